"""What is named on the hub is fetched into its cache, or refused in one line; all against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import contents
from conftest import Pico

from ditmoe_cli.errors import BadInputError, DitmoeError
from ditmoe_cli.files import downloads, hub
from ditmoe_cli.files.containers import locate
from ditmoe_cli.files.hub import fetched
from ditmoe_cli.files.staging import replaced_whole

pytest.importorskip("huggingface_hub")

from fake_hub import COMMIT, FakeHub, Faults, point_client, serving, stay_here

WEIGHTS = bytes(range(256)) * 40
REPO = "owner/repo"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one repository, which huggingface_hub takes for the real one; other machines are out of reach."""
    stay_here(monkeypatch)
    with serving(FakeHub()) as hub:
        hub.add(REPO, {"a.pt": WEIGHTS, "runs/b.pt": WEIGHTS[:5000], "README.md": b"hello"})
        point_client(monkeypatch, hub.url, cache)
        yield hub


def refused(text: str, kind: type[DitmoeError] = BadInputError) -> str:
    """The line that a name is refused with."""
    with pytest.raises(DitmoeError) as caught:
        fetched(text)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert "\n" not in message and message.startswith(text)
    return message


# what is fetched, and to where


@pytest.mark.parametrize("name", ["a.pt", "runs/b.pt"])
def test_a_file_lies_in_the_cache_as_the_library_lays_it(server: FakeHub, cache: Path, name: str) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    path = fetched(f"hf:{REPO}/{name}")
    content = server.repositories[REPO][COMMIT][name]
    assert path == cache / "models--owner--repo" / "snapshots" / COMMIT / name and path.read_bytes() == content
    assert path.is_symlink() and path.resolve().name == hashlib.sha256(content).hexdigest()
    assert server.fetched() == [name]
    assert hf_hub_download(REPO, name) == str(path), "the library finds it too"
    found = scan_cache_dir(cache)
    assert not found.warnings and {repo.repo_id for repo in found.repos} == {REPO}
    assert server.fetched() == [name]


def test_a_file_is_fetched_once(server: FakeHub) -> None:
    first = fetched(f"hf:{REPO}/a.pt")
    assert fetched(f"hf:{REPO}/a.pt") == first == fetched(f"hf:{REPO}/a.pt@{COMMIT}")
    assert server.fetched() == ["a.pt"]


def test_what_the_library_fetched_is_not_fetched_again(server: FakeHub) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(REPO, "a.pt")
    assert fetched(f"hf:{REPO}/a.pt") == Path(path)
    assert server.fetched() == ["a.pt"]


def test_a_commit_that_is_here_is_not_asked_for(server: FakeHub) -> None:
    fetched(f"hf:{REPO}/a.pt")
    server.asked.clear()
    fetched(f"hf:{REPO}/a.pt@{COMMIT}")
    assert server.asked == []


def test_what_stands_beside_a_file_is_asked_for_though_the_file_is_here(server: FakeHub) -> None:
    from huggingface_hub import hf_hub_download

    server.add("owner/beside", {"model.safetensors": WEIGHTS, "config.json": b"{}", "model.bin": WEIGHTS[1:]})
    hf_hub_download("owner/beside", "model.safetensors")
    for name in ("model.safetensors", f"model.safetensors@{COMMIT}"):
        assert (fetched(f"hf:owner/beside/{name}").parent / "config.json").is_file()
    assert server.fetched() == ["model.safetensors", "config.json"]


def test_branches_move_and_commits_stay(server: FakeHub) -> None:
    old, told = fetched(f"hf:{REPO}/a.pt"), []
    server.add(REPO, {"a.pt": WEIGHTS[::-1]}, commit="f" * 40)
    new = fetched(f"hf:{REPO}/a.pt", told.append)
    assert old.read_bytes() == WEIGHTS and new.read_bytes() == WEIGHTS[::-1]
    assert fetched(f"hf:{REPO}/a.pt@{COMMIT}") == old
    assert len(told) == 1 and "f" * 40 in told[0]


