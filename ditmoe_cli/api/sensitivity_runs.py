"""Maps of sensitivity: kept from an earlier run, or measured; and the files that show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.api.devices import dtype_on
from ditmoe_cli.api.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.sampling_requests import Running, SamplingOptions
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.diffusion.sampling import SampleSpec, check_followable
from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER, Solver
from ditmoe_cli.diffusion.step_bins import choose_bins
from ditmoe_cli.evaluation.kept_results import keep, read_kept, result_key
from ditmoe_cli.files.staging import check_target, clean_leftovers, staged
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dtypes import AUTO, Dtype
from ditmoe_cli.model.effort import Estimate
from ditmoe_cli.model.throughput import Rate, known_rate, likely_device
from ditmoe_cli.routing.calibration_settings import usual_classes
from ditmoe_cli.routing.sensitivity.map_effort import map_estimate
from ditmoe_cli.routing.sensitivity.sensitivity_map import MOST_BINS, PARTS, SensitivityMap, parse_map


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts that a list names, each once and in the order of `PARTS`. Raises `ValueError`."""
    return chosen_parts([word.strip() for word in text.split(",")])


def chosen_parts(words: Sequence[str]) -> tuple[str, ...]:
    """Return parts, each once and in the order of `PARTS`. Raises `ValueError` for unknown ones, and for none."""
    if not words or not set(words) <= set(PARTS):
        raise ValueError(f"give some of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in words)


@dataclass(frozen=True)
class MappedSampling(SamplingOptions):
    """How the states of a map are sampled."""

    images: int = 16

    def spec(
        self, checkpoint: Checkpoint, solvers: Mapping[Sampler, Solver] = DEFAULT_SOLVER, dtype: Dtype = "fp32"
    ) -> SampleSpec:
        """Return the spec that the options ask for, labels spread over all classes where none are given.

        Raises `UsageError` for values out of range, and for steps that cannot be followed.
        """
        classes = usual_classes(self.images, checkpoint.config.num_classes) if self.classes is None else self.classes
        counted = replace(self, classes=classes)
        return check_followable(super(MappedSampling, counted).spec(checkpoint, solvers, dtype))

    def foreseen_spec(self, checkpoint: Checkpoint, device: str) -> SampleSpec:
        """Return the spec of a dry run, which measures no dtype."""
        dtype = "fp32" if self.upstream and self.dtype == AUTO else self.dtype
        return self.spec(checkpoint, dtype=dtype_on(dtype, device, measures=False)(checkpoint))


@dataclass(frozen=True)
class LeavingOut:
    """Which parts are left out, and the step bins of their errors."""

    parts: tuple[str, ...] = tuple(PARTS)
    bins: int | None = None

    def bins_of(self, spec: SampleSpec) -> int:
        """Return the number of step bins. Raises `UsageError` for more than there are steps."""
        return min(spec.steps, MOST_BINS) if self.bins is None else choose_bins(self.bins, spec.steps)

    def estimate(self, checkpoint: Checkpoint, spec: SampleSpec, batch: int) -> Estimate:
        """Return what a map takes."""
        return map_estimate(checkpoint.config, spec, self.bins_of(spec), self.parts, batch)


@dataclass(frozen=True)
class MapFiles:
    """Where a map goes."""

    output: Path | None = None
    png: Path | None = None
    force: bool = False

    @property
    def named(self) -> tuple[Path, ...]:
        """The files that are asked for."""
        return tuple(path for path in (self.output, self.png) if path is not None)

    @property
    def path(self) -> str:
        """The absolute path that ``-q`` prints."""
        return str(self.named[0].absolute()) if self.named else ""

    def to_json(self) -> dict[str, str | None]:
        """Return absolute paths."""
        return {
            "output": str(self.output.absolute()) if self.output else None,
            "png": str(self.png.absolute()) if self.png else None,
        }


@dataclass(frozen=True, repr=False)
class ForeseenMap(Brief):
    """What a map would be of, and what it would take.

    Attributes:
        sampling: how its states would be sampled, as sample specs record it.
        bins: the step bins.
        parts: what would be left out.
        estimates: what measuring takes, from shapes.
        rate: the machine's speed that they rest on.
    """

    sampling: Mapping[str, Any]
    bins: int
    parts: tuple[str, ...]
    estimates: Sequence[Estimate]
    rate: Rate

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        estimate = estimate_of(self.estimates, self.rate)
        return {"sampling": dict(self.sampling), "bins": self.bins, "parts": list(self.parts), "estimate": estimate}

    def _brief(self) -> list[Fact]:
        return [("step bins", self.bins), ("parts", ", ".join(self.parts)), estimate_row(self.estimates, self.rate)]


def foreseen_map(
    checkpoint: Checkpoint, sampling: MappedSampling, leaving: LeavingOut, running: Running
) -> ForeseenMap:
    """Return what a map would take. Takes neither torch nor numpy."""
    spec = sampling.foreseen_spec(checkpoint, running.device)
    return ForeseenMap(
        {**spec.conditions(), "nfe": spec.nfe},
        leaving.bins_of(spec),
        leaving.parts,
        [leaving.estimate(checkpoint, spec, running.batch)],
        known_rate(likely_device(running.device)),
    )


def sensitivity_of(
    checkpoint: Checkpoint, spec: SampleSpec, leaving: LeavingOut, running: Running, to: MapFiles
) -> SensitivityMap:
    """Return the map of a checkpoint, kept from an earlier run or measured, and write the files that are asked for.

    Torch is not imported where it was kept. A file that holds the same already is up to date.
    """
    check_drawing(to)
    bins = leaving.bins_of(spec)
    key = result_key(
        "report sensitivity",
        {
            "checkpoint": checkpoint.fingerprint,
            "sampling": spec.conditions(),
            "bins": bins,
            "parts": list(leaving.parts),
            "device": running.device,
        },
    )
    found = None if to.force else _kept(key)
    if found is None:
        for path in to.named:
            check_target(path.absolute(), to.force, (checkpoint.path,))
        runtime = running.runtime
        foretell([leaving.estimate(checkpoint, spec, running.batch)], lambda: runtime.device)
        from ditmoe_cli.routing.sensitivity.left_out_parts import measured_map

        found = measured_map(checkpoint, spec, bins, leaving.parts, runtime)
        keep(key, found.to_json(), note)
    else:
        note("the map is kept from an earlier run; ⟨force⟩ measures anew")
    write_map(found, checkpoint, to)
    return found


def _kept(key: str) -> SensitivityMap | None:
    """Return a map that an earlier run kept; None where there is none, or a malformed one."""
    document = read_kept(key)
    try:
        return None if document is None else parse_map(document)
    except ValueError:
        return None


def check_drawing(to: MapFiles) -> None:
    """Raise `BadInputError` where a picture is asked for that cannot be drawn here."""
    if to.png is not None:
        from ditmoe_cli.routing.report.figures import require_matplotlib

        require_matplotlib()


def write_map(found: SensitivityMap, checkpoint: Checkpoint, to: MapFiles) -> None:
    """Write a map as JSON and as a picture where these are asked for."""
    if to.output is not None:
        text = json.dumps(found.to_json(), sort_keys=True, allow_nan=False)
        _write(to.output, f"{text}\n".encode(), to.force, checkpoint.path)
    if to.png is not None:
        from ditmoe_cli.routing.report.figures import sensitivity_png

        _write(to.png, sensitivity_png(found, checkpoint.name), to.force, checkpoint.path)


def _write(path: Path, contents: bytes, force: bool, source: Path) -> None:
    """Write a file, unless it holds the same already."""
    if not force and path.is_file() and not path.is_symlink() and path.read_bytes() == contents:
        clean_leftovers(path)
        note(f"{path} is up to date")
        return
    with staged(path, force, (source,)) as staging:
        staging.write_bytes(contents)
