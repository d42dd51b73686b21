"""Weights and the tensors that store them, for tests of number formats."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import torch
from conftest import Pico
from hypothesis import strategies as st
from torch import Tensor

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import dtype_code, tensor_bytes
from ditmoe_cli.formats.base import NumberFormat, Weight
from ditmoe_cli.formats.bitsandbytes import FourBit
from ditmoe_cli.formats.grouped import GroupedFormat
from ditmoe_cli.formats.integer import Integer
from ditmoe_cli.formats.packed_sizes import FEWEST_TELLING
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import FORMATS, Format, pack, parse_format, quantized_members
from ditmoe_cli.formats.weights import logical_weights

NAME = "layer.weight"
FOUR_BIT = [name for name in FORMATS if isinstance(parse_format(name), FourBit)]
GROUPED = [name for name in FORMATS if isinstance(parse_format(name), GroupedFormat)]
# one of each way through the code: blocks, nested blocks, rows; widths that straddle words or not; with zeros, without
KINDS = ["nf4", "fp4-dq", "int8", "int3-g32", "int4-g64", "int6-g128-sym", "ternary-g64"]


def packed_pico(pico: Pico, fmt: str, part: str = ".moe.") -> Pico:
    """Return the pico with all expert matrices (or those whose name contains `part`) stored in a format."""
    state: dict[str, Tensor] = {}
    for name, tensor in pico.state.items():
        chosen = part in name and name.endswith("_proj.weight" if part == ".moe." else ".weight")
        state |= pack(tensor, TensorInfo(name, "F32", tuple(tensor.shape)), fmt) if chosen else {name: tensor}
    return Pico(pico.config, state)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose rows differ much in scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = (2 * torch.randn(shape[0], 1, generator=generator)).exp() / 30
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def rough(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Weights whose rows differ much in scale, with outliers, zeros and rows of one sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) ** 3 * (2 * torch.randn(shape[0], 1, generator=generator)).exp()
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values[::3] = values[::3].abs()
    return values.clamp(-60000, 60000)


def odd(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Weights each row of which is hard in its own way: skewed, of one sign, constant, of zeros of both signs, tiny,
    huge, with outliers, halfway between steps, sparse."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(shape, generator=generator)
    for row in range(shape[0]):
        values = weight[row]
        made = {
            1: values**3 * 100,
            2: values.abs(),
            3: -values.abs(),
            4: torch.full_like(values, 0.37),
            5: torch.where(torch.arange(shape[1]) % 3 == 0, -0.0, 0.0),
            6: values * 1e-6,
            7: values * 1e5,
            8: torch.where(torch.arange(shape[1]) % 40 == 0, 30.0, values),
            9: (values * 100).round() / 100,
            10: torch.full_like(values, -0.0),
            11: torch.where(torch.arange(shape[1]) == 5, 1e-7, 0.0),
            12: torch.where(torch.rand(shape[1], generator=generator) < 0.9, 0.0, values),
            13: values.sign() * 0.5,
        }
        weight[row] = made.get((row + seed) % 14, values)
    return weight.clamp(-60000, 60000)


def all_columns(weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[1])


def info_of(weight: Tensor, name: str = NAME) -> TensorInfo:
    return TensorInfo(name, dtype_code(weight.dtype, name), tuple(weight.shape))


def infos_of(members: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: info_of(tensor, name) for name, tensor in members.items()}


def stored(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def no_bytes(name: str) -> bytes:
    raise AssertionError(f"{name} should not be read")


def described(*weights: tuple[TensorInfo, Format]) -> Callable[[str], bytes]:
    """The bytes of the small tensors that describe weights; all others are not to be read."""
    texts = {}
    for info, name in weights:
        fmt = parse_format(name)
        if isinstance(fmt, FourBit):
            texts[fmt.members(info)["state"].name] = fmt.state_json(info, 0.123456789)
        short = isinstance(fmt, Integer) and info.shape[1] < FEWEST_TELLING
        numbers = (*info.shape, fmt.bits) if short else info.shape
        texts[f"{info.name}_shape"] = struct.pack(f"<{len(numbers)}i", *map(int, numbers))

    def raw(name: str) -> bytes:
        assert name in texts, f"{name} should not be read"
        return texts[name]

    return raw


def weight_of(weight: Tensor, fmt: Format) -> Weight:
    """The weight that reading back `weight` in a format gives."""
    info = info_of(weight)
    if fmt not in FOUR_BIT:  # only their JSON keeps a dtype; others have scales that fp16 holds
        info = TensorInfo(info.name, "F16", info.shape)
    return Weight(info, parse_format(fmt), tuple(member.name for member in quantized_members(info, fmt)))


def found(members: Mapping[str, Tensor]) -> Weight:
    """The only weight that tensors store."""
    (weight,) = logical_weights(infos_of(members), lambda name: members[name].numpy().tobytes()).values()
    return weight


def dequantized(weight: Weight, members: Mapping[str, Tensor]) -> Tensor:
    assert isinstance(weight.stored_as, NumberFormat)
    return weight.stored_as.dequantize(weight.info, members)


def through(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """A weight packed and unpacked, in fp32."""
    return dequantized(weight_of(weight, fmt), pack(weight, info_of(weight), fmt, importance))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b))


def pieces_of(axis: int, formats: tuple[Format, ...], counts: tuple[int, ...]) -> Pieces:
    return Pieces(axis, tuple(map(parse_format, formats)), counts)


@st.composite
def in_pieces(draw: st.DrawFn) -> tuple[Tensor, TensorInfo, Pieces]:
    axis = draw(st.integers(0, 1))
    formats = draw(st.lists(st.sampled_from(["int3-g32", "int4-g64-sym", "ternary-g64"]), min_size=2, max_size=4))
    counts = tuple(draw(st.integers(32 if axis else 1, 100)) for _ in formats)
    shape = (7, sum(counts)) if axis else (sum(counts), 70)
    name = f"x.{'down' if axis else 'up'}_proj.weight"
    return (
        random(shape, draw(st.integers(0, 99))),
        TensorInfo(name, "F32", shape),
        pieces_of(axis, tuple(formats), counts),
    )
