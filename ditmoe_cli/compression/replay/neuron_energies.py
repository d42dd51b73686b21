"""CAMERA energies of experts' neurons, all measured on the same calibration tokens.

So energies of routed and shared neurons can be compared; a profile's sums cover routed neurons only, and more tokens.
The energy itself is defined in `compression.algebra.neurons`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.neurons import DEFAULT_ALPHA, energies
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.original_blocks import original_blocks
from ditmoe_cli.files.names import SHARED, in_block
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.progress import each

Energies = Mapping[str, Tensor]
"""The energies (H,) of each expert of a block, by the expert's full name."""


def measured_energies(calibrated: Calibrated) -> list[dict[str, Tensor]]:
    """Return the energies (H,) of the neurons of each block's routed and shared experts, in fp64.

    Raises `BadInputError` for a profile without states.
    """
    with original_blocks(calibrated) as blocks:
        return [
            {in_block(own.index, name): energy for name, energy in block_energies(own.block, own.attended).items()}
            for own in blocks
        ]


def block_energies(block: Block, attended: Sequence[Attended]) -> dict[str, Tensor]:
    """Return the energies (H,) of a block's experts by their names within the block, on its mixture's inputs.

    Branches have equal weight; the shared expert's routing weight is 1.
    """
    images = sum(len(part.gamma) for part in attended)
    gamma = torch.stack([part.gamma.double().square().sum(dim=0) for part in attended]).sum(dim=0) / images
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for part in each(attended, "measuring neurons", "batches of states", share=0.6):
        for name, squares in _squares(block, part.inputs.flatten(0, 1)):
            most = squares.amax(dim=0) if len(squares) else squares.new_zeros(squares.shape[1])
            sums[name] = sums.get(name, 0.0) + squares.double().sum(dim=0)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
    downs = {name: expert.down_proj.weight for name, expert in _experts(block)}
    return {name: energies(downs[name], sums[name], largest[name], gamma, DEFAULT_ALPHA).cpu() for name in sums}


def _experts(block: Block) -> Iterator[tuple[str, SwiGLU]]:
    """Yield the names of a block's experts and the experts, the shared one last."""
    for e, expert in enumerate([*block.moe.experts, block.moe.shared_experts]):
        assert isinstance(expert, SwiGLU)
        yield (f"moe.experts.{e}" if e < len(block.moe.experts) else SHARED), expert


def _squares(block: Block, u: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (g φ)² of each expert's neurons (n, H), for the n of the tokens u (T, D) that select it."""
    routing = block.moe.gate(u)
    for e, (name, expert) in enumerate(_experts(block)):
        gates = torch.ones_like(u[:, 0]) if name == SHARED else routing.gate_of(e)
        used = gates.nonzero().squeeze(1)
        yield name, (expert.neurons(u[used]) * gates[used].unsqueeze(1)).square()
