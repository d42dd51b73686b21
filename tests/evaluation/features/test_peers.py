"""Scores against torch-fidelity, pytorch-fid and clean-fid, each under its own convention, on the same images."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from peers import (
    imported,
    noise,
    pytorch_fid_network,
    seeded_state,
    smooth,
    torch_fidelity_network,
    torchvision_at_hand,
)
from torch.utils.data import Dataset

from ditmoe_cli.evaluation.features.extractors import activations, make_extractor
from ditmoe_cli.evaluation.features.inception import load_inception, preprocess, resize_clean
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, KernelSubsets
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features
from ditmoe_cli.evaluation.scores.inception_score import inception_score
from ditmoe_cli.evaluation.scores.kernel_distance import kernel_distance
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall


@pytest.fixture(autouse=True)
def torchvision():
    with torchvision_at_hand():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "seeded.pth"
    torch.save(seeded_state(), path)
    yield path
    path.unlink()


class Images(Dataset):
    """Images (N, H, W, C) as torch-fidelity takes them."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.mark.slow
def test_all_scores_equal_those_of_torch_fidelity(weights):
    """From images to scores, by its own entry point; its FID, whose root of 2048 features is slow, is tested below."""
    fidelity = imported("torch_fidelity")
    subject, reference = smooth(12), smooth(13, seed=2, contrast=0.7)
    convention = CONVENTIONS["torch-fidelity"]
    kernel = replace(convention.kernel, subsets=10, size=9)
    theirs = fidelity.calculate_metrics(
        input1=Images(subject),
        input2=Images(reference),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        **dict.fromkeys(("isc", "kid", "prc"), True),
        kid_subsets=kernel.subsets,
        kid_subset_size=kernel.size,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = make_extractor("inception", weights=weights, preprocessing=convention.preprocessing)
    ours = [activations(extractor, ImageSet(images), ["logits"]) for images in (subject, reference)]
    features = [one.features for one in ours]

    score = inception_score(ours[0].logits, parts=convention.inception.parts, seed=convention.inception.seed)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-3)
    assert score.deviation > 0

    distance = kernel_distance(*features, kernel)
    assert distance.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert distance.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)

    shares = precision_recall(*features, convention.neighbours)
    assert shares.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert shares.recall == pytest.approx(theirs["recall"], rel=1e-6)
    assert 0 < shares.recall < shares.precision < 1


