"""Uniform quantisation: what is packed, what is not, and how much it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressing import FORMATS, applied, formats_of, network, opened, outputs, pruned, quantised, state, stored
from conftest import make_pico

from ditmoe_cli.compression.plan import CompressionPlan, Formats
from ditmoe_cli.compression.precision.uniform import format_named, plan_uniform, settings_of
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.formats.registry import FORMATS as ALL_FORMATS
from ditmoe_cli.model.checkpoint import Checkpoint

WIDTH, INNER = 256, 512
BITS = (4, 8)


def wanted(checkpoint: Checkpoint) -> set[str]:
    """The expert, shared and attention matrices, by their endings."""
    endings = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    attention = ("attn.qkv.weight", "attn.proj.weight", "attn.Wqkv.weight", "attn.out_proj.weight")
    return {name for name in checkpoint.weights if name.endswith(endings + attention)}


def dequantised(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The fp32 values of packed weights, from their bytes and the two formats' definitions alone."""
    raw = {
        name: np.frombuffer(data, {"torch.uint8": "u1", "torch.int8": "i1", "torch.float32": "<f4"}[dtype]).reshape(
            shape
        )
        for name, (dtype, shape, data) in stored(checkpoint).items()
        if dtype in ("torch.uint8", "torch.int8", "torch.float32")
    }
    values = {}
    for name, weight in checkpoint.weights.items():
        if weight.format == "nf4":
            packed = raw[name].reshape(-1)
            codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
            scale = np.repeat(raw[f"{name}.absmax"], 64)[: codes.size]
            values[name] = (raw[f"{name}.quant_map"][codes] * scale).reshape(weight.info.shape)
        elif weight.format == "int8":
            scale = raw[name.removesuffix("weight") + "SCB"] / np.float32(127)
            values[name] = raw[name].astype(np.float32) * scale[:, None]
    return values


@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("bits", BITS)
def test_experts_and_attention_are_packed_and_all_else_stays(bits: int, attention: str, tmp_path: Path) -> None:
    original = opened(make_pico(attention=attention), tmp_path)
    plan = plan_uniform(original, FORMATS[bits])
    assert plan == CompressionPlan(
        "quantize",
        original.fingerprint,
        options={"uniform": True, "format": FORMATS[bits]},
        stages=(Formats(dict.fromkeys(wanted(original), FORMATS[bits])),),
    )
    packed = applied(original, plan, tmp_path / "packed.safetensors")
    assert {name for name, weight in packed.weights.items() if weight.format} == wanted(original)
    assert packed.config == original.config
    before, after = stored(original), stored(packed)
    assert all(after[name] == before[name] for name in before.keys() - wanted(original))


@pytest.mark.parametrize("first", BITS)
@pytest.mark.parametrize("second", BITS)
def test_what_is_packed_already_is_refused_by_name(first: int, second: int, tmp_path: Path) -> None:
    packed = quantised(opened(make_pico(), tmp_path), first, tmp_path / "packed.safetensors")
    smaller = pruned(packed, [(0, 1)] * 2, "ghost", tmp_path / "smaller.safetensors")
    for checkpoint in (packed, smaller):
        with pytest.raises(BadInputError, match=rf"'blocks\.0\..*is {FORMATS[first]} already"):
            plan_uniform(checkpoint, FORMATS[second])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "per_weight"), [(4, 4 + 32 / 64), (8, 8 + 32 / WIDTH)])
