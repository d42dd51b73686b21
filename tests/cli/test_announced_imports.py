"""Slow imports as phases."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from seeing import Seen

from ditmoe_cli.cli import announced_imports as announcing
from ditmoe_cli.cli.announced_imports import announced_imports
from ditmoe_cli.progress import watched_by


def test_an_import_is_a_phase_once_and_leaves_the_module_as_it_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("slow_one", "quick_one"):
        (tmp_path / f"{name}.py").write_text("VALUE = 3\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(announcing, "SLOW", frozenset({"slow_one"}))
    with watched_by(seen := Seen()), announced_imports():
        import quick_one  # type: ignore[import-not-found]
        import slow_one  # type: ignore[import-not-found]
    assert [phase.title for phase in seen.phases] == seen.ended == ["loading slow_one"]
    assert quick_one.VALUE == slow_one.VALUE == 3
    assert type(slow_one.__loader__) is type(slow_one.__spec__.loader) is type(quick_one.__loader__)
    assert not any(isinstance(finder, announcing._Finder) for finder in sys.meta_path)


def test_a_module_that_is_missing_or_broken_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(announcing, "SLOW", frozenset({"broken_one", "slow_and_missing"}))
    with watched_by(seen := Seen()), announced_imports():
        with pytest.raises(ModuleNotFoundError):
            import slow_and_missing  # type: ignore[import-not-found]  # noqa: F401
        with pytest.raises(ValueError, match="broken"):
            import broken_one  # noqa: F401
    assert seen.ended == ["loading broken_one"]
