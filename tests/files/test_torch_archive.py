"""Archives of torch's: torch reads them as its own, zip readers find every byte, and their size is known before."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import folder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files import torch_archive
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import dtype_code, tensor_bytes
from ditmoe_cli.files.streaming import chunks
from ditmoe_cli.files.torch_archive import SavedStateDict

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=20), max_size=6, unique=True))
    state = {}
    for name in names:
        shape, dtype = draw(st.lists(st.integers(0, 9), max_size=4)), draw(st.sampled_from(DTYPES))
        state[name] = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8).view(torch.uint8)
        state[name] = (state[name] % 2 if dtype == torch.bool else state[name]).view(dtype).reshape(shape)
    return state


def infos(state: Mapping[str, Tensor]) -> list[TensorInfo]:
    return [TensorInfo(name, dtype_code(value.dtype, name), tuple(value.shape)) for name, value in state.items()]


def written(state: Mapping[str, Tensor], path: Path, key: str | None = None, **beside: Any) -> SavedStateDict:
    archive = SavedStateDict(infos(state), key, beside)
    assert (
        archive.write(path, lambda info: chunks(tensor_bytes(state[info.name])))
        == archive.nbytes
        == path.stat().st_size
    )
    return archive


def assert_same(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    assert list(found) == list(state)
    for name, value in state.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].stride() == value.stride()
        assert bytes(tensor_bytes(found[name])) == bytes(tensor_bytes(value))


SETTINGS = {"rf": True, "guided": False, "layers": 28, "large": 2**40, "negative": -5, "dropout": 0.1, "name": "DiT é"}


@pytest.mark.parametrize("limit", [None, 40, 1])
@given(state=states(), key=st.sampled_from([None, "ema"]))
def test_torch_reads_what_we_write(limit: int | None, state: dict[str, Tensor], key: str | None) -> None:
    """Also with zip's 64-bit records, which take the place of numbers from `limit` on."""
    beside = {"args": SETTINGS} if key else {}
    with folder() as where, pytest.MonkeyPatch.context() as patched:
        if limit is not None:
            patched.setattr(torch_archive, "_LONG", limit)
            patched.setattr(torch_archive, "_SHORT", limit)
        written(state, where / "x.pt", key, **beside)
        for mapped in (False, True):
            loaded = torch.load(where / "x.pt", weights_only=True, mmap=mapped)
            assert_same(loaded[key] if key else loaded, state)
            assert key is None or loaded["args"] == SETTINGS
        with zipfile.ZipFile(where / "x.pt") as archive:
            assert archive.testzip() is None
            stored = {name: archive.read(f"archive/data/{i}") for i, name in enumerate(state)}
        assert stored == {name: bytes(tensor_bytes(value)) for name, value in state.items()}


def test_data_is_aligned_and_nothing_depends_on_the_clock_or_the_name(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(1)}
    for name in ("x.pt", "other.pth"):
        written(state, tmp_path / name, "ema")
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "other.pth").read_bytes()
    reader = torch._C.PyTorchFileReader(str(tmp_path / "x.pt"))
    assert all(reader.get_record_offset(f"data/{i}") % 64 == 0 for i in range(3))


def test_a_tensor_of_another_size_than_planned_is_an_error(tmp_path: Path) -> None:
    archive = SavedStateDict([TensorInfo("a", "F32", (2,))])
    with pytest.raises(DitmoeError, match="has 4 bytes, planned 8"):
        archive.write(tmp_path / "x.pt", lambda _: [memoryview(bytes(4))])
