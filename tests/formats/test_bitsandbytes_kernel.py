"""A kernel of others is used where it gives our values in less time, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats import bitsandbytes_kernel
from ditmoe_cli.formats.bitsandbytes_arithmetic import FP4_CODES, NF4_CODES, code_pairs, unpack_four_bit
from ditmoe_cli.formats.bitsandbytes_kernel import FourBitTensors, is_right_and_faster, unpack_fastest
from ditmoe_cli.formats.registry import pack

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Clock:
    """Time that passes by what is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float, value: Tensor) -> Callable[[], Tensor]:
        def unpack() -> Tensor:
            self.now += seconds
            return value

        return unpack


@pytest.mark.parametrize(
    ("value", "seconds", "chosen"),
    [
        (WEIGHT, 1.0, True),
        (WEIGHT, 3.0, False),
        (WEIGHT * (1 + 1e-7), 1.0, True),
        (WEIGHT + 1e-3, 1.0, False),
        (WEIGHT.T, 1.0, False),
        (WEIGHT * float("nan"), 1.0, False),
    ],
)
def test_what_is_right_and_faster_is_chosen(value: Tensor, seconds: float, chosen: bool) -> None:
    clock = Clock()
    assert is_right_and_faster(clock.taking(2.0, WEIGHT), clock.taking(seconds, value), clock) is chosen


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), NotImplementedError(), AttributeError("gone")])
def test_a_kernel_that_fails_is_not_chosen(error: Exception) -> None:
    def fails() -> Tensor:
        raise error

    assert not is_right_and_faster(lambda: WEIGHT, fails)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_is_asked_for_what_it_can_unpack(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU tensor: what it is given suffices to unpack the weight by its own format."""
    info = TensorInfo("x.weight", "F32", (4, 64))
    members = pack(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), info, kind)
    packed, absmax = members["x.weight"], members["x.weight.absmax"]
    codes = members["x.weight.quant_map"]
    asked: list[Any] = []

    def dequantize(data: Any, state: Any) -> Tensor:
        asked.append(state)
        bytes_ = data.tensor.reshape(-1).int()
        values = torch.stack((state.code[bytes_ >> 4], state.code[bytes_ & 15]), dim=1).reshape(-1, state.blocksize)
        return (values * state.absmax[:, None]).reshape(state.shape)

    library = SimpleNamespace(QuantState=SimpleNamespace, dequantize_4bit=dequantize)
    monkeypatch.setattr(bitsandbytes_kernel, "bitsandbytes", lambda: library)
    monkeypatch.setattr(bitsandbytes_kernel, "_preferred", {})
    monkeypatch.setattr(bitsandbytes_kernel, "_seconds", lambda unpack, _: 1.0 if unpack.__name__ == "theirs" else 2.0)

    def ours() -> Tensor:
        return unpack_four_bit(packed, absmax, code_pairs(codes), (4, 64), 64)

    on_gpu = SimpleNamespace(tensor=packed, is_cuda=True, device="cuda:0")
    weight = FourBitTensors(on_gpu, absmax, codes, kind, (4, 64), 64)  # type: ignore[arg-type]
    found = unpack_fastest(ours, weight)
    torch.testing.assert_close(found, ours())
    assert asked[0].quant_type == kind and asked[0].dtype == torch.float32
    assert codes.tolist() == pytest.approx(NF4_CODES if kind == "nf4" else FP4_CODES)
    count = len(asked)
    unpack_fastest(ours, weight)
    assert len(asked) == count + 1, "the choice is made once"


def test_on_a_cpu_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes_kernel, "bitsandbytes", lambda: pytest.fail("asked"))
    weight = torch.ones(2, 2)
    packed = FourBitTensors(torch.zeros(2, 1, dtype=torch.uint8), weight, weight, "nf4", (2, 2), 64)
    assert unpack_fastest(lambda: weight, packed) is weight
