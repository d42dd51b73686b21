"""Outputs appear whole or not at all, and never on top of what they should not touch."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, heed_interrupts

from ditmoe_cli.errors import BadInputError, DitmoeError, OutputExistsError
from ditmoe_cli.files.locks import locked
from ditmoe_cli.files.staging import check_space, check_target, clean_leftovers, staged


def write(target: Path, text: str = "new", force: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with staged(target, force, inputs) as staging:
        staging.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with staged(target) as staging:
        staging.write_text("new")
        assert not target.exists()
        assert staging.parent == target.parent, "a rename across file systems would copy"
        assert staging.name.startswith(".")
    assert target.read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_a_folder_appears_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "x") as staging:
        (staging / "deep").mkdir(parents=True)
        (staging / "deep" / "file").write_text("new")
    assert (tmp_path / "x" / "deep" / "file").read_text() == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_all_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    target, synced = tmp_path / "x", []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, target.exists()))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(target) as staging:
        if kind == "file":
            staging.write_text("new")
        else:
            (staging / "deep").mkdir(parents=True)
            (staging / "deep" / "file").write_text("new")
    written = {path.stat().st_ino for path in [target, *target.rglob("*")]}
    assert written <= {inode for inode, renamed in synced if not renamed}
    assert (tmp_path.stat().st_ino, True) in synced, "the rename itself"


def test_a_relative_target_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with staged(Path("x")) as staging:
        monkeypatch.chdir(tmp_path / "elsewhere")
        staging.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


def test_what_exists_is_replaced_only_by_force(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(OutputExistsError, match="force"):
        write(target)
    assert target.read_text() == "old"
    write(target, force=True)
    assert target.read_text() == "new"


def test_nothing_is_written_before_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(OutputExistsError), staged(tmp_path / "x"):
        pytest.fail("entered")


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with pytest.raises(OutputExistsError), staged(target) as staging:
        staging.write_text("new")
        target.write_text("of another process")
    assert target.read_text() == "of another process"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failure_leaves_the_target_as_it_was(
    tmp_path: Path, error: type[BaseException], kind: str, old: bool
) -> None:
    target = tmp_path / "x"
    if old:
        target.write_text("old")
    with pytest.raises(error), staged(target, force=True) as staging:
        if kind == "file":
            staging.write_text("half")
        else:
            staging.mkdir()
            (staging / "shard").write_text("half")
        raise error
    assert names(tmp_path) == (["x"] if old else [])
    assert not old or target.read_text() == "old"


def test_nothing_written_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(OSError, match="x"), staged(target, force=True):
        pass
    assert target.read_text() == "old"


@pytest.mark.parametrize("force", [False, True])
def test_links_are_no_targets(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("old")
    for name, goal in (("link", "file"), ("dangling", "absent")):
        (tmp_path / name).symlink_to(tmp_path / goal)
        with pytest.raises(OutputExistsError, match="symbolic link"):
            write(tmp_path / name, force=force)
    assert (tmp_path / "file").read_text() == "old"
    assert not (tmp_path / "absent").exists()


def test_devices_and_pipes_are_no_targets(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(OutputExistsError, match="neither a file nor a folder"):
            check_target(target, force=True)


def test_the_folder_to_write_into_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for parent, what in {"absent": "no such folder", "file": "is a file, and no folder"}.items():
        with pytest.raises(BadInputError, match=f"{parent}: {what} to write x into"):
            write(tmp_path / parent / "x")


@pytest.mark.parametrize("folder", ["/proc", "/sys", "locked"])
def test_a_folder_that_takes_no_files_is_refused_before_anything(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names the target, not a hidden file; the superuser is told so by /proc only."""
    target = Path(folder) / "x" if folder.startswith("/") else tmp_path / folder / "x"
    if folder == "locked":
        target.parent.mkdir(mode=0o500)
        monkeypatch.setattr(os, "open", _denied_in(target.parent, os.open))
    with pytest.raises(BadInputError) as caught:
        check_target(target, force=False)
    assert str(caught.value).startswith(f"{target}: cannot be written there (")
    assert ".ditmoe" not in str(caught.value)


