"""What processes that train together add up and agree on."""

from __future__ import annotations

import math
import socket
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from training import in_threads

from ditmoe_cli.compression.training.exchange import ALONE, Exchange, _buckets, exchange_on
from ditmoe_cli.compression.training.training_loop import Course, Means, Objective, Trained, _Run, train
from ditmoe_cli.compression.training.weight_steps import USUAL
from ditmoe_cli.errors import DitmoeError
from ditmoe_cli.files.workfolder import FollowedFolder, WorkFolder
from ditmoe_cli.processes import WHOLE, Share

CPU = torch.device("cpu")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_dealt_to_processes_without_gap_or_overlap(world: int) -> None:
    rows = torch.arange(7) * 2
    shares = [Exchange(Share(rank, world)).own(rows) for rank in range(world)]
    assert sorted(row for share in shares for row in share.tolist()) == rows.tolist()
    parts = Exchange(Share(0, world)).parts(rows, 2)
    assert torch.equal(torch.cat(parts), shares[0]) and max(map(len, parts)) <= 2
    assert Exchange(Share(1, 2)).parts(torch.arange(1), 4) == (), "of one row the second process has none"


def test_one_process_exchanges_nothing() -> None:
    tensors = [torch.ones(2), torch.ones(3)]
    ALONE.add_up(tensors)
    assert ALONE.agreed("a") == "a"
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors)
    assert torch.equal(ALONE.gathered([torch.ones(2), torch.zeros(1)], 3), torch.tensor([1.0, 1.0, 0.0]).double())
    assert exchange_on(WHOLE, CPU) == ALONE


def test_buckets_hold_all_tensors_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe_cli.compression.training.exchange._BUCKET", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2)]
    assert [[len(tensor) for tensor in bucket] for bucket in _buckets(tensors)] == [[4, 6], [1], [30], [2]]


def test_a_process_that_ended_is_reported_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    monkeypatch.setattr(dist, "all_reduce", broken)
    monkeypatch.setattr(dist, "all_gather_object", broken)
    with pytest.raises(DitmoeError, match="another process of this job has ended"):
        Exchange(Share(0, 2)).add_up([torch.ones(2)])
    with pytest.raises(DitmoeError, match="another process of this job has ended"):
        Exchange(Share(0, 2)).gathered([torch.ones(1)], 2)
    with pytest.raises(DitmoeError, match="another process of this job has ended"):
        exchange_on(Share(0, 2), CPU)


