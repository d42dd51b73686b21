"""Checkpoints of every kind become the same network, and broken ones none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico

from ditmoe_cli import load_model
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.reader import dtype_code
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.registry import Format, pack
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.experts import paired, stacked
from ditmoe_cli.model.loading import empty_model
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.parameters import count_parameters, is_compressible


def output(model: DiTMoE) -> torch.Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, generator=generator)
    return model(x, torch.tensor([0.3, 0.9]), torch.tensor([0, config.num_classes])).float()


def quantized(model: Pico, formats: dict[str, Format]) -> Pico:
    """Replace weights by their packed members."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state.items():
        if name in formats:
            info = TensorInfo(name, dtype_code(value.dtype, name), tuple(value.shape))
            state.update(pack(value, info, formats[name]))
        else:
            state[name] = value
    return replace(model, state=state)


@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_every_container_gives_the_same_network(tmp_path: Path, pico: Callable[..., Pico], attention: str) -> None:
    model = pico(attention=attention, heads=4)
    expected = output(model.model())
    paths = [
        model.save(tmp_path / "x.safetensors"),
        model.save(tmp_path / "x", shard_bytes=50_000),
        model.save_pt(tmp_path / "bare.pt"),
        model.save_pt(tmp_path / "train.pt", "train"),
        model.save_pt(tmp_path / "deepspeed", "deepspeed", legacy=False),
    ]
    for path in paths:
        loaded = load_model(path, num_heads=4)
        assert loaded.config == model.config
        assert torch.equal(output(loaded), expected)
        assert not loaded.training
        assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())


