"""Layers of packed weights on a GPU: every format in every kind of layer, all of whose tensors lie there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import Pico, make_pico
from devices import TRIED_ON
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.registry import FORMATS, pack
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import load_model

pytestmark = pytest.mark.cuda

LAYERS = (
    "t_embedder.mlp.2",
    "blocks.0.attn.qkv",
    "blocks.0.attn.proj",
    "blocks.0.adaLN_modulation.1",
    "blocks.0.moe.experts.1.gate_proj",
    "blocks.0.moe.experts.1.down_proj",
    "blocks.0.moe.shared_experts.up_proj",
    *(f"blocks.1.moe.experts.{e}.{matrix}_proj" for e in range(4) for matrix in ("gate", "up", "down")),
    "final_layer.linear",
)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


def packed(fmt: str, attention: str) -> Pico:
    """A pico of which one block's experts are packed, some of the other's, and layers that have biases."""
    model = make_pico(hidden=64, attention=attention, heads=4)
    flash = {"blocks.0.attn.qkv": "blocks.0.attn.Wqkv", "blocks.0.attn.proj": "blocks.0.attn.out_proj"}
    names = {f"{flash.get(name, name) if attention == 'flash' else name}.weight" for name in LAYERS}
    assert names <= model.state.keys()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state.items():
        state |= pack(tensor, TensorInfo(name, "F32", tuple(tensor.shape)), fmt) if name in names else {name: tensor}
    return replace(model, state=state)


def on_device(model: DiTMoE, device: str = TRIED_ON) -> bool:
    """Whether all tensors of a model lie on a device."""
    return all(tensor.device.type == device for tensor in (*model.parameters(), *model.buffers()))


def predicted(model: DiTMoE) -> Tensor:
    """What a model says of noise in each class, on its device."""
    config = model.config
    x = torch.randn(4, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3)).to(model.device)
    labels = (torch.arange(4) % (config.num_classes + 1)).to(model.device)
    with torch.inference_mode():
        return model.prepared([400.0], labels)(x, 400.0).float().cpu()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fmt", FORMATS)
def test_packed_layers_are_loaded_and_multiply(tmp_path: Path, fmt: str) -> None:
    for attention in ("timm", "flash"):
        path = packed(fmt, attention).save(tmp_path / f"{attention}.safetensors")
        expected = predicted(load_model(path, num_heads=4))
        kept = 0 if attention == "timm" else None
        for dtype, tolerance in TOLERANCES.items():
            model = load_model(path, TRIED_ON, dtype, num_heads=4, weights_memory=kept)
            assert on_device(model)
            for _ in range(3):  # what is unpacked is kept from the second time on
                assert distance(predicted(model), expected) <= tolerance, (attention, dtype)


def test_packed_models_move(tmp_path: Path) -> None:
    path = packed("nf4", "timm").save(tmp_path / "a.safetensors")
    expected = predicted(load_model(path))
    moved = load_model(path).to(TRIED_ON)
    assert on_device(moved)
    assert distance(predicted(moved), expected) <= 1e-4
    back = moved.to("cpu")
    assert on_device(back, "cpu")
    assert distance(predicted(back), expected) <= 1e-6


@pytest.mark.parametrize("delta", ["svd", "ternary"])
def test_differences_are_rebuilt(tmp_path: Path, delta: str) -> None:
    make_pico(hidden=64).save(tmp_path / "a.safetensors")
    words = ("merge", "a.safetensors", "--delta", delta, "-o", "d.safetensors", "--calibration-images", 4)
    assert here(*words, cwd=tmp_path).code == 0
    expected = predicted(load_model(tmp_path / "d.safetensors"))
    model = load_model(tmp_path / "d.safetensors", TRIED_ON)
    assert on_device(model)
    assert distance(predicted(model), expected) <= 1e-4
