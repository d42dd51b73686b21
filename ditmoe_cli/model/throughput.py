"""How fast this machine multiplies matrices: measured once, and kept in the cache for runs without torch."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.files.cache import keep_number, kept_numbers, torch_version
from ditmoe_cli.model.dtypes import Dtype, torch_dtype_of
from ditmoe_cli.progress import phase
from ditmoe_cli.threads import usable_cores

ASSUMED_RATE = 4e10  # operations a second of one thread of a CPU
_ASSUMED_RATE_OF_A_GPU = 2e13
_SIDE, _ROUNDS = 768, 5  # of the product that is timed
_SIDE_OF_A_GPU = 8192  # large enough that starting a product and waiting for it are nothing beside it
_FILE = "throughput.json"  # of the cache


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second of a large product in one dtype.

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
    threads = _threads_on(device)
    kept = kept_numbers(_FILE).get(_key(device, threads), 0.0)
    if kept > 0:
        return Rate(kept, threads, measured=True)
    return Rate(ASSUMED_RATE * threads if threads else _ASSUMED_RATE_OF_A_GPU, threads, measured=False)


def measured_rate(device: str, clock: Callable[[], float] = time.perf_counter) -> Rate:
    """Return the rate of a device in single precision, timed where it is not known."""
    rate = known_rate(device)
    if rate.measured:
        return rate
    with phase("measuring the speed of this machine"):
        measured = Rate(_product_rate(device, "fp32", clock), rate.threads, measured=True)
    keep_number(_FILE, _key(device, rate.threads), measured.flops)
    return measured


def peak_rate(device: str, dtype: Dtype, threads: int, clock: Callable[[], float] = time.perf_counter) -> Rate:
    """Return the highest rate of large products in a dtype that was ever measured, now or before, and keep it.

    It is timed anew each time, since what was kept may stem from a machine that was busy. On a CPU torch must be set to
    compute with `threads`; on a GPU their number is none.
    """
    threads = 0 if device.startswith("cuda") else threads
    key = _key(device, threads, dtype)
    kept = kept_numbers(_FILE).get(key, 0.0)
    timed = _product_rate(device, dtype, clock)
    if timed > kept:
        keep_number(_FILE, key, timed)
    return Rate(max(timed, kept), threads, measured=True)


def _product_rate(device: str, dtype: Dtype, clock: Callable[[], float]) -> float:
    """Return the rate of a product of random (n, n) matrices: 2 n³ operations over the shortest of some products.

    Random values, since a GPU multiplies equal ones with less power, and so faster than any model's.
    """
    import torch

    kind = torch_dtype_of(dtype)
    side = _SIDE_OF_A_GPU if device.startswith("cuda") else _SIDE
    generator = torch.Generator(device).manual_seed(0)
    shortest = float("inf")
    with torch.inference_mode():
        left, right = (torch.randn(side, side, device=device, generator=generator).to(kind) for _ in range(2))
        for _ in range(_ROUNDS):
            start = clock()
            float((left @ right)[0, 0])  # a number: the device is done by then
            shortest = min(shortest, clock() - start)
    return 2 * side**3 / max(shortest, 1e-9)


def likely_device(name: str, root: Path = Path("/dev")) -> str:
    """Return the device of a name, as far as it can be told without torch: ``auto`` is a GPU where there is one."""
    return name if name != "auto" else "cuda" if (root / "nvidiactl").exists() else "cpu"


def _threads_on(device: str) -> int:
    return 0 if device.startswith("cuda") else threads_of()


def _key(device: str, threads: int, dtype: Dtype = "fp32") -> str:
    kind = "" if dtype == "fp32" else f" {dtype}"
    return f"{platform.node()} {platform.machine()} {device} {threads} torch {torch_version()}{kind}"
