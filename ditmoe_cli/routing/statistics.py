"""What the counts of a profile say: load, agreement, overlap, co-activation, similarity of experts, transitions.

Pure functions of plain arrays. Counts are selections n_e of experts e = 0..E-1; a block with fewer experts than the
profile is wide has to be cut to its own first, or its missing experts count as dead. Without any counts there is
nothing to tell, and every statistic is 0. Statistics over the last axes return the leading axes, a number if none.
"""

from __future__ import annotations

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


# load: how evenly the tokens spread over a block's experts


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


# choices: how alike two distributions, neighbours or runs are


def jensen_shannon_distance(p: ArrayLike, q: ArrayLike) -> Array:
    """Return √(H₂(m) - (H₂(p) + H₂(q)) / 2), m = (p + q) / 2, in [0, 1]; a metric (Endres and Schindelin 2003).

    p and q are counts or probabilities (..., E), each scaled to sum to 1. 0 where either is empty, as then nothing
    is known to differ. Raises `BadInputError` where the numbers of experts differ.
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


def neighbour_agreement(choices: ArrayLike) -> float:
    """Return the share of neighbouring pairs of positions whose first expert is the same.

    `choices` (..., rows, columns) are expert ids; the pairs are those side by side and one above the other, of all
    maps together. 0 where there is no pair. Hold it against `chance_agreement`.
    """
    maps = np.asarray(choices)
    if maps.ndim < 2:
        raise BadInputError(f"choices must be maps (..., rows, columns), got {maps.shape}")
    beside = maps[..., :, 1:] == maps[..., :, :-1]
    below = maps[..., 1:, :] == maps[..., :-1, :]
    return float(mean_of(beside.sum() + below.sum(), beside.size + below.size))


def chance_agreement(counts: ArrayLike) -> Array:
    """Return Σ p_e², (...): how often two tokens agree that choose on their own, with the loads of counts (..., E)."""
    result: Array = (shares(counts) ** 2).sum(axis=-1)
    return result


def routing_overlap(a: ArrayLike, b: ArrayLike) -> float:
    """Return mean |A ∩ B| / k over tokens: the share of experts that two runs choose alike.

    a and b (T, k) are the expert ids of the same tokens at two steps, in two branches or checkpoints. They count as
    sets: the order of slots is of no matter, and neither are experts chosen twice (as where a merged expert stands
    in for two); k is the size of the larger set, so that equal choices always give 1. 0 without tokens. Raises
    `BadInputError` where the tokens differ in number.
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or 0 in (first.shape[1], second.shape[1]):
        raise BadInputError(f"choices of shape {first.shape} and {second.shape} are not (T, k) of the same tokens")
    distinct = _first_of_its_kind(first)
    size = np.maximum(distinct.sum(axis=1), _first_of_its_kind(second).sum(axis=1))
    found = (first[:, :, None] == second[:, None, :]).any(axis=2) & distinct
    return float(mean_of((found.sum(axis=1) / size).sum(), len(first)))


