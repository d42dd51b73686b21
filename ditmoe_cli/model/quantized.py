"""NF4 and int8 weights in torch: packing as bitsandbytes stores them, and our own dequantiser.

The dequantiser is ours because bitsandbytes' CPU kernels are wrong for some shapes and alter a module's
state on its first forward; see docs/design.md.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314): weights w in flattened blocks of 64, absmax a = max|w|, code =
argmin_q |w/a - c_q| over the 16 quantiles c of a normal distribution, two codes a byte.
int8 (LLM.int8, https://arxiv.org/abs/2208.07339): row absmax s on fp16-cast weights, q = round(127 w / s).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.checkpoint.formats import NF4_BLOCK, Format, Weight, quant_state_json
from ditmoe_cli.checkpoint.header import TensorInfo
from ditmoe_cli.checkpoint.reader import torch_dtype
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.differences import restored

NF4_CODES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack(weight: Tensor, info: TensorInfo, fmt: Format) -> dict[str, Tensor]:
    """Quantise a weight; return its members by name, as `formats.quantized_members` lays them out."""
    return _pack_nf4(weight, info) if fmt == "nf4" else _pack_int8(weight, info)


def _pack_nf4(weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
    codes = torch.tensor(NF4_CODES, dtype=torch.float32)
    flat = weight.detach().reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    midpoints = (codes[1:] + codes[:-1]) / 2
    nibbles = torch.bucketize(scaled, midpoints).to(torch.uint8).reshape(-1)[: flat.numel()]
    state = torch.frombuffer(bytearray(quant_state_json(info)), dtype=torch.uint8)
    return {
        info.name: ((nibbles[0::2] << 4) | nibbles[1::2]).unsqueeze(1),
        f"{info.name}.absmax": absmax,
        f"{info.name}.quant_map": codes,
        f"{info.name}.quant_state.bitsandbytes__nf4": state,
    }


def _pack_int8(weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
    half = weight.detach().to(torch.float16).float()
    scale = half.abs().amax(dim=1)
    if not bool(scale.isfinite().all()):
        raise BadInputError(f"tensor {info.name!r} holds values above fp16's range, which int8 scales are taken in")
    codes = (half * (127.0 / scale.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round()
    stem = info.name.removesuffix(".weight")
    return {
        info.name: codes.to(torch.int8),
        f"{stem}.SCB": scale,
        f"{stem}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def code_pairs(codes: Tensor) -> Tensor:
    """Return the two fp32 weights that each byte stands for, high nibble first, as 256 eight-byte cells.

    Looking bytes up in cells that hold both weights is about twice as fast as looking up each nibble. The cells
    pose as integers, which ``module.to(dtype)`` leaves alone.
    """
    return torch.cartesian_prod(codes, codes).view(torch.int64).reshape(-1)


def unpack_nf4(packed: Tensor, absmax: Tensor, pairs: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the fp32 weight of `shape`: code values by the table `pairs`, times their block's absmax."""
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    if values.numel() % NF4_BLOCK == 0:
        return values.reshape(-1, NF4_BLOCK).mul_(absmax[:, None]).reshape(shape)
    return values.mul_(absmax.repeat_interleave(NF4_BLOCK)[: values.numel()]).reshape(shape)


def unpack_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weight: code times row scale / 127."""
    return codes.float() * (scale / 127.0)[:, None]


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its weight packed and unpacks it for each multiplication.

    Members are buffers under short names; `load_members` fills them from a checkpoint. Scales are kept as the bits of
    their fp32 values, so that ``module.to(dtype)`` does not round them.
    """

    codes: Tensor
    scale: Tensor
    table: Tensor

    def __init__(self, weight: Weight, bias: bool) -> None:
        super().__init__()
        self.format = weight.format
        self.shape = weight.info.shape
        for name in ("codes", "scale", "table"):
            self.register_buffer(name, torch.empty(0))
        self.bias = nn.Parameter(torch.empty(self.shape[0]), requires_grad=False) if bias else None

    def load_members(self, members: dict[str, Tensor], weight: Weight) -> None:
        """Take over the packed tensors of `weight`."""
        self.codes = members[weight.members[0]]
        self.scale = members[weight.members[1]].view(torch.int32)
        if self.format == "nf4":
            self.table = code_pairs(members[weight.members[2]])

    def weight(self) -> Tensor:
        """Return the unpacked weight (out, in) in fp32."""
        scale = self.scale.view(torch.float32)
        if self.format == "nf4":
            return unpack_nf4(self.codes, scale, self.table, self.shape)
        return unpack_int8(self.codes, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        return F.linear(x, self.weight().to(x.dtype), self.bias)


def unpack(weight: Weight, members: dict[str, Tensor]) -> Tensor:
    """Return a weight in its logical dtype, whatever it is stored as; `members` are its tensors by name."""
    if weight.format is None:
        return members[weight.info.name]
    if weight.format in ("svd", "ternary"):
        return restored(weight, members)
    layer = QuantizedLinear(weight, bias=False)
    layer.load_members(members, weight)
    return layer.weight().to(torch_dtype(weight.info.dtype))
