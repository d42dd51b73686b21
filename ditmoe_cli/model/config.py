"""The configuration of a DiT-MoE, inferred from the names and shapes of its tensors.

Settings that no shape shows (top-k, the head count of timm layouts, the sampler family, whether the last label is the
null class) come from the user, else from hints in the file, else from a default that is reported as an assumption. An
unknown head count is refused, since a wrong one would produce garbage without an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ditmoe_cli.briefs import Brief, Fact, in_runs_of, span
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import (
    CONSTANTS,
    CONSTANTS_DOWN,
    CONSTANTS_UP,
    EXPERT_OF,
    MATRICES,
    RESIDUAL_CONSTANT,
    RESIDUAL_LINEAR,
    ROUTER,
    SHARED,
    in_block,
    in_expert,
    split_name,
)
from ditmoe_cli.files.pipelines import SCHEDULER
from ditmoe_cli.model.hints import Hints, is_whole, read_hints

Sampler = Literal["rf", "ddpm"]
AttentionLayout = Literal["timm", "flash"]

FREQUENCIES = 256
GHOST = -1  # in a router map: the row counts in the softmax and is never selected; lower values select constants
UNKNOWN = 0  # heads, where their number cannot be told
DEFAULT_TOP_K = 2
_UPSTREAM_CLASSES = 1000
_MOST_POSITIONS = 512  # patches a side, where nothing but a hint tells: images of 8192 pixels
HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}
_ATTENTION_NAMES: Mapping[AttentionLayout, tuple[str, str]] = {"timm": ("qkv", "proj"), "flash": ("Wqkv", "out_proj")}


@dataclass(frozen=True)
class BlockConfig:
    """The shapes of one block's mixture.

    Attributes:
        router_rows: rows of the router.
        expert_widths: neurons of each routed expert.
        shared_width: neurons of the shared expert.
        mapped: whether the router has a map, ``expert_of``; without it row e selects expert e.
        mass: whether selected routing weights are rescaled to the sum that the top-k of all rows has.
        constants: number of constants that rows select instead of experts.
        rank: rank of the linear maps beside the constants; 0 without them.
        residual_constant: whether the routing mass that selected rows do not carry is multiplied by a constant.
        residual_linear: whether it is multiplied by a linear map of the token.
    """

    router_rows: int
    expert_widths: tuple[int, ...]
    shared_width: int
    mapped: bool = False
    mass: bool = False
    constants: int = 0
    rank: int = 0
    residual_constant: bool = False
    residual_linear: bool = False

    @property
    def upstream(self) -> bool:
        """Whether upstream's code can run the block, apart from differing widths."""
        return not (self.mapped or self.mass or self.constants or self.residual_constant or self.residual_linear)


@dataclass(frozen=True, repr=False)
class DiTMoEConfig(Brief):
    """The configuration of a DiT-MoE.

    `input_size` is the side of the latent, or of the image in pixel space. `num_classes` does not count the null class,
    whose label it is; models that were trained without class dropout have none. `out_channels` is twice `in_channels`
    where sigma is learned. `num_heads` is 0 where it is unknown, which only `infer_config` with `allow_unknown` leaves.
    """

    input_size: int
    patch_size: int
    in_channels: int
    out_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int
    top_k: int
    attention: AttentionLayout
    sampler: Sampler
    blocks: tuple[BlockConfig, ...]
    null_class: bool = True

    @property
    def middle_time(self) -> float:
        """The time in the middle of the family's range: 0.5 of rectified flow's (0, 1], 500 of DDPM's 0 to 999."""
        return 0.5 if self.sampler == "rf" else 500

    @property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.null_class

    @property
    def num_patches(self) -> int:
        """Tokens per image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def pixel_space(self) -> bool:
        """Whether the model predicts pixels (grey or RGB), not latents."""
        return self.in_channels in (1, 3)

    @property
    def experts(self) -> tuple[int, ...]:
        """The number of experts of each block."""
        return tuple(len(block.expert_widths) for block in self.blocks)

    @property
    def num_experts(self) -> int:
        """Routed experts of a block; the largest number where blocks differ."""
        return max(len(block.expert_widths) for block in self.blocks)

    def _brief(self) -> list[Fact]:
        widths = [width for block in self.blocks for width in block.expert_widths]
        return [
            ("family", self.sampler),
            ("blocks", self.depth),
            ("width", self.hidden_size),
            ("heads", self.num_heads or "unknown"),
            ("experts", in_runs_of(self.experts)),
            ("of width", span(widths)),
            ("top-k", self.top_k),
            ("inputs", f"{self.in_channels} x {self.input_size} x {self.input_size} in patches of {self.patch_size}"),
            ("classes", f"{self.num_classes}{'' if self.null_class else ' without a null class'}"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON; values that all blocks share are written once."""
        document = asdict(replace(self, blocks=()))
        del document["blocks"]
        if self.null_class:
            del document["null_class"]  # what most models have is not written, as before there were others
        document["num_experts"] = _shared_value([len(b.expert_widths) for b in self.blocks])
        document["expert_width"] = _shared_value([_shared_value(list(b.expert_widths)) for b in self.blocks])
        document["shared_width"] = _shared_value([b.shared_width for b in self.blocks])
        if any(b.mass for b in self.blocks):
            document["router_mode"] = _shared_value(["mass" if b.mass else "plain" for b in self.blocks])
        return document


