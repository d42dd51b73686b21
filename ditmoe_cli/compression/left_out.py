"""Options that shape a result and were left out, at the values that they have in this version. Torch-free.

Histories keep them beside the options that were given, since defaults may change: a recipe still asks for the same
then. Numbers that stand for a rule, as 0 for as many tokens as suit, and switches that are off are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED, DEFAULT_FLOORS, DEFAULT_GROUP_SIZE

_FORMATS: Mapping[str, Any] = {
    "allow": ",".join(DEFAULT_ALLOWED),
    "floor": [f"{group}={bits:g}" for group, bits in DEFAULT_FLOORS.items()],
}


def defaults_of(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a planner's command that stand beside those that a plan names, by name."""
    if options.get("uniform"):
        return {} if "rounding" in options else {"rounding": "nearest"}
    if "delta" in options or options.get("target") == "upstream":  # which leave no such choice
        return {}
    refit = {} if options.get("no_refit") or options.get("scale") else {"refit": True}
    of_command: Mapping[str, Mapping[str, Any]] = {
        "prune": {"allocate": "uniform", "neurons": 1.0, **refit},
        "merge": refit,
        "quantize": {**_FORMATS, "group_size": DEFAULT_GROUP_SIZE},
        "compress": _FORMATS,
    }
    return {name: value for name, value in of_command.get(command, {}).items() if name not in options}
