"""Image sets are read back as written; other files are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.evaluation.images import ImageSet, images_digest, kind_of, read_images, to_uint8, write_images
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
    alpha = np.full((*colour.shape[:2], 1), 255, np.uint8)
    save_png(tmp_path / "0.png", np.concatenate([colour, alpha], axis=2))
    assert np.array_equal(read_images(tmp_path).images[0], colour)
    (tmp_path / "bw").mkdir()
    Image.new("1", (4, 5), 1).save(tmp_path / "bw" / "0.png")
    assert (read_images(tmp_path / "bw").images == 255).all()
    assert read_images(tmp_path / "bw").images.shape == (1, 5, 4, 1)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"holds no images \(PNG, JPEG, WebP or BMP\)$"):
        read_images(tmp_path)
    save_png(tmp_path / "0.png", noise_images(1)[0])
    save_png(tmp_path / "1.png", noise_images(1, h=6)[0])
    with pytest.raises(BadInputError, match=r"1\.png: is 4x6, but 4x5 in 0\.png"):
        read_images(tmp_path)
    for name, message in (
        ("2.gif", "GIF is not read; save it as PNG"),
        ("2.jxl", "JXL is not read"),
        ("2.tiff", "TIFF is not read"),
    ):
        if name.endswith("jxl"):
            (tmp_path / name).write_bytes(b"\xff\x0a" + bytes(40))
        else:
            save_png(tmp_path / name, noise_images(1)[0])
        with pytest.raises(BadInputError, match=rf"{name}: {message}"):
            read_images(tmp_path)
        (tmp_path / name).unlink()


def deep_png(file):
    """Write an RGB PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (2).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    rows = zlib.compress((b"\0" + bytes(12)) * 2)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def transparent(mode, alpha=40):
    return Image.new(mode, (4, 5), (9, 9, 9, alpha) if mode == "RGBA" else (9, alpha))


def keyed(file):
    """Write a palette PNG in which one colour is transparent."""
    Image.new("P", (4, 5)).save(file, transparency=0)


UNSUITABLE = {
    "16-bit grey": (
        lambda file: Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(file),
        "more than 8 bits a channel",
    ),
    "16-bit colour": (deep_png, "more than 8 bits a channel"),
    "alpha": (lambda file: transparent("RGBA").save(file), "has transparent pixels"),
    "grey with alpha": (lambda file: transparent("LA").save(file), "has transparent pixels"),
    "transparent palette": (keyed, "has transparent pixels"),
    "CMYK": (lambda file: Image.new("CMYK", (4, 5)).save(file, format="JPEG"), "colours of mode CMYK; save it as RGB"),
    "animated": (
        lambda file: Image.new("L", (4, 5)).save(
            file, format="WEBP", save_all=True, append_images=[Image.new("L", (4, 5), 99)]
        ),
        "is animated; save each of its 2 frames",
    ),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read as an image"),
    "text": (lambda file: file.write_text("not here"), "cannot be read as an image"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_images_that_are_refused_by_name(tmp_path, kind):
    write, message = UNSUITABLE[kind]
    write(tmp_path / "1.png")
    with pytest.raises(BadInputError, match=rf"1\.png: .*{message}"):
        read_images(tmp_path)


def test_a_single_image_is_refused_under_any_name(tmp_path):
    save_png(tmp_path / "0", noise_images(1)[0], format="PNG")
    with pytest.raises(BadInputError, match="is a single image; give the folder"):
        read_images(tmp_path / "0")
    assert kind_of(tmp_path / "0") == "images"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP", "PNG"])
def test_formats_are_told_by_content(tmp_path, kind):
    flat = np.full((3, 16, 16, 3), 128, np.uint8)
    for index, image in enumerate(flat):
        save_png(tmp_path / f"{index}.png", image, format=kind)
    save_png(tmp_path / "3", flat[0], format=kind)
    notes: list[str] = []
    images = read_images(tmp_path, notes.append).images
    assert np.array_equal(images, np.full((4, 16, 16, 3), 128, np.uint8))
    assert [note.partition(": ")[2][:22] for note in notes] == (["4 of 4 images are JPEG"] if kind == "JPEG" else [])


def test_grey_jpegs_stay_grey_and_palettes_become_colour(tmp_path):
    (tmp_path / "grey").mkdir()
    Image.new("L", (8, 8), 77).save(tmp_path / "grey" / "0.jpg")
    assert read_images(tmp_path / "grey").images.tolist() == np.full((1, 8, 8, 1), 77).tolist()
    (tmp_path / "palette").mkdir()
    Image.new("RGB", (8, 8), (200, 10, 30)).quantize(4).save(tmp_path / "palette" / "0.png")
    assert read_images(tmp_path / "palette").images[0, 0, 0].tolist() == [200, 10, 30]


def test_images_are_turned_as_their_exif_tells(tmp_path):
    pixels = noise_images(1, h=4, w=6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns, from the right
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(read_images(tmp_path).images[0], np.rot90(pixels, -1))


def classes(folder, *names):
    """Write two images to each of the folders, and return them in the order of the names given."""
    images = noise_images(2 * len(names))
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            save_png(folder / name / f"{i}.png", images[2 * number + i])
    return images


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("0", "2", "10"), [0, 0, 2, 2, 10, 10]),
        (("000", "001"), [0, 0, 1, 1]),
        (("train/0", "train/1"), [0, 0, 1, 1]),
        (("n01440764", "n01443537"), [0, 0, 1, 1]),
        (("a", "b"), None),
        (("0", "b"), None),
    ],
)
def test_class_folders_are_read_with_their_labels(tmp_path, names, labels):
    images = classes(tmp_path, *names)
    notes: list[str] = []
    got = read_images(tmp_path, notes.append)
    assert np.array_equal(got.images, images)
    assert (None if got.labels is None else got.labels.tolist()) == labels
    assert len(notes) == (labels is None)
    assert kind_of(tmp_path) == "images"


