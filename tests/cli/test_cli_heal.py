"""`ditmoe heal`: students of every kind in a pipe and from files, what is refused, and runs that go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow_but
from cli_helpers import Outcome, contents, here, on_terminal, piped, series, tensor_shapes
from conftest import make_pico
from healing import SMALL, changed, heal_on_few_states, pair
from interrupting import StoppedError, goes_on_to_the_same_bytes
from safetensors.torch import load_file
from students import LAYOUTS, OUT_OF_RANGE, PROFILING, STUDENTS, UNLIKE, refused, short_of_memory

from ditmoe_cli import open_checkpoint
from ditmoe_cli.compression.heal import healed_weights
from ditmoe_cli.compression.training import training_memory
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.files import pacing
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.routing.calibration_settings import spread_classes

SHORT = ("--steps", 6, "--batch", 8)
HEAL = ("heal", "s.safetensors", "--original", "a.safetensors", "--profile", "p.safetensors", *SHORT)


@pytest.fixture(scope="module", autouse=True)
def few_states() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        heal_on_few_states(monkeypatch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original with its profile, a student that nothing tells the origin of; not to be written to."""
    folder = tmp_path_factory.mktemp("healed")
    pair(folder)
    assert here(*PROFILING.split(), "a.safetensors", "-o", "p.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a profiled original of each layout and family."""
    folders = {}
    for name, (options, cfg) in LAYOUTS.items():
        folders[name] = tmp_path_factory.mktemp("layout")
        make_pico(**{**SMALL, **options}).save(folders[name] / "a.safetensors")
        profiling = here(*PROFILING.split(), "--cfg", cfg, "a.safetensors", cwd=folders[name])
        (folders[name] / "stage.json").write_text(profiling.out)
    return folders


# students of every kind


@pytest.mark.parametrize(
    ("student", "layout"),
    [  # test_cli_distill.py trains others of them each time
        *slow_but([("narrow", "timm rf")], zip(STUDENTS, cycle(LAYOUTS), strict=False))
    ],
)
def test_students_of_each_kind_are_healed_in_a_pipe(
    student: str, layout: str, profiled: dict[str, Path], tmp_path: Path
) -> None:
    source = profiled[layout]
    one = here(*STUDENTS[student].split(), cwd=tmp_path, stdin=(source / "stage.json").read_text())
    assert one.code == 0, one.err
    heal = ("heal", "--steps", 60, "--batch", 16, "--rate", 0.004)
    dry = here(*heal, "--dry-run", cwd=tmp_path, stdin=one.out)
    two = here(*heal, cwd=tmp_path, stdin=one.out)
    assert two.code == 0, two.err
    before, after = two.result["held_error"]
    assert 0 < after < before, "steps do what no closed form did"
    assert two.result["scopes"] == ["block", "model"] and two.result["block_steps"] == two.result["model_steps"] == 60
    assert len(two.result["held_error_before"]) == len(two.result["held_error_after"]) == 10

    assert two.result["bytes"] == dry.result["bytes"] == two.path.stat().st_size
    assert tensor_shapes(two.path) == tensor_shapes(one.path)
    old, new = load_file(one.path), load_file(two.path)
    kept = {name for name in old if torch.equal(old[name], new[name])}
    fixed = {name for name in old if name == "pos_embed" or name.endswith("expert_of")}
    assert fixed <= kept and not any(name.startswith("blocks.") for name in kept - fixed), (
        "others where blocks did best"
    )
    assert {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}

    envelope = two.envelope
    assert envelope["original"] == str(source / "a.safetensors")
    assert envelope["profile"] == str(source / "a.profile.safetensors")
    assert [step["command"] for step in envelope["history"]] == ["profile-experts", student_command(student), "heal"]
    checkpoint = open_checkpoint(two.path)
    assert checkpoint.config == open_checkpoint(one.path).config
    last = checkpoint.provenance().history[-1]
    assert last.command == "heal" and last.options["steps"] == 60
    assert list(map(float, last.measured["held_error"])) == pytest.approx([before, after], rel=1e-3)
    assert here("inspect", two.path, "--verify", cwd=tmp_path).code == 0


def student_command(student: str) -> str:
    return STUDENTS[student].split()[0]


def test_a_healed_student_is_quantised_scored_and_healed_again(profiled: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(profiled["timm rf"], tmp_path, dirs_exist_ok=True)
    line = (
        f"ditmoe {PROFILING} a.safetensors | ditmoe {STUDENTS['narrow']} | ditmoe heal --steps 4 --batch 8 | "
        "ditmoe convert --dtype fp16 | ditmoe heal --steps 3 --batch 8 --scope block | "
        "ditmoe quantize --uniform --format int8 | ditmoe fid --images 4 --steps 2 --extractor pixels"
    )
    outcome = piped(line, tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.envelope["original"] == str(tmp_path / "a.safetensors")
    commands = [step.command for step in open_checkpoint(outcome.path).provenance().history]
    assert commands == ["prune", "heal", "convert", "heal", "quantize"] and outcome.result["frechet"] >= 0


@pytest.mark.parametrize("scope", slow_but(["block"], ["block", "model"]))
def test_one_scope_alone(scope: str, folder: Path) -> None:
    outcome = here(*HEAL, "--scope", scope, "--steps", 60, cwd=folder)
    assert outcome.result["scopes"] == [scope]
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]
    assert outcome.path.name == f"s.heal-60steps-{scope}-batch8.safetensors"


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("router", ["moe.gate.weight"]),
        ("down,shared", ["experts.0.down_proj", "experts.1.down_proj", "experts.2.down_proj", "shared_experts"]),
        *slow_but(
            [],
            [
                ("norms", ["adaLN_modulation"]),
                ("embedders", ["embedder", "final_layer.linear"]),
                ("attention", ["attn."]),
                ("experts", [".experts."]),
            ],
        ),
    ],
)
def test_what_is_not_to_be_trained_keeps_its_bytes(train: str, trained: list[str], folder: Path) -> None:
    outcome = here(*HEAL, "--train", train, "--scope", "model", "--steps", 40, "--rate", 0.01, cwd=folder)
    old, new = load_file(folder / "s.safetensors"), load_file(outcome.path)
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing == {name for name in old if any(part in name for part in trained)}
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]


