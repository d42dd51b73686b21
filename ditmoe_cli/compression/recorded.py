"""What the provenance of a file records of a plan: its options, and the errors that were measured. Torch-free.

Errors are texts of one width each, so that the bytes of a file are known before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ditmoe_cli.compression.plan import FIGURES, UNDECIDED, CompressionPlan, Experts, Formats
from ditmoe_cli.files.provenance import Step

_WIDTH = 9  # of 1.234e-05
_RECORDED = ("predicted_error", "tried_error", "gap")  # figures of a plan that its file keeps


@dataclass(frozen=True)
class Measured:
    """Errors measured while weights were computed.

    Attributes:
        refit_error: each block's held-out error after refitting over that before; empty where none was refitted.
        prediction_error: relative squared error of the guided prediction of a rounded model, on the calibration states.
        top_k_agreement: of each block, the share of selected experts that original and rounded model both select.
    """

    refit_error: tuple[float, ...] = ()
    prediction_error: float | None = None
    top_k_agreement: tuple[float, ...] = ()

    def to_json(self) -> dict[str, float | list[float]]:
        """Return the measured errors by name."""
        result: dict[str, float | list[float]] = {}
        if self.refit_error:
            result["refit_error"] = list(self.refit_error)
        if self.prediction_error is not None:
            result |= {"prediction_error": self.prediction_error, "top_k_agreement": list(self.top_k_agreement)}
        return result

    def recorded(self) -> dict[str, list[str]]:
        """Return the measured errors as provenance holds them."""
        return {
            name: fixed(value if isinstance(value, list) else [value]) for name, value in sorted(self.to_json().items())
        }


def fixed(values: Iterable[float]) -> list[str]:
    """Return numbers of at least 0 as texts of one width, of four digits, as ``1.234e-05``.

    Numbers below 1e-99 become 0, and those above 9e99 infinite.
    """
    return [f"{0.0 if value < 1e-99 else math.inf if value > 9e99 else value:.3e}".rjust(_WIDTH) for value in values]


def planned_step(plan: CompressionPlan, depth: int) -> Step:
    """Return the step of a plan for a model of `depth` blocks, with zeros in place of what is yet to be measured."""
    options = {name: value for name, value in plan.options.items() if name not in (*FIGURES, UNDECIDED)}
    known = {name: fixed([plan.options[name]]) for name in _RECORDED if name in plan.options}
    open_figures = _to_be_measured(plan, depth).recorded()
    return Step(
        plan.command, plan.source, plan.digest, options, {**known, **open_figures}, plan.edited, plan.calibration
    )


def _to_be_measured(plan: CompressionPlan, depth: int) -> Measured:
    """Return zeros for what carrying out a plan measures."""
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
