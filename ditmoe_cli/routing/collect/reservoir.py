"""The reservoir of a profile: states that the model was given, and tokens that entered its mixtures there.

The choice depends on (seed, image, bin) alone, so neither batch size nor the number of processes changes it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe_cli.diffusion.noise import image_seed
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.step_bins import steps_of_bins
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.profile import BRANCHES


@dataclass(frozen=True)
class Selection:
    """The states (image, step) that are kept, and the positions of each that enter the reservoir.

    `step_of[(image, bin)]` is the step within the bin, `positions[(image, bin)]` the tokens, ascending.
    """

    step_of: dict[tuple[int, int], int]
    positions: dict[tuple[int, int], list[int]]


class ReservoirCounts(NamedTuple):
    """How many images keep states, and how many tokens of a state enter the reservoir in each branch."""

    images: int
    per_state: int


def reservoir_counts(spec: SampleSpec, bins: int, patches: int, reservoir: int) -> ReservoirCounts:
    """Return the counts for about `reservoir` tokens per block, over both branches."""
    branches = 1 if spec.cfg == 1.0 else BRANCHES
    images = min(spec.images, reservoir // (bins * branches))
    return ReservoirCounts(images, min(patches, reservoir // max(images * bins * branches, 1)))


def select_states(spec: SampleSpec, bins: int, patches: int, reservoir: int) -> Selection:
    """Choose states and tokens for about `reservoir` tokens per block, over both branches.

    Every (image, bin) gives one state as long as there is at least one token for it; else the last images give none.
    Labels cycle over images, so classes are covered evenly too. Positions are stratified: the patches are divided into
    as many equal runs as there are tokens, and one position is drawn from each.
    """
    images, per_state = reservoir_counts(spec, bins, patches, reservoir)
    step_of, positions = {}, {}
    for image in range(images):
        for b, steps in enumerate(steps_of_bins(spec.steps, bins)):
            generator = random.Random(image_seed(spec.seed, image * bins + b, "reservoir"))
            step_of[image, b] = generator.choice(steps)
            bounds = [i * patches // per_state for i in range(per_state + 1)]
            positions[image, b] = [generator.randrange(*ends) for ends in itertools.pairwise(bounds)]
    return Selection(step_of, positions)


@dataclass
class Reservoir:
    """States and tokens kept so far, in the order of sampling."""

    selection: Selection
    blocks: int
    z: list[Tensor] = field(default_factory=list)
    t: list[float] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    bin: list[int] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    inputs: list[list[Tensor]] = field(default_factory=list)  # per block, (branches, tokens, D) each
    gamma: list[list[Tensor]] = field(default_factory=list)  # per block, (branches, D) each
    chosen: dict[int, Tensor] = field(default_factory=dict)  # positions, by image that is kept at this step

    def __post_init__(self) -> None:
        self.inputs = [[] for _ in range(self.blocks)]
        self.gamma = [[] for _ in range(self.blocks)]

    def begin_step(self, images: range, step: int, b: int, z: Tensor, t: float) -> None:
        """Keep the states z (N, C, S, S) of those of `images` that are selected at this step."""
        kept = [image for image in images if self.selection.step_of.get((image, b)) == step]
        positions = [self.selection.positions[image, b] for image in kept]
        self.chosen = dict(zip(kept, torch.tensor(positions, dtype=torch.int64), strict=True)) if kept else {}
        self.z += z[[image - images.start for image in kept]].cpu().unbind() if kept else ()
        self.t += [t] * len(kept)
        self.image += kept
        self.bin += [b] * len(kept)
        self.positions += positions

    def keep(self, event: MoEEvent, images: range) -> None:
        """Keep the selected tokens of one block's event, which is of `images`: one copy from the device."""
        kept = [image for image in images if image in self.chosen]
        if not kept:
            return
        branches, width = len(event.gamma) // len(images), event.inputs.shape[-1]
        device = event.inputs.device
        rows = torch.tensor([image - images.start for image in kept]).to(device, non_blocking=True)
        positions = torch.stack([self.chosen[image] for image in kept]).to(device, non_blocking=True)
        gamma = event.gamma.reshape(branches, len(images), width)[:, rows].float().cpu()
        inputs = event.inputs.reshape(branches, len(images), -1, width)[:, rows.unsqueeze(1), positions]
        self.inputs[event.block] += inputs.bfloat16().cpu().unbind(dim=1)
        self.gamma[event.block] += gamma.unbind(dim=1)

    def rows(self, first: int) -> dict[str, Tensor]:
        """Return the states kept from number `first` on, with their tokens; nothing where there are none."""
        if len(self.z) <= first:
            return {}
        return {
            "z": torch.stack(self.z[first:]),
            "t": torch.tensor(self.t[first:], dtype=torch.float64),
            "image": torch.tensor(self.image[first:]),
            "bin": torch.tensor(self.bin[first:]),
            "positions": torch.tensor(self.positions[first:]),
            "inputs": torch.stack([torch.stack(stored[first:]) for stored in self.inputs]),
            "gamma": torch.stack([torch.stack(stored[first:]) for stored in self.gamma]),
        }

    def add_rows(self, rows: dict[str, Tensor]) -> None:
        """Add states as `rows` returned them."""
        if not rows:
            return
        self.z += rows["z"].unbind()
        for name in ("t", "image", "bin", "positions"):
            getattr(self, name).extend(rows[name].tolist())
        for block in range(self.blocks):
            self.inputs[block] += rows["inputs"][block].unbind()
            self.gamma[block] += rows["gamma"][block].unbind()

    def tensors(self, spec: SampleSpec) -> dict[str, Tensor]:
        """Return states and tokens in the order of (image, bin), whatever the batches were; empty if none were kept."""
        if not self.z:
            return {}
        order = sorted(range(len(self.z)), key=lambda s: (self.image[s], self.bin[s]))
        branches, width = self.gamma[0][0].shape
        tokens = [
            (new, branch, position)
            for new, old in enumerate(order)
            for branch in range(branches)
            for position in self.positions[old]
        ]
        where = torch.tensor(tokens, dtype=torch.int32).reshape(-1, 3)
        gamma = torch.zeros(self.blocks, len(order), BRANCHES, width)
        for block, stored in enumerate(self.gamma):
            gamma[block, :, :branches] = torch.stack([stored[old] for old in order])
        return {
            "states.z": torch.stack([self.z[old] for old in order]),
            "states.t": torch.tensor([self.t[old] for old in order], dtype=torch.float32),
            "states.label": torch.tensor(spec.labels([self.image[old] for old in order])),
            "states.image": torch.tensor([self.image[old] for old in order], dtype=torch.int32),
            "states.bin": torch.tensor([self.bin[old] for old in order], dtype=torch.int32),
            "reservoir.inputs": torch.stack(
                [torch.cat([stored[old].flatten(0, 1) for old in order]) for stored in self.inputs]
            ),
            "reservoir.state": where[:, 0].contiguous(),
            "reservoir.branch": where[:, 1].contiguous(),
            "reservoir.position": where[:, 2].contiguous(),
            "reservoir.gamma": gamma,
        }
