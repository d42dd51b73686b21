"""Estimates of time and memory, told before work of more than a minute, and by every dry run. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ditmoe_cli.api.notes import note
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import Rate, known_rate, measured_rate
from ditmoe_cli.processes import first_process
from ditmoe_cli.progress import duration, human_bytes

_WORTH_TELLING = 60.0  # seconds
_WORTH_MEASURING = 15.0  # seconds at the assumed rate


def foretell(
    estimates: Sequence[Estimate], device: Callable[[], str], rate_of: Callable[[str], Rate] = measured_rate
) -> None:
    """Tell what work is about to take, if it is more than a minute.

    The machine's speed is measured, which takes torch, only for work that multiplies matrices.
    """
    rate = known_rate("cpu")
    if not first_process() or _seconds(estimates, rate) < _WORTH_MEASURING:
        return
    if any(estimate.effort.multiplies for estimate in estimates):
        rate = rate_of(device())
    if _seconds(estimates, rate) >= _WORTH_TELLING:
        note(told(estimates, rate))


def told(estimates: Sequence[Estimate], rate: Rate) -> str:
    """Return an estimate for reading: ``about 12 min and 3.10 GB on 2 threads: refitting 28 blocks, writing``."""
    memory = max(estimate.memory for estimate in estimates)
    phases = ", ".join(estimate.what for estimate in estimates)
    return f"about {duration(_seconds(estimates, rate))} and {human_bytes(memory)} {rate.where}: {phases}"


def estimate_of(estimates: Sequence[Estimate], rate: Rate) -> dict[str, Any]:
    """Return an estimate as JSON: seconds and bytes of memory, in all and by phase, and what they rest on."""
    return {
        "seconds": _seconds(estimates, rate),
        "memory": max((round(estimate.memory) for estimate in estimates), default=0),
        "phases": [
            {"what": each.what, "seconds": each.seconds(rate.flops), "memory": round(each.memory)} for each in estimates
        ],
        "flops_per_second": rate.flops,
        "threads": rate.threads,
        "measured": rate.measured,
    }


def estimate_row(estimates: Sequence[Estimate], rate: Rate) -> tuple[str, str]:
    """Return an estimate as the row of a table."""
    assumed = "" if rate.measured else f" (assuming {rate.flops / 1e9:.0f} GFLOP/s)"
    return ("estimate", told(estimates, rate) + assumed)


def _seconds(estimates: Sequence[Estimate], rate: Rate) -> float:
    return sum(estimate.seconds(rate.flops) for estimate in estimates)
