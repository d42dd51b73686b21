"""What functions return that write checkpoints: where the result is, how large, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditmoe_cli.api.foretelling import estimate_of, told
from ditmoe_cli.briefs import Brief, Fact, shortened
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import Rate


@dataclass(frozen=True, repr=False)
class WrittenCheckpoint(Brief):
    """A checkpoint that was written, or that the same request had written before.

    Attributes:
        path: the file or folder.
        bytes: its size.
        bytes_before: the size of the checkpoint that it was made from.
        figures: what is known of it by name: what the plan does, and what was measured.
        plan: the plan that it was made by; None for copies and for trained checkpoints.
        plan_digest: the digest of that plan, as the history of the file has it.
        profile: the routing profile that it rests on, where it rests on one.
        seconds: how long it took; None where it was up to date.
    """

    path: Path
    bytes: int
    bytes_before: int
    figures: Mapping[str, Any] = field(default_factory=dict)
    plan: CompressionPlan | None = None
    plan_digest: str | None = None
    profile: Path | None = None
    seconds: float | None = None

    def __fspath__(self) -> str:
        """Return its path, so that it stands wherever a checkpoint is taken."""
        return str(self.path)

    @property
    def ratio(self) -> float:
        """Its size as a share of the input's."""
        return self.bytes / self.bytes_before

    @property
    def up_to_date(self) -> bool:
        """Whether it was there already, made by the same request."""
        return self.seconds is None

    def _brief(self) -> list[Fact]:
        errors, held = self.figures.get("refit_error"), self.figures.get("held_error")
        figures = {name: value for name, value in self.figures.items() if isinstance(value, float)}
        return [
            ("", self.path),
            ("bytes", f"{self.bytes_before:,} to {self.bytes:,} ({self.ratio:.3f} of the input)"),
            *((name.replace("_", " "), shortened(value)) for name, value in figures.items()),
            *([("refit error", _worst(errors))] if errors else []),
            *([("held error", " to ".join(map(shortened, held)))] if held else []),
            ("up to date", "") if self.seconds is None else ("seconds", f"{self.seconds:,.1f}"),
        ]

    def open(self) -> Checkpoint:
        """Return the checkpoint, opened."""
        return open_checkpoint(self.path)

    def to_json(self) -> dict[str, Any]:
        """Return sizes and figures by name."""
        result = {**size_facts(self.bytes, self.bytes_before), **self.figures, "plan_digest": self.plan_digest}
        return {**result, **({"up_to_date": True} if self.up_to_date else {"seconds": self.seconds})}


@dataclass(frozen=True, repr=False)
class ForeseenCheckpoint(Brief):
    """What would be written: where, how large, by which plan (None for a copy), and what that would take."""

    path: Path
    bytes: int
    bytes_before: int
    plan: CompressionPlan | None
    estimates: Sequence[Estimate]
    rate: Rate

    @property
    def ratio(self) -> float:
        """The size as a share of the input's."""
        return self.bytes / self.bytes_before

    @property
    def estimate(self) -> Mapping[str, Any]:
        """What it would take: ``seconds``, ``memory`` in bytes, and the ``phases``."""
        return estimate_of(self.estimates, self.rate)

    @property
    def decided_plan(self) -> CompressionPlan | None:
        """The plan; None where it is open until the checkpoint is profiled, when only its size is right."""
        return self.plan if self.plan is not None and self.plan.decided else None

    def _brief(self) -> list[Fact]:
        return [
            ("would write", self.path),
            ("bytes", f"{self.bytes_before:,} to {self.bytes:,} ({self.ratio:.3f} of the input)"),
            *([("takes", told(self.estimates, self.rate))] if self.estimates else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return sizes, estimate and plan by name."""
        plan = self.decided_plan
        return {
            **size_facts(self.bytes, self.bytes_before),
            "estimate": self.estimate,
            "plan": plan.document() if plan is not None else None,
        }


def _worst(errors: Sequence[float]) -> str:
    """Return the largest of one error a block, and where it is."""
    return f"at most {shortened(max(errors))}, in block {errors.index(max(errors))}"


def size_facts(size: int, before: int) -> dict[str, Any]:
    """Return the bytes of an output, of its input, and their ratio, by name."""
    return {"bytes": size, "bytes_before": before, "ratio": size / before}
