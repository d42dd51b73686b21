"""Work divided over threads: the same results, errors and gradients as in one thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import make_pico
from torch import Tensor

from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.side_by_side import MOST_BYTES, side_by_side, workers_for
from ditmoe_cli.compression.training.training_loop import Means, accumulate


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def three_threads() -> Iterator[None]:
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_each_part_has_a_thread_that_computes_with_one() -> None:
    meeting = threading.Barrier(2, timeout=20)  # passed only where both are at work at once

    def compute(part: int) -> tuple[int, int]:
        meeting.wait()
        return part, torch.get_num_threads()

    assert side_by_side(compute, [3, 4]) == [(3, 1), (4, 1)]
    assert torch.get_num_threads() == 2, "the caller keeps its own"
    assert side_by_side(lambda _: threading.current_thread(), [0]) == [threading.current_thread()]


@pytest.mark.usefixtures("two_threads")
def test_gradients_are_recorded_as_by_the_caller() -> None:
    modes = (torch.enable_grad(), torch.no_grad(), torch.inference_mode())
    found = []
    for mode in modes:
        with mode:
            found.append(side_by_side(lambda _: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()), [0, 1]))
    assert found == [[(True, False)] * 2, [(False, False)] * 2, [(False, True)] * 2]


@pytest.mark.usefixtures("three_threads")
def test_the_first_error_is_raised_once_all_have_ended() -> None:
    ended, meeting = [], threading.Barrier(3, timeout=20)

    def compute(part: int) -> int:
        meeting.wait()
        ended.append(part)
        if part:
            raise ValueError(f"part {part}")
        return part

    with pytest.raises(ValueError, match="part 1"):
        side_by_side(compute, [0, 1, 2])
    assert sorted(ended) == [0, 1, 2]


@pytest.mark.usefixtures("two_threads")
def test_threads_for_small_gradients_on_a_cpu_alone() -> None:
    cpu = torch.device("cpu")
    assert workers_for(cpu, 1000) == 2
    assert workers_for(cpu, MOST_BYTES // 4) == workers_for(cpu, MOST_BYTES) == 1
    assert workers_for(torch.device("cuda"), 1000) == 1


@pytest.mark.usefixtures("three_threads")
def test_gradients_of_a_model_are_those_of_one_thread() -> None:
    model = make_pico(sampler="rf", input_size=4, in_channels=1).model()
    weights = {name: weight.requires_grad_(True) for name, weight in model.named_parameters() if name != "pos_embed"}
    z, t = torch.randn(7, 1, 4, 4), torch.rand(7)

    def losses(rows: Tensor) -> Tensor:
        out: Tensor = model(z[rows], t[rows], rows % 3)
        return out.square().flatten(1).sum(dim=1)

    alone, _ = accumulate(weights, losses, torch.arange(7))
    expected = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    for part in (0, 3):
        total, _ = accumulate(weights, losses, torch.arange(7), part, Means(workers=3))
        torch.testing.assert_close(total, alone)
        for name, gradient in expected.items():
            torch.testing.assert_close(weights[name].grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_batches_are_divided_and_come_in_order() -> None:
    found = list(FittingBatches(4, workers=2).computed(lambda rows: sum(rows), 7))
    assert found == [(range(2), 1), (range(2, 4), 5), (range(4, 6), 9), (range(6, 7), 6)]


@pytest.mark.usefixtures("two_threads")
def test_memory_that_runs_out_in_a_thread_halves_the_batch() -> None:
    told: list[str] = []

    def compute(rows: range) -> list[int]:
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    batch = FittingBatches(4, told.append, workers=2)
    assert [row for _, rows in batch.computed(compute, 5) for row in rows] == list(range(5))
    assert batch.size == 2 and told == ["out of memory with 4 at once: going on with 2"]


@pytest.mark.usefixtures("two_threads")
def test_threads_are_kept_for_the_next_step() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def compute(_: int) -> threading.Thread:
        meeting.wait()
        return threading.current_thread()

    first, second = (set(side_by_side(compute, [0, 1])) for _ in range(2))
    assert first == second and threading.current_thread() not in first
