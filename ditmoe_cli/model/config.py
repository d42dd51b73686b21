"""The configuration of a DiT-MoE, inferred from the names and shapes of its tensors.

What no shape tells (top-k, the head count of timm layouts, the sampler family) comes from what the user gave,
else from hints in the file, else from a default that is reported as an assumption. An unknown head count is
refused, since a wrong one is silent garbage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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

Sampler = Literal["rf", "ddpm"]
Attention = Literal["timm", "flash"]

FREQUENCIES = 256
GHOST = -1  # in a router map: the row counts in the softmax and is never selected; below it stand constants
DEFAULT_TOP_K = 2
_HEADS_BY_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}
_ATTENTION_NAMES: Mapping[Attention, tuple[str, str]] = {"timm": ("qkv", "proj"), "flash": ("Wqkv", "out_proj")}


@dataclass(frozen=True)
class BlockConfig:
    """The shapes of one block's mixture: router rows, width of each routed expert, width of the shared one.

    `mapped` tells that ``expert_of`` stands beside the router; without it row e selects expert e. `mass` tells that
    selected routing weights are rescaled to the sum that the top-k of all rows would have. `constants` is the number
    of constants that rows select instead of experts, `rank` that of the linear maps beside them; `residual_constant`
    and `residual_linear` tell whether the routing mass that selected rows do not carry is given a constant and a
    linear map.
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
        """Whether upstream's code has a word for everything that the block holds."""
        return not (self.mapped or self.mass or self.constants or self.residual_constant or self.residual_linear)


@dataclass(frozen=True)
class DiTMoEConfig:
    """A DiT-MoE's configuration in the field's words.

    `input_size` is the side of the (latent) image; `num_classes` leaves out the null class, whose label is
    `num_classes`; `out_channels` is twice `in_channels` where sigma is learned.
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
    attention: Attention
    sampler: Sampler
    blocks: tuple[BlockConfig, ...]

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
        """Whether the model makes pixels (grey or RGB), not latents."""
        return self.in_channels in (1, 3)

    @property
    def num_experts(self) -> int:
        """Routed experts of a block; the most of any block where they differ."""
        return max(len(block.expert_widths) for block in self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON, values that all blocks share written once."""
        document = asdict(replace(self, blocks=()))
        del document["blocks"]
        document["num_experts"] = _shared_value([len(b.expert_widths) for b in self.blocks])
        document["expert_width"] = _shared_value([_shared_value(list(b.expert_widths)) for b in self.blocks])
        document["shared_width"] = _shared_value([b.shared_width for b in self.blocks])
        if any(b.mass for b in self.blocks):
            document["router_mode"] = _shared_value(["mass" if b.mass else "plain" for b in self.blocks])
        return document


def _shared_value(values: list[Any]) -> Any:
    """Return the one value that all entries have, or the list itself."""
    return values[0] if values and all(value == values[0] for value in values) else values


@dataclass(frozen=True)
class Given:
    """What the user says of a checkpoint; None where nothing was said."""

    num_heads: int | None = None
    top_k: int | None = None
    sampler: Sampler | None = None


@dataclass(frozen=True)
class Inferred:
    """A configuration, the assumptions it rests on, and warnings about hints that were ignored."""

    config: DiTMoEConfig
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def infer_config(
    weights: Mapping[str, TensorInfo],
    raw: Callable[[str], memoryview],
    hints: Mapping[str, Any],
    given: Given,
    where: str,
) -> Inferred:
    """Infer the configuration of the weights of a checkpoint.

    `weights` are logical dtypes and shapes; `raw(name)` returns a tensor's bytes (the final layer is looked at
    to tell rectified flow from DDPM); `hints` are training arguments or a configuration in the file's metadata;
    `where` names the file in errors. Raises `BadInputError` where the tensors are not a DiT-MoE's, contradict
    each other or leave the head count open, or where `given` contradicts them.
    """
    shapes = _Shapes(weights, where)
    _require_dit_moe(shapes)
    notes = _Notes()
    hidden, channels, patch, _ = shapes.of("x_embedder.proj.weight", 4)
    out_channels = _out_channels(shapes, channels, patch)
    attention: Attention = "flash" if in_block(0, "attn.Wqkv.weight") in weights else "timm"
    table_rows, _ = shapes.of("y_embedder.embedding_table.weight", 2)
    depth = _depth(shapes)
    modes = _router_modes(hints, depth, where)
    blocks = tuple(_block(shapes, i, modes[i]) for i in range(depth))
    config = DiTMoEConfig(
        input_size=_input_size(shapes, patch, hints, notes),
        patch_size=patch,
        in_channels=channels,
        out_channels=out_channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_num_heads(shapes, hidden, attention, hints, given, notes),
        num_classes=table_rows - 1,
        top_k=_top_k(_selectable_rows(shapes, raw, blocks), hints, given, notes, where),
        attention=attention,
        sampler=_sampler(shapes, raw, channels, out_channels, hints, given, notes),
        blocks=blocks,
    )
    _check_shapes(config, weights, where)
    _warn_of_contradictions(config, hints, notes)
    return Inferred(config, tuple(notes.assumptions), tuple(notes.warnings))