def test_runs_at_once_note_the_branch_one_after_the_other(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def slowly(path: Path, named: Path) -> Iterator[Path]:
        with replaced_whole(path, named) as new:
            yield new
            time.sleep(0.1)

    fetched(f"hf:{REPO}/a.pt")
    server.add(REPO, server.repositories[REPO][COMMIT], "f" * 40)
    fetched(f"hf:{REPO}/a.pt@{'f' * 40}")
    monkeypatch.setattr(hub, "replaced_whole", slowly)
    monkeypatch.setattr(hub, "silenced", nullcontext)  # which silences the process, not a thread
    with ThreadPoolExecutor(3) as runs:
        assert len(set(runs.map(fetched, [f"hf:{REPO}/a.pt"] * 3))) == 1


@pytest.mark.parametrize("branch", ["v1.0", "refs/pr/1"])
def test_other_branches_are_read(server: FakeHub, branch: str) -> None:
    server.add(REPO, {"a.pt": WEIGHTS[1:]}, commit="e" * 40, branch=branch)
    assert fetched(f"hf:{REPO}/a.pt@{branch}").read_bytes() == WEIGHTS[1:]
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS


def test_of_a_repository_only_what_is_read_is_fetched(
    server: FakeHub, pico: Callable[..., Pico], tmp_path: Path
) -> None:
    shards = pico(hidden=16, depth=1, input_size=4).save(tmp_path / "shards", shard_bytes=20_000)
    server.add_folder("owner/shards", shards)
    server.repositories["owner/shards"][COMMIT] |= {
        "diffusion_pytorch_model.fp16.safetensors": WEIGHTS,
        "optimizer.bin": WEIGHTS,
        "pytorch_model.bin": WEIGHTS,
        "images/x.png": WEIGHTS,
    }
    path = fetched("hf:owner/shards")
    assert sorted(server.fetched()) == sorted(file.name for file in shards.iterdir())
    assert contents(path) == contents(shards)
    server.asked.clear()
    assert fetched("hf:owner/shards") == path and server.fetched() == []
    index = fetched("hf:owner/shards/diffusion_pytorch_model.safetensors.index.json")
    assert index.parent == path and server.fetched() == []


def test_a_pipeline_is_read_from_its_averaged_transformer(
    server: FakeHub, pico: Callable[..., Pico], tmp_path: Path
) -> None:
    folder = pico().save(tmp_path / "single")
    weights = {name.name: name.read_bytes() for name in folder.iterdir()}
    beside = {
        "runs/model_index.json": b"{}",
        "runs/scheduler/scheduler_config.json": b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
    }
    folders = ("transformer", "transformer_ema", "vae")
    files = {f"runs/{each}/{name}": content for each in folders for name, content in weights.items()}
    server.add("owner/both", files | beside)
    told: list[str] = []
    path = fetched("hf:owner/both/runs", told.append)
    assert set(server.fetched()) == beside.keys() | {f"runs/transformer_ema/{name}" for name in weights}
    assert path.name == "runs" and locate(path).shards[0].parent.name == "transformer_ema"
    assert any("averaged weights are read" in text for text in told)
    assert {child.name for child in path.iterdir()} == {"model_index.json", "scheduler", "transformer_ema"}
    server.asked.clear()
    file = fetched("hf:owner/both/runs/transformer/diffusion_pytorch_model.safetensors")
    assert file.with_name("config.json").is_file() and server.fetched() == [], "equal files are fetched once"


def test_a_deepspeed_folder_is_read_from_its_last_step(
    server: FakeHub, pico: Callable[..., Pico], tmp_path: Path
) -> None:
    folder = pico().save_pt(tmp_path / "run", "deepspeed")
    states = (folder / "global_step7" / "mp_rank_00_model_states.pt").read_bytes()
    server.add(
        "owner/run",
        {
            "run/latest": b"global_step7\n",
            "run/global_step7/mp_rank_00_model_states.pt": states,
            "run/global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": WEIGHTS,
            "run/global_step3/mp_rank_00_model_states.pt": WEIGHTS,
        },
    )
    path = fetched("hf:owner/run/run")
    assert server.fetched() == ["run/latest", "run/global_step7/mp_rank_00_model_states.pt"]
    assert locate(path).pickles[0].read_bytes() == states


def test_several_checkpoints_are_listed(server: FakeHub) -> None:
    server.add("owner/many", {"a.pt": WEIGHTS, "b.pt": WEIGHTS})
    assert refused("hf:owner/many") == "hf:owner/many: holds 2 checkpoints (a.pt, b.pt); name one of them"
    assert server.fetched() == []


def test_the_token_stays_on_the_hub(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.token = "hf_secret"
    with serving(FakeHub(repositories=server.repositories)) as elsewhere:
        server.elsewhere = elsewhere.url
        assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS
    assert {token for *_, token in server.asked} == {"hf_secret"}
    assert elsewhere.asked and {token for *_, token in elsewhere.asked} == {""}


# connections that break


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_gone_on_with(server: FakeHub, ranges: bool) -> None:
    server.faults = Faults(cut_after=4000, times=2, no_ranges=not ranges)
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS
    asked = [given for method, path, given, _ in server.asked if method == "GET" and path.endswith("a.pt")]
    assert asked == ["", "bytes=4000-", "bytes=8000-" if ranges else "bytes=4000-"]


def test_the_next_run_goes_on_where_one_stopped(server: FakeHub, cache: Path) -> None:
    server.faults = Faults(cut_after=0)
    part = cache / "models--owner--repo" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:6000])
    assert "broke off" in refused(f"hf:{REPO}/a.pt")
    assert part.read_bytes() == WEIGHTS[:6000]
    server.faults, before = Faults(), len(server.asked)
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS
    assert [given for method, path, given, _ in server.asked[before:] if method == "GET" and path.endswith("a.pt")] == [
        "bytes=6000-"
    ]
    assert not part.exists()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("left", [b"\1" * 6000, b"\1" * len(WEIGHTS), WEIGHTS + b"more"])
