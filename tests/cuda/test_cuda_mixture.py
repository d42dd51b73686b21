"""Routing, dispatch and the backends of mixtures on a GPU, without waiting for it; models kept a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from devices import TRIED_ON
from torch import Tensor

from ditmoe_cli.diffusion.automatic_dtype import measured_difference
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.loading import build_model, load_model
from ditmoe_cli.model.mixture_backends import BACKENDS, Dispatch, GroupedExperts, LoopedExperts, backend_for
from ditmoe_cli.model.offload import OffloadedDiTMoE

pytestmark = pytest.mark.cuda

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
BF16 = torch.bfloat16
TIMES = [800.0, 300.0]


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., DiTMoE]:
    """Return how to load a pico onto the device in a dtype."""

    def load(dtype: torch.dtype = torch.float32, **options: object) -> DiTMoE:
        path = make_pico(**{"hidden": 64, **options}).save(tmp_path / "a.safetensors", force=True)  # type: ignore[arg-type]
        return load_model(path, TRIED_ON, dtype)

    return load


def experts_of(model: DiTMoE) -> list[SwiGLU]:
    """The experts of the first block."""
    return list(model.blocks[0].moe.experts)


def selections(tokens: int, groups: str) -> Tensor:
    """The experts that tokens select, two each of four."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    if groups == "empty":
        chosen[chosen == 0] = 3
        chosen[chosen == 2] = 1
    if groups == "one":
        chosen[:] = 2
    if groups == "constants":
        chosen[::3, 1] = -2
    return chosen


@pytest.mark.parametrize("groups", ["uneven", "empty", "one", "constants"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 515])
def test_grouped_products_agree_with_the_loop(loaded: Callable[..., DiTMoE], tokens: int, groups: str) -> None:
    plain, experts = experts_of(loaded()), experts_of(loaded(BF16))
    chosen = selections(tokens, groups).to(TRIED_ON)
    dispatch, constants = Dispatch.of(chosen, 4), int((chosen < 0).sum())
    u = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(0)).to(TRIED_ON)
    with torch.inference_mode():
        looped, grouped = (
            kind.outputs(experts, u.to(BF16), dispatch, constants, None) for kind in (LoopedExperts(), GroupedExperts())
        )
        exact = torch.stack([plain[expert](u[token]) for expert, token in pairs(chosen, dispatch)])
    assert looped.shape == grouped.shape == exact.shape == (2 * tokens - constants, 64)
    for found in (looped, grouped):
        assert found.dtype == BF16
        assert (found.float() - exact).norm() <= 0.02 * exact.norm()


