"""The provenance of a checkpoint: its configuration, history and card, in the ``ditmoe`` metadata of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import canonical_json

CHECKPOINT_SCHEMA = "ditmoe.checkpoint/1"
STAGE_SCHEMA = "ditmoe.stage/1"


def check_schema(value: object, expected: str, where: str) -> dict[str, Any]:
    """Return `value` as a JSON object of schema `expected`, or raise `BadInputError` that names `where`."""
    if not isinstance(value, dict):
        raise BadInputError(f"{where}: expected a JSON object of schema {expected}")
    if value.get("schema") != expected:
        raise BadInputError(f"{where}: schema is {value.get('schema')!r}, expected {expected!r}")
    return value


@dataclass(frozen=True)
class Step:
    """A step of a checkpoint's history.

    Attributes:
        command: the command.
        source: fingerprint of its input.
        plan: digest of its plan.
        calibration: settings of the calibration that the plan rests on, by which a descendant is profiled alike; None
            where it rests on none.
    """

    command: str
    source: str
    plan: str
    calibration: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the step as JSON; `calibration` only where there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Card:
    """How a checkpoint's images are scored and read.

    `extractor` names the features to score them by; a pixel value v in [-1, 1] means the grey level
    (v + 1) / 2 * `grey_levels`.
    """

    extractor: str | None = None
    grey_levels: int = 255


@dataclass(frozen=True)
class Provenance:
    """Configuration, history and card of a checkpoint; on disk, the hashes of its tensors stand beside them."""

    config: Mapping[str, Any]
    history: tuple[Step, ...] = ()
    card: Card = field(default_factory=Card)

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """Settings of the last calibration in the history; None without any."""
        return next((step.calibration for step in reversed(self.history) if step.calibration is not None), None)

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
        return {"format": "pt", "ditmoe": canonical_json(document)}


def parse_card(document: Mapping[str, Any]) -> Card:
    """Read a card from JSON. Raises `ValueError`, `KeyError` or `TypeError` where it is malformed."""
    card = Card(**document)
    if not isinstance(card.extractor, str | None) or type(card.grey_levels) is not int or card.grey_levels < 1:
        raise ValueError(f"card {dict(document)}")
    return card


def _parse_step(document: Mapping[str, Any]) -> Step:
    step = Step(**document)
    if not isinstance(step.calibration, dict | None):
        raise ValueError(f"calibration {step.calibration!r}")
    return step


def read_provenance(metadata: Mapping[str, str], where: str) -> Provenance | None:
    """Return the provenance in a file's metadata, None without any. Raises `BadInputError` where it is malformed."""
    if "ditmoe" not in metadata:
        return None
    try:
        document = check_schema(json.loads(metadata["ditmoe"]), CHECKPOINT_SCHEMA, f"{where}: ditmoe metadata")
        return Provenance(
            config=dict(document["config"]),
            history=tuple(_parse_step(step) for step in document["history"]),
            card=parse_card(document["card"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{where}: the ditmoe metadata is malformed ({error})") from None
