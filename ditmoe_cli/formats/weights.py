"""How packed weights are laid out on disk: names, dtypes, shapes and sizes, known without torch.

A weight ``X.weight`` of shape (out, in) becomes one of the following.

nf4, fp4 (4 bits, blocks of 64 weights of the flattened matrix) and int8 (one scale a row) are stored exactly as
bitsandbytes 0.50 serialises them, so that its own readers take our files; -dq is its double quantisation, which stores
the blocks' absmax in 8 bits. Below, B = ceil(out*in/64) and f4 is nf4 or fp4:

    f4     X.weight                                     U8   (out*in/2, 1)   first of each pair in the high nibble
           X.weight.absmax                              F32  (B,)
           X.weight.quant_map                           F32  (16,)           w = quant_map[code] * absmax
           X.weight.quant_state.bitsandbytes__f4        U8   JSON: quant_type, blocksize, dtype, shape
    f4-dq  X.weight, X.weight.quant_map                      as above
           X.weight.absmax                              U8   (B,)
           X.weight.nested_absmax                       F32  (ceil(B/256),)
           X.weight.nested_quant_map                    F32  (256,)
           X.weight.quant_state.bitsandbytes__f4        U8   JSON, with nested_blocksize, nested_dtype, nested_offset
                                                             absmax = nested_quant_map[code] * nested_absmax + offset
    int8   X.weight                                     I8   (out, in)
           X.SCB                                        F32  (out,)          w = code * SCB / 127
           X.weight_format                              U8   ()              always 0

The JSON of -dq is padded with spaces, so that its size does not depend on how many digits nested_offset takes.

int{b}-g{g} (b bits a weight, groups of g columns; b 2, 3, 4, 5, 6 or 8 and g 32, 64 or 128), its symmetric kind
int{b}-g{g}-sym, and ternary-g{g} are laid out so, with G = ceil(in/g) groups a row, the last of which may be shorter:

    int    X.weight_packed                              I32  (out, ceil(in*b/32))
           X.weight_scale                               F16  (out, G)        w = (code - zero) * scale
           X.weight_zero_point                          I32  (out, ceil(G*b/32))    absent of -sym: zero = 2^(b-1)
           X.weight_shape                               I32  (2,)            out, in
    tern.  X.weight_packed                              U8   (ceil(out*in/5),)      codes -1, 0, 1
           X.weight_scale                               F16  (out, G)        w = code * scale
           X.weight_shape                               I32  (2,)            out, in

Codes and zero points of b bits are unsigned and packed without gaps, the lowest bit first: value j of a row takes bits
b*j to b*j + b - 1 of the row, whose bit k is bit k mod 32 of word k // 32. Values may straddle words; each row begins
with a new one. Ternary codes run over the flattened matrix, byte = sum_i (code_i + 1) 3^i over five at a time, and
the last byte is padded with codes 0. Nothing else says what a weight is stored as: b follows from the words of a row,
which takes at least 32 columns, and g from the columns of the scales (the smallest that fits; where several fit, a
row is one group, and they are the same).

A block's experts may be stored as one base and what each differs from it by. A matrix X.weight (out, in) of an expert,
X = blocks.i.moe.experts.e.gate_proj, up_proj or down_proj, then has no tensor of its own name. It is the base of its
block, in the dtype that the matrix has to the model, plus a product of factors in that dtype, or a scale times codes:

    base       blocks.i.moe.base.gate_proj.weight      ...  (out, in)       likewise of up_proj and down_proj
    svd        X.weight.delta_left                     ...  (out, r)
               X.weight.delta_right                    ...  (r, in)
    ternary    X.weight.delta_ternary                  U8   (ceil(out*in/5),)   codes -1, 0, 1, five a byte in base 3
               X.weight.delta_scale                    F32  ()

A matrix may be cut along its neurons into pieces of different widths: rows of gate_proj and up_proj (and of any other
weight), columns of down_proj. X.weight then has no tensor of its own name either. Its pieces are weights of int and
ternary formats, numbered from 0, at least two, and are joined in that order:

    pieces     X.pieces.0.weight_packed, ...           as above, of shape (n_0, in), or (out, n_0) of down_proj
               X.pieces.1.weight_packed, ...           (n_1, in), or (out, n_1)

Its format is called rows:f_0*n_0+f_1*n_1+... or columns:f_0*n_0+f_1*n_1+..., as rows:int4-g64*64+int2-g64*192. No file
says which neurons they are: those of an expert may stand in any order that its three matrices share.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import BASE, MATRICES, in_block, split_name

Format = str  # one of FORMATS, which `parse_format` tells the meaning of, or pieces of them (`parse_pieces`)
DeltaFormat = Literal["svd", "ternary"]
Kind = Literal["nf4", "fp4", "int8", "uniform", "ternary"]
BLOCK = 64  # weights that share an absmax in nf4 and fp4
NESTED_BLOCK = 256  # absmax that share a scale under double quantisation
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
WORD_BITS = 32
FEWEST_COLUMNS = 32  # with fewer, the words of a row do not tell the bits
TERNARY_PER_BYTE = 5  # 3⁵ = 243 fits a byte
_BLOCKS_READ = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # block sizes that bitsandbytes knows
_OFFSET_DIGITS = 24  # no fp32 value takes more characters in JSON
_DELTA_PARTS: Mapping[str, DeltaFormat] = {
    "delta_left": "svd",
    "delta_right": "svd",
    "delta_ternary": "ternary",
    "delta_scale": "ternary",
}
_PACKED_PARTS = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape"})
_STATE_SUFFIX = ".quant_state.bitsandbytes__"
_PIECE_NAME = re.compile(r"(.+)\.pieces\.(\d+)\.weight")
_PIECE = re.compile(r"([a-z0-9-]+)\*([1-9][0-9]*)")
_AXES = ("rows", "columns")
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODES = {name: code for code, name in _TORCH_NAMES.items()}


@dataclass(frozen=True)
class Scheme:
    """What a format's name says.

    Attributes:
        name: the format.
        kind: ``uniform`` of int{b}-g{g}, else what the name begins with.
        bits: of a code; 2 of ternary ones, though five take a byte.
        group: weights that share a scale; 0 where a row does.
        symmetric: whether no zero point is stored.
        double: whether absmax are quantised themselves.
    """

    name: Format
    kind: Kind
    bits: int
    group: int = 0
    symmetric: bool = True
    double: bool = False

    @property
    def grouped(self) -> bool:
        """Whether fp16 scales belong to groups of columns, as in the uniform and ternary formats."""
        return self.kind in ("uniform", "ternary")

    @property
    def parts(self) -> tuple[str, ...]:
        """What the members are, in the order of `quantized_members`."""
        if self.kind == "int8":
            return ("packed", "scale", "form")
        if self.grouped:
            return ("packed", "scale", "shape") if self.symmetric else ("packed", "scale", "zero_point", "shape")
        nested = ("nested_absmax", "nested_quant_map") if self.double else ()
        return ("packed", "absmax", "quant_map", *nested, "state")


def _all_schemes() -> dict[Format, Scheme]:
    schemes = [
        Scheme("nf4", "nf4", 4, BLOCK),
        Scheme("fp4", "fp4", 4, BLOCK),
        Scheme("nf4-dq", "nf4", 4, BLOCK, double=True),
        Scheme("fp4-dq", "fp4", 4, BLOCK, double=True),
        Scheme("int8", "int8", 8),
    ]
    for group in GROUPS:
        for bits in BITS:
            schemes.append(Scheme(f"int{bits}-g{group}", "uniform", bits, group, symmetric=False))
            schemes.append(Scheme(f"int{bits}-g{group}-sym", "uniform", bits, group))
        schemes.append(Scheme(f"ternary-g{group}", "ternary", 2, group))
    return {scheme.name: scheme for scheme in schemes}


SCHEMES: Mapping[Format, Scheme] = _all_schemes()
FORMATS: tuple[Format, ...] = tuple(SCHEMES)


def parse_format(name: object, what: str = "the format") -> Scheme:
    """Return what the name of a format means. Raises `BadInputError` that begins with `what` for other names."""
    scheme = SCHEMES.get(name) if isinstance(name, str) else None
    if scheme is None:
        raise BadInputError(
            f"{what} is {name!r}; expected one of nf4, int8, fp4, nf4-dq, fp4-dq, int{{b}}-g{{g}}, int{{b}}-g{{g}}-sym "
            f"or ternary-g{{g}} with b one of {', '.join(map(str, BITS))} and g one of {', '.join(map(str, GROUPS))}"
        )
    return scheme


@dataclass(frozen=True)
class Pieces:
    """A format of pieces along one axis of a matrix: 0 for pieces of its rows, 1 of its columns.

    `formats` are those of the pieces, in order, and `counts` how many rows or columns each has.
    """

    axis: int
    formats: tuple[Format, ...]
    counts: tuple[int, ...]

    @property
    def name(self) -> Format:
        """The format's name, as ``rows:int4-g64*64+int2-g64*192``."""
        each = (f"{fmt}*{count}" for fmt, count in zip(self.formats, self.counts, strict=True))
        return f"{_AXES[self.axis]}:{'+'.join(each)}"

    @property
    def slices(self) -> tuple[slice, ...]:
        """The rows or columns of each piece."""
        return tuple(slice(*ends) for ends in pairwise(accumulate(self.counts, initial=0)))

    def infos(self, info: TensorInfo) -> list[TensorInfo]:
        """Return the pieces of the weight `info` as weights."""
        stem = info.name.removesuffix(".weight")
        return [
            replace(info, name=f"{stem}.pieces.{i}.weight", shape=self._shape(info.shape, count))
            for i, count in enumerate(self.counts)
        ]

    def _shape(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        return (count, *shape[1:]) if self.axis == 0 else (shape[0], count)


@lru_cache(maxsize=1024)
def parse_pieces(name: str) -> Pieces | None:
    """Return what the name of a format of pieces means; None for all other names."""
    axis, _, listed = name.partition(":")
    found = [_PIECE.fullmatch(each) for each in listed.split("+")]
    if axis not in _AXES or len(found) < 2 or not all(found):
        return None
    parts = [(match[1], int(match[2])) for match in found if match]
    if not all(fmt in SCHEMES and SCHEMES[fmt].grouped for fmt, _ in parts):
        return None
    return Pieces(_AXES.index(axis), *(tuple(column) for column in zip(*parts, strict=True)))


def checked_format(name: object, what: str = "the format") -> Format:
    """Return a format's name, of pieces or not. Raises `BadInputError` that begins with `what` for what is none."""
    if not isinstance(name, str) or ":" not in name:
        return parse_format(name, what).name
    if parse_pieces(name) is None:
        raise BadInputError(
            f"{what} is {name!r}; expected two or more pieces of int and ternary formats with their rows or columns, "
            "as rows:int4-g64*64+int2-g64*192"
        )
    return name


def format_label(name: Format) -> str:
    """Return a format's name without the sizes of its pieces, by which weights may be counted."""
    pieces = parse_pieces(name)
    return name if pieces is None else f"{_AXES[pieces.axis]}:{'+'.join(pieces.formats)}"


def neuron_axis(name: str) -> int:
    """Return the axis along which the weight `name` may be cut: 1, its columns, of down_proj, and 0 of all others."""
    return int(name.endswith(f"{MATRICES[2]}.weight"))


@dataclass(frozen=True)
class Weight:
    """A tensor as the model sees it: its logical dtype and shape, its format, and what stores it.

    `format` is None for a plain tensor, whose only member is itself. The base of ``svd`` and ``ternary`` weights is the
    first member of each expert's, and no weight itself. Of a weight in pieces, `pieces` are these.
    """

    info: TensorInfo
    format: Format | DeltaFormat | None
    members: tuple[str, ...]
    pieces: tuple[Weight, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the weight is kept packed in memory too."""
        return self.format in SCHEMES or bool(self.pieces)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that keep the weight packed in memory: one for each piece."""
        return tuple(each.info.name.removesuffix(".weight") for each in self.pieces or (self,))


def quant_state_json(info: TensorInfo, fmt: Format = "nf4", offset: float = 0.0) -> bytes:
    """Return bitsandbytes' JSON description of a 4 bit weight, as it writes it.

    With double quantisation, `offset` is what the blocks' absmax were lowered by, and spaces follow up to the length
    that the longest offset would give. JSON allows them.
    """
    scheme = parse_format(fmt)
    state: dict[str, object] = {
        "quant_type": scheme.kind,
        "blocksize": BLOCK,
        "dtype": _TORCH_NAMES[info.dtype],
        "shape": list(info.shape),
    }
    if not scheme.double:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    longest = len(json.dumps(state | {"nested_offset": 0})) - 1 + _OFFSET_DIGITS
    return json.dumps(state | {"nested_offset": offset}).ljust(longest).encode()


def packed_words(values: int, bits: int) -> int:
    """Return how many 32-bit words a row of values takes, ⌈values · bits / 32⌉."""
    return math.ceil(values * bits / WORD_BITS)


def quantized_members(info: TensorInfo, fmt: Format) -> list[TensorInfo]:
    """Return the tensors that store the weight `info` in format `fmt`: piece by piece, by its scheme's parts."""
    pieces = parse_pieces(fmt)
    if pieces is not None:
        each = zip(pieces.infos(info), pieces.formats, strict=True)
        return [member for piece, name in each for member in quantized_members(piece, name)]
    scheme = parse_format(fmt)
    if scheme.kind == "int8":
        stem = info.name.removesuffix(".weight")
        return [
            TensorInfo(info.name, "I8", info.shape),
            TensorInfo(f"{stem}.SCB", "F32", (info.shape[0],)),
            TensorInfo(f"{stem}.weight_format", "U8", ()),
        ]
    if scheme.grouped:
        return _grouped_members(info, scheme)
    state = TensorInfo(f"{info.name}{_STATE_SUFFIX}{scheme.kind}", "U8", (len(quant_state_json(info, fmt)),))
    return _four_bit_members(info, state, BLOCK, NESTED_BLOCK if scheme.double else 0)


def _four_bit_members(info: TensorInfo, state: TensorInfo, block: int, nested_block: int) -> list[TensorInfo]:
    blocks = math.ceil(info.numel / block)
    members = [
        TensorInfo(info.name, "U8", (math.ceil(info.numel / 2), 1)),
        TensorInfo(f"{info.name}.absmax", "U8" if nested_block else "F32", (blocks,)),
        TensorInfo(f"{info.name}.quant_map", "F32", (16,)),
    ]
    if nested_block:
        members += [
            TensorInfo(f"{info.name}.nested_absmax", "F32", (math.ceil(blocks / nested_block),)),
            TensorInfo(f"{info.name}.nested_quant_map", "F32", (256,)),
        ]
    return [*members, state]


def _grouped_members(info: TensorInfo, scheme: Scheme) -> list[TensorInfo]:
    rows, columns = info.shape
    groups = math.ceil(columns / scheme.group)
    packed = (
        TensorInfo(f"{info.name}_packed", "U8", (ternary_bytes(info.numel),))
        if scheme.kind == "ternary"
        else TensorInfo(f"{info.name}_packed", "I32", (rows, packed_words(columns, scheme.bits)))
    )
    zero = TensorInfo(f"{info.name}_zero_point", "I32", (rows, packed_words(groups, scheme.bits)))
    return [
        packed,
        TensorInfo(f"{info.name}_scale", "F16", (rows, groups)),
        *([] if scheme.symmetric else [zero]),
        TensorInfo(f"{info.name}_shape", "I32", (2,)),
    ]


def ternary_bytes(values: int) -> int:
    """Return how many bytes ternary values take, ⌈values / 5⌉."""
    return math.ceil(values / TERNARY_PER_BYTE)


def base_name(name: str) -> str:
    """Return the name of the base that the matrix `name` of an expert is stored as a difference from.

    Raises `BadInputError` for what is no matrix of an expert.
    """
    parts = split_name(name)
    if parts.block is None or parts.expert is None or parts.rest not in {f"{matrix}.weight" for matrix in MATRICES}:
        raise BadInputError(f"{name!r} is stored as a difference, but only matrices of routed experts may be")
    return in_block(parts.block, f"{BASE}.{parts.rest}")


def difference_members(info: TensorInfo, fmt: DeltaFormat, rank: int) -> list[TensorInfo]:
    """Return the tensors that store what an expert's matrix `info` differs from its base by; `rank` is for ``svd``."""
    rows, columns = info.shape
    if fmt == "svd":
        return [
            TensorInfo(f"{info.name}.delta_left", info.dtype, (rows, rank)),
            TensorInfo(f"{info.name}.delta_right", info.dtype, (rank, columns)),
        ]
    return [
        TensorInfo(f"{info.name}.delta_ternary", "U8", (ternary_bytes(info.numel),)),
        TensorInfo(f"{info.name}.delta_scale", "F32", ()),
    ]


def logical_weights(tensors: Mapping[str, TensorInfo], raw: Callable[[str], bytes]) -> dict[str, Weight]:
    """Group stored tensors into the weights the model sees.

    `raw(name)` returns a stored tensor's bytes; only small descriptions (JSON and shapes) are read.

    Raises `BadInputError` that names a tensor where what stores a weight is incomplete, or does not fit together.
    """
    result: dict[str, Weight] = {}
    taken: set[str] = set()
    for name in tensors:
        stem, _, part = name.rpartition(".")
        if name in taken:
            continue
        if _STATE_SUFFIX in name:
            weight = _four_bit_weight(name, tensors, raw(name))
        elif name.endswith(".SCB"):
            weight = _int8_weight(name, tensors)
        elif stem and part in _DELTA_PARTS:
            weight = _delta_weight(stem, _DELTA_PARTS[part], tensors)
        elif stem and part in _PACKED_PARTS:
            weight = _grouped_weight(f"{stem}.weight", tensors, raw)
        else:
            continue
        if result.setdefault(weight.info.name, weight) != weight:
            raise BadInputError(f"the weight {weight.info.name!r} is stored twice, in different formats")
        taken.update(weight.members)
    result = _joined(result)
    for name, weight in result.items():
        if name in tensors and name not in weight.members:
            raise BadInputError(f"tensor {name!r} stands beside {weight.members[0]!r}, which stores the same weight")
    plain = {n: Weight(info, None, (n,)) for n, info in tensors.items() if n not in taken}
    loose = next((name for name in plain if _PIECE_NAME.fullmatch(name)), None)
    if loose is not None:
        raise BadInputError(f"tensor {loose!r} is named as a piece of a weight, but is not packed as one")
    return result | plain


def _joined(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Return weights with those that are pieces of one joined."""
    result: dict[str, Weight] = {}
    pieces: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        match = _PIECE_NAME.fullmatch(name)
        if match is None:
            result[name] = weight
        else:
            pieces.setdefault(match[1], {})[name] = weight
    for stem, found in pieces.items():
        name = f"{stem}.weight"
        if name in result:
            raise BadInputError(f"the weight {name!r} is stored twice, in one piece and in several")
        result[name] = _of_pieces(name, list(_in_order(stem, found)))
    return result


def _in_order(stem: str, found: Mapping[str, Weight]) -> Iterator[Weight]:
    """Yield the pieces of a weight by their numbers, which have to begin with 0 and leave none out."""
    for i in range(max(len(found), 2)):
        name = f"{stem}.pieces.{i}.weight"
        if name not in found:
            raise BadInputError(
                f"'{stem}.weight' is stored in pieces, of which {name!r} is missing beside {next(iter(found))!r}"
            )
        yield found[name]


def _of_pieces(name: str, pieces: Sequence[Weight]) -> Weight:
    """Return the weight that pieces make up, whose shapes and formats have to fit together."""
    axis, first = neuron_axis(name), pieces[0].info
    for piece in pieces:
        scheme = SCHEMES.get(piece.format or "")
        if scheme is None or not scheme.grouped:
            raise BadInputError(
                f"{piece.info.name!r} is {piece.format}; pieces of a weight are of int formats or ternary"
            )
        if piece.info.shape[1 - axis] != first.shape[1 - axis]:
            raise BadInputError(
                f"{piece.info.name!r} is {list(piece.info.shape)} and {first.name!r} is {list(first.shape)}; as "
                f"{_AXES[axis]} of {name!r} they need as many {_AXES[1 - axis]}"
            )
    counts = tuple(piece.info.shape[axis] for piece in pieces)
    shape = (sum(counts), first.shape[1]) if axis == 0 else (first.shape[0], sum(counts))
    fmt = Pieces(axis, tuple(piece.format for piece in pieces if piece.format), counts).name
    members = tuple(member for piece in pieces for member in piece.members)
    return Weight(replace(first, name=name, shape=shape), fmt, members, tuple(pieces))


def _quantized_weight(info: TensorInfo, fmt: Format, tensors: Mapping[str, TensorInfo]) -> Weight:
    _check_matrix(info, fmt)
    return _of_members(info, fmt, quantized_members(info, fmt), tensors)


def _check_matrix(info: TensorInfo, fmt: Format) -> None:
    if len(info.shape) != 2:
        raise BadInputError(f"the {fmt} weight {info.name!r} has shape {list(info.shape)}, which is no matrix")


def _of_members(
    info: TensorInfo, fmt: Format | DeltaFormat, members: Sequence[TensorInfo], tensors: Mapping[str, TensorInfo]
) -> Weight:
    """Return the weight that is stored as `members`, each of which has to be there as it is described."""
    for member in members:
        found = tensors.get(member.name)
        if found != member:
            what = f"{found.dtype} {list(found.shape)}" if found else "missing"
            raise BadInputError(
                f"tensor {member.name!r} of the {fmt} weight {info.name!r} is {what}, "
                f"expected {member.dtype} {list(member.shape)}"
            )
    return Weight(info, fmt, tuple(member.name for member in members))


@dataclass(frozen=True)
class FourBitState:
    """What bitsandbytes' JSON says of a 4 bit weight; `nested_block` is 0 without double quantisation."""

    dtype: str
    shape: tuple[int, ...]
    block: int
    nested_block: int
    offset: float


def parse_quant_state(state: bytes, name: str) -> FourBitState:
    """Read bitsandbytes' JSON. Raises `BadInputError` that names the tensor `name`."""
    try:
        described = json.loads(state)
        nested = "nested_blocksize" in described
        parsed = FourBitState(
            _CODES[described["dtype"]],
            tuple(int(n) for n in described["shape"]),
            int(described["blocksize"]),
            int(described["nested_blocksize"]) if nested else 0,
            float(described["nested_offset"]) if nested else 0.0,
        )
        good = all(n >= 0 for n in parsed.shape) and math.isfinite(parsed.offset) and parsed.nested_block >= 0
        good &= not nested or (parsed.nested_block > 0 and described["nested_dtype"] == "float32")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        good = False
    if not good:
        raise BadInputError(f"tensor {name!r} does not hold a bitsandbytes quantisation state")
    if parsed.block not in _BLOCKS_READ:
        raise BadInputError(f"tensor {name!r} tells of blocks of {parsed.block}, which bitsandbytes does not know")
    return parsed


def _four_bit_weight(state_name: str, tensors: Mapping[str, TensorInfo], state: bytes) -> Weight:
    name, _, kind = state_name.partition(_STATE_SUFFIX)
    if kind not in ("nf4", "fp4"):
        raise BadInputError(f"tensor {state_name!r}: {kind} is no format that ditmoe reads; it reads nf4 and fp4")
    parsed = parse_quant_state(state, state_name)
    info, fmt = TensorInfo(name, parsed.dtype, parsed.shape), f"{kind}-dq" if parsed.nested_block else kind
    _check_matrix(info, fmt)
    described = TensorInfo(state_name, "U8", (len(state),))  # others may lay their JSON out otherwise
    return _of_members(info, fmt, _four_bit_members(info, described, parsed.block, parsed.nested_block), tensors)


def _grouped_weight(name: str, tensors: Mapping[str, TensorInfo], raw: Callable[[str], bytes]) -> Weight:
    """Return the uniform or ternary weight `name`, told by the dtypes and shapes of what stores it."""
    packed, scale, shape = (_required(name, part, tensors) for part in ("packed", "scale", "shape"))
    if (shape.dtype, shape.shape) != ("I32", (2,)):
        raise BadInputError(f"tensor {shape.name!r} is {shape.dtype} {list(shape.shape)}, expected I32 [2]")
    rows, columns = struct.unpack("<2i", raw(shape.name))
    info = TensorInfo(name, "F16", (rows, columns))
    if rows < 1 or columns < FEWEST_COLUMNS:
        raise BadInputError(
            f"tensor {shape.name!r} says [{rows}, {columns}]; expected at least 1 row and {FEWEST_COLUMNS} columns"
        )
    group = next((g for g in GROUPS if scale.shape == (rows, math.ceil(columns / g))), None)
    if group is None:
        raise BadInputError(
            f"tensor {scale.name!r} has shape {list(scale.shape)}, which no groups of "
            f"{', '.join(map(str, GROUPS))} columns give for a weight of {[rows, columns]}"
        )
    if packed.dtype == "U8":
        return _of_members(info, f"ternary-g{group}", _grouped_members(info, SCHEMES[f"ternary-g{group}"]), tensors)
    bits = next((b for b in BITS if packed.shape == (rows, packed_words(columns, b))), None)
    if bits is None:
        raise BadInputError(
            f"tensor {packed.name!r} has shape {list(packed.shape)}, which no {', '.join(map(str, BITS))} bits give "
            f"for a weight of {[rows, columns]}"
        )
    fmt = f"int{bits}-g{group}" + ("" if f"{name}_zero_point" in tensors else "-sym")
    return _of_members(info, fmt, _grouped_members(info, SCHEMES[fmt]), tensors)


def _required(name: str, part: str, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    if f"{name}_{part}" not in tensors:
        raise BadInputError(f"tensor '{name}_{part}' of the packed weight {name!r} is missing")
    return tensors[f"{name}_{part}"]


def _int8_weight(scale_name: str, tensors: Mapping[str, TensorInfo]) -> Weight:
    name = scale_name.removesuffix("SCB") + "weight"
    if name not in tensors:
        raise BadInputError(f"tensor {scale_name!r} stands without its weight {name!r}")
    return _quantized_weight(TensorInfo(name, "F16", tensors[name].shape), "int8", tensors)


def _delta_weight(name: str, fmt: DeltaFormat, tensors: Mapping[str, TensorInfo]) -> Weight:
    base = tensors.get(base_name(name))
    if base is None:
        raise BadInputError(f"the {fmt} weight {name!r} stands without its base {base_name(name)!r}")
    if name in tensors:
        raise BadInputError(f"tensor {name!r} stands beside its difference from {base.name!r}; one of them is too many")
    if len(base.shape) != 2 or base.dtype not in FLOATING:
        raise BadInputError(
            f"tensor {base.name!r} is {base.dtype} {list(base.shape)}, but the base of {name!r} has to be a floating "
            "matrix"
        )
    info = replace(base, name=name)
    return _of_members(info, fmt, [base, *difference_members(info, fmt, _rank(name, tensors))], tensors)


def _rank(name: str, tensors: Mapping[str, TensorInfo]) -> int:
    """Return the rank that a difference's factors tell: the columns of the left one, else the rows of the right one."""
    sides = ((f"{name}.delta_left", -1), (f"{name}.delta_right", 0))
    return next((tensors[side].shape[axis] for side, axis in sides if side in tensors and tensors[side].shape), 0)


def is_quantizable(info: TensorInfo, fmt: Format | None = None) -> bool:
    """Tell whether a weight can be stored in format `fmt`, or in any of bitsandbytes' where none is given.

    Those take a floating matrix of even size that is not fp64; uniform and ternary formats any floating matrix of at
    least 32 columns. Pieces take one whose rows or columns, along the axis of its neurons, they add up to.
    """
    if len(info.shape) != 2 or info.dtype not in FLOATING:
        return False
    pieces = parse_pieces(fmt) if fmt is not None else None
    if pieces is not None:
        fits = pieces.axis == neuron_axis(info.name) and sum(pieces.counts) == info.shape[pieces.axis]
        return fits and all(each.shape[1] >= FEWEST_COLUMNS for each in pieces.infos(info))
    if fmt is not None and parse_format(fmt).grouped:
        return info.shape[1] >= FEWEST_COLUMNS
    return info.dtype != "F64" and info.numel % 2 == 0
