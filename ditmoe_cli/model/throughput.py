"""How fast this machine multiplies matrices: measured once, and kept in the cache for runs without torch."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ditmoe_cli.files.cache import cache_folder
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.progress import phase
from ditmoe_cli.threads import usable_cores

ASSUMED_RATE = 4e10  # operations a second of one thread of a CPU
_ASSUMED_RATE_OF_A_GPU = 2e13
_SIDE, _ROUNDS = 768, 5  # of the product that is timed
_SIDE_OF_A_GPU = 4096


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second of a large product in single precision.

    `threads` is how many compute it, 0 on a GPU; `measured` whether it was timed on this machine.
    """

    flops: float
    threads: int
    measured: bool

    @property
    def where(self) -> str:
        """Where it holds, as people say it: ``on 2 threads``."""
        return ("on 1 thread" if self.threads == 1 else f"on {self.threads} threads") if self.threads else "on the GPU"


def threads_of(environment: Callable[[str], str | None] = os.environ.get) -> int:
    """Return how many threads torch will compute with."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        found = environment(name) or ""
        if found.isdigit() and int(found) > 0:
            return int(found)
    return usable_cores()


def known_rate(device: str) -> Rate:
    """Return the rate that was measured for this machine, torch and number of threads, else an assumed one.

    Takes no torch.
    """
    threads = 0 if device.startswith("cuda") else threads_of()
    kept = _kept().get(_key(device, threads))
    if kept is not None:
        return Rate(kept, threads, measured=True)
    return Rate(ASSUMED_RATE * threads if threads else _ASSUMED_RATE_OF_A_GPU, threads, measured=False)


def measured_rate(device: str, clock: Callable[[], float] = time.perf_counter) -> Rate:
    """Return the rate of a device, timed where it is not known: 2 n³ operations over the shortest of some products."""
    rate = known_rate(device)
    if rate.measured:
        return rate
    import torch

    side = _SIDE if rate.threads else _SIDE_OF_A_GPU
    with phase("measuring the speed of this machine"), torch.inference_mode():
        left, right = (torch.ones(side, side, device=device) for _ in range(2))
        shortest = float("inf")
        for _ in range(_ROUNDS):
            start = clock()
            float((left @ right)[0, 0])  # a number: the device is done by then
            shortest = min(shortest, clock() - start)
    measured = Rate(2 * side**3 / max(shortest, 1e-9), rate.threads, measured=True)
    _keep(_key(device, rate.threads), measured.flops)
    return measured


def likely_device(name: str, root: Path = Path("/dev")) -> str:
    """Return the device of a name, as far as it can be told without torch: ``auto`` is a GPU where there is one."""
    return name if name != "auto" else "cuda" if (root / "nvidiactl").exists() else "cpu"


def _key(device: str, threads: int) -> str:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = ""
    return f"{platform.node()} {platform.machine()} {device} {threads} torch {torch_version}"


def _file() -> Path:
    return cache_folder() / "throughput.json"


def _kept() -> dict[str, float]:
    """Return the rates in the cache; what is no such file is none."""
    with suppress(OSError, RuntimeError, ValueError):
        found = read_json(_file())
        if isinstance(found, dict):
            return {key: rate for key, rate in found.items() if isinstance(rate, float) and rate > 0}
    return {}


def _keep(key: str, rate: float) -> None:
    """Add a rate to the cache, where it can be written."""
    with suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.{os.getpid()}")
        new.write_text(json.dumps({**_kept(), key: rate}, indent=1, sort_keys=True))
        new.replace(file)
