"""Structural similarity: closed forms, a direct evaluation of its definition, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.scores.ssim import K1, K2, gaussian_window, smooth, ssim, window_size


def random_images(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def directly(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """One grey image pair (H, W), window by window, from the definition."""
    side = min(11, min(a.shape) - (min(a.shape) + 1) % 2)
    d = np.arange(side) - side // 2
    w = np.exp(-(d[:, None] ** 2 + d[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for top in range(a.shape[0] - side + 1):
        for left in range(a.shape[1] - side + 1):
            x, y = (i[top : top + side, left : left + side].astype(float) for i in (a, b))
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(3, 8, 8, 1), (20, 16, 13, 3), (1, 1, 5, 1), (2, 11, 12, 3)])
def test_equal_images_have_exactly_one(shape: tuple[int, ...]) -> None:
    images = random_images(shape, 0)
    assert (ssim(images, images.copy(), 255) == 1.0).all()


@pytest.mark.parametrize(("one", "other"), [(0, 255), (100, 120), (10, 0)])
def test_constant_images_leave_the_luminance_term(one: int, other: int) -> None:
    a, b = np.full((2, 16, 16, 3), one, np.uint8), np.full((2, 16, 16, 3), other, np.uint8)
    c1 = (K1 * 255) ** 2
    expected = (2 * one * other + c1) / (one**2 + other**2 + c1)
    np.testing.assert_allclose(ssim(a, b, 255), expected, rtol=1e-10)


def test_an_offset_leaves_the_structure_alone() -> None:
    """With equal means by construction, -a has covariance -var: the contrast term is (C₂ - 2σ²) / (C₂ + 2σ²)."""
    a = np.random.default_rng(0).normal(size=(1, 11, 11, 1))
    window = gaussian_window(11)
    a -= smooth(a, window)
    variance = float(smooth(a * a, window)[0, 0, 0, 0])
    c2 = (K2 * 2.0) ** 2
    assert ssim(a, -a, 2.0)[0] == pytest.approx((c2 - 2 * variance) / (c2 + 2 * variance), rel=1e-10)


@pytest.mark.parametrize("shape", [(4, 8, 8, 1), (2, 20, 14, 1), (1, 12, 12, 3)])
def test_the_definition_window_by_window(shape: tuple[int, ...]) -> None:
    a, b = random_images(shape, 1), random_images(shape, 2)
    expected = [
        np.mean([directly(x[..., c], y[..., c], 255) for c in range(shape[3])]) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b, 255), expected, rtol=1e-9)


def test_it_is_symmetric_and_independent_of_batch_and_scale() -> None:
    a, b = random_images((40, 9, 9, 1), 1), random_images((40, 9, 9, 1), 2)
    result = ssim(a, b, 255)
    np.testing.assert_allclose(ssim(b, a, 255), result, rtol=1e-13)
    assert (np.concatenate([ssim(a[i : i + 1], b[i : i + 1], 255) for i in range(40)]) == result).all()
    np.testing.assert_allclose(ssim(a * (16 / 255), b * (16 / 255), 16), result, rtol=1e-10)
    assert (result < 0.5).all(), "noise against noise has little in common"


def test_more_noise_is_less_similar() -> None:
    clean, noise = random_images((4, 32, 32, 1), 0).astype(float), np.random.default_rng(1).normal(size=(4, 32, 32, 1))
    result = [float(ssim(clean, clean + scale * noise, 255).mean()) for scale in (0, 1, 10, 50)]
    assert result == sorted(result, reverse=True)


@pytest.mark.parametrize(("side", "window"), [(1, 1), (2, 1), (3, 3), (8, 7), (10, 9), (11, 11), (12, 11), (256, 11)])
def test_the_window_shrinks_to_what_fits(side: int, window: int) -> None:
    assert window_size(side) == window


def test_the_window_is_a_normalised_gaussian() -> None:
    window = gaussian_window(11)
    assert window.sum() == pytest.approx(1, rel=1e-14)
    assert window[5] / window[6] == pytest.approx(np.exp(1 / (2 * 1.5**2)), rel=1e-12)
    assert (window == window[::-1]).all()
    assert gaussian_window(1).tolist() == [1.0]


def test_what_is_refused() -> None:
    a = random_images((2, 4, 4, 1), 0)
    for one, other in ((a, a[:1]), (a[0], a[0]), (a[:0], a[:0])):
        with pytest.raises(BadInputError, match="SSIM needs pairs of equal shape"):
            ssim(one, other, 255)
