"""Measures of routing: load, agreement of choices, co-activation, and similarity of experts.

Pure functions of plain arrays. Counts are selections n_e of experts e = 0..E-1. A block with fewer experts than the
profile is wide is first cut to its own, or its missing experts would count as dead. Without any counts every measure is
0. Measures over the last axes return the leading axes, a number if there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ditmoe_cli.errors import BadInputError

Array = NDArray[np.float64]
ExpertWeights = tuple[ArrayLike, ArrayLike, ArrayLike]

STARVED = 0.1


def _counts(values: ArrayLike, what: str = "counts") -> Array:
    """Return (..., E) as float64. Raises `BadInputError` where they cannot be counts."""
    counts = np.asarray(values, dtype=np.float64)
    if not counts.ndim or not counts.shape[-1]:
        raise BadInputError(f"{what} must be (..., experts), got {counts.shape}")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise BadInputError(f"{what} must be finite and not negative")
    return counts


def _square(values: ArrayLike, what: str) -> Array:
    """Return (..., E, E) as float64. Raises `BadInputError` for other shapes, NaN and infinity."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise BadInputError(f"{what} must be (..., E, E), got {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise BadInputError(f"{what} must be finite")
    return matrix


def mean_of(total: ArrayLike, n: ArrayLike) -> Array:
    """Return total / n, 0 where n = 0: the mean of what was summed over n tokens. Shapes broadcast."""
    count = np.asarray(n, dtype=np.float64)
    result: Array = np.where(count != 0, np.asarray(total, dtype=np.float64) / np.where(count != 0, count, 1.0), 0.0)
    return result


# load of a block's experts


def shares(counts: ArrayLike) -> Array:
    """Return p_e = n_e / Σ n, (..., E)."""
    known = _counts(counts)
    return mean_of(known, known.sum(axis=-1, keepdims=True))


def load_ratio(counts: ArrayLike) -> Array:
    """Return E p_e, (..., E): 1 for every expert where the load is even."""
    p = shares(counts)
    result: Array = p * p.shape[-1]
    return result


def _entropy(p: Array) -> Array:
    """Return -Σ p ln p in nats."""
    result: Array = np.maximum(-(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1), 0.0)
    return result


def normalised_entropy(counts: ArrayLike) -> Array:
    """Return H(p) / ln E in [0, 1]: 1 where the load is even, a single expert's included."""
    p = shares(counts)
    if p.shape[-1] == 1:
        return np.asarray(p[..., 0])
    result: Array = np.minimum(_entropy(p) / np.log(p.shape[-1]), 1.0)
    return result


def effective_experts(counts: ArrayLike) -> Array:
    """Return e^H(p) in 1..E, the number of equally loaded experts of the same entropy."""
    p = shares(counts)
    result: Array = np.where(p.any(axis=-1), np.exp(_entropy(p)), 0.0)
    return result


def gini(counts: ArrayLike) -> Array:
    """Return Σ_ij |p_i - p_j| / (2 E): 0 where the load is even, 1 - 1/E where one expert takes all."""
    p = np.sort(shares(counts), axis=-1)
    experts = p.shape[-1]
    rank = np.arange(1, experts + 1)
    # sorted, Σ_ij |p_i - p_j| is 2 Σ_i (2 i - E - 1) p_i
    result: Array = np.maximum(((2 * rank - experts - 1) * p).sum(axis=-1) / experts, 0.0)
    return result


def coefficient_of_variation(counts: ArrayLike) -> Array:
    """Return std(n) / mean(n), the standard deviation over all E experts (Shazeer et al. 2017 penalise its square)."""
    result: Array = load_ratio(counts).std(axis=-1)
    return result


def max_violation(counts: ArrayLike) -> Array:
    """Return max n / mean n - 1, MaxVio of Wang et al. 2024 (https://arxiv.org/abs/2408.15664)."""
    result: Array = np.maximum(load_ratio(counts).max(axis=-1) - 1.0, 0.0)
    return result


def dead(counts: ArrayLike) -> list[int]:
    """Return the experts that no token chose, of counts (E,): all of them where nothing was counted."""
    return [int(e) for e in np.flatnonzero(_one_block(counts) == 0)]


def starved(counts: ArrayLike, threshold: float = STARVED) -> list[int]:
    """Return the experts whose load ratio E p_e lies below `threshold`, of counts (E,); the dead are among them."""
    return [int(e) for e in np.flatnonzero(load_ratio(_one_block(counts)) < threshold)]


def _one_block(counts: ArrayLike) -> Array:
    """Return counts (E,). Raises `BadInputError` where there are more axes."""
    known = _counts(counts)
    if known.ndim != 1:
        raise BadInputError(f"counts must be those of one block, (experts,), got {known.shape}")
    return known


# agreement of choices


def jensen_shannon_distance(p: ArrayLike, q: ArrayLike) -> Array:
    """Return √(H₂(m) - (H₂(p) + H₂(q)) / 2), m = (p + q) / 2, in [0, 1]; a metric (Endres and Schindelin 2003).

    p and q are counts or probabilities (..., E), each scaled to sum to 1. 0 where either is empty. Raises
    `BadInputError` where the numbers of experts differ.
    """
    first, second = _counts(p, "p"), _counts(q, "q")
    if first.shape[-1] != second.shape[-1]:
        raise BadInputError(f"distributions over {first.shape[-1]} and {second.shape[-1]} experts cannot be compared")
    a, b = np.broadcast_arrays(shares(first), shares(second))
    middle = (a + b) / 2
    divergence = np.zeros(a.shape[:-1])
    for part in (a, b):
        # p ln(p / m), not a difference of entropies: exact for nearly equal distributions too
        ratio = np.where(part > 0, part / np.where(middle > 0, middle, 1.0), 1.0)
        divergence = divergence + (part * np.log2(ratio)).sum(axis=-1) / 2
    known = a.any(axis=-1) & b.any(axis=-1)
    return np.where(known, np.sqrt(np.clip(divergence, 0.0, 1.0)), 0.0)


@dataclass(frozen=True)
class Agreement:
    """How often two choices of top-k experts agree, (...), and how often they would by chance."""

    kept: Array
    chance: Array


def agreement(pairs: ArrayLike, k: ArrayLike) -> Agreement:
    """Return mean |A ∩ B| / k of pairs of choices A and B: at two steps, in two branches, of neighbouring patches.

    `pairs` (..., E, E) count (a, b) for a in A and b in B: k² for each A and B, of them one on the diagonal for each
    expert that A and B share, or more where slots share a merged expert. `k` (...) is the number of experts chosen. By
    chance, with marginals p and q of the pairs, the mean is k Σ_e p_e q_e. 0 without pairs.
    """
    counts, per_token = _square(pairs, "pairs of experts"), np.asarray(k, dtype=np.float64)
    total = counts.sum(axis=(-2, -1))
    kept = np.minimum(mean_of(per_token * np.trace(counts, axis1=-2, axis2=-1), total), 1.0)
    products = (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1)
    return Agreement(kept, np.minimum(mean_of(per_token * products, total**2), 1.0))


# relations between experts: chosen together, and alike


def coactivation_lift(coactivation: ArrayLike, tokens: ArrayLike) -> Array:
    """Return N_ij T / (N_i N_j), (..., E, E): 1 where experts i and j are chosen independently.

    `coactivation` (..., E, E) counts the tokens that chose both i and j, on the diagonal N_i those that chose i;
    `tokens` T (...) is the number of all. 0 for experts never chosen. A token never chooses an expert twice, so pairs
    drawn at random under even loads have the lift of `random_pair_lift`, not 1. The diagonal is T / N_i.
    """
    together = _square(coactivation, "co-activation counts")
    each = np.diagonal(together, axis1=-2, axis2=-1)
    total = np.asarray(tokens, dtype=np.float64)[..., None, None]
    return mean_of(together * total, each[..., :, None] * each[..., None, :])


def random_pair_lift(experts: int, k: float) -> float:
    """Return E (k - 1) / (k (E - 1)), the lift of two of k distinct experts drawn at random; 0 without pairs.

    For k = 2 it lies little above 1/2.
    """
    return experts * max(k - 1, 0.0) / (k * (experts - 1)) if experts > 1 and k > 0 else 0.0


def output_cosine(gram: ArrayLike) -> Array:
    """Return G_ij / √(G_ii G_jj) of Gram matrices G = Σ ⟨f_i, f_j⟩ (..., E, E); 0 for experts without output."""
    products = _square(gram, "Gram matrices")
    norm = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0.0))
    # one norm after the other: their product may over- or underflow
    cosine = mean_of(mean_of(products, norm[..., :, None]), norm[..., None, :])
    return np.clip(cosine, -1.0, 1.0)