def _shared_value(values: list[Any]) -> Any:
    """Return the value that all entries share, or the list itself where they differ."""
    return values[0] if values and all(value == values[0] for value in values) else values


@dataclass(frozen=True)
class Given:
    """Settings of a checkpoint that the user gave; None where not given."""

    num_heads: int | None = None
    top_k: int | None = None
    sampler: Sampler | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Inferred:
    """An inferred configuration, its assumptions, and warnings about hints that were ignored."""

    config: DiTMoEConfig
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def infer_config(
    weights: Mapping[str, TensorInfo],
    raw: Callable[[str], memoryview],
    hints: Mapping[str, Any],
    given: Given,
    where: str,
    allow_unknown: bool = False,
) -> Inferred:
    """Infer a configuration from the weights of a checkpoint.

    Args:
        weights: dtype and shape of each weight, as the model sees it.
        raw: ``raw(name)`` returns a tensor's bytes, none for a quantised weight; rectified flow and DDPM differ in
            those of the final layer.
        hints: training arguments, or the configuration in the file's metadata.
        given: settings of the user.
        where: name of the file in errors.
        allow_unknown: whether to return a configuration of 0 heads where their number cannot be told.

    Raises:
        BadInputError: the weights are not a DiT-MoE's, contradict each other or `given`, or leave the head count open.
    """
    evidence = _Evidence(weights, raw, read_hints(hints), given, where)
    evidence.warnings.extend(evidence.hints.warnings)
    _require_dit_moe(evidence)
    hidden, channels, patch, _ = evidence.shape("x_embedder.proj.weight", 4)
    out_channels = _out_channels(evidence, channels, patch)
    attention: AttentionLayout = "flash" if in_block(0, "attn.Wqkv.weight") in weights else "timm"
    table_rows, _ = evidence.shape("y_embedder.embedding_table.weight", 2)
    num_classes, null_class = _classes(evidence, table_rows)
    depth = _depth(evidence)
    modes = _router_modes(evidence, depth)
    blocks = tuple(_block(evidence, i, modes[i]) for i in range(depth))
    config = DiTMoEConfig(
        input_size=_input_size(evidence, patch),
        patch_size=patch,
        in_channels=channels,
        out_channels=out_channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_num_heads(evidence, hidden, attention, allow_unknown),
        num_classes=num_classes,
        top_k=_top_k(evidence, _selectable_rows(evidence, blocks)),
        attention=attention,
        sampler=_sampler(evidence, channels, out_channels),
        blocks=blocks,
        null_class=null_class,
    )
    _check_shapes(config, evidence)
    _warn_of_contradictions(config, evidence)
    return Inferred(config, tuple(evidence.assumptions), tuple(evidence.warnings))


