"""Folders of diffusers: a stranger without ditmoe opens them, samples our images, and unpacks our weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TESTS, Pico, make_pico
from distilling import FOUR, FOUR_DDPM, save_distilled
from families import FAMILIES, stored_in
from packed import packed_pico
from stored_parts import wholly_packed

from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.diffusers_folder import obstacle
from ditmoe_cli.exporting.exported import Wanted
from ditmoe_cli.exporting.targets import TARGETS, laid_out
from ditmoe_cli.files.provenance import Distilled
from ditmoe_cli.formats.base import NumberFormat
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.loading import load_model

LABELS = (0, 2, 1)
DROPPED = {"expert_of": ((0, 1, -1, 2), (1, 0, 1, -1)), "widths": ((64, 24, 8), (40, 16))}
CONSTANTS = {
    "expert_of": ((0, -2, -3, 1), (-2, 0, 1, -3)),
    "widths": ((64, 32), (24, 40)),
    "extras": {"constants": 2, "rank": 3, "residual_constant": True, "residual_linear": True},
}


def export(checkpoint: Checkpoint, folder: Path, **wanted: Any) -> Path:
    laid_out(TARGETS["diffusers"], checkpoint, Wanted(folder, **wanted), lambda _: None).write()
    return folder


@dataclass(frozen=True)
class Case:
    """A model, how it is sampled, and into how large files it goes."""

    model: Callable[[], Pico]
    cfg: float = 1.0
    steps: int = 3
    distilled: Distilled | None = None
    dtype: str = "float32"
    handled: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "timm": Case(lambda: make_pico(sampler="rf"), cfg=1.5),
    "flash": Case(lambda: make_pico(sampler="rf", attention="flash"), cfg=4.0),
    "ddpm": Case(lambda: make_pico(), cfg=1.5, steps=4),
    "ddpm flash, pixels": Case(lambda: make_pico(attention="flash", in_channels=1), cfg=1.5, steps=4),
    "no sigma, no null class": Case(lambda: make_pico(sampler="rf", learn_sigma=False, null_class=False, patch=4)),
    "one expert": Case(lambda: make_pico(sampler="rf", experts=1, top_k=1)),
    "dropped, ragged, shared narrowed": Case(lambda: make_pico(sampler="rf", shared_width=24, **DROPPED), cfg=1.5),
    "mass": Case(lambda: make_pico(sampler="rf", extras={"mass": True}, **DROPPED)),
    "constants, residuals": Case(lambda: make_pico(sampler="rf", **CONSTANTS)),
    "without pos_embed": Case(lambda: make_pico(sampler="rf").with_state(pos_embed=None)),
    "fp16, shards": Case(lambda: make_pico(sampler="rf", dtype=torch.float16), wanted={"shard_bytes": 60_000}),
    "ragged nf4": Case(lambda: packed_pico(make_pico(sampler="rf", **DROPPED), "nf4"), cfg=1.5, handled=True),
    "ragged nf4 in bf16": Case(lambda: packed_pico(make_pico(sampler="rf", **DROPPED), "nf4"), dtype="bfloat16"),
    "all in int4": Case(lambda: wholly_packed(make_pico(sampler="rf", attention="flash"), "int4-g32"), cfg=1.5),
    "all in nf4-dq, ddpm": Case(lambda: wholly_packed(make_pico(), "nf4-dq"), cfg=1.5, steps=4),
    "distilled": Case(lambda: make_pico(sampler="rf"), distilled=FOUR, steps=4),
    "distilled ddpm": Case(lambda: make_pico(), distilled=FOUR_DDPM, steps=4),
    "distilled ddpm, odd": Case(lambda: make_pico(), distilled=replace(FOUR_DDPM, steps=3), steps=3),
    **{family: Case(lambda family=family: stored_in(family).model, steps=4) for family in FAMILIES},  # type: ignore[misc]
    **{
        f"int{bits}-g{group}{kind}": Case(
            lambda fmt=f"int{bits}-g{group}{kind}": packed_pico(make_pico(sampler="rf", hidden=40, heads=2), fmt)  # type: ignore[misc]
        )
        for bits, group, kind in ((2, 32, ""), (3, 64, "-sym"), (5, 32, ""), (6, 128, ""), (8, 32, ""), (8, 64, "-sym"))
    },
}


def spec_of(case: Case, checkpoint: Checkpoint) -> SampleSpec:
    solver = "euler" if checkpoint.config.sampler == "rf" else "ddim-trailing"
    return SampleSpec(len(LABELS), case.steps, case.cfg, 7, solver, LABELS)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Seen:
    """What was exported, and what the stranger saw."""

    folder: Path
    results: Mapping[str, np.ndarray]
    said: str

    def source(self, name: str) -> Path:
        return self.folder / name / "x.safetensors"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """All cases, opened by one stranger, whom importing diffusers takes seconds."""
    folder = tmp_path_factory.mktemp("diffusers")
    jobs = {}
    for name, case in CASES.items():
        (folder / name).mkdir()
        model, path = case.model(), folder / name / "x.safetensors"
        if case.distilled is None:
            model.save(path)
        else:
            save_distilled(model, path, "a" * 64, case.distilled)
        checkpoint = open_checkpoint(path)
        config = checkpoint.config
        shape = (config.in_channels, config.input_size, config.input_size)
        jobs[name] = {
            "folder": str(export(checkpoint, folder / name / "out", **case.wanted)),
            "labels": LABELS,
            "noise": image_noise(7, range(len(LABELS)), torch.device("cpu")).draw(shape).tolist(),
            "settings": {"num_inference_steps": case.steps, "guidance_scale": case.cfg},
            "dtype": case.dtype,
            "handled": case.handled,
        }
        if case.distilled is not None:  # which says all of this itself
            jobs[name]["settings"] = {}
            jobs[name] |= {"plain_steps": case.steps} if config.sampler == "rf" else {}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    stranger = [sys.executable, "-I", str(TESTS / "support" / "stranger.py"), "jobs.json", "out.npz"]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(stranger, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz") as results:
        return Seen(folder, dict(results), done.stderr)


@pytest.mark.parametrize("name", CASES)
def test_a_stranger_samples_our_images(name: str, seen: Seen) -> None:
    case, path = CASES[name], seen.source(name)
    spec = spec_of(case, open_checkpoint(path))
    expected = sample_batch(load_model(path, dtype=getattr(torch, case.dtype)), spec, range(len(LABELS)))
    found = torch.from_numpy(seen.results[f"{name}/images"])
    assert found.shape == expected.shape
    exactly = 1e-4 if case.dtype == "float32" else 2e-2
    assert (found - expected).abs().max() <= exactly * max(1.0, float(expected.abs().max()))


def test_a_distilled_model_runs_in_any_loop_of_euler_steps(seen: Seen) -> None:
    np.testing.assert_allclose(seen.results["distilled/plain"], seen.results["distilled/images"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "int" in name or "nf4" in name or name in FAMILIES])
def test_a_stranger_unpacks_exactly_our_weights(name: str, seen: Seen) -> None:
    checkpoint = open_checkpoint(seen.source(name))
    packed = [weight for weight in checkpoint.weights.values() if weight.format is not None]
    assert {f"{name}/{weight.info.name}" for weight in packed} == {
        key for key in seen.results if key.startswith(f"{name}/") and key.endswith(".weight")
    }
    for weight in packed:
        members = {member: checkpoint.reader.tensor(member) for member in weight.members}
        fmt = weight.stored_as
        exact = fmt.dequantize(weight.info, members) if isinstance(fmt, NumberFormat) else weight.unpack(members)
        rounded = exact.to(getattr(torch, CASES[name].dtype)).float()
        assert torch.equal(torch.from_numpy(seen.results[f"{name}/{weight.info.name}"]), rounded)


def test_the_model_is_handled_as_others_are(seen: Seen) -> None:
    """It is saved, loaded without its pipeline, cast there and back, and unpacked for good."""
    made = {what.partition("/")[2]: array for what, array in seen.results.items() if what.startswith("ragged nf4/")}
    assert made["shards"] > 1
    for how in ("alone", "after saving", "of a variant in shards", "unpacked"):
        np.testing.assert_allclose(made[f"predicted {how}"], made["predicted"], atol=1e-5)
    np.testing.assert_allclose(made["predicted in fp32 again"], made["predicted"], atol=0.1)  # plain weights lost bits
    checkpoint = open_checkpoint(seen.source("ragged nf4"))
    packed = [name for weight in checkpoint.weights.values() if weight.quantized for name in weight.members]
    assert made["stored"] >= sum(checkpoint.header.tensors[name].nbytes for name in packed if "state" not in name)
    whole = sum(4 * weight.info.numel for weight in checkpoint.weights.values() if weight.quantized)
    assert made["stored"] < 0.5 * whole


def test_latents_are_decoded_and_what_is_wrong_is_refused(seen: Seen) -> None:
    made = {what.partition("/")[2]: array for what, array in seen.results.items() if what.startswith("ragged nf4/")}
    np.testing.assert_allclose(made["pt"], made["decoded"], atol=1e-6)
    np.testing.assert_array_equal(made["np"], made["pt"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(made["pil"], (made["np"] * 255).round().astype("uint8"))
    labels, none, kind, steps, noise, half, cat, scale, scheduler = made["refused"]
    assert "give labels from 0 to 2" in labels and "give labels" in none and "give pil, np, pt or latent" in kind
    assert "give whole numbers" in half and "give whole numbers" in cat and "give a number" in scale
    assert "FlowMatchHeunDiscreteScheduler: takes no sigmas" in scheduler
    assert "give at least 1" in steps and "give noise of shape (3, 4, 8, 8)" in noise


def test_diffusers_finds_all_weights_and_settings(seen: Seen) -> None:
    for complaint in ("were not used", "newly initialized", "not expected", "Expected types", "Deprecat"):
        assert complaint not in seen.said


@pytest.mark.parametrize("name", CASES)
def test_ours_reads_it_back(name: str, seen: Seen) -> None:
    source, back = open_checkpoint(seen.source(name)), open_checkpoint(seen.folder / name / "out")
    assert back.config == source.config and back.distilled == source.distilled
    if name != "without pos_embed":
        assert back.fingerprint == source.fingerprint and back.provenance() == source.provenance()
    assert not back.assumptions and not back.warnings


def test_steps_of_solvers_that_diffusers_lacks_are_refused(tmp_path: Path) -> None:
    save_distilled(make_pico(sampler="rf"), tmp_path / "x.safetensors", "a" * 64, replace(FOUR, solver="heun"))
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert "steps of heun, which no scheduler of diffusers takes" in (obstacle(checkpoint) or "")
    with pytest.raises(BadInputError, match="diffusers cannot load it"):
        export(checkpoint, tmp_path / "out")
