"""The order in which an expert's neurons may go, each at the least cost once the others are refitted.

An expert's output is linear in its neurons' activations φ (T, H), which scale the rows v of its down projection.
Without neuron j, and with the others' rows refitted, the squared error grows by

    Δ_j = ‖v_j‖² / (G⁻¹)_jj,      G = Σ_t φ φᵀ,

and the others' rows change by -v_j (G⁻¹)_ij / (G⁻¹)_jj: the optimal brain surgeon (Hassibi & Stork 1992,
https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html) for whole neurons. The neuron of
least Δ goes first, and so on: so one pass gives the refitted error of every width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.working_sizes import DOUBLE_FEATURES

RIDGE = 1e-4
"""Added to G's diagonal, times its mean: neurons that no token tells apart would otherwise have no inverse."""
_ROUNDS = 64  # in which neurons go: all of a round are found on a few candidates, and taken off at once
_SHRINK = 0.8  # share of neurons left at which what went is dropped from memory
_CANDIDATES = 4  # for each neuron that goes in a round


@dataclass(frozen=True)
class Elimination:
    """The order in which H neurons go, and what is left.

    Attributes:
        order: (H,) neurons, the last to go first: the first k are those that stay at width k.
        errors: (H + 1,) squared error Σ ‖Wᵀφ - Vᵀφ‖² of the best V on the first k neurons, k = 0 ... H; fp64.
        energies: (H + 1,) Σ_j ‖v_j‖² G_jj of that V: how large the terms are that add up to the output; fp64.
    """

    order: Tensor
    errors: Tensor
    energies: Tensor


def eliminate(gram: Tensor, values: Tensor) -> Elimination:
    """Return the order in which neurons go.

    Args:
        gram: (H, H) Σ φ φᵀ over tokens.
        values: (H, D) rows v: the down projection, transposed.

    Takes about 3 H³ operations and three times the Gram's memory, in fp64 up to `DOUBLE_FEATURES` neurons.
    """
    width, device = len(gram), gram.device
    dtype = torch.float64 if width <= DOUBLE_FEATURES else torch.float32
    powers = gram.diagonal().double()
    inverse = _inverse(gram.to(dtype))
    rows, left = values.to(dtype), torch.arange(width, device=device)
    gone: list[Tensor] = []
    costs: list[Tensor] = []
    energies = [_energy(rows, powers)]
    at_once, remaining = max(1, width // _ROUNDS), width
    free = torch.zeros(width, dtype=dtype, device=device)  # infinite for neurons that went: they do not go again
    while remaining:
        leaving, cost = _leaving(inverse, rows, free, min(at_once, remaining))
        gone.append(left[leaving])
        costs.append(cost.double())
        both, square = inverse[leaving], inverse[leaving][:, leaving]
        solved = torch.linalg.solve(square, torch.cat((both, rows[leaving]), dim=1))
        inverse.addmm_(both.T, solved[:, : len(left)], alpha=-1)
        rows = rows.addmm(both.T, solved[:, len(left) :], alpha=-1)
        free[leaving], rows[leaving] = torch.inf, 0.0
        inverse.diagonal()[leaving] = 1.0
        remaining -= len(leaving)
        step, before = _energy(rows, powers[left]), energies[-1]
        # between two rounds energies lie on a straight line
        energies += [before + (step - before) * (place + 1) / len(leaving) for place in range(len(leaving))]
        if remaining <= _SHRINK * len(left):
            stays = (free == 0).nonzero().squeeze(1)
            inverse = inverse.index_select(0, stays).index_select(1, stays)
            rows, free, left = rows[stays], free[stays], left[stays]
    errors = torch.cat((torch.zeros(1, dtype=torch.float64, device=device), torch.cat(costs).cumsum(0)))
    return Elimination(torch.cat(gone).flip(0), errors.flip(0), torch.stack(energies).flip(0))


def _inverse(gram: Tensor) -> Tensor:
    """Return (G + `RIDGE` mean(diag G) I)⁻¹."""
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    system = gram.clone()
    system.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(system))


def _energy(rows: Tensor, powers: Tensor) -> Tensor:
    """Return Σ_j ‖v_j‖² G_jj."""
    return (rows.square().sum(dim=1, dtype=torch.float64) * powers).sum()


def _leaving(inverse: Tensor, rows: Tensor, gone: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` neurons that go next, in order, and what each costs; `gone` is infinite for those that went.

    Each is the cheapest of the candidates once those before it are gone; candidates are the cheapest at the start.
    """
    scores = rows.square().sum(dim=1) / inverse.diagonal() + gone
    candidates = scores.argsort(stable=True)[: count * _CANDIDATES]
    small, own = inverse[candidates][:, candidates], rows[candidates]
    leaving: list[Tensor] = []
    costs: list[Tensor] = []
    free = gone[candidates]
    for _ in range(count):
        scores = own.square().sum(dim=1) / small.diagonal() + free
        place = scores.argmin()
        leaving.append(place)
        costs.append(scores[place])
        column = small[:, place] / small[place, place]
        own = own - column.unsqueeze(1) * own[place]
        small = small - column.unsqueeze(1) * small[place]
        free[place] = torch.inf
        small[place, place] = 1.0
    return candidates[torch.stack(leaving)], torch.stack(costs)
