"""How far a model's guided predictions are from its teacher's: what is trained on, and what judges.

The error of a state is ‖s v_c - (s - 1) v_u - v_T‖², v_c and v_u being the branches of the model and v_T the teacher's
guided prediction, summed over what is predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.training.error_bins import BINS
from ditmoe_cli.compression.training.exchange import ALONE, Exchange
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.teacher_states import TeacherStates, guided_prediction
from ditmoe_cli.diffusion.schedule import TRAINING_STEPS
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import DiTMoE

_TINY = 1e-30


def state_errors(model: DiTMoE, states: TeacherStates) -> Tensor:
    """Return the squared error of each state (N,), on the model's device; with gradients where they are recorded."""
    on = states.on(model.device)
    return (guided_prediction(model, on.z, on.t, on.labels, on.cfg) - on.targets).square().flatten(1).sum(dim=1)


def bins_of(t: Tensor, family: Sampler) -> Tensor:
    """Return the bin of each time (N,), 0 to `BINS` - 1: even parts of all times, from noise to image."""
    past = (1.0 - t.double()) * BINS if family == "rf" else (TRAINING_STEPS - 1 - t.double()) * BINS / TRAINING_STEPS
    return past.long().clamp(0, BINS - 1)


@dataclass(frozen=True)
class JudgedErrors:
    """Errors on states that nothing is trained on, by step bin.

    Attributes:
        errors: Σ of squared errors in each bin, from noise to image.
        references: Σ ‖v_T‖² in each bin.
        counts: states in each bin.
    """

    errors: tuple[float, ...]
    references: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def error(self) -> float:
        """The relative squared error over all states."""
        return sum(self.errors) / max(sum(self.references), _TINY)

    @property
    def by_bin(self) -> tuple[float, ...]:
        """The relative squared error of each bin."""
        return tuple(e / max(r, _TINY) for e, r in zip(self.errors, self.references, strict=True))


def judged_errors(
    model: DiTMoE, states: TeacherStates, batch: FittingBatches, exchange: Exchange = ALONE
) -> JudgedErrors:
    """Return a model's errors on states, in batches; each process computes those of its share."""
    mine = exchange.own(torch.arange(len(states)))
    with torch.inference_mode():
        found = batch.computed(lambda rows: state_errors(model, states.at(mine[rows.start : rows.stop])), len(mine))
        own = [errors for _, errors in found]
    gathered = exchange.gathered(own, len(states))
    references = states.targets.square().flatten(1).sum(dim=1)
    return exchange.agreed(by_bin(gathered, references, bins_of(states.t, model.config.sampler)))


def by_bin(errors: Tensor, references: Tensor, bins: Tensor) -> JudgedErrors:
    """Return squared errors and references of states (N,), summed over their bins (N,)."""
    bins = bins.cpu()
    sums = (torch.zeros(BINS).double().index_add_(0, bins, part.double().cpu()) for part in (errors, references))
    total, reference = (tuple(part.tolist()) for part in sums)
    return JudgedErrors(total, reference, tuple(torch.bincount(bins, minlength=BINS).tolist()))


def bin_weights(judged: JudgedErrors, strength: float) -> Tensor:
    """Return the weight of squared errors in each bin (B,), of mean 1.

    It is e_b^-a with a = `strength`, e_b being the mean error of a state of the bin before training: with 0 all errors
    count alike, with 1 all bins do.
    """
    means = torch.tensor([e / max(n, 1) for e, n in zip(judged.errors, judged.counts, strict=True)])
    seen = torch.tensor(judged.counts) > 0
    floor = float(means[seen].mean()) * 1e-3 + _TINY
    weights = torch.where(seen, means.clamp_min(floor).pow(-strength), torch.ones(()))
    weights[~seen] = weights[seen].mean()
    return weights / weights.mean()
