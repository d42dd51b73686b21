"""``ditmoe prune`` with all that it may do: bytes as predicted, models that run, and lines that say why not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow_but
from cli_helpers import Outcome, bytes_of, contents, environment, here, outputs, piped, tensor_shapes
from conftest import heed_signals, make_pico

from ditmoe_cli.compression.methods import SALIENCIES, SEARCHES

pytestmark = pytest.mark.usefixtures("few_tokens")

SETTINGS = ("--images", 4, "--steps", 2)
FEW = ("--refit-tokens", 64)
PRUNE = ("prune", "a.safetensors", "--profile", "p.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile and a fast one; not to be written to."""
    folder = tmp_path_factory.mktemp("prune")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    for name, options in {"p": (), "fast": ("--fast",), "dry": ("--reservoir", 0)}.items():
        words = ("profile-experts", "a.safetensors", *SETTINGS, "--bins", 2, *options, "-o", f"{name}.safetensors")
        assert here(*words, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def carried_out(words: tuple[object, ...], folder: Path) -> Outcome:
    """A command that writes what its dry run said, to the byte, and a model that samples."""
    before = outputs(folder)
    predicted = here(*words, "--dry-run", cwd=folder)
    assert outputs(folder) == before
    written = here(*words, cwd=folder)
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    sampled = here("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
    assert sampled.code == 0, sampled.err
    return written


WAYS: dict[str, tuple[object, ...]] = {
    **{f"method {name}": ("--keep", 2, "--method", name, *FEW) for name in (*SALIENCIES, *SEARCHES)},
    **{f"router {mode}": ("--keep", 2, "--router", mode, *FEW) for mode in ("slice", "ghost", "mass", "auto")},
    "allocated": ("--keep", 3, "--allocate", "global", "--method", "naee", *FEW),
    "narrowed": ("--neurons", 0.5, "--multiple", 8, *FEW),
    "narrowed over all blocks": ("--neurons", 0.5, "--multiple", 8, "--allocate", "global", *FEW),
    "pruned and narrowed": ("--keep", "auto", "--neurons", 0.4, "--multiple", 16, "--allocate", "global", *FEW),
    "narrowed, shared too": ("--keep", 3, "--neurons", 0.3, "--multiple", 1, "--narrow-shared", *FEW),
    "narrowed, not refitted": ("--keep", 3, "--neurons", 0.5, "--no-refit"),
    "constants": ("--keep", 2, "--constants", *FEW),
    "linear maps": ("--keep", 2, "--residual-rank", 3, *FEW),
    "linear maps, not refitted": ("--keep", 2, "--residual-rank", 3, "--no-refit"),
    "not refitted": ("--keep", 2, "--no-refit"),
    "all of it": ("--keep", 2, "--router", "mass", "--neurons", 0.5, "--multiple", 4, "--residual-rank", 2, *FEW),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_writes_what_it_predicts_and_runs(way: str, folder: Path) -> None:
    written = carried_out((*PRUNE, *WAYS[way], "-o", "out.safetensors"), folder)
    kept = [len(keep) for keep in written.result["kept"]]
    wanted = WAYS[way][WAYS[way].index("--keep") + 1] if "--keep" in WAYS[way] else 4
    if wanted == "auto":
        assert min(kept) >= 2 and sum(map(sum, written.result["widths"])) <= 0.4 * 2 * 4 * 64
    else:
        assert sum(kept) == 2 * wanted and (way == "allocated" or kept == [wanted] * 2)
    described = here("inspect", "out.safetensors", cwd=folder).result
    assert described["history"] == ["prune"]
    assert ("refit_error" in written.result) == ("--no-refit" not in WAYS[way])
    if "refit_error" in written.result:
        assert len(written.result["refit_error"]) == 2
        assert all(0 < error <= 1 for error in written.result["refit_error"])
    names = {name.split(".", 2)[2] for name in tensor_shapes(folder / "out.safetensors") if name.startswith("blocks.1")}
    dropped, mode = kept[1] < 4, written.result["router"]
    assert ("moe.constants" in names) == ("--constants" in WAYS[way] or "--residual-rank" in WAYS[way])
    assert ("moe.constants_up" in names) == ("--residual-rank" in WAYS[way])
    assert ("moe.residual_linear" in names) == (dropped and "refit_error" in written.result and mode != "slice")
    assert ("moe.gate.expert_of" in names) == (dropped and mode in ("ghost", "mass")) or mode == "auto"


def test_narrowed_widths_are_what_was_asked_for(folder: Path) -> None:
    words = (*PRUNE, "--keep", 2, "--neurons", 0.3, "--multiple", 8, "--no-refit", "-o", "o.safetensors")
    assert here(*words, cwd=folder).code == 0
    shapes = tensor_shapes(folder / "o.safetensors")
    # 0.3 of 64 neurons are 19.2, which round up to 24; the shared expert stays as it is
    assert shapes["blocks.0.moe.experts.1.gate_proj.weight"] == (24, 32)
    assert shapes["blocks.0.moe.experts.1.down_proj.weight"] == (32, 24)
    assert shapes["blocks.0.moe.shared_experts.up_proj.weight"] == (64, 32)


def test_names_tell_what_was_kept(folder: Path) -> None:
    for options, name in (
        (("--keep", 2), "a.prune-keep2.safetensors"),
        (("--keep", 2, "--neurons", 0.5), "a.prune-keep2-neurons0.5.safetensors"),
        (("--neurons", 0.5), "a.prune-neurons0.5.safetensors"),
    ):
        assert here(*PRUNE, *options, "--dry-run", "-q", cwd=folder).out == f"{folder / name}\n"


def test_what_replays_is_chosen_by_the_profile_alone(folder: Path) -> None:
    """In the plan the digest of the profile, every option that was given, and blocks of whatever was found best."""
    words = (*PRUNE, "--keep", 3, "--method", "diet", "--router", "auto", "--allocate", "global", *FEW, "--dry-run")
    plan = here(*words, cwd=folder).result["plan"]
    assert plan["options"] == {
        "keep": "3",
        "method": "diet",
        "router": "auto",
        "allocate": "global",
        "refit_tokens": 64,
    }
    assert {block["router"] for block in plan["blocks"]} <= {"slice", "ghost", "mass"}
    assert sum(len(block["keep"]) for block in plan["blocks"]) == 6
    assert plan["repair"]["tokens"] == 64
    assert plan["profile"] is not None


def test_a_pipe_of_all_stages(folder: Path) -> None:
    outcome = piped(
        "ditmoe profile-experts a.safetensors --images 4 --steps 2 --bins 2 "
        "| ditmoe prune --keep 2 --method naee --router mass --neurons 0.5 --refit-tokens 64 "
        "| ditmoe quantize --uniform --bits 8 | ditmoe inspect",
        folder,
    )
    assert [step["command"] for step in outcome.envelope["history"]] == ["profile-experts", "prune", "quantize"]
    assert outcome.result["history"] == ["prune", "quantize"]
    assert outcome.result["formats"]["int8"] > 0
    assert outcome.result["config"]["router_mode"] == "mass"
    assert outcome.envelope["profile"] == str(folder / "a.profile.safetensors")


def test_what_was_refitted_is_pruned_again(folder: Path) -> None:
    """The second round profiles the first one's output, residual maps and constants included."""
    once = here(*PRUNE, "--keep", 3, "--residual-rank", 1, *FEW, "-o", "once.safetensors", cwd=folder)
    twice = here("prune", "--keep", 2, *FEW, "-o", "twice.safetensors", cwd=folder, stdin=once.out)
    assert any("ancestor" in line for line in twice.notes)
    assert all(error <= 1 for error in twice.result["refit_error"])
    shapes = tensor_shapes(folder / "twice.safetensors")
    assert shapes["blocks.0.moe.constants_up"] == (1, 32, 1)
    assert shapes["blocks.0.moe.residual_linear"] == (32, 32)
    assert here("sample", "twice.safetensors", "--images", 1, "--steps", 1, cwd=folder).code == 0
    again = here("prune", "--keep", 2, "--constants", *FEW, cwd=folder, stdin=once.out)
    assert "has constants already" in again.error(3)


# what is refused, in one line and without a trace


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--keep", 1), 4, "top-2"),
        (("--keep", 5), 4, "has only 4 experts"),
        (("--keep", 2, "--method", "best"), 2, "naee"),
        (("--keep", 2, "--router", "mask"), 2, "auto, slice, ghost, mass"),
        (("--keep", 2, "--allocate", "fair"), 2, "--allocate fair"),
        (("--keep", 2, "--neurons", 0), 2, "neurons 0"),
        (("--keep", 2, "--neurons", "half"), 2, "--neurons"),
        (("--neurons", 0.5, "--multiple", 0), 2, "multiple of neurons 0"),
        (("--keep", 2, "--residual-rank", -1), 2, "--residual-rank -1"),
        (("--keep", 2, "--residual-rank", 33), 2, "--residual-rank 33: the model's width is 32"),
        (("--keep", 2, "--refit-tokens", -5), 2, "--refit-tokens -5"),
        (("--keep", 2, "--device", "abacus", "--method", "naee"), 2, "abacus"),
        ((), 2, "--neurons to narrow only"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_values(words: tuple[object, ...], code: int, said: str, options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    assert said in here(*PRUNE, *words, *options, cwd=folder).error(code)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("profile", "words", "said"),
    [
        ("fast", (), "profile again without --fast and with a --reservoir, or do without them: --no-refit"),
        ("dry", (), "profile again without --fast and with a --reservoir, or do without them: --no-refit"),
        ("fast", ("--method", "easy-ep", "--no-refit"), "without --fast"),
        ("fast", ("--method", "naee", "--no-refit"), "without --fast"),
        ("fast", ("--router", "auto", "--no-refit"), "without --fast"),
        ("dry", ("--allocate", "global", "--no-refit"), "with a larger --reservoir"),
        ("fast", ("--neurons", 0.5, "--multiple", 8, "--no-refit"), "without --fast"),
        ("fast", ("--constants", "--no-refit"), "without --fast"),
    ],
    ids=str,
)
def test_a_profile_that_lacks_what_is_needed(profile: str, words: tuple[object, ...], said: str, folder: Path) -> None:
    before = contents(folder)
    given = ("prune", "a.safetensors", "--keep", 2, "--profile", f"{profile}.safetensors")
    assert said in here(*given, *words, cwd=folder).error(3)
    assert contents(folder) == before
    if profile == "fast":
        assert here(*given, "--method", "gate-mass", "--no-refit", cwd=folder).code == 0, "what needs less is served"


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_is_refused_before_anything_is_profiled(bits: int, folder: Path) -> None:
    packed = here("quantize", "a.safetensors", "--uniform", "--bits", bits, "-o", "q.safetensors", cwd=folder)
    before = contents(folder)
    for words in (("--keep", 2), ("--keep", 2, "--dry-run"), ("--neurons", 0.5), ("--keep", 2, "--constants")):
        message = here("prune", *words, cwd=folder, stdin=packed.out).error(3)
        assert "q.safetensors" in message and "already" in message and "--no-refit" in message
        assert contents(folder) == before


def test_a_plan_that_computes_takes_its_own_profile(folder: Path) -> None:
    planned = here(*PRUNE, "--keep", 2, *FEW, "--dry-run", cwd=folder)
    (folder / "plan.json").write_text(planned.out)
    before = contents(folder)
    apply = ("apply", "a.safetensors", "--plan", "plan.json")
    assert "give the one that it was made with (--profile)" in here(*apply, cwd=folder).error(3)
    assert "is not the profile" in here(*apply, "--profile", "dry.safetensors", cwd=folder).error(3)
    assert here(*apply, "--dry-run", cwd=folder).result["bytes"] == planned.result["bytes"]
    assert contents(folder) == before
    inspected = {**here("inspect", "a.safetensors", cwd=folder).envelope, "profile": str(folder / "p.safetensors")}
    piped = here("apply", "--plan", "plan.json", cwd=folder, stdin=json.dumps(inspected))
    assert bytes_of(piped.path) == planned.result["bytes"], "the profile comes through the pipe"


STOPPED = """
import os, sys
from ditmoe_cli.cli import app
from ditmoe_cli.files.workfolder import WorkFolder
write, piece, number = WorkFolder.write, sys.argv[1], int(sys.argv[2])
def stopping(self, name, *rest):
    write(self, name, *rest)
    if name == piece:
        os.kill(os.getpid(), number)
WorkFolder.write = stopping
sys.argv[1:] = sys.argv[3:]
app.main()
"""


@pytest.mark.parametrize(
    ("number", "code"),
    slow_but([(signal.SIGTERM, 143)], [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)]),
)
def test_a_signal_while_refitting_loses_no_block(number: signal.Signals, code: int, folder: Path) -> None:
    whole = here(*PRUNE, "--keep", 2, *FEW, "-o", "whole.safetensors", cwd=folder)
    before = contents(folder)
    words = (*PRUNE, "--keep", 2, *FEW, "-o", "x.safetensors")
    stopped = subprocess.run(
        [sys.executable, "-c", STOPPED, "block.state.0", str(int(number)), *map(str, words)],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=heed_signals,
        check=False,
    )
    assert stopped.returncode == code and stopped.stdout == "", stopped.stderr
    kept = "ditmoe: kept 1 of 2 blocks; the same command goes on with block 2"
    assert (kept in stopped.stderr.splitlines()) == (number != signal.SIGKILL)
    assert "Traceback" not in stopped.stderr
    assert {name for name in contents(folder) if not name.startswith(".x.safetensors.work")} == set(before)
    again = here(*words, cwd=folder)
    assert f"going on with block 2 of 2 (kept in {folder / '.x.safetensors.work'})" in again.err
    assert again.path.read_bytes() == whole.path.read_bytes()
    assert set(contents(folder)) == {*before, "x.safetensors"}


# what it is for


@pytest.mark.slow
def test_a_refit_brings_the_demo_nearer_to_itself(tmp_path: Path) -> None:
    """The paired error of the predicted velocity, of what no sample was fitted on."""
    profiling = ("profile-experts", "demo:digits", "--images", 10, "--steps", 2, "--bins", 1, "-o", "p.safetensors")
    assert here(*profiling, cwd=tmp_path).code == 0
    errors = {}
    for name, options in {"refitted": ("--refit-tokens", 512), "copied": ("--no-refit",)}.items():
        words = (
            "prune",
            "demo:digits",
            "--keep",
            0.5,
            "--profile",
            "p.safetensors",
            *options,
            "-o",
            f"{name}.safetensors",
        )
        assert here(*words, cwd=tmp_path).code == 0
        compared = here(
            "compare", "demo:digits", f"{name}.safetensors", "--images", 4, "--steps", 2, "--bins", 1, cwd=tmp_path
        )
        errors[name] = compared.result["prediction"]["relative_error"]
    assert errors["refitted"] < 0.8 * errors["copied"]
