"""Several processes of a training as threads of this one, which add up and agree as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ditmoe_cli.compression.training.exchange import Exchange
from ditmoe_cli.processes import Share


@dataclass(frozen=True)
class Table:
    """Where threads lay what they exchange, and wait for each other."""

    barrier: threading.Barrier
    places: list[Any]

    def exchanged(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all threads."""
        self.places[rank] = value
        self.barrier.wait(timeout=60)
        found = list(self.places)
        self.barrier.wait(timeout=60)
        return found


@dataclass(frozen=True)
class ThreadExchange(Exchange):
    """One thread's part of a training; also what it was asked to agree on."""

    table: Table | None = None
    asked: list[Any] = field(default_factory=list)

    def all_of(self, value: Any) -> list[Any]:
        assert self.table is not None
        return self.table.exchanged(self.share.rank, value)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        parts = self.all_of([tensor.detach().clone() for tensor in tensors])
        for tensor, *each in zip(tensors, *parts, strict=True):
            tensor.copy_(torch.stack(each).sum(dim=0))

    def hand_out(self, tensors: Mapping[str, Tensor], owners: Mapping[str, int]) -> None:
        parts = self.all_of({name: tensor.detach().clone() for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(parts[owners[name]][name])

    def gathered(self, parts: Sequence[Tensor], count: int) -> Tensor:
        found = torch.zeros(count, dtype=torch.float64)
        for rank, each in enumerate(self.all_of(list(parts))):
            if each:
                found[rank :: self.share.world] = torch.cat(each).double()
        return found

    def agreed(self, value: Any) -> Any:
        self.asked.append(value)
        return self.all_of(value)[0]


def in_threads(world: int, work: Callable[[ThreadExchange], Any]) -> list[Any]:
    """Return what `work` returns in each of several threads that train together; a thread that fails ends all."""
    table = Table(threading.Barrier(world), [None] * world)

    def run(rank: int) -> Any:
        try:
            return work(ThreadExchange(Share(rank, world), None, table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return [job.result() for job in [pool.submit(run, rank) for rank in range(world)]]
