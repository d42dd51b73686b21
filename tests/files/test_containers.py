"""The containers that checkpoints come in, each told apart and read, EMA first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Pico

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.containers import locate
from ditmoe_cli.files.reader import open_reader

CONTAINERS = ["bare", "ema", "model", "module", "state_dict", "train", "deepspeed"]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(pico: Callable[..., Pico]) -> Pico:
    return pico(experts=12, hidden=16)


def assert_holds(path: Path, model: Pico) -> None:
    header, reader = open_reader(path)
    assert set(header.tensors) == set(model.state)
    for name, value in model.state.items():
        found = reader.tensor(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_pickles_of_every_container(tmp_path: Path, model: Pico, container: str, legacy: bool) -> None:
    path = model.save_pt(tmp_path / "x.pt", container, legacy=legacy)
    assert_holds(path, model)
    layout = open_reader(path)[0].layout
    assert {"bare": "bare", "train": "'ema'", "deepspeed": "DeepSpeed"}.get(container, container) in layout


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrapped_names_in_pickles_and_safetensors(tmp_path: Path, model: Pico, prefix: str) -> None:
    wrapped = {prefix + name: value for name, value in model.state.items()}
    torch.save({"model": wrapped}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    safetensors.torch.save_file(wrapped, tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", model)


def test_tensors_come_in_natural_order(tmp_path: Path, model: Pico) -> None:
    torch.save(dict(sorted(model.state.items(), reverse=True)), tmp_path / "x.pt")
    names = [n for n in open_reader(tmp_path / "x.pt")[0].tensors if n.startswith("blocks.1.moe.experts")]
    experts = [int(name.split(".")[4]) for name in names]
    assert experts == sorted(experts)
    assert max(experts) == 11


def test_arguments_become_hints(tmp_path: Path, model: Pico) -> None:
    path = model.save_pt(tmp_path / "x.pt", "train", num_experts=12, image_size=64, model="DiT-S/2")
    assert open_reader(path)[0].hints == {"num_experts": 12, "image_size": 64, "model": "DiT-S/2"}
    torch.save({"ema": dict(model.state), "args": {"top_k": 1}}, tmp_path / "y.pt")
    assert open_reader(tmp_path / "y.pt")[0].hints == {"top_k": 1}


def test_an_empty_ema_is_passed_over(tmp_path: Path, model: Pico) -> None:
    torch.save({"ema": {}, "model": dict(model.state)}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


@pytest.mark.parametrize(
    "document",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        "weights",
        {},
        {"model": {}},
        {"model": {"a": torch.zeros(2), "opt": [3]}},
        {"ema": {"a": torch.zeros(2), "shadow": {}}, "model": {"a": torch.zeros(2)}},
        {"weights": {"a": torch.zeros(2)}},
        {0: torch.zeros(2)},
        {"model": {("a", 1): torch.zeros(2)}},
        None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_pickles_without_a_state_dict_are_refused(tmp_path: Path, document: object) -> None:
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"x\.pt"):
        open_reader(tmp_path / "x.pt")


def test_numbers_beside_the_averaged_weights_do_not_hide_them(tmp_path: Path) -> None:
    averaged = {"a": torch.ones(2), "decay": 0.9999, "updates": 7}
    torch.save({"ema": averaged, "model": {"a": torch.zeros(2)}, "args": "--depth 2"}, tmp_path / "x.pt")
    header, reader = open_reader(tmp_path / "x.pt")
    assert list(header.tensors) == ["a"]
    assert reader.tensor("a").tolist() == [1.0, 1.0]
    assert header.hints == {}


def test_the_keys_that_were_found_are_named(tmp_path: Path) -> None:
    torch.save({"weights": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="epoch, weights"):
        open_reader(tmp_path / "x.pt")


def test_one_safetensors_file(tmp_path: Path, model: Pico) -> None:
    safetensors.torch.save_file(dict(model.state), tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", model)
    assert locate(tmp_path / "x.safetensors").layout == "safetensors"


def test_folders_of_ours_and_of_a_diffusers_pipeline(tmp_path: Path, model: Pico) -> None:
    folder = model.save(tmp_path / "single")
    shards = model.save(tmp_path / "shards", shard_bytes=50_000)
    assert len(list(shards.glob("*.safetensors"))) > 2
    for root in (folder, shards, shards / INDEX):
        assert_holds(root, model)
    for name in ("single", "shards"):
        pipeline = tmp_path / f"pipeline-{name}"
        shutil.copytree(tmp_path / name, pipeline / "transformer")
        (pipeline / "model_index.json").write_text("{}")
        assert_holds(pipeline, model)


def test_two_checkpoints_in_a_folder_are_not_guessed_between(tmp_path: Path, model: Pico) -> None:
    for name in ("a", "b"):
        model.save(tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInputError, match="2 checkpoints"):
        locate(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, model: Pico) -> None:
    folder = model.save(tmp_path / "x", shard_bytes=50_000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BadInputError, match=lost.name):
        open_reader(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / f"{shard}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(BadInputError, match="'x' stands in another shard"):
        open_reader(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": ".."}}',
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, index: bytes) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x.safetensors").write_bytes(b"")
    (folder / INDEX).write_bytes(index)
    with pytest.raises(BadInputError, match="index"):
        open_reader(folder)


def test_a_deepspeed_step_folder_and_the_latest_of_two(tmp_path: Path, model: Pico) -> None:
    folder = model.save_pt(tmp_path / "run", "deepspeed")
    assert_holds(folder / "global_step7", model)
    (folder / "global_step3").mkdir()
    torch.save({"module": {"a": torch.zeros(1)}}, folder / "global_step3" / "mp_rank_00_model_states.pt")
    assert_holds(folder, model)


@pytest.mark.parametrize("latest", [b"global_step9", b"", b"\xff\xfe", b"a\0b"])
def test_a_deepspeed_folder_whose_latest_leads_nowhere(tmp_path: Path, model: Pico, latest: bytes) -> None:
    folder = model.save_pt(tmp_path / "run", "deepspeed")
    (folder / "latest").write_bytes(latest)
    with pytest.raises(BadInputError, match="run"):
        open_reader(folder)


def test_model_parallel_parts_are_refused(tmp_path: Path, model: Pico) -> None:
    folder = model.save_pt(tmp_path / "run", "deepspeed")
    states = folder / "global_step7"
    shutil.copy(states / "mp_rank_00_model_states.pt", states / "mp_rank_01_model_states.pt")
    with pytest.raises(BadInputError, match="2 model-parallel parts"):
        open_reader(folder)


def test_zero3_placeholders_are_explained(tmp_path: Path, model: Pico) -> None:
    torch.save({"module": {name: torch.empty(0) for name in model.state}}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="zero_to_fp32"):
        open_reader(tmp_path / "x.pt")


def test_what_is_not_there_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "empty", "pipe"):
        with pytest.raises(BadInputError, match=name):
            open_reader(tmp_path / name)


def test_a_folder_named_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "x" / "y.safetensors").mkdir(parents=True)
    with pytest.raises(BadInputError):
        open_reader(tmp_path / "x")


def test_oracles_of_upstream_are_told_apart(oracle: Callable[[str], Any]) -> None:
    assert open_reader(oracle("train-script").checkpoint)[0].layout == "'ema' of {args, ema, model, opt}"
    assert "DeepSpeed folder" in open_reader(oracle("deepspeed-dir").checkpoint)[0].layout
