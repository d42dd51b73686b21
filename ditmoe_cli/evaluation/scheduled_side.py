"""A model that computes by a schedule, followed along the trajectory of another: on its own stream, and block by block.

Both runs begin anew with each batch and keep what they reuse: of the own stream, and of the other model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ditmoe_cli.diffusion.followed_predictions import FollowedPredictions
from ditmoe_cli.diffusion.scheduled_guidance import NullGuidance, Scheduled
from ditmoe_cli.diffusion.weak_guidance import Guidance
from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.scheduled import ScheduledRun


@dataclass(frozen=True)
class BlockOutputs:
    """What a block makes of its own stream and of the other model's, (B N, tokens, width), of the branches it has.

    `rows` are the router rows (T, k) that it selected on its own stream, -1 where it did not route; None where nowhere.
    """

    own: Tensor
    alone: Tensor
    rows: Tensor | None


class ScheduledSide:
    """A model by a schedule for one batch of `images`, asked evaluation after evaluation."""

    def __init__(self, model: DiTMoE, scheduled: Scheduled, guidance: Guidance, images: int) -> None:
        self.images = images
        self._model, self._table = model, scheduled.table
        self._own = ScheduledRun(model, scheduled.table, scheduled.statistics, self._routed)
        self._alone = ScheduledRun(model, scheduled.table, scheduled.statistics)
        self._null = NullGuidance(scheduled.table, guidance)
        self._followed = FollowedPredictions(scheduled.table, scheduled.slopes)
        self._rows: dict[int, Tensor] = {}

    @property
    def blockwise(self) -> bool:
        """Whether blocks can be told apart; not where all behind the first are reused together."""
        return self._table.residual is None

    @property
    def follows(self) -> bool:
        """Whether it is not asked in this evaluation, its prediction following the state."""
        return self._followed.at(self._own.evaluation)

    def followed(self, x: Tensor) -> Tensor:
        """Return the guided prediction (N, C', H, W) of an evaluation that follows, and go on."""
        output = self._followed.predicted(self._own.evaluation, x)
        for run in (self._own, self._alone):
            run.finish(0)
        return output

    def kept(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the guided prediction of the evaluation that was finished last, which later ones may follow."""
        return self._followed.kept(self._own.evaluation - 1, x, output)

    @property
    def branches(self) -> tuple[int, ...]:
        """The branches that it computes in this evaluation, the conditional one first."""
        if self.follows:
            return ()
        return (0, 1) if self._table.computes_null(self._own.evaluation) else (0,)

    def predict(self, x: Tensor, t: float, c: Tensor) -> Tensor:
        """Return the output for x (B N, C, H, W) under conditions c, where blocks cannot be told apart."""
        return self._own.predict(x, t, lambda _, modulate: modulate(c), self.branches)

    def block(
        self, index: int, own: Tensor, other: Tensor, conditions: tuple[Tensor, Tensor], t: float
    ) -> BlockOutputs:
        """Return what a block makes of its own stream and of the other model's under the conditions of each."""
        block, branches = cast(Block, self._model.blocks[index]), self.branches
        of_own, of_other = (block.adaLN_modulation(c) for c in conditions)
        self._rows.clear()
        made = self._own.block(index, own, of_own, t, branches)
        alone = self._alone.block(index, other, of_other, t, branches)
        return BlockOutputs(made, alone, self._all_rows(own.shape[1], branches))

    def finish(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the output from the tokens that the last block made of its own stream, and go on."""
        for run in (self._own, self._alone):
            run.finish(len(tokens))
        return self._model.unembed(tokens, c)

    def guided(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the guided output and the conditional branch of the evaluation that was finished last."""
        return self._null.guided(output, self._own.evaluation - 1)

    def _routed(self, _block: int, branches: Sequence[int], rows: Tensor) -> None:
        for branch, part in zip(branches, rows.chunk(len(branches)), strict=True):
            self._rows[branch] = part

    def _all_rows(self, tokens: int, branches: Sequence[int]) -> Tensor | None:
        """Return the router rows of all branches, -1 for one that did not route; None where none did."""
        if not self._rows:
            return None
        some = next(iter(self._rows.values()))
        none = some.new_full((self.images * tokens, some.shape[1]), -1)
        return torch.cat([self._rows.get(branch, none) for branch in branches])
