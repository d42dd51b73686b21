"""Names that are no UTF-8, for libraries that take nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ditmoe_cli.files.file_names import utf8_name


def test_a_name_in_utf8_stays(tmp_path: Path) -> None:
    with utf8_name(tmp_path / "é.pt") as name:
        assert name == str(tmp_path / "é.pt")


def test_any_other_name_is_one_of_the_same_file_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.pt")
    file.write_bytes(b"weights")
    with utf8_name(file) as name:
        assert name.encode() and Path(name).read_bytes() == b"weights"
    assert not Path(name).exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9.pt")
    with pytest.raises(FileNotFoundError) as error, utf8_name(file):
        pass
    assert error.value.filename == str(file)