def test_a_list_of_groups_is_the_same_in_any_order(folder: Path) -> None:
    first = here(*HEAL, "--train", "shared, down,down", cwd=folder)
    again = here(*HEAL, "--train", "down,shared", cwd=folder)
    assert again.path == first.path and again.result["up_to_date"]
    assert first.path.name == "s.heal-6steps-shared+down-batch8.safetensors"


def test_a_useless_rate_leaves_the_weights_of_the_input(folder: Path) -> None:
    make_pico(**SMALL).with_state(final_layer__linear__bias=torch.full((8,), 1e-3)).save(
        folder / "s.safetensors", force=True
    )
    outcome = here(*HEAL, "--rate", 0.9, cwd=folder)
    before, after = outcome.result["held_error"]
    assert after <= before, "never worse than the input"
    old, new = load_file(folder / "s.safetensors"), load_file(outcome.path)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert any("the output has those of the input" in note for note in outcome.notes)
    assert outcome.result["held_error_after"] == outcome.result["held_error_before"]


# outputs


@pytest.mark.slow
def test_into_a_folder(folder: Path) -> None:
    words = (*HEAL, "-o", "out", "--max-shard-size", "20KB")
    dry = here(*words, "--dry-run", cwd=folder)
    outcome = here(*words, cwd=folder)
    assert outcome.result["bytes"] == dry.result["bytes"] == sum(f.stat().st_size for f in (folder / "out").iterdir())
    assert len(list((folder / "out").glob("*.safetensors"))) > 1
    single = here(*HEAL, "-o", "x.safetensors", cwd=folder)
    assert open_checkpoint(folder / "out").fingerprint == open_checkpoint(single.path).fingerprint
    assert here(*words, cwd=folder).result["up_to_date"]


def test_what_is_up_to_date_is_told_again(folder: Path) -> None:
    first = here(*HEAL, cwd=folder)
    before = contents(folder)
    again = here(*HEAL, cwd=folder)
    assert f"ditmoe: {first.path} is up to date" in again.notes and contents(folder) == before
    one, two = first.envelope, again.envelope
    expected, found = one.pop("result"), two.pop("result")
    assert found.pop("up_to_date") is True and expected.pop("seconds") >= 0
    for name in ("held_error", "held_error_before", "held_error_after"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-3)
    assert found == expected and two == one
    dry = here(*HEAL, "--dry-run", cwd=folder)
    assert dry.result["up_to_date"] and dry.result["dry_run"]