@dataclass(frozen=True)
class _Evidence:
    """The arguments of `infer_config`, and lists that collect assumptions and warnings."""

    weights: Mapping[str, TensorInfo]
    raw: Callable[[str], memoryview]
    hints: Hints
    given: Given
    where: str
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return a weight's shape. Raises `BadInputError` where it is missing, empty or not of `rank` dimensions."""
        if name not in self.weights:
            raise BadInputError(f"{self.where}: tensor {name!r} is missing; this is not a whole DiT-MoE checkpoint")
        shape = self.weights[name].shape
        if len(shape) != rank or 0 in shape:
            raise BadInputError(f"{self.where}: tensor {name!r} has shape {list(shape)}, expected {rank} dimensions")
        return shape


def _require_dit_moe(evidence: _Evidence) -> None:
    names = evidence.weights
    if any(name.endswith(ROUTER) for name in names):
        return
    if any(name.startswith("blocks.") and ".mlp." in name for name in names):
        raise BadInputError(
            f"{evidence.where}: not a DiT-MoE: its blocks hold dense MLPs (blocks.*.mlp) and no router ({ROUTER})"
        )
    some = ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")
    holds = f"it holds {some}" if some else "it holds no tensors at all"
    raise BadInputError(f"{evidence.where}: not a DiT-MoE: no tensor blocks.*.{ROUTER} ({holds})")


def _depth(evidence: _Evidence) -> int:
    blocks = {parts.block for parts in map(split_name, evidence.weights) if parts.block is not None}
    missing = next((block for block in range(len(blocks)) if block not in blocks), None)
    if missing is not None:
        raise BadInputError(
            f"{evidence.where}: tensor {in_block(missing, ROUTER)!r} is missing; this is not a whole DiT-MoE checkpoint"
        )
    return len(blocks)


def _router_modes(evidence: _Evidence, depth: int) -> list[str]:
    """Return the router mode of each block, plain unless the metadata of a file of ditmoe's names another."""
    hint = evidence.hints.values.get("router_mode", "plain")
    modes = [hint] * depth if isinstance(hint, str) else hint
    if not isinstance(modes, list) or len(modes) != depth or not all(mode in ("plain", "mass") for mode in modes):
        raise BadInputError(
            f"{evidence.where}: the router mode in the metadata is {hint!r}; expected plain or mass a block"
        )
    return modes


def _block(evidence: _Evidence, block: int, mode: str) -> BlockConfig:
    prefix = in_block(block, "moe.experts.")
    # a name such as experts.x. does not parse as an expert, and is refused by _check_shapes
    experts = {
        parts.expert
        for parts in (split_name(name) for name in evidence.weights if name.startswith(prefix))
        if parts.expert is not None
    }
    rows, _ = evidence.shape(in_block(block, ROUTER), 2)
    widths = tuple(evidence.shape(in_expert(block, e, "gate_proj.weight"), 2)[0] for e in range(len(experts)))
    shared, _ = evidence.shape(in_block(block, f"{SHARED}.gate_proj.weight"), 2)
    mapped = in_block(block, EXPERT_OF) in evidence.weights
    if mapped and not experts:
        raise BadInputError(f"{evidence.where}: block {block} holds no routed experts")
    if not mapped and rows != len(experts):
        raise BadInputError(
            f"{evidence.where}: tensor {in_block(block, ROUTER)!r} has {rows} rows, but the block holds "
            f"{len(experts)} experts"
        )
    return BlockConfig(
        router_rows=rows,
        expert_widths=widths,
        shared_width=shared,
        mapped=mapped,
        mass=mode == "mass",
        constants=evidence.shape(in_block(block, CONSTANTS), 2)[0]
        if in_block(block, CONSTANTS) in evidence.weights
        else 0,
        rank=evidence.shape(in_block(block, CONSTANTS_UP), 3)[2]
        if in_block(block, CONSTANTS_UP) in evidence.weights
        else 0,
        residual_constant=in_block(block, RESIDUAL_CONSTANT) in evidence.weights,
        residual_linear=in_block(block, RESIDUAL_LINEAR) in evidence.weights,
    )


