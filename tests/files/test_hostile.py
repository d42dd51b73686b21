"""Files made to break their readers: refused by name, without the memory, the time or the code that they ask for."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Pico, make_pico
from mutating import framed, limited_memory, small_model, watched
from PIL import Image
from safetensors.torch import save_file

from ditmoe_cli.compression.plan import read_plan
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features.statistics_files import read_statistics
from ditmoe_cli.evaluation.images import read_images
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.routing.profile import read_profile

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
GIGABYTES = 10**11
MIB = 2**20


def refused(read: Callable[[Path], object], path: Path, match: str, room: int = 64 * MIB) -> None:
    """Check that a path is refused in one line that says `match`, within 5 s and `room` bytes."""
    with watched(), limited_memory(room), pytest.raises(BadInputError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have everything imported that a first read imports, so that the rooms are those of the files."""
    folder = tmp_path_factory.mktemp("imported")
    model = small_model()
    for path in (model.save(folder / "a.safetensors"), model.save_pt(folder / "a.pt")):
        open_checkpoint(path, num_heads=2).reader.tensor("pos_embed")


# ------------------------------------------------------------------ pickles


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel: int, kind: str = "FloatStorage", legacy: bool = False) -> bytes:
    named = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(numel)
    return named + (b"Nt" if legacy else b"t") + b"Q"


