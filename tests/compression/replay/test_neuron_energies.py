"""CAMERA energies of neurons: against a slow count, in parts, and of experts that no token chose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressing import calibrated, measure_few_tokens, network, opened, profile_of
from conftest import make_pico
from rounding import states_for

from ditmoe_cli.compression.replay.neuron_energies import block_energies, measured_energies
from ditmoe_cli.files.names import SHARED, in_block, split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Attended
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.profile import RoutingProfile

TOKENS = 512
Given = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, widths=((96, 64, 100), (64, 160, 40)))
    checkpoint = opened(pico, tmp_path_factory.mktemp("energies"))
    return checkpoint, profile_of(checkpoint, images=8)


def test_energies_are_those_of_a_count(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ_h E[γ_h²] W_hi² (0.1 Σ a² + 0.9 max a²), a token and a slot at a time."""
    measure_few_tokens(monkeypatch, TOKENS)
    checkpoint, profile = given
    model = network(checkpoint)
    states, _ = states_for(checkpoint, profile, TOKENS)
    null = torch.full_like(states.labels, model.config.num_classes)
    events: list[MoEEvent] = []
    with torch.no_grad():
        model(
            *(torch.cat([part] * 2) for part in (states.z, states.t)), torch.cat([states.labels, null]), events.append
        )
        measured = measured_energies(calibrated(checkpoint, profile))
        for b, event in enumerate(events):
            gamma = event.gamma.double().square().mean(dim=0)
            moe = model.blocks[b].moe
            assert set(measured[b]) == {in_block(b, f"moe.experts.{e}") for e in range(3)} | {in_block(b, SHARED)}
            for name, energy in measured[b].items():
                e = split_name(f"{name}.x").expert
                expert = moe.shared_experts if e is None else moe.experts[e]
                phi = expert.neurons(event.inputs).double()
                chosen = torch.ones(len(phi), 1)
                if e is not None:
                    chosen = (event.routing.weights * (event.routing.experts == e)).sum(dim=1, keepdim=True)
                squares = (phi * chosen).square()
                reach = (expert.down_proj.weight.double().square() * gamma[:, None]).sum(dim=0)
                expected = reach * (0.1 * squares.sum(dim=0) + 0.9 * squares.amax(dim=0))
                assert torch.allclose(energy, expected, rtol=1e-3), name


def test_parts_of_the_images_add_up(given: Given) -> None:
    block = network(given[0]).blocks[0]
    generator = torch.Generator().manual_seed(3)
    residual, inputs = (torch.randn(6, 4, 32, generator=generator) for _ in range(2))
    gamma = torch.randn(6, 32, generator=generator)
    whole = block_energies(block, [Attended(residual, inputs, gamma)])
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = block_energies(block, [Attended(residual[r], inputs[r], gamma[r]) for r in rows])
    assert all(torch.allclose(parts[name], whole[name], rtol=1e-4) for name in whole)


def test_an_expert_that_no_token_chose_has_no_energy(tmp_path: Path) -> None:
    pico = make_pico(hidden=32, input_size=4, expert_of=((0, 1, 0), (1, 1, 0)), widths=((64,) * 2,) * 2)
    block = network(opened(pico, tmp_path)).blocks[0]
    block.moe.gate.expert_of = torch.zeros(3, dtype=torch.int32)
    inputs = torch.randn(2, 4, 32)
    energies = block_energies(block, [Attended(inputs, inputs, torch.ones(2, 32))])
    assert float(energies["moe.experts.1"].abs().max()) == 0 < float(energies["moe.experts.0"].min())
