"""What compression adds to a mixture, against it written naively: constants, linear maps, residuals, the mass mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.moe import MoEEvent, SparseMoE
from ditmoe_cli.model.router import Router, Routing
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.collector import PURPOSE, collect

HIDDEN = 16
MAP = ((0, -2, 1, -3, -1), (-3, 1, -1, 0, -2))  # two experts, two constants and a ghost
WIDTHS = ((24, 8), (16, 24))


def extended(top_k: int = 2, experts_of: tuple[tuple[int, ...], ...] = MAP, **extras: object) -> Pico:
    return make_pico(hidden=HIDDEN, input_size=4, widths=WIDTHS, expert_of=experts_of, top_k=top_k, extras=extras)


class Naive(nn.Module):
    """A block's mixture in float64, token by token and slot by slot."""

    def __init__(self, pico: Pico, block: int) -> None:
        super().__init__()
        prefix = f"blocks.{block}.moe."
        self.tensors = {n.removeprefix(prefix): t.double() for n, t in pico.state.items() if n.startswith(prefix)}
        self.top_k, self.mass = pico.config.top_k, pico.config.blocks[block].mass
        self.selects = pico.state[f"{prefix}gate.expert_of"].tolist()
        self.block, self.reached = block, set()

    def swiglu(self, stem: str, u: Tensor) -> Tensor:
        gate, up, down = (self.tensors[f"{stem}.{m}_proj.weight"] for m in ("gate", "up", "down"))
        hidden = gate @ u
        return down @ (hidden * torch.sigmoid(hidden) * (up @ u))

    def selected(self, row: int, u: Tensor) -> Tensor:
        """What a row selects makes of a token."""
        self.reached.add(self.selects[row])
        if self.selects[row] >= 0:
            return self.swiglu(f"experts.{self.selects[row]}", u)
        j = -2 - self.selects[row]
        found = self.tensors["constants"][j]
        if "constants_up" in self.tensors:
            found = found + self.tensors["constants_up"][j] @ (self.tensors["constants_down"][j] @ u)
        return found

    def gates(self, u: Tensor) -> dict[int, float]:
        """The routing weight of each selected row."""
        odds = [float(logit.exp()) for logit in self.tensors["gate.weight"] @ u]
        p = [odd / sum(odds) for odd in odds]
        rows = sorted((r for r, select in enumerate(self.selects) if select != -1), key=lambda r: -p[r])[: self.top_k]
        wanted = sum(sorted(p)[-self.top_k :]) if self.mass else sum(p[r] for r in rows)
        return {r: p[r] * wanted / sum(p[s] for s in rows) for r in rows}

    def one(self, u: Tensor) -> Tensor:
        gates = self.gates(u)
        out = self.swiglu("shared_experts", u) + sum(g * self.selected(row, u) for row, g in gates.items())
        missing = 1 - sum(gates.values())
        if "residual_constant" in self.tensors:
            out = out + missing * self.tensors["residual_constant"]
        if "residual_linear" in self.tensors:
            out = out + missing * (self.tensors["residual_linear"] @ u)
        return out

    def forward(self, u: Tensor, *_: object) -> Tensor:
        mixed = torch.stack([self.one(token) for token in u.reshape(-1, u.shape[-1]).double()])
        return mixed.reshape(u.shape).to(u.dtype)


CASES = {
    "constants": extended(constants=2),
    "top-1": extended(top_k=1, constants=2),
    "everything is selected": extended(top_k=4, constants=2),
    "linear maps": extended(constants=2, rank=3),
    "residual constant": extended(constants=2, residual_constant=True),
    "residual linear": extended(constants=2, residual_linear=True),
    "mass": extended(constants=2, mass=True),
    "mass of ghosts alone": extended(experts_of=((0, -1, 1, -1), (-1, 1, -1, 0)), mass=True),
    "all of it": extended(constants=2, rank=2, residual_constant=True, residual_linear=True, mass=True),
}
both = pytest.mark.parametrize("case", CASES)


def inputs(pico: Pico) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, pico.config.in_channels, 4, 4, generator=torch.Generator().manual_seed(2))
    return x, torch.linspace(10, 900, 4), torch.tensor([0, 1, 2, 3])


@both
def test_a_model_equals_the_mixture_written_out(case: str) -> None:
    pico = CASES[case]
    naive = pico.model()
    for i, block in enumerate(naive.blocks):
        block.moe = Naive(pico, i)
    x, t, y = inputs(pico)
    assert_close(pico.model()(x, t, y), naive(x, t, y), rtol=1e-4, atol=1e-5)
    reached = set().union(*(block.moe.reached for block in naive.blocks))
    assert reached == {select for select in pico.state["blocks.0.moe.gate.expert_of"].tolist() if select != -1}


@both
def test_every_part_counts(case: str) -> None:
    """Without a tensor's values, or without the mode, the output is another."""
    pico = CASES[case]
    x, t, y = inputs(pico)
    expected = pico.model()(x, t, y)
    for name in pico.state:
        if any(part in name for part in ("constants", "residual")):
            changed = Pico(pico.config, {**pico.state, name: torch.zeros_like(pico.state[name])})
            assert (changed.model()(x, t, y) - expected).abs().max() > 1e-3, name
    if pico.config.blocks[0].mass:
        model = pico.model()
        for block in model.blocks:
            block.moe.gate.mass = False
        assert (model(x, t, y) - expected).abs().max() > 1e-3


