"""The pruning planner: from scores to the experts that each block keeps. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ditmoe_cli.compression.block_layout import require_plain
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.estimates import replaying_estimate
from ditmoe_cli.compression.methods import DEFAULT_METHODS, SALIENCIES, SEARCHES
from ditmoe_cli.compression.plan import (
    UNDECIDED,
    BlockPlan,
    CompressionPlan,
    Experts,
    Repair,
    RouterMode,
    repair_options,
)
from ditmoe_cli.compression.planner import Planner, Work, label_of, repair_label
from ditmoe_cli.compression.prune.widths import widths_of_ratio
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate, branches_at
from ditmoe_cli.routing.profile import RoutingProfile, empty_tables, require_profile_of
from ditmoe_cli.routing.saliency import Scores


def kept_counts(checkpoint: Checkpoint, keep: Keep) -> list[int]:
    """Return how many experts each block keeps. Raises `InfeasibleError` where a block cannot."""
    counts = []
    for i, block in enumerate(checkpoint.config.blocks):
        experts, kept = len(block.expert_widths), keep.of(len(block.expert_widths))
        if kept < checkpoint.config.top_k:
            raise InfeasibleError(
                f"⟨keep⟩ {keep} leaves {kept} of {experts} experts in block {i}, fewer than its "
                f"top-{checkpoint.config.top_k} routing needs; keep at least {checkpoint.config.top_k}"
            )
        if kept > experts:
            raise InfeasibleError(f"⟨keep⟩ {keep}: block {i} has only {experts} experts")
        counts.append(kept)
    return counts


@dataclass(frozen=True)
class Pruning(Planner):
    """The planner of pruning.

    Attributes:
        keep: experts to keep in each block; with `shared_budget` on average.
        method: name of the method that chooses experts.
        router: router mode for the rows of dropped experts; None for each block's mode of least replayed error.
        seed: seed of random choices.
        shared_budget: spread experts over the blocks by their replayed errors, and neurons over all experts of all
            blocks by their energies.
        neurons: share of the experts' neurons to keep.
        multiple: number that narrowed widths are multiples of.
        narrow_shared: narrow the shared expert too.
        constants: let rows of dropped experts select constants in their place.
        rank: rank of the linear maps beside these constants.
        repair: refitting of the kept weights; None for none.
    """

    keep: Keep
    method: str = DEFAULT_METHODS["prune"]
    router: RouterMode | None = "ghost"
    seed: int = 0
    shared_budget: bool = False
    neurons: float = 1.0
    multiple: int = 64
    narrow_shared: bool = False
    constants: bool = False
    rank: int = 0
    repair: Repair | None = None
    command: ClassVar[str] = "prune"

    @property
    def replays(self) -> bool:
        """Whether planning takes weights and the profile's reservoir or moments, not its small tables only."""
        return self.method in SEARCHES or self.router is None or self.shared_budget

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        narrows, plain = self.neurons < 1.0, Pruning(self.keep)
        return label_of(
            self.command,
            None if narrows and self.keep.ratio == 1.0 else f"keep{self.keep}",
            narrows and f"neurons{self.neurons:g}",
            narrows and self.multiple != plain.multiple and f"multiple{self.multiple}",
            narrows and self.narrow_shared and "shared",
            self.method != plain.method and self.method,
            self.method == "random" and self.seed and f"seed{self.seed}",
            self.router != plain.router and (self.router or "auto"),
            self.shared_budget and "global",
            f"rank{self.rank}" if self.rank else self.constants and "constants",
            repair_label(self.repair),
        )

    @property
    def measures(self) -> bool:
        """Whether the plan takes long; see `Planner.measures`."""
        return self.replays

    def estimates(self, work: Work, cfg: float) -> list[Estimate]:
        """Return what replaying takes on the tokens that the profile keeps, for choices that rest on it."""
        settings = work.calibration()
        if not self.replays or settings is None:
            return []
        config, branches = work.checkpoint.config, branches_at(cfg)
        seen = int(settings["images"]) * int(settings["steps"]) * config.num_patches * branches
        return [replaying_estimate(config, min(int(settings["reservoir"]), seen), branches)]

    @property
    def computes(self) -> bool:
        """Whether weights are computed, not only copied."""
        return self.repair is not None or self.constants or self.neurons < 1.0

    @property
    def needs_profile(self) -> bool:
        """Whether planning, or carrying the plan out, takes a profile."""
        scored = self.method in SEARCHES or SALIENCIES[self.method].needs_profile
        return scored or self.replays or self.computes

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for the options of the plan; defaults are left out.

        Method and router always stand there.
        """
        given: dict[str, Any] = {"keep": str(self.keep), "method": self.method, "router": self.router or "auto"}
        if self.method == "random":
            given["seed"] = self.seed
        if self.shared_budget:
            given["allocate"] = "global"
        if self.neurons < 1.0:
            given |= {"neurons": self.neurons, "multiple": self.multiple}
        switches = ("narrow_shared", "constants") if not self.rank else ("narrow_shared",)
        given |= {name: True for name in switches if getattr(self, name)}
        return {**given, **({"residual_rank": self.rank} if self.rank else {}), **repair_options(self.repair)}

    def check(self, work: Work) -> None:
        """Refuse what `check_pruning` refuses; note what changes nothing."""
        check_pruning(work.checkpoint, self)
        for idle in idle_settings(work.checkpoint, self):
            work.note(f"warning: {idle}")

    def warnings(self, profile: RoutingProfile) -> list[str]:
        """Return a warning for each expert that no calibration token chose."""
        return [
            f"no calibration token chose expert {expert} of block {block}; its saliency counts as 0"
            for block, expert in profile.never_routed()
        ]

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Plan by scores, or by replayed errors; see `plan_prune` and `plan_replayed`."""
        if not self.replays:
            return plan_prune(work.checkpoint, profile, self)
        assert profile is not None
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        kept = kept_measures(work.checkpoint, profile, work.device(), work.note)
        return plan_replayed(Calibrated(work.checkpoint, profile, work.device(), kept=kept), self)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return a plan of the right size; see `undecided_plan`."""
        return undecided_plan(checkpoint, self)

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return how many experts there were, and which stay, how wide."""
        blocks = plan.stage(Experts).blocks
        narrows = any(block.widths for block in blocks)
        return {
            "experts_before": [len(block.expert_widths) for block in checkpoint.config.blocks],
            "kept": [list(block.keep) for block in blocks],
            **({"widths": [list(block.widths) for block in blocks]} if narrows else {}),
            **{name: plan.options[name] for name in ("method", "router")},
        }

    def judged(self, work: Work, profile: RoutingProfile, plan: CompressionPlan, written: Path) -> Mapping[str, Any]:
        """Return what narrowing to the same bytes would have kept, where experts are dropped and weights refitted.

        Nothing for profiles without a reservoir or energies, and where constants stand in for experts.
        """
        del written
        blocks, old = plan.stage(Experts).blocks, work.checkpoint.config.blocks
        drops = any(len(block.keep) < len(before.expert_widths) for block, before in zip(blocks, old, strict=True))
        knows = {"reservoir.inputs", "neuron.energy"} <= profile.header.tensors.keys()
        if not (drops and knows) or self.repair is None or self.constants or self.neurons < 1.0:
            return {}
        from ditmoe_cli.compression.prune.narrowing_instead import compared

        calibrated = Calibrated(work.checkpoint, profile, work.device())
        return {"routed_error": asdict(compared(calibrated, plan.stage(Experts), self.multiple))}

    def closing(self, judged: Mapping[str, Any]) -> str | None:
        """Return the line that says so."""
        if "routed_error" not in judged:
            return None
        found = judged["routed_error"]
        multiple = "" if found["multiple"] == self.multiple == 64 else f" ⟨multiple⟩ {found['multiple']}"
        return (
            f"before refitting, dropping experts leaves {found['dropping']:.3g} of the routed output's energy as "
            f"error; narrowing all of them to the same bytes would leave {found['narrowing']:.3g} "
            f"(⟨neurons⟩ {found['neurons']:.4g} ⟨allocate⟩ global{multiple})"
        )


