"""Ternary differences: the right entries, the best scale, and bytes that come back as they were."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from swiglu import seeded
from torch import Tensor

from ditmoe_cli.compression.delta.compeft import ternary
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.formats.packed_sizes import ternary_bytes
from ditmoe_cli.formats.packing import pack_base3, unpack_base3

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)
densities = st.floats(0.01, 1.0)


def delta(seed: int, rows: int = 8, columns: int = 11) -> Tensor:
    return torch.randn(rows, columns, generator=seeded(seed))


@given(shapes, st.integers(0, 2**31))
def test_codes_survive_packing(shape: tuple[int, ...], seed: int) -> None:
    codes = torch.randint(-1, 2, shape, generator=seeded(seed)).to(torch.int8)
    packed = pack_base3(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(codes.numel() / 5),) == (ternary_bytes(codes.numel()),)
    back = unpack_base3(packed, shape)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


def test_bytes_are_base_three_with_the_first_code_lowest() -> None:
    codes = torch.tensor([-1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 0, -1], dtype=torch.int8)
    assert pack_base3(codes).tolist() == [0, 242, 2 + 3 * 1 + 9 * 0 + 27 * 1 + 81 * 1]


def test_bytes_that_fit_no_codes_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"2 bytes for shape \[11\], which takes 3"):
        unpack_base3(torch.zeros(2, dtype=torch.uint8), (11,))
    with pytest.raises(BadInputError, match="byte 243 stands for no five codes"):
        unpack_base3(torch.tensor([0, 243], dtype=torch.uint8), (2, 5))


@given(st.integers(0, 2**31), densities)
def test_the_largest_entries_keep_their_signs(seed: int, density: float) -> None:
    original = delta(seed)
    found = ternary(original, density)
    kept = found.codes != 0
    assert int(kept.sum()) == math.ceil(density * original.numel() - 1e-9)
    assert torch.equal(found.codes[kept].float(), original[kept].sign())
    if not bool(kept.all()):
        assert float(original[kept].abs().min()) >= float(original[~kept].abs().max())


@given(st.integers(0, 2**31), densities)
def test_no_alpha_of_a_grid_betters_the_closed_form(seed: int, density: float) -> None:
    original = delta(seed)
    found = ternary(original, density)
    least = float((original - found.scale * found.codes).norm())
    for alpha in torch.linspace(0.1, 5.0, 50):
        assert float((original - alpha * original.std() * found.codes).norm()) >= least - 1e-5


def test_ties_fall_to_the_first_entries() -> None:
    found = ternary(torch.tensor([[1.0, -2.0], [2.0, -2.0]]), 0.5)
    assert found.codes.tolist() == [[0, -1], [1, 0]]
    assert found.scale == 2.0


def test_zeros_are_not_kept() -> None:
    half = ternary(torch.tensor([0.0, 3.0, 0.0, -1.0]), 1.0)
    assert (half.codes.tolist(), half.scale) == ([0, 1, 0, -1], 2.0)
    nothing = ternary(torch.zeros(3, 4), 0.5)
    assert (int(nothing.codes.abs().sum()), nothing.scale) == (0, 0.0)


@pytest.mark.parametrize("density", [0.0, 1.1, float("nan")])
def test_what_is_no_density_is_refused(density: float) -> None:
    with pytest.raises(UsageError, match="density of ternary codes"):
        ternary(torch.ones(3), density)
