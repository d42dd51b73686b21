"""What every command promises: one JSON on stdout, one line per error on stderr, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cases import slow_but
from cli_helpers import (
    FIELDS,
    PATHS,
    Outcome,
    command,
    contents,
    environment,
    here,
    outside,
    shell,
    terminal,
)
from compressing import compress_in_few_trials
from conftest import heed_signals, make_pico
from healing import heal_on_few_states

from ditmoe_cli.errors import DitmoeError

GARBAGE = "this is no envelope\n"
SAMPLING = ("--images", 4, "--steps", 2)


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """For compressions and healing in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        compress_in_few_trials(monkeypatch)
        heal_on_few_states(monkeypatch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pixel checkpoint, its profile, a plan for it, and samples of it."""
    folder = tmp_path_factory.mktemp("contract")
    make_pico(sampler="rf", in_channels=1, seed=3).save(folder / "a.safetensors")
    here("profile-experts", "a.safetensors", *SAMPLING, "--bins", 2, "-o", "p.safetensors", cwd=folder)
    planned = here(*COMMANDS["prune"], "--dry-run", cwd=folder)
    (folder / "plan.json").write_text(planned.out)
    student = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "-o", "b.safetensors")
    assert here(*student, cwd=folder).code == 0
    assert here("sample", "a.safetensors", *SAMPLING, "-o", "s.safetensors", cwd=folder).code == 0
    return folder


COMMANDS: dict[str, tuple[object, ...]] = {
    "inspect": ("inspect", "a.safetensors"),
    "convert": ("convert", "a.safetensors"),
    "export": ("export", "a.safetensors", "--to", "diffusers"),
    "profile-experts": ("profile-experts", "a.safetensors", *SAMPLING, "--bins", 2),
    "prune": ("prune", "a.safetensors", "--keep", 0.5, "--profile", "p.safetensors", "--refit-tokens", 64),
    "merge": ("merge", "a.safetensors", "--groups", 2, "--profile", "p.safetensors", "--refit-tokens", 64),
    "quantize": ("quantize", "a.safetensors", "--uniform", "--bits", 4),
    "compress": ("compress", "a.safetensors", "--ratio", 0.5, "--allow", "4,8", "--profile", "p.safetensors"),
    "heal": (
        *("heal", "b.safetensors", "--original=a.safetensors", "--profile", "p.safetensors"),
        *("--steps", 2, "--batch", 4),
    ),
    "apply": ("apply", "a.safetensors", "--plan", "plan.json", "--profile", "p.safetensors", "-o", "c.safetensors"),
    "sample": ("sample", "a.safetensors", *SAMPLING),
    "fid": ("fid", "a.safetensors", "--ref", "s.safetensors", *SAMPLING),
    "compare": ("compare", "a.safetensors", "a.safetensors", *SAMPLING, "--bins", 2),
    "bench": ("bench", "a.safetensors", "--batch", 2, "--repeats", 1),
}
PROGRAMS = ("inspect", "sample")
# what each command names in its envelope
MADE = {
    "inspect": ("checkpoint", "a.safetensors"),
    "convert": ("checkpoint", "a.converted.safetensors"),
    "export": ("checkpoint", "a.safetensors"),
    "profile-experts": ("profile", "a.profile.safetensors"),
    "prune": ("checkpoint", "a.prune-keep0.5-tokens64.safetensors"),
    "merge": ("checkpoint", "a.merge-groups2-tokens64.safetensors"),
    "quantize": ("checkpoint", "a.quantize-nf4.safetensors"),
    "compress": ("checkpoint", "a.compress-ratio0.5-allow4,8.safetensors"),
    "heal": ("checkpoint", "b.heal-2steps-batch4.safetensors"),
    "apply": ("checkpoint", "c.safetensors"),
    "sample": ("samples", "a.samples-images4-steps2.safetensors"),
    "fid": ("checkpoint", "a.safetensors"),
    "compare": ("checkpoint", "a.safetensors"),
    "bench": ("checkpoint", "a.safetensors"),
}


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, Outcome]:
    """Every command, run once: some as programs with pipes for streams and garbage on stdin, the others in process.

    There `here` gives a stdin that fails when it is read: beside a checkpoint nobody may wait for one.
    """
    with ThreadPoolExecutor(2) as pool:
        waiting = {name: pool.submit(outside, *COMMANDS[name], cwd=folder, stdin=GARBAGE) for name in PROGRAMS}
        programs = {name: outcome.result() for name, outcome in waiting.items()}
    others = {name: words for name, words in COMMANDS.items() if name not in PROGRAMS}
    return programs | {name: here(*words, cwd=folder) for name, words in others.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_one_envelope(name: str, ran: dict[str, Outcome], folder: Path) -> None:
    envelope = ran[name].envelope
    assert set(envelope) == FIELDS
    assert envelope["schema"] == "ditmoe.stage/1"
    paths = {key: envelope[key] for key in PATHS if envelope[key] is not None}
    assert all(Path(path).is_absolute() and Path(path).exists() for path in paths.values()), paths
    assert paths["original"] == str(folder / "a.safetensors")
    field, made = MADE[name]
    assert paths[field] == str(folder / made)
    assert envelope["result"]
    assert envelope["given"] == {"num_heads": None, "top_k": None, "sampler": None, "num_classes": None}
    steps = [step["command"] for step in envelope["history"]]
    # apply carries out what prune planned
    assert steps == ([] if name == "inspect" else [name])


@pytest.mark.parametrize("name", COMMANDS)
def test_stderr_holds_notes_only(name: str, ran: dict[str, Outcome]) -> None:
    assert "Traceback" not in ran[name].err
    allowed = (
        "warning: ",
        "assuming ",
        "profiling ",
        "grouping ",
        "refitting ",
        "writing ",
        "sampling ",
        "using ",
        "measuring ",
        "before refitting, dropping ",
        "block-healed weights are not better",
        "no trained weights were better",
    )
    assert all(note.removeprefix("ditmoe: ").startswith(allowed) for note in ran[name].notes)


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name not in ("inspect", "export", "fid", "compare", "bench")]
)
def test_quiet_prints_the_path_alone(name: str, folder: Path) -> None:
    outcome = here(*COMMANDS[name], "--force", "-q", cwd=folder)
    assert outcome.code == 0
    assert outcome.out == f"{folder / MADE[name][1]}\n"


def test_a_terminal_that_waits_is_no_reason_to_wait(folder: Path) -> None:
    """An open stdin that never ends must not matter beside an explicit checkpoint."""
    read, write = os.pipe()
    try:
        done = subprocess.run(
            command(*COMMANDS["inspect"]), cwd=folder, env=environment(), stdin=read, capture_output=True, timeout=60
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0


def words_without_checkpoint(name: str) -> list[object]:
    return [word for word in COMMANDS[name] if word not in ("a.safetensors", "b.safetensors")]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        ("", "stdin is empty"),
        (" \n\n", "stdin is empty"),
        ('{"schema": "ditmoe.stage/1", "checkpo', "cut short"),
        ("[1, 2]", "'list'"),
        ("null", "'NoneType'"),
        ('{"schema": "ditmoe.stage/2"}', "'ditmoe.stage/2'"),
        ('{"schema": "ditmoe.plan/1"}', "'ditmoe.plan/1'"),
        ("{}", "ditmoe.stage/1"),
        ('{"schema": "ditmoe.stage/1", "checkpoint": 7}', "checkpoint"),
        ('{"schema": "ditmoe.stage/1", "checkpoint": "a.safetensors", "history": 1}', "history"),
        ('{"schema": "ditmoe.stage/1", "checkpoint": "a.safetensors", "given": "x"}', "given"),
        ('{"schema": "ditmoe.stage/1"}', "no checkpoint"),
    ],
)
def test_a_broken_envelope_is_bad_input(name: str, stdin: str, said: str, folder: Path) -> None:
    before = contents(folder)
    message = here(*words_without_checkpoint(name), cwd=folder, stdin=stdin).error(3)
    assert said in message
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("given", {"num_heads": "two"}),
        ("given", {"heads": 2}),
        ("given", {"sampler": "flow"}),
        ("given", {"top_k": 0}),
        ("given", {"num_classes": -1}),
        ("history", ["prune"]),
    ],
)
def test_an_envelope_of_nonsense_values_is_bad_input(field: str, value: object, folder: Path) -> None:
    envelope = {"schema": "ditmoe.stage/1", "checkpoint": str(folder / "a.safetensors"), field: value}
    assert field in here("inspect", cwd=folder, stdin=json.dumps(envelope)).error(3)


def test_an_empty_pipe_names_the_command_before(folder: Path) -> None:
    """A failing command prints nothing, and the next one says so in a line of its own."""
    outcome = shell("ditmoe inspect missing.safetensors | ditmoe inspect", folder)
    assert outcome.code == 3 and outcome.out == ""
    first, second = sorted(outcome.err.splitlines())
    assert "missing.safetensors: no such file" in first
    assert "stdin is empty" in second


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nonsense",), "nonsense"),
        (("--nonsense",), "--nonsense"),
        (("prune", "a.safetensors", "--nonsense"), "--nonsense"),
        (("prune", "a.safetensors", "--keep"), "--keep"),
        (("prune", "a.safetensors"), "--keep"),
        (("prune", "a.safetensors", "--keep", 2, "--method", "nonsense"), "nonsense"),
        (("prune", "a.safetensors", "--keep", 2, "--router", "mask"), "mask"),
        (("prune", "a.safetensors", "--keep", 2, "--device", "abacus", "--top-k", 1), "abacus"),
        (("prune", "a.safetensors", "--keep", 2, "--allocate", "fairly"), "--allocate fairly"),
        (("prune", "a.safetensors", "--keep", 2, "--refit-tokens", -1), "--refit-tokens -1"),
        (("prune", "a.safetensors", "--keep", 2, "--residual-rank", -1), "--residual-rank -1"),
        (("prune", "a.safetensors", "--keep", 2, "--neurons", 0), "neurons 0"),
        (("prune", "a.safetensors", "--keep", 2, "--neurons", 1.5), "neurons 1.5"),
        (("prune", "a.safetensors", "--keep", 2, "--neurons", "nan"), "neurons nan"),
        (("prune", "a.safetensors", "--keep", 2, "--neurons", 0.5, "--multiple", 0), "neurons 0"),
        (("merge", "a.safetensors"), "--groups"),
        (("merge", "a.safetensors", "--groups", 0), "--groups 0"),
        (("merge", "a.safetensors", "--groups", 1.5), "--groups 1.5"),
        (("merge", "a.safetensors", "--groups", "few"), "--groups few"),
        (("merge", "a.safetensors", "--groups", 2, "--method", "reap"), "--method reap"),
        (("merge", "a.safetensors", "--groups", 2, "--router", "ghost"), "--router ghost"),
        (("merge", "a.safetensors", "--groups", 2, "--refit-tokens", -1), "--refit-tokens -1"),
        (("quantize", "a.safetensors"), "--bits"),
        (("quantize", "a.safetensors", "--uniform", "--bits", 7), "--bits 7"),
        (("quantize", "a.safetensors", "--uniform", "--bits", "four"), "--bits"),
        (("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "x.pt"), "x.pt"),
        (("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "x", "--max-shard-size", "much"), "much"),
        (("convert", "a.safetensors", "b.safetensors"), "b.safetensors"),
        (("convert", "a.safetensors", "--heads", 0), "--heads 0"),
        (("convert", "a.safetensors", "--top-k", -1), "--top-k -1"),
        (("convert", "a.safetensors", "--sampler", "flow"), "flow"),
        (("sample", "a.safetensors", "--images", 0), "--images 0"),
        (("sample", "a.safetensors", "--images", "many"), "--images"),
        (("sample", "a.safetensors", "--steps", 0), "--steps 0"),
        (("sample", "a.safetensors", "--cfg", "nan"), "--cfg nan"),
        (("sample", "a.safetensors", "--cfg", "-1"), "--cfg -1"),
        (("sample", "a.safetensors", "--batch", 0), "--batch 0"),
        (("sample", "a.safetensors", "--solver", "ddim"), "ddim"),
        (("sample", "a.safetensors", "--solver", "rk45"), "rk45"),
        (("sample", "a.safetensors", "--classes", "0,x"), "0,x"),
        (("sample", "a.safetensors", "--classes", "3"), "3"),
        (("sample", "a.safetensors", "--device", "abacus"), "abacus"),
        (("sample", "a.safetensors", "-o", "x.npz"), "x.npz"),
        (("profile-experts", "a.safetensors", "--steps", 2, "--bins", 3), "--bins 3"),
        (("profile-experts", "a.safetensors", "--reservoir", -1), "--reservoir -1"),
        (("fid", "a.safetensors"), "--ref"),
        (("fid", "a.safetensors", "--ref", "s.safetensors", "--max", -1), "--max"),
        (("fid", "a.safetensors", "--ref", "s.safetensors", "--extractor", "vgg"), "vgg"),
        (("fid", "a.safetensors", "--ref", "s.safetensors", "--extractor", "no_module:make"), "no_module"),
        (("compare", "a.safetensors"), "a.safetensors alone"),
        (("compare", "a.safetensors", "a.safetensors", "--max-error", -1), "--max-error"),
        (("compare", "a.safetensors", "a.safetensors", "--max-error", "nan"), "--max-error"),
        (("compare", "a.safetensors", "a.safetensors", "--bins", 21), "--bins 21"),
        (("compare", "a.safetensors", "a.safetensors", "--grid", "g.jpg"), "g.jpg"),
        (("compare", "a.safetensors", "a.safetensors", "-o", "c.json"), "c.json"),
        (("compare", "a.safetensors", "a.safetensors", "--batch", 0), "--batch 0"),
        (("bench", "a.safetensors", "--batch", 0), "--batch 0"),
        (("bench", "a.safetensors", "--repeats", 0), "--repeats 0"),
        (("bench", "a.safetensors", "--cfg", "nan"), "--cfg nan"),
        (("bench", "a.safetensors", "--cfg", "inf"), "--cfg inf"),
        (("bench", "a.safetensors", "--cfg", "-1"), "--cfg -1"),
        (("bench", "a.safetensors", "--max-memory", "much"), "--max-memory much"),
        (("bench", "a.safetensors", "--max-memory", 0), "--max-memory 0"),
        (("bench", "a.safetensors", "--device", "abacus"), "abacus"),
        (("bench", "a.safetensors", "--sampler", "flow"), "flow"),
        (("bench", "a.safetensors", "-o", "b.safetensors"), "-o"),
        (("heal", "a.safetensors"), "--original"),
        (("heal", "a.safetensors", "--original", "s.safetensors", "--scope", "all"), "--scope"),
        (("apply", "a.safetensors"), "--plan"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_usage_errors(words: tuple[object, ...], said: str, folder: Path, tmp_path: Path) -> None:
    for name in ("a.safetensors", "s.safetensors"):
        shutil.copy(folder / name, tmp_path)
    before = contents(tmp_path)
    assert said in here(*words, cwd=tmp_path).error(2)
    assert contents(tmp_path) == before


def test_usage_errors_as_a_program(folder: Path) -> None:
    message = outside("prune", "a.safetensors", "--nonsense", cwd=folder).error(2)
    assert "--nonsense" in message and "ditmoe prune --help" in message


def test_no_arguments_print_the_help_and_fail(folder: Path) -> None:
    outcome = here(cwd=folder)
    assert outcome.code == 2
    assert "profile-experts" in outcome.out and outcome.err == ""


def test_torchrun_is_for_shared_work_on_an_explicit_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    envelope = here("inspect", "a.safetensors", cwd=folder).out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name in COMMANDS:
        assert "torchrun" in here(*words_without_checkpoint(name), cwd=folder, stdin=envelope).error(2)
    assert "one process" in here("prune", "a.safetensors", "--keep", "0.5", cwd=folder).error(2)
    told = here("convert", "a.safetensors", cwd=folder).error(2)
    assert "profile-experts, sample, fid, heal and distill can share" in told


def test_an_envelope_goes_through_a_pipe(folder: Path) -> None:
    envelope = here("inspect", "a.safetensors", "--top-k", 1, cwd=folder).out
    outcome = shell("ditmoe inspect a.safetensors --top-k 1 | ditmoe inspect", folder)
    assert outcome.envelope["given"]["top_k"] == 1
    assert outcome.result["config"]["top_k"] == 1
    again = here("inspect", "--top-k", 2, cwd=folder, stdin=envelope)
    assert again.envelope["given"]["top_k"] == 2, "what is said last counts"


# closed and full stdout


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "a.safetensors"),
        ("prune", "--list-methods"),
        ("prune", "--help"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (("convert", "a.safetensors", "--dry-run", "--force"), ("--version",), ())
        ),
    ],
)
def test_a_closed_pipe_ends_silently(words: tuple[str, ...], folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            command(*words),
            cwd=folder,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_stdout_closed_by_the_shell(folder: Path) -> None:
    outcome = shell("ditmoe inspect a.safetensors >&-", folder)
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_stdout_is_one_line(folder: Path) -> None:
    assert "no space" in shell("ditmoe inspect a.safetensors > /dev/full", folder).error(1)


# signals


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a while to write."""
    folder = tmp_path_factory.mktemp("large")
    return make_pico(hidden=256, depth=4, experts=8).save(folder / "large.safetensors")


@pytest.fixture
def writing(large: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A quantize in the middle of writing ``out.safetensors`` over an older one."""
    (tmp_path / "out.safetensors").write_bytes(b"the old one")
    child = subprocess.Popen(
        command("quantize", large, "--uniform", "--bits", 4, "-o", "out.safetensors", "--force"),
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_signals,
    )
    end = time.monotonic() + 60
    while not any(tmp_path.glob(".out.safetensors.ditmoe-tmp-*")):
        assert child.poll() is None and time.monotonic() < end, "never began to write"
        time.sleep(0.002)
    yield child
    if child.poll() is None:
        child.kill()
    child.communicate()


@pytest.mark.parametrize(
    ("number", "code"), slow_but([(signal.SIGTERM, 143)], [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
)
def test_a_signal_while_writing_leaves_no_trace(
    number: signal.Signals, code: int, writing: subprocess.Popen[bytes], large: Path, tmp_path: Path
) -> None:
    before = contents(large.parent)
    writing.send_signal(number)
    out, err = writing.communicate(timeout=60)
    assert writing.returncode == code
    assert out == b""
    assert b"Traceback" not in err and err.count(b"\n") <= 1
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]
    assert (tmp_path / "out.safetensors").read_bytes() == b"the old one"
    assert contents(large.parent) == before


def test_a_kill_while_writing_leaves_the_old_output(writing: subprocess.Popen[bytes], tmp_path: Path) -> None:
    writing.kill()
    writing.communicate(timeout=60)
    assert (tmp_path / "out.safetensors").read_bytes() == b"the old one"


# terminals


def test_a_terminal_gets_a_table(folder: Path) -> None:
    code, text = terminal("inspect", "a.safetensors", cwd=folder)
    assert code == 0
    assert "\033[1m" in text, "labels stand out"
    plain = re.sub(r"\033\[\d*m", "", text)
    assert re.search(r"^architecture +depth 2, width 32", plain, re.MULTILINE)
    assert "{" not in plain


def test_no_color_is_honoured_and_json_can_be_had(folder: Path) -> None:
    code, text = terminal("inspect", "a.safetensors", cwd=folder, NO_COLOR="1")
    assert code == 0
    assert "\033" not in text
    code, text = terminal("inspect", "a.safetensors", "--json", cwd=folder)
    assert json.loads(text)["schema"] == "ditmoe.stage/1"


def test_paths_are_never_wrapped(folder: Path) -> None:
    """A bar, a table with a long path and an error with one, on a terminal far narrower than the path."""
    deep = folder / ("a-folder-with-a-long-name-" * 4)
    deep.mkdir(exist_ok=True)
    target = deep / "out.safetensors"
    words = ("convert", "a.safetensors", "-o", target)
    code, text = terminal(*words, cwd=folder, columns=40, NO_COLOR="1", DITMOE_PROGRESS="1")
    assert code == 0
    assert str(target) in text
    assert "\033[1m" not in text and "\033[3" not in text, "a bar may move the cursor, but without colour"
    code, text = terminal("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", target, cwd=folder, columns=40)
    assert code == 5
    assert f"ditmoe: error: {target}: exists already" in text


# exit codes are what errors.py draws


def test_the_exit_codes_in_the_drawing() -> None:
    import ditmoe_cli.errors as errors

    drawn = dict(re.findall(r"(\w+Error) +(\d)", errors.__doc__ or ""))
    classes = {DitmoeError, *DitmoeError.__subclasses__()}
    assert {kind.__name__: str(kind.exit_code) for kind in classes} == drawn
