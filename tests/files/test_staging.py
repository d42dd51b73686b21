"""Outputs appear whole or not at all, and never on top of what they should not touch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, heed_signals

from ditmoe_cli.errors import BadInputError, DitmoeError, OutputExistsError
from ditmoe_cli.files import cleanup
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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_takes_outputs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(tmp_path / "x") as staging:
        staging.write_text("new")
    assert (tmp_path / "x").read_text() == "new"


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


@pytest.mark.parametrize("force", [False, True])
def test_devices_pipes_and_sockets_are_no_targets(tmp_path: Path, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(tmp_path):
        listening.bind("socket")
        for target in (Path("/dev/null"), Path("/dev/zero"), Path("pipe"), Path("socket")):
            with pytest.raises(OutputExistsError, match="neither a file nor a folder"):
                write(target, force=force)
    assert names(tmp_path) == ["pipe", "socket"]


def test_the_standard_output_is_no_target() -> None:
    with pytest.raises((OutputExistsError, BadInputError), match="/dev/stdout"):
        check_target(Path("/dev/stdout"), force=True)


@contextlib.contextmanager
def mounted(*words: object, at: Path) -> Iterator[None]:
    """Mount something while the context lasts; skips where that is not allowed."""
    if subprocess.run(["mount", *map(str, words), str(at)], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_mount_points_are_no_targets(tmp_path: Path, kind: str) -> None:
    """As volumes of containers are, whose place nothing can take: said before any work."""
    (tmp_path / "from here").mkdir()
    (tmp_path / "from here" / "config.json").write_text("old")
    source, target = tmp_path / "from here", tmp_path / "to there"
    if kind == "file":
        source = source / "config.json"
        target.touch()
    else:
        target.mkdir()
    with mounted("--bind", source, at=target), pytest.raises(OutputExistsError, match="is a mount point"):
        check_target(target, force=True)


def test_a_disk_that_fills_keeps_the_old_output_and_gives_its_room_back(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=256k", "none", at=disk):
        write(disk / "x", "old")
        free = os.statvfs(disk).f_bavail
        with pytest.raises(OSError, match=re.escape(f"No space left on device: '{disk / 'x'}'")):
            write(disk / "x", "new" * 200_000, force=True)
        assert (disk / "x").read_text() == "old"
        assert names(disk) == ["x"] and os.statvfs(disk).f_bavail == free


def test_room_that_a_killed_run_takes_is_free(tmp_path: Path) -> None:
    """It is deleted before a lack of room is told."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=256k", "none", at=disk):
        left = disk / f".y.ditmoe-tmp-{ended_process()}"
        left.write_bytes(bytes(200_000))
        left.with_name(f"{left.name}.lock").touch()
        check_space(disk / "x", 150_000)
        assert names(disk) == []


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


def step_that_is_a_link(folder: Path) -> tuple[Path, Path]:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "in").write_text("old")
    (folder / "run").mkdir()
    (folder / "run" / "global_step7").symlink_to("../elsewhere")
    return folder / "elsewhere" / "in", folder / "run"


def folder_around_a_shard(folder: Path) -> tuple[Path, Path]:
    (folder / "blobs").mkdir()
    (folder / "blobs" / "shard").write_text("old")
    (folder / "in").mkdir()
    (folder / "in" / "shard").symlink_to("../blobs/shard")
    return folder / "blobs", folder / "in" / "shard"


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
        step_that_is_a_link,
        folder_around_a_shard,
    ],
)
def test_the_input_is_no_target(tmp_path: Path, arrange: Callable[[Path], tuple[Path, Path]]) -> None:
    target, source = arrange(tmp_path)
    with pytest.raises(OutputExistsError, match="is the input itself"):
        write(target, force=True, inputs=(source,))
    found = target if target.is_file() else source
    assert found.read_text() == "old"


def test_the_input_is_known_where_its_folder_is_mounted_twice(tmp_path: Path) -> None:
    """Its path differs then, as it does where upper and lower case are the same; number and device do not."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    (one / "in").mkdir()
    (one / "in" / "shard").write_text("old")
    with mounted("--bind", one, at=other):
        for target in (other / "in" / "shard", other / "in" / "new", other / "in"):
            with pytest.raises(OutputExistsError, match=r"is the input itself|would lie within the input"):
                write(target, force=True, inputs=(one / "in",))


def test_the_input_is_known_where_case_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a disk ``IN`` is what ``in`` is, though no path says so."""
    (tmp_path / "in").mkdir()
    real = Path.stat

    def stat_of(self: Path, **named: bool) -> os.stat_result:
        return real(Path(str(self).replace(f"{tmp_path}/IN", f"{tmp_path}/in")), **named)

    monkeypatch.setattr(Path, "stat", stat_of)
    with pytest.raises(OutputExistsError, match=f"IN/x: would lie within the input {tmp_path / 'in'};"):
        check_target(tmp_path / "IN" / "x", force=True, inputs=(tmp_path / "in",))


