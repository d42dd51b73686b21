"""The output of a plan, to the byte, from headers alone: its tensors, where each one's bytes come from, its metadata.

Neither torch nor numpy is imported. `apply` produces the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ditmoe_cli.compression.block_layout import BlockLayout, block_layouts, new_names
from ditmoe_cli.compression.computed import expert_map_bytes, mixture_infos
from ditmoe_cli.compression.delta.delta_sizes import delta_tensors
from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.compression.plan import CompressionPlan, Differences, Experts, Formats, Retraining
from ditmoe_cli.compression.planned_training import planned_training
from ditmoe_cli.compression.recorded import Measured, planned_step, with_measured
from ditmoe_cli.compression.replay.neuron_order import is_ordered
from ditmoe_cli.compression.rounding.smooth import is_smoothed
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.making import computed_here
from ditmoe_cli.files.names import EXPERT_OF, ROUTER, in_block, in_expert, natural_key, split_name
from ditmoe_cli.files.provenance import Distilled, Provenance, Step
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.registry import Format, is_quantizable, quantized_members
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.parameters import is_compressible


@dataclass(frozen=True)
class Copied:
    """Bytes of a stored tensor of the checkpoint."""

    tensor: str


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor."""

    tensor: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """A member of a weight that is rounded to the nearest values of a format, and renamed to `target`."""

    weight: str
    target: TensorInfo
    format: Format


@dataclass(frozen=True)
class Known:
    """Bytes that are known already."""

    data: bytes


@dataclass(frozen=True)
class Computed:
    """Bytes that are computed from calibration data before anything is written."""


Content = Copied | Rows | Packed | Known | Computed


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output, and where its bytes come from."""

    info: TensorInfo
    content: Content


@dataclass(frozen=True)
class PlannedOutput:
    """Everything about an output but its bytes.

    Attributes:
        plan: the plan whose result it is; None for a plain copy.
        tensors: its tensors, in order.
        config: its configuration.
        provenance: its metadata.
    """

    plan: CompressionPlan | None
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

    def needed_bytes(self, output: Output) -> int:
        """Return the bytes that the output takes on disk while it is made: its own, and those of computed weights."""
        computed = sum(tensor.info.nbytes for tensor in self.tensors if isinstance(tensor.content, Computed))
        return self.predicted_bytes(output) + computed

    def measured(self, measured: Measured, device: str) -> PlannedOutput:
        """Return the output with what was measured, and on which device; its bytes are as many."""
        return self._with_last(lambda step: replace(with_measured(step, measured), made=computed_here(device)))

    def trained(self, device: str, dtype: str, processes: int) -> PlannedOutput:
        """Return the output with what trained it; its bytes are as many."""
        made = computed_here(device, dtype=dtype, processes=processes)
        return self._with_last(lambda step: replace(step, made=made))

    def _with_last(self, changed: Callable[[Step], Step]) -> PlannedOutput:
        """Return the output with another last step of its history."""
        *before, last = self.provenance.history
        return replace(self, provenance=replace(self.provenance, history=(*before, changed(last))))


def _few_steps(plan: CompressionPlan, config: DiTMoEConfig) -> Distilled | None:
    """Return by which few steps the result of a plan is sampled; None where it distils none."""
    asked = planned_training(plan) if plan.retraining is not None else None
    return asked.distilled(config.sampler) if isinstance(asked, Distilling) else None


def planned_output(checkpoint: Checkpoint, plan: CompressionPlan | None) -> PlannedOutput:
    """Lay out the result of applying `plan` (None: a plain copy) to `checkpoint`.

    Raises `BadInputError` where the plan is for another checkpoint or names a weight that this one lacks, and
    `InfeasibleError` where it would leave fewer experts than top-k.
    """
    base = checkpoint.provenance()
    if plan is None:
        copies = (PlannedTensor(info, Copied(info.name)) for info in checkpoint.header.tensors.values())
        return PlannedOutput(None, tuple(copies), checkpoint.config, base)
    check_plan(checkpoint, plan)
    draft = Draft([Kept(weight) for weight in checkpoint.weights.values()], [], checkpoint.config.blocks)
    for stage in plan.stages:
        match stage:
            case Experts():
                draft = _with_experts(checkpoint, stage, draft)
            case Differences():
                draft = _with_differences(checkpoint, stage, draft)
            case Retraining():
                pass  # layout and dtypes stay
            case Formats():
                draft = _with_formats(stage, draft)
    tensors = draft.tensors + [tensor for kept in draft.weights for tensor in _moved(checkpoint, kept)]
    if plan.retraining is not None:
        tensors = [replace(tensor, content=Computed()) for tensor in tensors]
    once = {tensor.info.name: tensor for tensor in tensors}  # bases are members of several weights
    config = replace(checkpoint.config, blocks=draft.blocks)
    history = (*base.history, planned_step(plan, checkpoint.config.experts))
    few = _few_steps(plan, config) or base.distilled
    return PlannedOutput(
        plan=plan,
        tensors=tuple(sorted(once.values(), key=lambda tensor: natural_key(tensor.info.name))),
        config=config,
        provenance=replace(base, config=config.to_json(), history=history, distilled=few),
    )


@dataclass(frozen=True)
class Kept:
    """A weight that is still to be copied; the prefix `old` of its members' names is replaced by `new`."""

    weight: Weight
    old: str = ""
    new: str = ""

    def renamed(self, name: str) -> str:
        """Return a member's new name. The base of a difference does not begin with `old`, and keeps its name."""
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


