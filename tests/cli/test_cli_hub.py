"""Commands take names on the hub as they take paths: results, outputs, messages, the cache; all on this machine."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import slow_but
from cli_helpers import command, contents, environment, here, on_terminal, piped, series
from conftest import Pico, heed_signals

pytest.importorskip("huggingface_hub")

from fake_hub import COMMIT, FakeHub, Faults, environment_of, point_client, serving, stay_here

from ditmoe_cli.files.header import read_safetensors_header

pytestmark = pytest.mark.usefixtures("few_tokens")

PUBLISHED = "dit_moe_s_8E2A.pt"


@pytest.fixture(scope="module")
def stored(pico: Callable[..., Pico], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a repository: a pickle as the authors publish them, a safetensors file, and shards."""
    folder = tmp_path_factory.mktemp("stored")
    model = pico(sampler="rf", in_channels=1, attention="flash")
    model.save_pt(folder / PUBLISHED, "ema")
    model.save(folder / "a.safetensors")
    model.save(folder / "shards", shard_bytes=50_000)
    return folder


@pytest.fixture
def server(stored: Path) -> Iterator[FakeHub]:
    with serving(FakeHub()) as hub:
        hub.add_folder("feizhengcong/DiT-MoE", stored)
        hub.add_folder("owner/some-shards", stored / "shards")
        hub.add("owner/many", {"a.pt": b"a", "b.pt": b"b"})
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def work(server: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run commands in, whose hub is the server."""
    stay_here(monkeypatch)
    point_client(monkeypatch, server.url, cache)
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


NAMED = (
    ("hf:dit-moe-s", PUBLISHED, "dit_moe_s_8E2A"),
    ("hf:feizhengcong/DiT-MoE/a.safetensors@main", "a.safetensors", "a"),
    ("hf:owner/some-shards", "shards", "some-shards"),
    (f"hf:owner/some-shards@{COMMIT}", "shards", "some-shards"),
    ("hf:feizhengcong/DiT-MoE/shards", "shards", "shards"),
)


@pytest.mark.parametrize(("name", "local", "stem"), NAMED)
def test_outputs_are_those_of_the_file_and_named_after_it(
    work: Path, stored: Path, cache: Path, name: str, local: str, stem: str
) -> None:
    told = here("quantize", name, "--uniform", "--bits", 8, cwd=work)
    assert told.path == work / f"{stem}.quantize-int8.safetensors" and told.path.is_file()
    before = contents(cache)
    expected = here("quantize", stored / local, "--uniform", "--bits", 8, "-o", work / "x.safetensors", cwd=work)
    files = [read_safetensors_header(each.path) for each in (told, expected)]
    documents = [json.loads(file.metadata["ditmoe"]) for file in files]
    assert documents[0].pop("origin").startswith("hf:") and documents[0] == documents[1]  # and all hashes in them
    assert names(work) == {told.path.name, "x.safetensors"} and contents(cache) == before
    original = Path(told.envelope["original"])
    assert original.is_absolute() and cache in original.parents


def test_the_rest_of_a_pipe_and_a_second_run_take_no_hub(
    work: Path, server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = here("profile-experts", "hf:dit-moe-s", "--images", 4, "--steps", 2, "--bins", 2, cwd=work)
    assert server.fetched() == [PUBLISHED]
    point_client(monkeypatch, "https://hub.invalid", cache)
    pruned = here("prune", "--keep", 2, cwd=work, stdin=first.out)
    compared = here("compare", "--images", 2, "--steps", 2, cwd=work, stdin=pruned.out)
    assert compared.result["images"]["n"] == 2
    assert names(work) == {"dit_moe_s_8E2A.profile.safetensors", "dit_moe_s_8E2A.prune-keep2.safetensors"}
    again = here("prune", "hf:dit-moe-s", "--keep", 2, "--dry-run", "--force", cwd=work)
    assert any(f"read from the cache, commit {COMMIT}, since hub.invalid cannot be reached" in n for n in again.notes)
    assert any("using the profile" in note for note in again.notes), "the profile is found by its usual name"
    assert again.result["bytes"] == pruned.result["bytes"]


def test_every_command_takes_names(work: Path, server: FakeHub) -> None:
    name, settings = "hf:feizhengcong/DiT-MoE/a.safetensors", ("--images", 4, "--steps", 2)
    assert here("inspect", name, cwd=work).result["parameters"]["total"] > 0
    profile = here("profile-experts", name, *settings, "--bins", 2, cwd=work).envelope["profile"]
    plan = here("prune", name, "--keep", 2, "--no-refit", "--profile", profile, "--dry-run", cwd=work)
    (work / "plan.json").write_text(plan.out)
    for words in (
        ("convert", name),
        ("merge", name, "--groups", 2, "--no-refit", "--profile", profile),
        ("apply", name, "--plan", "plan.json", "--profile", profile),
        ("sample", name, *settings),
        ("compare", name, "hf:owner/some-shards", *settings),
        ("bench", name, "--batch", 1),
        ("report", "profile", name, "--weights", name, "--replicates", 20),
        ("fid", name, "--ref", "hf:owner/some-shards", "--extractor", "pixels", *settings),
    ):
        outcome = here(*words, cwd=work)
        assert outcome.code == 0, (words, outcome.err)
    assert sorted(server.fetched()) == sorted(
        ["a.safetensors", *(f for f in server.repositories["owner/some-shards"][COMMIT])]
    )
    assert not any(name.startswith(("hf", "0123")) for name in names(work))


def test_light_commands_stay_light(server: FakeHub, cache: Path, tmp_path: Path) -> None:
    name = "hf:owner/some-shards"
    commands = [
        ("inspect", name),
        ("convert", name, "--dry-run"),
        ("prune", f"{name}@{COMMIT}", "--keep", 2, "--dry-run"),
        ("quantize", name, "--uniform", "--bits", 4, "--dry-run"),
        ("inspect", "hf:owner/nothing"),
    ]
    *done, last = series(commands, tmp_path, **environment_of(server, cache))
    assert not any({"torch", "numpy"} & set(heavy) for _, heavy in (*done, last))
    assert all(outcome.code == 0 for outcome, _ in done), done
    assert "no such repository" in last[0].error(3)


def test_the_environment_is_heeded(work: Path, server: FakeHub, cache: Path) -> None:
    run, other = ("inspect", "hf:owner/some-shards"), ("inspect", "hf:owner/many/a.pt")
    server.token = "hf_secret"
    told = environment_of(server, cache)
    assert "private" in here(*run, cwd=work).error(3)
    assert series([run], work, **told, HF_TOKEN="hf_secret")[0][0].code == 0
    asked = len(server.asked)
    (offline, _), (lacking, _) = series([run, other], work, **told, HF_HUB_OFFLINE="1")
    assert offline.code == 0 and len(server.asked) == asked
    assert f"ditmoe: hf:owner/some-shards: read from the cache, commit {COMMIT}" in offline.err
    assert "unset HF_HUB_OFFLINE" in lacking.error(3)


def test_only_our_own_lines_stand_on_stderr(work: Path) -> None:
    outcome = here("inspect", "hf:owner/some-shards", cwd=work)
    assert outcome.notes == [
        f"ditmoe: hf:owner/some-shards: reading commit {COMMIT}; end the name in @COMMIT to read the same another time"
    ]


def test_a_terminal_shows_the_bytes_and_no_other_bar(
    work: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DITMOE_PROGRESS")
    monkeypatch.setattr("ditmoe_cli.cli.progress_display.SECONDS_BEFORE_A_BAR", 0.0)
    monkeypatch.setattr("ditmoe_cli.cli.progress_display.SECONDS_BETWEEN_LOOKS", 0.02)
    server.faults = Faults("GET", seconds=0.6, times=1)
    code, text = on_terminal("inspect", "hf:dit-moe-s", cwd=work, COLUMNS="120")
    assert code == 0 and "fetching hf:dit-moe-s" in text and " kB" in text
    assert not any(mark in text for mark in ("it/s", "B/s]", "%|", "Fetching"))


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM], [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
def test_a_stopped_download_is_gone_on_with(work: Path, server: FakeHub, cache: Path, number: signal.Signals) -> None:
    half = len(server.repositories["feizhengcong/DiT-MoE"][COMMIT][PUBLISHED]) // 2
    server.faults = Faults(cut_after=half)
    env = environment(**environment_of(server, cache))
    child = subprocess.Popen(
        command("inspect", "hf:dit-moe-s"), cwd=work, env=env, stderr=-1, stdout=-1, preexec_fn=heed_signals
    )
    blobs = cache / "models--feizhengcong--DiT-MoE" / "blobs"
    until = time.monotonic() + 60
    while not any(part.stat().st_size >= half for part in blobs.glob("*.incomplete")):
        assert time.monotonic() < until and child.poll() is None
        time.sleep(0.02)
    child.send_signal(number)
    said = child.communicate(timeout=60)[1].decode()
    assert child.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in said and said.count("\n") <= 1
    (left,) = (part.stat().st_size for part in blobs.iterdir())
    server.faults, asked = Faults(), len(server.asked)
    assert here("inspect", "hf:dit-moe-s", cwd=work).code == 0
    assert [given for *_, given, _ in server.asked[asked:] if given] == [f"bytes={left}-"]


def test_two_commands_at_once_fetch_once(server: FakeHub, cache: Path, tmp_path: Path) -> None:
    server.faults = Faults("GET", seconds=0.5, times=1)
    env = environment(**environment_of(server, cache))
    words = command("inspect", "hf:owner/some-shards")
    children = [subprocess.Popen(words, cwd=tmp_path, env=env, stdout=-1, stderr=-1) for _ in range(2)]
    said = [json.loads(child.communicate(timeout=60)[0]) for child in children]
    assert said[0] == said[1] and not any(child.returncode for child in children)
    assert len(server.fetched()) == len(set(server.fetched()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf:nothing", "no such published checkpoint; there is hf:dit-moe-s"),
        ("hf:owner/some-shards@x/../y", "no name on the hub; others are hf:OWNER/REPO"),
        ("hf:owner/absent", "no such repository"),
        ("hf:owner/some-shards/absent.pt", "has no 'absent.pt' at main"),
        ("hf:owner/many", "holds 2 checkpoints (a.pt, b.pt); name one of them"),
    ],
)
def test_what_is_not_there_ends_in_one_line(work: Path, cache: Path, name: str, words: str) -> None:
    for arguments in (("inspect", name), ("report", "profile", name), ("fid", name, "--extractor", "pixels")):
        assert words in here(*arguments, cwd=work).error(3)
    assert words in here("compare", "demo:digits", name, cwd=work).error(3)
    assert not names(work) and not any(path.is_file() for path in cache.rglob("*") if "refs" not in path.parts)


def test_the_cache_is_no_place_for_an_output(work: Path, cache: Path) -> None:
    here("inspect", "hf:owner/some-shards", cwd=work)
    before = contents(cache)
    snapshot = cache / "models--owner--some-shards" / "snapshots" / COMMIT
    for target in (snapshot, snapshot.parent, snapshot / "x.safetensors"):
        here("convert", f"hf:owner/some-shards@{COMMIT}", "-o", target, "--force", cwd=work).error(5)
    here("inspect", "hf:dit-moe-s", cwd=work)
    file = next((cache / "models--feizhengcong--DiT-MoE" / "snapshots" / COMMIT).iterdir())
    for target in (file.parent, file.resolve().parent):
        here("convert", "hf:dit-moe-s", "-o", target, "--force", cwd=work).error(5)
    assert before.items() <= contents(cache).items() and file.is_symlink()


def test_names_are_completed() -> None:
    from ditmoe_cli.cli.options import complete_checkpoint

    assert complete_checkpoint("hf") == ["hf:dit-moe-s", "hf:dit-moe-b", "hf:dit-moe-xl", "hf:dit-moe-g"]
    assert complete_checkpoint("hf:dit-moe-x") == ["hf:dit-moe-xl"] and complete_checkpoint("x") == []


def test_a_pipe_of_commands_from_a_name_to_a_score(work: Path) -> None:
    line = (
        "ditmoe convert hf:owner/some-shards | ditmoe quantize --uniform --bits 8 | ditmoe compare --images 2 --steps 2"
    )
    outcome = piped(line, work)
    assert outcome.code == 0, outcome.err
    assert names(work) == {
        "some-shards.converted.safetensors",
        "some-shards.converted.quantize-int8.safetensors",
    }


def test_the_folder_of_a_link_is_no_place_for_an_output(work: Path, server: FakeHub, stored: Path, cache: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    server.add("owner/one", {name: (stored / "a.safetensors").read_bytes()})
    here("inspect", f"hf:owner/one/{name}", cwd=work)
    snapshot = cache / "models--owner--one" / "snapshots" / COMMIT
    before = contents(cache)
    here("convert", snapshot / name, "-o", snapshot, "--force", cwd=work).error(5)
    assert contents(cache) == before
