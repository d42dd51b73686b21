"""What the provenance of a file records of a plan: its options, and the errors that were measured. Torch-free.

Errors are texts of one width each, so that the bytes of a file are known before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast, get_args

from ditmoe_cli.compression.left_out import defaults_of
from ditmoe_cli.compression.plan import (
    FIGURES,
    UNDECIDED,
    BlockPlan,
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    PlanStage,
    Retraining,
    Rounding,
    RouterMode,
)
from ditmoe_cli.compression.training.training_request import open_clock
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.making import computed_here, written_here
from ditmoe_cli.files.names import in_expert, split_name
from ditmoe_cli.files.provenance import Step, expert_fates
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.version import __version__

CLOCK = "clock"
"""The entry among what was measured that keeps what the clock chose for a training (`training_request.Clock`)."""
GIVEN_CLOCK = "given-clock"
"""The piece of a work folder that holds what an earlier run chose by the clock, where that is given."""
_WIDTH = 9  # of 1.234e-05
_RECORDED = ("predicted_error", "tried_error", "damage", "gap")  # figures of a plan that its file keeps


@dataclass(frozen=True)
class Measured:
    """Errors measured while weights were computed.

    Attributes:
        refit_error: each block's held-out error after refitting over that before; empty where none was refitted.
        prediction_error: relative squared error of the guided prediction of a rounded model, on the calibration states.
        top_k_agreement: of each block, the share of selected experts that original and rounded model both select.
        held_error: of a trained model, the relative squared error of the guided prediction on held-out states, before
            training and after.
        clock: of a trained model, what the clock chose for its training.
    """

    refit_error: tuple[float, ...] = ()
    prediction_error: float | None = None
    top_k_agreement: tuple[float, ...] = ()
    held_error: tuple[float, ...] = ()
    clock: tuple[int, ...] = ()

    def to_json(self) -> dict[str, float | list[float]]:
        """Return the measured errors by name."""
        result: dict[str, float | list[float]] = {}
        if self.refit_error:
            result["refit_error"] = list(self.refit_error)
        if self.prediction_error is not None:
            result |= {"prediction_error": self.prediction_error, "top_k_agreement": list(self.top_k_agreement)}
        if self.held_error:
            result["held_error"] = list(self.held_error)
        return result

    def recorded(self) -> dict[str, list[str]]:
        """Return the measured errors as provenance holds them."""
        errors = {
            name: fixed(value if isinstance(value, list) else [value]) for name, value in sorted(self.to_json().items())
        }
        return {**errors, CLOCK: whole(self.clock)} if self.clock else errors


def fixed(values: Iterable[float]) -> list[str]:
    """Return numbers of at least 0 as texts of one width, of four digits, as ``1.234e-05``.

    Numbers below 1e-99 become 0, and those above 9e99 infinite.
    """
    return [f"{0.0 if value < 1e-99 else math.inf if value > 9e99 else value:.3e}".rjust(_WIDTH) for value in values]


def whole(counts: Iterable[int]) -> list[str]:
    """Return whole numbers of at most nine digits as texts of one width."""
    return [f"{count:{_WIDTH}d}" for count in counts]


def planned_step(plan: CompressionPlan, experts: Sequence[int]) -> Step:
    """Return the step of a plan for a model with so many experts in each block.

    Zeros stand in place of what is yet to be measured.
    """
    options = {name: value for name, value in plan.options.items() if name not in (*FIGURES, UNDECIDED)}
    known = {name: fixed([plan.options[name]]) for name in _RECORDED if name in plan.options}
    open_figures = _to_be_measured(plan, len(experts)).recorded()
    own = {**plan.to_json(), "digest": plan.written} if plan.edited else plan.to_json() if plan.by_hand else None
    return Step(
        plan.command,
        plan.source,
        plan.digest,
        options,
        {**known, **open_figures},
        edited=plan.edited,
        experts=_experts(plan, experts),
        request=request_of(plan),
        calibration=plan.calibration,
        defaults={} if own is not None else defaults_of(plan.command, options),
        made=computed_here() if plan.computes else written_here(),
        planned=own,
    )


def request_of(plan: CompressionPlan) -> str:
    """Return the digest of what a plan's result is asked for by: the planner's request, else the plan itself."""
    if plan.request is not None and not plan.edited:
        return plan.request
    return digest({"version": __version__, "plan": plan.digest})


def _experts(plan: CompressionPlan, counts: Sequence[int]) -> tuple[str, ...]:
    """Return what becomes of each block's experts (`Step.experts`); nothing where the plan has no such stage."""
    stage = next((stage for stage in plan.stages if isinstance(stage, Experts)), Experts())
    return tuple(_fates(block, count) for block, count in zip(stage.blocks, counts, strict=False))


