"""Pickles that are followed without being built: whatever torch saves passes, and nothing is built beyond the file."""

from __future__ import annotations

import pickle
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutating import limited_memory, watched

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.archives import read_torch_archive
from ditmoe_cli.files.pickle_scan import Made, PickleScan, UnknownCallError
from ditmoe_cli.files.reader import open_reader

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.uint16,
)
NUMPYS = ("?", "u1", "<f4", ">f8", "<i8")


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors, views of others, transposed, empty, and parameters."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    made = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    match draw(st.integers(0, 3)):
        case 0:
            return made.T if made.ndim == 2 else made
        case 1:
            return torch.zeros(10)[draw(st.integers(0, 9)) :]
        case 2 if made.is_floating_point():
            return torch.nn.Parameter(made)
        case _:
            return made


SCALARS = (
    *(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.binary(min_size=1, max_size=5),
    ),
    *(tensors(), st.sampled_from(NUMPYS).map(lambda code: np.zeros((2, 1), code)), st.just(np.float32(1.5))),
    *(st.just(torch.Size([2, 3])), st.just(torch.float16), st.just(torch.device("cpu")), st.just(1j)),
)
KEYS = st.text(max_size=4) | st.integers(-5, 5) | st.tuples(st.integers(0, 3), st.text(max_size=2))
DOCUMENTS = st.recursive(
    st.one_of(*SCALARS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda values: Namespace(**values))
        | st.lists(inner, min_size=1, max_size=2).map(lambda values: [values, values])
        | st.just({1, 2})
        | st.just(Counter("aab"))
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scan") / "x.pt"


@settings(max_examples=100)
@given(document=DOCUMENTS, legacy=st.booleans())
def test_whatever_torch_saves_and_loads_passes(scratch: Path, document: object, legacy: bool) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "opt": [document]}, scratch, _use_new_zipfile_serialization=not legacy)
    header, reader = open_reader(scratch)
    assert reader.tensor("w").tolist() == [1.0, 1.0, 1.0]
    assert "w" in header.tensors


def stored(key: object, nbytes: int) -> int:
    """Believe a pickle about its storages."""
    assert isinstance(key, str)
    return nbytes


def followed(document: object, folder: Path) -> Any:
    torch.save(document, folder / "x.pt")
    archive = read_torch_archive(folder / "x.pt")
    return PickleScan(archive.pickle, stored).run()


def test_shared_values_weigh_as_often_as_they_are_met(tmp_path: Path) -> None:
    twice = ["a", "b", ["c"]]  # a list of 3 values in one of 1: 5 with both lists
    weights = [followed(document, tmp_path).weight for document in ([], twice, [twice], [twice, twice])]
    assert weights == [1, 5, 6, 11]
    assert followed({"a": (1, (2, 3))}, tmp_path).depth == 3
    assert followed({"w": torch.zeros(3)}, tmp_path) == Made("dict", 3, 1)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
SNIPPETS = (
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"u",
        b"s",
        b"e",
        b"a",
        b"R",
        b"b",
        b"Q",
        b"\x81",
        b"N",
        b"K\x02",
    ),
    *(b"q\x00", b"h\x00", b"q\x01", b"h\x01", b"X\x01\x00\x00\x00a", b"X\x01\x00\x00\x000", b"J\xff\xff\xff\x7f"),
    *(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch\nSize\n", b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n", b"cnumpy\ndtype\n", b"ctorch\nTensor\n"),
    *(b"cos\nsystem\n", b"M\xff\xff", b"\x8f", STORAGE, STORAGE + b"K\x00K\x02\x85K\x01\x85\x89NtR"),
)


@settings(max_examples=200)
@given(parts=st.lists(st.sampled_from(SNIPPETS), max_size=25))
def test_any_operations_are_followed_or_refused(scratch: Path, parts: list[bytes]) -> None:
    with zipfile.ZipFile(scratch, "w") as file:
        file.writestr("x/data.pkl", b"\x80\x02" + b"".join(parts) + b".")
        file.writestr("x/data/0", bytes(16))
        file.writestr("x/version", b"3\n")
    with watched(), limited_memory():
        try:
            header, reader = open_reader(scratch)
        except BadInputError as error:
            assert "\n" not in str(error)
            return
        for name in header.tensors:
            reader.raw(name).tobytes()


def test_a_call_is_named() -> None:
    assert PickleScan(pickle.dumps(print, 2), stored).run() is not None  # a name alone runs nothing
    with pytest.raises(UnknownCallError, match=r"builtins\.print"):
        PickleScan(b"\x80\x02c__builtin__\nprint\n)R.", stored).run()