def _out_channels(evidence: _Evidence, channels: int, patch: int) -> int:
    rows, _ = evidence.shape("final_layer.linear.weight", 2)
    for out_channels in (channels, 2 * channels):
        if rows == patch * patch * out_channels:
            return out_channels
    raise BadInputError(
        f"{evidence.where}: tensor 'final_layer.linear.weight' has {rows} rows; with {channels} channels and patch "
        f"{patch} expected {patch * patch * channels} or {2 * patch * patch * channels}"
    )


def _input_size(evidence: _Evidence, patch: int) -> int:
    if "pos_embed" in evidence.weights:
        _, tokens, _ = evidence.shape("pos_embed", 3)
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise BadInputError(f"{evidence.where}: tensor 'pos_embed' holds {tokens} positions, not a square")
        return side * patch
    hints = evidence.hints
    hinted = hints.whole("input_size") or hints.whole("image_size") // 8
    if 0 < hinted <= _MOST_POSITIONS * patch and hinted % patch == 0:
        return hinted
    evidence.assumptions.append("input size 32 (256 px): pos_embed is absent and is rebuilt")
    return 32


def _classes(evidence: _Evidence, rows: int) -> tuple[int, bool]:
    """Return the number of classes, and whether a null class stands behind them in the label table of `rows` rows."""
    given, hints = evidence.given.num_classes, evidence.hints
    if given is not None:
        if given < 1 or given not in (rows, rows - 1):
            raise BadInputError(
                f"{evidence.where}: ⟨num_classes⟩ {given} contradicts the label table of {rows} rows: give {rows}"
                + (f", or {rows - 1} where the last is the null class" if rows > 1 else "")
            )
        return given, given < rows
    dropout, hinted = hints.number("class_dropout"), hints.whole("num_classes")
    if rows == 1:
        return 1, False
    if hinted == rows:
        if dropout:
            evidence.warnings.append(
                f"the file's hint {hints.find('class_dropout')} is ignored: the label table has a row for each of the "
                f"{rows} classes, and none for the null class"
            )
        return rows, False
    if hinted == rows - 1:
        if dropout == 0:
            evidence.warnings.append(
                f"the file's hint {hints.find('class_dropout')} says that the null class was not trained, but the "
                "label table has a row for it; guidance takes it as it is"
            )
        return rows - 1, True
    if dropout is not None:
        return (rows, False) if dropout == 0 else (rows - 1, True)
    if rows == _UPSTREAM_CLASSES:
        evidence.assumptions.append(
            f"{rows} classes and no null class: the label table has {rows} rows (or give ⟨num_classes⟩)"
        )
        return rows, False
    if rows != _UPSTREAM_CLASSES + 1:
        evidence.assumptions.append(
            f"{rows - 1} class{'' if rows == 2 else 'es'} and a null class: the label table has {rows} rows "
            "(or give ⟨num_classes⟩)"
        )
    return rows - 1, True


