"""Damaged inputs of every kind that is read: each is refused in one line, or read, and nothing else happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mutated_inputs import GROUPS
from mutating import Tally, limited_memory

# inputs of each corpus; in all more than 100,000
MANY = {
    "headers of any tensors": 60_000,
    "headers of a model": 8_000,
    "packed weights": 3_000,
    "states of packed weights": 3_000,
    "pickles": 9_000,
    "ditmoe inspect": 1_000,
    "indices of shards": 6_000,
    "config.json": 2_000,
    "latest of DeepSpeed": 2_000,
    "plans": 5_000,
    "envelopes": 5_000,
    "profiles": 1_000,
    "samples": 2_000,
    "statistics": 2_000,
    "archives of images": 1_000,
    "kept pieces": 2_000,
}
FEW = 20


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail where anything is run or written outside the folder of the inputs."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)

    def refuse(*arguments: object) -> int:
        raise AssertionError(f"a file had this run: {arguments}")

    monkeypatch.setattr(os, "system", refuse)
    yield
    assert not any(place.iterdir())


def tally(group: str, folder: Path, seeds: Callable[[str], range]) -> Tally:
    corpora, counted = GROUPS[group](folder), Tally()
    with limited_memory():
        for corpus in corpora:
            counted.run(corpus, seeds(corpus.name))
    return counted


@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("group", GROUPS)
def test_some_damaged_inputs(tmp_path: Path, group: str) -> None:
    counted = tally(group, tmp_path, lambda name: range(MANY[name], MANY[name] + FEW))
    assert all(each["refused"] for each in counted.counts.values())


@pytest.mark.slow
@pytest.mark.usefixtures("canary")
@pytest.mark.parametrize("group", GROUPS)
def test_a_hundred_thousand_damaged_inputs(tmp_path: Path, group: str) -> None:
    counted = tally(group, tmp_path, lambda name: range(MANY[name]))
    sys.stdout.write(f"{counted}\n")  # shown by -s
    # some damage hurts nothing: so inputs are damaged in places that are read, and whole but for these
    assert all(each["refused"] and each["read"] for each in counted.counts.values())
    assert counted.total == sum(MANY[name] for name in counted.counts)


def test_they_are_a_hundred_thousand(tmp_path: Path) -> None:
    names = []
    for group, corpora in GROUPS.items():
        (tmp_path / group).mkdir()
        names += [corpus.name for corpus in corpora(tmp_path / group)]
    assert sorted(names) == sorted(MANY)
    assert sum(MANY.values()) > 100_000
