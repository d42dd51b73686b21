"""Streams: calibration states that pass a model's blocks, as tokens x (N, P, D) under conditions c (N, D).

One block's weights are in memory at a time, beside the tokens of all states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.guided import GuidedStates, image_slices, in_branches
from ditmoe_cli.compression.replay.states import States
from ditmoe_cli.files.workfolder import Piece
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import each


@dataclass
class Stream:
    """States of all branches between two blocks: tokens x (N, P, D) and conditions c (N, D)."""

    x: Tensor
    c: Tensor

    def at(self, rows: Tensor) -> Stream:
        """Return those of some rows."""
        return Stream(self.x[rows], self.c[rows])

    def through(self, block: Block) -> Tensor:
        """Return the tokens behind a block, (N, P, D)."""
        return torch.cat([block(self.x[rows], self.c[rows], 0, None) for rows in _batches(self.x, "passing states")])

    def attended(self, block: Block) -> list[Attended]:
        """Return the states between a block's attention and its mixture, some images at a time."""
        return [block.attend(self.x[rows], self.c[rows]) for rows in _batches(self.x, "attending")]

    def go_on(self, kept: Piece | None, name: str) -> None:
        """Move the stream behind the blocks that an unfinished run has done, if any; it kept tokens x as `name`."""
        if kept is not None:
            self.x = kept.tensor(name).to(self.x.device)

    def advance(self, attended: Attended, moe: SparseMoE) -> None:
        """Add the output of a block's mixture, so that the stream is behind the block."""
        self.x = attended.residual
        for rows in _batches(self.x, "mixing"):
            mixed = moe(attended.inputs[rows], 0, attended.gamma[rows], None)
            self.x[rows] += attended.gamma[rows].unsqueeze(1) * mixed


def joined(parts: Sequence[Attended]) -> Attended:
    """Return the states of all parts."""
    return Attended(
        residual=torch.cat([part.residual for part in parts]),
        inputs=torch.cat([part.inputs for part in parts]),
        gamma=torch.cat([part.gamma for part in parts]),
    )


def _batches(states: Tensor, title: str) -> Iterator[slice]:
    return each(image_slices(len(states)), title, "batches of states")


def embedded(model: OffloadedDiTMoE, states: GuidedStates) -> Stream:
    """Return the stream of states before the first block."""
    parts = [
        model.embed(states.z[rows], states.t[rows], states.labels[rows])
        for rows in _batches(states.z, "embedding states")
    ]
    x, c = (torch.cat(column) for column in zip(*parts, strict=True))
    return Stream(x, c)


@dataclass(frozen=True)
class Tokens:
    """Tokens of one block, and the weights of their errors.

    Attributes:
        inputs: (T, D) mixture inputs u.
        weights: (T,) mean of γ² over channels, times the branch's weight, scaled to a mean of 1.
        held: (T,) whether a token is held out.
    """

    inputs: Tensor
    weights: Tensor
    held: Tensor


class CalibrationStream(Stream):
    """A stream through blocks that are compressed one after the other.

    Each block's inputs come from the already compressed blocks before it, as they will when the model runs. Tokens
    of the images `left_out` have no weight: nothing is fitted on them.
    """

    def __init__(self, model: OffloadedDiTMoE, states: States, left_out: Sequence[int] = ()) -> None:
        start = embedded(model, in_branches(states, model))
        super().__init__(start.x, start.c)
        self._held = states.held.repeat(states.branches)
        self._weights = torch.tensor(states.branch_weights).repeat_interleave(len(states))
        if left_out:
            out = torch.isin(states.images, torch.tensor(left_out, dtype=states.images.dtype))
            self._weights = self._weights * ~out.repeat(states.branches)

    def attend(self, block: Block) -> Attended:
        """Return all states between a block's attention and its mixture."""
        return joined(self.attended(block))

    def tokens(self, attended: Attended) -> Tokens:
        """Return the input tokens of a block's mixture."""
        patches = attended.inputs.shape[1]
        branch_weights = self._weights.to(attended.gamma.device)
        weights = (attended.gamma.float().square().mean(dim=1) * branch_weights).repeat_interleave(patches)
        weights = weights / weights.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return Tokens(attended.inputs.flatten(0, 1), weights, self._held.repeat_interleave(patches).to(weights.device))

    def of_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return whether each row is held out, and its branch's weight, both (rows,).

        Rows come image by image, the same number for each.
        """
        of_image = rows // len(self._held)
        held, weights = (part.repeat_interleave(of_image).to(self.x.device) for part in (self._held, self._weights))
        return held, weights
