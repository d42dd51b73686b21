"""Operations of the parts of a block, by which tables of compute are planned and counted. Torch-free.

With width D, P tokens an image, R router rows and the shared width S, one image takes P (8 D² + 4 P D) operations in
attention, one token 2 R D in the router, 6 D H in an expert of width H and 6 D S in the shared one. Embeddings,
modulations, which all times and classes share, and the final layer are always computed.
"""

from __future__ import annotations

from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.effort import attention_flops, ends_flops, unrouted_flops


def fixed_cost(config: DiTMoEConfig) -> float:
    """Return the operations of one image that no table saves: the ends of the model, and 12 D² of each modulation."""
    return ends_flops(config) + config.depth * _modulation_cost(config)


def _modulation_cost(config: DiTMoEConfig) -> float:
    return 12.0 * config.hidden_size**2


def attention_cost(config: DiTMoEConfig) -> float:
    """Return the operations of one image in a block's attention, P (8 D² + 4 P D)."""
    return attention_flops(config) - _modulation_cost(config)


def attended_to_cost(config: DiTMoEConfig) -> float:
    """Return the operations of one image that tell which tokens are attended to, P (4 D² + 2 P D)."""
    width, tokens = config.hidden_size, config.num_patches
    return tokens * (4.0 * width**2 + 2.0 * tokens * width)


def shared_cost(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one token in the shared expert, 6 D S."""
    return 6.0 * config.hidden_size * block.shared_width


def unrouted_cost(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one token in the router, 2 R D, and in a linear map of the residual, 2 D²."""
    return unrouted_flops(config, block) - shared_cost(config, block)


def expert_cost(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one slot, 6 D H for the mean width H of the experts."""
    widths = block.expert_widths
    return 6.0 * config.hidden_size * sum(widths) / max(len(widths), 1)


def block_cost(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one image in a block that computes all of it."""
    token = unrouted_cost(config, block) + shared_cost(config, block) + config.top_k * expert_cost(config, block)
    return attention_cost(config) + config.num_patches * token


def evaluation_cost(config: DiTMoEConfig) -> float:
    """Return the operations of one image in one evaluation of one branch that computes everything."""
    return fixed_cost(config) + sum(block_cost(config, block) for block in config.blocks)
