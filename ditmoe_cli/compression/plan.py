"""Compression plans: everything that is to be done to a checkpoint, as data.

A plan can be printed, compared, edited and applied later. It names its checkpoint by fingerprint and, where its
choice rests on one, its profile by digest. It lists stages, each of its own type: `Experts`, `Differences`,
`Formats`, `Retraining`.
Making, reading and checking plans needs neither torch nor numpy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ditmoe_cli.briefs import Brief, Fact, in_runs_of, shortened, span
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import canonical_json, digest
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.provenance import STAGE_SCHEMA, check_schema
from ditmoe_cli.formats.differences import DeltaFormat
from ditmoe_cli.formats.registry import Format, parse_format

PLAN_SCHEMA = "ditmoe.plan/1"
_JSON_WORDS: Mapping[type, str] = {str: "string", list: "list", dict: "JSON object"}
MOST_TOKENS = 2**24
"""The most calibration tokens to fit or round on: all of them are in memory at once, 4 bytes for each channel."""
RouterMode = Literal["slice", "ghost", "mass"]
Ordering = Literal["camera"]
Selection = Literal["elimination"]


@dataclass(frozen=True)
class BlockPlan:
    """The future of one block's experts.

    Attributes:
        keep: the physical experts that stay, ascending; they are renumbered from 0.
        router: the future of the other experts' rows: ``slice`` deletes them; ``ghost`` keeps them in the softmax but
            never selects them; ``mass`` does so, and rescales the selected routing weights to the sum that the top-k
            of all rows would have.
        merged: pairs (expert, kept expert that it is merged into). Rows of merged experts select the kept expert,
            unless they are sliced.
        widths: how many neurons each kept expert keeps; empty where all keep all.
        shared_width: how many neurons the shared expert keeps; None for all.
        constants: whether rows of dropped experts select a constant.
        rank: of a linear map beside each constant; 0 for none.
    """

    keep: tuple[int, ...]
    router: RouterMode
    merged: tuple[tuple[int, int], ...] = ()
    widths: tuple[int, ...] = ()
    shared_width: int | None = None
    constants: bool = False
    rank: int = 0

    @property
    def computes(self) -> bool:
        """Whether weights are computed, not only copied."""
        return bool(self.merged or self.widths or self.shared_width or self.constants)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, fields at their defaults left out."""
        document: dict[str, Any] = {"keep": list(self.keep), "router": self.router}
        if self.merged:
            document["merged"] = [list(pair) for pair in self.merged]
        if self.widths:
            document["widths"] = list(self.widths)
        document |= {name: getattr(self, name) for name in _BLOCK_DEFAULTS if getattr(self, name)}
        return document


_BLOCK_DEFAULTS = ("shared_width", "constants", "rank")


@dataclass(frozen=True)
class Repair:
    """The refitting of kept weights, block after block, to the original mixture's output.

    Attributes:
        scale: fit only a factor for each kept expert's output.
        shared: solve the shared expert's down projection too, beside those of the experts.
        constant: fit a constant to the routing mass that selected rows do not carry.
        linear: fit a linear map to that mass too.
        tokens: number of tokens to fit on; 0 for a number that suits the size of the system.
    """

    scale: bool = False
    shared: bool = True
    constant: bool = True
    linear: bool = True
    tokens: int = 0


def repair_options(repair: Repair | None) -> dict[str, Any]:
    """Return how weights are refitted, by the names of the options, for those of a plan; defaults are left out."""
    if repair is None:
        return {"no_refit": True}
    scale = {"scale": True} if repair.scale else {}
    return {**scale, **({"refit_tokens": repair.tokens} if repair.tokens else {})}


@dataclass(frozen=True)
class Rounding:
    """The rounding of weights to their formats: by GPTQ, on calibration states that ran through the blocks before.

    Attributes:
        method: ``gptq``.
        tokens: number of tokens to fit on; 0 for a number that suits the widths.
        smoothing: if above 0, a mixture's input channels are scaled first, by that power of their largest input.
    """

    method: Literal["gptq"] = "gptq"
    tokens: int = 0
    smoothing: float = 0.0


