"""``ditmoe fid``: scores on request, refusals before anything is sampled, kept statistics, runs cut off or shared."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import command, contents, here, in_two_processes, on_terminal, series, start
from conftest import make_pico
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from ditmoe_cli.evaluation import samples
from ditmoe_cli.evaluation.features.extractors import InceptionExtractor, PixelExtractor
from ditmoe_cli.evaluation.scores.conventions import CONVENTIONS, KernelSubsets
from ditmoe_cli.evaluation.scores.extrapolation import frechet_infinity
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance, frechet_of_features
from ditmoe_cli.evaluation.scores.inception_score import inception_score
from ditmoe_cli.evaluation.scores.kernel_distance import kernel_distance
from ditmoe_cli.evaluation.scores.precision_recall import precision_recall

SETTINGS = ("--images", 6, "--steps", 2)
MANY = ("--images", 150, "--steps", 1)
PIXELS = ("--extractor", "pixels")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, samples of two of them, and references of other kinds; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    make_pico(sampler="rf", in_channels=1, seed=1).save(folder / "b.safetensors")
    make_pico(sampler="rf", in_channels=1, input_size=16).save(folder / "large.safetensors")
    make_pico(sampler="rf").save(folder / "latent.safetensors")
    for name in ("a", "b"):
        words = ("sample", f"{name}.safetensors", *MANY, "-o", f"{name}-many.safetensors")
        assert here(*words, cwd=folder).code == 0
    generator = np.random.default_rng(0)
    shapes = {
        "r": (12, 8, 8, 1),
        "r70": (70, 8, 8, 1),
        "r16": (12, 16, 16, 1),
        "rgb": (12, 8, 8, 3),
        "one": (1, 8, 8, 1),
    }
    for name, shape in shapes.items():
        np.savez(folder / f"{name}.npz", arr_0=generator.integers(0, 256, shape, dtype=np.uint8))
    np.savez(folder / "stats.npz", mu=np.zeros(64), sigma=np.eye(64), n=np.asarray(50))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, and a cache of one's own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling fails, so that what passes did not sample."""

    def sampled(*_: Any) -> NDArray[Any]:
        raise AssertionError("something was sampled")

    monkeypatch.setattr(samples, "sample", sampled)


SAMPLE = samples.sample


def images_of(path: Path) -> NDArray[np.uint8]:
    return load_file(path)["images"]


def features_of(path: Path) -> NDArray[np.float64]:
    return PixelExtractor(255)(images_of(path))


def png_folder(folder: Path, count: int = 70) -> Path:
    """A folder of random grey PNG."""
    images = np.random.default_rng(1).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    (folder / "png").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "png" / f"{i}.png")
    return folder / "png"


# scores


@pytest.mark.parametrize("sides", [("a.safetensors", "b.safetensors"), ("a-many.safetensors", "b-many.safetensors")])
def test_scores_are_those_of_the_library(sides: tuple[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With subsets of 40, since torch-fidelity's own take 1000 images."""
    subsets = KernelSubsets(subsets=4, size=40)
    monkeypatch.setitem(CONVENTIONS, "torch-fidelity", replace(CONVENTIONS["torch-fidelity"], kernel=subsets))
    words = ("fid", sides[0], "--ref", sides[1], *MANY, *PIXELS, "--metrics", "kid,pr,fid-inf")
    outcome = here(*words, "--convention", "torch-fidelity", "-o", "score.safetensors", cwd=folder)
    result, scores = outcome.result, outcome.result["scores"]
    a, b = features_of(folder / "a-many.safetensors"), features_of(folder / "b-many.safetensors")
    kernel = kernel_distance(a, b, subsets)
    both, line = precision_recall(a, b, neighbours=3), frechet_infinity(a, feature_statistics(b))
    near: dict[str, Any] = {
        "rel": 1e-6 if sides[0] == "a.safetensors" else 1e-12
    }  # rounding of pixels, in batches of another process
    assert result["frechet"] == pytest.approx(frechet_of_features(a, b), **near)
    assert scores["kernel_distance"]["mean"] == pytest.approx(kernel.mean, **near)
    assert scores["kernel_distance"]["deviation"] == pytest.approx(kernel.deviation, **near)
    assert (scores["kernel_distance"]["subsets"], scores["kernel_distance"]["size"]) == (4, 40)
    assert (scores["precision"], scores["recall"]) == (both.precision, both.recall)
    assert scores["frechet_infinity"]["intercept"] == pytest.approx(line.intercept, **near)
    assert set(scores) == {"kernel_distance", "precision", "recall", "frechet_infinity"}, (
        "none is called as Inception's"
    )
    assert set(scores["frechet_infinity"]) == set(asdict(line))
    stored = load_file(folder / "score.safetensors")
    assert stored["precision"] == both.precision and stored["kernel_distance.mean"] == scores["kernel_distance"]["mean"]


def test_all_are_those_that_the_convention_has(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "b-many.safetensors", *PIXELS, "--metrics", "all", "--convention")
    assert set(here(*words, "clean-fid", cwd=folder).result["scores"]) == {"kernel_distance", "frechet_infinity"}
    assert set(here(*words, "pytorch-fid", cwd=folder).result["scores"]) == {"frechet_infinity"}
    assert "sFID needs --extractor inception" in here(*words, "adm", cwd=folder).error(2)


def test_an_interval_lies_about_its_value(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "b.safetensors", *MANY, *PIXELS, "--bootstrap", 20)
    result = here(*words, cwd=folder).result
    interval = result["interval"]
    assert interval["estimate"] == pytest.approx(result["frechet"], rel=1e-9)
    assert 0 < interval["low"] < result["frechet"] < interval["high"]
    assert (interval["resamples"], interval["method"]) == (20, "centred")
    assert here(*words, cwd=folder).result["interval"] == interval
    assert here(*words[:-2], cwd=folder).result["interval"] is None


def test_an_interval_against_statistics_and_images(folder: Path) -> None:
    png_folder(folder)
    for reference in ("stats.npz", "png"):
        words = ("fid", "a-many.safetensors", "--ref", reference, *PIXELS, "--bootstrap", 20)
        first, second = (here(*words, cwd=folder).result for _ in range(2))
        assert first["interval"]["low"] < first["frechet"] < first["interval"]["high"]
        assert second == first, "whatever the first one kept"


def test_paired_features_where_seeds_pair(folder: Path) -> None:
    words = ("fid", "a.safetensors", *MANY, *PIXELS, "--ref")
    result = here(*words, "b.safetensors", cwd=folder).result
    a, b = features_of(folder / "a-many.safetensors"), features_of(folder / "b-many.safetensors")
    found = result["paired_features"]
    assert found["estimate"] == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), rel=1e-6)
    assert found["low"] < found["estimate"] < found["high"]
    assert result["paired"]["n"] == 150
    unpaired = here(*words, "r.npz", cwd=folder).result
    assert unpaired["paired"] is None and unpaired["paired_features"] is None
    with_original = here(*words, "r.npz", "--original", "b-many.safetensors", cwd=folder).result
    assert with_original["paired_features"]["estimate"] == pytest.approx(found["estimate"], rel=1e-6)


