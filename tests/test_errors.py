"""Errors name settings in two ways, and quote others in a line."""

from __future__ import annotations

import pytest

from ditmoe_cli.errors import BrokenImageError, UsageError, first_line, is_out_of_memory, named


def test_settings_are_named_as_the_reader_knows_them() -> None:
    error = UsageError("⟨group_size⟩ 0: must be at least 1 (see ⟨bits⟩)")
    assert str(error) == "group_size 0: must be at least 1 (see bits)"
    assert named(error.message, lambda name: "--" + name.replace("_", "-")).startswith("--group-size 0: ")


def test_a_broken_image_is_named_by_its_index() -> None:
    error = BrokenImageError(3, "NaN or infinite values")
    assert str(error) == "image 3 of the batch holds NaN or infinite values"
    assert (error.index, error.problem) == (3, "NaN or infinite values")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("x" * 500), "x" * 160),
        (ValueError(), "ValueError"),
        (ValueError("\nrest"), "ValueError"),
    ],
)
def test_first_lines_are_short_and_never_empty(error: ValueError, expected: str) -> None:
    assert first_line(error) == expected


def test_out_of_memory_is_recognised() -> None:
    gpu = type("OutOfMemoryError", (RuntimeError,), {})
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert all(map(is_out_of_memory, (MemoryError(), gpu(), cpu)))
    assert not is_out_of_memory(RuntimeError("a shape"))
