"""Amplification of errors: the share of an error in a block that arrives in the prediction.

For each block b and kind k of weight (mixture, attention, modulation) a stream of states gets the error of rounding all
of the block's weights of that kind, and passes the rest of the model. Its amplification is

    a_bk = (Σ ‖Δ prediction‖² / Σ ‖prediction‖²) / (Σ ‖Δ stream‖² / guided tokens).

It depends on the size of the error: a small one tips tokens to other experts too, and such a token's error is not
small. So it is measured with errors of the size of interest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ditmoe_cli.compression.replay.guided import GuidedStates
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.compression.replay.tokens import ratio
from ditmoe_cli.compression.working_sizes import FEWEST_STATES, SENT_TOKENS
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.progress import each

Amplification = tuple[Mapping[str, float], ...]
"""The amplification of each block, by kind of weight."""


class ErrorStreams:
    """The original's states and, for each block and kind of weight, states that carry its error."""

    def __init__(self, model: OffloadedDiTMoE, states: GuidedStates) -> None:
        self.model, config = model, model.config
        count = max(SENT_TOKENS // (config.num_patches * states.branches), FEWEST_STATES)
        self.states = states.first(min(count, len(states.z) // states.branches))
        self.original = embedded(model, self.states)
        self._changed: dict[tuple[int, str], tuple[Stream, float]] = {}

    def pass_through(self, index: int, block: Block, formats: Mapping[str, str], after: Tensor) -> None:
        """Let all streams pass a block, and start one for each kind of the weights that are rounded.

        `formats` are by weights' names within the block; `after` are the original's tokens behind the block.
        """
        for stream, _ in each(self._changed.values(), "passing on errors", "streams", share=0.1):
            stream.x = stream.through(block)
        for kind in sorted({kind_of(name) for name in formats}):
            with rounded({linear(block, name): fmt for name, fmt in formats.items() if kind_of(name) == kind}):
                stream = Stream(self.original.through(block), self.original.c)
            self._changed[index, kind] = stream, self.states.energy(stream.x - after)
        self.original.x = after

    def state(self) -> dict[str, Tensor]:
        """Return the tokens of all streams behind the blocks passed so far, on the CPU, by name."""
        changed = {f"changed.{index}.{kind}": stream.x.cpu() for (index, kind), (stream, _) in self._changed.items()}
        return {"original": self.original.x.cpu(), **changed}

    def errors(self) -> dict[str, float]:
        """Return the error that each stream started with, by its name in `state`."""
        return {f"changed.{index}.{kind}": error for (index, kind), (_, error) in self._changed.items()}

    def go_on(self, state: Callable[[str], Tensor], errors: Mapping[str, float]) -> None:
        """Take the streams up where `state` and `errors` left them."""
        self.original.x = state("original").to(self.model.device)
        for name, error in errors.items():
            _, index, kind = name.split(".")
            self._changed[int(index), kind] = Stream(state(name).to(self.model.device), self.original.c), error

    def predicted(self, stream: Stream) -> Tensor:
        """Return the guided prediction of states that have passed all blocks."""
        return self.states.predicted(self.model, stream.x, stream.c)

    def amplification(self) -> Amplification:
        """Return the error of each stream's prediction over the error that it started with; 0 where that is 0."""
        expected = self.predicted(self.original)
        factors = [dict[str, float]() for _ in range(self.model.config.depth)]
        for (index, kind), (stream, error) in each(self._changed.items(), "predicting", "streams"):
            arrived = relative_error(self.predicted(stream), expected)
            factors[index][kind] = arrived / error if error else 0.0
        return tuple(factors)


def kind_of(name: str) -> str:
    """Return the kind of a weight, named within its block: where in the block its error enters the stream."""
    if name.startswith("attn."):
        return "attention"
    return "modulation" if name.startswith("adaLN_modulation.") else "mixture"


def relative_error(prediction: Tensor, expected: Tensor) -> float:
    """Return Σ ‖prediction - expected‖² / Σ ‖expected‖²; 0 where both are equal, also where both are 0."""
    error, reference = (float(part.double().square().sum()) for part in (prediction - expected, expected))
    return ratio(error, reference)
