"""Extractors: pixels by hand, inception's batching, and the contract of a user's own extractor."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features.extractors import (
    PRECISIONS,
    InceptionExtractor,
    PixelExtractor,
    activations,
    area_weights,
    check_extractor_name,
    check_extras,
    describe_extractor,
    make_extractor,
)
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, check_comparable
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.scores.conventions import PREPROCESSINGS
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics


def noise_images(n=5, h=8, w=8, c=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, c), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_eight_by_eight_are_the_grey_levels(channels):
    images = noise_images(c=channels)
    got = PixelExtractor(16)(images)
    assert got.dtype == np.float64
    assert np.allclose(got, images.reshape(5, -1) / 255 * 16, rtol=1e-14)
    white = np.full((1, 8, 8, channels), 255, np.uint8)
    assert (PixelExtractor(16)(white) == 16).all()


def test_pixels_of_larger_images_are_block_means():
    images = noise_images(h=32, w=16, c=3)
    expected = images.reshape(5, 8, 4, 8, 2, 3).mean(axis=(2, 4)).reshape(5, -1)
    assert np.allclose(PixelExtractor(255)(images), expected, rtol=1e-13)


def test_smaller_images_keep_their_pixels():
    images = noise_images(h=4, w=8)
    assert np.allclose(PixelExtractor(255)(images), images.reshape(5, 32), rtol=1e-14)


@pytest.mark.parametrize("length", [8, 9, 12, 15, 28, 32, 299])
def test_area_weights_average_by_overlap(length):
    weights = area_weights(length, 8)
    assert weights.shape == (8, length)
    assert np.allclose(weights.sum(axis=1), 1)
    # Every pixel counts equally in the whole.
    assert np.allclose(weights.sum(axis=0), 8 / length)
    # Means over a grid that divides both: each pixel repeated 8 times, each cell holding `length` of them.
    values = np.random.default_rng(0).normal(size=length)
    assert np.allclose(weights @ values, values.repeat(8).reshape(8, length).mean(axis=1))


def test_pixels_are_identified_by_their_levels():
    a, b = (make_extractor("pixels", grey_levels=levels) for levels in (16, 255))
    assert (a.name, a.digest) == ("pixels", "pixels-8x8-levels16")
    assert a.digest != b.digest
    assert "0..16" in a.preprocessing


class MeanColour(torch.nn.Module):
    """Stands in for Inception: uint8 (N, H, W, C) to float (N, C); records batches and how they were prepared."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.recipes = set()

    def pool_and_spatial(self, images, preprocessing):
        assert images.dtype == torch.uint8
        self.batches.append(len(images))
        self.recipes.add(preprocessing)
        if torch.is_autocast_enabled("cpu"):
            self.recipes.add("autocast")
        x = images.float()
        return x.mean(dim=(1, 2)), x[:, 0].flatten(1)

    def logits(self, features, bias):
        return features * 2 + bias


