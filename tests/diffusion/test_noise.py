"""Noise belongs to the image: a function of seed and index alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.diffusion.noise import image_noise, image_seed

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)
INDICES = st.lists(st.integers(0, 10**6), min_size=1, max_size=6)


@given(seed=st.integers(0, 2**64), indices=INDICES)
def test_an_images_noise_does_not_depend_on_its_batch(seed: int, indices: list[int]) -> None:
    together = image_noise(seed, indices, CPU)
    first, second = together.draw(SHAPE), together.draw(SHAPE)
    for position, index in enumerate(indices):
        alone = image_noise(seed, [index], CPU)
        assert torch.equal(alone.draw(SHAPE)[0], first[position])
        assert torch.equal(alone.draw(SHAPE)[0], second[position])


def test_draws_seeds_images_and_purposes_differ() -> None:
    stream = image_noise(0, [0, 1], CPU)
    draws = [*stream.draw(SHAPE), *stream.draw(SHAPE), *image_noise(1, [0], CPU).draw(SHAPE)]
    draws += [*image_noise(0, [0], CPU, "profile").draw(SHAPE)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


@given(seed=st.integers(0, 10**6), index=st.integers(0, 10**6))
def test_seeds_fit_torch_and_do_not_collide_across_seed_and_index(seed: int, index: int) -> None:
    value = image_seed(seed, index)
    assert 0 <= value < 2**63
    assert value != image_seed(seed, index + 1)
    assert value != image_seed(seed + 1, index)
    assert value != image_seed(int(f"1{seed}"), index)
    assert image_seed(1, 23) != image_seed(12, 3)


def test_seeds_are_these_for_ever() -> None:
    """Numbers in files refer to them: they may not change between versions or machines."""
    assert image_seed(0, 0) == 5581580776828162119
    assert image_seed(5, 123, "profile") == 8165941769154076221


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    image_noise(0, [0, 1], CPU).draw(SHAPE)
    assert torch.equal(torch.randn(4), expected)


def test_noise_is_standard_normal_within_and_across_images() -> None:
    drawn = image_noise(0, range(400), CPU).draw((4, 8, 8))
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    first = drawn[:, 0, 0, 0]
    assert abs(float(first.mean())) < 0.2
    assert abs(float(first.std()) - 1) < 0.15
    assert abs(float((first[1:] * first[:-1]).mean())) < 0.2, "neighbours are independent"
