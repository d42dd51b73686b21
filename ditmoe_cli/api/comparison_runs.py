"""How far checkpoints stray from others: kept from an earlier run, or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.guiding_requests import Guiding, sampling_work
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.sampling_requests import Running
from ditmoe_cli.briefs import Brief, Fact, shortened
from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, check_schedule
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.step_bins import choose_bins
from ditmoe_cli.evaluation.computed_share import parse_computed
from ditmoe_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.compare import CheckpointPair, KeptComparison, Outputs


@dataclass(frozen=True)
class Comparing:
    """Step bins of the measured errors."""

    bins: int | None = None


@dataclass(frozen=True)
class ComparisonFiles:
    """The files that a comparison writes, each where it is asked for."""

    grid: Path | None = None
    output: Path | None = None
    force: bool = False

    @property
    def outputs(self) -> Outputs:
        """The same as the comparison takes them."""
        from ditmoe_cli.evaluation.compare import Outputs

        return Outputs(self.output, self.grid, self.force)

    @property
    def path(self) -> str:
        """The absolute path that ``-q`` prints."""
        written = self.output or self.grid
        return str(written.absolute()) if written else ""


def pair_of(
    a: Checkpoint,
    b: Checkpoint,
    spec_of: Callable[[Checkpoint], SampleSpec],
    guiding: Guiding,
    comparing: Comparing,
    schedule: ComputeSchedule | None = None,
) -> CheckpointPair:
    """Return A and B with how they are sampled: both as A, or each in its own way where few steps are one's own.

    `schedule` is that of B. Raises `UsageError` for what is measured step by step, where steps differ, and
    `BadInputError` for a schedule that does not fit.
    """
    from ditmoe_cli.evaluation.compare import CheckpointPair
    from ditmoe_cli.evaluation.sampled_models import guidance_warning, guided_as, model_of, spec_beside

    models = model_of(a), model_of(b)
    spec = guided_as(spec_of(a), models[0], models, guiding.weak)
    own = spec_beside(b, spec_of, spec, models[0], models, guiding.weak)
    for warning in (
        guidance_warning(b.path, models[1], a.path, models[0], spec),
        guidance_warning(a.path, models[0], b.path, models[1], own),
    ):
        if warning is not None:
            note(warning)
    if schedule is not None:
        check_schedule(schedule, b, own.way)
    if own == spec:
        return CheckpointPair(a, b, spec, choose_bins(comparing.bins, spec.steps), guiding.weak, schedule=schedule)
    apart = f"{a.name} and {b.name} are sampled by other steps, so that images alone are compared"
    refuse_idle(comparing, f"where {apart}", "bins", "max_error")
    note(f"{apart}; ditmoe inspect ⟨values⟩ compares their weights")
    return CheckpointPair(a, b, spec, choose_bins(None, spec.steps), guiding.weak, own, schedule)


def compared(pairs: Sequence[CheckpointPair], running: Running, outputs: Outputs) -> list[KeptComparison]:
    """Return the result of each comparison, kept from an earlier run or measured; all are checked before any work.

    Torch is not imported where all were kept.
    """
    from ditmoe_cli.evaluation.compare import (
        KeptComparison,
        check_pair,
        compare_checkpoints,
        comparison_key,
        keep_comparison,
        kept_comparison,
    )

    for pair in pairs:
        check_pair(pair, replace(outputs, numbers=None, grid=None))
    keys = [comparison_key(pair, running.device) for pair in pairs]
    results: list[KeptComparison | None] = [
        None if outputs.force else kept_comparison(key, pair, outputs) for key, pair in zip(keys, pairs, strict=True)
    ]
    todo = [index for index, result in enumerate(results) if result is None]
    for index in todo:
        check_pair(pairs[index], outputs)
    if len(todo) < len(pairs):
        which = f"{len(pairs) - len(todo)} of {len(pairs)} results are" if len(pairs) > 1 else "the result is"
        note(f"{which} kept from an earlier run; ⟨force⟩ measures anew")
    runtime = running.runtime if todo else None
    estimates = [
        sampling_work(each, spec, running.batch, Guiding(spec.guide, pair.weak))
        for pair in (pairs[index] for index in todo)
        for each, spec in pair.sampled
    ]
    if runtime is not None:
        foretell(estimates, lambda: runtime.device)
    for index in todo:
        assert runtime is not None
        start = time.monotonic()
        try:
            measured = compare_checkpoints(pairs[index], runtime, outputs)
        except BaseException:
            finished = sum(result is not None for result in results)
            if finished:
                note(f"kept the results of {finished} of {len(pairs)} files; the same command goes on from there")
            raise
        results[index] = kept = KeptComparison(measured.to_json(), time.monotonic() - start)
        keep_comparison(keys[index], kept, outputs, note)
    return [result for result in results if result]


@dataclass(frozen=True, repr=False)
class ComparedCheckpoints(Brief):
    """How far one checkpoint strays from another.

    Attributes:
        figures: all that was measured, by name; docs/compare.md describes it.
        seconds: how long it took, or had taken where it was kept.
    """

    figures: Mapping[str, Any]
    seconds: float

    @property
    def relative_error(self) -> float | None:
        """‖v_B - v_A‖² / ‖v_A‖² over all steps and images; None where steps differ, or where it is infinite."""
        prediction = self.figures["prediction"]
        error: float | None = prediction["relative_error"] if prediction else None
        return error

    @property
    def image_error(self) -> float | None:
        """Mean squared error of the final images of the same seeds; None for latents."""
        images = self.figures["images"]
        error: float | None = images["mse"] if images else None
        return error

    def _brief(self) -> list[Fact]:
        routing, conditions = self.figures["routing"], self.figures["conditions"]
        return [
            ("relative error", shortened(self.relative_error)),
            ("image mse", shortened(self.image_error)),
            *([("routing overlap", shortened(routing["overlap"]))] if routing else []),
            *([("schedule", computed.told)] if (computed := parse_computed(self.figures.get("computed"))) else []),
            *((side, conditions[side]["path"]) for side in ("a", "b")),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all that was measured, by name."""
        return dict(self.figures)
