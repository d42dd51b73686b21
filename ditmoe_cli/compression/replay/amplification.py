"""Amplification of errors: the share of an error in a block that arrives in the prediction.

For blocks b and kinds k of weight (mixture, attention, modulation) a stream of states gets the error of
rounding all of the block's weights of that kind, and passes the rest of the model. Its amplification is

    a_bk = (Σ ‖Δ prediction‖² / Σ ‖prediction‖²) / (Σ ‖Δ stream‖² / guided tokens)

with Δ stream measured where `compression.replay.local_errors` says. It depends on the size of the error: a small one
tips tokens to other experts too, and such a token's error is not small. So it is measured with errors of the size of
interest.

Streams start at `ANCHORS` blocks of each kind at most, evenly spaced with both ends, and amplifications between them
are interpolated on a logarithmic scale: in a model of depth L they pass some 2 L blocks a kind, where streams from all
blocks would pass L² / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.guided import GuidedStates
from ditmoe_cli.compression.replay.local_errors import Place, kind_of, place_of, residual_of, started_error
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.compression.replay.tokens import ratio
from ditmoe_cli.compression.working_sizes import ANCHORS, FEWEST_CARRYING, carrying_tokens
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import each

Amplification = tuple[Mapping[str, float], ...]
"""The amplification of each block, by kind of weight."""


def anchors(blocks: Iterable[int]) -> list[int]:
    """Return at most `ANCHORS` of the blocks, evenly spaced in their order, the first and the last among them."""
    ordered = sorted(set(blocks))
    if len(ordered) <= ANCHORS:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (ANCHORS - 1))] for i in range(ANCHORS)]


def interpolated(known: Mapping[int, float], index: int) -> float:
    """Return the value of block `index`, between the nearest known ones: geometric where both are above 0."""
    below, above = max(i for i in known if i <= index), min(i for i in known if i >= index)
    if below == above:
        return known[below]
    share = (index - below) / (above - below)
    low, high = known[below], known[above]
    if low > 0 and high > 0:
        return math.exp((1 - share) * math.log(low) + share * math.log(high))
    return (1 - share) * low + share * high


class ErrorStreams:
    """The original's states and, from anchors of each kind of weight on, some of them that carry its error.

    `rounded_weights` names all weights whose errors are sent, in any block.
    """

    def __init__(self, model: OffloadedDiTMoE, states: GuidedStates, rounded_weights: Iterable[str] = ()) -> None:
        self.model, self.states = model, states
        self.original = embedded(model, states)
        patches = model.config.num_patches
        self._rows = states.spread(carrying_tokens(patches), patches, FEWEST_CARRYING)
        self.carrying = states.at(self._rows)
        self._blocks: dict[str, set[int]] = {}
        for place in filter(None, map(place_of, rounded_weights)):
            self._blocks.setdefault(place[1], set()).add(place[0])
        self._started_at = {(b, kind) for kind, blocks in self._blocks.items() for b in anchors(blocks)}
        self._changed: dict[Place, tuple[Stream, Tensor]] = {}

    def pass_through(self, index: int, block: Block, attended: Sequence[Attended], formats: Mapping[str, str]) -> None:
        """Let all streams pass a block, and start those of the kinds of the weights that are rounded.

        `attended` is the original between the block's attention and its mixture; `formats` are by weights' names within
        the block.
        """
        for stream, _ in each(self._changed.values(), "passing on errors", "streams", share=0.1):
            stream.x = stream.through(block)
        before = self._carried(self.original)
        self.original.x = torch.cat([block.mix(part, index, None) for part in attended])
        kinds = sorted(kind for kind in {kind_of(name) for name in formats} if (index, kind) in self._started_at)
        if not kinds:
            return
        original = residual_of(attended)[self._rows], self.original.x[self._rows]
        for kind in kinds:
            with rounded({linear(block, name): fmt for name, fmt in formats.items() if kind_of(name) == kind}):
                parts = before.attended(block)
                after = torch.cat([block.mix(part, index, None) for part in parts])
            error = started_error(kind, self.carrying, parts, after, original)
            self._changed[index, kind] = Stream(after, before.c), error

    def state(self) -> dict[str, Tensor]:
        """Return the tokens of all streams behind the blocks passed so far, on the CPU, by name."""
        changed = {f"changed.{index}.{kind}": stream.x.cpu() for (index, kind), (stream, _) in self._changed.items()}
        return {"original": self.original.x.cpu(), **changed}

    def errors(self) -> dict[str, float]:
        """Return the error that each stream started with, by its name in `state`."""
        return {f"changed.{index}.{kind}": float(error) for (index, kind), (_, error) in self._changed.items()}

    def go_on(self, state: Callable[[str], Tensor], errors: Mapping[str, float]) -> None:
        """Take the streams up where `state` and `errors` left them."""
        device = self.model.device
        self.original.x = state("original").to(device)
        c = self._carried(self.original).c
        for name, error in errors.items():
            _, index, kind = name.split(".")
            started = torch.tensor(error, dtype=torch.float64, device=device)
            self._changed[int(index), kind] = Stream(state(name).to(device), c), started

    def predicted(self, stream: Stream) -> Tensor:
        """Return the guided prediction of all states, which have passed all blocks."""
        return self.states.predicted(self.model, stream.x, stream.c)

    def amplification(self) -> Amplification:
        """Return the error of each stream's prediction over the error that it started with; 0 where that is 0.

        Blocks without a stream of their own get what is interpolated.
        """
        original = self._carried(self.original)
        expected = self.carrying.predicted(self.model, original.x, original.c)
        known: dict[str, dict[int, float]] = {}
        for (index, kind), (stream, started) in each(self._changed.items(), "predicting", "streams"):
            arrived = relative_error(self.carrying.predicted(self.model, stream.x, stream.c), expected)
            error = float(started)
            known.setdefault(kind, {})[index] = arrived / error if error else 0.0
        factors = [dict[str, float]() for _ in range(self.model.config.depth)]
        for kind, measured in known.items():
            for index in self._blocks[kind]:
                factors[index][kind] = interpolated(measured, index)
        return tuple(factors)

    def _carried(self, stream: Stream) -> Stream:
        """Return those states of a stream of all that carry errors."""
        return stream.at(self._rows)


def relative_error(prediction: Tensor, expected: Tensor) -> float:
    """Return Σ ‖prediction - expected‖² / Σ ‖expected‖²; 0 where both are equal, also where both are 0."""
    error, reference = (float(part.double().square().sum()) for part in (prediction - expected, expected))
    return ratio(error, reference)
