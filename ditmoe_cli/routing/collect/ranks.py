"""Calibration in several processes under ``torchrun``: the tensors of all ranks are gathered and merged.

Each batch is the same set of images on any number of processes, so the integer counts are those of one process as long
as every process runs with the same number of threads. Sums differ by the order of addition alone.
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
    """Return the first rank with another number of threads than rank 0, whose rounding may differ; None if none."""
    if share.world == 1:
        return None
    threads: list[int] = [0] * share.world
    dist.all_gather_object(threads, torch.get_num_threads())
    return next((rank for rank, count in enumerate(threads) if count != threads[0]), None)


def gather_merged(share: Share, own: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of all ranks merged on rank 0, and None on the others; `own` are this rank's."""
    if share.world == 1:
        return own
    parts: list[dict[str, Tensor] | None] | None = [None] * share.world if share.rank == 0 else None
    dist.gather_object(own, parts)
    return merge([part for part in parts if part is not None]) if parts is not None else None


def merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several ranks as one: sums added, maxima compared, states and tokens put in order.

    Counters and moments are in every part; a rank that kept no state has none of the states' tensors.
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
    """Return states and reservoirs of all parts in the order of (image, bin)."""
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
