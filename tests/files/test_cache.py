"""Where the cache is, on machines of all kinds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.cache import cache_folder, cached_file, find_cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a folder for temporary files beside it."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


def refuse_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder one that cannot be written, also for root, who may write everything."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


def own(home: Path) -> Path:
    return home.parent / "tmp" / f"ditmoe-{os.getuid()}"


def test_it_is_in_the_home_folder_and_not_created(home: Path) -> None:
    assert cache_folder("work") == home / ".cache" / "ditmoe" / "work"
    assert find_cache().problem == "" and not any(home.iterdir())


def test_a_variable_names_another_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert cache_folder() == home / "elsewhere" / "ditmoe"


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_an_empty_or_relative_variable_counts_as_none(value: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == home / ".cache" / "ditmoe"


def test_a_user_whom_the_system_does_not_know_gets_a_temporary_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run under a number of their own: no HOME, and no entry in /etc/passwd."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    cache = find_cache()
    assert cache.folder == own(home) and cache.problem == f"there is no home folder; the cache is in {own(home)}"


def test_a_home_folder_that_is_missing_or_read_only_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writes(home, monkeypatch)
    assert find_cache().problem.startswith(f"{home / '.cache' / 'ditmoe'} cannot be written; ")
    assert cache_folder("work") == own(home) / "work"
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert cache_folder() == own(home) or os.access("/proc", os.W_OK)


def test_files_of_a_read_only_cache_are_still_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = home / ".cache" / "ditmoe"
    usual.mkdir(parents=True)
    (usual / "weights").touch()
    refuse_writes(usual, monkeypatch)
    assert cached_file("weights") == usual / "weights"
    assert cached_file("others") == own(home) / "others"


def test_a_temporary_folder_of_somebody_else_is_not_trusted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writes(home, monkeypatch)
    (home.parent / "other").mkdir()
    own(home).symlink_to(home.parent / "other")
    with pytest.raises(BadInputError, match="somebody else's; set XDG_CACHE_HOME"):
        find_cache()


def test_without_any_folder_the_way_out_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    refuse_writes(home, monkeypatch)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(BadInputError, match="and no temporary one; set XDG_CACHE_HOME"):
        find_cache()
