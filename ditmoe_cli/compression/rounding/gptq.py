"""Rounding to fixed grids that spreads each column's error over the columns after it (GPTQ), many matrices at once.

Source: Frantar et al., GPTQ, 2022, https://arxiv.org/abs/2210.17323.

Matrices that read the same inputs, as an expert's gate and up, share a Hessian, and are rounded as one. Those of
several experts, of equal shapes, go column by column together. Tensors have columns in the order in which they are
rounded, the last one first, and rows last: values (E, n, R) of E experts, n inputs and R rows; factors (E, n, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import cholesky
from ditmoe_cli.compression.rounding.second_moments import refuse
from ditmoe_cli.compression.working_sizes import DAMPINGS, TRIED_ROWS
from ditmoe_cli.formats.base import Grid
from ditmoe_cli.formats.columns import Columns, Rule, beside, stacked

BLOCK = 128  # columns that earlier ones move by one product
_WITHIN = 16  # columns that move each other one by one
RAISES, LEAST_RAISED = 4, 1e-6  # how often damping is raised, and its first value above 0


@dataclass(frozen=True)
class Readers:
    """Matrices that read the same inputs.

    Attributes:
        weights: (out_m, in) of each matrix m, fp32.
        grids: of each matrix, all of one rule (`rule_of`).
        hessian: (in, in) second moment of the inputs, at any scale.
        held: (T, in) held-out inputs, times the roots of their weights.
        tokens: effective number of tokens that the inputs come from (`effective_tokens`).
    """

    weights: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    hessian: Tensor
    held: Tensor
    tokens: float

    @property
    def alike(self) -> tuple[object, ...]:
        """What those have in common that can be rounded together: shapes, rule, and whether tokens are held out."""
        return (
            *(tuple(weight.shape) for weight in self.weights),
            rule_of(self.grids[0], self.hessian.device),
            len(self.held) > 0,
        )


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


def rule_of(grid: Grid, device: torch.device) -> Rule:
    """Return the rule by which columns are rounded to a grid, whose numbers are on a device."""
    return grid.columns(torch.zeros(1, dtype=torch.int64, device=device)).rule


def plain(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight (out, in) with each entry rounded on its own."""
    return grid.round(weight, torch.arange(weight.shape[1], device=weight.device))


def best_rounding(readers: Sequence[Readers], dampings: Sequence[float] = DAMPINGS) -> list[tuple[Rounded, ...]]:
    """Return the matrices of each of `readers` rounded plainly, or by GPTQ with one of `dampings`.

    The error is tr((Ŵ - W) M (Ŵ - W)ᵀ) for the second moment M of held-out inputs. Plain rounding is kept where nothing
    is better. All rows are rounded with the first damping; each further one is tried on about `TRIED_ROWS` rows of each
    matrix, spread evenly, and taken where it has less error there and on all rows. For each matrix the first damping
    that has not is the last that is tried, since errors fall and then rise with damping.

    Where no token was held out it is unknown whether a Hessian generalises: plain rounding is kept, unless the
    effective number of tokens is at least `in`; then the first damping is used, and the error is that under the Hessian
    itself. `readers` have to be `alike`. Raises `BadInputError` where a matrix holds NaN or infinity.
    """
    if len(readers[0].held):
        return _Search(readers, [Moment.of(each.held) for each in readers]).rounded(dampings)
    return [_without_held(each, dampings) for each in readers]


def _without_held(each: Readers, dampings: Sequence[float]) -> tuple[Rounded, ...]:
    if each.tokens >= len(each.hessian):
        return _Search([each], [Moment(each.hessian, is_root=False)]).rounded(dampings[:1])[0]
    pairs = zip(each.weights, each.grids, strict=True)
    return tuple(Rounded(plain(weight, grid), None, 1.0) for weight, grid in pairs)


