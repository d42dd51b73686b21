"""A mix of formats tried out: all weights rounded to the nearest at once, and each block's errors on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditmoe_cli.compression.replay.amplification import Amplification, Probes, Stream, embedded, measured_states
from ditmoe_cli.compression.replay.guided import relative_error
from ditmoe_cli.compression.replay.neuron_order import Orders, reorder
from ditmoe_cli.compression.replay.rounded_layers import layers_of, rounded
from ditmoe_cli.files.names import in_block, split_name
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class Trial:
    """What a mix does.

    Attributes:
        error: relative squared error of the guided prediction, on the states that were measured on.
        amplification: of each block and kind of weight, with errors of this mix's size.
    """

    error: float
    amplification: Amplification


def trial(
    checkpoint: Checkpoint,
    profile: RoutingProfile,
    formats: Mapping[str, str],
    device: str,
    bar: ProgressBar,
    orders: Sequence[Orders] = (),
) -> Trial:
    """Round every weight to its format and see what that does to the prediction.

    With `orders`, one mapping a block, the neurons of experts are put in order first.
    """
    model = OffloadedDiTMoE(checkpoint, torch.device(device))
    with torch.inference_mode(), resident_blocks(model, bar, f"trying the plan for {checkpoint.path.name}") as blocks:
        probes = Probes(model, measured_states(checkpoint, profile, model))
        outside = {model.linear(name): fmt for name, fmt in formats.items() if split_name(name).block is None}
        with rounded(outside):
            changed = Stream(*embedded(model, probes.states))
        for index, block in blocks:
            own_formats = {n: fmt for n, fmt in formats.items() if split_name(n).block == index}
            if orders:
                reorder(block, index, orders[index])
            probes.pass_through(
                index,
                block,
                {n.removeprefix(in_block(index, "")): fmt for n, fmt in own_formats.items()},
                probes.base.through(block),
            )
            with rounded(layers_of(block, index, own_formats)):
                changed.x = changed.through(block)
        wanted = probes.predicted(probes.base)
        with rounded(outside):
            found = probes.predicted(changed)
        return Trial(relative_error(found, wanted), probes.amplification())
