"""Options of sampling: classes are read as they are printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.cli.sampling_options import parse_classes


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("0", (0,)),
        ("0,3,7", (0, 3, 7)),
        ("0-3", (0, 1, 2, 3)),
        ("0-3,7", (0, 1, 2, 3, 7)),
        ("7, 2-2 ,0-1", (7, 2, 0, 1)),
        ("3,3", (3, 3)),
    ],
)
def test_numbers_and_ranges(text: str, classes: tuple[int, ...]) -> None:
    assert parse_classes(text) == classes


@pytest.mark.parametrize("text", ["", ",", "0,", "a", "3-1", "-1", "0-", "0--3", "1.5", "0-9999999999999", "0-3;7"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="class"):
        parse_classes(text)


def test_classes_are_given_as_they_are_printed(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    settings = ("--images", 4, "--steps", 1)
    first = here("sample", "a.safetensors", *settings, "-o", "x.safetensors", cwd=tmp_path)
    printed = first.result["spec"]["classes"]
    assert printed == "0-2"
    again = here("sample", "a.safetensors", *settings, "--classes", printed, "-o", "y.safetensors", cwd=tmp_path)
    assert again.result["spec"] == first.result["spec"]
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    beyond = here("sample", "a.safetensors", *settings, "--classes", "1-3", cwd=tmp_path)
    assert beyond.error(2) == "--classes 3: the checkpoint has classes 0 to 2"