def _denied_in(folder: Path, real: Callable[..., int]) -> Callable[..., int]:
    """What `os.open` does for a user who may not write to a folder."""

    def denied(path: Path, flags: int, *args: int) -> int:
        is_nameless = flags & os.O_TMPFILE == os.O_TMPFILE and Path(path) == folder
        if is_nameless or (flags & os.O_CREAT and Path(path).parent == folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *args)

    return denied


def test_a_name_that_is_too_long_is_refused_before_anything(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="File name too long"):
        check_target(tmp_path / ("x" * 256), force=False)
    write(tmp_path / ("x" * 255))
    assert names(tmp_path) == ["x" * 255], "the longest name that there can be"


def test_names_that_are_no_text_are_targets(tmp_path: Path) -> None:
    target = Path(os.fsdecode(os.fsencode(tmp_path) + b"/x\xff"))
    write(target)
    assert target.read_text() == "new"
    assert names(tmp_path) == [target.name]


def test_a_check_leaves_nothing_behind(tmp_path: Path) -> None:
    check_target(tmp_path / "x", force=False)
    assert names(tmp_path) == []


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    check_space(tmp_path / "x", 0)
    with pytest.raises(DitmoeError, match=r"x: needs .* TB, and .* has .* free; make room") as caught:
        check_space(tmp_path / "x", 2 * disk.f_blocks * disk.f_frsize + 10**15)
    assert caught.value.exit_code == 1


def test_a_full_disk_names_the_target(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'x'}'")),
        staged(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'x'}'")), staged(tmp_path / "x") as staging:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(staging / "shard"))
    with pytest.raises(OSError, match="'of another'"), staged(tmp_path / "x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "of another")


def input_itself(folder: Path) -> tuple[Path, Path]:
    (folder / "in").write_text("old")
    return folder / "in", folder / "in"


def input_by_another_name(folder: Path) -> tuple[Path, Path]:
    (folder / "in").write_text("old")
    os.link(folder / "in", folder / "hard")
    return folder / "hard", folder / "in"


def input_through_a_link(folder: Path) -> tuple[Path, Path]:
    (folder / "in").write_text("old")
    (folder / "soft").symlink_to(folder / "in")
    return folder / "in", folder / "soft"


def input_through_a_linked_folder(folder: Path) -> tuple[Path, Path]:
    (folder / "real").mkdir()
    (folder / "real" / "in").write_text("old")
    (folder / "alias").symlink_to(folder / "real")
    return folder / "alias" / "in", folder / "real" / "in"


def input_inside_the_target(folder: Path) -> tuple[Path, Path]:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "in").write_text("old")
    return folder / "deep", folder / "deep" / "er" / "in"


def input_folder_of_links(folder: Path) -> tuple[Path, Path]:
    (folder / "blob").write_text("old")
    (folder / "in").mkdir()
    (folder / "in" / "shard").symlink_to("../blob")
    return folder / "blob", folder / "in"


def shard_of_an_index(folder: Path) -> tuple[Path, Path]:
    (folder / "shard").write_text("old")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard"}}')
    return folder / "shard", folder / "model.safetensors.index.json"


def target_inside_the_input_folder(folder: Path) -> tuple[Path, Path]:
    (folder / "in").mkdir()
    (folder / "in" / "shard").write_text("old")
    return folder / "in" / "shard", folder / "in"


@pytest.mark.parametrize(
    "arrange",
    [
        input_itself,
        input_by_another_name,
        input_through_a_link,
        input_through_a_linked_folder,
        input_inside_the_target,
        target_inside_the_input_folder,
        input_folder_of_links,
        shard_of_an_index,
    ],
)
def test_the_input_is_no_target(tmp_path: Path, arrange: Callable[[Path], tuple[Path, Path]]) -> None:
    target, source = arrange(tmp_path)
    with pytest.raises(OutputExistsError, match="is the input itself"):
        write(target, force=True, inputs=(source,))
    found = target if target.is_file() else source
    assert found.read_text() == "old"


def test_a_neighbour_of_the_input_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in-2").write_text("old")
    write(tmp_path / "in-2", force=True, inputs=(tmp_path / "in",))
    assert (tmp_path / "in-2").read_text() == "new"


