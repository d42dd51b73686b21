"""Computed weights, kept in a file for each block until the writer asks for them in its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.compression.block_layout import BlockLayout
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, ROUTER, SHARED, in_block, in_expert, split_name
from ditmoe_cli.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Spool:
    """A folder of safetensors files, one for each block."""

    folder: Path

    def write(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block's tensors under their full names. Raises `OSError` where there is no room."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(block))
        except SafetensorError as error:
            raise OSError(f"{self._file(block)}: {error}; let TMPDIR name a folder with more room") from None

    def read(self, name: str) -> memoryview:
        """Return a tensor's bytes."""
        from safetensors import safe_open

        from ditmoe_cli.files.reader import tensor_bytes

        block = split_name(name).block
        assert block is not None
        with safe_open(self._file(block), "pt") as file:
            return tensor_bytes(file.get_tensor(name))

    def _file(self, block: int) -> Path:
        return self.folder / f"{block}.safetensors"


@dataclass(frozen=True)
class Computing(Calibrated):
    """The checkpoint that weights are computed from, with the profile that the plan was made with, and the spool.

    Attributes:
        spool: where computed weights wait for the writer.
    """

    spool: Spool


def as_stored(checkpoint: Checkpoint, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a computed tensor in the dtype that it is written in, on the CPU. Raises `BadInputError` on overflow."""
    stored = tensor.to("cpu", dtype)
    if tensor.is_floating_point() and not bool(stored.isfinite().all()):
        raise BadInputError(
            f"{checkpoint.path}: the computed {name!r} does not fit into {dtype}; convert the checkpoint to fp32 or "
            "bf16 first, or give ⟨no_refit⟩"
        )
    return stored


def expert_map_bytes(selects: Sequence[int]) -> bytes:
    """Return an ``expert_of`` map as it is stored."""
    return b"".join(expert.to_bytes(4, "little", signed=True) for expert in selects)


def source_dtype(checkpoint: Checkpoint, block: int, layout: BlockLayout, name: str) -> str:
    """Return the dtype of a computed tensor, named within its block: that of the weight that it comes from.

    Tensors that upstream has no name for get the dtype of the router.
    """
    expert = split_name(in_block(block, name)).expert
    if expert is not None:
        source = in_expert(block, layout.members[expert][0], split_name(in_block(block, name)).rest)
    elif name in {f"{SHARED}.{matrix}.weight" for matrix in MATRICES}:
        source = in_block(block, name)
    else:
        source = in_block(block, ROUTER)
    return checkpoint.weights[source].info.dtype
