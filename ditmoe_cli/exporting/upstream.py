"""What upstream's code (feizc/DiT-MoE) can hold, and the arguments of its ``DiT`` that build it.

Its blocks are alike. Each has one expert of width ``mlp_ratio`` times the model's (a whole number) for each row of the
router, and a shared expert of twice the model's width; a label table has a null row if ``class_dropout_prob`` is not 0.
Everything else that compression makes of a mixture has no module there.
"""

from __future__ import annotations

from collections.abc import Callable

from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig

_SHARED = 2  # width of the shared expert over that of the model
_CLASS_DROPOUT = 0.1
_WIDEST_HEAD, _HEAD_STEP = 128, 8  # of flash attention

_EXTENSIONS: tuple[tuple[Callable[[BlockConfig], object], str, str], ...] = (
    (
        lambda block: block.constants,
        "constants in the place of experts",
        "prune with ⟨router⟩ slice, and without ⟨constants⟩ and ⟨residual_rank⟩",
    ),
    (lambda block: block.mass, "rescaled routing weights", "prune with ⟨router⟩ slice"),
    (
        lambda block: block.residual_constant or block.residual_linear,
        "a residual that a refit added",
        "prune or merge with ⟨router⟩ slice",
    ),
    (
        lambda block: block.mapped,
        "a router with rows that select no expert, or one that others select too",
        "prune or merge with ⟨router⟩ slice",
    ),
)


def obstacle(config: DiTMoEConfig) -> str | None:
    """Return what upstream's code has no module for in a model, and how to compress it instead; None for nothing."""
    for has, what, remedy in _EXTENSIONS:
        block = next((i for i, block in enumerate(config.blocks) if has(block)), None)
        if block is not None:
            return f"block {block} has {what}; {remedy} instead"
    first = config.blocks[0]
    width, hidden = first.expert_widths[0], config.hidden_size
    if len(set(config.experts)) > 1:
        counts = f"{min(config.experts)} to {max(config.experts)}"
        return f"blocks have {counts} experts, and all need as many; keep the same number in each (⟨allocate⟩ uniform)"
    other = next((w for block in config.blocks for w in block.expert_widths if w != width), None)
    if other is not None:
        return f"experts have {width} and {other} neurons, and all need as many; narrow them alike (⟨allocate⟩ uniform)"
    if width % hidden:
        return (
            f"experts have {width} neurons, no multiple of the width {hidden}; narrow them to one (⟨multiple⟩ {hidden})"
        )
    shared = next((block.shared_width for block in config.blocks if block.shared_width != _SHARED * hidden), None)
    if shared is not None:
        return f"a shared expert has {shared} neurons, not {_SHARED * hidden}; prune without ⟨narrow_shared⟩"
    head = config.hidden_size // config.num_heads if config.num_heads else _HEAD_STEP
    if config.attention == "flash" and (head % _HEAD_STEP or head > _WIDEST_HEAD):
        return f"its heads are {head} wide, and flash attention takes multiples of {_HEAD_STEP} up to {_WIDEST_HEAD}"
    return None


def arguments(config: DiTMoEConfig) -> dict[str, int | float | bool]:
    """Return the keyword arguments of upstream's ``DiT`` that build a model without `obstacle`."""
    return {
        "input_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.blocks[0].expert_widths[0] // config.hidden_size,
        "class_dropout_prob": _CLASS_DROPOUT if config.null_class else 0.0,
        "num_classes": config.num_classes,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "learn_sigma": config.out_channels != config.in_channels,
        "use_flash_attn": config.attention == "flash",
    }
