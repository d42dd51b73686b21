"""Compression plans: what is to be done to a checkpoint, as data.

A plan can be printed, compared, edited and applied later. It names its checkpoint by fingerprint and, where its
choice rests on one, its profile by digest. Making, reading and checking plans needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.provenance import STAGE_SCHEMA, canonical_json, check_schema, digest
from ditmoe_cli.formats.weights import DeltaFormat, Format, checked_format

PLAN_SCHEMA = "ditmoe.plan/1"
_JSON_WORDS: Mapping[type, str] = {str: "string", list: "list", dict: "JSON object"}
RouterMode = Literal["slice", "ghost", "mass"]
Ordering = Literal["camera"]


@dataclass(frozen=True)
class BlockPlan:
    """What happens to one block's experts.

    `keep` lists the physical experts that stay, ascending; they are renumbered from 0. `router` says what becomes
    of the rows of the others: ``slice`` deletes them; ``ghost`` keeps them in the softmax but never selects them;
    ``mass`` does so, and rescales what is selected to the sum that the top-k of all rows would have. `merged` are
    pairs (expert, kept expert that it is merged into); rows of merged experts select what they went into, unless they
    are sliced. `widths` are the neurons that each kept expert keeps, none given: all; `shared_width` likewise.
    `constants` tells that a dropped expert's row selects a constant in its place, with a linear map of `rank` if above
    0.
    """

    keep: tuple[int, ...]
    router: RouterMode
    merged: tuple[tuple[int, int], ...] = ()
    widths: tuple[int, ...] = ()
    shared_width: int | None = None
    constants: bool = False
    rank: int = 0

    @property
    def rebuilds(self) -> bool:
        """Whether weights are computed, not only copied."""
        return bool(self.merged or self.widths or self.shared_width or self.constants)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON, without what is left at its default."""
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
    """How what stays is fitted to what went, block after block.

    Down projections of the routed experts are solved anew; with `shared` the shared expert's too; with `constant` and
    `linear` the routing mass that selected rows do not carry is given a constant and a linear map. With `scale` nothing
    but a factor for each kept expert is fitted. `tokens` to fit on, 0 for a number that suits the size of the system.
    """

    scale: bool = False
    shared: bool = True
    constant: bool = True
    linear: bool = True
    tokens: int = 0


@dataclass(frozen=True)
class Delta:
    """How every block's experts are stored as one base and what each differs from it by.

    `ratio` is, of ``svd``, the weights of the two factors over those of a matrix; of ``ternary`` the share of entries
    that are not 0.
    """

    kind: DeltaFormat
    ratio: float


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded to their formats: ``gptq`` on what calibration states make of the blocks below.

    `tokens` to fit on, 0 for a number that suits the widths. With `smoothing` above 0 the channels that enter a mixture
    are scaled first, by that power of their largest input.
    """

    method: Literal["gptq"] = "gptq"
    tokens: int = 0
    smoothing: float = 0.0


@dataclass(frozen=True)
class CompressionPlan:
    """A command's whole decision.

    Attributes:
        command: the command that planned, such as ``prune``.
        source: fingerprint of the checkpoint that the plan is for.
        profile: digest of the profile that the choice rests on, if any.
        options: the options that led here, for the reader.
        blocks: one entry per block, or none where experts stay as they are.
        formats: quantised format of each weight that gets one.
        ordering: how neurons of experts whose matrices are cut into pieces are put in order first: ``camera``, by
            falling energy; None as they stand.
        merging: the method by which experts are merged, where some are.
        repair: how weights are refitted after; None where they are not.
        delta: how experts are stored as differences, all of which then stay; None where they are stored whole.
        rounding: how weights are rounded to `formats`; None for the nearest values.
    """

    command: str
    source: str
    profile: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[BlockPlan, ...] = ()
    formats: Mapping[str, Format] = field(default_factory=dict)
    merging: str | None = None
    repair: Repair | None = None
    delta: Delta | None = None
    rounding: Rounding | None = None
    ordering: Ordering | None = None

    @property
    def rebuilds(self) -> bool:
        """Whether weights are computed from calibration data, which takes the profile."""
        rebuilt = self.repair is not None or any(block.rebuilds for block in self.blocks)
        whole = (self.delta, self.rounding, self.ordering)
        return any(each is not None for each in whole) or (bool(self.blocks) and rebuilt)

    @property
    def decided(self) -> bool:
        """Whether the plan chooses experts; an undecided one stands for its size only."""
        return "undecided" not in self.options

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's canonical JSON."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "schema": PLAN_SCHEMA,
            "command": self.command,
            "source": self.source,
            "profile": self.profile,
            "options": dict(self.options),
            "blocks": [block.to_json() for block in self.blocks],
            "formats": dict(sorted(self.formats.items())),
            "merging": self.merging,
            "repair": asdict(self.repair) if self.repair else None,
            "delta": asdict(self.delta) if self.delta else None,
            "rounding": asdict(self.rounding) if self.rounding else None,
            "ordering": self.ordering,
        }


def parse_plan(document: object, where: str) -> CompressionPlan:
    """Read a plan from JSON. Raises `BadInputError` that names `where` and the field."""
    fields = check_schema(document, PLAN_SCHEMA, where)
    blocks = _field(fields, "blocks", list, where)
    formats = _field(fields, "formats", dict, where)
    command = _field(fields, "command", str, where)
    if not re.fullmatch(r"[a-z-]+", command):  # it becomes part of the output's default name
        raise BadInputError(f"{where}: field 'command' is {command!r}; expected the name of a command")
    plan = CompressionPlan(
        command=command,
        source=_field(fields, "source", str, where),
        profile=None if fields.get("profile", "") is None else _field(fields, "profile", str, where),
        options=_field(fields, "options", dict, where),
        blocks=tuple(_parse_block(block, f"{where}: block {i}") for i, block in enumerate(blocks)),
        formats={name: checked_format(fmt, f"{where}: format of {name}") for name, fmt in formats.items()},
        merging=_field(fields, "merging", str, where) if fields.get("merging") is not None else None,
        repair=_parse_repair(fields["repair"], where) if fields.get("repair") is not None else None,
        delta=_parse_delta(fields["delta"], where) if fields.get("delta") is not None else None,
        rounding=_parse_rounding(fields["rounding"], where) if fields.get("rounding") is not None else None,
        ordering=_one_of(fields.get("ordering"), (None, *get_args(Ordering)), f"{where}: field 'ordering'"),
    )
    try:
        canonical_json(plan.to_json())
    except ValueError as error:  # NaN and infinity, which Python reads but JSON does not know
        raise BadInputError(f"{where}: field 'options' is not JSON ({error})") from None
    return plan


def _field(fields: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Return a field that must be there and be a `kind`."""
    if name not in fields:
        raise BadInputError(f"{where}: field {name!r} is missing")
    if not isinstance(fields[name], kind):
        raise BadInputError(f"{where}: field {name!r} is {fields[name]!r}; expected a {_JSON_WORDS[kind]}")
    return fields[name]


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
    return Repair(**value)


