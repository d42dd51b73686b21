"""Sub-MoE: merge experts in a subspace that they share (Li et al. 2025, https://arxiv.org/abs/2506.23266)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ditmoe_cli.compression.algebra.matching import aligned
from ditmoe_cli.compression.algebra.means import weighted_mean
from ditmoe_cli.compression.algebra.truncated_svd import whitening
from ditmoe_cli.compression.merge.grouping import mean_outputs, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.routing.measures import mean_of


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups by k-means on the direction of mean outputs in each cell.

    Squared distances are 2 Σ_cells (1 - cos). Raises `InfeasibleError` for a count outside 1..E, and `BadInputError`
    where the profile has no means.
    """

    def labels() -> list[int]:
        means = mean_outputs(inputs)
        directions = mean_of(means, np.linalg.norm(means, axis=-1, keepdims=True)).reshape(len(means), -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of experts that coincide: partition() deals them out
            found: list[int] = KMeans(count, n_init=10, random_state=0).fit_predict(directions).tolist()
        return found

    return partition(len(inputs.selected), count, labels)


def merge(
    experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None, rank: int | None = None
) -> ExpertWeights:
    """Return U_r U_rᵀ Σ_j α_j W_j / Σ α for gate, up and downᵀ (H, D), of members aligned to the dominant one.

    U_r (H, r) are the first left singular vectors of [W_1 S … W_n S], the members side by side, so that what is
    shared is the space of the aligned neurons. For gate and up S Sᵀ is the covariance of the tokens' inputs,
    weighted by (Σ_j g_j)² w; S is I without tokens, and for down. This is the paper's U_r Σ_r (Σ_j α_j V_j / Σ α)ᵀ,
    written without V: at full rank, the default, it is the mean of the aligned members, whatever S.

    Raises `UsageError` for a rank below 1, and `BadInputError` where the experts differ in width.
    """
    members = aligned(experts, shares)
    mean = weighted_mean(members, shares)
    if rank is None:
        return mean
    if rank < 1:
        raise UsageError(f"rank {rank}: a shared subspace has at least one dimension")
    root = _whitening(tokens) if tokens else torch.eye(mean.gate.shape[1]).to(mean.gate)
    return ExpertWeights(
        _projected(mean.gate, [member.gate @ root for member in members], rank),
        _projected(mean.up, [member.up @ root for member in members], rank),
        _projected(mean.down.T, [member.down.T for member in members], rank).T.contiguous(),
    )


def _projected(mean: Tensor, members: Sequence[Tensor], rank: int) -> Tensor:
    """Return U_r U_rᵀ `mean` (H, D), U_r the first left singular vectors of the `members` (H, D) side by side."""
    basis: Tensor = torch.linalg.svd(torch.cat(list(members), dim=1), full_matrices=False).U[:, :rank]
    return basis @ (basis.T @ mean)


def _whitening(tokens: MergeTokens) -> Tensor:
    """Return S (D, D), of full rank, with S Sᵀ = Σ_t s_t u_t u_tᵀ and s the tokens' importance."""
    weighted = tokens.inputs * tokens.importance.unsqueeze(1)
    return whitening(weighted.T @ tokens.inputs).to(tokens.inputs.dtype)
