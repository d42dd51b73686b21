"""DIET: keep experts that stand for all directions in which deletions change the output.

From a study of expert pruning in a video diffusion transformer. Each expert has a signature, the mean change of the
guided output when it alone is deleted; experts are kept so that every dropped one has a kept one of similar direction.
The paper's cells are its prompts, here they are step bins; its budgets by layer and its annealing are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.prune.subset_search import Subset, best_subset
from ditmoe_cli.compression.replay.subsets import contributions, kept_experts, ranked_chunks
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.moe import SparseMoE


def choose(tokens: BlockTokens, moe: SparseMoE, count: int, mode: RouterMode) -> Subset:
    """Return the `count` experts of least Σ_{i dropped} min_{j kept} (1 - cos(s_i, s_j)), s the signatures, ascending.

    All subsets are tried where they are few, else experts are dropped greedily and then swapped. Raises
    `InfeasibleError` where `count` does not leave enough experts for top-k.
    """
    experts = len(moe.experts)
    if count == experts:
        return tuple(range(experts))  # and none could be deleted where top-k needs them all
    distances = _distances(signatures(tokens, moe, mode))
    return best_subset(experts, count, lambda subsets: _uncovered(distances, subsets).tolist())


@torch.no_grad()
def signatures(tokens: BlockTokens, moe: SparseMoE, mode: RouterMode) -> Tensor:
    """Return each expert's signature (E, bins D): the mean change of the guided output over the pairs of each step bin.

    The change is that of deleting the expert alone, tokens routed anew, gates as `mode` says.
    """
    experts, bins = len(moe.experts), int(tokens.bins.max()) + 1
    device = moe.gate.weight.device
    one_deleted = [[e for e in range(experts) if e != deleted] for deleted in range(experts)]
    keep = kept_experts(one_deleted, experts, device)
    total = torch.zeros(bins, experts, tokens.inputs.shape[1], dtype=torch.float64, device=device)
    for part, ranking in ranked_chunks(tokens, moe):
        changes = ranking.changes(keep, mode)
        rows = contributions(part, moe, ranking, changes.shape[2])
        total.index_add_(0, part.paired(part.bins)[:, 0], (changes.flatten(1, 2).mT @ rows).double())
    counts = tokens.paired(tokens.bins)[:, 0].bincount(minlength=bins).clamp_min(1).to(device)
    means: Tensor = total / counts.reshape(-1, 1, 1)
    return means.transpose(0, 1).flatten(1).cpu()


def _distances(vectors: Tensor) -> Tensor:
    """Return 1 - cos of all pairs of signatures, (E, E), and 0 for an expert whose deletion changes nothing."""
    norms = vectors.norm(dim=1, keepdim=True)
    unit = vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny)
    distances: Tensor = (1 - unit @ unit.T).clamp_min(0).masked_fill(norms == 0, 0.0)
    return distances


def _uncovered(distances: Tensor, subsets: Sequence[Subset]) -> Tensor:
    """Return Σ_i min_{j kept} d_ij of each subset, (C,); kept experts add nothing, being 0 away from themselves."""
    keep = kept_experts(subsets, len(distances), distances.device)
    total = torch.zeros(len(keep), dtype=distances.dtype)
    for row in distances:
        total += torch.where(keep, row, torch.inf).amin(dim=1)
    return total
