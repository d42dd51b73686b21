"""``ditmoe convert`` to and from the layouts of other programs: upstream's files and diffusers' pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import contents, here, on_terminal, piped, series
from conftest import Pico, make_pico
from safetensors.torch import load_file, save_file
from upstream_code import UpstreamDiT, find_model

from ditmoe_cli import open_checkpoint

# ------------------------------------------------------------------ to upstream


def test_upstream_loads_the_file_and_it_reads_back(tmp_path: Path) -> None:
    model = make_pico(attention="flash", sampler="rf")
    model.save(tmp_path / "x.safetensors")
    predicted = here("convert", "x.safetensors", "--to-upstream", "--dry-run", cwd=tmp_path)
    assert predicted.path == tmp_path / "x.safetensors"
    assert not (tmp_path / "x.upstream.pt").exists()
    outcome = here("convert", "x.safetensors", "--to-upstream", cwd=tmp_path)
    assert outcome.path == tmp_path / "x.upstream.pt"
    assert outcome.result["bytes"] == predicted.result["bytes"] == outcome.path.stat().st_size
    built = UpstreamDiT(**outcome.result["upstream"]["arguments"])
    built.load_state_dict(find_model(outcome.path))
    assert here("convert", "x.upstream.pt", "-o", "y.safetensors", cwd=tmp_path).code == 0
    assert (tmp_path / "y.safetensors").stat().st_size > 0
    assert (
        open_checkpoint(tmp_path / "y.safetensors").fingerprint
        == open_checkpoint(tmp_path / "x.safetensors").fingerprint
    )


def test_dry_runs_import_no_torch(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    ((outcome, heavy),) = series([("convert", "x.safetensors", "--to-upstream", "--dry-run")], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not heavy


def test_equal_work_gives_equal_bytes_and_is_not_done_twice(tmp_path: Path) -> None:
    model = make_pico()
    model.save(tmp_path / "x.safetensors")
    model.save(tmp_path / "shards", shard_bytes=20_000)
    for source in ("x.safetensors", "shards"):
        assert here("convert", source, "--to-upstream", "-o", f"{source}.pt", cwd=tmp_path).code == 0
    assert (tmp_path / "x.safetensors.pt").read_bytes() == (tmp_path / "shards.pt").read_bytes()
    before = contents(tmp_path)
    again = here("convert", "x.safetensors", "--to-upstream", "-o", "shards.pt", cwd=tmp_path)
    assert again.result["up_to_date"] is True
    assert contents(tmp_path) == before
    make_pico(seed=1).save(tmp_path / "other.safetensors")
    words = ("convert", "other.safetensors", "--to-upstream", "-o", "shards.pt")
    assert "is no copy of this input" in here(*words, cwd=tmp_path).error(5)
    assert here(*words, "--force", cwd=tmp_path).code == 0


QUANTISED = ["quantize --uniform --bits 4", "quantize --uniform --format nf4", "quantize --uniform --format int8"]


@pytest.mark.parametrize("line", QUANTISED)
def test_quantised_weights_are_written_as_the_model_sees_them(tmp_path: Path, line: str) -> None:
    make_pico(hidden=64).save(tmp_path / "x.safetensors")
    assert here(*line.split(), "x.safetensors", "-o", "q.safetensors", cwd=tmp_path).code == 0
    outcome = here("convert", "q.safetensors", "--to-upstream", "-o", "q.pt", cwd=tmp_path)
    assert any("weights are dequantised, since upstream's code loads plain ones only" in n for n in outcome.notes)
    assert here("convert", "q.safetensors", "--dequantize", "-o", "plain.safetensors", cwd=tmp_path).code == 0
    checkpoint, found = open_checkpoint(tmp_path / "q.safetensors"), find_model(tmp_path / "q.pt")
    plain = load_file(tmp_path / "plain.safetensors")
    assert found.keys() == plain.keys() == checkpoint.weights.keys()
    for name, weight in checkpoint.weights.items():
        expected = weight.unpack({member: checkpoint.reader.tensor(member) for member in weight.members})
        assert torch.equal(found[name], expected)
        assert torch.equal(plain[name], expected)
    assert open_checkpoint(tmp_path / "plain.safetensors").ancestors[-1] == checkpoint.fingerprint
    UpstreamDiT(**outcome.result["upstream"]["arguments"]).load_state_dict(found)


def test_a_dtype_goes_with_dequantised_weights(tmp_path: Path) -> None:
    make_pico(hidden=64).save(tmp_path / "x.safetensors")
    assert here(*QUANTISED[0].split(), "x.safetensors", "-o", "q.safetensors", cwd=tmp_path).code == 0
    assert here("convert", "q.safetensors", "--dequantize", "--dtype", "bf16", "-o", "b", cwd=tmp_path).code == 0
    (step,) = [s for s in open_checkpoint(tmp_path / "b").provenance().history if s.command == "convert"]
    assert step.options == {"dequantize": True, "dtype": "bf16"}
    assert {info.dtype for info in open_checkpoint(tmp_path / "b").header.tensors.values()} == {"BF16"}
    assert here("convert", "q.safetensors", "--to-upstream", "--dtype", "fp32", "-o", "b.pt", cwd=tmp_path).code == 0
    assert {value.dtype for value in find_model(tmp_path / "b.pt").values()} == {torch.float32}


def test_a_position_embedding_that_is_absent_is_rebuilt_for_upstream(tmp_path: Path) -> None:
    model = make_pico()
    model.with_state(pos_embed=None).save(tmp_path / "x.safetensors")
    outcome = here("convert", "x.safetensors", "--to-upstream", "-o", "x.pt", cwd=tmp_path)
    assert any("pos_embed is rebuilt" in note for note in outcome.notes)
    assert torch.equal(find_model(tmp_path / "x.pt")["pos_embed"], model.state["pos_embed"])


def test_ghost_rows_have_no_place_upstream(tmp_path: Path) -> None:
    model = make_pico(expert_of=((0, 1, -1, 2), (0, 1, 2, 3)), widths=((64,) * 3, (64,) * 4))
    model.save(tmp_path / "x.safetensors")
    message = here("convert", "x.safetensors", "--to-upstream", cwd=tmp_path).error(3)
    assert message.endswith("prune or merge with --router slice instead")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-o", "y.pt"), "give --to-upstream"),
        (("--to-upstream", "-o", "y.safetensors"), "name FILE.pt"),
        (("--to-upstream", "-o", "folder"), "name FILE.pt"),
        (("--to-upstream", "--max-shard-size", "1MB"), "--max-shard-size has no effect on a single file"),
        (("-o", "y.ckpt"), "checkpoints are written as"),
    ],
)
def test_names_that_do_not_fit_the_layout(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    assert said in here("convert", "x.safetensors", *words, cwd=tmp_path).error(2)


def test_broken_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = make_pico()
    model.state["final_layer.linear.bias"][3] = float("nan")
    model.save(tmp_path / "x.safetensors")
    assert "'final_layer.linear.bias' holds NaN" in here(
        "convert", "x.safetensors", "--to-upstream", cwd=tmp_path
    ).error(3)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_table_tells_how_to_build_it(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    _, text = on_terminal("convert", "x.safetensors", "--to-upstream", cwd=tmp_path)
    assert "it has no model of width 32, depth 2, patch 2 and 2 heads; build it as DiT(input_size=8" in text


# ------------------------------------------------------------------ from diffusers


def pipeline(folder: Path, model: Pico, scheduler: str | None, in_index: bool = False, **config: Any) -> Path:
    """Write a folder as the diffusers port of DiT-MoE does: its converter's files, without code and VAE."""
    settings = {
        "_class_name": "DiTMoETransformer2DModel",
        "input_size": model.config.input_size,
        "in_channels": model.config.in_channels,
        "class_dropout_prob": 0.1,
        "num_classes": model.config.num_classes,
        "num_experts": model.config.num_experts,
        "num_experts_per_tok": model.config.top_k,
        "pretraining_tp": 2,
        "use_flash_attn": model.config.attention == "flash",
        "learn_sigma": True,
        "depth": model.config.depth,
        "hidden_size": model.config.hidden_size,
        "patch_size": model.config.patch_size,
        "num_heads": model.config.num_heads,
    }
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(settings | config))
    save_file(dict(model.state), folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "DiTMoEPipeline"],
        "transformer": ["transformer_dit_moe", "DiTMoETransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {"0": "tench"},
    }
    if scheduler is not None and in_index:
        index["scheduler"] = ["diffusers", scheduler]
    elif scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


