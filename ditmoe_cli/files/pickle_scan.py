"""What a pickle would build, followed step by step without building it.

torch's weights-only reader runs no code of a file, but believes its numbers: it makes room for storages and arrays of
any size that a pickle of a few bytes names, enlarges storages that a tensor's shape reaches beyond, and takes time
without end for tuples of tuples of tuples. So each pickle is followed here first: on a stack of descriptions, by the
operations and callables that torch's reader takes, all others being refused.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from struct import unpack
from typing import Any

# bytes of an element by the names of torch's classes of storages
_ELEMENT_BYTES: Mapping[str, int] = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "BoolStorage": 1,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "UntypedStorage": 1,
    "QUInt8Storage": 1,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# called with whatever stands in the file, they make no more than that
_HARMLESS = frozenset(
    (
        *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "argparse.Namespace"),
        *("torch.Size", "torch.device", "torch.serialization._get_layout", "_codecs.encode", "numpy.dtype"),
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage"),
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    )
)
_EMPTY_TENSOR = re.compile(r"torch\.(\w+\.)*\w*Tensor")
_BYTES = frozenset(("_codecs.encode", "list"))  # what a bytearray is made of
_ARRAYS = frozenset(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core"))
_TENSORS = frozenset(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_PARAMETER = "torch.nn.parameter.Parameter"
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_NUMBERS = re.compile(r"[<>=|]?[?bBhHiIlLqQefdu][0-9]{0,2}")  # of numpy's dtypes
_COPY = (False, True)  # a dtype that is no copy is numpy's own, which setting its state would change for all arrays
_ORDERS = ("<", ">", "|", "=")
_DTYPE_STATE = (None, None, None, -1, -1, 0)  # subarray, names, fields, sizes and flags of a plain dtype
_UNSHARED = 100_000  # values that may be walked beyond those of the file
_SHARED = 8  # times that each value of a file may be walked
_TUPLE_KEYS = 1000
_DEEPEST = 100


@dataclass(frozen=True)
class Global:
    """A class or function by its full name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A storage of a tensor: its bytes, and those of an element."""

    nbytes: int
    element: int


@dataclass
class Made:
    """A container, or what a callable returns.

    Attributes:
        kind: ``dict``, ``list``, ``set``, ``tensor``, or the name of the callable.
        weight: values that a walk through it meets.
        depth: of what it holds.
        held: whether it stands in another one, and so is whole.
    """

    kind: str
    weight: int = 1
    depth: int = 0
    held: bool = False


@dataclass(frozen=True)
class Fixed:
    """A tuple, the values that a walk through it meets, and its depth."""

    items: tuple[Any, ...]
    weight: int
    depth: int


def weight_of(value: object) -> int:
    """Return how many values a walk through a value meets."""
    return value.weight if isinstance(value, Made | Fixed) else 1


def depth_of(value: object) -> int:
    """Return how deep a value nests others."""
    return value.depth if isinstance(value, Made | Fixed) else 0


@dataclass
class PickleScan:
    """The state of a pickle that is followed, and what all pickles of a file have taken so far.

    Attributes:
        data: the bytes of the file, or of the archive's pickle.
        position: of the next byte.
        storage_bytes: returns the bytes of a storage from its key and the bytes that the pickle says, or raises
            `ValueError`.
    """

    data: bytes | mmap.mmap
    storage_bytes: Callable[[object, int], int]
    position: int = 0
    _values: int = 0
    _walked: int = 0
    _tuple_keys: int = 0
    _stack: list[Any] = field(default_factory=list)
    _marks: list[list[Any]] = field(default_factory=list)
    _memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> object:
        """Follow the next pickle to its end, and return the description of what it holds.

        Raises `ValueError` that says what is wrong, and `IndexError`, `KeyError`, `TypeError` or `struct.error` for
        bytes that are no pickle.
        """
        self._stack, self._marks, self._memo = [], [], {}
        while True:
            code = self._read(1)[0]
            if code == pickle.STOP[0]:
                value = self._stack.pop()
                self._walk(value)
                return value
            step = _STEPS.get(code)
            if step is None:
                raise pickle.UnpicklingError(f"operation {code}")
            step(self)

    # ---------------------------------------------------------------- bytes

    def _read(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError("it is cut short")
        read = bytes(self.data[self.position : end])
        self.position = end
        return read

    def _line(self) -> str:
        end = self.position
        while self.data[end] != 10:
            end += 1
        line = self._read(end - self.position).decode()
        self.position += 1
        return line

    # ---------------------------------------------------------------- values

    def _push(self, value: object) -> None:
        self._values += 1
        self._stack.append(value)

    def _walk(self, value: object) -> None:
        """Count a walk through a value. Raises `ValueError` where all walks take too long for the file."""
        self._walked += weight_of(value) if isinstance(value, Made | Fixed) else 0
        if self._walked > _UNSHARED + _SHARED * self._values:
            raise ValueError("values that hold each other over and over would take no end of time")

    def _popped_to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _hold(self, holder: Made, values: Sequence[object]) -> None:
        whole = holder.held
        weight, depth = self._measured(values)
        if whole or holder.held:  # it grows although it stands in another value, or is to stand in itself
            raise ValueError("a value holds itself")
        holder.weight += weight
        holder.depth = max(holder.depth, depth)
        self._limit(holder)

    def _fixed(self, items: Sequence[object]) -> Fixed:
        weight, depth = self._measured(items)
        made = Fixed(tuple(items), 1 + weight, depth)
        self._limit(made)
        self._values += 1
        return made

    def _measured(self, values: Sequence[object]) -> tuple[int, int]:
        """Return weight and depth of what is to hold values, which are whole from now on."""
        for value in values:
            if isinstance(value, Made):
                value.held = True
        return sum(map(weight_of, values)), 1 + max(map(depth_of, values), default=0)

    def _limit(self, made: Made | Fixed) -> None:
        if made.weight > _UNSHARED + _SHARED * self._values:
            raise ValueError("values that hold each other over and over would take no end of time")
        if made.depth > _DEEPEST:
            raise ValueError("values are nested too deep")

    def _set_items(self, items: Sequence[object]) -> None:
        holder = self._stack[-1]
        if not isinstance(holder, Made) or len(items) % 2:
            raise TypeError("entries of nothing")
        for key in items[::2]:
            self._walk(key)
            self._tuple_keys += isinstance(key, Fixed)
            # equal hashes, which numbers that large can be chosen for, make each look-up slower than the one before
            if (isinstance(key, int) and abs(key) >= 2**60) or self._tuple_keys > _TUPLE_KEYS:
                raise ValueError("its keys are no names")
        self._hold(holder, items)

    # ---------------------------------------------------------------- calls

    def _called(self, function: object, arguments: object) -> object:
        """Return the description of what a call gives. Raises `ValueError` for calls that are not made."""
        if not isinstance(function, Global) or not isinstance(arguments, Fixed):
            raise TypeError("a call of nothing")
        name, given = function.name, arguments.items
        self._walk(arguments)
        made = Made(name, arguments.weight, arguments.depth)
        if name in _TENSORS:
            itemsize = _itemsize(given[6]) if name.endswith("_v3") else 0
            _check_view(given[0], given[1], given[2], given[3], itemsize)
            return Made("tensor")
        if name == _FROM_TYPE:
            tensor = self._called(given[0], given[2])
            return tensor if isinstance(tensor, Made) and tensor.kind == "tensor" else made
        if name == _PARAMETER:
            if any(isinstance(value, int | Fixed) and not isinstance(value, bool) for value in given):
                raise ValueError("a parameter is made of numbers")
            return Made("tensor")
        if name in _ARRAYS:
            if len(given) < 2 or given[0] != Global("numpy.ndarray") or getattr(given[1], "items", None) != (0,):
                raise ValueError("an array is made with a size before its values")
            return made
        if name == "numpy.dtype" and not _is_dtype(given):
            raise ValueError("an array holds other values than numbers")
        if name in _HARMLESS:
            return made
        if _EMPTY_TENSOR.fullmatch(name) and not given:
            return Made("tensor")
        if name == "builtins.bytearray" and all(isinstance(value, Made) and value.kind in _BYTES for value in given):
            return made
        raise UnknownCallError(name)

    def _build(self) -> None:
        """Follow what sets the state of an object."""
        state, holder = self._stack.pop(), self._stack[-1]
        if not isinstance(holder, Made):
            raise TypeError("a state of nothing")
        self._walk(state)
        items = state.items if isinstance(state, Fixed) else ()
        if holder.kind == "tensor" and items and isinstance(items[0], Storage):
            storage, offset, size, stride = items[:4]
            _check_view(storage, offset, size, stride, 0)
        elif holder.kind == "tensor" and items and not (isinstance(items[0], Made) and items[0].kind == "tensor"):
            raise ValueError("a tensor's state is none")
        if holder.kind == "numpy.dtype" and (len(items) != 8 or items[1] not in _ORDERS or items[2:] != _DTYPE_STATE):
            raise ValueError("an array holds other values than numbers")
        self._hold(holder, (state,))


class UnknownCallError(ValueError):
    """A pickle calls what is no part of weights, or asks it for any size; the message is its name."""


def _check_view(storage: object, offset: object, size: object, stride: object, itemsize: int) -> None:
    """Raise `ValueError` for a tensor that does not lie within its storage, or repeats elements of it."""
    if not isinstance(storage, Storage) or not isinstance(size, Fixed) or not isinstance(stride, Fixed):
        raise TypeError("a tensor of nothing")
    numbers = [offset, *size.items, *stride.items]
    whole = [number for number in numbers if type(number) is int and 0 <= number < 2**63]
    shape, steps = whole[1 : 1 + len(size.items)], whole[1 + len(size.items) :]
    if len(whole) < len(numbers) or len(shape) != len(steps):
        raise ValueError("a tensor's shape is none")
    reached = whole[0] + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1
    elements, held = math.prod(shape), storage.nbytes // (itemsize or storage.element)
    if elements and reached > held:
        raise ValueError(f"a tensor of shape {shape[:8]} reaches beyond the {held} elements that are stored")
    if elements > held:
        raise ValueError(
            f"a tensor of shape {shape[:8]} repeats the {held} elements that are stored; save it with contiguous()"
        )


def _is_dtype(given: tuple[object, ...]) -> bool:
    """Return whether these are the arguments of a dtype of numbers, as numpy pickles it."""
    return bool(given) and isinstance(given[0], str) and bool(_NUMBERS.fullmatch(given[0])) and given[1:] == _COPY


def _itemsize(dtype: object) -> int:
    import torch

    found = getattr(torch, dtype.name.removeprefix("torch."), None) if isinstance(dtype, Global) else None
    if not isinstance(found, torch.dtype):
        raise TypeError("no dtype")
    return found.itemsize


# ------------------------------------------------------------------ the operations


def _global(scan: PickleScan) -> None:
    module, name = scan._line(), scan._line()
    scan._push(Global(f"{_PYTHON_2.get(module, module)}.{name}"))


def _reduce(scan: PickleScan) -> None:
    arguments = scan._stack.pop()
    scan._stack[-1] = scan._called(scan._stack[-1], arguments)


def _newobj(scan: PickleScan) -> None:
    arguments = scan._stack.pop()
    scan._stack[-1] = scan._called(scan._stack[-1], arguments)


def _persistent(scan: PickleScan) -> None:
    name, kind, key, _, numel, *_ = scan._stack.pop().items
    if name not in ("storage", b"storage") or not isinstance(kind, Global) or type(numel) is not int or numel < 0:
        raise TypeError("no storage")
    element = _ELEMENT_BYTES.get(kind.name.rpartition(".")[2])
    if element is None:
        raise UnknownCallError(kind.name)
    scan._push(Storage(scan.storage_bytes(key, numel * element), element))


def _appended(scan: PickleScan, items: Sequence[object]) -> None:
    holder = scan._stack[-1]
    if not isinstance(holder, Made):
        raise TypeError("entries of nothing")
    scan._hold(holder, items)


def _mark(scan: PickleScan) -> None:
    scan._marks.append(scan._stack)
    scan._stack = []


def _tuple(scan: PickleScan) -> None:
    made = scan._fixed(scan._popped_to_mark())
    scan._stack.append(made)


def _last(count: int) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        if len(scan._stack) < count:
            raise IndexError
        scan._stack[-count:] = [scan._fixed(scan._stack[-count:])]

    return step


def _constant(value: object) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(value)


def _container(kind: str) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(Made(kind))


def _number(layout: str, size: int) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(unpack(layout, scan._read(size))[0])


def _text(scan: PickleScan) -> None:
    scan._push(str(scan._read(unpack("<I", scan._read(4))[0]), "utf-8", "surrogatepass"))


def _short_bytes(scan: PickleScan) -> None:
    scan._push(str(scan._read(scan._read(1)[0]), "latin-1"))


def _long(scan: PickleScan) -> None:
    scan._push(int.from_bytes(scan._read(scan._read(1)[0]), "little", signed=True))


def _get(layout: str, size: int) -> Callable[[PickleScan], None]:
    return lambda scan: scan._push(scan._memo[unpack(layout, scan._read(size))[0]])


def _put(layout: str, size: int) -> Callable[[PickleScan], None]:
    def step(scan: PickleScan) -> None:
        scan._memo[unpack(layout, scan._read(size))[0]] = scan._stack[-1]

    return step


_STEPS: Mapping[int, Callable[[PickleScan], None]] = {
    code[0]: step
    for code, step in {
        pickle.PROTO: lambda scan: scan._read(1) and None,
        pickle.GLOBAL: _global,
        pickle.REDUCE: _reduce,
        pickle.NEWOBJ: _newobj,
        pickle.BUILD: PickleScan._build,
        pickle.BINPERSID: _persistent,
        pickle.APPEND: lambda scan: _appended(scan, [scan._stack.pop()]),
        pickle.APPENDS: lambda scan: _appended(scan, scan._popped_to_mark()),
        pickle.SETITEM: lambda scan: scan._set_items([scan._stack.pop(-2), scan._stack.pop()]),
        pickle.SETITEMS: lambda scan: scan._set_items(scan._popped_to_mark()),
        pickle.MARK: _mark,
        pickle.TUPLE: _tuple,
        pickle.TUPLE1: _last(1),
        pickle.TUPLE2: _last(2),
        pickle.TUPLE3: _last(3),
        pickle.EMPTY_TUPLE: lambda scan: scan._stack.append(scan._fixed(())),
        pickle.EMPTY_LIST: _container("list"),
        pickle.EMPTY_DICT: _container("dict"),
        pickle.EMPTY_SET: _container("set"),
        pickle.NONE: _constant(None),
        pickle.NEWTRUE: _constant(True),
        pickle.NEWFALSE: _constant(False),
        pickle.BININT: _number("<i", 4),
        pickle.BININT1: _number("<B", 1),
        pickle.BININT2: _number("<H", 2),
        pickle.BINFLOAT: _number(">d", 8),
        pickle.LONG1: _long,
        pickle.BINUNICODE: _text,
        pickle.SHORT_BINSTRING: _short_bytes,
        pickle.BINGET: _get("<B", 1),
        pickle.LONG_BINGET: _get("<I", 4),
        pickle.BINPUT: _put("<B", 1),
        pickle.LONG_BINPUT: _put("<I", 4),
    }.items()
}
