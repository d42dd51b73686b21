"""The safetensors header: read as the library reads it, and distrusted as a download should be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import DTYPE_BYTES, TensorInfo, encode_header, read_safetensors_header

INFOS = st.lists(
    st.builds(
        TensorInfo,
        st.text(max_size=12).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    unique_by=lambda info: info.name,
    max_size=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


@given(infos=INFOS, metadata=st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3))
def test_what_is_encoded_is_read_back(scratch: Path, infos: list[TensorInfo], metadata: dict[str, str]) -> None:
    header = encode_header(infos, metadata)
    assert len(header) % 8 == 0
    scratch.write_bytes(header + bytes(sum(info.nbytes for info in infos)))
    found = read_safetensors_header(scratch)
    assert found.metadata == metadata
    assert [tensor.info for tensor in found.tensors.values()] == infos
    assert all(tensor.end - tensor.start == tensor.info.nbytes for tensor in found.tensors.values())
    starts = [tensor.start for tensor in found.tensors.values()]
    assert starts == sorted(starts)


def test_metadata_order_does_not_change_the_bytes() -> None:
    infos = [TensorInfo("a", "F32", (2,))]
    assert encode_header(infos, {"b": "1", "a": "2"}) == encode_header(infos, {"a": "2", "b": "1"})


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(True), "c": torch.zeros(2, 0, dtype=torch.int64)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read_safetensors_header(tmp_path / "x.safetensors")
    assert found.metadata == {"format": "pt"}
    assert {n: (t.info.dtype, t.info.shape) for n, t in found.tensors.items()} == {
        "a": ("F32", (3,)),
        "b": ("BOOL", ()),
        "c": ("I64", (2, 0)),
    }


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    infos = [TensorInfo("a", "F32", (2, 3)), TensorInfo("b", "F16", (3,))]
    whole = encode_header(infos, {"k": "v"}) + bytes(30)
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    read_safetensors_header(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadInputError):
            read_safetensors_header(path)


def test_a_truncated_download_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed({"a": entry()}, bytes(5)))
    with pytest.raises(BadInputError, match="truncated, fetch it again"):
        read_safetensors_header(path)


DAMAGED = {
    "empty": b"",
    "length beyond the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "length of all ones": b"\xff" * 8 + b"{}",
    "not JSON": framed(b"{not json"),
    "not UTF-8": framed(b'{"\xff\xfe": 1}'),
    "a list": framed([1, 2]),
    "nested too deeply": framed(b"[" * 100_000),
    "metadata of numbers": framed({"__metadata__": {"a": 1}}),
    "metadata null": framed({"__metadata__": None}),
    "trailing bytes": framed({"a": entry()}, bytes(9)),
    "bytes without tensors": framed({}, b"x"),
    "a gap": framed({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "an overlap": framed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": framed({"a": entry(), "b": entry()}, bytes(8)),
    "data cut short": framed({"a": entry()}, bytes(7)),
    "unknown dtype": framed({"a": entry(dtype="F7")}, bytes(8)),
    "dtype of the wrong size": framed({"a": entry(dtype="F64")}, bytes(8)),
    "dtype not a name": framed({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative shape": framed({"a": entry(shape=[-1, -2])}, bytes(8)),
    "fractional shape": framed({"a": entry(shape=[2.0])}, bytes(8)),
    "shape of truths": framed({"a": entry(shape=[2, True])}, bytes(8)),
    "shape not a list": framed({"a": entry(shape="2")}, bytes(8)),
    "astronomic shape": framed({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)),
    "offsets backwards": framed({"a": entry(offsets=[8, 0])}, bytes(8)),
    "offsets negative": framed({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "offsets too many": framed({"a": entry(offsets=[0, 4, 8])}, bytes(8)),
    "offsets of strings": framed({"a": entry(offsets=["0", "8"])}, bytes(8)),
    "no offsets": framed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry not an object": framed({"a": 5}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused_and_the_file_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(BadInputError, match=r"broken\.safetensors") as caught:
        read_safetensors_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", sorted(DAMAGED.keys() - {"metadata null"}))  # null is none to the library
def test_what_we_refuse_the_library_refuses_too(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises((safetensors.SafetensorError, OSError)):
        safetensors.torch.load_file(path)


@given(data=st.binary(max_size=64))
def test_noise_is_refused_in_one_way(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    if data[:8] == (2).to_bytes(8, "little") and data[8:] == b"{}":
        return
    with pytest.raises(BadInputError):
        read_safetensors_header(scratch)


@given(header=JSON | st.dictionaries(st.text(max_size=3), st.fixed_dictionaries(entry(JSON, JSON, JSON))))
def test_any_json_is_read_or_refused_in_one_way(scratch: Path, header: object) -> None:
    scratch.write_bytes(framed(header, bytes(8)))
    try:
        found = read_safetensors_header(scratch)
    except BadInputError:
        return
    assert sum(tensor.info.nbytes for tensor in found.tensors.values()) == 8


@given(shape=st.lists(st.integers(0, 9), max_size=4), dtype=st.sampled_from(sorted(DTYPE_BYTES)))
def test_sizes(shape: list[int], dtype: str) -> None:
    info = TensorInfo("a", dtype, tuple(shape))
    assert info.numel == math.prod(shape)
    assert info.nbytes == torch.empty(shape).numel() * DTYPE_BYTES[dtype]
