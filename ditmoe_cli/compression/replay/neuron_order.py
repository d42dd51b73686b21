"""Neurons of experts in the order of their CAMERA energy, so that pieces of a matrix hold neurons that matter alike.

An expert's output is a sum over its neurons, so that rows of gate and up and columns of down may be put in any common
order without changing it.

Energies are those of `compression.algebra.neurons`, all taken on the same calibration tokens, so that those of
routed and shared neurons compare: a profile's sums, which are over more tokens, know routed neurons only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.algebra.neurons import DEFAULT_ALPHA, energies
from ditmoe_cli.compression.computed import Computing
from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.compression.replay.ordered import expert_stem, has_pieces, is_ordered
from ditmoe_cli.compression.replay.visit import visit_blocks
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.formats.pieces import neuron_axis
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.moe import SwiGLU
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile

Energies = Mapping[str, Tensor]  # (H,) of each expert of a block, by its full name without a matrix
Orders = Mapping[str, Tensor]  # the same of which neuron stands where


def neuron_energies(
    checkpoint: Checkpoint, profile: RoutingProfile, device: str, bar: ProgressBar
) -> list[dict[str, Tensor]]:
    """Return the energies (H,) of the neurons of each block's routed and shared experts, in fp64.

    Raises `BadInputError` for a profile without states.
    """

    def look(index: int, block: Block, seen: Sequence[Attended], after: Sequence[Tensor]) -> dict[str, Tensor]:
        del after
        return {in_block(index, name): energy for name, energy in block_energies(block, seen).items()}

    return visit_blocks(checkpoint, profile, device, bar, look)


def block_energies(block: Block, seen: Sequence[Attended]) -> dict[str, Tensor]:
    """Return the energies (H,) of a block's experts by their names within it, on what its mixture is given.

    Branches count alike; the shared expert's routing weight is 1.
    """
    images = sum(len(part.gamma) for part in seen)
    gamma = torch.stack([part.gamma.double().square().sum(dim=0) for part in seen]).sum(dim=0) / images
    sums: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for part in seen:
        for name, squares in _squares(block, part.inputs.flatten(0, 1)):
            most = squares.amax(dim=0) if len(squares) else squares.new_zeros(squares.shape[1])
            sums[name] = sums.get(name, 0.0) + squares.double().sum(dim=0)
            largest[name] = torch.maximum(largest[name], most) if name in largest else most
    downs = {name: expert.down_proj.weight for name, expert in _experts(block)}
    return {name: energies(downs[name], sums[name], largest[name], gamma, DEFAULT_ALPHA).cpu() for name in sums}


def _experts(block: Block) -> Iterator[tuple[str, SwiGLU]]:
    """Yield a block's experts by their names, the shared one last."""
    for e, expert in enumerate([*block.moe.experts, block.moe.shared_experts]):
        assert isinstance(expert, SwiGLU)
        yield (f"moe.experts.{e}" if e < len(block.moe.experts) else SHARED), expert


def _squares(block: Block, u: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (g φ)² of each expert's neurons (n, H), for the tokens of u (T, D) that it is given."""
    routing = block.moe.gate(u)
    for e, (name, expert) in enumerate(_experts(block)):
        gates = torch.ones_like(u[:, 0]) if name == SHARED else routing.gate_of(e)
        used = gates.nonzero().squeeze(1)
        yield name, (expert.neurons(u[used]) * gates[used].unsqueeze(1)).square()


def falling(energy: Tensor) -> Tensor:
    """Return the numbers of neurons by falling energy (H,); equal ones keep their order."""
    return energy.argsort(descending=True, stable=True)


def orders_of(energies: Sequence[Energies], formats: Mapping[str, str]) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders of the experts that have a matrix in pieces."""
    return [
        {stem: falling(energy) for stem, energy in block.items() if has_pieces(formats, stem)} for block in energies
    ]


def planned_orders(computing: Computing, stage: Formats) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders that a stage gives to its experts; empty where it has none."""
    if stage.ordering is None:
        return [{} for _ in range(computing.checkpoint.config.depth)]
    energies = neuron_energies(computing.checkpoint, computing.profile, computing.device, computing.bar)
    return orders_of(energies, stage.formats)


def reorder(block: Block, index: int, orders: Orders) -> None:
    """Put the neurons of experts of block `index` in order, in place."""
    for stem, order in orders.items():
        expert = block.get_submodule(stem.removeprefix(in_block(index, "")))
        for matrix in MATRICES:
            layer = expert.get_submodule(matrix)
            assert isinstance(layer, nn.Linear)
            layer.weight.data = in_order(layer.weight.data, f"{stem}.{matrix}.weight", order)


def in_order(weight: Tensor, name: str, order: Tensor) -> Tensor:
    """Return the matrix `name` of an expert with its neurons in an order (H,)."""
    return weight.index_select(neuron_axis(name), order.to(weight.device))


def unrounded(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> dict[str, Tensor]:
    """Return the reordered matrices of a block that keep their dtype, for they get no format."""
    return {
        name: in_order(checkpoint.finite_tensor(name), name, order)
        for name, order in _ordered(checkpoint, stage, index, orders)
        if name not in stage.formats
    }


def _ordered(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a block that are reordered, and how."""
    for name in checkpoint.weights:
        if split_name(name).block == index and is_ordered(stage, name):
            yield name, orders[expert_stem(name) or ""]


def encode_ordered(computing: Computing, stage: Formats) -> None:
    """Put experts' neurons in order and round their matrices to the nearest values, into the spool.

    Raises `BadInputError` for a profile without states, and for values that are not finite.
    """
    checkpoint = computing.checkpoint
    orders = planned_orders(computing, stage)
    for index, mine in enumerate(orders):
        members = unrounded(checkpoint, stage, index, mine)
        for name, order in _ordered(checkpoint, stage, index, mine):
            if name in stage.formats:
                weight = in_order(checkpoint.finite_tensor(name), name, order)
                members |= pack(weight, checkpoint.weights[name].info, stage.formats[name])
        computing.spool.write(index, members)
