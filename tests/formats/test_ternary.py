"""Ternary formats: sizes, the best scales there are, and bytes that stand for no codes. See also test_integer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import NAME, all_columns, dequantized, info_of, random, weight_of

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.grouped import GROUPS
from ditmoe_cli.formats.registry import grid_of, pack, quantized_members


@given(rows=st.integers(1, 50), columns=st.integers(32, 500), group=st.sampled_from(GROUPS))
def test_sizes_by_hand(rows: int, columns: int, group: int) -> None:
    codes, scale, shape = quantized_members(TensorInfo("a.b.weight", "BF16", (rows, columns)), f"ternary-g{group}")
    assert (codes.name, codes.dtype, codes.nbytes) == ("a.b.weight_packed", "U8", -(-rows * columns // 5))
    assert (scale.name, scale.dtype, scale.nbytes) == ("a.b.weight_scale", "F16", 2 * rows * -(-columns // group))
    assert (shape.name, shape.dtype, shape.nbytes) == ("a.b.weight_shape", "I32", 8)


def test_errors_approach_those_of_the_best_ternary_quantiser() -> None:
    """Of a Gaussian, w > t becomes s = E[w | w > t]; the best t leaves 1 - 2 φ(t)² / (1 - Φ(t)) of the variance."""
    best = min(1 - 2 * (math.exp(-t * t) / (2 * math.pi)) / (0.5 * math.erfc(t / 2**0.5)) for t in (0.55, 0.61, 0.67))
    weight = torch.randn(512, 1152, generator=torch.Generator().manual_seed(0))
    errors = [
        float((grid_of(weight, f"ternary-g{g}").round(weight, all_columns(weight)) - weight).norm() / weight.norm())
        for g in GROUPS
    ]
    assert errors == sorted(errors), "small groups fit better"
    assert errors[-1] < best**0.5
    assert errors[-1] == pytest.approx(best**0.5, rel=0.02)


@given(seed=st.integers(0, 99), weighted=st.booleans())
def test_scales_are_the_best_there_are(seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 32, generator=generator)
    importance = torch.rand(32, generator=generator) if weighted else torch.ones(32)
    ours = grid_of(weight, "ternary-g32", importance).round(weight, all_columns(weight))
    error = float((importance * (weight - ours).square()).sum())
    scales = torch.linspace(0.01, 4, 400)[:, None]
    others = (weight / scales).round().clamp(-1, 1) * scales
    assert error <= float((importance * (weight - others).square()).sum(dim=1).min()) * (1 + 1e-5)


def test_bytes_that_stand_for_no_codes_are_refused_by_name() -> None:
    weight = random((4, 64))
    members = pack(weight, info_of(weight), "ternary-g64")
    members[f"{NAME}_packed"][7] = 250
    with pytest.raises(BadInputError, match=rf"'{NAME}_packed'.* byte 250"):
        dequantized(weight_of(weight, "ternary-g64"), members)
