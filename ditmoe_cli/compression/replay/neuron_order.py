"""Neurons of experts in the order of their CAMERA energy, so that pieces of a matrix hold neurons that matter alike.

An expert's output is a sum over its neurons, so that rows of gate and up and columns of down may be put in any common
order without changing it.

Which weights are reordered is known from headers: torch is imported only where neurons are moved.
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

    from ditmoe_cli.compression.calibrated import Calibrated
    from ditmoe_cli.compression.computed import Computing
    from ditmoe_cli.compression.replay.neuron_energies import Energies
    from ditmoe_cli.model.dit import Block

Orders = Mapping[str, "Tensor"]
"""(H,) the old number of the neuron at each place, of each expert of a block, by its full name without a matrix."""


def expert_stem(name: str) -> str | None:
    """Return the name of the expert, routed or shared, that a weight is a matrix of; None for all other weights."""
    parts = split_name(name)
    stem, _, matrix = name.removesuffix(".weight").rpartition(".")
    known = parts.expert is not None or (parts.block is not None and stem.endswith(f".{SHARED}"))
    return stem if known and matrix in MATRICES and name.endswith(".weight") else None


def has_pieces(formats: Mapping[str, str], stem: str) -> bool:
    """Return whether formats cut a matrix of an expert into pieces."""
    own = (formats.get(f"{stem}.{matrix}.weight") for matrix in MATRICES)
    return any(fmt is not None and parse_pieces(fmt) is not None for fmt in own)


def is_ordered(stage: Formats, name: str) -> bool:
    """Return whether a weight's neurons are reordered: it is a matrix of an expert that has one in pieces."""
    stem = expert_stem(name) if stage.ordering is not None else None
    return stem is not None and has_pieces(stage.formats, stem)


def falling(energy: Tensor) -> Tensor:
    """Return the numbers of neurons by falling energy (H,); equal ones keep their order."""
    return energy.argsort(descending=True, stable=True)


def orders_of(energies: Sequence[Energies], formats: Mapping[str, str]) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders of the experts that have a matrix in pieces."""
    return [
        {stem: falling(energy) for stem, energy in block.items() if has_pieces(formats, stem)} for block in energies
    ]


def planned_orders(calibrated: Calibrated, stage: Formats) -> list[dict[str, Tensor]]:
    """Return, for each block, the orders that a stage gives to its experts; empty where it has none."""
    from ditmoe_cli.compression.replay.neuron_energies import measured_energies

    if stage.ordering is None:
        return [{} for _ in range(calibrated.checkpoint.config.depth)]
    return orders_of(measured_energies(calibrated), stage.formats)


def reorder(block: Block, index: int, orders: Orders) -> None:
    """Put the neurons of experts of block `index` in order, in place."""
    for stem, order in orders.items():
        expert = block.get_submodule(stem.removeprefix(in_block(index, "")))
        for matrix in MATRICES:
            weight = expert.get_parameter(f"{matrix}.weight")
            weight.data = in_order(weight.data, f"{stem}.{matrix}.weight", order)


def in_order(weight: Tensor, name: str, order: Tensor) -> Tensor:
    """Return the matrix `name` of an expert with its neurons in an order (H,)."""
    return weight.index_select(neuron_axis(name), order.to(weight.device))


def unrounded(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> dict[str, Tensor]:
    """Return the reordered matrices of a block that get no format, and so keep their dtype."""
    return {
        name: in_order(checkpoint.finite_tensor(name), name, order)
        for name, order in _ordered(checkpoint, stage, index, orders)
        if name not in stage.formats
    }


def _ordered(checkpoint: Checkpoint, stage: Formats, index: int, orders: Orders) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a block that are reordered, and their orders."""
    for name in checkpoint.weights:
        if split_name(name).block == index and is_ordered(stage, name):
            yield name, orders[expert_stem(name) or ""]


def encode_ordered(computing: Computing, stage: Formats) -> None:
    """Put experts' neurons in order and round their matrices to the nearest values, into the spool.

    Raises `BadInputError` for a profile without states, and for values that are not finite.
    """
    from ditmoe_cli.formats.registry import pack

    checkpoint = computing.checkpoint
    for index, orders in enumerate(planned_orders(computing, stage)):
        members = unrounded(checkpoint, stage, index, orders)
        for name, order in _ordered(checkpoint, stage, index, orders):
            if name in stage.formats:
                weight = in_order(checkpoint.finite_tensor(name), name, order)
                members |= pack(weight, checkpoint.weights[name].info, stage.formats[name])
        computing.spool.write(index, members)
