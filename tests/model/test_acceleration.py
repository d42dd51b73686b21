"""Compiled models and graphs give the plain model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli import load_model
from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats import products
from ditmoe_cli.model.acceleration import Acceleration, GraphedDiTMoE, accelerated
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.moe import MoEEvent

TIMES = [999.0, 500.0, 3.0]


def capture_by_running(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stand in for a CUDA graph: the same work on the same memory, run again by the host."""
    result = work()
    return lambda: result.copy_(work()), result


def test_replayed_evaluations_are_those_of_the_model(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    captures: list[int] = []

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        captures.append(1)
        return capture_by_running(work)

    graphed = GraphedDiTMoE(model, capture)
    assert (graphed.config, graphed.device) == (model.config, model.device)
    for seed, labels in ((0, [0, 1, 2, 3]), (1, [2, 2, 1, 0]), (2, [1, 0])):
        x = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        plain, replayed = (kind.prepared(TIMES, torch.tensor(labels)) for kind in (model, graphed))
        results = [(plain(x * t, t), replayed(x * t, t)) for t in TIMES]
        for expected, found in results:
            assert torch.equal(found, expected), "results of earlier steps are not overwritten either"
    assert len(captures) == 2, "one for each shape"


def test_observed_evaluations_are_not_replayed(pico: Callable[..., Pico]) -> None:
    model, seen = pico().model(), list[MoEEvent]()
    graphed = GraphedDiTMoE(model, lambda _: pytest.fail("captured"))
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    found = graphed.prepared(TIMES, labels)(x, 3.0, seen.append)
    assert torch.equal(found, model.prepared(TIMES, labels)(x, 3.0))
    assert len(seen) == model.config.depth


def test_a_graph_needs_a_gpu(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    with pytest.raises(UsageError, match="cuda_graphs: the model is on the cpu"):
        accelerated(model, Acceleration(graphs=True))
    assert accelerated(model, Acceleration()) is accelerated(model, Acceleration(graphs=False)) is model


def test_what_is_forgotten_is_captured_again(pico: Callable[..., Pico]) -> None:
    model, captures = pico().model(), []

    def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        captures.append(1)
        return capture_by_running(work)

    graphed, x, labels = GraphedDiTMoE(model, capture), torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    for _ in range(2):
        assert torch.equal(graphed.prepared(TIMES, labels)(x, 3.0), model.prepared(TIMES, labels)(x, 3.0))
        graphed.forget()
    assert len(captures) == 2


def test_a_machine_that_cannot_compile_says_so(pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: object) -> Callable[[Tensor], Tensor]:
        def call(_: Tensor) -> Tensor:
            raise RuntimeError("no C++ compiler found\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(
        UsageError, match=r"compile: torch cannot compile here \(no C\+\+ compiler found\); leave it out"
    ):
        accelerated(pico().model(), Acceleration(compiled=True))


def test_what_would_be_compiled_is_called_as_a_module(pico: Callable[..., Pico]) -> None:
    model, calls = pico().model(), []
    for block in model.blocks:
        for part in (block.attn, block.moe.shared_experts):
            part.register_forward_hook(lambda *_: calls.append(1))
    model.prepared(TIMES, torch.tensor([0, 1]))(torch.randn(2, 4, 8, 8), 3.0)
    assert len(calls) == 2 * model.config.depth


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [None, "int8"])
def test_a_compiled_model_is_the_model_within_rounding(
    tmp_path: Path, pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch, fmt: str | None
) -> None:
    monkeypatch.setattr(products, "LEAST_PACKED", 2**8)  # so that matrices are large enough for oneDNN
    path = pico().save(tmp_path / "a.safetensors")
    if fmt is not None:
        source, path = open_checkpoint(path), tmp_path / "b.safetensors"
        apply(source, plan_uniform(source, fmt), Output(path))
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    expected = load_model(path).prepared(TIMES, labels)(x, 3.0)
    compiled = accelerated(load_model(path), Acceleration(compiled=True))
    with torch.inference_mode():
        for _ in range(3):  # packed weights are kept from the second time on
            torch.testing.assert_close(compiled.prepared(TIMES, labels)(x, 3.0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_cuda_graphs_replay_to_the_last_bit(pico: Callable[..., Pico], tmp_path: Path) -> None:
    model = load_model(pico(hidden=64).save(tmp_path / "a.safetensors"), "cuda", torch.bfloat16)
    with torch.inference_mode():
        graphed = accelerated(model, Acceleration())
        assert isinstance(graphed, GraphedDiTMoE), "by default, where it can be"
        for seed in range(2):
            x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).cuda()
            labels = torch.tensor([0, seed, 2, 3]).cuda()
            plain, replayed = (kind.prepared(TIMES, labels) for kind in (model, graphed))
            for t in TIMES:
                assert torch.equal(replayed(x, t), plain(x, t))


@pytest.mark.cuda
def test_what_waits_for_the_device_cannot_be_captured(pico: Callable[..., Pico], tmp_path: Path) -> None:
    for number, (options, dtype) in enumerate(
        (({"hidden": 64}, torch.float32), ({"hidden": 64, "widths": ((8, 16, 8, 8),) * 2}, torch.bfloat16))
    ):
        model = load_model(pico(**options).save(tmp_path / f"{number}.safetensors"), "cuda", dtype)
        with pytest.raises(UsageError, match="block 0 cannot be captured"):
            accelerated(model, Acceleration(graphs=True))
        assert accelerated(model, Acceleration()) is model
