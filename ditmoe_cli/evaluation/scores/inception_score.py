"""The Inception score (https://arxiv.org/abs/1606.03498): how certain a classifier is, and over how many classes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.scores.feature_statistics import Array


@dataclass(frozen=True)
class InceptionScore:
    """Mean over the parts, standard deviation (divisor: number of parts), and the score of each part."""

    mean: float
    deviation: float
    parts: tuple[float, ...]


def inception_score(
    logits: Array, *, parts: int | None = None, chunk: int | None = None, seed: int | None = None
) -> InceptionScore:
    """Return the mean over parts of the images of exp (1/n Σᵢ KL(pᵢ ‖ p̄)), in float64.

    `logits` are (N, K); pᵢ = softmax of row i, p̄ the mean of the pᵢ of a part, n its images, KL in nats. A score lies
    between 1 and K. The images are divided into `parts` equal ones (part j holds images ⌊jN/parts⌋ to ⌊(j+1)N/parts⌋,
    as in torch-fidelity), or into chunks of `chunk` in a row, of which the last may be shorter and weighs the same (as
    in ADM). With `seed` images are first permuted by ``numpy.random.RandomState(seed)``.

    Raises `UsageError` unless exactly one of `parts` and `chunk` is given and positive, `BadInputError` where logits
    are not finite and (N, K), or are fewer than the parts.
    """
    if (parts is None) == (chunk is None) or min(parts or 1, chunk or 1) < 1 or 0 in (parts, chunk):
        raise UsageError(f"an Inception score takes either parts or a chunk, got parts {parts} and chunk {chunk}")
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not logits.size or not np.isfinite(logits).all():
        raise BadInputError(f"logits must be finite and (images, classes), got {logits.shape}")
    count = len(logits)
    if parts is not None and parts > count:
        raise BadInputError(f"an Inception score over {parts} parts needs as many images, got {count}")
    if parts is not None:
        edges = [part * count // parts for part in range(parts + 1)]
    else:
        assert chunk is not None
        edges = [*range(0, count, chunk), count]
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(count)]
    scores = [_part_score(logits[start:stop]) for start, stop in pairwise(edges)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), tuple(scores))


def _part_score(logits: Array) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    # A class of probability 0 in every image (by underflow) must add 0, not 0 · log 0.
    log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
    return float(np.exp((p * (log_p - log_mean)).sum(axis=1).mean()))
