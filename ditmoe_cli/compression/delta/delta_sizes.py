"""Sizes of compressed differences: ranks, and the tensors that store them. Torch-free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from ditmoe_cli.compression.plan import Differences
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.formats.differences import base_name, difference_format
from ditmoe_cli.model.checkpoint import Checkpoint


def rank_of_ratio(rows: int, columns: int, ratio: float) -> int:
    """Return the largest rank r with r (m + n) ≤ ratio · m n weights, ⌊ratio · m n / (m + n)⌋; may be 0.

    Raises `UsageError` for a ratio outside (0, 1].
    """
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"ratio of a difference's weights {ratio}: give one above 0 and at most 1.0")
    return math.floor(ratio * rows * columns / (rows + columns) + 1e-9)


def delta_tensors(checkpoint: Checkpoint, stage: Differences) -> list[TensorInfo]:
    """Return the tensors that store all blocks' experts as bases and differences, from headers.

    Raises `BadInputError` where experts are packed already or those of a block differ in shape or dtype, and
    `InfeasibleError` for a ratio that leaves rank 0.
    """
    matrices = itertools.product(range(checkpoint.config.depth), MATRICES)
    return [info for block, matrix in matrices for info in _matrix_tensors(checkpoint, stage, block, matrix)]


def _matrix_tensors(checkpoint: Checkpoint, stage: Differences, block: int, matrix: str) -> Iterator[TensorInfo]:
    """Yield the base of one matrix of a block's experts, and each expert's difference from it."""
    count = len(checkpoint.config.blocks[block].expert_widths)
    first, *others = (_plain(checkpoint, in_expert(block, e, f"{matrix}.weight")) for e in range(count))
    for other in others:
        if replace(other, name=first.name) != first:
            raise BadInputError(
                f"{checkpoint.path}: {other.name!r} is {other.dtype} {list(other.shape)}, but {first.name!r} is "
                f"{first.dtype} {list(first.shape)}; only experts of one shape and dtype can share a base"
            )
    fmt = difference_format(stage.kind, _rank(first, stage))
    yield replace(first, name=base_name(first.name))
    for info in (first, *others):
        yield from fmt.difference_members(info).values()


def _plain(checkpoint: Checkpoint, name: str) -> TensorInfo:
    weight = checkpoint.weights[name]
    if weight.format is not None:
        raise BadInputError(
            f"{checkpoint.path}: {name!r} is {weight.format} already; store differences of the checkpoint that it came "
            "from, or make its weights plain by convert ⟨dequantize⟩"
        )
    return weight.info


def _rank(info: TensorInfo, stage: Differences) -> int:
    if stage.kind != "svd":
        return 0
    rows, columns = info.shape
    rank = rank_of_ratio(rows, columns, stage.ratio)
    if not rank:
        least = math.ceil(1000 * (rows + columns) / (rows * columns)) / 1000
        raise InfeasibleError(
            f"a ratio of {stage.ratio:g} leaves rank 0 for {info.name!r} {list(info.shape)}; give at least {least:g}"
        )
    return rank
