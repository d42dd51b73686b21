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

CHUNK_VALUES = 1 << 18  # worked on at a time on the CPU: a few such tensors stay in its cache
_CELLS = 3**TERNARY_PER_BYTE
_LANES = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_TOGETHER = {2: 4, 3: 4, 4: 2, 5: 2, 6: 2}  # codes looked up at once, by bits: those of a byte, or of up to 12 bits


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
    """Return the int32 codes (rows, n) that `pack_rows` packed."""
    word, shift, across = _places(n, bits, words.device)
    codes = words.index_select(1, word)
    # Shifts are arithmetic: what a sign bit drags in lies above the width, and is masked.
    codes.bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)
    if len(across):
        below = WORD_BITS - shift[across]
        low = codes[:, across] & ((1 << below) - 1)
        # Where a row ends within a code, as `unpack_values` may ask for one, the rest of that code is of no interest.
        high = words.index_select(1, (word[across] + 1).clamp_max_(words.shape[1] - 1)) << below
        codes[:, across] = low | (high & ((1 << bits) - 1))
    return codes


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Return int32 words (⌈n · bits / 32⌉, columns) that hold codes (n, columns), packed down each column."""
    return pack_rows(codes.t(), bits).t().clone(memory_format=torch.contiguous_format)


def unpack_columns(words: Tensor, n: int, bits: int) -> Tensor:
    """Return the int32 codes (n, columns) that `pack_columns` packed."""
    return unpack_rows(words.t(), n, bits).t()


def unpack_values(words: Tensor, n: int, bits: int) -> Tensor:
    """Return the codes (rows, n) that `pack_rows` packed as fp32, in half the time that `unpack_rows` takes.

    Codes are unpacked several at a time, as one wider code that is looked up in a table; a byte is such a code.
    """
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :n].float()
    together = _TOGETHER[bits]
    if together * bits == 8:
        wide = words.contiguous().view(torch.uint8).int()
    else:
        wide = unpack_rows(words, -(-n // together), together * bits)
    values = _values_table(bits, words.device).index_select(0, wide.reshape(-1)).view(torch.float32)
    return values.reshape(len(words), -1)[:, :n]


@lru_cache(maxsize=16)
def _values_table(bits: int, device: torch.device) -> Tensor:
    """Return the fp32 codes that each wide code stands for, as cells of 8 or 16 bytes, which look-ups move at once."""
    together = _TOGETHER[bits]
    wide = torch.arange(1 << together * bits, device=device)[:, None]
    codes = (wide >> bits * torch.arange(together, device=device) & (1 << bits) - 1).float()
    return codes.view(torch.int64 if together == 2 else torch.complex128).reshape(-1)


@lru_cache(maxsize=64)
def _places(n: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the word and the shift of each of n values, and which of them straddle."""
    start = torch.arange(n, device=device, dtype=torch.int32) * bits
    shift = start % WORD_BITS
    return start // WORD_BITS, shift, (shift + bits > WORD_BITS).nonzero().flatten()


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
    return base3_digits(packed, torch.int8)[: math.prod(shape)].reshape(shape)


def base3_digits(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes of all bytes, padding included, in `dtype`, of bytes that `check_base3` accepts."""
    return _cells(packed.device, dtype).index_select(0, packed.int()).reshape(-1)


@lru_cache(maxsize=8)
def _cells(device: torch.device, dtype: torch.dtype) -> Tensor:
    bytes_ = torch.arange(_CELLS, device=device).unsqueeze(1)
    return (bytes_ // _powers(device) % 3 - 1).to(dtype)


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(TERNARY_PER_BYTE, device=device)
