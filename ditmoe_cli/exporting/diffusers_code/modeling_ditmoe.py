"""DiT-MoE for diffusers: a diffusion transformer with mixtures of experts, whose weights may be packed.

Fei et al. 2024, https://arxiv.org/abs/2407.11633. This file needs torch and diffusers alone. Experts may be of any
widths, fewer than the rows of their router, or replaced by constants. `unpack` tells how each packed format is read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

Part = Callable[[str], Tensor]  # returns a tensor that stores a weight X.weight, by the end of its name behind X.
Settings = dict[str, Any]
EPS = 1e-6
STATE = "weight.quant_state.bitsandbytes__"  # JSON of a four-bit weight
_EXACT = (
    *("x_embedder", "y_embedder", "pos_embed", "gate", "q_norm", "k_norm"),
    *("constants", "constants_up", "constants_down", "residual_constant", "residual_linear"),
)
"""Parts that stay in fp32 also where SDNQ loads a model in another dtype."""
_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "proxies", "force_download")

# ------------------------------------------------------------------ packed weights


def part_names(packing: str) -> list[str]:
    """Return the ends of the names of the tensors that store a weight X.weight, behind ``X.``."""
    if ":" in packing:
        names = enumerate(part_names(piece) for piece, _ in pieces_of(packing))
        return [f"pieces.{i}.{name}" for i, piece in names for name in piece]
    kind, *settings = packing.split("-")
    if kind in ("nf4", "fp4"):
        nested = ["weight.nested_absmax", "weight.nested_quant_map"] if settings else []
        return ["weight", "weight.absmax", "weight.quant_map", *nested, f"{STATE}{kind}"]
    if packing == "int8":
        return ["weight", "SCB", "weight_format"]
    if packing == "svd":
        return ["weight.delta_left", "weight.delta_right"]
    if packing == "ternary":
        return ["weight.delta_ternary", "weight.delta_scale"]
    has_zeros = kind != "ternary" and settings[-1] != "sym"
    return ["weight_packed", "weight_scale", "weight_shape", *(["weight_zero_point"] if has_zeros else [])]


def unpack(packing: str, shape: tuple[int, int], part: Part, base: Tensor | None = None) -> Tensor:
    """Return a weight (out, in) in fp32.

    =========================  ============================================================
    nf4, fp4, nf4-dq, fp4-dq   bitsandbytes' four bits, dq with double quantisation
    int8                       bitsandbytes' eight bits, a scale for each row
    int{b}-g{g}                (code - zero) · scale, a zero and a scale for g columns
    int{b}-g{g}-sym            (code - 2^(b-1)) · scale
    ternary-g{g}               -1, 0 or 1, times a scale for g columns
    rows:A*n+B*m, columns:...  pieces in these formats, side by side
    svd, ternary               an expert's difference from the `base` of its block
    =========================  ============================================================
    """
    if ":" in packing:
        return unpack_pieces(packing, shape, part)
    kind, *settings = packing.split("-")
    if kind in ("nf4", "fp4"):
        return unpack_four_bit(part, shape, kind)
    if packing == "int8":
        return part("weight").float() * (part("SCB") / 127.0)[:, None]
    if base is not None:
        return restore(part, base, packing)
    group, scale = int(settings[0].removeprefix("g")), part("weight_scale").float()
    if kind == "ternary":
        return by_groups(base3_digits(part("weight_packed"), shape), scale, group)
    bits = int(kind.removeprefix("int"))
    codes = bit_fields(part("weight_packed"), shape[1], bits)
    if settings[-1] == "sym":
        return by_groups(codes, scale, group, 2 ** (bits - 1))
    zeros = bit_fields(part("weight_zero_point").T.contiguous(), shape[0], bits).T
    return by_groups(codes, scale, group, zeros[..., None])


def by_groups(values: Tensor, scale: Tensor, group: int, zero: Tensor | int | None = None) -> Tensor:
    """Return (values - zero) · scale in fp32 for values (rows, n), a scale (rows, groups) for `group` columns each.

    Zeros are one for all, or (rows, groups, 1).
    """
    rows, n = values.shape
    whole = F.pad(values, (0, -n % group)) if n % group else values
    grouped = whole.view(rows, -1, group)
    return ((grouped if zero is None else grouped - zero) * scale[..., None]).view(rows, -1)[:, :n]


def bit_fields(words: Tensor, count: int, bits: int) -> Tensor:
    """Return the codes (rows, count) in rows of int32 words: code j in bits b j to b j + b - 1, the lowest first.

    Eight codes fill b bytes, and each lies in one or two of them.
    """
    data = words.view(torch.uint8)
    eights = F.pad(data, (0, -data.shape[1] % bits)).view(len(data), -1, bits).short()
    codes = []
    for start in range(0, 8 * bits, bits):
        byte, shift = divmod(start, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code |= eights[..., byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, dim=2).flatten(1)[:, :count]


def base3_digits(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes -1, 0 and 1 of a matrix in fp32, five of which make a byte Σ_i (code_i + 1) 3^i."""
    values = torch.arange(3**5, device=packed.device)[:, None] // 3 ** torch.arange(5, device=packed.device) % 3 - 1
    return values.float().index_select(0, packed.int()).flatten()[: math.prod(shape)].view(shape)