def check_pruning(checkpoint: Checkpoint, pruning: Pruning) -> None:
    """Refuse what cannot be done to the checkpoint, before it is profiled.

    Raises `InfeasibleError` where a block cannot keep so many, `UsageError` for a rank above its width and an open
    number of experts without neurons to share, and `BadInputError` where weights would be computed of packed ones.
    """
    if pruning.keep.auto and not (pruning.shared_budget and pruning.neurons < 1.0 and pruning.router):
        raise UsageError(
            "⟨keep⟩ auto: experts go that are left no neurons; give ⟨neurons⟩, ⟨allocate⟩ global and a ⟨router⟩"
        )
    kept_counts(checkpoint, pruning.keep)
    if pruning.rank > checkpoint.config.hidden_size:
        raise UsageError(f"⟨residual_rank⟩ {pruning.rank}: the model's width is {checkpoint.config.hidden_size}")
    if pruning.computes:
        require_plain(checkpoint)


def idle_settings(checkpoint: Checkpoint, pruning: Pruning) -> list[str]:
    """Return a note for each request that changes nothing of a checkpoint."""
    blocks = checkpoint.config.blocks
    keeps_all = kept_counts(checkpoint, pruning.keep) == [len(block.expert_widths) for block in blocks]
    notes = []
    if keeps_all and pruning.neurons == 1.0:
        notes.append(f"⟨keep⟩ {pruning.keep} keeps all experts of each block, so that none are dropped")
    if pruning.neurons < 1.0 and not pruning.shared_budget:
        widths = [width for block in blocks for width in block.expert_widths]
        if all(widths_of_ratio(width, pruning.neurons, pruning.multiple) == width for width in widths):
            notes.append(
                f"⟨neurons⟩ {pruning.neurons:g} leaves every expert its width, rounded up to a multiple of "
                f"{pruning.multiple}; give a smaller ⟨multiple⟩"
            )
    if pruning.narrow_shared and not any(block.shared_width for block in blocks):
        notes.append(f"⟨narrow_shared⟩ has no effect: {checkpoint.name} has no shared experts")
    return notes


