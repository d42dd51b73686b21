"""A kernel of others is used where it gives our values in less time, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import NAME, info_of, random
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats import bitsandbytes_arithmetic, bitsandbytes_kernel
from ditmoe_cli.formats.bitsandbytes_arithmetic import code_pairs, unpack_four_bit
from ditmoe_cli.formats.bitsandbytes_kernel import (
    FourBitTensors,
    cpu_library,
    is_right_and_faster,
    kernel,
    unpack_fastest,
)
from ditmoe_cli.formats.registry import pack, parse_format

WEIGHT = torch.arange(6.0).reshape(2, 3)
needs_library = pytest.mark.skipif(cpu_library() is None, reason="bitsandbytes has no library for this CPU")


class Clock:
    """Time that passes by what is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, value: Tensor) -> Callable[[Tensor], None]:
        def unpack(out: Tensor) -> None:
            self.now += seconds
            out.copy_(value)

        return unpack


@pytest.mark.parametrize(
    ("value", "seconds", "chosen"),
    [
        (WEIGHT, 1.0, True),
        (WEIGHT, 3.0, False),
        (WEIGHT * (1 + 2e-7), 1.0, False),
        (WEIGHT + 1e-3, 1.0, False),
        (WEIGHT * float("nan"), 1.0, False),
    ],
)
def test_what_is_right_and_faster_is_chosen(value: Tensor, seconds: float, chosen: bool) -> None:
    clock = Clock()
    ours, theirs = clock.taking(2.0, WEIGHT), clock.taking(seconds, value)
    assert is_right_and_faster(ours, theirs, torch.empty(2, 3), clock) is chosen


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), NotImplementedError(), AttributeError("gone")])
def test_a_kernel_that_fails_is_not_chosen(error: Exception) -> None:
    def fails(_: Tensor) -> None:
        raise error

    assert not is_right_and_faster(lambda out: out.fill_(1), fails, torch.empty(2, 3))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_is_asked_for_what_it_can_unpack(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: what it is given suffices to unpack the weight by its own format."""
    info = TensorInfo("x.weight", "F32", (4, 64))
    members = pack(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), info, kind)
    packed, absmax = members["x.weight"], members["x.weight.absmax"]
    codes = members["x.weight.quant_map"]
    asked: list[Any] = []

    def dequantize(data: Tensor, state: Any, out: Tensor) -> None:
        asked.append(state)
        bytes_ = data.reshape(-1).int()
        values = torch.stack((codes[bytes_ >> 4], codes[bytes_ & 15]), dim=1).reshape(-1, state.blocksize)
        out.copy_((values * state.absmax[:, None]).reshape(state.shape))

    library = SimpleNamespace(QuantState=SimpleNamespace, dequantize_4bit=dequantize)
    monkeypatch.setattr(bitsandbytes_kernel, "kernel", lambda weight, _: bitsandbytes_kernel._on_gpu(library, weight))
    monkeypatch.setattr(bitsandbytes_kernel, "_preferred", {})
    monkeypatch.setattr(bitsandbytes_kernel, "_seconds", lambda unpack, *_: 2.0 if unpack.__name__ == "ours" else 1.0)

    def ours(out: Tensor) -> None:
        unpack_four_bit(packed, absmax, code_pairs(codes), 64, out)

    weight = FourBitTensors(packed, absmax, kind, 64)
    found, expected = torch.empty(4, 64), torch.empty(4, 64)
    ours(expected)
    unpack_fastest(ours, weight, found)
    assert torch.equal(found, expected)
    assert asked[0].quant_type == kind and asked[0].dtype == torch.float32
    count = len(asked)
    unpack_fastest(ours, weight, found)
    assert len(asked) == count + 1, "the choice is made once"
    unpack_fastest(ours, weight, torch.empty(4, 64, dtype=torch.bfloat16))
    assert len(asked) > count + 2, "for each dtype"


def test_where_there_is_no_kernel_ours_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes_kernel, "cpu_library", lambda: None)
    monkeypatch.setattr(bitsandbytes_kernel, "bitsandbytes", lambda: pytest.fail("asked on the CPU"))
    out = torch.empty(2, 64)
    weight = FourBitTensors(torch.zeros(64, 1, dtype=torch.uint8), torch.ones(2), "nf4", 64)
    unpack_fastest(lambda given: given.fill_(3), weight, out)
    assert torch.equal(out, torch.full((2, 64), 3.0))


def test_what_kernels_cannot_write_never_reaches_them() -> None:
    weight = FourBitTensors(torch.zeros(64, 1, dtype=torch.uint8), torch.ones(2), "nf4", 64)
    assert kernel(weight, torch.empty(2, 128)[:, :64]) is None, "gaps between rows"
    assert kernel(weight, torch.empty(2, 64, dtype=torch.float64)) is None
    assert kernel(weight, torch.empty(4, 32)) is None, "rows that are no whole blocks"


def test_another_codebook_never_reaches_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels know the usual one alone, and take no other."""
    monkeypatch.setattr(bitsandbytes_arithmetic, "unpack_fastest", lambda *_: pytest.fail("asked"))
    weight = random((4, 64))
    members = pack(weight, info_of(weight), "nf4")
    codes = members[f"{NAME}.quant_map"]
    usual = parse_format("nf4")
    with pytest.raises(pytest.fail.Exception, match="asked"):
        usual.load(info_of(weight), members).matrix()
    members[f"{NAME}.quant_map"] = codes * 0.5
    halved = usual.load(info_of(weight), members).matrix()
    monkeypatch.undo()
    members[f"{NAME}.quant_map"] = codes
    assert torch.equal(halved, usual.load(info_of(weight), members).matrix() * 0.5)


@needs_library
@given(
    rows=st.integers(1, 70),
    blocks=st.integers(1, 5),
    kind=st.sampled_from(["nf4", "fp4", "nf4-dq", "fp4-dq"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_the_library_for_the_cpu_gives_our_bits(
    rows: int, blocks: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    weight = random((rows, 64 * blocks), seed=seed)
    packed = parse_format(kind).load(info_of(weight), pack(weight, info_of(weight), kind))
    bytes_, absmax, pairs = (packed.tensors[name] for name in ("packed", "absmax", "pairs"))
    if kind.endswith("-dq"):
        absmax = torch.rand(rows * blocks) + 0.1
    ours, theirs = torch.empty(weight.shape, dtype=dtype), torch.empty(weight.shape, dtype=dtype)
    unpack_four_bit(bytes_, absmax, pairs, 64, ours)
    unpack = kernel(FourBitTensors(bytes_, absmax, kind[:3], 64), theirs)
    assert unpack is not None
    unpack(theirs)
    assert torch.equal(theirs, ours)
