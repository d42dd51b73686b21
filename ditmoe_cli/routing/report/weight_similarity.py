"""Similarity of a checkpoint's experts by their weights."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.expert_weights import ExpertWeights, read_expert
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.measures import matched_weight_cosine


def weight_similarities(checkpoint: Checkpoint) -> list[NDArray[np.float64]]:
    """Return the cosine of each pair of experts' weights after matching their neurons, (E, E) for each block."""
    sizes = [len(block.expert_widths) for block in checkpoint.config.blocks]
    pairs = sum(size * (size - 1) // 2 for size in sizes)
    result = []
    with phase("matching experts' neurons", pairs, "pairs") as progress:
        for block, size in enumerate(sizes):
            experts = [_arrays(read_expert(checkpoint, block, e)) for e in range(size)]
            cosines = np.eye(size)
            for i, j in itertools.combinations(range(size), 2):
                cosines[i, j] = cosines[j, i] = matched_weight_cosine(experts[i], experts[j])
                progress(1)
            result.append(cosines)
    return result


def _arrays(expert: ExpertWeights) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    return expert.gate.numpy(), expert.up.numpy(), expert.down.numpy()
