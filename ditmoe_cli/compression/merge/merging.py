"""The merging planner: from groups to a plan. Which experts are alike is measured in the profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ditmoe_cli.compression.block_layout import require_plain
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MERGES
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
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile, require_profile_of


@dataclass(frozen=True)
class Merging(Planner):
    """The planner of merging.

    Attributes:
        groups: number of experts that each block keeps.
        method: name of the method.
        router: router mode for the rows of merged experts.
        repair: refitting of the merged weights; None for none.
    """

    groups: Keep
    method: str = DEFAULT_METHODS["merge"]
    router: RouterMode = "ghost"
    repair: Repair | None = None
    command: ClassVar[str] = "merge"
    needs_profile: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        plain = Merging(self.groups)
        return label_of(
            f"{self.command}-groups{self.groups}",
            self.method != plain.method and self.method,
            self.router != plain.router and self.router,
            repair_label(self.repair),
        )

    def check(self, work: Work) -> None:
        """Raise the errors of impossible numbers of groups, and of packed experts, whose weights cannot be computed."""
        counts = group_counts(work.checkpoint, self)
        if counts == [len(block.expert_widths) for block in work.checkpoint.config.blocks]:
            work.note(f"warning: ⟨groups⟩ {self.groups} is as many as each block has experts, so that none are merged")
        require_plain(work.checkpoint)

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan of `plan_merge`."""
        assert profile is not None
        return plan_merge(work.checkpoint, profile, self)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return a plan of the right size; see `undecided_merge`."""
        return undecided_merge(checkpoint, self)

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return how many experts there were, and which are merged, the one that gives its place first."""
        experts = plan.stage(Experts)
        groups = [
            [[lead, *(e for e, into in block.merged if into == lead)] for lead in block.keep]
            for block in experts.blocks
        ]
        return {
            "experts_before": [len(block.expert_widths) for block in checkpoint.config.blocks],
            "groups": groups,
            "method": experts.merging,
            "router": plan.options["router"],
        }

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for the options of the plan."""
        router = "map" if self.router == "ghost" else self.router
        given = {"groups": str(self.groups), "method": self.method, "router": router}
        return {**given, **repair_options(self.repair)}


def group_counts(checkpoint: Checkpoint, merging: Merging) -> list[int]:
    """Return how many experts each block is left with.

    Raises `InfeasibleError` where it cannot be, and `BadInputError` where experts are merged already or differ in
    width.

    A block may have fewer than top-k: a token's slots then share an expert, and its routing weights add, unless rows
    are sliced.
    """
    counts = []
    for i, block in enumerate(checkpoint.config.blocks):
        experts, groups = len(block.expert_widths), merging.groups.of(len(block.expert_widths))
        least = checkpoint.config.top_k if merging.router == "slice" else 1
        if not least <= groups <= experts:
            raise InfeasibleError(
                f"⟨groups⟩ {merging.groups}: block {i} has {experts} experts and can be left with {least} to {experts}"
            )
        if groups < experts:
            _require_alike(checkpoint, i)
        counts.append(groups)
    return counts


def _require_alike(checkpoint: Checkpoint, index: int) -> None:
    _rows(checkpoint, index)
    if len(set(checkpoint.config.blocks[index].expert_widths)) > 1:
        raise BadInputError(f"{checkpoint.path}: the experts of block {index} differ in width and cannot be merged")


def plan_merge(checkpoint: Checkpoint, profile: RoutingProfile, merging: Merging) -> CompressionPlan:
    """Plan to merge every block's experts within groups. The member that was selected most gives a group its place.

    Raises `InfeasibleError` for numbers that cannot be, and `BadInputError` for a profile of another checkpoint or one
    that lacks what the method needs.
    """
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    blocks = []
    with phase(f"grouping the experts of {checkpoint.name}", checkpoint.config.depth, "blocks") as progress:
        for index, count in enumerate(group_counts(checkpoint, merging)):
            inputs = _inputs(checkpoint, profile, merging.method, index)
            groups = MERGES[merging.method].group(inputs, count)
            blocks.append(_block_plan(groups, inputs.selected.tolist(), merging.router))
            progress(1)
    return _plan(checkpoint, merging, blocks, profile.digest, merging.options())


def undecided_merge(checkpoint: Checkpoint, merging: Merging) -> CompressionPlan:
    """Return a plan of the right size whose groups are not chosen yet, to predict bytes without a profile."""
    blocks = []
    for index, count in enumerate(group_counts(checkpoint, merging)):
        experts = len(checkpoint.config.blocks[index].expert_widths)
        groups = (*((e,) for e in range(count - 1)), tuple(range(count - 1, experts)))
        blocks.append(_block_plan(groups, (), merging.router))
    return _plan(checkpoint, merging, blocks, None, {**merging.options(), UNDECIDED: True})


def _plan(
    checkpoint: Checkpoint,
    merging: Merging,
    blocks: Sequence[BlockPlan],
    profile: str | None,
    options: Mapping[str, object],
) -> CompressionPlan:
    return CompressionPlan(
        command="merge",
        source=checkpoint.fingerprint,
        profile=profile,
        options=options,
        stages=(Experts(tuple(blocks), merging.method, merging.repair),),
    )


def _block_plan(groups: Groups, selected: Sequence[float], router: RouterMode) -> BlockPlan:
    leads = {max(group, key=lambda e: (selected[e] if selected else 0, -e)): group for group in groups}
    pairs = sorted((e, lead) for lead, group in leads.items() for e in group if e != lead)
    return BlockPlan(tuple(sorted(leads)), router, merged=tuple(pairs))


def _inputs(checkpoint: Checkpoint, profile: RoutingProfile, method: str, index: int) -> GroupingInputs:
    """Return what a block's grouping rests on, as numpy arrays."""
    from ditmoe_cli.model.expert_weights import read_expert

    experts = len(checkpoint.config.blocks[index].expert_widths)
    needed = MERGES[method]
    if needed.needs_means and "output.all_token_mean" not in profile.header.tensors:
        raise BadInputError(
            f"{profile.path}: ⟨method⟩ {method} groups experts by their outputs on the same tokens, which the profile "
            "lacks; profile again without ⟨fast⟩"
        )
    rows = _rows(checkpoint, index)
    grams = profile.block_tensor("router.logit_gram", index)[..., rows, :][..., rows].flatten(0, 1)
    means = None
    if needed.needs_means:
        means = profile.block_tensor("output.all_token_mean", index)[:, :, :experts].flatten(0, 1).numpy()
    return GroupingInputs(
        selected=profile.block_tensor("selected", index)[..., :experts].sum(dim=(0, 1)).double().numpy(),
        logit_grams=grams.numpy(),
        means=means,
        experts=lambda: [read_expert(checkpoint, index, e) for e in range(experts)],
    )


def _rows(checkpoint: Checkpoint, index: int) -> list[int]:
    """Return the router row of each expert. Raises `BadInputError` where experts have several, or none."""
    expert_of = checkpoint.expert_map(index)
    experts = range(len(checkpoint.config.blocks[index].expert_widths))
    if any(expert_of.count(e) != 1 for e in experts):
        raise BadInputError(
            f"{checkpoint.path}: experts of block {index} are merged already; merge the checkpoint that it came from"
        )
    return [expert_of.index(e) for e in experts]
