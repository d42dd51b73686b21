"""Counters and moments against sums taken token by token over the recorded events."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pico
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.step_bins import step_bin
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.collector import PURPOSE, collect
from ditmoe_cli.routing.collect.moments import PAIR_SUMS
from ditmoe_cli.routing.measures import alignment, unbiased_hsic

BINS = 2
CASES = {
    "one branch": ({"sampler": "rf", "in_channels": 1}, 1.0, "euler"),
    "guided": ({"sampler": "ddpm", "in_channels": 4}, 2.5, "ddim"),
    "uneven top-3": ({"sampler": "rf", "in_channels": 1, "top_k": 3, "widths": ((8, 24, 16), (8,) * 5)}, 2.0, "euler"),
}


@dataclass
class Run:
    """A calibration run's tensors, and the events that an independent pass over the same images recorded."""

    model: DiTMoE
    spec: SampleSpec
    tensors: dict[str, Tensor]
    steps: list[list[MoEEvent]]

    @property
    def branches(self) -> int:
        return 1 if self.spec.cfg == 1.0 else 2

    def tokens(self) -> Iterator[tuple[int, int, int, int, int, int, int]]:
        """Yield (step, block, branch, bin, image, position, row in the event) of every token."""
        patches = self.model.config.num_patches
        for step, events in enumerate(self.steps):
            for event in events:
                for row in range(len(event.inputs)):
                    image = row // patches
                    branch, image = divmod(image, self.spec.images)
                    b = step_bin(step, self.spec.steps, BINS)
                    yield step, event.block, branch, b, image, row % patches, row


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, pico: Callable[..., Pico]) -> Run:
    options, cfg, solver = CASES[request.param]
    model = pico(**options, input_size=4).model()
    spec = SampleSpec(3, 4, cfg, 5, solver, (0, 1))
    steps: list[list[MoEEvent]] = []
    with torch.inference_mode():
        watchers = Watchers(lambda event: steps[-1].append(event), lambda *_: steps.append([]))
        sample_batch(model, spec, range(3), watchers, PURPOSE)
    return Run(model, spec, collect(model, Calibration(spec, BINS, 48, 3)), steps)


def zeros(run: Run, *shape: int) -> Tensor:
    return torch.zeros(run.model.config.depth, 2, BINS, *shape, dtype=torch.float64)


