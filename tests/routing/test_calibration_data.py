"""Images given for calibration: read, checked, and noised as training would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pico
from PIL import Image
from safetensors.numpy import save_file

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.calibration_data import read_data

PicoFactory = Callable[..., Pico]


def images_npz(path: Path, **changes: Any) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        "arr_0": generator.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8),
        "labels": np.array([2, 0, 1, 2, 0, 1]),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_pixels_become_what_the_model_is_trained_on(tmp_path: Path, pico: PicoFactory) -> None:
    extremes = np.zeros((2, 8, 8, 1), np.uint8)
    extremes[1] = 255
    path = images_npz(tmp_path / "a.npz", arr_0=extremes, labels=np.array([1, 0]))
    data = read_data(path, pico(in_channels=1, input_size=8).config, images=10)
    assert data.clean.shape == (2, 1, 8, 8)
    assert data.clean[0].unique().tolist() == [-1.0]
    assert data.clean[1].unique().tolist() == [1.0]
    assert data.labels == (1, 0)


def test_the_first_images_are_taken_and_the_digest_is_of_the_whole_file(tmp_path: Path, pico: PicoFactory) -> None:
    config = pico(in_channels=1, input_size=8).config
    path = images_npz(tmp_path / "a.npz")
    few, all_of_them = read_data(path, config, 2), read_data(path, config, 6)
    assert few.labels == (2, 0)
    assert few.digest == all_of_them.digest
    assert (few.clean == all_of_them.clean[:2]).all()


def test_latents_are_taken_as_they_are(tmp_path: Path, pico: PicoFactory) -> None:
    latents = np.random.default_rng(1).normal(size=(3, 4, 8, 8)).astype(np.float32)
    path = tmp_path / "latents.safetensors"
    save_file({"latents": latents, "labels": np.array([0, 1, 2])}, path)
    data = read_data(path, pico(in_channels=4, input_size=8).config, 3)
    np.testing.assert_array_equal(data.clean.numpy(), latents)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": np.array([0, 1, 2, 9, 0, 1])}, "holds label 9"),
        ({"arr_0": np.zeros((6, 16, 16, 1), np.uint8)}, r"the model takes \(1, 8, 8\)"),
        ({"arr_0": np.zeros((6, 8, 8, 3), np.uint8)}, r"images are \(3, 8, 8\)"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    tmp_path: Path, pico: PicoFactory, changes: dict[str, Any], said: str
) -> None:
    path = images_npz(tmp_path / "a.npz", **changes)
    with pytest.raises(BadInputError, match=said):
        read_data(path, pico(in_channels=1, input_size=8, num_classes=3).config, 6)


def test_unlabelled_images_get_the_null_class(tmp_path: Path, pico: PicoFactory) -> None:
    config = pico(in_channels=1, input_size=8, num_classes=3).config
    assert read_data(images_npz(tmp_path / "a.npz", labels=None), config, 4).labels == (3, 3, 3, 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 100 * i, np.uint8)).save(folder / f"{i}.png")
    data = read_data(folder, config, 2)
    assert data.labels == (3, 3)
    assert data.clean.shape == (2, 1, 8, 8)


def test_missing_data_and_pixels_for_a_latent_model_are_refused(tmp_path: Path, pico: PicoFactory) -> None:
    config = pico(in_channels=4, input_size=8).config
    with pytest.raises(BadInputError, match="no such file"):
        read_data(tmp_path / "absent.npz", config, 4)
    pixels = tmp_path / "pixels.safetensors"
    save_file({"images": np.zeros((2, 8, 8, 3), np.uint8)}, pixels)
    with pytest.raises(BadInputError, match="holds no latents"):
        read_data(pixels, config, 4)


def test_a_model_without_a_null_class_needs_labels(tmp_path: Path, pico: PicoFactory) -> None:
    config = pico(in_channels=1, input_size=8, null_class=False).config
    assert read_data(images_npz(tmp_path / "a.npz"), config, 6).labels == (2, 0, 1, 2, 0, 1)
    with pytest.raises(BadInputError, match=r"no labels.*no null class"):
        read_data(images_npz(tmp_path / "b.npz", labels=None), config, 6)
    with pytest.raises(BadInputError, match=r"label 3; the model has classes 0 to 2$"):
        read_data(images_npz(tmp_path / "c.npz", labels=np.full(6, 3)), config, 6)
