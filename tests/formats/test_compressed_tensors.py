"""compressed-tensors reads our integer weights, and packs the same codes and zero points into the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed import NAME, info_of, random, weight_of

from ditmoe_cli.formats.integer import BITS
from ditmoe_cli.formats.integer_arithmetic import IntegerGrid
from ditmoe_cli.formats.registry import grid_of

CASES = [(bits, group, symmetric) for bits in BITS for group in (32, 128) for symmetric in (False, True)]


@pytest.fixture(scope="module")
def library() -> Any:
    """What is asked of it; widths that do not divide 32 are packed densely since 0.18."""
    return pytest.importorskip("compressed_tensors.compressors.pack_quantized", exc_type=ImportError)


def scheme(bits: int, group: int, symmetric: bool) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_it_reads_our_weights(library: Any, bits: int, group: int, symmetric: bool) -> None:
    """To the bit, in fp16; more rows than a word of zero points holds, and a number that does not fill its words."""
    fmt = f"int{bits}-g{group}{'-sym' if symmetric else ''}"
    weight = random((37, 3 * group))
    weight[::3] = weight[::3].abs()  # zero points far from the middle
    members = grid_of(weight, fmt).pack(weight, info_of(weight))
    assert list(members) == [
        f"{NAME}_{part}" for part in ("packed", "scale", "zero_point", "shape") if f"{NAME}_{part}" in members
    ]
    theirs = {name.removeprefix(NAME.removesuffix("weight")): value for name, value in members.items()}
    read = library.PackedQuantizationCompressor.decompress(theirs, scheme(bits, group, symmetric))["weight"]
    assert torch.equal(read, weight_of(weight, fmt).unpack(members))


@pytest.mark.parametrize(("bits", "group", "symmetric"), CASES)
def test_it_packs_the_same_codes_into_the_same_bits(library: Any, bits: int, group: int, symmetric: bool) -> None:
    weight = random((37, 3 * group), 1)
    grid = grid_of(weight, f"int{bits}-g{group}{'-sym' if symmetric else ''}")
    assert isinstance(grid, IntegerGrid)
    ours = grid.parts(weight, info_of(weight))
    state = {"weight": grid.round(weight, torch.arange(3 * group)), "weight_scale": grid.scale}
    if grid.zero is not None:
        state["weight_zero_point"] = (grid.zero - 2 ** (bits - 1)).to(torch.int8)
    theirs = library.PackedQuantizationCompressor.compress(state, scheme(bits, group, symmetric))
    assert torch.equal(theirs["weight_packed"], ours["packed"])
    assert ("weight_zero_point" in theirs) == ("zero_point" in ours) == (not symmetric)
    if not symmetric:
        assert torch.equal(theirs["weight_zero_point"], ours["zero_point"])
    assert theirs["weight_shape"].tolist() == ours["shape"].tolist()
