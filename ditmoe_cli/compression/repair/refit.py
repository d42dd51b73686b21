"""Refit: the down projections of what stays are solved anew, so that they stand in for what went.

Everything that a mixture computes before its down projections is kept: which experts a token goes to, with which
routing weights g', and the neurons φ. The output is linear in the down projections, so the best ones follow from a
regression of the original mixture's output y on the features

    p = [g'_e φ_e(u)]_e  ⊕  φ_shared(u)  ⊕  m u  ⊕  m,      m = 1 - Σ_e g'_e,

with g'_e = 0 where e was not selected: the kept experts, the shared expert, and for the routing mass m that no
selected row carries a linear map L and a constant c. With W the weights as they stand, Γ the tokens' weights and y'
the mixture's output as it stands,

    W* = W + (PᵀΓP + λI)⁻¹ PᵀΓ (Y - Y'),

λ being chosen on tokens of held-out images. Where the system is too large to be solved at once, its terms are
solved one after the other, each for what the others leave, twice over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.algebra.ridge import Fit, Normal, fit
from ditmoe_cli.compression.replay.outputs import chunks, output_of
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.compression.working_sizes import LARGEST_SYSTEM, SWEEPS, systems
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.router import Routing
from ditmoe_cli.progress import each


@dataclass(frozen=True)
class Term:
    """A part of a mixture's output that is linear in a weight: features (n, F) of tokens, times weight (F, D)."""

    size: int
    features: Callable[[Tensor, Routing], Tensor]
    add: Callable[[Tensor], None]


@dataclass(frozen=True)
class Refitted:
    """The result of a fit.

    Attributes:
        error: error on held-out tokens of a fit to the others, over that without a fit; 1 where no fit is better. The
            product of these for terms solved one after the other.
        strengths: ridge strength of each system that was solved.
    """

    error: float
    strengths: tuple[float, ...]


def refit(original: SparseMoE, changed: SparseMoE, tokens: Tokens, shared: bool) -> Refitted:
    """Fit `changed` to the output of `original` on `tokens`, in place; with `shared` the shared expert too.

    A residual constant and linear map are fitted where `changed` has them. The error on held-out tokens never grows.
    """
    rest = _residuals(original, changed, tokens)
    terms = _terms(changed, shared)
    groups = systems([term.size for term in terms], LARGEST_SYSTEM)
    rounds = [terms[group] for group in groups] * (SWEEPS if len(groups) > 1 else 1)
    fits = [_solve(changed, some, tokens, rest) for some in each(rounds, "refitting", "systems", share=0.8)]
    taken = [one for one in fits if one is not None]
    return Refitted(math.prod(one.error for one in taken), tuple(one.strength for one in taken))


def _solve(moe: SparseMoE, terms: Sequence[Term], tokens: Tokens, rest: Tensor) -> Fit | None:
    """Fit terms to the residuals `rest` (T, D), subtract their change from it, and return the fit; None for no fit."""
    size = sum(term.size for term in terms)
    train, held = (Normal.empty(size, rest.shape[1], rest.device) for _ in range(2))
    for rows in each(chunks(len(rest)), "summing the system", "batches of tokens", share=0.5):
        parts, out = _features(moe, terms, tokens.inputs[rows]), tokens.held[rows]
        for sums, side in ((train, ~out), (held, out)):
            sums.add([part[side] for part in parts], rest[rows][side], tokens.weights[rows][side])
    fitted = fit(train, held)
    if fitted is None:
        return None
    solution = fitted.solution.float()
    for rows in chunks(len(rest)):
        rest[rows] -= torch.cat(_features(moe, terms, tokens.inputs[rows]), dim=1) @ solution
    for term, part in zip(terms, torch.split(solution, [term.size for term in terms]), strict=True):
        term.add(part)
    return fitted


def _features(moe: SparseMoE, terms: Sequence[Term], inputs: Tensor) -> list[Tensor]:
    routing = moe.gate(inputs)
    return [term.features(inputs, routing) for term in terms]


def _residuals(original: SparseMoE, changed: SparseMoE, tokens: Tokens) -> Tensor:
    """Return Y - Y' (T, D)."""
    parts = [
        output_of(original, tokens.inputs[rows]) - output_of(changed, tokens.inputs[rows])
        for rows in each(chunks(len(tokens.inputs)), "comparing outputs", "batches of tokens", share=0.1)
    ]
    return torch.cat(parts)


def _terms(moe: SparseMoE, shared: bool) -> list[Term]:
    """Return the terms of a mixture that can be fitted."""
    terms = [_expert_term(expert, index) for index, expert in enumerate(_swiglus(moe.experts))]
    if shared:
        terms.append(_shared_term(moe))
    if moe.residual_linear is not None:
        terms.append(
            Term(moe.residual_linear.shape[1], lambda u, routing: _missing(routing) * u, _adder(moe, "residual_linear"))
        )
    if moe.residual_constant is not None:
        terms.append(Term(1, lambda _, routing: _missing(routing), _adder(moe, "residual_constant")))
    return terms


def _swiglus(experts: nn.ModuleList) -> Iterator[SwiGLU]:
    for expert in experts:
        assert isinstance(expert, SwiGLU)
        yield expert


def _expert_term(expert: SwiGLU, index: int) -> Term:
    def features(u: Tensor, routing: Routing) -> Tensor:
        gates = routing.gate_of(index)
        selected = gates > 0
        neurons = u.new_zeros(len(u), expert.down_proj.in_features)
        neurons[selected] = expert.neurons(u[selected]) * gates[selected].unsqueeze(1)
        return neurons

    return Term(expert.down_proj.in_features, features, _down_adder(expert))


def _shared_term(moe: SparseMoE) -> Term:
    shared = moe.shared_experts
    return Term(shared.down_proj.in_features, lambda u, _: shared.neurons(u), _down_adder(shared))


def _down_adder(expert: SwiGLU) -> Callable[[Tensor], None]:
    def add(change: Tensor) -> None:
        expert.down_proj.weight = nn.Parameter(expert.down_proj.weight + change.T, requires_grad=False)

    return add


def _adder(moe: SparseMoE, name: str) -> Callable[[Tensor], None]:
    def add(change: Tensor) -> None:
        old = moe._buffers[name]
        assert old is not None
        moe._buffers[name] = old + change.T.reshape(old.shape)

    return add


def _missing(routing: Routing) -> Tensor:
    """Return 1 - Σ g of the selected rows, (T, 1)."""
    return 1 - routing.weights.sum(dim=1, keepdim=True)
