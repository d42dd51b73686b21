"""Steps of a student in closed form, and paths of an original as a student of few steps follows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import make_pico
from torch import Tensor

from ditmoe_cli.compression.distill.distilling import STUDENT_SOLVER, TEACHER_SOLVER
from ditmoe_cli.compression.distill.teacher_paths import PURPOSE, Paths, StudentSteps, sampled_paths, student_steps
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.diffusion.forward_process import respaced_schedule, sampling_schedule
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.predictor import Predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import Solver, evaluation_times, flow_times, trailing_timesteps
from ditmoe_cli.diffusion.solvers import ddim, euler
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.model.config import Sampler
from ditmoe_cli.model.dit import DiTMoE

CPU = torch.device("cpu")
FAMILIES: tuple[Sampler, ...] = ("rf", "ddpm")
SHAPE = (4, 8, 8)


def noise(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def model_of(family: Sampler, **shape: object) -> DiTMoE:
    return make_pico(sampler=family, **shape).model()  # type: ignore[arg-type]


def predictor(model: DiTMoE, labels: Tensor) -> Predictor:
    return lambda x, t: model(x, torch.full((len(x),), float(t)), labels)


# closed forms


def test_steps_of_a_rectified_flow_are_eulers() -> None:
    few = student_steps("rf", 4, CPU)
    assert len(few) == 4
    assert few.times.tolist() == [1.0, 0.75, 0.5, 0.25] and few.times.tolist() == evaluation_times("euler", 4)
    assert few.keep.tolist() == [1.0] * 4 and few.gain.tolist() == [-0.25] * 4


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_steps_of_ddpm_weights_are_ddims_between_trailing_timesteps(steps: int) -> None:
    """By hand: a = √(ᾱ' / ᾱ), b = √(1 - ᾱ') - a √(1 - ᾱ), the last step ends at ᾱ' = 1."""
    few = student_steps("ddpm", steps, CPU)
    times = trailing_timesteps(steps)[::-1]
    assert few.times.tolist() == times == evaluation_times("ddim-trailing", steps) and times[0] == 999
    kept = [*respaced_schedule(list(range(1000))).alphas_bar[times].tolist(), 1.0]
    for i in range(steps):
        a = (kept[i + 1] / kept[i]) ** 0.5
        assert float(few.keep[i]) == pytest.approx(a, rel=1e-6)
        assert float(few.gain[i]) == pytest.approx((1 - kept[i + 1]) ** 0.5 - a * (1 - kept[i]) ** 0.5, rel=1e-6)
    assert all(part.dtype == torch.float32 for part in (few.times, few.keep, few.gain))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_true_prediction_leads_from_one_noise_level_to_the_next(family: Sampler) -> None:
    """Of one image x and noise ε: z = (1 - t) x + t ε and v = ε - x; or z = √ᾱ x + √(1 - ᾱ) ε, predicted ε."""
    few, x, eps = student_steps(family, 4, CPU), noise(4, 2).double(), noise(4).double()
    kept = [1 - t for t in (1.0, 0.75, 0.5, 0.25, 0.0)], [1.0, 0.75, 0.5, 0.25, 0.0]
    if family == "ddpm":
        schedule = sampling_schedule("ddim-trailing", 4)
        bars = [*schedule.alphas_bar.flip(0).tolist(), 1.0]
        kept = [bar**0.5 for bar in bars], [(1 - bar) ** 0.5 for bar in bars]
    states = torch.stack([a * x + s * eps for a, s in zip(*kept, strict=True)])
    step = torch.arange(4)
    here, after = states[step, step], states[step + 1, step]
    truth = eps - x if family == "rf" else eps
    torch.testing.assert_close(few.advanced(here, truth, step), after, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few.target(here, after, step), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_target_and_advanced_are_inverses(family: Sampler) -> None:
    few, step = student_steps(family, 5, CPU), torch.tensor([4, 0, 2, 2])
    z, prediction = noise(4), noise(4, 3)
    after = few.advanced(z, prediction, step)
    torch.testing.assert_close(few.target(z, after, step), prediction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few.advanced(z, few.target(z, after, step), step), after, rtol=1e-4, atol=1e-5)
    wide = torch.cat((prediction, 7 + prediction), dim=1)
    assert torch.equal(few.advanced(z, wide, step), after), "of a learned variance nothing is taken"
    each = [few.advanced(z[i : i + 1], prediction[i : i + 1], step[i : i + 1]) for i in range(4)]
    assert torch.equal(torch.cat(each), after), "each state takes its own step"


@pytest.mark.parametrize("learns_sigma", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 3, 4])
@torch.no_grad()
def test_a_chain_of_steps_is_the_solver(family: Sampler, steps: int, learns_sigma: bool) -> None:
    model, z, labels = model_of(family, learn_sigma=learns_sigma), noise(), torch.tensor([0, 2, 1])
    predict = predictor(model, labels)
    expected = (
        euler(predict, z, flow_times(steps))
        if family == "rf"
        else ddim(predict, z, sampling_schedule("ddim-trailing", steps))
    )
    few = student_steps(family, steps, CPU)
    for number in range(steps):
        here = torch.full((3,), number)
        z = few.advanced(z, model(z, few.times[here], labels), here)
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-4)


