"""What distilling takes, from shapes: paths, memory and operations. Torch-free."""

from __future__ import annotations

from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.compression.training.training_memory import BACKWARD, checks_of, end_to_end_bytes, stepping
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    Estimate,
    activation_bytes,
    branches_at,
    loading,
    model_bytes,
    passes,
    total,
)

PATH_BYTES = 2 * 2**30  # that all paths take at most
HELD_PATHS = 512  # that judge
SAMPLED = 256  # that are sampled at once
_PASSES = 2  # over all states, which is how often training gains by a state
_MOST_PATHS, _FEWEST_PATHS = 65_536, 16


def path_bytes(config: DiTMoEConfig, kept: int) -> int:
    """Return the bytes of a path of which some states and the image are kept."""
    return 4 * (kept + 1) * config.in_channels * config.input_size**2


def most_paths(config: DiTMoEConfig, kept: int) -> int:
    """Return how many paths there is room for."""
    return max(min(_MOST_PATHS, PATH_BYTES // path_bytes(config, kept)), _FEWEST_PATHS)


def paths_for(config: DiTMoEConfig, asked: Distilling) -> int:
    """Return how many paths some iterations are worth, beside those that judge.

    Each of their states is trained on twice; or more often, where paths would take longer than training, which takes
    three predictions a state.
    """
    assert asked.iterations is not None
    kept, states = asked.stages(config.sampler)[0], asked.iterations * asked.batch
    worth = min(states // (_PASSES * asked.steps), BACKWARD * states // asked.evaluations(config.sampler))
    return min(max(worth + held_paths(worth), _FEWEST_PATHS), most_paths(config, kept))


def held_paths(count: int) -> int:
    """Return how many of some paths judge."""
    return min(HELD_PATHS, max(count // 8, 1))


def distilling_bytes(student: DiTMoEConfig, size: TrainedSize, states: int, processes: int = 1) -> float:
    """Return the memory of training, with `states` of a batch at once; the original is gone by then."""
    return end_to_end_bytes(student, size, states, processes)


def distilling_effort(
    student: DiTMoEConfig, original: DiTMoEConfig, asked: Distilling, size: TrainedSize, iterations: int
) -> Effort:
    """Return the operations of sampling paths, and of training on them."""
    paths = paths_for(original, asked) if asked.iterations is not None else _FEWEST_PATHS
    branches = branches_at(asked.cfg) + (asked.guide is not None)
    sampled = passes(original, branches * paths, asked.evaluations(original.sampler), branches * min(paths, SAMPLED))
    own = (asked.steps - 1) / 4 if asked.states == "own" else 0  # of half of the states, half of the steps on average
    step = passes(student, asked.batch, 1, asked.batch) * (BACKWARD + own) + stepping(student, size, asked.batch)
    judged = passes(student, held_paths(paths), asked.steps * (checks_of(iterations) + 2), asked.batch)
    return total([sampled, step * iterations, judged])


def distilling_estimate(
    student: DiTMoEConfig, original: DiTMoEConfig, asked: Distilling, size: TrainedSize
) -> Estimate:
    """Return what distilling is expected to take; what is asked for in minutes takes these, or a step where more."""
    iterations, kept = asked.iterations or 1, asked.stages(original.sampler)[0]
    effort = loading(original) + loading(student) + distilling_effort(student, original, asked, size, iterations)
    paths = paths_for(original, asked) if asked.iterations is not None else most_paths(original, kept)
    sampling = model_bytes(original) + activation_bytes(original, branches_at(asked.cfg) * min(SAMPLED, paths))
    memory = max(sampling, distilling_bytes(student, size, asked.batch)) + paths * path_bytes(original, kept)
    seconds = 60 * asked.minutes if asked.minutes is not None else 0.0
    return Estimate(f"distilling to {asked.steps} steps", effort, BASELINE_BYTES + memory, seconds)
