"""Compression plans: what is to be done to a checkpoint, as data.

A plan can be printed, compared, edited and applied later. It names its checkpoint by fingerprint and, where its
choice rests on one, its profile by digest. Making, reading and checking plans needs neither torch nor numpy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ditmoe_cli.checkpoint.formats import Format
from ditmoe_cli.checkpoint.provenance import STAGE_SCHEMA, canonical_json, check_schema, digest
from ditmoe_cli.errors import BadInputError

PLAN_SCHEMA = "ditmoe.plan/1"
_JSON_WORDS: Mapping[type, str] = {str: "string", list: "list", dict: "JSON object"}
RouterMode = Literal["slice", "ghost"]


@dataclass(frozen=True)
class BlockPlan:
    """What happens to one block's experts.

    `keep` lists the physical experts that stay, ascending; they are renumbered from 0. `router` says what becomes
    of the rows of the others: ``slice`` deletes them, ``ghost`` keeps them in the softmax but never selects them.
    """

    keep: tuple[int, ...]
    router: RouterMode


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
    """

    command: str
    source: str
    profile: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: tuple[BlockPlan, ...] = ()
    formats: Mapping[str, Format] = field(default_factory=dict)

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
            "blocks": [{"keep": list(block.keep), "router": block.router} for block in self.blocks],
            "formats": dict(sorted(self.formats.items())),
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
        formats={name: _one_of(fmt, get_args(Format), f"{where}: format of {name}") for name, fmt in formats.items()},
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
    return BlockPlan(tuple(keep), router)


def _one_of(value: object, choices: tuple[Any, ...], what: str) -> Any:
    if value not in choices:
        raise BadInputError(f"{what} is {value!r}; expected one of {', '.join(choices)}")
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
        for name in ("command", "source", "profile", "options")
        if getattr(a, name) != getattr(b, name)
    ]
    if len(a.blocks) != len(b.blocks):
        lines.append(f"blocks: {len(a.blocks)} | {len(b.blocks)}")
    lines += [
        f"block {i}: {x.router} {list(x.keep)} | {y.router} {list(y.keep)}"
        for i, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=False))
        if x != y
    ]
    return lines + [
        f"{name}: {a.formats.get(name, 'unchanged')} | {b.formats.get(name, 'unchanged')}"
        for name in sorted(a.formats.keys() | b.formats.keys())
        if a.formats.get(name) != b.formats.get(name)
    ]
