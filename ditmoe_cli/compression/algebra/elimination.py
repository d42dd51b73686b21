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

RIDGE = 1e-4
"""Added to G's diagonal, times its mean: neurons that no token tells apart would otherwise have no inverse."""
_ROUNDS = 64  # in which neurons go: all of a round are found on a few candidates, and taken off at once
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

    Takes about 4 H³ operations in fp64 and three times the Gram's memory.
    """
    width, device = len(gram), gram.device
    gram = gram.double()
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge * torch.eye(width, device=device).double()))
    rows, alive, powers = values.double().clone(), torch.arange(width, device=device), gram.diagonal()
    gone: list[Tensor] = []
    costs: list[Tensor] = []
    energies = [_energy(rows, powers)]
    at_once = max(1, width // _ROUNDS)
    while len(alive):
        leaving, cost = _leaving(inverse, rows, min(at_once, len(alive)))
        gone.append(alive[leaving])
        costs.append(cost)
        staying = torch.ones(len(alive), dtype=torch.bool, device=device)
        staying[leaving] = False
        stays = staying.nonzero().squeeze(1)
        both = inverse[leaving][:, stays]
        solved = torch.linalg.solve(inverse[leaving][:, leaving], torch.cat((both, rows[leaving]), dim=1))
        inverse = inverse[stays][:, stays].addmm_(both.T, solved[:, : len(stays)], alpha=-1)
        rows = rows[stays].addmm_(both.T, solved[:, len(stays) :], alpha=-1)
        alive = alive[stays]
        step = _energy(rows, powers[alive])
        before = energies[-1]  # in between, energies are those of a straight line
        energies += [before + (step - before) * (place + 1) / len(leaving) for place in range(len(leaving))]
    errors = torch.cat((torch.zeros(1, dtype=torch.float64, device=device), torch.cat(costs).cumsum(0)))
    return Elimination(torch.cat(gone).flip(0), errors.flip(0), torch.stack(energies).flip(0))


def _energy(rows: Tensor, powers: Tensor) -> Tensor:
    """Return Σ_j ‖v_j‖² G_jj."""
    return (rows.square().sum(dim=1) * powers).sum()


def _leaving(inverse: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` neurons that go next, in order, and what each costs.

    Each is the cheapest of the candidates once those before it are gone; candidates are the cheapest at the start.
    """
    scores = rows.square().sum(dim=1) / inverse.diagonal()
    candidates = scores.argsort(stable=True)[: count * _CANDIDATES]
    small, own = inverse[candidates][:, candidates], rows[candidates]
    leaving: list[Tensor] = []
    costs: list[Tensor] = []
    free = torch.zeros(len(candidates), dtype=torch.float64, device=inverse.device)
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