class _Notes:
    """Assumptions and warnings gathered on the way."""

    def __init__(self) -> None:
        self.assumptions: list[str] = []
        self.warnings: list[str] = []


@dataclass(frozen=True)
class _Shapes:
    """Shapes by name, with errors that name file and tensor."""

    weights: Mapping[str, TensorInfo]
    where: str

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        if name not in self.weights:
            raise BadInputError(f"{self.where}: tensor {name!r} is missing; this is not a whole DiT-MoE checkpoint")
        shape = self.weights[name].shape
        if len(shape) != rank or 0 in shape:
            raise BadInputError(f"{self.where}: tensor {name!r} has shape {list(shape)}, expected {rank} dimensions")
        return shape


def _require_dit_moe(shapes: _Shapes) -> None:
    names = shapes.weights
    if any(name.endswith(ROUTER) for name in names):
        return
    if any(name.startswith("blocks.") and ".mlp." in name for name in names):
        raise BadInputError(
            f"{shapes.where}: not a DiT-MoE: its blocks hold dense MLPs (blocks.*.mlp) and no router ({ROUTER})"
        )
    some = ", ".join(list(names)[:3])
    raise BadInputError(f"{shapes.where}: not a DiT-MoE: no tensor blocks.*.{ROUTER} (it holds {some}, ...)")


def _depth(shapes: _Shapes) -> int:
    return 1 + max(parts.block for parts in map(split_name, shapes.weights) if parts.block is not None)


def _router_modes(hints: Mapping[str, Any], depth: int, where: str) -> list[str]:
    """Return each block's router mode, which the metadata of files that we write tell."""
    hint = hints.get("router_mode", "plain")
    modes = [hint] * depth if isinstance(hint, str) else hint
    if not isinstance(modes, list) or len(modes) != depth or not all(mode in ("plain", "mass") for mode in modes):
        raise BadInputError(f"{where}: the router mode in the metadata is {hint!r}; expected plain or mass a block")
    return modes


def _block(shapes: _Shapes, block: int, mode: str) -> BlockConfig:
    prefix = in_block(block, "moe.experts.")
    # a stray name such as experts.x. would not parse as an expert and is found by _check_shapes
    found = {
        parts.expert
        for parts in (split_name(name) for name in shapes.weights if name.startswith(prefix))
        if parts.expert is not None
    }
    rows, _ = shapes.of(in_block(block, ROUTER), 2)
    widths = tuple(shapes.of(in_expert(block, e, "gate_proj.weight"), 2)[0] for e in range(len(found)))
    shared, _ = shapes.of(in_block(block, f"{SHARED}.gate_proj.weight"), 2)
    mapped = in_block(block, EXPERT_OF) in shapes.weights
    if mapped and not found:
        raise BadInputError(f"{shapes.where}: block {block} holds no routed experts")
    if not mapped and rows != len(found):
        raise BadInputError(
            f"{shapes.where}: tensor {in_block(block, ROUTER)!r} has {rows} rows, but the block holds "
            f"{len(found)} experts"
        )
    return BlockConfig(
        router_rows=rows,
        expert_widths=widths,
        shared_width=shared,
        mapped=mapped,
        mass=mode == "mass",
        constants=shapes.of(in_block(block, CONSTANTS), 2)[0] if in_block(block, CONSTANTS) in shapes.weights else 0,
        rank=shapes.of(in_block(block, CONSTANTS_UP), 3)[2] if in_block(block, CONSTANTS_UP) in shapes.weights else 0,
        residual_constant=in_block(block, RESIDUAL_CONSTANT) in shapes.weights,
        residual_linear=in_block(block, RESIDUAL_LINEAR) in shapes.weights,
    )


def _out_channels(shapes: _Shapes, channels: int, patch: int) -> int:
    rows, _ = shapes.of("final_layer.linear.weight", 2)
    for out_channels in (channels, 2 * channels):
        if rows == patch * patch * out_channels:
            return out_channels
    raise BadInputError(
        f"{shapes.where}: tensor 'final_layer.linear.weight' has {rows} rows; with {channels} channels and patch "
        f"{patch} expected {patch * patch * channels} or {2 * patch * patch * channels}"
    )


