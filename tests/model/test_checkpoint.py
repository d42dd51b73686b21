"""Opening a checkpoint: lazily, by any name, with its router maps checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico

from ditmoe_cli import open_checkpoint
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.provenance import Card, Provenance
from ditmoe_cli.files.reader import SafetensorsReader
from ditmoe_cli.model.checkpoint import resolve_path
from ditmoe_cli.model.config import expected_weights


def test_our_files_need_no_assumptions(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    for number, options in enumerate(({"sampler": "rf"}, {"attention": "flash", "top_k": 1}, {"top_k": 3})):
        model = pico(**options)
        checkpoint = open_checkpoint(model.save(tmp_path / f"{number}.safetensors"))
        assert checkpoint.config == model.config
        assert checkpoint.assumptions == checkpoint.warnings == ()
        assert checkpoint.card == Card(extractor="pixels")
        assert checkpoint.provenance() == Provenance(model.config.to_json(), card=Card(extractor="pixels"))


def test_others_files_are_opened_with_what_is_given(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf", top_k=3)
    path = model.save_pt(tmp_path / "x.pt", "train")
    checkpoint = open_checkpoint(str(path), num_heads=2, top_k=3)
    assert checkpoint.config == model.config
    assert checkpoint.card == Card()
    assert checkpoint.path == path
    assert open_checkpoint(path, num_heads=4, top_k=1, sampler="ddpm").config == replace(
        model.config, num_heads=4, top_k=1, sampler="ddpm"
    )
    with pytest.raises(BadInputError, match=r"x\.pt.*heads"):
        open_checkpoint(path)


def test_opening_reads_next_to_nothing(
    tmp_path: Path, pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico(expert_of=((0, 1, -1, 2), (3, 2, 1, 0)), widths=((8,) * 3, (8,) * 4))
    path = model.save(tmp_path / "x.safetensors", provenance=Provenance({"num_heads": 2}))
    read: list[str] = []
    original = SafetensorsReader.raw

    def raw(self: SafetensorsReader, name: str) -> memoryview:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(SafetensorsReader, "raw", raw)
    assert open_checkpoint(path).config.blocks == model.config.blocks
    final = {"final_layer.linear.weight", "final_layer.linear.bias"}
    assert set(read) <= final | {name for name in model.state if name.endswith("expert_of")}


@pytest.mark.parametrize("name", ["demo:", "demo:nothing", "demo:../digits", "demo:/etc/passwd", "demo:*"])
def test_unknown_demos_are_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="no such demo"):
        resolve_path(name)


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    assert resolve_path(tmp_path / "x") == tmp_path / "x"
    assert resolve_path("not-demo:x") == Path("not-demo:x")
    with pytest.raises(BadInputError, match="no such file"):
        open_checkpoint(tmp_path / "absent.pt")


def test_router_maps(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    plain = open_checkpoint(pico().save(tmp_path / "plain.safetensors"))
    assert plain.expert_map(0) == (0, 1, 2, 3)
    maps = ((0, -1, 1, 0), (1, 0, -1, -1))
    model = pico(widths=((8, 16), (8, 8)), expert_of=maps)
    for path in (model.save(tmp_path / "mapped.safetensors"), model.save_pt(tmp_path / "mapped.pt")):
        checkpoint = open_checkpoint(path, num_heads=2)
        assert (checkpoint.expert_map(0), checkpoint.expert_map(1)) == maps
        assert checkpoint.config.blocks == model.config.blocks


@pytest.mark.parametrize("row", [-2, 2, 2**31 - 1, -(2**31)])
def test_a_map_that_names_no_expert_is_refused(tmp_path: Path, pico: Callable[..., Pico], row: int) -> None:
    model = pico(widths=((8, 16), (8, 8)), expert_of=((0, 1, 0), (0, 1, row)))
    path = model.save(tmp_path / "x.safetensors")
    with pytest.raises(BadInputError, match=rf"blocks\.1\.moe\.gate\.expert_of' holds {row}"):
        open_checkpoint(path)


def test_a_map_of_too_few_selectable_rows_is_refused(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico(widths=((8, 16), (8, 8)), expert_of=((0, 1), (1, -1)))
    path = model.save_pt(tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="top_k 2"):
        open_checkpoint(path, num_heads=2, top_k=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_values_are_refused_by_name_when_read(tmp_path: Path, pico: Callable[..., Pico], value: float) -> None:
    model, name = pico(dtype=torch.bfloat16), "blocks.1.moe.experts.2.down_proj.weight"
    model.state[name][3, 5] = value
    checkpoint = open_checkpoint(model.save(tmp_path / "x.safetensors"))
    checkpoint.finite_tensor("pos_embed")
    with pytest.raises(BadInputError, match=rf"x\.safetensors: tensor '{name}' holds NaN or infinite"):
        checkpoint.finite_tensor(name)


def test_the_order_is_natural_and_whole(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico(depth=11, widths=((4,),) * 11, top_k=1)
    checkpoint = open_checkpoint(model.save(tmp_path / "x.safetensors"))
    assert set(checkpoint.weights) == set(expected_weights(model.config))
    blocks = [int(name.split(".")[1]) for name in checkpoint.header.tensors if name.startswith("blocks.")]
    assert blocks == sorted(blocks)
