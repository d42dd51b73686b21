"""Schedules of compute: what each block of one checkpoint computes in each evaluation of one way of sampling.

A file is safetensors. Its metadata hold the JSON of schema ``ditmoe.schedule/1``: checkpoint, sampling, table, and how
that was chosen. With L blocks, at most R router rows, B step bins, width D and two branches, it has the statistics that
its rules for slots need:

    energy            F32  (B, 2, L, R)   E‖γ ⊙ f‖² of what a router row selects
    scale, constant   F32  (L, R, D)      the regression of an expert's output on that of the token's first expert

and, with K evaluations and C channels of the state, where predictions follow it (`followed_predictions`),

    slopes            F32  (K, C, 2)      by which they follow

Reading the metadata needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.diffusion.few_steps import told_sampling
from ditmoe_cli.diffusion.schedule import ALWAYS, SOLVERS, Interval, Solver, evaluation_times
from ditmoe_cli.diffusion.weak_guidance import Guidance, Guide, parse_guide
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.model.block_choices import ComputeTable, NullChoice, Rule, check_table, parse_choice
from ditmoe_cli.model.compute_cost import evaluation_cost
from ditmoe_cli.model.config import DiTMoEConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditmoe_cli.model.checkpoint import Checkpoint

SCHEDULE_SCHEMA = "ditmoe.schedule/1"
ENERGY, SCALE, CONSTANT, SLOPES = "energy", "scale", "constant", "slopes"
NEEDED: Mapping[Rule, tuple[str, ...]] = {"saliency": (ENERGY,), "regressed": (SCALE, CONSTANT)}
"""The statistics that a rule for slots needs."""


@dataclass(frozen=True)
class ScheduledSampling:
    """The way of sampling that a schedule is for."""

    solver: Solver
    steps: int
    cfg: float = 1.0
    interval: Interval = ALWAYS
    guide: Guide | None = None

    @property
    def guidance(self) -> Guidance:
        """How predictions are guided."""
        return Guidance(SOLVERS[self.solver].family, self.cfg, self.interval, self.guide)

    @property
    def times(self) -> list[float]:
        """The time of every evaluation."""
        return evaluation_times(self.solver, self.steps)

    @property
    def null(self) -> tuple[NullChoice, ...]:
        """What becomes of the null class where nothing is saved; nothing where it never guides."""
        guided = [self.guidance.takes_null_class(t) for t in self.times]
        return tuple("compute" if each else "off" for each in guided) if any(guided) else ()

    def operations(self, config: DiTMoEConfig) -> float:
        """Return the operations of the model for one image where everything is computed, both branches counted.

        Experts of several widths count by their mean; a weaker model that guides does not count.
        """
        return evaluation_cost(config) * sum(1 + self.guidance.takes_null_class(t) for t in self.times)

    @property
    def told(self) -> str:
        """The sampling in words."""
        interval = "" if self.interval == ALWAYS else " from {:g} to {:g}".format(*self.interval)
        guide = "" if self.guide is None else f", guided by {self.guide.told}"
        return f"{told_sampling(self.solver, self.steps)} at cfg {self.cfg:g}{interval}{guide}"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        told = {"solver": self.solver, "steps": self.steps, "cfg": self.cfg, "interval": list(self.interval)}
        return {**told, "guide": None if self.guide is None else self.guide.to_json()}


@dataclass(frozen=True)
class ComputeSchedule:
    """A schedule, opened.

    Attributes:
        path: its file.
        checkpoint: the fingerprint of the checkpoint that it is for.
        sampling: the way of sampling that it is for.
        method: how the table was made, as ``fora:2`` or ``planned``.
        table: what is computed.
        bins: the step bins of `energy`.
        measured: what was measured while it was chosen: shares of operations, errors.
    """

    path: Path
    checkpoint: str
    sampling: ScheduledSampling
    method: str
    table: ComputeTable
    bins: int
    measured: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, by which samples name it."""
        return file_digest(self.path)

    def is_for(self, way: ScheduledSampling) -> bool:
        """Return whether it is for a way of sampling, a weaker model that guides left aside."""
        return replace(self.sampling, guide=None) == replace(way, guide=None)

    @property
    def nfe(self) -> int:
        """The evaluations of an image: of both branches, where they are predicted, and of a weaker model."""
        guidance, table, followed = self.sampling.guidance, self.table, set(self.table.followed)
        asked = [k for k in range(table.evaluations) if k not in followed]
        return sum(1 + table.computes_null(k) + guidance.takes_weak(self.sampling.times[k]) for k in asked)

    def statistics(self) -> dict[str, NDArray[Any]]:
        """Return the statistics that it holds."""
        from ditmoe_cli.files.arrays import read_arrays

        return read_arrays(self.path, (ENERGY, SCALE, CONSTANT, SLOPES))


