"""The layout of a healed checkpoint, and what its history keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from healing import pair

from ditmoe_cli.compression.apply import write_planned
from ditmoe_cli.compression.heal.healed_output import HealingRecord, healed_output, healing_record
from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.training.error_bins import BINS
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.files.reader import tensor_bytes
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import open_checkpoint

RECORD = HealingRecord(
    1234, 56, 7890, (0.1234567, 3e-7), tuple(0.01 * b for b in range(BINS)), tuple(0.001 * b for b in range(BINS))
)
TRAINED = ("blocks.0.moe.gate.weight", "final_layer.linear.bias")


def test_bytes_are_known_before_anything_is_measured(tmp_path: Path) -> None:
    _, path = pair(tmp_path)
    student, target = open_checkpoint(path), Output(tmp_path / "h.safetensors")
    asked = ("request", Healing("f" * 64, None, 5), {"cfg": 1.5, "images": 4})
    predicted = healed_output(student, TRAINED, *asked).predicted_bytes(target)
    values = {name: student.finite_tensor(name) + 1 for name in TRAINED}
    planned = healed_output(student, TRAINED, *asked, RECORD)
    written = write_planned(student, planned, target, lambda name: tensor_bytes(values[name]))
    assert written == predicted == target.path.stat().st_size

    healed = open_checkpoint(target.path)
    assert list(healed.header.tensors) == list(student.header.tensors)
    for name in student.header.tensors:
        expected = student.finite_tensor(name) + (1 if name in TRAINED else 0)
        assert torch.equal(healed.finite_tensor(name), expected)
    (step,) = healed.provenance().history
    assert (step.command, step.source, step.request) == ("heal", student.fingerprint, "request")
    assert healed.provenance().calibration == {"cfg": 1.5, "images": 4}
    record = healing_record(step)
    assert record is not None and record.scopes == ["block", "model"]
    assert (record.images, record.block_steps, record.model_steps) == (1234, 56, 7890)
    assert record.held_error == pytest.approx(RECORD.held_error, rel=1e-3)
    assert record.held_error_after == pytest.approx(RECORD.held_error_after, rel=1e-3)


@pytest.mark.parametrize(("steps", "scopes"), [((0, 3), ["model"]), ((3, 0), ["block"]), ((0, 0), [])])
def test_scopes_are_those_that_took_steps(steps: tuple[int, int], scopes: list[str]) -> None:
    record = HealingRecord(1, *steps)
    assert record.scopes == scopes == record.to_json()["scopes"]
    assert record.to_json()["held_error_before"] == [0.0] * BINS


def test_what_another_program_wrote_into_a_history_is_no_record() -> None:
    measured = RECORD.measured()
    step = Step("heal", "source", "plan", measured=measured)
    assert healing_record(step) is not None
    assert healing_record(replace(step, command="prune")) is None
    for broken in (
        {},
        {"course": measured["course"]},
        {**measured, "course": ["1.5", "2", "3"]},
        {**measured, "course": ["1", "2"]},
        {**measured, "held_error": []},
        {**measured, "held_error_after": ["0.1"]},
        {**measured, "other": ["0.1"]},
    ):
        record = healing_record(step.with_measured(broken))
        assert record is None or list(broken) == ["course"]