@dataclass(frozen=True)
class Moment:
    """A second moment M (n, n) of inputs, or X (T, n) with M = Xᵀ X, if `is_root`."""

    matrix: Tensor
    is_root: bool

    @classmethod
    def of(cls, inputs: Tensor) -> Moment:
        """Return the second moment of inputs (T, n), as what takes fewer operations."""
        wide = len(inputs) < inputs.shape[1]
        return cls(inputs, is_root=True) if wide else cls(inputs.T @ inputs, is_root=False)

    def ordered(self, order: Tensor, dtype: torch.dtype) -> Moment:
        """Return that of the inputs in an order (n,)."""
        rows = self.matrix if self.is_root else self.matrix[order]
        return Moment(rows[:, order].to(dtype), self.is_root)

    def errors(self, lost: Tensor) -> Tensor:
        """Return d M dᵀ in fp64 for each column d (n,) of differences `lost` (n, R)."""
        products = self.matrix @ lost
        return (products.square_() if self.is_root else products.mul_(lost)).sum(dim=0, dtype=torch.float64)


def factor(hessian: Tensor, damping: float) -> tuple[Tensor, float | None]:
    """Return L, lower triangular, over its diagonal: L_ki / L_ii, with L Lᵀ = H + δ mean(diag H) I, and δ.

    H is (n, n). Columns whose diagonal is 0 (inputs that are always 0) count in no mean, and move no other. δ is
    `damping`; where the factorisation fails it is raised tenfold (from 0 to `LEAST_RAISED`), `RAISES` times at most.
    Where it still fails H is no second moment: then L is I, and δ None.

    The factorisation is in H's dtype. In fp32, L Lᵀ is off by some 1e-7 of the largest eigenvalue, hundreds of times
    less than the least damping that is tried adds.
    """
    diagonal = hessian.diagonal()
    unused = diagonal == 0
    mean = diagonal.sum() / (~unused).sum().clamp_min(1)
    scale = torch.where(mean > 0, mean, 1.0)
    for _ in range(1 + RAISES):
        system = hessian.clone()
        system.diagonal().add_(damping * scale + scale * unused)
        lower = cholesky(system)
        if lower is not None:
            return lower.div_(lower.diagonal().clone()), damping
        damping = max(10 * damping, LEAST_RAISED)
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), None


