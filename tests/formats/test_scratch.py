from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from packed import KINDS, info_of, random, same_bytes

from ditmoe_cli.formats.registry import pack
from ditmoe_cli.formats.scratch import scratch

CPU = torch.device("cpu")


def test_a_use_is_given_the_same_memory_again() -> None:
    first = scratch("a use", (3, 5), CPU)
    assert (first.dtype, first.shape) == (torch.float32, (3, 5))
    assert scratch("a use", (7,), CPU, torch.int16).data_ptr() == first.data_ptr()
    assert scratch("another use", (3, 5), CPU).data_ptr() != first.data_ptr()
    larger = scratch("a use", (100, 100), CPU)
    assert larger.is_contiguous()
    assert scratch("a use", (2, 2), CPU).data_ptr() == larger.data_ptr()


def test_what_is_very_large_is_not_kept() -> None:
    size = (1 << 22) + 1
    assert scratch("large", (size,), CPU).numel() == size
    kept = scratch("large", (1,), CPU)
    assert kept.untyped_storage().nbytes() < 4 * size


def test_threads_do_not_share_it() -> None:
    own = scratch("a use", (8,), CPU)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: scratch("a use", (8,), CPU).data_ptr()).result() != own.data_ptr()


def test_weights_packed_side_by_side_are_those_packed_in_turn() -> None:
    weights = [random((40 + i, 192 + 8 * i), i) for i in range(12)]
    jobs = [(weight, fmt) for weight in weights for fmt in KINDS]
    expected = [pack(weight, info_of(weight), fmt) for weight, fmt in jobs]
    with ThreadPoolExecutor(4) as pool:
        for members, wanted in zip(
            pool.map(lambda job: pack(job[0], info_of(job[0]), job[1]), jobs), expected, strict=True
        ):
            assert all(same_bytes(members[name], value) for name, value in wanted.items())