def _fates(block: BlockPlan, count: int) -> str:
    leads = {**{e: e for e in block.keep}, **dict(block.merged)}
    return "".join(str(leads.get(e, "-")).rjust(_digits(count)) for e in range(count))


def _digits(count: int) -> int:
    return len(str(count - 1))


def recorded_plan(step: Step, source: Checkpoint, target: Checkpoint) -> CompressionPlan:
    """Return what the history of `target` tells about the plan by which it was made from `source`.

    Formats and widths are those of its weights, formats under the names that `source` has for them; how weights were
    refitted is left out, and of rounding only whether it was GPTQ's is told.
    """
    figures = {name: float(step.measured[name][0]) for name in _RECORDED if name in step.measured}
    stages: list[PlanStage] = []
    blocks = _recorded_blocks(step, source, target) if step.experts else ()
    formats = _recorded_formats(source, target, blocks)
    if blocks:
        stages.append(Experts(blocks, step.options.get("method")))
    elif "delta" in step.options:
        stages.append(Differences(step.options["delta"], step.options["delta_ratio"]))
    rounding = Rounding() if {"prediction_error", "held_error"} & set(step.measured) else None
    if (formats or rounding) if blocks else "delta" not in step.options:
        stages.append(Formats(formats, rounding))
    if step.options.get("heal") or "steps" in step.options:
        stages.append(Retraining(step.options.get("minutes"), student_steps=step.options.get("steps")))
    return CompressionPlan(step.command, step.source, None, {**step.options, **figures}, tuple(stages))


def _recorded_blocks(step: Step, source: Checkpoint, target: Checkpoint) -> tuple[BlockPlan, ...]:
    asked = str(step.options.get("router"))
    router = cast(RouterMode, asked if asked in get_args(RouterMode) else "ghost")
    blocks = []
    for text, old, new in zip(step.experts, source.config.blocks, target.config.blocks, strict=True):
        fates = expert_fates(text)
        keep = tuple(e for e, fate in enumerate(fates) if fate == str(e))
        merged = tuple((e, int(fate)) for e, fate in enumerate(fates) if fate not in ("-", str(e)))
        widths = new.expert_widths if new.expert_widths != tuple(old.expert_widths[e] for e in keep) else ()
        shared = new.shared_width if new.shared_width != old.shared_width else None
        blocks.append(BlockPlan(keep, router, merged, widths, shared))
    return tuple(blocks)


def _recorded_formats(source: Checkpoint, target: Checkpoint, blocks: Sequence[BlockPlan]) -> dict[str, str]:
    """Return the formats of weights that had none before, by the names that the source has for them."""
    found = {}
    for name, weight in target.weights.items():
        old = _old_name(name, blocks)
        if weight.format is not None and old in source.weights and source.weights[old].format is None:
            found[old] = str(weight.format)
    return found


def _old_name(name: str, blocks: Sequence[BlockPlan]) -> str:
    """Return the name of a weight before experts were renumbered."""
    parts = split_name(name)
    if not blocks or parts.block is None or parts.expert is None:
        return name
    return in_expert(parts.block, blocks[parts.block].keep[parts.expert], parts.rest)


def _to_be_measured(plan: CompressionPlan, depth: int) -> Measured:
    """Return zeros for what carrying out a plan measures."""
    if plan.retraining is not None:
        trainings = 1 if plan.retraining.student_steps is not None else 2  # of few steps, or of blocks and the model
        clock = open_clock(trainings) if plan.retraining.minutes is not None else ()
        return Measured(held_error=(0.0, 0.0), clock=clock)
    zeros, refit, rounds = (0.0,) * depth, False, False
    for stage in plan.stages:
        match stage:
            case Experts():
                refit = bool(stage.blocks) and stage.repair is not None
            case Formats():
                rounds = stage.rounding is not None
    return Measured(
        refit_error=zeros if refit else (),
        prediction_error=0.0 if rounds else None,
        top_k_agreement=zeros if rounds else (),
    )


def with_measured(step: Step, measured: Measured) -> Step:
    """Return a step with the errors that were measured."""
    return step.with_measured({**step.measured, **measured.recorded()})
