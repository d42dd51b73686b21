"""Similarity of a block's experts on shared inputs: every expert is run on every reservoir token, routed to it or not.

Experts are comparable only on the same tokens, and the router gives each of them others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.routing.measures import alignment, unbiased_hsic
from ditmoe_cli.routing.profile import BRANCHES

BATCH = 256  # tokens of one estimate of HSIC, whose Gram matrices grow with their square


@dataclass(frozen=True)
class SharedInputs:
    """Outputs of all experts of a block on the same tokens, summarised.

    Attributes:
        means: (cells, E, D) mean output over all tokens of each cell (branch and step bin), 0 where there are none.
        cka: (E, E) centred kernel alignment of the outputs, 0 where there are too few tokens.
    """

    means: Tensor
    cka: Tensor


def with_similarities(
    model: DiTMoE | OffloadedDiTMoE, tensors: dict[str, Tensor], bins: int, work: WorkFolder | None = None
) -> dict[str, Tensor]:
    """Return a profile's tensors with ``output.all_token_mean`` (L, 2, B, E, D) and ``output.cka`` (L, E, E).

    Without a reservoir nothing is added. Each block's results are kept in `work`, and taken from there.
    """
    if "reservoir.inputs" not in tensors:
        return tensors
    bin_of = tensors["states.bin"].long()[tensors["reservoir.state"].long()]
    cells = tensors["reservoir.branch"].long() * bins + bin_of
    experts = model.config.num_experts
    results = []
    with resident_blocks(model, "comparing experts on shared inputs") as blocks:
        for (index, block), inputs in zip(blocks, tensors["reservoir.inputs"], strict=True):
            kept = work.read(f"inputs.{index}") if work is not None else None
            if kept is not None:
                results.append(SharedInputs(kept.tensor("means"), kept.tensor("cka")))
                continue
            results.append(on_shared_inputs(block.moe, inputs, cells, BRANCHES * bins, experts))
            if work is not None:
                work.write(f"inputs.{index}", {"means": results[-1].means, "cka": results[-1].cka})
    shape = (len(results), BRANCHES, bins, experts, model.config.hidden_size)
    means = torch.stack([each.means for each in results]).reshape(shape)
    return {**tensors, "output.all_token_mean": means, "output.cka": torch.stack([each.cka for each in results])}


def on_shared_inputs(moe: SparseMoE, inputs: Tensor, cells: Tensor, count: int, experts: int) -> SharedInputs:
    """Run all experts on `inputs` (T, D), whose tokens belong to `cells` (T,), numbers below `count`.

    `experts` is the most of any block; the results of missing ones stay 0.
    """
    membership = F.one_hot(cells.long(), count).float().T  # (cells, T)
    share = membership / membership.sum(dim=1, keepdim=True).clamp_min(1)
    means = torch.zeros(count, experts, inputs.shape[1])
    hsic = np.zeros((len(moe.experts), len(moe.experts)))
    parameter = moe.gate.weight
    for rows in _strided(len(inputs)):
        moved = inputs[rows].to(parameter.device, parameter.dtype)
        outputs = torch.stack([expert(moved).float().cpu() for expert in moe.experts])  # (E, n, D)
        means[:, : len(moe.experts)] += torch.einsum("cn,end->ced", share[:, rows], outputs)
        centred = (outputs - outputs.mean(dim=1, keepdim=True)).double()  # HSIC is the same, rounding is not
        hsic += unbiased_hsic((centred @ centred.transpose(1, 2)).numpy())
    cka = torch.zeros(experts, experts)
    cka[: len(hsic), : len(hsic)] = torch.from_numpy(alignment(hsic)).float()
    return SharedInputs(means, cka)


def _strided(tokens: int) -> Iterator[slice]:
    """Yield slices of every n-th token, one from each of the first n on, so that each batch spreads over all states."""
    count = max(tokens // BATCH, 1)
    return (slice(start, None, count) for start in range(count))
