"""The files of a checkpoint are located in each of its containers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Pico
from reading import assert_holds

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.containers import locate
from ditmoe_cli.files.reader import open_reader

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(pico: Callable[..., Pico]) -> Pico:
    return pico(experts=12, hidden=16)


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
