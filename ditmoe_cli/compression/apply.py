"""Plans carried out: the one function that writes compressed checkpoints.

What the output holds is known from headers alone, to the byte (`planned_output`); its content is produced one
tensor at a time while it is written (`apply`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ditmoe_cli.checkpoint.formats import Format, Weight, is_quantizable, quantized_members
from ditmoe_cli.checkpoint.header import TensorInfo
from ditmoe_cli.checkpoint.names import EXPERT_OF, ROUTER, in_block, in_expert, natural_key, split_name
from ditmoe_cli.checkpoint.provenance import Provenance, Step
from ditmoe_cli.checkpoint.writer import Output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.checkpoint import Checkpoint, is_compressible
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig

Producer = Callable[[], memoryview]
KeptRows = tuple[tuple[int, ...], tuple[int, ...], bool]
Progress = Callable[[int], None]

_SMALL = 256  # bytes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output, and how to get its bytes."""

    info: TensorInfo
    produce: Producer


@dataclass(frozen=True)
class PlannedOutput:
    """Everything about an output but its bytes."""

    tensors: tuple[PlannedTensor, ...]
    config: DiTMoEConfig
    provenance: Provenance

    @property
    def infos(self) -> list[TensorInfo]:
        """The tensors, in order."""
        return [tensor.info for tensor in self.tensors]

    def predicted_bytes(self, output: Output) -> int:
        """Return the exact bytes that the output will take on disk."""
        return output.predicted_bytes(self.infos, self.provenance)


def planned_output(checkpoint: Checkpoint, plan: CompressionPlan | None) -> PlannedOutput:
    """Lay out what `plan` makes of `checkpoint` (None: a plain copy), from headers alone.

    Raises `BadInputError` where the plan is for another checkpoint or names what this one lacks, and
    `InfeasibleError` where it would leave fewer experts than top-k.
    """
    base = checkpoint.provenance()
    if plan is None:
        return PlannedOutput(tuple(_copies(checkpoint)), checkpoint.config, base)
    _check_plan(checkpoint, plan)
    rows = _kept_rows(checkpoint, plan)
    tensors: list[PlannedTensor] = []
    for weight in checkpoint.weights.values():
        tensors += _transformed(checkpoint, plan, rows, weight)
    tensors += [_expert_map(i, *kept) for i, kept in enumerate(rows) if kept[2]]
    tensors.sort(key=lambda tensor: natural_key(tensor.info.name))
    config = _planned_config(checkpoint, plan, rows)
    history = (*base.history, Step(plan.command, plan.source, plan.digest))
    provenance = Provenance(config.to_json(), history, base.card)
    return PlannedOutput(tuple(tensors), config, provenance)


def apply(
    checkpoint: Checkpoint, plan: CompressionPlan | None, output: Output, progress: Progress | None = None
) -> int:
    """Write what `plan` makes of `checkpoint` (None: a copy in safetensors); return its bytes on disk.

    One weight is in memory at a time. `progress` is told the bytes written with each tensor. Raises what
    `planned_output` raises, `BadInputError` for NaN or infinite weights, and `OutputExistsError`.
    """
    if plan is not None and not plan.decided:
        raise BadInputError("the plan leaves open which experts stay; plan again with a profile")
    planned = planned_output(checkpoint, plan)
    producers = {tensor.info.name: tensor.produce for tensor in planned.tensors}

    def content(info: TensorInfo) -> memoryview:
        data = producers[info.name]()
        if progress is not None:
            progress(info.nbytes)
        return data

    return output.write(planned.infos, content, planned.provenance, [checkpoint.path])


def _copies(checkpoint: Checkpoint) -> Iterator[PlannedTensor]:
    for info in checkpoint.header.tensors.values():
        yield PlannedTensor(info, _reading(checkpoint, info.name))


def _reading(checkpoint: Checkpoint, name: str) -> Producer:
    def produce() -> memoryview:
        from ditmoe_cli.checkpoint.reader import tensor_bytes

        return tensor_bytes(checkpoint.finite_tensor(name))

    return produce


def _check_plan(checkpoint: Checkpoint, plan: CompressionPlan) -> None:
    config = checkpoint.config
    if plan.source != checkpoint.fingerprint:
        raise BadInputError(
            f"{checkpoint.path}: the plan is for another checkpoint ({plan.source[:12]}, not "
            f"{checkpoint.fingerprint[:12]}); plan anew for this one"
        )
    if plan.blocks and len(plan.blocks) != config.depth:
        raise BadInputError(f"the plan has {len(plan.blocks)} blocks, {checkpoint.path} has {config.depth}")
    for i, (block, shapes) in enumerate(zip(plan.blocks, config.blocks, strict=False)):
        if max(block.keep) >= len(shapes.expert_widths):
            raise BadInputError(
                f"the plan keeps expert {max(block.keep)} of block {i}, which has {len(shapes.expert_widths)} experts"
            )
        selectable = sum(expert in block.keep for expert in checkpoint.expert_map(i))
        if min(selectable, len(block.keep)) < config.top_k:
            raise InfeasibleError(
                f"block {i} would keep {len(block.keep)} of {len(shapes.expert_widths)} experts, fewer than its "
                f"top-{config.top_k} routing needs; keep at least {config.top_k}"
            )
    for name, fmt in plan.formats.items():
        _check_format(checkpoint, name, fmt)


