"""The weights that a mix of precisions covers, and the formats that each may take. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditmoe_cli.compression.plan import CompressionPlan, Formats, Rounding
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.exporting.choices import Choices
from ditmoe_cli.exporting.targets import TARGETS
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import MATRICES, split_name
from ditmoe_cli.formats.registry import format_label, is_quantizable
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import WeightGroup, weight_group

WIDTHS = ("1.58", "2", "3", "4", "5", "6", "8", "16")
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
GROUPS: tuple[WeightGroup, ...] = ("experts", "shared", "attn", "modulation", "embedders")
DEFAULT_ALLOWED = ("2", "3", "4", "5", "6", "8", "16")
DEFAULT_FLOORS: Mapping[str, float] = {"shared": 3, "attn": 3, "modulation": 4, "embedders": 4}


_WHOLE_GROUPS = TensorInfo("weight", "F16", (max(GROUP_SIZES), max(GROUP_SIZES)))

Offered = Mapping[str, tuple[str | None, ...]]
"""The formats that each weight may take, narrowest first; None leaves it as it is."""


@dataclass(frozen=True)
class Candidates:
    """The formats that a planner may choose from.

    Attributes:
        allowed: widths in bits, of `WIDTHS`; 16 leaves a weight as it is.
        group_size: weights that share a scale.
        symmetric: whether ranges are symmetric, without zero points.
        floors: fewest bits, by group of weights.
        protected: groups of weights that stay as they are.
        tied: matrices of an expert, shared or routed, that take the same format.
        target: the name of the target whose layout has to hold the result; None for none.
    """

    allowed: tuple[str, ...] = DEFAULT_ALLOWED
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = False
    floors: Mapping[str, float] = field(default_factory=lambda: DEFAULT_FLOORS)
    protected: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    target: str | None = None

    def __post_init__(self) -> None:
        for setting, values, known in (
            ("⟨allow⟩", self.allowed, WIDTHS),
            ("⟨floor⟩", tuple(self.floors), GROUPS),
            ("⟨protect⟩", self.protected, GROUPS),
            ("⟨tie⟩", self.tied, tuple(matrix.removesuffix("_proj") for matrix in MATRICES)),
            ("⟨group_size⟩", (self.group_size,), GROUP_SIZES),
            ("⟨target⟩", () if self.target is None else (self.target,), tuple(TARGETS)),
        ):
            unknown = next((value for value in values if value not in known), None)
            if unknown is not None:
                raise UsageError(f"{setting} {unknown}: choose from {', '.join(map(str, known))}")
        if all(width == "16" for width in self.allowed):
            raise UsageError(f"⟨allow⟩ {','.join(self.allowed)}: leaves every weight as it is; allow a narrower width")
        if self.symmetric and all(width in ("1.58", "16") for width in self.allowed):
            raise UsageError(f"⟨symmetric⟩ has no effect with ⟨allow⟩ {','.join(self.allowed)}, without integers")
        if self.tied and len(set(self.tied)) == 1:
            raise UsageError(f"⟨tie⟩ {self.tied[0]}: name at least two matrices, as gate,up")
        idle = [] if self.allowed == DEFAULT_ALLOWED else [width for width in self.allowed if not self._hold(width)]
        if idle:
            raise UsageError(f"⟨allow⟩ {idle[0]} has no effect with ⟨target⟩ {self.target}, which holds no such format")

    def _hold(self, width: str) -> bool:
        """Return whether the target's layout holds a matrix of whole groups at a width."""
        formats = self.formats_of(width)
        return any(fmt is None or self.choices.hold(_WHOLE_GROUPS, fmt) for fmt in formats)

    def options(self) -> dict[str, Any]:
        """Return what differs from the defaults, by the names of the options, for the options of a plan."""
        plain = Candidates()
        given: dict[str, Any] = {"allow": ",".join(self.allowed)} if self.allowed != plain.allowed else {}
        floors = [f"{group}={bits:g}" for group, bits in self.floors.items() if plain.floors.get(group) != bits]
        lists = {"floor": floors, "protect": ",".join(self.protected), "tie": ",".join(self.tied)}
        given |= {name: value for name, value in lists.items() if value}
        if self.group_size != plain.group_size:
            given["group_size"] = self.group_size
        if self.target is not None:
            given["target"] = self.target
        return {**given, "symmetric": True} if self.symmetric else given

    def labels(self) -> tuple[str | bool, ...]:
        """Return the parts of a file's name for what differs from the defaults."""
        plain = Candidates()
        floors = [f"{group}{bits:g}" for group, bits in self.floors.items() if plain.floors.get(group) != bits]
        return (
            self.group_size != plain.group_size and f"g{self.group_size}",
            self.symmetric and "sym",
            self.allowed != plain.allowed and f"allow{','.join(self.allowed)}",
            bool(floors) and f"floor{','.join(floors)}",
            bool(self.protected) and f"protect{','.join(self.protected)}",
            bool(self.tied) and f"tie{','.join(self.tied)}",
            self.target is not None and self.target,
        )

    @property
    def choices(self) -> Choices:
        """What the target's layout holds."""
        return Choices() if self.target is None else TARGETS[self.target].choices

    def take(self, info: TensorInfo, fmt: str) -> bool:
        """Return whether a weight may be stored in a format: by its shape, and by the target's layout."""
        return is_quantizable(info, fmt) and self.choices.hold(info, fmt)

    def formats_of(self, width: str) -> tuple[str | None, ...]:
        """Return the formats of a width, narrowest first; None for 16, which leaves a weight as it is."""
        widths = self.choices.widths
        return (self.format_of(width),) if widths is None or width == "16" else widths.get(width, ())

    def format_of(self, width: str) -> str | None:
        """Return the format of a width; None for 16, which leaves a weight as it is."""
        if width == "16":
            return None
        stem = "ternary" if width == "1.58" else f"int{width}"
        suffix = "-sym" if self.symmetric and width != "1.58" else ""
        return f"{stem}-g{self.group_size}{suffix}"