def gptq(
    values: Tensor, factors: Tensor, columns: Callable[[slice], Columns], block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Return Ŵ (E, n, R) on the grid and W - Ŵ, such that tr((Ŵ - W) H (Ŵ - W)ᵀ) is small for each W of `values`.

    `factors` (E, n, n) are those of `factor`, and `columns` returns the grids of a slice of columns. With i falling
    from n - 1 to 0, column i is moved, when it is rounded, by

        Σ_{k>i} (w_k - ŵ_k) L_ki / L_ii

    with the original w. That is the recursion of the paper, which moves all later columns by (w_i - ŵ_i) U_ij / U_ii, U
    the Cholesky factor of H⁻¹, but no inverse is needed. Sums over earlier blocks of `block` columns are taken by one
    product, and those within a block by products for `_WITHIN` columns.
    """
    rounded, lost = torch.empty_like(values), torch.empty_like(values)
    for stop in range(values.shape[1], 0, -block):
        here = slice(max(stop - block, 0), stop)
        moved = values[:, here].clone()
        if stop < values.shape[1]:
            moved.baddbmm_(factors[:, stop:, here].transpose(1, 2), lost[:, stop:])
        _round_block(values[:, here], moved, lost[:, here], factors[:, here, here], columns(here))
        rounded[:, here] = moved
    return rounded, lost


def _round_block(values: Tensor, moved: Tensor, lost: Tensor, factors: Tensor, columns: Columns) -> None:
    """Round columns (E, B, R), the last one first: overwrite `moved` by them, and `lost` by `values` less them."""
    numbers = columns.one_by_one()
    each = list(zip(values.unbind(1), moved.unbind(1), lost.unbind(1), lost.unsqueeze(2).unbind(1), strict=True))
    passed = factors.unsqueeze(3).contiguous()  # (E, k, i, 1): of one column k to all i, beside rows
    for stop in range(moved.shape[1], 0, -_WITHIN):
        start = max(stop - _WITHIN, 0)
        if stop < moved.shape[1]:
            moved[:, start:stop].baddbmm_(factors[:, stop:, start:stop].transpose(1, 2), lost[:, stop:])
        for i in range(stop - 1, start - 1, -1):
            value, row, difference, beside_columns = each[i]
            columns.rule(row, *(numbers[i] if numbers else ()))
            torch.sub(value, row, out=difference)
            if i > start:
                moved[:, start:i].addcmul_(passed[:, i, start:i], beside_columns)


@dataclass
class _Best:
    """The best rounding of E readers by GPTQ so far.

    Attributes:
        values: (E, n, R) rounded.
        errors: (E, R) of each row, in fp64.
        dampings: (E, M) of each matrix; NaN where the Hessian has no factor.
    """

    values: Tensor
    errors: Tensor
    dampings: Tensor


class _Search:
    """The search for the best dampings of the M matrices of each of E readers that are alike.

    Attributes:
        slot: (R,) matrix of each row.
        order: (E, n) columns by ascending diagonal of the Hessian, so that the last, of the largest inputs, is the
            first to be rounded; of equal ones the first.
        values: (E, n, R) weights.
        hessians: (E, n, n).
        moments: of held-out inputs.
        step: which rows are tried: each `step`-th.
    """

    def __init__(self, readers: Sequence[Readers], moments: Sequence[Moment]) -> None:
        first, self._readers = readers[0], readers
        like, width, sizes = first.weights[0], len(first.hessian), [len(weight) for weight in first.weights]
        self.slot = torch.arange(len(sizes), device=like.device).repeat_interleave(
            torch.tensor(sizes, device=like.device)
        )
        self.step = max(1, min(sizes) // TRIED_ROWS)
        self.order = torch.empty(len(readers), width, dtype=torch.int64, device=like.device)
        self.values = like.new_empty(len(readers), width, sum(sizes))
        self.hessians = like.new_empty(len(readers), width, width)
        self.moments: list[Moment] = []
        for e, (each, moment) in enumerate(zip(readers, moments, strict=True)):
            refuse(~each.hessian.isfinite().all(dim=1), "GPTQ: row {} of the Hessian holds NaN or infinity")
            order = each.hessian.diagonal().argsort(descending=True, stable=True).flip(0)
            self.order[e], self.hessians[e] = order, each.hessian[order][:, order]
            rows = torch.split(self.values[e], sizes, dim=1)
            for weight, place in zip(each.weights, rows, strict=True):
                refuse(~weight.isfinite().all(dim=1), "GPTQ: row {} of the weight holds NaN or infinity")
                place.copy_(weight.T[order])
            self.moments.append(moment.ordered(order, like.dtype))

    def rounded(self, dampings: Sequence[float]) -> list[tuple[Rounded, ...]]:
        """Return the matrices of each reader as `best_rounding` does."""
        everyone = torch.arange(len(self._readers))
        baseline = self._of_matrices(self._errors(everyone, self._lost_plainly()))
        best = self._best(dampings, everyone)
        least = baseline if best is None else self._of_matrices(best.errors)
        sums = zip(baseline.tolist(), least.tolist(), strict=True)
        found = []
        for e, (each, (plain_errors, errors)) in enumerate(zip(self._readers, sums, strict=True)):
            rows = [] if best is None else torch.split(best.values[e], [len(weight) for weight in each.weights], dim=1)
            matrices = []
            for m, (weight, grid) in enumerate(zip(each.weights, each.grids, strict=True)):
                if best is None or errors[m] >= plain_errors[m]:
                    matrices.append(Rounded(plain(weight, grid), None, 1.0))
                    continue
                result = torch.empty_like(weight)
                result[:, self.order[e]] = rows[m].T
                matrices.append(Rounded(result, float(best.dampings[e, m]), errors[m] / plain_errors[m]))
            found.append(tuple(matrices))
        return found

    def _best(self, dampings: Sequence[float], everyone: Tensor) -> _Best | None:
        """Return the best rounding with one of `dampings` of each matrix; None where there are none."""
        if not dampings:
            return None
        factors, used = self._factored(everyone, dampings[0])
        values, errors = self._solved(everyone, factors)
        best = _Best(values, errors, used[:, None].repeat(1, int(self.slot[-1]) + 1))
        falling = torch.ones_like(best.dampings, dtype=torch.bool)  # (E, M) whether errors still fell
        for damping in dampings[1:]:
            who = falling.any(dim=1).nonzero().squeeze(1)
            if not len(who):
                break
            factors, used = self._factored(who, damping)
            if self.step > 1:
                _, errors = self._solved(who, factors, self.step)
                before = self._of_matrices(best.errors[who, :: self.step], self.step)
                falling[who] &= (self._of_matrices(errors, self.step) < before).cpu()
                still = falling[who].any(dim=1)
                who, used, factors = who[still], used[still], factors[still.to(factors.device)]
            if not len(who):
                break
            values, errors = self._solved(who, factors)
            falling[who] &= (self._of_matrices(errors) < self._of_matrices(best.errors[who])).cpu()
            taken = falling[who].to(self.slot.device)[:, self.slot]
            best.values[who] = torch.where(taken[:, None], values, best.values[who])
            best.errors[who] = torch.where(taken, errors, best.errors[who])
            best.dampings[who] = torch.where(falling[who], used[:, None], best.dampings[who])
        return best

    def _factored(self, who: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Return the factors (e, n, n) of the readers `who` (e,), and their dampings, NaN for None."""
        factors = torch.empty_like(self.hessians[: len(who)])
        used = torch.empty(len(who), dtype=torch.float64)
        for place, e in enumerate(who.tolist()):
            factors[place], taken = factor(self.hessians[e], damping)
            used[place] = math.nan if taken is None else taken
        return factors, used

    def _solved(self, who: Tensor, factors: Tensor, step: int = 1) -> tuple[Tensor, Tensor]:
        """Return each `step`-th row of the readers `who` (e,) rounded by GPTQ, (e, n, r), and its errors (e, r)."""
        values = self.values if len(who) == len(self.values) else self.values[who]
        rounded, lost = gptq(values[..., ::step].contiguous(), factors, lambda here: self._columns(who, here, step))
        return rounded, self._errors(who, lost)

    def _columns(self, who: Tensor, here: slice, step: int = 1) -> Columns:
        """Return the grids of some columns of each `step`-th row of the readers `who` (e,)."""
        parts = [
            beside([grid.columns(self.order[e, here]) for grid in self._readers[e].grids]).every(step)
            for e in who.tolist()
        ]
        return stacked(parts)

    def _lost_plainly(self) -> Tensor:
        """Return what all lose that are rounded plainly, (E, n, R)."""
        everyone, lost = torch.arange(len(self._readers)), torch.empty_like(self.values)
        for start in range(0, self.values.shape[1], BLOCK):
            here = slice(start, start + BLOCK)
            rounded = self.values[:, here].clone()
            self._columns(everyone, here).round_(rounded)
            torch.sub(self.values[:, here], rounded, out=lost[:, here])
        return lost

    def _errors(self, who: Tensor, lost: Tensor) -> Tensor:
        """Return the errors (e, r) of rows that lose `lost` (e, n, r), of the readers `who` (e,), in fp64."""
        return torch.stack([self.moments[e].errors(of_one) for e, of_one in zip(who.tolist(), lost, strict=True)])

    def _of_matrices(self, errors: Tensor, step: int = 1) -> Tensor:
        """Return the sums (e, M) of the errors (e, r) of each `step`-th row over each matrix."""
        sums = errors.new_zeros(len(errors), int(self.slot[-1]) + 1)
        return sums.index_add_(1, self.slot[::step], errors)