def test_sums_over_selected_experts(run: Run) -> None:
    experts = run.model.config.num_experts
    names = ("gate_mass", "gate_square", "norm", "norm_square", "gate_norm", "gate_square_norm_square")
    expected: dict[str, Any] = {name: zeros(run, experts) for name in (*names, "raw_norm", "raw_gate_norm", "norm_max")}
    patches = run.model.config.num_patches
    for step, block, branch, b, _, _, row in run.tokens():
        event = run.steps[step][block]
        gamma = event.gamma[row // patches].double()
        for slot, e in enumerate(event.routing.experts[row].tolist()):
            g, f = float(event.routing.weights[row, slot]), event.outputs[row, slot].double()
            after, before = float((gamma * f).norm()), float(f.norm())
            values = (g, g * g, after, after**2, g * after, (g * after) ** 2)
            for name, value in zip(names, values, strict=True):
                expected[name][block, branch, b, e] += value
            expected["raw_norm"][block, branch, b, e] += before
            expected["raw_gate_norm"][block, branch, b, e] += g * before
            cell = expected["norm_max"][block, branch, b]
            cell[e] = max(float(cell[e]), after)
    for name, value in expected.items():
        assert_close(run.tensors[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_counts_pairs_and_transitions(run: Run) -> None:
    config = run.model.config
    experts = config.num_experts
    pairs, steps_back = zeros(run, experts, experts), zeros(run, experts, experts)
    across, beside = zeros(run, experts, experts)[:, 0], zeros(run, experts, experts)
    side, uncond = math.isqrt(config.num_patches), run.spec.images * config.num_patches
    up = torch.zeros(config.depth - 1, 2, BINS, experts, experts, dtype=torch.float64)
    per_step = torch.zeros(run.spec.images, config.depth, 2, BINS, experts)
    per_position = torch.zeros(run.spec.images, config.depth, 2, config.num_patches, experts)
    for step, block, branch, b, image, position, row in run.tokens():
        chosen = run.steps[step][block].routing.experts[row].tolist()
        for e in chosen:
            per_step[image, block, branch, b, e] += 1
            per_position[image, block, branch, position, e] += 1
            for other in chosen:
                pairs[block, branch, b, e, other] += 1
            if run.branches == 2 and branch == 0:
                for other in run.steps[step][block].routing.experts[row + uncond].tolist():
                    across[block, b, e, other] += 1
            neighbours = [row + 1] * (position % side + 1 < side) + [row + side] * (position + side < side**2)
            for neighbour in neighbours:
                for other in run.steps[step][block].routing.experts[neighbour].tolist():
                    beside[block, branch, b, e, other] += 1
            for below in run.steps[step][block - 1].routing.experts[row].tolist() if block else ():
                up[block - 1, branch, b, below, e] += 1
            for before in run.steps[step - 1][block].routing.experts[row].tolist() if step else ():
                steps_back[block, branch, b, before, e] += 1
    tensors = run.tensors
    assert torch.equal(tensors["coactivation"].double(), pairs)
    assert torch.equal(tensors["transitions.block"].double(), up)
    assert torch.equal(tensors["transitions.step"].double(), steps_back)
    assert torch.equal(tensors["transitions.branch"].double(), across)
    assert torch.equal(tensors["transitions.neighbour"].double(), beside)
    assert torch.equal(tensors["image.steps"].float(), per_step)
    assert torch.equal(tensors["image.positions"].float(), per_position)
    assert torch.equal(tensors["selected"], tensors["coactivation"].diagonal(dim1=-2, dim2=-1))


def test_router_sums(run: Run) -> None:
    expected = {name: zeros(run) for name in ("entropy", "margin", "topk_mass", "logsumexp_square")}
    rows = max(block.router_rows for block in run.model.config.blocks)
    gram, total = zeros(run, rows, rows), zeros(run, rows)
    for step, block, branch, b, _, _, row in run.tokens():
        event = run.steps[step][block]
        weight = run.model.blocks[block].moe.gate.weight.double()
        logits = weight @ event.inputs[row].double()
        p = logits.softmax(0).sort(descending=True).values
        k = event.routing.experts.shape[1]
        expected["entropy"][block, branch, b] -= float((p * p.log()).sum())
        expected["margin"][block, branch, b] += float(p[k - 1] - (p[k] if len(p) > k else 0))
        expected["topk_mass"][block, branch, b] += float(p[:k].sum())
        expected["logsumexp_square"][block, branch, b] += float(logits.logsumexp(0) ** 2)
        n = len(logits)
        gram[block, branch, b, :n, :n] += torch.outer(logits, logits)
        total[block, branch, b, :n] += logits
    for name, value in expected.items():
        assert_close(run.tensors[f"router.{name}"], value, rtol=1e-5, atol=1e-5)
    assert_close(run.tensors["router.logit_gram"], gram, rtol=1e-5, atol=1e-4)
    assert_close(run.tensors["router.logit_sum"], total, rtol=1e-5, atol=1e-4)


def test_moments_of_outputs_inputs_and_gamma(run: Run) -> None:
    config = run.model.config
    experts, width = config.num_experts, config.hidden_size
    easy, gram = zeros(run, experts), zeros(run, experts, experts)
    sums, weighted = zeros(run, experts, width), zeros(run, experts, width)
    pairs = {name: zeros(run, experts, experts) for name in PAIR_SUMS}
    largest = torch.zeros(config.depth, experts, width, dtype=torch.float64)
    squares = torch.zeros_like(largest)
    for step, block, branch, b, _, _, row in run.tokens():
        event = run.steps[step][block]
        gamma, u = event.gamma[row // config.num_patches].double(), event.inputs[row].double()
        weights, chosen = event.routing.weights[row].double(), event.routing.experts[row].tolist()
        assert event.residual is not None
        x = event.residual.reshape(-1, width)[row].double()
        reaching = gamma * weights[:, None] * event.outputs[row].double()
        after = x + reaching.sum(0)
        turned = max(1 - float(x @ after / (x.norm() * after.norm())), 0.0)
        for i, e in enumerate(chosen):
            easy[block, branch, b, e] += float(reaching[i].norm()) * turned
            sums[block, branch, b, e] += event.outputs[row, i].double()
            weighted[block, branch, b, e] += weights[i] ** 2 * event.outputs[row, i].double()
            largest[block, e] = torch.maximum(largest[block, e], u.abs())
            squares[block, e] += u**2
            for j, other in enumerate(chosen):
                gram[block, branch, b, e, other] += reaching[i] @ reaching[j]
                f, h = event.outputs[row, i].double(), event.outputs[row, j].double()
                ratio = weights[i] / (weights[i] + weights[j])
                values = (f @ h, f @ h / (f.norm() * h.norm()), ratio, ratio**2)
                for name, value in zip(PAIR_SUMS, values, strict=True):
                    pairs[name][block, branch, b, e, other] += value
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert_close(run.tensors["easy_ep"], easy, **close)
    assert_close(run.tensors["output.gram"], gram, **close)
    for name, expected in pairs.items():
        assert_close(run.tensors[name], expected, **close)
    assert_close(run.tensors["output.sum"].double(), sums, **close)
    assert_close(run.tensors["output.gate_square_sum"].double(), weighted, **close)
    assert_close(run.tensors["input.max"].double(), largest, **close)
    assert_close(run.tensors["input.square"].double(), squares, **close)
    gammas = zeros(run, width)
    for step, events in enumerate(run.steps):
        for event in events:
            per_branch = event.gamma.double().reshape(run.branches, -1, width).sum(1)
            gammas[event.block, : run.branches, step_bin(step, run.spec.steps, BINS)] += per_branch
    assert_close(run.tensors["gamma.sum"].double(), gammas, **close)
    assert run.tensors["gamma.images"].sum() == run.spec.images * run.spec.steps * run.branches


def test_neuron_energies(run: Run) -> None:
    config = run.model.config
    widest = max(max(block.expert_widths) for block in config.blocks)
    energy = torch.zeros(config.depth, config.num_experts, widest, dtype=torch.float64)
    largest = torch.zeros_like(energy)
    for step, block, *_, row in run.tokens():
        event = run.steps[step][block]
        for slot, e in enumerate(event.routing.experts[row].tolist()):
            phi = run.model.blocks[block].moe.experts[e].neurons(event.inputs[row]).double()
            squared = (float(event.routing.weights[row, slot]) * phi) ** 2
            energy[block, e, : len(phi)] += squared
            largest[block, e, : len(phi)] = torch.maximum(largest[block, e, : len(phi)], squared)
    assert_close(run.tensors["neuron.energy"].double(), energy, rtol=1e-4, atol=1e-6)
    assert_close(run.tensors["neuron.max"].double(), largest, rtol=1e-4, atol=1e-6)


def test_means_over_all_reservoir_tokens(run: Run) -> None:
    tensors, config = run.tensors, run.model.config
    bins = tensors["states.bin"][tensors["reservoir.state"].long()]
    for block in range(config.depth):
        for e, expert in enumerate(run.model.blocks[block].moe.experts):
            outputs = expert(tensors["reservoir.inputs"][block].float())
            for branch in range(run.branches):
                for b in range(BINS):
                    mine = outputs[(bins == b) & (tensors["reservoir.branch"] == branch)]
                    found = tensors["output.all_token_mean"][block, branch, b, e]
                    assert_close(found, mine.mean(0), rtol=1e-4, atol=1e-5)


def test_alignment_of_outputs_on_the_same_tokens(run: Run) -> None:
    for block in range(run.model.config.depth):
        experts = run.model.blocks[block].moe.experts
        inputs = run.tensors["reservoir.inputs"][block].float()
        with torch.inference_mode():
            outputs = [expert(inputs).double().numpy() for expert in experts]
        expected = alignment(unbiased_hsic(np.stack([x @ x.T for x in outputs])))
        found = run.tensors["output.cka"][block]
        assert_close(found[: len(experts), : len(experts)].double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
        assert not found[len(experts) :].any()


def test_fast_keeps_the_same_counters_and_nothing_else(run: Run) -> None:
    fast = collect(run.model, Calibration(run.spec, BINS, 48, 3, fast=True))
    assert {name for name in run.tensors if name not in fast} == {
        *PAIR_SUMS,
        *("easy_ep", "output.gram", "output.sum", "output.gate_square_sum", "output.all_token_mean", "output.cka"),
        *("input.max", "input.square", "gamma.sum", "gamma.square", "gamma.images", "neuron.energy", "neuron.max"),
        *(name for name in run.tensors if name.startswith(("states.", "reservoir."))),
    }
    assert all(torch.equal(value, run.tensors[name]) for name, value in fast.items())
