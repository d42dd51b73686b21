"""Sub-MoE: merge experts in a subspace that they share (Li et al. 2025, https://arxiv.org/abs/2506.23266)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import svd
from ditmoe_cli.compression.algebra.matching import aligned
from ditmoe_cli.compression.algebra.means import mean_expert
from ditmoe_cli.compression.algebra.neurons import output
from ditmoe_cli.compression.algebra.whitening import covariance_of, whitening
from ditmoe_cli.compression.merge.grouping import mean_outputs, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.progress import each
from ditmoe_cli.routing.measures import mean_of

_RANKS = 16
_TOKENS = 4096  # at a time
_ROUNDING = 1e-6


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
            clusters: list[int] = KMeans(count, n_init=10, random_state=0).fit_predict(directions).tolist()
        return clusters

    return partition(len(inputs.selected), count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return U_r U_rᵀ W̄ for gate, up and downᵀ (H, D): the mean of aligned members in the subspace that they share.

    W̄ = Σ_j α_j W_j / Σ α. U_r (H, r) are the first left singular vectors of [W_1 S … W_n S], the members side by side,
    so that what is shared is the space of the aligned neurons. For gate and up S Sᵀ is the covariance of the inputs of
    tokens that are not held out, weighted by (Σ_j g_j)² w; for down S is I. This is the paper's
    U_r Σ_r (Σ_j α_j V_j / Σ α)ᵀ, written without V. At full rank it is W̄, whatever S.

    The rank is chosen on held-out tokens (`best_rank`). Raises `BadInputError` without tokens, and where the experts
    differ in width.
    """
    if tokens is None:
        raise BadInputError(
            "sub-moe chooses its rank on tokens, which the profile does not keep; profile without ⟨fast⟩"
        )
    members = aligned(experts, shares)
    mean = mean_expert(members, shares)
    subspace = Subspace.shared_by(members, tokens.part(~tokens.held))
    rank = best_rank(experts, mean, subspace, tokens.part(tokens.held))
    return mean if rank is None else subspace.projected(mean, rank)


def best_rank(
    experts: Sequence[ExpertWeights], mean: ExpertWeights, subspace: Subspace, held: MergeTokens
) -> int | None:
    """Return the rank of least Σ_t w ‖Σ_j g_j f_j(u) - (Σ_j g_j) f(u)‖² on held-out tokens, None for the full one.

    f_j are the group's members and f the mean in the subspace. Ranks are sixteenths of the full one. A rank has to
    better the full one by more than rounding: a millionth of what the members themselves give.
    """
    wanted, full = torch.zeros_like(held.inputs), subspace.gate.shape[1]
    for expert, gate in zip(experts, held.gates.T, strict=True):
        wanted += gate.unsqueeze(1) * _outputs(expert, held.inputs)

    def error(merged: ExpertWeights) -> float:
        lost = wanted - held.gates.sum(dim=1, keepdim=True) * _outputs(merged, held.inputs)
        return float((held.weights * lost.double().square().sum(dim=1)).sum())

    least = error(mean) - _ROUNDING * float((held.weights * wanted.double().square().sum(dim=1)).sum())
    best = None
    ranks = sorted({math.ceil(full * part / _RANKS) for part in range(1, _RANKS)} - {full}, reverse=True)
    for rank in each(ranks, "trying", "ranks", share=0.4):
        reached = error(subspace.projected(mean, rank))
        if reached < least:
            best, least = rank, reached
    return best


@dataclass(frozen=True)
class Subspace:
    """The left singular vectors U (H, min(H, n D)) of the gates, ups and transposed downs of n members.

    Those of most energy come first.
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def shared_by(cls, members: Sequence[ExpertWeights], tokens: MergeTokens) -> Subspace:
        """Return the directions that aligned members share, gate and up as tokens meet them."""
        root = _whitening(tokens)
        sides = (
            [member.gate @ root for member in members],
            [member.up @ root for member in members],
            [member.down.T for member in members],
        )
        return cls(*(_left_vectors(side) for side in each(sides, "looking for shared directions", "sides", share=0.4)))

    def projected(self, expert: ExpertWeights, rank: int) -> ExpertWeights:
        """Return U_r U_rᵀ W of gate, up and downᵀ."""
        gate, up, down = (
            basis[:, :rank] @ (basis[:, :rank].T @ matrix)
            for basis, matrix in ((self.gate, expert.gate), (self.up, expert.up), (self.down, expert.down.T))
        )
        return ExpertWeights(gate, up, down.T.contiguous())


def _outputs(expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """Return f(u) (T, D) of tokens u (T, D), some at a time."""
    return torch.cat([output(expert, u) for u in torch.split(inputs, _TOKENS)])


def _left_vectors(matrices: Sequence[Tensor]) -> Tensor:
    """Return the left singular vectors of matrices (H, D) side by side, by falling singular value."""
    vectors: Tensor = svd(torch.cat(list(matrices), dim=1)).U
    return vectors


def _whitening(tokens: MergeTokens) -> Tensor:
    """Return S (D, D), of full rank, with S Sᵀ = Σ_t s_t u_t u_tᵀ and s the tokens' importance."""
    return whitening(covariance_of(tokens.inputs, tokens.importance)).to(tokens.inputs.dtype)
