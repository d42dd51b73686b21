"""Computed weights, kept block by block until the writer asks for them in its own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ditmoe_cli.compression.block_layout import BlockLayout
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.casting import checked_cast
from ditmoe_cli.files.finite import all_finite
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import EXPERT_OF, MATRICES, ROUTER, SHARED, in_block, in_expert, split_name
from ditmoe_cli.files.workfolder import KeptLoop, WorkFolder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import mixture_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Computing(Calibrated):
    """The checkpoint that weights are computed from, with the profile that the plan was made with.

    Attributes:
        work: what an unfinished run has left.
        blocks: the loop over blocks; each one's weights are kept under their full names, for the writer.
    """

    work: WorkFolder
    blocks: KeptLoop


def kept_weight(blocks: KeptLoop, name: str) -> memoryview:
    """Return the bytes of a computed weight."""
    block = split_name(name).block
    assert block is not None
    return blocks.result(block).raw(name)


def as_stored(checkpoint: Checkpoint, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a computed tensor in the dtype that it is written in, on the CPU.

    Raises `BadInputError` where it holds NaN or infinite values, or does not fit its dtype (`checked_cast`). Tensors
    that are added to what an original weight gives, such as constants and differences, may round to 0.
    """
    computed = tensor.to("cpu")
    if not (computed.is_floating_point() and dtype.is_floating_point):
        return computed.to(dtype)
    if not all_finite(computed):
        raise BadInputError(f"{checkpoint.path}: the computed {name!r} holds NaN or infinite values")
    try:
        return checked_cast(computed, dtype, keeps_small=name in checkpoint.weights)
    except ValueError as error:
        raise BadInputError(
            f"{checkpoint.path}: the computed {name!r} {error}; make it wider first (ditmoe convert ⟨dtype⟩ fp32)"
        ) from None


def expert_map_bytes(selects: Sequence[int]) -> bytes:
    """Return an ``expert_of`` map as it is stored."""
    return b"".join(expert.to_bytes(4, "little", signed=True) for expert in selects)


def source_dtype(checkpoint: Checkpoint, block: int, layout: BlockLayout, name: str) -> str:
    """Return the dtype of a computed tensor, named within its block: that of the weight that it comes from.

    Tensors that upstream has no name for get the dtype of the router, but for ``expert_of``, which is int32.
    """
    if name == EXPERT_OF:
        return "I32"
    expert = split_name(in_block(block, name)).expert
    if expert is not None:
        source = in_expert(block, layout.members[expert][0], split_name(in_block(block, name)).rest)
    elif name in {f"{SHARED}.{matrix}.weight" for matrix in MATRICES}:
        source = in_block(block, name)
    else:
        source = in_block(block, ROUTER)
    return checkpoint.weights[source].info.dtype


def mixture_infos(checkpoint: Checkpoint, block: int, layout: BlockLayout) -> list[TensorInfo]:
    """Return the tensors of a mixture whose weights are computed, in the dtypes of the weights that they come from."""
    shapes = mixture_shapes(checkpoint.config.hidden_size, layout.config)
    return [
        TensorInfo(in_block(block, name), source_dtype(checkpoint, block, layout, name), shape)
        for name, shape in shapes.items()
    ]
