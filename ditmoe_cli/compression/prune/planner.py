"""The pruning planner: from scores to the experts that each block keeps. Torch-free."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from ditmoe_cli.checkpoint.header import TensorInfo
from ditmoe_cli.checkpoint.names import split_name
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, RouterMode
from ditmoe_cli.compression.prune.methods import DEFAULT_METHOD, METHODS, Scores
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile, empty_tables, require_profile_of


@dataclass(frozen=True)
class Keep:
    """How many experts a block keeps: a ratio of those it has, or a count."""

    ratio: float | None = None
    count: int | None = None

    def of(self, experts: int) -> int:
        """Return the number kept out of `experts`; a ratio is rounded up."""
        if self.count is not None:
            return self.count
        assert self.ratio is not None
        return math.ceil(self.ratio * experts - 1e-9)

    def __str__(self) -> str:
        return str(self.count if self.count is not None else self.ratio)


def parse_keep(text: str) -> Keep:
    """Read ``--keep``: with a decimal point a ratio in (0, 1], without one a count of at least 1."""
    try:
        if text.lstrip("+-").isdigit():
            if int(text) < 1:
                raise UsageError(f"--keep {text}: keep at least one expert")
            return Keep(count=int(text))
        ratio = float(text)
    except ValueError:
        raise UsageError(f"--keep {text}: give a ratio such as 0.5 or a count such as 4") from None
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"--keep {text}: a ratio must be above 0 and at most 1.0; a count has no decimal point")
    return Keep(ratio=ratio)


def kept_counts(checkpoint: Checkpoint, keep: Keep) -> list[int]:
    """Return how many experts each block keeps. Raises `InfeasibleError` where a block cannot."""
    counts = []
    for i, block in enumerate(checkpoint.config.blocks):
        experts, kept = len(block.expert_widths), keep.of(len(block.expert_widths))
        if kept < checkpoint.config.top_k:
            raise InfeasibleError(
                f"--keep {keep} leaves {kept} of {experts} experts in block {i}, fewer than its "
                f"top-{checkpoint.config.top_k} routing needs; keep at least {checkpoint.config.top_k}"
            )
        if kept > experts:
            raise InfeasibleError(f"--keep {keep}: block {i} has only {experts} experts")
        counts.append(kept)
    return counts


@dataclass(frozen=True)
class Pruning:
    """What to prune: how many experts stay, by which method, in which router mode; `seed` is for random ones."""

    keep: Keep
    method: str = DEFAULT_METHOD
    router: RouterMode = "ghost"
    seed: int = 0


def plan_prune(checkpoint: Checkpoint, profile: RoutingProfile | None, pruning: Pruning) -> CompressionPlan:
    """Plan to keep, in every block, the experts of highest score.

    Ties fall to the lower number. `profile` may be None for methods that need none. Raises `InfeasibleError`
    where fewer than top-k would stay, and `BadInputError` for a profile of another checkpoint.
    """
    if profile is not None:
        require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    counts = kept_counts(checkpoint, pruning.keep)
    experts = tuple(len(block.expert_widths) for block in checkpoint.config.blocks)
    scores = METHODS[pruning.method].score(profile.tables if profile else empty_tables(experts), pruning.seed)
    return CompressionPlan(
        command="prune",
        source=checkpoint.fingerprint,
        profile=profile.digest if profile else None,
        options={**asdict(pruning), "keep": str(pruning.keep)},
        blocks=tuple(BlockPlan(keep, pruning.router) for keep in best(scores, counts)),
    )


def best(scores: Scores, counts: list[int]) -> list[tuple[int, ...]]:
    """Return, per block, the `counts` experts of highest score in ascending order."""
    return [
        tuple(sorted(sorted(range(len(block)), key=lambda e: (-block[e], e))[:count]))
        for block, count in zip(scores, counts, strict=True)
    ]


def undecided_plan(checkpoint: Checkpoint, pruning: Pruning) -> CompressionPlan:
    """Return a plan of the right size whose experts are not chosen yet, to predict bytes without a profile.

    Raises `InfeasibleError` as planning would, and `BadInputError` where the bytes depend on the choice.
    """
    counts = kept_counts(checkpoint, pruning.keep)
    for i in range(checkpoint.config.depth):
        if len(_expert_layouts(checkpoint, i)) > 1:
            what = f"the experts of block {i} differ in size"
        elif pruning.router == "slice" and _merged_or_moved(checkpoint, i):
            what = f"the router rows of block {i} do not name its experts one by one"
        else:
            continue
        raise BadInputError(f"{checkpoint.path}: {what}, so the bytes depend on which are kept; give a --profile")
    blocks = tuple(BlockPlan(tuple(range(count)), pruning.router) for count in counts)
    return CompressionPlan("prune", checkpoint.fingerprint, options={"undecided": True}, blocks=blocks)


def _expert_layouts(checkpoint: Checkpoint, block: int) -> set[frozenset[TensorInfo]]:
    """Return the different ways in which a block's experts are stored, tensors named as within the expert."""
    layouts: dict[int, set[TensorInfo]] = {}
    for name, info in checkpoint.header.tensors.items():
        parts = split_name(name)
        if parts.block == block and parts.expert is not None:
            layouts.setdefault(parts.expert, set()).add(replace(info, name=parts.rest))
    return {frozenset(layout) for layout in layouts.values()}


def _merged_or_moved(checkpoint: Checkpoint, block: int) -> bool:
    """Tell whether a block's router rows, ghosts left aside, are other than its experts one by one."""
    selected = [expert for expert in checkpoint.expert_map(block) if expert >= 0]
    return selected != list(range(len(checkpoint.config.blocks[block].expert_widths)))
