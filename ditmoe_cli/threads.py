"""Threads of this process: as many as it may really use, that wait without keeping a core busy.

torch, MKL and OpenBLAS read the variables below once, when they are loaded; so they are set before torch is imported.

OpenMP's threads meet at a barrier after every operation. By default they spin there for long, which is fastest on
a free machine. But where another process wants a core, the threads that spin keep the last one from it, and each
barrier lasts a time slice of the scheduler. Threads that sleep at once make small models half as slow again, since
waking one takes longer than most barriers last. So threads spin for some microseconds, and then sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from ditmoe_cli.control_groups import control_groups, text_of

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # any of them says how threads wait
_BRIEFLY = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}  # rounds of GNU's runtime, milliseconds of Intel's
_OPENMP, _MKL, _OPENBLAS = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"


def prepare_threads(environment: MutableMapping[str, str], count: int) -> None:
    """Make threads spin briefly, and `count` the default of their number, where the environment says nothing.

    torchrun gives its processes a number of their own.
    """
    if not any(name in environment for name in _WAITING):
        environment.update(_BRIEFLY)
    if not any(name in environment for name in (_OPENMP, _MKL)):
        environment[_OPENMP] = str(count)


def use_threads(count: int, environment: MutableMapping[str, str]) -> None:
    """Compute with `count` threads, whatever the environment said; also where torch is loaded already."""
    environment.update({_OPENMP: str(count), _MKL: str(count), _OPENBLAS: str(count)})
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(count)


def usable_threads() -> int:
    """Return how many threads compute: torch's number, before it is loaded the one that it will take."""
    if "torch" in sys.modules:
        import torch

        return torch.get_num_threads()
    told = (os.environ.get(name, "").partition(",")[0].strip() for name in (_MKL, _OPENMP))
    return next((int(text) for text in told if text.isdecimal() and int(text)), usable_cores())


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute with one thread in each thread that asks it to, for work that is divided over threads.

    Threads that begin meanwhile take the number over, also where one of them is the first to load torch; the others
    keep theirs.
    """
    count, told = usable_threads(), {name: os.environ.get(name) for name in (_OPENMP, _MKL, _OPENBLAS)}
    use_threads(1, os.environ)
    try:
        yield
    finally:
        for name, text in told.items():
            os.environ.pop(name) if text is None else os.environ.update({name: text})
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(count)


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: those that it may run on, within the quota of its control groups.

    Cores are physical ones, as MKL counts them: two threads of one core share its arithmetic. A quota of 2.5 cores
    is 2 threads, since with more of them all are stopped for a part of each period.
    """
    cores = _cores(root / "sys/devices/system/cpu")
    quotas = [quota for folder in control_groups(root, "cpu") if (quota := _quota(folder)) is not None]
    return max(1, min([cores, *map(int, quotas)]))


def _cores(topology: Path) -> int:
    """Return the number of physical cores that the process may run on, of CPUs where the system names no cores."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    return len({text_of(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def _quota(folder: Path) -> float | None:
    """Return the cores that a control group may use at a time, None for no limit."""
    limit, *period = text_of(folder / "cpu.max").split() or [text_of(folder / "cpu.cfs_quota_us").strip()]
    try:
        quota, length = int(limit), int(period[0] if period else text_of(folder / "cpu.cfs_period_us"))
    except ValueError:
        return None  # "max", or no such file
    return quota / length if quota > 0 and length > 0 else None
