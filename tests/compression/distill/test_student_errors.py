"""Errors of a student's steps: of each from the teacher's states, and of its own paths."""

from __future__ import annotations

import pytest
import torch
from cases import with_slow
from conftest import Pico, make_pico
from healing import changed
from torch import Tensor
from training import in_threads

from ditmoe_cli.compression.distill.distilling import STUDENT_SOLVER, TEACHER_SOLVER
from ditmoe_cli.compression.distill.student_errors import (
    PathErrors,
    mean_step_errors,
    own_states,
    path_errors,
    step_errors,
)
from ditmoe_cli.compression.distill.teacher_paths import Paths, sampled_paths, student_steps
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.config import Sampler

CPU = torch.device("cpu")
FAMILIES: tuple[Sampler, ...] = ("rf", "ddpm")
STEPS = 4


def original(family: Sampler) -> Pico:
    return make_pico(sampler=family, input_size=4, seed=2)


def paths_of(family: Sampler, own_solver: bool = False, images: int = 7) -> Paths:
    """Paths of an original, by its default solver in twice as many steps, or by the student's in as many."""
    solver = STUDENT_SOLVER[family] if own_solver else TEACHER_SOLVER[family]
    spec = SampleSpec(images, STEPS * (1 if own_solver else 2), 1.0, 3, solver, (0, 1, 2))
    return sampled_paths(original(family).model(), spec, STEPS, FittingBatches(256))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_sampled_as_its_own_student_has_no_error(family: Sampler) -> None:
    model, paths, few = original(family).model(), paths_of(family, own_solver=True), student_steps(family, STEPS, CPU)
    found = path_errors(model, few, paths, FittingBatches(3))
    assert len(found.by_step) == STEPS and max(found.by_step) < 1e-9
    other = path_errors(changed(original(family)).model(), few, paths, FittingBatches(3))
    assert min(other.by_step) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_errors_by_hand(family: Sampler) -> None:
    """Each path alone, step by step, by the definition."""
    student, paths, few = changed(original(family)).model(), paths_of(family), student_steps(family, STEPS, CPU)
    ours, theirs = torch.zeros(STEPS).double(), torch.zeros(STEPS).double()
    for path, label in zip(paths.z, paths.labels, strict=True):
        z = path[:1]
        for i in range(STEPS):
            out = student(z, few.times[i : i + 1], label[None])[:, : z.shape[1]]
            z = float(few.keep[i]) * z + float(few.gain[i]) * out
            ours[i] += (z - path[i + 1]).square().sum()
            theirs[i] += path[i + 1].square().sum()
    found = path_errors(student, few, paths, FittingBatches(3))
    assert list(found.by_step) == pytest.approx((ours / theirs).tolist(), rel=1e-4)
    assert found.image == found.by_step[-1]


@pytest.mark.parametrize("family", with_slow(FAMILIES))
def test_errors_are_the_same_in_any_batches_and_processes(family: Sampler) -> None:
    student, paths, few = changed(original(family)).model(), paths_of(family), student_steps(family, STEPS, CPU)
    whole = path_errors(student, few, paths, FittingBatches(100))
    for batch in (2, 7):
        assert path_errors(student, few, paths, FittingBatches(batch)).by_step == pytest.approx(whole.by_step, rel=1e-5)
    for world in (2, 9):  # of nine two have no path
        each = in_threads(world, lambda exchange: path_errors(student, few, paths, FittingBatches(2), exchange))
        assert all(found == each[0] for found in each), "all processes have the same bits"
        assert each[0].by_step == pytest.approx(whole.by_step, rel=1e-5)


def test_paths_of_zeros_are_judged_without_a_division_by_zero() -> None:
    student, few = original("rf").model(), student_steps("rf", STEPS, CPU)
    zeros = Paths(torch.zeros(2, STEPS + 1, 4, 4, 4), torch.tensor([0, 1]))
    assert all(0 < error < float("inf") for error in path_errors(student, few, zeros, FittingBatches(2)).by_step)
    assert PathErrors((0.5, 0.25)).image == 0.25


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_of_steps_have_gradients_and_are_those_of_the_target(family: Sampler) -> None:
    """‖z' - after‖² = b² ‖f - target‖²."""
    student, paths, few = changed(original(family)).model(), paths_of(family), student_steps(family, STEPS, CPU)
    student.requires_grad_(True)
    step = torch.tensor([0, 1, 2, 3, 3, 1, 0])
    rows = torch.arange(7)
    z, after = paths.z[rows, step], paths.z[rows, step + 1]
    errors = step_errors(student, few, z, after, paths.labels, step)
    assert errors.shape == (7,)
    out = student(z, few.times[step], paths.labels)[:, : z.shape[1]]
    gap = (out - few.target(z, after, step)).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(errors, few.gain[step].square() * gap, rtol=1e-3, atol=1e-5)
    errors.sum().backward()
    weight = student.get_parameter("blocks.0.moe.shared_experts.up_proj.weight")
    assert weight.grad is not None and float(weight.grad.abs().max()) > 0


@pytest.mark.parametrize("family", with_slow(FAMILIES))
def test_means_of_steps_are_those_of_all_paths_in_any_batches_and_processes(family: Sampler) -> None:
    student, paths, few = changed(original(family)).model(), paths_of(family), student_steps(family, STEPS, CPU)
    with torch.no_grad():
        expected = [
            float(step_errors(student, few, paths.z[:, i], paths.z[:, i + 1], paths.labels, torch.full((7,), i)).mean())
            for i in range(STEPS)
        ]
    for batch in (1, 3, 7):
        found = mean_step_errors(student, few, paths, FittingBatches(batch))
        assert found.tolist() == pytest.approx(expected, rel=1e-4) and not found.requires_grad
    for world in (2, 9):
        each = in_threads(world, lambda exchange: mean_step_errors(student, few, paths, FittingBatches(2), exchange))
        assert all(torch.equal(found, each[0]) for found in each)
        assert each[0].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_states_are_where_own_steps_lead(family: Sampler) -> None:
    student, paths, few = changed(original(family)).model(), paths_of(family), student_steps(family, STEPS, CPU)
    noise, labels = paths.z[:, 0], paths.labels
    with torch.no_grad():
        along, z = [noise], noise
        for i in range(STEPS):
            here = torch.full_like(labels, i)
            z = few.advanced(z, student(z, few.times[here], labels), here)
            along.append(z)
    for step in (torch.zeros(7, dtype=torch.long), torch.tensor([3, 0, 1, 2, 3, 3, 0]), torch.full((7,), 2)):
        found = own_states(student, few, noise, labels, step)
        expected = torch.stack([along[int(number)][row] for row, number in enumerate(step)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not found.requires_grad
    assert torch.equal(own_states(student, few, noise, labels, torch.zeros(7, dtype=torch.long)), noise)


def test_own_states_ask_no_more_than_they_have_to(monkeypatch: pytest.MonkeyPatch) -> None:
    student, few, asked = original("rf").model(), student_steps("rf", STEPS, CPU), list[int]()
    forward = type(student).forward

    def counted(self: object, x: Tensor, *more: Tensor) -> Tensor:
        asked.append(len(x))
        return forward(self, x, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(type(student), "forward", counted)
    own_states(student, few, torch.randn(4, 4, 4, 4), torch.zeros(4, dtype=torch.long), torch.tensor([0, 1, 3, 1]))
    assert asked == [3, 1, 1]
    nothing = own_states(student, few, torch.zeros(0, 4, 4, 4), torch.zeros(0).long(), torch.zeros(0).long())
    assert len(nothing) == 0 and len(asked) == 3
