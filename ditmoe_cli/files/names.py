"""Tensor names, parsed and composed. They are those of feizc/DiT-MoE, on disk as well."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_WRAPPERS = ("module.", "_orig_mod.", "model.")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^moe\.experts\.(\d+)\.(.+)$")

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


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Map upstream names to the stored names, which may have wrappers such as ``module.`` before them.

    Only wrappers that all names carry are removed, so a tensor that is itself called ``model.x`` keeps its name.
    """
    result = {name: name for name in names}
    while result:
        wrapper = next((w for w in _WRAPPERS if all(name.startswith(w) for name in result)), None)
        if wrapper is None:
            break
        result = {name.removeprefix(wrapper): stored for name, stored in result.items()}
    return result


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that puts ``experts.2`` before ``experts.10``."""
    return tuple((0, int(p)) if p.isdecimal() else (1, p) for p in name.split("."))
