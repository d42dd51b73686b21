"""What rules for slots know of a model: how much each expert's output weighs, and how experts follow from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE
from ditmoe_cli.model.block_choices import Rule
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.progress import phase
from ditmoe_cli.scheduling.way_states import Visited, Way

_LEAST = 1e-12


@dataclass(frozen=True)
class Selections:
    """Selections of the tokens of one evaluation and branch in a block: routing weights p (T, k) and rows (T, k)."""

    weights: Tensor
    rows: Tensor

    @property
    def second_shares(self) -> Tensor:
        """p_2 / p_1 of each token (T,)."""
        return self.weights[:, 1] / self.weights[:, 0].clamp_min(_LEAST)


Place = tuple[int, int, int]
"""Bin, branch and block."""


@dataclass(frozen=True)
class WayStatistics:
    """Statistics over the measured evaluations, one in each bin.

    Attributes:
        arrays: `energy` (B, 2, L, R), `scale` and `constant` (L, R, D), as `compute_schedule` describes them.
        selections: by bin, branch and block.
    """

    arrays: Mapping[str, Tensor]
    selections: Mapping[Place, Selections]

    def median(self, rule: Rule, block: int) -> float:
        """Return the median over all tokens of a block of what a rule compares: p_2 / p_1 of `odp`, or saliencies."""
        places = [place for place in self.selections if place[2] == block]
        compared = [self.selections[p].second_shares if rule == "odp" else self.saliencies(p) for p in places]
        return float(torch.cat(compared).median())

    def saliencies(self, place: Place) -> Tensor:
        """Return p_2² E‖γ ⊙ f‖² of all tokens (T,) in a bin, branch and block."""
        chosen = self.selections[place]
        return chosen.weights[:, 1].square() * self.arrays[ENERGY][place][chosen.rows[:, 1]]


@dataclass
class _Sums:
    """Sums of a block over tokens: of energies by bin, branch and row, and of the regression by row."""

    energy: Tensor
    count: Tensor
    moments: Tensor
    seen: dict[tuple[int, int], Selections] = field(default_factory=dict)


def way_statistics(
    way: Way, seen: Visited, indices: Sequence[int], measured: Sequence[int], energies: Tensor | None = None
) -> WayStatistics:
    """Return the statistics at the `measured` evaluations, one in each bin, for the images `indices`.

    `energies` (B, 2, L, R) that are known stand in place of those of the images.

    The regression of row r is that of f_r on f_1, by channel, over tokens that chose r behind their first expert,
    weighted with p_r²: s = Cov(f_1, f_r) / Var(f_1), c = E f_r - s E f_1. Rows that no token chose so have s = c = 0.
    An energy that no token tells is the mean of its block.
    """
    model, config = way.model, way.model.config
    rows, width, branches = max(b.router_rows for b in config.blocks), config.hidden_size, 2 if way.sampling.null else 1
    sums = [
        _Sums(
            torch.zeros(len(measured), 2, rows, dtype=torch.float64),
            torch.zeros(len(measured), 2, rows, dtype=torch.float64),
            torch.zeros(5, rows, width, dtype=torch.float64),
        )
        for _ in config.blocks
    ]
    labels = way.labels(indices)
    null = torch.full_like(labels, config.num_classes)
    with torch.inference_mode(), phase("what experts add", len(measured), "steps") as progress:
        for place, evaluation in enumerate(measured):
            t, x = way.sampling.times[evaluation], seen.states[evaluation][: len(indices)]
            for branch in range(branches):

                def watch(event: MoEEvent, place: int = place, branch: int = branch) -> None:
                    _add(sums[event.block], event, place, branch)

                model.prepared([t], null if branch else labels)(x, t, watch)
            progress(1)
    energy = torch.stack([_energies(each) for each in sums], dim=2).float() if energies is None else energies
    pairs = [_regression(each.moments) for each in sums]
    arrays = {
        ENERGY: energy,
        SCALE: torch.stack([scale for scale, _ in pairs]).float(),
        CONSTANT: torch.stack([constant for _, constant in pairs]).float(),
    }
    selections = {
        (place, branch, block): chosen
        for block, each in enumerate(sums)
        for (place, branch), chosen in each.seen.items()
    }
    on_device = {name: array.to(model.device) for name, array in arrays.items()}
    return WayStatistics(on_device, selections)


def _add(sums: _Sums, event: MoEEvent, place: int, branch: int) -> None:
    routing, f = event.routing, event.outputs.float()
    tokens = len(f) // len(event.gamma)
    gamma = event.gamma.float().repeat_interleave(tokens, dim=0)
    energies = (f * gamma[:, None]).square().sum(dim=2).double().cpu()
    rows, p = routing.rows.cpu(), routing.weights.double().cpu()
    sums.energy[place, branch].index_add_(0, rows.reshape(-1), energies.reshape(-1))
    sums.count[place, branch].index_add_(0, rows.reshape(-1), torch.ones_like(energies).reshape(-1))
    first = f[:, 0].double().cpu()
    for slot in range(1, f.shape[1]):
        other, weight = f[:, slot].double().cpu(), p[:, slot : slot + 1].square()
        values = (torch.ones_like(first), first, other, first.square(), first * other)
        for total, value in zip(sums.moments, values, strict=True):
            total.index_add_(0, rows[:, slot], weight * value)
    if f.shape[1] > 1:
        sums.seen[place, branch] = Selections(routing.weights.float(), routing.rows)


def _energies(sums: _Sums) -> Tensor:
    """Return the mean energies (B, 2, R); the mean of the block where there is no token."""
    mean = sums.energy.sum() / sums.count.sum().clamp_min(1)
    return torch.where(sums.count > 0, sums.energy / sums.count.clamp_min(1), mean)


def _regression(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return s and c (R, D) from the sums of weights, f_1, f_r, f_1² and f_1 f_r, (5, R, D)."""
    weight = moments[0].clamp_min(_LEAST)
    first, other, square, product = (each / weight for each in moments[1:])
    variance = square - first.square()
    scale = torch.where(variance > _LEAST, (product - first * other) / variance.clamp_min(_LEAST), 0.0)
    chosen = moments[0] > _LEAST
    return torch.where(chosen, scale, 0.0), torch.where(chosen, other - scale * first, 0.0)
