"""Scales in place of a refit: a factor for each expert's output, folded into its down projection.

The cheapest repair that there is (LS-scale): as many unknowns as experts, so a few hundred tokens are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.outputs import chunks, held_error, output_of
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE

DEFAULT_RIDGE = 1e-6


def rescale(original: SparseMoE, changed: SparseMoE, tokens: Tokens) -> float:
    """Scale each expert of `changed` so that its output is nearest to that of `original`, in place.

    Scales are found on tokens that are not held out. Returns the error on those that are, over that before; where it
    would grow nothing is changed, and 1 is returned.
    """
    first, *others = _equations(original, changed, tokens)
    for more in others:
        first += more
    scales = survivor_scales(first).float().tolist()
    before = held_error(original, changed, tokens)
    _multiply(changed, scales)
    after = held_error(original, changed, tokens)
    if after < before:
        return after / before
    _multiply(changed, [1 / scale if scale else 1.0 for scale in scales])
    return 1.0


def _multiply(moe: SparseMoE, scales: list[float]) -> None:
    for expert, scale in zip(moe.experts, scales, strict=True):
        assert isinstance(expert, SwiGLU)
        expert.down_proj.weight.data *= scale  # in place: experts lie together in memory


def _equations(original: SparseMoE, changed: SparseMoE, tokens: Tokens) -> Iterator[NormalEquations]:
    """Yield the normal equations of some tokens at a time that are not held out."""
    inputs, weights = tokens.inputs[~tokens.held], tokens.weights[~tokens.held]
    for rows in chunks(len(inputs)):
        parts = _parts(changed, inputs[rows])
        wanted = output_of(original, inputs[rows]) - output_of(changed, inputs[rows]) + parts.sum(dim=0)
        yield normal_equations(wanted, parts, weights[rows])


def _parts(moe: SparseMoE, inputs: Tensor) -> Tensor:
    """Return what each expert adds to tokens (T, D), g f or 0, (E, T, D)."""
    routing = moe.gate(inputs)
    outputs = moe.expert_outputs(inputs, routing.experts) * routing.weights.unsqueeze(-1)
    chosen = routing.chosen(len(moe.experts)).to(outputs)
    return torch.einsum("tke,tkd->etd", chosen, outputs)


@dataclass(frozen=True)
class NormalEquations:
    """The sums that survivors' scales need: A_kl = Σ_t w ⟨r_k, r_l⟩ (K, K) and b_k = Σ_t w ⟨r_k, y⟩ (K,).

    Those of several batches of tokens add up.
    """

    gram: Tensor
    moments: Tensor

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(self.gram + other.gram, self.moments + other.moments)


def normal_equations(wanted: Tensor, parts: Tensor, weights: Tensor) -> NormalEquations:
    """Return the sums in float64 over tokens of wanted outputs y (T, D), weighing w (T,).

    `parts` (K, T, D) holds what each survivor adds, r_k = g_k f_k, 0 for tokens that did not select it.
    """
    flat = parts.double().flatten(1)  # (K, T D)
    weighted = (parts.double() * weights.double().unsqueeze(-1)).flatten(1)
    return NormalEquations(weighted @ flat.T, weighted @ wanted.double().flatten())


def survivor_scales(equations: NormalEquations, ridge: float = DEFAULT_RIDGE) -> Tensor:
    """Return c (K,) that minimises Σ_t w ‖y - Σ_k c_k r_k‖² + λ ‖c - 1‖², λ = ridge · mean diagonal of A.

    c - 1 is the least-norm solution of (A + λI)(c - 1) = b - A1, so that scales which the tokens do not determine,
    such as an unused survivor's, stay at 1 and a singular matrix is no harm. In float64.
    """
    gram = equations.gram.double()
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    residual = equations.moments.double() - gram.sum(dim=1)
    change: Tensor = torch.linalg.pinv(damped, hermitian=True) @ residual
    return 1.0 + change
