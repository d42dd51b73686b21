"""The provenance of a checkpoint: configuration, history, card and few steps, in a file's ``ditmoe`` metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.licences import checked_name

CHECKPOINT_SCHEMA = "ditmoe.checkpoint/1"
_MOST_DIGITS = 6  # of an expert's number
STAGE_SCHEMA = "ditmoe.stage/1"
EXPORTING = "export"
"""The command whose steps lay weights out for other programs."""
_ORIGIN = re.compile(r"(demo|hf):[A-Za-z0-9_.+@/-]{1,500}")


def check_schema(value: object, expected: str, where: str) -> dict[str, Any]:
    """Return `value` as a JSON object of schema `expected`, or raise `BadInputError` that names `where`."""
    if not isinstance(value, dict):
        raise BadInputError(f"{where}: expected a JSON object of schema {expected}")
    if value.get("schema") != expected:
        told = f"schema is {value.get('schema')!r}, expected {expected!r}"
        raise BadInputError(f"{where}: {told}; name a file of that schema")
    return value


@dataclass(frozen=True)
class Step:
    """A step of a checkpoint's history.

    Attributes:
        command: the command that was run.
        source: fingerprint of its input.
        plan: digest of its plan.
        options: the options that were given, by name.
        measured: errors that were predicted or measured, by name; those of a refit or of routing are one a block.
        edited: whether the plan was changed after a planner had written it.
        experts: what became of each block's experts, where some were dropped or merged: a text of fixed width for each
            expert, ``-`` where it was dropped, else the number of the expert that it stays or that takes its place.
        request: digest of what was asked for, by which the same request is recognised; None in older files.
        calibration: settings of the calibration that the plan rests on, by which a descendant is profiled alike; None
            where it rests on none.
        defaults: options that shape the result and were left out, at the values that they had, by name.
        made: versions of the programs that made it, and, where weights are computed, threads, device and the like,
            whose rounding differs.
        planned: the plan itself, where no planner chose it: one that was edited, or written by hand; None elsewhere.
    """

    command: str
    source: str
    plan: str
    options: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Sequence[str]] = field(default_factory=dict)
    edited: bool = False
    experts: Sequence[str] = ()
    request: str | None = None
    calibration: Mapping[str, Any] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, Any] | None = None

    def with_measured(self, measured: Mapping[str, Sequence[str]]) -> Step:
        """Return the step with other errors."""
        return replace(self, measured=measured)

    @property
    def distils(self) -> bool:
        """Whether its output has few steps of its own: that of ``distill``, and of ``compress`` with steps."""
        return self.command == "distill" or (self.command == "compress" and "steps" in self.options)

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON, fields at their defaults left out."""
        document: dict[str, Any] = {"command": self.command, "source": self.source, "plan": self.plan}
        if self.options:
            document["options"] = dict(self.options)
        if self.measured:
            document["measured"] = {name: list(texts) for name, texts in self.measured.items()}
        if self.calibration is not None:
            document["calibration"] = dict(self.calibration)
        if self.experts:
            document["experts"] = list(self.experts)
        if self.request is not None:
            document["request"] = self.request
        document |= {name: dict(value) for name in ("defaults", "made", "planned") if (value := getattr(self, name))}
        return {**document, "edited": True} if self.edited else document


def parse_step(document: Mapping[str, Any]) -> Step:
    """Read a step from JSON. Raises `ValueError` or `TypeError` where it is malformed."""
    step = Step(**document)
    texts = all(isinstance(text, str) for text in (step.command, step.source, step.plan, step.request or ""))
    optional = all(isinstance(table, dict | None) for table in (step.calibration, step.planned))
    tables = optional and all(isinstance(table, dict) for table in (step.options, step.defaults, step.made))
    texts = texts and tables and all(isinstance(text, str) for text in step.made.values())
    experts = isinstance(step.experts, list | tuple) and all(
        isinstance(block, str) and _are_fates(block) for block in step.experts
    )
    if not texts or not tables or not experts or type(step.edited) is not bool:
        raise ValueError(f"step {dict(document)}")
    for errors in step.measured.values():
        if not isinstance(errors, list):
            raise ValueError(f"step {dict(document)}")
        list(map(float, errors))
    return step


