"""The files of a checkpoint are located in each of its containers."""

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
from reading import assert_holds

from ditmoe_cli import open_checkpoint
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


def sharded(folder: Path, model: Pico, names: list[str]) -> Path:
    """Write a model divided over safetensors or pickles of these names, without an index."""
    folder.mkdir(exist_ok=True)
    tensors = list(model.state.items())
    for number, name in enumerate(names):
        part = dict(tensors[number :: len(names)])
        torch.save(part, folder / name) if name.endswith(".bin") else safetensors.torch.save_file(part, folder / name)
    return folder


SHARDS = [
    "model-0000{}-of-00003.safetensors",
    "diffusion_pytorch_model.fp16-0000{}-of-00003.safetensors",
    "diffusion_pytorch_model-0000{}-of-00003.fp16.safetensors",
    "pytorch_model-0000{}-of-00003.bin",
]


@pytest.mark.parametrize("pattern", SHARDS)
def test_shards_without_an_index_are_read_together(tmp_path: Path, model: Pico, pattern: str) -> None:
    folder = sharded(tmp_path / "x", model, [pattern.format(number) for number in (1, 2, 3)])
    assert_holds(folder, model)
    assert "without an index" in open_reader(folder)[0].layout
    (folder / pattern.format(2)).unlink()
    with pytest.raises(BadInputError, match=r"shards without an index: 2 of 3 are here.*number 2 is missing"):
        open_reader(folder)


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ("diffusion_pytorch_model.safetensors.index.fp16.json", SHARDS[1]),
        ("model.safetensors.index.json", SHARDS[0]),
        ("pytorch_model.bin.index.json", SHARDS[3]),
    ],
)
def test_indices_of_other_programs(tmp_path: Path, model: Pico, index: str, pattern: str) -> None:
    names = [pattern.format(number) for number in (1, 2, 3)]
    folder = sharded(tmp_path / "x", model, names)
    weight_map = {name: names[number % 3] for number, name in enumerate(model.state)}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_holds(folder, model)
    assert_holds(folder / index, model)


def test_a_variant_beside_the_full_weights_is_named(tmp_path: Path, model: Pico) -> None:
    folder = sharded(tmp_path / "x", model, ["diffusion_pytorch_model.safetensors"])
    half = {name: value.half() for name, value in model.state.items()}
    safetensors.torch.save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_holds(folder, model)
    assert open_reader(folder)[0].notes == (
        "diffusion_pytorch_model.safetensors is read, not diffusion_pytorch_model.fp16.safetensors beside it",
    )
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert open_reader(folder)[0].tensors["pos_embed"].dtype == "F16"


def test_averaged_files_and_folders_stand_first(tmp_path: Path, model: Pico, pico: Callable[..., Pico]) -> None:
    other = pico(experts=12, hidden=16, seed=1)
    folder = sharded(tmp_path / "x", other, ["model.safetensors"])
    sharded(folder, model, ["model.ema.safetensors"])
    assert_holds(folder, model)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    model.save(pipeline / "transformer_ema")
    other.save(pipeline / "transformer")
    assert_holds(pipeline, model)
    assert "transformer_ema/, not those in transformer/" in open_reader(pipeline)[0].notes[0]


def test_files_that_are_no_models_do_not_make_a_folder_ambiguous(tmp_path: Path, model: Pico) -> None:
    folder = sharded(tmp_path / "x", model, ["a.safetensors"])
    safetensors.torch.save_file({"images": torch.zeros(2)}, folder / "a.samples.safetensors")
    safetensors.torch.save_file({"counts": torch.zeros(2)}, folder / "a.profile.safetensors")
    torch.save({"state": {}}, folder / "optimizer.bin")
    assert_holds(folder, model)


def test_a_folder_of_one_pickle(tmp_path: Path, model: Pico) -> None:
    assert_holds(sharded(tmp_path / "x", model, ["pytorch_model.bin"]), model)


def test_a_config_beside_shards_of_another_program_is_read(tmp_path: Path, model: Pico) -> None:
    folder = sharded(tmp_path / "x", model, [SHARDS[0].format(number) for number in (1, 2, 3)])
    (folder / "config.json").write_text(json.dumps({"_class_name": "Other", "num_heads": 2, "num_experts_per_tok": 1}))
    hints = open_reader(folder)[0].hints
    assert (hints["num_heads"], hints["num_experts_per_tok"]) == (2, 1)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadInputError, match=r"config\.json.*mend or remove"):
            open_reader(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_in_the_encodings_of_editors(tmp_path: Path, model: Pico, encoding: str) -> None:
    safetensors.torch.save_file(dict(model.state), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_heads": 2}', encoding=encoding)
    assert open_reader(tmp_path)[0].hints == {"num_heads": 2}


def test_the_metadata_of_weights_outvotes_a_config_with_a_word(tmp_path: Path, model: Pico) -> None:
    folder = model.save(tmp_path / "x")
    assert open_reader(folder)[0].warnings == ()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "top_k": 1}))
    (warning,) = open_reader(folder)[0].warnings
    assert "config.json says top_k=1" in warning
    assert open_checkpoint(folder).config.top_k == 2


def test_zero3_shards_name_the_command_that_puts_them_together(tmp_path: Path, model: Pico) -> None:
    step = tmp_path / "run" / "global_step1"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("global_step1")
    part = step / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {name: torch.zeros(0) for name in model.state}}, part)
    run = step.parent
    command = f"python -m deepspeed.utils.zero_to_fp32 {run} {run}-fp32 -t global_step1, and name {run}-fp32"
    for path in (run, step, part):
        with pytest.raises(BadInputError) as caught:
            open_reader(path)
        assert command in str(caught.value)
    (run / "zero_to_fp32.py").write_text("")
    with pytest.raises(BadInputError, match=r"python \S+run/zero_to_fp32\.py"):
        open_reader(run)


def test_distributed_shards_name_the_command_that_puts_them_together(tmp_path: Path) -> None:
    (tmp_path / "x" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "x" / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(BadInputError, match=r"dcp_to_torch \S+pytorch_model_fsdp_0 "):
        open_reader(tmp_path / "x")


def test_shards_of_two_checkpoints_are_not_mixed(tmp_path: Path, model: Pico, pico: Callable[..., Pico]) -> None:
    folder = model.save(tmp_path / "x", shard_bytes=50_000)
    other = pico(experts=12, hidden=16, top_k=1).save(tmp_path / "y", shard_bytes=50_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shutil.copy(other / shard.name, shard)
    with pytest.raises(BadInputError, match="of another checkpoint"):
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
