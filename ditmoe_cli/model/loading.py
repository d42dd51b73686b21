"""Loading: the weights of a checkpoint, put into a model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights, unpacked_weights
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.embedders import sincos_position_embedding
from ditmoe_cli.model.experts import SwiGLU, reserve
from ditmoe_cli.model.gpu_memory import follows_dtype
from ditmoe_cli.progress import BYTES, phase


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    num_heads: int | None = None,
    top_k: int | None = None,
    sampler: Sampler | None = None,
    num_classes: int | None = None,
    weights_memory: int | None = None,
) -> DiTMoE:
    """Load any checkpoint that ditmoe reads or writes, ready to predict.

    Quantised weights stay packed in memory; beside them, unpacked ones are kept from the first prediction on, as far as
    `weights_memory` goes. Experts that are stored as differences are rebuilt, and take the memory of whole ones.

    Args:
        path: what `open_checkpoint` takes.
        device: of the weights.
        dtype: what attention and experts compute in, and what their weights are kept in where they are not quantised.
            Routing, norms, modulation and the stream between blocks stay fp32.
        num_heads, top_k, sampler, num_classes: as for `open_checkpoint`.
        weights_memory: bytes for unpacked weights beside the packed ones, 0 for none; half of the memory that is free
            when the model first predicts, where none is given. Predictions are the same.

    Raises:
        BadInputError: the checkpoint is missing, damaged, not a DiT-MoE, or holds NaN or infinite weights.
        ValueError: `weights_memory` is below 0.
    """
    checkpoint = open_checkpoint(path, num_heads=num_heads, top_k=top_k, sampler=sampler, num_classes=num_classes)
    return build_model(checkpoint, torch.device(device), dtype, UnpackedWeights(weights_memory))


def build_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    unpacked: UnpackedWeights | None = None,
) -> DiTMoE:
    """Put the weights of an opened checkpoint into a model, one tensor at a time.

    `unpacked` keeps what packed weights are unpacked to; without it, as much as `default_budget` says.
    """
    model = empty_model(checkpoint)
    unpacked = unpacked_weights() if unpacked is None else unpacked
    size = sum(info.nbytes for info in checkpoint.header.tensors.values())
    with phase(f"loading {checkpoint.name}", size, BYTES) as progress:
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            reserve_block(block, checkpoint, index, device, dtype)
        for weight in checkpoint.weights.values():
            assign(model, checkpoint, weight, device, dtype, unpacked)
            progress(sum(checkpoint.header.tensors[name].nbytes for name in weight.members))
    finish(model, checkpoint, device, dtype)
    return model


def empty_model(checkpoint: Checkpoint) -> DiTMoE:
    """Return a model of the checkpoint's configuration whose weights are on torch's meta device, without memory."""
    with torch.device("meta"):
        return DiTMoE(checkpoint.config)


def reserve_block(block: Block, checkpoint: Checkpoint, index: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give the experts of a block whose weights are all plain memory that they lie together in, to be filled."""

    def plain(stem: str) -> bool:
        names = (in_block(index, f"{stem}.{matrix}.weight") for matrix in MATRICES)
        return not any(checkpoint.weights[name].quantized for name in names)

    moe = block.moe
    routed = [expert for e, expert in enumerate(moe.experts) if plain(f"moe.experts.{e}")]
    reserve(cast("list[SwiGLU]", routed), device, dtype)
    if plain(SHARED):
        reserve([moe.shared_experts], device, dtype)


def finish(model: DiTMoE, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Set a model to inference in `dtype`, and rebuild its position embedding where the checkpoint has none."""
    if "pos_embed" not in checkpoint.weights:
        side = checkpoint.config.input_size // checkpoint.config.patch_size
        embedding = sincos_position_embedding(checkpoint.config.hidden_size, side)
        put(model, "pos_embed", embedding.to(device))
    model.compute_in(dtype)
    model.eval().requires_grad_(False)


def kept_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to keep a weight in: `dtype` where it follows that of the model (`follows_dtype`), else fp32."""
    return dtype if follows_dtype(name) else torch.float32


def assign(
    model: DiTMoE,
    checkpoint: Checkpoint,
    weight: Weight,
    device: torch.device,
    dtype: torch.dtype,
    unpacked: UnpackedWeights,
) -> None:
    """Read one weight into a model; a linear layer of quantised weights is replaced by a `PackedLinear`.

    Raises `BadInputError` where the weight holds NaN or infinite values, or is quantised but not of a linear layer.
    """
    name = weight.info.name
    if not weight.quantized:
        value = weight.unpack({member: checkpoint.finite_tensor(member) for member in weight.members})
        put(model, name, value.to(device, kept_in(name, dtype) if value.is_floating_point() else value.dtype))
        return
    members = {member: checkpoint.finite_tensor(member).to(device) for member in weight.members}
    module_name = name.removesuffix(".weight")
    old = model.get_submodule(module_name)
    if not isinstance(old, nn.Linear):
        raise BadInputError(
            f"{checkpoint.path}: tensor {name!r} is stored as {weight.format}, but only linear layers may be"
        )
    layer = PackedLinear(weight, members, bias=getattr(old, "bias", None) is not None, unpacked=unpacked)
    parent = model.get_submodule(module_name.rpartition(".")[0])
    setattr(parent, module_name.rpartition(".")[2], layer)
    bias = f"{module_name}.bias"
    if bias in checkpoint.weights:
        put(model, bias, checkpoint.finite_tensor(bias).to(device, kept_in(bias, dtype)))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer; device and dtype become those of `value`. Memory that is reserved is filled."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = owner._parameters.get(leaf)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    elif old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
        old.data.copy_(value)
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
