"""Refit: the down projections of what stays are solved anew, so that they stand in for what went.

Everything that a mixture computes before its down projections is kept: which experts a token goes to, with which
routing weights g', and the neurons φ. The output is linear in the down projections, so the best ones follow from a
regression of the original mixture's output y on the features

    p = [g'_e φ_e(u)]_e  ⊕  φ_shared(u)  ⊕  m u  ⊕  m,      m = 1 - Σ_e g'_e,

with g'_e = 0 where e was not selected: the kept experts, the shared expert, and for the routing mass m that no
selected row carries a linear map L and a constant c. With W the weights as they stand, Γ the tokens' weights and y'
the mixture's output as it stands,

    W* = W + (PᵀΓP + λI)⁻¹ PᵀΓ (Y - Y').

Where the system is too large to be solved at once, its terms are solved one after the other, each for what the others
leave, twice over; factors are kept for the second time.

λ and what is done at all is decided by a trial on tokens of images that are not held out: its error on the others is
that of tokens which it never saw. Of outputs of more than `TRIAL_OUTPUTS` channels the trial takes as many random
directions, which makes it cheap: errors of strengths are compared on the same directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.ridge import Factors, Normal, Rows, add_cross, choose
from ditmoe_cli.compression.repair.features import FitTokens, Routes, Term, fitted_terms, keep_features
from ditmoe_cli.compression.repair.shortfall import Routed, shortfall
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.compression.working_sizes import SWEEPS, TRIAL_OUTPUTS, most_unknowns, systems
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.progress import each


@dataclass(frozen=True)
class Refitted:
    """The result of a fit.

    Attributes:
        error: error on held-out tokens of a fit to the others, over that without a fit; 1 where no fit is better. The
            product of these for systems solved one after the other.
        strengths: ridge strength of each system that was solved, each time that it was.
    """

    error: float
    strengths: tuple[float, ...]


def refit(original: SparseMoE, changed: SparseMoE, tokens: Tokens, shared: bool) -> Refitted:
    """Fit `changed` to the output of `original` on `tokens`, in place; with `shared` the shared expert too.

    A residual constant and linear map are fitted where `changed` has them. The error on held-out tokens never grows.
    """
    fitting = FitTokens(tokens)
    sides = [Routed(moe, Routes.of(moe, fitting)) for moe in (original, changed)]
    terms, common = fitted_terms(changed, sides[1].routes, fitting, shared)
    keep_features(terms[: len(changed.experts) + shared], fitting)
    rest = _with_trial(shortfall(sides[0], sides[1], terms, common, fitting))
    sizes = [term.size for term in terms]
    groups = systems(sizes, most_unknowns(sizes))
    parts = [_System(terms[group], fitting, rest, original.gate.weight.shape[1]) for group in groups]
    rounds = parts * (SWEEPS if len(parts) > 1 else 1)
    solved = [part.solve(again=len(parts) > 1) for part in each(rounds, "refitting", "systems", share=0.7)]
    taken = [one for one in solved if one is not None]
    return Refitted(math.prod(one.error for one in taken), tuple(one.strength for one in taken))


def _with_trial(rest: Tensor) -> Tensor:
    """Return what is left of outputs (T, D) with what a trial is to fit beside it, (T, D + d)."""
    width = rest.shape[1]
    if width <= TRIAL_OUTPUTS:
        return torch.cat((rest, rest), dim=1)
    directions = torch.randn(width, TRIAL_OUTPUTS, generator=torch.Generator().manual_seed(0))
    return torch.cat((rest, rest @ torch.linalg.qr(directions).Q.to(rest)), dim=1)


@dataclass(frozen=True)
class _Solved:
    """The strength of a solution, and its error on held-out tokens over that before."""

    strength: float
    error: float


@dataclass
class _System:
    """Terms that are solved at once, for what is left of the outputs, `rest` (T, D + d) with a trial in the last d."""

    terms: Sequence[Term]
    tokens: FitTokens
    rest: Tensor
    width: int
    tried: bool = False
    strength: float = 0.0
    factors: Factors | None = None

    def solve(self, again: bool) -> _Solved | None:
        """Fit the terms, subtract their change from what is left, and return the fit; None where none is better.

        With `again` the system is solved more than once.
        """
        if not self.tried:
            self.tried = True
            return self._solve_first(again)
        return self._solve_again()

    def _solve_first(self, again: bool) -> _Solved | None:
        """Choose the strength on the trial, solve on all tokens, and keep the factors if the system is solved again."""
        train, held = self._sums()
        trial = choose(self._of_trial(train, self.tokens.train), self._of_trial(held, self.tokens.held))
        if trial is None:
            return None
        self.strength = trial.strength
        second = train.factor(trial.strength) if again else None
        train.gram += held.gram
        both = Normal(train.gram, (train.cross + held.cross)[:, : self.width])
        del held
        if second is None:
            solution = both.solve(trial.strength)
        else:
            first = both.factor(trial.strength)
            del train
            both.gram = both.gram[:0]
            self.factors = None if first is None else Factors.of(first, second)
            solution = None if self.factors is None else self.factors.solve_first(both.cross)
        if solution is None:
            return None
        self._take(solution, trial.solution, again)
        return _Solved(trial.strength, trial.error)

    def _solve_again(self) -> _Solved | None:
        """Solve for what is left by now, if that lowers the error of the trial on held-out tokens."""
        if self.factors is None:
            return None
        size = sum(term.size for term in self.terms)
        shape, like = (size, self.rest.shape[1]), self.factors.packed
        train, held = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        for cross, batches in ((train, self.tokens.train), (held, self.tokens.held)):
            for batch in batches:
                add_cross(cross, self._rows(batch), self.rest[batch])
        trial = self.factors.solve_second(train[:, self.width :])
        before = after = 0.0
        for batch in self.tokens.held:
            left = self.rest[batch, self.width :]
            before += float(left.double().square().sum())
            after += float((left - self._change(batch, trial)).double().square().sum())
        if not after < before:
            return None
        self._take(self.factors.solve_first((train + held)[:, : self.width]), trial, True)
        return _Solved(self.strength, after / before)

    def _sums(self) -> tuple[Normal, Normal]:
        """Return the sums over tokens to fit on, and over those held out."""
        size = sum(term.size for term in self.terms)
        train, held = (Normal.empty(size, self.rest.shape[1], self.rest.device) for _ in range(2))
        for batch in each(self.tokens.batches, "summing the system", "batches of tokens", share=0.4):
            sums = train if batch in self.tokens.train else held
            sums.add(self._rows(batch), self.rest[batch])
        return train, held

    def _of_trial(self, sums: Normal, batches: Sequence[slice]) -> Normal:
        energy = sum(float(self.rest[batch, self.width :].double().square().sum()) for batch in batches)
        return Normal(sums.gram, sums.cross[:, self.width :], energy)

    def _rows(self, batch: slice) -> list[Rows]:
        return [term.rows(batch) for term in self.terms]

    def _change(self, batch: slice, solution: Tensor) -> Tensor:
        """Return what a solution adds to the outputs of a batch of tokens."""
        values = solution.to(self.rest.dtype)
        change = torch.zeros(batch.stop - batch.start, values.shape[1], device=values.device)
        for rows, part in zip(self._rows(batch), self._split(values), strict=True):
            if rows.places is None:
                change.addmm_(rows.values, part)
            else:
                change[rows.places] += rows.values @ part
        return change

    def _take(self, solution: Tensor, trial: Tensor, again: bool) -> None:
        """Add the change to the weights and, where more is to be solved for what is left, subtract it there."""
        if again:
            both = torch.cat((solution, trial), dim=1)
            for batch in each(self.tokens.batches, "taking the change off", "batches of tokens", share=0.2):
                self.rest[batch] -= self._change(batch, both)
        for term, part in zip(self.terms, self._split(solution.float()), strict=True):
            term.add(part)

    def _split(self, solution: Tensor) -> list[Tensor]:
        ends = [0]
        for term in self.terms:
            ends.append(ends[-1] + term.size)
        return [solution[start:stop] for start, stop in pairwise(ends)]