def _input_size(shapes: _Shapes, patch: int, hints: Mapping[str, Any], notes: _Notes) -> int:
    if "pos_embed" in shapes.weights:
        _, tokens, _ = shapes.of("pos_embed", 3)
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise BadInputError(f"{shapes.where}: tensor 'pos_embed' holds {tokens} positions, not a square")
        return side * patch
    hinted = _whole(hints.get("input_size")) or _whole(hints.get("image_size")) // 8
    if hinted > 0 and hinted % patch == 0:
        return hinted
    notes.assumptions.append("input size 32 (256 px): pos_embed is absent and is rebuilt")
    return 32


def _whole(value: object) -> int:
    """Return a hint that is a positive whole number, else 0: hints may be anything."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _num_heads(
    shapes: _Shapes,
    hidden: int,
    attention: Attention,
    hints: Mapping[str, Any],
    given: Given,
    notes: _Notes,
) -> int:
    measured = None
    if attention == "flash":
        (head_dim,) = shapes.of(in_block(0, "attn.q_norm.weight"), 1)
        if hidden % head_dim:
            raise BadInputError(
                f"{shapes.where}: tensor {in_block(0, 'attn.q_norm.weight')!r} has length {head_dim}, which does not "
                f"divide the width {hidden}"
            )
        measured = hidden // head_dim
    if given.num_heads is not None:
        if given.num_heads < 1 or hidden % given.num_heads or measured not in (None, given.num_heads):
            expected = f"it is {measured}" if measured else f"it must divide the width {hidden}"
            raise BadInputError(f"{shapes.where}: ⟨heads⟩ {given.num_heads} contradicts the shapes: {expected}")
        return given.num_heads
    if measured is not None:
        return measured
    hinted = _whole(hints.get("num_heads"))
    if hinted and hidden % hinted == 0 and _whole(hints.get("hidden_size", hidden)) == hidden:
        return hinted
    if hidden in _HEADS_BY_WIDTH:
        heads = _HEADS_BY_WIDTH[hidden]
        notes.assumptions.append(f"{heads} attention heads, as upstream models of width {hidden} have")
        return heads
    raise BadInputError(
        f"{shapes.where}: the number of attention heads cannot be told from timm tensors of width {hidden}; "
        "give it with ⟨heads⟩ (num_heads= in Python)"
    )


def _selectable_rows(shapes: _Shapes, raw: Callable[[str], memoryview], blocks: tuple[BlockConfig, ...]) -> int:
    """Return how many router rows top-k can choose from, in the block that has the fewest.

    Rows that share a merged expert each take a slot; ghost rows take none.
    """
    counts = []
    for i, block in enumerate(blocks):
        if block.mapped:
            shapes.of(in_block(i, EXPERT_OF), 1)
            counts.append(sum(row != GHOST for row in parse_expert_map(raw(in_block(i, EXPERT_OF)))))
        else:
            counts.append(block.router_rows)
    return min(counts)


def parse_expert_map(data: memoryview) -> tuple[int, ...]:
    """Return the router map that an ``expert_of`` tensor's bytes hold (int32)."""
    return tuple(int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, data.nbytes, 4))


def _top_k(fewest: int, hints: Mapping[str, Any], given: Given, notes: _Notes, where: str) -> int:
    if fewest < 1:
        raise BadInputError(f"{where}: a block's router map {EXPERT_OF!r} selects no expert at all")
    if given.top_k is not None:
        if not 1 <= given.top_k <= fewest:
            raise BadInputError(
                f"{where}: ⟨top_k⟩ {given.top_k} is not between 1 and the {fewest} experts that a block can choose from"
            )
        return given.top_k
    hinted = _whole(hints.get("top_k")) or _whole(hints.get("num_experts_per_tok"))
    if 1 <= hinted <= fewest:
        return hinted
    top_k = min(DEFAULT_TOP_K, fewest)
    notes.assumptions.append(f"top-{top_k} routing: the file does not tell (give ⟨top_k⟩)")
    return top_k


