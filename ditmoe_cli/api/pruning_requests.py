"""What is asked of a pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.planning_requests import Refitting
from ditmoe_cli.compression.counts import parse_keep
from ditmoe_cli.compression.plan import Repair, RouterMode
from ditmoe_cli.compression.prune.pruning import Pruning
from ditmoe_cli.compression.prune.widths import widths_of_ratio
from ditmoe_cli.errors import UsageError


@dataclass(frozen=True)
class Dropping:
    """Which experts are kept, and how routers go on."""

    keep: str | None = None
    method: str = "reap"
    seed: int = 0
    router: str = "ghost"
    allocate: str = "uniform"


@dataclass(frozen=True)
class Narrowing:
    """How kept experts are narrowed."""

    neurons: float = 1.0
    multiple: int = 64
    narrow_shared: bool = False


@dataclass(frozen=True)
class Replacing(Refitting):
    """Repairs and replacements of dropped experts."""

    scale: bool = False
    constants: bool = False
    residual_rank: int = 0

    def repair(self, router: str) -> Repair | None:
        """Return how to refit or scale, or None for neither. Raises `UsageError` for a scale without a refit."""
        if self.scale and not self.refit:
            raise UsageError("⟨scale⟩ is a repair; leave out ⟨no_refit⟩")
        scaling = Repair(scale=True, shared=False, constant=False, linear=False, tokens=self.refit_tokens)
        return scaling if self.scale else super().repair(router)


def pruning_of(dropping: Dropping, narrowing: Narrowing, replacing: Replacing) -> Pruning:
    """Return what to prune. Raises `UsageError` for unknown names and values out of range."""
    keep = "1.0" if dropping.keep is None and narrowing.neurons != 1.0 else dropping.keep
    if keep is None:
        raise UsageError(
            "⟨keep⟩ is missing: give a ratio such as 0.5 or a count such as 4, or ⟨neurons⟩ to narrow only"
        )
    widths_of_ratio(narrowing.multiple, narrowing.neurons, narrowing.multiple)  # refuses what is out of range
    refuse_idle_options(dropping, narrowing, replacing)
    return Pruning(
        keep=parse_keep(keep),
        method=dropping.method,
        router=None if dropping.router == "auto" else cast(RouterMode, dropping.router),
        seed=dropping.seed,
        repair=replacing.repair(dropping.router),
        shared_budget=dropping.allocate == "global",
        neurons=narrowing.neurons,
        multiple=narrowing.multiple,
        narrow_shared=narrowing.narrow_shared,
        constants=replacing.constants or replacing.residual_rank > 0,
        rank=replacing.residual_rank,
    )


def refuse_idle_options(dropping: Dropping, narrowing: Narrowing, replacing: Replacing) -> None:
    """Raise `UsageError` for an option that has no effect beside the others."""
    if dropping.keep is None:
        refuse_idle(dropping, "without ⟨keep⟩, since all experts stay", "method", "seed", "router")
        refuse_idle(replacing, "without ⟨keep⟩, since all experts stay", "constants", "residual_rank")
    if dropping.method != "random":
        refuse_idle(dropping, "without ⟨method⟩ random", "seed")
    if narrowing.neurons == 1.0:
        refuse_idle(narrowing, "without ⟨neurons⟩", "multiple", "narrow_shared")
