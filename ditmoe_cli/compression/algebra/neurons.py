"""Neurons of experts: activations, energies, and experts of fewer neurons.

A neuron is a row of W_gate and of W_up with a column of W_down; an expert's output is the sum over its neurons.
Energies are those of CAMERA (Xu et al. 2025, https://arxiv.org/abs/2508.02322), which calls a neuron a micro-expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.routing.profile import RoutingProfile

DEFAULT_ALPHA = 0.9  # as in the authors' scripts


def energies(down: Tensor, energy: Tensor, largest: Tensor, gamma_square: Tensor, alpha: float) -> Tensor:
    """Return I_i = Σ_h E[γ_h²] W_down[h, i]² · ((1 - α) Σ_t a_i(t)² + α max_t a_i(t)²) of an expert's H neurons.

    a = g φ is a neuron's activation times the routing weight, 0 for tokens that went elsewhere. γ is the block's
    residual gate: I measures what reaches the residual stream, which all blocks share, so energies of different blocks
    compare.

    Args:
        down: W_down (D, H).
        energy: Σ_t a² (H,).
        largest: max_t a² (H,), squared already.
        gamma_square: E[γ²] (D,).
        alpha: share of the largest activation in [0, 1].

    Returns:
        (H,) in float64.
    """
    reach = gamma_square.double() @ down.double().square()
    return reach * ((1.0 - alpha) * energy.double() + alpha * largest.double())


def activations(expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """Return φ(u) = SiLU(W_gate u) ⊙ W_up u of tokens u (T, D), (T, H)."""
    return F.silu(inputs @ expert.gate.T) * (inputs @ expert.up.T)


def output(expert: ExpertWeights, inputs: Tensor) -> Tensor:
    """Return f(u) = W_down φ(u) of tokens u (T, D), (T, D)."""
    return activations(expert, inputs) @ expert.down.T


def profiled_energies(profile: RoutingProfile, block: int, downs: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Return the energies (H,) of experts from a profile's sums, each expert given as its number and W_down (D, H).

    Raises `BadInputError` for a ``fast`` profile, which has no such sums.
    """
    energy, largest = (_table(profile, f"neuron.{name}", block) for name in ("energy", "max"))
    gamma = mean_gamma_square(profile, block)
    result = []
    for expert, down in downs:
        squares, most, scale = (t.to(down.device) for t in (energy[expert], largest[expert], gamma))
        width = down.shape[1]
        result.append(energies(down, squares[:width], most[:width], scale, DEFAULT_ALPHA))
    return result


def mean_gamma_square(profile: RoutingProfile, block: int) -> Tensor:
    """Return E[γ²] (D,) over steps and branches. Raises `BadInputError` for a ``fast`` profile."""
    return _table(profile, "gamma.square", block).sum(dim=(0, 1)) / profile.tensor("gamma.images").sum()


def _table(profile: RoutingProfile, name: str, block: int) -> Tensor:
    if name not in profile.header.tensors:
        raise BadInputError(f"{profile.path}: the profile has no {name!r}; profile again without ⟨fast⟩")
    return profile.block_tensor(name, block)


def narrowed(expert: ExpertWeights, neurons: Sequence[int] | Tensor) -> ExpertWeights:
    """Return an expert of the given neurons, in the order given: rows of gate and up, columns of down.

    Given all of them in another order, it computes what the expert does.
    """
    index = torch.as_tensor(neurons, dtype=torch.int64, device=expert.gate.device)
    return ExpertWeights(expert.gate[index], expert.up[index], expert.down[:, index])


def best_neurons(energy: Tensor, width: int) -> Tensor:
    """Return the `width` neurons of highest energy in ascending order; ties fall to the lower number."""
    return energy.argsort(descending=True, stable=True)[:width].sort().values
