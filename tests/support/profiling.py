"""What the tests of routing share: a DiT-MoE written out naively, and a calibration counted token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch, visit_noised
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.collect.collector import PURPOSE


@dataclass(frozen=True)
class Mixture:
    """One block's mixture for a batch: tokens u (N, P, D), gate γ (N, D), probabilities (N, P, R)."""

    u: Tensor
    gamma: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Naive:
    """A pico model in float64, by its formulas."""

    pico: Pico

    def weight(self, name: str) -> Tensor:
        return self.pico.state[name].double()

    def linear(self, stem: str, x: Tensor) -> Tensor:
        return x @ self.weight(f"{stem}.weight").T + self.weight(f"{stem}.bias")

    def expert(self, stem: str, u: Tensor) -> Tensor:
        gate, up, down = (self.weight(f"{stem}.{m}_proj.weight") for m in ("gate", "up", "down"))
        hidden = u @ gate.T
        return (hidden * torch.sigmoid(hidden) * (u @ up.T)) @ down.T

    def expert_of(self, block: int) -> list[int]:
        name = f"blocks.{block}.moe.gate.expert_of"
        rows = len(self.pico.state[f"blocks.{block}.moe.gate.weight"])
        return self.pico.state[name].tolist() if name in self.pico.state else list(range(rows))

    def norm(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def conditions(self, t: float, labels: list[int]) -> Tensor:
        angles = t * torch.exp(-math.log(10_000) / 128 * torch.arange(128, dtype=torch.float64))
        hidden = self.linear("t_embedder.mlp.0", torch.cat((angles.cos(), angles.sin())))
        time = self.linear("t_embedder.mlp.2", hidden * torch.sigmoid(hidden))
        return time + self.weight("y_embedder.embedding_table.weight")[labels]

    def attend(self, block: int, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = self.pico.config.num_heads
        q, k, v = self.linear(f"blocks.{block}.attn.qkv", x).reshape(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / (width / heads) ** 0.5).softmax(-1) @ v
        return self.linear(f"blocks.{block}.attn.proj", mixed.transpose(1, 2).reshape(n, tokens, width))

    def mixtures(self, z: Tensor, t: float, labels: list[int]) -> list[Mixture]:
        """Return what every block's mixture sees of images z (N, C, S, S) at time t."""
        config = self.pico.config
        patches = torch.nn.functional.unfold(z.double(), config.patch_size, stride=config.patch_size).transpose(1, 2)
        kernel = self.weight("x_embedder.proj.weight").flatten(1)
        x = patches @ kernel.T + self.weight("x_embedder.proj.bias") + self.weight("pos_embed")
        c = self.conditions(t, labels)
        c = c * torch.sigmoid(c)
        found = []
        for block in range(config.depth):
            parts = self.linear(f"blocks.{block}.adaLN_modulation.1", c).chunk(6, dim=1)
            shift_a, scale_a, gate, shift_m, scale_m, gamma = (part.unsqueeze(1) for part in parts)
            x = x + gate * self.attend(block, self.norm(x) * (1 + scale_a) + shift_a)
            u = self.norm(x) * (1 + scale_m) + shift_m
            probabilities = (u @ self.weight(f"blocks.{block}.moe.gate.weight").T).softmax(-1)
            found.append(Mixture(u, gamma.squeeze(1), probabilities))
            mixed = self.expert(f"blocks.{block}.moe.shared_experts", u)
            for image, position in all_tokens(u):
                for row in self.chosen(block, probabilities[image, position]):
                    output = self.expert(self.stem(block, row), u[image, position])
                    mixed[image, position] += probabilities[image, position, row] * output
            x = x + gamma * mixed
        return found

    def stem(self, block: int, row: int) -> str:
        return f"blocks.{block}.moe.experts.{self.expert_of(block)[row]}"

    def chosen(self, block: int, probabilities: Tensor) -> list[int]:
        """Return the rows that top-k selects for one token."""
        selectable = [row for row, expert in enumerate(self.expert_of(block)) if expert >= 0]
        return sorted(selectable, key=lambda row: -float(probabilities[row]))[: self.pico.config.top_k]


def all_tokens(u: Tensor) -> Iterator[tuple[int, int]]:
    return ((image, position) for image in range(u.shape[0]) for position in range(u.shape[1]))


@dataclass(frozen=True)
class Trajectory:
    """What the model was fed at each step: z (N, C, S, S) and t."""

    z: tuple[Tensor, ...]
    t: tuple[float, ...]


def trajectory(pico: Pico, spec: SampleSpec, clean: Tensor | None = None) -> Trajectory:
    z: list[Tensor] = []
    times: list[float] = []

    def on_step(x: Tensor, t: float) -> None:
        z.append(x.clone())
        times.append(t)

    everything, watchers = range(spec.images), Watchers(on_step=on_step)
    if clean is None:
        sample_batch(pico.model(), spec, everything, watchers, PURPOSE)
    else:
        visit_noised(pico.model(), spec, everything, clean, watchers, PURPOSE)
    return Trajectory(tuple(z), tuple(times))


def branch_labels(pico: Pico, spec: SampleSpec) -> list[list[int]]:
    """The labels of each guidance branch: the images' own, and the null class where guidance runs."""
    own = [spec.classes[i % len(spec.classes)] for i in range(spec.images)]
    return [own] if spec.cfg == 1.0 else [own, [pico.config.num_classes] * spec.images]


@dataclass(frozen=True)
class Counted:
    """Counters filled token by token, shaped as in a profile."""

    counts: Tensor
    gate_mass: Tensor
    gate_norm: Tensor


def count_by_hand(pico: Pico, spec: SampleSpec, bins: int, seen: Trajectory) -> Counted:
    config, naive = pico.config, Naive(pico)
    counts = torch.zeros(config.depth, 2, bins, config.num_patches, config.num_experts, dtype=torch.int64)
    mass = torch.zeros(config.depth, 2, bins, config.num_experts, dtype=torch.float64)
    norm = torch.zeros_like(mass)
    for step, (z, t) in enumerate(zip(seen.z, seen.t, strict=True)):
        step_bin = math.floor(step / spec.steps * bins + 1e-9)
        for branch, labels in enumerate(branch_labels(pico, spec)):
            for block, mixture in enumerate(naive.mixtures(z, t, labels)):
                for image, position in all_tokens(mixture.u):
                    for row in naive.chosen(block, mixture.probabilities[image, position]):
                        expert = naive.expert_of(block)[row]
                        g = mixture.probabilities[image, position, row]
                        f = naive.expert(naive.stem(block, row), mixture.u[image, position])
                        counts[block, branch, step_bin, position, expert] += 1
                        mass[block, branch, step_bin, expert] += g
                        norm[block, branch, step_bin, expert] += g * (mixture.gamma[image] * f).norm()
    return Counted(counts, mass, norm)


def reap_by_hand(counted: Counted, cfg: float) -> Tensor:
    """REAP scores (L, E): the mean of g ‖γ ⊙ f‖ over routed tokens, branches weighed as guidance does."""
    weight = torch.tensor([cfg, abs(cfg - 1)], dtype=torch.float64)
    norm = torch.einsum("w,lwbe->le", weight, counted.gate_norm)
    number = torch.einsum("w,lwbpe->le", weight, counted.counts.double())
    return torch.where(number > 0, norm / number.clamp_min(1e-9), 0.0)


def opened(pico: Pico, folder: Path, name: str = "original.safetensors") -> Checkpoint:
    return open_checkpoint(pico.save(folder / name))
