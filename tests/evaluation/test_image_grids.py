"""Grids of images: the place and size of each image, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.evaluation.image_grids import (
    INNER,
    MOST_IN_GRID,
    MOST_PAIRS,
    OUTER,
    SIDE_STRIP,
    STRIP,
    enlarged,
    pair_grid,
    sample_grid,
    write_png,
)


def numbered(count: int, side: int = 8, channels: int = 1, offset: int = 0) -> np.ndarray:
    """Return images of one grey each, by index."""
    grey = (np.arange(count) * 2 + offset).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, side, side, channels)).copy()


@pytest.mark.parametrize(("side", "shown"), [(1, 64), (8, 64), (28, 84), (63, 126), (64, 64), (256, 256)])
def test_images_are_enlarged_to_64_pixels_by_a_whole_factor(side: int, shown: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    large = enlarged(images)
    assert large.shape == (2, shown, shown, 3)
    factor = shown // side
    assert (large[:, ::factor, ::factor] == images).all()
    assert (large[:, factor - 1 :: factor, factor - 1 :: factor] == images).all(), "nearest neighbour"


@pytest.mark.parametrize(
    ("count", "across", "down"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (64, 8, 8), (99, 8, 8)]
)
def test_pairs_stand_in_reading_order_a_left_b_right(count: int, across: int, down: int) -> None:
    picture = pair_grid(numbered(count), numbered(count, offset=1))
    step_down, step_across = 64 + OUTER, 2 * 64 + INNER + OUTER
    assert picture.shape == (down * step_down + OUTER, across * step_across + OUTER, 1)
    for index in range(min(count, MOST_PAIRS)):
        top, left = OUTER + index // across * step_down, OUTER + index % across * step_across
        assert (picture[top : top + 64, left : left + 64] == 2 * index).all()
        assert (picture[top : top + 64, left + 64 + INNER : left + 128 + INNER] == 2 * index + 1).all()
    shown = min(count, MOST_PAIRS)
    assert (picture == 255).sum() == picture.size - shown * 2 * 64 * 64, "white all around"


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_the_file_is_png_and_equal_for_equal_images(channels: int, mode: str, tmp_path: Path) -> None:
    picture = pair_grid(numbered(3, channels=channels), numbered(3, channels=channels, offset=1))
    size = write_png(tmp_path / "a.png", picture)
    write_png(tmp_path / "b.png", picture)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size == size
    with Image.open(tmp_path / "a.png") as image:
        assert (image.format, image.mode) == ("PNG", mode)
        assert (np.asarray(image).reshape(picture.shape) == picture).all()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    target, picture = tmp_path / "a.png", pair_grid(numbered(1), numbered(1))
    target.write_bytes(b"other")
    with pytest.raises(OutputExistsError):
        write_png(target, picture)
    with pytest.raises(OutputExistsError, match="is the input itself"):
        write_png(target, picture, force=True, inputs=[target])
    assert target.read_bytes() == b"other"
    write_png(target, picture, force=True)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_what_makes_no_pairs() -> None:
    images = numbered(2)
    for a, b in ((images, images[:1]), (images[0], images[0]), (images[:0], images[:0])):
        with pytest.raises(BadInputError, match="make no pairs"):
            pair_grid(a, b)


@pytest.mark.parametrize(("count", "channels"), [(1, 3), (2, 1), (5, 1), (9, 3), (70, 1)])
def test_samples_stand_in_reading_order_on_white(count: int, channels: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 16, 32, channels), dtype=np.uint8)
    picture = sample_grid(images)
    shown = min(count, MOST_IN_GRID)
    across = (picture.shape[1] - INNER) // (128 + INNER)
    down = (picture.shape[0] - INNER) // (64 + INNER)
    assert picture.shape == (down * (64 + INNER) + INNER, across * (128 + INNER) + INNER, channels)
    assert 0 <= across - down <= 1
    assert across * (down - 1) < shown <= across * down
    outside = np.ones(picture.shape[:2], dtype=bool)
    for index in range(shown):
        top, left = (INNER + index // across * (64 + INNER)), (INNER + index % across * (128 + INNER))
        cell = (slice(top, top + 64), slice(left, left + 128))
        assert (picture[cell] == images[index].repeat(4, axis=0).repeat(4, axis=1)).all()
        outside[cell] = False
    assert (picture[outside] == 255).all()


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_a_grid_of_other_arrays_is_refused(images: np.ndarray) -> None:
    with pytest.raises(BadInputError):
        sample_grid(images)


def test_classes_in_turn_make_columns_with_marks() -> None:
    images = np.random.default_rng(0).integers(0, 200, (25, 8, 8, 1), dtype=np.uint8)
    picture = sample_grid(images, [0, 3, 7] * 8 + [0])
    across, down, step = 3, 9, 64 + INNER
    assert picture.shape == (STRIP + down * step + INNER, SIDE_STRIP + across * step + INNER, 1)
    for index in range(25):
        top, left = STRIP + INNER + index // across * step, SIDE_STRIP + INNER + index % across * step
        assert (picture[top : top + 64, left : left + 64] == enlarged(images)[index]).all(), "marks stand beside images"
    heads = [picture[:STRIP, SIDE_STRIP + INNER + column * step :][:, :64] for column in range(across)]
    assert all((head < 128).any() for head in heads)
    assert len({head.tobytes() for head in heads}) == 3
    sides = [picture[STRIP + INNER + row * step :][:64, :SIDE_STRIP] for row in range(down)]
    assert len({side.tobytes() for side in sides}) == down, "each row has the number of its first image"


def test_other_orders_of_classes_stand_above_each_image() -> None:
    images = np.random.default_rng(0).integers(0, 200, (9, 8, 8, 3), dtype=np.uint8)
    picture = sample_grid(images, [5, 1, 900, 4, 4, 2, 0, 3, 11])
    step_down, step = 64 + STRIP, 64 + INNER
    assert picture.shape == (3 * step_down + INNER, SIDE_STRIP + 3 * step + INNER, 3)
    for index in range(9):
        top, left = STRIP + index // 3 * step_down, SIDE_STRIP + INNER + index % 3 * step
        assert (picture[top : top + 64, left : left + 64] == enlarged(images)[index]).all()
        assert (picture[top - STRIP + INNER : top, left : left + 64] < 128).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_are_marked_beside_their_images(channels: int) -> None:
    a = np.random.default_rng(0).integers(0, 200, (5, 8, 8, channels), dtype=np.uint8)
    plain, marked = pair_grid(a, a), pair_grid(a, a, [0, 1, 2, 3, 4])
    assert plain.shape == marked.shape
    assert (marked[plain < 200] == plain[plain < 200]).all(), "no mark covers an image"
    assert (marked[:OUTER, OUTER : OUTER + 64] < 128).any()
    a_mark, b_mark = (marked[:OUTER, OUTER + side * (64 + INNER) :][:, :64] for side in range(2))
    assert not np.array_equal(a_mark, b_mark)