@dataclass(frozen=True)
class Experts:
    """The stage that drops, merges, narrows or refits experts.

    Attributes:
        blocks: one entry per block.
        merging: the method by which experts are merged, where some are.
        repair: refitting of the weights afterwards; None for none.
        selection: which neurons of narrowed experts stay: those of highest energy where it is None, and with
            ``elimination`` those whose loss costs most (`compression.replay.eliminations`).
    """

    blocks: tuple[BlockPlan, ...] = ()
    merging: str | None = None
    repair: Repair | None = None
    selection: Selection | None = None

    @property
    def computes(self) -> bool:
        """Whether weights are computed from calibration data."""
        return bool(self.blocks) and (self.repair is not None or any(block.computes for block in self.blocks))

    def fields(self) -> dict[str, Any]:
        """Return the stage's fields of the plan's JSON."""
        blocks = [block.to_json() for block in self.blocks]
        selection = {"selection": self.selection} if self.selection else {}
        repair = asdict(self.repair) if self.repair else None
        return {"blocks": blocks, "merging": self.merging, "repair": repair, **selection}


@dataclass(frozen=True)
class Differences:
    """The stage that stores every block's experts as one base and each expert's difference from it.

    Attributes:
        kind: ``svd`` (two factors) or ``ternary`` (codes -1, 0, 1 and a scale).
        ratio: of ``svd``, the weights of the two factors over those of a matrix; of ``ternary``, the share of entries
            that are not 0.
    """

    kind: DeltaFormat
    ratio: float

    @property
    def computes(self) -> bool:
        """Whether weights are computed from calibration data: always."""
        return True

    def fields(self) -> dict[str, Any]:
        """Return the stage's fields of the plan's JSON."""
        return {"delta": asdict(self)}


@dataclass(frozen=True)
class Formats:
    """The stage that quantises weights.

    Attributes:
        formats: the quantised format of each weight that gets one, by the weight's name in the plan's checkpoint.
        rounding: how weights are rounded to them; None for the nearest values.
        ordering: how neurons of experts whose matrices are cut into pieces are put in order first: ``camera``, by
            falling energy; None where they keep their order.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    rounding: Rounding | None = None
    ordering: Ordering | None = None

    @property
    def computes(self) -> bool:
        """Whether weights are computed from calibration data."""
        return self.rounding is not None or self.ordering is not None

    def fields(self) -> dict[str, Any]:
        """Return the stage's fields of the plan's JSON."""
        rounding = asdict(self.rounding) if self.rounding else None
        return {"formats": dict(sorted(self.formats.items())), "rounding": rounding, "ordering": self.ordering}


@dataclass(frozen=True)
class Retraining:
    """The stage that trains what all others made to predict as the plan's checkpoint does.

    Attributes:
        minutes: how long; None where `steps` say so.
        steps: of training.
        seed: of noise and orders.
        student_steps: of sampling, which it is distilled to; None where it is healed.
    """

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    student_steps: int | None = None

    @property
    def computes(self) -> bool:
        """Whether weights are computed from calibration data: always."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the stage as JSON; without `student_steps` where it is healed."""
        return {name: value for name, value in asdict(self).items() if name != "student_steps" or value is not None}

    def fields(self) -> dict[str, Any]:
        """Return the stage's fields of the plan's JSON."""
        return {"retraining": self.to_json()}


PlanStage = Experts | Differences | Formats | Retraining
S = TypeVar("S", Experts, Differences, Formats, Retraining)
T = TypeVar("T")
_ORDER = (Experts, Differences, Formats, Retraining)
_NO_STAGES: Mapping[str, Any] = {  # the JSON fields of all stages, in the order in which they are written
    "blocks": [],
    "formats": {},
    "merging": None,
    "repair": None,
    "delta": None,
    "rounding": None,
    "ordering": None,
}
_SIGNS = ("request", "digest")  # fields by which planners sign
FIGURES = (
    *("predicted_error", "untied_error", "free_error", "tried_error", "free_tried_error"),
    *("damage", "next_smaller", "bound", "gap", "solver"),
)
"""Entries of a plan's options that nobody gave: figures of the choice itself."""
UNDECIDED = "undecided"
"""The entry in the options of a plan that stands for its size only."""


