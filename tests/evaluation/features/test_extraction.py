"""Features that are taken beside the sampling: one batch at a time, and the last one is waited for in sight."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest
from seeing import Seen

from ditmoe_cli.evaluation.features.extraction import Extraction, background
from ditmoe_cli.evaluation.features.extractors import make_extractor
from ditmoe_cli.progress import watched_by


def test_the_last_batch_is_waited_for_in_a_phase() -> None:
    gate, taken = Event(), []

    def task(first: int, _: object) -> None:
        if first == 4:
            assert gate.wait(60)
        taken.append(first)

    class Opening(Seen):
        """Let the last batch end once its phase has begun."""

        def __call__(self, phase):  # type: ignore[no-untyped-def]
            gate.set()
            return super().__call__(phase)

    with watched_by(seen := Opening()), background(task, "the last features") as submit:
        submit(0, np.zeros(1))
        submit(4, np.zeros(1))
        assert not seen.phases
    assert taken == [0, 4] and seen.ended == ["the last features"]


def test_an_error_in_the_background_is_raised_at_the_next_batch() -> None:
    def task(first: int, _: object) -> None:
        raise ValueError(f"broken at {first}")

    with pytest.raises(ValueError, match="broken at 0"), background(task, "the last features") as submit:
        submit(0, np.zeros(1))
        submit(4, np.zeros(1))


def test_what_another_version_took_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extraction = Extraction(make_extractor("pixels"), 255, (), "", tmp_path, tmp_path, 1)
    before = {extraction.statistics_path("images"), *extraction.array_names().values()}
    assert before == {extraction.statistics_path("images"), *extraction.array_names().values()}
    monkeypatch.setattr("ditmoe_cli.files.workfolder.__version__", "another")
    assert not before & {extraction.statistics_path("images"), *extraction.array_names().values()}
