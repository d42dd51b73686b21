"""Number formats in plain arithmetic: whole tensors at once, one candidate after the other, a comparison a midpoint.

What the package does in blocks, by tables and in fewer steps has to give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.formats.bitsandbytes_arithmetic import FP4_CODES, NF4_CODES

_LEAST_SHRINK = {2: 0.35, 3: 0.45, 4: 0.55, 5: 0.65, 6: 0.75, 8: 0.85}
_FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


def groups_of(weight: Tensor, group: int) -> Tensor:
    values = weight.float()
    return F.pad(values, (0, -values.shape[1] % group)).reshape(len(values), -1, group)


def inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def packed(codes: Tensor, bits: int) -> Tensor:
    """The int32 words of codes (rows, n), bit after bit."""
    rows, n = codes.shape
    places = codes.long()[:, :, None] >> torch.arange(bits) & 1
    flat = F.pad(places.reshape(rows, -1), (0, -n * bits % 32)).reshape(rows, -1, 32)
    words = (flat << torch.arange(32)).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def four_bit_ranks(values: Tensor, scale: Tensor, kind: str) -> Tensor:
    """How many midpoints of the codebook lie below values / scale."""
    codes = torch.tensor(NF4_CODES if kind == "nf4" else FP4_CODES).sort().values
    scaled = values.float() * (1.0 / torch.where(scale.abs() < 1e-38, 1e-38, scale))
    return sum(((scaled > midpoint).int() for midpoint in ((codes[1:] + codes[:-1]) / 2).tolist()), torch.tensor(0))


def four_bit_bytes(weight: Tensor, absmax: Tensor, kind: str) -> Tensor:
    """The bytes of a weight (out, in) whose blocks of 64 have these absmax, the first code in the high nibble."""
    flat = weight.float().reshape(-1)
    ranks = four_bit_ranks(F.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64), absmax[:, None], kind)
    nibbles = torch.tensor(_FP4_ASCENDING)[ranks] if kind == "fp4" else ranks
    pairs = nibbles.reshape(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[: -(-len(flat) // 2), None]


def int8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out,) of int8 as bitsandbytes makes them."""
    half = weight.to(torch.float16).float()
    scale = half.abs().amax(dim=1)
    steps = half.clamp(-65504, 65504) * torch.where(scale == 0, 0.0, 127.0 / scale)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def integer_grid(
    weight: Tensor, importance: Tensor | None, bits: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups)."""
    groups = groups_of(weight, group)
    weights = None if importance is None else groups_of(importance[None], group)
    most = 2**bits - 1
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    largest = torch.maximum(high, -low)
    best_error, best_scale, best_zero = torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low)

    def attempt(scale: Tensor, zero: Tensor) -> Tensor:
        nonlocal best_error, best_scale, best_zero
        scale, zero = scale.half().float(), zero.clamp(0, most)
        codes = (groups * inverse(scale)[..., None]).round_().clamp_(-zero[..., None], (most - zero)[..., None])
        error = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        error = (error if weights is None else error.mul_(weights)).sum(dim=2)
        better = error < best_error
        best_error, best_scale, best_zero = (
            torch.where(better, new, old) for new, old in ((error, best_error), (scale, best_scale), (zero, best_zero))
        )
        weighted = codes if weights is None else codes * weights
        return (weighted * groups).sum(dim=2) / (weighted * codes).sum(dim=2).clamp_min_(torch.finfo().tiny)

    half = torch.full_like(low, 2.0 ** (bits - 1))
    for shrink in torch.linspace(1, _LEAST_SHRINK[bits], 12).tolist():
        if symmetric:
            for sign, more, fewer in ((1, -low, high), (-1, high, -low)):
                attempt(sign * shrink * torch.maximum(fewer / (half - 1), more / half), half)
        else:
            scale = ((high - low) * (shrink / most)).half().float()
            attempt(scale, (-low * shrink * inverse(scale)).round_())
    attempt(largest, half if symmetric else (low < 0).float())
    if symmetric:
        attempt(largest / (half - 1), half)
    for shift in (0, 0) if symmetric else (0, 0, -1, 1, 0):
        attempt(attempt(best_scale, best_zero + shift), best_zero + shift)
    return best_scale, best_zero


def integer_words(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Tensor:
    """The words of the codes of a weight (out, in)."""
    steps = (groups_of(weight, group) * inverse(scale)[..., None]).round_()
    codes = steps.clamp_(-zero[..., None], (2**bits - 1 - zero)[..., None]) + zero[..., None]
    return packed(codes.flatten(1)[:, : weight.shape[1]].int(), bits)


def ternary_scales(weight: Tensor, importance: Tensor | None, group: int) -> Tensor:
    """Scales (out, groups)."""
    groups = groups_of(weight, group)
    weights = None if importance is None else groups_of(importance[None], group)
    sizes, order = groups.abs().sort(dim=2, descending=True)
    ordered = torch.ones_like(sizes) if weights is None else weights.expand_as(sizes).gather(2, order)
    total, mass = (ordered * sizes).cumsum(dim=2), ordered.cumsum(dim=2).clamp_min_(torch.finfo().tiny)
    means = total / mass
    best = (total * means).argmax(dim=2, keepdim=True)
    optimum, largest = means.gather(2, best)[..., 0].half().float(), sizes[..., 0].half().float()

    def error(scale: Tensor) -> Tensor:
        codes = (groups * inverse(scale)[..., None]).round_().clamp_(-1, 1)
        squares = torch.addcmul(groups, codes, scale[..., None], value=-1).square_()
        return (squares if weights is None else squares.mul_(weights)).sum(dim=2)

    return torch.where(error(optimum) <= error(largest), optimum, largest)


def rescaling_loss(weight: Tensor, group: int, steps: float) -> float:
    """√(Σ_g ‖w_g‖² ((ŝ - s) / s)²  / ‖w‖²) of groups whose range of `steps` steps takes a scale s, in fp16 ŝ."""
    groups = groups_of(weight, group)
    low, high = groups.amin(dim=2).clamp_max_(0), groups.amax(dim=2).clamp_min_(0)
    scale = ((high - low) / steps).double()
    lost = torch.where(scale > 0, scale.half().double() / scale - 1, 0.0)
    energy = groups.double().square().sum(dim=2)
    return float((energy * lost.square()).sum() / energy.sum()) ** 0.5


def row_codes(words: Tensor, n: int, bits: int) -> Tensor:
    """The codes (rows, n) of int32 words (rows, ...), bit after bit."""
    places = words.long()[:, :, None] >> torch.arange(32) & 1
    return (places.reshape(len(words), -1)[:, : n * bits].reshape(len(words), n, bits) << torch.arange(bits)).sum(dim=2)


def per_column(values: Tensor, columns: int, group: int) -> Tensor:
    """Values (rows, groups) of groups of columns as (rows, columns)."""
    return values.float().repeat_interleave(group, dim=1)[:, :columns]


def integer_values(
    words: Tensor, scale: Tensor, zero_words: Tensor | None, shape: tuple[int, int], bits: int, group: int
) -> Tensor:
    """The weight (out, in) in fp32."""
    rows, columns = shape
    codes = row_codes(words, columns, bits).float()
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if zero_words is None else row_codes(zero_words.T, rows, bits).T
    return (codes - per_column(zero, columns, group)) * per_column(scale, columns, group)


def ternary_values(bytes_: Tensor, scale: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """The weight (out, in) in fp32."""
    digits = torch.stack([bytes_.long() // 3**i % 3 - 1 for i in range(5)], dim=1)
    codes = digits.reshape(-1)[: shape[0] * shape[1]].reshape(shape).float()
    return codes * per_column(scale, shape[1], group)


def four_bit_values(bytes_: Tensor, absmax: Tensor, codes: Tensor, shape: tuple[int, int], block: int) -> Tensor:
    """The weight (out, in) in fp32, of absmax (blocks,) in fp32."""
    flat = bytes_.reshape(-1).long()
    values = torch.stack((codes[flat >> 4], codes[flat & 15]), dim=1).reshape(-1)[: shape[0] * shape[1]]
    return (values * absmax.repeat_interleave(block)[: len(values)]).reshape(shape)


def nested_absmax(codes: Tensor, scale: Tensor, table: Tensor, offset: float, block: int) -> Tensor:
    """Absmax (blocks,) under double quantisation, in fp32."""
    return table[codes.long()] * scale.repeat_interleave(block)[: len(codes)] + offset


def int8_values(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight (out, in) in fp32."""
    return codes.float() * (scale / 127.0)[:, None]
