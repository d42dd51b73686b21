"""The layout of a distilled checkpoint, and what its history keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from healing import pair

from ditmoe_cli.compression.apply import write_planned
from ditmoe_cli.compression.distill.distilled_output import DistillingRecord, distilled_output, distilling_record
from ditmoe_cli.compression.distill.distilling import Distilling
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.files.reader import tensor_bytes
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import open_checkpoint

ASKED = Distilling("f" * 64, minutes=None, iterations=5, cfg=1.5)
RECORD = DistillingRecord(12_345, 678_901, (0.1234567, 3e-7, 2.5, 1e-120), (0.01, 1e300, 0.0, 0.04))
TRAINED = ("blocks.0.moe.gate.weight", "final_layer.linear.bias")


def test_bytes_are_known_before_anything_is_measured(tmp_path: Path) -> None:
    _, path = pair(tmp_path)
    student, target = open_checkpoint(path), Output(tmp_path / "d.safetensors")
    predicted = distilled_output(student, TRAINED, "request", ASKED, None).predicted_bytes(target)
    values = {name: student.finite_tensor(name) + 1 for name in TRAINED}
    planned = distilled_output(student, TRAINED, "request", ASKED, RECORD)
    written = write_planned(student, planned, target, lambda name: tensor_bytes(values[name]))
    assert written == predicted == target.path.stat().st_size

    few = open_checkpoint(target.path)
    assert list(few.header.tensors) == list(student.header.tensors)
    for name in student.header.tensors:
        assert torch.equal(few.finite_tensor(name), student.finite_tensor(name) + (1 if name in TRAINED else 0))
    assert few.distilled == ASKED.distilled("rf")
    (step,) = few.provenance().history
    assert (step.command, step.source, step.request) == ("distill", student.fingerprint, "request")
    assert step.options == ASKED.options() == {"original": "f" * 64, "iterations": 5, "cfg": 1.5}
    assert step.calibration is None


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_record_has_the_bytes_of_none_for_any_steps(steps: int, tmp_path: Path) -> None:
    student, target = open_checkpoint(pair(tmp_path)[1]), Output(tmp_path / "d.safetensors")
    asked = replace(ASKED, steps=steps)
    done = DistillingRecord(16, 5, (0.5,) * steps, (float("inf"),) * steps)
    sizes = {distilled_output(student, TRAINED, "r", asked, each).predicted_bytes(target) for each in (None, done)}
    assert len(sizes) == 1


def test_a_record_comes_back_from_the_texts_of_a_history(tmp_path: Path) -> None:
    student = open_checkpoint(pair(tmp_path)[1])
    step = distilled_output(student, TRAINED, "request", ASKED, RECORD).provenance.history[-1]
    found = distilling_record(step)
    assert found is not None and (found.paths, found.iterations) == (12_345, 678_901)
    assert found.before == pytest.approx((0.1234567, 3e-7, 2.5, 0.0), rel=1e-3)
    assert found.after == pytest.approx((0.01, float("inf"), 0.0, 0.04), rel=1e-3)
    assert found.held_error == (found.before[-1], found.after[-1]) == (0.0, 0.04)
    assert found.to_json() == {
        "paths": 12_345,
        "iterations": 678_901,
        "held_error": [0.0, 0.04],
        "path_error_before": list(found.before),
        "path_error_after": list(found.after),
        "clock": [],
    }
    assert DistillingRecord().held_error == (0.0, 0.0)


GOOD: dict[str, Any] = {
    "course": ["16", "5"],
    "path_error_before": ["0.1", "0.2"],
    "path_error_after": ["0.1", "0.1"],
}


def test_what_another_program_wrote_into_a_history_is_no_record() -> None:
    step = Step("distill", "source", "plan", measured=GOOD)
    assert distilling_record(step) == DistillingRecord(16, 5, (0.1, 0.2), (0.1, 0.1))
    assert distilling_record(replace(step, command="heal")) is None
    for broken in (
        {},
        {"course": GOOD["course"]},
        *({name: value for name, value in GOOD.items() if name != left_out} for left_out in GOOD),
        {**GOOD, "course": ["1.5", "2"]},
        {**GOOD, "course": ["1"]},
        {**GOOD, "course": ["1", "2", "3"]},
        {**GOOD, "course": []},
        {**GOOD, "path_error_before": ["0.1"]},
        {**GOOD, "path_error_after": ["0.1", "x"]},
        {**GOOD, "path_error_before": [], "path_error_after": []},
    ):
        assert distilling_record(step.with_measured(broken)) is None, broken
