"""Calibration over several processes: batches are dealt out by image index, and their tensors merged.

Started by ``torchrun`` (gloo on CPUs, nccl on GPUs). Since each batch is the same set of images on any number of
processes, the integer counts are those of one process, as long as every process runs with the same number of threads;
sums differ by the order of addition alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_cli.processes import Share

_LARGEST = ("norm_max", "input.max", "neuron.max")
_PER_STATE = ("states.", "reservoir.")


def rank_of_other_threads(share: Share) -> int | None:
    """Return a process that runs with another number of threads than rank 0, whose rounding may differ; else None."""
    if share.world == 1:
        return None
    threads: list[int] = [0] * share.world
    dist.all_gather_object(threads, torch.get_num_threads())
    return next((rank for rank, count in enumerate(threads) if count != threads[0]), None)


def merged(share: Share, mine: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Gather every process's tensors on rank 0 and return them merged; None on the others."""
    if share.world == 1:
        return mine
    parts: list[dict[str, Tensor] | None] | None = [None] * share.world if share.rank == 0 else None
    dist.gather_object(mine, parts)
    return merge([part for part in parts if part is not None]) if parts is not None else None


def merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the tensors of several processes: sums add, extremes compare, states and tokens are put in order.

    A process whose images none were kept of has no states; counters and moments are in every part.
    """
    streamed = [name for name in parts[0] if not name.startswith(_PER_STATE)]
    result = {name: _merge_streamed(name, [part[name] for part in parts]) for name in streamed}
    with_states = [part for part in parts if "states.z" in part]
    return {**result, **_merge_states(with_states)} if with_states else result


def _merge_streamed(name: str, tensors: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(tensors))
    if name in _LARGEST:
        return stacked.amax(dim=0)
    return stacked.sum(dim=0).to(stacked.dtype)


def _merge_states(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate states and reservoirs and bring both into the order of (image, bin)."""
    offsets = torch.tensor([0, *(len(part["states.t"]) for part in parts)]).cumsum(0)
    joined = {
        name: torch.cat([part[name] for part in parts], dim=1 if name in ("reservoir.inputs", "reservoir.gamma") else 0)
        for name in parts[0]
        if name.startswith(_PER_STATE)
    }
    state = torch.cat([part["reservoir.state"] + int(offsets[i]) for i, part in enumerate(parts)])
    bins = int(joined["states.bin"].max()) + 1
    order = (joined["states.image"].long() * bins + joined["states.bin"]).argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    tokens = place[state.long()].argsort(stable=True)
    result = {name: tensor[order] for name, tensor in joined.items() if name.startswith("states.")}
    result["reservoir.state"] = place[state.long()][tokens].int()
    for name in ("reservoir.branch", "reservoir.position"):
        result[name] = joined[name][tokens]
    result["reservoir.inputs"] = joined["reservoir.inputs"][:, tokens]
    result["reservoir.gamma"] = joined["reservoir.gamma"][:, order]
    return result