def plan_prune(checkpoint: Checkpoint, profile: RoutingProfile | None, pruning: Pruning) -> CompressionPlan:
    """Plan to keep, in every block, the experts of highest score.

    Ties fall to the lower number. `profile` may be None for methods that need none. Raises `InfeasibleError`
    where fewer than top-k would stay, and `BadInputError` for a profile of another checkpoint. Not for plans that
    replay: `plan_replayed`.
    """
    assert not pruning.replays
    if profile is not None:
        require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    counts = kept_counts(checkpoint, pruning.keep)
    experts = tuple(len(block.expert_widths) for block in checkpoint.config.blocks)
    scores = SALIENCIES[pruning.method].score(profile.tables if profile else empty_tables(experts), pruning.seed)
    keeps = best(scores, counts)
    blocks = [_block_plan(checkpoint, pruning, i, keep, pruning.router or "ghost") for i, keep in enumerate(keeps)]
    return _plan(checkpoint, profile, pruning, blocks)


def plan_replayed(calibrated: Calibrated, pruning: Pruning) -> CompressionPlan:
    """Plan by replayed errors, and by energies of neurons where these are shared.

    Raises what `plan_prune` does, and `BadInputError` where the profile has no reservoir or no energies.
    """
    from ditmoe_cli.compression.prune.neuron_budget import NeuronBudget, shared_widths
    from ditmoe_cli.compression.prune.replayed_choice import Criterion, choose_replayed

    checkpoint, profile = calibrated.checkpoint, calibrated.profile
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    counts = kept_counts(checkpoint, pruning.keep)
    keeps = [tuple(range(count)) for count in counts]
    routers: list[RouterMode] = [pruning.router or "ghost"] * len(counts)
    if counts != [len(block.expert_widths) for block in checkpoint.config.blocks]:
        criterion = Criterion(pruning.method, pruning.router, pruning.shared_budget, pruning.seed)
        choices = choose_replayed(calibrated, criterion, counts)
        keeps, routers = [choice.keep for choice in choices], [choice.router for choice in choices]
    widths: Sequence[Mapping[int, int] | None] = [None] * len(keeps)
    if pruning.shared_budget and pruning.neurons < 1.0:
        budget = NeuronBudget(pruning.neurons, pruning.multiple, experts_may_go=pruning.keep.auto)
        widths = shared_widths(checkpoint, profile, keeps, budget)
        keeps = [tuple(each) for each in widths]
    blocks = [
        _block_plan(checkpoint, pruning, i, keep, router, wide)
        for i, (keep, router, wide) in enumerate(zip(keeps, routers, widths, strict=True))
    ]
    return _plan(checkpoint, profile, pruning, blocks)


def _plan(
    checkpoint: Checkpoint, profile: RoutingProfile | None, pruning: Pruning, blocks: Sequence[BlockPlan]
) -> CompressionPlan:
    return CompressionPlan(
        command="prune",
        source=checkpoint.fingerprint,
        profile=profile.digest if profile else None,
        options=pruning.options(),
        stages=(Experts(tuple(blocks), repair=pruning.repair),),
    )


def _block_plan(
    checkpoint: Checkpoint,
    pruning: Pruning,
    index: int,
    keep: tuple[int, ...],
    router: RouterMode,
    widths: Mapping[int, int] | None = None,
) -> BlockPlan:
    """Return a block's plan: which experts stay, how wide (as asked for, if None), and what stands in for others."""
    old = checkpoint.config.blocks[index]
    ratio, multiple = pruning.neurons, pruning.multiple
    narrows = ratio < 1.0
    if narrows and widths is None:
        widths = {e: widths_of_ratio(old.expert_widths[e], ratio, multiple) for e in keep}
    return BlockPlan(
        keep=keep,
        router=router,
        widths=tuple(widths[e] for e in keep) if widths is not None else (),
        shared_width=widths_of_ratio(old.shared_width, ratio, multiple) if narrows and pruning.narrow_shared else None,
        constants=pruning.constants and len(keep) < len(old.expert_widths),
        rank=pruning.rank if pruning.constants and len(keep) < len(old.expert_widths) else 0,
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
        raise BadInputError(f"{checkpoint.path}: {what}, so the bytes depend on which are kept; give a ⟨profile⟩")
    if pruning.shared_budget or pruning.router is None:
        raise BadInputError(
            f"{checkpoint.path}: what each block keeps, and the bytes too, rests on measured errors; give a ⟨profile⟩"
        )
    keeps = [tuple(range(count)) for count in counts]
    blocks = tuple(_block_plan(checkpoint, pruning, i, keep, pruning.router) for i, keep in enumerate(keeps))
    return CompressionPlan(
        "prune",
        checkpoint.fingerprint,
        options={**pruning.options(), UNDECIDED: True},
        stages=(Experts(blocks, repair=pruning.repair),),
    )


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
