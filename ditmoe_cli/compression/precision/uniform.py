"""Uniform quantisation: one format for every routed, shared and attention matrix. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ditmoe_cli.compression.plan import CompressionPlan, Formats, Rounding
from ditmoe_cli.compression.planner import Planner, Work, label_of, tokens_label
from ditmoe_cli.compression.precision.candidates import (
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    format_counts,
    left_alone,
    require_unquantised,
    rounding_options,
)
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.formats.registry import is_quantizable
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import weight_group
from ditmoe_cli.routing.profile import RoutingProfile

UNIFORM_GROUPS = ("experts", "shared", "attn")
KINDS = ("nf4", "fp4", "int8", "int", "ternary")
INTEGER_BITS = (2, 3, 4, 5, 6, 8)
_TERNARY_BITS = 1.58


@dataclass(frozen=True)
class UniformPrecision(Planner):
    """The planner of one format for all routed, shared and attention matrices.

    Attributes:
        format: the format.
        rounding: method that rounds weights to it; None for the nearest values, which need no profile.
    """

    format: str
    rounding: Rounding | None = None
    command: ClassVar[str] = "quantize"

    @property
    def needs_profile(self) -> bool:
        """Whether weights are rounded on calibration data."""
        return self.rounding is not None

    @property
    def label(self) -> str:
        """The ending of the default output's name; that of a mix has its bits or its size in it."""
        return label_of(
            f"{self.command}-{self.format}",
            self.rounding and self.rounding.method,
            tokens_label(self.rounding),
            self.rounding and self.rounding.smoothing and f"smooth{self.rounding.smoothing:g}",
        )

    def check(self, work: Work) -> None:
        """Raise `BadInputError` where weights are quantised already."""
        require_unquantised(work.checkpoint)

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan of `plan_uniform`; notes which matrices do not take the format."""
        formats = uniform_formats(work.checkpoint, self.format)
        weights = work.checkpoint.weights.items()
        left = [n for n, w in weights if weight_group(w.info) in UNIFORM_GROUPS and n not in formats]
        for note in left_alone(work.checkpoint, left, f"their shape or dtype does not allow {self.format}"):
            work.note(f"warning: {note}")
        return plan_uniform(work.checkpoint, self.format, self.rounding, profile.digest if profile else None)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Return the plan without its profile, on which no format depends."""
        return plan_uniform(checkpoint, self.format, self.rounding)

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        """Return the number of weights that get the format."""
        del checkpoint
        return format_counts(plan)


def format_named(
    kind: str | None,
    bits: float | None,
    *,
    group_size: int = DEFAULT_GROUP_SIZE,
    symmetric: bool = False,
    double_quant: bool = False,
) -> str:
    """Return the name of the format of a kind, of `KINDS`, and a width.

    Without a kind 4 bits are NF4, 8 are bitsandbytes' int8, 1.58 are ternary, and all other widths are uniform
    integers. Without a width the kind's own is taken.

    Args:
        kind: kind of format.
        bits: width.
        group_size: weights that share a scale, in integers and ternary formats.
        symmetric: whether integers have ranges symmetric about 0.
        double_quant: whether scales of NF4 and FP4 are quantised too.

    Raises `UsageError` for unknown values and for combinations that no format has.
    """
    if kind is None:
        default = {4.0: "nf4", 8.0: "int8", _TERNARY_BITS: "ternary"}
        kind = default.get(bits, "int") if bits is not None else None
    if kind not in KINDS:
        problem = "⟨bits⟩ is missing: give a width, or a ⟨format⟩" if kind is None else f"⟨format⟩ {kind}: unknown"
        raise UsageError(f"{problem}; choose from {', '.join(KINDS)}")
    if group_size not in GROUP_SIZES:
        raise UsageError(f"⟨group_size⟩ {group_size}: choose from {', '.join(map(str, GROUP_SIZES))}")
    if double_quant and kind not in ("nf4", "fp4"):
        raise UsageError(f"⟨double_quant⟩: only nf4 and fp4 have it, not {kind}")
    if symmetric and kind != "int":
        raise UsageError(f"⟨symmetric⟩: only ⟨format⟩ int has it, not {kind}")
    if kind in ("nf4", "fp4", "int8") and group_size != DEFAULT_GROUP_SIZE:
        raise UsageError(f"⟨group_size⟩ {group_size}: {kind} has its own; only int and ternary have groups to choose")
    fixed = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0, "ternary": _TERNARY_BITS}.get(kind)
    if fixed is not None and bits not in (None, fixed):
        raise UsageError(f"⟨format⟩ {kind}: has {fixed:g} bits, not ⟨bits⟩ {bits:g}")
    if kind == "int" and bits not in INTEGER_BITS:
        raise UsageError(f"⟨bits⟩ {bits}: with ⟨uniform⟩ choose from {', '.join(map(str, INTEGER_BITS))}")
    if kind == "int":
        return f"int{bits:g}-g{group_size}{'-sym' if symmetric else ''}"
    return f"ternary-g{group_size}" if kind == "ternary" else f"{kind}{'-dq' if double_quant else ''}"


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of which `format_named` makes a format's name, those at their defaults left out."""
    stem, *parts = name.split("-")
    kind = "int" if stem.startswith("int") and parts else stem
    found: dict[str, Any] = {"format": kind}
    if kind == "int":
        found["bits"] = int(stem.removeprefix("int"))
    group = next((int(part[1:]) for part in parts if part.startswith("g")), DEFAULT_GROUP_SIZE)
    if group != DEFAULT_GROUP_SIZE:
        found["group_size"] = group
    found |= {setting: True for part, setting in (("sym", "symmetric"), ("dq", "double_quant")) if part in parts}
    return found


def uniform_formats(checkpoint: Checkpoint, fmt: str) -> dict[str, str]:
    """Return one format for all routed, shared and attention matrices that it suits."""
    return {
        name: fmt
        for name, weight in checkpoint.weights.items()
        if weight_group(weight.info) in UNIFORM_GROUPS and is_quantizable(weight.info, fmt)
    }


def plan_uniform(
    checkpoint: Checkpoint, fmt: str, rounding: Rounding | None = None, profile: str | None = None
) -> CompressionPlan:
    """Return the plan that stores all routed, shared and attention matrices in one format, and the rest as it is.

    `profile` is the digest of the profile that weights are rounded with. Raises `BadInputError` where weights are
    quantised already, and where none can be.
    """
    require_unquantised(checkpoint)
    formats = uniform_formats(checkpoint, fmt)
    if not formats:
        raise BadInputError(f"{checkpoint.path}: holds no fp16, bf16 or fp32 matrix that could be stored as {fmt}")
    options = {"uniform": True, "format": fmt, **(rounding_options(rounding) if rounding else {})}
    source = checkpoint.fingerprint
    return CompressionPlan("quantize", source, profile, options, (Formats(formats, rounding),))