def test_nccl_adds_up_where_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL itself takes two GPUs; here it is told when it is asked for."""
    asked: list[str] = []

    def places(found: list[Any], mine: tuple[str, str]) -> None:
        found[:] = [mine, (mine[0], other)]

    def new_group(backend: str) -> str:
        asked.append(backend)
        return backend

    monkeypatch.setattr(dist, "all_gather_object", places)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    other = "cuda:1"
    assert exchange_on(Share(0, 2), torch.device("cuda:0")).group == "nccl"
    other = "cuda:0"
    assert exchange_on(Share(0, 2), torch.device("cuda:0")).group is None, "NCCL refuses two processes on one GPU"
    assert exchange_on(Share(0, 2), CPU).group is None
    assert asked == ["nccl"]


def test_owners_have_about_as_much_each() -> None:
    weights = {name: torch.zeros(size) for name, size in (("a", 5), ("b", 9), ("c", 4), ("d", 1), ("e", 3))}
    assert Exchange(Share(0, 2)).owners(weights) == {"b": 0, "a": 1, "c": 1, "e": 0, "d": 1}
    assert Exchange(Share(1, 2)).owners(weights) == Exchange(Share(0, 2)).owners(weights)
    assert set(ALONE.owners(weights).values()) == {0}


def _exchanged(rank: int, port: int, results: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    exchange = exchange_on(Share(rank, 2), CPU)
    sums = [torch.full((2, 3), rank + 1.0), torch.tensor(10.0 * rank), torch.tensor([0.1, 0.2]) * (rank + 1)]
    exchange.add_up(sums)
    weights = {"a": torch.full((2, 2), 1.0 + rank), "b": torch.full((3,), 5.0 + rank), "c": torch.tensor([7.0 + rank])}
    owners = exchange.owners(weights)
    own = {name: weight * 10 for name, weight in weights.items() if owners[name] == rank}
    collected = exchange.collected(own, weights, owners)
    exchange.hand_out(weights, owners)
    handed = {name: weight.tolist() for name, weight in weights.items()}
    gathered = exchange.gathered([torch.tensor([rank + 0.5] if rank == 0 else [7.0])], 2)
    found = [each.tolist() for each in sums], handed, gathered.tolist(), exchange.agreed(f"of {rank}")
    results.put((rank, found, {name: tensor.tolist() for name, tensor in collected.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_same_sums_and_weights_and_the_first_ones_decisions() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_exchanged, (port, results), nprocs=2)
    (_, first, collected), (_, second, nothing) = sorted([results.get(), results.get()], key=lambda each: each[0])
    assert first == second
    sums, handed, gathered, said = first
    assert sums[:2] == [[[3.0] * 3] * 2, 10.0] and sums[2] == pytest.approx([0.3, 0.6])
    assert handed == {"a": [[1.0] * 2] * 2, "b": [6.0] * 3, "c": [8.0]}, "a is the first process's, the others not"
    assert collected == {"a": [[10.0] * 2] * 2, "b": [60.0] * 3, "c": [80.0]} and nothing == {}
    assert gathered == [0.5, 7.0] and said == "of 0"


# the loop in several processes


def regression(exchange: Exchange, course: Course, spoilt: int | None = None) -> tuple[Trained, dict[str, Tensor]]:
    """Fit a linear map to 40 points; states from `spoilt` on have no finite loss."""
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(40, 5, generator=generator), torch.randn(5, 3, generator=generator)
    weights = {"map": torch.zeros(5, 3).requires_grad_(), "bias": torch.zeros(3).requires_grad_()}

    def errors(rows: Tensor) -> Tensor:
        found = (x[rows] @ weights["map"] + weights["bias"] - x[rows] @ true).square().sum(dim=1)
        return found if spoilt is None else torch.where(rows >= spoilt, found * math.nan, found)

    def judge() -> float:
        with torch.no_grad():
            own = [errors(rows) for rows in exchange.parts(torch.arange(30, 40), 4)]
        return float(exchange.gathered(own, 10).mean()) if spoilt is None else 1.0

    trained = train(weights, Objective(30, errors, judge), course, "fitting", Means(exchange=exchange))
    return trained, {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize(("world", "part"), [(2, 0), (3, 2)])
def test_processes_that_train_together_train_as_one_does(world: int, part: int) -> None:
    course = Course(steps=30, batch=8, rate=300.0, seed=3, checks=5)
    alone, expected = regression(ALONE, course)
    assert alone.after < 0.1 * alone.before
    found = in_threads(world, lambda exchange: regression(exchange, replace(course, part=part)))
    for trained, weights in found:
        assert [check.step for check in trained.checks] == [check.step for check in alone.checks]
        assert trained.after == pytest.approx(alone.after, rel=1e-3)
        assert [c.loss for c in trained.checks] == pytest.approx([c.loss for c in alone.checks], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
            assert torch.equal(weight, found[0][1][name]), "all have the same weights"


def test_each_process_keeps_the_optimizers_values_of_its_own_weights_alone() -> None:
    weights = {"a": torch.ones(6), "b": torch.ones(5), "c": torch.ones(3)}

    def work(exchange: Exchange) -> tuple[set[str], int]:
        own = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        objective = Objective(4, lambda rows: sum(w.sum() for w in own.values()).expand(len(rows)), lambda: 1.0)  # type: ignore[union-attr]
        run = _Run(own, objective, Course(steps=1, batch=4, checks=1), Means(exchange=exchange), 1.0, USUAL)
        assert run.advance()
        return set(run.steps.moments()["first"]), len(run.averaged) + len(run.best)

    assert in_threads(2, work) == [({"a"}, 2), ({"b", "c"}, 4)]
    assert in_threads(4, work)[3] == (set(), 0), "more processes than weights"


def test_one_step_is_that_of_one_process_up_to_rounding() -> None:
    course = Course(steps=1, batch=7, rate=300.0, checks=1)
    alone, expected = regression(ALONE, course)
    for trained, weights in in_threads(2, lambda exchange: regression(exchange, course)):
        assert trained.checks[0].loss == pytest.approx(alone.checks[0].loss, rel=1e-6)
        torch.testing.assert_close(weights["map"], expected["map"], rtol=1e-6, atol=1e-7)


def test_a_batch_smaller_than_the_processes_leaves_some_without_rows() -> None:
    course = Course(steps=4, batch=1, rate=300.0, checks=1)
    alone, _ = regression(ALONE, course)
    for trained, _ in in_threads(3, lambda exchange: regression(exchange, course)):
        assert trained.after == pytest.approx(alone.after, rel=1e-4)


def test_all_processes_end_where_one_of_them_meets_no_finite_loss() -> None:
    course = Course(steps=10, batch=2, checks=1)
    alone, _ = regression(ALONE, course, spoilt=12)
    for trained, _ in in_threads(2, lambda exchange: regression(exchange, course, spoilt=12)):
        assert trained.checks == alone.checks == () and trained.after == trained.before


def test_a_process_that_runs_out_of_memory_takes_smaller_parts_and_the_others_do_not() -> None:
    course = Course(steps=3, batch=8, rate=300.0, checks=1)
    said: list[tuple[int, str]] = []

    def work(exchange: Exchange) -> tuple[Trained, Tensor]:
        weight, rank = torch.zeros(5, 3).requires_grad_(), exchange.share.rank

        def losses(rows: Tensor) -> Tensor:
            if rank == 1 and len(rows) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return (weight - rows.float().reshape(-1, 1, 1)).square().sum(dim=(1, 2))

        means = Means(note=lambda text: said.append((rank, text)), exchange=exchange)
        return train(
            {"w": weight}, Objective(20, losses, lambda: float(weight.detach().sum())), course, "fitting", means
        ), weight.detach()

    first, second = in_threads(2, work)
    assert torch.equal(first[1], second[1])
    assert [rank for rank, _ in said] == [1] and "going on with 2" in said[0][1]


def test_decisions_are_the_first_processes() -> None:
    """Errors that rounding makes unequal would let one process keep what another drops."""
    course = Course(steps=6, batch=4, rate=300.0, checks=3)

    def work(exchange: Exchange) -> tuple[Trained, Tensor]:
        weight = torch.zeros(1).requires_grad_()
        errors = iter([5.0, 4.0, 3.0, 2.0] if exchange.share.first else [5.0, 6.0, 7.0, 8.0])
        objective = Objective(9, lambda rows: (weight - 1).square().expand(len(rows)), lambda: next(errors))
        return train({"w": weight}, objective, course, "fitting", Means(exchange=exchange)), weight.detach()

    first, second = in_threads(2, work)
    assert first[0].after == second[0].after == 2.0 and torch.equal(first[1], second[1])


def test_all_processes_go_on_where_the_first_one_has_stopped(tmp_path: Path) -> None:
    course = Course(steps=10, batch=4, rate=300.0, checks=5)

    def work(exchange: Exchange, broken_at: int | None = None) -> tuple[Trained, Tensor]:
        folder = WorkFolder(tmp_path, "key", lambda _: None)
        followed = folder if exchange.share.first else FollowedFolder(tmp_path, "key", lambda _: None)
        weight, calls = torch.zeros(4).requires_grad_(), [0]

        def losses(rows: Tensor) -> Tensor:
            calls[0] += 1
            if calls[0] == broken_at:
                raise KeyboardInterrupt
            return (weight - rows.float().unsqueeze(1)).square().sum(dim=1)

        def judge() -> float:
            return float((weight.detach() - 6).square().sum())

        objective, means = Objective(12, losses, judge), Means(followed, exchange=exchange)
        return train({"w": weight}, objective, course, "fitting", means), weight.detach()

    straight = in_threads(2, work)
    for piece in tmp_path.glob("*.safetensors"):
        piece.unlink()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ditmoe_cli.files.pacing.Pace.is_due", True)
        with pytest.raises((KeyboardInterrupt, threading.BrokenBarrierError)):
            in_threads(2, lambda exchange: work(exchange, broken_at=8))
        assert [piece.name for piece in tmp_path.glob("*.safetensors")] == ["training.safetensors"]
    again = in_threads(2, work)
    assert all(torch.equal(each[1], straight[0][1]) for each in again)
    assert again[0][0] == straight[0][0]


def test_work_that_one_process_cannot_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe_cli.files.pacing.Pace.is_due", True)

    def work(exchange: Exchange, elsewhere: Path) -> tuple[Trained, Tensor]:
        place = WorkFolder(tmp_path, "k", str) if exchange.share.first else FollowedFolder(elsewhere, "k", str)
        weight = torch.zeros(1).requires_grad_()
        objective = Objective(4, lambda rows: (weight - 1).square().expand(len(rows)), lambda: 1.0)
        course = Course(steps=2, batch=2, checks=2)
        return train({"w": weight}, objective, course, "fitting", Means(place, exchange=exchange)), weight.detach()

    in_threads(2, lambda exchange: work(exchange, tmp_path))
    in_threads(2, lambda exchange: work(exchange, tmp_path))
    with pytest.raises((DitmoeError, threading.BrokenBarrierError), match=r"not to be seen|^$"):
        in_threads(2, lambda exchange: work(exchange, tmp_path / "elsewhere"))