def unbiased_hsic(grams: ArrayLike) -> Array:
    """Return HSIC_1 of all pairs of Gram matrices K (E, n, n) over the same n tokens, (E, E).

    HSIC_1(K, L) = (tr K̃L̃ + 1ᵀK̃1 1ᵀL̃1 / ((n - 1)(n - 2)) - 2 1ᵀK̃L̃1 / (n - 2)) / (n (n - 3)), K̃ being K with
    a diagonal of zeros. It is unbiased: the mean over batches of tokens tends to the value of all tokens, and outputs
    of many dimensions do not look alike. 0 for n < 4. Source: Song et al. 2012 (JMLR 13).
    """
    k = _square(grams, "Gram matrices").copy()
    if k.ndim != 3:
        raise BadInputError(f"Gram matrices {k.shape} are not (E, n, n)")
    n = k.shape[-1]
    if n < 4:
        return np.zeros((len(k), len(k)))
    k[:, np.arange(n), np.arange(n)] = 0.0
    flat, rows, totals = k.reshape(len(k), -1), k.sum(axis=-1), k.sum(axis=(-2, -1))
    hsic = flat @ flat.T + np.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 * rows @ rows.T / (n - 2)
    return np.asarray(hsic / (n * (n - 3)))


def alignment(hsic: ArrayLike) -> Array:
    """Return H_ij / √(H_ii H_jj) of HSIC (E, E): linear CKA, 1 for outputs equal but for rotation and scale.

    0 for experts whose outputs do not vary. Source: Kornblith et al. 2019 (https://arxiv.org/abs/1905.00414), over
    batches as Nguyen et al. 2021 (https://arxiv.org/abs/2010.15327).
    """
    return output_cosine(hsic)