def _num_heads(evidence: _Evidence, hidden: int, attention: AttentionLayout, allow_unknown: bool) -> int:
    given, hints = evidence.given, evidence.hints
    measured = None
    if attention == "flash":
        (head_dim,) = evidence.shape(in_block(0, "attn.q_norm.weight"), 1)
        if hidden % head_dim:
            raise BadInputError(
                f"{evidence.where}: tensor {in_block(0, 'attn.q_norm.weight')!r} has length {head_dim}, which does not "
                f"divide the width {hidden}"
            )
        measured = hidden // head_dim
    if given.num_heads is not None:
        if given.num_heads < 1 or hidden % given.num_heads or measured not in (None, given.num_heads):
            expected = f"it is {measured}" if measured else f"it must divide the width {hidden}"
            raise BadInputError(f"{evidence.where}: ⟨heads⟩ {given.num_heads} contradicts the shapes: {expected}")
        return given.num_heads
    if measured is not None:
        return measured
    head_dim = hints.whole("head_dim")
    hinted = hints.whole("num_heads") or (hidden // head_dim if head_dim and hidden % head_dim == 0 else 0)
    width = hints.find("hidden_size")
    if hinted and hidden % hinted == 0 and (width is None or hints.whole("hidden_size") == hidden):
        return hinted
    hint, told = hints.find("num_heads") or hints.find("head_dim"), ""
    if hint is not None and is_whole(hint.value):
        why = (
            f"{hint.spelling} must divide the width {hidden}" if not hinted or hidden % hinted else f"{width} is wrong"
        )
        told = f"the file's hint {hint} is ignored: {why}"
        evidence.warnings.append(told)
    if hidden in HEADS_BY_WIDTH:
        heads = HEADS_BY_WIDTH[hidden]
        evidence.assumptions.append(f"{heads} attention heads, as upstream models of width {hidden} have")
        return heads
    if allow_unknown:
        return UNKNOWN
    raise BadInputError(
        f"{evidence.where}: the number of attention heads cannot be told from timm tensors of width {hidden}"
        + (f" ({told})" if told else "")
        + "; give it with ⟨heads⟩ (num_heads= in Python)"
    )


def _selectable_rows(evidence: _Evidence, blocks: tuple[BlockConfig, ...]) -> int:
    """Return the number of router rows that top-k can select, in the block that has the fewest.

    Rows that share a merged expert each take a slot; ghost rows take none.
    """
    counts = []
    for i, block in enumerate(blocks):
        if block.mapped:
            name, shape = in_block(i, EXPERT_OF), evidence.shape(in_block(i, EXPERT_OF), 1)
            if shape != (block.router_rows,) or evidence.weights[name].dtype != "I32":
                raise BadInputError(
                    f"{evidence.where}: tensor {name!r} is {evidence.weights[name].dtype} {list(shape)}, expected I32 "
                    f"{[block.router_rows]}, a number for each row of the router"
                )
            counts.append(sum(row != GHOST for row in parse_expert_map(evidence.raw(in_block(i, EXPERT_OF)))))
        else:
            counts.append(block.router_rows)
    return min(counts)


def parse_expert_map(data: memoryview) -> tuple[int, ...]:
    """Return the router map in the bytes of an ``expert_of`` tensor (int32, little-endian)."""
    return tuple(int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, data.nbytes, 4))


def _top_k(evidence: _Evidence, fewest: int) -> int:
    given, hints, where = evidence.given, evidence.hints, evidence.where
    if fewest < 1:
        raise BadInputError(f"{where}: a block's router map {EXPERT_OF!r} selects no expert at all")
    if given.top_k is not None:
        if not 1 <= given.top_k <= fewest:
            raise BadInputError(
                f"{where}: ⟨top_k⟩ {given.top_k} is not between 1 and the {fewest} experts that a block can choose from"
            )
        return given.top_k
    name = hints.model_name
    hinted = hints.whole("top_k") or (name.top_k if name and name.top_k else 0)
    if 1 <= hinted <= fewest:
        return hinted
    top_k = min(DEFAULT_TOP_K, fewest)
    evidence.assumptions.append(f"top-{top_k} routing: the file does not tell (give ⟨top_k⟩)")
    return top_k


