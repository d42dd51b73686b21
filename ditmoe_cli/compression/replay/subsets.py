"""The exact error of keeping a subset of a block's experts, replayed on tokens that are routed again.

Errors are those of `compression.replay.tokens`, relative to the energy of the original routed output.

Symbols: T tokens in n pairs of B = 2 branches (without guidance n = T and B = 1), D width, E experts, R router rows
that select an expert or a constant, k = top-k, C candidates: sets of physical experts that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.replay.tokens import BlockTokens, ratio
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.config import GHOST
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.progress import each, phase

_OUTPUTS = 2**23  # elements of the outputs in memory at a time
_GATES = 2**20  # elements of the gates compared at a time: few enough for a processor's cache
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Ranking:
    """The selectable router rows of each token, best first.

    Attributes:
        order: (n, B, R) row at each rank.
        probabilities: (n, B, R) probability at each rank, of a softmax over all rows.
        gates: (n, B, k) routing weights of the k best rows in the block as it is.
        whole: (n, B) sum of the k largest probabilities of all rows, selectable or not.
        targets: (R,) target of each row: an expert e >= 0, or a constant below 0.
        mass: whether the block scales its gates to `whole` already, which it then always does.
    """

    order: Tensor
    probabilities: Tensor
    gates: Tensor
    whole: Tensor
    targets: Tensor
    mass: bool

    def experts(self, ranks: int) -> Tensor:
        """Return the targets of the rows at the best ranks, (T, ranks)."""
        return self.targets[self.order[..., :ranks]].transpose(0, 1).flatten(0, 1)

    def changes(self, keep: Tensor, mode: RouterMode) -> Tensor:
        """Return the change of gates at each rank if only the experts `keep` (C, E) are kept, (n, B, ranks, C).

        The k best of the kept rows are selected: with their probabilities p as gates (``ghost``), with p over the sum
        of p of the kept rows (``slice``), or with p scaled per token so that their sum is that of the k largest p of
        all rows (``mass``). Ranks that no candidate can select are left out. Raises `InfeasibleError` where fewer than
        k rows are kept.
        """
        kept = keep[:, self.targets.clamp_min(0)] | (self.targets < 0)  # constants are always kept
        k = self.gates.shape[-1]
        fewest = int(kept.sum(dim=1).min())
        if fewest < k:
            raise InfeasibleError(f"{fewest} router rows would stay, fewer than top-{k} routing needs")
        ranks = k + len(self.targets) - fewest
        order, probabilities = self.order[..., :ranks], self.probabilities[..., :ranks].unsqueeze(-1)
        kept_ranks = kept.T.to(torch.uint8)[order]
        gates = (kept_ranks * (kept_ranks.cumsum(dim=2, dtype=torch.int16) <= k)) * probabilities
        if mode == "slice":
            remaining = torch.zeros_like(self.probabilities).scatter_(-1, self.order, self.probabilities)
            gates /= (remaining @ kept.T.float()).clamp_min(_TINY).unsqueeze(2)
        elif mode == "mass" or self.mass:
            gates *= (self.whole.unsqueeze(-1) / gates.sum(dim=2).clamp_min(_TINY)).unsqueeze(2)
        gates[:, :, :k] -= self.gates.unsqueeze(-1)
        return gates


def rank(tokens: BlockTokens, moe: SparseMoE) -> Ranking:
    """Return the ranking of the rows that each token may select."""
    routing = moe.gate(_inputs(moe, tokens))
    everything = torch.arange(routing.probabilities.shape[-1], device=routing.probabilities.device)
    expert_of = everything if moe.gate.expert_of is None else moe.gate.expert_of.long()
    selectable = expert_of != GHOST
    probabilities, order = routing.probabilities[:, selectable].sort(dim=-1, descending=True, stable=True)
    return Ranking(
        order=tokens.paired(order),
        probabilities=tokens.paired(probabilities),
        gates=tokens.paired(routing.weights.float()),
        whole=tokens.paired(routing.probabilities.topk(moe.gate.top_k, dim=-1).values.sum(dim=-1)),
        targets=expert_of[selectable],
        mass=moe.gate.mass,
    )


def contributions(tokens: BlockTokens, moe: SparseMoE, ranking: Ranking, ranks: int) -> Tensor:
    """Return the contribution of each rank to the guided output per unit of its gate, (n, B ranks, D).

    That is c γ ⊙ (f - r): c the branch's coefficient, f the output of the row's target, and r the output of a refitted
    block per unit of unselected routing mass, 0 in other blocks.
    """
    u = _inputs(moe, tokens)
    outputs = moe.expert_outputs(u, ranking.experts(ranks))
    left_over = moe.left_over(u, u.new_zeros(len(u), 1))
    if left_over is not None:
        outputs = outputs - left_over.unsqueeze(1)
    return tokens.paired(tokens.weighed(outputs.float())).flatten(1, 2)


def ranked_chunks(tokens: BlockTokens, moe: SparseMoE) -> Iterator[tuple[BlockTokens, Ranking]]:
    """Yield tokens and their ranking, some pairs at a time."""
    size = _pairs_at_a_time(tokens, moe)
    with phase("computing all outputs", -(-tokens.pairs // size), "batches of tokens", share=0.8) as progress:
        for part in tokens.chunks(size, moe.gate.weight.device):
            yield part, rank(part, moe)
            progress(1)


def kept_experts(subsets: Sequence[Sequence[int]], experts: int, device: torch.device) -> Tensor:
    """Return whether each subset keeps each expert, (C, E)."""
    keep = torch.zeros(len(subsets), experts, dtype=torch.bool)
    for row, subset in zip(keep, subsets, strict=True):
        row[list(subset)] = True
    return keep.to(device)


class SubsetReplay:
    """The exact error of keeping any subset of a block's experts, tokens routed again: Σ Δgᵀ K Δg over all pairs.

    K (B R, B R) is the Gram matrix of the rows' contributions to a pair's guided output, in the order of the pair's
    ranks; it is computed once. Δg is the change of the gates. Memory is n (B R)² numbers. Errors are relative to
    `reference`, the energy of the original routed output.
    """

    @torch.no_grad()
    def __init__(self, tokens: BlockTokens, moe: SparseMoE) -> None:
        self._experts, self._device = len(moe.experts), moe.gate.weight.device
        self._parts: list[tuple[Ranking, Tensor]] = []
        self.reference = 0.0
        for part, ranking in ranked_chunks(tokens, moe):
            rows = contributions(part, moe, ranking, len(ranking.targets))
            gram = (rows @ rows.mT).reshape(part.pairs, *(part.branches, len(ranking.targets)) * 2)
            self._parts.append((ranking, gram))
            self.reference += part.energy(_routed_output(moe, part))

    def errors(self, subsets: Sequence[Sequence[int]], mode: RouterMode) -> Tensor:
        """Return each subset's error relative to the original routed output, (C,) in float64.

        `subsets` list the physical experts that are kept. Raises `InfeasibleError` where fewer than top-k rows are.
        """
        keep = kept_experts(subsets, self._experts, self._device)
        title = f"replaying {len(subsets):,} subsets"
        errors = (
            _part_errors(ranking, gram, keep, mode) for ranking, gram in each(self._parts, title, "batches of tokens")
        )
        total = sum(errors, torch.zeros(len(keep)).double())
        return torch.tensor([ratio(error, self.reference) for error in total.tolist()], dtype=torch.float64)


def _part_errors(ranking: Ranking, gram: Tensor, keep: Tensor, mode: RouterMode) -> Tensor:
    """Return Σ Δgᵀ K Δg of each candidate `keep` (C, E) over a part's pairs, (C,), some candidates at a time."""
    size = max(_GATES // ranking.order.numel(), 1)
    return torch.cat([_energies(gram, ranking.changes(some, mode)) for some in torch.split(keep, size)]).cpu()


def _energies(gram: Tensor, gates: Tensor) -> Tensor:
    """Return Σ gᵀ K g over pairs, (C,), of gates (n, B, ranks, C) at the best ranks of K (n, B, R, B, R)."""
    ranks = gates.shape[2]
    matrix = gram[:, :, :ranks, :, :ranks].flatten(3, 4).flatten(1, 2)
    columns = gates.flatten(1, 2)
    return ((matrix @ columns) * columns).sum(dim=(0, 1), dtype=torch.float64).clamp_min(0)


def _inputs(moe: SparseMoE, tokens: BlockTokens) -> Tensor:
    return tokens.inputs.to(moe.gate.weight.dtype)


def _routed_output(moe: SparseMoE, tokens: BlockTokens) -> Tensor:
    """Return the routed output (T, D) in fp32: the mixture's less the shared expert's."""
    inputs = _inputs(moe, tokens)
    both: Tensor = moe(inputs.unsqueeze(0), 0, tokens.gamma, None)
    shared: Tensor = moe.shared_experts(inputs)
    return both.squeeze(0).float() - shared.float()


def _pairs_at_a_time(tokens: BlockTokens, moe: SparseMoE) -> int:
    """Return as many pairs as keep the outputs of all router rows (R, D) within `_OUTPUTS`."""
    return max(_OUTPUTS // (tokens.branches * moe.gate.weight.numel()), 1)
