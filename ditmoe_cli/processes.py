"""Several processes on one job, as ``torchrun`` starts them: who does what, and waiting for each other.

Work is dealt out by image index. What is merged lies on the CPU, whatever the device, so the group is gloo's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from ditmoe_cli.errors import DitmoeError

_PATIENCE = timedelta(days=2)  # a rank may be slow; a dead one is torchrun's to notice

Item = TypeVar("Item")
Found = TypeVar("Found")


def under_torchrun() -> bool:
    """Tell whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@dataclass(frozen=True)
class Share:
    """This process's share of the work: every `world`-th batch, from batch `rank` on."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def of(self, batches: Sequence[Item]) -> list[Item]:
        """Return this process's batches."""
        return list(batches[self.rank :: self.world])

    def wait(self) -> None:
        """Return once all processes are here. Raises `DitmoeError` where one of them has ended."""
        if self.world > 1:
            _meet()

    def told(self, find: Callable[[], Found]) -> Found:
        """Return what `find` finds on the first process, on all of them.

        Each looking for itself might see another state of a folder.
        """
        if self.world == 1:
            return find()
        import torch.distributed as dist

        held = [find() if self.first else None]
        with _one_for_all():
            dist.broadcast_object_list(held)
        return held[0]  # type: ignore[return-value]


WHOLE = Share()


@contextmanager
def process_group() -> Iterator[Share]:
    """Join the group that torchrun started, and leave it after; a share of everything where there is none."""
    if not under_torchrun() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield WHOLE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
        _meet()  # nobody leaves while another's last message is under way
    finally:
        dist.destroy_process_group()


def _meet() -> None:
    """Return once all processes are here. Raises `DitmoeError` where one of them has ended."""
    import torch.distributed as dist

    with _one_for_all():
        dist.barrier()


@contextmanager
def _one_for_all() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        raise DitmoeError("another process of this job has ended; see its message, and start the job again") from None


def own_device(device: str) -> str:
    """Return the device of this process: its own GPU, where several share a machine and none was numbered."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and under_torchrun() else device
