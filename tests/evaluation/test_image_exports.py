"""Exported images read back as they were, are written whole or not at all, and never over other files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.evaluation import image_exports
from ditmoe_cli.evaluation.image_exports import write_adm_npz, write_png_folder
from ditmoe_cli.evaluation.images import read_images


def random(count: int, channels: int = 3, height: int = 5, width: int = 7) -> NDArray[np.uint8]:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_folder_comes_back_as_it_was(tmp_path: Path, channels: int, mode: str) -> None:
    images = random(12, channels)
    size = write_png_folder(tmp_path / "out", images)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [f"{i:06d}.png" for i in range(12)]
    assert (read_images(tmp_path / "out").images == images).all()
    assert size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    for file in (tmp_path / "out").iterdir():
        with Image.open(file) as image:
            assert (image.format, image.mode) == ("PNG", mode)


def test_names_take_the_digits_of_the_last_one_so_that_they_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_exports, "DIGITS", 1)
    write_png_folder(tmp_path / "out", random(11))
    assert names(tmp_path / "out") == [f"{i:02d}.png" for i in range(11)]
    assert (read_images(tmp_path / "out").images == random(11)).all()


def test_an_empty_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_png_folder(tmp_path / "out", random(2))
    assert names(tmp_path / "out") == ["000000.png", "000001.png"]


def test_force_replaces_all_that_an_earlier_run_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_png_folder(out, random(3))
    with pytest.raises(OutputExistsError, match="force"):
        write_png_folder(out, random(2))
    assert (read_images(out).images == random(3)).all()
    write_png_folder(out, random(2), force=True)
    assert names(out) == ["000000.png", "000001.png"]
    assert (read_images(out).images == random(2)).all()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("other", ["notes.txt", "cat.png", "000001.jpg", "00001.png", ".hidden", "config.json", "sub/"])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_stays(tmp_path: Path, other: str, force: bool) -> None:
    out = tmp_path / "out"
    write_png_folder(out, random(1))
    if other.endswith("/"):
        (out / other).mkdir()
    else:
        (out / other).write_text("other")
    before = names(out)
    with pytest.raises(OutputExistsError, match=other.strip("/") if force else "force"):
        write_png_folder(out, random(2), force=force)
    assert names(out) == before
    assert (np.asarray(Image.open(out / "000000.png")) == random(1)[0]).all()


@pytest.mark.parametrize("force", [False, True])
def test_inputs_and_links_are_no_targets(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "in"
    write_png_folder(out, random(2))
    for inputs in ([out], [out / "000001.png"]):
        with pytest.raises(OutputExistsError, match="is the input itself"):
            write_png_folder(out, random(1), force=force, inputs=inputs)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputExistsError, match="symbolic link"):
        write_png_folder(tmp_path / "link", random(1), force=force)
    assert names(out) == ["000000.png", "000001.png"]
    assert names(tmp_path / "empty") == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["nothing", "empty", "old"])
def test_a_failure_midway_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], before: str
) -> None:
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    elif before == "old":
        write_png_folder(out, random(2))
    save, saved = Image.Image.save, []

    def failing(image: Image.Image, path: Path, **options: Any) -> None:
        if len(saved) == 3:
            raise error("disk full")
        saved.append(path)
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(error):
        write_png_folder(out, random(5), force=before == "old")
    assert len(saved) == 3
    assert names(tmp_path) == ([] if before == "nothing" else ["out"])
    if before == "empty":
        assert names(out) == []
    elif before == "old":
        assert (read_images(out).images == random(2)).all()


def test_what_appears_meanwhile_in_an_empty_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save = Image.Image.save

    def meddling(image: Image.Image, path: Path, **options: Any) -> None:
        (out / "000000.png").write_text("of another process")
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", meddling)
    with pytest.raises(OutputExistsError, match=r"000000\.png"):
        write_png_folder(out, random(2))
    assert (out / "000000.png").read_text() == "of another process"
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------ npz


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_is_what_adm_reads(tmp_path: Path, channels: int) -> None:
    images, labels = random(4, channels), np.arange(4, dtype=np.int64)
    size = write_adm_npz(tmp_path / "a.npz", images, labels)
    assert (tmp_path / "a.npz").stat().st_size == size
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.uint8, (4, 5, 7, 3))
        assert (archive["arr_0"] == images).all(), "grey in each of three channels"
        assert archive["arr_1"].dtype == np.int64
        assert (archive["arr_1"] == labels).all()
    with zipfile.ZipFile(tmp_path / "a.npz") as members:
        assert {member.compress_type for member in members.infolist()} == {zipfile.ZIP_STORED}
    assert (read_images(tmp_path / "a.npz").images == images).all()


def test_npz_without_labels(tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "a.npz", random(2))
    write_adm_npz(tmp_path / "b.npz", random(2))
    with np.load(tmp_path / "a.npz") as archive:
        assert archive.files == ["arr_0"]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes(), "equal images, equal bytes"


def test_npz_over_something(tmp_path: Path) -> None:
    target = tmp_path / "a.npz"
    target.write_bytes(b"other")
    with pytest.raises(OutputExistsError, match="force"):
        write_adm_npz(target, random(2))
    with pytest.raises(OutputExistsError, match="is the input itself"):
        write_adm_npz(target, random(2), force=True, inputs=[target])
    assert target.read_bytes() == b"other"
    write_adm_npz(target, random(2), force=True)
    assert (read_images(target).images == random(2)).all()


def test_an_npz_cut_off_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", failing)
    with pytest.raises(OSError, match="disk full"):
        write_adm_npz(tmp_path / "a.npz", random(2))
    assert names(tmp_path) == []


Writer = Callable[[Path, Any], Any]


@pytest.mark.parametrize("write", [write_png_folder, write_adm_npz])
@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_other_arrays_are_refused(tmp_path: Path, write: Writer, images: NDArray[Any]) -> None:
    with pytest.raises(BadInputError):
        write(tmp_path / "out", images)
    assert names(tmp_path) == []


def test_labels_must_be_one_for_each(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="labels"):
        write_adm_npz(tmp_path / "a.npz", random(3), np.arange(2, dtype=np.int64))