def test_upstreams_own_sampling_is_scored(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "r.npz", *PIXELS, "--images", 2, "--upstream-exact")
    sampling = here(*words, cwd=folder).result["conditions"]["subject"]["sampling"]
    assert (sampling["solver"], sampling["steps"], sampling["nfe"]) == ("euler", 50, 50)


def test_an_extractor_that_cannot_do_with_even_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that divides by the deviation of an image's pixels: nobody asked for the features of black ones."""
    source = """
        import numpy as np

        def make():
            def normalised(images):
                rows = images.reshape(len(images), -1).astype(float)
                assert (rows.std(axis=1) > 0).all()
                return (rows / rows.std(axis=1, keepdims=True))[:, :5]
            return normalised
    """
    (folder / "normalising.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", "--extractor", "normalising:make")
    assert here(*words, cwd=folder).result["frechet"] > 0
    monkeypatch.delitem(sys.modules, "normalising")


# refused before anything is sampled


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--metrics", "sfid"), 2, "sFID needs --extractor inception"),
        (("--metrics", "pr,is"), 2, "the Inception score needs --extractor inception"),
        (("--metrics", "is", "--convention", "torch-fidelity"), 2, "the Inception score needs"),
        (("--metrics", "fdd"), 2, "--metrics fdd: unknown; choose from sfid, is, pr, kid, fid-inf or all"),
        (("--metrics", "pr,"), 2, "unknown"),
        (("--metrics", ""), 2, "unknown"),
        (("--convention", "fidelity"), 2, "unknown convention 'fidelity'; choose adm"),
        (("--metrics", "kid", "--convention", "x"), 2, "unknown convention"),
        (("--metrics", "kid"), 2, "adm has no such score; give --convention torch-fidelity or clean-fid"),
        (("--metrics", "pr", "--convention", "pytorch-fid"), 2, "give --convention adm or torch-fidelity"),
        (("--metrics", "sfid", "--convention", "clean-fid"), 2, "give --convention adm"),
        (("--bootstrap", 1), 2, "--bootstrap 1"),
        (("--bootstrap", -2), 2, "--bootstrap -2"),
        (("--precision", "fp16"), 2, "--precision fp16"),
        (("--images", 1), 2, "--images 1"),
        (("--batch", 0), 2, "--batch 0"),
        (("--vae", "nowhere"), 2, "makes pixels"),
        (("--metrics", "kid", "--convention", "torch-fidelity"), 3, "a.safetensors: --metrics kid takes at least 1000"),
        (("--metrics", "pr", "--images", 3), 3, "a.safetensors: --metrics pr takes at least 4 images, got 3"),
        (("--metrics", "fid-inf"), 3, "a.safetensors: --metrics fid-inf: extrapolating a distance over 64 features"),
        (("--ref", "one.npz"), 3, "one.npz: a distance needs at least 2 images, got 1"),
        (("--ref", "one.npz", "--anyway"), 3, "one.npz: a distance needs at least 2 images, got 1"),
        (("--ref", "r16.npz"), 3, "r16.npz has images of 16 x 16 x 1; make both alike, or give --anyway"),
        (("--ref", "rgb.npz"), 3, "rgb.npz has images of 8 x 8 x 3"),
        (("--ref", "large.safetensors"), 3, "large.safetensors has images of 16 x 16 x 1"),
        (("--original", "large.safetensors"), 3, "large.safetensors has images of 16 x 16 x 1"),
        (("--ref", "stats.npz", "--metrics", "pr"), 3, "stats.npz: holds statistics, and --metrics pr needs images"),
        (
            ("--ref", "stats.npz", "--metrics", "kid", "--convention", "clean-fid"),
            3,
            "stats.npz: holds statistics, and --metrics kid needs images",
        ),
        (("--ref", "a-many.safetensors"), 3, "steps 1 there, 2 here"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("idle")
def test_refused_before_anything_is_sampled(words: tuple[object, ...], code: int, said: str, folder: Path) -> None:
    before = contents(folder)
    reference = () if "--ref" in words else ("--ref", "b.safetensors")
    line = ("fid", "a.safetensors", *reference, *SETTINGS, *PIXELS, *words, "-o", "score.safetensors")
    assert said in here(*line, cwd=folder).error(code)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "options",
    [
        ("--metrics", "pr"),
        ("--metrics", "kid", "--convention", "clean-fid"),
        ("--metrics", "fid-inf"),
        ("--bootstrap", 9),
    ],
)
@pytest.mark.usefixtures("idle")
def test_statistics_as_the_subject(options: tuple[object, ...], folder: Path) -> None:
    words = ("fid", "stats.npz", "--ref", "b.safetensors", *SETTINGS, *PIXELS, *options)
    option = " ".join(map(str, options[:2])).replace(" 9", "")
    assert f"stats.npz: holds statistics, and {option} needs images" in here(*words, cwd=folder).error(3)


