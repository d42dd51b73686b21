"""States with a known error on their way to the prediction: how much of an error in a block arrives there.

For each block b and kind k of weight (mixture, attention, modulation) a stream of states is given the error of rounding
all of a block's weights of that kind, and goes through the rest of the model. Its amplification is

    a_bk = (Σ ‖Δ prediction‖² / Σ ‖prediction‖²) / (Σ ‖Δ stream‖² / guided tokens).

It depends on how large the error is: a small one tips tokens to other experts too, and such a token's error is not
small. So it has to be measured with errors of the size that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.guided import Conditions, conditions, relative_error, slices
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.states import calibration_states
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile

PROBED_TOKENS = 4_096  # of the streams that carry an error to the end
FEWEST_STATES = 16
TOKENS = 16_384  # that errors in a block are replayed on, of all branches

Amplification = tuple[Mapping[str, float], ...]  # of each block, by kind of weight


def measured_states(checkpoint: Checkpoint, profile: RoutingProfile, model: OffloadedDiTMoE) -> Conditions:
    """Return the states that errors are measured on, in all branches."""
    spec = profiled_spec(profile.calibration, checkpoint)
    branches = 1 if spec.cfg == 1.0 else 2
    wanted = max(TOKENS // (checkpoint.config.num_patches * branches), FEWEST_STATES)
    return conditions(model, calibration_states(profile, spec, wanted), spec)


def embedded(model: OffloadedDiTMoE, states: Conditions) -> tuple[Tensor, Tensor]:
    """Return what the first block is given of states: tokens (N, P, D) and conditions (N, D)."""
    parts = [model.embed(states.z[r], states.t[r], states.labels[r]) for r in slices(len(states.z))]
    x, c = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, c


@dataclass
class Stream:
    """States on their way: tokens x (N, P, D) under conditions c (N, D)."""

    x: Tensor
    c: Tensor

    def through(self, block: Block) -> Tensor:
        """Return what a block makes of them."""
        return torch.cat([block(self.x[rows], self.c[rows], 0, None) for rows in slices(len(self.x))])


class Probes:
    """The original's states and, for each block and kind of weight, those that carry its error."""

    def __init__(self, model: OffloadedDiTMoE, states: Conditions) -> None:
        self.model, config = model, model.config
        count = max(PROBED_TOKENS // (config.num_patches * states.branches), FEWEST_STATES)
        self.states = states.first(min(count, len(states.z) // states.branches))
        self.base = Stream(*embedded(model, self.states))
        self._sent: dict[tuple[int, str], tuple[Stream, float]] = {}

    def pass_through(self, index: int, block: Block, formats: Mapping[str, str], after: Tensor) -> None:
        """Let all streams pass a block, and start one for each kind of the weights that are rounded.

        `formats` are by names within the block, `after` what it makes of the original's states.
        """
        for stream, _ in self._sent.values():
            stream.x = stream.through(block)
        for kind in sorted({kind_of(name) for name in formats}):
            with rounded({linear(block, name): fmt for name, fmt in formats.items() if kind_of(name) == kind}):
                stream = Stream(self.base.through(block), self.base.c)
            self._sent[index, kind] = stream, self.states.energy(stream.x - after)
        self.base.x = after

    def predicted(self, stream: Stream) -> Tensor:
        """Return the guided prediction of states that have passed all blocks."""
        return self.states.predicted(self.model, stream.x, stream.c)

    def amplification(self) -> Amplification:
        """Return what arrived of each error, over what it was; 0 of none."""
        wanted = self.predicted(self.base)
        found = [dict[str, float]() for _ in range(self.model.config.depth)]
        for (index, kind), (stream, local) in self._sent.items():
            arrived = relative_error(self.predicted(stream), wanted)
            found[index][kind] = arrived / local if local else 0.0
        return tuple(found)


def kind_of(name: str) -> str:
    """Return the kind of a weight, named within its block: where in the block its error enters the stream."""
    if name.startswith("attn."):
        return "attention"
    return "modulation" if name.startswith("adaLN_modulation.") else "mixture"
