"""Which stored tensors are trained, from headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ditmoe_cli.compression.training.stepped_matrices import matrix_flops
from ditmoe_cli.compression.training.trained_groups import has_low_rank_update, trained_groups, trained_values
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainedTensor:
    """A stored tensor that is trained.

    Attributes:
        weight: the weight that it is a part of; of several, the first.
        part: which one; None of a plain weight, which is stored as itself.
        values: how many are trained.
        rank: that of the update that trains a matrix; None for what is trained itself.
    """

    weight: Weight
    part: str | None
    values: int
    rank: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is a plain weight that is trained itself."""
        return self.part is None and self.rank is None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return tuple(self.weight.info.shape)


@dataclass(frozen=True)
class TrainedSize:
    """How many values are trained, how many weights are put together for each product (`TrainedLinear`), and the
    operations of a step of all matrices that can step as such (`matrix_steps`)."""

    values: int
    composed: int = 0
    matrix_flops: int = 0


def trained_size(checkpoint: Checkpoint, tensors: Mapping[str, TrainedTensor]) -> TrainedSize:
    """Return the size of what is trained of a checkpoint."""
    composed = sum(weight.info.numel for weight in checkpoint.weights.values() if weight.quantized)
    matrices = sum(matrix_flops(name, tensor.shape) for name, tensor in tensors.items() if tensor.is_whole)
    return TrainedSize(sum(tensor.values for tensor in tensors.values()), composed, matrices)


def tensors_to_train(
    checkpoint: Checkpoint, groups: Collection[str], codes: bool = False, rank: int | None = None
) -> dict[str, TrainedTensor]:
    """Return the stored tensors of a checkpoint that are trained, by name.

    They are all plain weights in some `groups`, and of stored ones what `StoredFormat.trained_parts` says: scales,
    factors; with `codes`, those of integer formats too. With a `rank`, plain matrices are trained by updates of
    that rank. Raises `BadInputError` for none.
    """
    found: dict[str, TrainedTensor] = {}
    for name, weight in checkpoint.weights.items():
        if not trained_groups(name) & set(groups):
            continue
        if weight.stored_as is None:
            has_update = rank is not None and has_low_rank_update(weight.info, rank)
            values = trained_values(weight.info, rank)
            found[name] = TrainedTensor(weight, None, values, rank if has_update else None)
            continue
        members = weight.stored_as.members(weight.info)
        for part, values in weight.stored_as.trained_parts(weight.info, codes).items():
            found.setdefault(members[part].name, TrainedTensor(weight, part, values))
    if not found:
        raise BadInputError(f"{checkpoint.path}: has no weights to train in {', '.join(groups)}")
    return found
