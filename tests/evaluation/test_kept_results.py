"""Results that are kept: those that were changed in the file, or are of another key, are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditmoe_cli.evaluation.kept_results import keep, read_kept, result_key

KEY = result_key("fid", {"seed": 0})


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep(KEY, {"score": 1.25}, lambda line: pytest.fail(line))
    (file,) = (file for file in tmp_path.rglob("*.json"))
    return file


def test_a_result_comes_back_under_its_key_only(kept: Path) -> None:
    assert read_kept(KEY) == {"score": 1.25}
    other = result_key("fid", {"seed": 1})
    assert read_kept(other) is None
    kept.rename(kept.with_name(f"{other[:40]}.json"))
    assert read_kept(other) is None


def test_a_result_that_was_changed_is_none(kept: Path) -> None:
    kept.write_text(kept.read_text().replace("1.25", "1.26"))
    assert read_kept(KEY) is None
