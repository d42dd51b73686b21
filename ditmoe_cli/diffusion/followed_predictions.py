"""Predictions of evaluations in which a model is not asked: they follow the state.

With z and o the state and the guided prediction, z', o' those of the last evaluation in which the model was asked, and
o'' that of the one before,

    o = o' + a ⊙ (z - z') + b ⊙ (o' - o'')

by channel; channels that are no velocity or noise, as the variance of DDPM weights, are those of o'. The slopes a and b
are fitted by least squares to a model's own way. Where noise is drawn anew at each step, a answers it: a denoiser's
output moves nearly with its input at high noise. Where none is, b extrapolates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditmoe_cli.model.block_choices import ComputeTable

_RIDGE = 1e-6
"""What is added to the diagonal of normal equations, relative to it, so that terms that are alike share alike."""


def fitted_slopes(states: Tensor, predictions: Tensor, table: ComputeTable) -> Tensor:
    """Return the slopes (K, C, 2) of a table with K evaluations; zero in evaluations in which the model is asked.

    `states` (K, N, C, H, W) and `predictions` (K, N, C' >= C, H, W) are those of N images, everything computed.
    """
    slopes = torch.zeros(len(states), states.shape[2], 2)
    for evaluation in table.followed:
        sources = table.asked_before(evaluation)
        before = sources[-2] if len(sources) == 2 else None
        slopes[evaluation] = slopes_at(states, predictions, evaluation, sources[-1], before)
    return slopes.to(states.device)


def slopes_at(states: Tensor, predictions: Tensor, evaluation: int, last: int, before: int | None) -> Tensor:
    """Return a and b (C, 2) of one evaluation which follows `last` and, where there is one, the evaluation `before`."""
    wanted = _by_channel(predictions, evaluation, last, states.shape[2])
    terms = [_by_channel(states, evaluation, last, states.shape[2])]
    if before is not None:
        terms.append(_by_channel(predictions, last, before, states.shape[2]))
    found = torch.zeros(states.shape[2], 2, dtype=torch.float64)
    for channel, target in enumerate(wanted):
        matrix = torch.stack([term[channel] for term in terms], dim=1)
        gram = matrix.T @ matrix
        gram += torch.diag(_RIDGE * gram.diagonal() + torch.finfo(torch.float64).tiny)
        found[channel, : len(terms)] = torch.linalg.solve(gram, matrix.T @ target)
    return found.float()


def _by_channel(values: Tensor, later: int, earlier: int, channels: int) -> Tensor:
    """Return the difference of two evaluations (C, N H W) in fp64."""
    apart = (values[later, :, :channels].double() - values[earlier, :, :channels].double()).cpu()
    return apart.transpose(0, 1).flatten(1)


def following(slopes: Tensor, x: Tensor, last: tuple[Tensor, Tensor], before: Tensor | None) -> Tensor:
    """Return o (N, C', H, W) for the state x (N, C, H, W), slopes (C, 2), z' and o', and o'' where there is one."""
    state, output = last
    channels = x.shape[1]
    a, b = (slope.view(-1, 1, 1) for slope in slopes.unbind(dim=1))
    moved = output[:, :channels] + a * (x - state)
    if before is not None:
        moved = moved + b * (output - before)[:, :channels]
    return torch.cat((moved, output[:, channels:]), dim=1)


class FollowedPredictions:
    """What evaluations of one batch keep for later ones that follow, by a table and its slopes (K, C, 2).

    Raises `ValueError` for a table that follows without slopes.
    """

    def __init__(self, table: ComputeTable, slopes: Tensor | None) -> None:
        self._followed = frozenset(table.followed)
        if self._followed and slopes is None:
            raise ValueError("a table in which predictions follow, without slopes")
        self._slopes, self._last = slopes, max(self._followed, default=-1)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def at(self, evaluation: int) -> bool:
        """Return whether an evaluation follows."""
        return evaluation in self._followed

    def kept(self, evaluation: int, x: Tensor, output: Tensor) -> Tensor:
        """Return the guided prediction of an evaluation in which the model was asked, kept as long as it is needed."""
        self._kept = [*self._kept, (x, output)][-2:] if evaluation < self._last else []
        return output

    def predicted(self, evaluation: int, x: Tensor) -> Tensor:
        """Return the guided prediction (N, C', H, W) of an evaluation that follows, for x (N, C, H, W)."""
        assert self._slopes is not None
        before = self._kept[-2][1] if len(self._kept) == 2 else None
        return following(self._slopes[evaluation].to(x.dtype), x, self._kept[-1], before)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.numel() * tensor.element_size() for pair in self._kept for tensor in pair)
