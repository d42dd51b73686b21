"""Similarity of a block's experts on shared inputs: all run on the same reservoir tokens, routed to them or not.

Experts are comparable only on the same tokens, and the router gives each of them others.
"""

from __future__ import annotations

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
from ditmoe_cli.progress import each
from ditmoe_cli.routing.calibration_settings import SHARED_BATCH, SHARED_TOKENS
from ditmoe_cli.routing.measures import alignment, unbiased_hsic
from ditmoe_cli.routing.profile import BRANCHES

_BATCHES = 8  # that pass an expert at once


@dataclass(frozen=True)
class SharedInputs:
    """Outputs of all experts of a block on the same tokens, summarised.

    Attributes:
        means: (cells, E, D) mean output over the tokens of each cell (branch and step bin), 0 where there are none.
        cka: (E, E) centred kernel alignment of the outputs, 0 where there are too few tokens.
    """

    means: Tensor
    cka: Tensor


def with_similarities(
    model: DiTMoE | OffloadedDiTMoE, tensors: dict[str, Tensor], bins: int, work: WorkFolder | None = None
) -> dict[str, Tensor]:
    """Return a profile's tensors with ``output.all_token_mean`` (L, 2, B, E, D) and ``output.cka`` (L, E, E).

    Without a reservoir nothing is added. A phase counts blocks, whose results are kept in `work` and taken from there.
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
    means = torch.stack([found.means for found in results]).reshape(shape)
    return {**tensors, "output.all_token_mean": means, "output.cka": torch.stack([found.cka for found in results])}


def on_shared_inputs(moe: SparseMoE, inputs: Tensor, cells: Tensor, count: int, experts: int) -> SharedInputs:
    """Run all experts on at most `SHARED_TOKENS` of the `inputs` (T, D), which belong to `cells` (T,) below `count`.

    `experts` is the most of any block; the results of missing ones stay 0. Of E experts with H neurons on T tokens it
    takes 6 E T D H operations, and 2 E T `SHARED_BATCH` D for the Gram matrices.
    """
    parameter = moe.gate.weight
    batches = [rows.to(parameter.device) for rows in _batches(len(inputs))]
    taken = torch.cat(batches)
    membership = F.one_hot(cells.to(parameter.device, torch.int64)[taken], count).float().T  # (cells, tokens taken)
    share = membership / membership.sum(dim=1, keepdim=True).clamp_min(1)
    means = torch.zeros(count, experts, inputs.shape[1], device=parameter.device)
    hsic = np.zeros((len(moe.experts), len(moe.experts)))
    inputs = inputs.to(parameter.device, parameter.dtype)
    done = 0
    for start in each(range(0, len(batches), _BATCHES), "running all experts", "batches of tokens", share=1.0):
        some = batches[start : start + _BATCHES]
        sizes = [len(rows) for rows in some]
        moved = inputs[torch.cat(some)]
        outputs = torch.stack([expert(moved).float() for expert in moe.experts])  # (E, n, D)
        weights = share[:, done : done + len(moved)]
        means[:, : len(moe.experts)] += torch.einsum("cn,end->ced", weights, outputs)
        done += len(moved)
        for part in torch.split(outputs, sizes, dim=1):
            centred = part - part.mean(dim=1, keepdim=True)  # HSIC is the same, rounding is not
            hsic += unbiased_hsic((centred @ centred.mT).double().cpu().numpy())
    cka = torch.zeros(experts, experts)
    cka[: len(hsic), : len(hsic)] = torch.from_numpy(alignment(hsic)).float()
    return SharedInputs(means.cpu(), cka)


def _batches(tokens: int) -> list[Tensor]:
    """Return the indices of the tokens of each batch: every n-th token, so that each batch spreads over all states.

    At most `SHARED_TOKENS` of them are taken, evenly spaced.
    """
    taken = torch.arange(0, tokens, max(-(-tokens // SHARED_TOKENS), 1))
    count = max(len(taken) // SHARED_BATCH, 1)
    return [taken[start::count] for start in range(count)]
