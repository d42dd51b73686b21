"""Guidance by a weaker model on the command line: sample, fid, compare and bench take it, and record and count it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import here
from conftest import Pico, make_pico
from distilling import FOUR, save_distilled
from safetensors.numpy import load_file

from ditmoe_cli.api.guiding_requests import Guiding
from ditmoe_cli.cli.guiding_options import StepGuiding, WeakGuiding
from ditmoe_cli.cli.stage import Stage, parse_stage
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import Given

pytestmark = pytest.mark.usefixtures("few_tokens")

QUICK = ("--images", 4, "--steps", 3, "--solver", "euler")
DDPM = ("--images", 4, "--steps", 3, "--solver", "ddim")
WITH = ("--guide-with", "weak.safetensors", "--guide-scale", 0.5)
BY = ("--guide-by", "top1", "--guide-scale", 0.5)


def pixels(**changes: Any) -> Pico:
    """Return a model of pixels."""
    return make_pico(**{"sampler": "rf", "in_channels": 1, "widths": ((16,) * 4,) * 2, **changes})


def swapped(model: Pico) -> Pico:
    """Return the same function in other weights: experts 0 and 1 of each block change places, with their rows."""
    state = dict(model.state)
    for block in range(2):
        moe = f"blocks.{block}.moe"
        state[f"{moe}.gate.weight"] = model.state[f"{moe}.gate.weight"][torch.tensor([1, 0, 2, 3])]
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            first, second = (f"{moe}.experts.{expert}.{matrix}.weight" for expert in (0, 1))
            state[first], state[second] = model.state[second], model.state[first]
    return Pico(model.config, state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a narrower one, the same function in other weights, and others that cannot guide it."""
    made = tmp_path_factory.mktemp("guiding")
    pixels().save(made / "a.safetensors")
    pixels(seed=1).save(made / "b.safetensors")
    pixels(seed=2, widths=((8,) * 4,) * 2).save(made / "weak.safetensors")
    swapped(pixels()).save(made / "copy.safetensors")
    pixels(top_k=1).save(made / "one.safetensors")
    pixels(sampler="ddpm").save(made / "ddpm.safetensors")
    pixels(sampler="ddpm", seed=1).save(made / "ddpm-weak.safetensors")
    pixels(input_size=4).save(made / "small.safetensors")
    pixels(num_classes=5).save(made / "classes.safetensors")
    make_pico(sampler="rf").save(made / "latents.safetensors")
    save_distilled(pixels(seed=3), made / "few.safetensors", "f" * 64)
    return made


def images(path: Path) -> np.ndarray[Any, Any]:
    return load_file(path)["images"]


# what is asked for


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--guide-scale", 0.5), "--guide-scale: nothing guides; give a weaker copy with --guide-with, or --guide-by"),
        (("--guide-interval", "0.2,0.8"), "--guide-interval: nothing guides"),
        (("--guide-with", "weak.safetensors"), "--guide-with weak.safetensors: give its scale, as --guide-scale 0.5"),
        (("--guide-by", "top1"), "--guide-by top1: give its scale"),
        ((*BY, "--guide-with", "weak.safetensors"), "--guide-by top1: --guide-with names another weaker model"),
        (("--guide-by", "top2", "--guide-scale", 1), "--guide-by top2: choose top1 or rank2"),
        (("--guide-by", "top1", "--guide-scale", "nan"), "--guide-scale nan: must be a finite"),
        (("--guide-by", "top1", "--guide-scale", "inf"), "--guide-scale inf: must be a finite"),
        (
            ("--guide-by", "top1", "--guide-scale=-1"),
            "--guide-scale -1.0: must be a finite guidance",
        ),
        ((*BY, "--guide-interval", "0.8,0.2"), "--guide-interval 0.8,0.2: give two noise levels, 0 <= LOW < HIGH <= 1"),
        ((*BY, "--guide-interval", "wide"), "--guide-interval wide: give two noise levels"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "fid", "compare"])
