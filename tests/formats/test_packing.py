"""Dense packing: round trips, and the documented layout read by other means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.integer import BITS
from ditmoe_cli.formats.packed_sizes import packed_words, ternary_bytes
from ditmoe_cli.formats.packing import (
    check_base3,
    pack_base3,
    pack_columns,
    pack_rows,
    row_chunk,
    unpack_base3,
    unpack_columns,
    unpack_rows,
)

widths = st.sampled_from([1, *BITS, 7])


def random_codes(rows: int, n: int, bits: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 5), n=st.integers(0, 200), bits=widths, seed=st.integers(0, 99))
def test_rows_come_back(rows: int, n: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    words = pack_rows(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (rows, packed_words(n, bits)))
    assert torch.equal(unpack_rows(words, n, bits).long(), codes)


@given(n=st.integers(1, 80), columns=st.integers(1, 5), bits=widths, seed=st.integers(0, 99))
def test_columns_are_packed_as_the_rows_of_the_transpose(n: int, columns: int, bits: int, seed: int) -> None:
    codes = random_codes(n, columns, bits, seed)
    words = pack_columns(codes, bits)
    assert (words.dtype, words.shape) == (torch.int32, (packed_words(n, bits), columns))
    assert torch.equal(words, pack_rows(codes.T, bits).T)
    assert words.stride() == (columns, 1), "as files hold it"
    assert torch.equal(unpack_columns(words, n, bits).long(), codes)


@given(rows=st.integers(1, 4), n=st.integers(1, 100), bits=widths, seed=st.integers(0, 99))
def test_a_row_is_one_number_with_the_first_code_lowest(rows: int, n: int, bits: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    for row, words in zip(codes.tolist(), pack_rows(codes, bits).numpy(), strict=True):
        assert int.from_bytes(words.tobytes(), "little") == sum(code << (bits * j) for j, code in enumerate(row))


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_survive_the_sign_bit(bits: int) -> None:
    codes = torch.full((2, 67), 2**bits - 1)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), 67, bits).long(), codes)


def test_what_lies_behind_a_row_is_not_read() -> None:
    words = pack_rows(torch.ones(1, 33, dtype=torch.int32), 3)
    dirty = words.clone()
    dirty[0, -1] |= -8  # bits above the one value that begins in the last word
    assert torch.equal(unpack_rows(dirty, 33, 3).clone(), unpack_rows(words, 33, 3))


@given(size=st.integers(0, 40), seed=st.integers(0, 99))
def test_ternary_codes_come_back(size: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_base3(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (ternary_bytes(size),))
    assert torch.equal(unpack_base3(packed, (size,)), codes)
    padded = [*codes.tolist(), 0, 0, 0, 0]
    assert packed.tolist() == [sum((padded[5 * k + i] + 1) * 3**i for i in range(5)) for k in range(len(packed))]


def test_bytes_that_stand_for_no_codes_are_refused() -> None:
    with pytest.raises(BadInputError, match="byte 243"):
        check_base3(torch.tensor([243], dtype=torch.uint8), (5,))
    with pytest.raises(BadInputError, match="1 bytes for shape"):
        check_base3(torch.tensor([0], dtype=torch.uint8), (2, 3))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_chunks_are_of_at_least_one_row(rows: int, columns: int) -> None:
    assert 1 <= row_chunk(rows, columns, torch.device("cpu")) <= rows