CHECK_AS_NOBODY = """
import os, sys
from pathlib import Path
from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files.staging import check_target
os.setresuid(65534, 65534, 65534)
try:
    check_target(Path(sys.argv[1]), force=True)
except DitmoeError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can be another user")
def test_what_other_users_own_is_refused_before_anything() -> None:
    """A folder without the right to write, an old output whose files cannot be deleted, one that cannot be read."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        root = Path(name)
        root.chmod(0o777)
        (root / "closed").mkdir(mode=0o755)
        for folder, mode in {"full": 0o555, "secret": 0o300}.items():
            (root / folder).mkdir(mode=mode)
            os.chown(root / folder, 65534, 65534)
        for target, said in {
            root / "closed" / "x": "cannot be written there (Permission denied)",
            root / "full": "its files cannot be deleted, so it is not replaced",
            root / "secret": "cannot be read, so it is not replaced",
        }.items():
            words = [sys.executable, "-c", CHECK_AS_NOBODY, str(target)]
            done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            assert done.stdout.startswith(f"{target}: {said}"), done.stderr
        assert names(root) == ["closed", "full", "secret"]


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


LIVE = """
import sys, time
from pathlib import Path
from ditmoe_cli.files.staging import staged
with staged(Path(sys.argv[1]), force=True) as staging:
    staging.mkdir()
    (staging / "config.json").write_text("half")
    print(staging, flush=True)
    time.sleep(60)
"""


def test_of_two_runs_only_the_killed_ones_files_are_deleted(tmp_path: Path) -> None:
    """Both write the same target, and a third one comes."""
    words = [sys.executable, "-c", LIVE, str(tmp_path / "x")]
    runs = [subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        places = [Path((run.stdout or pytest.fail()).readline().rstrip()) for run in runs]
        for other in ("x", "y", "z"):
            write(tmp_path / other)
        assert all((place / "config.json").is_file() for place in places), "both live"
        runs[0].kill()
        runs[0].wait()
        check_target(tmp_path / "w", force=False)
        with pytest.raises(OutputExistsError):
            write(tmp_path / "x")
        assert all(place.exists() for place in places), "neither a check nor a refused run cleans"
        write(tmp_path / "y", force=True)
        assert [place.exists() for place in places] == [False, True]
        hidden = [name for name in names(tmp_path) if name.startswith(".")]
        assert hidden == [places[1].name, f"{places[1].name}.lock"]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    write(tmp_path / "y", force=True)
    assert names(tmp_path) == ["x", "y", "z"]


def test_a_cleaner_that_is_killed_leaves_the_lock_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f".y.ditmoe-tmp-{ended_process()}"
    left.write_text("half")
    left.with_name(f"{left.name}.lock").touch()
    monkeypatch.setattr("ditmoe_cli.files.staging._remove", lambda _: False)  # as far as it got
    clean_leftovers(tmp_path / "x")
    assert names(tmp_path) == [left.name, f"{left.name}.lock"]
    monkeypatch.undo()
    cleanup.undo_all()  # what the end of that process does
    clean_leftovers(tmp_path / "x")
    assert names(tmp_path) == []


def test_files_of_others_with_similar_names_stay(tmp_path: Path) -> None:
    kept = [
        f".x.tmp-{ended_process()}",
        f".x.tmp-{ended_process()}.lock",
        ".x.ditmoe",
        ".ditmoe-tmp-",
        ".x.ditmoe-tmp-1a",
    ]
    for name in kept:
        (tmp_path / name).write_text("of a user")
    write(tmp_path / "x")
    write(tmp_path / "x", force=True)
    assert names(tmp_path) == sorted(["x", *kept])


def test_what_a_run_left_in_another_folder_stays(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    left = tmp_path / "other" / f".x.ditmoe-tmp-{ended_process()}"
    left.touch()
    left.with_name(f"{left.name}.lock").touch()
    write(tmp_path / "one" / "x")
    assert len(names(tmp_path / "other")) == 2


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
import os, sys, time
from pathlib import Path
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.writer import Output, one_by_one

os.environ["OMP_NUM_THREADS"] = "1"  # jobs in the main thread, which the signal ends

def content(info):
    if info.name == "b":
        print("half", flush=True)
        time.sleep(60)
    return memoryview(bytes(8))

infos = [TensorInfo(name, "F32", (2,)) for name in "abc"]
Output(Path(sys.argv[1]), force=True, shard_bytes=8).write(infos, one_by_one(infos, content), Provenance({}), ())
"""


@pytest.mark.parametrize(
    ("how", "name", "old"),
    [
        (signal.SIGKILL, "x.safetensors", True),
        (signal.SIGINT, "x", True),
        (signal.SIGKILL, "x", False),
        (signal.SIGINT, "x.safetensors", False),
    ],
)
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
        preexec_fn=heed_signals,
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