# paths


def spec_of(
    family: Sampler, images: int = 5, steps: int = 8, cfg: float = 1.0, solver: Solver | None = None
) -> SampleSpec:
    return SampleSpec(images, steps, cfg, 7, solver or TEACHER_SOLVER[family], (0, 2))


@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_are_from_the_samplers_noise_to_its_images(family: Sampler, cfg: float) -> None:
    model, spec = model_of(family), spec_of(family, cfg=cfg)
    paths = sampled_paths(model, spec, 4, FittingBatches(2))
    assert len(paths) == 5 and paths.z.shape == (5, 5, *SHAPE) and paths.z.dtype == torch.float32
    assert paths.labels.tolist() == [0, 2, 0, 2, 0]
    first = image_noise(7, range(5), CPU, PURPOSE).draw(SHAPE)
    torch.testing.assert_close(paths.z[:, 0], first)
    torch.testing.assert_close(
        paths.z[:, -1], sample_batch(model, spec, range(5), purpose=PURPOSE), rtol=1e-4, atol=1e-5
    )
    whole = sampled_paths(model, spec, 4, FittingBatches(256))
    torch.testing.assert_close(paths.z, whole.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [1, 2, 4, 8])
def test_the_states_that_are_kept_are_those_that_the_solver_passed(family: Sampler, kept: int) -> None:
    model, spec = model_of(family), spec_of(family)
    passed: dict[float, Tensor] = {}

    def through(predict: Predictor) -> Predictor:
        def seen(x: Tensor, t: float) -> Tensor:
            passed[t] = x.clone()  # the last time that a solver asks there, it is at its state
            return predict(x, t)

        return seen

    image = sample_batch(model, spec, range(5), Watchers(through=through), PURPOSE)
    every = torch.stack([*passed.values(), image], dim=1)
    paths = sampled_paths(model, spec, kept, FittingBatches(256))
    assert torch.equal(paths.z, every[:, :: 8 // kept])
    for fewer in (count for count in (1, 2, 4) if kept % count == 0):
        assert torch.equal(paths.in_steps(fewer).z, every[:, :: 8 // fewer])
        assert torch.equal(paths.in_steps(fewer).labels, paths.labels)


def test_some_of_the_paths() -> None:
    paths = Paths(torch.arange(12.0).reshape(4, 3, 1, 1, 1), torch.arange(4))
    assert paths.at(slice(1, 3)).labels.tolist() == [1, 2]
    assert paths.at(torch.tensor([3, 0])).z.flatten().tolist() == [9, 10, 11, 0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_along_its_own_solvers_paths_a_teacher_predicts_the_targets(family: Sampler) -> None:
    """A teacher that takes the student's steps: its predictions are the targets."""
    model = model_of(family)
    paths = sampled_paths(model, spec_of(family, steps=4, solver=STUDENT_SOLVER[family]), 4, FittingBatches(256))
    few: StudentSteps = student_steps(family, 4, CPU)
    target: Callable[[int], Tensor] = lambda i: few.target(paths.z[:, i], paths.z[:, i + 1], torch.full((5,), i))  # noqa: E731
    for i in range(4):
        with torch.no_grad():
            predicted = model(paths.z[:, i], few.times[i].repeat(5), paths.labels)[:, : SHAPE[0]]
        torch.testing.assert_close(target(i), predicted, rtol=1e-3, atol=2e-3)
