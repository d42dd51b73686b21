"""The registry of methods: every method that prune, merge and quantize offer by name, with its source.

Reading it imports neither torch nor numpy: the functions of a method are imported when they are first called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditmoe_cli.compression.calibrated import Calibrated
    from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
    from ditmoe_cli.compression.plan import RouterMode
    from ditmoe_cli.compression.precision.mix import Mix
    from ditmoe_cli.compression.precision.mix_request import MixRequest
    from ditmoe_cli.compression.replay.tokens import BlockTokens
    from ditmoe_cli.model.expert_weights import ExpertWeights
    from ditmoe_cli.model.moe import SparseMoE
    from ditmoe_cli.routing.profile import RoutingTables
    from ditmoe_cli.routing.saliency import Scores


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method in a few words, and its paper."""

    summary: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Saliency(Method):
    """A way to prune: `score(tables, seed)` returns each block's scores of its experts; the highest are kept."""

    score: Callable[[RoutingTables, int], Scores]
    needs_profile: bool = True


@dataclass(frozen=True, kw_only=True)
class SubsetSearch(Method):
    """A way to prune by replaying a block's tokens: `choose(tokens, mixture, count, router mode)` returns experts."""

    choose: Callable[[BlockTokens, SparseMoE, int, RouterMode], tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class MergeMethod(Method):
    """A way to merge.

    Attributes:
        group: returns groups of one block's experts, as many as asked for.
        merge: returns the expert that replaces a group's members, given their frequency shares α and, where it needs
            them, calibration tokens.
        needs_means: whether `group` needs mean outputs, which ``fast`` profiles lack.
        needs_tokens: whether `merge` needs tokens of the reservoir, which they lack too.
    """

    group: Callable[[GroupingInputs, int], Groups]
    merge: Callable[[Sequence[ExpertWeights], Sequence[float], MergeTokens | None], ExpertWeights]
    needs_means: bool = False
    needs_tokens: bool = False


@dataclass(frozen=True, kw_only=True)
class MixMethod(Method):
    """A way to mix precisions: `choose(request, calibrated)` returns formats within the request's limit."""

    choose: Callable[[MixRequest, Calibrated], Mix]


@dataclass(frozen=True)
class _Lazy:
    """A function of a module of this package, imported when it is called."""

    module: str
    function: str

    def load(self) -> Any:
        """Return the function."""
        return getattr(import_module(f"ditmoe_cli.{self.module}"), self.function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        return self.load()(*arguments)


def _saliency(function: str, summary: str, source: str) -> Saliency:
    """Return a criterion of `routing.saliency` that draws nothing."""
    score = _Lazy("routing.saliency", function)
    return Saliency(score=lambda tables, _: score(tables), summary=summary, source=source)


def _merge(module: str, summary: str, source: str, *, average: str | None = None, **needs: bool) -> MergeMethod:
    """Return the method of a module of `compression.merge` that groups, and merges too unless it names an average."""
    path = f"compression.merge.{module}"
    merge = _Lazy("compression.merge.averages", average) if average else _Lazy(path, "merge")
    return MergeMethod(group=_Lazy(path, "group"), merge=merge, summary=summary, source=source, **needs)


def _mix(module: str, summary: str, source: str) -> MixMethod:
    """Return the method of a module of `compression.precision`."""
    return MixMethod(choose=_Lazy(f"compression.precision.{module}", "choose"), summary=summary, source=source)


SALIENCIES: Mapping[str, Saliency] = {
    "reap": _saliency("reap", "mean gated output norm over routed tokens, after γ", "arXiv 2510.13999"),
    "man": _saliency("man", "mean output norm over routed tokens, after γ", "arXiv 2606.15716"),
    "msan": _saliency("msan", "mean squared output norm over routed tokens, after γ", "arXiv 2606.15716"),
    "easy-ep": _saliency("easy_ep", "gated output norms, weighed by how far tokens turn", "arXiv 2504.06792"),
    "gate-mass": _saliency("gate_mass", "sum of routing weights", "arXiv 2404.05089"),
    "frequency": _saliency("frequency", "how often an expert is selected", "arXiv 2404.05089"),
    "random": Saliency(
        score=_Lazy("routing.saliency", "random"),
        summary="a seeded draw, the baseline to beat",
        source="-",
        needs_profile=False,
    ),
}
SEARCHES: Mapping[str, SubsetSearch] = {
    "naee": SubsetSearch(
        choose=_Lazy("compression.prune.naee", "choose"),
        summary="the subset of least replayed output error",
        source="arXiv 2402.14800",
    ),
    "diet": SubsetSearch(
        choose=_Lazy("compression.prune.diet", "choose"),
        summary="the subset whose deletions are most like those of the dropped experts",
        source="DIET",
    ),
}
MERGES: Mapping[str, MergeMethod] = {
    "m-smoe": _merge(
        "m_smoe",
        "alike to the router; aligned, frequency-weighted mean",
        "arXiv 2310.01334",
        average="aligned_average",
    ),
    "hc-smoe": _merge(
        "hc_smoe",
        "close mean outputs; frequency-weighted mean",
        "arXiv 2410.08589",
        average="weighted_average",
        needs_means=True,
    ),
    "mergemoe": _merge(
        "mergemoe", "near weights; down projection by least squares", "arXiv 2510.14436", needs_tokens=True
    ),
    "sub-moe": _merge(
        "sub_moe",
        "mean outputs of like direction; mean in a shared subspace of chosen rank",
        "arXiv 2506.23266",
        needs_means=True,
        needs_tokens=True,
    ),
    "average": _merge(
        "average",
        "equally loaded groups; plain mean, the baseline to beat",
        "arXiv 2308.06093",
        average="plain_average",
    ),
    "uncurl": _merge(
        "uncurl",
        "spectral clusters of router logits; aligned, frequency-weighted mean",
        "arXiv 2409.01483",
        average="aligned_average",
    ),
}
MIXES: Mapping[str, MixMethod] = {
    "replay": _mix("least_error", "least replayed error of the guided prediction, over all weights at once", "-"),
    "pmq": _mix(
        "baselines.pmq",
        "per block, by experts' use and the error of their outputs; attention at 4 bits",
        "arXiv 2410.06270",
    ),
    "outlier": _mix("baselines.outlier", "two widths, the wider for matrices with outlier columns", "arXiv 2406.08155"),
    "block-score": _mix(
        "baselines.block_score",
        "two widths, the wider for blocks that turn the residual stream most",
        "arXiv 2406.08155",
    ),
    "camera-q": _mix(
        "baselines.camera_q",
        "three widths within each expert, the widest for neurons of highest energy",
        "arXiv 2508.02322",
    ),
}
METHODS: Mapping[str, Mapping[str, Method]] = {  # by command
    "prune": {**SALIENCIES, **SEARCHES},
    "merge": MERGES,
    "quantize": MIXES,
}
DEFAULT_METHODS: Mapping[str, str] = {"prune": "reap", "merge": "m-smoe", "quantize": "replay"}
