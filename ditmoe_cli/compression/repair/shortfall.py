"""What a changed mixture lacks of the original one's output, with nothing computed that both have in common.

Neurons of a changed expert that are those of an original one, as those of a kept or a narrowed one are, cancel where
both route a token alike. So only the other neurons of the original are computed, and common ones where routing weights
differ: with φ_c the common neurons and φ_o the others,

    g f(u) - g' f'(u) = g W_o φ_o(u) + (g - g') W_c φ_c(u).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.compression.repair.features import FitTokens, Routes, Term, swiglus
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.progress import each

_TOKENS = 4096  # that are run at a time


@dataclass(frozen=True)
class Routed:
    """A mixture with the routing of the tokens of a fit."""

    moe: SparseMoE
    routes: Routes


def shortfall(original: Routed, changed: Routed, terms: Sequence[Term], common: Term, tokens: FitTokens) -> Tensor:
    """Return √w (y - y') of all tokens (T, D), y and y' being the outputs of the mixtures.

    `terms` are those of the changed experts, in order, and `common` that of the shared expert.
    """
    missing = torch.zeros(len(tokens), original.moe.gate.weight.shape[1], device=tokens.root.device)
    for batch in tokens.batches:
        for side, sign in ((original, 1.0), (changed, -1.0)):
            _add_extensions(missing[batch], side, tokens, batch, sign)
    matched = _matches(list(swiglus(original.moe.experts)), list(swiglus(changed.moe.experts)))
    numbered = list(enumerate(swiglus(original.moe.experts)))
    for number, expert in each(numbered, "comparing outputs", "experts", share=0.1):
        gates, match = original.routes.gate_of(number), matched.get(number)
        if match is None:
            _add_output(missing, _weights(expert), gates, tokens)
            continue
        _add_output(missing, _others(expert, match.neurons), gates, tokens)
        _add_common(missing, changed, terms[match.expert], match.expert, gates, tokens)
    for index in set(range(len(changed.moe.experts))) - {match.expert for match in matched.values()}:
        _add_common(missing, changed, terms[index], index, torch.zeros_like(tokens.root), tokens)
    _add_shared(missing, original.moe.shared_experts, changed.moe.shared_experts, common, tokens)
    return missing


@dataclass(frozen=True)
class _Match:
    """A changed expert, all of whose neurons are some `neurons` (H',) of an original one."""

    expert: int
    neurons: Tensor


_Weights = tuple[Tensor, Tensor, Tensor]  # gate and up (H, D), down (D, H)


def _weights(expert: SwiGLU) -> _Weights:
    return expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight


def _others(expert: SwiGLU, neurons: Tensor) -> _Weights:
    """Return the weights of the neurons that are not among `neurons`."""
    gate, up, down = _weights(expert)
    others = torch.ones(len(gate), dtype=torch.bool, device=gate.device)
    others[neurons] = False
    return gate[others], up[others], down[:, others]


def _matches(original: Sequence[SwiGLU], changed: Sequence[SwiGLU]) -> dict[int, _Match]:
    """Return the changed expert that consists of neurons of an original one, by the number of the latter."""
    keys = [_keys(expert) for expert in original]
    found: dict[int, _Match] = {}
    for index, expert in enumerate(changed):
        wanted = _keys(expert)
        for number, known in enumerate(keys):
            if number not in found and (neurons := _neurons(original[number], known, expert, wanted)) is not None:
                found[number] = _Match(index, neurons)
                break
    return found


def _keys(expert: SwiGLU) -> Tensor:
    """Return a number of each neuron (H,) that is the same for the same weights of gate and up."""
    gate, up, _ = _weights(expert)
    odd = torch.arange(gate.shape[1], device=gate.device) * 0x3C6EF362 + 1
    first, second = ((part.detach().float().view(torch.int32) * odd).sum(dim=1) for part in (gate, up))
    return first * 31 + second


def _neurons(expert: SwiGLU, keys: Tensor, part: SwiGLU, wanted: Tensor) -> Tensor | None:
    """Return the neurons of an expert that a part of it consists of; None where it is no part."""
    ordered, order = keys.sort(stable=True)
    places = torch.searchsorted(ordered, wanted).clamp_max(len(ordered) - 1)
    if len(wanted) > len(keys) or not bool((ordered[places] == wanted).all()):
        return None
    neurons = order[places]
    (gate, up, down), mine = _weights(expert), _weights(part)
    same = torch.equal(gate[neurons], mine[0]) and torch.equal(up[neurons], mine[1])
    distinct = len(torch.unique(neurons)) == len(neurons)
    return neurons if distinct and same and torch.equal(down[:, neurons], mine[2]) else None


def _add_output(missing: Tensor, weights: _Weights, gates: Tensor, tokens: FitTokens) -> None:
    """Add √w g f(u) of the expert with these weights to the rows of `missing` that select it."""
    gate, up, down = weights
    if not len(gate):
        return
    for places in torch.split((gates > 0).nonzero().flatten(), _TOKENS):
        u = tokens.inputs(places)
        neurons = F.silu(F.linear(u, gate)) * F.linear(u, up)
        missing[places] += F.linear(neurons, down) * (gates * tokens.root)[places, None]


def _add_common(missing: Tensor, changed: Routed, term: Term, index: int, gates: Tensor, tokens: FitTokens) -> None:
    """Add √w (g - g') f'(u) of a changed expert, `gates` g (T,) being those that the original routes with."""
    expert, own = changed.moe.experts[index], changed.routes.gate_of(index)
    assert isinstance(expert, SwiGLU) and term.places is not None
    alone = torch.where(own > 0, 0.0, gates)
    _add_output(missing, _weights(expert), alone, tokens)
    change = (gates[term.places] - own[term.places]) / own[term.places]
    for some in torch.split(change.nonzero().flatten(), _TOKENS):
        missing[term.places[some]] += change[some, None] * F.linear(term.values(some), expert.down_proj.weight)


def _add_shared(missing: Tensor, original: SwiGLU, changed: SwiGLU, term: Term, tokens: FitTokens) -> None:
    ones = torch.ones_like(tokens.root)
    match = _matches([original], [changed]).get(0)
    _add_output(missing, _weights(original) if match is None else _others(original, match.neurons), ones, tokens)
    if match is None:
        for batch in tokens.batches:
            missing[batch] -= F.linear(term.values(batch), changed.down_proj.weight)


def _add_extensions(missing: Tensor, side: Routed, tokens: FitTokens, batch: slice, sign: float) -> None:
    """Add ±√w times what constants and residual maps give to a batch of tokens."""
    moe, u, root = side.moe, tokens.inputs(batch), tokens.root[batch, None]
    experts, weights = side.routes.experts[batch], side.routes.weights[batch]
    left_over = moe.left_over(u, weights)
    if left_over is not None:
        missing += sign * root * left_over
    if moe.constants is not None:
        for slot, selected in _slots(experts):
            constants = moe.constant_outputs(u[selected], -2 - experts[selected, slot])
            missing[selected] += sign * (root[selected] * weights[selected, slot, None]) * constants


def _slots(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each slot of tokens (T, k), with the tokens that select a constant in it."""
    for slot in range(experts.shape[1]):
        yield slot, (experts[:, slot] < -1).nonzero().flatten()
