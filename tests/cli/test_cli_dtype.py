"""``--dtype``: every command that runs the model computes in it, records it, and mixes none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import make_pico
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditmoe_cli.api import devices
from ditmoe_cli.evaluation.samples import read_origin
from ditmoe_cli.routing.profile import read_profile

pytestmark = pytest.mark.usefixtures("few_tokens")

SHORT = ("--images", "6", "--steps", "2", "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtypes")
    make_pico(sampler="rf", in_channels=1, learn_sigma=False).save(folder / "a.safetensors")
    for dtype in ("fp32", "bf16"):
        done = here("sample", "a.safetensors", *SHORT, "--dtype", dtype, "-o", f"{dtype}.safetensors", cwd=folder)
        assert done.code == 0, done.err
    return folder


def test_samples_record_their_dtype_and_are_near(folder: Path) -> None:
    origins = {dtype: read_origin(folder / f"{dtype}.safetensors") for dtype in ("fp32", "bf16")}
    assert [origin and origin.spec.dtype for origin in origins.values()] == ["fp32", "bf16"]
    exact, rounded = (load_file(folder / f"{dtype}.safetensors") for dtype in ("fp32", "bf16"))
    (name,) = {"images", "latents"} & exact.keys()
    difference = (exact[name].float() - rounded[name].float()).norm() / exact[name].float().norm()
    assert 0 < float(difference) < 0.1


def test_a_score_refuses_samples_of_two_dtypes(folder: Path) -> None:
    ours, theirs = "fp32.safetensors", "bf16.safetensors"
    refused = here("fid", ours, "--ref", theirs, "--extractor", "pixels", "--quiet", cwd=folder)
    assert refused.code == 3
    assert "dtype bf16 there, fp32 here" in refused.err
    assert here("fid", ours, "--ref", ours, "--extractor", "pixels", "--quiet", cwd=folder).code == 0


def test_default_names_tell_the_dtype(folder: Path) -> None:
    done = here("sample", "a.safetensors", *SHORT, "--dtype", "bf16", cwd=folder)
    assert done.code == 0, done.err
    assert (folder / "a.samples-images6-steps2-bf16.safetensors").is_file()


def test_profiles_record_it_and_plans_compute_in_it(folder: Path) -> None:
    done = here("profile-experts", "a.safetensors", *SHORT, "--dtype", "bf16", "-o", "p.safetensors", cwd=folder)
    assert done.code == 0, done.err
    assert read_profile(folder / "p.safetensors").calibration["dtype"] == "bf16"
    words = ("prune", "a.safetensors", "--keep", "0.5", "--profile", "p.safetensors", "--quiet")
    refused = here(*words, "--dtype", "fp32", "-o", "b.safetensors", cwd=folder)
    assert refused.code == 2
    assert "--dtype fp32: the profile was made with bf16" in refused.err
    for dtype in ("bf16", "auto"):
        assert here(*words, "--dtype", dtype, "-o", f"{dtype}.pruned.safetensors", cwd=folder).code == 0
    kept, again = (load_file(folder / f"{dtype}.pruned.safetensors") for dtype in ("bf16", "auto"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    original = load_file(folder / "a.safetensors")
    assert torch.equal(kept["blocks.0.attn.qkv.weight"], original["blocks.0.attn.qkv.weight"]), (
        "weights are not rounded"
    )


def test_a_plan_without_a_profile_takes_no_dtype(folder: Path) -> None:
    words = ("quantize", "a.safetensors", "--uniform", "--format", "nf4", "-o", "q.safetensors", "--quiet")
    refused = here(*words, "--dtype", "bf16", cwd=folder)
    assert refused.code == 2
    assert "--dtype has no effect" in refused.err


def test_auto_is_chosen_once_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(devices, "chosen_dtype", lambda *arguments: asked.append(arguments[1]) or "bf16")
    done = here("sample", "a.safetensors", *SHORT, "-o", "auto.safetensors", cwd=folder)
    assert done.code == 0, done.err
    assert asked == ["cpu"]
    origin = read_origin(folder / "auto.safetensors")
    assert origin is not None and origin.spec.dtype == "bf16"


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    refused = here("sample", "a.safetensors", "--dtype", "int8", cwd=folder)
    assert refused.code == 2
    assert "choose auto, fp32, bf16, fp16" in refused.err


def test_upstream_is_followed_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "chosen_dtype", lambda *_: "bf16")
    words = ("sample", "a.safetensors", "--images", "1", "--upstream-exact", "--quiet")
    assert here(*words, "-o", "upstream.safetensors", cwd=folder).code == 0
    origin = read_origin(folder / "upstream.safetensors")
    assert origin is not None and origin.spec.dtype == "fp32"


def test_values_beyond_fp16_are_told(folder: Path) -> None:
    state = load_file(folder / "a.safetensors")
    name = "blocks.0.moe.shared_experts.up_proj.weight"
    save_file({**state, name: state[name] * 1e6}, folder / "large.safetensors", read_metadata(folder / "a.safetensors"))
    refused = here("sample", "large.safetensors", *SHORT, "--dtype", "fp16", "-o", "l.safetensors", cwd=folder)
    assert refused.code == 3
    assert "infinite in fp16: give --dtype fp32, or bf16" in refused.err


def test_profiles_of_before_count_as_fp32(folder: Path) -> None:
    words = ("profile-experts", "a.safetensors", *SHORT, "--dtype", "fp32", "-o", "old.safetensors")
    assert here(*words, cwd=folder).code == 0
    profile = folder / "old.safetensors"
    document = json.loads(read_metadata(profile)["ditmoe"])
    del document["calibration"]["dtype"]
    save_file(load_file(profile), profile, {**read_metadata(profile), "ditmoe": json.dumps(document)})
    assert read_profile(profile).calibration["dtype"] == "fp32"
    again = here(*words, cwd=folder)
    assert again.code == 0, again.err


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