FLOW, DIFFUSION = "DiTMoEFlowMatchScheduler", "DDIMScheduler"


@pytest.mark.parametrize("option", [(), ("--from-diffusers",)])
@pytest.mark.parametrize("in_index", [False, True])
@pytest.mark.parametrize(("family", "scheduler"), [("rf", FLOW), ("ddpm", DIFFUSION)])
def test_a_pipelines_folder_needs_nothing_more(
    tmp_path: Path, family: str, scheduler: str, in_index: bool, option: tuple[str, ...]
) -> None:
    model = make_pico(sampler=family)
    pipeline(tmp_path / "DiT-MoE-S-8E2A", model, scheduler, in_index)
    outcome = here("convert", "DiT-MoE-S-8E2A", *option, cwd=tmp_path)
    assert outcome.path == tmp_path / "DiT-MoE-S-8E2A.converted.safetensors"
    assert "warning" not in outcome.err
    assert f"assuming sampler {family}: the pipeline's scheduler is {scheduler}" in outcome.err
    written = load_file(outcome.path)
    assert written.keys() == model.state.keys()
    assert all(torch.equal(written[name], value) for name, value in model.state.items())
    assert open_checkpoint(outcome.path).config == model.config


@pytest.mark.parametrize(
    ("family", "scheduler", "taken"),
    [
        ("rf", DIFFUSION, "rf"),
        ("ddpm", FLOW, "rf"),
        ("rf", "FlowMatchEulerDiscreteScheduler", "rf"),
        ("ddpm", "X", "ddpm"),
    ],
)
def test_a_scheduler_that_the_weights_contradict_is_named(
    tmp_path: Path, family: str, scheduler: str, taken: str
) -> None:
    """The port writes a DDIM scheduler unless told otherwise, whatever the weights; a flow may go on from DDPM's."""
    pipeline(tmp_path / "p", make_pico(sampler=family), scheduler)
    outcome = here("convert", "p", "-o", "y.safetensors", cwd=tmp_path)
    assert open_checkpoint(tmp_path / "y.safetensors").config.sampler == taken
    told = f"warning: the pipeline's scheduler is {scheduler}, but the sigma rows" in outcome.err
    assert told == ((family, scheduler) in [("rf", DIFFUSION), ("ddpm", FLOW)])


