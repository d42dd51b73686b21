"""Plans carried out: the one function that writes compressed checkpoints.

What the output holds is known from headers alone, to the byte (`planned_output`); its content is produced one
tensor at a time while it is written (`apply`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ditmoe_cli.compression.block_layout import BlockLayout, block_layouts
from ditmoe_cli.compression.computed import Spool, expert_map_bytes, source_dtype
from ditmoe_cli.compression.delta.delta_sizes import delta_tensors
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.replay.ordered import is_ordered
from ditmoe_cli.compression.rounding.smoothed import is_smoothed
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import EXPERT_OF, ROUTER, in_block, in_expert, natural_key, split_name
from ditmoe_cli.files.provenance import Provenance, Step
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.weights import Format, Weight, is_quantizable, quantized_members
from ditmoe_cli.model.config import DiTMoEConfig, mixture_shapes
from ditmoe_cli.model.opened import Checkpoint, is_compressible
from ditmoe_cli.progress import ProgressBar, silent_bar
from ditmoe_cli.routing.profile import RoutingProfile

Producer = Callable[[], memoryview]

_SMALL = 256  # bytes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output, and how to get its bytes; None where they are computed before writing."""

    info: TensorInfo
    produce: Producer | None


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
    layouts = block_layouts(checkpoint, plan)
    _check_copied(plan, layouts)
    tensors: list[PlannedTensor] = []
    for weight in checkpoint.weights.values():
        tensors += _transformed(checkpoint, plan, layouts, weight)
    for i, layout in enumerate(layouts):
        tensors += _rebuilt(checkpoint, i, layout) if layout.rebuilt else _expert_map(i, layout)
    if plan.delta is not None:
        tensors += [PlannedTensor(info, None) for info in delta_tensors(checkpoint, plan.delta)]
    once = {tensor.info.name: tensor for tensor in tensors}  # bases are members of several weights
    tensors = sorted(once.values(), key=lambda tensor: natural_key(tensor.info.name))
    config = replace(checkpoint.config, blocks=tuple(layout.config for layout in layouts) or checkpoint.config.blocks)
    history = (*base.history, Step(plan.command, plan.source, plan.digest))
    provenance = Provenance(config.to_json(), history, base.card)
    return PlannedOutput(tuple(tensors), config, provenance)


def apply(
    checkpoint: Checkpoint,
    plan: CompressionPlan | None,
    output: Output,
    bar: ProgressBar | None = None,
    profile: RoutingProfile | None = None,
    device: str = "cpu",
) -> Applied:
    """Write what `plan` makes of `checkpoint` (None: a copy in safetensors).

    One weight is in memory at a time; where weights are computed, one block's and the calibration tokens, on
    `device`. `profile` is what such a plan was made with. Raises what `planned_output` raises, `BadInputError` for NaN
    or infinite weights and for a profile that is missing or another one, and `OutputExistsError`.
    """
    if plan is not None and not plan.decided:
        raise BadInputError("the plan leaves open which experts stay; plan again with a profile")
    planned = planned_output(checkpoint, plan)
    if plan is None or not plan.rebuilds:
        return Applied(_write(checkpoint, planned, output, bar, None), Computed())
    check_target(output.path, output.force, [checkpoint.path])
    with TemporaryDirectory(prefix="ditmoe-") as folder:
        spool = Spool(Path(folder))
        computed = _compute(checkpoint, plan, _profile_of(plan, profile), spool, device, bar or silent_bar)
        return Applied(_write(checkpoint, planned, output, bar, spool), computed)


@dataclass(frozen=True)
class Computed:
    """What computing weights told.

    Attributes:
        repaired: each block's held-out error after refitting over that before.
        error: relative squared error of the guided prediction of a rounded model, on the calibration states.
        agreement: of each block, the share of selected experts that original and rounded model both select.
    """

    repaired: tuple[float, ...] = ()
    error: float | None = None
    agreement: tuple[float, ...] = ()


@dataclass(frozen=True)
class Applied:
    """What was written: bytes on disk, and what computing it told."""

    bytes: int
    computed: Computed


