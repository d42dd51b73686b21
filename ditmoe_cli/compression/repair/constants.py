"""Constant experts as in MoE++ (Jin et al. 2024, https://arxiv.org/abs/2410.07348), fitted instead of trained.

A dropped expert's router row stays (as a ghost that can be selected), and its output becomes a constant. That leaves
the other routing weights untouched and restores the mean of what was lost.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_t w_t v_t / Σ_t w_t (D,) of values (T, D) and weights (T,); 0 where all weights are."""
    weights = weights.to(values)
    total = weights.sum()
    return weights @ values / torch.where(total > 0, total, 1.0)


def bin_means(values: Tensor, weights: Tensor, bins: Tensor, count: int) -> Tensor:
    """Return the weighted mean of each step bin (count, D); `bins` (T,) tells each token's.

    A bin without weight gets the mean over all bins.
    """
    weights = weights.to(values)
    totals = values.new_zeros(count).index_add(0, bins, weights).unsqueeze(-1)
    sums = values.new_zeros(count, values.shape[1]).index_add(0, bins, weights.unsqueeze(-1) * values)
    return torch.where(totals > 0, sums / torch.where(totals > 0, totals, 1.0), weighted_mean(values, weights))


def replacement_constants(outputs: Tensor, weights: Tensor, bins: Tensor, count: int, held_out: Tensor) -> Tensor:
    """Return the constants v_b (count, D) that stand in for an expert's outputs f, one for each step bin b.

    v = Σ_t w g² f / Σ_t w g² minimises the gated error Σ_t w ‖g (f - v)‖². Bins have constants of their own if, fitted
    to the other tokens, these predict the held-out ones better than a single constant does; else all rows are the
    same. The chosen kind is fitted to all tokens in the end.

    Args:
        outputs: f (T, D) of the tokens that were routed to the expert; T may be 0, and then v is 0.
        weights: w g² (T,), with the routing weight g and any weight w of the token.
        bins: step bin (T,) of each token, int64.
        count: number of bins.
        held_out: (T,) bool; tokens of one image belong on the same side.
    """
    outputs, weights = outputs.double(), weights.double()
    if _bins_pay(outputs, weights, bins, count, held_out):
        return bin_means(outputs, weights, bins, count).float()
    return weighted_mean(outputs, weights).expand(count, -1).float()


def _bins_pay(outputs: Tensor, weights: Tensor, bins: Tensor, count: int, held_out: Tensor) -> bool:
    fitted = ~held_out
    single = weighted_mean(outputs[fitted], weights[fitted])
    per_bin = bin_means(outputs[fitted], weights[fitted], bins[fitted], count)[bins[held_out]]

    def error(predicted: Tensor) -> float:
        return float(weights[held_out] @ (outputs[held_out] - predicted).square().sum(dim=1))

    return error(per_bin) < error(single)
