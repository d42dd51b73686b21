"""Image sets are read back as written; other files are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.evaluation.images import ImageSet, kind_of, read_images, to_uint8, write_images
from ditmoe_cli.files.arrays import write_npz


def noise_images(n=3, h=5, w=4, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


def save_png(path, pixels, **options):
    Image.fromarray(pixels.squeeze()).save(path, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read_back(tmp_path, channels):
    images, labels = noise_images(c=channels), np.array([7, 0, -1])
    path = tmp_path / "samples.safetensors"
    size = write_images(path, ImageSet(images, labels), [2, 3, 5], {"cfg": 1.5})
    assert size == path.stat().st_size
    got = read_images(path)
    assert np.array_equal(got.images, images)
    assert np.array_equal(got.labels, labels)
    assert len(got) == 3


def test_the_file_opens_elsewhere_and_carries_seeds_and_conditions(tmp_path):
    path = tmp_path / "samples.safetensors"
    write_images(path, ImageSet(noise_images(), np.arange(3)), [2, 3, 5], {"cfg": 1.5})
    assert load_file(path)["seed"].tolist() == [2, 3, 5]
    header = path.read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["ditmoe"]) == {"cfg": 1.5, "schema": "ditmoe.samples/1"}


def test_equal_content_gives_equal_bytes_whatever_the_memory_layout(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    images = noise_images()
    write_images(a, ImageSet(images, np.arange(3)), [0, 1, 2], {"x": 1, "y": 2})
    write_images(b, ImageSet(np.asfortranarray(images), np.arange(3)), np.arange(3), {"y": 2, "x": 1})
    assert a.read_bytes() == b.read_bytes()


def test_labels_are_optional_and_seeds_are_not(tmp_path):
    path = tmp_path / "samples.safetensors"
    write_images(path, ImageSet(noise_images()), [0, 1, 2], {})
    assert read_images(path).labels is None
    with pytest.raises(BadInputError, match="2 seeds for 3 images"):
        write_images(tmp_path / "other.safetensors", ImageSet(noise_images()), [0, 1], {})


def test_existing_files_are_kept_unless_forced(tmp_path):
    path = tmp_path / "samples.safetensors"
    write_images(path, ImageSet(noise_images(seed=1)), [0, 1, 2], {})
    with pytest.raises(OutputExistsError, match="force"):
        write_images(path, ImageSet(noise_images(seed=2)), [0, 1, 2], {})
    assert np.array_equal(read_images(path).images, noise_images(seed=1))
    write_images(path, ImageSet(noise_images(seed=2)), [0, 1, 2], {}, force=True)
    assert np.array_equal(read_images(path).images, noise_images(seed=2))


@pytest.mark.parametrize("key", ["arr_0", "images"])
def test_npz_of_adm(tmp_path, key):
    path = tmp_path / "batch.npz"
    np.savez(path, **{key: noise_images(), "labels": np.array([1, 2, 3], dtype=np.int32)})
    got = read_images(path)
    assert np.array_equal(got.images, noise_images())
    assert got.labels.dtype == np.int64
    assert got.labels.tolist() == [1, 2, 3]


def test_labels_of_adm_are_its_second_array(tmp_path):
    n = len(noise_images())
    labels, names = np.arange(n), {"labels": np.arange(n)[::-1]}
    for arrays, expected in (
        ({"arr_1": labels}, labels),
        ({"arr_1": labels.astype(np.uint8)}, labels),
        ({"arr_1": labels, **names}, names["labels"]),
        ({"arr_1": labels / 2}, None),  # something else, saved without a name
        ({"arr_1": np.arange(n + 1)}, None),
        ({"arr_1": labels[:, None]}, None),
    ):
        np.savez(tmp_path / "a.npz", arr_0=noise_images(), **arrays)
        result = read_images(tmp_path / "a.npz")
        assert np.array_equal(result.images, noise_images())
        assert (result.labels is None) == (expected is None)
        assert expected is None or (result.labels.dtype == np.int64 and np.array_equal(result.labels, expected))


def test_npz_is_written_the_same_each_time(tmp_path):
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, {"arr_0": noise_images()})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert np.array_equal(read_images(tmp_path / "a.npz").images, noise_images())


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_of_png_in_natural_order(tmp_path, channels):
    images = noise_images(n=12, c=channels)
    for index, image in enumerate(images):
        save_png(tmp_path / f"img_{index}.png", image)
    (tmp_path / "notes.txt").write_text("kept out")
    got = read_images(tmp_path)
    assert np.array_equal(got.images, images)
    assert got.labels is None


@pytest.mark.parametrize("grey_first", [True, False])
def test_grey_among_colour_becomes_colour(tmp_path, grey_first):
    grey, colour = noise_images(1, c=1)[0], noise_images(1)[0]
    first, second = (grey, colour) if grey_first else (colour, grey)
    save_png(tmp_path / "0.png", first)
    save_png(tmp_path / "1.png", second)
    got = read_images(tmp_path).images
    assert np.array_equal(got[0 if grey_first else 1], grey.repeat(3, axis=2))
    assert np.array_equal(got[1 if grey_first else 0], colour)


def test_other_modes_become_rgb_and_black_and_white_stays_grey(tmp_path):
    colour = noise_images(1)[0]
    alpha = np.full((*colour.shape[:2], 1), 40, np.uint8)
    save_png(tmp_path / "0.png", np.concatenate([colour, alpha], axis=2))
    assert np.array_equal(read_images(tmp_path).images[0], colour)
    (tmp_path / "bw").mkdir()
    Image.new("1", (4, 5), 1).save(tmp_path / "bw" / "0.png")
    assert (read_images(tmp_path / "bw").images == 255).all()
    assert read_images(tmp_path / "bw").images.shape == (1, 5, 4, 1)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="holds no PNG images"):
        read_images(tmp_path)
    save_png(tmp_path / "0.png", noise_images(1)[0])
    save_png(tmp_path / "1.png", noise_images(1, h=6)[0])
    with pytest.raises(BadInputError, match=r"1\.png: is 4x6, but 4x5 in 0\.png"):
        read_images(tmp_path)
    save_png(tmp_path / "1.jpg", noise_images(1)[0])
    with pytest.raises(BadInputError, match=r"1\.jpg: only PNG is read, .* JPEG .* changes FID"):
        read_images(tmp_path)


def test_pngs_that_are_refused(tmp_path):
    file = tmp_path / "0.png"
    save_png(file, noise_images(1)[0], format="JPEG")
    with pytest.raises(BadInputError, match=r"0\.png: cannot be read as PNG"):
        read_images(tmp_path)
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(file)
    with pytest.raises(BadInputError, match="more than 8 bits a channel"):
        read_images(tmp_path)
    with pytest.raises(BadInputError, match="is a single image; give the folder"):
        read_images(file)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "folder/a.png"])
def test_truncated_files_are_named(tmp_path, name, share):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    images = noise_images(4, 16, 16)
    if file.suffix == ".npz":
        np.savez(file, arr_0=images)
    elif file.suffix == ".safetensors":
        write_images(file, ImageSet(images), range(4), {})
    else:
        save_png(file, images[0])
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(BadInputError) as caught:
        read_images(tmp_path / name.split("/")[0])
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zip_features_that_python_lacks_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=noise_images())
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 6] = 99  # the version needed to extract, in the central directory
    path.write_bytes(raw)
    with pytest.raises(BadInputError, match=r"a\.npz: cannot be read as npz \(zip file version 9\.9"):
        read_images(path)
    assert kind_of(path) == "images"


def test_arrays_that_are_no_images(tmp_path):
    good = noise_images()
    cases = [
        ({"arr_0": good.astype(np.float32)}, "dtype float32; they must be uint8"),
        ({"arr_0": good[0]}, r"shape \(5, 4, 3\); it must be \(N, H, W, C\)"),
        ({"arr_0": good[..., :2]}, "C 1 or 3"),
        ({"arr_0": good[:0]}, "holds no pixel"),
        ({"arr_0": good, "labels": np.arange(2)}, r"labels are int64 \(2,\).* 3 images"),
        ({"arr_0": good, "labels": np.ones(3)}, "labels are float64"),
        ({"other": good}, "neither an array 'arr_0' nor 'images'"),
        ({"arr_0": np.array([{}])}, "cannot be read as npz"),
    ]
    for number, (arrays, message) in enumerate(cases):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **arrays)
        with pytest.raises(BadInputError, match=rf"{number}\.npz: .*{message}"):
            read_images(path)


def test_safetensors_that_are_no_images(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(BadInputError, match=r"a\.safetensors: has no tensor 'images'"):
        read_images(path)
    save_file({"images": noise_images()}, path, {"ditmoe": '{"schema":"ditmoe.profile/1"}'})
    with pytest.raises(BadInputError, match=r"schema is 'ditmoe\.profile/1', expected 'ditmoe\.samples/1'"):
        read_images(path)
    save_file({"images": noise_images()}, path, {"ditmoe": "{"})
    with pytest.raises(BadInputError, match="is not JSON"):
        read_images(path)
    save_file({"images": noise_images().astype(np.float16)}, path)
    with pytest.raises(BadInputError, match=r"a\.safetensors: 'images' has dtype F16"):
        read_images(path)


def test_a_missing_path_is_named(tmp_path):
    for function in (kind_of, read_images):
        with pytest.raises(BadInputError, match="nowhere: no such file or folder"):
            function(tmp_path / "nowhere")


def test_an_image_set_checks_itself():
    with pytest.raises(BadInputError, match="dtype float64"):
        ImageSet(np.zeros((1, 2, 2, 3)))


def kinds(folder: Path) -> dict[str, str]:
    """Write one of each kind of input to `folder`, under the name of its kind."""
    n, moments = noise_images(), {"mu": np.ones(2), "sigma": np.eye(2)}
    np.savez(folder / "adm.npz", arr_0=n)
    np.savez(folder / "moments.npz", arr_0=n, mu_s=np.ones(1), **moments)
    write_images(folder / "samples.safetensors", ImageSet(n), [0, 1, 2], {})
    save_file(moments, folder / "moments.safetensors")
    save_file({"blocks.0.w": np.ones(2)}, folder / "model.safetensors")
    torch.save({"w": torch.ones(2)}, folder / "model.pt")
    for name in ("pngs", "jpegs", "preview", "pipeline/transformer", "empty"):
        (folder / name).mkdir(parents=True)
    for name in ("pngs/a.png", "preview/a.png", "jpegs/a.jpg", "pipeline/a.png"):
        save_png(folder / name, n[0])
    for name in ("preview", "pipeline/transformer"):
        save_file({"w": np.ones(2)}, folder / name / "diffusion_pytorch_model.safetensors")
    (folder / "cut.npz").write_bytes(b"PK")
    statistics = {"moments.npz", "moments.safetensors"}
    images = {"adm.npz", "cut.npz", "samples.safetensors", "pngs", "jpegs", "pngs/a.png"}
    rest = {"model.safetensors", "model.pt", "preview", "pipeline", "empty"}
    groups = {"statistics": statistics, "images": images, "checkpoint": rest}
    return {name: kind for kind, names in groups.items() for name in names}


def test_kinds_are_told_by_content_without_torch_or_numpy(tmp_path):
    expected = kinds(tmp_path)
    program = (
        "import json, sys, pathlib\n"
        "from ditmoe_cli.evaluation.images import kind_of\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps({n: kind_of(root / n) for n in json.loads(sys.argv[2])}))\n"
        "assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys(), 'heavy import'\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(sorted(expected))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_kind_of_a_damaged_header_is_an_error(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(BadInputError, match=r"a\.safetensors: not a safetensors file"):
        kind_of(tmp_path / "a.safetensors")


def test_pixels_are_clamped_scaled_and_rounded():
    values = torch.tensor([-1.0, -2.0, 0.0, 1.0, 3.0, -1 + 2 * 100 / 255, -1 + 2 * 100.4 / 255])
    got = to_uint8(values.reshape(1, 1, 1, 7))
    assert got.shape == (1, 1, 7, 1)
    assert got.ravel().tolist() == [0, 0, 128, 255, 255, 100, 100]


def test_every_grey_level_survives_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 4, 4)[:, :3]
    back = to_uint8(levels.float() / 127.5 - 1)
    assert np.array_equal(back, levels.permute(0, 2, 3, 1).numpy())


def test_nan_pixels_are_refused():
    pixels = torch.zeros(3, 1, 2, 2)
    pixels[1, 0, 1, 1] = torch.nan
    with pytest.raises(BadInputError, match="image 1 of the batch holds NaN"):
        to_uint8(pixels)