def pairs(chosen: Tensor, dispatch: Dispatch) -> list[tuple[int, int]]:
    """Expert and token of each slot that selects an expert, in the order of a dispatch."""
    slots = chosen.reshape(-1)
    return [(int(slots[place]), int(place) // 2) for place in dispatch.order if slots[place] >= 0]


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "grouped"), ({"widths": ((64, 72, 64, 64),) * 2}, "loop"), ({"widths": ((60,) * 4,) * 2}, "loop")],
    ids=["equal", "ragged", "unaligned"],
)
@needs_gpu
def test_backends_are_chosen_by_what_grouped_products_take(
    loaded: Callable[..., DiTMoE], options: dict[str, object], name: str
) -> None:
    expected, found = (evaluated(loaded(dtype, **options)) for dtype in (torch.float32, BF16))
    assert (found - expected).norm() <= 0.05 * expected.norm()
    experts = experts_of(loaded(BF16, **options))
    assert backend_for(experts, torch.zeros(4, 64, dtype=BF16, device="cuda")).name == name
    assert backend_for(experts, torch.zeros(4, 64, device="cuda")).name == "loop"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_neurons_are_shown_alike(loaded: Callable[..., DiTMoE], backend: GroupedExperts | LoopedExperts) -> None:
    experts, chosen = experts_of(loaded(BF16)), selections(30, "empty").to(TRIED_ON)
    u = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).to(TRIED_ON, BF16)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.inference_mode():
        backend.outputs(
            experts, u, Dispatch.of(chosen, 4), 0, lambda e, slots, phi: seen.__setitem__(e, (slots, phi.clone()))
        )
        assert sorted(seen) == [1, 3]
        for e, (slots, phi) in seen.items():
            assert (chosen.reshape(-1)[slots] == e).all()
            torch.testing.assert_close(phi, experts[e].neurons(u[slots // 2]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("groups", ["uneven", "empty", "one", "constants"])
def test_dispatches_are_those_of_the_cpu(groups: str) -> None:
    chosen = selections(100, groups)
    expected, found = Dispatch.of(chosen, 4), Dispatch.of(chosen.to(TRIED_ON), 4)
    for name in ("order", "tokens", "ends", "inverse"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name


@pytest.mark.parametrize("options", [{}, {"expert_of": ((0, 1, -1, 2), (0, 1, 2, -1)), "widths": ((128,) * 3,) * 2}])
@pytest.mark.parametrize("mass", [False, True])
def test_routers_choose_the_experts_that_the_cpu_chooses(
    tmp_path: Path, options: dict[str, object], mass: bool
) -> None:
    extras = {"mass": True} if mass and options else {}
    pico = make_pico(hidden=64, extras=extras, **options)  # type: ignore[arg-type]
    path = pico.save(tmp_path / "a.safetensors")
    u = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    expected, found = (load_model(path, device).blocks[0].moe.gate(u.to(device)) for device in ("cpu", TRIED_ON))
    assert torch.equal(found.experts.cpu(), expected.experts)
    torch.testing.assert_close(found.weights.cpu(), expected.weights, rtol=1e-4, atol=1e-6)


def evaluated(model: DiTMoE | OffloadedDiTMoE, images: int = 6) -> Tensor:
    """What a model predicts for noise, at two times."""
    x = torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(model.device)
    labels = (torch.arange(images) % 3).to(model.device)
    with torch.inference_mode():
        predict = model.prepared(TIMES, labels)
        return torch.stack([predict(x, t) for t in TIMES]).float().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_a_model_kept_a_block_at_a_time_predicts_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(make_pico(hidden=64).save(tmp_path / "a.safetensors"))
    device = torch.device(TRIED_ON)
    resident = evaluated(build_model(checkpoint, device, dtype))
    offloaded = evaluated(OffloadedDiTMoE(checkpoint, device, 6, 2, dtype=dtype, stored=dtype))
    torch.testing.assert_close(offloaded, resident, rtol=0.02 if dtype == BF16 else 1e-4, atol=1e-2)
    assert (offloaded - resident).norm() <= (0.02 if dtype == BF16 else 1e-5) * resident.norm()


def test_bf16_is_compared_with_fp32(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico(hidden=64).save(tmp_path / "a.safetensors"))
    assert 0 < measured_difference(checkpoint, TRIED_ON, "bf16") < 0.05  # states of random weights grow, and hide it


@needs_gpu
def test_an_evaluation_does_not_wait_for_the_device(loaded: Callable[..., DiTMoE]) -> None:
    model = loaded(BF16)
    x, labels = torch.randn(4, 4, 8, 8, device="cuda"), torch.tensor([0, 1, 2, 0], device="cuda")
    with torch.inference_mode():
        predict = model.prepared(TIMES, labels)
        for t in TIMES:  # kernels are made, modulations computed
            predict(x, t)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for t in TIMES:
                predict(x, t)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_block_at_a_time_takes_the_memory_of_a_block(tmp_path: Path) -> None:
    pico: Pico = make_pico(hidden=256, depth=8)
    checkpoint = open_checkpoint(pico.save(tmp_path / "a.safetensors"))
    block = sum(value.numel() * 4 for name, value in pico.state.items() if name.startswith("blocks.0."))
    evaluated(build_model(checkpoint, torch.device("cuda")))  # libraries take what they keep
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    evaluated(OffloadedDiTMoE(checkpoint, torch.device("cuda"), 6, 6))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 3 * block