def matched_weight_cosine(a: ExpertWeights, b: ExpertWeights) -> float:
    """Return max_π Σ_h ⟨a_h, b_π(h)⟩ / (‖a‖ ‖b‖), the cosine of two experts' weights after matching their neurons.

    Each expert is gate (H, D), up (H, D) and down (D, H); neuron h is row h of gate and up with column h of down. 1 for
    experts that differ in the order of neurons alone; unmatched neurons of the wider one count as zero. Unrelated
    experts reach more than 0, as the best of all matchings is taken; 0 where all weights are 0. A joint change of sign
    of up and down, which leaves the expert's output, is not undone. The Hungarian method takes time that grows with H³,
    to some 9 s a pair at H = 4608. Source: weight matching of Ainsworth et al. 2022 (https://arxiv.org/abs/2209.04836).

    Raises `BadInputError` where shapes do not fit, or for NaN and infinity.
    """
    first, second = _neurons(a), _neurons(b)
    if first.shape[1] != second.shape[1]:
        raise BadInputError(f"experts of width {first.shape[1] // 3} and {second.shape[1] // 3} cannot be matched")
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if not all(norms):
        return 0.0
    similarity = first / norms[0] @ (second / norms[1]).T
    rows, columns = best_matching(similarity)
    return min(max(float(similarity[rows, columns].sum()), -1.0), 1.0)


def best_matching(similarity: NDArray[np.floating[Any]]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and columns of the pairs that maximise Σ similarity, each row and column in one pair at most.

    Solved exactly by the Hungarian method; of (n, m) min(n, m) pairs are matched, rows ascending.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return rows, columns


def _neurons(weights: ExpertWeights) -> Array:
    """Return one row per neuron, (H, 3 D): gate, up and down side by side."""
    gate, up, down = (np.asarray(weight, dtype=np.float64) for weight in weights)
    if gate.ndim != 2 or up.shape != gate.shape or down.shape != gate.shape[::-1]:
        raise BadInputError(
            "an expert's weights are gate (H, D), up (H, D) and down (D, H), "
            f"not {gate.shape}, {up.shape} and {down.shape}"
        )
    rows = np.concatenate((gate, up, down.T), axis=1)
    if not np.isfinite(rows).all():
        raise BadInputError("an expert's weights must be finite")
    return rows
