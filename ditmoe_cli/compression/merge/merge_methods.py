"""The methods of ``ditmoe merge --method``: a literal table, one file each, imported when first used.

Reading the table needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
    from ditmoe_cli.model.expert_weights import ExpertWeights


@dataclass(frozen=True)
class MergeMethod:
    """A method: how experts are grouped, how a group becomes one expert, and where it comes from.

    Attributes:
        group: the groups, as many as asked for, of one block's experts.
        merge: the expert that replaces a group's members, of frequency shares α; tokens may be None unless needed.
        summary: what it does, in a few words.
        source: its paper.
        needs_means: whether `group` needs mean outputs, which ``--fast`` profiles lack.
        needs_tokens: whether `merge` needs tokens of the reservoir, which they lack too.
    """

    group: Callable[[GroupingInputs, int], Groups]
    merge: Callable[[Sequence[ExpertWeights], Sequence[float], MergeTokens | None], ExpertWeights]
    summary: str
    source: str
    needs_means: bool = False
    needs_tokens: bool = False


class _Module(Protocol):
    """What the module of a method holds."""

    def group(self, inputs: GroupingInputs, count: int) -> Groups: ...

    def merge(
        self, experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None
    ) -> ExpertWeights: ...


def _method(
    module: str, summary: str, source: str, *, needs_means: bool = False, needs_tokens: bool = False
) -> MergeMethod:
    """Return the method of a module beside this one."""

    def implementation() -> _Module:
        return cast(_Module, import_module(f"ditmoe_cli.compression.merge.{module}"))

    return MergeMethod(
        lambda inputs, count: implementation().group(inputs, count),
        lambda experts, shares, tokens: implementation().merge(experts, shares, tokens),
        summary,
        source,
        needs_means,
        needs_tokens,
    )


METHODS: Mapping[str, MergeMethod] = {
    "m-smoe": _method("m_smoe", "alike to the router; aligned, frequency-weighted mean", "arXiv 2310.01334"),
    "hc-smoe": _method("hc_smoe", "close mean outputs; frequency-weighted mean", "arXiv 2410.08589", needs_means=True),
    "mergemoe": _method(
        "mergemoe", "near weights; down projection by least squares", "arXiv 2510.14436", needs_tokens=True
    ),
    "sub-moe": _method(
        "sub_moe",
        "mean outputs of like direction; mean in a shared subspace of chosen rank",
        "arXiv 2506.23266",
        needs_means=True,
        needs_tokens=True,
    ),
    "average": _method("average", "equally loaded groups; plain mean, the baseline to beat", "arXiv 2308.06093"),
    "uncurl": _method(
        "uncurl", "spectral clusters of router logits; aligned, frequency-weighted mean", "arXiv 2409.01483"
    ),
}
