"""What healing takes, from shapes: memory of both scopes, and operations. Torch-free.

A trained weight takes 24 bytes: its value in fp32, its gradient, AdamW's two moments, the averaged and the best value.
Recording gradients keeps the activations of all blocks that are trained.
"""

from __future__ import annotations

from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    Estimate,
    activation_bytes,
    block_steps,
    block_weights,
    branches_at,
    image_flops,
    loading,
    model_bytes,
)

TRAINED_BYTES = 24
_BACKWARD = 3  # times the operations, and about the memory, of a forward pass


def model_scope_bytes(student: DiTMoEConfig, original: DiTMoEConfig, trained: int, states: int, cfg: float) -> float:
    """Return the memory of healing end to end: both models, `trained` weights, and `states` of a batch at once."""
    kept = student.depth * activation_bytes(student, states * branches_at(cfg)) * _BACKWARD / 2
    return model_bytes(original) + model_bytes(student) + (TRAINED_BYTES - 4) * trained + kept


def block_scope_bytes(student: DiTMoEConfig, original: DiTMoEConfig, states: int, batch: int, cfg: float) -> float:
    """Return the memory of healing block after block, on `states`, `batch` of them at once."""
    branches = branches_at(cfg)
    widest = max(block_weights(student, block) for block in student.blocks)
    other = max(block_weights(original, block) for block in original.blocks)
    tokens = 4 * states * branches * student.num_patches * student.hidden_size
    kept = activation_bytes(student, min(batch, states) * branches) * _BACKWARD / 2
    return BASELINE_BYTES + TRAINED_BYTES * widest + 4 * other + 5 * tokens + kept


def step_effort(student: DiTMoEConfig, original: DiTMoEConfig, batch: int, cfg: float) -> Effort:
    """Return the operations of a step end to end: a prediction of the original, and three of the student."""
    flops = batch * branches_at(cfg) * (image_flops(original) + _BACKWARD * image_flops(student))
    steps = sum(block_steps(block) for block in original.blocks)
    return Effort(flops=flops, steps=steps + _BACKWARD * sum(block_steps(block) for block in student.blocks))


def healing_estimate(
    student: DiTMoEConfig, original: DiTMoEConfig, asked: Healing, trained: int, cfg: float
) -> Estimate:
    """Return what healing is expected to take; in steps. What is asked for in minutes takes these."""
    effort = (
        step_effort(student, original, asked.batch, cfg) * (asked.steps or 0) + loading(original) + loading(student)
    )
    memory = BASELINE_BYTES + model_scope_bytes(student, original, trained, asked.batch, cfg)
    return Estimate(f"healing {student.depth} blocks", effort, memory)