def test_scores_of_given_features_equal_those_of_torch_fidelity():
    """More images than one block or subset takes, and features of every sign."""
    imported("torch_fidelity")
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(300, 24)), 0.3 + 1.2 * generator.normal(size=(250, 24))
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    quiet = {"verbose": False}
    theirs = {
        **metric_isc.isc_features_to_metric(first, splits=7),
        **metric_kid.kid_features_to_metric(first, second, kid_subsets=20, kid_subset_size=100, **quiet),
        **metric_prc.prc_features_to_metric(first, second, **quiet),
        **metric_fid.fid_statistics_to_metric(
            *(metric_fid.fid_features_to_statistics(side) for side in (first, second)), verbose=False
        ),
    }
    score = inception_score(a, parts=7, seed=2020)
    assert (score.mean, score.deviation) == pytest.approx(
        (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-10
    )
    distance = kernel_distance(a, b, KernelSubsets(20, 100))
    assert (distance.mean, distance.deviation) == pytest.approx(
        (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]), rel=1e-9
    )
    shares = precision_recall(a, b, block=64)
    assert (shares.precision, shares.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert frechet_of_features(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_those_of_torch_fidelity(weights, bias):
    peer = torch_fidelity_network(weights, ["logits" if bias else "logits_unbiased"])
    batch = noise(2)
    with torch.inference_mode():
        (expected,) = peer(batch.permute(0, 3, 1, 2))
    wanted = "biased_logits" if bias else "logits"
    got = activations(make_extractor("inception", weights=weights), ImageSet(batch.numpy()), [wanted]).logits
    assert np.abs(got - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


def as_pytorch_fid_reads(images):
    """Return images as torchvision's ToTensor gives them: (N, C, H, W) in 0..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255


@pytest.mark.parametrize("side", [32, 320])
def test_features_equal_those_of_pytorch_fid(weights, monkeypatch, side):
    imported("torch_fidelity")  # whose blocks stand in where torchvision is missing
    peer = pytorch_fid_network(seeded_state(), monkeypatch)
    batch = noise(2, side, side, seed=side).numpy()
    with torch.inference_mode():
        expected = peer(as_pytorch_fid_reads(batch))[0].flatten(1).numpy()
    convention = CONVENTIONS["pytorch-fid"]
    got = make_extractor("inception", weights=weights, preprocessing=convention.preprocessing)(batch)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    if side < 299:  # the conventions must differ, or this would prove nothing
        other = make_extractor("inception", weights=weights)(batch)
        assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()


def test_fid_equals_that_of_pytorch_fid(weights, monkeypatch):
    """Over the first 3 features, since its matrix root over all takes many seconds."""
    imported("torch_fidelity")
    peer = pytorch_fid_network(seeded_state(), monkeypatch)
    peer_fid = imported("pytorch_fid.fid_score").calculate_frechet_distance
    sets = [smooth(4, seed=2), smooth(5, seed=3, contrast=0.7)]
    theirs = []
    with torch.inference_mode():
        for images in sets:
            features = peer(as_pytorch_fid_reads(images))[0].flatten(1).double().numpy()[:, :3]
            theirs.append((features.mean(axis=0), np.cov(features, rowvar=False)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of an argument that it will drop
        expected = peer_fid(*theirs[0], *theirs[1])
    extractor = make_extractor("inception", weights=weights, preprocessing="pytorch-fid")
    ours = [extractor(images)[:, :3] for images in sets]
    assert frechet_of_features(*ours) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*map(feature_statistics, ours)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (299, 299), (400, 300), (17, 640)])
def test_resizing_equals_that_of_clean_fid(height, width):
    resize = imported("cleanfid.resize").build_resizer("clean")
    batch = noise(2, height, width, seed=height)
    expected = np.stack([resize(image) for image in batch.numpy()]).transpose(0, 3, 1, 2)
    assert np.array_equal(resize_clean(batch.permute(0, 3, 1, 2), 299).numpy(), expected)
    # Its network scales the result, which is not part of the package.
    assert np.allclose(preprocess(batch, "clean-fid").numpy(), (expected - 128) / 128, rtol=0, atol=1e-6)


def test_scores_of_given_features_equal_those_of_clean_fid():
    fid = imported("cleanfid.fid")
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(60, 8)), 0.3 + generator.normal(size=(90, 8))
    kernel = CONVENTIONS["clean-fid"].kernel
    for size in (kernel.size, 40):
        state = np.random.get_state()
        np.random.seed(kernel.seed)  # its generator is numpy's global one
        expected = fid.kernel_distance(b, a, num_subsets=kernel.subsets, max_subset_size=size)
        np.random.set_state(state)
        assert kernel_distance(a, b, replace(kernel, size=size)).mean == pytest.approx(expected, rel=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert frechet_of_features(a, b) == pytest.approx(fid.fid_from_feats(a, b), rel=1e-8)


def test_the_network_itself_is_the_same_under_clean_fid(weights):
    """Its weights are not published, but features equal those of the network on preprocessed images."""
    module, _ = load_inception(weights)
    batch = noise(2)
    got = make_extractor("inception", weights=weights, preprocessing="clean-fid")(batch.numpy())
    rounded = torch.from_numpy(
        (preprocess(batch, "clean-fid") * 128 + 128).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    with torch.inference_mode():
        near = module(rounded).double().numpy()  # of 299 x 299 already, so that nothing is resized
    # Rounding to grey levels is all that differs.
    assert np.abs(got - near).max() <= 2e-2 * np.abs(near).max()
