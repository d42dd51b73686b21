"""Predictions without a part of a block, on the states of a checkpoint's own sampling.

A block that leaves something out reads what the blocks before it make of a state, which is the same whatever it leaves
out: so these run once, and behind each block only those after it run for its parts, which are predicted side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditmoe_cli.diffusion.guidance import combine
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, check_followable, sample_batch
from ditmoe_cli.diffusion.schedule import evaluation_times
from ditmoe_cli.diffusion.step_bins import step_bin, steps_of_bins
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.worker import Runtime
from ditmoe_cli.model.block_choices import BlockChoice, parse_choice
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conditions import Conditions, conditions
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import Attended, Block, DiTMoE, gated_sum
from ditmoe_cli.model.dtypes import torch_dtype_of
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.partial_mixtures import mixed_in_part
from ditmoe_cli.progress import Phase, phase
from ditmoe_cli.routing.collect.collector import PURPOSE
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

_GOLDEN = (5**0.5 - 1) / 2  # φ

Sums = NDArray[np.float64]


def measured_map(
    checkpoint: Checkpoint, spec: SampleSpec, bins: int, parts: Sequence[str], runtime: Runtime
) -> SensitivityMap:
    """Return the map of `parts` over states of the images of `spec`, whose noise is that of calibrations.

    Each image is measured once in each bin, at the step that `turn_of` names. Raises `UsageError` for steps that cannot
    be followed, and `BadInputError` where predictions are not finite, or are 0.
    """
    check_followable(spec)
    model = build_model(checkpoint, torch.device(runtime.device), torch_dtype_of(spec.dtype)).prepack()
    depth = checkpoint.config.depth
    errors, squares = np.zeros((len(parts), bins, depth)), np.zeros(bins)
    total = spec.images * bins * depth * len(parts)
    with phase(f"leaving out parts of {checkpoint.name}", total, "predictions") as progress:
        for indices in batches(spec.images, runtime.batch):
            of_batch = _Batch(model, spec, bins, parts, indices, progress)
            sample_batch(model, spec, indices, Watchers(on_step=of_batch.measure), PURPOSE)
            errors += of_batch.errors
            squares += of_batch.squares
    if not np.isfinite(errors).all() or ((squares == 0) & (errors > 0).any(axis=(0, 2))).any():
        raise BadInputError(_told_broken(parts, errors, spec))
    relative = np.divide(errors, squares[:, None], out=np.zeros_like(errors), where=squares[:, None] > 0)
    times = evaluation_times(spec.solver, spec.steps)
    config = checkpoint.config
    return SensitivityMap(
        checkpoint.fingerprint,
        {**spec.conditions(), "nfe": spec.nfe},
        tuple(float(times[steps[0]]) for steps in steps_of_bins(spec.steps, bins)),
        tuple((squares / (spec.images * config.in_channels * config.input_size**2)).tolist()),
        {part: tuple(tuple(row) for row in relative[p].tolist()) for p, part in enumerate(parts)},
    )


def turn_of(image: int, steps: int) -> int:
    """Return at which of a bin's steps an image is measured: ⌊S frac(i φ)⌋, which spreads few images evenly over S."""
    return int(image * _GOLDEN % 1.0 * steps)


def _told_broken(parts: Sequence[str], errors: Sums, spec: SampleSpec) -> str:
    broken = np.argwhere(~np.isfinite(errors))
    if not len(broken):
        return "predictions are 0 in a bin of steps, so that no error is relative to them; is the final layer trained?"
    part, _, block = broken[0]
    again = "; give ⟨dtype⟩ fp32" if spec.dtype != "fp32" else "; are its weights whole?"
    return f"without its {PARTS[parts[part]]}, block {block} leads to NaN or infinite predictions{again}"