def test_settings_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, command: str, words: tuple[object, ...], said: str
) -> None:
    a = str(folder / "a.safetensors")
    subject = {"sample": (a,), "fid": (a, "--ref", a), "compare": (a, a)}[command]
    (tmp_path / "weak.safetensors").symlink_to(folder / "weak.safetensors")
    assert here(command, *subject, *QUICK, *words, cwd=tmp_path).error(2).startswith(said)
    assert [path.name for path in tmp_path.iterdir()] == ["weak.safetensors"]


@pytest.mark.parametrize(
    ("weak", "code", "said"),
    [
        ("a", 3, "a.safetensors: is the checkpoint that it would guide, and a model is not guided by itself"),
        ("ddpm", 3, "cannot guide"),
        ("small", 3, "input_size 4 instead of 8"),
        ("classes", 3, "num_classes 5 instead of 3"),
        ("latents", 3, "in_channels 4 instead of 1"),
        ("missing", 3, "missing.safetensors"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "fid", "compare", "bench"])
def test_checkpoints_that_cannot_guide_are_refused(
    folder: Path, tmp_path: Path, command: str, weak: str, code: int, said: str
) -> None:
    a, b = (str(folder / f"{name}.safetensors") for name in ("a", "b"))
    words = {"sample": (a,), "fid": (a, "--ref", b), "compare": (a, b), "bench": (a,)}[command]
    guide = ("--guide-with", folder / f"{weak}.safetensors", "--guide-scale", 0.5)
    assert said in here(command, *words, *guide, cwd=tmp_path).error(code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sample", "fid", "compare", "bench"])
def test_nan_in_the_weaker_copy_is_named(folder: Path, tmp_path: Path, command: str) -> None:
    a, b = (str(folder / f"{name}.safetensors") for name in ("a", "b"))
    words = {"sample": (a,), "fid": (a, "--ref", b), "compare": (a, b), "bench": (a,)}[command]
    weak = pixels(seed=2)
    nan = torch.full_like(weak.state["final_layer.linear.bias"], torch.nan)
    path = weak.with_state(final_layer__linear__bias=nan).save(tmp_path / "nan.safetensors")
    said = here(command, *words, "--guide-with", path, "--guide-scale", 1, cwd=tmp_path).error(3)
    assert "nan.safetensors" in said and "final_layer.linear.bias" in said
    assert [each.name for each in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_a_weaker_copy_whose_predictions_overflow_is_named(folder: Path, tmp_path: Path, family: str) -> None:
    """In fp16, whose largest value is 65,504: the weights are finite, and so is all that the guided model predicts."""
    weak = pixels(seed=2, sampler=family)
    huge = {f"blocks.0.moe.shared_experts.{name}.weight": 1e4 for name in ("gate_proj", "up_proj", "down_proj")}
    changes = {name: weak.state[name] * by for name, by in huge.items()}
    path = weak.with_state(**changes).save(tmp_path / "w.safetensors")
    model = folder / ("a.safetensors" if family == "rf" else "ddpm.safetensors")
    guide = ("--guide-with", path, "--guide-scale", 1, "--dtype", "fp16", "-o", "s.safetensors")
    said = here("sample", model, "--images", 2, "--steps", 2, *guide, cwd=tmp_path).error(3)
    assert "in image 0 (seed 0) at evaluation 1 of 2, in the weaker model (of fingerprint" in said
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.parametrize("command", ["sample", "bench"])
def test_a_model_of_one_expert_a_token_has_no_other_routing(folder: Path, command: str) -> None:
    said = here(command, "one.safetensors", "--guide-by", "rank2", "--guide-scale", 1, cwd=folder).error(2)
    assert said.startswith("--guide-by rank2: one.safetensors takes one expert a token")


def test_a_scale_of_zero_is_checked_and_guides_nowhere(folder: Path) -> None:
    weak = open_checkpoint(folder / "weak.safetensors")
    assert Guiding(Guide(weak.fingerprint, 0.0), weak).used is None
    given = Given(None, None, None, None)
    assert StepGuiding().opened(given) == Guiding()
    assert WeakGuiding(guide_by="top1", guide_scale=0.0).opened(given).used is None
    with pytest.raises(UsageError, match="guide_scale"):
        StepGuiding(guide_scale=0.5).opened(given)


@pytest.mark.parametrize("guide", [WITH, BY])
def test_a_distilled_checkpoint_is_not_guided(folder: Path, guide: tuple[Any, ...]) -> None:
    said = here("sample", "few.safetensors", "--images", 2, *guide, cwd=folder).error(2)
    assert said.startswith("--guide-scale 0.5: few.safetensors was distilled to 4 steps of euler, with guidance 1.5")
    assert said.endswith("is sampled by its own steps alone; leave it out")


def test_a_distilled_checkpoint_guides_none(folder: Path) -> None:
    guide = ("--guide-with", "few.safetensors", "--guide-scale", 0.5)
    said = here("sample", "a.safetensors", *QUICK, *guide, cwd=folder).error(3)
    assert "few.safetensors: was distilled to 4 steps of euler" in said and "guides at no others" in said


# what is done


@pytest.mark.parametrize("cfg", [1, 1.5])
@pytest.mark.parametrize("guide", [WITH, BY, (*BY, "--guide-interval", "0.5,1")])
def test_samples_record_and_count_the_guide(folder: Path, tmp_path: Path, guide: tuple[Any, ...], cfg: float) -> None:
    words = ("sample", folder / "a.safetensors", *QUICK, "--cfg", cfg)
    guide = tuple(folder / word if str(word).startswith("weak") else word for word in guide)
    plain = here(*words, "-o", "plain.safetensors", cwd=tmp_path)
    guided = here(*words, *guide, "-o", "guided.safetensors", cwd=tmp_path)
    within = 2 if "--guide-interval" in guide else 3
    assert guided.result["nfe"] == plain.result["nfe"] + within
    weak = open_checkpoint(folder / "weak.safetensors").fingerprint
    model, interval = ("top1" if "top1" in guide else weak), ([0.5, 1.0] if within == 2 else [0.0, 1.0])
    assert guided.result["spec"]["guide"] == {"model": model, "scale": 0.5, "interval": interval}
    assert "guide" not in plain.result["spec"]
    difference = np.abs(images(tmp_path / "guided.safetensors").astype(int) - images(tmp_path / "plain.safetensors"))
    assert difference.max() > 3
    again = here(*words, *guide, "-o", "guided.safetensors", cwd=tmp_path)
    assert "guided.safetensors: up to date" in again.err
    other = here(*words, "-o", "guided.safetensors", cwd=tmp_path)
    assert "sampled in another way (other guide" in other.error(5)


def test_unguided_and_zero_are_the_same_bytes_in_the_same_file(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "a.safetensors", *QUICK)
    zero = ("--guide-with", folder / "weak.safetensors", "--guide-scale", 0)
    assert here(*words, "-o", "x.safetensors", cwd=tmp_path).code == 0
    assert here(*words, *zero, "-o", "y.safetensors", cwd=tmp_path).code == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_the_same_function_in_other_weights_guides_nowhere(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "a.safetensors", *QUICK)
    guide = ("--guide-with", folder / "copy.safetensors", "--guide-scale", 2)
    assert here(*words, "-o", "x.safetensors", cwd=tmp_path).code == 0
    assert here(*words, *guide, "-o", "y.safetensors", cwd=tmp_path).code == 0
    difference = images(tmp_path / "x.safetensors").astype(int) - images(tmp_path / "y.safetensors")
    assert np.abs(difference).max() <= 1


def test_the_default_name_tells_the_guide(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "a.safetensors", "--images", 2, "--steps", 1)
    found = [here(*words, *guide, "-q", cwd=tmp_path).out.strip() for guide in ((*BY, "--guide-interval", "0.2,1"), ())]
    assert [Path(path).name for path in found] == [
        "a.samples-images2-steps1-guide0.5bytop1from0.2to1.safetensors",
        "a.samples-images2-steps1.safetensors",
    ]


def test_ddpm_weights_are_guided_too(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "ddpm.safetensors", *DDPM)
    guide = ("--guide-with", folder / "ddpm-weak.safetensors", "--guide-scale", 1)
    assert here(*words, "-o", "x.safetensors", cwd=tmp_path).result["nfe"] == 3
    assert here(*words, *guide, "--cfg", 1.5, "-o", "y.safetensors", cwd=tmp_path).result["nfe"] == 9
    assert not np.array_equal(images(tmp_path / "x.safetensors"), images(tmp_path / "y.safetensors"))


def test_a_weaker_copy_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "weak.safetensors"
    target.write_bytes((folder / "weak.safetensors").read_bytes())
    before = target.read_bytes()
    words = ("sample", folder / "a.safetensors", *QUICK, "--guide-with", target, "--guide-scale", 1)
    here(*words, "-o", target, "--force", cwd=tmp_path).error(5)
    assert target.read_bytes() == before


def test_fid_guides_both_sides_alike_and_refuses_samples_of_another_guide(folder: Path, tmp_path: Path) -> None:
    a, b, weak = (folder / f"{name}.safetensors" for name in ("a", "b", "weak"))
    many = ("--images", 8, "--steps", 2)
    guide = ("--guide-with", weak, "--guide-scale", 0.5)
    found = here("fid", b, "--ref", a, *many, *guide, cwd=tmp_path).result
    sampled = [found["conditions"][side]["sampling"] for side in ("subject", "reference", "original")]
    assert sampled[0] == sampled[1] == sampled[2] and sampled[0]["guide"]["scale"] == 0.5
    assert sampled[0]["nfe"] == 4
    plain = here("fid", b, "--ref", a, *many, cwd=tmp_path).result
    assert plain["paired"]["mse"] != found["paired"]["mse"]
    for name, words in (("a", guide), ("b", guide), ("plain", ())):
        path = b if name == "b" else a
        assert here("sample", path, *many, *words, "-o", f"{name}.safetensors", cwd=tmp_path).code == 0
    files = here("fid", "b.safetensors", "--ref", "a.safetensors", cwd=tmp_path).result
    assert files["paired"]["mse"] == found["paired"]["mse"]
    unlike = here("fid", "b.safetensors", "--ref", "plain.safetensors", cwd=tmp_path).error(3)
    assert "guide None there" in unlike and "at 0.5 here" in unlike
    kept = here("fid", b, "--ref", a, *many, *guide, cwd=tmp_path)
    assert "kept from an earlier run" in kept.err and kept.result["paired"] == found["paired"]


def test_guided_samples_take_their_guide_to_sample_an_original(folder: Path, tmp_path: Path) -> None:
    a, b, weak = (folder / f"{name}.safetensors" for name in ("a", "b", "weak"))
    many = ("--images", 8, "--steps", 2)
    guide = ("--guide-with", weak, "--guide-scale", 0.5)
    assert here("sample", b, *many, *guide, "-o", "b.safetensors", cwd=tmp_path).code == 0
    said = here("fid", "b.safetensors", "--ref", a, cwd=tmp_path).error(3)
    assert "is to be guided by the checkpoint of fingerprint" in said
    assert "give that one with --guide-with, at --guide-scale 0.5" in said
    found = here("fid", "b.safetensors", "--ref", a, *guide, cwd=tmp_path).result
    assert found["paired"]["n"] == 8
    assert here("sample", b, *many, *BY, "-o", "by.safetensors", cwd=tmp_path).code == 0
    assert here("fid", "by.safetensors", "--ref", a, cwd=tmp_path).result["paired"]["n"] == 8


def test_a_pipe_hands_the_weaker_checkpoint_on(folder: Path, tmp_path: Path) -> None:
    a, weak = folder / "a.safetensors", folder / "weak.safetensors"
    sampled = here("sample", a, "--images", 8, "--steps", 2, "--guide-with", weak, "--guide-scale", 0.5, cwd=tmp_path)
    assert sampled.envelope["weak"] == str(weak)
    scored = here("fid", cwd=tmp_path, stdin=sampled.out)
    assert scored.result["paired"]["mse"] == 0, "the original is guided too"
    assert scored.result["conditions"]["original"]["sampling"]["guide"]["scale"] == 0.5
    assert "weak" not in here("sample", a, "--images", 8, "--steps", 1, *BY, cwd=tmp_path).envelope


def test_a_pipe_that_distilled_hands_on_what_guided(folder: Path, tmp_path: Path) -> None:
    """The original is guided as the copy was taught, without the weaker checkpoint being named again."""
    original, weak = open_checkpoint(folder / "a.safetensors"), open_checkpoint(folder / "weak.safetensors")
    taught = replace(FOUR, cfg=1.0, guide=weak.fingerprint, guide_scale=0.5)
    few = save_distilled(pixels(seed=3), tmp_path / "few.safetensors", original.fingerprint, taught)
    made = Stage(str(few), str(original.path), piped=True)
    for stage, guide in ((made, None), (replace(made, weak=str(weak.path)), weak.fingerprint)):
        envelope = json.dumps(stage.to_json({}))
        assert parse_stage(envelope).weak == stage.weak
        words = ("--images", 8, "--extractor", "pixels")
        found = here("fid", *words, cwd=tmp_path, stdin=envelope).result["conditions"]["reference"]["sampling"]
        assert found.get("guide", {}).get("model") == guide
        compared = here("compare", "--images", 2, cwd=tmp_path, stdin=envelope)
        assert ("in the weights, which" in compared.err) == (guide is None)


def test_a_reference_that_guides_is_refused(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "weak.safetensors", "--images", 4, "--steps", 1, *WITH)
    said = here(*words, cwd=folder).error(3)
    assert "weak.safetensors: cannot be sampled as the other side is" in said and "is not guided by itself" in said


@pytest.mark.parametrize("guide", [WITH, ("--guide-by", "rank2", "--guide-scale", 0.5, "--guide-interval", "0.5,1")])
def test_compare_guides_both(folder: Path, guide: tuple[Any, ...]) -> None:
    words = ("compare", "a.safetensors", "b.safetensors", "--images", 3, "--steps", 3, "--cfg", 1.5)
    plain, guided = here(*words, cwd=folder).result, here(*words, *guide, cwd=folder).result
    assert guided["conditions"]["sampling"]["guide"]["scale"] == 0.5
    added = guided["conditions"]["sampling"]["nfe"] - plain["conditions"]["sampling"]["nfe"]
    assert added == (2 if "--guide-interval" in guide else 3)
    assert guided["prediction"]["relative_error"] != plain["prediction"]["relative_error"]
    same = here("compare", "a.safetensors", "a.safetensors", "--images", 2, "--steps", 2, *guide, cwd=folder).result
    assert same["prediction"]["relative_error"] == same["images"]["mse"] == 0


@pytest.mark.parametrize("guide", [WITH, pytest.param(BY, marks=pytest.mark.slow)])
def test_bench_times_both_models(folder: Path, guide: tuple[Any, ...]) -> None:
    words = ("bench", "a.safetensors", "--batch", 2, "--repeats", 1, "--threads", 1)
    plain, guided = here(*words, cwd=folder).result, here(*words, *guide, cwd=folder).result
    own = open_checkpoint(folder / "weak.safetensors")
    assert guided["conditions"]["guide"]["model"] == (own.fingerprint if guide is WITH else "top1")
    assert (guided["conditions"]["weak_bytes"] > 0) == (guide is WITH)
    assert 1.3 * plain["flops"] < guided["flops"] < 2 * plain["flops"]
    assert "guide" not in plain["conditions"] and "weak_bytes" not in plain["conditions"]
    told = here(*words, *guide, "--text", cwd=folder).out
    assert "guided by" in told and ("weaker model" in told) == (guide is WITH)


def test_profiles_and_planners_take_no_guide(folder: Path) -> None:
    for command in ("profile-experts", "prune", "quantize"):
        assert "No such option" in here(command, "a.safetensors", *BY, cwd=folder).error(2)
