"""Training in several processes, as ``torchrun`` starts them: what they add up, and what they agree on.

Each process computes the gradients of its share of a batch's rows; their sum is the gradient of the batch. Each weight
has an owner, which alone keeps what the optimizer keeps of it, takes the step, and hands the new values to the others
(as ZeRO does: Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054). Gradients and weights go through NCCL where
each process has a GPU of its own, else through gloo, and what is agreed on through gloo.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_cli.compression.training.dividing import buckets, dealt
from ditmoe_cli.processes import WHOLE, Share, Value, ended_processes_reported

_BUCKET = 2**24  # numbers that are added up at once


@dataclass(frozen=True)
class Exchange:
    """This process's part of a training, and the others.

    Attributes:
        share: which of how many processes this is.
        group: the process group that gradients and weights go through; None for the usual one.
    """

    share: Share = WHOLE
    group: Any = None

    def own(self, rows: Tensor) -> Tensor:
        """Return this process's share of rows (n,): every `world`-th."""
        return rows[self.share.rank :: self.share.world]

    def parts(self, rows: Tensor, size: int) -> tuple[Tensor, ...]:
        """Return this process's share of rows in parts of at most `size`; none where it has no rows."""
        own = self.own(rows)
        return torch.split(own, size) if len(own) else ()

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their sums over all processes, the same bits in each.

        Raises `DitmoeError` where another process has ended.
        """
        if self.share.world == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with ended_processes_reported():
                dist.all_reduce(flat, group=self.group)
            for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def owners(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Return the process that owns each weight, the largest dealt out first, to the one that has least so far."""
        return dealt({name: weight.numel() for name, weight in weights.items()}, self.share.world)

    @torch.no_grad()
    def hand_out(self, tensors: Mapping[str, Tensor], owners: Mapping[str, int]) -> None:
        """Replace tensors of one dtype and device by those of their owners.

        Raises `DitmoeError` where another process has ended.
        """
        for owner in range(self.share.world) if self.share.world > 1 else ():
            for bucket in _buckets([tensor for name, tensor in tensors.items() if owners[name] == owner]):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                with ended_processes_reported():
                    dist.broadcast(flat, owner, group=self.group)
                for tensor, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def collected(
        self, own: Mapping[str, Tensor], like: Mapping[str, Tensor], owners: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Return in the first process the tensors of all owners, on the CPU, each of the shape of its weight in `like`.

        Raises `DitmoeError` where another process has ended.
        """
        found: dict[str, Tensor] = {}
        for name, weight in like.items():
            tensor = own[name].detach() if name in own else torch.empty_like(weight, requires_grad=False)
            self.hand_out({name: tensor}, owners)
            if self.share.first:
                found[name] = tensor.cpu().contiguous()
        return found

    def gathered(self, parts: Sequence[Tensor], count: int) -> Tensor:
        """Return the values (count,) of all rows, in fp64 on the CPU, from those of this process's share, in `parts`.

        Raises `DitmoeError` where another process has ended.
        """
        found = torch.zeros(count, dtype=torch.float64)
        if parts:
            self.own(found).copy_(torch.cat(list(parts)))
        if self.share.world > 1:
            with ended_processes_reported():
                dist.all_reduce(found)
        return found

    def agreed(self, value: Value) -> Value:
        """Return the first process's value of what each has computed. Decisions rest on it, so that all decide alike.

        Raises `DitmoeError` where another process has ended.
        """
        return self.share.from_first(lambda: value)


ALONE = Exchange()


def exchange_on(share: Share, device: torch.device) -> Exchange:
    """Return the exchange of processes that compute on a device each; all of them call it."""
    if share.world == 1:
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    places: list[tuple[str, str]] = [("", "")] * share.world
    with ended_processes_reported():
        dist.all_gather_object(places, (socket.gethostname(), str(device)))
    apart = len(set(places)) == len(places) and all(name.startswith("cuda") for _, name in places)
    return Exchange(share, dist.new_group(backend="nccl") if apart and dist.is_nccl_available() else None)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors in order, together as many as go through at once."""
    return buckets(tensors, Tensor.numel, _BUCKET)