def test_anyway_scores_other_sizes_without_pairs(folder: Path) -> None:
    for reference in ("r16.npz", "large.safetensors"):
        words = ("fid", "a.safetensors", "--ref", reference, *SETTINGS, *PIXELS)
        result = here(*words, "--anyway", cwd=folder).result
        assert result["frechet"] > 0 and result["paired"] is None and result["paired_features"] is None
    wider = ("fid", "a-many.safetensors", "--ref", "rgb.npz", *PIXELS, "--anyway")
    assert "64" in here(*wider, cwd=folder).error(3), "but features must be as many"


def test_samples_under_another_interval(folder: Path) -> None:
    guided = (*SETTINGS, "--cfg", 3)
    here("sample", "a.safetensors", *guided, "--cfg-interval", "0,0.5", "-o", "s.safetensors", cwd=folder)
    words = ("fid", "a.safetensors", *guided, *PIXELS, "--ref", "s.safetensors")
    assert "interval [0.0, 0.5] there, [0.0, 1.0] here" in here(*words, cwd=folder).error(3)
    anyway = here(*words, "--anyway", cwd=folder).result
    assert anyway["frechet"] > 0 and anyway["paired"] is None
    same = here(*words, "--cfg-interval", "0,0.5", cwd=folder).result
    assert same["frechet"] == 0 and same["paired"]["mse"] == 0
    conditions = same["conditions"]["subject"]["sampling"]
    assert (conditions["interval"], conditions["nfe"]) == ([0.0, 0.5], 3)


# Inception's own scores, with a network that stands in for it