def _sampler(evidence: _Evidence, channels: int, out_channels: int) -> Sampler:
    """Return the sampler family of the weights.

    Under rectified flow the sigma rows of the final layer (r mod 2C >= C) get no gradient and keep their zeros.
    """
    given, hints, assumptions = evidence.given, evidence.hints, evidence.assumptions
    if given.sampler is not None:
        return given.sampler
    named = hints.values.get("sampler")
    if named in ("rf", "ddpm"):
        return "rf" if named == "rf" else "ddpm"
    used = None if out_channels == channels else _sigma_rows_used(evidence, channels)
    shown: Sampler = "ddpm" if used else "rf"
    reason = "are not all zero" if used else "are all zero"
    flag = hints.flag("rf")
    if flag is not None:
        sampler: Sampler = "rf" if flag else "ddpm"
        if used is not None and sampler != shown:
            evidence.warnings.append(
                f"the file says {hints.find('rf')}, but the sigma rows of the final layer {reason}, as "
                f"{shown} training leaves them; ⟨sampler⟩ {shown} may be right"
            )
        assumptions.append(f"sampler {sampler}: the file says {hints.find('rf')}")
        return sampler
    scheduler = hints.values.get(SCHEDULER)
    scheduled = _family_of(scheduler)
    if scheduled is not None:
        # sigma rows at zero are no DDPM model's, and the port writes a DDIM scheduler unless told otherwise
        sampler = scheduled if used or used is None else "rf"
        if used is not None and scheduled != shown:
            evidence.warnings.append(
                f"the pipeline's scheduler is {scheduler}, but the sigma rows of the final layer {reason}, as {shown} "
                f"training leaves them; sampler {sampler} is taken (or give ⟨sampler⟩)"
            )
        assumptions.append(f"sampler {sampler}: the pipeline's scheduler is {scheduler}")
        return sampler
    if used is None:
        assumptions.append("sampler rf: no sigma is learned and nothing tells (give ⟨sampler⟩)")
        return "rf"
    told = f"the sigma rows of the final layer {reason} (or give ⟨sampler⟩)"
    if not used and _is_untrained(evidence):
        told = "all of the final layer is zero, as before training, and tells nothing (give ⟨sampler⟩)"
    assumptions.append(f"sampler {shown}: {told}")
    return shown


def _family_of(scheduler: object) -> Sampler | None:
    """Return the sampler family of a scheduler's class in diffusers or its DiT-MoE port; None for an unknown one."""
    if not isinstance(scheduler, str):
        return None
    return "rf" if "Flow" in scheduler else "ddpm" if scheduler.startswith(("DDIM", "DDPM")) else None


def _sigma_rows_used(evidence: _Evidence, channels: int) -> bool:
    for name, rank in (("final_layer.linear.weight", 2), ("final_layer.linear.bias", 1)):
        rows, data = evidence.shape(name, rank)[0], evidence.raw(name)
        step = data.nbytes // rows  # 0 where the weight is quantised: then the bias tells
        zeros = bytes(step)
        if any(data[r * step : (r + 1) * step] != zeros for r in range(rows) if r % (2 * channels) >= channels):
            return True
    return False


def _is_untrained(evidence: _Evidence) -> bool:
    """Return whether the final layer is all zeros, as training finds it."""
    data = evidence.raw("final_layer.linear.weight")
    return data.nbytes > 0 and data == bytes(data.nbytes)


