"""What tests of merging share: blocks whose experts form known groups, and tokens to merge for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from swiglu import random_expert, seeded

from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups, MergeTokens
from ditmoe_cli.model.expert_weights import ExpertWeights

HIDDEN, WIDTH, CELLS = 6, 8, 3


def moved(expert: ExpertWeights, scale: float, seed: int) -> ExpertWeights:
    """The expert plus `scale` of another."""
    other = random_expert(HIDDEN, WIDTH, seed)
    return ExpertWeights(
        expert.gate + scale * other.gate, expert.up + scale * other.up, expert.down + scale * other.down
    )


def planted(labels: Sequence[int], *, noise: float = 0.01, selected: Sequence[float] | None = None) -> GroupingInputs:
    """A block whose experts of equal label are alike in weights, outputs and router logits, but for `noise`.

    The first expert of each label is selected most, unless `selected` says otherwise. The last cell is empty.
    """
    generator = np.random.default_rng(sum(labels) + len(labels))
    clusters = max(labels) + 1

    def alike(*shape: int) -> np.ndarray:
        """(cells, E, ...), experts of equal label close to each other; no cell resembles another."""
        centres = generator.normal(size=(CELLS, clusters, *shape))
        rows = centres[:, list(labels)] + noise * generator.normal(size=(CELLS, len(labels), *shape))
        rows[-1] = 0.0
        return rows

    logits, means = alike(200), alike(40)
    experts = [moved(random_expert(HIDDEN, WIDTH, label), noise, 100 + e) for e, label in enumerate(labels)]
    firsts = [100.0 - e if label not in labels[:e] else 1.0 for e, label in enumerate(labels)]
    return GroupingInputs(
        selected=np.array(firsts if selected is None else selected, dtype=np.float64),
        logit_grams=logits @ logits.swapaxes(1, 2),
        means=means.astype(np.float32),
        experts=lambda: experts,
    )


def groups_of(labels: Sequence[int]) -> Groups:
    """The groups that labels make."""
    return tuple(tuple(e for e, other in enumerate(labels) if other == label) for label in dict.fromkeys(labels))


def tokens_for(members: int, count: int = 64, seed: int = 0) -> MergeTokens:
    """Random tokens, each of which selects some of the members."""
    generator = seeded(1000 + seed)
    chosen = torch.rand(count, members, generator=generator) < 0.6
    return MergeTokens(
        inputs=torch.randn(count, HIDDEN, generator=generator),
        gates=torch.rand(count, members, generator=generator) * chosen,
        weights=torch.rand(count, generator=generator),
        held=torch.arange(count) % 4 == 0,
    )