def _compute(
    checkpoint: Checkpoint, plan: CompressionPlan, profile: RoutingProfile, spool: Spool, device: str, bar: ProgressBar
) -> Computed:
    """Compute into `spool` what is not copied."""
    if plan.delta is not None:
        from ditmoe_cli.compression.delta import differencing as differences

        differences.encode(checkpoint, plan.delta, profile, spool, device, bar)
        return Computed()
    if plan.rounding is not None:
        from ditmoe_cli.compression.rounding.gptq_blocks import encode

        rounded = encode(checkpoint, plan, profile, spool, device, bar)
        return Computed(error=rounded.error, agreement=rounded.agreement)
    if plan.ordering is not None:
        from ditmoe_cli.compression.replay.neuron_order import encode_ordered

        encode_ordered(checkpoint, plan, profile, spool, device, bar)
        return Computed()
    from ditmoe_cli.compression.rebuild import rebuild

    return Computed(rebuild(checkpoint, plan, block_layouts(checkpoint, plan), profile, spool, device, bar))


def _profile_of(plan: CompressionPlan, profile: RoutingProfile | None) -> RoutingProfile:
    if profile is None:
        raise BadInputError(
            "the plan computes weights from a routing profile; give the one that it was made with (--profile)"
        )
    if plan.profile is not None and profile.digest != plan.profile:
        raise BadInputError(
            f"{profile.path}: is not the profile that the plan was made with ({profile.digest[:12]}, not "
            f"{plan.profile[:12]})"
        )
    return profile


def _write(
    checkpoint: Checkpoint, planned: PlannedOutput, output: Output, bar: ProgressBar | None, spool: Spool | None
) -> int:
    producers = {tensor.info.name: tensor.produce for tensor in planned.tensors}
    with (bar or silent_bar)(f"writing {output.path.name}", sum(info.nbytes for info in planned.infos)) as progress:

        def content(info: TensorInfo) -> memoryview:
            produce = producers[info.name]
            if produce is None:
                assert spool is not None
                data = spool.read(info.name)
            else:
                data = produce()
            progress(info.nbytes)
            return data

        return output.write(planned.infos, content, planned.provenance, [checkpoint.path])


def _copies(checkpoint: Checkpoint) -> Iterator[PlannedTensor]:
    for info in checkpoint.header.tensors.values():
        yield PlannedTensor(info, _reading(checkpoint, info.name))


def _reading(checkpoint: Checkpoint, name: str) -> Producer:
    def produce() -> memoryview:
        from ditmoe_cli.files.reader import tensor_bytes

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
    if plan.delta is not None and (plan.blocks or plan.merging or plan.repair):
        raise BadInputError(
            "the plan stores experts as differences and changes which experts there are; make that two plans, the "
            "differences last"
        )
    if plan.rounding is not None and (plan.blocks or plan.delta is not None):
        raise BadInputError("the plan computes weights and rounds them by GPTQ; make that two plans, rounding last")
    if plan.ordering is not None and (plan.blocks or plan.delta is not None):
        raise BadInputError(
            "the plan computes weights and reorders their neurons; make that two plans, reordering last"
        )
    for name, fmt in plan.formats.items():
        _check_format(checkpoint, name, fmt)
        if plan.delta is not None and split_name(name).expert is not None:
            raise BadInputError(f"the plan stores {name!r} as {fmt} and as a difference; choose one")


def _check_copied(plan: CompressionPlan, layouts: Sequence[BlockLayout]) -> None:
    """Refuse formats of weights that are computed, which are written as they are."""
    for name, fmt in plan.formats.items():
        parts = split_name(name)
        in_mixture = parts.expert is not None or parts.rest.startswith("moe.")
        if layouts and parts.block is not None and in_mixture and layouts[parts.block].rebuilt:
            raise BadInputError(f"the plan computes {name!r} and stores it as {fmt}; make that two plans")


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
            f"the plan stores {name!r} as {fmt}; only matrices of experts, attention, modulation and embedders are "
            "quantised, and never the router"
        )
    if not is_quantizable(weight.info, fmt):
        raise BadInputError(f"the plan stores {name!r} as {fmt}, but its shape or dtype does not allow it")


