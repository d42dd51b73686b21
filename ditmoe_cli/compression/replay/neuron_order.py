"""Neurons of experts in the order of their CAMERA energy, so that a piece of a matrix holds neurons of like energy.

An expert's output is a sum over its neurons, so any common order of the rows of gate and up and the columns of down
leaves it unchanged.

The names of reordered weights are known from headers, so torch is imported only where neurons are moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.formats.pieces import neuron_axis
from ditmoe_cli.formats.registry import parse_pieces
from ditmoe_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.compression.computed import Computing
    from ditmoe_cli.compression.replay.neuron_energies import Energies
    from ditmoe_cli.model.dit import Block

_KEPT = "orders"  # the piece of the work folder that holds the orders of all blocks
Orders = Mapping[str, "Tensor"]
"""The order (H,) of each expert of a block, the old index of the neuron at each place, by the expert's full name."""


def expert_stem(name: str) -> str | None:
    """Return the name of the expert, routed or shared, that a weight is a matrix of; None for all other weights."""
    parts = split_name(name)
    stem, _, matrix = name.removesuffix(".weight").rpartition(".")
    of_expert = parts.expert is not None or (parts.block is not None and stem.endswith(f".{SHARED}"))
    return stem if of_expert and matrix in MATRICES and name.endswith(".weight") else None


def has_pieces(formats: Mapping[str, str], stem: str) -> bool:
    """Return whether any matrix of an expert is cut into pieces."""
    own = (formats.get(f"{stem}.{matrix}.weight") for matrix in MATRICES)
    return any(fmt is not None and parse_pieces(fmt) is not None for fmt in own)


def is_ordered(stage: Formats, name: str) -> bool:
    """Return whether a weight's neurons are reordered, as in all matrices of an expert with one in pieces."""
    stem = expert_stem(name) if stage.ordering is not None else None
    return stem is not None and has_pieces(stage.formats, stem)


def falling(energy: Tensor) -> Tensor:
    """Return the indices of neurons by falling energy (H,); equal ones keep their order."""
    return energy.argsort(descending=True, stable=True)


def orders_of(energies: Sequence[Energies], formats: Mapping[str, str]) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders of the experts that have a matrix in pieces."""
    return [
        {stem: falling(energy) for stem, energy in block.items() if has_pieces(formats, stem)} for block in energies
    ]


def planned_orders(computing: Computing, stage: Formats) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders of its experts in a stage; empty where the stage has no ordering.

    They are measured once, and kept for a run that goes on.
    """
    from ditmoe_cli.compression.replay.neuron_energies import measured_energies

    depth = computing.checkpoint.config.depth
    if stage.ordering is None:
        return [{} for _ in range(depth)]
    piece = computing.work.read(_KEPT)
    if piece is None:
        orders = orders_of(measured_energies(computing), stage.formats)
        computing.work.write(_KEPT, {stem: order for block in orders for stem, order in block.items()})
        return orders
    return [
        {stem: piece.tensor(stem) for stem in piece.names if split_name(stem).block == index} for index in range(depth)
    ]


def reorder(block: Block, index: int, orders: Orders) -> None:
    """Reorder the neurons of experts of block `index`, in place."""
    for stem, order in orders.items():
        expert = block.get_submodule(stem.removeprefix(in_block(index, "")))
        for matrix in MATRICES:
            weight = expert.get_parameter(f"{matrix}.weight")
            weight.data.copy_(in_order(weight.data, f"{stem}.{matrix}.weight", order))


def in_order(weight: Tensor, name: str, order: Tensor) -> Tensor:
    """Return the matrix `name` of an expert with its neurons in the given order (H,)."""
    return weight.index_select(neuron_axis(name), order.to(weight.device))


def unrounded(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> dict[str, Tensor]:
    """Return the reordered matrices of a block that get no format, in their dtype."""
    return {
        name: in_order(checkpoint.finite_tensor(name), name, order)
        for name, order in _ordered(checkpoint, stage, index, orders)
        if name not in stage.formats
    }


def _ordered(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> Iterator[tuple[str, Tensor]]:
    """Yield the names of a block's reordered matrices, and their orders."""
    for name in checkpoint.weights:
        if split_name(name).block == index and is_ordered(stage, name):
            yield name, orders[expert_stem(name) or ""]


def encode_ordered(computing: Computing, stage: Formats) -> None:
    """Reorder experts' neurons, round their matrices to the nearest values, and keep them block by block.

    Raises `BadInputError` for a profile without states, and for values that are not finite.
    """
    from ditmoe_cli.formats.registry import pack

    checkpoint, kept = computing.checkpoint, computing.blocks
    orders = planned_orders(computing, stage)
    for index in range(kept.start, kept.total):
        members = unrounded(checkpoint, stage, index, orders[index])
        for name, order in _ordered(checkpoint, stage, index, orders[index]):
            if name in stage.formats:
                weight = in_order(checkpoint.finite_tensor(name), name, order)
                members |= pack(weight, checkpoint.weights[name].info, stage.formats[name])
        kept.keep(index, members)