def _check_format(checkpoint: Checkpoint, name: str, fmt: Format) -> None:
    weight = checkpoint.weights.get(name)
    if weight is None:
        raise BadInputError(f"the plan quantises {name!r}, which {checkpoint.path} does not hold")
    if weight.format is not None:
        raise BadInputError(
            f"{checkpoint.path}: {name!r} is {weight.format} already; quantise the checkpoint that it came from"
        )
    if not is_compressible(weight.info):
        raise BadInputError(
            f"the plan stores {name!r} as {fmt}; only expert, shared and attention matrices are quantised"
        )
    if not is_quantizable(weight.info):
        raise BadInputError(f"the plan stores {name!r} as {fmt}, but its shape or dtype does not allow it")


def _transformed(
    checkpoint: Checkpoint, plan: CompressionPlan, rows: Sequence[KeptRows], weight: Weight
) -> list[PlannedTensor]:
    """Return the output tensors that come of one weight; none where its expert is dropped."""
    name = weight.info.name
    parts = split_name(name)
    block = plan.blocks[parts.block] if plan.blocks and parts.block is not None else None
    if block is not None and parts.block is not None:
        if parts.rest == ROUTER:
            return [_router_rows(checkpoint, weight, rows[parts.block][0])]
        if parts.rest == EXPERT_OF:
            return []  # written anew by _expert_map
        if parts.expert is not None:
            if parts.expert not in block.keep:
                return []
            stem = in_expert(parts.block, block.keep.index(parts.expert), "")
            return _moved(checkpoint, weight, in_expert(parts.block, parts.expert, ""), stem, plan.formats.get(name))
    return _moved(checkpoint, weight, "", "", plan.formats.get(name))


def _moved(checkpoint: Checkpoint, weight: Weight, old: str, new: str, fmt: Format | None) -> list[PlannedTensor]:
    """Return a weight's members with the prefix `old` of their names replaced by `new`, packed if `fmt` is given."""
    if fmt is not None:
        target = replace(weight.info, name=new + weight.info.name.removeprefix(old))
        return _packed(checkpoint, weight.info.name, target, fmt)
    moved = []
    for member in weight.members:
        info = replace(checkpoint.header.tensors[member], name=new + member.removeprefix(old))
        moved.append(PlannedTensor(info, _reading(checkpoint, member)))
    return moved


def _packed(checkpoint: Checkpoint, source: str, target: TensorInfo, fmt: Format) -> list[PlannedTensor]:
    """Return the members of a weight to be quantised; they are packed together when the first is asked for."""
    infos = quantized_members(target, fmt)
    waiting: dict[str, memoryview] = {}

    def produce(name: str) -> memoryview:
        from ditmoe_cli.checkpoint.reader import tensor_bytes
        from ditmoe_cli.model.quantized import pack

        if name not in waiting:
            packed = pack(checkpoint.finite_tensor(source), target, fmt)
            waiting.update({member: _held(tensor_bytes(tensor)) for member, tensor in packed.items()})
        return waiting.pop(name)

    return [PlannedTensor(info, lambda name=info.name: produce(name)) for info in infos]  # type: ignore[misc]


def _held(data: memoryview) -> memoryview:
    """Return bytes that may wait for long: small ones as a copy in Python's own memory.

    The last bytes of each weight are written at the end of the file. Left where torch allocated them, between
    large blocks since freed, they would keep the allocator from using those again, and memory would grow with
    the checkpoint.
    """
    return memoryview(bytes(data)) if data.nbytes <= _SMALL else data


def _kept_rows(checkpoint: Checkpoint, plan: CompressionPlan) -> list[KeptRows]:
    """Return for each block the router rows that stay, what each selects, and whether that must be written."""
    return [_block_rows(checkpoint.expert_map(i), block) for i, block in enumerate(plan.blocks)]


def _block_rows(expert_of: Sequence[int], block: BlockPlan) -> KeptRows:
    renumbered = {expert: new for new, expert in enumerate(block.keep)}
    selects = [renumbered.get(expert, -1) for expert in expert_of]
    rows = [row for row, new in enumerate(selects) if block.router == "ghost" or new >= 0]
    kept = tuple(selects[row] for row in rows)
    return tuple(rows), kept, kept != tuple(range(len(block.keep)))


def _router_rows(checkpoint: Checkpoint, weight: Weight, rows: Sequence[int]) -> PlannedTensor:
    def produce() -> memoryview:
        from ditmoe_cli.checkpoint.reader import tensor_bytes

        return tensor_bytes(checkpoint.finite_tensor(weight.info.name)[list(rows)])

    return PlannedTensor(replace(weight.info, shape=(len(rows), weight.info.shape[1])), produce)


def _expert_map(block: int, rows: Sequence[int], selects: Sequence[int], _: bool) -> PlannedTensor:
    data = b"".join(expert.to_bytes(4, "little", signed=True) for expert in selects)
    return PlannedTensor(TensorInfo(in_block(block, EXPERT_OF), "I32", (len(rows),)), lambda: memoryview(data))


def _planned_config(checkpoint: Checkpoint, plan: CompressionPlan, kept: Sequence[KeptRows]) -> DiTMoEConfig:
    config = checkpoint.config
    if not plan.blocks:
        return config
    blocks = [
        BlockConfig(len(rows), tuple(old.expert_widths[e] for e in block.keep), old.shared_width, mapped)
        for old, block, (rows, _, mapped) in zip(config.blocks, plan.blocks, kept, strict=True)
    ]
    return replace(config, blocks=tuple(blocks))
