"""Written files: readable by the safetensors library, aligned, predictable, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.errors import DitmoeError, OutputExistsError
from ditmoe_cli.files.header import DTYPE_BYTES, TensorInfo, read_safetensors_header
from ditmoe_cli.files.names import unwrapped
from ditmoe_cli.files.provenance import Card, Provenance, Step
from ditmoe_cli.files.reader import dtype_code, open_reader, tensor_bytes
from ditmoe_cli.files.writer import Job, Output, aligned_order, one_by_one, plan_shards, write_safetensors

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
STATES = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), SHAPES),
    min_size=1,
    max_size=10,
)


def tensors_of(description: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(description))
    return {
        name: (100 * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))
        for name, (dtype, shape) in description.items()
    }


def infos_of(tensors: dict[str, torch.Tensor]) -> list[TensorInfo]:
    return [TensorInfo(n, dtype_code(t.dtype, n), tuple(t.shape)) for n, t in tensors.items()]


def jobs_of(tensors: dict[str, torch.Tensor]) -> list[Job]:
    return one_by_one(infos_of(tensors), lambda info: tensor_bytes(tensors[info.name]))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writer")


@given(description=STATES)
def test_any_mix_of_tensors_round_trips_through_us_and_the_library(
    scratch: Path, description: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    tensors, path = tensors_of(description), scratch / "x.safetensors"

    def content(info: TensorInfo) -> memoryview:
        return tensor_bytes(tensors[info.name])

    size = write_safetensors(path, infos_of(tensors), content, Provenance({}).to_metadata)
    assert size == path.stat().st_size
    theirs = safetensors.torch.load_file(path)
    ours = read_safetensors_header(path).tensors
    assert theirs.keys() == ours.keys() == tensors.keys()
    _, reader = open_reader(path)
    upstream = {name: unwrapped(name)[0] for name in tensors}
    for name, value in tensors.items():
        assert theirs[name].dtype == value.dtype
        assert theirs[name].shape == value.shape
        assert bytes(tensor_bytes(theirs[name])) == bytes(tensor_bytes(value))
        assert ours[name].start % DTYPE_BYTES[ours[name].info.dtype] == 0, "misaligned"
        read = reader.tensor(upstream[name])
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert bytes(tensor_bytes(read)) == bytes(tensor_bytes(value))


@given(infos=st.lists(st.builds(TensorInfo, st.text(), st.sampled_from(sorted(DTYPE_BYTES)), SHAPES)))
def test_aligned_order_aligns_and_loses_nothing(infos: list[TensorInfo]) -> None:
    ordered = aligned_order(infos)
    assert sorted(ordered, key=repr) == sorted(infos, key=repr)
    position = 0
    for info in ordered:
        assert position % DTYPE_BYTES[info.dtype] == 0
        position += info.nbytes
    whole = [info for info in infos if info.nbytes % 8 == 0]
    assert ordered[: len(whole)] == whole


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 100))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    infos = [TensorInfo(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(infos, limit)
    assert [info for shard in shards for info in shard.tensors] == infos
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        size = sum(info.nbytes for info in shard.tensors)
        assert size <= limit or len(shard.tensors) == 1
        assert following is None or size + following.tensors[0].nbytes > limit, "could have held one more"
    if len(shards) > 1:
        pattern = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
        assert [s.name for s in shards] == [pattern.format(i + 1, len(shards)) for i in range(len(shards))]
    else:
        assert shards[0].name == "diffusion_pytorch_model.safetensors"


HISTORIES = st.lists(st.builds(Step, st.text(max_size=5), st.text(max_size=5), st.text(max_size=5)), max_size=3)


@given(description=STATES, history=HISTORIES, shard_bytes=st.sampled_from([20, 200, 10**9]))
def test_predicted_bytes_are_written_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    description: dict[str, tuple[str, tuple[int, ...]]],
    history: list[Step],
    shard_bytes: int,
) -> None:
    tensors, root = tensors_of(description), tmp_path_factory.mktemp("predicted")
    provenance = Provenance({"depth": 2, "ünïcode": "é"}, tuple(history), Card("pixels"))
    for path in (root / "x.safetensors", root / "folder"):
        output = Output(path, shard_bytes=shard_bytes)
        predicted = output.predicted_bytes(infos_of(tensors), provenance)
        written = output.write(infos_of(tensors), jobs_of(tensors), provenance, ())
        on_disk = sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
        assert predicted == written == on_disk


def test_the_same_bytes_every_time(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico(dtype=torch.float16)
    for number in range(2):
        model.save(tmp_path / f"{number}.safetensors")
        model.save(tmp_path / f"{number}", shard_bytes=30_000)
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    names = sorted(p.name for p in (tmp_path / "0").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "1").iterdir())
    assert all((tmp_path / "0" / n).read_bytes() == (tmp_path / "1" / n).read_bytes() for n in names)


def test_no_path_and_no_time_gets_in(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    path = pico().save(tmp_path / "name-of-the-file.safetensors")
    assert b"name-of-the-file" not in path.read_bytes()
    assert str(tmp_path).encode() not in path.read_bytes()


def test_metadata_holds_the_hash_of_each_tensor(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico()
    folder = model.save(tmp_path / "x", shard_bytes=100_000)
    hashes: dict[str, str] = {}
    for shard in folder.glob("*.safetensors"):
        hashes.update(json.loads(read_safetensors_header(shard).metadata["ditmoe"])["tensors"])
    assert hashes == {n: hashlib.sha256(tensor_bytes(t)).hexdigest() for n, t in model.state.items()}


def test_a_sharded_folder_is_what_diffusers_expects(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model = pico()
    folder = model.save(tmp_path / "x", shard_bytes=50_000)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in model.infos())
    assert index["weight_map"].keys() == model.state.keys()
    read = {name: safetensors.torch.load_file(folder / name) for name in set(index["weight_map"].values())}
    assert len(read) > 2
    for name, shard in index["weight_map"].items():
        assert torch.equal(read[shard][name], model.state[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "DiTMoE"
    assert config["hidden_size"] == model.config.hidden_size


def test_content_is_asked_for_once(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model, asked = pico(), []

    def content(info: TensorInfo) -> memoryview:
        asked.append(info.name)
        return tensor_bytes(model.state[info.name])

    Output(tmp_path / "x.safetensors").write(model.infos(), one_by_one(model.infos(), content), Provenance({}), ())
    assert sorted(asked) == sorted(model.state)


def test_content_of_the_wrong_size_leaves_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "x.safetensors", tmp_path / "x"):
        with pytest.raises(DitmoeError, match="a has 3 bytes, planned 8"):
            infos = [TensorInfo("a", "F32", (2,))]
            Output(path).write(infos, one_by_one(infos, lambda _: memoryview(b"abc")), Provenance({}), ())
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_not_overwritten_unasked(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    first, second = pico(), pico(seed=1)
    for path in (tmp_path / "x.safetensors", tmp_path / "x"):
        first.save(path)
        with pytest.raises(OutputExistsError, match="force"):
            second.save(path)
        assert torch.equal(open_reader(path)[1].tensor("pos_embed"), first.state["pos_embed"])
        second.save(path, force=True)
        name = "x_embedder.proj.weight"
        assert torch.equal(open_reader(path)[1].tensor(name), second.state[name])
    assert len(list(tmp_path.iterdir())) == 2


def test_fewer_shards_replace_more(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    model, path = pico(), tmp_path / "x"
    model.save(path, shard_bytes=20_000)
    model.save(path, force=True)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
