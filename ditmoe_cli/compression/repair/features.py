"""The terms of a mixture's output that are linear in a weight, and their features on the tokens of a fit.

Features are computed once and kept, term after term, as long as they fit into `KEPT_FEATURES` bytes; those of other
terms are computed whenever they are asked for. Both are scaled by the root of their token's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.algebra.ridge import Rows
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.compression.working_sizes import KEPT_FEATURES
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.progress import each

_TOKENS = 8192  # of a batch


class FitTokens:
    """The tokens of a fit, those to fit on first, then those held out; in batches, none of which has both.

    Attributes:
        order: (T,) index of each token in the `Tokens` that were given.
        root: (T,) root of its weight.
        train: batches of tokens to fit on, as slices.
        held: batches of tokens that are held out.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._inputs = tokens.inputs
        self.order = tokens.held.to(torch.int8).argsort(stable=True)
        self.root = tokens.weights.float().sqrt()[self.order]
        fitted = int((~tokens.held).sum())
        self.train, self.held = _batches(0, fitted), _batches(fitted, len(self.order))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def batches(self) -> list[slice]:
        """All batches, in order."""
        return self.train + self.held

    def inputs(self, places: Tensor | slice) -> Tensor:
        """Return the inputs u (n, D) of the tokens at some places of the order."""
        return self._inputs[self.order[places]]


def _batches(start: int, stop: int) -> list[slice]:
    return [slice(at, min(at + _TOKENS, stop)) for at in range(start, stop, _TOKENS)]


@dataclass(frozen=True)
class Routes:
    """How a mixture routes the tokens of a fit: experts (T, k) and routing weights (T, k)."""

    experts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, moe: SparseMoE, tokens: FitTokens) -> Routes:
        """Route all tokens."""
        parts = [moe.gate(tokens.inputs(rows)) for rows in tokens.batches]
        return cls(torch.cat([part.experts for part in parts]), torch.cat([part.weights for part in parts]))

    def gate_of(self, expert: int) -> Tensor:
        """Return an expert's routing weight for each token (T,), summed over rows that share it, else 0."""
        return (self.weights * (self.experts == expert)).sum(dim=1)

    @property
    def missing(self) -> Tensor:
        """1 - Σ g of the selected rows, (T, 1)."""
        return 1 - self.weights.sum(dim=1, keepdim=True)


@dataclass
class Term:
    """A part of a mixture's output that is linear in a weight: features (n, F) of n tokens, times weight (F, D).

    Attributes:
        size: F.
        places: (n,) the tokens whose features are not all 0, ascending; None for all.
        features: returns the features (m, F) of tokens, given as indices into `places`.
        add: adds a change (F, D) to the weight.
    """

    size: int
    places: Tensor | None
    features: Callable[[Tensor | slice], Tensor]
    add: Callable[[Tensor], None]
    kept: Tensor | None = None

    @cached_property
    def _listed(self) -> Tensor | None:
        return None if self.places is None else self.places.cpu()

    def inside(self, batch: slice) -> slice:
        """Return which of `places` are tokens of a batch."""
        if self._listed is None:
            return batch
        start, stop = torch.searchsorted(self._listed, torch.tensor([batch.start, batch.stop])).tolist()
        return slice(start, stop)

    def values(self, own: Tensor | slice) -> Tensor:
        """Return features (m, F), given as indices into `places`."""
        return self.features(own) if self.kept is None else self.kept[own]

    def rows(self, batch: slice) -> Rows:
        """Return the features in a batch of tokens."""
        inside = self.inside(batch)
        return Rows(self.values(inside), None if self.places is None else self.places[inside] - batch.start)


def fitted_terms(moe: SparseMoE, routes: Routes, tokens: FitTokens, shared: bool) -> tuple[list[Term], Term]:
    """Return the terms of a mixture that can be fitted, and that of the shared expert, one of them with `shared`."""
    terms = [_expert_term(expert, routes.gate_of(index), tokens) for index, expert in enumerate(swiglus(moe.experts))]
    common = _shared_term(moe.shared_experts, tokens)
    if shared:
        terms.append(common)
    scale = routes.missing * tokens.root[:, None]
    if moe.residual_linear is not None:
        width = moe.residual_linear.shape[1]
        terms.append(Term(width, None, lambda own: scale[own] * tokens.inputs(own), _adder(moe, "residual_linear")))
    if moe.residual_constant is not None:
        terms.append(Term(1, None, lambda own: scale[own], _adder(moe, "residual_constant")))
    return terms, common


def keep_features(terms: Sequence[Term], tokens: FitTokens) -> None:
    """Compute the features of experts, as many as may be kept."""
    left = KEPT_FEATURES
    for term in each(terms, "computing neurons", "terms", share=0.1):
        count = len(tokens) if term.places is None else len(term.places)
        needed = 4 * count * term.size
        if needed > left:
            continue
        left -= needed
        kept = torch.empty(count, term.size, device=tokens.root.device)
        for batch in tokens.batches:
            inside = term.inside(batch)
            kept[inside] = term.features(inside)
        term.kept = kept


def swiglus(experts: nn.ModuleList) -> Iterator[SwiGLU]:
    """Yield the experts of a mixture."""
    for expert in experts:
        assert isinstance(expert, SwiGLU)
        yield expert


def _expert_term(expert: SwiGLU, gates: Tensor, tokens: FitTokens) -> Term:
    places = (gates > 0).nonzero().flatten()
    scale = (gates * tokens.root)[places, None]

    def features(own: Tensor | slice) -> Tensor:
        return expert.neurons(tokens.inputs(places[own])).mul_(scale[own])

    return Term(expert.down_proj.in_features, places, features, _down_adder(expert))


def _shared_term(shared: SwiGLU, tokens: FitTokens) -> Term:
    def features(own: Tensor | slice) -> Tensor:
        return shared.neurons(tokens.inputs(own)).mul_(tokens.root[own, None])

    return Term(shared.down_proj.in_features, None, features, _down_adder(shared))


def _down_adder(expert: SwiGLU) -> Callable[[Tensor], None]:
    def add(change: Tensor) -> None:
        expert.down_proj.weight.data += change.T  # in place: experts lie together in memory

    return add


def _adder(moe: SparseMoE, name: str) -> Callable[[Tensor], None]:
    def add(change: Tensor) -> None:
        old = moe._buffers[name]
        assert old is not None
        moe._buffers[name] = old + change.T.reshape(old.shape)

    return add
