"""The archives that ``torch.save`` writes, laid out and written without torch, a tensor at a time in each thread.

An archive is a zip of entries that are stored, not compressed: ``data.pkl``, a pickle in which each tensor names its
storage by number, ``byteorder``, the storages ``data/0``, ``data/1``, … and ``version``. Data begins at multiples of 64
bytes, as torch pads it, so that ``torch.load`` can map the file. Times are those of no clock, so that equal content
gives equal bytes. Formats: https://docs.pytorch.org/docs/stable/notes/serialization.html (archive), PEP 307 (pickles of
protocol 2), APPNOTE.TXT of PKWARE (zip, and its 64-bit records beyond 4 GB).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.streaming import Count, digested, in_threads, syncing, write_at, write_parts

Plain = str | int | float | bool
Content = Callable[[TensorInfo], Iterable[memoryview]]
"""Return the bytes of a tensor in parts."""
NOTE = "ditmoe.json"
"""An entry that torch passes over: the metadata that safetensors have in their header."""

_STORAGES: Mapping[str, str] = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
}
_FOLDER = "archive/"
_ALIGNMENT = 64
# in zip's fields of 16 and 32 bits: the number stands in a 64-bit record
_ELSEWHERE_16, _ELSEWHERE = 0xFFFF, 0xFFFFFFFF
_SHORT, _LONG = _ELSEWHERE_16, _ELSEWHERE  # numbers from here on do
_PADDING_ID, _ZIP64_ID = 0x4246, 0x0001  # of extra fields: torch's padding, 64-bit sizes
_STORED, _NO_FLAGS, _NO_TIME, _FIRST_DAY = 0, 0, 0, 0x21  # 1 January 1980
_VERSION, _VERSION_64 = 20, 45  # of zip, needed to extract


@dataclass(frozen=True)
class _Entry:
    """A file in the archive: its name, its size, and the tensor or the bytes that it holds; None for the note."""

    name: str
    size: int
    source: TensorInfo | bytes | None


@dataclass(frozen=True)
class SavedStateDict:
    """A state dict under a key, with plain settings beside it; the state dict alone without a key.

    ``torch.load`` returns ``{key: {name: tensor}, **beside}``, or ``{name: tensor}``.

    Attributes:
        tensors: the tensors in order, each with a storage of its own.
        key: the key of the state dict; None for a bare one.
        beside: what stands beside it, by key.
        note_bytes: bytes of the `NOTE`, which is written last; 0 for none.
    """

    tensors: Sequence[TensorInfo]
    key: str | None = None
    beside: Mapping[str, Mapping[str, Plain]] = field(default_factory=dict)
    note_bytes: int = 0

    @cached_property
    def _entries(self) -> list[_Entry]:
        texts = {"data.pkl": self._pickle(), "byteorder": b"little"}
        storages = [_Entry(f"{_FOLDER}data/{i}", info.nbytes, info) for i, info in enumerate(self.tensors)]
        first = [_Entry(_FOLDER + name, len(text), text) for name, text in texts.items()]
        note = [_Entry(_FOLDER + NOTE, self.note_bytes, None)] if self.note_bytes else []
        return [*first, *storages, _Entry(_FOLDER + "version", 2, b"3\n"), *note]

    @property
    def nbytes(self) -> int:
        """The exact bytes of the archive."""
        return self._ends[-1] + len(self._directory([0] * len(self._entries)))

    @cached_property
    def _ends(self) -> list[int]:
        """Where each entry ends, and so the next begins."""
        return list(accumulate(self._entries, lambda at, e: at + len(_local_header(e, 0, at)) + e.size, initial=0))

    def write(self, path: Path, content: Content, note: Callable[[], bytes] = bytes) -> int:
        """Write the archive and return its bytes. Several threads call ``content(info)``, each for its tensor.

        ``note()`` returns the note, when all tensors are written.
        """
        with path.open("wb", buffering=0) as opened, syncing([opened.fileno()], self.nbytes) as wrote:
            file = opened.fileno()
            places = list(zip(self._entries, self._ends[:-1], strict=True))
            known = [place for place in places if place[0].source is not None]
            checksums = in_threads([partial(_put, file, entry, at, content, wrote) for entry, at in known])
            for entry, at in places[len(known) :]:
                checksums.append(_put(file, replace(entry, source=note()), at, content, wrote))
            write_at(file, memoryview(self._directory(checksums)), self._ends[-1])
        return self.nbytes

    def _directory(self, checksums: Sequence[int]) -> bytes:
        """Return what follows the entries: the central directory, and where it stands."""
        rows = zip(self._entries, checksums, self._ends[:-1], strict=True)
        listed = b"".join(_listed(entry, checksum, at) for entry, checksum, at in rows)
        count, size, start = len(self._entries), len(listed), self._ends[-1]
        if count < _SHORT and size < _LONG and start < _LONG:
            return listed + b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, count, count, size, start, 0)
        versions = struct.pack("<HH", _VERSION_64, _VERSION_64)
        record = b"PK\x06\x06" + struct.pack("<Q", 44) + versions
        record += struct.pack("<LLQQQQ", 0, 0, count, count, size, start)
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, start + size, 1)
        counts = struct.pack("<HHHHLLH", 0, 0, _ELSEWHERE_16, _ELSEWHERE_16, _ELSEWHERE, _ELSEWHERE, 0)
        return listed + record + locator + b"PK\x05\x06" + counts

    def _pickle(self) -> bytes:
        """Return the pickle of the whole document, of protocol 2 and without memo."""
        state = b"}(" + b"".join(_text(t.name) + _tensor(i, t) for i, t in enumerate(self.tensors)) + b"u"
        if self.key is None:
            return b"\x80\x02" + state + b"."
        others = b"".join(_text(key) + _settings(values) for key, values in self.beside.items())
        return b"\x80\x02}(" + _text(self.key) + state + others + b"u."


def _put(file: int, entry: _Entry, at: int, content: Content, wrote: Count) -> int:
    """Write an entry, data first, from byte `at` of an open file on, and return the checksum of its data."""
    start, checksum = at + len(_local_header(entry, 0, at)), 0

    def update(part: memoryview) -> None:
        nonlocal checksum
        checksum = zlib.crc32(part, checksum)

    assert entry.source is not None
    parts = [memoryview(entry.source)] if isinstance(entry.source, bytes) else content(entry.source)
    write_parts(file, start, entry.size, digested(parts, update), wrote, entry.name)
    write_at(file, memoryview(_local_header(entry, checksum, at)), at)
    return checksum


def _local_header(entry: _Entry, checksum: int, at: int) -> bytes:
    """Return what stands before an entry that begins at byte `at`, padded so that its data is aligned."""
    name, large = entry.name.encode(), entry.size >= _LONG
    extra = struct.pack("<HHQQ", _ZIP64_ID, 16, entry.size, entry.size) if large else b""
    padding = -(at + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
    extra += struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    version, size = (_VERSION_64, _ELSEWHERE) if large else (_VERSION, entry.size)
    fixed = struct.pack("<HHHHHLLL", version, _NO_FLAGS, _STORED, _NO_TIME, _FIRST_DAY, checksum, size, size)
    return b"PK\x03\x04" + fixed + struct.pack("<HH", len(name), len(extra)) + name + extra


def _listed(entry: _Entry, checksum: int, at: int) -> bytes:
    """Return an entry of the central directory; numbers beyond 32 bits stand in its extra field."""
    name, numbers = entry.name.encode(), (entry.size, entry.size, at)
    beyond = [number for number in numbers if number >= _LONG]
    extra = struct.pack(f"<HH{len(beyond)}Q", _ZIP64_ID, 8 * len(beyond), *beyond) if beyond else b""
    version = _VERSION_64 if beyond else _VERSION
    packed, unpacked, start = (number if number < _LONG else _ELSEWHERE for number in numbers)
    fixed = struct.pack("<HHHHHH", version, version, _NO_FLAGS, _STORED, _NO_TIME, _FIRST_DAY)
    sizes = struct.pack("<LLLHHHHHLL", checksum, packed, unpacked, len(name), len(extra), 0, 0, 0, 0, start)
    return b"PK\x01\x02" + fixed + sizes + name + extra


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<L", len(data)) + data


def _whole(number: int) -> bytes:
    """Return the opcode of an integer, of any size."""
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<l", number)
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _plain(value: Plain) -> bytes:
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _whole(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return _text(value)


def _settings(values: Mapping[str, Plain]) -> bytes:
    return b"}(" + b"".join(_text(name) + _plain(value) for name, value in values.items()) + b"u"


def _wholes(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_whole, numbers)) + b"t"


def _tensor(number: int, info: TensorInfo) -> bytes:
    """Return the opcodes that rebuild a contiguous tensor from the whole of the storage of this number."""
    storage_type = f"ctorch\n{_STORAGES[info.dtype]}Storage\n".encode()
    storage = b"(" + _text("storage") + storage_type + _text(str(number)) + _text("cpu") + _whole(info.numel) + b"tQ"
    strides = list(accumulate(reversed(info.shape[1:]), lambda stride, size: stride * max(size, 1), initial=1))[::-1]
    layout = _whole(0) + _wholes(info.shape) + _wholes(strides[-len(info.shape) :] if info.shape else ())
    no_gradient = b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + layout + no_gradient + b"tR"