def unpack_four_bit(part: Part, shape: tuple[int, int], kind: str) -> Tensor:
    """Return a weight in bitsandbytes' NF4 or FP4: two codes a byte, the first in its high half, absmax by block."""
    state = json.loads(bytes(part(f"{STATE}{kind}").tolist()))
    absmax, codes = part("weight.absmax")[None], part("weight.quant_map")
    if "nested_blocksize" in state:
        sizes = part("weight.nested_quant_map").index_select(0, absmax[0].int())
        absmax = by_groups(sizes[None], part("weight.nested_absmax")[None], state["nested_blocksize"])
        absmax = absmax + state["nested_offset"]
    pairs = torch.cartesian_prod(codes, codes)  # the two weights of each byte
    values = pairs.index_select(0, part("weight").flatten().int()).view(1, -1)[:, : math.prod(shape)]
    return by_groups(values, absmax, state["blocksize"]).view(shape)


def pieces_of(packing: str) -> list[tuple[str, int]]:
    """Return format and rows (or columns) of each piece of ``rows:int4-g64*64+int2-g64*192``."""
    pieces = (piece.split("*") for piece in packing.partition(":")[2].split("+"))
    return [(name, int(count)) for name, count in pieces]


def unpack_pieces(packing: str, shape: tuple[int, int], part: Part) -> Tensor:
    """Return a weight whose rows (or columns) are pieces in formats of their own."""
    of_rows = packing.startswith("rows:")

    def piece(i: int, name: str, count: int) -> Tensor:
        size = (count, shape[1]) if of_rows else (shape[0], count)
        return unpack(name, size, lambda end: part(f"pieces.{i}.{end}"))

    pieces = [piece(i, name, count) for i, (name, count) in enumerate(pieces_of(packing))]
    return torch.cat(pieces, dim=0 if of_rows else 1)


def restore(part: Part, base: Tensor, packing: str) -> Tensor:
    """Return base + left · right, or base + scale · codes, rounded to the dtype in which the base is stored."""
    if packing == "svd":
        whole = torch.addmm(base.float(), part("weight.delta_left").float(), part("weight.delta_right").float())
    else:
        codes = base3_digits(part("weight.delta_ternary"), (base.shape[0], base.shape[1]))
        whole = base.float() + codes * part("weight.delta_scale")
    return whole.to(base.dtype).float()


