"""``ditmoe convert``: what it keeps of a checkpoint, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import Pico, make_pico
from safetensors.torch import load_file

from ditmoe_cli import open_checkpoint


def test_a_model_without_a_null_class_stays_one(tmp_path: Path) -> None:
    model = make_pico(null_class=False, num_classes=5)
    model.save_pt(tmp_path / "x.pt", "train", num_heads=2, class_dropout_prob=0.0)
    assert here("convert", "x.pt", "-o", "y.safetensors", cwd=tmp_path).code == 0
    pruning = ("--keep", "2", "--no-refit", "--method", "random", "-o", "z")
    assert here("prune", "y.safetensors", *pruning, cwd=tmp_path).code == 0
    for name in ("x.pt", "y.safetensors", "z"):
        config = open_checkpoint(tmp_path / name).config
        assert (config.num_classes, config.null_class) == (5, False)


@pytest.mark.parametrize(
    "line", ["sample", "profile-experts", "bench", "compare x.safetensors", "fid --ref x.safetensors"]
)
def test_guidance_without_a_null_class_is_refused_with_the_reason(tmp_path: Path, line: str) -> None:
    make_pico(null_class=False, sampler="rf").save(tmp_path / "x.safetensors")
    message = here(*line.split(), "x.safetensors", "--cfg", "1.5", cwd=tmp_path, stdin="").error(2)
    assert message.startswith("--cfg 1.5: the checkpoint was trained without class dropout and has no null class")


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = make_pico(expert_of=((0, 1, -1, 2), (0, 1, 2, 3)), widths=((8,) * 3, (8,) * 4))
    model.save(tmp_path / "x.safetensors")
    arguments = ("convert", "x.safetensors", "--dtype", name, "-o", "y.safetensors")
    predicted = here(*arguments, "--dry-run", cwd=tmp_path).result["bytes"]
    assert here(*arguments, cwd=tmp_path).result["bytes"] == predicted
    written = load_file(tmp_path / "y.safetensors")
    for weight, value in model.state.items():
        expected = value.to(dtype) if value.is_floating_point() else value
        assert written[weight].dtype == expected.dtype
        assert torch.equal(written[weight], expected)
    before, after = open_checkpoint(tmp_path / "x.safetensors"), open_checkpoint(tmp_path / "y.safetensors")
    assert after.config == before.config
    assert after.ancestors == (() if name == "fp32" else (before.fingerprint,))


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_values_beyond_fp16_are_refused_by_tensor_and_value(tmp_path: Path, value: float) -> None:
    model, name = make_pico(), "blocks.1.moe.experts.2.down_proj.weight"
    model.state[name][0, 3] = value
    model.save(tmp_path / "x.safetensors")
    message = here("convert", "x.safetensors", "--dtype", "fp16", cwd=tmp_path).error(3)
    assert name in message
    assert f"{value:g}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]
    assert here("convert", "x.safetensors", "--dtype", "bf16", cwd=tmp_path).code == 0


def test_values_too_small_for_fp16_are_refused(tmp_path: Path) -> None:
    name = "blocks.0.moe.experts.0.up_proj.weight"
    model = make_pico()
    model.state[name].mul_(1e-8)
    model.save(tmp_path / "x.safetensors")
    message = here("convert", "x.safetensors", "--dtype", "fp16", cwd=tmp_path).error(3)
    assert name in message
    assert "of its norm in fp16" in message


def test_quantised_weights_keep_their_storage(tmp_path: Path) -> None:
    make_pico(hidden=64).save(tmp_path / "x.safetensors")
    assert here("quantize", "x.safetensors", "--uniform", "--bits", "4", "-o", "q.safetensors", cwd=tmp_path).code == 0
    outcome = here("convert", "q.safetensors", "--dtype", "bf16", "-o", "y.safetensors", cwd=tmp_path)
    assert any("quantised weights stay as they are" in note for note in outcome.notes)
    before, after = load_file(tmp_path / "q.safetensors"), load_file(tmp_path / "y.safetensors")
    packed = open_checkpoint(tmp_path / "q.safetensors").weights.values()
    for weight in packed:
        for member in weight.members:
            expected = before[member] if weight.quantized else before[member].bfloat16()
            assert torch.equal(after[member], expected)


FP64 = [
    "convert",
    "quantize --uniform --bits 4",
    "quantize --uniform --format nf4",
    "quantize --uniform --format int8",
    "prune --keep 2 --no-refit",
]


@pytest.mark.parametrize("line", FP64)
def test_fp64_is_fp32_to_every_command(tmp_path: Path, line: str) -> None:
    """Values that fp32 holds give the same bytes from either file, whatever the command."""
    model = make_pico(hidden=64)
    Pico(model.config, {n: t.double() for n, t in model.state.items()}).save(tmp_path / "double.safetensors")
    model.save(tmp_path / "single.safetensors")
    method = ("--method", "random") if line.startswith("prune") else ()
    for name in ("double", "single"):
        outcome = here(*line.split(), *method, f"{name}.safetensors", "-o", f"{name}-out.safetensors", cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert ("tensors in fp64 are read as fp32" in outcome.err) == (name == "double")
    assert (tmp_path / "double-out.safetensors").read_bytes() == (tmp_path / "single-out.safetensors").read_bytes()


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_names_that_are_no_utf8(tmp_path: Path, ending: str) -> None:
    model = make_pico()
    path = tmp_path / (os.fsdecode(b"caf\xe9.") + ending)
    if ending == "pt":
        model.save_pt(path, "train", num_heads=2)
    else:
        model.save(path)
    assert open_checkpoint(path).config.depth == 2
    outcome = here("convert", path.name, "-o", "y.safetensors", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert torch.equal(load_file(tmp_path / "y.safetensors")["pos_embed"], model.state["pos_embed"])
