"""What healing takes, from shapes: states, memory of both scopes, and operations. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import (
    BACKWARD,
    COMPOSED_BYTES,
    TRAINED_BYTES,
    checks_of,
    end_to_end_bytes,
    stepping,
)
from ditmoe_cli.compression.working_sizes import HELD_OUT
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    Estimate,
    activation_bytes,
    block_flops,
    block_steps,
    block_weights,
    branches_at,
    loading,
    model_bytes,
    passes,
    total,
)

BLOCK_TOKENS = 65_536  # of one branch that a block is healed on
HELD_STATES = 512  # that judge the whole model
STREAMS = 5  # tokens of all states that are in memory at once
_MOST_IMAGES, _STATES_AN_IMAGE = 4096, 64  # that are sampled; states of a run that a new image is worth sampling for


def block_states(config: DiTMoEConfig) -> int:
    """Return how many states a block is healed on."""
    return max(BLOCK_TOKENS // config.num_patches, 2 * HELD_OUT)


def images_for(steps: int | None, batch: int) -> int:
    """Return how many images are worth sampling for some steps; None where the time decides."""
    return _MOST_IMAGES if steps is None else min(_MOST_IMAGES, steps * batch // _STATES_AN_IMAGE)


def model_scope_bytes(
    student: DiTMoEConfig, original: DiTMoEConfig, size: TrainedSize, states: int, cfg: float, processes: int = 1
) -> float:
    """Return the memory of healing end to end: both models, what is trained, and `states` of a batch at once.

    It is that of one of some processes.
    """
    return model_bytes(original) + end_to_end_bytes(student, size, states * branches_at(cfg), processes)


def block_scope_bytes(
    student: DiTMoEConfig, original: DiTMoEConfig, size: TrainedSize, batch: int, cfg: float
) -> float:
    """Return the memory of healing block after block, `batch` states at once.

    What is trained of all blocks is taken to be spread over them as all weights are.
    """
    branches, states = branches_at(cfg), block_states(original)
    widest = max(block_weights(student, block) for block in student.blocks)
    other = max(block_weights(original, block) for block in original.blocks)
    tokens = 4 * states * branches * student.num_patches * student.hidden_size
    kept = activation_bytes(student, min(batch, states) * branches) * BACKWARD / 2
    share = widest / sum(block_weights(student, block) for block in student.blocks)
    weights = (TRAINED_BYTES - 4) * min(widest, size.values * share) + COMPOSED_BYTES * min(
        widest, size.composed * share
    )
    return 4 * widest + weights + 4 * other + STREAMS * tokens + kept


def model_scope_effort(student: DiTMoEConfig, original: DiTMoEConfig, steps: int, batch: int, cfg: float) -> Effort:
    """Return the operations of healing end to end.

    A step takes a prediction of the original and, with gradients, three of the student; each check a prediction of the
    student for all that judge, of which the original is asked once.
    """
    branches, judged = branches_at(cfg), checks_of(steps) + 2
    states = branches * batch
    step = [passes(original, states, 1, states), passes(student, states, 1, states) * BACKWARD]
    held = [passes(original, branches * HELD_STATES, 1, batch), passes(student, branches * HELD_STATES, judged, batch)]
    return total(step) * steps + total(held)


def block_scope_effort(student: DiTMoEConfig, original: DiTMoEConfig, steps: int, batch: int, cfg: float) -> Effort:
    """Return the operations of healing block after block.

    All states pass each block of the original twice and of the student once, those that judge the student's at each
    check; a step takes three passes.
    """
    branches, states = branches_at(cfg), block_states(original)
    student_passes = states * (1 + (checks_of(steps) + 2) / HELD_OUT) + BACKWARD * steps * batch
    flops = 2 * states * sum(block_flops(original, block) for block in original.blocks)
    flops += student_passes * sum(block_flops(student, block) for block in student.blocks)
    small = BACKWARD * steps * sum(block_steps(block) for block in student.blocks)
    return Effort(flops=branches * flops, steps=small)


def healing_estimate(
    student: DiTMoEConfig, original: DiTMoEConfig, asked: Healing, size: TrainedSize, calibration: Mapping[str, Any]
) -> Estimate:
    """Return what healing is expected to take, on the states of a calibration.

    What is asked for in minutes takes these, or what a single step takes where that is more. The memory of ``auto`` is
    that of the whole model, which is trained where there is so much.
    """
    cfg, steps = float(calibration["cfg"]), asked.iterations or 1
    effort = loading(original) + loading(student)
    memory = 0.0
    if asked.scope != "model":
        effort += block_scope_effort(student, original, steps, asked.batch, cfg)
        effort += stepping(student, size, asked.batch) * steps
        memory = block_scope_bytes(student, original, size, asked.batch, cfg)
    if asked.scope != "block":
        images = images_for(steps, asked.batch)
        evaluations = int(calibration["steps"]) * branches_at(cfg)
        effort += model_scope_effort(student, original, steps, asked.batch, cfg)
        effort += stepping(student, size, asked.batch) * steps
        effort += passes(original, images, evaluations, images)
        memory = max(memory, model_scope_bytes(student, original, size, asked.batch, cfg))
    seconds = 60 * asked.minutes if asked.minutes is not None else 0.0
    return Estimate(f"healing {student.depth} blocks", effort, BASELINE_BYTES + memory, seconds)
