"""How two checkpoints are related, by their histories: which steps they share, and which experts of whom they kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ditmoe_cli.files.provenance import Step, expert_fates

Relation = Literal["same", "ancestor", "descendant", "siblings", "unknown"]


@dataclass(frozen=True)
class Lineage:
    """A checkpoint's fingerprint, where it is known, and the steps that led to it."""

    fingerprint: str | None
    history: tuple[Step, ...] = ()

    @property
    def states(self) -> tuple[str | None, ...]:
        """The fingerprints that the checkpoint went through, its own last."""
        return (*(step.source for step in self.history), self.fingerprint)


@dataclass(frozen=True)
class Kinship:
    """How a checkpoint A is related to a checkpoint B.

    Attributes:
        relation: ``ancestor`` where B was made from A, ``descendant`` where A was made from B, ``siblings`` where both
            were made from a third; ``unknown`` where no fingerprint is in both histories.
        shared: the steps that led to the last checkpoint that both come from.
        a, b: the steps of each since.
    """

    relation: Relation
    shared: tuple[Step, ...] = ()
    a: tuple[Step, ...] = ()
    b: tuple[Step, ...] = ()


def kinship(a: Lineage, b: Lineage) -> Kinship:
    """Return how two checkpoints are related, by the last fingerprint that both have or come from."""
    for there in reversed(range(len(b.states))):
        common = b.states[there]
        if common is None or common not in a.states:
            continue
        here = max(place for place, state in enumerate(a.states) if state == common)
        own, other = a.history[here:], b.history[there:]
        relation: Relation = "siblings" if own and other else "descendant" if own else "ancestor" if other else "same"
        return Kinship(relation, a.history[:here], own, other)
    return Kinship("unknown", a=a.history, b=b.history)


Kept = tuple[tuple[int, ...], ...]
"""For each block, the number that each of its experts had in an ancestor."""


def kept_experts(steps: Sequence[Step], counts: Sequence[int]) -> Kept | None:
    """Return which experts of the checkpoint before `steps` are left after them, by block.

    `counts` are the experts of each block that are left. None where no step changed experts, or where what the steps
    tell does not fit `counts`.
    """
    kept: list[tuple[int, ...]] | None = None
    try:
        for step in steps:
            if step.experts:
                fates = [expert_fates(text) for text in step.experts]
                stayed = [tuple(e for e, fate in enumerate(block) if fate == str(e)) for block in fates]
                kept = (
                    stayed
                    if kept is None
                    else [tuple(before[e] for e in now) for before, now in zip(kept, stayed, strict=True)]
                )
    except (ValueError, IndexError):
        return None
    return tuple(kept) if kept is not None and [len(block) for block in kept] == list(counts) else None
