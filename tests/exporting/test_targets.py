"""What the targets promise: what a planner may choose for them, and files that bitsandbytes opens as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import documented, exact_values, mixed_pico

from ditmoe_cli.exporting import loading_code
from ditmoe_cli.exporting.choices import Choices
from ditmoe_cli.exporting.targets import TARGETS
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.model.checkpoint import open_checkpoint


def test_bitsandbytes_opens_a_layer_of_our_file(tmp_path: Path) -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    mixed_pico(("nf4", "fp4-dq", "int8", "nf4-dq"), widths=((64, 64, 128),) * 2).save(tmp_path / "a.safetensors")
    checkpoint, linear = open_checkpoint(tmp_path / "a.safetensors"), documented("With bitsandbytes")["linear"]
    assert TARGETS["bitsandbytes"].obstacle(checkpoint) is None
    expected, tried = exact_values(checkpoint), set()
    for name, weight in checkpoint.weights.items():
        if weight.format is None or weight.format in tried:
            continue
        tried.add(weight.format)
        layer = linear(tmp_path / "a.safetensors", name.removesuffix(".weight"))
        if weight.format == "int8":
            values = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        else:
            values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-7)
        inputs = torch.randn(4, weight.info.shape[1], generator=torch.Generator().manual_seed(0))
        products = inputs @ expected[name].T
        assert (layer(inputs).float() - products).norm() < 0.02 * products.norm(), weight.format
    assert tried == {"nf4", "fp4-dq", "int8", "nf4-dq"}


@pytest.mark.parametrize(
    ("target", "shape", "held"),
    [
        ("compressed-tensors", (64, 96), {"int4-g32", "int8"}),
        ("sdnq", (64, 96), {"int4-g32", "int4-g64", "ternary-g64", "int8"}),
        ("bitsandbytes", (64, 96), {"int8"}),
        ("bitsandbytes", (64, 128), {"int8", "nf4"}),
    ],
)
def test_choices_hold_what_the_layout_does(target: str, shape: tuple[int, int], held: set[str]) -> None:
    formats = {"int4-g32", "int4-g64", "ternary-g64", "int8", "nf4"}
    info = TensorInfo("x.weight", "F16", shape)
    assert {fmt for fmt in formats if TARGETS[target].choices.hold(info, fmt)} == held


def test_docs_show_the_code_of_cards() -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert all(code in text for code in (loading_code.FILL, loading_code.LINEAR))


def test_choices_restrict_where_something_is_left_out() -> None:
    assert not Choices().restrict and Choices().hold(TensorInfo("x.weight", "F16", (8, 8)), "nf4")
    assert all(target.choices.restrict for name, target in TARGETS.items() if name != "diffusers")
