"""What a block computes in one evaluation of the model, and tables of that over all evaluations. Torch-free.

A block adds gate ⊙ a(x) and γ ⊙ (routed + shared). Each of the two parts is computed, taken from an earlier evaluation
(kept before gate and γ, and multiplied by today's), extrapolated from two earlier ones, or left out; and a mixture that
is computed may leave out slots behind the first of a token.

| text of a choice | the block |
|---|---|
| `full` | computes all |
| `reuse`, `forecast`, `skip` | takes attention and mixture from before, extrapolates them, leaves them out |
| `reuse-attention`, `forecast-attention`, `skip-attention` | does so with its attention alone |
| `reuse-mixture`, `forecast-mixture`, `skip-mixture` | does so with its mixture alone |
| `reuse-slots` | routes anew, and computes only experts that the token did not choose before |
| `top1`, `regressed`, `top-p:T`, `odp:T`, `saliency:T` | leaves out slots (`SlotRule`) |
| `skip-shared` | leaves out the shared expert |
| `follow` | does nothing, nor does any other: predictions follow the state (`diffusion/followed_predictions.py`) |

Texts are joined by ``+``, as in ``forecast-attention+top1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["compute", "reuse", "forecast", "skip", "follow"]
MixturePart = Literal["compute", "reuse", "forecast", "skip", "reuse-slots", "follow"]
Rule = Literal["top1", "regressed", "top-p", "odp", "saliency"]
NullChoice = Literal["compute", "reuse", "off"]
"""The null class in one evaluation: predicted; guiding as it did when it was predicted last; or not guiding."""

NULL_CHOICES: tuple[str, ...] = get_args(NullChoice)
WITH_THRESHOLD: tuple[Rule, ...] = ("top-p", "odp", "saliency")
"""Rules that have a threshold."""


@dataclass(frozen=True)
class SlotRule:
    """Which slots of a token are computed; the first always is.

    With p the routing weights of a token, best first, and T the threshold, slot j > 1 is left out where

    | rule | |
    |---|---|
    | `top1` | always |
    | `regressed` | always; s_e ⊙ f_1 + c_e stands in for its expert e, f_1 being the output of slot 1 |
    | `top-p` | Σ_{i<j} p_i > T (https://arxiv.org/abs/2403.07652); nothing at T = 1 |
    | `odp` | p_j < T p_1, but for the most attended 2 % of tokens (https://arxiv.org/abs/2410.06270) |
    | `saliency` | p_j² E‖γ ⊙ f_e‖² < T, the mean being that of calibration tokens; nothing at T = 0 |
    """

    rule: Rule
    threshold: float = 0.0

    @property
    def leaves_nothing_out(self) -> bool:
        """Whether all slots are computed, whatever the routing weights are."""
        if self.rule == "top-p":
            return self.threshold >= 1
        return self.rule in ("odp", "saliency") and self.threshold == 0

    @property
    def text(self) -> str:
        """The rule as a text, with its threshold where it has one."""
        return f"{self.rule}:{self.threshold!r}" if self.rule in WITH_THRESHOLD else self.rule


@dataclass(frozen=True)
class BlockChoice:
    """What a block computes: its attention, its mixture, which slots of that, and whether its shared expert."""

    attention: Part = "compute"
    mixture: MixturePart = "compute"
    slots: SlotRule | None = None
    shared: bool = True

    @property
    def text(self) -> str:
        """The choice as a text, which `parse_choice` reads."""
        if self.attention == self.mixture != "compute":
            return self.attention
        parts = [] if self.attention == "compute" else [f"{self.attention}-attention"]
        if self.mixture != "compute":
            parts.append(self.mixture if self.mixture == "reuse-slots" else f"{self.mixture}-mixture")
        parts += [] if self.slots is None else [self.slots.text]
        parts += [] if self.shared else ["skip-shared"]
        return "+".join(parts) or "full"


FULL = BlockChoice()
FOLLOW = BlockChoice("follow", "follow")
_WHOLE: Mapping[str, BlockChoice] = {
    "full": FULL,
    "reuse": BlockChoice("reuse", "reuse"),
    "forecast": BlockChoice("forecast", "forecast"),
    "skip": BlockChoice("skip", "skip"),
    "follow": FOLLOW,
}
_APART: tuple[Part, ...] = ("reuse", "forecast", "skip")
"""What one part of a block may do while the other is computed."""
_ATTENTION: Mapping[str, Part] = {f"{part}-attention": part for part in _APART}
_MIXTURE: Mapping[str, MixturePart] = {
    **{f"{part}-mixture": part for part in _APART},
    "reuse-slots": "reuse-slots",
}


def parse_choice(text: str) -> BlockChoice:
    """Read a choice from its text. Raises `ValueError`, which names the part that is wrong."""
    if text in _WHOLE:
        return _WHOLE[text]
    attention: Part = "compute"
    mixture: MixturePart = "compute"
    slots: SlotRule | None = None
    shared = True
    seen: set[str] = set()
    for part in text.split("+"):
        kind = "attention" if part in _ATTENTION else "mixture" if part in _MIXTURE else part.partition(":")[0]
        if kind in seen:
            raise ValueError(f"{text!r}: says twice what becomes of its {kind}")
        seen.add(kind)
        if part in _ATTENTION:
            attention = _ATTENTION[part]
        elif part in _MIXTURE:
            mixture = _MIXTURE[part]
        elif part == "skip-shared":
            shared = False
        elif slots is None:
            slots = parse_rule(part)
        else:
            raise ValueError(f"{text!r}: has two rules for slots")
    if mixture != "compute" and (slots is not None or not shared):
        raise ValueError(f"{text!r}: a mixture that is not computed has no slots to leave out")
    return BlockChoice(attention, mixture, slots, shared)


def parse_rule(text: str) -> SlotRule:
    """Read a rule for slots. Raises `ValueError`."""
    name, colon, value = text.partition(":")
    rule = next((known for known in get_args(Rule) if known == name), None)
    if rule is None:
        raise ValueError(f"{text!r}: is no choice of a block")
    if (rule in WITH_THRESHOLD) != bool(colon):
        raise ValueError(f"{text!r}: {'needs' if rule in WITH_THRESHOLD else 'has no'} threshold")
    try:
        threshold = float(value) if colon else 0.0
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold) or threshold < 0:
        raise ValueError(f"{text!r}: a threshold is a finite number of at least 0")
    return SlotRule(rule, threshold)


@dataclass(frozen=True)
class ComputeTable:
    """What every block computes in every evaluation and branch.

    Attributes:
        choices: all choices that occur.
        cells: the index of a choice, [evaluation][branch][block]; branch 0 is conditional. Branch 1 is there in a
            guided table alone.
        null: what becomes of the null class, by evaluation; none in a table without guidance.
        residual: θ where later blocks are reused by image, in place of `cells`: what all blocks behind the first add is
            taken from before where ‖r - r'‖₁ < θ ‖r'‖₁, r being what the first block adds, and r' what it added when
            they were computed last (https://github.com/chengzeyi/ParaAttention). Then all cells are `full`.
    """

    choices: tuple[BlockChoice, ...]
    cells: tuple[tuple[tuple[int, ...], ...], ...]
    null: tuple[NullChoice, ...] = ()
    residual: float | None = None

    @property
    def evaluations(self) -> int:
        """How many evaluations it plans."""
        return len(self.cells)

    @property
    def branches(self) -> int:
        """The branches: 2 with guidance."""
        return 2 if self.null else 1

    def at(self, evaluation: int, branch: int, block: int) -> BlockChoice:
        """Return what a block computes."""
        return self.choices[self.cells[evaluation][branch][block]]

    def follows(self, evaluation: int) -> bool:
        """Return whether the model is not asked in an evaluation, its prediction following the state."""
        return self.at(evaluation, 0, 0) == FOLLOW

    @property
    def followed(self) -> tuple[int, ...]:
        """The evaluations in which the model is not asked."""
        if FOLLOW not in self.choices:
            return ()
        return tuple(evaluation for evaluation in range(self.evaluations) if self.follows(evaluation))

    def asked_before(self, evaluation: int) -> tuple[int, ...]:
        """Return the last two evaluations before one in which the model is asked, or as many as there are."""
        return tuple(k for k in range(evaluation) if not self.follows(k))[-2:]

    def computes_null(self, evaluation: int) -> bool:
        """Return whether the null class is predicted in an evaluation."""
        return bool(self.null) and self.null[evaluation] == "compute"

    @property
    def rules(self) -> set[Rule]:
        """The rules for slots that occur."""
        used = {index for step in self.cells for branch in step for index in branch}
        return {choice.slots.rule for k, choice in enumerate(self.choices) if k in used and choice.slots is not None}


def table_of(cells: Sequence[Sequence[Sequence[BlockChoice]]], null: Sequence[NullChoice] = ()) -> ComputeTable:
    """Return the table of choices [evaluation][branch][block], each kept once. Raises `ValueError` as `check_table`."""
    places: dict[BlockChoice, int] = {}
    numbered = tuple(
        tuple(tuple(places.setdefault(choice, len(places)) for choice in branch) for branch in step) for step in cells
    )
    return check_table(ComputeTable(tuple(places), numbered, tuple(null)))


def full_table(
    evaluations: int, blocks: int, null: Sequence[NullChoice] = (), residual: float | None = None
) -> ComputeTable:
    """Return the table in which blocks compute all, of two branches where the null class has choices."""
    step = ((0,) * blocks,) * (2 if null else 1)
    return check_table(ComputeTable((FULL,), (step,) * evaluations, tuple(null), residual))


def check_table(table: ComputeTable) -> ComputeTable:
    """Return a table that can be carried out.

    Raises `ValueError`, which names the place, for numbers of branches, blocks and evaluations that differ, for choices
    that are not there, for what is reused before it was computed, and for other choices beside residuals.
    """
    if table.null and len(table.null) != table.evaluations:
        raise ValueError(f"{len(table.null)} choices of the null class for {table.evaluations} evaluations")
    if any(choice not in NULL_CHOICES for choice in table.null):
        raise ValueError(f"the null class is {sorted(set(table.null) - set(NULL_CHOICES))[0]!r}")
    blocks = len(table.cells[0][0]) if table.cells and table.cells[0] else 0
    for evaluation, step in enumerate(table.cells):
        if len(step) != table.branches or any(len(branch) != blocks for branch in step):
            raise ValueError(f"evaluation {evaluation} has not {table.branches} branches of {blocks} blocks")
        if any(not 0 <= index < len(table.choices) for branch in step for index in branch):
            raise ValueError(f"evaluation {evaluation} has a choice beyond the {len(table.choices)} that are listed")
    if table.residual is not None:
        if any(choice != FULL for choice in table.choices):
            raise ValueError("blocks are chosen by residuals and by cells")
        if not 0 <= table.residual < math.inf:
            raise ValueError(f"a threshold of residuals of {table.residual}")
    _check_followed(table)
    _check_sources(table, blocks)
    return table


def _check_followed(table: ComputeTable) -> None:
    """Raise `ValueError` where some blocks follow, where nothing was before, and where the null class is predicted."""
    for evaluation, step in enumerate(table.cells):
        follow = {table.choices[index] == FOLLOW for branch in step for index in branch}
        if follow == {True, False}:
            raise ValueError(f"evaluation {evaluation} follows in some blocks, and not in others")
        if True in follow and evaluation == 0:
            raise ValueError("evaluation 0 follows, and there is none before it")
        if True in follow and table.computes_null(evaluation):
            raise ValueError(f"evaluation {evaluation} follows, and predicts the null class")


def _check_sources(table: ComputeTable, blocks: int) -> None:
    """Raise `ValueError` where something is reused that was not computed before."""
    if table.null and "reuse" in table.null and "compute" not in table.null[: table.null.index("reuse")]:
        raise ValueError("the null class is reused before it was predicted")
    for branch in range(table.branches):
        for block in range(blocks):
            seen: set[str] = set()
            for evaluation in range(table.evaluations):
                if branch == 1 and not table.computes_null(evaluation):
                    continue
                choice = table.at(evaluation, branch, block)
                for name, part in (("attention", choice.attention), ("mixture", choice.mixture)):
                    if part in ("reuse", "forecast") and name not in seen:
                        raise ValueError(f"evaluation {evaluation}, block {block}: its {name} was not computed before")
                if choice.mixture == "reuse-slots" and "slots" not in seen:
                    raise ValueError(f"evaluation {evaluation}, block {block}: its slots were not computed before")
                seen |= {"attention"} if choice.attention == "compute" else set()
                if choice.mixture in ("compute", "reuse-slots"):
                    seen |= {"mixture"} if choice.slots is not None else {"mixture", "slots"}
