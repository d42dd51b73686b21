"""Small checkpoints one of whose matrices is stored in each way that there is, and what may be wrong with its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import Pico, make_pico
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import in_block, in_expert
from ditmoe_cli.formats.differences import SvdDifference, TernaryDifference
from ditmoe_cli.formats.registry import pack

MATRIX = in_expert(0, 1, "gate_proj.weight")
BASE = in_block(0, "moe.base.gate_proj.weight")
FORMATS = ("nf4", "fp4", "nf4-dq", "fp4-dq", "int8", "int3-g32", "int4-g32-sym", "ternary-g32")
PIECES = "rows:int3-g32*16+int4-g32-sym*16+ternary-g32*32"
FAMILIES = (*FORMATS, "pieces", "svd", "ternary")


@dataclass(frozen=True)
class Stored:
    """A model, and the names of the tensors that store `MATRIX`."""

    model: Pico
    members: tuple[str, ...]


def stored_in(family: str) -> Stored:
    """Return a model whose `MATRIX` is stored in a family; as a difference, so are all of its kind in the block."""
    plain = make_pico(dtype=torch.float16)
    state = dict(plain.state)
    if family not in ("svd", "ternary"):
        weight = state.pop(MATRIX)
        info = TensorInfo(MATRIX, "F16", tuple(weight.shape))
        packed = pack(weight.float(), info, PIECES if family == "pieces" else family)
        return Stored(Pico(plain.config, {**state, **packed}), tuple(packed))
    members: tuple[str, ...] = ()
    for expert in range(plain.config.num_experts):
        name = in_expert(0, expert, "gate_proj.weight")
        weight = state.pop(name)
        state.setdefault(BASE, weight)
        difference = _difference(family, name, weight)
        state.update(difference)
        members = (BASE, *difference) if name == MATRIX else members
    return Stored(Pico(plain.config, state), members)


def _difference(family: str, name: str, weight: Tensor) -> dict[str, Tensor]:
    if family == "svd":
        return SvdDifference.pack(name, weight[:, :3].clone(), weight[:3].clone())
    return TernaryDifference.pack(name, weight.sign().to(torch.int8), 0.5)


CHANGES = ("missing", "dtype", "shape", "rank", "empty")


def changed(tensor: Tensor, change: str) -> Tensor | None:
    """Return what stands in place of a tensor; None for nothing."""
    if change == "missing":
        return None
    shapes = {"dtype": tuple(tensor.shape), "shape": (7, 7), "rank": (7, 7, 7), "empty": (0,)}
    return torch.zeros(shapes[change], dtype=torch.int16 if change == "dtype" else tensor.dtype)


def without_metadata(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write tensors as other programs do, which know nothing of ditmoe."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def with_metadata_of(source: Path, state: Mapping[str, Tensor], path: Path) -> Path:
    """Write tensors as programs do that keep the metadata of the file which they rewrite."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path