class _Batch:
    """One batch of images while they are sampled.

    Attributes:
        errors: (parts, B, L) Σ‖v - v'‖² so far.
        squares: (B,) Σ‖v‖².
    """

    def __init__(
        self,
        model: DiTMoE,
        spec: SampleSpec,
        bins: int,
        parts: Sequence[str],
        indices: Sequence[int],
        progress: Phase,
    ) -> None:
        self._model, self._spec, self._bins, self._indices = model, spec, bins, indices
        self._choices = [parse_choice(part) for part in parts]
        self._progress = progress
        self._step = 0
        self.errors, self.squares = np.zeros((len(parts), bins, model.config.depth)), np.zeros(bins)

    @cached_property
    def _conditions(self) -> Conditions:
        """The conditions of the branches, the conditional one first."""
        spec, model = self._spec, self._model
        labels = torch.tensor(spec.labels(self._indices), device=model.device)
        if spec.cfg != 1.0:
            labels = torch.cat((labels, torch.full_like(labels, model.config.num_classes)))
        times = list(dict.fromkeys(evaluation_times(spec.solver, spec.steps)))
        return conditions(times, labels, model.condition, model.config)

    def measure(self, x: Tensor, t: float) -> None:
        """Add the errors at a state x (N, C, H, W) of the next step, at time t, of the images whose turn it is."""
        bin_ = step_bin(self._step, self._spec.steps, self._bins)
        steps = steps_of_bins(self._spec.steps, self._bins)[bin_]
        turn = self._step - steps[0]
        self._step += 1
        images = [row for row, index in enumerate(self._indices) if turn_of(index, len(steps)) == turn]
        if not images:
            return
        rows = torch.tensor(images, device=x.device)
        branches = 1 if self._spec.cfg == 1.0 else 2
        places = torch.cat([rows + branch * len(x) for branch in range(branches)])
        modulations = [
            self._conditions.at(f"blocks.{index}", block.adaLN_modulation, t)[places]
            for index, block in enumerate(_blocks(self._model))
        ]
        final = self._conditions.at("final", self._model.final_layer.adaLN_modulation, t)[places]
        errors, squares = left_out_errors(
            self._model, self._spec, self._choices, x[rows].repeat(branches, 1, 1, 1), modulations, final
        )
        self.errors[:, bin_] += errors
        self.squares[bin_] += squares
        self._progress(len(images) * errors.size)


def left_out_errors(
    model: DiTMoE,
    spec: SampleSpec,
    choices: Sequence[BlockChoice],
    x: Tensor,
    modulations: Sequence[Tensor],
    final: Tensor,
) -> tuple[Sums, float]:
    """Return Σ‖v - v'‖² (choices, L) and Σ‖v‖² at states x (B N, C, H, W), one for each branch, the conditional first.

    `modulations` (B N, 6 D) are those of the blocks, `final` (B N, 2 D) that of the final layer.
    """
    blocks, channels = _blocks(model), x.shape[1]
    changed: list[Tensor] = []
    tokens = model.patches(x)
    for index, (block, modulation) in enumerate(zip(blocks, modulations, strict=True)):
        attended = block.attend_modulated(tokens, modulation)
        left = [c for c in choices if not has_nothing_left_out(c, model.config, index)]
        if left:
            out = torch.cat([block_output(block, choice, tokens, modulation, attended) for choice in left])
            for later in range(index + 1, len(blocks)):
                again = modulations[later].repeat(len(left), 1)
                out = blocks[later].mix(blocks[later].attend_modulated(out, again), later, None)
            predicted = model.unpatched(out, final.repeat(len(left), 1)).float()
            changed += [guided(part, spec)[:, :channels] for part in predicted.chunk(len(left))]
        tokens = block.mix(attended, index, None)
    whole = guided(model.unpatched(tokens, final).float(), spec)[:, :channels]
    found = iter([(part - whole).double().square().sum() for part in changed])
    errors = np.zeros((len(choices), len(blocks)))
    for index in range(len(blocks)):
        for place, choice in enumerate(choices):
            if not has_nothing_left_out(choice, model.config, index):
                errors[place, index] = float(next(found))
    return errors, float(whole.double().square().sum())


def has_nothing_left_out(choice: BlockChoice, config: DiTMoEConfig, block: int) -> bool:
    """Return whether a choice computes all that a block has: `top1` of one slot, or no shared expert to leave out."""
    one_slot = choice.slots is None or (choice.slots.rule == "top1" and config.top_k == 1)
    all_shared = choice.shared or config.blocks[block].shared_width == 0
    return choice.attention == choice.mixture == "compute" and one_slot and all_shared


def block_output(block: Block, choice: BlockChoice, x: Tensor, modulation: Tensor, attended: Attended) -> Tensor:
    """Return what a block makes of x (N, tokens, D) by a choice that takes nothing from before.

    `attended` is the block's state after its attention on x.
    """
    if choice.attention == "skip":
        if choice.mixture == "skip":
            return x
        attended = block.attended_by(x, modulation, None)
    if choice.mixture == "skip":
        return attended.residual
    u = attended.inputs
    mixed = mixed_in_part(block.moe, u.reshape(-1, u.shape[-1]), choice.slots, shared=choice.shared)
    return gated_sum(attended.residual, attended.gamma, mixed.output.reshape(u.shape))


def guided(output: Tensor, spec: SampleSpec) -> Tensor:
    """Return the guided prediction from the output (B N, C, H, W) of one branch or both, the conditional first."""
    if spec.cfg == 1.0:
        return output
    cond, uncond = output.chunk(2)
    return combine(cond, uncond, spec.cfg, spec.family)


def _blocks(model: DiTMoE) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]
