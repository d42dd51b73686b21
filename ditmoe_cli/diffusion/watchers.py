"""Watchers: callables that are shown model evaluations while they happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.diffusion.predictor import Predictor
    from ditmoe_cli.model.moe import Observer

StepWatcher = Callable[["Tensor", float], None]


@dataclass(frozen=True)
class Watchers:
    """`on_step` is called with (x, t) before each model evaluation, `observer` with each block's event during it.

    `through` wraps the guided predictor, to keep predictions and to give kept ones again in place of evaluations.
    """

    observer: Observer | None = None
    on_step: StepWatcher | None = None
    through: Callable[[Predictor], Predictor] = lambda predict: predict


UNWATCHED = Watchers()
