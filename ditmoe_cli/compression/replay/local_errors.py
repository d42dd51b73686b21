"""Errors in a block, measured where a weight's error enters the stream, so that no more than needed runs anew.

- attention: between attention and mixture, without the mixture
- modulation: behind the block, at `SENT_POSITIONS` of each image's tokens, whose attention is that of all
- mixture: behind the block

An amplification (`compression.replay.amplification`) goes with the place that its error was measured at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.guided import GuidedStates
from ditmoe_cli.compression.working_sizes import SENT_POSITIONS
from ditmoe_cli.files.names import in_block, split_name
from ditmoe_cli.model.dit import Attended, Block

Place = tuple[int, str]
"""A block, and the kind of a weight: where its error is measured."""


def place_of(name: str) -> Place | None:
    """Return where the error of a weight is measured; None for those outside the blocks, which the prediction shows."""
    block = split_name(name).block
    return None if block is None else (block, kind_of(name.removeprefix(in_block(block, ""))))


def kind_of(name: str) -> str:
    """Return the kind of a weight, named within its block."""
    if name.startswith("attn."):
        return "attention"
    return "modulation" if name.startswith("adaLN_modulation.") else "mixture"


def residual_of(parts: Sequence[Attended]) -> Tensor:
    """Return the stream between attention and mixture, (N, P, D), of some images at a time."""
    return torch.cat([part.residual for part in parts])


def positions(patches: int) -> Tensor:
    """Return the tokens of an image, in order, at which errors of the modulation are measured: the same of all images.

    An error of the modulation is the same shift, scale or gate for all tokens of an image, so few tell of it.
    """
    everywhere = torch.randperm(patches, generator=torch.Generator().manual_seed(0))
    return everywhere[:SENT_POSITIONS].sort().values


def behind(block: Block, parts: Sequence[Attended], where: Tensor) -> Tensor:
    """Return the stream behind a block at the tokens `where` (n,) of each image, (N, n, D)."""
    some = (Attended(part.residual[:, where], part.inputs[:, where], part.gamma) for part in parts)
    return torch.cat([block.mix(part, 0, None) for part in some])


def started_error(
    kind: str, states: GuidedStates, parts: Sequence[Attended], after: Tensor, original: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the error of a stream where one of `kind` is measured.

    `parts` and `after` are the changed stream between attention and mixture and behind the block, `original` the
    original's residual and tokens there.
    """
    residual, behind_original = original
    if kind == "attention":
        return states.energy(residual_of(parts) - residual)
    where = positions(after.shape[1]) if kind == "modulation" else slice(None)
    return states.energy(after[:, where] - behind_original[:, where])