@dataclass(frozen=True)
class Draft:
    """An output after some stages of its plan.

    Attributes:
        weights: those that the stages so far leave as they are.
        tensors: those that take the others' places.
        blocks: the configurations of the blocks.
        computed: the names of the weights that computed ones replace, and under which names; None where nothing takes
            their place.
    """

    weights: list[Kept]
    tensors: list[PlannedTensor]
    blocks: tuple[BlockConfig, ...]
    computed: Mapping[str, str | None] = field(default_factory=dict)


def check_plan(checkpoint: Checkpoint, plan: CompressionPlan) -> None:
    """Raise `BadInputError` for a plan of another checkpoint, and for stages that do not go together."""
    config = checkpoint.config
    if plan.source != checkpoint.fingerprint:
        raise BadInputError(
            f"{checkpoint.path}: the plan is for another checkpoint ({plan.source[:12]}, not "
            f"{checkpoint.fingerprint[:12]}); plan anew for this one"
        )
    before: set[type] = set()
    for stage in plan.stages:
        match stage:
            case Experts() if stage.blocks and len(stage.blocks) != config.depth:
                raise BadInputError(f"the plan has {len(stage.blocks)} blocks, {checkpoint.path} has {config.depth}")
            case Differences() if Experts in before:
                raise BadInputError(
                    "the plan stores experts as differences and changes which experts there are; make that two plans, "
                    "the differences last"
                )
            case Retraining() if Differences in before:
                raise BadInputError("the plan stores differences and trains them; make that two plans (ditmoe heal)")
            case Formats():
                _check_formats(checkpoint, stage, before)
        before.add(type(stage))


def _check_formats(checkpoint: Checkpoint, stage: Formats, before: set[type]) -> None:
    """Refuse formats that a weight cannot have, and stages before this one that it cannot follow."""
    if stage.rounding is not None and Differences in before:
        raise BadInputError("the plan stores differences and rounds by GPTQ; make that two plans, rounding last")
    if before and (stage.ordering is not None or (stage.rounding is not None and stage.rounding.smoothing)):
        what = "reordering" if stage.ordering is not None else "smoothing"
        raise BadInputError(f"the plan changes experts and has a {what}; make that two plans, {what} last")
    for name, fmt in stage.formats.items():
        _check_format(checkpoint, name, fmt)
        if Differences in before and split_name(name).expert is not None:
            raise BadInputError(f"the plan stores {name!r} as {fmt} and as a difference; choose one")


def _check_format(checkpoint: Checkpoint, name: str, fmt: Format) -> None:
    weight = checkpoint.weights.get(name)
    if weight is None:
        raise BadInputError(f"the plan quantises {name!r}, which {checkpoint.path} does not hold")
    if weight.format is not None:
        raise BadInputError(
            f"{checkpoint.path}: {name!r} is {weight.format} already; quantise the checkpoint that it came from, or "
            "make its weights plain by convert ⟨dequantize⟩"
        )
    if not is_compressible(weight.info):
        raise BadInputError(
            f"the plan stores {name!r} as {fmt}; only matrices of experts, attention, modulation and embedders are "
            "quantised, and never the router"
        )
    if not is_quantizable(weight.info, fmt):
        raise BadInputError(f"the plan stores {name!r} as {fmt}, but its shape or dtype does not allow it")


def _with_experts(checkpoint: Checkpoint, stage: Experts, draft: Draft) -> Draft:
    """Keep, rename or replace the weights of mixtures."""
    layouts = block_layouts(checkpoint, stage)
    if not layouts:
        return draft
    weights: list[Kept] = []
    tensors: list[PlannedTensor] = []
    computed: dict[str, str | None] = {}
    renamed = {old: new for i, layout in enumerate(layouts) for old, new in new_names(i, layout).items()}
    for kept in draft.weights:
        name = kept.weight.info.name
        parts = split_name(name)
        if parts.block is None or not (parts.expert is not None or parts.rest.startswith("moe.")):
            weights.append(kept)
        elif layouts[parts.block].rebuilt:
            computed[name] = renamed.get(name) if parts.expert is not None else name
        elif parts.expert is not None:
            weights += _renumbered(kept, parts.block, parts.expert, layouts[parts.block])
        elif parts.rest == ROUTER:
            tensors.append(_router_rows(kept.weight, layouts[parts.block].rows))
        elif parts.rest != EXPERT_OF:  # which is written anew
            weights.append(kept)
    for i, layout in enumerate(layouts):
        if layout.rebuilt:
            tensors += [PlannedTensor(info, Computed()) for info in mixture_infos(checkpoint, i, layout)]
        else:
            tensors += _expert_map(i, layout)
    blocks = tuple(layout.config for layout in layouts)
    return Draft(weights, draft.tensors + tensors, blocks, {**draft.computed, **computed})


