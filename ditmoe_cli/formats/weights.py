"""Stored tensors grouped into the weights that the model sees, by names, dtypes and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import RawBytes, Weight
from ditmoe_cli.formats.pieces import is_piece, join_pieces
from ditmoe_cli.formats.registry import FAMILIES


def logical_weights(tensors: Mapping[str, TensorInfo], raw: RawBytes) -> dict[str, Weight]:
    """Group stored tensors into the weights the model sees.

    `raw(name)` returns a stored tensor's bytes; only small descriptions (JSON and shapes) are read.

    Raises `BadInputError` that names a tensor where what stores a weight is incomplete, or does not fit together.
    """
    packed: dict[str, Weight] = {}
    taken: set[str] = set()
    for name in tensors:
        weight = None if name in taken else _weight_of_member(name, tensors, raw)
        if weight is None:
            continue
        if packed.setdefault(weight.info.name, weight) != weight:
            raise BadInputError(f"the weight {weight.info.name!r} is stored twice, in different formats")
        taken.update(weight.members)
    packed = join_pieces(packed)
    for name, weight in packed.items():
        if name in tensors and name not in weight.members:
            raise BadInputError(f"tensor {name!r} stands beside {weight.members[0]!r}, which stores the same weight")
    plain = {name: Weight(info, None, (name,)) for name, info in tensors.items() if name not in taken}
    loose = next((name for name in plain if is_piece(name)), None)
    if loose is not None:
        raise BadInputError(f"tensor {loose!r} is named as a piece of a weight, but is not packed as one")
    return packed | plain


def _weight_of_member(name: str, tensors: Mapping[str, TensorInfo], raw: RawBytes) -> Weight | None:
    """Return the weight that the stored tensor `name` is a member of; None where no format takes it for one."""
    weights = (family.find(name, tensors, raw) for family in FAMILIES)
    return next((weight for weight in weights if weight is not None), None)