@dataclass(frozen=True, repr=False)
class CompressionPlan(Brief):
    """A command's whole decision.

    Attributes:
        command: the command that planned, such as ``prune``.
        source: fingerprint of the checkpoint that the plan is for.
        profile: digest of the profile that the choice rests on, if any.
        options: the options that led here, for the reader, and `FIGURES`.
        calibration: settings of that profile's calibration, which the result's history keeps.
        stages: the changes, in order. JSON of this schema has a place for one stage of each type, in the order
            `Experts`, `Differences`, `Formats`, `Retraining`; others raise `ValueError`.
        request: digest of what a planner was asked for, which the result's history keeps.
        written: the digest in the file that the plan was read from, by which planners sign; None where it has none.
        by_hand: whether it comes from a plan file that no planner signed.
    """

    command: str
    source: str
    profile: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[PlanStage, ...] = ()
    calibration: Mapping[str, Any] | None = field(default=None, kw_only=True)
    written: str | None = field(default=None, compare=False)
    request: str | None = field(default=None, compare=False, kw_only=True)
    by_hand: bool = field(default=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        places = [_ORDER.index(type(stage)) for stage in self.stages]
        if places != sorted(set(places)):
            raise ValueError(
                f"{PLAN_SCHEMA} holds experts, differences, formats and retraining, once each, in this order"
            )

    @property
    def computes(self) -> bool:
        """Whether weights are computed from calibration data, which takes the profile."""
        return any(stage.computes for stage in self.stages)

    @property
    def decided(self) -> bool:
        """Whether the plan chooses experts; an undecided one stands for its size only."""
        return UNDECIDED not in self.options

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON, that of `to_json`."""
        return digest(self.to_json())

    @property
    def edited(self) -> bool:
        """Whether the plan was changed after a planner had written it."""
        return self.written is not None and self.written != self.digest

    @property
    def together(self) -> tuple[Experts, Formats] | None:
        """The stages that are carried out together, block after block: experts that change, and formats by GPTQ."""
        experts = next((stage for stage in self.stages if isinstance(stage, Experts) and stage.blocks), None)
        formats = next((stage for stage in self.stages if isinstance(stage, Formats) and stage.rounding), None)
        return None if experts is None or formats is None else (experts, formats)

    @property
    def retraining(self) -> Retraining | None:
        """The stage that trains weights; None where there is none."""
        return next((stage for stage in self.stages if isinstance(stage, Retraining)), None)

    @cached_property
    def work_digest(self) -> str:
        """SHA-256 of the stages alone, but for training: of all that decides which weights are computed before it."""
        fields = dict(_NO_STAGES)
        for stage in self.stages:
            fields |= {} if isinstance(stage, Retraining) else stage.fields()
        return digest(fields)

    def stage(self, kind: type[S]) -> S:
        """Return the stage of a type. Raises `LookupError` where the plan has none."""
        for stage in self.stages:
            if isinstance(stage, kind):
                return stage
        raise LookupError(f"the plan of {self.command} has no stage {kind.__name__}")

    def _brief(self) -> list[Fact]:
        options = {name: value for name, value in self.options.items() if name not in FIGURES}
        figures = {name: value for name, value in self.options.items() if name in FIGURES and isinstance(value, float)}
        return [
            ("", self.command),
            *options.items(),
            *(fact for stage in self.stages for fact in _stage_facts(stage)),
            *((name.replace("_", " "), shortened(value)) for name, value in figures.items()),
            ("digest", self.digest[:12]),
            ("for checkpoint", self.source[:12]),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, the fields of all stages side by side."""
        fields = dict(_NO_STAGES)
        for stage in self.stages:
            fields |= stage.fields()
        return {
            "schema": PLAN_SCHEMA,
            "command": self.command,
            "source": self.source,
            "profile": self.profile,
            **({} if self.calibration is None else {"calibration": dict(self.calibration)}),
            "options": dict(self.options),
            **fields,
        }

    def document(self) -> dict[str, Any]:
        """Return the plan as it is written: its JSON, its request, and the digest that it had when it was planned."""
        request = {} if self.request is None else {"request": self.request}
        return {**self.to_json(), **request, "digest": self.written or self.digest}


def _stage_facts(stage: PlanStage) -> list[Fact]:
    """Return what a stage does, in brief."""
    match stage:
        case Experts():
            widths = [width for block in stage.blocks for width in block.widths]
            narrowed = [("widths", span(widths))] if widths else []
            return [("keeps experts", in_runs_of(len(block.keep) for block in stage.blocks)), *narrowed]
        case Differences():
            return [("differences", f"{stage.kind} {stage.ratio:g}")]
        case Formats():
            counts = Counter(stage.formats.values())
            told = ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))
            return [("formats", told)] if told else []
        case Retraining():
            return [("training", f"{stage.minutes:g} min" if stage.minutes is not None else f"{stage.steps} steps")]


