"""Several processes on one job, as ``torchrun`` starts them: each one's share of the work, and synchronisation.

Batches are divided by their index. Exchanged values are on the CPU, whatever the device, so the backend is gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ditmoe_cli.errors import DitmoeError, UsageError

_TIMEOUT = timedelta(days=2)  # a process may be slow; torchrun itself notices one that has ended

Item = TypeVar("Item")
Value = TypeVar("Value")


def under_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def first_process() -> bool:
    """Return whether this is the process that prints: torchrun's first one, or the only one."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Share:
    """This process's share of the work: every `world`-th batch, starting with batch `rank`."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def of(self, batches: Sequence[Item]) -> list[Item]:
        """Return this process's batches."""
        return list(batches[self.rank :: self.world])

    def wait(self) -> None:
        """Wait for all processes. Raises `DitmoeError` where one of them has ended."""
        if self.world > 1:
            _barrier()

    def from_first(self, compute: Callable[[], Value]) -> Value:
        """Return, in every process, the value that the first process computes.

        Values that depend on a folder could differ between processes that each compute them at their own time.

        Raises `DitmoeError` where another process has ended.
        """
        if self.world == 1:
            return compute()
        import torch.distributed as dist

        values = [compute() if self.first else None]
        with ended_processes_reported():
            dist.broadcast_object_list(values)
        return values[0]  # type: ignore[return-value]

    def after_first(self, compute: Callable[[], Value]) -> Value:
        """Return what each process computes for itself, the others when the first one has: it may leave them files.

        Raises `DitmoeError` where another process has ended.
        """
        if self.world == 1:
            return compute()
        if self.first:
            value = compute()
        self.wait()
        if not self.first:
            value = compute()
        self.wait()
        return value

    def check_same(self, name: str, value: str) -> None:
        """Raise `UsageError` where the first process has another value of a setting, which machines choose."""
        theirs = self.from_first(lambda: value)
        if theirs != value:
            raise UsageError(f"⟨{name}⟩ auto: is {value} on this machine, {theirs} on the first process's; name one")


WHOLE = Share()


@contextmanager
def process_group() -> Iterator[Share]:
    """Join torchrun's processes and yield this one's share; the whole work where there are no others.

    Who has joined them already, as a command that makes a profile on the way, stays with them.
    """
    if not under_torchrun() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield WHOLE
        return
    import torch.distributed as dist

    if dist.is_initialized():
        yield Share(dist.get_rank(), dist.get_world_size())
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
        _barrier()  # a process that left earlier would cut off the last message of another
    finally:
        dist.destroy_process_group()


def _barrier() -> None:
    import torch.distributed as dist

    with ended_processes_reported():
        dist.barrier()


@contextmanager
def ended_processes_reported() -> Iterator[None]:
    """Raise `DitmoeError` instead of the RuntimeError of a collective operation that another process left."""
    try:
        yield
    except RuntimeError:
        raise DitmoeError("another process of this job has ended; see its message, and start the job again") from None


def own_device(device: str) -> str:
    """Return the device of this process: under torchrun, ``cuda`` is the GPU of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and under_torchrun() else device
