"""Rounding to a fixed grid that spreads each column's error over the columns after it (GPTQ).

Source: Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.working_sizes import DAMPINGS
from ditmoe_cli.errors import BadInputError

Rounding = Callable[[Tensor, Tensor], Tensor]
"""Takes values (out, n) and their columns (n,) int64; returns the values rounded to the grid of those columns.

The grid is fixed beforehand (static groups), so columns may come in any order, one or many at a time.
"""

CHUNK = 4096  # tokens whose products are summed in one fp32 matmul
WIDEST_IN_DOUBLE = 2048  # wider sums are in fp32: at 4608 fp64 would take 170 MB
RAISES, LEAST_RAISED = 4, 1e-6  # how often damping is raised, and its first value above 0


@dataclass(frozen=True)
class Hessian:
    """Second moment of a linear layer's inputs: the Hessian, up to a factor 2, of its squared output error.

    Attributes:
        matrix: Σ w x xᵀ (in, in) in fp32, over tokens x of weight w.
        weight: Σ w.
        tokens: effective number of tokens, (Σ w)² / Σ w²: their number where all weights are equal, else less. 0
            without tokens.
    """

    matrix: Tensor
    weight: float
    tokens: float

    def __add__(self, other: Hessian) -> Hessian:
        """Return the Hessian over the tokens of both."""
        squares = sum(part.weight**2 / part.tokens for part in (self, other) if part.tokens)
        weight = self.weight + other.weight
        return Hessian(self.matrix + other.matrix, weight, weight**2 / squares if squares else 0.0)

    def normalised(self) -> Tensor:
        """Return the mean Σ w x xᵀ / Σ w (in, in); 0 where Σ w is 0."""
        return self.matrix / self.weight if self.weight else self.matrix


def hessian_of(inputs: Tensor, weights: Tensor) -> Hessian:
    """Return the Hessian of inputs (T, in) of weights w (T,).

    For the error of an expert's contribution, w is its squared routing weight. Products are summed in fp32 by chunks of
    tokens, and chunks in fp64 up to a width of `WIDEST_IN_DOUBLE`. Raises `BadInputError` for values that are NaN or
    infinite, weights below 0, and sums beyond fp32's range.
    """
    if weights.shape != inputs.shape[:1] or inputs.ndim != 2:
        raise BadInputError(
            f"Hessian: inputs {tuple(inputs.shape)} and weights {tuple(weights.shape)}, not (T, in) and (T,)"
        )
    w = weights.double()
    refuse(~w.isfinite() | (w < 0), "Hessian: the weight of token {} is NaN, infinite or below 0")
    width = inputs.shape[1]
    dtype = torch.float64 if width <= WIDEST_IN_DOUBLE else torch.float32
    total = torch.zeros(width, width, dtype=dtype, device=inputs.device)
    for start in range(0, len(inputs), CHUNK):
        x = inputs[start : start + CHUNK].float()
        refuse(~x.isfinite().all(dim=1), "Hessian: the input of token {} holds NaN or infinity", start)
        x = x * w[start : start + CHUNK].sqrt().float().unsqueeze(1)
        total += x.T @ x
    matrix = total.float()
    refuse(~matrix.isfinite().all(dim=1), "Hessian: the sum over tokens exceeds fp32 in row {}")
    weight, squares = float(w.sum()), float(w.square().sum())
    return Hessian(matrix, weight, weight**2 / squares if squares else 0.0)


def refuse(wrong: Tensor, message: str, start: int = 0) -> None:
    """Raise `BadInputError` with the first index where `wrong` (n,) is true, counted from `start`, if there is one."""
    if wrong.any():
        raise BadInputError(
            f"{message.format(start + int(wrong.int().argmax()))}; check the calibration and checkpoint"
        )


def shrunk(own: Hessian, pooled: Hessian, width: int) -> Tensor:
    """Return λ H_own + (1 - λ) H_pooled (in, in), both normalised, with λ = n / (n + K).

    n is the effective number of `own`'s tokens and K the `width`, the number of inputs: with n < K an expert's own
    Hessian is singular, and GPTQ on it can do worse than plain rounding. Where no token chose the expert, the result is
    the pooled one, such as that of all tokens of its block.
    """
    share = own.tokens / (own.tokens + width)
    return share * own.normalised() + (1 - share) * pooled.normalised()


def factor(hessian: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Return R, upper triangular in fp64, with R Rᵀ = H + δ mean(diag H) I, and δ.

    δ is `damping`; where the factorisation fails it is raised tenfold (from 0 to `LEAST_RAISED`), `RAISES` times at
    most. Returns None where it still fails: then H is no second moment.
    """
    mean = float(hessian.diagonal().double().mean())
    for _ in range(1 + RAISES):
        # Lower triangular with rows and columns reversed is upper triangular.
        system = hessian.flip(0, 1).double()
        system.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(system)
        if not int(failed):
            return lower.flip(0, 1), damping
        damping = max(10 * damping, LEAST_RAISED)
    return None