OPTIONS: dict[str, dict[str, Any]] = {
    "widths": {"widths": ((8, 16, 24), (40, 8))},
    "map": {"widths": ((8, 16), (8, 8)), "expert_of": ((0, -1, 1, 0), (1, 0, -1, 1))},
    "merged below top-k": {"widths": ((8,), (8,)), "expert_of": ((0, 0, -1), (0, 0, 0))},
    "pixels": {"in_channels": 1, "sampler": "rf", "learn_sigma": True},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_compressed_shapes_load(tmp_path: Path, pico: Callable[..., Pico], case: str) -> None:
    model = pico(**OPTIONS[case])
    loaded = load_model(model.save(tmp_path / "x.safetensors"))
    assert loaded.config == model.config
    torch.testing.assert_close(output(loaded), output(model.model()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_dtypes_are_converted_on_the_way(
    tmp_path: Path, pico: Callable[..., Pico], stored: torch.dtype, computed: torch.dtype
) -> None:
    model = pico(dtype=stored, widths=((8, 8), (8, 8)), expert_of=((0, 1, -1), (1, 0, -1)))
    path = model.save(tmp_path / "x.safetensors")
    loaded = load_model(path, dtype=computed)
    assert loaded.dtype == computed
    assert loaded.blocks[0].moe.gate.expert_of.dtype == torch.int32
    assert loaded.blocks[0].moe.gate.weight.dtype == loaded.pos_embed.dtype == torch.float32
    assert loaded.blocks[0].moe.experts[0].down_proj.weight.dtype == loaded.blocks[0].attn.qkv.weight.dtype == computed
    reference = model.model().float()
    for parameter in reference.blocks.parameters():
        if parameter.ndim == 2 and parameter.shape[0] != 3:
            parameter.copy_(parameter.to(computed))
    reference.compute_in(computed)
    rounding = torch.finfo(computed).eps
    torch.testing.assert_close(output(loaded), output(reference), rtol=4 * rounding, atol=4 * rounding)


def test_low_precision_is_near_fp32_and_keeps_fp32_where_it_matters(pico: Callable[..., Pico], tmp_path: Path) -> None:
    path = pico().save(tmp_path / "x.safetensors")
    exact, rounded = (load_model(path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    seen: list[MoEEvent] = []
    x, t, y = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 700.0]),
        torch.tensor([0, 1]),
    )
    found = rounded(x, t, y, seen.append)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact(x, t, y), rtol=0.1, atol=0.05)
    assert not torch.equal(found, exact(x, t, y))
    for event in seen:
        assert event.outputs.dtype == torch.bfloat16
        assert {event.inputs.dtype, event.gamma.dtype, event.routing.probabilities.dtype} == {torch.float32}
        assert event.residual is not None and event.residual.dtype == torch.float32


def test_experts_lie_together_in_memory(pico: Callable[..., Pico], tmp_path: Path) -> None:
    moe = load_model(pico().save(tmp_path / "x.safetensors")).blocks[0].moe
    stack = stacked(list(moe.experts))
    assert stack is not None
    for e, expert in enumerate(moe.experts):
        assert torch.equal(stack.gate_up[e], torch.cat((expert.gate_proj.weight, expert.up_proj.weight)))
        assert torch.equal(stack.down[e], expert.down_proj.weight)
    assert paired(moe.shared_experts) is not None


def test_mixed_dtypes_load(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    """As upstream's first XL file had: fp32 weights, an fp16 position embedding."""
    model = pico()
    mixed = model.with_state(pos_embed=model.state["pos_embed"].half())
    loaded = load_model(mixed.save_pt(tmp_path / "x.pt"), num_heads=2)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(output(loaded), output(model.model()), rtol=1e-2, atol=1e-2)


def test_a_missing_position_embedding_is_rebuilt(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico()
    bare = model.with_state(pos_embed=None)
    for path in (bare.save(tmp_path / "x.safetensors"), bare.save_pt(tmp_path / "x.pt", "train", image_size=64)):
        loaded = load_model(path, num_heads=2)
        torch.testing.assert_close(output(loaded), output(model.model()))
    assert load_model(bare.save_pt(tmp_path / "y.pt"), num_heads=2).pos_embed.shape == (1, 256, 32)


def test_an_oracle_without_its_position_embedding(tmp_path: Path, oracle: Callable[[str], Any]) -> None:
    found = oracle("deepspeed-dir")
    reader = open_checkpoint(found.checkpoint).reader
    state = {n: reader.tensor(n) for n in open_checkpoint(found.checkpoint).weights if n != "pos_embed"}
    torch.save({"ema": state, "args": {"input_size": 16}}, tmp_path / "x.pt")
    assert "pos_embed" not in open_checkpoint(tmp_path / "x.pt").weights
    torch.testing.assert_close(output(load_model(tmp_path / "x.pt")), output(load_model(found.checkpoint)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pos_embed", float("nan")),
        ("blocks.1.moe.gate.weight", float("inf")),
        ("blocks.0.moe.experts.3.up_proj.weight", -float("inf")),
        ("x_embedder.proj.bias", float("nan")),
    ],
)
def test_broken_weights_are_refused_by_name(tmp_path: Path, pico: Callable[..., Pico], name: str, value: float) -> None:
    model = pico()
    model.state[name].view(-1)[-1] = value
    for path in (model.save(tmp_path / "x.safetensors"), model.save_pt(tmp_path / "x.pt")):
        with pytest.raises(BadInputError, match=rf"{path.name}: tensor '{name}' holds NaN or infinite"):
            load_model(path, num_heads=2)


# ------------------------------------------------------------------ quantised


@pytest.mark.parametrize(
    ("formats", "attention"), [(("nf4",), "timm"), (("int8",), "flash"), (("nf4", "int8", None), "flash")]
)
def test_quantised_checkpoints_compute_with_their_rounded_weights(
    tmp_path: Path, pico: Callable[..., Pico], attention: str, formats: tuple[Format | None, ...]
) -> None:
    model = pico(attention=attention)
    names = [info.name for info in model.infos() if is_compressible(info)]
    chosen = {name: formats[i % len(formats)] for i, name in enumerate(names)}
    packed = quantized(model, {name: fmt for name, fmt in chosen.items() if fmt})
    path = packed.save(tmp_path / "x.safetensors", provenance=Provenance(model.config.to_json()))
    assert path.stat().st_size < 0.7 * model.save(tmp_path / "whole.safetensors").stat().st_size
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == model.config
    assert count_parameters(checkpoint).total == sum(t.numel() for t in model.state.values())
    loaded = load_model(path)
    layers = {f"{n}.weight": m for n, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert {name: layer.format for name, layer in layers.items()} == {n: f for n, f in chosen.items() if f}
    rounded = replace(model, state={**model.state, **{n: layer.weight() for n, layer in layers.items()}})
    torch.testing.assert_close(output(loaded), output(rounded.model()))
    assert not torch.allclose(output(loaded), output(model.model()), rtol=1e-3)


def test_broken_scales_are_refused_by_name(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    name = "blocks.0.attn.proj.weight"
    packed = quantized(pico(), {name: "nf4"})
    packed.state[f"{name}.absmax"][1] = float("nan")
    with pytest.raises(BadInputError, match=rf"'{name}\.absmax' holds NaN"):
        load_model(packed.save(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", ["blocks.0.moe.gate.weight", "y_embedder.embedding_table.weight"])
def test_what_is_no_linear_layer_cannot_be_quantised(tmp_path: Path, pico: Callable[..., Pico], name: str) -> None:
    path = quantized(pico(), {name: "nf4"}).save(tmp_path / "x.safetensors")
    with pytest.raises(BadInputError, match=rf"'{name}'"):
        load_model(path)


def test_other_quantised_linear_layers_of_others_load(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    """Files made elsewhere may pack layers that we would leave alone."""
    model = pico()
    names = ["t_embedder.mlp.2.weight", "blocks.1.adaLN_modulation.1.weight", "final_layer.linear.weight"]
    path = quantized(model, dict.fromkeys(names, "int8")).save(tmp_path / "x.safetensors")
    loaded, expected = output(load_model(path)), output(model.model())
    assert (loaded - expected).norm() < 0.05 * expected.norm()


def test_an_empty_model_draws_nothing(
    pico: Callable[..., Pico], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normal values on the meta device make torch import its compiler, which takes seconds."""

    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("values are drawn")

    monkeypatch.setattr(torch.Tensor, "normal_", drawn)
    model = empty_model(open_checkpoint(pico().save(tmp_path / "a.safetensors")))
    assert all(parameter.is_meta for parameter in model.parameters())
