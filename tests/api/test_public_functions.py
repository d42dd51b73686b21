"""The functions do what the commands do: the same files, up to date when called again, and refused in the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import here
from conftest import make_pico
from safetensors.numpy import load_file

import ditmoe_cli
from ditmoe_cli import DitmoeError
from ditmoe_cli.api.written_checkpoints import WrittenCheckpoint
from ditmoe_cli.compression.plan import Experts
from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.routing.profile import RoutingProfile

pytestmark = pytest.mark.usefixtures("few_tokens")

SAMPLING = {"images": 4, "steps": 2}
WORDS = ("--images", 4, "--steps", 2)


@pytest.fixture(scope="module")
def _source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    make_pico(sampler="rf", in_channels=1, learn_sigma=False).save(folder / "a.safetensors")
    ditmoe_cli.profile(folder / "a.safetensors", **SAMPLING, bins=2, output=folder / "p.safetensors")  # type: ignore[arg-type]
    return folder


@pytest.fixture
def folder(_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.safetensors", "p.safetensors"):
        (tmp_path / name).write_bytes((_source / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def profile(folder: Path) -> RoutingProfile:
    return ditmoe_cli.read_profile(folder / "p.safetensors")


def same_file(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_a_profile_is_the_command_s(folder: Path, profile: RoutingProfile) -> None:
    done = here("profile-experts", "a.safetensors", *WORDS, "--bins", 2, "-o", "cli.safetensors", cwd=folder)
    assert done.code == 0, done.err
    assert same_file(profile.path, folder / "cli.safetensors")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (
            lambda a, p: ditmoe_cli.plan_prune(a, keep=0.5, neurons=0.5, multiple=8, profile=p),
            ("prune", "--keep", 0.5, "--neurons", 0.5, "--multiple", 8),
        ),
        (lambda a, p: ditmoe_cli.plan_merge(a, groups=2, profile=p), ("merge", "--groups", 2)),
        (
            lambda a, p: ditmoe_cli.plan_quantize(
                a, bits=4, allow=(3, 4, 16), floor={"attn": 4}, group_size=32, rounding="nearest", profile=p
            ),
            (
                *("quantize", "--bits", 4, "--allow", "3,4,16", "--floor", "attn=4"),
                *("--group-size", 32, "--rounding", "nearest"),
            ),
        ),
        (lambda a, _: ditmoe_cli.plan_quantize(a, bits=8, uniform=True), ("quantize", "--bits", 8, "--uniform")),
    ],
    ids=["prune", "merge", "mix", "uniform"],
)
def test_a_plan_that_is_applied_is_the_command_s_file(plan: object, words: tuple, folder: Path) -> None:  # type: ignore[type-arg]
    command, *options = words
    taking = () if "--uniform" in options else ("--profile", "p.safetensors")
    done = here(command, "a.safetensors", *options, *taking, "-o", "cli.safetensors", cwd=folder)
    assert done.code == 0, done.err
    checkpoint = ditmoe_cli.open_checkpoint("a.safetensors")
    made = plan(checkpoint, "p.safetensors")  # type: ignore[operator]
    result = ditmoe_cli.apply(checkpoint, made, profile="p.safetensors" if taking else None, output="b.safetensors")
    assert same_file(result.path, folder / "cli.safetensors")
    assert result.bytes == result.path.stat().st_size == done.result["bytes"] and result.ratio == done.result["ratio"]
    assert result.open().fingerprint == ditmoe_cli.open_checkpoint("cli.safetensors").fingerprint


@pytest.mark.usefixtures("folder")
def test_what_is_done_again_is_up_to_date(profile: RoutingProfile) -> None:
    plan = ditmoe_cli.plan_prune("a.safetensors", keep=2, profile=profile)
    first = ditmoe_cli.apply("a.safetensors", plan, profile=profile, output="b.safetensors")
    again = ditmoe_cli.apply("a.safetensors", plan, profile=profile, output="b.safetensors")
    assert not first.up_to_date and again.up_to_date and again.bytes == first.bytes
    other = ditmoe_cli.plan_prune("a.safetensors", keep=3, profile=profile)
    with pytest.raises(OutputExistsError, match="give force to replace it, or output for another name"):
        ditmoe_cli.apply("a.safetensors", other, profile=profile, output="b.safetensors")
    forced = ditmoe_cli.apply("a.safetensors", other, profile=profile, output="b.safetensors", force=True)
    assert not forced.up_to_date and forced.figures["kept"] != first.figures["kept"]


@pytest.mark.slow
def test_an_output_is_named_as_the_command_names_it(folder: Path) -> None:
    result = ditmoe_cli.compress("a.safetensors", ratio=0.8, target="upstream", profile="p.safetensors")
    assert result.path == folder / "a.compress-ratio0.8-upstream.safetensors"
    assert result.ratio <= 0.8 and result.plan is not None and result.profile == Path("p.safetensors")


@pytest.mark.usefixtures("folder")
def test_a_plan_that_was_edited_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ditmoe_cli.plan_prune("a.safetensors", keep=2, method="random", refit=False)
    assert not plan.edited
    experts = plan.stage(Experts)
    others = tuple(expert for expert in range(4) if expert not in experts.blocks[0].keep)
    blocks = (replace(experts.blocks[0], keep=others), *experts.blocks[1:])
    edited = replace(plan, stages=(replace(experts, blocks=blocks),))
    assert edited.edited
    assert ditmoe_cli.apply("a.safetensors", edited, output="b.safetensors").open().provenance().history[-1].edited
    assert "the plan was edited" in capsys.readouterr().err


def test_a_plan_needs_no_place_for_its_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, profile = (folder / name for name in ("a.safetensors", "p.safetensors"))
    monkeypatch.chdir("/proc")  # in which nobody makes files
    assert ditmoe_cli.plan_quantize(source, bits=4, uniform=True).stages
    assert ditmoe_cli.plan_prune(source, keep=0.5, profile=profile).stages
    for asked in ({"profile": profile, "bits": 4}, {"bits": 3}):
        with pytest.raises(BadInputError, match=r"/proc: cannot be written .* what a plan rests on is kept there"):
            ditmoe_cli.plan_quantize(source, **asked)  # type: ignore[arg-type]


@pytest.mark.usefixtures("folder")
def test_a_plan_for_another_checkpoint_is_refused() -> None:
    plan = ditmoe_cli.plan_prune("a.safetensors", keep=2, method="random", refit=False)
    small = ditmoe_cli.apply("a.safetensors", plan, output="b.safetensors")
    with pytest.raises(BadInputError, match="another checkpoint"):
        ditmoe_cli.apply(small.path, plan, output="c.safetensors")


def pruned(folder: Path) -> WrittenCheckpoint:
    plan = ditmoe_cli.plan_prune("a.safetensors", neurons=0.5, multiple=8, profile="p.safetensors")
    return ditmoe_cli.apply("a.safetensors", plan, profile="p.safetensors", output=folder / "b.safetensors")


@pytest.mark.slow
def test_healing_is_the_command_s(folder: Path) -> None:
    small = pruned(folder)
    asked = {"original": "a.safetensors", "steps": 1, "batch": 4, "scope": "model", "profile": "p.safetensors"}
    result = ditmoe_cli.heal(small, **asked, output="h.safetensors")  # type: ignore[arg-type]
    words = ("--original", "a.safetensors", "--steps", 1, "--batch", 4, "--scope", "model")
    done = here("heal", small.path, *words, "--profile", "p.safetensors", "-o", "cli.safetensors", cwd=folder)
    assert done.code == 0, done.err
    assert same_file(result.path, folder / "cli.safetensors")
    before, after = result.record.held_error
    assert after <= before and list(result.figures["held_error"]) == done.result["held_error"]
    again = ditmoe_cli.heal(small.path, **asked, output="h.safetensors")  # type: ignore[arg-type]
    assert again.up_to_date and again.record.model_steps == result.record.model_steps == 1


def test_distilling_is_the_command_s(folder: Path) -> None:
    words = ("--original", "a.safetensors", "--steps", 1, "--teacher-steps", 2, "--iterations", 2, "--batch", 4)
    done = here("distill", "a.safetensors", *words, "-o", "cli.safetensors", cwd=folder)
    assert done.code == 0, done.err
    a = ditmoe_cli.open_checkpoint("a.safetensors")
    result = ditmoe_cli.distill(a, original=a, steps=1, teacher_steps=2, iterations=2, batch=4, output="d.safetensors")
    assert same_file(result.path, folder / "cli.safetensors")
    distilled = result.open().distilled
    assert distilled is not None and distilled.steps == 1


def test_samples_are_the_command_s(folder: Path) -> None:
    done = here("sample", "a.safetensors", *WORDS, "--cfg", 1.5, "--seed", 3, "-o", "cli.safetensors", cwd=folder)
    assert done.code == 0, done.err
    result = ditmoe_cli.sample("a.safetensors", **SAMPLING, cfg=1.5, seed=3, output="s.safetensors", grid="g.png")  # type: ignore[arg-type]
    assert same_file(result.path, folder / "cli.safetensors")
    assert result.kind == "images" and result.values.shape == (4, *result.shape) and result.values.dtype == np.uint8
    assert np.array_equal(result.values, load_file(folder / "cli.safetensors")["images"])
    assert result.exports == {"grid": Path("g.png")} and result.nfe == done.result["nfe"]


def test_scores_take_checkpoints_and_samples(folder: Path) -> None:
    small = pruned(folder)
    here_, there = (
        ditmoe_cli.sample(path, **SAMPLING, output=f"{name}.samples.safetensors")  # type: ignore[arg-type]
        for path, name in ((small.path, "b"), (folder / "a.safetensors", "a"))
    )
    by_samples = ditmoe_cli.score(here_, ref=there, extractor="pixels", metrics=["pr"])
    by_checkpoints = ditmoe_cli.score(small, ref="a.safetensors", **SAMPLING, extractor="pixels")  # type: ignore[arg-type]
    done = here("fid", here_.path, "--ref", there.path, "--extractor", "pixels", "--metrics", "pr", cwd=folder)
    assert by_samples.to_json() == done.result
    assert by_checkpoints.value == by_samples.value and by_checkpoints.paired == by_samples.paired
    same = ditmoe_cli.score(there, ref=there, extractor="pixels")
    assert same.paired is not None and same.paired.mse == 0.0


def test_a_comparison_is_the_command_s(folder: Path) -> None:
    small = pruned(folder)
    result = ditmoe_cli.compare("a.safetensors", small, **SAMPLING)  # type: ignore[arg-type]
    done = here("compare", "a.safetensors", small.path, *WORDS, cwd=folder)
    assert result.to_json() == done.result
    assert result.relative_error == done.result["prediction"]["relative_error"]
    unchanged = ditmoe_cli.compare("a.safetensors", "a.safetensors", **SAMPLING)  # type: ignore[arg-type]
    assert unchanged.relative_error == 0.0 and unchanged.image_error == 0.0


def test_a_benchmark_measures_what_the_command_does(folder: Path) -> None:
    work = {"batch": 1, "repeats": 1, "threads": 1}
    alone = ditmoe_cli.bench("a.safetensors", **work)  # type: ignore[arg-type]
    done = here("bench", "a.safetensors", "--batch", 1, "--repeats", 1, "--threads", 1, cwd=folder)
    told = alone.to_json()
    assert told.keys() == done.result.keys()
    assert told["bytes"] == done.result["bytes"] and told["flops"] == done.result["flops"]
    assert alone.seconds == (told["seconds"],) and alone.needed == (told["memory"]["needed"],)
    both = ditmoe_cli.bench("a.safetensors", ["a.safetensors"], cfg=1.5, **work)  # type: ignore[arg-type]
    assert [each["path"] for each in both.to_json()["files"]] == [str(folder / "a.safetensors")] * 2
    assert both.ratios[0].median == 1.0 and both.results[1].load.rows == 2
    with pytest.raises(DitmoeError, match="repeats 0: must be at least 1"):
        ditmoe_cli.bench("a.safetensors", "a.safetensors", repeats=0)


def test_a_report_is_the_command_s(folder: Path, profile: RoutingProfile) -> None:
    result = ditmoe_cli.report(profile, replicates=20)
    done = here("report", "profile", "p.safetensors", "--replicates", 20, cwd=folder)
    assert result.to_json() == {name: value for name, value in done.result.items() if name not in ("page", "png")}
    assert set(result.claims.values()) <= {"holds", "does not hold", "cannot be told"}
    profile.path.rename(folder / "a.profile.safetensors")
    assert ditmoe_cli.report("a.safetensors", replicates=20).claims == result.claims, "found under its usual name"


@pytest.mark.usefixtures("folder")
def test_models_predict_alike_however_they_are_named() -> None:
    import torch

    models = [ditmoe_cli.load_model(which) for which in ("a.safetensors", ditmoe_cli.open_checkpoint("a.safetensors"))]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 0.5]), torch.tensor([1, 0])
    with torch.no_grad():
        assert torch.equal(models[0](x, t, y), models[1](x, t, y))
    assert (
        ditmoe_cli.load_model("a.safetensors", dtype=torch.bfloat16).blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    )


def test_all_errors_are_of_one_base() -> None:
    assert issubclass(OutputExistsError, DitmoeError)
