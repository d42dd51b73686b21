"""``ditmoe convert`` from the folders of diffusers pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import here
from conftest import Pico, make_pico
from safetensors.torch import load_file, save_file

from ditmoe_cli import open_checkpoint


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
