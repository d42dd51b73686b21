"""What training end to end takes, from shapes. Torch-free.

A trained weight takes 28 bytes (`training_loop`), its own value among them; of a matrix that is trained by an update of
low rank, each value of the update does, and those of the matrix 4. Several processes share all but the value and its
gradient. Recording gradients keeps the activations of all blocks that are trained.
"""

from __future__ import annotations

from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.effort import Effort, activation_bytes, image_flops, model_bytes

TRAINED_BYTES = 28
COMPOSED_BYTES = 5  # of a weight of a matrix that is put together, beside itself in fp32: its codes, packed and in fp32
BACKWARD = 3  # times the operations, and about the memory, of a forward pass
_SHARED_BYTES = TRAINED_BYTES - 8  # of them, where several processes train
_MOST_STEPPING = 0.75  # of the operations of gradients: to the same error matrices take about half of the steps
_MOST_CHECKS, _STEPS_A_CHECK = 25, 20


def checks_of(steps: int) -> int:
    """Return how often a course of some steps is judged."""
    return min(max(steps // _STEPS_A_CHECK, 1), _MOST_CHECKS)


def pays(size: TrainedSize, student: DiTMoEConfig, batch: int) -> bool:
    """Return whether steps of matrices are worth their operations, beside the gradients of a batch of states."""
    return size.matrix_flops <= _MOST_STEPPING * BACKWARD * batch * image_flops(student)


def stepping(student: DiTMoEConfig, size: TrainedSize, batch: int) -> Effort:
    """Return the operations of a step beside its gradients: those of matrices, where they step as such."""
    return Effort(flops=size.matrix_flops if pays(size, student, batch) else 0)


def end_to_end_bytes(student: DiTMoEConfig, size: TrainedSize, predictions: int, processes: int = 1) -> float:
    """Return the memory of a student that is trained end to end, with gradients of some predictions at once.

    It is that of one of some processes.
    """
    kept = student.depth * activation_bytes(student, predictions) * BACKWARD / 2
    weights = (4 + _SHARED_BYTES / processes) * size.values + COMPOSED_BYTES * size.composed
    return model_bytes(student) + weights + kept