class _Network:
    """Features, spatial features and logits that are pixels."""

    def pool_and_spatial(self, images: torch.Tensor, _recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
        flat = images.float().flatten(1) / 255
        return flat[:, :16], flat[:, 16:28]

    def logits(self, pool: torch.Tensor, bias: bool) -> torch.Tensor:
        return 4 * pool[:, :5] + (torch.arange(5) if bias else 0)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> InceptionExtractor:
    """What takes the place of Inception."""
    found = InceptionExtractor(_Network(), "a stand-in", "cpu")  # type: ignore[arg-type]
    monkeypatch.setattr("ditmoe_cli.evaluation.fid.make_extractor", lambda *_, **__: found)
    monkeypatch.setattr("ditmoe_cli.evaluation.fid.will_fetch", lambda _: False)
    return found


@pytest.mark.parametrize("subject", ["a.safetensors", "a-many.safetensors"])
def test_inceptions_scores_are_those_of_the_library(subject: str, folder: Path, network: InceptionExtractor) -> None:
    a, b = (network.activations(images_of(folder / f"{name}-many.safetensors"), ("spatial", "logits")) for name in "ab")
    assert a.spatial is not None and b.spatial is not None and a.logits is not None
    words = ("fid", subject, "--ref", "b-many.safetensors", *MANY, "--extractor", "inception", "--metrics")
    result = here(*words, "all", cwd=folder).result
    assert result["fid"] == pytest.approx(frechet_of_features(a.features, b.features), rel=1e-6)
    assert result["metric"] == "fid" and result["conditions"]["convention"] == "adm"
    scores = result["scores"]
    assert set(scores) == {"sfid", "inception_score", "precision", "recall", "fid_infinity"}
    spatial = frechet_distance(feature_statistics(a.spatial), feature_statistics(b.spatial))
    assert scores["sfid"] == pytest.approx(spatial, rel=1e-6)
    chunked, shuffled = inception_score(a.logits, chunk=5000), inception_score(a.logits, parts=10, seed=2020)
    assert scores["inception_score"] == pytest.approx({"mean": chunked.mean, "deviation": 0.0, "parts": 1}, rel=1e-6)
    other = here(*words, "is", "--convention", "torch-fidelity", cwd=folder).result["scores"]["inception_score"]
    assert other == pytest.approx({"mean": shuffled.mean, "deviation": shuffled.deviation, "parts": 10}, rel=1e-6)


@pytest.mark.usefixtures("network")
def test_kept_statistics_serve_the_spatial_score_where_they_have_it(folder: Path) -> None:
    png_folder(folder)
    words = ("fid", "a-many.safetensors", "--ref", "png", "--extractor", "inception")
    here(*words, cwd=folder)
    first = here(*words, "--metrics", "sfid,is", cwd=folder)
    assert "using the statistics" not in first.err, "the kept ones lack it"
    second = here(*words, "--metrics", "sfid,is", cwd=folder)
    assert "using the statistics" in second.err
    one, two = first.result["scores"], second.result["scores"]
    assert two["sfid"] == pytest.approx(one["sfid"], rel=1e-6) and two["inception_score"] == one["inception_score"]
    assert "using the statistics" in here(*words, cwd=folder).err


@pytest.mark.usefixtures("network", "idle")
def test_images_are_too_few_for_an_inception_score(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "b.safetensors", *SETTINGS, "--extractor", "inception")
    options = ("--metrics", "is", "--convention", "torch-fidelity")
    assert "a.safetensors: --metrics is takes at least 10 images" in here(*words, *options, cwd=folder).error(3)
    missing: tuple[object, ...] = (
        "fid",
        "a.safetensors",
        "--ref",
        "stats.npz",
        *SETTINGS,
        "--extractor",
        "inception",
        "--metrics",
        "sfid",
    )
    assert "stats.npz: has no spatial statistics (mu_s, sigma_s)" in here(*missing, cwd=folder).error(3)


# VAEs


def test_samples_of_latents_say_how_to_get_images(tmp_path: Path) -> None:
    make_pico().save(tmp_path / "a.safetensors")
    assert here("sample", "a.safetensors", "--images", 2, "--steps", 1, "-o", "s.safetensors", cwd=tmp_path).code == 0
    for words in (("s.safetensors", "--ref", "a.safetensors"), ("a.safetensors", "--ref", "s.safetensors")):
        message = here("fid", *words, "--extractor", "pixels", cwd=tmp_path).error(3)
        assert "s.safetensors: holds latents, not images; sample the checkpoint with --vae" in message


@pytest.mark.slow
def test_latents_are_scored_through_one_vae(folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    for seed, name in enumerate(("vae", "other")):
        torch.manual_seed(seed)
        settings: dict[str, Any] = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2}
        diffusers.AutoencoderKL(**settings, latent_channels=4).save_pretrained(folder / name)
    shutil.copytree(folder / "vae", folder / "copy")
    sampled = ("sample", "latent.safetensors", *SETTINGS)
    for name in ("vae", "other", "copy"):
        assert here(*sampled, "--vae", name, "-o", f"{name}.safetensors", cwd=folder).code == 0
    words = ("fid", "latent.safetensors", *SETTINGS, *PIXELS, "--ref")
    assert "give --vae" in here(*words, "vae.safetensors", cwd=folder).error(3)
    assert "latent.safetensors: makes latents" in here(*words, "b.safetensors", cwd=folder).error(3)
    same_words = (*words, "vae.safetensors", "--vae", "vae")
    same = here(*same_words, cwd=folder).result
    assert same["frechet"] == 0 and same["paired"]["mse"] == 0
    assert same["conditions"]["subject"]["vae"]["name"] == "vae"
    for subject in (words[:-1], ("fid", "vae.safetensors", *PIXELS)):
        vae = ("--vae", "vae") if subject[1] == "latent.safetensors" else ()
        other = (*subject, "--ref", "other.safetensors", *vae)
        assert "other.safetensors: was sampled under other settings (VAE" in here(*other, cwd=folder).error(3)
        anyway = here(*other, "--anyway", cwd=folder).result
        assert anyway["frechet"] > 0 and anyway["paired"] is None
    copied = here("fid", "vae.safetensors", *PIXELS, "--ref", "copy.safetensors", cwd=folder).result
    assert copied["paired"]["mse"] == 0, "what a VAE is called is no matter"
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert "input itself" in here(*same_words, "-o", weights, "--force", cwd=folder).error(5)


# statistics that are kept


def test_statistics_of_a_reference_are_kept(folder: Path) -> None:
    png_folder(folder)
    words = ("fid", "a-many.safetensors", "--ref", "png", *PIXELS, "--force")
    first, second = here(*words, cwd=folder), here(*words, cwd=folder)
    assert "kept" not in first.err and f"using the statistics of {folder / 'png'}" in second.err
    assert second.result["frechet"] == pytest.approx(first.result["frechet"], rel=1e-6)
    assert second.result["reference_images"] == 70
    kept = list((folder.parent / "cache" / "ditmoe" / "statistics").iterdir())
    assert len(kept) == 1
    sampled = here("fid", "a.safetensors", *MANY, "--ref", "png", *PIXELS, cwd=folder)
    assert "using the statistics" in sampled.err, "whatever the subject"
    assert sampled.result["frechet"] == pytest.approx(first.result["frechet"], rel=1e-6)
    kept[0].write_bytes(kept[0].read_bytes()[:300])
    assert here(*words, cwd=folder).result == first.result, "a file cut short is made anew"
    Image.new("L", (8, 8), 255).save(folder / "png" / "3.png")
    changed = here(*words, cwd=folder)
    assert "using" not in changed.err and changed.result["frechet"] != pytest.approx(first.result["frechet"], rel=1e-3)


def test_kept_statistics_beside_a_stored_original(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r70.npz", "--original", "b-many.safetensors", *PIXELS, "--force")
    first, second = here(*words, cwd=folder), here(*words, cwd=folder)
    assert "using the statistics" in second.err
    assert second.result["frechet"] == pytest.approx(first.result["frechet"], rel=1e-6)
    assert second.result["paired"] == first.result["paired"] is not None


def test_features_that_are_asked_for_are_taken_all_the_same(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS)
    here(*words, cwd=folder)
    outcome = here(*words, "--metrics", "pr", cwd=folder)
    assert "using" not in outcome.err and 0 <= outcome.result["scores"]["recall"] <= 1


def test_a_cache_that_takes_nothing_costs_no_score(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "full").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "full"))
    monkeypatch.setattr("tempfile.tempdir", str(folder.parent))
    words = ("fid", "a-many.safetensors", "--ref", "r70.npz", *PIXELS)
    outcome = here(*words, cwd=folder)
    assert outcome.result["frechet"] > 0 and "cannot be written; the cache is in" in outcome.err
    assert "kept from an earlier run" in here(*words, cwd=folder).err


