"""Trials of a mix of formats: all weights rounded to the nearest at once, and the errors of each block alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.amplification import Amplification, ErrorStreams, relative_error
from ditmoe_cli.compression.replay.guided import measured_states
from ditmoe_cli.compression.replay.neuron_order import Orders, reorder
from ditmoe_cli.compression.replay.rounded_layers import layers_of, rounded
from ditmoe_cli.compression.replay.stream import embedded
from ditmoe_cli.files.names import in_block, split_name
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks


@dataclass(frozen=True)
class Trial:
    """The measured errors of a mix.

    Attributes:
        error: relative squared error of the guided prediction, on `measured_states`.
        amplification: amplification of each block and kind of weight, at errors of this mix's size.
    """

    error: float
    amplification: Amplification


def try_formats(calibrated: Calibrated, formats: Mapping[str, str], orders: Sequence[Orders] = ()) -> Trial:
    """Return the errors of rounding every weight to its format.

    With `orders`, one mapping per block, the neurons of experts are put in order first. Raises `BadInputError` for a
    profile without states.
    """
    checkpoint = calibrated.checkpoint
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device))
    with resident_blocks(model, f"trying the plan for {checkpoint.path.name}") as blocks:
        streams = ErrorStreams(model, measured_states(calibrated, model))
        outside = {model.linear(name): fmt for name, fmt in formats.items() if split_name(name).block is None}
        with rounded(outside):
            changed = embedded(model, streams.states)
        for index, block in blocks:
            own_formats = {name: fmt for name, fmt in formats.items() if split_name(name).block == index}
            if orders:
                reorder(block, index, orders[index])
            within_block = {name.removeprefix(in_block(index, "")): fmt for name, fmt in own_formats.items()}
            streams.pass_through(index, block, within_block, streams.original.through(block))
            with rounded(layers_of(block, index, own_formats)):
                changed.x = changed.through(block)
        expected = streams.predicted(streams.original)
        with rounded(outside):
            prediction = streams.predicted(changed)
        return Trial(relative_error(prediction, expected), streams.amplification())
