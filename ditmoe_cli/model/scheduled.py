"""A model whose blocks compute what a table says, evaluation after evaluation, with what later ones take from before.

    attention   x ← x + gate ⊙ a,   a = attn(x) | a' | a' + (a' - a'') (t - t') / (t' - t'') | 0
    mixture     x ← x + γ ⊙ m,      m likewise

a' and a'' are what was computed last and before that, at times t' and t''; gate and γ are those of today. A forecast
with one earlier output alone is that output (https://arxiv.org/abs/2503.06923, of first order).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ditmoe_cli.model.block_choices import BlockChoice, ComputeTable
from ditmoe_cli.model.compute_cost import attended_to_cost, attention_cost, fixed_cost, shared_cost, unrouted_cost
from ditmoe_cli.model.dit import Attended, Block, DiTMoE, ModulationOf, gated_sum
from ditmoe_cli.model.partial_mixtures import (
    SlotOutputs,
    SlotStatistics,
    mixed_from_before,
    mixed_in_part,
    protected_tokens,
)

Statistics = Callable[[int, int, int], SlotStatistics]
"""Takes evaluation, branch and block, and returns what rules for slots know there."""


Routed = Callable[[int, Sequence[int], Tensor], None]
"""Takes a block, the branches that it routed, and the router rows (T, k) that their tokens selected."""


def no_statistics(evaluation: int, branch: int, block: int) -> SlotStatistics:
    """Return that nothing is known, for tables whose rules need nothing."""
    del evaluation, branch, block
    return SlotStatistics()


@dataclass(frozen=True)
class _Kept:
    """An output (N, tokens, D) of an evaluation at time `t`, and the last evaluation that takes it."""

    t: float
    output: Tensor
    last: int


@dataclass
class _Shelf:
    """What is kept of one block in one branch: the last two outputs of attention and mixture, and slots."""

    attention: list[_Kept] = field(default_factory=list)
    mixture: list[_Kept] = field(default_factory=list)
    slots: SlotOutputs | None = None
    slots_last: int = -1

    def forget(self, evaluation: int) -> None:
        """Let go of what no later evaluation takes."""
        self.attention = [kept for kept in self.attention if kept.last > evaluation]
        self.mixture = [kept for kept in self.mixture if kept.last > evaluation]
        if self.slots_last <= evaluation:
            self.slots = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        tensors = [kept.output for kept in (*self.attention, *self.mixture)]
        if self.slots is not None:
            tensors += [self.slots.rows, self.slots.outputs, self.slots.shared]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _takes(part: str) -> int:
    """Return how many earlier outputs a part takes."""
    return {"reuse": 1, "forecast": 2}.get(part, 0)


@dataclass(frozen=True)
class Lifetimes:
    """The last evaluation that takes an output, by the evaluation that computed it; -1 for none, of one block."""

    attention: Mapping[int, int]
    mixture: Mapping[int, int]
    slots: Mapping[int, int]


def lifetimes(table: ComputeTable, branch: int, block: int) -> Lifetimes:
    """Return how long the outputs of a block are kept."""
    lasts: dict[str, dict[int, int]] = {"attention": {}, "mixture": {}, "slots": {}}
    made: dict[str, list[int]] = {"attention": [], "mixture": [], "slots": []}
    for evaluation in range(table.evaluations):
        if branch == 1 and not table.computes_null(evaluation):
            continue
        choice = table.at(evaluation, branch, block)
        for name, part in (("attention", choice.attention), ("mixture", choice.mixture)):
            for source in made[name][-_takes(part) :] if _takes(part) else ():
                lasts[name][source] = evaluation
        if choice.mixture == "reuse-slots":
            lasts["slots"][made["slots"][-1]] = evaluation
        made["attention"] += [evaluation] if choice.attention == "compute" else []
        if choice.mixture in ("compute", "reuse-slots"):
            made["mixture"].append(evaluation)
            made["slots"] += [evaluation] if choice.slots is None and choice.shared else []
    return Lifetimes(lasts["attention"], lasts["mixture"], lasts["slots"])


@dataclass
class ComputeCount:
    """What a run computed for a batch: operations, all branches together, and the most bytes that it kept at a time."""

    flops: float = 0.0
    most_kept: int = 0
    _slots: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add_slots(self, counts: Tensor, costs: Tensor) -> None:
        """Count slots (E,) of experts of these costs (E,); they are summed when the total is asked for."""
        self._slots.append((counts, costs))

    @property
    def total(self) -> float:
        """All operations."""
        routed = sum(float((counts.double().cpu() * costs).sum()) for counts, costs in self._slots)
        return self.flops + routed


class ScheduledRun:
    """One batch of images, evaluated once after the other as a table says.

    Attributes:
        count: what was computed so far.
        evaluation: the number of the next evaluation.
        kept_beside: bytes that others keep for later evaluations, which are counted with these.
    """

    def __init__(
        self,
        model: DiTMoE,
        table: ComputeTable,
        statistics: Statistics = no_statistics,
        routed: Routed | None = None,
    ) -> None:
        """Begin; `routed` is told what blocks route, unless later ones are reused by residuals."""
        self._model, self._table, self._statistics, self._routed = model, table, statistics, routed
        self._blocks = [block for block in model.blocks if isinstance(block, Block)]
        pairs = [(branch, block) for branch in range(table.branches) for block in range(len(self._blocks))]
        self._lifetimes = {(branch, block): lifetimes(table, branch, block) for branch, block in pairs}
        self._shelves = {pair: _Shelf() for pair in pairs}
        width = model.config.hidden_size
        self._expert_costs = [
            torch.tensor([6.0 * width * inner for inner in block.expert_widths], dtype=torch.float64)
            for block in model.config.blocks
        ]
        self._first: dict[int, _First] = {}
        self.count, self.evaluation, self.kept_beside = ComputeCount(), 0, 0

    def predict(self, x: Tensor, t: float, modulation_of: ModulationOf, branches: Sequence[int]) -> Tensor:
        """Return the prediction for x (B N, C, H, W), N images of each of B branches, at time t, and go on to the next.

        Raises `IndexError` behind the last evaluation of the table.
        """
        if self.evaluation >= self._table.evaluations:
            raise IndexError(f"the table ends after {self._table.evaluations} evaluations")
        model = self._model
        tokens = model.patches(x)
        if self._table.residual is None:
            for index, block in enumerate(self._blocks):
                modulation = modulation_of(f"blocks.{index}", block.adaLN_modulation)
                tokens = self.block(index, tokens, modulation, t, branches)
        else:
            tokens = self._by_residual(tokens, modulation_of, self._table.residual, branches)
        self.finish(len(x))
        return model.unpatched(tokens, modulation_of("final", model.final_layer.adaLN_modulation))

    def finish(self, rows: int) -> None:
        """Count an evaluation of that many rows, let go of what no later one takes, and go on to the next.

        Rows are 0 where the model was not asked.
        """
        self.count.flops += rows * fixed_cost(self._model.config)
        kept = sum(shelf.nbytes for shelf in self._shelves.values()) + sum(f.nbytes for f in self._first.values())
        self.count.most_kept = max(self.count.most_kept, kept + self.kept_beside)
        for shelf in self._shelves.values():
            shelf.forget(self.evaluation)
        self.evaluation += 1

    # -------------------------------------------------------------- one block

    def block(self, index: int, x: Tensor, modulation: Tensor, t: float, branches: Sequence[int]) -> Tensor:
        """Return what a block makes of x (B N, tokens, D) in this evaluation; branches of one choice are one batch.

        Of an evaluation, each block is asked once, and `finish` ends it.
        """
        choices = [_effective(self._table.at(self.evaluation, branch, index)) for branch in branches]
        statistics = [self._statistics(self.evaluation, branch, index) for branch in branches]
        rule = choices[0].slots
        alike = all(choice == choices[0] for choice in choices) and (
            rule is None or rule.rule != "saliency" or all(each is statistics[0] for each in statistics)
        )
        if alike:
            return self._chosen(index, choices[0], x, modulation, t, branches, statistics[0])
        size = len(x) // len(branches)
        parts = []
        for place, branch in enumerate(branches):
            rows = slice(place * size, (place + 1) * size)
            known = statistics[place]
            parts.append(self._chosen(index, choices[place], x[rows], modulation[rows], t, (branch,), known))
        return torch.cat(parts)

    def _chosen(
        self,
        index: int,
        choice: BlockChoice,
        x: Tensor,
        modulation: Tensor,
        t: float,
        branches: Sequence[int],
        statistics: SlotStatistics,
    ) -> Tensor:
        """Return what a block makes of x (B N, tokens, D) of the branches, all by one choice."""
        block = self._blocks[index]
        inputs = x
        attention = self._attention(index, choice, x, modulation, t, branches)
        if choice.mixture in ("compute", "reuse-slots"):
            attended = block.attended_by(x, modulation, attention)
            protected = self._protected(block, choice, inputs, modulation)
            mixed = self._mixture(index, choice, attended, t, branches, statistics, protected)
            return gated_sum(attended.residual, attended.gamma, mixed)
        gate, gamma = block.gates(modulation)
        x = x if attention is None else gated_sum(x, gate, attention)
        taken = self._taken(index, "mixture", choice.mixture, t, branches)
        return x if taken is None else gated_sum(x, gamma, taken)

    def _attention(
        self, index: int, choice: BlockChoice, x: Tensor, modulation: Tensor, t: float, branches: Sequence[int]
    ) -> Tensor | None:
        """Return the output of attention (B N, tokens, D), computed or from before; None where it is left out."""
        if choice.attention != "compute":
            return self._taken(index, "attention", choice.attention, t, branches)
        block = self._blocks[index]
        output: Tensor = block.attn(block.attention_inputs(x, modulation))
        self.count.flops += len(x) * attention_cost(self._model.config)
        lasts = [self._lifetimes[branch, index].attention.get(self.evaluation, -1) for branch in branches]
        self._keep([self._shelves[branch, index].attention for branch in branches], output, t, lasts)
        return output

    def _mixture(
        self,
        index: int,
        choice: BlockChoice,
        attended: Attended,
        t: float,
        branches: Sequence[int],
        statistics: SlotStatistics,
        protected: Tensor | None,
    ) -> Tensor:
        """Return the output of the mixture (B N, tokens, D), computed in whole or in part."""
        block, config = self._blocks[index], self._model.config
        u = attended.inputs
        flat = u.reshape(-1, u.shape[-1])
        keeps = [self._lifetimes[branch, index].slots.get(self.evaluation, -1) for branch in branches]
        if choice.mixture == "reuse-slots":
            mixed = mixed_from_before(block.moe, flat, self._slots_before(index, branches))
        else:
            keep = max(keeps) >= 0
            mixed = mixed_in_part(block.moe, flat, choice.slots, statistics, protected, choice.shared, keep)
            self.count.flops += len(flat) * (shared_cost(config, config.blocks[index]) if choice.shared else 0.0)
        self.count.flops += len(flat) * unrouted_cost(config, config.blocks[index])
        self.count.add_slots(mixed.computed, self._expert_costs[index])
        if self._routed is not None:
            self._routed(index, branches, mixed.rows)
        output = mixed.output.reshape(u.shape)
        shelves = [self._shelves[branch, index] for branch in branches]
        lasts = [self._lifetimes[branch, index].mixture.get(self.evaluation, -1) for branch in branches]
        self._keep([shelf.mixture for shelf in shelves], output, t, lasts)
        for place, shelf in enumerate(shelves):
            if keeps[place] >= 0 and mixed.kept is not None:
                part = _part(mixed.kept, place, len(branches))
                shelf.slots, shelf.slots_last = part if len(set(keeps)) == 1 else _apart(part), keeps[place]
        return output

    def _protected(self, block: Block, choice: BlockChoice, x: Tensor, modulation: Tensor) -> Tensor | None:
        """Return the tokens (T,) that a rule leaves as they are; None where it does not ask."""
        if choice.slots is None or choice.slots.rule != "odp":
            return None
        self.count.flops += len(x) * attended_to_cost(self._model.config)
        return protected_tokens(block.attn.attended_to(block.attention_inputs(x, modulation))).reshape(-1)

    def _keep(self, shelves: Sequence[list[_Kept]], output: Tensor, t: float, lasts: Sequence[int]) -> None:
        """Keep the output of branches until the last evaluation that takes each; apart, where one is let go of before.

        Parts of one output would keep all of it in memory.
        """
        for shelf, part, last in zip(shelves, output.chunk(len(shelves)), lasts, strict=True):
            if last >= 0:
                shelf.append(_Kept(t, part if len(set(lasts)) == 1 else part.clone(), last))

    def _slots_before(self, index: int, branches: Sequence[int]) -> SlotOutputs:
        """Return the slots of branches that were kept, image after image."""
        kept = [self._shelves[branch, index].slots for branch in branches]
        found = [each for each in kept if each is not None]
        if len(found) == 1:
            return found[0]
        return SlotOutputs(
            torch.cat([each.rows for each in found]),
            torch.cat([each.outputs for each in found]),
            torch.cat([each.shared for each in found]),
        )

    def _taken(self, index: int, name: str, part: str, t: float, branches: Sequence[int]) -> Tensor | None:
        """Return what is taken from before, or extrapolated to time t; None where nothing is."""
        if part == "skip":
            return None
        outputs = []
        for branch in branches:
            shelf = self._shelves[branch, index]
            kept = shelf.attention if name == "attention" else shelf.mixture
            kept = kept[-_takes(part) :] if part == "forecast" else kept[-1:]
            outputs.append(extrapolated([each.output for each in kept], [each.t for each in kept], t))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    # -------------------------------------------------------------- by residuals of the first block

    def _by_residual(
        self, tokens: Tensor, modulation_of: ModulationOf, threshold: float, branches: Sequence[int]
    ) -> Tensor:
        """Return the tokens behind the last block; images whose first block adds nearly the same skip the others."""
        modulations = [modulation_of(f"blocks.{i}", block.adaLN_modulation) for i, block in enumerate(self._blocks)]
        behind = self._whole_block(0, tokens, modulations[0])
        added = behind - tokens
        kept = [self._first.get(branch) for branch in branches]
        firsts = added.chunk(len(branches))
        moved = torch.cat([_moved(first, before, threshold) for first, before in zip(firsts, kept, strict=True)])
        some, every = bool(moved.any()), bool(moved.all())
        later = torch.cat(
            [torch.zeros_like(first) if k is None else k.later for first, k in zip(firsts, kept, strict=True)]
        )
        if not some:
            return behind + later
        out = behind if every else behind[moved]
        for index in range(1, len(self._blocks)):
            out = self._whole_block(index, out, modulations[index] if every else modulations[index][moved])
        result = out
        if not every:
            result = behind + later
            result[moved] = out
        later[moved] = out - (behind if every else behind[moved])
        parts = zip(branches, firsts, later.chunk(len(branches)), moved.chunk(len(branches)), kept, strict=True)
        for branch, first, behind_first, new, before in parts:
            base = first if before is None else torch.where(new[:, None, None], first, before.added)
            found = _First(base, behind_first)
            self._first[branch] = found if len(branches) == 1 else _First(base.clone(), behind_first.clone())
        return result

    def _whole_block(self, index: int, x: Tensor, modulation: Tensor) -> Tensor:
        """Return what a block makes of x, all of it computed."""
        block, config = self._blocks[index], self._model.config
        attended = block.attend_modulated(x, modulation)
        flat = attended.inputs.reshape(-1, x.shape[-1])
        mixed = mixed_in_part(block.moe, flat)
        each = unrouted_cost(config, config.blocks[index]) + shared_cost(config, config.blocks[index])
        self.count.flops += len(x) * attention_cost(config) + len(flat) * each
        self.count.add_slots(mixed.computed, self._expert_costs[index])
        return gated_sum(attended.residual, attended.gamma, mixed.output.reshape(x.shape))


@dataclass(frozen=True)
class _First:
    """What the first block added (N, tokens, D) when all others were computed last, and what these added."""

    added: Tensor
    later: Tensor

    @property
    def nbytes(self) -> int:
        return 2 * self.added.numel() * self.added.element_size()


def _effective(choice: BlockChoice) -> BlockChoice:
    """Return a choice without a rule that leaves nothing out."""
    return replace(choice, slots=None) if choice.slots is not None and choice.slots.leaves_nothing_out else choice


def _moved(first: Tensor, kept: _First | None, threshold: float) -> Tensor:
    """Return the images (N,) to which the first block adds something else than before: `first` (N, tokens, D)."""
    if kept is None:
        return torch.ones(len(first), dtype=torch.bool, device=first.device)
    change, before = (first - kept.added).abs(), kept.added.abs()
    return change.sum(dim=(1, 2)) >= threshold * before.sum(dim=(1, 2))


def extrapolated(outputs: Sequence[Tensor], times: Sequence[float], t: float) -> Tensor:
    """Return a' + (a' - a'') (t - t') / (t' - t'') of the last two outputs, a'' before a'.

    It is a' where there is no a'', or where both are of one time.
    """
    if len(outputs) < 2 or times[-2] == times[-1]:
        return outputs[-1]
    factor = (t - times[-1]) / (times[-1] - times[-2])
    return torch.lerp(outputs[-1], outputs[-2], -factor)


def _part(kept: SlotOutputs, place: int, parts: int) -> SlotOutputs:
    """Return what is kept of one of several branches."""
    return replace(
        kept,
        rows=kept.rows.chunk(parts)[place],
        outputs=kept.outputs.chunk(parts)[place],
        shared=kept.shared.chunk(parts)[place],
    )


def _apart(kept: SlotOutputs) -> SlotOutputs:
    """Return the same in memory of its own."""
    return SlotOutputs(kept.rows.clone(), kept.outputs.clone(), kept.shared.clone())
