"""Inputs that are damaged on purpose, and what becomes of them: refused in one line, or read where nothing was hurt.

A corpus writes a damaged input from a seed and reads all of it. `Tally` counts the outcomes; everything but a
`BadInputError` of one line is a failure that names corpus and seed: another exception, more memory than the process may
take (`limited_memory`), or more time than `LONGEST` seconds.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import resource
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import torch
from conftest import Pico, make_pico

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Card, Provenance, Step
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.checkpoint import open_checkpoint

LONGEST = 5.0  # seconds
_ROOM = 2**28  # bytes of memory beyond those of the process before: all damaged files are smaller than a megabyte

# what stands in JSON in place of values: sizes without end, other types, texts that no name has, and no JSON at all
_VALUES: tuple[str, ...] = (
    *("null", "true", "false", "0", "-1", "1", "2", "7", "1.5", "-0.0", "1e3", "1e400", "-1e400", "NaN", "Infinity"),
    *("4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" * 400, "1" * 5000),
    *("1000000000", "-9223372036854775808", "[]", "{}", "[[]]", '""', '"F32"', '"I32"', '"U8"', '"F8_E4M3"', '"X"'),
    *('"\\u0000"', '"\\ud800"', '"\\u001b[2J"', '"../x"', '"/etc/passwd"', '"a\\nb"', '"é"', '"e\\u0301"', '"%s"'),
    *("[0,0]", "[0,8]", "[1000000000000]", "[1000000000000,1000000000000]", "[0,1000000000000]", "[-1,-1]", "[1e9]"),
    *("[" + ",".join(["9" * 300] * 40) + "]", "[" * 2000 + "]" * 2000, '{"a":' * 300 + "1" + "}" * 300, "[1,2"),
    *(
        '{"a":1,"a":2}',
        '"' + "x" * 10_000 + '"',
        "[true,true]",
        '["0","8"]',
        "[1.0,2.0]",
        '{"schema":"x"}',
        "\\",
        "\x00",
    ),
)
_EDGES = (0, 1, 2, 3, 5, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_NAMES = (
    *("blocks.0.moe.gate.weight", "blocks.999999999.attn.qkv.weight", "blocks." + "9" * 5000 + ".x", "blocks.-1.x"),
    *("blocks.0.moe.experts.99999.gate_proj.weight", "blocks.0.moe.experts.1e9.x", "blocks.٣.attn.qkv.weight", "", "."),
    *("blocks.0.moe.experts." + "1" * 5000 + ".x", "__metadata__", "x.weight_packed", "x.weight_shape", "x.SCB"),
    *("a.quant_state.bitsandbytes__nf4", "a.absmax", "a.pieces.0.weight", "a.pieces." + "7" * 5000 + ".weight"),
    *("blocks.0.moe.experts.0.gate_proj.weight.delta_left", "blocks.0.moe.constants", "blocks.0.moe.gate.expert_of"),
    *("module.module.module", "\x00", "\x1b[2J", "../x", "x" * 10_000, "pos_embed.", ".pos_embed", "ema.pos_embed"),
)


# ------------------------------------------------------------------ what is damaged


def small_model() -> Pico:
    """A DiT-MoE of some 25 tensors and 4,000 weights."""
    return make_pico(hidden=8, depth=1, experts=2, widths=((16, 16),), shared_width=16, num_classes=2, input_size=4)


def packed_model() -> Pico:
    """A DiT-MoE whose weights are stored in all kinds of ways, with a router's map and constants."""
    extras = {"constants": 1, "rank": 2, "residual_constant": True, "residual_linear": True}
    pico = make_pico(depth=1, widths=((64,) * 5,), shared_width=64, expert_of=((0, 1, 2, 3, 4, -1, -2),), extras=extras)
    expert = "blocks.0.moe.experts.{}.{}_proj.weight"
    formats = {
        expert.format(0, "gate"): "nf4",
        expert.format(0, "up"): "nf4-dq",
        expert.format(0, "down"): "int8",
        expert.format(1, "gate"): "int4-g32",
        expert.format(1, "up"): "int3-g32-sym",
        expert.format(1, "down"): "ternary-g32",
        expert.format(2, "gate"): "rows:int4-g32*32+int2-g32*32",
        expert.format(2, "up"): "rows:ternary-g32*16+int3-g32*48",
        expert.format(2, "down"): "columns:int4-g32*32+int2-g32*32",
    }
    state = dict(pico.state)
    for name, fmt in formats.items():
        weight = state.pop(name)
        state |= pack(weight, TensorInfo(name, "F32", tuple(weight.shape)), fmt)
    for matrix in ("gate", "up", "down"):
        base = state[expert.format(3, matrix)]
        state[f"blocks.0.moe.base.{matrix}_proj.weight"] = base
        rows, columns = state.pop(expert.format(3, matrix)).shape
        state[f"{expert.format(3, matrix)}.delta_left"] = torch.ones(rows, 2)
        state[f"{expert.format(3, matrix)}.delta_right"] = torch.ones(2, columns)
        del state[expert.format(4, matrix)]
        state[f"{expert.format(4, matrix)}.delta_ternary"] = torch.full(
            (-(-rows * columns // 5),), 121, dtype=torch.uint8
        )
        state[f"{expert.format(4, matrix)}.delta_scale"] = torch.tensor(0.5)
    return Pico(pico.config, state)


def a_provenance(pico: Pico) -> Provenance:
    """A history with everything that one may hold."""
    step = Step(
        "prune",
        "a" * 64,
        "b" * 64,
        {"keep": 0.5, "method": "x"},
        {"refit_error": ["1.234e-05"]},
        experts=("0-11",),
        request="c" * 64,
        calibration={"images": 64, "steps": 20, "cfg": 1.5, "bins": 2, "classes": [0, 1], "solver": "euler"},
    )
    return Provenance(pico.config.to_json(), (step,), Card(extractor="pixels"))


@dataclass(frozen=True)
class Safetensors:
    """A safetensors file in parts: the entries of its header, and its bytes behind that."""

    header: Mapping[str, Any]
    data: bytes

    @staticmethod
    def of(content: bytes) -> Safetensors:
        length = int.from_bytes(content[:8], "little")
        return Safetensors(json.loads(content[8 : 8 + length]), content[8 + length :])

    def without(self, name: str) -> Safetensors:
        """The file without a tensor, laid out anew."""
        header, data = {}, b""
        for other, entry in self.header.items():
            if other == name:
                continue
            if other != "__metadata__":
                begin, end = entry["data_offsets"]
                data += self.data[begin:end]
                entry = {**entry, "data_offsets": [len(data) - (end - begin), len(data)]}
            header[other] = entry
        return Safetensors(header, data)

    def bytes(self) -> bytes:
        return framed(json.dumps(self.header).encode(), self.data)


def framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


# ------------------------------------------------------------------ damage to bytes and to JSON


def hurt_bytes(random: Random, content: bytes) -> bytes:
    """Bytes of which some are others, missing, twice, or numbers without end."""
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        at = random.randrange(len(damaged) + 1)
        match random.randrange(7):
            case 0:
                damaged[at : at + 1] = bytes([random.randrange(256)])
            case 1 if damaged:
                damaged[min(at, len(damaged) - 1)] ^= 1 << random.randrange(8)
            case 2:
                del damaged[at : at + random.choice((1, 4, 100))]
            case 3:
                damaged[at:at] = random.randbytes(random.choice((1, 8, 100)))
            case 4:
                damaged[at:at] = damaged[at : at + random.choice((8, 100, 1000))]
            case 5:
                damaged[at : at + 8] = random.choice(_EDGES).to_bytes(8, "little")
            case _:
                del damaged[at:]
    return bytes(damaged)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers of a JSON value, each with every key or index that it has."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield value, key
        yield from _places(item)


def hurt_json(random: Random, value: Any, most: int = 3) -> str:
    """The text of a JSON value in which something else stands in some places, twice, or not at all."""
    value = json.loads(json.dumps(value))
    raw: list[str] = []
    for _ in range(random.randrange(1, most + 1)):
        places = list(_places(value))
        if not places:
            break
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1 | 2:
                raw.append(random.choice(_VALUES))
                holder[key] = f"@{len(raw) - 1}@"
            case 3:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[random.choice(_NAMES)] = holder.pop(key)
            case _:
                other, at = random.choice(places)
                holder[key] = (
                    json.loads(json.dumps(other[at]))
                    if at in other or (isinstance(other, list) and at < len(other))
                    else 0
                )
    text = json.dumps(value)
    for number, part in enumerate(raw):
        text = text.replace(f'"@{number}@"', part)
    if random.random() < 0.1:  # a key twice
        text = text.replace("{", '{"schema":1,"schema":2,', 1)
    return text


# ------------------------------------------------------------------ safetensors


def hurt_safetensors(random: Random, file: Safetensors) -> bytes:
    """A safetensors file that is damaged in its header, its metadata, its bytes, or by a tensor less."""
    names = [name for name in file.header if name != "__metadata__"]
    match random.randrange(8):
        case 0:
            return hurt_bytes(random, file.bytes())
        case 1:
            header = json.dumps(file.header).encode()
            return framed(hurt_bytes(random, header), file.data)
        case 2:
            return framed(hurt_json(random, file.header).encode(errors="surrogatepass"), file.data)
        case 3:
            name = random.choice(names)
            entry = hurt_json(random, file.header[name], 1)
            text = json.dumps({**file.header, name: "@entry@"}).replace('"@entry@"', entry)
            return framed(text.encode(errors="surrogatepass"), file.data)
        case 4:
            document = json.loads(file.header["__metadata__"]["ditmoe"])
            metadata = {**file.header["__metadata__"], "ditmoe": hurt_json(random, document)}
            return framed(json.dumps({**file.header, "__metadata__": metadata}).encode(), file.data)
        case 5:
            for _ in range(random.choice((1, 1, 2, 5))):
                file = file.without(random.choice(names))
            bare = {key: value for key, value in file.header.items() if key != "__metadata__"}
            return Safetensors(bare if random.random() < 0.7 else file.header, file.data).bytes()
        case 6:
            name = random.choice(names)
            begin, end = file.header[name]["data_offsets"]
            part = file.data[begin:end]
            part = (hurt_bytes(random, part) + bytes(len(part)))[: len(part)]
            return Safetensors(file.header, file.data[:begin] + part + file.data[end:]).bytes()
        case _:
            a, b = random.choice(names), random.choice((*names, *_NAMES))
            header = {b if name == a else a if name == b else name: entry for name, entry in file.header.items()}
            return Safetensors(header, file.data).bytes()


def hurt_state(random: Random, file: Safetensors) -> bytes:
    """A file in which the JSON or the numbers that describe a packed weight are damaged, and all else fits."""
    name = random.choice(
        [name for name in file.header if "quant_state" in name or name.endswith(("_shape", "expert_of"))]
    )
    begin, end = file.header[name]["data_offsets"]
    if "quant_state" in name:
        part = hurt_json(random, json.loads(file.data[begin:end]), 2).encode(errors="surrogatepass")
        part = part.ljust(end - begin) if random.random() < 0.8 else part
    else:
        part = struct.pack(
            f"<{(end - begin) // 4}i",
            *(random.choice((-(2**31), -2, -1, 0, 1, 8, 32, 64, 2**31 - 1)) for _ in range((end - begin) // 4)),
        )
    header, moved = {}, len(part) - (end - begin)
    for other, entry in file.header.items():
        if other == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if other == name:
            entry = {
                **entry,
                "data_offsets": [first, last + moved],
                "shape": [last - first + moved] if entry["dtype"] == "U8" else entry["shape"],
            }
        elif first >= end:
            entry = {**entry, "data_offsets": [first + moved, last + moved]}
        header[other] = entry
    return Safetensors(header, file.data[:begin] + part + file.data[end:]).bytes()


def read_checkpoint(path: Path) -> None:
    """Open a checkpoint and read all of it."""
    checkpoint = open_checkpoint(path, num_heads=2)
    for weight in checkpoint.weights.values():
        weight.unpack({name: checkpoint.reader.tensor(name) for name in weight.members})
    for name in checkpoint.header.tensors:
        checkpoint.reader.raw(name).tobytes()


def read_tensors(path: Path) -> None:
    """Read all tensors of a checkpoint, whatever they are."""
    header, reader = open_reader(path)
    for name in header.tensors:
        reader.tensor(name)
        reader.raw(name).tobytes()


# ------------------------------------------------------------------ pickles

_GLOBALS = (
    *(b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"cbuiltins\nbytearray\n"),
    *(b"ctorch.hub\nload\n", b"cnumpy\nload\n", b"ctorch\nload\n", b"cbuiltins\ngetattr\n", b"csubprocess\nPopen\n"),
    *(
        b"ctorch\nFloatTensor\n",
        b"ctorch.storage\nUntypedStorage\n",
        b"ctorch.storage\nTypedStorage\n",
        b"cnumpy\nndarray\n",
    ),
    *(
        b"ctorch\nFloatStorage\n",
        b"cnumpy\ndtype\n",
        b"cnumpy._core.multiarray\n_reconstruct\n",
        b"ccollections\nCounter\n",
    ),
    *(
        b"cbuiltins\nset\n",
        b"ctorch\nSize\n",
        b"ctorch._utils\n_rebuild_tensor\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n",
    ),
    *(
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
        b"ctorch._utils\n_rebuild_qtensor\n",
        b"cargparse\nNamespace\n",
    ),
    *(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.nn.parameter\nParameter\n", b"ctorch\nnope\n", b"c\n\n"),
    *(b"ctorch._utils\n_rebuild_nested_tensor\n", b"ctorch\nfloat64\n", b"ctorch\nDoubleStorage\n", b"ctorch\nint1\n"),
)
_SNIPPETS = (
    *(
        b"N",
        b"\x88",
        b"}",
        b"]",
        b")",
        b"\x8f",
        b"K\x00",
        b"K\xff",
        b"M\xff\xff",
        b"J\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
    ),
    *(
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\x7f" * 255,
        b"G\x7f\xf0" + bytes(6),
        b"G\x7f\xf8" + bytes(6),
    ),
    *(
        b"X\x03\x00\x00\x00ema",
        b"X\x00\x00\x00\x00",
        b"X\xff\xff\xff\xffa",
        b"U\x03abc",
        b"X\x03\x00\x00\x00\xed\xa0\x80",
    ),
    *(
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"0",
        b"R",
        b"\x81",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b"Q",
        b"q\x00",
        b"h\x00",
    ),
    *(b"h\x07", b"2", b".", b"l", b"d", b"I1\n", b"S'x'\n", b"\x95" + bytes(8), b"\x94", b"\x93", b"\x8c\x01a", b"i"),
)


@dataclass(frozen=True)
class Pickled:
    """A state dict as torch saves it: the operations of its pickle, and its storages by key."""

    operations: Sequence[bytes]
    storages: Mapping[str, bytes]
    legacy: bytes = b""

    @staticmethod
    def of(document: object, folder: Path) -> Pickled:
        path = folder / "whole.pt"
        torch.save(document, path)
        with zipfile.ZipFile(path) as archive:
            data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
            storages = {name.rpartition("/")[2]: archive.read(name) for name in archive.namelist() if "/data/" in name}
        starts = [at for _, _, at in pickletools.genops(data)]
        operations = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
        buffer = io.BytesIO()
        torch.save(document, buffer, _use_new_zipfile_serialization=False)
        return Pickled(operations, storages, buffer.getvalue())


def hurt_operations(random: Random, operations: Sequence[bytes]) -> bytes:
    """A pickle some of whose operations are others, missing, twice, or take other numbers."""
    damaged = list(operations)
    numbers = [i for i, op in enumerate(damaged) if op[:1] in (b"K", b"M", b"J")]
    names = [i for i, op in enumerate(damaged) if op[:1] == b"c"]
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(1, len(damaged))
        match random.randrange(8):
            case 0 | 1:
                damaged[random.choice(numbers) if numbers else at] = b"\x8a\x09" + random.choice(
                    (*_EDGES, 2**40, 2**62, 2**63, 10**12)
                ).to_bytes(9, "little")
            case 2:
                damaged[random.choice(names) if names else at] = random.choice(_GLOBALS)
            case 3:
                damaged[at] = random.choice(_SNIPPETS)
            case 4:
                damaged[at:at] = [random.choice((*_SNIPPETS, *_GLOBALS)) for _ in range(random.choice((1, 2, 3)))]
            case 5:
                del damaged[at : at + random.choice((1, 2, 10))]
            case 6:
                damaged[at:at] = damaged[at : at + random.choice((2, 20, 200))]
            case _:
                damaged[at] = hurt_bytes(random, damaged[at])
        numbers = [i for i in numbers if i < len(damaged)]
        names = [i for i in names if i < len(damaged)]
        if len(damaged) < 2:
            break
    return b"".join(damaged)


def hurt_pickle(random: Random, whole: Pickled) -> bytes:
    """A damaged file of torch's: an archive, or a pickle of before torch 1.6."""
    kind = random.randrange(10)
    if kind == 0:
        return hurt_bytes(random, whole.legacy)
    data = b"".join(whole.operations) if kind == 1 else hurt_operations(random, whole.operations)
    if kind == 2:  # a legacy file around the damaged pickle
        pickles = (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        )
        return pickles + data + pickle.dumps(list(whole.storages), 2) + b"".join(whole.storages.values())
    buffer = io.BytesIO()
    compression = (
        random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)) if random.random() < 0.05 else zipfile.ZIP_STORED
    )
    root = random.choice(("x", "../x", "X", "x/y", "")) if random.random() < 0.05 else "x"
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr("x/byteorder", random.choice((b"little", b"big", b"\xff")) if kind == 3 else b"little")
        if kind == 4:
            archive.writestr(
                random.choice(("x/DATA.PKL", "x/data.pkl ", "x/constants.pkl", "../../x", "x/code/a")), data
            )
        for key, storage in whole.storages.items():
            if kind == 5 and random.random() < 0.2:
                storage = hurt_bytes(random, storage)
            archive.writestr(f"x/data/{key}", storage)
        archive.writestr("x/version", b"3\n")
        if kind == 6:
            archive.comment = random.randbytes(30)
    return hurt_bytes(random, buffer.getvalue()) if kind in (1, 7) else buffer.getvalue()


# ------------------------------------------------------------------ folders


def hurt_index(random: Random, index: Mapping[str, Any]) -> str:
    """The text of an index that names other files, or is damaged."""
    if random.random() < 0.5:
        return hurt_json(random, index)
    names = dict(index["weight_map"])
    for name in random.sample(list(names), random.choice((1, 2, len(names)))):
        names[name] = random.choice(
            (
                "../a.safetensors",
                "/etc/passwd",
                "",
                ".",
                "..",
                "a\x00b",
                "x" * 300,
                "loop",
                "folder",
                "pipe",
                "zero",
                "other.safetensors",
                "index.json",
                "\ud800",
            )
        )
    return json.dumps({**index, "weight_map": names})


# ------------------------------------------------------------------ outcomes


@dataclass(frozen=True)
class Corpus:
    """Damaged inputs of one kind.

    Attributes:
        name: of the kind.
        write: writes a damaged input that a seed gives, and returns its path.
        read: reads all of an input.
    """

    name: str
    write: Callable[[Random], Path]
    read: Callable[[Path], object]


@dataclass
class Tally:
    """How many inputs of each corpus were refused and read."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def run(self, corpus: Corpus, seeds: Sequence[int]) -> None:
        """Damage an input for each seed, and read it. Raises `AssertionError` for any outcome but the two."""
        counts = self.counts.setdefault(corpus.name, Counter())
        for seed in seeds:
            path = corpus.write(Random(f"{corpus.name} {seed}"))
            try:
                with watched():
                    corpus.read(path)
                counts["read"] += 1
            except BadInputError as error:
                assert "\n" not in str(error), f"{corpus.name} {seed}: {error}"
                assert "allocate" not in str(error) and "emory" not in str(error), f"{corpus.name} {seed}: {error}"
                counts["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{corpus.name} {seed}: {type(error).__name__}: {str(error)[:300]}") from error

    @property
    def total(self) -> int:
        return sum(map(Counter.total, self.counts.values()))

    def __str__(self) -> str:
        return "\n".join(
            f"| {name} | {each.total():,} | {each['refused']:,} | {each['read']:,} |"
            for name, each in self.counts.items()
        )


class TooLongError(BaseException):
    """Reading takes longer than `LONGEST`."""


@contextmanager
def watched() -> Iterator[None]:
    """End what lasts longer than `LONGEST` seconds of this process's own time, whatever others do meanwhile."""

    def end(*_: object) -> NoReturn:
        raise TooLongError

    old = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


@contextmanager
def limited_memory(room: int = _ROOM) -> Iterator[None]:
    """Let this process take at most `room` bytes more memory than it has: everything else raises."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))
