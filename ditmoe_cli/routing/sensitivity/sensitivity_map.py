"""Maps of the error that predictions have without a part of a block, as data. Neither torch nor numpy.

The error of a part p of block l in step bin b is

    e[p, b, l] = Σ‖v - v'‖² / Σ‖v‖²

over states of that bin, v being the guided prediction of the whole model, and v' that of the model whose block l leaves
out p in both branches of guidance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_cli.briefs import Brief, Fact, heat_map
from ditmoe_cli.diffusion.step_bins import steps_of_bins
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.json_text import read_json

SENSITIVITY_SCHEMA = "ditmoe.sensitivity/1"
PARTS: Mapping[str, str] = {
    "skip": "block",
    "skip-attention": "attention",
    "skip-mixture": "mixture",
    "top1": "slot 2",
    "skip-shared": "shared expert",
}
"""What is left out, by the text of the choice (`block_choices`) that does; `top1` leaves out all slots but 1."""
MOST_BINS = 50  # where no number of bins is given

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, repr=False)
class SensitivityMap(Brief):
    """A map of L blocks and B step bins.

    Attributes:
        checkpoint: the fingerprint of the checkpoint.
        sampling: how its states were sampled, as sample specs record it.
        times: (B,) the time of each bin's first step.
        reference: (B,) the mean square of v.
        errors: (B, L) by the text of the choice that leaves a part out.
    """

    checkpoint: str
    sampling: Mapping[str, Any]
    times: tuple[float, ...]
    reference: tuple[float, ...]
    errors: Mapping[str, Rows]

    @property
    def bins(self) -> int:
        """The step bins."""
        return len(self.times)

    @property
    def blocks(self) -> int:
        """The blocks."""
        return len(next(iter(self.errors.values()))[0])

    @property
    def _weights(self) -> list[float]:
        """Σ‖v‖² of each bin over all of its steps, up to a factor that bins share."""
        steps = steps_of_bins(int(self.sampling["steps"]), self.bins)
        return [len(each) * size for each, size in zip(steps, self.reference, strict=True)]

    def by_block(self, part: str) -> list[float]:
        """Return the error of a part over all steps, (L,)."""
        return self._merged(part, range(self.bins))

    def grouped(self, part: str, groups: int) -> list[list[float]]:
        """Return the error of a part over groups of neighbouring bins, at most so many, (groups, L)."""
        return [self._merged(part, bins) for bins in steps_of_bins(self.bins, min(groups, self.bins))]

    def _merged(self, part: str, bins: Sequence[int]) -> list[float]:
        weights, rows = self._weights, self.errors[part]
        whole = sum(weights[b] for b in bins)
        if not whole:
            return [0.0] * self.blocks
        return [sum(weights[b] * rows[b][block] for b in bins) / whole for block in range(self.blocks)]

    def to_json(self) -> dict[str, Any]:
        """Return the map as JSON, with the errors over all steps."""
        return {
            "schema": SENSITIVITY_SCHEMA,
            "checkpoint": self.checkpoint,
            "sampling": dict(self.sampling),
            "times": list(self.times),
            "reference": list(self.reference),
            "errors": {part: [list(row) for row in rows] for part, rows in self.errors.items()},
            "by_block": {part: self.by_block(part) for part in self.errors},
        }

    def _brief(self) -> list[Fact]:
        def worst(part: str) -> str:
            errors = self.by_block(part)
            return f"{max(errors):.4g} in block {errors.index(max(errors))}"

        return [*((f"most without {PARTS[part]}", worst(part)) for part in self.errors), ("step bins", self.bins)]

    def _repr_html_(self) -> str:
        rows = {part: [list(row) for row in zip(*rows, strict=True)] for part, rows in self.errors.items()}
        maps = (heat_map(f"without {PARTS[part]}", rows[part], "block", "step bin", 0.0) for part in self.errors)
        return f"{super()._repr_html_()}{''.join(maps)}"


def parse_map(document: object) -> SensitivityMap:
    """Read a map from its JSON. Raises `ValueError` where it is malformed."""
    try:
        if not isinstance(document, dict) or document["schema"] != SENSITIVITY_SCHEMA:
            raise ValueError(f"its schema is not {SENSITIVITY_SCHEMA}")
        sampling = dict(document["sampling"])
        times, reference = _numbers(document["times"]), _numbers(document["reference"], 0.0)
        errors = {str(part): tuple(_numbers(row, 0.0) for row in rows) for part, rows in document["errors"].items()}
        steps = sampling["steps"]
        if type(steps) is not int or not 1 <= len(times) <= steps or len(reference) != len(times):
            raise ValueError(f"{len(times)} times and {len(reference)} references")
        sizes = {len(row) for rows in errors.values() for row in rows}
        if len(sizes) != 1 or 0 in sizes or any(len(rows) != len(times) for rows in errors.values()):
            raise ValueError("its parts differ in bins or blocks")
        if not set(errors) <= set(PARTS):
            raise ValueError(f"{sorted(set(errors) - set(PARTS))[0][:40]!r} is no part")
        ordered = {part: errors[part] for part in PARTS if part in errors}  # as they are measured
        return SensitivityMap(str(document["checkpoint"]), sampling, times, reference, ordered)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from None


def _numbers(values: Sequence[object], least: float = -math.inf) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values if type(value) in (int, float))  # type: ignore[arg-type]
    if len(numbers) != len(values) or not all(least <= number < math.inf for number in numbers):
        raise ValueError("a number is out of range, or none")
    return numbers


def read_map(path: Path) -> SensitivityMap:
    """Return the map in a file. Raises `BadInputError` where it is missing, or no map."""
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; make it with ditmoe report sensitivity")
    try:
        return parse_map(read_json(path))
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"{path}: is no map of sensitivity ({str(error)[:200]}); make one with ditmoe report sensitivity"
        ) from None