def test_settings_that_the_port_gets_wrong_are_named_and_ignored(tmp_path: Path) -> None:
    """Its converter writes eight experts and the shape of XL unless told otherwise."""
    model = make_pico(attention="flash", experts=16, sampler="rf")
    pipeline(tmp_path / "p", model, FLOW, num_experts=8, depth=28, hidden_size=1152, num_heads=16)
    outcome = here("convert", "p", "--from-diffusers", "-o", "y.safetensors", cwd=tmp_path)
    assert open_checkpoint(tmp_path / "y.safetensors").config == model.config
    assert "num_experts=8 is ignored: it is 16" in outcome.err


def test_the_pipelines_weights_are_read_though_others_stand_in_its_folder(tmp_path: Path) -> None:
    model, other = make_pico(), make_pico(seed=1)
    pipeline(tmp_path / "p", model, DIFFUSION)
    other.save(tmp_path / "p" / "mine.safetensors")
    for option, expected in ((("--from-diffusers",), model), ((), other)):
        assert here("convert", "p", *option, "--force", "-o", "y.safetensors", cwd=tmp_path).code == 0
        assert torch.equal(load_file(tmp_path / "y.safetensors")["pos_embed"], model.state["pos_embed"])
        name = "final_layer.linear.weight"
        assert torch.equal(load_file(tmp_path / "y.safetensors")[name], expected.state[name])


@pytest.mark.parametrize("path", ["p/transformer", "p/transformer/diffusion_pytorch_model.safetensors"])
def test_a_pipelines_inner_paths_tell_the_sampler_too(tmp_path: Path, path: str) -> None:
    pipeline(tmp_path / "p", make_pico(learn_sigma=False), DIFFUSION)
    assert open_checkpoint(tmp_path / path).config.sampler == "ddpm"


def test_what_is_no_pipeline_is_refused_as_one(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "x.safetensors")
    message = here("convert", "x.safetensors", "--from-diffusers", cwd=tmp_path).error(3)
    assert message.endswith("leave --from-diffusers out, which reads any layout")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"_class_name": 3}', '{"scheduler": "x"}', '{"scheduler": []}'])
def test_a_scheduler_that_cannot_be_read_tells_nothing(tmp_path: Path, text: str) -> None:
    pipeline(tmp_path / "p", make_pico(), DIFFUSION)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (tmp_path / "p" / name).write_text(text)
    assert open_checkpoint(tmp_path / "p").config.sampler == "ddpm"


def test_a_pipeline_goes_to_upstream_and_through_a_pipe(tmp_path: Path) -> None:
    model = make_pico(sampler="rf")
    pipeline(tmp_path / "p", model, FLOW)
    outcome = piped("ditmoe convert p --from-diffusers --to-upstream | ditmoe convert -o z.safetensors", tmp_path)
    assert outcome.path == tmp_path / "z.safetensors"
    found = find_model(tmp_path / "p.upstream.pt")
    assert all(torch.equal(found[name], value) for name, value in model.state.items())
    assert open_checkpoint(tmp_path / "z.safetensors").config == model.config


def test_the_input_is_no_target(tmp_path: Path) -> None:
    make_pico().save_pt(tmp_path / "x.pt")
    words = ("convert", "x.pt", "--heads", "2", "--to-upstream", "-o", "x.pt", "--force")
    before = contents(tmp_path)
    assert "is the input itself" in here(*words, cwd=tmp_path).error(5)
    assert contents(tmp_path) == before