@both
def test_a_file_brings_back_the_same_model(case: str, tmp_path: Path) -> None:
    pico = CASES[case]
    checkpoint = open_checkpoint(pico.save(tmp_path / "a.safetensors"))
    assert checkpoint.config == pico.config
    assert checkpoint.expert_map(1) == tuple(pico.state["blocks.1.moe.gate.expert_of"].tolist())
    loaded = build_model(checkpoint, torch.device("cpu"))
    torch.testing.assert_close(loaded(*inputs(pico)), pico.model()(*inputs(pico)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", [-4, 2])
def test_a_row_that_selects_no_constant_and_no_expert_is_refused(select: int, tmp_path: Path) -> None:
    pico = extended(experts_of=((0, 1, -2, -3, select), (0, 1, -2, -3, -1)), constants=2)
    with pytest.raises(BadInputError, match=rf"expert_of' holds {select}.*2 experts and 2 constants of block 0"):
        open_checkpoint(pico.save(tmp_path / "a.safetensors"))


@given(rows=st.integers(2, 8), seed=st.integers(0, 99), data=st.data())
def test_mass_is_that_of_the_full_top_k(rows: int, seed: int, data: st.DataObject) -> None:
    ghosts = data.draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    top_k = data.draw(st.integers(1, rows - len(ghosts)))
    selects = torch.tensor([-1 if row in ghosts else row for row in range(rows)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed)
    weight, u = torch.randn(rows, 6, generator=generator), torch.randn(30, 6, generator=generator)

    def routed(mass: bool, expert_of: Tensor | None) -> Routing:
        router = Router(6, BlockConfig(rows, (), 0, expert_of is not None, mass=mass), top_k).requires_grad_(False)
        router.weight.copy_(weight)
        router.expert_of = expert_of
        routing: Routing = router(u)
        return routing

    full, ghosted, massive = routed(False, None), routed(False, selects), routed(True, selects)
    assert torch.equal(massive.rows, ghosted.rows)
    assert_close(massive.weights.sum(dim=1), full.weights.sum(dim=1))
    assert_close(massive.weights / massive.weights[:, :1], ghosted.weights / ghosted.weights[:, :1])
    untouched = ~torch.isin(full.rows, torch.tensor(sorted(ghosts), dtype=torch.int64)).any(dim=1)
    assert_close(massive.weights[untouched], full.weights[untouched])


def test_neurons_of_constants_are_not_watched() -> None:
    moe = CASES["linear maps"].model().blocks[0].moe
    assert isinstance(moe, SparseMoE)

    class Watcher:
        def __init__(self) -> None:
            self.events: list[MoEEvent] = []
            self.shown: dict[int, Tensor] = {}

        def neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
            assert block == 7 and len(weights) == len(activations)
            self.shown[expert] = weights

        def __call__(self, event: MoEEvent) -> None:
            self.events.append(event)

    watcher, u = Watcher(), torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(1))
    moe(u, 7, torch.ones(2, HIDDEN), watcher)
    routing = watcher.events[0].routing
    assert set(routing.experts.flatten().tolist()) == {0, 1, -2, -3}
    for expert in (0, 1):
        assert_close(watcher.shown[expert].sort().values, routing.weights[routing.experts == expert].sort().values)
    assert set(watcher.shown) == {0, 1}


SPEC = SampleSpec(images=3, steps=3, cfg=1.5, seed=4, solver="ddim", classes=(0, 1))


@pytest.mark.parametrize("fast", [False, True])
def test_profiling_counts_no_expert_where_a_slot_went_to_a_constant(fast: bool) -> None:
    pico = CASES["linear maps"]
    constants = torch.zeros(pico.config.depth)
    slots = torch.zeros(pico.config.depth)

    def count(event: MoEEvent) -> None:
        slots[event.block] += event.routing.experts.numel()
        constants[event.block] += (event.routing.experts < 0).sum()

    found = collect(pico.model(), Calibration(SPEC, 3, 100, 2, fast=fast))
    sample_batch(pico.model(), SPEC, range(3), Watchers(count), PURPOSE)
    assert (constants > 0).all() and (constants < slots).all()
    assert found["selected"].shape[-1] == 2
    assert torch.equal(found["selected"].sum(dim=(1, 2, 3)).float(), slots - constants)
    assert torch.equal(found["counts"].sum(dim=3), found["selected"])
    assert torch.equal(found["coactivation"].diagonal(dim1=-2, dim2=-1), found["selected"])
    # the mass of slots that went to constants is no expert's
    assert (found["gate_mass"].sum(dim=-1) < found["router.topk_mass"]).all()
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())


def test_constants_that_no_row_selects_change_no_profile() -> None:
    selects = ((0, -1, 1), (1, 0, -1))
    ghosts = make_pico(hidden=HIDDEN, input_size=4, widths=WIDTHS, expert_of=selects)
    maps = {f"blocks.{b}.moe.gate.expert_of": torch.tensor(rows, dtype=torch.int32) for b, rows in enumerate(selects)}
    weight = {f"blocks.{b}.moe.constants": torch.ones(1, HIDDEN) for b in range(2)}
    held = make_pico(hidden=HIDDEN, input_size=4, widths=WIDTHS, expert_of=selects, extras={"constants": 1})
    held = Pico(held.config, {**ghosts.state, **maps, **weight})
    first, second = (collect(pico.model(), Calibration(SPEC, 3, 100, 2)) for pico in (ghosts, held))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
