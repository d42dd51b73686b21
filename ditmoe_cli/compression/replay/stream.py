"""The student stream: calibration states on their way through blocks that are compressed one after the other.

Each block is given what the already compressed blocks below make of the states, so that it can be fitted to what it
will meet. One block's weights are in memory at a time, beside the tokens of all states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.states import States
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE

_ROWS = 64  # images that go through a block at once


@dataclass(frozen=True)
class Tokens:
    """Tokens of one block, and how much their errors matter.

    Attributes:
        inputs: (T, D) mixture inputs u.
        weights: (T,) mean of γ² over channels, times the branch's weight, scaled to a mean of 1.
        held: (T,) whether held out.
    """

    inputs: Tensor
    weights: Tensor
    held: Tensor


class Stream:
    """States between two blocks: tokens x (N, P, D) of all branches, and their conditions c (N, D)."""

    def __init__(self, model: OffloadedDiTMoE, states: States) -> None:
        branches = len(states.branch_weights)
        null = torch.full_like(states.labels, model.config.num_classes)
        labels = torch.cat([states.labels, null][:branches])
        labels = labels.to(model.device)
        z, t = (torch.cat([part] * branches).to(model.device) for part in (states.z, states.t))
        parts = [model.embed(*(part[rows] for part in (z, t, labels))) for rows in _slices(len(z))]
        self.x, self.c = (torch.cat(column) for column in zip(*parts, strict=True))
        self._held = states.held.repeat(branches)
        self._weights = torch.tensor(states.branch_weights).repeat_interleave(len(states))

    def attend(self, block: Block) -> Attended:
        """Run a block's attention on all states."""
        parts = [block.attend(self.x[rows], self.c[rows]) for rows in _slices(len(self.x))]
        columns = ([part.residual for part in parts], [part.inputs for part in parts], [part.gamma for part in parts])
        return Attended(*(torch.cat(column) for column in columns))

    def tokens(self, seen: Attended) -> Tokens:
        """Return the tokens that a block's mixture is given."""
        patches = seen.inputs.shape[1]
        weights = (seen.gamma.float().square().mean(dim=1) * self._weights.to(seen.gamma.device)).repeat_interleave(
            patches
        )
        weights = weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return Tokens(seen.inputs.flatten(0, 1), weights, self._held.repeat_interleave(patches).to(weights.device))

    def of_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return, of `rows` rows, as many an image: whether each is held out, and its branch's weight; both (rows,)."""
        each = rows // len(self._held)
        held, weights = (part.repeat_interleave(each).to(self.x.device) for part in (self._held, self._weights))
        return held, weights

    def advance(self, seen: Attended, moe: SparseMoE) -> None:
        """Add what a block's mixture makes of its inputs: the stream now stands behind the block."""
        self.x = seen.residual
        for rows in _slices(len(self.x)):
            mixed = moe(seen.inputs[rows], 0, seen.gamma[rows], None)
            self.x[rows] += seen.gamma[rows].unsqueeze(1) * mixed


def _slices(total: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, total)) for start in range(0, total, _ROWS))