def _parse_delta(value: object, where: str) -> Delta:
    if not isinstance(value, dict) or value.keys() != {"kind", "ratio"}:
        raise BadInputError(f"{where}: field 'delta' is {value!r}; expected null or kind and ratio")
    kind = _one_of(value["kind"], get_args(DeltaFormat), f"{where}: kind of field 'delta'")
    ratio = value["ratio"]
    if type(ratio) not in (int, float) or not 0 < ratio <= 1:
        raise BadInputError(f"{where}: ratio of field 'delta' is {ratio!r}; expected a number above 0 and at most 1")
    return Delta(kind, float(ratio))


def _parse_rounding(value: object, where: str) -> Rounding:
    if not isinstance(value, dict) or value.keys() != {"method", "tokens", "smoothing"}:
        raise BadInputError(f"{where}: field 'rounding' is {value!r}; expected null or method, tokens and smoothing")
    method = _one_of(value["method"], ("gptq",), f"{where}: method of field 'rounding'")
    tokens, smoothing = value["tokens"], value["smoothing"]
    if type(tokens) is not int or tokens < 0:
        raise BadInputError(f"{where}: tokens of field 'rounding' are {tokens!r}; expected a whole number")
    if type(smoothing) not in (int, float) or not 0 <= smoothing <= 1:
        raise BadInputError(f"{where}: smoothing of field 'rounding' is {smoothing!r}; expected a number from 0 to 1")
    return Rounding(method, tokens, float(smoothing))


def _one_of(value: object, choices: tuple[Any, ...], what: str) -> Any:
    if value not in choices:
        named = ("null" if choice is None else choice for choice in choices)
        raise BadInputError(f"{what} is {value!r}; expected one of {', '.join(named)}")
    return value


def read_plan(path: Path) -> CompressionPlan:
    """Read a plan file: a plan, or the output of a planner's ``--dry-run``."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path}: not a plan ({error})") from None
    if isinstance(document, dict) and document.get("schema") == STAGE_SCHEMA:
        result = document.get("result")
        document = result.get("plan") if isinstance(result, dict) else None
        if isinstance(result, dict) and result.get("dry_run") and document is None:
            raise BadInputError(f"{path}: the dry run left the plan open; plan again with a --profile")
    return parse_plan(document, str(path))


def plan_difference(a: CompressionPlan, b: CompressionPlan) -> list[str]:
    """Return the lines in which two plans differ; none where they would do the same."""
    lines = [
        f"{name}: {getattr(a, name)} | {getattr(b, name)}"
        for name in ("command", "source", "profile", "options", "merging", "repair", "delta", "rounding", "ordering")
        if getattr(a, name) != getattr(b, name)
    ]
    if len(a.blocks) != len(b.blocks):
        lines.append(f"blocks: {len(a.blocks)} | {len(b.blocks)}")
    lines += [
        f"block {i}: {x.to_json()} | {y.to_json()}"
        for i, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=False))
        if x != y
    ]
    return lines + [
        f"{name}: {a.formats.get(name, 'unchanged')} | {b.formats.get(name, 'unchanged')}"
        for name in sorted(a.formats.keys() | b.formats.keys())
        if a.formats.get(name) != b.formats.get(name)
    ]
