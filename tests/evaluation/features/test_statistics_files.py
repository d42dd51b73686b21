"""Statistics on disk: both containers carry them exactly; what is no covariance is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.evaluation.features.extractors import PixelExtractor, describe_extractor
from ditmoe_cli.evaluation.features.statistics_files import (
    StoredStatistics,
    check_comparable,
    read_statistics,
    write_statistics,
)
from ditmoe_cli.evaluation.images import kind_of, read_images
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics

EXTRACTOR = {"name": "pixels", "digest": "d", "preprocessing": "none", "grey_levels": 16}


def stored(width=5, extractor=EXTRACTOR):
    x = np.random.default_rng(0).normal(size=(9, width))
    return StoredStatistics(feature_statistics(x), extractor)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("extractor", [EXTRACTOR, None])
def test_what_is_written_is_read_back_exactly(tmp_path, suffix, extractor):
    path = tmp_path / f"stats.{suffix}"
    written = stored(extractor=extractor)
    assert write_statistics(path, written) == path.stat().st_size
    got = read_statistics(path)
    assert np.array_equal(got.statistics.mu, written.statistics.mu)
    assert np.array_equal(got.statistics.sigma, written.statistics.sigma)
    assert got.statistics.n == 9
    assert got.extractor == extractor


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_unknown_n_stays_unknown_and_bytes_are_the_same_each_time(tmp_path, suffix):
    statistics = replace(stored().statistics, n=None)
    for name in ("a", "b"):
        write_statistics(tmp_path / f"{name}.{suffix}", StoredStatistics(statistics))
    assert read_statistics(tmp_path / f"a.{suffix}").statistics.n is None
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_safetensors_open_elsewhere(tmp_path):
    path = tmp_path / "stats.safetensors"
    write_statistics(path, stored())
    arrays = load_file(path)
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "mu": ("float64", (5,)),
        "sigma": ("float64", (5, 5)),
        "n": ("int64", ()),
    }
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert json.loads(metadata["ditmoe"]) == {"schema": "ditmoe.statistics/1", "extractor": EXTRACTOR}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_others(tmp_path, save):
    path = tmp_path / "reference.npz"
    save(path, mu=np.arange(3, dtype=np.float32), sigma=np.eye(3), mu_s=np.ones(7), arr_0=np.zeros(4))
    got = read_statistics(path)
    assert got.extractor is None
    assert got.statistics.n is None
    assert got.statistics.mu.dtype == np.float64
    assert got.statistics.mu.tolist() == [0, 1, 2]


def adm_reference(path, **extra):
    """Write an npz as ADM publishes them: statistics of many images, and some of the images."""
    generator = np.random.default_rng(0)
    pool, spatial = generator.normal(size=(20, 4)), generator.normal(size=(20, 6))
    arrays = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    arrays["arr_0"] = generator.integers(0, 256, (3, 5, 5, 3), dtype=np.uint8)
    arrays |= extra
    np.savez(path, **arrays)
    return arrays


def test_reference_batches_of_adm_give_both_statistics_and_images(tmp_path):
    path = tmp_path / "VIRTUAL.npz"
    arrays = adm_reference(path)
    got = read_statistics(path)
    assert np.array_equal(got.statistics.mu, arrays["mu"])
    assert np.array_equal(got.spatial.mu, arrays["mu_s"])
    assert np.array_equal(got.spatial.sigma, arrays["sigma_s"])
    assert (got.statistics.n, got.spatial.n, got.extractor) == (None, None, None)
    assert kind_of(path) == "statistics"
    assert np.array_equal(read_images(path).images, arrays["arr_0"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mu_s": np.ones(5)}, r"mu_s is \(5,\) and sigma_s \(6, 6\)"),
        ({"sigma_s": np.triu(np.ones((6, 6)))}, "sigma_s differs from its transpose"),
        ({"mu_s": np.full(6, np.nan)}, "mu_s holds NaN"),
        ({"mu_s": np.ones(6, dtype=np.int64)}, "mu_s has dtype int64"),
    ],
)
def test_spatial_statistics_that_are_refused(tmp_path, extra, message):
    path = tmp_path / "bad.npz"
    adm_reference(path, **extra)
    with pytest.raises(BadInputError, match=message):
        read_statistics(path)


def test_statistics_without_images_are_no_images(tmp_path):
    path = tmp_path / "stats.npz"
    write_statistics(path, stored())
    with pytest.raises(BadInputError, match="neither an array 'arr_0' nor 'images'"):
        read_images(path)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_spatial_statistics_are_read_back_exactly(tmp_path, suffix):
    path = tmp_path / f"stats.{suffix}"
    written = replace(stored(), spatial=stored(7).statistics)
    assert write_statistics(path, written) == path.stat().st_size
    got = read_statistics(path)
    assert np.array_equal(got.spatial.mu, written.spatial.mu)
    assert np.array_equal(got.spatial.sigma, written.spatial.sigma)
    assert (got.statistics.n, got.spatial.n) == (9, 9)
    assert got.extractor == EXTRACTOR
    write_statistics(path, stored(), force=True)
    assert read_statistics(path).spatial is None


def test_comparing_needs_one_spatial_width():
    a, b = (replace(stored(), spatial=stored(width).statistics) for width in (7, 6))
    check_comparable(a, stored(), "a", "b")
    with pytest.raises(BadInputError, match="a has 7 spatial features, b has 6"):
        check_comparable(a, b, "a", "b")


def test_others_read_our_npz(tmp_path):
    path = tmp_path / "stats.npz"
    write_statistics(path, stored())
    with np.load(path) as archive:
        assert np.array_equal(archive["mu"], stored().statistics.mu)
        assert np.array_equal(archive["sigma"], stored().statistics.sigma)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"sigma": np.eye(2)}, "has no array 'mu'"),
        ({"mu": np.ones(2)}, "has no array 'sigma'"),
        ({"mu": np.ones(3), "sigma": np.eye(2)}, r"mu is \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.ones((1, 2)), "sigma": np.eye(2)}, r"mu is \(1, 2\)"),
        ({"mu": np.ones(0), "sigma": np.ones((0, 0))}, r"mu is \(0,\)"),
        ({"mu": np.array([1, np.nan]), "sigma": np.eye(2)}, "mu holds NaN or infinite"),
        ({"mu": np.ones(2), "sigma": np.diag([1, np.inf])}, "sigma holds NaN or infinite"),
        ({"mu": np.ones(2, np.int64), "sigma": np.eye(2)}, "mu has dtype int64"),
        ({"mu": np.ones(2), "sigma": np.array([[1.0, 0.5], [0.4, 1.0]])}, "transpose by 0.1"),
        ({"mu": np.ones(2), "sigma": np.diag([1.0, -0.5])}, "variance -0.5"),
        ({"mu": np.ones(2), "sigma": np.eye(2), "n": np.array(0)}, "n is 0; it must be the number"),
        ({"mu": np.ones(2), "sigma": np.eye(2), "n": np.array([1, 2])}, r"n is \[1, 2\]"),
        ({"mu": np.ones(2), "sigma": np.eye(2), "n": np.array(2.0)}, "n is 2.0"),
    ],
)
def test_what_is_no_statistics_is_refused(tmp_path, suffix, arrays, message):
    path = tmp_path / f"bad.{suffix}"
    if suffix == "npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)
    with pytest.raises(BadInputError, match=message) as caught:
        read_statistics(path)
    assert str(path) in str(caught.value)


def test_metadata_that_is_refused(tmp_path):
    moments = {"mu": np.ones(2), "sigma": np.eye(2)}
    documents = [
        ("{", "is not JSON"),
        ('{"schema":"ditmoe.samples/1"}', "schema is 'ditmoe.samples/1'"),
        ('{"schema":"ditmoe.statistics/1","extractor":{"name":"pixels"}}', "lacks name, digest, preprocessing"),
    ]
    for text, message in documents:
        save_file(moments, tmp_path / "a.safetensors", {"ditmoe": text})
        np.savez(tmp_path / "a.npz", ditmoe=np.array(text), **moments)
        for name in ("a.safetensors", "a.npz"):
            with pytest.raises(BadInputError, match=message):
                read_statistics(tmp_path / name)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"none\.npz: no such file"):
        read_statistics(tmp_path / "none.npz")
    path = tmp_path / "cut.npz"
    write_statistics(path, stored())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(BadInputError, match=r"cut\.npz: not an npz archive, or cut short"):
        read_statistics(path)
    np.savez(path, mu=np.array([{}]), sigma=np.eye(1))
    with pytest.raises(BadInputError, match=r"cut\.npz: cannot be read as npz"):
        read_statistics(path)


def test_outputs_that_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_statistics(path, stored())
    with pytest.raises(OutputExistsError, match="force"):
        write_statistics(path, stored())
    with pytest.raises(UsageError, match=r"a\.json: statistics are written as \.safetensors or \.npz"):
        write_statistics(tmp_path / "a.json", stored())


def test_comparing_needs_one_extractor_and_one_width():
    a = stored()
    check_comparable(a, stored(), "a", "b")
    check_comparable(a, stored(extractor=None), "a", "b")
    check_comparable(a, stored(extractor={**EXTRACTOR, "grey_levels": 255}), "a", "b")
    other = stored(extractor={**EXTRACTOR, "digest": "e"})
    with pytest.raises(BadInputError, match="digest differs, a has 'd', b has 'e'"):
        check_comparable(a, other, "a", "b")
    wide = StoredStatistics(FeatureStatistics(np.ones(7), np.eye(7), None))
    with pytest.raises(BadInputError, match="a has 5 features, b has 7"):
        check_comparable(a, wide, "a", "b")


def test_the_description_of_an_extractor_can_be_stored(tmp_path):
    description = describe_extractor(PixelExtractor(16), 16)
    write_statistics(tmp_path / "a.safetensors", stored(extractor=description))
    assert read_statistics(tmp_path / "a.safetensors").extractor == description
    assert description["digest"] == "pixels-8x8-levels16"
    assert description["grey_levels"] == 16


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.ones(2), np.array([[1.0, 9.0], [9.0, 1.0]]), r"sigma has the eigenvalue -8, a variance below 0"),
        (np.ones(2), -np.eye(2), "sigma holds the variance -1"),
        (np.ones(2), np.array([[1.0, 0.5], [0.4, 1.0]]), "sigma differs from its transpose by 0.1"),
        (np.ones(2), np.array([[1.0, np.nan], [np.nan, 1.0]]), "sigma holds NaN"),
        (np.array([1.0, np.inf]), np.eye(2), "mu holds NaN or infinite values"),
        (np.ones(3), np.eye(2), r"mu is \(3,\) and sigma \(2, 2\)"),
        (np.ones((2, 1)), np.eye(2), r"mu is \(2, 1\)"),
        (np.ones(2) * 1e300, np.array([[1e300, 2e300], [2e300, 1e300]]), r"eigenvalue -1e\+300"),
    ],
)
def test_a_mean_and_a_covariance_are_checked_whole(tmp_path, suffix, mu, sigma, message):
    path = tmp_path / f"bad.{suffix}"
    (np.savez(path, mu=mu, sigma=sigma) if suffix == "npz" else save_file({"mu": mu, "sigma": sigma}, path))
    with pytest.raises(BadInputError, match=rf"bad\.{suffix}: .*{message}"):
        read_statistics(path)


def test_complex_moments_are_refused(tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.ones(2), sigma=np.eye(2) + 0j)
    with pytest.raises(BadInputError, match="sigma has dtype complex128"):
        read_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize("images", [5, 40])
def test_covariances_that_rounding_alone_makes_indefinite_are_read(tmp_path, images):
    """Fewer images than features leave eigenvalues of 0, which sums in float32 move to either side."""
    x = np.random.default_rng(0).normal(3, 1, (images, 64)).astype(np.float32)
    sigma = np.cov(x, rowvar=False, dtype=np.float32)
    assert np.linalg.eigvalsh(sigma.astype(np.float64))[0] < 0
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=sigma)
    assert read_statistics(tmp_path / "a.npz").statistics.dimension == 64


@pytest.mark.parametrize(
    ("mean", "covariance"), [("mean", "cov"), ("ref_mu", "ref_sigma"), ("reference_mu", "reference_sigma")]
)
def test_other_spellings_are_read(tmp_path, mean, covariance):
    path = tmp_path / "a.npz"
    np.savez(path, **{mean: np.ones(2), covariance: np.eye(2)})
    assert kind_of(path) == "statistics"
    assert read_statistics(path).statistics.mu.tolist() == [1, 1]


def test_two_spellings_of_others_are_refused_and_the_plain_one_wins(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, ref_mu=np.ones(2), mean=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(BadInputError, match="holds mean and ref_mu; store the one"):
        read_statistics(path)
    np.savez(path, mu=np.full(2, 3.0), ref_mu=np.ones(2), mean=np.zeros(2), sigma=np.eye(2))
    assert read_statistics(path).statistics.mu.tolist() == [3, 3]