class KeepsDtype(nn.Module):
    """A module whose own tensors keep their dtypes where a model is cast, as by ``half()``."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.dtype == tensor.dtype else tensor.to(made.device)

        for child in self.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(moved, recurse=False)  # type: ignore[no-untyped-call]


class Stored(nn.Module):
    """Tensors as a file holds them, by their `names` there. They keep its dtypes, whatever a model is cast to."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.stored = names, KeepsDtype()
        self.texts: dict[str, Tensor] = {}  # stay where they are read: fetching them from a GPU would stop it
        for name in names:
            self._put(name, torch.empty(0))

    def part(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return self.texts[name] if STATE in name else self.stored.get_buffer(name.replace(".", "__"))

    def _put(self, name: str, value: Tensor) -> None:
        if STATE in name:
            self.texts[name] = value
        else:
            self.stored.register_buffer(name.replace(".", "__"), value, persistent=False)

    def _save_to_state_dict(self, destination: Settings, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: self.part(name) for name in self.names})

    def _load_from_state_dict(self, state_dict: Settings, prefix: str, *args: Any) -> None:
        for name in self.names:
            if prefix + name in state_dict:
                self._put(name, state_dict[prefix + name].to(self.part(name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weight, or of what SDNQ makes of it, which keeps hooks."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_forward_pre_hook(cast_input)


def cast_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Return the input of a linear layer in the dtype that it computes in; SDNQ's tell theirs."""
    dtype = layer.dtype if hasattr(layer, "dtype") else cast(Tensor, layer.weight).dtype
    return (inputs[0].to(cast(torch.dtype, dtype)),)


class ExactLinear(KeepsDtype, Linear):
    """A linear layer that stays in fp32."""


ExactLinear.__name__ = "Linear"  # SDNQ goes by the names of classes


class ExactConv(KeepsDtype, nn.Conv2d):
    """A convolution that stays in fp32."""


class ExactTable(KeepsDtype, nn.Embedding):
    """An embedding that stays in fp32."""


class PackedLinear(Stored):
    """A linear layer whose weight stays packed, and is unpacked whenever it is used."""

    def __init__(self, plain: nn.Linear, packing: str, base: Stored | None = None) -> None:
        super().__init__(part_names(packing))
        self.packing, self.shape, self.bias = packing, (plain.out_features, plain.in_features), plain.bias
        self.register_buffer("like", torch.empty(0, dtype=plain.weight.dtype), persistent=False)  # of the dtype
        self._base = (base,)  # in a tuple, and so no child: experts share it

    def unpacked(self) -> Tensor:
        """Return the weight (out, in) in the dtype that the layer computes in."""
        base = self._base[0]
        weight = unpack(self.packing, self.shape, self.part, None if base is None else base.part("weight"))
        return weight.to(self.get_buffer("like").dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        weight = self.unpacked()
        return F.linear(x.to(weight.dtype), weight, self.bias)

    def plain(self) -> nn.Linear:
        """Return the layer with its weight unpacked for good."""
        layer = (ExactLinear if isinstance(self, KeepsDtype) else Linear)(1, 1, bias=False, device="meta")
        layer.out_features, layer.in_features = self.shape
        layer.weight, layer.bias = nn.Parameter(self.unpacked(), requires_grad=False), self.bias
        return layer


class ExactPackedLinear(KeepsDtype, PackedLinear):
    """A packed linear layer that computes in fp32."""


# ------------------------------------------------------------------ the network


class PatchEmbed(nn.Module):
    """Map images (N, C, H, W) to tokens (N, patches, width), row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = ExactConv(channels, width, patch, patch, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of x."""
        tokens: Tensor = self.proj(x.float())
        return tokens.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Map times (N,) to (N, width): cosines and sines of 128 frequencies, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (ExactLinear(size, width, dtype=torch.float32) for size in (256, width))
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times."""
        frequencies = torch.exp(-math.log(10_000.0) / 128 * torch.arange(128, device=t.device))
        angles = t.float()[:, None] * frequencies
        out: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=1))
        return out


class LabelEmbedder(nn.Module):
    """Map labels (N,) to (N, width); the null class, where there is one, has the last row."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = ExactTable(rows, width, dtype=torch.float32)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels."""
        out: Tensor = self.embedding_table(y)
        return out


class HeadNorm(KeepsDtype):
    """LayerNorm over a head, computed in fp32 and returned in the dtype of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., head) normalised."""
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, EPS).to(x.dtype)


class Attention(nn.Module):
    """Self-attention, its layers named as in timm, or as in flash-attn, where queries and keys are normalised too."""

    def __init__(self, width: int, heads: int, layout: str) -> None:
        super().__init__()
        self.heads, self.is_flash = heads, layout == "flash"
        if self.is_flash:
            self.Wqkv, self.out_proj = Linear(width, 3 * width), Linear(width, width)
            self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)
        else:
            self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, tokens, width)."""
        n, tokens, width = x.shape
        packed = (self.Wqkv if self.is_flash else self.qkv)(x)
        q, k, v = packed.reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.is_flash:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        out: Tensor = (self.out_proj if self.is_flash else self.proj)(mixed)
        return out


class Router(KeepsDtype):
    """p = softmax(W u), of which the k largest count, as they are.

    A map ``expert_of`` says what each row selects: e >= 0 an expert, -2 - j the constant j, and -1 nothing, so that the
    row counts in the softmax and is never selected. With `mass`, the selected weights are rescaled to the sum of the k
    largest of all rows.
    """

    expert_of: Tensor | None

    def __init__(self, width: int, block: Settings, top_k: int) -> None:
        super().__init__()
        rows, mapped = block["router_rows"], block.get("mapped", False)
        self.top_k, self.mass = top_k, block.get("mass", False)
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=torch.float32))
        self.register_buffer("expert_of", torch.empty(rows, dtype=torch.int32) if mapped else None)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the slots of tokens u (T, width) select, and their routing weights, both (T, k)."""
        probabilities = (u.float() @ self.weight.T).softmax(dim=-1)
        best = probabilities.topk(self.top_k, dim=-1)
        if self.expert_of is None:
            return best.indices, best.values
        rows = probabilities.masked_fill(self.expert_of == -1, -1.0).topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, rows)
        if self.mass:
            weights = weights * (best.values.sum(dim=-1, keepdim=True) / weights.sum(dim=-1, keepdim=True))
        return self.expert_of.long()[rows], weights


