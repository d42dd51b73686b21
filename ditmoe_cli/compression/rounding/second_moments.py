"""Second moments of layers' inputs: the Hessians, up to a factor 2, of their squared output errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ditmoe_cli.errors import BadInputError

CHUNK = 2048  # tokens whose inputs are computed and multiplied at a time
_STRIP = 512  # rows of a product that are computed at a time, from the diagonal on


def second_moment(batches: Iterable[tuple[Tensor, Tensor]], width: int, device: torch.device) -> Tensor:
    """Return Σ w x xᵀ (in, in) in fp32 over batches of inputs x (n, in), in = `width`, and weights w (n,).

    For the error of an expert's contribution, w is its squared routing weight. Products are summed in fp32, above the
    diagonal only, which takes little more than half of 2 n in² operations. Raises `BadInputError` for values that are
    NaN or infinite, weights below 0, and sums beyond fp32's range.
    """
    total = torch.zeros(width, width, device=device)
    strips = [slice(start, min(start + _STRIP, width)) for start in range(0, width, _STRIP)]
    seen = 0
    for inputs, weights in batches:
        x = rooted(inputs, weights, seen)
        for strip in strips:
            total[strip, strip.start :].addmm_(x[:, strip].T, x[:, strip.start :])
        seen += len(x)
    for strip in strips:
        total[strip.stop :, strip] = total[strip, strip.stop :].T
    refuse(~total.diagonal().isfinite(), "second moment: the sum over tokens exceeds fp32 in row {}")
    return total


def rooted(inputs: Tensor, weights: Tensor, first: int = 0) -> Tensor:
    """Return √w x (n, in) in fp32 of inputs x (n, in) and weights w (n,), whose second moment is Σ w x xᵀ.

    Raises `BadInputError` for values that are NaN or infinite, and weights below 0; messages count from token `first`.
    """
    if weights.shape != inputs.shape[:1] or inputs.ndim != 2:
        raise BadInputError(
            f"second moment: inputs {tuple(inputs.shape)} and weights {tuple(weights.shape)}, not (T, in) and (T,)"
        )
    refuse(~weights.isfinite() | (weights < 0), "the weight of token {} is NaN, infinite or below 0", first)
    refuse(~inputs.isfinite().all(dim=1), "the input of token {} holds NaN or infinity", first)
    return inputs.float() * weights.sqrt().float().unsqueeze(1)


def effective_tokens(weights: Tensor) -> float:
    """Return (Σ w)² / Σ w² of weights (T,): their number where all are equal, else less; 0 where all are 0."""
    w = weights.double()
    return float(w.sum().square() / w.square().sum().clamp_min(torch.finfo(torch.float64).tiny))


def shrunk_weights(own: Tensor, pooled: Tensor, width: int) -> Tensor:
    """Return weights (T,) whose second moment is λ H_own + (1 - λ) H_pooled with λ = n / (n + K).

    H_own and H_pooled are the mean second moments Σ w x xᵀ / Σ w under the weights `own` and `pooled` (T,); n is the
    effective number of `own`'s tokens and K the `width`, the number of inputs: with n < K an expert's own moment is
    singular, and GPTQ on it can do worse than plain rounding. Where no token chose the expert, the result is that of
    the pooled tokens, such as all tokens of its block.
    """
    tokens = effective_tokens(own)
    share = tokens / (tokens + width)
    parts = ((share, own.double()), (1 - share, pooled.double()))
    tiny = torch.finfo(torch.float64).tiny
    return sum((part * weights / weights.sum().clamp_min(tiny) for part, weights in parts), start=torch.zeros_like(own))


def refuse(wrong: Tensor, message: str, start: int = 0) -> None:
    """Raise `BadInputError` with the first index where `wrong` (n,) is true, counted from `start`, if there is one."""
    if wrong.any():
        raise BadInputError(
            f"{message.format(start + int(wrong.int().argmax()))}; check the calibration and checkpoint"
        )
