"""The methods of ``ditmoe quantize --method``: a literal table, one file each, imported when first used.

Reading the table needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from ditmoe_cli.compression.precision.budget import Choice
from ditmoe_cli.compression.precision.task import Task


@dataclass(frozen=True)
class Method:
    """A method: the formats that it chooses within a task's budget, what it does, and where it comes from."""

    choose: Callable[[Task], Choice]
    summary: str
    source: str


class _Module(Protocol):
    """What the module of a method holds."""

    def choose(self, task: Task) -> Choice: ...


def _method(module: str, summary: str, source: str) -> Method:
    """Return the method of a module beside this one."""

    def choose(task: Task) -> Choice:
        return cast(_Module, import_module(f"ditmoe_cli.compression.precision.{module}")).choose(task)

    return Method(choose, summary, source)


METHODS: Mapping[str, Method] = {
    "replay": _method("least_error", "least replayed error of the guided prediction, over all weights at once", "-"),
    "pmq": _method(
        "baselines.pmq",
        "per block, by experts' use and the error of their outputs; attention at 4 bits",
        "arXiv 2410.06270",
    ),
    "outlier": _method(
        "baselines.outlier", "two widths, the wider for matrices with outlier columns", "arXiv 2406.08155"
    ),
    "block-score": _method(
        "baselines.block_score",
        "two widths, the wider for blocks that turn the residual stream most",
        "arXiv 2406.08155",
    ),
    "camera-q": _method(
        "baselines.camera_q",
        "three widths within each expert, the widest for neurons of highest energy",
        "arXiv 2508.02322",
    ),
}
DEFAULT_METHOD = "replay"