def plain(weight: Tensor, round: Rounding) -> Tensor:
    """Return a weight (out, in) with each entry rounded on its own."""
    return round(weight, torch.arange(weight.shape[1], device=weight.device))


def gptq(
    weight: Tensor, hessian: Tensor, round: Rounding, damping: float, act_order: bool = True, block: int = 128
) -> tuple[Tensor, float | None]:
    """Return Ŵ (out, in) on the grid, such that tr((Ŵ - W) H (Ŵ - W)ᵀ) is small, for W fp32 and H (in, in).

    Returns also the damping that H was factored with: None where it has no factor, and columns are rounded to the
    nearest.

    Column by column, with U the upper Cholesky factor of (H + δ mean(diag H) I)⁻¹ = Uᵀ U, δ the `damping` (`factor`):
        ŵ_i = round(w_i),  e = (w_i - ŵ_i) / U_ii,  w_j -= e U_ij for all j > i.
    Since U⁻¹ = R of `factor`, column i has been moved, when it is rounded, by
        Σ_{k<i} (w_k - ŵ_k) R_ki / R_ii
    with the original w, so no inverse is needed. Sums over earlier blocks are taken for `block` columns at a time. With
    `act_order` columns are rounded by descending diag H, equal ones by index, else in their own order.

    Columns whose diagonal is 0 (inputs that are always 0) are rounded to the nearest, pass on no error, and count in no
    mean.
    Raises `BadInputError` where W or H holds NaN or infinity.
    """
    refuse(~weight.isfinite().all(dim=1), "GPTQ: row {} of the weight holds NaN or infinity")
    refuse(~hessian.isfinite().all(dim=1), "GPTQ: row {} of the Hessian holds NaN or infinity")
    diagonal = hessian.diagonal()
    order = torch.arange(len(diagonal), device=diagonal.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    order, unused = order[diagonal[order] != 0], (diagonal == 0).nonzero().squeeze(1)
    factored = factor(hessian[order][:, order], damping) if len(order) else None
    if factored is None:
        return plain(weight, round), None
    upper, used = factored
    passed = (upper / upper.diagonal()).to(weight.dtype)  # (k, i): R_ki / R_ii
    del upper, factored
    values = weight.T[order]  # a column of W is a row here, contiguous in memory; rounded in place
    lost = torch.empty_like(values)  # w - ŵ
    for start in range(0, len(order), block):
        here = slice(start, start + block)
        moved_by_earlier = torch.addmm(values[here], passed[:start, here].T, lost[:start])
        passed_within = passed[here, here].T.contiguous()
        for i, row in enumerate(moved_by_earlier):
            column = start + i
            moved = row + passed_within[i, :i] @ lost[start:column]
            rounded = round(moved.unsqueeze(1), order[column : column + 1]).squeeze(1)
            lost[column] = values[column] - rounded
            values[column] = rounded
    result = torch.empty_like(weight)
    result[:, order] = values.T
    if len(unused):
        result[:, unused] = round(weight[:, unused], unused)
    return result, used


def output_error(difference: Tensor, moment: Tensor) -> float:
    """Return tr(D M Dᵀ), at least 0, for D (out, in) and M (in, in)."""
    return max(0.0, float(((difference @ moment) * difference).sum(dtype=torch.float64)))


@dataclass(frozen=True)
class Rounded:
    """A rounded weight.

    Attributes:
        weight: (out, in) on its grid.
        damping: damping of GPTQ; None where plain rounding was kept.
        error: held-out error over that of plain rounding, at most 1.
    """

    weight: Tensor
    damping: float | None
    error: float


def best_rounding(
    weight: Tensor,
    hessian: Tensor,
    round: Rounding,
    held: Tensor | Hessian,
    dampings: Sequence[float] = DAMPINGS,
    tokens: float = 0.0,
) -> Rounded:
    """Return the weight rounded with least error on held-out tokens: plainly, or by GPTQ with one of `dampings`.

    The error is tr((Ŵ - W) M (Ŵ - W)ᵀ) for `held`, the second moment M (in, in) of held-out inputs at any scale. Plain
    rounding is kept where no damping is better.

    Where no token was held out (M = 0) it is unknown whether a Hessian generalises: plain rounding is kept, unless
    `tokens`, the effective number of tokens that chose the expert, is at least `in`; then the first damping is tried,
    and the error is that under `hessian` itself. Raises `BadInputError` where a matrix holds NaN or infinity.
    """
    moment = held.matrix if isinstance(held, Hessian) else held
    refuse(~moment.isfinite().all(dim=1), "GPTQ: row {} of the held-out second moment holds NaN or infinity")
    if not moment.any():
        moment, dampings = hessian, dampings[:1] if tokens >= weight.shape[1] else ()
    moment = moment.to(weight.dtype)
    best, chosen = plain(weight, round), None
    least = baseline = output_error(best - weight, moment)
    for damping in dampings:
        candidate, used = gptq(weight, hessian, round, damping)
        error = output_error(candidate - weight, moment)
        if error < least:
            best, chosen, least = candidate, used, error
    return Rounded(best, chosen, least / baseline if baseline else 1.0)