def _first_of_its_kind(choices: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return (T, k), False for slots that repeat an earlier slot of the same token."""
    ordered = np.tril(np.ones((choices.shape[1],) * 2, dtype=bool), -1)
    repeated: NDArray[np.bool_] = ((choices[:, :, None] == choices[:, None, :]) & ordered).any(axis=2)
    return ~repeated


def chance_overlap(experts: int, top_k: int) -> float:
    """Return k / E, the overlap of two choices of k out of E experts at random."""
    if not 0 < top_k <= experts:
        raise BadInputError(f"cannot choose {top_k} of {experts} experts")
    return top_k / experts


# relations: experts chosen together, one after the other, and experts alike


def coactivation_lift(coactivation: ArrayLike, tokens: ArrayLike) -> Array:
    """Return N_ij T / (N_i N_j), (..., E, E): 1 where experts i and j are chosen independently.

    `coactivation` (..., E, E) counts the tokens that chose both i and j, on the diagonal N_i those that chose i;
    `tokens` T (...) is the number of all. 0 for experts never chosen. A token never chooses an expert twice: with
    even loads, pairs drawn at random have a lift of E (k - 1) / (k (E - 1)), for k = 2 little above 1/2, not 1. The
    diagonal is T / N_i.
    """
    together = _square(coactivation, "co-activation counts")
    each = np.diagonal(together, axis1=-2, axis2=-1)
    total = np.asarray(tokens, dtype=np.float64)[..., None, None]
    return mean_of(together * total, each[..., :, None] * each[..., None, :])


def transition_probabilities(counts: ArrayLike) -> Array:
    """Return p(j | i) = n_ij / Σ_j n_ij of counts (..., E, E'), from expert i to j; rows without counts stay 0.

    From one block to the next or one step to the next; the blocks may differ in their number of experts.
    """
    known = _counts(counts)
    if known.ndim < 2:
        raise BadInputError(f"transition counts must be (..., E, E'), got {known.shape}")
    return shares(known)


def output_cosine(gram: ArrayLike) -> Array:
    """Return G_ij / √(G_ii G_jj) of Gram matrices G = Σ ⟨f_i, f_j⟩ (..., E, E); 0 for experts without output."""
    products = _square(gram, "Gram matrices")
    norm = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0.0))
    # one norm after the other: their product may over- or underflow
    cosine = mean_of(mean_of(products, norm[..., :, None]), norm[..., None, :])
    return np.clip(cosine, -1.0, 1.0)


def _centred_gram(gram: Array) -> Array:
    """Return HKH, H = I - 11ᵀ/T."""
    result: Array = gram - gram.mean(axis=0) - gram.mean(axis=1, keepdims=True) + gram.mean()
    return result


def cka_from_grams(a: ArrayLike, b: ArrayLike) -> float:
    """Return ⟨HKH, HLH⟩ / (‖HKH‖ ‖HLH‖) of Gram matrices K, L (T, T) over the same tokens, in [0, 1].

    0 where outputs do not vary over the tokens. Source: Kornblith et al. 2019 (https://arxiv.org/abs/1905.00414).
    """
    first, second = _square(a, "Gram matrices"), _square(b, "Gram matrices")
    if first.shape != second.shape or first.ndim != 2:
        raise BadInputError(f"Gram matrices {first.shape} and {second.shape} are not (T, T) of the same tokens")
    k, other = _centred_gram(first), _centred_gram(second)
    if _vanished(k, first) or _vanished(other, second):
        return 0.0
    return _cut_ratio(float((k * other).sum()), float(np.linalg.norm(k)), float(np.linalg.norm(other)))


def _vanished(centred: Array, raw: Array) -> bool:
    """Return whether nothing but rounding is left after centring."""
    return float(np.linalg.norm(centred)) <= 1e-12 * float(np.linalg.norm(raw))


def linear_cka(a: ArrayLike, b: ArrayLike) -> float:
    """Return ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms, of outputs X (T, D) and Y (T, D') with their means taken off.

    In [0, 1], unchanged by rotation and scaling of either; 0 where one does not vary. With fewer tokens than
    dimensions it is close to 1 whatever the experts do, so give it many. Source: as `cka_from_grams`.
    """
    x, y = (np.asarray(outputs, dtype=np.float64) for outputs in (a, b))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise BadInputError(f"outputs of shape {x.shape} and {y.shape} are not (T, D) of the same tokens")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise BadInputError("outputs must be finite")
    raw_x, raw_y = x, y
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    if _vanished(x, raw_x) or _vanished(y, raw_y):
        return 0.0
    if len(x) < min(x.shape[1], y.shape[1]):
        return cka_from_grams(x @ x.T, y @ y.T)
    cross = float(np.linalg.norm(y.T @ x))
    return _cut_ratio(cross * cross, float(np.linalg.norm(x.T @ x)), float(np.linalg.norm(y.T @ y)))


def _cut_ratio(product: float, a: float, b: float) -> float:
    """Return product / (a b), rounding beyond [0, 1] cut off."""
    return min(max(product / a / b, 0.0), 1.0)


def matched_weight_cosine(a: ExpertWeights, b: ExpertWeights) -> float:
    """Return the cosine of two experts' weights after their neurons have been matched.

    Each expert is gate (H, D), up (H, D) and down (D, H). Neuron h is the row h of gate and up with the column h of
    down; the matching π maximises Σ_h ⟨a_h, b_π(h)⟩ (Hungarian method), which is the cosine's numerator, over ‖a‖ ‖b‖.
    1 for experts that differ in the order of neurons alone; unmatched neurons of the wider one count as zero. A
    joint change of sign of up and down, which leaves the expert's output, is not undone. Unrelated experts reach more
    than 0, as the best of all matchings is taken; 0 where all weights are. Time grows with H³, to some 9 s a pair at
    H = 4608. Source: weight matching of Ainsworth et al. 2022 (https://arxiv.org/abs/2209.04836).

    Raises `BadInputError` where shapes do not fit, or for NaN and infinity.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    first, second = _neurons(a), _neurons(b)
    if first.shape[1] != second.shape[1]:
        raise BadInputError(f"experts of width {first.shape[1] // 3} and {second.shape[1] // 3} cannot be matched")
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    if not all(norms):
        return 0.0
    similarity = first / norms[0] @ (second / norms[1]).T
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return min(max(float(similarity[rows, columns].sum()), -1.0), 1.0)


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
