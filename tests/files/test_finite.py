from __future__ import annotations

import pytest
import torch

from ditmoe_cli.files.finite import all_finite, finite_bytes, finite_values
from ditmoe_cli.files.reader import dtype_code, tensor_bytes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = (1, 2, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1000, 4099, 70001)  # around the widths of vectors and blocks


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_is_found_wherever_it_stands(dtype: torch.dtype, bad: float) -> None:
    for size in SIZES:
        tensor = torch.randn(size).to(dtype)
        for place in {0, 1, size // 2, size - 2, size - 1} & set(range(size)):
            broken = tensor.clone()
            broken[place] = bad
            assert not all_finite(broken), (size, place)
        assert all_finite(tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_values_of_both_signs_do_not_cancel(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4096, dtype=dtype)
    tensor[7], tensor[4000] = torch.inf, -torch.inf
    assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_of_any_bits_is_found(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    exponent = torch.tensor([torch.inf], dtype=dtype).view(bits)
    for payload in (1, 5):
        for sign in (0, torch.iinfo(bits).min):
            tensor = torch.ones(100, dtype=dtype)
            tensor.view(bits)[50] = int(exponent) | payload | sign
            assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_ends_of_the_range_are_finite_though_their_sum_is_not(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for tensor in (torch.full((300,), most, dtype=dtype), torch.full((300,), -most, dtype=dtype)):
        assert not tensor.sum().isfinite()
        assert all_finite(tensor)
        tensor[123] = torch.nan
        assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_denormals_and_empty_tensors_are_finite(dtype: torch.dtype) -> None:
    tiniest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert all_finite(torch.tensor([0.0, -0.0, tiniest, -tiniest], dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.empty(3, 0, dtype=dtype))
    assert all_finite(torch.tensor(-0.0, dtype=dtype))
    assert not all_finite(torch.tensor(torch.nan, dtype=dtype))


def test_views_and_other_dtypes() -> None:
    whole = torch.randn(64, 48)
    whole[3, 5] = torch.nan
    assert not all_finite(whole.t())
    assert not all_finite(whole[3])
    assert all_finite(whole[4:, ::2])
    assert not all_finite(whole.requires_grad_())
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16):
        assert all_finite(torch.ones(5).to(dtype))


CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_are_judged_as_torch_judges_values(dtype: torch.dtype) -> None:
    """All bits of the two bytes that hold the exponent, with random ones below."""
    width = dtype.itemsize
    below = torch.randint(0, 256, (65536, width - 2), dtype=torch.uint8)
    top = torch.arange(65536).to(torch.int32).view(torch.uint8).reshape(-1, 4)[:, :2]
    values = torch.cat([below, top], dim=1).contiguous().view(dtype).reshape(-1)
    finite = values.isfinite().tolist()
    rows = values.view(torch.uint8).reshape(-1, width).numpy()
    assert [finite_bytes(row.tobytes(), CODES[dtype]) for row in rows] == finite
    good = values[values.isfinite()]
    assert finite_bytes(good.view(torch.uint8).numpy().tobytes(), CODES[dtype])
    for place in (0, 1, len(good) // 2, len(good) - 1):
        broken = good.clone()
        broken[place] = -torch.inf
        assert not finite_bytes(broken.view(torch.uint8).numpy().tobytes(), CODES[dtype])


@pytest.mark.parametrize(("code", "dtype"), [("F8_E5M2", torch.float8_e5m2), ("F8_E4M3", torch.float8_e4m3fn)])
def test_bytes_of_eight_bits_are_judged_as_torch_judges_values(code: str, dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    finite = values.view(dtype).float().isfinite().tolist()
    assert [finite_bytes(bytes([value]), code) for value in range(256)] == finite
    assert [finite_values(memoryview(bytes([value, 0])), code) for value in range(256)] == finite


def test_whole_numbers_and_no_bytes_are_finite() -> None:
    assert finite_bytes(b"\xff" * 64, "I32") and finite_bytes(b"\xff" * 64, "U8")
    assert all(finite_bytes(b"", code) for code in CODES.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -65504.0, 6e-8, torch.nan, torch.inf, -torch.inf])
def test_values_and_bytes_say_what_tensors_say(dtype: torch.dtype, value: float) -> None:
    tensor = torch.randn(70).to(dtype)
    tensor[33] = value
    data, code = tensor_bytes(tensor), dtype_code(dtype, "")
    assert finite_values(data, code) == finite_bytes(bytes(data), code) == all_finite(tensor)


def test_other_dtypes_and_nothing_are_finite() -> None:
    assert finite_values(memoryview(b"\xff" * 8), "I32")
    assert finite_values(memoryview(b""), "F16")
