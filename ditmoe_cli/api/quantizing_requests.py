"""What is asked of a quantisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from ditmoe_cli.api.output_names import Size
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.plan import MOST_TOKENS, Rounding
from ditmoe_cli.compression.planner import Planner
from ditmoe_cli.compression.precision.budget import Budget
from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED, DEFAULT_FLOORS, DEFAULT_GROUP_SIZE, Candidates
from ditmoe_cli.compression.precision.mixed import TYING, MixedPrecision
from ditmoe_cli.compression.precision.uniform import UniformPrecision, format_named
from ditmoe_cli.errors import UsageError


@dataclass(frozen=True)
class Mixing:
    """Formats that a planned mix may choose from."""

    allow: tuple[str, ...] = DEFAULT_ALLOWED
    floor: list[str] | None = None
    protect: tuple[str, ...] = ()
    tie: tuple[str, ...] = ()

    def candidates(self, group_size: int, *, symmetric: bool) -> Candidates:
        """Return the formats to choose from. Raises `UsageError` for unknown names and what has no effect."""
        protected = next((text for text in self.floor or () if parse_floor(text)[0] in self.protect), None)
        if protected is not None:
            raise UsageError(f"⟨floor⟩ {protected} has no effect with ⟨protect⟩ {','.join(self.protect)}")
        floors = {**DEFAULT_FLOORS, **dict(parse_floor(text) for text in self.floor or ())}
        return Candidates(
            allowed=self.allow,
            group_size=group_size,
            symmetric=symmetric,
            floors=floors,
            protected=self.protect,
            tied=self.tie,
        )


def parse_floor(text: str) -> tuple[str, float]:
    """Return the group and the bits of ``GROUP=B``. Raises `UsageError`."""
    group, _, width = text.partition("=")
    try:
        return group, float(width)
    except ValueError:
        raise UsageError(f"⟨floor⟩ {text}: give a group and its fewest bits, as attn=4") from None


@dataclass(frozen=True)
class Precision:
    """How precise weights stay: the size to meet, by one format or a planned mix."""

    bits: float | None = None
    size: Size | None = None
    method: str = DEFAULT_METHODS["quantize"]
    uniform: bool = False
    format: str | None = None


@dataclass(frozen=True)
class Grids:
    """The grids that weights are rounded to."""

    double_quant: bool = False
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = False


@dataclass(frozen=True)
class RoundingOptions:
    """How weights are rounded."""

    rounding: str | None = None
    tokens: int = 0
    smooth: float = 0.0

    def method(self, uniform: bool) -> Rounding | None:
        """Return how weights are rounded, None for to the nearest. Raises `UsageError` for values out of range."""
        nearest = (self.rounding or ("nearest" if uniform else "gptq")) == "nearest"
        if self.tokens < 0 or (self.tokens and nearest):
            raise UsageError(f"⟨tokens⟩ {self.tokens}: give at least 1, and ⟨rounding⟩ gptq")
        if self.tokens > MOST_TOKENS:
            raise UsageError(f"⟨tokens⟩ {self.tokens}: give at most {MOST_TOKENS}, since all are in memory at once")
        if not 0 <= self.smooth <= 1 or (self.smooth and nearest):
            raise UsageError(f"⟨smooth⟩ {self.smooth:g}: give 0 to 1, and ⟨rounding⟩ gptq")
        return None if nearest else Rounding("gptq", self.tokens, self.smooth)


def quantizing_of(precision: Precision, grids: Grids, mixing: Mixing, rounding: RoundingOptions) -> Planner:
    """Return what to quantise to: one format, or a planned mix. Raises `UsageError` for what does not go together."""
    rounded = rounding.method(precision.uniform)
    return (uniform_of if precision.uniform else mix_of)(precision, grids, mixing, rounded)


def known_method(name: str) -> str:
    """Return the name of a method. Raises `UsageError` for an unknown one."""
    if name not in MIXES:
        raise UsageError(f"⟨method⟩ {name}: unknown; choose from {', '.join(MIXES)}")
    return name


def uniform_of(precision: Precision, grids: Grids, mixing: Mixing, rounding: Rounding | None) -> UniformPrecision:
    """Return what is asked for where all weights take one format. Raises `UsageError` for what does not go together."""
    if known_method(precision.method) != DEFAULT_METHODS["quantize"]:
        raise UsageError(f"⟨method⟩ {precision.method}: plans a mix; leave out ⟨uniform⟩")
    refuse_mixing(mixing)
    if precision.size is not None:
        raise UsageError("⟨size⟩ plans a mix; give ⟨bits⟩ with ⟨uniform⟩")
    name = format_named(
        precision.format,
        precision.bits,
        group_size=grids.group_size,
        symmetric=grids.symmetric,
        double_quant=grids.double_quant,
    )
    return UniformPrecision(name, rounding)


def mix_of(precision: Precision, grids: Grids, mixing: Mixing, rounding: Rounding | None) -> MixedPrecision:
    """Return what a planned mix is to be. Raises `UsageError` for unknown names and values out of range."""
    method = known_method(precision.method)
    if precision.format is not None or grids.double_quant:
        raise UsageError("⟨format⟩ and ⟨double_quant⟩: a mix has formats of its own; give ⟨uniform⟩, or ⟨allow⟩")
    size = precision.size
    if precision.bits is None and size is None:
        raise UsageError("⟨bits⟩ is missing: give a width, as 4 or 3.25, or a ⟨size⟩")
    budget = Budget(precision.bits, size.bytes if size is not None else None)
    if mixing.tie and method not in TYING:
        raise UsageError(f"⟨tie⟩ has no effect with ⟨method⟩ {method}; only {' and '.join(TYING)} tie matrices")
    candidates = mixing.candidates(grids.group_size, symmetric=grids.symmetric)
    return MixedPrecision(budget, candidates, method, rounding)


def refuse_mixing(mixing: Mixing) -> None:
    """Raise `UsageError` for the first option that shapes a mix, where one format is asked for."""
    for field in fields(mixing):
        if getattr(mixing, field.name) != field.default:
            raise UsageError(f"--{field.name}: shapes a planned mix; leave out ⟨uniform⟩")


def width_texts(widths: Sequence[int | float | str]) -> tuple[str, ...]:
    """Return widths in bits as texts: ``4`` as ``"4"``."""
    return tuple(width if isinstance(width, str) else f"{width:g}" for width in widths)


def floor_texts(floors: Mapping[str, float] | None) -> list[str] | None:
    """Return the fewest bits of groups as texts: ``{"attn": 4}`` as ``["attn=4"]``."""
    return None if floors is None else [f"{group}={bits:g}" for group, bits in floors.items()]
