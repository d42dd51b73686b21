"""States from a profile: those that it keeps, and its images noised anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_states import IMAGES, KINDS, STEPS, Given, profiled, profiled_kind, states_of
from conftest import make_pico

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay import states as states_of_fits
from ditmoe_cli.compression.replay.states import calibration_states, fitting_states
from ditmoe_cli.diffusion.forward_process import sampling_schedule
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration, profiled_spec


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled_kind(request.param, tmp_path_factory.mktemp("states"))


def test_stored_states_come_first_and_few_are_a_choice_of_them(case: Given) -> None:
    stored = case[1].tensor("states.z")
    everything = states_of(case, len(stored))
    assert torch.equal(everything.z, stored)
    few = states_of(case, 5)
    assert len(few) == 5
    assert all(any(torch.equal(z, other) for other in stored) for z in few.z)


def test_further_states_are_the_images_noised_to_the_samplers_times(case: Given) -> None:
    checkpoint, profile = case
    stored, count = len(profile.tensor("states.z")), 3 * IMAGES * STEPS
    states = states_of(case, stored + count)
    final = profile.tensor("image.final")
    noise = image_noise(3, range(count), torch.device("cpu"), "refit").draw(final.shape[1:])
    rf = checkpoint.config.sampler == "rf"
    schedule = None if rf else sampling_schedule("ddim", STEPS)
    times = [i / STEPS for i in range(1, STEPS + 1)] if schedule is None else list(schedule.timesteps)
    seen = set()
    for n in range(count):
        image, t = int(states.images[stored + n]), float(states.t[stored + n])
        assert image == n % IMAGES and int(states.labels[stored + n]) == image % 2
        step = min(range(STEPS), key=lambda s: abs(times[s] - t))
        assert times[step] == pytest.approx(t)
        seen.add((image, step))
        if schedule is None:
            expected = (1 - t) * final[image] + t * noise[n]
        else:
            kept = float(schedule.alphas_bar[step])
            expected = kept**0.5 * final[image] + (1 - kept) ** 0.5 * noise[n]
        torch.testing.assert_close(states.z[stored + n], expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == IMAGES * STEPS, "every image at every time"


def test_whole_images_are_held_out(case: Given) -> None:
    states = states_of(case, 150)
    held, others = (set(states.images[mine].tolist()) for mine in (states.held, ~states.held))
    assert held == {7} and not held & others
    assert states.branch_weights == ((1.0,) if case[0].config.sampler == "rf" else (4.0, 1.0))


def test_a_profile_without_states_says_what_to_do(tmp_path: Path) -> None:
    checkpoint, profile = profiled(make_pico(sampler="rf", in_channels=1), "euler", 1.0, tmp_path, fast=True)
    with pytest.raises(BadInputError, match="without fast"):
        calibration_states(profile, profiled_spec(profile.calibration, checkpoint), 10)


def test_a_profile_without_a_reservoir_says_so_too(tmp_path: Path) -> None:
    checkpoint, profile = profiled(make_pico(sampler="rf", in_channels=1), "euler", 1.0, tmp_path, reservoir=0)
    with pytest.raises(BadInputError, match="with a reservoir"):
        calibration_states(profile, profiled_spec(profile.calibration, checkpoint), 10)


def test_noise_of_states_is_their_own(case: Given) -> None:
    """Neither that of calibration nor that of evaluated images, and no state has that of another."""
    profile = case[1]
    stored, count = len(profile.tensor("states.z")), IMAGES * STEPS
    states = states_of(case, stored + count)
    fresh = states.z[stored:][states.t[stored:] == states.t[stored:].max()].flatten(1)
    assert len(fresh) == IMAGES
    shape = profile.tensor("image.final").shape[1:]
    others = [
        image_noise(3, range(count), torch.device("cpu"), purpose).draw(shape).flatten(1)
        for purpose in ("image", "calibration")
    ]
    known = torch.cat([fresh, *others])
    alike = torch.corrcoef(known)[: len(fresh)].fill_diagonal_(0)
    assert float(alike.abs().max()) < 0.9


def test_all_that_follows_from_the_profile_is_the_same_again(case: Given) -> None:
    torch.manual_seed(1)
    first = states_of(case, 90)
    torch.manual_seed(2)
    second = states_of(case, 90)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("z", "t", "labels", "held"))


@pytest.mark.parametrize(("images", "held"), [(1, {0}), (3, {2}), (7, {6}), (8, {7}), (16, {7, 15})])
def test_an_eighth_of_the_images_or_the_last_is_held_out(images: int, held: set[int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico(sampler="rf", in_channels=1, depth=1).save(tmp_path / "a.safetensors"))
    spec = SampleSpec(images, 2, 1.0, 3, "euler", (0, 1))
    profile = calibrate(checkpoint, Calibration(spec, 1, 10**4), Run("cpu"), tmp_path / "p.safetensors", force=True)
    assert profile is not None
    states = calibration_states(profile, spec, 3 * images)
    assert set(states.images[states.held].tolist()) == held
    assert set(states.images[~states.held].tolist()) == set(range(images)) - held


@pytest.mark.parametrize(
    ("unknowns", "tokens", "taken"),
    [(10, 0, 20_480), (1_000, 0, 32_000), (10_000, 0, 65_536), (10_000, 512, 512), (1, 1, 16 * 4)],
)
def test_fits_take_tokens_for_their_unknowns(
    unknowns: int, tokens: int, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 for each here, within bounds, or as many as are asked for; never fewer than 16 states."""
    checkpoint, profile = profiled(make_pico(sampler="rf", in_channels=1, input_size=4), "euler", 1.0, tmp_path)
    assert checkpoint.config.num_patches == 4
    wanted = []
    monkeypatch.setattr(states_of_fits, "calibration_states", lambda *arguments: wanted.append(arguments[2]))
    fitting_states(Calibrated(checkpoint, profile, "cpu"), unknowns, 32, tokens)
    assert wanted == [taken // 4]