def _sampler(
    shapes: _Shapes,
    raw: Callable[[str], memoryview],
    channels: int,
    out_channels: int,
    hints: Mapping[str, Any],
    given: Given,
    notes: _Notes,
) -> Sampler:
    """Tell rectified flow from DDPM.

    Under rectified flow the sigma rows of the final layer (r mod 2C >= C) get no gradient and keep their zeros.
    """
    if given.sampler is not None:
        return given.sampler
    if hints.get("sampler") in ("rf", "ddpm"):
        return "rf" if hints["sampler"] == "rf" else "ddpm"
    if isinstance(hints.get("rf"), bool):
        sampler: Sampler = "rf" if hints["rf"] else "ddpm"
        notes.assumptions.append(f"sampler {sampler}: the training arguments say rf={hints['rf']}")
        return sampler
    if out_channels == channels:
        notes.assumptions.append("sampler rf: no sigma is learned and nothing tells (give ⟨sampler⟩)")
        return "rf"
    used = _sigma_rows_used(shapes, raw, channels)
    reason = "are not all zero" if used else "are all zero"
    sampler = "ddpm" if used else "rf"
    notes.assumptions.append(f"sampler {sampler}: the sigma rows of the final layer {reason} (or give ⟨sampler⟩)")
    return sampler


def _sigma_rows_used(shapes: _Shapes, raw: Callable[[str], memoryview], channels: int) -> bool:
    for name, rank in (("final_layer.linear.weight", 2), ("final_layer.linear.bias", 1)):
        rows, data = shapes.of(name, rank)[0], raw(name)
        step = data.nbytes // rows
        if any(any(data[r * step : (r + 1) * step]) for r in range(rows) if r % (2 * channels) >= channels):
            return True
    return False


def expected_weights(config: DiTMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor name of a model of this configuration with its shape (``pos_embed`` included)."""
    width, rows = config.hidden_size, config.patch_size**2 * config.out_channels
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.num_patches, width),
        "x_embedder.proj.weight": (width, config.in_channels, config.patch_size, config.patch_size),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, FREQUENCIES),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, width),
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
    """Return the tensors of a block's mixture, by their names within the block."""
    shapes = {ROUTER: (block.router_rows, width), **extension_shapes(width, block)}
    stems = [(f"moe.experts.{e}", inner) for e, inner in enumerate(block.expert_widths)]
    for stem, inner in [*stems, (SHARED, block.shared_width)]:
        for matrix in MATRICES:
            shapes[f"{stem}.{matrix}.weight"] = (width, inner) if matrix == "down_proj" else (inner, width)
    return shapes


def extension_shapes(width: int, block: BlockConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a block that upstream has no word for."""
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


def _check_shapes(config: DiTMoEConfig, weights: Mapping[str, TensorInfo], where: str) -> None:
    """Hold every tensor against the configuration: none missing, none left over, all of one logic."""
    expected = expected_weights(config)
    for name, shape in expected.items():
        if name not in weights:
            if name == "pos_embed":
                continue  # rebuilt when absent
            raise BadInputError(f"{where}: tensor {name!r} is missing; this is not a whole DiT-MoE checkpoint")
        info = weights[name]
        if info.shape != shape:
            raise BadInputError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, but the others imply {list(shape)}"
            )
        integral = name.endswith(EXPERT_OF)
        if (info.dtype == "I32") != integral or (not integral and info.dtype not in FLOATING):
            raise BadInputError(f"{where}: tensor {name!r} has dtype {info.dtype}, which is not what it should hold")
    unknown = [name for name in weights if name not in expected]
    if unknown:
        raise BadInputError(
            f"{where}: tensor {unknown[0]!r} has no place in a DiT-MoE ({len(unknown)} such); "
            "if it is an extension, this version of ditmoe does not know it"
        )


_HINTED_FIELDS = {
    "input_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_size": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "num_classes": "num_classes",
    "num_experts": "num_experts",
    "top_k": "top_k",
    "num_experts_per_tok": "top_k",
}
_UPSTREAM_MODELS = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28), "G": (1408, 40)}


def _warn_of_contradictions(config: DiTMoEConfig, hints: Mapping[str, Any], notes: _Notes) -> None:
    for hint, name in _HINTED_FIELDS.items():
        value, actual = hints.get(hint), getattr(config, name)
        if isinstance(value, int) and value != actual:
            notes.warnings.append(f"the file's hint {hint}={value} is ignored: it is {actual}")
    size, _, patch = str(hints.get("model", "")).removeprefix("DiT-").partition("/")
    if size in _UPSTREAM_MODELS and patch.isdigit():
        width, depth = _UPSTREAM_MODELS[size]
        if (width, depth, int(patch)) != (config.hidden_size, config.depth, config.patch_size):
            notes.warnings.append(
                f"the file's hint model={hints['model']} is ignored: the shapes say width {config.hidden_size}, "
                f"depth {config.depth}, patch {config.patch_size}"
            )
    image_size = hints.get("image_size")
    if isinstance(image_size, int) and config.in_channels == 4 and image_size != 8 * config.input_size:
        notes.warnings.append(
            f"the file's hint image_size={image_size} is ignored: the shapes say {config.input_size} latents "
            f"({8 * config.input_size} px)"
        )
