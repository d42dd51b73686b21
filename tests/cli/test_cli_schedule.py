"""ditmoe schedule: written, followed in a pipe, done once; what fewer steps and bad inputs are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import slow_but
from cli_helpers import contents, here, piped, series
from conftest import Pico, make_pico
from distilling import SMALL, distilled_pair
from safetensors.numpy import load_file

import ditmoe_cli
from ditmoe_cli.api.schedule_runs import ForeseenSchedule, MadeSchedule
from ditmoe_cli.diffusion.compute_schedule import read_schedule
from ditmoe_cli.errors import InfeasibleError, OutputExistsError, UsageError
from ditmoe_cli.model.checkpoint import open_checkpoint

WAY = ("--solver", "euler", "--steps", 6)
PLAN = (*WAY, "--images", 8, "--bins", 3, "--flops", 0.6, "--anyway")
FORA = (*WAY, "--images", 8, "--method", "fora:2", "--anyway")


def pixels(**changes: Any) -> Pico:
    return make_pico(
        **{"sampler": "rf", "in_channels": 1, "learn_sigma": False, "hidden": 16, "input_size": 4, **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("schedules")
    pixels().save(made / "a.safetensors")
    pixels(top_k=1).save(made / "one.safetensors")
    return made


# what is written


def test_a_schedule_is_planned_and_followed(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    found = here("schedule", a, *PLAN, "--cfg", 1.5, cwd=tmp_path)
    path = tmp_path / "a.planned0.6.euler6-cfg1.5.schedule.safetensors"
    assert found.envelope["schedule"] == str(path) and found.envelope["checkpoint"] == str(a)
    result, schedule = found.result, read_schedule(path)
    assert result["flops"] <= 0.6 * (1 + 1e-6) and result["damage"] <= result["damage_bound"]
    assert sum(result["choices"].values()) == pytest.approx(1) and result["kept_bytes"] > 0
    assert schedule.checkpoint == open_checkpoint(a).fingerprint and schedule.bins == 3
    assert schedule.sampling.told == "6 steps of euler at cfg 1.5"
    assert {"fora:2", "taylor:2"} <= {schedule.method[9:-1], *(each["name"] for each in result["tried"])}
    sampled = here("sample", a, "--images", 16, "--schedule", path, cwd=tmp_path).result["computed"]
    assert sampled["flops"] == pytest.approx(result["flops"], abs=0.03) and sampled["method"] == schedule.method


WHOLE = ("fora:2", "follow:2", "odp", "regressed", "saliency:0.05", "residual:0.2", "moeca:2", "top1")


@pytest.mark.parametrize("method", slow_but(["follow:2", "regressed", "top1"], WHOLE))
def test_methods_for_the_whole_model(folder: Path, tmp_path: Path, method: str) -> None:
    a = folder / "a.safetensors"
    found = here("schedule", a, *WAY, "--images", 8, "--method", method, "--anyway", cwd=tmp_path).result
    assert (found["method"], found["tried"], found["gap"]) == (method, [], None)
    path = tmp_path / f"a.{method.replace(':', '')}.euler6.schedule.safetensors"
    computed = here("sample", a, "--images", 4, "--schedule", path, cwd=tmp_path).result["computed"]
    assert computed["flops"] == pytest.approx(found["flops"], abs=0.1)


def test_everything_computed_is_no_schedule_to_the_bit(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    words = ("--images", 4, "-o")
    found = here("schedule", a, *WAY, "--images", 8, "--flops", 1, "-o", "all.safetensors", cwd=tmp_path).result
    assert (found["damage"], found["fewer_steps"]) == (0.0, None)
    assert here("sample", a, *WAY, *words, "x.safetensors", cwd=tmp_path).code == 0
    assert here("sample", a, "--schedule", "all.safetensors", *words, "y.safetensors", cwd=tmp_path).code == 0
    one, other = (load_file(tmp_path / f"{name}.safetensors")["images"] for name in "xy")
    assert np.array_equal(one, other)


def test_pipes(folder: Path, tmp_path: Path) -> None:
    plan = " ".join(map(str, FORA))
    sampled = piped(f"ditmoe schedule {folder / 'a.safetensors'} {plan} | ditmoe sample --images 4", tmp_path)
    assert sampled.result["computed"]["method"] == "fora:2"
    packed = f"ditmoe quantize {folder / 'a.safetensors'} --bits 8 --uniform -o small.safetensors"
    scored = piped(f"{packed} | ditmoe schedule {plan} | ditmoe fid --images 8", tmp_path)
    assert [step["command"] for step in scored.envelope["history"]][-2:] == ["schedule", "fid"]
    conditions = scored.result["conditions"]
    assert conditions["subject"]["sampling"]["schedule"] and "schedule" not in conditions["reference"]["sampling"]
    schedule = read_schedule(tmp_path / "small.fora2.euler6.schedule.safetensors")
    assert schedule.checkpoint == open_checkpoint(tmp_path / "small.safetensors").fingerprint


@pytest.mark.parametrize("attention", slow_but(["timm"], ["timm", "flash"]))
def test_ancestral_sampling_of_latents_with_learned_variance(tmp_path: Path, attention: str) -> None:
    a = make_pico(sampler="ddpm", attention=attention, hidden=16, input_size=4).save(tmp_path / "a.safetensors")
    words = ("--solver", "ddpm", "--steps", 6, "--cfg", 2, "--images", 8, "--bins", 2, "--flops", 0.5)
    found = here("schedule", a, *words, cwd=tmp_path).result
    assert found["fewer_steps"] is None and found["flops"] <= 0.5 * (1 + 1e-6)


def test_distilled_checkpoints_by_their_own_steps(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path, **SMALL)
    found = here("schedule", pair.few, "--images", 8, "--flops", 0.7, cwd=tmp_path)
    assert found.result["sampling"]["solver"] == "euler" and found.result["sampling"]["steps"] == 4
    assert found.result["fewer_steps"] is None
    here("schedule", pair.few, "--images", 8, "--flops", 0.7, "--upstream-exact", cwd=tmp_path).error(2)


@pytest.mark.slow
def test_one_expert_a_token(folder: Path, tmp_path: Path) -> None:
    one = folder / "one.safetensors"
    found = here("schedule", one, *PLAN, cwd=tmp_path).result
    assert found["flops"] <= 0.6 * (1 + 1e-6)
    assert not any(rule in kind for kind in found["choices"] for rule in ("top", "odp", "saliency", "regressed"))


@pytest.mark.parametrize(
    "by", [("--guide-by", "top1"), pytest.param(("--guide-with", "one.safetensors"), marks=pytest.mark.slow)]
)
def test_weaker_models_that_guide(folder: Path, tmp_path: Path, by: tuple[str, str]) -> None:
    weak = (by[0], folder / by[1] if by[0] == "--guide-with" else by[1], "--guide-scale", 0.5)
    plan = " ".join(map(str, (*FORA, *weak, "--cfg", 1.5)))
    found = piped(f"ditmoe schedule {folder / 'a.safetensors'} {plan} | ditmoe sample --images 4", tmp_path)
    assert found.result["computed"]["method"] == "fora:2" and found.result["nfe"] == 18


@pytest.mark.slow
def test_a_guided_interval_whose_null_class_is_reused(folder: Path, tmp_path: Path) -> None:
    guided = ("--cfg", 3, "--cfg-interval", "0.3,0.9", "--max-damage", 0.05)
    a = folder / "a.safetensors"
    found = here("schedule", a, *WAY, "--images", 8, *guided, "--bins", 2, "--anyway", cwd=tmp_path)
    assert found.result["damage_bound"] <= 0.05
    schedule = read_schedule(Path(found.envelope["schedule"]))
    assert (schedule.table.null[0], schedule.bins) == ("off", 2)
    assert here("sample", a, "--images", 4, "--schedule", schedule.path, cwd=tmp_path).code == 0


def test_what_people_read(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    shown = here("schedule", a, *FORA, "-o", "x.safetensors", "--text", cwd=tmp_path).out
    for row in ("schedule", "method", "operations", "damage", "blocks", "kept", "fewer steps"):
        assert row in shown
    assert (
        here("schedule", a, *FORA, "-o", "x.safetensors", "-q", cwd=tmp_path).out == f"{tmp_path / 'x.safetensors'}\n"
    )


# done once


def test_the_same_is_up_to_date_and_another_is_refused(folder: Path, tmp_path: Path) -> None:
    words = ("schedule", folder / "a.safetensors", *PLAN, "-o", "x.safetensors")
    first = here(*words, cwd=tmp_path)
    before = contents(tmp_path)
    again = here(*words, cwd=tmp_path)
    assert "x.safetensors: is up to date" in again.err and again.result == first.result
    assert "--force" in here(*words, "--seed", 1, cwd=tmp_path).error(5)
    assert "--force" in here(*words, "--bins", 2, cwd=tmp_path).error(5)
    assert contents(tmp_path) == before
    assert here(*words, "--force", cwd=tmp_path).result == first.result
    assert contents(tmp_path) == before  # the same bytes
    assert here(*words, "--seed", 1, "--force", cwd=tmp_path).code == 0
    assert contents(tmp_path) != before
    (tmp_path / "x.safetensors").write_bytes(b"something else")
    here(*words, cwd=tmp_path).error(5)
    a = (tmp_path / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    assert a and here("schedule", "a.safetensors", *PLAN, "-o", "a.safetensors", "--force", cwd=tmp_path).code == 5


def test_dry_runs_import_no_torch_and_write_nothing(folder: Path, tmp_path: Path) -> None:
    ((outcome, heavy),) = series([("schedule", folder / "a.safetensors", *PLAN, "--dry-run")], tmp_path)
    assert outcome.code == 0, outcome.err
    assert not heavy and list(tmp_path.iterdir()) == []
    assert outcome.result["dry_run"] is True and outcome.result["estimate"]["seconds"] > 0
    assert outcome.result["path"].endswith("a.planned0.6.euler6.schedule.safetensors")
    words = ("schedule", folder / "a.safetensors", *WAY, "--flops", 0.0001, "--dry-run")
    assert "the least that can be chosen here is" in here(*words, cwd=tmp_path).error(4)


# fewer steps


def test_where_fewer_steps_win_nothing_is_written_unless_asked(folder: Path, tmp_path: Path) -> None:
    words = (
        "schedule",
        folder / "a.safetensors",
        "--solver",
        "euler",
        "--steps",
        12,
        "--images",
        8,
        "--method",
        "fora:3",
    )
    written = here(*words, "--anyway", cwd=tmp_path)
    rival = written.result["fewer_steps"]
    assert rival["error"] < rival["schedule_error"], "the fixture is meant to be one where fewer steps win"
    before = contents(tmp_path)
    said = here(*words, cwd=tmp_path).error(4)  # also where it was written before
    assert contents(tmp_path) == before
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert here(*words, cwd=tmp_path).error(4) == said
    assert list(tmp_path.iterdir()) == []
    steps = f"{rival['steps']} step{'s' if rival['steps'] > 1 else ''} of {rival['solver']}"
    assert said.startswith(f"{steps} cost no more ({rival['evaluations']} evaluations, the schedule 0.")
    assert "times less" in said and said.endswith("sample so, or write the schedule with --anyway")


# refusals


@pytest.mark.parametrize(
    ("model", "words", "code", "said"),
    [
        ("a", (), 2, "--flops, --max-damage: nothing says how much to save; give one, as --flops 0.6"),
        ("a", ("--flops", 0.5, "--max-damage", 0.1), 2, "--flops, --max-damage: both are given; give one"),
        ("a", ("--flops", 0), 2, "--flops 0: must be a share of all operations, above 0 and at most 1"),
        ("a", ("--flops", 1.5), 2, "--flops 1.5: must be a share of all operations"),
        ("a", ("--flops", "nan"), 2, "--flops nan: must be a share of all operations"),
        ("a", ("--flops", "half"), 2, "Invalid value for '--flops'"),
        ("a", ("--flops", 0.0001), 4, "--flops 0.0001: the least that can be chosen here is 0."),
        ("a", ("--method", "a-sdm", "--flops", 0.1), 4, "--flops 0.1: the least that can be chosen here is 0."),
        ("a", ("--max-damage", -1), 2, "--max-damage -1: must be at least 0, as 0.001"),
        ("a", ("--max-damage", "inf"), 2, "--max-damage inf: must be at least 0"),
        ("a", ("--method", "fora"), 2, "--method fora: give every how many evaluations all is computed, as in fora:2"),
        ("a", ("--method", "fora:1"), 2, "--method fora:1: give every how many evaluations"),
        ("a", ("--method", "fora:²"), 2, "as in fora:2"),
        ("a", ("--method", "top-p"), 2, "--method 'top-p': needs threshold; there are full, fora:N,"),
        ("a", ("--method", "top-p:x"), 2, "a threshold is a finite number of at least 0"),
        ("a", ("--method", "deepcache"), 2, "--method 'deepcache': is no choice of a block; there are full, fora:N,"),
        ("a", ("--method", "residual"), 2, "--method residual: give a threshold of at least 0"),
        (
            "a",
            ("--method", "fora:2", "--flops", 0.5),
            2,
            "--flops: has no effect beside --method fora:2; leave one out",
        ),
        ("a", ("--method", "full", "--max-damage", 0.5), 2, "--max-damage: has no effect beside --method full"),
        ("a", ("--flops", 0.5, "--images", 7), 2, "must be at least 8"),
        ("a", ("--flops", 0.5, "--bins", 7), 2, "--bins 7: must be between 1 and the 6 steps"),
        ("a", ("--flops", 0.5, "--bins", 0), 2, "--bins 0: must be between 1 and the 6 steps"),
        ("a", ("--flops", 0.5, "--cfg-interval", "0.2,0.8"), 2, "--cfg-interval 0.2,0.8: nothing is guided at a scale"),
        ("a", ("--flops", 0.5, "--cfg", -1), 2, "--cfg -1.0: must be a finite guidance scale"),
        ("a", ("--flops", 0.5, "--classes", "9"), 2, "--classes"),
        ("a", ("--flops", 0.5, "--guide-by", "top1"), 2, "--guide-by top1: give its scale, as --guide-scale 0.5"),
        ("a", ("--flops", 0.5, "--solver", "ddim"), 2, "--solver ddim"),
        ("a", ("--flops", 0.5, "-o", "x.pt"), 2, "x.pt"),
        ("one", ("--method", "odp"), 2, "--method odp: the model takes one expert a token"),
        ("one", ("--method", "top1"), 2, "choose fora:N, taylor:N or residual:T"),
        ("missing", ("--flops", 0.5), 3, "missing.safetensors"),
    ],
)
def test_bad_inputs(folder: Path, tmp_path: Path, model: str, words: tuple[object, ...], code: int, said: str) -> None:
    path = folder / f"{model}.safetensors"
    assert said in here("schedule", path, "--solver", "euler", "--steps", 6, *words, cwd=tmp_path).error(code)
    assert list(tmp_path.iterdir()) == []


# from Python


def test_from_python(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a = folder / "a.safetensors"
    told = here("schedule", a, *FORA, "-o", "cli.safetensors", cwd=tmp_path).result
    settings: dict[str, Any] = {"method": "fora:2", "solver": "euler", "steps": 6, "images": 8}
    foreseen = ditmoe_cli.schedule(a, **settings, dry_run=True)
    assert isinstance(foreseen, ForeseenSchedule) and not foreseen.path.exists()
    made = ditmoe_cli.schedule(a, **settings, anyway=True, output="x.safetensors")
    assert isinstance(made, MadeSchedule) and made.to_json() == json.loads(json.dumps(told))
    assert made.path.read_bytes() == (tmp_path / "cli.safetensors").read_bytes()
    assert "operations" in repr(made) or "fora:2" in repr(made)
    sampled = ditmoe_cli.sample(a, images=4, schedule=made.path)
    assert sampled.spec.schedule == read_schedule(made.path).digest
    with pytest.raises(InfeasibleError, match="or write the schedule with anyway"):
        ditmoe_cli.schedule(a, **{**settings, "steps": 12, "method": "fora:3"})
    with pytest.raises(UsageError, match="flops, max_damage: nothing says how much to save; give one, as"):
        ditmoe_cli.schedule(a)
    with pytest.raises(UsageError, match="flops 'x': give a number"):
        ditmoe_cli.schedule(a, flops="x")  # type: ignore[arg-type]
    with pytest.raises(OutputExistsError):
        ditmoe_cli.schedule(a, **{**settings, "method": "taylor:2"}, anyway=True, output="x.safetensors")
