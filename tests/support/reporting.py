"""Hand-made profiles for the tests of reports: routing drawn from given probabilities, counted as profiles count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ditmoe_cli.routing.profile import RoutingProfile, read_profile, write_profile
from ditmoe_cli.routing.report.build import build_report
from ditmoe_cli.routing.report.contents import ProfileReport


@dataclass(frozen=True)
class Planted:
    """Sizes of a profile, and p(expert | block, branch, bin, position, class) in `chances` (L, W, B, P, C, E)."""

    chances: np.ndarray
    images: int = 40
    steps_per_bin: int = 4
    cfg: float = 2.0
    fast: bool = True
    seed: int = 0

    def tables(self) -> dict[str, np.ndarray]:
        """Draw one expert a token and count."""
        blocks, branches, bins, positions, classes, experts = self.chances.shape
        generator = np.random.default_rng(self.seed)
        n = self.steps_per_bin
        drawn = np.zeros((self.images, blocks, 2, bins, positions, experts), np.int64)
        for image in range(self.images):
            p = self.chances[:, :, :, :, image % classes]
            drawn[image, :, :branches] = generator.multinomial(n, p / p.sum(-1, keepdims=True))
        counts = drawn.sum(0)
        selected = counts.sum(3)
        tokens = np.zeros((2, bins), np.int64)
        tokens[:branches] = n * positions * self.images
        shape = (blocks, 2, bins, experts)
        gates = selected * (1.0 + np.arange(experts))
        diagonal = selected[..., None] * np.eye(experts, dtype=np.int64)
        made = {
            "counts": counts,
            "selected": selected,
            "tokens": tokens,
            "image.steps": drawn.sum(4).astype(np.int32),
            "image.positions": drawn.sum(3).astype(np.int16),
            "coactivation": diagonal,
            "transitions.block": np.ones((max(blocks - 1, 0), 2, bins, experts, experts), np.int64),
            "transitions.step": diagonal,
            "transitions.branch": diagonal[:, 0] if branches > 1 else 0 * diagonal[:, 0],
            "transitions.neighbour": 0 * diagonal + tokens[..., None, None],
            "gate_mass": gates,
            "gate_norm": gates * 2,
            "norm": selected * 3.0,
            "norm_square": selected * 9.0,
            **{f"router.{name}": np.ones(shape[:3]) * tokens.sum() for name in ("entropy", "margin", "topk_mass")},
        }
        if not self.fast:
            made["easy_ep"] = gates * 5
            made["output.gram"] = np.broadcast_to(np.eye(experts), (*shape, experts)).copy()
            made["output.cka"] = np.broadcast_to(np.eye(experts, dtype=np.float32), (blocks, experts, experts)).copy()
            made["output.all_token_mean"] = generator.normal(size=(*shape, 6)).astype(np.float32)
        return made

    def save(self, path: Path, **changes: object) -> RoutingProfile:
        """Write the profile; `changes` are calibration settings."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in self.tables().items()}
        bins, classes = self.chances.shape[2], self.chances.shape[4]
        calibration: Mapping[str, object] = {
            "images": self.images,
            "steps": bins * self.steps_per_bin,
            "bins": bins,
            "cfg": self.cfg,
            "fast": self.fast,
            "classes": f"0-{classes - 1}",
            **changes,
        }
        experts = (self.chances.shape[5],) * self.chances.shape[0]
        write_profile(path, tensors, "f" * 64, calibration, experts, True, ())
        return read_profile(path)


def even(
    blocks: int = 4, branches: int = 2, bins: int = 6, positions: int = 9, classes: int = 5, experts: int = 4
) -> np.ndarray:
    """Probabilities that depend on nothing."""
    return np.ones((blocks, branches, bins, positions, classes, experts))


def by_step(**sizes: int) -> np.ndarray:
    """Near noise each step bin has its expert; later all are alike."""
    chances = even(**sizes)
    half = chances.shape[2] // 2
    for b in range(half):
        chances[:, :, b, :, :, b % chances.shape[-1]] += 20
    return chances


def by_position(fading: bool, **sizes: int) -> np.ndarray:
    """Each position has its expert; where `fading`, in the first half of the blocks alone."""
    chances = even(**sizes)
    blocks, positions = chances.shape[0], chances.shape[3]
    for block in range(blocks // 2 if fading else blocks):
        for p in range(positions):
            chances[block, :, :, p, :, p % chances.shape[-1]] += 8
    return chances


def by_class(**sizes: int) -> np.ndarray:
    """Each class has its expert."""
    chances = even(**sizes)
    for c in range(chances.shape[4]):
        chances[:, :, :, :, c, c % chances.shape[-1]] += 8
    return chances


def report_of(folder: Path, planted: Planted) -> ProfileReport:
    """Return the report of a hand-made profile, which is written into `folder`."""
    return build_report(planted.save(folder / "p.safetensors"), 20, 0)


def full_report(folder: Path) -> ProfileReport:
    """Return the report of a full profile of two blocks, whose expert (1, 2) is dead."""
    chances = by_step(blocks=2) * by_position(fading=True, blocks=2)
    chances[1, ..., 2] = 0
    return report_of(folder, Planted(chances, images=10, fast=False))


def unequal(folder: Path) -> ProfileReport:
    """Return the report of a profile whose blocks have 4 and 2 experts, as pruned checkpoints do."""
    chances = even(blocks=2)
    chances[1, ..., 2:] = 0
    profile = Planted(chances, images=5).save(folder / "p.safetensors")
    tensors = {name: profile.tensor(name) for name in profile.header.tensors}
    write_profile(profile.path, tensors, profile.checkpoint, profile.calibration, (4, 2), True, ())
    return build_report(read_profile(profile.path), 20, 0)