def test_a_checkpoint_folder_is_replaced_by_force(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "diffusion_pytorch_model-00001-of-00002.safetensors").write_text("old")
    (target / "config.json").write_text("old")
    with staged(target, force=True) as staging:
        staging.mkdir()
        (staging / "config.json").write_text("new")
    assert names(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_of_other_things_is_not_wiped_even_by_force(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "thesis" / "chapter1").write_text("years of work")
    (home / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="home"), staged(home, force=True) as staging:
        if kind == "file":
            staging.write_text("new")
        else:
            staging.mkdir()
    assert (home / "thesis" / "chapter1").read_text() == "years of work"


def test_leftovers_of_a_killed_run_with_our_number_do_not_hinder(tmp_path: Path) -> None:
    stale = tmp_path / f".x.ditmoe-tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "shard").write_text("half")
    with staged(tmp_path / "x") as staging:
        staging.mkdir()
        (staging / "config.json").write_text("new")
    assert names(tmp_path / "x") == ["config.json"]
    assert names(tmp_path) == ["x"]


def test_a_live_process_with_our_number_keeps_its_files(tmp_path: Path) -> None:
    """As two containers with one folder have it."""
    other = tmp_path / f".x.ditmoe-tmp-{os.getpid()}"
    other.write_text("of the other")
    with locked(tmp_path / f".x.ditmoe-tmp-{os.getpid()}.lock"):
        write(tmp_path / "x")
        assert other.read_text() == "of the other"
    assert (tmp_path / "x").read_text() == "new"


def ended_process() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


def test_what_killed_runs_left_is_cleaned_by_the_next_run_in_the_folder(tmp_path: Path) -> None:
    run = ended_process()
    for left in (f".x.ditmoe-tmp-{run}", f".x.ditmoe-tmp-{run}-1", f".y.ditmoe-tmp-{run}"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "shard").write_text("half")
    (tmp_path / f".y.ditmoe-tmp-{run}.lock").touch()
    (tmp_path / f".z.ditmoe-tmp-{run}.lock").touch()
    write(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_what_may_belong_to_a_live_run_is_kept(tmp_path: Path) -> None:
    run = ended_process()
    kept = {
        f".x.ditmoe-tmp-{os.getppid()}",
        f".y.ditmoe-tmp-{run}",
        f".y.ditmoe-tmp-{os.getppid()}",
        ".x.ditmoe-tmp-me",
        ".note",
    }
    for name in kept:
        (tmp_path / name).write_text("half")
    write(tmp_path / "x")
    assert set(names(tmp_path)) == {"x", *kept}


def test_an_old_folder_whose_replacement_was_killed_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / f".x.ditmoe-old-{ended_process()}"
    old.mkdir()
    (old / "config.json").write_text("old")
    clean_leftovers(tmp_path / "x")
    assert (tmp_path / "x" / "config.json").read_text() == "old"
    old.mkdir()
    (old / "config.json").write_text("older")
    clean_leftovers(tmp_path / "x")
    assert (tmp_path / "x" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write(tmp_path / "file")
        with staged(tmp_path / "folder") as staging:
            staging.mkdir()
            (staging / "config.json").write_text("new")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"file": 0o666 & ~mask, "folder": 0o777 & ~mask}


WRITER = """
import sys, time
from pathlib import Path
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.writer import Output

def content(info):
    if info.name == "b":
        print("half", flush=True)
        time.sleep(60)
    return memoryview(bytes(8))

infos = [TensorInfo(name, "F32", (2,)) for name in "abc"]
Output(Path(sys.argv[1]), force=True, shard_bytes=8).write(infos, content, Provenance({}), ())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("name", ["x.safetensors", "x"])
@pytest.mark.parametrize("old", [True, False])
def test_a_killed_writer_leaves_the_old_or_nothing(tmp_path: Path, how: signal.Signals, name: str, old: bool) -> None:
    target = tmp_path / name
    if old:
        target.write_text("old")
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=heed_interrupts,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(how)
        assert writer.wait(30) != 0
    assert target.exists() == old
    assert not old or target.read_text() == "old"
    if how == signal.SIGINT:
        assert names(tmp_path) == ([name] if old else [])
    write(tmp_path / "y")
    assert names(tmp_path) == sorted([name, "y"] if old else ["y"]), "the next run cleans"