def test_a_file_of_statistics_and_images(folder: Path) -> None:
    """As ADM's references are: the distance is to its statistics, other scores are of its images."""
    images = images_of(folder / "b-many.safetensors")[:20]
    given = FeatureStatistics(np.full(64, 100.0), 400 * np.eye(64), None)
    np.savez(folder / "adm.npz", arr_0=images, mu=given.mu, sigma=given.sigma)
    a, b = features_of(folder / "a-many.safetensors"), PixelExtractor(255)(images)
    expected, both = frechet_distance(feature_statistics(a), given), precision_recall(a, b)
    words = ("fid", "a-many.safetensors", "--ref", "adm.npz", *PIXELS)
    plain, scored = (
        here(*words, cwd=folder).result,
        here(*words, "--metrics", "pr", "--bootstrap", 5, cwd=folder).result,
    )
    assert plain["frechet"] == scored["frechet"] == pytest.approx(expected, rel=1e-9)
    assert scored["scores"] == {"precision": both.precision, "recall": both.recall}
    assert scored["interval"]["estimate"] == pytest.approx(expected, rel=1e-9)
    turned = here("fid", "adm.npz", "--ref", "a-many.safetensors", *PIXELS, "--metrics", "pr", cwd=folder).result
    assert turned["scores"] == {"precision": both.recall, "recall": both.precision}
    assert turned["frechet"] == pytest.approx(expected, rel=1e-9)


# what is under way


@pytest.mark.parametrize("form", ["file", "folder", "pickle"])
def test_one_checkpoint_under_two_names_is_sampled_once(form: str, folder: Path) -> None:
    """Whatever its layout."""
    if form == "pickle":
        make_pico(sampler="rf", in_channels=1).save_pt(folder / "x", "deepspeed", num_heads=2)
    else:
        place = ("-o", "x", "--max-shard-size", "50KB") if form == "folder" else ("-o", "x.safetensors")
        assert here("convert", "a.safetensors", *place, cwd=folder).code == 0
    name = "x.safetensors" if form == "file" else "x"
    result = here("fid", name, "--ref", "a.safetensors", *SETTINGS, *PIXELS, cwd=folder).result
    assert result["frechet"] == 0 and result["paired"]["mse"] == 0
    kept = [path.name for path in (folder.parent / "cache" / "ditmoe" / "work").iterdir()]
    assert len(kept) == (2 if form == "pickle" else 1)


