"""MergeMoE: merge experts' outputs, the down projection by least squares (https://arxiv.org/abs/2510.14436)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.means import mean_expert, normalised, require_equal_widths
from ditmoe_cli.compression.algebra.neurons import activations, output
from ditmoe_cli.compression.algebra.ridge import Normal, Rows
from ditmoe_cli.compression.merge.grouping import Array, most_selected, nearest_centres, partition
from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.progress import each

RIDGE = 0.01
_TOKENS = 4096  # at a time


def group(inputs: GroupingInputs, count: int) -> Groups:
    """Return `count` groups: the experts selected most are centres, the others join the nearest of these.

    Distance is ‖[W_up, W_gate]_j - [W_up, W_gate]_c‖_F, neurons in the order they have. Raises `InfeasibleError` for
    a count outside 1..E, and `BadInputError` where the experts differ in width.
    """

    def labels() -> list[int]:
        centres = most_selected(inputs.selected, count)
        return nearest_centres(centres, -_distances(inputs.experts(), centres))

    return partition(len(inputs.selected), count, labels)


def merge(experts: Sequence[ExpertWeights], shares: Sequence[float], tokens: MergeTokens | None) -> ExpertWeights:
    """Return gate and up as Σ_j B_j W_j, B = α / Σ α, and the down projection that fits Y = Σ_j B_j f_j best.

    With P (H, T) the merged neurons φ(u) = SiLU(W_gate u) ⊙ W_up u, S the diagonal of tokens' weights (Σ_j g_j)² w
    and W̄ = Σ_j B_j W_down,j::

        W_down = W̄ + (Y - W̄ P) S Pᵀ (P S Pᵀ + λ I)⁻¹,    λ = RIDGE · mean diagonal of P S Pᵀ

    Without the ridge it is the paper's Y S Pᵀ (P S Pᵀ)⁻¹. The ridge draws towards W̄ rather than 0, so that on few
    tokens, or none that select a member, the error does not exceed that of the mean. Raises `BadInputError` without
    tokens, and where the experts differ in width.
    """
    if tokens is None:
        raise BadInputError("mergemoe fits to tokens, which the profile does not keep; profile without ⟨fast⟩")
    mean, importance = mean_expert(experts, shares), tokens.importance
    width, hidden = mean.gate.shape
    sums = Normal.empty(width, hidden, mean.gate.device)
    rounds = torch.split((importance > 0).nonzero().flatten(), _TOKENS)
    for rows in each(rounds, "summing the system", "batches of tokens", share=0.8):
        u = tokens.inputs[rows]
        phi = activations(mean, u)
        missing = _mean_output(experts, normalised(shares), u) - phi @ mean.down.T
        root = importance[rows].sqrt().unsqueeze(1)
        sums.add([Rows(phi * root)], missing * root)
    change = sums.solve(RIDGE)
    if change is None:
        raise BadInputError("mergemoe: the system of an expert's neurons cannot be solved; profile with more tokens")
    return replace(mean, down=mean.down + change.T.float())


def _mean_output(experts: Sequence[ExpertWeights], weights: Sequence[float], u: Tensor) -> Tensor:
    """Return Σ_j B_j f_j(u), (T, D)."""
    parts = (b * output(expert, u) for b, expert in zip(weights, experts, strict=True))
    return sum(parts, start=torch.zeros_like(u))


def _distances(experts: Sequence[ExpertWeights], centres: Sequence[int]) -> Array:
    """Return (E, N) Frobenius distances of gate and up together, from each expert to each centre."""
    require_equal_widths(experts)

    def distance(a: ExpertWeights, b: ExpertWeights) -> float:
        return float(torch.hypot((a.gate - b.gate).norm(), (a.up - b.up).norm()))

    return np.array([[distance(expert, experts[centre]) for centre in centres] for expert in experts])
