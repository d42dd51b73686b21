"""How much memory this process may still take."""

from __future__ import annotations

import math
from pathlib import Path

from ditmoe_cli.control_groups import control_groups, text_of


def free_memory(root: Path = Path("/")) -> float:
    """Return the bytes of memory that are free or can be freed, infinite where the system does not tell.

    That is MemAvailable of /proc/meminfo, or what the limits of the process's control groups leave, if that is less.
    """
    return max(0.0, min([_available(root), *map(_left, control_groups(root, "memory"))]))


def _available(root: Path) -> float:
    lines = text_of(root / "proc/meminfo").splitlines()
    words = next((line.split() for line in lines if line.startswith("MemAvailable:")), [])
    return int(words[1]) * 1024.0 if len(words) > 1 and words[1].isdecimal() else math.inf


def _left(folder: Path) -> float:
    """Return the bytes that a control group leaves: its limit less what is in use, pages of files not counted.

    Reads memory.max and memory.current, in version 1 memory.limit_in_bytes and memory.usage_in_bytes.
    """
    version_2 = (folder / "memory.max").exists()
    names = ("memory.max", "memory.current") if version_2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (text_of(folder / name).strip() for name in names)
    if not limit.isdecimal() or not used.isdecimal():
        return math.inf  # "max", or no such file
    counted = dict(line.split()[:2] for line in text_of(folder / "memory.stat").splitlines() if " " in line)
    prefix = "" if version_2 else "total_"
    files = sum(int(counted.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return float(limit) - max(0, int(used) - files)
