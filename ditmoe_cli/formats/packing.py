"""Small integers packed densely: widths of 1 to 8 bits in 32-bit words, and ternary codes five a byte.

Row r of codes c of b bits is the little-endian bit string Σ_j c_rj 2^(b j), cut into words of 32 bits and padded with
zeros to whole words. Value j hence begins at bit b j mod 32 of word ⌊b j / 32⌋ and may straddle into the next.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.packed_sizes import TERNARY_PER_BYTE, WORD_BITS, packed_words, ternary_bytes
from ditmoe_cli.formats.scratch import scratch

CHUNK_VALUES = 1 << 18  # worked on at a time on the CPU: a few such tensors stay in its cache
_CELLS = 3**TERNARY_PER_BYTE
_LANES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def row_chunk(rows: int, columns: int, device: torch.device) -> int:
    """Return how many rows to work on at a time: equal parts that stay in the cache of a core, more elsewhere."""
    values = CHUNK_VALUES if device.type == "cpu" else 64 * CHUNK_VALUES
    most = max(1, values // max(1, columns))
    parts = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / parts))


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words (rows, ⌈n · bits / 32⌉) that hold codes (rows, n) in 0 … 2^bits − 1.

    Codes stand in lanes of 8 bits at first. Neighbouring lanes are put together until whole bytes are full.
    """
    rows, n = codes.shape
    short = -n % WORD_BITS
    if not n:
        return codes.new_empty(rows, 0, dtype=torch.int32)
    wide = (F.pad(codes, (0, short)) if short else codes).to(torch.uint8).reshape(-1).view(torch.int64)
    lane, width = 8, bits
    while width % 8:
        low = sum(((1 << width) - 1) << place for place in range(0, 64, 2 * lane))
        wide = (wide & low) | (wide >> (lane - width)).bitwise_and_(low << width)
        lane, width = 2 * lane, 2 * width
    if width == 8:
        packed = wide.view(_LANES[lane]).to(torch.uint8)
    else:
        packed = wide.view(torch.uint8).reshape(-1, lane // 8)[:, : width // 8].reshape(-1)
    return packed.view(torch.int32).reshape(rows, -1)[:, : packed_words(n, bits)].contiguous()


def unpack_rows(words: Tensor, n: int, bits: int) -> Tensor:
    """Return the uint8 codes (rows, n) that `pack_rows` packed; they hold until the next call in this thread.

    Codes are put into lanes of several bytes, eight codes or fewer each, whose halves are drawn apart until each code
    has a byte. 0.3 to 0.9 ns a code, against 2 to 3 where each code is looked up by its word and shifted.
    """
    rows, count = words.shape
    if bits == 8 or not n:
        return _of_rows(words, torch.uint8)[:, :n]
    if 8 % bits == 0:
        lanes = scratch("lanes", (rows, 4 * count), words.device, _LANES[64 // bits])
        lanes.copy_(_of_rows(words, torch.uint8))
        return _spread(lanes, bits, 8 // bits)[:, :n]
    return _spread(_lanes_of_eight(words, n, bits), bits, 8)[:, :n]


def _of_rows(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the words of rows, however they lie in memory, as smaller ones (rows, ...)."""
    rows, count = words.shape
    return words.reshape(-1).view(dtype).view(rows, count * 4 // dtype.itemsize)


def _lanes_of_eight(words: Tensor, n: int, bits: int) -> Tensor:
    """Return int64 lanes (rows, ⌈n / 8⌉), the lowest 8 · `bits` bits of which are eight codes each."""
    rows, count = words.shape
    windows, shift = _windows(n, bits, words.device)
    index = scratch("places", (rows, len(windows)), words.device, torch.int32)
    first = torch.arange(0, 2 * rows * count, 2 * count, dtype=torch.int32, device=words.device)[:, None]
    torch.add(first, windows, out=index)
    lanes = scratch("lanes", (rows, len(shift)), words.device, torch.int64)
    halves = _of_rows(words, torch.int16).reshape(-1)
    if len(windows) == 4 * len(shift):
        torch.index_select(halves, 0, index.reshape(-1), out=lanes.view(torch.int16).reshape(-1))
    else:
        pairs = scratch("windows", (index.numel(),), words.device, torch.int16)
        torch.index_select(halves, 0, index.reshape(-1), out=pairs)
        lanes.copy_(pairs.view(torch.int32).view(rows, -1))
    if bits % 2:
        lanes.bitwise_right_shift_(shift)
    return lanes.bitwise_and_((1 << 8 * bits) - 1)


@lru_cache(maxsize=64)
def _windows(n: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which half words of a row hold the codes 8 k … 8 k + 7, and how far they are to be shifted.

    They are two or four for each k, one after the other, and what of them lies beyond these codes is of no interest.
    """
    start = torch.arange(0, n, 8, dtype=torch.int32) * bits
    needed = math.ceil((8 * bits + 8 * bits % 16) / 16)
    place = torch.arange(2 if needed <= 2 else 4, dtype=torch.int32).clamp_max_(needed - 1)
    most = 2 * packed_words(n, bits) - 1  # of a row that ends within the eight
    windows = (start[:, None] // 16 + place).clamp_max_(most).reshape(-1)
    return windows.to(device), (start % 16).long().to(device)


def _spread(lanes: Tensor, bits: int, codes: int) -> Tensor:
    """Return lanes (rows, m) of `codes` codes side by side as bytes (rows, codes · m); they take the lanes' memory."""
    whole = 8 * codes
    moved = scratch("moved", tuple(lanes.shape), lanes.device, lanes.dtype)
    while codes > 1:
        codes //= 2
        width, lane = bits * codes, 8 * codes
        low = sum(((1 << width) - 1) << place for place in range(0, whole, 2 * lane))
        torch.bitwise_left_shift(lanes, lane - width, out=moved)
        if 2 * width <= lane:  # what is moved falls onto nothing of the lower half
            lanes.bitwise_or_(moved).bitwise_and_(low | low << lane)
        else:
            lanes.bitwise_and_(low).bitwise_or_(moved.bitwise_and_(low << lane))
    return lanes.view(torch.uint8)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words (⌈n · bits / 32⌉, columns) that hold codes (n, columns), packed down each column."""
    return pack_rows(codes.t(), bits).t().clone(memory_format=torch.contiguous_format)


def unpack_columns(words: Tensor, n: int, bits: int) -> Tensor:
    """Return the uint8 codes (n, columns) that `pack_columns` packed."""
    return unpack_rows(words.t(), n, bits).t().clone(memory_format=torch.contiguous_format)


def pack_base3(codes: Tensor) -> Tensor:
    """Return ⌈n / 5⌉ bytes that hold n codes of any shape: Σ_i (c_i + 1) 3^i over five at a time, padded with 0."""
    flat = codes.reshape(-1)
    short = -flat.numel() % TERNARY_PER_BYTE
    packed = torch.empty(ternary_bytes(flat.numel()), dtype=torch.uint8, device=codes.device)
    powers = _powers(codes.device).float()
    parts = torch.split(F.pad(flat, (0, short)) if short else flat, row_chunk(len(packed), 5, codes.device) * 5)
    for part, target in zip(parts, torch.split(packed, len(parts[0]) // 5 or 1), strict=True):
        numbers = part.float().reshape(-1, TERNARY_PER_BYTE).mv(powers)  # whole ones below 122: exact
        target.copy_(numbers.add_(_CELLS // 2).to(torch.int16))
    return packed


def check_base3(packed: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `BadInputError` where the number of bytes does not fit the shape, or one stands for no codes."""
    size = math.prod(shape)
    if packed.shape != (ternary_bytes(size),):
        raise BadInputError(
            f"ternary codes: {packed.numel()} bytes for shape {list(shape)}, which takes {ternary_bytes(size)}"
        )
    if size and int(packed.max()) >= _CELLS:
        raise BadInputError(f"ternary codes: byte {int(packed.max())} stands for no five codes (at most {_CELLS - 1})")


def unpack_base3(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 codes of `shape` that bytes hold. Raises `BadInputError` as `check_base3` does."""
    check_base3(packed, shape)
    return base3_digits(packed, torch.int8)[: math.prod(shape)].reshape(shape).clone()


def base3_digits(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of all bytes, padding included, in `dtype`, of bytes that `check_base3` accepts.

    They hold until the next call in this thread.
    """
    index = scratch("places", (len(packed),), packed.device, torch.int32).copy_(packed)
    digits = scratch("digits", (len(packed), TERNARY_PER_BYTE), packed.device, dtype)
    return torch.index_select(_cells(packed.device, dtype), 0, index, out=digits).view(-1)


@lru_cache(maxsize=8)
def _cells(device: torch.device, dtype: torch.dtype) -> Tensor:
    bytes_ = torch.arange(_CELLS, device=device).unsqueeze(1)
    return (bytes_ // _powers(device) % 3 - 1).to(dtype)


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(TERNARY_PER_BYTE, device=device)