def test_other_runs_are_kept_from_what_is_being_filled_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the reference, which they may want too, while the other side is sampled."""
    work, sampled, seen = folder / "work", samples.sample, []

    def watched(*args: Any) -> NDArray[Any]:
        seen.append([path.stem for path in work.glob("*.lock")])
        assert (work / seen[-1][0] / "samples.npy").is_file()
        return sampled(*args)

    monkeypatch.setattr(samples, "sample", watched)
    words = ("fid", "a.safetensors", "--ref", "r.npz", "--original", "b.safetensors", *SETTINGS, *PIXELS)
    assert here(*words, "--work", "work", cwd=folder).result["paired"]["n"] == 6
    assert [len(locked) for locked in seen] == [1, 1] and seen[0] != seen[1]
    assert list(work.iterdir()) == []


def test_a_failure_with_nothing_done_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(*_: Any) -> NDArray[Any]:
        raise MemoryError

    monkeypatch.setattr(samples, "sample", sampled)
    words = ("fid", "a.safetensors", "--ref", "r.npz", *SETTINGS, *PIXELS, "--batch", 1, "--work", "work")
    assert "out of memory" in here(*words, cwd=folder).error(1)
    assert list((folder / "work").iterdir()) == []


LONG = (
    *("fid", "a.safetensors", "--ref", "b.safetensors", *PIXELS),
    *("--steps", 20, "--batch", 1, "--images", 24, "--force"),
)


def numbers(result: Mapping[str, Any]) -> list[float]:
    paired, features = result["paired"], result["paired_features"]
    return [
        result["frechet"],
        *(paired[k] for k in ("mse", "psnr", "max_abs")),
        *(features[k] for k in ("low", "high")),
    ]


@pytest.mark.slow
def test_a_run_that_was_killed_is_gone_on_with_and_two_processes_give_the_same(folder: Path) -> None:
    work = folder / "work"
    straight = here(*LONG, "--work", "work", cwd=folder).result
    child = start(command(*LONG, "--work", "work"), folder)
    end = time.monotonic() + 60
    while len(list(work.glob("*/samples.*.done"))) < 4:
        assert child.poll() is None and time.monotonic() < end, child.communicate()
        time.sleep(0.005)
    child.kill()
    child.communicate()
    assert {path.suffix for path in work.iterdir()} == {"", ".lock"}
    again = here(*LONG, "--work", "work", cwd=folder)
    assert "of 24 images that an earlier run left" in again.err
    assert numbers(again.result) == numbers(straight)
    assert list(work.iterdir()) == []
    printing, silent = in_two_processes(*LONG, "--work", "work", cwd=folder)
    assert (silent.code, silent.out) == (0, ""), "one process prints"
    assert numbers(printing.result) == pytest.approx(numbers(straight), rel=1e-9)
    assert list(work.iterdir()) == []


# scores that are kept


AGAINST = ("fid", "a.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS)


def test_a_second_run_takes_the_kept_score_without_torch(folder: Path) -> None:
    first = here(*AGAINST, cwd=folder)
    ((again, heavy),) = series([AGAINST], folder)
    assert again.envelope == first.envelope
    assert "torch" not in heavy
    assert "warning: only 6 images" in again.err
    assert again.notes[-1] == "ditmoe: the score is kept from an earlier run; --force measures anew"


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "more", [("--seed", 1), ("--bootstrap", 2), ("--metrics", "fid-inf"), ("--original", "c.safetensors"), ("--force",)]
)
def test_what_a_score_depends_on_is_measured_anew(more: tuple[object, ...], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(samples, "sample", SAMPLE)
        here(*AGAINST, "--work", "work", cwd=folder)
    shutil.copy(folder / "large.safetensors", folder / "c.safetensors")
    assert here(*AGAINST, cwd=folder).code == 0
    assert here(*AGAINST, *more, "--work", "work", cwd=folder).code != 0


def test_a_kept_score_follows_files_that_moved_and_not_files_that_changed(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS)
    first = here(*words, cwd=folder).result
    (folder / "r.npz").rename(folder / "s.npz")
    moved = here("fid", "a-many.safetensors", "--ref", "s.npz", *PIXELS, cwd=folder)
    assert "kept from an earlier run" in moved.err
    assert moved.result["conditions"]["reference"]["path"] == str(folder / "s.npz")
    assert moved.result["frechet"] == first["frechet"]
    shutil.copy(folder / "r70.npz", folder / "s.npz")
    changed = here("fid", "a-many.safetensors", "--ref", "s.npz", *PIXELS, cwd=folder)
    assert "kept from an earlier run" not in changed.err
    assert changed.result["frechet"] != first["frechet"]


def test_a_score_file_is_up_to_date_or_completed_or_refused(folder: Path) -> None:
    here(*AGAINST, cwd=folder)
    assert here(*AGAINST, "-o", "s.safetensors", cwd=folder).code == 0
    before = (folder / "s.safetensors").stat().st_mtime_ns
    assert here(*AGAINST, "-o", "s.safetensors", cwd=folder).code == 0
    assert (folder / "s.safetensors").stat().st_mtime_ns == before
    other = here(*AGAINST, "--seed", 1, "-o", "s.safetensors", cwd=folder)
    assert "s.safetensors: exists already" in other.error(5)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"schema": "ditmoe.kept/1"}', b"[]"])
def test_a_damaged_score_is_measured_anew(damage: bytes, folder: Path) -> None:
    first = here(*AGAINST, cwd=folder).result
    (kept,) = (folder.parent / "cache" / "ditmoe" / "results").iterdir()
    kept.write_bytes(damage)
    again = here(*AGAINST, cwd=folder)
    assert again.result == first and "kept from" not in again.err


def test_a_result_that_cannot_be_kept_costs_a_note_alone(folder: Path) -> None:
    (folder.parent / "cache" / "ditmoe").mkdir(parents=True)
    (folder.parent / "cache" / "ditmoe" / "results").write_text("a file")
    outcome = here("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS, cwd=folder)
    assert outcome.code == 0
    assert "the result is not kept for another run" in outcome.err


def test_images_of_a_checkpoint_serve_the_next_subject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[str] = []

    def counted(model: Any, what: Any, indices: Any) -> NDArray[Any]:
        sampled.extend(what.checkpoint.path.stem for _ in indices)
        return SAMPLE(model, what, indices)

    monkeypatch.setattr(samples, "sample", counted)
    here(*AGAINST, cwd=folder)
    again = here("fid", "c.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS, cwd=folder)
    assert again.code == 3 and sampled.count("b") == 6
    make_pico(sampler="rf", in_channels=1, seed=7).save(folder / "c.safetensors")
    again = here("fid", "c.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS, cwd=folder)
    assert "using the 6 images of b.safetensors that an earlier run kept" in again.err
    assert (sampled.count("b"), sampled.count("c")) == (6, 6)


# several files


def test_several_files_make_one_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, against = ("a.safetensors", "b.safetensors"), ("--ref", "b.safetensors", *SETTINGS, *PIXELS)
    one, two = (here("fid", name, *against, "--work", "w", cwd=folder).result for name in names)
    sampled: list[str] = []

    def counted(model: Any, what: Any, indices: Any) -> NDArray[Any]:
        sampled.extend(what.checkpoint.path.stem for _ in indices)
        return SAMPLE(model, what, indices)

    monkeypatch.setattr(samples, "sample", counted)
    words = ("fid", *names, *against, "--force")
    outcome = here(*words, cwd=folder)
    files = outcome.result["files"]
    assert [file["path"] for file in files] == [str(folder / name) for name in names]
    assert set(files[0]) == {*one, "path", "bytes", "seconds"}
    assert [file["frechet"] for file in files] == [one["frechet"], two["frechet"]]
    assert [file["bytes"] for file in files] == [(folder / name).stat().st_size for name in names]
    assert sorted(sampled) == ["a"] * 6 + ["b"] * 6, "the reference is sampled once"
    assert outcome.envelope["checkpoint"] is None
    code, screen = on_terminal(*words[:-1], cwd=folder, NO_COLOR="1")
    assert code == 0
    lines = [line for line in screen.splitlines() if not line.startswith("ditmoe: ")]
    assert lines[0].split() == ["file", "bytes", "paired", "mse", "frechet", "seconds"]
    assert [line.split()[0] for line in lines[1:]] == ["a.safetensors", "b.safetensors"]
    assert "2 of 2 scores are kept from an earlier run" in screen


@pytest.mark.usefixtures("idle")
def test_one_bad_file_of_several_is_refused_before_any_work(folder: Path) -> None:
    words = ("fid", "a.safetensors", "large.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS)
    assert "large.safetensors has images of 16 x 16 x 1" in here(*words, cwd=folder).error(3)
    assert "nowhere.npz" in here("fid", "a.safetensors", "nowhere.npz", *words[3:], cwd=folder).error(3)


def test_a_failure_keeps_the_scores_that_are_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pico(sampler="rf", in_channels=1, seed=7).save(folder / "c.safetensors")

    def failing(model: Any, what: Any, indices: Any) -> NDArray[Any]:
        if what.checkpoint.path.stem == "c":
            raise OSError(28, "No space left on device")
        return SAMPLE(model, what, indices)

    words = ("fid", "a.safetensors", "c.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS)
    with monkeypatch.context() as patched:
        patched.setattr(samples, "sample", failing)
        outcome = here(*words, cwd=folder)
    assert outcome.code == 1
    assert "kept the scores of 1 of 2 files; the same command goes on from there" in outcome.err
    assert "1 of 2 scores are kept from an earlier run" in here(*words, cwd=folder).err


def test_the_gate_names_the_file_of_several(folder: Path) -> None:
    words = ("fid", "b.safetensors", "a.safetensors", "--ref", "b.safetensors", *SETTINGS, *PIXELS, "--max", 0)
    outcome = here(*words, cwd=folder)
    assert outcome.code == 6
    assert f"error: {folder / 'a.safetensors'}: frechet" in outcome.err


@pytest.mark.parametrize("more", [("-o", "s.safetensors"), ("--save-statistics", "s.npz")])
def test_a_file_of_one_score_is_refused_for_several(more: tuple[str, str], folder: Path) -> None:
    words = ("fid", "a.safetensors", "b.safetensors", "--ref", "r.npz", *PIXELS)
    assert f"{more[1]}: holds the score or the statistics of one file, and 2 are given" in here(
        *words, *more, cwd=folder
    ).error(2)


@pytest.mark.parametrize("more", [("--weights", "a.safetensors"), ("--precision", "bf16")])
def test_settings_of_inception_are_refused_for_other_extractors(more: tuple[str, str], folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS)
    assert "is for Inception, and the extractor is pixels" in here(*words, *more, cwd=folder).error(2)


# statistics for later


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_statistics_are_written_and_serve_as_a_reference(suffix: str, folder: Path) -> None:
    words = ("fid", "b-many.safetensors", *PIXELS, "--save-statistics", f"saved.{suffix}")
    assert here(*words, cwd=folder).result["frechet"] == 0, "alone it is compared with itself"
    against = here("fid", "a-many.safetensors", "--ref", "b-many.safetensors", *PIXELS, cwd=folder).result["frechet"]
    found = here("fid", "a-many.safetensors", "--ref", f"saved.{suffix}", *PIXELS, cwd=folder).result
    assert found["frechet"] == pytest.approx(against, rel=1e-9)
    assert found["reference_images"] == 150
    if suffix == "npz":
        with np.load(folder / "saved.npz") as saved:
            assert saved["mu"].shape == (64,) and saved["sigma"].shape == (64, 64), "as pytorch-fid reads them"
    again = here(*words, cwd=folder)
    assert again.code == 0 and "kept from an earlier run" in again.err
    others = here(*words, "--bootstrap", 2, cwd=folder)
    assert others.code == 5 and f"saved.{suffix}" in others.err
    assert here(*words, "--force", cwd=folder).code == 0
    (folder / f"saved.{suffix}").write_bytes(b"other")
    assert here(*words, cwd=folder).code == 5


def test_statistics_of_pixels_have_no_spatial_ones(folder: Path) -> None:
    here("fid", "b-many.safetensors", *PIXELS, "--save-statistics", "s.safetensors", cwd=folder)
    assert set(load_file(folder / "s.safetensors")) == {"mu", "sigma", "n"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--save-statistics", "s.txt"), "--save-statistics s.txt: give a name that ends in"),
        (("--save-statistics", "s.safetensors", "-o", "s.safetensors"), "named twice"),
    ],
)
def test_statistics_that_cannot_be_written(more: tuple[str, ...], said: str, folder: Path) -> None:
    assert said in here("fid", "b-many.safetensors", *PIXELS, *more, cwd=folder).error(2)


def test_statistics_remember_how_and_of_what_they_were_made(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--images", 70, "--steps", 1, "--cfg", 2, *PIXELS)
    here(*words, "--save-statistics", "s.npz", cwd=folder)
    other = ("fid", "b.safetensors", "--images", 70, "--steps", 2, *PIXELS, "--ref", "s.npz")
    message = here(*other, cwd=folder).error(3)
    assert "steps 1 there, 2 here, cfg 2.0 there, 1.0 here" in message
    assert here(*other, "--anyway", cwd=folder).result["frechet"] > 0
    message = here("fid", "rgb.npz", *PIXELS, "--ref", "s.npz", cwd=folder).error(3)
    assert "differ" in message


def test_statistics_against_statistics_take_no_network(folder: Path) -> None:
    """And are called what their files say, or nothing where they say nothing."""
    for name in ("a", "b"):
        here("fid", f"{name}-many.safetensors", *PIXELS, "--save-statistics", f"{name}.npz", cwd=folder)
    result = here("fid", "a.npz", "--ref", "b.npz", cwd=folder).result
    assert result["frechet"] > 0 and result["conditions"]["extractor"]["name"] == "pixels"
    with np.load(folder / "a.npz") as ours:
        np.savez(folder / "theirs.npz", mu=ours["mu"], sigma=ours["sigma"])
    against = here("fid", "theirs.npz", "--ref", "stats.npz", cwd=folder).result
    assert against["frechet"] > 0 and against["conditions"]["extractor"]["name"] == "unknown"
    named = here("fid", "theirs.npz", "--ref", "stats.npz", "--extractor", "inception", cwd=folder).result
    assert named["fid"] == against["frechet"], "who gives them says that they are Inception's"


def test_features_of_code_without_a_digest_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of a factory says nothing of the weights that it loads."""
    (folder / "mine.py").write_text(
        "import numpy as np\ndef make():\n    w = np.load('w.npy')\n"
        "    return lambda images: images.reshape(len(images), -1)[:, :4] * w\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    words = ("fid", "a-many.safetensors", "--ref", "r70.npz", "--extractor", "mine:make")
    found = []
    for weight in (1.0, 2.0):
        np.save(folder / "w.npy", np.full(4, weight))
        outcome = here(*words, cwd=folder)
        assert "using the statistics" not in outcome.err
        found.append(outcome.result["frechet"])
    assert found[1] == pytest.approx(4 * found[0])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ("b-many.safetensors", "--save-statistics", "s.npz", "--max", "1"),
            2,
            "--max: there is nothing to be near to",
        ),
        (("b-many.safetensors", "--ref", "r70.npz", "--vae", "v"), 2, "--vae v: no side is a checkpoint"),
    ],
)
def test_options_that_would_do_nothing(words: tuple[str, ...], code: int, said: str, folder: Path) -> None:
    assert said in here("fid", *words, *PIXELS, cwd=folder).error(code)


def test_an_original_that_pairs_with_nothing_is_told(folder: Path) -> None:
    here("sample", "b.safetensors", "--images", 150, "--steps", 1, "--seed", 5, "-o", "o.safetensors", cwd=folder)
    outcome = here("fid", "a-many.safetensors", "--ref", "r70.npz", "--original", "o.safetensors", *PIXELS, cwd=folder)
    assert outcome.result["paired"] is None and "o.safetensors: pairs with nothing" in outcome.err


def test_few_images_score_the_same_on_every_run(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS)
    first, second = here(*words, cwd=folder), here(*words, cwd=folder)
    assert first.result == second.result and "using the statistics" not in second.err


def test_resamples_have_a_bound(folder: Path) -> None:
    words = ("fid", "a-many.safetensors", "--ref", "r.npz", *PIXELS, "--bootstrap", 10**12)
    assert "--bootstrap 1000000000000: give at most 1000000" in here(*words, cwd=folder).error(2)