def schedule_document(
    checkpoint: str,
    sampling: ScheduledSampling,
    method: str,
    table: ComputeTable,
    bins: int,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the JSON of a schedule's file."""
    return {
        "schema": SCHEDULE_SCHEMA,
        "checkpoint": checkpoint,
        "sampling": sampling.to_json(),
        "method": method,
        "bins": bins,
        "table": {
            "choices": [choice.text for choice in table.choices],
            "cells": [[list(branch) for branch in step] for step in table.cells],
            "null": list(table.null),
            "residual": table.residual,
        },
        "measured": dict(measured),
    }


def read_schedule(path: Path) -> ComputeSchedule:
    """Open a schedule.

    Raises `BadInputError` where the file is missing, damaged or no schedule, where its table cannot be carried out, and
    where it lacks statistics that its rules need.
    """
    from ditmoe_cli.files.arrays import read_document

    if not path.is_file():
        raise BadInputError(f"{path}: no such schedule; make one with ditmoe schedule")
    header = read_safetensors_header(path)
    document = read_document(header, SCHEDULE_SCHEMA, path)
    if document is None:
        raise BadInputError(f"{path}: is no schedule of compute; make one with ditmoe schedule")
    try:
        sampling = _parse_sampling(document["sampling"])
        table = _parse_table(document["table"])
        bins, measured = int(document["bins"]), dict(document["measured"])
        schedule = ComputeSchedule(
            path, str(document["checkpoint"]), sampling, str(document["method"]), table, bins, measured
        )
        if table.evaluations != len(sampling.times):
            raise ValueError(f"it plans {table.evaluations} evaluations, {sampling.told} take {len(sampling.times)}")
        if bool(table.null) != bool(sampling.null):
            raise ValueError(f"it plans {table.branches} branches, {sampling.told} take another number")
        if not 1 <= bins <= table.evaluations:
            raise ValueError(f"it has {bins} step bins for {table.evaluations} evaluations")
        _check_guided(table, sampling)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInputError(f"{path}: the schedule is malformed ({error}); make it again") from None
    missing = [name for name in needed_statistics(table) if name not in header.tensors]
    if missing:
        raise BadInputError(f"{path}: the schedule has no tensor {missing[0]!r}, which its rules need; make it again")
    return schedule


def needed_statistics(table: ComputeTable) -> list[str]:
    """Return the names of the statistics that a table needs."""
    found = [name for rule in sorted(table.rules) for name in NEEDED.get(rule, ())]
    return [*found, SLOPES] if table.followed else found


def _check_guided(table: ComputeTable, sampling: ScheduledSampling) -> None:
    for evaluation, (mine, full) in enumerate(zip(table.null, sampling.null, strict=False)):
        if full == "off" and mine != "off":
            raise ValueError(f"evaluation {evaluation} takes the null class, which does not guide there")


def _parse_sampling(document: Mapping[str, Any]) -> ScheduledSampling:
    low, high = document["interval"]
    solver = document["solver"]
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver}")
    steps = document["steps"]
    if type(steps) is not int or not 1 <= steps <= 100_000:
        raise ValueError(f"{steps} steps")
    guide = parse_guide(document["guide"])
    return ScheduledSampling(solver, steps, float(document["cfg"]), (float(low), float(high)), guide)


def _parse_table(document: Mapping[str, Any]) -> ComputeTable:
    choices = tuple(parse_choice(text) for text in document["choices"])
    cells = tuple(tuple(tuple(_numbers(branch)) for branch in step) for step in document["cells"])
    residual = document["residual"]
    return check_table(
        ComputeTable(choices, cells, tuple(document["null"]), None if residual is None else float(residual))
    )


def _numbers(values: Sequence[object]) -> list[int]:
    if not all(type(value) is int for value in values):
        raise ValueError("a cell is no number")
    return [value for value in values if isinstance(value, int)]


def check_schedule(schedule: ComputeSchedule, checkpoint: Checkpoint, sampling: ScheduledSampling) -> ComputeSchedule:
    """Return a schedule that fits.

    Raises `BadInputError` for a schedule of another checkpoint or way of sampling, for a table with other blocks than
    the model has, and for statistics of other shapes.
    """
    where = f"{schedule.path}: is a schedule"
    if schedule.checkpoint != checkpoint.fingerprint:
        raise BadInputError(
            f"{where} of another checkpoint ({schedule.checkpoint[:12]}), not of {checkpoint.path} "
            f"({checkpoint.fingerprint[:12]}); make one of that with ditmoe schedule"
        )
    if schedule.sampling != sampling:
        raise BadInputError(
            f"{where} for {schedule.sampling.told}, not for {sampling.told}; sample so, or make one for that with "
            "ditmoe schedule"
        )
    check_blocks(schedule, checkpoint.config)
    return schedule


def check_blocks(schedule: ComputeSchedule, config: DiTMoEConfig) -> None:
    """Raise `BadInputError` where a schedule is not of a model's blocks, router rows and width."""
    blocks = len(schedule.table.cells[0][0])
    if blocks != config.depth:
        raise BadInputError(
            f"{schedule.path}: plans {blocks} blocks, the model has {config.depth}; make it again with ditmoe schedule"
        )
    rows = max(block.router_rows for block in config.blocks)
    shapes = {
        ENERGY: (schedule.bins, 2, blocks, rows),
        SCALE: (blocks, rows, config.hidden_size),
        CONSTANT: (blocks, rows, config.hidden_size),
        SLOPES: (schedule.table.evaluations, config.in_channels, 2),
    }
    tensors = read_safetensors_header(schedule.path).tensors
    for name, shape in shapes.items():
        if name in tensors and (tensors[name].info.shape != shape or tensors[name].info.dtype != "F32"):
            info = tensors[name].info
            raise BadInputError(
                f"{schedule.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, not F32 {list(shape)} as the "
                "model needs; make it again with ditmoe schedule"
            )