def test_another_request_for_the_same_output_is_refused(folder: Path) -> None:
    out = ("-o", "x.safetensors")
    assert here(*HEAL, *out, cwd=folder).code == 0
    for other in (("--steps", 7), ("--rate", 0.02), ("--train", "down"), ("--scope", "block")):
        for words in ((*HEAL, *out, *other), (*HEAL, *out, *other, "--dry-run")):
            message = refused(folder, 5, *words)
            assert "another request: heal" in message and "--force" in message, other
    assert here(*HEAL, *out, *other, "--force", cwd=folder).code == 0


def test_a_dry_run_takes_neither_torch_nor_a_profile_and_writes_nothing(folder: Path) -> None:
    (folder / "p.safetensors").unlink()
    before = contents(folder)
    words = ("heal", "s.safetensors", "--original", "a.safetensors", "--minutes", 7, "--dry-run")
    ((outcome, heavy),) = series([words], folder)
    assert not heavy and contents(folder) == before
    profiling, healing = outcome.result["estimate"]["phases"]
    assert profiling["what"].startswith("profiling") and healing["seconds"] == 420
    assert outcome.result["estimate"]["seconds"] == pytest.approx(profiling["seconds"] + 420)
    assert outcome.result["trained_weights"] == sum(
        tensor.numel() for name, tensor in load_file(folder / "s.safetensors").items() if name != "pos_embed"
    )


def test_minutes_are_kept_within(folder: Path) -> None:
    outcome = here(*HEAL[:-4], "--minutes", 0.01, "--batch", 8, cwd=folder)
    result = outcome.result
    assert result["block_steps"] >= 1 and result["model_steps"] >= 1 and result["images"] >= 10
    assert outcome.path.name == "s.heal-0.01min-batch8.safetensors"


