"""What a map of sensitivity takes, from shapes. Torch-free.

A state of L blocks costs a prediction, and for each block and part that block again, without the part, and all behind
it: some P L² / 2 blocks for P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.block_choices import BlockChoice, parse_choice
from ditmoe_cli.model.compute_cost import block_cost, expert_cost, shared_cost, unrouted_cost
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.effort import (
    BASELINE_BYTES,
    Effort,
    Estimate,
    activation_bytes,
    block_steps,
    branches_at,
    ends_flops,
    image_flops,
    loading,
    model_bytes,
    passes,
    total,
)


def map_estimate(config: DiTMoEConfig, spec: SampleSpec, bins: int, parts: Sequence[str], batch: int) -> Estimate:
    """Return what sampling and the map take; memory is that of all parts side by side."""
    branches = branches_at(spec.cfg)
    together = min(batch, spec.images) * branches
    states = spec.images * bins
    effort = total(
        (
            passes(config, spec.images, spec.nfe, batch),
            Effort(flops=states * branches * state_flops(config, parts)),
            Effort(steps=-(-spec.images // batch) * bins * _steps(config)),
            loading(config),
        )
    )
    memory = BASELINE_BYTES + model_bytes(config) + activation_bytes(config, together * len(parts))
    return Estimate(f"leaving out {len(parts)} parts of {config.depth} blocks at {states:,} states", effort, memory)


def state_flops(config: DiTMoEConfig, parts: Sequence[str]) -> float:
    """Return the operations of one state in one branch of guidance: the prediction, and those without each part."""
    behind = 0.0
    flops = image_flops(config)
    for block in reversed(config.blocks):
        own = sum(chosen_cost(config, block, parse_choice(part)) for part in parts)
        flops += own + len(parts) * (behind + ends_flops(config))
        behind += block_cost(config, block)
    return flops


def chosen_cost(config: DiTMoEConfig, block: BlockConfig, choice: BlockChoice) -> float:
    """Return the operations of one image in a block that leaves something out, its attention being known."""
    if choice.mixture == "skip":
        return 0.0
    slots = config.top_k if choice.slots is None else 1
    token = unrouted_cost(config, block) + slots * expert_cost(config, block)
    return config.num_patches * (token + (shared_cost(config, block) if choice.shared else 0.0))


def _steps(config: DiTMoEConfig) -> float:
    """Return the small operations of the map at the states of one step."""
    return sum((index + 1) * block_steps(block) for index, block in enumerate(config.blocks))
