"""Phases and their parts: who is told of them, and how much is done."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from seeing import Seen

from ditmoe_cli.progress import each, phase, watched_by


def test_the_watcher_is_told_of_outer_phases_and_reads_their_parts() -> None:
    with watched_by(seen := Seen()), phase("refitting", 2, "blocks") as outer:
        assert outer.inner is None
        with phase("solving", 9, "systems") as part, phase("reading") as innermost:
            assert outer.inner is part and part.inner is innermost
            part(3)
        assert outer.inner is None and part.done == 3
        outer(1)
    with phase("unwatched", 1) as alone:
        alone(1)
    assert seen.phases == [outer] and seen.ended == ["refitting"] and outer.done == 1


def test_a_part_counts_for_its_share_of_one_unit() -> None:
    with phase("refitting", 4, "blocks") as outer:
        with phase("collecting", 8, "batches", share=0.25) as first:
            first(4)
            assert outer.fraction == pytest.approx(0.25 * 0.5 / 4)
        assert outer.fraction == pytest.approx(0.25 / 4)
        with phase("solving", 3, "systems", share=0.75) as second:
            second(1)
            assert outer.fraction == pytest.approx((0.25 + 0.75 / 3) / 4)
        assert outer.fraction == pytest.approx(1 / 4)
        outer(1)
        assert outer.fraction == 1 / 4, "the unit is counted once, whatever its parts were"
        with phase("of an unknown share", 2) as third:
            third(1)
            assert outer.fraction == 1 / 4
        outer(3)
        assert outer.fraction == 1.0


def test_a_part_may_be_several_units() -> None:
    """A batch of 4 of 8 images, in steps."""
    with phase("sampling", 8, "images") as outer:
        with phase("evaluating", 10, "steps", share=4) as batch:
            batch(5)
            assert outer.fraction == pytest.approx(2 / 8)
        assert outer.fraction == pytest.approx(4 / 8)
        outer(4)
        assert outer.fraction == 4 / 8
        for _ in range(3):
            with phase("of half a unit", share=0.5):
                pass
        assert outer.fraction == pytest.approx(5 / 8), "parts together are no more than a unit"


def test_work_that_an_earlier_run_did_counts_as_done() -> None:
    with phase("refitting", 4, "blocks", start=3) as progress:
        assert progress.fraction == 0.75
        progress(1)
    assert progress.done == 4


def test_nobody_knows_how_much_of_an_uncounted_phase_is_done() -> None:
    with phase("loading") as progress:
        progress(5)
        assert progress.fraction == 0.0


def test_an_error_ends_the_phase_and_its_parts() -> None:
    with watched_by(seen := Seen()):
        with pytest.raises(ValueError, match="broken"), phase("a", 1) as outer, phase("b"):
            raise ValueError("broken")
        with phase("c"):
            pass
    assert outer.inner is None and seen.ended == ["a", "c"]


def test_phases_of_other_threads_are_nobodys_parts() -> None:
    def work() -> int:
        with phase("features", 1) as progress:
            progress(1)
        return progress.done

    with watched_by(seen := Seen()), phase("sampling", 1) as outer, ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == 1
        assert outer.inner is None
    assert seen.ended == ["sampling"]


def test_each_counts_an_item_as_done_when_the_next_is_asked_for() -> None:
    done = []
    with phase("refitting", 1, "blocks") as outer:
        for item in each("abc", "solving", "systems", share=1.0):
            assert outer.inner is not None
            done.append((item, outer.inner.done, outer.fraction))
    assert done == [("a", 0, 0.0), ("b", 1, pytest.approx(1 / 3)), ("c", 2, pytest.approx(2 / 3))]
    assert outer.inner is None and outer.fraction == 1.0


def test_a_loop_that_is_left_early_ends_its_part() -> None:
    with phase("choosing", 1) as outer:
        for _ in each((1, 2, 3), "solving", "strengths"):
            break
        assert outer.inner is None


def test_an_error_amid_each_leaves_no_phase_behind() -> None:
    """The error keeps the generator alive; what follows is no part of the phase that it was a part of."""
    with watched_by(seen := Seen()):
        with pytest.raises(ValueError, match="broken") as kept, phase("a", 1):
            items = each([1, 2], "b", "items")
            for _ in items:
                raise ValueError("broken")
        with phase("c"):
            pass
        del kept, items
        with phase("d"):
            pass
    assert seen.ended == ["a", "c", "d"]