@pytest.mark.parametrize(
    ("given", "spread"), slow_but([((), True)], [((), True), (("--calibration-classes", "3,5,7"), False)])
)
def test_sampled_images_are_of_all_classes_unless_told(
    given: tuple[object, ...], spread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model of 40 classes, whose profile has room for ten."""
    pair(tmp_path, num_classes=40)
    asked, sampled = list[tuple[int, ...]](), healed_weights.sampled_images

    def seen(teacher: DiTMoE, spec: SampleSpec, *more: Any) -> torch.Tensor:
        asked.append(spec.classes)
        return sampled(teacher, spec, *more)

    monkeypatch.setattr(healed_weights, "sampled_images", seen)
    words = ("--calibration-images", 10, "--calibration-steps", 2, *given, "--steps", 16, "--batch", 32)
    outcome = here(*HEAL[:4], *words, "--scope", "model", cwd=tmp_path)
    assert outcome.code == 0 and outcome.result["images"] == 18, outcome.err
    assert asked == [spread_classes(40) if spread else (3, 5, 7)]


# profiles


def test_a_profile_is_found_beside_the_original_or_made(folder: Path) -> None:
    heal = tuple(word for word in HEAL if word not in ("--profile", "p.safetensors"))
    settings = ("--calibration-images", 9, "--calibration-steps", 2)
    first = here(*heal, *settings, "-o", "x.safetensors", cwd=folder)
    (made,) = folder.glob("a.*.profile.safetensors")
    assert first.envelope["profile"] == str(made)
    again = here(*heal, *settings, "-o", "y.safetensors", cwd=folder)
    assert (folder / "y.safetensors").read_bytes() == (folder / "x.safetensors").read_bytes()
    assert any("using the profile kept" in note for note in again.notes)
    (folder / "p.safetensors").rename(folder / "a.profile.safetensors")
    third = here(*heal, "-o", "z.safetensors", cwd=folder)
    assert third.envelope["profile"] == str(folder / "a.profile.safetensors")


def test_a_profile_of_the_student_that_the_pipe_names_is_passed_over(folder: Path) -> None:
    student = here("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", "--no-refit", cwd=folder)
    profiled = here(*PROFILING.split(), cwd=folder, stdin=student.out)
    settings = ("--calibration-images", 9, "--calibration-steps", 2)
    outcome = here("heal", *SHORT, *settings, cwd=folder, stdin=profiled.out)
    assert outcome.code == 0, outcome.err
    assert Path(outcome.envelope["profile"]).name.startswith("a.")


def test_given_images_are_trained_on_alone(folder: Path) -> None:
    assert here("sample", "a.safetensors", "--images", 12, "--steps", 2, "-o", "i.safetensors", cwd=folder).code == 0
    heal = tuple(word for word in HEAL if word not in ("--profile", "p.safetensors"))
    outcome = here(*heal, "--calibration-data", "i.safetensors", "--calibration-images", 12, cwd=folder)
    assert outcome.result["images"] == 12, outcome.err


# bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *OUT_OF_RANGE,
        (("--steps", 0), "--steps 0: give at least 1"),
        (("--steps", 10**9), "give at most 999,999,999"),
        (("--steps", 5, "--minutes", 5), "--minutes, as 10, or --steps"),
        (("--steps", 5, "--scope", "everything"), "--scope"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_settings_out_of_range(words: tuple[object, ...], said: str, folder: Path) -> None:
    assert said in refused(folder, 2, *HEAL[:-4], *words)
    assert said in refused(folder, 2, *HEAL[:-4], *words, "--dry-run")


def test_the_original_has_to_be_named(folder: Path) -> None:
    assert "--original is missing" in refused(folder, 2, "heal", "s.safetensors")
    piped_itself = here("inspect", "s.safetensors", cwd=folder).out
    assert "--original is missing" in refused(folder, 2, "heal", stdin=piped_itself)


def test_an_original_that_is_missing_or_none(folder: Path) -> None:
    assert "x.safetensors: no such file" in refused(
        folder, 3, "heal", "s.safetensors", "--original", "x.safetensors", *SHORT
    )
    assert "p.safetensors" in refused(folder, 3, "heal", "s.safetensors", "--original", "p.safetensors", *SHORT)
    stage = json.loads(here("inspect", "s.safetensors", cwd=folder).out)
    stage["original"] = str(folder / "gone.safetensors")
    assert "gone.safetensors: no such file" in refused(folder, 3, "heal", *SHORT, stdin=json.dumps(stage))


def test_the_original_itself_and_the_wrong_way_round(folder: Path) -> None:
    assert "is the original itself" in refused(
        folder, 3, "heal", "a.safetensors", "--original", "a.safetensors", *SHORT
    )
    here("convert", "a.safetensors", "-o", "copy.safetensors", cwd=folder)
    assert "is the original itself" in refused(folder, 3, "heal", "copy.safetensors", *HEAL[2:])
    student = here("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", cwd=folder).path.name
    message = refused(folder, 3, "heal", "a.safetensors", "--original", student, *SHORT)
    assert "give them the other way round" in message and student in message


def test_a_student_of_another_model(folder: Path) -> None:
    make_pico(**SMALL, seed=9).save(folder / "b.safetensors")
    other = here("prune", "b.safetensors", "--keep", 2, "--method", "random", "--no-refit", cwd=folder).path.name
    message = refused(folder, 3, "heal", other, *HEAL[2:])
    assert f"{other}: was made from another checkpoint" in message and "--original" in message


def test_what_nothing_tells_the_origin_of_is_healed_with_a_warning(folder: Path) -> None:
    outcome = here(*HEAL, "--dry-run", cwd=folder)
    assert "ditmoe: warning: nothing tells whether s.safetensors was made from a.safetensors" in outcome.err
    first, second = (
        here("prune", "a.safetensors", "--keep", 2, "--method", "random", "--seed", n, "--no-refit", cwd=folder).path
        for n in (1, 2)
    )
    outcome = here("heal", first.name, "--original", second.name, "--dry-run", cwd=folder)
    assert "both were made from a third checkpoint" in outcome.err


@pytest.mark.parametrize(
    ("options", "said"), UNLIKE, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_shapes_that_cannot_correspond(options: dict[str, Any], said: str, folder: Path) -> None:
    make_pico(**{**SMALL, **options}).save(folder / "x.safetensors")
    for words in (("x.safetensors", *HEAL[2:]), ("x.safetensors", *HEAL[2:], "--dry-run")):
        message = refused(folder, 3, "heal", *words)
        assert "x.safetensors: its" in message and said in message and "--original" in message


def test_an_option_that_settles_what_the_original_cannot_tell_is_named(folder: Path) -> None:
    make_pico(**SMALL).save_pt(folder / "a.pt")
    changed(make_pico(**{**SMALL, "top_k": 1})).save(folder / "x.safetensors")
    words = ("heal", "x.safetensors", "--original", "a.pt", "--heads", 2, *SHORT)
    assert "or --top-k where its file cannot tell" in refused(folder, 3, *words)


@pytest.mark.parametrize("settings", [("--fast",), ("--reservoir", "0")], ids=" ".join)
def test_a_profile_without_states(settings: tuple[object, ...], folder: Path) -> None:
    words = ("profile-experts", "a.safetensors", "--images", 4, "--steps", 2, "--bins", 1, *settings)
    assert here(*words, "-o", "f.safetensors", cwd=folder).code == 0
    for more in ((), ("--dry-run",)):
        message = refused(folder, 3, *HEAL[:-4], "--profile", "f.safetensors", *SHORT, *more)
        assert "f.safetensors: keeps no states to train on" in message and "--fast" in message


def test_a_single_image_cannot_judge_and_be_trained_on(folder: Path) -> None:
    heal = tuple(word for word in HEAL if word not in ("--profile", "p.safetensors"))
    assert "images are too few" in refused(folder, 3, *heal, "--calibration-images", 1)


def test_profiles_of_others(folder: Path) -> None:
    make_pico(**SMALL, seed=9).save(folder / "b.safetensors")
    here(*PROFILING.split(), "b.safetensors", "-o", "q.safetensors", cwd=folder)
    here(*PROFILING.split(), "s.safetensors", "-o", "r.safetensors", cwd=folder)
    for profile in ("q.safetensors", "r.safetensors"):
        message = refused(folder, 3, *HEAL[:-4], "--profile", profile, *SHORT)
        assert profile in message and "another checkpoint" in message
    assert "no such profile" in refused(folder, 3, *HEAL[:-4], "--profile", "x.safetensors", *SHORT)
    assert "schema" in refused(folder, 3, *HEAL[:-4], "--profile", "a.safetensors", *SHORT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("whose", "profile"),
    [
        ("s.safetensors", ("--profile", "p.safetensors")),
        ("s.safetensors", ("--calibration-images", 4)),
        ("a.safetensors", ("--calibration-images", 4)),  # of which a profile is never made
    ],
    ids=["student", "student, to be profiled", "original"],
)
def test_weights_that_are_no_numbers(value: float, whose: str, profile: tuple[object, ...], folder: Path) -> None:
    name = "blocks.1.moe.experts.2.up_proj.weight"
    pico = make_pico(**SMALL) if whose == "a.safetensors" else changed(make_pico(**SMALL))
    pico.state[name][0, 0] = value
    pico.save(folder / whose, force=True)
    heal = tuple(word for word in HEAL if word not in ("--profile", "p.safetensors"))
    message = refused(folder, 3, *heal, *profile)
    assert whose in message and name in message and "NaN or infinite" in message


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_student_that_overflows(scope: str, folder: Path) -> None:
    """Finite weights whose predictions are not."""
    pico = changed(make_pico(**SMALL))
    huge = {name.replace(".", "__"): 1e30 * value for name, value in pico.state.items() if "moe" in name}
    pico.with_state(**huge).save(folder / "s.safetensors", force=True)
    message = refused(folder, 3, *HEAL, "--scope", scope)
    assert "s.safetensors" in message and "not finite" in message


def test_nothing_to_train(folder: Path) -> None:
    message = refused(folder, 3, *HEAL, "--train", "embedders", "--scope", "block")
    assert "s.safetensors: has no weights to train in embedders of its blocks; give --scope model" in message


def test_outputs_in_the_way_of_inputs(folder: Path) -> None:
    for name in ("s.safetensors", "a.safetensors", "p.safetensors"):
        for more in (("--force",), ("--force", "--dry-run")):
            assert "is the input itself" in refused(folder, 5, *HEAL, "-o", name, *more), name
    assert "no such folder" in refused(folder, 3, *HEAL, "-o", "nowhere/x.safetensors")
    (folder / "x.safetensors").write_text("mine")
    assert "exists already" in refused(folder, 5, *HEAL, "-o", "x.safetensors")


def test_memory_that_does_not_suffice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe_cli.compression.heal.healed_weights.free_on", lambda _: 50_000.0)
    message = refused(folder, 4, *HEAL, "--scope", "model")
    assert "end to end takes" in message and "--scope block" in message and "--train" in message
    outcome = here(*HEAL, cwd=folder)
    assert outcome.result["scopes"] == ["block"]
    assert any("healing block after block alone: end to end takes" in note for note in outcome.notes)


@pytest.mark.slow
def test_batches_are_halved_where_memory_runs_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sampling, in judging and in training: no memory for more than four states at once."""
    words = (*HEAL, "--scope", "model", "--batch", 64, "--steps", 8)
    whole = here(*words, "-o", "x.safetensors", cwd=folder)
    with monkeypatch.context() as short:
        short_of_memory(short, 4)
        outcome = here(*words, "-o", "y.safetensors", cwd=folder)
    assert outcome.code == 0, outcome.err
    told = [note for note in outcome.notes if "out of memory with" in note]
    assert sum("to the same gradients" in note for note in told) == 4, "64 states, 32, 16 and 8"
    assert len(told) == len(set(told)) > 4 + 3, "images, what judges, too, and each size only once"
    assert outcome.result["held_error"] == pytest.approx(whole.result["held_error"], rel=1e-3)


# going on


def healed_or_stopped(folder: Path, *words: object) -> Outcome:
    """Heal; raise what `stopping_after` ends a run by, which the command line reports."""
    outcome = here(*HEAL, *words, cwd=folder)
    if "StoppedError" in outcome.err:
        raise StoppedError
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WORK_PER_KEEPING", 0.0)
    monkeypatch.setattr(training_memory, "_STEPS_A_CHECK", 2)
    (folder / "runs").mkdir()

    def run(target: Path) -> None:
        healed_or_stopped(folder, "--steps", 4, "-o", target)

    pieces = goes_on_to_the_same_bytes(run, folder / "runs")
    assert [name.split(".")[0] for name in pieces] == [
        *("images", "block-course", "healed-block", "healed-block", "healed-block", "healed-block"),
        *("model-course", "training", "training", "trained"),
    ]


# what others make of a healed checkpoint


@pytest.fixture(scope="module")
def healed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("others") / "folder"))
    return folder, here(*HEAL, "-o", "h.safetensors", cwd=folder)


