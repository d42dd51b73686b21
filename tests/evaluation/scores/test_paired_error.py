"""Paired errors: closed forms, exactness, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.scores.paired_error import paired_error


def random_images(shape, seed):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_equal_images_have_no_error_and_no_psnr():
    images = random_images((3, 4, 4, 1), 0)
    got = paired_error(images, images.copy(), 255)
    assert (got.mse, got.psnr, got.max_abs, got.n) == (0.0, None, 0.0, 3)


def test_a_constant_offset_in_both_directions():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 10
    b[1] -= 20
    got = paired_error(a, b, 255)
    assert got.mse == pytest.approx((100 + 400) / 2, rel=1e-15)
    assert got.max_abs == 20
    assert got.psnr == pytest.approx(20 * np.log10(255) - 10 * np.log10(250), rel=1e-14)


def test_black_against_white_on_sixteen_levels():
    got = paired_error(np.zeros((1, 8, 8, 1), np.uint8), np.full((1, 8, 8, 1), 255, np.uint8), 16)
    assert (got.mse, got.max_abs) == (256.0, 16.0)
    assert got.psnr == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("levels", [1, 16, 255])
def test_float64_reference_over_several_chunks(levels):
    a, b = random_images((150, 4, 5, 3), 1), random_images((150, 4, 5, 3), 2)
    difference = (a.astype(np.float64) - b) / 255 * levels
    got = paired_error(a, b, levels)
    assert got.mse == pytest.approx((difference**2).mean(), rel=1e-13)
    assert got.max_abs == pytest.approx(np.abs(difference).max(), rel=1e-14)
    assert got.psnr == pytest.approx(10 * np.log10(levels**2 / (difference**2).mean()), rel=1e-13)
    assert got.n == 150


def test_order_of_images_and_of_arguments_changes_nothing():
    a, b = random_images((100, 3, 3, 1), 1), random_images((100, 3, 3, 1), 2)
    order = np.random.default_rng(0).permutation(100)
    assert paired_error(a, b, 16) == paired_error(b[order], a[order], 16)


def test_what_is_refused():
    a = random_images((2, 4, 4, 1), 0)
    with pytest.raises(BadInputError, match=r"\(2, 4, 4, 1\) and \(1, 4, 4, 1\) cannot be paired"):
        paired_error(a, a[:1], 255)
    with pytest.raises(BadInputError, match=r"second images are float32 \(2, 4, 4, 1\)"):
        paired_error(a, a.astype(np.float32), 255)
    with pytest.raises(BadInputError, match=r"first images are uint8 \(4, 4, 1\)"):
        paired_error(a[0], a[0], 255)
    with pytest.raises(BadInputError, match="first images are uint8"):
        paired_error(a[:0], a[:0], 255)
