"""Errors of choices, one block and one evaluation at a time, replayed on the states of a model's own way.

For evaluation k, block l and a choice, the block computes what the choice says and all later blocks compute in full.
With v_c and v_u the branches of the prediction and s the guidance scale, the error is E‖s Δv_c‖² for the conditional
branch and E‖(s - 1) Δv_u‖² for the null one: what the guided prediction is off where that branch alone is; a weaker
model of scale W that guides makes it s + W. Channels that are not guided are those of the conditional branch. Outputs
from before are those of the same images at earlier evaluations of the way.

Blocks are gone through in order. Of the 16 evaluations that a choice may take from, the streams are kept, and of the
block at hand the outputs: some 80 N P D values, N being images of all branches, P tokens and D the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, ScheduledSampling
from ditmoe_cli.diffusion.guidance import guided_channels
from ditmoe_cli.model.block_choices import BlockChoice
from ditmoe_cli.model.conditions import conditions
from ditmoe_cli.model.dit import Attended, Block, gated_sum
from ditmoe_cli.model.partial_mixtures import (
    SlotOutputs,
    SlotStatistics,
    mixed_from_before,
    mixed_in_part,
    protected_tokens,
)
from ditmoe_cli.model.scheduled import extrapolated
from ditmoe_cli.scheduling.patterns import LONG_PERIODS, MOST_ROWS, PERIODS, Probe
from ditmoe_cli.scheduling.way_states import Visited, Way
from ditmoe_cli.scheduling.way_statistics import WayStatistics


@dataclass(frozen=True)
class Replayed:
    """What a probe costs: the mean squared error of the guided prediction an image, and the slots that are computed.

    `slots` is the mean number of slots that a token computes in its experts.
    """

    error: float
    slots: float


@dataclass(frozen=True)
class Replays:
    """What was replayed in one evaluation.

    Attributes:
        cells: by branch and block, and by probe.
        joint: what all blocks do alike, by branch, and by probe.
        null_reused: E‖(s - 1) (d - d')‖² with d = v_c - v_u, and d' that of so many evaluations before; by age.
        null_off: E‖(s - 1) d‖².
    """

    cells: Mapping[tuple[int, int], Mapping[Probe, Replayed]]
    joint: Sequence[Mapping[Probe, Replayed]]
    null_reused: Mapping[int, float]
    null_off: float


Asked = Mapping[tuple[int, int], Sequence[Probe]]
"""The probes of a branch and block; their choices may have thresholds of their own."""


@dataclass(frozen=True)
class _Moment:
    """One evaluation with all rows that are replayed: its time, and modulations by name."""

    t: float
    modulations: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Computed:
    """What a block computed in one evaluation: its outputs (rows, P, D), and its mixture's inputs."""

    attention: Tensor
    mixture: Tensor
    attended: Attended


def earlier(evaluation: int) -> range:
    """Return the evaluations that a choice in one may take from, and that one itself."""
    return range(max(0, evaluation - max(2 * max(PERIODS), max(LONG_PERIODS)) + 1), evaluation + 1)


def replayed(
    way: Way,
    seen: Visited,
    indices: Sequence[int],
    evaluation: int,
    place: int,
    asked: Asked,
    joint: Sequence[Probe],
    known: WayStatistics,
) -> Replays:
    """Return the errors of probes in one evaluation, which is that of bin `place`, on the images `indices`.

    Those `asked` are for one block each, `joint` ones for all blocks together.
    """
    with torch.inference_mode():
        return _Replay(way, seen, indices, evaluation, place, known).run(asked, joint)


class _Replay:
    """The replay of one evaluation."""

    def __init__(
        self, way: Way, seen: Visited, indices: Sequence[int], evaluation: int, place: int, known: WayStatistics
    ) -> None:
        self._way, self._known, self._place = way, known, place
        self._model, self._count = way.model, len(indices)
        self._scales = branch_scales(way.sampling, evaluation)
        self._branches = tuple(range(len(self._scales)))
        labels = way.labels(indices)
        null = torch.full_like(labels, way.model.config.num_classes)
        self._labels = torch.cat((labels, null)[: len(self._scales)])
        window = earlier(evaluation)
        self._moments = [self._moment(way.sampling.times[k]) for k in window]
        self._streams = [self._patches(seen.states[k][: self._count]) for k in window]

    def _moment(self, t: float) -> _Moment:
        model = self._model
        run = conditions([t], self._labels, model.condition, model.config)
        named = [(f"blocks.{i}", block.adaLN_modulation) for i, block in enumerate(self._blocks)]
        named.append(("final", model.final_layer.adaLN_modulation))
        return _Moment(t, {name: run.at(name, modulate, t) for name, modulate in named})

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self._model.blocks if isinstance(block, Block)]

    def _patches(self, x: Tensor) -> Tensor:
        return self._model.patches(torch.cat([x] * len(self._scales)))

    def run(self, asked: Asked, joint: Sequence[Probe]) -> Replays:
        """Return the errors of all probes, block after block."""
        found: dict[tuple[int, int], dict[Probe, Replayed]] = {}
        whole = self._whole()
        together = {
            (branch, probe): self._streams[-1][self._rows_of(branch)] for branch in self._branches for probe in joint
        }
        for index, block in enumerate(self._blocks):
            before = list(self._streams)
            together_at_most = max(1, MOST_ROWS // len(before[0]))
            computed = [
                each
                for start in range(0, len(before), together_at_most)
                for each in self._computed(block, index, range(len(before))[start : start + together_at_most])
            ]
            for branch in self._branches:
                found[branch, index] = {}
            probes = [(branch, probe) for branch in self._branches for probe in asked.get((branch, index), ())]
            parts = max(1, MOST_ROWS // self._count)
            for start in range(0, len(probes), parts):
                for (branch, probe), result in zip(
                    probes[start : start + parts],
                    self._errors(index, probes[start : start + parts], before[-1], computed, whole),
                    strict=True,
                ):
                    found[branch, index][probe] = result
            for (branch, probe), stream in together.items():
                together[branch, probe], _ = self._probed(index, branch, probe, stream, computed, own=False)
            self._streams = [gated_sum(each.attended.residual, each.attended.gamma, each.mixture) for each in computed]
        return Replays(found, self._joint(together, joint, whole), *self._null())

    def _joint(
        self, together: Mapping[tuple[int, Probe], Tensor], joint: Sequence[Probe], whole: Tensor
    ) -> list[dict[Probe, Replayed]]:
        """Return the errors of what all blocks did alike, by branch."""
        found: list[dict[Probe, Replayed]] = [{} for _ in self._branches]
        for branch, probe in ((branch, probe) for branch in self._branches for probe in joint):
            rows = self._rows_of(branch)
            output = self._behind(len(self._blocks), together[branch, probe], rows)
            found[branch][probe] = Replayed(self._off(branch, output, whole[rows]), 0.0)
        return found

    def _off(self, branch: int, output: Tensor, whole: Tensor) -> float:
        """Return the error of the outputs of a branch."""
        return self._error(branch, (output - whole)[:, : self._model.config.in_channels])

    def _error(self, branch: int, off: Tensor) -> float:
        """Return the error of the guided prediction where the channels of a branch are off."""
        guided = guided_channels(off.shape[1], self._way.sampling.guidance.family)
        beside = 1.0 if branch == 0 else 0.0
        return self._scales[branch] ** 2 * _mean_square(off[:, :guided]) + beside * _mean_square(off[:, guided:])

    def _null(self) -> tuple[dict[int, float], float]:
        """Return the errors of reusing the null class by age, and that of leaving it out; none without guidance."""
        if len(self._scales) == 1:
            return {}, 0.0
        outputs = [
            self._model.unpatched(stream, moment.modulations["final"]).float()[:, : self._model.config.in_channels]
            for stream, moment in zip(self._streams, self._moments, strict=True)
        ]
        apart = [cond - uncond for cond, uncond in (output.chunk(2) for output in outputs)]
        reused = {age: self._error(1, apart[-1] - apart[-1 - age]) for age in range(1, len(apart))}
        return reused, self._error(1, apart[-1])

    def _whole(self) -> Tensor:
        """Return the prediction of the evaluation, (rows, C', H, W)."""
        return self._behind(0, self._streams[-1], slice(None))

    def _behind(self, index: int, tokens: Tensor, rows: slice | Tensor) -> Tensor:
        """Return the prediction from the inputs of block `index`, of some of the rows."""
        moment = self._moments[-1]
        for later, block in list(enumerate(self._blocks))[index:]:
            attended = block.attend_modulated(tokens, moment.modulations[f"blocks.{later}"][rows])
            tokens = block.mix(attended, later, None)
        return self._model.unpatched(tokens, moment.modulations["final"][rows]).float()

    def _computed(self, block: Block, index: int, evaluations: range) -> list[_Computed]:
        """Return what a block computes in some evaluations, all of which pass it together."""
        x = torch.cat([self._streams[k] for k in evaluations])
        modulation = torch.cat([self._moments[k].modulations[f"blocks.{index}"] for k in evaluations])
        attention: Tensor = block.attn(block.attention_inputs(x, modulation))
        whole = block.attended_by(x, modulation, attention)
        mixture = block.moe(whole.inputs, index, whole.gamma, None, whole.residual)
        parts = (
            each.chunk(len(evaluations)) for each in (attention, mixture, whole.residual, whole.inputs, whole.gamma)
        )
        return [_Computed(a, m, Attended(*attended)) for a, m, *attended in zip(*parts, strict=True)]

    def _errors(
        self,
        index: int,
        probes: Sequence[tuple[int, Probe]],
        x: Tensor,
        computed: Sequence[_Computed],
        whole: Tensor,
    ) -> list[Replayed]:
        """Return the errors of some probes of a block, all of which pass the later blocks together."""
        outs, slots = [], []
        for branch, probe in probes:
            out, count = self._probed(index, branch, probe, x[self._rows_of(branch)], computed)
            outs.append(out)
            slots.append(count)
        rows = torch.cat([self._rows_of(branch) for branch, _ in probes])
        found = self._behind(index + 1, torch.cat(outs), rows)
        parts = zip(found.chunk(len(probes)), whole[rows].chunk(len(probes)), strict=True)
        return [
            Replayed(self._off(branch, mine, its), count)
            for (branch, _), (mine, its), count in zip(probes, parts, slots, strict=True)
        ]

    def _rows_of(self, branch: int) -> Tensor:
        return torch.arange(branch * self._count, (branch + 1) * self._count, device=self._model.device)

    def _probed(
        self, index: int, branch: int, probe: Probe, x: Tensor, computed: Sequence[_Computed], own: bool = True
    ) -> tuple[Tensor, float]:
        """Return the stream of a branch behind a block that does what a probe says with x, and its slots.

        Where x is not the model's `own` stream, since blocks before did not compute all, attention is computed on it.
        """
        block, rows = self._blocks[index], slice(branch * self._count, (branch + 1) * self._count)
        modulation = self._moments[-1].modulations[f"blocks.{index}"][rows]
        choice = probe.choice
        if choice.attention == "compute" and not own:
            attention: Tensor | None = block.attn(block.attention_inputs(x, modulation))
        else:
            attention = self._part("attention", choice.attention, probe, computed, rows)
        gate, gamma = block.gates(modulation)
        if choice.mixture not in ("compute", "reuse-slots"):
            x = x if attention is None else gated_sum(x, gate, attention)
            mixed = self._part("mixture", choice.mixture, probe, computed, rows)
            return (x if mixed is None else gated_sum(x, gamma, mixed)), 0.0
        attended = block.attended_by(x, modulation, attention)
        u = attended.inputs
        flat = u.reshape(-1, u.shape[-1])
        if choice.mixture == "reuse-slots":
            mixture = mixed_from_before(block.moe, flat, self._slots(block, computed, probe.age, rows))
        else:
            protected = self._protected(block, choice, x, modulation)
            known = self._statistics(index, branch)
            mixture = mixed_in_part(block.moe, flat, choice.slots, known, protected, choice.shared)
        out = gated_sum(attended.residual, attended.gamma, mixture.output.reshape(u.shape))
        return out, float(mixture.computed.sum()) / len(flat)

    def _part(self, name: str, part: str, probe: Probe, computed: Sequence[_Computed], rows: slice) -> Tensor | None:
        """Return what stands for attention or mixture; None where it is left out."""
        values = [each.attention if name == "attention" else each.mixture for each in computed]
        if part == "compute":
            return values[-1][rows]
        if part == "skip":
            return None
        last = len(values) - 1 - probe.age
        before = last - probe.spacing
        kept = [values[last][rows]] if part == "reuse" or before < 0 else [values[before][rows], values[last][rows]]
        times = [self._moments[last].t] if len(kept) == 1 else [self._moments[before].t, self._moments[last].t]
        return extrapolated(kept, times, self._moments[-1].t)

    def _slots(self, block: Block, computed: Sequence[_Computed], age: int, rows: slice) -> SlotOutputs:
        """Return the outputs of slots of an earlier evaluation, computed anew."""
        u = computed[len(computed) - 1 - age].attended.inputs[rows]
        kept = mixed_in_part(block.moe, u.reshape(-1, u.shape[-1]), keep=True).kept
        assert kept is not None
        return kept

    def _protected(self, block: Block, choice: BlockChoice, x: Tensor, modulation: Tensor) -> Tensor | None:
        if choice.slots is None or choice.slots.rule != "odp":
            return None
        return protected_tokens(block.attn.attended_to(block.attention_inputs(x, modulation))).reshape(-1)

    def _statistics(self, index: int, branch: int) -> SlotStatistics:
        arrays = self._known.arrays
        energy = arrays[ENERGY][self._place, branch, index]
        return SlotStatistics(energy, arrays[SCALE][index], arrays[CONSTANT][index])


def _mean_square(off: Tensor) -> float:
    """Return the mean over images of Σ off² of each."""
    return float(off.square().flatten(1).sum(dim=1).double().mean())


def branch_scales(sampling: ScheduledSampling, evaluation: int) -> tuple[float, ...]:
    """Return by what an error of each branch counts in the guided prediction: s + W and s - 1.

    s is 1 where the null class does not guide, and W 0 where a weaker model does not.
    """
    guide = sampling.guide
    weak = guide.scale if guide is not None and sampling.guidance.takes_weak(sampling.times[evaluation]) else 0.0
    if not sampling.null or sampling.null[evaluation] != "compute":
        return (1.0 + weak,)
    return (sampling.cfg + weak, abs(sampling.cfg - 1.0))