def test_what_is_left_of_another_file_is_no_part_of_this_one(cache: Path, left: bytes) -> None:
    part = cache / "models--owner--repo" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    if len(left) <= len(WEIGHTS):
        assert "SHA-256" in refused(f"hf:{REPO}/a.pt") and not part.exists()
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS


def test_other_bytes_than_the_digest_says_are_refused_and_deleted(server: FakeHub, cache: Path) -> None:
    server.faults = Faults(garbage=True)
    assert "fetch it again" in refused(f"hf:{REPO}/a.pt")
    assert not any(path.stat().st_size >= len(WEIGHTS) for path in cache.rglob("*"))
    server.faults = Faults()
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS


@pytest.mark.parametrize("kind", ["api", "HEAD", "GET"])
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_fails_is_named(server: FakeHub, kind: str, status: int) -> None:
    server.faults = Faults(kind, status)
    message = refused(f"hf:{REPO}/a.pt")
    assert f"{server.url} answers with HTTP {status}; try again later" in message


def test_a_server_that_fails_once_is_asked_again(server: FakeHub) -> None:
    server.faults = Faults("GET", 503, times=1)
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS


def test_a_server_that_does_not_answer_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.1)
    server.faults = Faults("api", seconds=3, times=1)
    assert f"{server.url} does not answer; try again later" in refused(f"hf:{REPO}/a.pt")


def test_a_download_that_stalls_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.faults = Faults("GET", seconds=3, times=2)
    assert f"broke off ({server.url} does not answer); what has arrived is kept" in refused(f"hf:{REPO}/a.pt")


# answers that refuse


@pytest.mark.usefixtures("server")
def test_a_repository_that_is_not_there() -> None:
    message = refused("hf:owner/other/a.pt")
    assert "there is no such repository, or it is private; check 'owner/other'" in message and "HF_TOKEN" in message


def test_a_private_repository_takes_a_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    assert "it is private" in refused(f"hf:{REPO}/a.pt")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetched(f"hf:{REPO}/a.pt").read_bytes() == WEIGHTS


@pytest.mark.parametrize("kind", ["api", "HEAD"])
def test_a_gated_repository_says_where_to_ask(server: FakeHub, kind: str) -> None:
    server.faults = Faults(kind, 403, "GatedRepo")
    message = refused(f"hf:{REPO}/a.pt")
    assert f"the repository is gated; ask for access at {server.url}/{REPO}" in message and "HF_TOKEN" in message


