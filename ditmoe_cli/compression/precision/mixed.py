"""The planner of mixed precision: a format for every weight, chosen by a method within a budget. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.plan import CompressionPlan, Rounding
from ditmoe_cli.compression.planner import Planner, Work
from ditmoe_cli.compression.precision.budget import Budget, budget_bytes, check_budget, plan_mixed
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats, format_counts
from ditmoe_cli.compression.precision.task import Task
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class MixedPrecision(Planner):
    """The planner of a mix of formats.

    Attributes:
        budget: how large the file may be.
        candidates: the formats to choose from.
        method: by which formats are chosen, of `MIXES`.
        rounding: how weights are rounded to their formats; None for the nearest values.
        label: ending of the default output's name.
    """

    budget: Budget
    candidates: Candidates
    method: str = DEFAULT_METHODS["quantize"]
    rounding: Rounding | None = None
    label: str = "quantize"
    command: ClassVar[str] = "quantize"
    needs_profile: ClassVar[bool] = True

    def check(self, work: Work) -> None:
        """Refuse checkpoints that are quantised already, and a budget that nothing fits."""
        formats = candidate_formats(work.checkpoint, self.candidates)
        check_budget(work.checkpoint, formats, self.candidates, self._limit(work), work.output)

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Choose formats by the method, and try them where the method has not."""
        from ditmoe_cli.compression.precision.trial import trial

        assert profile is not None
        checkpoint, device = work.checkpoint, work.device()
        task = Task(
            checkpoint=checkpoint,
            profile=profile,
            candidates=self.candidates,
            formats=candidate_formats(checkpoint, self.candidates),
            limit=self._limit(work),
            output=work.output,
            device=device,
            bar=work.bar,
        )
        choice = MIXES[self.method].choose(task)
        tried = choice.tried
        if tried is None:
            tried = trial(checkpoint, profile, choice.formats, device, work.bar).error
        options = {"method": self.method, **self.budget.options(), "tried_error": tried}
        return plan_mixed(checkpoint, profile.digest, choice, options, self.rounding)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Raise `BadInputError`: errors are measured with a profile."""
        raise BadInputError(f"{checkpoint.path}: which mix is best rests on measured errors; give a --profile")

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return how many weights get each format, and the errors that are expected."""
        del checkpoint
        names = ("method", "predicted_error", "tried_error", "gap", "solver")
        return {**format_counts(plan), **{name: plan.options[name] for name in names if name in plan.options}}

    def _limit(self, work: Work) -> int:
        """Return the bytes that the file may take."""
        return budget_bytes(work.checkpoint, self.budget, self.candidates, work.output)
