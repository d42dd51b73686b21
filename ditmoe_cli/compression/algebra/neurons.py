"""CAMERA-P: pruning neurons across experts by their energy (Xu et al. 2025, https://arxiv.org/abs/2508.02322).

A neuron with its row of W_gate and W_up and its column of W_down is a micro-expert; a block's output is the sum over
all of them. The paper drops those of least energy, pooled over the experts of a block, by zeroing their weights. Here
experts become narrower instead, so widths have to suit the hardware: see `pooled_widths`. Energies are those of what
reaches the residual stream, which is one for all blocks, so that a pool may span them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.expert_weights import ExpertWeights

DEFAULT_ALPHA = 0.9  # what the authors' scripts use


def energies(down: Tensor, energy: Tensor, largest: Tensor, gamma_square: Tensor, alpha: float) -> Tensor:
    """Return I_i = Σ_h E[γ_h²] W_down[h, i]² · ((1 - α) Σ_t a_i(t)² + α max_t a_i(t)²) of an expert's H neurons.

    a = g φ is a neuron's activation times the routing weight, 0 for tokens that went elsewhere; γ is the block's
    residual gate, so that I measures what reaches the residual stream.

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


def narrowed(expert: ExpertWeights, neurons: Sequence[int] | Tensor) -> ExpertWeights:
    """Return the expert of the given neurons alone, in the order given: rows of gate and up, columns of down."""
    index = torch.as_tensor(neurons, dtype=torch.int64, device=expert.gate.device)
    return ExpertWeights(expert.gate[index], expert.up[index], expert.down[:, index])


def best_neurons(energy: Tensor, width: int) -> Tensor:
    """Return the `width` neurons of highest energy in ascending order; ties fall to the lower number."""
    return energy.argsort(descending=True, stable=True)[:width].sort().values


def pooled_widths(energies: Sequence[Tensor], total: int, multiple: int, least: Sequence[int]) -> tuple[int, ...]:
    """Return how many neurons each expert of a pool keeps: those of the pool's highest energies.

    Rounding: an expert's neurons, best first, are cut into groups of `multiple`, and what is left over is a last,
    smaller group. Every expert gets the groups that hold its `least` best neurons, or all of them if it has no more;
    then groups follow by energy per neuron, over all experts, while they fit into `total`. So each width is 0, a
    multiple of `multiple` or the expert's own, less than a group of the budget is left over, and no other such
    widths hold more energy, as long as the experts' own widths are multiples. Ties fall to the lower number.

    Args:
        energies: (H,) per expert; H may differ.
        total: most neurons to keep over all experts.
        multiple: what widths are multiples of, at least 1.
        least: fewest neurons of each expert; 0 lets it go.

    Raises `InfeasibleError` where `total` is too small for the least widths.
    """
    ladders = [_widths(len(each), multiple, floor) for each, floor in zip(energies, least, strict=True)]
    widths = [ladder[0] for ladder in ladders]
    if sum(widths) > total:
        raise InfeasibleError(
            f"{total} neurons are too few for {len(widths)} experts, which need {sum(widths)} at the least; keep more, "
            f"or give a smaller --multiple"
        )
    steps = (_steps(i, each, ladder) for i, (each, ladder) in enumerate(zip(energies, ladders, strict=True)))
    for _, expert, start, end in heapq.merge(*steps):
        # after a group that did not fit, the smaller one behind it must not jump ahead
        if start == widths[expert] and sum(widths) + end - start <= total:
            widths[expert] = end
    return tuple(widths)


def _widths(width: int, multiple: int, least: int) -> list[int]:
    """Return the widths that an expert of `width` may get, ascending."""
    return [w for w in (*range(0, width, multiple), width) if w >= min(least, width)]


def _steps(expert: int, energies: Tensor, ladder: list[int]) -> Iterator[tuple[float, int, int, int]]:
    """Yield the steps from each width to the next as (-energy per neuron, expert, width, next width)."""
    ranked = energies.double().sort(descending=True).values
    for start, end in itertools.pairwise(ladder):
        yield -float(ranked[start:end].mean()), expert, start, end