def test_images_beside_folders_of_images_are_all_read(tmp_path):
    images = classes(tmp_path, "0", "1")
    save_png(tmp_path / "z.png", images[0])
    got = read_images(tmp_path)
    assert np.array_equal(got.images, np.concatenate([images, images[:1]]))
    assert got.labels is None


def test_what_is_left_out_is_said_and_clutter_is_not(tmp_path):
    classes(tmp_path, "0")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "0/Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    save_png(tmp_path / ".hidden" / "0.png", noise_images(1)[0])
    digest = images_digest(tmp_path)
    notes: list[str] = []
    assert len(read_images(tmp_path, notes.append)) == 2
    assert notes == []
    (tmp_path / "labels.txt").write_text("x")
    read_images(tmp_path, notes.append)
    assert notes == [f"{tmp_path}: leaving out 1 other file, labels.txt, which is no image"]
    (tmp_path / "z.txt").write_text("x")
    read_images(tmp_path, notes.append)
    assert notes[1:] == [f"{tmp_path}: leaving out 2 other files, which are no images, such as labels.txt"]
    assert images_digest(tmp_path) == digest


def test_folders_that_lead_back_are_read_once(tmp_path):
    classes(tmp_path, "0")
    (tmp_path / "0" / "again").symlink_to(tmp_path)
    assert len(read_images(tmp_path)) == 2


def test_the_digest_is_of_all_images_at_any_depth(tmp_path):
    classes(tmp_path, "0", "1")
    before = images_digest(tmp_path)
    (tmp_path / "1" / "1.png").rename(tmp_path / "0" / "2.png")
    moved = images_digest(tmp_path)
    save_png(tmp_path / "0" / "2.png", noise_images(1, seed=9)[0])
    assert len({before, moved, images_digest(tmp_path)}) == 3


def test_a_zip_of_images_is_read_as_its_folder_is(tmp_path):
    images = classes(tmp_path / "folder", "0", "1")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "folder"))
        archive.writestr("__MACOSX/._0.png", b"x")
    got = read_images(tmp_path / "a.zip")
    assert np.array_equal(got.images, images)
    assert got.labels.tolist() == [0, 0, 1, 1]
    assert kind_of(tmp_path / "a.zip") == "images"


def test_containers_are_told_by_content(tmp_path):
    images = noise_images()
    write_images(tmp_path / "a.safetensors", ImageSet(images), range(3), {})
    np.savez(tmp_path / "b.npz", arr_0=images)
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    (tmp_path / "b.npz").rename(tmp_path / "b.safetensors")
    for name in ("a.bin", "b.safetensors"):
        assert kind_of(tmp_path / name) == "images"
        assert np.array_equal(read_images(tmp_path / name).images, images)


def test_the_only_array_of_images_is_read_under_any_name(tmp_path):
    np.savez(tmp_path / "a.npz", samples=noise_images(), y=np.arange(3))
    got = read_images(tmp_path / "a.npz")
    assert np.array_equal(got.images, noise_images())
    assert got.labels.tolist() == [0, 1, 2]
    np.savez(tmp_path / "a.npz", real=noise_images(), fake=noise_images())
    with pytest.raises(BadInputError, match="neither an array 'arr_0' nor 'images', but fake, real"):
        read_images(tmp_path / "a.npz")


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
        ({"other": good[0]}, "neither an array 'arr_0' nor 'images'"),
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