def candidate_formats(checkpoint: Checkpoint, candidates: Candidates) -> dict[str, tuple[str | None, ...]]:
    """Return the formats that each planned weight may take, narrowest first; None leaves it as it is.

    Raises `BadInputError` where weights are quantised already, and `UsageError` where no format remains for a group.
    """
    require_unquantised(checkpoint)
    offered: dict[str, tuple[str | None, ...]] = {}
    for name, weight in checkpoint.weights.items():
        group = weight_group(weight.info)
        if group is None or group in candidates.protected or weight.info.dtype not in FLOATING:
            continue
        floor = candidates.floors.get(group, 0)
        widths = [width for width in WIDTHS if width in candidates.allowed and float(width) >= floor]
        if not widths:
            raise UsageError(
                f"⟨allow⟩ {','.join(candidates.allowed)} and ⟨floor⟩ {group}={floor:g} leave nothing; allow a wider "
                f"one, or ⟨protect⟩ {group}"
            )
        formats = (fmt for width in widths for fmt in candidates.formats_of(width))
        offered[name] = tuple(fmt for fmt in formats if fmt is None or candidates.take(weight.info, fmt))
    if candidates.protected and not offered:
        raise UsageError(f"⟨protect⟩ {','.join(candidates.protected)}: leaves nothing to quantise")
    if not any(any(formats) for formats in offered.values()):
        raise BadInputError(f"{checkpoint.path}: holds no fp16, bf16 or fp32 matrix that could be quantised")
    return {name: formats or (None,) for name, formats in offered.items()}


def idle_settings(checkpoint: Checkpoint, candidates: Candidates, offered: Offered) -> list[str]:
    """Return a note for each setting that changes nothing for a checkpoint: widths that no weight may take, and groups.

    `offered` are the formats that each weight may take, of `candidate_formats`.
    """
    possible = {fmt for formats in offered.values() for fmt in formats}
    present = {weight_group(weight.info) for weight in checkpoint.weights.values()}
    floors = [group for group, bits in candidates.floors.items() if DEFAULT_FLOORS.get(group) != bits]
    notes = [
        f"⟨{setting}⟩ {group} has no effect: {checkpoint.name} has no such weights"
        for setting, groups in (("floor", floors), ("protect", candidates.protected))
        for group in groups
        if group not in present
    ]
    if candidates.allowed == DEFAULT_ALLOWED:
        return notes
    idle = [
        width
        for width in candidates.allowed
        if width != "16" and not possible.intersection(candidates.formats_of(width))
    ]
    return [
        *notes,
        *(f"⟨allow⟩ {width} has no effect: no weight may take it, by its shape or ⟨floor⟩" for width in idle),
    ]


def left_alone(checkpoint: Checkpoint, names: Sequence[str], why: str) -> list[str]:
    """Return a note for each group of weights among `names` that stay as they are, with their share of the bytes."""
    notes = []
    for group in GROUPS:
        whole = [w.info for w in checkpoint.weights.values() if weight_group(w.info) == group]
        left = [info for info in whole if info.name in names]
        if left:
            share = sum(info.nbytes for info in left) / checkpoint.header.file_bytes
            notes.append(
                f"{len(left)} of {len(whole)} matrices of {group} stay as they are, {share:.1%} of the bytes: {why} "
                f"(the first is {left[0].name!r}, {list(left[0].shape)})"
            )
    return notes


def require_unquantised(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` where a weight is packed already, or an expert stored as a difference."""
    packed = next((w for w in checkpoint.weights.values() if weight_group(w.info) and w.format is not None), None)
    if packed is not None:
        raise BadInputError(
            f"{checkpoint.path}: {packed.info.name!r} is {packed.format} already; quantise the checkpoint that it "
            "came from, or make its weights plain by convert ⟨dequantize⟩"
        )


def ties(names: Sequence[str], tied: Sequence[str]) -> dict[str, str]:
    """Return, for each weight, the name of its decision, which tied weights share."""
    decisions = {}
    for name in names:
        parts = split_name(name)
        matrix = name.removesuffix("_proj.weight").rpartition(".")[2]
        is_tied = matrix in tied and (parts.expert is not None or ".shared_experts." in name)
        decisions[name] = name.replace(f".{matrix}_proj.", f".{'+'.join(tied)}.") if is_tied else name
    return decisions


def rounding_options(rounding: Rounding | None) -> dict[str, Any]:
    """Return how weights are rounded, by the names of the options; defaults of GPTQ are left out."""
    if rounding is None:
        return {"rounding": "nearest"}
    tokens = {"tokens": rounding.tokens} if rounding.tokens else {}
    smooth = {"smooth": rounding.smoothing} if rounding.smoothing else {}
    return {"rounding": rounding.method, **tokens, **smooth}


def format_counts(plan: CompressionPlan) -> dict[str, Any]:
    """Return the number of weights that get a format, in all and by format, for a command's result."""
    formats = plan.stage(Formats).formats
    counts = Counter(map(format_label, formats.values()))
    return {"weights": len(formats), "formats": dict(sorted(counts.items()))}