def _transformed(
    checkpoint: Checkpoint, plan: CompressionPlan, layouts: Sequence[BlockLayout], weight: Weight
) -> list[PlannedTensor]:
    """Return the output tensors that come of one weight; none where its expert is dropped."""
    name = weight.info.name
    parts = split_name(name)
    if plan.delta is not None and parts.expert is not None:
        return []  # written as a difference
    if layouts and parts.block is not None and parts.rest.startswith("moe.") | (parts.expert is not None):
        layout = layouts[parts.block]
        if layout.rebuilt or parts.rest == EXPERT_OF:
            return []  # written anew
        if parts.rest == ROUTER:
            return [_router_rows(checkpoint, weight, layout.rows)]
        if parts.expert is not None:
            kept = [members[0] for members in layout.members]
            if parts.expert not in kept:
                return []
            stem = in_expert(parts.block, kept.index(parts.expert), "")
            return _moved(checkpoint, weight, in_expert(parts.block, parts.expert, ""), stem, plan.formats.get(name))
    fmt = plan.formats.get(name)
    ordered = is_ordered(plan, name)
    if fmt is not None and (ordered or (plan.rounding is not None and parts.block is not None)):
        return [PlannedTensor(info, None) for info in quantized_members(weight.info, fmt)]
    smoothed = plan.rounding is not None and plan.rounding.smoothing and is_smoothed(name)
    if fmt is None and (ordered or smoothed):
        return [PlannedTensor(weight.info, None)]
    return _moved(checkpoint, weight, "", "", fmt)


def _moved(checkpoint: Checkpoint, weight: Weight, old: str, new: str, fmt: Format | None) -> list[PlannedTensor]:
    """Return a weight's members with the prefix `old` of their names replaced by `new`, packed if `fmt` is given.

    The base of an expert's matrix is none of the expert's own, and keeps its name.
    """
    if fmt is not None:
        target = replace(weight.info, name=new + weight.info.name.removeprefix(old))
        return _packed(checkpoint, weight.info.name, target, fmt)
    moved = []
    for member in weight.members:
        name = new + member.removeprefix(old) if member.startswith(old) else member
        info = replace(checkpoint.header.tensors[member], name=name)
        moved.append(PlannedTensor(info, _reading(checkpoint, member)))
    return moved


def _packed(checkpoint: Checkpoint, source: str, target: TensorInfo, fmt: Format) -> list[PlannedTensor]:
    """Return the members of a weight to be quantised; they are packed together when the first is asked for."""
    infos = quantized_members(target, fmt)
    waiting: dict[str, memoryview] = {}

    def produce(name: str) -> memoryview:
        from ditmoe_cli.files.reader import tensor_bytes
        from ditmoe_cli.formats.quantized import pack

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


def _router_rows(checkpoint: Checkpoint, weight: Weight, rows: Sequence[int]) -> PlannedTensor:
    def produce() -> memoryview:
        from ditmoe_cli.files.reader import tensor_bytes

        return tensor_bytes(checkpoint.finite_tensor(weight.info.name)[list(rows)])

    return PlannedTensor(replace(weight.info, shape=(len(rows), weight.info.shape[1])), produce)


def _expert_map(block: int, layout: BlockLayout) -> list[PlannedTensor]:
    if not layout.config.mapped:
        return []
    data = expert_map_bytes(layout.selects)
    return [PlannedTensor(TensorInfo(in_block(block, EXPERT_OF), "I32", (len(layout.rows),)), lambda: memoryview(data))]


def _rebuilt(checkpoint: Checkpoint, block: int, layout: BlockLayout) -> list[PlannedTensor]:
    """Return the tensors of a mixture whose weights are computed, in the dtypes of what they come from."""
    tensors = []
    for name, shape in mixture_shapes(checkpoint.config.hidden_size, layout.config).items():
        dtype = "I32" if name == EXPERT_OF else source_dtype(checkpoint, block, layout, name)
        tensors.append(PlannedTensor(TensorInfo(in_block(block, name), dtype, shape), None))
    return tensors
