"""What is asked of a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from ditmoe_cli.api.calling import AnyCheckpoint
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.training_request import DEFAULT_BATCH, DEFAULT_MINUTES, Codes
from ditmoe_cli.model.checkpoint import Checkpoint


def parse_groups(text: str) -> tuple[str, ...]:
    """Return the groups of weights that a list names, each once and in the order of `GROUPS`, all for ``all``."""
    words = {word.strip() for word in text.split(",")}
    unknown = sorted(words - {"all", *GROUPS})
    return (*(group for group in GROUPS if words & {"all", group}), *unknown)


@dataclass(frozen=True)
class TrainingOptions:
    """What is trained towards what, for how long, and how."""

    original: AnyCheckpoint | None = None
    minutes: float | None = None
    train: tuple[str, ...] = GROUPS
    codes: str = "fixed"
    batch: int = DEFAULT_BATCH
    rate: float | None = None
    seed: int = 0
    clock: tuple[int, ...] | None = field(default=None, kw_only=True)

    def fields(self, original: Checkpoint, iterations: int | None) -> dict[str, Any]:
        """Return what is asked for, as fields of a `TrainingRequest`."""
        return {
            "original": original.fingerprint,
            "clock": self.clock,
            "minutes": DEFAULT_MINUTES if self.minutes is None and iterations is None else self.minutes,
            "iterations": iterations,
            "train": self.train,
            "codes": cast(Codes, self.codes),
            "batch": self.batch,
            "rate": self.rate,
            "seed": self.seed,
        }
