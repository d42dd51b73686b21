"""Round trips through all layouts that convert reads and writes keep every byte of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import here
from compressing import folder
from conftest import Pico, make_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import same_bytes
from safetensors.torch import load_file, save_file
from torch import Tensor
from upstream_code import UpstreamDiT, find_model

from ditmoe_cli import open_checkpoint
from ditmoe_cli.exporting.upstream import arguments

pytestmark = pytest.mark.usefixtures("few_tokens")

HEADS = 2


def pipeline(model: Pico, path: Path) -> Path:
    (path / "transformer").mkdir(parents=True)
    save_file(dict(model.state), path / "transformer" / "diffusion_pytorch_model.safetensors")
    (path / "model_index.json").write_text('{"_class_name": ["pipeline", "DiTMoEPipeline"]}')
    return path


# each writes a model as another program does, without our metadata
SOURCES: dict[str, Callable[[Pico, Path], Path]] = {
    "bare.pt": lambda model, path: model.save_pt(path),
    "ema.pt": lambda model, path: model.save_pt(path, "ema"),
    "train.pt": lambda model, path: model.save_pt(path, "train"),
    "legacy.pt": lambda model, path: model.save_pt(path, "module", legacy=True),
    "deepspeed": lambda model, path: model.save_pt(path, "deepspeed"),
    "pipeline": pipeline,
    "one.safetensors": lambda model, path: save_file(dict(model.state), path) or path,
}


def assert_same(found: Mapping[str, Tensor], model: Pico) -> None:
    assert found.keys() == model.state.keys()
    assert all(same_bytes(found[name], value) for name, value in model.state.items())


def converted(source: str, output: str, *words: str, cwd: Path) -> Path:
    command = "export" if "--to" in words else "convert"
    outcome = here(command, source, *words, "-o", output, cwd=cwd)
    assert outcome.code == 0, outcome.err
    assert outcome.result["bytes"] == sum(
        file.stat().st_size for file in ([cwd / output] if (cwd / output).is_file() else (cwd / output).iterdir())
    )
    return cwd / output


@st.composite
def models(draw: st.DrawFn) -> Pico:
    experts = draw(st.sampled_from([1, 2, 4, 16]))
    config: dict[str, Any] = {
        "attention": draw(st.sampled_from(["timm", "flash"])),
        "sampler": draw(st.sampled_from(["rf", "ddpm"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "experts": experts,
        "top_k": draw(st.integers(1, min(2, experts))),
        "depth": draw(st.integers(1, 2)),
        "input_size": draw(st.sampled_from([8, 64])),
        "null_class": draw(st.booleans()),
        "hidden": 16,
    }
    model = make_pico(**config)
    odd = draw(st.sampled_from(["none", "pos_embed", "negative zeros"]))
    if odd == "pos_embed":  # frozen, and so left in another dtype
        model.state["pos_embed"] = model.state["pos_embed"].to(draw(st.sampled_from([torch.float32, torch.float16])))
    if odd == "negative zeros":
        model.state["blocks.0.attn.qkv.bias" if config["attention"] == "timm" else "blocks.0.attn.Wqkv.bias"].mul_(-0.0)
    return model


@settings(max_examples=8)
@given(model=models(), source=st.sampled_from(sorted(SOURCES)), sharded=st.booleans())
def test_every_byte_survives(model: Pico, source: str, sharded: bool) -> None:
    config = model.config
    told = ("--heads", str(HEADS), "--top-k", str(config.top_k), "--sampler", config.sampler)
    told = (*told, "--num-classes", str(config.num_classes))
    shards = ("--max-shard-size", "50KB") if sharded else ()
    first, last = ("first", "last") if sharded else ("first.safetensors", "last.safetensors")
    with folder() as where:
        SOURCES[source](model, where / source)
        ours = converted(source, first, *told, *shards, cwd=where)
        upstream = converted(first, "upstream.pt", "--to", "upstream", cwd=where)
        again = converted("upstream.pt", last, *told, *shards, cwd=where)
        assert_same(find_model(upstream), model)
        UpstreamDiT(**arguments(config)).load_state_dict(find_model(upstream))
        for written in (ours, again):
            files = [written] if written.is_file() else sorted(written.glob("*.safetensors"))
            assert_same({name: value for file in files for name, value in load_file(file).items()}, model)
            assert open_checkpoint(written).config == config
        assert open_checkpoint(again).fingerprint == open_checkpoint(ours).fingerprint


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_a_dtype_is_given_to_every_layout(tmp_path: Path, source: str, dtype: str) -> None:
    """Casting what is stored in another dtype does not depend on the layout, and back again loses nothing more."""
    model = make_pico(hidden=16)
    SOURCES[source](model, tmp_path / source)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    cast = Pico(model.config, {name: value.to(wanted) for name, value in model.state.items()})
    given = ("--heads", str(HEADS))
    converted(source, "y.safetensors", *given, "--dtype", dtype, cwd=tmp_path)
    converted(source, "y.pt", *given, "--dtype", dtype, "--to", "upstream", cwd=tmp_path)
    assert_same(load_file(tmp_path / "y.safetensors"), cast)
    assert_same(find_model(tmp_path / "y.pt"), cast)
    converted("y.safetensors", "wide.safetensors", "--dtype", "fp32", cwd=tmp_path)
    converted("wide.safetensors", "back.safetensors", "--dtype", dtype, cwd=tmp_path)
    assert_same(load_file(tmp_path / "back.safetensors"), cast)


@pytest.mark.parametrize("command", [("convert",), ("export", "--to", "upstream")], ids=["convert", "export"])
@pytest.mark.parametrize("source", sorted(SOURCES))
def test_overflow_is_refused_by_tensor_in_every_layout(tmp_path: Path, source: str, command: tuple[str, ...]) -> None:
    model, name = make_pico(hidden=16), "blocks.1.moe.experts.3.down_proj.weight"
    model.state[name][0, 0] = 7e4
    SOURCES[source](model, tmp_path / source)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = (*command, source, "--heads", str(HEADS), "--dtype", "fp16")
    message = here(*words, cwd=tmp_path).error(3)
    assert f"tensor {name!r} holds 70000, beyond the 65504 that fp16 can hold; choose a wider dtype" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
