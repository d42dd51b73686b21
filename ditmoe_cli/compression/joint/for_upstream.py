"""The planner of a compression that upstream's code loads: fewer and narrower experts, alike in all blocks. Torch-free.

Upstream (`export.upstream`) builds all blocks alike: one number of experts, one width that is a multiple of the
model's, a whole shared expert, a router row for each expert, and weights without formats. So few pairs of number and
width are within a size. Of each width the largest number that fits is carried out whole, without what upstream has no
module for, and the plan of least error on held-out calibration images is taken. Which experts stay is the choice of
REAP, and which neurons that of `compression.replay.eliminations`. In the end the plan of as many bytes that nothing
restricts is carried out too, which tells the price.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ditmoe_cli.compression.block_layout import require_original
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.estimates import carrying_out, repeated
from ditmoe_cli.compression.joint.compressing import Compressing, Goal, holding, once, tried_in
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, Rounding
from ditmoe_cli.compression.planner import Planner, Work, label_of
from ditmoe_cli.compression.precision.candidates import Candidates
from ditmoe_cli.compression.prune.pruning import Pruning, plan_prune
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.exporting.upstream import obstacle
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.routing.profile import RoutingProfile

_REPAIR = Repair(constant=False, linear=False)  # upstream's blocks have no place for either


@dataclass(frozen=True)
class Shape:
    """The experts of every block: how many, and how wide."""

    experts: int
    width: int


@dataclass(frozen=True)
class ForUpstream(Planner):
    """The planner of a compression to a size that upstream's code loads."""

    goal: Goal
    command: ClassVar[str] = "compress"
    needs_profile: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        return label_of(f"{self.command}-{self.goal.label}", "upstream")

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for the options of the plan."""
        return {**self.goal.options(), "target": "upstream"}

    def check(self, work: Work) -> None:
        """Raise the errors of quantised checkpoints, of what upstream cannot load, and of a size out of reach."""
        require_original(work.checkpoint)
        self.least_bytes(work)

    def least_bytes(self, work: Work) -> int:
        """Return the bytes of the smallest file that upstream loads.

        Raises `InfeasibleError` where they exceed the goal, and `BadInputError` where upstream loads no result.
        """
        limit = self.goal.limit(work.checkpoint)
        sizes = self._sizes(work)
        least = min(sizes.values())
        if least > limit:
            raise InfeasibleError(
                f"{work.checkpoint.path}: {limit:,} bytes are allowed, and the smallest file that upstream's code "
                f"loads takes {least:,} ({least / work.checkpoint.header.file_bytes:.3f} of it); give that ⟨size⟩ "
                "or more"
            )
        return least

    def estimates(self, work: Work, cfg: float) -> list[Estimate]:
        """Return what eliminating neurons and trying each shape takes, and the plan that nothing restricts."""
        tried, settings = [], {"cfg": cfg}
        for shape in self._worth_trying(work):
            plan = replace(self._plan(work, _first(work.checkpoint, shape.experts), shape), calibration=settings)
            tried += carrying_out(work.checkpoint, plan, 0)[:-1]
        elimination, measuring, _, *carrying = self._free.estimates(work, cfg)
        return [elimination, repeated(tried, "trying {} plans"), measuring, *carrying]

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan of least tried error, whose weights stay in the work folder."""
        from ditmoe_cli.compression.apply import loop_name
        from ditmoe_cli.compression.joint.choosing import tried_errors
        from ditmoe_cli.compression.rebuild import neuron_orders
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        assert profile is not None
        checkpoint, limit = work.checkpoint, self.goal.limit(work.checkpoint)
        kept = kept_measures(checkpoint, profile, work.device(), once(work.note))
        calibrated = Calibrated(checkpoint, profile, work.device(), kept=kept)
        orders = neuron_orders(calibrated, Experts(selection="elimination"))
        tried: list[tuple[float, CompressionPlan]] = []
        with tried_in(work) as folder:
            for shape in self._worth_trying(work):
                pruned = plan_prune(checkpoint, profile, Pruning(Keep(count=shape.experts), router="slice"))
                keeps = [block.keep for block in pruned.stage(Experts).blocks]
                plan = replace(self._plan(work, keeps, shape), profile=profile.digest)
                laid_out = planned_output(checkpoint, plan)
                if laid_out.predicted_bytes(work.output) > limit or obstacle(laid_out.config) is not None:
                    continue  # of an uneven checkpoint, whose experts or router rows differ
                held = tried_errors(calibrated, folder, plan, f"trying plan {len(tried) + 1} for", orders)
                tried.append((held.error, plan))
                tried.sort(key=lambda each: each[0])
                for _, worse in tried[1:]:
                    folder.drop_loop(loop_name(worse))
            if not tried:
                raise InfeasibleError(f"{checkpoint.path}: no choice of experts is within {limit:,} bytes; give more")
            size = planned_output(checkpoint, tried[0][1]).predicted_bytes(work.output)
            free = self._free_error(work, calibrated, folder, size)
        error, plan = tried[0]
        return replace(plan, options={**plan.options, "tried_error": error, "free_tried_error": free})

    @property
    def _free(self) -> Compressing:
        """The planner of the same goal that nothing restricts."""
        return Compressing(self.goal, Candidates())

    def _free_error(self, work: Work, calibrated: Calibrated, folder: WorkFolder, size: int) -> float:
        """Return the tried error of a plan of at most `size` bytes that nothing restricts."""
        from ditmoe_cli.compression.joint.choosing import FIRST_KAPPA, Trials, settled_program

        request = holding(self._free.request(work))
        program, curves = settled_program(request, calibrated, lambda _: size)
        trials = Trials(request, calibrated, curves, folder)
        tried = trials.carried_out(program.solved(size, FIRST_KAPPA))
        trials.drop(tried)
        return tried.held.error

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Raise `BadInputError`: errors are measured with a profile."""
        raise BadInputError(f"{checkpoint.path}: which plan is best rests on measured errors; give a ⟨profile⟩")

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> Mapping[str, Any]:
        """Return how many experts stay in each block, and how wide."""
        block = plan.stage(Experts).blocks[0]
        old = checkpoint.config.blocks[0].expert_widths
        return {"experts": len(block.keep), "width": block.widths[0] if block.widths else old[block.keep[0]]}

    def _sizes(self, work: Work) -> dict[Shape, int]:
        """Return the bytes of the file of each shape that upstream loads."""
        checkpoint = work.checkpoint
        config, found, reason = checkpoint.config, {}, None
        narrowest = min(width for block in config.blocks for width in block.expert_widths)
        for width in range(config.hidden_size, narrowest + 1, config.hidden_size):
            for experts in range(config.top_k, min(config.experts) + 1):
                shape = Shape(experts, width)
                laid_out = planned_output(checkpoint, self._plan(work, _first(checkpoint, experts), shape))
                reason = obstacle(laid_out.config)
                if reason is None:
                    found[shape] = laid_out.predicted_bytes(work.output)
        if not found:
            reason = reason or f"an expert has {narrowest} neurons, fewer than the model's width {config.hidden_size}"
            raise BadInputError(f"{checkpoint.path}: upstream's code loads nothing that comes of it: {reason}")
        return found

    def _worth_trying(self, work: Work) -> list[Shape]:
        """Return the shapes within the size that no other one there has at least as many experts as wide as."""
        limit = self.goal.limit(work.checkpoint)
        fits = [shape for shape, size in self._sizes(work).items() if size <= limit]
        return [
            shape
            for shape in fits
            if not any(o != shape and o.experts >= shape.experts and o.width >= shape.width for o in fits)
        ]

    def _plan(self, work: Work, keeps: Sequence[tuple[int, ...]], shape: Shape) -> CompressionPlan:
        """Return the plan that keeps experts at one width; its file is as large as with its figures."""
        blocks = []
        for keep, old in zip(keeps, work.checkpoint.config.blocks, strict=True):
            whole = all(old.expert_widths[expert] == shape.width for expert in keep)
            blocks.append(BlockPlan(keep, "slice", widths=() if whole else (shape.width,) * len(keep)))
        experts = Experts(tuple(blocks), repair=_REPAIR, selection="elimination")
        return CompressionPlan(
            self.command,
            work.checkpoint.fingerprint,
            options={**self.options(), "tried_error": 0.0},
            stages=(experts, Formats({}, Rounding())),  # without formats: carried out together, on both streams
            calibration=work.calibration(),
        )


def _first(checkpoint: Checkpoint, experts: int) -> list[tuple[int, ...]]:
    """Return the first experts of each block, in place of those that a profile would choose."""
    return [tuple(range(experts))] * checkpoint.config.depth
