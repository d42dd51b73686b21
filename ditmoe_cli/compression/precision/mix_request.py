"""The request for a mix of precisions: formats to choose from, and the bytes allowed. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ditmoe_cli.compression.planner import Work
from ditmoe_cli.compression.precision.budget import Budget, FileSizes
from ditmoe_cli.compression.precision.candidates import WIDTHS, Candidates, Offered, candidate_formats, ties
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import WeightGroup, weight_group


@dataclass(frozen=True)
class MixRequest:
    """A request for a mix of formats.

    Attributes:
        checkpoint: the checkpoint to quantise.
        candidates: the widths to choose from, and how weights are tied.
        formats: the formats that each weight may take (`candidate_formats`).
        limit: bytes of the largest file allowed.
        sizes: bytes of the file with any formats.
    """

    checkpoint: Checkpoint
    candidates: Candidates
    formats: Offered
    limit: int
    sizes: FileSizes

    @cached_property
    def widths(self) -> tuple[str, ...]:
        """The widths to choose from, narrowest first."""
        return tuple(width for width in WIDTHS if width in self.candidates.allowed)

    @cached_property
    def decisions(self) -> dict[str, list[str]]:
        """The weights of each decision: one, or those that are tied together."""
        members: dict[str, list[str]] = {}
        for name, decision in ties(list(self.formats), self.candidates.tied).items():
            members.setdefault(decision, []).append(name)
        return members

    def weights_of(self, *groups: WeightGroup) -> list[str]:
        """Return the weights of `groups` that may be quantised."""
        return [name for name in self.formats if weight_group(self.checkpoint.weights[name].info) in groups]

    def format_at(self, name: str, width: str) -> str | None:
        """Return a weight's format at a width, else at the next wider one that it may take, else at its widest."""
        wider = (self.candidates.format_of(each) for each in WIDTHS[WIDTHS.index(width) :])
        return next((fmt for fmt in wider if fmt in self.formats[name]), self.formats[name][-1])

    def formats_at(self, names: Sequence[str], width: str) -> dict[str, str]:
        """Return weights' formats at a width; weights that stay as they are have none."""
        formats = ((name, self.format_at(name, width)) for name in names)
        return {name: fmt for name, fmt in formats if fmt is not None}

    def size(self, *formats: Mapping[str, str]) -> int:
        """Return the bytes of the file with weights in `formats`, and everything else as it is."""
        return self.sizes.of({name: fmt for part in formats for name, fmt in part.items()})


def mix_request(work: Work, candidates: Candidates, budget: Budget, step: Step | None = None) -> MixRequest:
    """Return the request for a mix within a budget. Raises what `candidate_formats` raises.

    `step` is the one that the plan will add to the history of the file, whose bytes count.
    """
    checkpoint = work.checkpoint
    sizes = FileSizes(checkpoint, work.output, step)
    formats = candidate_formats(checkpoint, candidates)
    return MixRequest(checkpoint, candidates, formats, budget.limit(sizes, candidates), sizes)
