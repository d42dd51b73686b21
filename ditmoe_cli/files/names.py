"""Tensor names, parsed and composed. They are those of feizc/DiT-MoE, on disk as well."""

from __future__ import annotations

import re
from dataclasses import dataclass

# what DDP and averages, torch.compile, FSDP, activation checkpointing and Lightning's Fabric put into names
_WRAPPERS = frozenset(
    (
        *("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
        *("_forward_module", "_original_module"),
    )
)
_BLOCK = re.compile(r"^blocks\.(\d{1,9})\.(.+)$")
_EXPERT = re.compile(r"^moe\.experts\.(\d{1,9})\.(.+)$")

_LONG = 19  # digits of what is no number of a part any more, and would take long to read

MATRICES = ("gate_proj", "up_proj", "down_proj")
SHARED = "moe.shared_experts"
BASE = "moe.base"
ROUTER = "moe.gate.weight"
EXPERT_OF = "moe.gate.expert_of"
CONSTANTS = "moe.constants"
CONSTANTS_UP = "moe.constants_up"
CONSTANTS_DOWN = "moe.constants_down"
RESIDUAL_CONSTANT = "moe.residual_constant"
RESIDUAL_LINEAR = "moe.residual_linear"


@dataclass(frozen=True)
class NameParts:
    """The parts of a tensor name; block and expert are None where it has none, `rest` is the remainder.

    ``blocks.3.moe.experts.10.up_proj.weight`` is block 3, expert 10, rest ``up_proj.weight``.
    """

    block: int | None
    expert: int | None
    rest: str


def split_name(name: str) -> NameParts:
    """Return the block, the expert and the rest of a tensor name."""
    block = _BLOCK.match(name)
    if block is None:
        return NameParts(None, None, name)
    expert = _EXPERT.match(block[2])
    if expert is None:
        return NameParts(int(block[1]), None, block[2])
    return NameParts(int(block[1]), int(expert[1]), expert[2])


def in_block(block: int, rest: str) -> str:
    """Return the name of the tensor `rest` of a block."""
    return f"blocks.{block}.{rest}"


def in_expert(block: int, expert: int, rest: str) -> str:
    """Return the name of the tensor `rest` of a routed expert."""
    return f"blocks.{block}.moe.experts.{expert}.{rest}"


def unwrapped(name: str) -> tuple[str, list[int]]:
    """Return a stored name without the wrappers in it, and the index in the stored name of each part that is left.

    ``module.blocks.0._orig_mod.attn.qkv.bias`` is ``blocks.0.attn.qkv.bias``, of parts 1, 2, 4, 5 and 6.
    """
    parts = name.split(".")
    kept = [index for index, part in enumerate(parts) if part not in _WRAPPERS] or list(range(len(parts)))
    return ".".join(parts[index] for index in kept), kept


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts ``experts.2`` before ``experts.10``."""
    return tuple((0, int(p)) if p.isdecimal() and len(p) < _LONG else (1, p) for p in name.split("."))