def tensor(stored: bytes, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + number(offset) + numbers(*shape) + numbers(*stride)
    return call + b"\x89ccollections\nOrderedDict\n)RtR"


def state(*values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(f"a{i}") + value for i, value in enumerate(values)) + b"u."


def archive(path: Path, data: bytes, floats: int = 4, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("x/data.pkl", data)
        file.writestr("x/byteorder", b"little")
        file.writestr("x/data/0", bytes(4 * floats))
        file.writestr("x/version", b"3\n")
    return path


def laughs(depth: int, pair: bytes, start: bytes) -> bytes:
    """Values that hold the one before twice, `depth` deep: 2^depth when walked."""
    return b"(" + start + b"q\x00" + (pair + b"q\x00") * depth + b"t"


PICKLES = {
    "a shape that repeats one element": (tensor(storage(4), (10**12,), (0,)), "repeats the 4 elements"),
    "a shape beyond its storage": (tensor(storage(4), (GIGABYTES,), (1,)), "reaches beyond the 4"),
    "an offset beyond its storage": (tensor(storage(4), (4,), (1,), 2**62), "reaches beyond"),
    "a negative shape": (tensor(storage(4), (-1,), (1,)), "shape is none"),
    "a negative stride": (tensor(storage(4), (4,), (-1,)), "shape is none"),
    "a negative offset": (tensor(storage(4), (4,), (1,), -1), "shape is none"),
    "fewer strides than sizes": (tensor(storage(4), (2, 2), (1,)), "shape is none"),
    "a storage larger than its entry": (tensor(storage(GIGABYTES), (4,), (1,)), "other than 400000000000 bytes"),
    "a storage of a negative size": (tensor(storage(-4), (4,), (1,)), "no checkpoint pickle"),
    "a bytearray of any size": (b"cbuiltins\nbytearray\n" + numbers(GIGABYTES) + b"R", "holds bytearray, which is not"),
    "a tensor of any size": (b"ctorch\nFloatTensor\n" + numbers(GIGABYTES) + b"R", r"holds torch\.FloatTensor"),
    "a new tensor of any size": (b"ctorch\nFloatTensor\n" + numbers(GIGABYTES) + b"\x81", r"holds torch\.FloatTensor"),
    "a bare storage": (b"ctorch.storage\nUntypedStorage\n" + numbers(GIGABYTES) + b"R", r"UntypedStorage, which"),
    "an array of any size": (
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + numbers(GIGABYTES) + text("b") + b"tR",
        "a size before its values",
    ),
    "a new array of any size": (b"cnumpy\nndarray\n" + numbers(GIGABYTES) + b"\x81", r"holds numpy\.ndarray"),
    "numpy's own dtype altered": (
        b"cnumpy\ndtype\n"
        + text("f8")
        + b"\x85R(K\x03"
        + text("<")
        + b"NNN"
        + number(-1)
        + number(-1)
        + number(63)
        + b"tb",
        "other values than numbers",
    ),
    "an array of objects": (b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR", "other values than numbers"),
    "tuples of tuples": (laughs(40, b"h\x00h\x00\x86", b")"), "over and over"),
    "mappings of mappings": (laughs(40, b"}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00u", b"}"), "over and over"),
    "lists of lists": (laughs(40, b"](h\x00h\x00e", b"]"), "over and over"),
    "a tuple of tuples as a key, over and over": (
        b"}(" + laughs(14, b"h\x00h\x00\x86", b")") + b"q\x01N" + b"h\x01N" * 20 + b"u",
        "over and over",
    ),
    "a mapping in itself": (b"}q\x00(X\x01\x00\x00\x00ah\x00u", "holds itself"),
    "a list in itself": (b"]q\x00h\x00a", "holds itself"),
    "a list in a mapping in it": (b"]q\x00}(X\x01\x00\x00\x00ah\x00ua", "holds itself"),
    "tuples without end": (b")" + b"\x85" * 100_000, "nested too deep"),
    "lists without end": (b"]" * 100_000 + b"a" * 99_999, "nested too deep"),
    "keys of one hash": (
        b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 50_000)) + b"u",
        "no names",
    ),
    "something that runs": (b"cos\nsystem\n" + text("touch /tmp/canary") + b"\x85R", r"holds os\.system, which is not"),
    "something that imports": (b"cnumpy.f2py\ncompile\n" + text("x") + b"\x85R", r"holds numpy\.f2py\.compile"),
    "something that is loaded": (b"ctorch.hub\nload\n" + text("x") + b"\x85R", r"holds torch\.hub\.load"),
    "something under a tensor's type": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\neval\nctorch\nTensor\n" + text("1") + b"\x85NtR",
        "holds eval, which is not weights",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_asks_for_the_world(tmp_path: Path, case: str) -> None:
    data, match = PICKLES[case]
    refused(open_reader, archive(tmp_path / "x.pt", state(data)), rf"x\.pt: .*({match})")


@pytest.mark.parametrize("numel", [GIGABYTES, 2**62])
def test_a_pickle_of_before_archives_cannot_ask_for_storages_either(tmp_path: Path, numel: int) -> None:
    data = state(tensor(storage(numel, legacy=True), (4,), (1,)))
    (tmp_path / "x.pt").write_bytes(MAGIC + data + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16))
    refused(open_reader, tmp_path / "x.pt", "larger than the file")
    data = state(tensor(storage(4, legacy=True), (GIGABYTES,), (1,)))
    (tmp_path / "x.pt").write_bytes(MAGIC + data + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16))
    refused(open_reader, tmp_path / "x.pt", "reaches beyond the 4")


def test_methods_that_a_file_sets_on_a_tensor_are_dropped(tmp_path: Path) -> None:
    inner = tensor(storage(4), (4,), (1,)).removesuffix(b"R")
    function, arguments = inner[: inner.index(b"(")], inner[inner.index(b"(") :]
    methods = b"}(" + b"".join(text(name) + b"K\x05" for name in ("numel", "detach", "contiguous", "item")) + b"u"
    made = b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + b"ctorch\nTensor\n" + arguments + methods + b"tR"
    path = archive(tmp_path / "x.pt", b"\x80\x02}(" + text("model") + state(made)[2:-1] + b"u.")
    header, opened = open_reader(path)
    assert list(header.tensors) == ["a0"]
    assert opened.tensor("a0").numel() == 4


def test_names_of_a_pickle_may_share_values(tmp_path: Path) -> None:
    """What real files share, a state dict under two keys and tensors of one storage, is no reason to refuse them."""
    flat = torch.arange(40.0)
    whole = {f"a.{i}": flat[i : i + 1] for i in range(40)}
    torch.save({"ema": whole, "model": whole, "again": [whole, whole]}, tmp_path / "x.pt")
    header, reader = open_reader(tmp_path / "x.pt")
    assert [reader.tensor(name).item() for name in header.tensors] == list(range(40))


