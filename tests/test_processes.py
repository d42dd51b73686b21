"""Shares of the work under torchrun, and processes that end early."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from ditmoe_cli.errors import DitmoeError, UsageError
from ditmoe_cli.processes import WHOLE, Share, own_device, process_group


def test_shares_divide_batches_without_gap_or_overlap() -> None:
    batches = list(range(11))
    shares = [Share(rank, 3).of(batches) for rank in range(3)]
    assert shares[0] == [0, 3, 6, 9]
    assert sorted(batch for share in shares for batch in share) == batches
    assert WHOLE.of(batches) == batches
    assert [Share(rank, 3).first for rank in range(3)] == [True, False, False]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with process_group() as share:
        assert share == WHOLE
        assert share.from_first(lambda: 3) == 3
        share.wait()
    assert own_device("cuda") == "cuda"


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "2")
    assert [own_device(device) for device in ("cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:0", "cpu"]


def test_a_process_that_ended_is_reported_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr("torch.distributed.barrier", broken)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broken)
    with pytest.raises(DitmoeError, match="another process of this job has ended"):
        Share(0, 2).wait()
    with pytest.raises(DitmoeError, match="another process of this job has ended"):
        Share(1, 2).from_first(lambda: 3)


def test_the_others_compute_when_the_first_has() -> None:
    """One process waits twice: before the others compute, and until they have."""
    order: list[str] = []

    class Waiting(Share):
        def wait(self) -> None:
            order.append("wait")

    for rank in (0, 1):
        assert Waiting(rank, 2).after_first(lambda: order.append("compute") or 5) == 5  # type: ignore[func-returns-value]
    assert order == ["compute", "wait", "wait", "wait", "compute", "wait"]
    assert WHOLE.after_first(lambda: 3) == 3


def test_who_has_joined_the_processes_stays_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setitem(os.environ, "TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with process_group() as share:  # neither joined again nor left behind
        assert share == Share(2, 3)


class Later(Share):
    """A later process of a job whose first one chose fp32."""

    def from_first(self, compute: Callable[[], object]) -> Any:
        compute()
        return "fp32"


def test_processes_that_chose_otherwise_are_refused() -> None:
    Later(1, 2).check_same("dtype", "fp32")
    Share().check_same("dtype", "bf16")
    with pytest.raises(UsageError, match="dtype auto: is bf16 on this machine, fp32 on the first process's; name one"):
        Later(1, 2).check_same("dtype", "bf16")