def parse_plan(document: object, where: str) -> CompressionPlan:
    """Read a plan from JSON. Raises `BadInputError` that names `where` and the field."""
    fields = check_schema(document, PLAN_SCHEMA, where)
    unknown = sorted(
        set(fields)
        - {
            "schema",
            "command",
            "source",
            "profile",
            "options",
            "calibration",
            "selection",
            "retraining",
            *_SIGNS,
            *_NO_STAGES,
        }
    )
    if unknown:
        raise BadInputError(f"{where}: unknown field {unknown[0]!r}")
    blocks = _field(fields, "blocks", list, where)
    formats = _field(fields, "formats", dict, where)
    command = _field(fields, "command", str, where)
    if not re.fullmatch(r"[a-z-]+", command):  # it becomes part of the output's default name
        raise BadInputError(f"{where}: field 'command' is {command!r}; expected the name of a command")
    source = _field(fields, "source", str, where)
    profile = None if fields.get("profile", "") is None else _field(fields, "profile", str, where)
    options = _field(fields, "options", dict, where)
    experts = Experts(
        blocks=tuple(_parse_block(block, f"{where}: block {i}") for i, block in enumerate(blocks)),
        merging=_field(fields, "merging", str, where) if fields.get("merging") is not None else None,
        repair=_parsed(fields, "repair", _parse_repair, where),
        selection=_one_of(fields.get("selection"), (None, *get_args(Selection)), f"{where}: field 'selection'"),
    )
    quantised = Formats(
        formats={name: parse_format(fmt, f"{where}: format of {name}").name for name, fmt in formats.items()},
        rounding=_parsed(fields, "rounding", _parse_rounding, where),
        ordering=_one_of(fields.get("ordering"), (None, *get_args(Ordering)), f"{where}: field 'ordering'"),
    )
    differences = _parsed(fields, "delta", _parse_differences, where)
    stages = (experts, differences, quantised, _parsed(fields, "retraining", _parse_retraining, where))
    calibration = None if fields.get("calibration") is None else _field(fields, "calibration", dict, where)
    present = tuple(stage for stage in stages if stage not in (None, Experts(), Formats()))
    written = _field(fields, "digest", str, where) if fields.get("digest") is not None else None
    request = _field(fields, "request", str, where) if fields.get("request") is not None else None
    request = request if written is not None else None  # nobody signed it
    signs: dict[str, Any] = {"written": written, "request": request}
    plan = CompressionPlan(command, source, profile, options, present, calibration=calibration, **signs)
    try:
        canonical_json(plan.to_json())
    except ValueError as error:  # NaN and infinity, which Python reads but JSON does not know
        raise BadInputError(f"{where}: field 'options' or 'calibration' is not JSON ({error})") from None
    return plan