@pytest.mark.parametrize("where", ["data.pkl", "data/0"])
def test_an_archive_of_torchs_that_expands_is_refused(tmp_path: Path, where: str) -> None:
    data = state(*[tensor(storage(4), (4,), (1,))], text("x") if where != "data.pkl" else text("x" * 10**7))
    path = archive(tmp_path / "x.pt", data, 4 if where == "data.pkl" else 10**7, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2 * MIB
    refused(open_reader, path, r"x/data\.pkl' is compressed or encrypted")


def test_an_archive_that_two_programs_would_read_differently_is_refused(tmp_path: Path) -> None:
    data = state(tensor(storage(4), (4,), (1,)))
    for name in ("x/data.pkl", "x/DATA.PKL"):
        path = archive(tmp_path / "x.pt", data)
        with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning) if name == "x/data.pkl" else watched():
            file.writestr(name, state(b"cos\nsystem\n" + text("true") + b"\x85R"))
        refused(open_reader, path, "no archive that torch wrote")
    path = archive(tmp_path / "x.pt", data)
    path.write_bytes(path.read_bytes()[:-2] + b"\x04\x00abcd")
    refused(open_reader, path, "no archive that torch wrote")
    assert open_reader(archive(tmp_path / "x.pt", b"\x80\x02}(" + text("model") + data[2:-1] + b"u."))[0].tensors