def _renumbered(kept: Kept, block: int, expert: int, layout: BlockLayout) -> list[Kept]:
    """Return a weight under its expert's new number; none where the expert is dropped."""
    experts = [members[0] for members in layout.members]
    if expert not in experts:
        return []
    return [replace(kept, old=in_expert(block, expert, ""), new=in_expert(block, experts.index(expert), ""))]


def _router_rows(weight: Weight, rows: Sequence[int]) -> PlannedTensor:
    if list(rows) == list(range(weight.info.shape[0])):
        return PlannedTensor(weight.info, Copied(weight.info.name))
    info = replace(weight.info, shape=(len(rows), weight.info.shape[1]))
    return PlannedTensor(info, Rows(weight.info.name, tuple(rows)))


def _expert_map(block: int, layout: BlockLayout) -> list[PlannedTensor]:
    """Return the map from router rows to experts, where rows do not select experts one by one."""
    if not layout.config.mapped:
        return []
    info = TensorInfo(in_block(block, EXPERT_OF), "I32", (len(layout.rows),))
    return [PlannedTensor(info, Known(expert_map_bytes(layout.selects)))]


def _with_differences(checkpoint: Checkpoint, stage: Differences, draft: Draft) -> Draft:
    """Replace the experts' matrices by bases and differences."""
    weights = [kept for kept in draft.weights if split_name(kept.weight.info.name).expert is None]
    tensors = [PlannedTensor(info, Computed()) for info in delta_tensors(checkpoint, stage)]
    return replace(draft, weights=weights, tensors=draft.tensors + tensors)


def _with_formats(stage: Formats, draft: Draft) -> Draft:
    """Replace the weights that get a format by its members.

    Formats of weights that a stage before drops have no effect. Raises `BadInputError` for formats of weights that one
    computes where they are not rounded by GPTQ.
    """
    packed: dict[str, Format] = {}
    for name, fmt in stage.formats.items():
        if name in draft.computed:
            if stage.rounding is None:
                raise BadInputError(
                    f"the plan computes {name!r} and stores it as {fmt}; round by gptq, or in another plan"
                )
            packed[draft.computed[name] or ""] = fmt  # of a weight that goes: nothing has that name
    before = [tensor for kept in draft.tensors for tensor in _packed(kept, packed.get(kept.info.name))]
    weights: list[Kept] = []
    tensors: list[PlannedTensor] = []
    for kept in draft.weights:
        replaced = _quantised(stage, kept)
        tensors += replaced
        weights += [] if replaced else [kept]
    return replace(draft, weights=weights, tensors=before + tensors)


def _packed(tensor: PlannedTensor, fmt: Format | None) -> list[PlannedTensor]:
    """Return the tensors that store a computed weight in a format; itself without one."""
    if fmt is None:
        return [tensor]
    if not is_quantizable(tensor.info, fmt):
        raise BadInputError(f"the plan stores {tensor.info.name!r} as {fmt}, but its new shape does not allow it")
    return [PlannedTensor(member, Computed()) for member in quantized_members(tensor.info, fmt)]


def _quantised(stage: Formats, kept: Kept) -> list[PlannedTensor]:
    """Return the tensors that store a weight that is quantised, reordered or smoothed; none where it is none of that.

    A weight's members are computed where calibration data enters them, and packed while writing elsewhere.
    """
    info = kept.weight.info
    fmt, ordered, computed = stage.formats.get(info.name), is_ordered(stage, info.name), Computed()
    if fmt is None:
        return [PlannedTensor(info, computed)] if ordered or is_smoothed(stage, info.name) else []
    target = replace(info, name=kept.renamed(info.name))
    by_gptq = stage.rounding is not None and split_name(info.name).block is not None
    content = computed if ordered or by_gptq else Packed(info.name, target, fmt)
    return [PlannedTensor(member, content) for member in quantized_members(target, fmt)]


def _moved(checkpoint: Checkpoint, kept: Kept) -> list[PlannedTensor]:
    """Return the members of a weight that is copied, under their new names."""
    return [
        PlannedTensor(replace(checkpoint.header.tensors[member], name=kept.renamed(member)), Copied(member))
        for member in kept.weight.members
    ]