def test_matrices_take_the_bits_asked_for_and_their_scales(
    bits: int, per_weight: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = opened(make_pico(hidden=WIDTH, depth=1, widths=((INNER,) * 2,), dtype=dtype), tmp_path)
    packed = quantised(original, bits, tmp_path / "packed.safetensors")
    members = {name: [packed.header.tensors[m] for m in packed.weights[name].members] for name in wanted(original)}
    used = 8 * sum(info.nbytes for infos in members.values() for info in infos)
    weights = sum(original.weights[name].info.numel for name in members)
    assert per_weight <= used / weights + 0.07  # rows of down_proj are longer, so share their scale among more
    assert used / weights <= per_weight + 0.07  # NF4's table and description


@pytest.mark.parametrize(
    ("bits", "expected"),
    # NF4: measured over Gaussian blocks of 64; int8: a uniform error of a 127th of the row's largest weight,
    # about sqrt(2 ln n) deviations, over sqrt(12)
    [(4, lambda row: 0.092), (8, lambda row: math.sqrt(2 * math.log(row)) / 127 / math.sqrt(12))],  # noqa: ARG005
)
def test_gaussian_weights_lose_what_the_format_must_lose(bits: int, expected: object, tmp_path: Path) -> None:
    original = opened(make_pico(hidden=WIDTH, depth=1, widths=((4 * WIDTH,) * 2,)), tmp_path)
    packed = quantised(original, bits, tmp_path / "packed.safetensors")
    weights, approximate = state(original), dequantised(packed)
    assert approximate.keys() == wanted(original)
    for name, value in approximate.items():
        exact = weights[name].numpy()
        error = np.linalg.norm(value - exact) / np.linalg.norm(exact)
        assert error == pytest.approx(expected(exact.shape[1]), rel=0.1), name  # type: ignore[operator]


@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("bits", BITS)
def test_a_packed_network_is_that_of_its_unpacked_weights(bits: int, attention: str, tmp_path: Path) -> None:
    pico = make_pico(attention=attention)
    original = opened(pico, tmp_path)
    packed = quantised(original, bits, tmp_path / "packed.safetensors")
    unpacked = pico.with_state(**{name: torch.from_numpy(value) for name, value in dequantised(packed).items()})
    assert torch.equal(outputs(network(packed)), outputs(unpacked.model()))


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.3), (8, 0.03)])
def test_a_packed_network_stays_close_to_the_original(bits: int, limit: float, tmp_path: Path) -> None:
    # one expert a token of one: rounding cannot tip the choice
    original = opened(make_pico(hidden=64, widths=((128,),) * 2, top_k=1), tmp_path)
    exact = outputs(network(original))
    found = outputs(network(quantised(original, bits, tmp_path / "packed.safetensors")))
    error = float((found - exact).norm() / exact.norm())
    assert limit / 10 < error < limit


@pytest.mark.parametrize("bits", BITS)
def test_a_pruned_checkpoint_is_packed_as_any_other(bits: int, tmp_path: Path) -> None:
    small = pruned(opened(make_pico(), tmp_path), [(0, 3), (1, 2)], "ghost", tmp_path / "small.safetensors")
    packed = quantised(small, bits, tmp_path / "packed.safetensors")
    assert [block.mapped for block in packed.config.blocks] == [True, True]
    assert formats_of(plan_uniform(small, FORMATS[bits])).keys() == wanted(small)
    assert not {name for name in packed.weights if packed.weights[name].format} & {
        f"blocks.{i}.moe.gate.{rest}" for i in range(2) for rest in ("weight", "expert_of")
    }
    for block in range(2):
        name = f"blocks.{block}.moe.gate.expert_of"
        assert torch.equal(state(packed)[name], state(small)[name])


@pytest.mark.parametrize(
    ("kind", "bits", "fmt"),
    [
        (None, 4, "nf4"),
        (None, 8, "int8"),
        (None, 3, "int3-g64"),
        (None, 1.58, "ternary-g64"),
        ("int", 4, "int4-g64"),
        ("int", 8, "int8-g64"),
        ("fp4", None, "fp4"),
        ("ternary", None, "ternary-g64"),
    ],
)
def test_formats_by_kind_and_width(kind: str | None, bits: float | None, fmt: str) -> None:
    assert format_named(kind, bits) == fmt


@pytest.mark.parametrize(
    ("kind", "bits", "settings", "message"),
    [
        (None, None, {}, "bits is missing"),
        ("hqq", 4, {}, "format hqq"),
        ("nf4", 3, {}, "4 bits, not bits 3"),
        ("int", 7, {}, "bits 7"),
        ("int", None, {}, "bits None"),
        ("nf4", 4, {"symmetric": True}, "symmetric"),
        ("int", 4, {"double_quant": True}, "double_quant"),
        ("int", 4, {"group_size": 48}, "group_size 48"),
        ("nf4", 4, {"group_size": 32}, "group_size 32"),
    ],
    ids=str,
)
def test_formats_that_do_not_exist_are_refused(
    kind: str | None, bits: float | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        format_named(kind, bits, **settings)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_settings_make_the_name_that_they_are_read_from(name: str) -> None:
    settings = settings_of(name)
    assert format_named(settings.pop("format"), settings.pop("bits", None), **settings) == name