def expert_fates(text: str) -> list[str]:
    """Return what became of each expert of a block, by its text in `Step.experts`.

    Raises `ValueError` where no number of experts gives a text of this length.
    """
    widths = (width for width in range(1, _MOST_DIGITS + 1) if len(text) % width == 0)
    width = next((width for width in widths if len(str(len(text) // width - 1)) == width), None)
    if width is None or not text:
        raise ValueError(f"the fates of experts {text[:40]!r} are of no number of experts")
    return [text[start : start + width].strip() for start in range(0, len(text), width)]


def _are_fates(text: str) -> bool:
    """Return whether a text says of each expert of a block that it is dropped, stays or goes into another one."""
    try:
        fates = expert_fates(text)
        return all(fate == "-" or 0 <= int(fate) < len(fates) for fate in fates)
    except ValueError:
        return False


@dataclass(frozen=True)
class Card:
    """How a checkpoint's images are scored and read.

    `extractor` names the features to score them by; a pixel value v in [-1, 1] means the grey level
    (v + 1) / 2 * `grey_levels`.
    """

    extractor: str | None = None
    grey_levels: int = 255


@dataclass(frozen=True)
class Distilled:
    """By which few steps a distilled checkpoint is sampled, and which guidance went into its weights.

    Attributes:
        solver, steps: what it was trained for; one evaluation a step, of the conditional branch alone.
        cfg: scale of classifier-free guidance in the weights; 1 for none.
        guide: the weaker model whose guidance is in the weights: its fingerprint, or ``top1`` or ``rank2``; None.
        guide_scale: the scale W of that guidance.
        guide_interval: noise levels, 0 to 1, within which it guided.
        teacher_solver, teacher_steps: by which the original's paths were sampled.
    """

    solver: str
    steps: int
    cfg: float = 1.0
    guide: str | None = None
    guide_scale: float = 0.0
    guide_interval: tuple[float, float] = (0.0, 1.0)
    teacher_solver: str = ""
    teacher_steps: int = 0


@dataclass(frozen=True)
class Provenance:
    """Configuration, history and card of a checkpoint; on disk, the hashes of its tensors stand beside them.

    `distilled` says by which few steps it is sampled; None where any will do. `origin` is the name of the checkpoint
    that the history begins with, where it has one that holds everywhere: ``demo:NAME``, or ``hf:…`` on the hub, and
    `licence` that which its metadata names, if any. `exported` has the options of ``export`` where this is a copy in
    the layout of another program; what is made of that is none.
    """

    config: Mapping[str, Any]
    history: tuple[Step, ...] = ()
    card: Card = field(default_factory=Card)
    distilled: Distilled | None = None
    origin: str | None = None
    licence: str | None = None
    exported: Mapping[str, Any] = field(default_factory=dict)

    @property
    def export(self) -> Mapping[str, Any]:
        """The options of ``export`` where this is what that wrote; nothing elsewhere."""
        last = self.history[-1] if self.history else None
        return last.options if last is not None and last.command == EXPORTING else self.exported

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """Settings of the last calibration in the history; None without any.

        Of a distilled checkpoint those from before it was distilled do not count: the states there are others.
        """
        settings = (step.calibration for step in reversed(self._since_distilling) if step.calibration is not None)
        return next(settings, None)

    @property
    def _since_distilling(self) -> tuple[Step, ...]:
        """The steps whose calibrations hold for the checkpoint; the distilling's own only if it took the same steps."""
        if self.distilled is None:
            return self.history
        last, own = self._distilling, (self.distilled.solver, self.distilled.steps)
        doubtful, since = (
            (self.history, ()) if last is None else (self.history[last : last + 1], self.history[last + 1 :])
        )
        return (*(step for step in doubtful if _solver_and_steps(step.calibration) == own), *since)

    @property
    def _distilling(self) -> int | None:
        """The place in the history of the last distilling; None where none is recorded."""
        return max((place for place, step in enumerate(self.history) if step.distils), default=None)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Fingerprints of the checkpoints that this one is a distilled copy of, oldest first; none for any other.

        They are its ancestors before it was distilled, and the original that it was distilled towards.
        """
        last = self._distilling if self.distilled is not None else None
        if last is None:
            return ()
        original = self.history[last].options.get("original")
        named = (original,) if isinstance(original, str) else ()
        return tuple(dict.fromkeys((*(step.source for step in self.history[: last + 1]), *named)))

    @property
    def ancestors(self) -> tuple[str, ...]:
        """Fingerprints of the checkpoints that this one was computed from, oldest first."""
        return tuple(step.source for step in self.history)

    def to_metadata(self, hashes: Mapping[str, str]) -> dict[str, str]:
        """Return the safetensors metadata. It holds no times or paths, so that equal work gives equal bytes."""
        document = {
            "schema": CHECKPOINT_SCHEMA,
            "config": dict(self.config),
            "history": [step.to_json() for step in self.history],
            "card": asdict(self.card),
            "tensors": dict(hashes),
        }
        if self.distilled is not None:
            document["distilled"] = asdict(self.distilled)
        if self.origin is not None:
            document["origin"] = self.origin
        if self.licence is not None:
            document["licence"] = self.licence
        if self.exported:
            document["exported"] = dict(self.exported)
        return {"format": "pt", "ditmoe": canonical_json(document)}


def _solver_and_steps(settings: Mapping[str, Any] | None) -> tuple[Any, Any] | None:
    return None if settings is None else (settings.get("solver"), settings.get("steps"))


def recorded_hashes(metadata: Mapping[str, str], where: str) -> Mapping[str, str]:
    """Return the SHA-256 of each tensor of a file by name, as its metadata says; nothing where it holds none.

    They are those of the tensors that ditmoe wrote; another program may have changed the tensors since. Raises
    `BadInputError` where they are malformed.
    """
    if "ditmoe" not in metadata:
        return {}
    try:
        hashes = parse_json(metadata["ditmoe"]).get("tensors", {})
    except (ValueError, AttributeError) as error:
        raise BadInputError(f"{where}: the ditmoe metadata is malformed ({first_line(error)})") from None
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise BadInputError(f"{where}: the ditmoe metadata is malformed (the hashes of tensors are no map of texts)")
    return hashes


def parse_card(document: Mapping[str, Any]) -> Card:
    """Read a card from JSON. Raises `ValueError`, `KeyError` or `TypeError` where it is malformed."""
    card = Card(**document)
    if not isinstance(card.extractor, str | None) or type(card.grey_levels) is not int or card.grey_levels < 1:
        raise ValueError(f"card {dict(document)}")
    return card


def parse_distilled(document: Mapping[str, Any] | None) -> Distilled | None:
    """Read how a distilled checkpoint is sampled; None for None. Raises `ValueError` or `TypeError` where malformed."""
    if document is None:
        return None
    low, high = document.get("guide_interval", (0.0, 1.0))
    found = Distilled(**{**document, "guide_interval": (float(low), float(high))})
    texts = isinstance(found.solver, str) and isinstance(found.teacher_solver, str)
    counts = type(found.steps) is int and found.steps >= 1 and type(found.teacher_steps) is int
    scales = all(math.isfinite(value) for value in (found.cfg, found.guide_scale, *found.guide_interval))
    if not (texts and counts and scales and isinstance(found.guide, str | None)):
        raise ValueError(f"distilled {dict(document)}")
    return found


def parse_origin(document: object) -> str | None:
    """Read the name of the checkpoint that a history begins with. Raises `ValueError` for what is no such name."""
    if document is None or (isinstance(document, str) and _ORIGIN.fullmatch(document)):
        return document
    raise ValueError(f"origin {str(document)[:60]!r}")


def read_provenance(metadata: Mapping[str, str], where: str) -> Provenance | None:
    """Return the provenance in a file's metadata, None without any. Raises `BadInputError` where it is malformed."""
    if "ditmoe" not in metadata:
        return None
    try:
        document = check_schema(parse_json(metadata["ditmoe"]), CHECKPOINT_SCHEMA, f"{where}: ditmoe metadata")
        return Provenance(
            config=dict(document["config"]),
            history=tuple(parse_step(step) for step in document["history"]),
            card=parse_card(document["card"]),
            distilled=parse_distilled(document.get("distilled")),
            origin=parse_origin(document.get("origin")),
            licence=checked_name(document.get("licence")),
            exported=dict(document.get("exported", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BadInputError(f"{where}: the ditmoe metadata is malformed ({first_line(error)})") from None