def test_inception_runs_in_batches_and_returns_doubles():
    module = MeanColour()
    images = noise_images(n=7, c=3)
    images.setflags(write=False)
    got = InceptionExtractor(module, "d", "cpu", batch=3)(images)
    assert module.batches == [3, 3, 1]
    assert got.dtype == np.float64
    assert np.allclose(got, images.mean(axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inception_prepares_and_computes_as_told(precision):
    module = MeanColour()
    InceptionExtractor(module, "d", "cpu", recipe="clean-fid", precision=precision)(noise_images(n=2))
    assert module.recipes == {"clean-fid"} | ({"autocast"} if precision == "bf16" else set())


def test_all_activations_come_from_one_pass():
    images = noise_images(n=7, c=3)
    module = MeanColour()
    extractor = InceptionExtractor(module, "d", "cpu", batch=2)
    got = activations(extractor, ImageSet(images), ["spatial", "logits"], batch=3)
    assert module.batches == [2, 1, 2, 1, 1]
    mean = images.mean(axis=(1, 2))
    assert np.allclose(got.features, mean, rtol=1e-6)
    assert np.allclose(got.logits, 2 * mean, rtol=1e-6)
    assert np.array_equal(got.spatial, images[:, 0].reshape(7, -1))
    assert {array.dtype.name for array in (got.features, got.spatial, got.logits)} == {"float64"}
    biased = activations(extractor, ImageSet(images), ["biased_logits"])
    assert np.allclose(biased.logits, 2 * mean + 1, rtol=1e-6)
    assert biased.spatial is None
    assert np.array_equal(activations(extractor, ImageSet(images)).features, biased.features)


def test_other_extractors_give_features_only():
    image_set = ImageSet(noise_images())
    got = activations(PixelExtractor(16), image_set)
    assert np.array_equal(got.features, PixelExtractor(16)(image_set.images))
    assert (got.spatial, got.logits) == (None, None)
    for wanted, score in (("spatial", "sFID"), ("logits", "the Inception score"), ("biased_logits", "Inception score")):
        with pytest.raises(UsageError, match=f"{score}.* needs extractor inception; pixels gives features only"):
            activations(PixelExtractor(16), image_set, [wanted])
    with pytest.raises(UsageError, match="unknown activations pool; choose spatial, logits"):
        activations(PixelExtractor(16), image_set, ["pool"])
    with pytest.raises(UsageError, match="with the bias or without"):
        check_extras(InceptionExtractor(MeanColour(), "d", "cpu"), ["logits", "biased_logits"])


def test_preprocessing_and_precision_show_in_the_description_and_part_statistics():
    def stored(**options):
        described = describe_extractor(InceptionExtractor(MeanColour(), "d", "cpu", **options), 255)
        return StoredStatistics(FeatureStatistics(np.zeros(3), np.eye(3), 5), described)

    kinds = [stored(recipe=recipe, precision=precision) for recipe in PREPROCESSINGS for precision in PRECISIONS]
    assert len({kind.extractor["preprocessing"] for kind in kinds}) == 6
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds):
            if i == j:
                check_comparable(a, b, "a", "b")
                continue
            with pytest.raises(BadInputError, match="preprocessing differs"):
                check_comparable(a, b, "a", "b")
    # Statistics stored before preprocessing was a setting stay comparable.
    assert stored().extractor["preprocessing"] == "TF1 bilinear to 299x299, (x - 128) / 128"
    assert stored(precision="bf16").extractor["preprocessing"].endswith("; bf16")


def test_unknown_preprocessing_and_precision_are_refused():
    with pytest.raises(UsageError, match="unknown preprocessing 'pil'; choose tf1, pytorch-fid, clean-fid"):
        make_extractor("inception", preprocessing="pil")
    with pytest.raises(UsageError, match="unknown precision 'fp16'; choose fp32, bf16"):
        make_extractor("inception", precision="fp16")


def test_features_in_batches_equal_those_of_one_call():
    image_set = ImageSet(noise_images(n=7))
    got = activations(PixelExtractor(16), image_set, batch=3).features
    assert np.allclose(got, PixelExtractor(16)(image_set.images), rtol=1e-14)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Return a function that writes an importable module in the working directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []

    def write(text):
        name = f"own_extractor_{tmp_path.name}_{len(names)}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_an_extractor_of_ones_own(own_module, tmp_path):
    text = "def factory():\n    return lambda images: images.reshape(len(images), -1)[:, :3].tolist()\n"
    name = own_module(text)
    extractor = make_extractor(f"{name}:factory")
    images = noise_images()
    assert np.array_equal(activations(extractor, ImageSet(images), batch=2).features, images.reshape(5, -1)[:, :3])
    assert extractor.name == f"{name}:factory"
    assert extractor.digest == hashlib.sha256(text.encode()).hexdigest()
    assert (tmp_path / f"{name}.py").exists()


def test_an_extractor_may_tell_its_own_digest(own_module):
    name = own_module(
        "class Mean:\n"
        "    digest, preprocessing = 'weights-1', 'none'\n"
        "    def __call__(self, images):\n"
        "        return images.mean(axis=(1, 2))\n"
    )
    extractor = make_extractor(f"{name}:Mean")
    assert (extractor.digest, extractor.preprocessing) == ("weights-1", "none")


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (
            "def factory(): raise ValueError('no weights\\nsecond line')",
            BadInputError,
            "failed: ValueError: no weights$",
        ),
        ("def factory(): return 3", BadInputError, "returned a int, not a function"),
        ("factory = 3", UsageError, "'factory' is a int, not a factory"),
        ("other = 3", UsageError, "has no 'factory'"),
        ("import no_such_module_at_all", UsageError, "cannot import own.*ModuleNotFoundError"),
        ("1 / 0", UsageError, "cannot import own.*ZeroDivisionError"),
    ],
)
def test_factories_that_are_refused(own_module, body, error, message):
    name = own_module(body + "\n")
    with pytest.raises(error, match=message):
        make_extractor(f"{name}:factory")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("images.ravel()", r"returned shape \(160,\), expected \(5, D\)"),
        ("images.reshape(len(images), -1)[:3]", r"returned shape \(3, 32\)"),
        ("images.reshape(len(images), -1)[:, :0]", r"returned shape \(5, 0\)"),
        ("images.reshape(len(images), -1) / 0", "NaN or infinite"),
        ("[['a']] * 5", "failed: ValueError"),
        ("1 // 0", "failed: ZeroDivisionError"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_features_that_are_refused(own_module, expression, message):
    name = own_module(f"def factory():\n    return lambda images: {expression}\n")
    with pytest.raises(BadInputError, match=message):
        make_extractor(f"{name}:factory")(noise_images(h=4))


def test_a_width_that_changes_is_refused(own_module):
    name = own_module("import numpy as np\ndef factory():\n    return lambda x: np.ones((len(x), len(x)))\n")
    with pytest.raises(BadInputError, match="features of width 3, then 2"):
        activations(make_extractor(f"{name}:factory"), ImageSet(noise_images()), batch=3)


@pytest.mark.parametrize("name", ["pixels", "inception", "a:b", "pkg.mod:make"])
def test_good_names(name):
    check_extractor_name(name)


@pytest.mark.parametrize("name", ["", "pixel", "Inception", "a:", ":b", "a.b", "a:b:c", "a b:c", "../x:y"])
def test_bad_names(name):
    with pytest.raises(UsageError, match=r"unknown extractor .* choose pixels, inception or"):
        check_extractor_name(name)
    with pytest.raises(UsageError):
        make_extractor(name)


def test_pixels_and_names_need_no_torch():
    program = (
        "import sys\n"
        "from ditmoe_cli.evaluation.features.extractors import check_extractor_name, make_extractor\n"
        "check_extractor_name('inception'), make_extractor('pixels', grey_levels=16)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
