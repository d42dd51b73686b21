"""The router map and the shapes of each block of a result, known from headers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.plan import BlockPlan, Experts, Repair
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import GHOST, BlockConfig


@dataclass(frozen=True)
class BlockLayout:
    """A block to be written.

    Attributes:
        rows: router rows that stay, by their old numbers.
        selects: the expert (by its new number), constant or nothing that each row selects, as ``expert_of`` holds it.
        members: for each new expert, the old ones that it is made of, the kept one first.
        dropped: old experts that are neither kept nor merged.
        config: shapes of the result.
        rebuilt: whether its weights are computed; otherwise they are copied.
    """

    rows: tuple[int, ...]
    selects: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]
    config: BlockConfig
    rebuilt: bool


def block_layouts(checkpoint: Checkpoint, stage: Experts) -> list[BlockLayout]:
    """Lay out every block that a stage names.

    Raises `BadInputError` where it names experts or neurons that the checkpoint lacks, or computes weights of quantised
    experts, and `InfeasibleError` where fewer experts than top-k would stay.
    """
    for i, block in enumerate(stage.blocks):
        _check_together(checkpoint, stage, i, block)
    return [_block_layout(checkpoint, stage.repair, i, block) for i, block in enumerate(stage.blocks)]


def new_names(block: int, layout: BlockLayout) -> dict[str, str]:
    """Return the new name of each weight of an expert that others do not replace, by its old one.

    Of merged experts it is the kept one, in whose place the merger stands.
    """
    return {
        in_expert(block, members[0], f"{matrix}.weight"): in_expert(block, new, f"{matrix}.weight")
        for new, members in enumerate(layout.members)
        for matrix in MATRICES
    }


def _check_together(checkpoint: Checkpoint, stage: Experts, index: int, block: BlockPlan) -> None:
    """Refuse fields that are valid alone, but not together."""
    width = checkpoint.config.hidden_size
    if block.merged and stage.merging not in MERGES:
        raise BadInputError(
            f"the plan merges experts, and its merging is {stage.merging!r}; choose {', '.join(MERGES)}"
        )
    if block.merged and block.widths:
        raise BadInputError(f"the plan merges experts of block {index} and gives them widths; narrow in a second plan")
    if block.rank and not block.constants:
        raise BadInputError(f"the plan gives block {index} maps of rank {block.rank} without constants")
    if block.rank > width:
        raise BadInputError(f"block {index} cannot have maps of rank {block.rank}: its width is {width}")


def _block_layout(checkpoint: Checkpoint, repair: Repair | None, index: int, block: BlockPlan) -> BlockLayout:
    old = checkpoint.config.blocks[index]
    _check_experts(old, block, index)
    members = tuple((lead, *(e for e, into in block.merged if into == lead)) for lead in block.keep)
    merged = {e for e, _ in block.merged}
    dropped = tuple(e for e in range(len(old.expert_widths)) if e not in block.keep and e not in merged)
    targets = _targets(block, members, dropped, old.constants)
    selects = [targets.get(expert, expert) for expert in checkpoint.expert_map(index)]
    rows = [
        row for row, new in enumerate(selects) if block.router != "slice" or _stays(checkpoint, index, block, row, new)
    ]
    kept = tuple(selects[row] for row in rows)
    _check_selectable(checkpoint, index, block, kept)
    replaces = block.constants and bool(dropped)
    touched = repair is not None and len(block.keep) < len(old.expert_widths)
    config = BlockConfig(
        router_rows=len(rows),
        expert_widths=block.widths or tuple(old.expert_widths[e] for e in block.keep),
        shared_width=block.shared_width or old.shared_width,
        mapped=kept != tuple(range(len(block.keep))),
        mass=old.mass or (block.router == "mass" and bool(dropped)),
        constants=len(dropped) if replaces else old.constants,
        rank=block.rank if replaces else old.rank,
        residual_constant=old.residual_constant or bool(touched and repair and repair.constant),
        residual_linear=old.residual_linear or bool(touched and repair and repair.linear),
    )
    rebuilt = block.computes or repair is not None
    if rebuilt:
        _require_plain(checkpoint, index)
    return BlockLayout(tuple(rows), kept, members, dropped, config, rebuilt)


def _targets(
    block: BlockPlan, members: Sequence[Sequence[int]], dropped: Sequence[int], constants: int
) -> dict[int, int]:
    """Return the new target of each old expert's rows: a new expert, a constant, or nothing."""
    targets = {old: new for new, group in enumerate(members) for old in group}
    if block.constants and constants:
        raise BadInputError("the plan replaces experts by constants in a checkpoint that has constants already")
    return targets | {e: GHOST - 1 - j if block.constants else GHOST for j, e in enumerate(dropped)}


def _stays(checkpoint: Checkpoint, index: int, block: BlockPlan, row: int, new: int) -> bool:
    """Tell whether a row survives slicing: it selects something, and not an expert that is merged into another."""
    merged = {expert for expert, _ in block.merged}
    return new != GHOST and checkpoint.expert_map(index)[row] not in merged


def _check_experts(old: BlockConfig, block: BlockPlan, index: int) -> None:
    named = (*block.keep, *(e for e, _ in block.merged))
    if max(named) >= len(old.expert_widths):
        raise BadInputError(
            f"the plan keeps expert {max(named)} of block {index}, which has {len(old.expert_widths)} experts"
        )
    for expert, width in zip(block.keep, block.widths, strict=False):
        if width > old.expert_widths[expert]:
            raise BadInputError(
                f"the plan keeps {width} neurons of expert {expert} of block {index}, which has "
                f"{old.expert_widths[expert]}"
            )
    if block.shared_width and block.shared_width > old.shared_width:
        raise BadInputError(
            f"the plan keeps {block.shared_width} neurons of the shared expert of block {index}, which has "
            f"{old.shared_width}"
        )


def _check_selectable(checkpoint: Checkpoint, index: int, block: BlockPlan, selects: Sequence[int]) -> None:
    top_k, experts = checkpoint.config.top_k, len(checkpoint.config.blocks[index].expert_widths)
    if sum(new != GHOST for new in selects) < top_k:
        raise InfeasibleError(
            f"block {index} would keep {len(block.keep)} of {experts} experts, fewer than its top-{top_k} routing "
            f"needs; keep at least {top_k}"
        )


def require_original(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` where any weight is packed: compression begins with what weights were before."""
    packed = next((w for w in checkpoint.weights.values() if w.format is not None), None)
    if packed is not None:
        raise BadInputError(
            f"{checkpoint.path}: {packed.info.name!r} is {packed.format} already; compress the checkpoint that it came "
            "from, or make its weights plain by convert ⟨dequantize⟩"
        )


def require_plain(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` where a mixture is packed: its weights cannot be computed."""
    for index in range(checkpoint.config.depth):
        _require_plain(checkpoint, index)


def _require_plain(checkpoint: Checkpoint, index: int) -> None:
    prefix = f"blocks.{index}.moe."
    packed = next((w for n, w in checkpoint.weights.items() if n.startswith(prefix) and w.format is not None), None)
    if packed is not None:
        raise BadInputError(
            f"{checkpoint.path}: {packed.info.name!r} is {packed.format} already, and what is packed cannot be "
            "refitted, merged or narrowed; do that first, prune with ⟨no_refit⟩, or make its weights plain by convert "
            "⟨dequantize⟩"
        )