def test_other_archives_are_told_from_torchs(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(open_reader, tmp_path / "script.pt", "TorchScript")
    with tarfile.open(tmp_path / "tar.pt", "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    refused(open_reader, tmp_path / "tar.pt", "tar archive")
    with zipfile.ZipFile(tmp_path / "up.pt", "w") as outside:
        outside.writestr("../../data.pkl", state())
    refused(open_reader, tmp_path / "up.pt", "up.pt")
    assert not (tmp_path.parent.parent / "data.pkl").exists()


# ------------------------------------------------------------------ safetensors and JSON


def entry(shape: object, end: object, dtype: str = "F32", begin: object = 0) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "more digits than python reads": (
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        "a",
    ),
    "sizes whose product takes minutes": (
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 299] * 100_000) + b'],"data_offsets":[0,8]}}',
        "shape",
    ),
    "empty, and of any size": (json.dumps({"a": entry([0, 2**63], 0), "b": entry([2], 8)}).encode(), "shape"),
    "empty, and of overflowing sizes": (json.dumps({"a": entry([0, 2**40, 2**40], 0)}).encode(), "shape"),
    "more dimensions than arrays have": (
        json.dumps({"a": entry([1] * 33, 4), "b": entry([1], 8, begin=4)}).encode(),
        "sha",
    ),
    "offsets of truth values": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', "no numbers"),
    "an entry twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry([2], 8)).encode(),) * 2), "'a' stands twice"),
    "a key of an entry twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "twice"),
    "two tensors in one place": (json.dumps({"a": entry([2], 8), "b": entry([2], 8)}).encode(), "overlaps"),
    "half a character": (b'{"\\ud800":%b}' % json.dumps(entry([2], 8)).encode(), "not JSON"),
    "half a character in bytes": (b'{"\xed\xa0\x80":%b}' % json.dumps(entry([2], 8)).encode(), "not JSON"),
    "nested without end": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "nested deep": (b'{"__metadata__":' + b"[" * 900 + b"]" * 900 + b"}", "nested too deep"),
    "an infinite number": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', "out of range"),
    "no number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN is no JSON"),
    "millions of values": (b"[" + b"[]," * 3_000_000 + b"[]]", "values"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_asks_for_the_world(tmp_path: Path, case: str) -> None:
    header, match = HEADERS[case]
    (tmp_path / "x.safetensors").write_bytes(framed(header, bytes(8)))
    refused(open_reader, tmp_path / "x.safetensors", rf"x\.safetensors: .*{match}", 2**28)


def test_a_header_takes_no_more_memory_than_some_times_its_bytes(tmp_path: Path) -> None:
    """Empty lists are what takes most memory for its text: 3 bytes become 64."""
    header = b'{"__metadata__":{"a":"b"},"a":[' + b"[]," * 150_000 + b"[]]}"
    (tmp_path / "x.safetensors").write_bytes(framed(header, b""))
    tracemalloc.start()
    try:
        with pytest.raises(BadInputError, match="malformed"):
            open_reader(tmp_path / "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


LONG = ("blocks.999999999.attn.qkv.weight", f"blocks.{'9' * 5000}.x", f"blocks.0.moe.experts.{'1' * 5000}.x")


@pytest.mark.parametrize("name", LONG, ids=["block", "digits", "expert"])
def test_a_name_that_counts_blocks_without_end(tmp_path: Path, name: str) -> None:
    model = small_model().with_state(**{name.replace(".", "__"): torch.zeros(2)})
    refused(open_checkpoint, model.save(tmp_path / "x.safetensors"), r"x\.safetensors: tensor")


def test_what_a_file_says_of_a_model_takes_no_memory(tmp_path: Path) -> None:
    model = small_model().with_state(pos_embed=None)
    (tmp_path / "x").mkdir()
    save_file(dict(model.state), tmp_path / "x" / "diffusion_pytorch_model.safetensors")
    config = {"input_size": 10**9, "depth": 10**9, "num_experts": 10**9, "num_heads": 2}
    for document in (config, {**config, "class_dropout_prob": 10**290, "nested": {"top_k": [1] * 1000}}):
        (tmp_path / "x" / "config.json").write_text(json.dumps(document))
        with watched(), limited_memory(64 * MIB):
            opened = open_checkpoint(tmp_path / "x")
        assert (opened.config.input_size, opened.config.depth) == (32, 1)  # and not what the file says


def test_a_plan_that_does_not_end(tmp_path: Path) -> None:
    refused(read_plan, Path("/dev/zero"), "no file")
    os.mkfifo(tmp_path / "pipe")
    refused(read_plan, tmp_path / "pipe", "not a plan")
    (tmp_path / "deep").write_text('{"schema":"ditmoe.plan/1","blocks":' + "[" * 500 + "]" * 500 + "}")
    refused(read_plan, tmp_path / "deep", "nested too deep")
    with (tmp_path / "long").open("wb") as file:
        file.truncate(200_000_000)
    refused(read_plan, tmp_path / "long", "longer than 100000000 bytes", 2**29)


# ------------------------------------------------------------------ folders


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_pico(depth=1, hidden=16).save(tmp_path / "x", shard_bytes=20_000)
    return tmp_path / "x"


def renamed(folder: Path, name: str) -> Path:
    index = next(folder.glob("*.index.json"))
    document = json.loads(index.read_text())
    document["weight_map"] = dict.fromkeys(document["weight_map"], name)
    index.write_text(json.dumps(document))
    return index


ELSEWHERE = ("../secret.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "a\nb", "x" * 300, "a/b")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_names_files_beside_it(shards: Path, name: str) -> None:
    (shards.parent / "secret.safetensors").write_bytes(next(shards.glob("*.safetensors")).read_bytes())
    index = renamed(shards, name)
    for path in (shards, index):
        refused(open_reader, path, "weight_map must name files beside the index")


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "nowhere"])
def test_a_shard_is_a_file(shards: Path, kind: str) -> None:
    place = shards / "odd.safetensors"
    {
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
        "loop": lambda: place.symlink_to(place.name),
        "device": lambda: place.symlink_to("/dev/zero"),
        "nowhere": lambda: place.symlink_to("nowhere"),
    }[kind]()
    refused(open_reader, renamed(shards, place.name), r"shard odd\.safetensors is missing")


@pytest.mark.parametrize("kind", ["pipe", "loop", "/dev/zero", "/dev/null"])
def test_a_checkpoint_is_a_file_or_a_folder(tmp_path: Path, kind: str) -> None:
    path = Path(kind) if kind.startswith("/") else tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "loop":
        path.symlink_to("x")
    refused(open_reader, path, "neither a file nor a folder|no such file")


def test_an_index_without_end(shards: Path) -> None:
    with next(shards.glob("*.index.json")).open("ab") as file:
        file.truncate(200_000_000)
    refused(open_reader, shards, "longer than 100000000 bytes", 2**29)


def test_shards_numbered_without_end(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    pico().save(tmp_path / f"model-00001-of-{'9' * 200}.safetensors")
    refused(open_reader, tmp_path, "number 2, 3, 4, 5, 6 is missing")


@pytest.mark.parametrize("latest", ["../elsewhere", "/etc", "a\0b", "a\nb", "", "..", "x" * 5000, "pipes"])
def test_latest_names_a_folder_beside_it(tmp_path: Path, latest: str) -> None:
    folder = small_model().save_pt(tmp_path / "run", "deepspeed")
    small_model().save_pt(tmp_path / "elsewhere", "deepspeed")
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(latest)
    refused(open_reader, folder, "no folder beside it|no model states")


def test_a_folder_of_links_that_loop(tmp_path: Path) -> None:
    for name in ("transformer", "a", "latest"):
        (tmp_path / name).symlink_to(".")
    (tmp_path / "b").symlink_to("b")
    refused(open_reader, tmp_path, "no checkpoint here")


def test_a_folder_of_thousands_of_files(tmp_path: Path) -> None:
    for number in range(2_000):
        (tmp_path / f"{number}.safetensors").touch()
    refused(open_reader, tmp_path, "holds 2000 checkpoints")


# ------------------------------------------------------------------ arrays and images


def npz(path: Path, said: str, data: bytes, names: tuple[str, ...] = ("mu", "sigma")) -> Path:
    text = said.encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


def described(shape: str, dtype: str = "<f8") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"


def test_an_npz_that_expands_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", described("(50000000,)", "|u1"), bytes(50_000_000))
    assert path.stat().st_size < MIB
    refused(read_statistics, path, "expands to 100,000")
    path = npz(tmp_path / "y.npz", described("(100, 1000, 1000, 1)", "|u1"), bytes(10**8), ("arr_0",))
    refused(read_images, path, "expands to 100,000")
    np.savez_compressed(tmp_path / "z.npz", arr_0=np.zeros((100, 32, 32, 3), np.uint8))  # black images are no trap
    assert len(read_images(tmp_path / "z.npz")) == 100


@pytest.mark.parametrize("shape", ["(100000000000,)", "(-1,)", "(2**40,)", "()", "None", "-" * 9000 + "1", "(" * 500])
def test_an_array_has_the_bytes_that_its_shape_says(tmp_path: Path, shape: str) -> None:
    refused(read_statistics, npz(tmp_path / "x.npz", described(shape), bytes(24)), "cannot be read as npz")


def bomb(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(bomb(8000))
    refused(read_images, tmp_path / "x", r"a\.png: has 8000 x 8000 pixels", 2**27)


def test_images_that_expand_together_are_refused(tmp_path: Path) -> None:
    content = bomb(1024)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for number in range(2000):
            file.writestr(f"{number}.png", content)
    refused(read_images, tmp_path / "x.zip", "expands to 2,097,152,000 bytes", 2**27)


def test_a_profile_counts_experts(tmp_path: Path) -> None:
    settings = {"checkpoint": "a", "calibration": {"bins": 1, "cfg": 1}, "experts": [-5, 10**15]}
    document = json.dumps({"schema": "ditmoe.profile/1", **settings})
    header = {"__metadata__": {"ditmoe": document}, "a": entry([2], 8)}
    (tmp_path / "x.safetensors").write_bytes(framed(json.dumps(header).encode(), bytes(8)))
    refused(read_profile, tmp_path / "x.safetensors", "experts are")