class SwiGLU(nn.Module):
    """An expert f(u) = W_down (SiLU(W_gate u) * W_up u)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (T, width), and return them in fp32."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))
        return out.float()


class SparseMoE(KeepsDtype):
    """Σ g f(u) over the selected experts, plus the shared expert.

    Where there are constants, rows may select v_j + A_j B_j u in place of an expert. Where there are residuals,
    (1 - Σ g) (c + L u) is added for the routing mass that the selected rows do not carry.
    """

    constants: Tensor | None
    constants_up: Tensor | None
    constants_down: Tensor | None
    residual_constant: Tensor | None
    residual_linear: Tensor | None

    def __init__(self, width: int, block: Settings, top_k: int) -> None:
        super().__init__()
        self.gate = Router(width, block, top_k)
        self.experts = nn.ModuleList(SwiGLU(width, inner) for inner in block["expert_widths"])
        self.shared_experts = SwiGLU(width, block["shared_width"])
        count, rank = block.get("constants", 0), block.get("rank", 0)
        shapes: dict[str, tuple[int, ...] | None] = {
            "constants": (count, width) if count else None,
            "constants_up": (count, width, rank) if rank else None,
            "constants_down": (count, rank, width) if rank else None,
            "residual_constant": (width,) if block.get("residual_constant") else None,
            "residual_linear": (width, width) if block.get("residual_linear") else None,
        }
        for name, shape in shapes.items():
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, tokens, width), in fp32."""
        u = x.reshape(-1, x.shape[-1])
        selected, weights = self.gate(u)
        out: Tensor = self.shared_experts(u)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(selected == e)
            if len(tokens):
                out.index_add_(0, tokens, weights[tokens, slots, None] * expert(u[tokens]))
        if self.constants is not None:
            tokens, slots = torch.where(selected < -1)
            added = self._constant_outputs(self.constants, u[tokens], -2 - selected[tokens, slots])
            out.index_add_(0, tokens, weights[tokens, slots, None] * added)
        return (out + self._left_over(u, weights)).view(x.shape)

    def _constant_outputs(self, constants: Tensor, u: Tensor, chosen: Tensor) -> Tensor:
        """Return v_j + A_j B_j u of tokens u (n, width) for the constants j (n,) that they selected."""
        out = constants[chosen]
        if self.constants_up is not None and self.constants_down is not None:
            for j, (up, down) in enumerate(zip(self.constants_up, self.constants_down, strict=True)):
                own = chosen == j
                out[own] += u[own] @ down.T @ up.T
        return out

    def _left_over(self, u: Tensor, weights: Tensor) -> Tensor | float:
        """Return (1 - Σ g) (c + L u); 0 without residuals."""
        if self.residual_constant is None and self.residual_linear is None:
            return 0.0
        added = torch.zeros_like(u) if self.residual_linear is None else u @ self.residual_linear.T
        if self.residual_constant is not None:
            added = added + self.residual_constant
        return (1 - weights.sum(dim=1, keepdim=True)) * added