def expected_weights(config: DiTMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight of a model, ``pos_embed`` included."""
    width, rows = config.hidden_size, config.patch_size**2 * config.out_channels
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.num_patches, width),
        "x_embedder.proj.weight": (width, config.in_channels, config.patch_size, config.patch_size),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, FREQUENCIES),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (config.label_rows, width),
    }
    for i, block in enumerate(config.blocks):
        shapes.update({in_block(i, rest): shape for rest, shape in _block_shapes(config, block).items()})
    shapes["final_layer.linear.weight"] = (rows, width)
    shapes["final_layer.linear.bias"] = (rows,)
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * width, width)
    shapes["final_layer.adaLN_modulation.1.bias"] = (2 * width,)
    return shapes


def _block_shapes(config: DiTMoEConfig, block: BlockConfig) -> dict[str, tuple[int, ...]]:
    width = config.hidden_size
    qkv, proj = _ATTENTION_NAMES[config.attention]
    shapes: dict[str, tuple[int, ...]] = {
        f"attn.{qkv}.weight": (3 * width, width),
        f"attn.{qkv}.bias": (3 * width,),
        f"attn.{proj}.weight": (width, width),
        f"attn.{proj}.bias": (width,),
    }
    if config.attention == "flash":
        for norm in ("q_norm", "k_norm"):
            shapes[f"attn.{norm}.weight"] = shapes[f"attn.{norm}.bias"] = (config.head_dim,)
    shapes |= mixture_shapes(width, block)
    shapes["adaLN_modulation.1.weight"] = (6 * width, width)
    shapes["adaLN_modulation.1.bias"] = (6 * width,)
    return shapes


def mixture_shapes(width: int, block: BlockConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a block's mixture, by their names within the block."""
    shapes = {ROUTER: (block.router_rows, width), **extension_shapes(width, block)}
    stems = [(f"moe.experts.{e}", inner) for e, inner in enumerate(block.expert_widths)]
    for stem, inner in [*stems, (SHARED, block.shared_width)]:
        for matrix in MATRICES:
            shapes[f"{stem}.{matrix}.weight"] = (width, inner) if matrix == "down_proj" else (inner, width)
    return shapes


def extension_shapes(width: int, block: BlockConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that only compressed blocks have, by their names within the block."""
    shapes: dict[str, tuple[int, ...]] = {}
    if block.mapped:
        shapes[EXPERT_OF] = (block.router_rows,)
    if block.constants:
        shapes[CONSTANTS] = (block.constants, width)
    if block.rank:
        shapes[CONSTANTS_UP] = (block.constants, width, block.rank)
        shapes[CONSTANTS_DOWN] = (block.constants, block.rank, width)
    if block.residual_constant:
        shapes[RESIDUAL_CONSTANT] = (width,)
    if block.residual_linear:
        shapes[RESIDUAL_LINEAR] = (width, width)
    return shapes


def _check_shapes(config: DiTMoEConfig, evidence: _Evidence) -> None:
    """Raise `BadInputError` for a weight that is missing, unexpected, or of another shape or kind of dtype."""
    weights, where = evidence.weights, evidence.where
    expected = expected_weights(config)
    for name, shape in expected.items():
        if name not in weights:
            if name == "pos_embed":
                continue  # rebuilt when absent
            raise BadInputError(f"{where}: tensor {name!r} is missing; this is not a whole DiT-MoE checkpoint")
        info = weights[name]
        integral = name.endswith(EXPERT_OF)
        if (info.dtype == "I32") != integral or (not integral and info.dtype not in FLOATING):
            expected_dtype = "I32" if integral else "F32, BF16, F16 or F64"
            raise BadInputError(
                f"{where}: tensor {name!r} has dtype {info.dtype}, expected {expected_dtype}"
                + ("" if integral else "; unpack it with the program that packed it")
            )
        if info.shape != shape:
            raise BadInputError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, but the others imply {list(shape)}"
            )
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise BadInputError(
            f"{where}: tensor {unknown[0]!r} has no place in a DiT-MoE ({len(unknown)} such); "
            "if it is an extension, this version of ditmoe does not know it"
        )


_COMPARED = (
    *("input_size", "patch_size", "in_channels", "out_channels", "hidden_size", "depth", "num_heads", "num_classes"),
    *("num_experts", "top_k"),
)
UPSTREAM_MODELS = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28), "G": (1408, 40)}


def _warn_of_contradictions(config: DiTMoEConfig, evidence: _Evidence) -> None:
    hints, warnings = evidence.hints, evidence.warnings
    for name in _COMPARED:
        hint, actual = hints.find(name), getattr(config, name)
        if hint is None or hint.value == actual or not isinstance(hint.value, int | float | str):
            continue  # our own files list what blocks do not share
        if isinstance(hint.value, int) and actual != UNKNOWN:
            warnings.append(f"the file's hint {hint} is ignored: it is {actual}")
        elif not is_whole(hint.value):
            warnings.append(f"the file's hint {hint.spelling}={hint.value!r} is ignored: it is no whole number")
    model = hints.model_name
    if model is not None and model.size in UPSTREAM_MODELS:
        width, depth = UPSTREAM_MODELS[model.size]
        if (width, depth, model.patch) != (config.hidden_size, config.depth, config.patch_size):
            warnings.append(
                f"the file's hint model={hints.values['model']} is ignored: the shapes say width {config.hidden_size}, "
                f"depth {config.depth}, patch {config.patch_size}"
            )
    image_size = hints.whole("image_size")
    if image_size and config.in_channels == 4 and image_size != 8 * config.input_size:
        warnings.append(
            f"the file's hint image_size={image_size} is ignored: the shapes say {config.input_size} latents "
            f"({8 * config.input_size} px)"
        )
