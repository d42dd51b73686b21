"""Readers return stored tensors under upstream names, lazily."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, Pico
from reading import assert_holds

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.reader import dtype_code, open_reader, tensor_bytes, torch_dtype

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
]


@pytest.fixture(scope="module")
def model(pico: Callable[..., Pico]) -> Pico:
    return pico(experts=12, hidden=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_odd_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(15).reshape(3, 5).to(dtype)
    tensors = {"matrix": values, "scalar": values[1, 1].clone(), "one": values[:1, :1].clone()}
    safetensors.torch.save_file({**tensors, "none": values[:, :0].clone()}, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for path in (tmp_path / "x.safetensors", tmp_path / "x.pt"):
        header, reader = open_reader(path)
        for name, value in tensors.items():
            assert reader.tensor(name).dtype == dtype
            assert torch.equal(reader.tensor(name), value)
            assert header.tensors[name].dtype == dtype_code(dtype, "")
            assert header.tensors[name].nbytes == reader.raw(name).nbytes
            assert bytes(reader.raw(name)) == bytes(value.reshape(-1).view(torch.uint8).numpy())
    empty = open_reader(tmp_path / "x.safetensors")[1].tensor("none")
    assert (empty.dtype, empty.shape) == (dtype, (3, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_codes_are_inverse(dtype: torch.dtype) -> None:
    assert torch_dtype(dtype_code(dtype, "x")) == dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_a_place_are_refused_by_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({"strange": torch.zeros(2).to(dtype)}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="strange"):
        open_reader(tmp_path / "x.pt")


def test_sparse_tensors_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"sparse": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"x\.pt"):
        open_reader(tmp_path / "x.pt")


def test_float8_in_safetensors_opens_but_is_not_computed_with(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    _, reader = open_reader(tmp_path / "x.safetensors")
    assert len(reader.raw("a")) == 2
    with pytest.raises(BadInputError, match="F8_E4M3"):
        reader.tensor("a")


def test_views_transposes_and_parameters_in_a_pickle(tmp_path: Path) -> None:
    flat = torch.arange(24.0)
    state = {"a": flat[:6].reshape(2, 3), "b": flat[6:18].reshape(3, 4).T, "c": torch.nn.Parameter(flat[18:])}
    torch.save(state, tmp_path / "x.pt")
    _, reader = open_reader(tmp_path / "x.pt")
    for name, value in state.items():
        assert torch.equal(reader.tensor(name), value)
        assert bytes(reader.raw(name)) == bytes(tensor_bytes(value.detach().clone()))


def test_a_tensor_is_a_copy_that_outlives_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    tensor = open_reader(path)[1].tensor("a")
    tensor += 1
    assert torch.equal(tensor, torch.full((4,), 2.0))
    assert path.read_bytes() == before


@pytest.mark.parametrize("archive", [True, False])
def test_a_tensor_of_a_pickle_is_a_copy_too(archive: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=archive)
    before = path.read_bytes()
    reader = open_reader(path)[1]
    stored = bytes(reader.raw("a"))
    tensor = reader.tensor("a")
    tensor += 1
    assert bytes(reader.raw("a")) == stored, "what is hashed and copied is what the file holds"
    assert torch.equal(reader.tensor("a"), torch.ones(4))
    assert path.read_bytes() == before


def test_safetensors_are_opened_and_fingerprinted_without_torch(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    path = pico().save(tmp_path / "x.safetensors")
    program = (
        "import sys; from ditmoe_cli import open_checkpoint; c = open_checkpoint(sys.argv[1]); c.fingerprint; "
        "print(sorted({'torch', 'numpy', 'typer', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


FOREIGN = {
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "zeros": bytes(1000),
    "text": b"hello\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "cut zip": b"PK\x03\x04" + bytes(100),
    "bzip2": b"BZh91AY" + bytes(40),
    "xz": b"\xfd7zXZ\x00" + bytes(40),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(40),
    "tar": bytes(257) + b"ustar" + bytes(250),
    "json": b'{"weight_map": {}}',
    "gguf": b"GGUF" + bytes(40),
    "hdf5": b"\x89HDF\r\n" + bytes(40),
    "npy": b"\x93NUMPY" + bytes(40),
    "empty": b"",
    "one byte": b"x",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "numbers": pickle.dumps([1, 2, 3]),
    "endless stack": b"\x80\x02" + b"(" * 500 + b".",
}


SAID = {
    "web page": "web page",
    "git-lfs pointer": "git lfs pull",
    "zeros": "begins with zeros",
    "gzip": "gzip; unpack",
    "bzip2": "bzip2; unpack",
    "xz": "xz; unpack",
    "zstd": "zstd; unpack",
    "cut zip": "cut short; fetch it again",
    "json": "JSON",
    "gguf": "GGUF",
    "hdf5": "HDF5",
    "npy": "numpy array",
    "empty": "is empty",
}


@pytest.mark.parametrize("kind", SAID)
def test_what_a_file_is_instead_is_said(tmp_path: Path, kind: str) -> None:
    for name in ("x.pt", "x.safetensors"):
        (tmp_path / name).write_bytes(FOREIGN[kind])
        with pytest.raises(BadInputError, match=SAID[kind]):
            open_reader(tmp_path / name)


def test_an_npz_is_named_as_such(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(BadInputError, match="numpy archive"):
        open_reader(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
def test_files_of_other_kinds(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(FOREIGN[kind])
    with pytest.raises(BadInputError, match="file") as caught:
        open_reader(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x", "x.safetensors.part"])
def test_safetensors_under_another_name(tmp_path: Path, model: Pico, name: str) -> None:
    path = model.save(tmp_path / "x.safetensors").rename(tmp_path / name)
    assert_holds(path, model)
    assert open_reader(path)[0].layout == "safetensors"


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_under_another_name(tmp_path: Path, model: Pico, legacy: bool) -> None:
    path = model.save_pt(tmp_path / "x.safetensors", "ema", legacy=legacy)
    assert_holds(path, model)
    assert open_reader(path)[0].layout == "'ema' of {ema}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    for path in (pico().save(tmp_path / "x.safetensors"), pico().save_pt(tmp_path / "x.pt")):
        path.chmod(0)
        with pytest.raises(BadInputError, match="permission"):
            open_reader(path)


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "net.", "model.diffusion_model.", "transformer."]
)
def test_wrapped_names_in_pickles_and_safetensors(tmp_path: Path, model: Pico, prefix: str) -> None:
    wrapped = {prefix + name: value for name, value in model.state.items()}
    torch.save({"model": wrapped}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    safetensors.torch.save_file(wrapped, tmp_path / "x.safetensors")
    assert_holds(tmp_path / "x.safetensors", model)


def test_tensors_come_in_natural_order(tmp_path: Path, model: Pico) -> None:
    torch.save(dict(sorted(model.state.items(), reverse=True)), tmp_path / "x.pt")
    names = [n for n in open_reader(tmp_path / "x.pt")[0].tensors if n.startswith("blocks.1.moe.experts")]
    experts = [int(name.split(".")[4]) for name in names]
    assert experts == sorted(experts)
    assert max(experts) == 11


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / f"{shard}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(BadInputError, match="'x' stands in another shard"):
        open_reader(tmp_path)
