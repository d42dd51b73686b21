"""The planner of mixed precision: a format for every weight, chosen by a method within a budget. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.estimates import measuring_estimate
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.plan import CompressionPlan, Formats, Rounding
from ditmoe_cli.compression.planner import Planner, Work, label_of, tokens_label
from ditmoe_cli.compression.precision.budget import Budget
from ditmoe_cli.compression.precision.candidates import (
    Candidates,
    format_counts,
    idle_settings,
    left_alone,
    rounding_options,
)
from ditmoe_cli.compression.precision.mix import Mix, narrowest_bytes, too_small
from ditmoe_cli.compression.precision.mix_request import MixRequest, mix_request
from ditmoe_cli.compression.recorded import planned_step
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.effort import Estimate, branches_at
from ditmoe_cli.model.parameters import weight_group
from ditmoe_cli.progress import each
from ditmoe_cli.routing.profile import RoutingProfile

TYING = ("replay", "outlier")
"""The methods that give tied matrices one format; all others decide for whole experts, blocks or neurons."""


@dataclass(frozen=True)
class MixedPrecision(Planner):
    """The planner of a mix of formats.

    Attributes:
        budget: the largest file allowed.
        candidates: the formats to choose from.
        method: name of the method that chooses formats, of `MIXES`.
        rounding: method that rounds weights to their formats; None for the nearest values.
    """

    budget: Budget
    candidates: Candidates
    method: str = DEFAULT_METHODS["quantize"]
    rounding: Rounding | None = None
    command: ClassVar[str] = "quantize"
    needs_profile: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        return label_of(
            f"{self.command}-{self.budget.label}",
            self.method != DEFAULT_METHODS[self.command] and self.method,
            *self.candidates.labels(),
            "nearest" if self.rounding is None else "",
            tokens_label(self.rounding),
            self.rounding and self.rounding.smoothing and f"smooth{self.rounding.smoothing:g}",
        )

    def check(self, work: Work) -> None:
        """Raise the errors of quantised checkpoints, and of a budget below the narrowest formats; note what is idle."""
        self.least_bytes(work)
        for idle in idle_settings(work.checkpoint, self.candidates, self._request(work).formats):
            work.note(f"warning: {idle}")

    def estimates(self, work: Work, cfg: float) -> list[Estimate]:
        """Return what measuring the errors of formats takes, for the method that does so."""
        if self.method != DEFAULT_METHODS["quantize"]:
            return []
        offered = self._request(work).formats
        counts = {name: sum(fmt is not None for fmt in formats) for name, formats in offered.items()}
        return [measuring_estimate(work.checkpoint.config, counts, branches_at(cfg))]

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan of the method's mix, with the error of rounding all its weights at once."""
        from ditmoe_cli.compression.precision.trial import try_formats
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        assert profile is not None
        kept = kept_measures(work.checkpoint, profile, work.device(), work.note)
        calibrated = Calibrated(work.checkpoint, profile, work.device(), kept=kept)
        mix = MIXES[self.method].choose(self._held(work, self._request(work)), calibrated)
        for failure in mix.failures:
            work.note(f"warning: a solver of the mix gave no proof ({failure}); the plan names it beside its gap")
        tried_error = mix.tried_error
        if tried_error is None:
            tried_error = try_formats(calibrated, mix.formats).error
        return plan_mix(calibrated, mix, {**self.options(), "tried_error": tried_error}, self.rounding)

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for the options of the plan."""
        given = {"method": self.method, **self.budget.options(), **self.candidates.options()}
        return {**given, **rounding_options(self.rounding)}

    def least_bytes(self, work: Work) -> int:
        """Return the size of the file in the narrowest formats allowed.

        Raises `InfeasibleError` where it exceeds the budget, with a size that does: the file's history holds the size
        that is asked for, so a larger number may take more bytes itself.
        """
        request = self._request(work)
        least = narrowest_bytes(request)
        if least <= request.limit:
            return least
        while self.budget.size is not None:
            larger = narrowest_bytes(replace(self, budget=Budget(size=least))._request(work))
            if larger <= least:
                break
            least = larger
        raise too_small(request.limit, least)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Raise `BadInputError`: errors are measured with a profile."""
        raise BadInputError(f"{checkpoint.path}: which mix is best rests on measured errors; give a ⟨profile⟩")

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return the number of weights of each format, and the expected errors."""
        del checkpoint
        names = ("method", "predicted_error", "tried_error", "gap", "solver")
        return {**format_counts(plan), **{name: plan.options[name] for name in names if name in plan.options}}

    def _request(self, work: Work) -> MixRequest:
        step = planned_step(self._sized(work), work.checkpoint.config.experts)
        return mix_request(work, self.candidates, self.budget, step)

    def _held(self, work: Work, request: MixRequest) -> MixRequest:
        """Return the request without the formats that do not hold a weight's values; notes the weights left without."""
        narrow = [
            name for name, formats in request.formats.items() if formats == (None,) and self._asked_for(name, work)
        ]
        checked = each(request.formats, f"checking the values of {work.checkpoint.name}", "matrices")
        held = {name: held_formats(work.checkpoint, name, request.formats[name]) for name in checked}
        lost = [n for n, formats in held.items() if not any(formats) and any(request.formats[n])]
        for names, why in (
            (narrow, "their shape does not allow any of the formats"),
            (lost, "no format holds their values"),
        ):
            for message in left_alone(work.checkpoint, names, why):
                work.note(f"warning: {message}")
        return replace(request, formats=held)

    def _asked_for(self, name: str, work: Work) -> bool:
        """Return whether a weight might have had a format if it had another shape."""
        group = weight_group(work.checkpoint.weights[name].info)
        return any(
            width != "16" and float(width) >= self.candidates.floors.get(group or "", 0)
            for width in self.candidates.allowed
        )

    def _sized(self, work: Work) -> CompressionPlan:
        """Return a plan whose entry in the history of the file is as long as that of the plan to come."""
        solved = ("predicted_error", "gap") if self.method == DEFAULT_METHODS["quantize"] else ()
        options = {**self.options(), **dict.fromkeys((*solved, "tried_error"), 0.0)}
        stages = (Formats({}, self.rounding),)
        source = work.checkpoint.fingerprint
        return CompressionPlan("quantize", source, None, options, stages, calibration=work.calibration())


def held_formats(checkpoint: Checkpoint, name: str, formats: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Return the formats of a weight that hold its values, narrowest first; None alone where none does."""
    if not any(formats):
        return formats
    weight = checkpoint.finite_tensor(name)

    def holds(fmt: str) -> bool:
        try:
            parse_format(fmt).check_values(weight, name)
        except BadInputError:
            return False
        return True

    return tuple(fmt for fmt in formats if fmt is None or holds(fmt)) or (None,)


def plan_mix(
    calibrated: Calibrated, mix: Mix, options: Mapping[str, Any], rounding: Rounding | None
) -> CompressionPlan:
    """Return the plan that stores weights in the formats of a mix, with `options` beside the mix's own."""
    return CompressionPlan(
        "quantize",
        calibrated.checkpoint.fingerprint,
        calibrated.profile.digest,
        {**options, **mix.options},
        stages=(Formats(mix.formats, rounding, mix.ordering),),
    )
