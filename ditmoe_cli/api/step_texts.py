"""A step of a checkpoint's history in one line, with its settings marked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ditmoe_cli.compression.distill.distilled_output import distilling_record
from ditmoe_cli.compression.heal.healed_output import healing_record
from ditmoe_cli.compression.recorded import CLOCK
from ditmoe_cli.files.provenance import Step

_FINGERPRINT = re.compile("[0-9a-f]{64}")


def number(value: float) -> str:
    """Return an error or a gap for reading, in three digits."""
    return f"{value:.3g}"


def step_text(step: Step) -> str:
    """Return a step of a history in one line: ``prune ⟨keep⟩ 0.5 ⟨method⟩ reap, refit error 0.03``."""
    words = [step.command, *(word for name, value in step.options.items() for word in _flag(name, value))]
    record = healing_record(step) or distilling_record(step)
    measured = [
        f"{name.replace('_', ' ')} {_spread(list(map(float, texts)))}"
        for name, texts in step.measured.items()
        if texts and name not in ("gap", CLOCK) and record is None
    ]
    if record is not None:
        measured.append(f"held error {held_text(record.held_error)}")
    return ", ".join([" ".join(words), *measured]) + " (by an edited plan)" * step.edited


def held_text(errors: Sequence[float]) -> str:
    """Return an error on held-out states before and after training: ``0.12 -> 0.03``."""
    return " -> ".join(map(number, errors))


def _spread(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _flag(name: str, value: object) -> Iterator[str]:
    """Yield an option as it is given; switches have no value, and lists are given one by one."""
    flag = f"⟨{name}⟩"
    for each in value if isinstance(value, list) else [value]:
        if each is not False and each is not None:
            yield flag if each is True else f"{flag} {_shortened(each)}"


def _shortened(value: object) -> object:
    """Return a value of an option; of a fingerprint its first digits, as everywhere in tables."""
    return value[:12] if isinstance(value, str) and _FINGERPRINT.fullmatch(value) else value
