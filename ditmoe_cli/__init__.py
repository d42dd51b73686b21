"""ditmoe: profile, prune, quantise, re-sample and score pretrained DiT-MoE checkpoints.

What the commands do, as functions; docs/python.md describes them. Importing this package costs nothing: each name
brings in what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ditmoe_cli.version import __version__

if TYPE_CHECKING:
    from ditmoe_cli.api.calling import quiet
    from ditmoe_cli.api.checkpoint_files import convert, export, inspect
    from ditmoe_cli.api.measurements import bench, compare, profile, report, sample, schedule, score, sensitivity
    from ditmoe_cli.api.opening import load_model, open_checkpoint, read_profile
    from ditmoe_cli.api.planners import apply, compress, plan_merge, plan_prune, plan_quantize, size_curve
    from ditmoe_cli.api.trainers import distill, heal
    from ditmoe_cli.errors import DitmoeError

_MODULES = {
    "DitmoeError": "errors",
    "apply": "api.planners",
    "bench": "api.measurements",
    "compare": "api.measurements",
    "compress": "api.planners",
    "convert": "api.checkpoint_files",
    "distill": "api.trainers",
    "export": "api.checkpoint_files",
    "heal": "api.trainers",
    "inspect": "api.checkpoint_files",
    "load_model": "api.opening",
    "open_checkpoint": "api.opening",
    "plan_merge": "api.planners",
    "plan_prune": "api.planners",
    "plan_quantize": "api.planners",
    "profile": "api.measurements",
    "quiet": "api.calling",
    "read_profile": "api.opening",
    "report": "api.measurements",
    "sample": "api.measurements",
    "schedule": "api.measurements",
    "score": "api.measurements",
    "sensitivity": "api.measurements",
    "size_curve": "api.planners",
}

__all__ = [
    "DitmoeError",
    "__version__",
    "apply",
    "bench",
    "compare",
    "compress",
    "convert",
    "distill",
    "export",
    "heal",
    "inspect",
    "load_model",
    "open_checkpoint",
    "plan_merge",
    "plan_prune",
    "plan_quantize",
    "profile",
    "quiet",
    "read_profile",
    "report",
    "sample",
    "schedule",
    "score",
    "sensitivity",
    "size_curve",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