def modulation(width: int, parts: int) -> nn.Sequential:
    """Return adaLN: SiLU, then a layer from conditions (N, width) to `parts` vectors an image."""
    return nn.Sequential(nn.SiLU(), ExactLinear(width, parts * width, dtype=torch.float32))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift for tokens x (N, tokens, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """x + gate ⊙ attention, then x + gate ⊙ mixture. The stream x stays in fp32."""

    def __init__(self, width: int, heads: int, layout: str, block: Settings, top_k: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads, layout)
        self.moe = SparseMoE(width, block, top_k)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (N, tokens, width) under conditions c (N, width)."""
        shift, scale, gate, moe_shift, moe_scale, moe_gate = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulated(x, shift, scale))
        out: Tensor = x + moe_gate[:, None] * self.moe(modulated(x, moe_shift, moe_scale))
        return out


class FinalLayer(nn.Module):
    """Map tokens to patches of the output."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = ExactLinear(width, outputs, dtype=torch.float32)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (N, tokens, width) under conditions c (N, width)."""
        out: Tensor = self.linear(modulated(x, *self.adaLN_modulation(c).chunk(2, dim=1)))
        return out


class DiTMoETransformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predict the velocity, or the noise and its variance, of noisy images.

    Rectified flow (`sampler` rf): z_t = (1 - t) x + t noise, times t in (0, 1], and the velocity noise - x is returned.
    DDPM: times are 0 to 999, and the noise is returned, the variance of sigma-learning models behind it.

    Args:
        input_size, patch_size, in_channels, out_channels: of images, or latents; side and patch in values.
        hidden_size, num_heads, top_k: of a block; experts that a token selects.
        num_classes, null_class: classes, and whether a label `num_classes` stands behind them for none.
        attention: how attention layers are named, timm or flash.
        sampler: rf or ddpm.
        mixtures: of each block, ``router_rows``, ``expert_widths``, ``shared_width`` and what else it has.
        packed: by format, the names of the layers whose weights are stored so (`unpack`).
        auto_map: where ``AutoModel`` finds this class.
    """

    _no_split_modules = ("Block",)
    _supports_gradient_checkpointing = False
    _supports_param_buffer_assignment = False  # values go into the dtype of the model, not into the file's

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        out_channels: int,
        hidden_size: int,
        num_heads: int,
        num_classes: int,
        null_class: bool,
        top_k: int,
        attention: str,
        sampler: str,  # noqa: ARG002  kept in the configuration
        mixtures: list[Settings],
        packed: dict[str, list[str]] | None = None,
        auto_map: dict[str, str] | None = None,  # noqa: ARG002
    ) -> None:
        super().__init__()
        patches = (input_size // patch_size) ** 2
        with torch.device("meta"):
            self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
            self.t_embedder = TimestepEmbedder(hidden_size)
            self.y_embedder = LabelEmbedder(num_classes + null_class, hidden_size)
            self.pos_embed = nn.Parameter(torch.empty(1, patches, hidden_size, dtype=torch.float32))
            self.blocks = nn.ModuleList(Block(hidden_size, num_heads, attention, block, top_k) for block in mixtures)
            self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels)
        for packing, names in (packed or {}).items():
            for name in names:
                self._pack(name, packing)
        if not nn.Linear(1, 1).weight.is_meta:  # as where a quantiser loads the weights
            self.to_empty(device="cpu")
        self.requires_grad_(False)

    def _pack(self, name: str, packing: str) -> None:
        """Put a packed layer in the place of a plain one. Experts that are differences share a base."""
        parent, _, leaf = name.rpartition(".")
        plain = cast(nn.Linear, self.get_submodule(name))
        base = None
        if packing in ("svd", "ternary"):
            moe = self.get_submodule(name.partition(".experts.")[0])
            if not hasattr(moe, "base"):
                moe.base = nn.ModuleDict()
            bases = cast(nn.ModuleDict, moe.base)
            if leaf not in bases:
                bases[leaf] = Stored(["weight"])
            base = cast(Stored, bases[leaf])
        kind = ExactPackedLinear if isinstance(plain, KeepsDtype) else PackedLinear
        setattr(self.get_submodule(parent), leaf, kind(plain, packing, base))

    @classmethod
    def from_pretrained(cls, path: Any, **settings: Any) -> Any:
        """Load as all models of diffusers. Packed parts keep the dtypes of the file, whatever `torch_dtype` is.

        Raises `ValueError` for a `device_map` of several devices.
        """
        where = {name: settings[name] for name in _WHERE if name in settings}
        if "quantization_config" in cls.load_config(path, **where):  # of SDNQ, which has no packed parts of ours
            cls._keep_in_fp32_modules = list(_EXACT)
            try:
                return super().from_pretrained(path, **settings)
            finally:
                cls._keep_in_fp32_modules = None
        device_map = settings.pop("device_map", None)
        devices = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
        if len(devices) != 1 or devices[0] in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise ValueError(f"device_map {device_map!r}: name one device, or move the model by to()")
        # the other way to load casts all that is floating, and knows no names such as weight.absmax
        model = super().from_pretrained(path, **{**settings, "low_cpu_mem_usage": False})
        return model if devices[0] is None else model.to(devices[0])

    @wraps(ModelMixin.save_pretrained)  # pipelines look for arguments such as variant in the signature
    def save_pretrained(self, save_directory: Any, *settings: Any, **named: Any) -> None:
        """Save as all models of diffusers, and this file beside the weights."""
        super().save_pretrained(save_directory, *settings, **named)
        shutil.copyfile(__file__, Path(save_directory) / "modeling_ditmoe.py")

    def dequantize(self) -> Any:
        """Unpack all weights for good: more memory, fewer computations a step."""
        for name, layer in list(self.named_modules()):
            if isinstance(layer, PackedLinear):
                parent, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(parent), leaf, layer.plain())
        return self

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, class_labels: Tensor, return_dict: bool = True
    ) -> Any:
        """Predict for images (N, C, H, W) at a time, or at times (N,), of labels (N,)."""
        device, count = hidden_states.device, len(hidden_states)
        times = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(count)
        c = self.t_embedder(times) + self.y_embedder(class_labels)
        x = self.x_embedder(hidden_states) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        sample = self._image(self.final_layer(x, c)).to(hidden_states.dtype)
        if self.config.sampler == "rf":
            sample = sample[:, : self.config.in_channels]  # no variance is learned
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _image(self, patches: Tensor) -> Tensor:
        """Return the image (N, out_channels, H, W) of patches (N, patches, patch² · out_channels)."""
        patch, channels = self.config.patch_size, self.config.out_channels
        side = self.config.input_size // patch
        grid = patches.reshape(-1, side, side, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(-1, channels, side * patch, side * patch)
