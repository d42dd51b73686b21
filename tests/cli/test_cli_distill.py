"""`ditmoe distill`: students of every kind in a pipe and from files, what is refused, and runs that go on."""

from __future__ import annotations

import json
import shutil
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow_but
from cli_helpers import Outcome, contents, here, on_terminal, piped, series, tensor_shapes
from conftest import Pico, make_pico
from healing import SMALL, changed, pair
from interrupting import StoppedError, goes_on_to_the_same_bytes, stopping_after
from packed import packed_pico
from safetensors.torch import load_file
from stored_parts import wholly_packed
from students import LAYOUTS, OUT_OF_RANGE, PROFILING, STUDENTS, UNLIKE, refused, short_of_memory

from ditmoe_cli import open_checkpoint
from ditmoe_cli.compression.distill import kept_paths
from ditmoe_cli.compression.training import training_memory
from ditmoe_cli.files import pacing

SHORT = ("--steps", 2, "--iterations", 6, "--batch", 8, "--teacher-steps", 4)
DISTILL = ("distill", "s.safetensors", "--original", "a.safetensors", *SHORT)
LEARNING = ("--steps", 2, "--iterations", 24, "--batch", 16, "--teacher-steps", 4, "--rate", 0.005)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, and a student that nothing tells the origin of; not to be written to."""
    folder = tmp_path_factory.mktemp("distilled")
    pair(folder)
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
    [  # the other kinds are healed each time in test_cli_heal.py
        *slow_but(
            [("mass", "flash rf"), ("constants", "timm ddpm"), ("merge", "flash ddpm")],
            zip(STUDENTS, cycle(LAYOUTS), strict=False),
        )
    ],
)
def test_students_of_each_kind_are_distilled_in_a_pipe(
    student: str, layout: str, profiled: dict[str, Path], tmp_path: Path
) -> None:
    source, cfg = profiled[layout], LAYOUTS[layout][1]
    one = here(*STUDENTS[student].split(), cwd=tmp_path, stdin=(source / "stage.json").read_text())
    assert one.code == 0, one.err
    distill = ("distill", *LEARNING, "--cfg", cfg)
    dry = here(*distill, "--dry-run", cwd=tmp_path, stdin=one.out)
    two = here(*distill, cwd=tmp_path, stdin=one.out)
    assert two.code == 0, two.err
    before, after = two.result["held_error"]
    assert 0 < after < before
    assert two.result["iterations"] == 24 and two.result["paths"] == 96 + 12
    assert len(two.result["path_error_before"]) == len(two.result["path_error_after"]) == 2
    assert two.result["path_error_after"][-1] == after

    assert two.result["bytes"] == dry.result["bytes"] == two.path.stat().st_size
    assert tensor_shapes(two.path) == tensor_shapes(one.path)
    old, new = load_file(one.path), load_file(two.path)
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert {name for name in old if name == "pos_embed" or name.endswith("expert_of")} <= same
    assert {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}

    envelope = two.envelope
    assert envelope["original"] == str(source / "a.safetensors") and envelope["profile"] is None
    commands = ["profile-experts", STUDENTS[student].split()[0], "distill"]
    assert [step["command"] for step in envelope["history"]] == commands
    checkpoint = open_checkpoint(two.path)
    assert checkpoint.config == open_checkpoint(one.path).config
    family = checkpoint.config.sampler
    few = checkpoint.distilled
    assert few is not None
    assert (few.solver, few.steps, few.cfg) == ({"rf": "euler", "ddpm": "ddim-trailing"}[family], 2, float(cfg))
    assert (few.teacher_solver, few.teacher_steps) == ({"rf": "ab3", "ddpm": "ddpm-dpmpp-2m"}[family], 4)
    last = checkpoint.provenance().history[-1]
    assert last.command == "distill" and last.options["steps"] == 2 and last.options["iterations"] == 24
    assert list(map(float, last.measured["path_error_after"])) == pytest.approx(
        two.result["path_error_after"], rel=1e-3
    )
    assert here("inspect", two.path, "--verify", cwd=tmp_path).code == 0


def test_a_distilled_student_is_quantised_scored_and_distilled_on(profiled: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(profiled["timm rf"], tmp_path, dirs_exist_ok=True)
    words = "--batch 8 --teacher-steps 4"
    line = (
        f"ditmoe {PROFILING} a.safetensors | ditmoe {STUDENTS['narrow']} | "
        f"ditmoe distill --steps 4 --iterations 4 {words} --cfg 1.5 | ditmoe convert --dtype fp16 | "
        f"ditmoe distill --steps 2 --iterations 4 {words} --cfg 1.5 | "
        "ditmoe quantize --uniform --format int8 | "
        "ditmoe fid --images 4 --extractor pixels"
    )
    outcome = piped(line, tmp_path)
    assert outcome.code == 0, outcome.err
    assert outcome.envelope["original"] == str(tmp_path / "a.safetensors")
    checkpoint = open_checkpoint(outcome.path)
    commands = [step.command for step in checkpoint.provenance().history]
    assert commands == ["prune", "distill", "convert", "distill", "quantize"]
    assert checkpoint.distilled is not None and checkpoint.distilled.steps == 2, "the last one counts"
    assert outcome.result["frechet"] >= 0


@pytest.mark.parametrize(
    "words",
    [
        ("distill", "a.safetensors"),
        pytest.param(("distill", "a.safetensors", "--original", "a.safetensors"), marks=pytest.mark.slow),
    ],
)
def test_the_original_itself_is_a_student(words: tuple[str, ...], folder: Path) -> None:
    outcome = here(*words, *LEARNING, cwd=folder)
    assert outcome.code == 0, outcome.err
    before, after = outcome.result["held_error"]
    assert after < before and not any("warning" in line for line in outcome.notes)
    assert outcome.result["original"] == str(folder / "a.safetensors")
    assert outcome.path.name == "a.distill-2steps-24iterations-from4-batch16-rate0.005.safetensors"


def test_the_original_itself_is_a_student_in_a_pipe(folder: Path) -> None:
    outcome = piped(f"ditmoe inspect a.safetensors | ditmoe distill {' '.join(map(str, SHORT))}", folder)
    assert outcome.code == 0, outcome.err
    assert outcome.result["original"] == str(folder / "a.safetensors")


def quantised(kind: str) -> Pico:
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, widths=((32, 48, 32),) * 2)
    if kind == "mix":
        return packed_pico(packed_pico(pico, "int2-g32", "experts.1."), "ternary-g32", "experts.2.")
    return wholly_packed(pico, kind)


@pytest.mark.parametrize(
    ("kind", "words", "moved"),
    [
        ("nf4", (), "absmax"),
        pytest.param("int8", (), "SCB", marks=pytest.mark.slow),
        pytest.param("int3-g32", ("--train", "attention"), "weight_scale", marks=pytest.mark.slow),
        pytest.param("int4-g32", ("--train", "lora:2"), "weight_scale", marks=pytest.mark.slow),
        ("mix", ("--codes", "learn", "--train", "experts", "--rate", 0.1), "weight_scale"),
    ],
)
def test_quantised_students_are_distilled_in_their_layout(
    kind: str, words: tuple[object, ...], moved: str, tmp_path: Path
) -> None:
    student = quantised(kind).save(tmp_path / "s.safetensors")
    make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, widths=((32, 48, 32),) * 2).save(
        tmp_path / "a.safetensors"
    )
    dry = here(*DISTILL, *words, "--iterations", 30, "--dry-run", cwd=tmp_path)
    outcome = here(*DISTILL, *words, "--iterations", 30, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    before, after = outcome.result["held_error"]
    assert after < before
    assert outcome.result["bytes"] == dry.result["bytes"] == outcome.path.stat().st_size
    old, new = open_checkpoint(student), open_checkpoint(outcome.path)
    assert new.header.tensors == old.header.tensors
    assert [weight.format for weight in new.weights.values()] == [weight.format for weight in old.weights.values()]
    differing = {name for name in old.header.tensors if not old.finite_tensor(name).equal(new.finite_tensor(name))}
    assert any(name.endswith(moved) for name in differing), differing
    codes = {weight.members[0] for weight in old.weights.values() if weight.quantized}
    if "learn" in words:
        assert "codes of ternary-g32 stay as they are, and scales are trained" in outcome.err
        assert differing & codes
    else:
        assert not differing & codes, "codes are fixed"


def test_students_of_differences_are_distilled_in_their_layout(profiled: dict[str, Path], tmp_path: Path) -> None:
    stage = (profiled["timm rf"] / "stage.json").read_text()
    one = here("merge", "--delta", "svd", "--delta-ratio", 0.5, cwd=tmp_path, stdin=stage)
    two = here("distill", *LEARNING, cwd=tmp_path, stdin=one.out)
    assert two.code == 0, two.err
    assert two.result["held_error"][1] < two.result["held_error"][0]
    assert open_checkpoint(two.path).header.tensors == open_checkpoint(one.path).header.tensors


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        pytest.param("router", ["moe.gate.weight"], marks=pytest.mark.slow),
        pytest.param("embedders", ["embedder", "final_layer.linear"], marks=pytest.mark.slow),
        ("attention,norms", ["attn.", "adaLN_modulation"]),
    ],
)
def test_what_is_not_to_be_trained_keeps_its_bytes(train: str, trained: list[str], folder: Path) -> None:
    outcome = here(*DISTILL, "--train", train, "--iterations", 30, cwd=folder)
    old, new = load_file(folder / "s.safetensors"), load_file(outcome.path)
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]
    differing = {name for name in old if not torch.equal(old[name], new[name])}
    assert differing <= {name for name in old if any(part in name for part in trained)} and differing


@pytest.mark.slow
def test_updates_of_low_rank(folder: Path) -> None:
    outcome = here(*DISTILL, "--train", "lora:2", "--iterations", 40, cwd=folder)
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]
    assert outcome.envelope["history"][-1]["options"]["train"] == "lora:2"
    few, whole = (here(*DISTILL, *more, "--dry-run", cwd=folder).result for more in (("--train", "lora:1"), ()))
    assert few["trained_weights"] < whole["trained_weights"]
    assert few["estimate"]["memory"] < whole["estimate"]["memory"]


def test_half_precision_stays_half_precision(folder: Path) -> None:
    made = here("convert", "s.safetensors", "--dtype", "bf16", "-o", "h.safetensors", cwd=folder)
    outcome = here("distill", made.path, *DISTILL[2:], "--iterations", 30, cwd=folder)
    old, new = load_file(made.path), load_file(outcome.path)
    assert {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]


# methods


@pytest.mark.parametrize(
    ("layout", "methods"),
    [
        ("timm rf", [(), ("--states", "own"), ("--progressive",)]),
        pytest.param("flash ddpm", [(), ("--states", "own", "--progressive")], marks=pytest.mark.slow),
    ],
)
def test_states_of_its_own_and_progress(
    layout: str, methods: list[tuple[str, ...]], profiled: dict[str, Path], tmp_path: Path
) -> None:
    words = ("distill", profiled[layout] / "a.safetensors", "--steps", 2, "--teacher-steps", 8)
    results, files = [], []
    for more in methods:
        outcome = here(*words, "--iterations", 24, "--batch", 16, "--rate", 0.005, *more, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        before, after = outcome.result["held_error"]
        assert after < before and outcome.result["iterations"] == 24, "of all stages together"
        results.append(outcome.result)
        files.append(outcome.path.read_bytes())
    assert len(set(files)) == len(methods)
    assert results[0]["held_error"][0] == pytest.approx(results[1]["held_error"][0]), "judged on the same paths"


@pytest.mark.parametrize(
    "guide",
    [
        ("--guide-by", "top1", "--guide-scale", 0.5),
        pytest.param(
            ("--guide-with", "weak.safetensors", "--guide-scale", 1, "--guide-interval", "0.2,0.8", "--cfg", 1.5),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_guidance_by_a_weaker_model_goes_into_the_weights(guide: tuple[object, ...], folder: Path) -> None:
    changed(make_pico(**SMALL), 0.3, seed=9).save(folder / "weak.safetensors")
    words = ("distill", "a.safetensors", *LEARNING, *guide)
    dry, outcome = here(*words, "--dry-run", cwd=folder), here(*words, cwd=folder)
    assert outcome.code == 0, outcome.err
    assert outcome.result["held_error"][1] < outcome.result["held_error"][0]
    assert outcome.result["bytes"] == dry.result["bytes"] == outcome.path.stat().st_size
    assert here(*words, cwd=folder).result["up_to_date"]
    few = open_checkpoint(outcome.path).distilled
    weak = open_checkpoint(folder / "weak.safetensors").fingerprint
    assert few is not None and few.guide_scale == guide[3] and few.guide == ("top1" if guide[1] == "top1" else weak)
    plain = here("distill", "a.safetensors", *LEARNING, "-o", "plain.safetensors", cwd=folder)
    assert plain.path.read_bytes() != outcome.path.read_bytes()
    assert plain.result["held_error"] != outcome.result["held_error"], "of other images"


def test_weaker_models_that_cannot_guide(folder: Path) -> None:
    pico = changed(make_pico(**SMALL), 0.3, seed=9)
    huge = {name.replace(".", "__"): 1e30 * value for name, value in pico.state.items() if "moe" in name}
    pico.with_state(**huge).save(folder / "huge.safetensors")
    pico.state["blocks.0.moe.gate.weight"][0, 0] = float("nan")
    pico.save(folder / "nan.safetensors")
    make_pico(**{**SMALL, "in_channels": 3}).save(folder / "other.safetensors")
    for name, said in (
        ("huge", "in the weaker model"),
        ("nan", "nan.safetensors: tensor 'blocks.0.moe.gate.weight' holds NaN"),
        ("other", "other.safetensors"),
        ("a", "a model is not guided by itself"),
        ("gone", "gone.safetensors: no such file"),
    ):
        assert said in refused(folder, 3, *DISTILL, "--guide-with", f"{name}.safetensors", "--guide-scale", 1)
    assert "is the input itself" in refused(
        folder, 5, *DISTILL, "--guide-with", "s.safetensors", "--guide-scale", 1, "-o", "s.safetensors", "--force"
    )


def test_iterations_are_shared_by_stages_to_the_last_one(folder: Path) -> None:
    words = ("distill", "a.safetensors", "--steps", 1, "--teacher-steps", 8, "--progressive", "--batch", 4)
    for asked in (2, 7):
        outcome = here(*words, "--iterations", asked, "-o", f"{asked}.safetensors", cwd=folder)
        if asked < 3:
            assert "--iterations" in outcome.error(2)
        else:
            assert outcome.result["iterations"] == asked


def test_minutes_are_kept_within(folder: Path) -> None:
    outcome = here(*DISTILL[:4], "--steps", 2, "--minutes", 0.005, "--batch", 8, cwd=folder)
    result = outcome.result
    assert result["iterations"] >= 1 and result["paths"] >= 2
    assert outcome.path.name == "s.distill-2steps-0.005min-batch8.safetensors"
    assert open_checkpoint(outcome.path).distilled is not None
    tiny = here(*DISTILL[:4], "--minutes", 1e-9, "--progressive", "--steps", 4, cwd=folder)
    assert tiny.code == 0 and tiny.result["paths"] == 2 and tiny.result["iterations"] == 2


@pytest.mark.slow
def test_a_useless_rate_leaves_the_weights_of_the_input(folder: Path) -> None:
    outcome = here(*DISTILL, "--rate", 0.99, "--iterations", 30, cwd=folder)
    before, after = outcome.result["held_error"]
    assert after <= before, "never worse than the input"
    if after == before:
        assert any("the output has those of the input" in note for note in outcome.notes)
        assert outcome.result["path_error_after"] == outcome.result["path_error_before"]
        old, new = load_file(folder / "s.safetensors"), load_file(outcome.path)
        assert all(torch.equal(old[name], new[name]) for name in old)


# outputs


def test_into_a_folder(folder: Path) -> None:
    words = (*DISTILL, "-o", "out", "--max-shard-size", "20KB")
    dry = here(*words, "--dry-run", cwd=folder)
    outcome = here(*words, cwd=folder)
    assert outcome.result["bytes"] == dry.result["bytes"] == sum(f.stat().st_size for f in (folder / "out").iterdir())
    assert len(list((folder / "out").glob("*.safetensors"))) > 1
    single = here(*DISTILL, "-o", "x.safetensors", cwd=folder)
    assert open_checkpoint(folder / "out").fingerprint == open_checkpoint(single.path).fingerprint
    assert open_checkpoint(folder / "out").distilled == open_checkpoint(single.path).distilled
    assert here(*words, cwd=folder).result["up_to_date"]


def test_equal_requests_give_equal_bytes_and_other_seeds_do_not(folder: Path) -> None:
    files = []
    for name, seed in (("x", 0), ("y", 0), ("z", 1)):
        assert here(*DISTILL, "--seed", seed, "-o", f"{name}.safetensors", cwd=folder).code == 0
        files.append((folder / f"{name}.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_what_is_up_to_date_is_told_again(folder: Path) -> None:
    first = here(*DISTILL, cwd=folder)
    before = contents(folder)
    again = here(*DISTILL, cwd=folder)
    assert f"ditmoe: {first.path} is up to date" in again.notes and contents(folder) == before
    one, two = first.envelope, again.envelope
    expected, found = one.pop("result"), two.pop("result")
    assert found.pop("up_to_date") is True and expected.pop("seconds") >= 0
    for name in ("held_error", "path_error_before", "path_error_after"):
        assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-3)
    assert found == expected and two == one
    dry = here(*DISTILL, "--dry-run", cwd=folder)
    assert dry.result["up_to_date"] and dry.result["dry_run"]
    forced = here(*DISTILL, "--force", cwd=folder)
    assert "up_to_date" not in forced.result and contents(folder) == before, "the same bytes again"


def test_another_request_for_the_same_output_is_refused(folder: Path) -> None:
    out = ("-o", "x.safetensors")
    assert here(*DISTILL, *out, cwd=folder).code == 0
    for other in (("--iterations", 7), ("--cfg", 1.5), ("--states", "own"), ("--teacher-steps", 8), ("--steps", 4)):
        for words in ((*DISTILL, *out, *other), (*DISTILL, *out, *other, "--dry-run")):
            message = refused(folder, 5, *words)
            assert "another request: distill" in message and "--force" in message, other


def test_a_dry_run_takes_no_torch_and_writes_nothing(folder: Path) -> None:
    before = contents(folder)
    timed = (*DISTILL[:4], "--minutes", 7, "--dry-run")
    ((outcome, heavy), (other, _)) = series([timed, (*DISTILL, "--dry-run")], folder)
    assert not heavy and contents(folder) == before
    (distilling,) = outcome.result["estimate"]["phases"]
    assert distilling["what"] == "distilling to 4 steps" and distilling["seconds"] == 420
    assert outcome.result["trained_weights"] == sum(
        tensor.numel() for name, tensor in load_file(folder / "s.safetensors").items() if name != "pos_embed"
    )
    assert outcome.envelope["checkpoint"] == str(folder / "s.safetensors")
    assert other.result["estimate"]["seconds"] < 420


def test_the_table_of_a_run_and_what_inspect_tells(folder: Path) -> None:
    result = here(*DISTILL, "-o", "d.safetensors", cwd=folder).result
    code, text = on_terminal(*DISTILL, "-o", "d.safetensors", cwd=folder, NO_COLOR="1")
    assert code == 0
    rows = dict(line.split("  ", 1) for line in text.splitlines() if "  " in line and not line.startswith("ditmoe"))
    before, after = result["held_error"]
    assert rows["error"].strip() == f"{before:.3g} -> {after:.3g} of images, on held-out noise"
    assert rows["distilled"].strip() == "to 2 steps, in 6 iterations on 16 paths"
    code, text = on_terminal("inspect", "d.safetensors", cwd=folder, NO_COLOR="1")
    (line,) = (line for line in text.splitlines() if line.startswith("history"))
    original = open_checkpoint(folder / "a.safetensors").fingerprint[:12]
    assert line.split(None, 1)[1].startswith(
        f"distill --batch 8 --iterations 6 --original {original} --steps 2 --teacher-steps 4"
    )


# bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *OUT_OF_RANGE,
        (("--iterations", 0), "--iterations 0: give at least 1"),
        (("--iterations", 10**30), "give at most 999,999,999"),
        (("--iterations", 5, "--minutes", 5), "--minutes, as 10, or --iterations"),
        (("--steps", 0), "--steps 0"),
        (("--steps", -1), "--steps -1"),
        (("--steps", 25), "--steps 25: the original itself takes 24 of ab3; give fewer, or more --teacher-steps"),
        (("--steps", 32, "--teacher-steps", 16), "--teacher-steps 16: give a multiple of the 32 steps"),
        (("--teacher-steps", 6), "--teacher-steps 6: give a multiple of the 4 steps of the student"),
        (("--teacher-steps", 0), "--teacher-steps 0"),
        (("--teacher-steps", 10**9), "--teacher-steps 1000000000: ab3 takes at most 100000"),
        (("--cfg", -1), "--cfg -1"),
        (("--cfg", "nan"), "--cfg nan"),
        (("--cfg", "inf"), "--cfg inf"),
        (("--states", "mine"), "--states mine"),
        (("--steps", 1, "--states", "own"), "--states own has no effect with --steps 1"),
        (("--steps", 8, "--progressive"), "--progressive has no effect"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_settings_out_of_range(words: tuple[object, ...], said: str, folder: Path) -> None:
    assert said in refused(folder, 2, *DISTILL[:4], *words)
    assert said in refused(folder, 2, *DISTILL[:4], *words, "--dry-run")


@pytest.mark.parametrize(
    ("options", "said"), UNLIKE, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_shapes_that_cannot_correspond(options: dict[str, Any], said: str, folder: Path) -> None:
    make_pico(**{**SMALL, **options}).save(folder / "x.safetensors")
    for words in (("x.safetensors", *DISTILL[2:]), ("x.safetensors", *DISTILL[2:], "--dry-run")):
        message = refused(folder, 3, "distill", *words)
        assert "x.safetensors: its" in message and said in message and "--original" in message


def test_guidance_without_a_null_class(tmp_path: Path) -> None:
    pair(tmp_path, null_class=False)
    assert "no null class" in refused(tmp_path, 2, *DISTILL, "--cfg", 1.5)
    assert here(*DISTILL, cwd=tmp_path).code == 0


def test_an_original_that_is_missing_or_none(folder: Path) -> None:
    for name in ("x.safetensors", "."):
        assert "--original" not in name
        refused(folder, 3, *DISTILL[:2], "--original", name, *SHORT)
    message = refused(folder, 3, *DISTILL[:2], "--original", "x.safetensors", *SHORT)
    assert "x.safetensors: no such file" in message
    stage = json.loads(here("inspect", "s.safetensors", cwd=folder).out)
    stage["original"] = str(folder / "gone.safetensors")
    assert "gone.safetensors: no such file" in refused(folder, 3, "distill", *SHORT, stdin=json.dumps(stage))
    stage["original"] = None
    assert "--original is missing" in refused(folder, 2, "distill", *SHORT, stdin=json.dumps(stage))


def test_the_wrong_way_round(folder: Path) -> None:
    student = here("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", cwd=folder).path.name
    message = refused(folder, 3, "distill", "a.safetensors", "--original", student, *SHORT)
    assert "give them the other way round" in message and student in message


def test_what_was_trained_towards_an_original_is_trained_towards_it_again(folder: Path) -> None:
    """Also where nothing tells that it was made from it, and with all that was done to it in between."""
    few = here(*DISTILL, "-o", "few.safetensors", cwd=folder).path.name
    small = here("quantize", few, "--uniform", "--bits", 8, "-o", "small.safetensors", cwd=folder).path.name
    for student in (few, small):
        outcome = here("distill", student, *DISTILL[2:], "--steps", 1, cwd=folder)
        assert outcome.code == 0 and outcome.notes == [], outcome.err
    make_pico(**SMALL, seed=9).save(folder / "b.safetensors")
    message = refused(folder, 3, "distill", few, "--original", "b.safetensors", *SHORT)
    assert f"{few}: was made from another checkpoint" in message


def test_assumptions_of_the_original_as_its_own_student_are_told_once(folder: Path) -> None:
    make_pico(**SMALL).save_pt(folder / "a.pt")
    outcome = here("distill", "a.pt", "--heads", 2, *SHORT, "--dry-run", cwd=folder)
    assert outcome.notes and len(outcome.notes) == len(set(outcome.notes))


def test_a_student_of_another_model(folder: Path) -> None:
    make_pico(**SMALL, seed=9).save(folder / "b.safetensors")
    other = here("prune", "b.safetensors", "--keep", 2, "--method", "random", "--no-refit", cwd=folder).path.name
    message = refused(folder, 3, "distill", other, *DISTILL[2:])
    assert f"{other}: was made from another checkpoint" in message and "--original" in message


def test_what_nothing_tells_the_origin_of_is_distilled_with_a_warning(folder: Path) -> None:
    outcome = here(*DISTILL, "--dry-run", cwd=folder)
    assert "ditmoe: warning: nothing tells whether s.safetensors was made from a.safetensors" in outcome.err
    piped_itself = here("inspect", "s.safetensors", cwd=folder).out
    alone = here("distill", *SHORT, "--dry-run", cwd=folder, stdin=piped_itself)
    assert alone.notes == [] and alone.result["original"] == str(folder / "s.safetensors")


def test_a_compressed_student_learns_from_itself_only_where_that_is_said(folder: Path) -> None:
    student = here("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", cwd=folder).path.name
    here("convert", "a.safetensors", "--dtype", "bf16", "-o", "half.safetensors", cwd=folder)
    piped_itself = here("inspect", student, cwd=folder).out
    for words, stdin in ((("distill", student, *SHORT), None), (("distill", *SHORT), piped_itself)):
        message = refused(folder, 2, *words, stdin=stdin)
        assert f"--original is missing: {student} was made from another checkpoint" in message and "by prune" in message
    given = here("distill", student, "--original", student, *SHORT, "--dry-run", cwd=folder)
    assert given.notes == [], "who names it means it"
    assert here("distill", student, *DISTILL[2:], "--dry-run", cwd=folder).notes == []
    assert here("distill", "half.safetensors", *SHORT, "--dry-run", cwd=folder).code == 0, (
        "in another dtype it is the same"
    )


def test_an_original_that_is_distilled_itself(folder: Path) -> None:
    few = here("distill", "a.safetensors", *SHORT, "-o", "few.safetensors", cwd=folder)
    assert few.code == 0
    for words in (
        ("distill", "few.safetensors", *SHORT),
        ("distill", "s.safetensors", "--original", "few.safetensors", *SHORT),
        ("distill", "a.safetensors", "--original", "few.safetensors", *SHORT),
    ):
        message = refused(folder, 3, *words)
        assert "few.safetensors: was distilled to 2 steps itself" in message and "--original" in message
    on = here("distill", "few.safetensors", "--original", "a.safetensors", *SHORT, "--steps", 1, cwd=folder)
    assert on.code == 0 and open_checkpoint(on.path).distilled is not None, "it may learn on itself"


def test_a_pipe_that_goes_on_behind_a_distilled_checkpoint_knows_its_original(folder: Path) -> None:
    short = " ".join(map(str, SHORT))
    line = f"ditmoe inspect a.safetensors | ditmoe distill {short} | ditmoe distill {short} --seed 1"
    outcome = piped(line, folder)
    assert outcome.code == 0 and outcome.result["original"] == str(folder / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("whose", ["s.safetensors", "a.safetensors"])
def test_weights_that_are_no_numbers(value: float, whose: str, folder: Path) -> None:
    name = "blocks.1.moe.experts.2.up_proj.weight"
    pico = make_pico(**SMALL) if whose == "a.safetensors" else changed(make_pico(**SMALL))
    pico.state[name][0, 0] = value
    pico.save(folder / whose, force=True)
    message = refused(folder, 3, *DISTILL)
    assert whose in message and name in message and "NaN or infinite" in message


@pytest.mark.parametrize("whose", ["s.safetensors", "a.safetensors"])
def test_models_that_overflow(whose: str, folder: Path) -> None:
    """Finite weights whose predictions are not: which model has them is said."""
    pico = changed(make_pico(**SMALL))
    huge = {name.replace(".", "__"): 1e30 * value for name, value in pico.state.items() if "moe" in name}
    pico.with_state(**huge).save(folder / whose, force=True)
    message = refused(folder, 3, *DISTILL)
    assert whose in message and ("not finite" in message or "NaN or infinite" in message)


def test_outputs_in_the_way_of_inputs(folder: Path) -> None:
    for name in ("s.safetensors", "a.safetensors"):
        for more in (("--force",), ("--force", "--dry-run")):
            assert "is the input itself" in refused(folder, 5, *DISTILL, "-o", name, *more), name
    assert "no such folder" in refused(folder, 3, *DISTILL, "-o", "nowhere/x.safetensors")
    (folder / "x.safetensors").write_text("mine")
    assert "exists already" in refused(folder, 5, *DISTILL, "-o", "x.safetensors")


def test_memory_that_does_not_suffice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe_cli.compression.distill.distilled_weights.free_on", lambda _: 50_000.0)
    message = refused(folder, 4, *DISTILL)
    assert "distilling s.safetensors takes" in message and "--train" in message and "lora:8" in message


# going on


def distilled_or_stopped(folder: Path, *words: object) -> Outcome:
    """Distil; raise what `stopping_after` ends a run by, which the command line reports."""
    outcome = here(*DISTILL, *words, cwd=folder)
    if "StoppedError" in outcome.err:
        raise StoppedError
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "WORK_PER_KEEPING", 0.0)
    monkeypatch.setattr(training_memory, "_STEPS_A_CHECK", 1)
    monkeypatch.setattr(kept_paths, "SAMPLED", 14)
    (folder / "runs").mkdir()
    words = ("--progressive", "--states", "own", "--teacher-steps", 8, "--iterations", 4, "--batch", 4)

    def run(target: Path) -> None:
        distilled_or_stopped(folder, *words, "-o", target)

    pieces = goes_on_to_the_same_bytes(run, folder / "runs")
    assert pieces == [
        *("paths", "paths-0", "paths-14"),
        *("distilling-4-course", *["training-4"] * 2),
        *("distilling-2-course", *["training-2"] * 2),
        "trained",
    ]


def test_another_request_starts_anew(folder: Path) -> None:
    with pytest.raises(StoppedError), stopping_after(2):
        distilled_or_stopped(folder, "-o", "x.safetensors")
    outcome = here(*DISTILL, "--seed", 1, "-o", "x.safetensors", cwd=folder)
    assert any("another request" in note for note in outcome.notes)
    alone = here(*DISTILL, "--seed", 1, "-o", "y.safetensors", cwd=folder)
    assert alone.path.read_bytes() == outcome.path.read_bytes()


# memory that runs out


@pytest.mark.parametrize("guided", [(), pytest.param(("--cfg", 1.5), marks=pytest.mark.slow)])
def test_batches_are_halved_where_memory_runs_out(
    guided: tuple[object, ...], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sampling, in judging and in training: no memory for more than four states at once."""
    words = (*DISTILL, "--batch", 64, "--iterations", 4, *guided)
    whole = here(*words, "-o", "x.safetensors", cwd=folder)
    with monkeypatch.context() as short:
        short_of_memory(short, 4)
        outcome = here(*words, "-o", "y.safetensors", cwd=folder)
    assert outcome.code == 0, outcome.err
    told = [note for note in outcome.notes if "out of memory with" in note]
    assert sum("to the same gradients" in note for note in told) == 4, "64 states, 32, 16 and 8"
    assert len(told) > 4 + 4, "paths and what judges, too"
    assert outcome.result["held_error"] == pytest.approx(whole.result["held_error"], rel=1e-3)
