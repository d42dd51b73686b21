"""How a profile is collected: the model samples, and every mixture's routing is counted.

Counters see every token of every trajectory. A state (z_t, t, y) is kept for each image and step bin of a part of
the images, and a fixed choice of its tokens enters the reservoir: the same tokens in every block, conditional and
unconditional ones paired. What is chosen depends on (seed, image, bin) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditmoe_cli.diffusion.noise import image_seed
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch, visit_noised
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.profile import BRANCHES

# calibration noise is never the noise that images are evaluated on, whatever the seeds
PURPOSE = "calibration"


@dataclass(frozen=True)
class Selection:
    """Which (image, step) states are kept, and which positions of each enter the reservoir.

    `step_of[(image, bin)]` is the step within the bin, `positions[(image, bin)]` the tokens, ascending.
    """

    step_of: dict[tuple[int, int], int]
    positions: dict[tuple[int, int], list[int]]


def step_bin(step: int, steps: int, bins: int) -> int:
    """Return the bin of a step; step 0 starts from pure noise."""
    return step * bins // steps


def select_states(spec: SampleSpec, bins: int, patches: int, reservoir: int) -> Selection:
    """Choose states and tokens for about `reservoir` tokens per block, over both branches.

    Every (image, bin) gives one state as long as there is at least one token for it; images are left out from
    the end otherwise. Positions are drawn without replacement.
    """
    branches = 1 if spec.cfg == 1.0 else BRANCHES
    images = min(spec.images, reservoir // (bins * branches))
    per_state = min(patches, reservoir // max(images * bins * branches, 1))
    step_of, positions = {}, {}
    for image in range(images):
        for b in range(bins):
            generator = random.Random(image_seed(spec.seed, image * bins + b, "reservoir"))
            steps = [s for s in range(spec.steps) if step_bin(s, spec.steps, bins) == b]
            step_of[image, b] = generator.choice(steps)
            positions[image, b] = sorted(generator.sample(range(patches), per_state))
    return Selection(step_of, positions)


@dataclass
class _Kept:
    """States and tokens kept so far, in the order of sampling."""

    z: list[Tensor] = field(default_factory=list)
    t: list[float] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    bin: list[int] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)  # per block, (branches, tokens, D) each
    gamma: list[list[Tensor]] = field(default_factory=list)  # per block, (branches, D) each


class RoutingCollector:
    """Watches a model sample one batch after the other, and keeps counters and a reservoir.

    Hand `begin_batch` the images, pass the collector as observer and its `begin_step` as step watcher.
    """

    def __init__(self, config: DiTMoEConfig, spec: SampleSpec, bins: int, selection: Selection) -> None:
        self.config, self.spec, self.bins, self.selection = config, spec, bins, selection
        shape = (config.depth, BRANCHES, bins, config.num_patches, config.num_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64)
        self.gate_mass = torch.zeros(config.depth, BRANCHES, bins, config.num_experts, dtype=torch.float64)
        self.gate_norm = torch.zeros_like(self.gate_mass)
        self.tokens = torch.zeros(BRANCHES, bins, dtype=torch.int64)
        self.kept = _Kept(inputs=[[] for _ in config.blocks], gamma=[[] for _ in config.blocks])
        self._images: list[int] = []
        self._step = -1
        self._chosen: list[tuple[int, list[int]]] = []

    def begin_batch(self, images: list[int]) -> None:
        """Start a batch of images by their indices."""
        self._images, self._step = images, -1

    def begin_step(self, z: Tensor, t: float) -> None:
        """Take note that the model is about to be shown z (N, C, H, W) at time t."""
        self._step += 1
        b = step_bin(self._step, self.spec.steps, self.bins)
        self._chosen = []
        for row, image in enumerate(self._images):
            if self.selection.step_of.get((image, b)) != self._step:
                continue
            positions = self.selection.positions[image, b]
            self._chosen.append((row, positions))
            self.kept.z.append(z[row].cpu().clone())
            self.kept.t.append(t)
            self.kept.image.append(image)
            self.kept.bin.append(b)
            self.kept.positions.append(positions)

    def __call__(self, event: MoEEvent) -> None:
        """Count one block's routing and keep its share of the reservoir."""
        if not bool(event.outputs.isfinite().all()):
            raise BadInputError(f"block {event.block} produced NaN or infinite values at step {self._step}")
        b = step_bin(self._step, self.spec.steps, self.bins)
        images, patches = len(self._images), self.config.num_patches
        branches = len(event.gamma) // images
        experts = event.routing.experts.reshape(branches, images, patches, -1)
        norms = (
            event.outputs.reshape(len(event.gamma), -1, event.outputs.shape[-1]).float()
            * event.gamma.float().unsqueeze(1)
        ).norm(dim=-1)
        weights = event.routing.weights.float().reshape(branches, -1)
        self._count(event.block, b, experts, weights, norms.reshape(branches, -1))
        if event.block == 0:
            self.tokens[:branches, b] += images * patches
        inputs = event.inputs.reshape(branches, images, patches, -1)
        gamma = event.gamma.reshape(branches, images, -1)
        for row, positions in self._chosen:
            self.kept.inputs[event.block].append(inputs[:, row, positions].bfloat16().cpu())
            self.kept.gamma[event.block].append(gamma[:, row].float().cpu())

    def _count(self, block: int, b: int, experts: Tensor, weights: Tensor, norms: Tensor) -> None:
        """Add one event; experts (branches, images, positions, k), weights and norms (branches, the rest)."""
        branches, _, patches, _ = experts.shape
        size = self.config.num_experts
        positions = torch.arange(patches, device=experts.device).reshape(1, 1, -1, 1)
        for branch in range(branches):
            chosen = experts[branch].reshape(-1)
            cells = (positions[0] * size + experts[branch]).reshape(-1)
            self.counts[block, branch, b] += torch.bincount(cells, minlength=patches * size).reshape(-1, size).cpu()
            # a matrix product, since weighted bincounts add in no fixed order on a GPU
            mass = weights[branch].double()
            one_hot = torch.nn.functional.one_hot(chosen, size).double()
            sums = torch.stack((mass, mass * norms[branch].double())) @ one_hot
            self.gate_mass[block, branch, b] += sums[0].cpu()
            self.gate_norm[block, branch, b] += sums[1].cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything collected, under the names that profiles store it by."""
        counted = {
            "counts": self.counts,
            "selected": self.counts.sum(dim=3),
            "gate_mass": self.gate_mass,
            "gate_norm": self.gate_norm,
            "tokens": self.tokens,
        }
        return {**counted, **self._reservoir()} if self.kept.z else counted

    def _reservoir(self) -> dict[str, Tensor]:
        """Return states and tokens in the order of (image, bin), whatever the batches were."""
        kept = self.kept
        order = sorted(range(len(kept.z)), key=lambda s: (kept.image[s], kept.bin[s]))
        branches = len(kept.gamma[0][0])
        states = [
            (new, branch, position)
            for new, old in enumerate(order)
            for branch in range(branches)
            for position in kept.positions[old]
        ]
        where = torch.tensor(states, dtype=torch.int32).reshape(-1, 3)
        gamma = torch.zeros(len(kept.gamma), len(order), BRANCHES, self.config.hidden_size)
        for block, stored in enumerate(kept.gamma):
            gamma[block, :, :branches] = torch.stack([stored[old] for old in order])
        return {
            "states.z": torch.stack([kept.z[old] for old in order]),
            "states.t": torch.tensor([kept.t[old] for old in order], dtype=torch.float32),
            "states.label": torch.tensor(self.spec.labels([kept.image[old] for old in order])),
            "states.image": torch.tensor([kept.image[old] for old in order], dtype=torch.int32),
            "states.bin": torch.tensor([kept.bin[old] for old in order], dtype=torch.int32),
            "reservoir.inputs": torch.stack(
                [torch.cat([stored[old].flatten(0, 1) for old in order]) for stored in kept.inputs]
            ),
            "reservoir.state": where[:, 0].contiguous(),
            "reservoir.branch": where[:, 1].contiguous(),
            "reservoir.position": where[:, 2].contiguous(),
            "reservoir.gamma": gamma,
        }


def check_settings(spec: SampleSpec, bins: int, reservoir: int) -> None:
    """Raise `UsageError` for more bins than steps or a negative reservoir."""
    if not 1 <= bins <= spec.steps:
        raise UsageError(f"--bins {bins}: must be between 1 and the {spec.steps} steps")
    if reservoir < 0:
        raise UsageError(f"--reservoir {reservoir}: must be at least 0 tokens")


def collect(
    model: DiTMoE,
    spec: SampleSpec,
    bins: int,
    reservoir: int,
    batch: int,
    progress: Callable[[int], None],
    clean: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sample `spec`'s images, or noise the given `clean` ones (N, C, S, S), and return the profile's tensors.

    `progress` is told the images of each batch.
    """
    selection = select_states(spec, bins, model.config.num_patches, reservoir)
    collector = RoutingCollector(model.config, spec, bins, selection)
    for indices in batches(spec.images, batch):
        collector.begin_batch(list(indices))
        if clean is None:
            sample_batch(model, spec, indices, collector, collector.begin_step, PURPOSE)
        else:
            chunk = clean[indices.start : indices.stop]
            visit_noised(model, spec, indices, chunk, collector, collector.begin_step, PURPOSE)
        progress(len(indices))
    return collector.tensors()
