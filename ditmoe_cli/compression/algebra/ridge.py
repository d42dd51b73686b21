"""Ridge regression from streamed normal equations, its strength chosen on held-out rows.

Systems of up to `DOUBLE_FEATURES` are summed and solved in float64. Larger ones are in float32, since float64 takes
twice as long on a CPU and 64 times as long on most GPUs: a solution is refined once, by a residual in float64 (Higham
2002, Accuracy and Stability of Numerical Algorithms, section 12).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.decompositions import cholesky
from ditmoe_cli.compression.working_sizes import DOUBLE_FEATURES
from ditmoe_cli.progress import phase

STRENGTHS = tuple(10.0**power for power in range(1, -8, -1))
_COLUMNS = 768  # of a Gram that are computed at once: their products below the diagonal are left out
_LEADING = 1024  # features on which the search for a strength of a large system starts


@dataclass(frozen=True)
class Rows:
    """Features (n, F) in those rows of a batch in which they are not all 0.

    Attributes:
        values: (n, F) the features.
        places: (n,) their rows in the batch, ascending; None for all rows.
    """

    values: Tensor
    places: Tensor | None = None

    def of(self, batch: Tensor) -> Tensor:
        """Return the rows of a batch (rows, D) that features belong to, (n, D)."""
        return batch if self.places is None else batch[self.places]

    def beside(self, other: Rows, rows: int) -> tuple[Tensor, Tensor]:
        """Return the features of both in the rows that both have, of a batch of `rows`."""
        if other.places is None:
            return self.values, self.of(other.values)
        if self.places is None:
            return other.of(self.values), other.values
        where = torch.full((rows,), -1, dtype=torch.int64, device=self.places.device)
        where[self.places] = torch.arange(len(self.places), device=where.device)
        mine = where[other.places]
        both = mine >= 0
        return self.values[mine[both]], other.values[both]


@dataclass
class Normal:
    """Sums over rows (p, r), scaled by the root of their weight: Σ p pᵀ (F, F), Σ p rᵀ (F, D) and Σ ‖r‖².

    They are all that the squared error of a linear map V (F, D) needs: Σ ‖r - Vᵀp‖². Of the Gram the blocks below the
    diagonal are not summed: `whole` mirrors them.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    _mirrored: bool = False

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Normal:
        """Return sums over no rows, in float64 up to `DOUBLE_FEATURES` and in float32 beyond."""
        dtype = torch.float64 if features <= DOUBLE_FEATURES else torch.float32
        gram, cross = (torch.zeros(features, size, dtype=dtype, device=device) for size in (features, outputs))
        return cls(gram, cross)

    def add(self, parts: Sequence[Rows], targets: Tensor) -> None:
        """Add a batch: features in parts side by side, targets (rows, D), all scaled by the root of their weights."""
        self._mirrored = False
        starts = _starts(parts)
        for index, (part, (start, stop)) in enumerate(zip(parts, pairwise(starts), strict=True)):
            for at in range(0, stop - start, _COLUMNS):
                own, square = part.values[:, at : at + _COLUMNS], self.gram[start + at : stop, start + at : stop]
                _add_product(square[: own.shape[1]], own, part.values[:, at:])
            for other, (left, right) in zip(parts[index + 1 :], pairwise(starts[index + 1 :]), strict=True):
                _add_product(self.gram[start:stop, left:right], *part.beside(other, len(targets)))
        add_cross(self.cross, parts, targets)
        self.energy += float(targets.double().square().sum())

    @property
    def whole(self) -> Tensor:
        """The Gram, its lower triangle made that of the upper one, in place, if it is not yet."""
        if self._mirrored:
            return self.gram
        for start in range(0, len(self.gram), _COLUMNS):
            stop = start + _COLUMNS
            square = self.gram[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)
            self.gram[stop:, start:stop] = self.gram[start:stop, stop:].T
        self._mirrored = True
        return self.gram

    def __add__(self, other: Normal) -> Normal:
        """Return the sums over the rows of both."""
        return Normal(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def leading(self, features: int) -> Normal:
        """Return the sums of the first features alone, in float64."""
        return Normal(self.gram[:features, :features].double(), self.cross[:features].double(), self.energy)

    def error(self, solution: Tensor) -> float:
        """Return Σ ‖r - Vᵀp‖² for V (F, D), which rounding may leave a little below 0."""
        slope = self.whole @ solution - 2 * self.cross
        return self.energy + float((solution * slope).double().sum())

    def ridge(self, strength: float) -> float:
        """Return λ: `strength` times the mean of the Gram's diagonal."""
        return strength * float(self.gram.diagonal().mean())

    def factor(self, strength: float) -> Tensor | None:
        """Return the lower Cholesky factor of Σ p pᵀ + λ I; None where it has none, as far as rounding lets see."""
        system = self.whole.clone()
        system.diagonal().add_(self.ridge(strength))
        return cholesky(system)

    def solve(self, strength: float) -> Tensor | None:
        """Return (Σ p pᵀ + λ I)⁻¹ Σ p rᵀ, refined once in float32; None where the system cannot be factorised."""
        if self.ridge(strength) == 0.0:  # no feature was ever other than 0
            return torch.zeros_like(self.cross)
        lower = self.factor(strength)
        if lower is None:
            return None
        solution = torch.cholesky_solve(self.cross, lower)
        if self.gram.dtype == torch.float64:
            return solution
        return solution + torch.cholesky_solve(self._left(solution, self.ridge(strength)), lower)

    def _left(self, solution: Tensor, ridge: float) -> Tensor:
        """Return Σ p rᵀ - (Σ p pᵀ + λ I) V, computed in float64."""
        wide = solution.double()
        parts = [
            cross.double() - gram.double() @ wide - ridge * own
            for cross, gram, own in zip(
                *(torch.split(t, _COLUMNS) for t in (self.cross, self.whole, wide)), strict=True
            )
        ]
        return torch.cat(parts).to(solution.dtype)


def add_cross(cross: Tensor, parts: Sequence[Rows], targets: Tensor) -> None:
    """Add a batch's Σ p rᵀ to `cross` (F, D); see `Normal.add`."""
    for part, (start, stop) in zip(parts, pairwise(_starts(parts)), strict=True):
        _add_product(cross[start:stop], part.values, part.of(targets))


def _starts(parts: Sequence[Rows]) -> list[int]:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.values.shape[1])
    return starts


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to `sums`, whose dtype may be wider."""
    if sums.dtype == left.dtype:
        sums.addmm_(left.T, right)
    else:
        sums += left.T @ right


@dataclass(frozen=True)
class Choice:
    """A strength, the solution (F, D) that the rows to fit have with it, and its held-out error over that of V = 0."""

    strength: float
    solution: Tensor
    error: float


def choose(train: Normal, held: Normal) -> Choice | None:
    """Return the strength whose solution on `train` has the least error on `held`; None where none betters V = 0.

    Strengths are tried from the strongest on, until the error has grown twice; those of a system in float32 from the
    best of its first features on, as long as the error falls. A strength at which the system cannot be factorised
    counts as no better.
    """
    order = range(len(STRENGTHS))
    with phase("solving", len(STRENGTHS), "strengths", share=0.3) as progress:

        def tried(place: int, train: Normal = train, held: Normal = held) -> Choice:
            solution = train.solve(STRENGTHS[place])
            progress(1)
            if solution is None:
                return Choice(STRENGTHS[place], train.cross, float("inf"))
            return Choice(STRENGTHS[place], solution, held.error(solution))

        if train.gram.dtype == torch.float64:
            best = _descend(tried, order, 2)
        else:
            first, fewer = train.leading(_LEADING), held.leading(_LEADING)
            guess = _descend(lambda place: tried(place, first, fewer), order, 2)
            start = STRENGTHS.index(guess.strength)
            best = _descend(tried, range(start, -1, -1), 1)
            if best.strength == STRENGTHS[start]:
                weaker = _descend(tried, range(start + 1, len(STRENGTHS)), 1, best)
                best = min(best, weaker, key=lambda choice: choice.error)
    if not best.error < held.energy:
        return None
    return Choice(best.strength, best.solution, max(best.error, 0.0) / held.energy)


def _descend(
    tried: Callable[[int], Choice], places: Sequence[int], patience: int, best: Choice | None = None
) -> Choice:
    """Return the best of the strengths at `places`, tried in order until the error has not fallen `patience` times."""
    worse = 0
    for place in places:
        found = tried(place)
        if best is None or found.error < best.error:
            best, worse = found, 0
        else:
            worse += 1
        if worse == patience:
            break
    assert best is not None
    return best


@dataclass(frozen=True)
class Factors:
    """Cholesky factors of two systems (F, F) in the memory of one, to be solved again with other right-hand sides.

    A = L Lᵀ and B = M S² Mᵀ, M having a diagonal of ones.

    Attributes:
        packed: L in the lower triangle, Mᵀ above the diagonal.
        scale: (F,) the diagonal of S.
    """

    packed: Tensor
    scale: Tensor

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Factors:
        """Return the factors of A and B, given as lower triangular matrices; the first one's memory is taken."""
        scale = second.diagonal().clone()
        for start in range(0, len(first), _COLUMNS):
            rows = slice(start, start + _COLUMNS)
            unit = second[start:, rows] / scale[rows]
            first[rows, start:] += unit.T.triu(1)
        return cls(first, scale)

    def solve_first(self, cross: Tensor) -> Tensor:
        """Return A⁻¹ C for C (F, D)."""
        half = torch.linalg.solve_triangular(self.packed, cross, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.packed.mT, half, upper=True)
        return whole

    def solve_second(self, cross: Tensor) -> Tensor:
        """Return B⁻¹ C for C (F, D)."""
        half = torch.linalg.solve_triangular(self.packed.mT, cross, upper=False, unitriangular=True)
        half /= self.scale.square()[:, None]
        whole: Tensor = torch.linalg.solve_triangular(self.packed, half, upper=True, unitriangular=True)
        return whole