def test_inspect_tells_the_step(healed: tuple[Path, Outcome]) -> None:
    folder, outcome = healed
    code, text = on_terminal("inspect", "h.safetensors", cwd=folder, NO_COLOR="1")
    (line,) = (line for line in text.splitlines() if line.startswith("history"))
    before, after = outcome.result["held_error"]
    original = open_checkpoint(folder / "a.safetensors").fingerprint[:12]
    assert code == 0
    assert line.split(None, 1)[1] == (
        f"heal --batch 8 --original {original} --steps 6, held error {before:.3g} -> {after:.3g}"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "s.safetensors", "h.safetensors"),
        ("inspect", "h.safetensors", "a.safetensors", "--verify"),
        ("convert", "h.safetensors"),
        ("convert", "h.safetensors", "-o", "shards", "--max-shard-size", "20KB"),
        ("prune", "h.safetensors", "--keep", 2, "--refit-tokens", 64),
        ("merge", "h.safetensors", "--groups", 2, "--no-refit"),
        ("compare", "a.safetensors", "h.safetensors", "--images", 4, "--steps", 2, "--bins", 2),
        ("sample", "h.safetensors", "--images", 4, "--steps", 2),
        ("bench", "h.safetensors", "--batch", 1, "--repeats", 1),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_commands_take_a_healed_checkpoint(words: tuple[object, ...], healed: tuple[Path, Outcome]) -> None:
    folder, _ = healed
    outcome = here(*words, cwd=folder)
    assert outcome.code == 0, outcome.err


def test_the_table_of_a_run(healed: tuple[Path, Outcome]) -> None:
    folder, outcome = healed
    code, text = on_terminal(*HEAL, "-o", "h.safetensors", cwd=folder, NO_COLOR="1")
    assert code == 0
    rows = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line and not line.startswith("ditmoe"))
    before, after = outcome.result["held_error"]
    assert rows["error"].strip().startswith(f"{before:.3g} -> {after:.3g} of the guided prediction")
    assert "6 steps of each block and 6 steps of the model, on 10 images noised anew" in rows["healed"]
