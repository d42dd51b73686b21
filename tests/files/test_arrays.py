"""Named arrays in safetensors and npz come back as written; damaged files are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.files.arrays import npz_names, read_arrays, read_document, read_npz, write_arrays, write_npz
from ditmoe_cli.files.header import read_safetensors_header

ARRAYS = {
    "b": np.arange(6, dtype="<f4").reshape(2, 3),
    "a": np.array(7, dtype="<i8"),
    "empty": np.zeros((0, 4), dtype="|u1"),
}


def test_safetensors_come_back_mapped_and_in_equal_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    assert write_arrays(one, ARRAYS, {"schema": "x/1"}) == one.stat().st_size
    write_arrays(two, dict(reversed(ARRAYS.items())), {"schema": "x/1"})
    assert one.read_bytes() == two.read_bytes()
    arrays = read_arrays(one, ["b", "empty", "a", "absent"])
    assert arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
    with pytest.raises(ValueError, match="read-only"):
        arrays["b"][0, 0] = 1


def test_documents_are_checked_by_schema(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_arrays(path, ARRAYS, {"schema": "x/1", "n": 3})
    header = read_safetensors_header(path)
    assert read_document(header, "x/1", path) == {"schema": "x/1", "n": 3}
    with pytest.raises(
        BadInputError, match=r"x\.safetensors: ditmoe metadata: schema is 'x/1', expected 'y/1'; name a"
    ):
        read_document(header, "y/1", path)


def test_npz_come_back_and_are_told_from_pickles(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    assert write_npz(path, ARRAYS) == path.stat().st_size
    assert npz_names(path) == set(ARRAYS)
    assert read_npz(path, ["b", "absent"]).keys() == {"b"}
    with pytest.raises(OutputExistsError):
        write_npz(path, ARRAYS)
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pt")
    assert npz_names(tmp_path / "x.pt") == npz_names(tmp_path / "absent") == set()


def test_damaged_npz_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_npz(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadInputError, match=r"x\.npz: not an npz archive, or cut short"):
        read_npz(path, ["b"])
    objects = tmp_path / "objects.npz"
    np.savez(objects, b=np.array([{}], dtype=object))
    with pytest.raises(BadInputError, match=r"objects\.npz: cannot be read as npz"):
        read_npz(objects, ["b"])
