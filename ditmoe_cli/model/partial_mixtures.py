"""Mixtures in part: slots left out by a rule, a regressed second expert, and outputs of an earlier evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.model.block_choices import SlotRule
from ditmoe_cli.model.mixture_backends import Dispatch
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.router import Routing

PROTECTED = 0.02
"""The share of an image's tokens that `odp` leaves as they are."""


@dataclass(frozen=True)
class SlotStatistics:
    """What rules for slots know of a block from calibration; each is None where no rule needs it.

    Attributes:
        energy: (R,) E‖γ ⊙ f‖² of what each of R router rows selects, over the tokens that it was selected for.
        scale, constant: (R, D) s and c of the regression s ⊙ f_1 + c.
    """

    energy: Tensor | None = None
    scale: Tensor | None = None
    constant: Tensor | None = None


@dataclass(frozen=True)
class SlotOutputs:
    """What later evaluations take of a mixture: rows (T, k), f of each slot (T, k, D), and the shared expert's."""

    rows: Tensor
    outputs: Tensor
    shared: Tensor


@dataclass(frozen=True)
class Mixed:
    """The output of a mixture (T, D), the slots that each expert computed (E,), router rows (T, k), and what is kept.

    Rows are those that the router selected, left-out slots included.
    """

    output: Tensor
    computed: Tensor
    rows: Tensor
    kept: SlotOutputs | None = None


def left_out(rule: SlotRule, routing: Routing, statistics: SlotStatistics, protected: Tensor | None = None) -> Tensor:
    """Return which slots (T, k) a rule leaves out; `protected` (T,) marks tokens that `odp` leaves as they are.

    Raises `ValueError` where the rule needs statistics that are not there.
    """
    p = routing.weights.float()
    behind = torch.ones_like(p, dtype=torch.bool)
    behind[:, 0] = False
    if rule.rule in ("top1", "regressed"):
        return behind
    if rule.rule == "top-p":
        return behind & (p.cumsum(dim=1) - p > rule.threshold) if rule.threshold < 1 else torch.zeros_like(behind)
    if rule.rule == "odp":
        weak = behind & (p < rule.threshold * p[:, :1])
        return weak if protected is None else weak & ~protected[:, None]
    if statistics.energy is None:
        raise ValueError("leaving slots out by saliency takes the energies of experts' outputs")
    return behind & (p.square() * statistics.energy[routing.rows] < rule.threshold)


def protected_tokens(attended_to: Tensor) -> Tensor:
    """Return which tokens (N, tokens) are the 2 % of their image, one at the least, that are attended to most."""
    count = max(1, round(PROTECTED * attended_to.shape[1]))
    best = attended_to.topk(count, dim=1).indices
    return torch.zeros_like(attended_to, dtype=torch.bool).scatter_(1, best, True)


def mixed_in_part(
    moe: SparseMoE,
    u: Tensor,
    rule: SlotRule | None = None,
    statistics: SlotStatistics | None = None,
    protected: Tensor | None = None,
    shared: bool = True,
    keep: bool = False,
) -> Mixed:
    """Return the mixture of tokens u (T, D) without the slots that a rule leaves out, and without the shared expert.

    With nothing left out it is `SparseMoE.forward` to the bit. The routing mass of a slot that is left out goes to the
    residual constant and map of the block, where it has them; `regressed` keeps its mass.
    """
    routing: Routing = moe.gate(u)
    statistics = statistics or SlotStatistics()
    dropped = None if rule is None else left_out(rule, routing, statistics, protected)
    weights = routing.weights if dropped is None else routing.weights.masked_fill(dropped, 0.0)
    selected = routing.experts if dropped is None else routing.experts.masked_fill(dropped, len(moe.experts))
    dispatch = Dispatch.of(routing.experts, len(moe.experts), dropped)
    inputs = u.to(moe.dtype or u.dtype)
    ordered = moe.ordered_outputs(inputs, selected, dispatch)
    if rule is not None and rule.rule == "regressed":
        output = _regressed(dispatch.by_slot(ordered)[:, 0], routing, statistics).to(weights.dtype)
        weights = routing.weights
    else:
        output = dispatch.weighted_sum(ordered, weights)
    output = _with_left_over(moe, u, weights, output)
    added: Tensor | None = moe.shared_experts(inputs) if shared else None
    kept = None
    if keep and added is not None and dropped is None:
        kept = SlotOutputs(routing.rows, dispatch.by_slot(ordered), added)
    return Mixed(output if added is None else output + added, _counts(dispatch, selected), routing.rows, kept)


def _with_left_over(moe: SparseMoE, u: Tensor, weights: Tensor, output: Tensor) -> Tensor:
    rest = moe.left_over(u, weights)
    return output if rest is None else output + rest


def _counts(dispatch: Dispatch, selected: Tensor) -> Tensor:
    """Return how many slots each expert computes (E,); constants are none."""
    constants = (selected < 0).sum().reshape(1).to(dispatch.ends.dtype)
    return torch.diff(dispatch.ends, prepend=constants)


def _regressed(first: Tensor, routing: Routing, statistics: SlotStatistics) -> Tensor:
    """Return p_1 f_1 + Σ_{j>1} p_j (s_j ⊙ f_1 + c_j) for f_1 (T, D)."""
    if statistics.scale is None or statistics.constant is None:
        raise ValueError("a regressed second expert takes the regression's coefficients")
    p, rows = routing.weights.float(), routing.rows
    factor = p[:, :1].expand_as(first.float())
    constant = torch.zeros_like(factor)
    for slot in range(1, p.shape[1]):
        factor = torch.addcmul(factor, p[:, slot : slot + 1], statistics.scale[rows[:, slot]])
        constant = torch.addcmul(constant, p[:, slot : slot + 1], statistics.constant[rows[:, slot]])
    return torch.addcmul(constant, factor, first.float())


def _weighted(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_k w_k f_k (T, D) of outputs f (T, k, D) in the dtype of weights w (T, k)."""
    if weights.is_cpu and weights.dtype == torch.float32:
        places = torch.arange(weights.numel()).view_as(weights)
        return F.embedding_bag(places, outputs.float().flatten(0, 1), per_sample_weights=weights, mode="sum")
    total = weights[:, :1] * outputs[:, 0]
    for slot in range(1, weights.shape[1]):
        total = torch.addcmul(total, weights[:, slot : slot + 1], outputs[:, slot])
    return total


def mixed_from_before(moe: SparseMoE, u: Tensor, before: SlotOutputs) -> Mixed:
    """Return the mixture of tokens u (T, D) under today's routing, with outputs from before where a row was selected.

    Only slots whose router row the token did not select before are computed (https://arxiv.org/abs/2606.15615); the
    shared expert's output is that from before.
    """
    routing: Routing = moe.gate(u)
    same = routing.rows[:, :, None] == before.rows[:, None, :]
    found = same.any(dim=2)
    places = same.to(torch.uint8).argmax(dim=2)
    outputs = before.outputs.gather(1, places[:, :, None].expand(-1, -1, before.outputs.shape[2]))
    tokens, slots = (~found).nonzero(as_tuple=True)
    chosen = routing.experts[tokens, slots][:, None]
    if len(tokens):
        outputs[tokens, slots] = moe.expert_outputs(u[tokens], chosen)[:, 0].to(outputs.dtype)
    output = _with_left_over(moe, u, routing.weights, _weighted(outputs, routing.weights))
    counts = torch.bincount(chosen[chosen >= 0], minlength=len(moe.experts))
    kept = replace(before, rows=routing.rows, outputs=outputs)
    return Mixed(output + before.shared, counts, routing.rows, kept)
