"""What a method of mixed precision is given, and what the methods with few widths share. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ditmoe_cli.compression.precision.budget import Choice, file_bytes
from ditmoe_cli.compression.precision.candidates import WIDTHS, Candidates
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.opened import Checkpoint, WeightGroup, weight_group
from ditmoe_cli.routing.profile import RoutingProfile

if TYPE_CHECKING:
    from ditmoe_cli.progress import ProgressBar

DENSE: tuple[WeightGroup, ...] = ("attn", "shared")  # weights that every token uses
DENSE_WIDTH = "4"  # what they get in MC-MoE


@dataclass(frozen=True)
class Task:
    """A mix that is asked for.

    Attributes:
        checkpoint: what is quantised.
        profile: a profile of it.
        candidates: what may be chosen from.
        formats: the formats that each weight may take, narrowest first (`candidate_formats`).
        limit: bytes of the largest file allowed.
        output: where that goes.
        device: what measurements run on.
        bar: shows how far they are.
    """

    checkpoint: Checkpoint
    profile: RoutingProfile
    candidates: Candidates
    formats: Mapping[str, tuple[str | None, ...]]
    limit: int
    output: Output
    device: str
    bar: ProgressBar

    @cached_property
    def widths(self) -> tuple[str, ...]:
        """The widths to choose from, narrowest first."""
        return tuple(width for width in WIDTHS if width in self.candidates.allowed)

    def named(self, *groups: WeightGroup) -> list[str]:
        """Return the weights of some groups that may be quantised."""
        return [name for name in self.formats if weight_group(self.checkpoint.weights[name].info) in groups]

    def format_at(self, name: str, width: str) -> str | None:
        """Return a weight's format at a width, or at the next wider that it may take, else at its widest."""
        wider = (self.candidates.format_of(each) for each in WIDTHS[WIDTHS.index(width) :])
        return next((fmt for fmt in wider if fmt in self.formats[name]), self.formats[name][-1])

    def at(self, names: Sequence[str], width: str) -> dict[str, str]:
        """Return weights' formats at a width, without those that it leaves as they are."""
        formats = ((name, self.format_at(name, width)) for name in names)
        return {name: fmt for name, fmt in formats if fmt is not None}

    def size(self, *formats: Mapping[str, str]) -> int:
        """Return the bytes of the file with some formats, and all else left as it is."""
        return file_bytes(self.checkpoint, {name: fmt for part in formats for name, fmt in part.items()}, self.output)


def widest_that_fits(task: Task, fixed: Mapping[str, str], names: Sequence[str]) -> int:
    """Return the index in `Task.widths` of the widest width that all of `names` can have beside `fixed`.

    Raises `InfeasibleError` with the least bytes where none fits.
    """
    size = 0
    for index in reversed(range(len(task.widths))):
        size = task.size(fixed, task.at(names, task.widths[index]))
        if size <= task.limit:
            return index
    raise InfeasibleError(
        f"the budget is {task.limit:,} bytes, and the narrowest formats of this method take {size:,}; give more"
    )


def settle(task: Task, settled: Sequence[WeightGroup] = DENSE) -> tuple[dict[str, str], list[str]]:
    """Return formats that stand from the start, and the weights that are left to be decided.

    Attention and the shared expert, or those of them that are to be `settled`, get `DENSE_WIDTH`, as in MC-MoE; where
    even the narrowest formats of the others do not fit beside that, they are to be decided too.
    """
    dense, rest = task.named(*settled), task.named("experts", *(group for group in DENSE if group not in settled))
    fixed = task.at(dense, DENSE_WIDTH)
    if task.size(fixed, task.at(rest, task.widths[0])) <= task.limit:
        return fixed, rest
    return {}, [*rest, *dense]


def widened(task: Task, fixed: Mapping[str, str], units: Sequence[Sequence[str]]) -> Choice:
    """Give the first n of some units of weights, most important first, the wider of two widths, and the rest the other.

    These are the widest that all can have within the budget, and the next one of `Task.widths`; n is the largest that
    the budget allows. Files grow with n.
    """
    everything = [name for unit in units for name in unit]
    index = widest_that_fits(task, fixed, everything)
    if index == len(task.widths) - 1:
        return Choice({**fixed, **task.at(everything, task.widths[index])})
    narrow, wide = (task.at(everything, width) for width in task.widths[index : index + 2])

    def formats(n: int) -> dict[str, str]:
        first = {name for unit in units[:n] for name in unit}
        mine = {name: (wide if name in first else narrow).get(name) for name in everything}
        return {**fixed, **{name: fmt for name, fmt in mine.items() if fmt is not None}}

    return Choice(most_that_fits(task, formats, len(units)))


def most_that_fits(task: Task, formats: Callable[[int], dict[str, str]], too_many: int) -> dict[str, str]:
    """Return ``formats(n)`` of the largest n below `too_many` whose file the budget allows, else of 0.

    Files grow with n.
    """
    fits = 0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if task.size(formats(middle)) <= task.limit else (fits, middle)
    return formats(fits)