def test_a_token_that_is_not_valid(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = refused(f"hf:{REPO}/a.pt")
    assert "HTTP 401; the token is not valid: log in with hf auth login or set HF_TOKEN anew" in message
    assert "hf_other" not in message


def test_a_refusal_is_not_tried_again(server: FakeHub) -> None:
    server.faults = Faults("GET", 403)
    assert "HTTP 403; log in with hf auth login or set HF_TOKEN of somebody who may" in refused(f"hf:{REPO}/a.pt")
    assert server.fetched() == ["a.pt"]


@pytest.mark.usefixtures("server")
def test_a_revision_that_is_not_there() -> None:
    assert "there is no such revision; name a branch, a tag or a whole commit after the @, not 'nine'" in refused(
        f"hf:{REPO}/a.pt@nine"
    )


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("path", ["c.pt", "runs/c.pt", "run", "a.pt/b.pt"])
def test_a_file_that_is_not_there_is_told_those_that_are(path: str) -> None:
    message = refused(f"hf:{REPO}/{path}")
    assert f"{REPO} has no {path!r} at main; it has a.pt, runs/b.pt, README.md" in message


def test_a_folder_without_a_checkpoint(server: FakeHub) -> None:
    server.add("owner/texts", {"docs/a.md": b"hello"})
    assert refused("hf:owner/texts/docs").startswith("hf:owner/texts/docs: no checkpoint here (looked for")


@pytest.mark.parametrize("name", ["owner--/repo/a.pt", "owner/re..po/a.pt"])
def test_names_that_the_hub_does_not_allow(server: FakeHub, name: str) -> None:
    assert "no name on the hub" in refused(f"hf:{name}")
    assert server.asked == []


def test_a_hostile_server_writes_nothing_outside_the_cache(server: FakeHub, tmp_path: Path) -> None:
    server.add("owner/bad", {"../../../../x.pt": WEIGHTS, "a.pt": WEIGHTS})
    assert "a.pt" in refused("hf:owner/bad/x.pt") and fetched("hf:owner/bad").is_dir()
    server.faults = Faults(digest="../../../x")
    server.add("owner/worse", {"a.pt": WEIGHTS})
    assert "tells no usable digest of a.pt" in refused("hf:owner/worse/a.pt")
    server.add("owner/worst", {"a.pt": WEIGHTS}, commit="../../..")
    assert "answers as no hub does" in refused("hf:owner/worst/a.pt")
    assert {child.name for child in tmp_path.iterdir()} == {"hub"}


# no hub


@pytest.mark.usefixtures("server")
def test_no_hub_and_nothing_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_client(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}", cache)
        message = refused(f"hf:{REPO}/a.pt")
    assert re.search(r"http://127\.0\.0\.1:\d+ cannot be reached: .*refused.*; try again later, or fetch", message)
    point_client(monkeypatch, "https://hub.invalid", cache)
    assert "hub.invalid cannot be reached: " in refused(f"hf:{REPO}/a.pt")


@pytest.mark.parametrize("how", ["offline", "down", "failing"])
def test_without_a_hub_the_cache_is_read_and_said_so(
    server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str, pico: Callable[..., Pico], tmp_path: Path
) -> None:
    server.add_folder(
        "owner/shards", pico(hidden=16, depth=1, input_size=4).save(tmp_path / "shards", shard_bytes=20_000)
    )
    names = [f"hf:{REPO}/a.pt", "hf:owner/shards", f"hf:owner/shards@{COMMIT}"]
    paths = [fetched(name) for name in names]
    if how == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif how == "down":
        point_client(monkeypatch, "https://hub.invalid", cache)
    else:
        server.faults = Faults("api", 503)
    told: list[str] = []
    assert [fetched(name, told.append) for name in names] == paths
    reason = {"offline": "HF_HUB_OFFLINE is set", "down": "cannot be reached", "failing": "HTTP 503"}[how]
    assert len(told) == 2 and all(f"read from the cache, commit {COMMIT}, since" in t and reason in t for t in told)
    next(paths[1].glob("*-00002-of-*")).unlink()
    assert reason in refused("hf:owner/shards")


def test_offline_what_the_cache_lacks_is_told(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(f"hf:{REPO}/a.pt")
    assert "HF_HUB_OFFLINE is set; the hub's cache does not hold it: unset HF_HUB_OFFLINE" in message
    assert server.asked == []


def test_a_refusal_is_no_reason_to_read_the_cache(server: FakeHub) -> None:
    fetched(f"hf:{REPO}/a.pt")
    del server.repositories[REPO]
    assert "no such repository" in refused(f"hf:{REPO}/a.pt")


# the disk


def test_a_full_disk_is_told_before_anything_is_fetched(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs("/")
    monkeypatch.setattr(hub.os, "statvfs", lambda _: _Disk(real, free=5000))
    message = refused(f"hf:{REPO}/a.pt", DitmoeError)
    assert "needs 10.2 kB" in message and "5.0 kB free" in message and "HF_HOME" in message
    assert server.fetched() == []


class _Disk:
    def __init__(self, real: os.statvfs_result, free: int) -> None:
        self.f_bavail, self.f_frsize, self.f_blocks = free, 1, real.f_blocks


def test_a_disk_that_fills_keeps_what_has_arrived(
    server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults = Faults(cut_after=4000)
    monkeypatch.setattr(downloads._Partial, "receive", _filling(downloads._Partial.receive, after=4000))
    message = refused(f"hf:{REPO}/a.pt", DitmoeError)
    assert "no space left in the hub's cache" in message and "run the command again" in message
    part = next((cache / "models--owner--repo" / "blobs").glob("*.incomplete"))
    assert part.read_bytes() == WEIGHTS[:4000]


def _filling(receive: Callable[..., None], after: int) -> Callable[..., None]:
    def full(partial: Any, client: Any) -> None:
        if partial.position >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        receive(partial, client)

    return full


@pytest.mark.usefixtures("server")
def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = refused(f"hf:{REPO}/a.pt")
    assert f"the hub's cache in {cache} cannot be written (Permission denied); set HF_HOME" in message


# the client


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert "pip install 'ditmoe[hub]'" in refused("hf:dit-moe-s")


def test_an_old_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.__version__", "0.36.2")
    assert "need huggingface_hub 1.0, here is 0.36.2" in refused("hf:dit-moe-s")


def test_published_names_ask_for_the_authors_files(server: FakeHub) -> None:
    server.add("feizhengcong/DiT-MoE", {"dit_moe_xl_8E2A.pt": WEIGHTS, "dit_moe_s_8E2A.pt": WEIGHTS[1:]})
    assert fetched("hf:dit-moe-xl").read_bytes() == WEIGHTS
    assert server.fetched() == ["dit_moe_xl_8E2A.pt"]