def _field(fields: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return a field that must be there and be a `kind`."""
    if name not in fields:
        raise BadInputError(f"{where}: field {name!r} is missing")
    if not isinstance(fields[name], kind):
        raise BadInputError(f"{where}: field {name!r} is {fields[name]!r}; expected a {_JSON_WORDS[kind]}")
    return fields[name]


def _parsed(fields: Mapping[str, Any], name: str, parse: Callable[[object, str], T], where: str) -> T | None:
    """Return a field that may be absent or null, parsed."""
    return None if fields.get(name) is None else parse(fields[name], where)


def _parse_block(block: object, where: str) -> BlockPlan:
    if not isinstance(block, dict):
        raise BadInputError(f"{where} is {block!r}; expected an object with keep and router")
    keep = _field(block, "keep", list, where)
    if not all(type(e) is int and e >= 0 for e in keep) or keep != sorted(set(keep)) or not keep:
        raise BadInputError(f"{where}: field 'keep' is {keep}; expected ascending expert numbers")
    router = _one_of(_field(block, "router", str, where), get_args(RouterMode), f"{where}: field 'router'")
    unknown = sorted(set(block) - {"keep", "router", "merged", "widths", *_BLOCK_DEFAULTS})
    if unknown:
        raise BadInputError(f"{where}: unknown field {unknown[0]!r}")
    merged = _whole_numbers(block.get("merged", []), 2, f"{where}: field 'merged'")
    leads = {lead for _, lead in merged}
    if not leads <= set(keep) or len({e for e, _ in merged} | set(keep)) != len(merged) + len(keep):
        raise BadInputError(
            f"{where}: field 'merged' is {block['merged']}; expected pairs (dropped expert, kept expert)"
        )
    listed = [[width] for width in _listed(block, "widths", where)]
    widths = tuple(width for (width,) in _whole_numbers(listed, 1, f"{where}: field 'widths'"))
    if widths and (len(widths) != len(keep) or min(widths) < 1):
        raise BadInputError(
            f"{where}: field 'widths' is {list(widths)}; expected one of at least 1 for each kept expert"
        )
    return BlockPlan(
        keep=tuple(keep),
        router=router,
        merged=merged,
        widths=widths,
        shared_width=_optional(block, "shared_width", None, int, where),
        constants=_optional(block, "constants", False, bool, where),
        rank=_optional(block, "rank", 0, int, where),
    )


def _optional(block: Mapping[str, Any], name: str, default: Any, kind: type, where: str) -> Any:
    """Return a field that may be absent: a number of at least 0, or a truth value."""
    if name not in block:
        return default
    value = block[name]
    fits = type(value) is kind
    if not fits or value < 0:
        wanted = "true or false" if kind is bool else "a whole number"
        raise BadInputError(f"{where}: field {name!r} is {value!r}; expected {wanted}")
    return value


def _listed(block: Mapping[str, Any], name: str, where: str) -> list[Any]:
    values = block.get(name, [])
    if not isinstance(values, list):
        raise BadInputError(f"{where}: field {name!r} is {values!r}; expected a list")
    return values


def _whole_numbers(values: object, length: int, what: str) -> tuple[Any, ...]:
    """Return lists of `length` whole numbers of at least 0 as tuples."""
    good = isinstance(values, list) and all(
        isinstance(entry, list) and len(entry) == length and all(type(n) is int and n >= 0 for n in entry)
        for entry in values
    )
    if not good:
        raise BadInputError(f"{what} is {values!r}; expected lists of {length} whole numbers")
    assert isinstance(values, list)
    return tuple(tuple(entry) for entry in values)


def _parse_repair(value: object, where: str) -> Repair:
    expected: dict[str, Any] = asdict(Repair())
    if not isinstance(value, dict) or value.keys() != expected.keys():
        raise BadInputError(f"{where}: field 'repair' is {value!r}; expected null or {', '.join(expected)}")
    for name, default in expected.items():
        if type(value[name]) is not type(default) or value[name] < 0:
            raise BadInputError(f"{where}: field 'repair' has {name} {value[name]!r}; expected as {default!r}")
    _check_tokens(value["tokens"], f"{where}: field 'repair'")
    return Repair(**value)


def _parse_differences(value: object, where: str) -> Differences:
    if not isinstance(value, dict) or value.keys() != {"kind", "ratio"}:
        raise BadInputError(f"{where}: field 'delta' is {value!r}; expected null or kind and ratio")
    kind = _one_of(value["kind"], get_args(DeltaFormat), f"{where}: kind of field 'delta'")
    ratio = value["ratio"]
    if type(ratio) not in (int, float) or not 0 < ratio <= 1:
        raise BadInputError(f"{where}: ratio of field 'delta' is {ratio!r}; expected a number above 0 and at most 1")
    return Differences(kind, float(ratio))


def _parse_retraining(value: object, where: str) -> Retraining:
    if not isinstance(value, dict) or value.keys() - {"student_steps"} != {"minutes", "steps", "seed"}:
        raise BadInputError(f"{where}: field 'retraining' is {value!r}; expected null or minutes, steps and seed")
    minutes, steps, seed, few = value["minutes"], value["steps"], value["seed"], value.get("student_steps")
    timed = type(minutes) in (int, float) and 0 < minutes < math.inf and steps is None
    counted = type(steps) is int and steps > 0 and minutes is None
    if few is not None and (type(few) is not int or few < 1):
        raise BadInputError(f"{where}: student_steps of field 'retraining' is {few!r}; expected null or at least 1")
    if not (timed or counted) or type(seed) is not int:
        raise BadInputError(f"{where}: field 'retraining' is {value!r}; expected minutes or steps above 0, and a seed")
    return Retraining(None if minutes is None else float(minutes), steps, seed, few)


def _parse_rounding(value: object, where: str) -> Rounding:
    if not isinstance(value, dict) or value.keys() != {"method", "tokens", "smoothing"}:
        raise BadInputError(f"{where}: field 'rounding' is {value!r}; expected null or method, tokens and smoothing")
    method = _one_of(value["method"], ("gptq",), f"{where}: method of field 'rounding'")
    tokens, smoothing = value["tokens"], value["smoothing"]
    if type(tokens) is not int or tokens < 0:
        raise BadInputError(f"{where}: tokens of field 'rounding' are {tokens!r}; expected a whole number")
    _check_tokens(tokens, f"{where}: field 'rounding'")
    if type(smoothing) not in (int, float) or not 0 <= smoothing <= 1:
        raise BadInputError(f"{where}: smoothing of field 'rounding' is {smoothing!r}; expected a number from 0 to 1")
    return Rounding(method, tokens, float(smoothing))


def _check_tokens(tokens: int, what: str) -> None:
    if tokens > MOST_TOKENS:
        raise BadInputError(f"{what} has {tokens} tokens; expected at most {MOST_TOKENS}, since all are in memory")


def _one_of(value: object, choices: tuple[Any, ...], what: str) -> Any:
    if value not in choices:
        named = ("null" if choice is None else choice for choice in choices)
        raise BadInputError(f"{what} is {value!r}; expected one of {', '.join(named)}")
    return value


def read_plan(path: Path) -> CompressionPlan:
    """Read a plan file: a plan, or the envelope of a planner's dry run."""
    try:
        document = read_json(path, names=True)
    except FileNotFoundError:
        raise BadInputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise BadInputError(f"{path}: not a plan (it is no text)") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: not a plan ({error})") from None
    if isinstance(document, dict) and document.get("schema") == STAGE_SCHEMA:
        result = document.get("result")
        document = result.get("plan") if isinstance(result, dict) else None
        if isinstance(result, dict) and result.get("dry_run") and document is None:
            raise BadInputError(f"{path}: the dry run left the plan open; plan again with a ⟨profile⟩")
        if isinstance(result, dict) and document is None and isinstance(result.get("points"), list):
            raise BadInputError(
                f"{path}: a curve with {len(result['points'])} plans; give one of them, result.points[i].plan"
            )
    plan = parse_plan(document, str(path))
    return replace(plan, by_hand=plan.written is None)
