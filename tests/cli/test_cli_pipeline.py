"""Commands joined: the pipeline in a shell, profiles on the way, and scores against all kinds of references."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Outcome, contents, here, piped, shell, tensor_shapes
from conftest import make_pico
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

pytestmark = pytest.mark.usefixtures("few_tokens")

SETTINGS = ("--images", 4, "--steps", 2)
PROFILING = (*SETTINGS, "--bins", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pixel checkpoint, its profile, another one's profile, and samples; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    make_pico(sampler="rf", in_channels=1, seed=9).save(folder / "other.safetensors")
    for name in ("a", "other"):
        words = ("profile-experts", f"{name}.safetensors", *PROFILING, "-o", f"{name}.profile.safetensors")
        assert here(*words, cwd=folder).code == 0
    assert here("sample", "a.safetensors", *SETTINGS, "-o", "s.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


def commands_of(outcome: Outcome) -> list[str]:
    return [step["command"] for step in outcome.envelope["history"]]


# the four stages


def test_the_pipeline_on_the_demo(tmp_path: Path) -> None:
    outcome = piped(
        "ditmoe profile-experts demo:digits --images 8 --steps 4 --bins 4 | ditmoe prune --keep 0.5 --refit-tokens 256 "
        "| ditmoe quantize --uniform --bits 4 | ditmoe fid --images 16 --steps 4",
        tmp_path,
    )
    assert commands_of(outcome) == ["profile-experts", "prune", "quantize", "fid"]
    result = outcome.result
    assert result["metric"] == "frechet" and "fid" not in result, "pixels are not Inception features"
    assert result["frechet"] > 0 and result["paired"]["mse"] > 0
    assert result["images"] == result["reference_images"] == result["paired"]["n"] == 16
    conditions = result["conditions"]
    assert conditions["extractor"]["name"] == "pixels", "the demo's metadata names it"
    assert conditions["subject"]["sampling"] == conditions["reference"]["sampling"]
    assert conditions["subject"]["sampling"]["steps"] == 4
    assert conditions["reference"]["path"].endswith("digits.safetensors")
    names = sorted(file.name for file in tmp_path.iterdir())
    pruned = "digits.prune-keep0.5-tokens256"
    assert names == ["digits.profile.safetensors", f"{pruned}.quantize-nf4.safetensors", f"{pruned}.safetensors"]


def test_overrides_reach_every_later_stage(tmp_path: Path) -> None:
    """A pickle that tells neither heads nor top-k; fid opens it again as the original."""
    make_pico(sampler="rf", in_channels=1).save_pt(tmp_path / "m.pt")
    assert "--heads" in here("profile-experts", "m.pt", *PROFILING, cwd=tmp_path).error(3)
    outcome = here("profile-experts", "m.pt", "--heads", 4, "--top-k", 1, *PROFILING, cwd=tmp_path)
    for words in (
        ("prune", "--keep", 1),
        ("quantize", "--uniform", "--bits", 8),
        ("fid", *SETTINGS, "--extractor", "pixels"),
    ):
        outcome = here(*words, cwd=tmp_path, stdin=outcome.out)
        assert outcome.envelope["given"] == {"num_heads": 4, "top_k": 1, "sampler": None, "num_classes": None}
    assert outcome.envelope["original"] == str(tmp_path / "m.pt")
    assert outcome.result["paired"]["mse"] > 0
    config = here("inspect", outcome.path, cwd=tmp_path).result["config"]
    assert (config["num_heads"], config["top_k"], config["num_experts"]) == (4, 1, 1)


def test_a_reference_can_be_given_what_it_does_not_tell(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save_pt(tmp_path / "m.pt")
    converted = here("convert", "m.pt", "--heads", 4, cwd=tmp_path)
    for side in ("--ref", "--original"):
        words = ("fid", converted.path, "--ref", converted.path, side, "m.pt", *SETTINGS, "--extractor", "pixels")
        assert "--heads" in here(*words, cwd=tmp_path).error(3)
        assert here(*words, "--heads", 4, cwd=tmp_path).result["paired"]["mse"] == 0


@pytest.mark.slow
def test_the_pipeline_on_a_real_checkpoint(shared: Path, tmp_path: Path) -> None:
    source = shared / "cifar10" / "checkpoint.pt"
    outcome = piped(
        f"ditmoe profile-experts {source} --images 4 --steps 2 --bins 2 | ditmoe prune --keep 0.5 --no-refit "
        "| ditmoe quantize --uniform --bits 4 | ditmoe fid --images 4 --steps 2 --extractor pixels",
        tmp_path,
    )
    assert outcome.envelope["original"] == str(source)
    assert outcome.result["paired"]["mse"] > 0
    assert outcome.path.stat().st_size < source.stat().st_size / 6
    words = ("fid", outcome.path, "--ref", source.with_name("images.npz"), *SETTINGS, "--extractor", "pixels")
    scored = here(*words, cwd=tmp_path)
    assert scored.result["reference_images"] == 10_000
    assert scored.result["paired"] is None, "real images have no seeds"


def test_a_failing_stage_fails_the_pipe_and_leaves_nothing(folder: Path) -> None:
    before = contents(folder)
    outcome = shell("ditmoe inspect a.safetensors | ditmoe prune --keep 9 | ditmoe quantize --uniform --bits 4", folder)
    assert outcome.code == 3 and outcome.out == "", "the last stage says that its input is empty"
    assert sorted(line.split(": ")[2].split()[0] for line in outcome.err.splitlines()) == ["--keep", "stdin"]
    assert contents(folder) == before


@pytest.mark.parametrize("change", [("convert",), ("prune", "--keep", "1.0")])
def test_an_unchanged_model_scores_zero(change: tuple[str, ...], folder: Path) -> None:
    profiled = here("inspect", "a.safetensors", cwd=folder).envelope
    profiled["profile"] = str(folder / "a.profile.safetensors")
    copied = here(*change, cwd=folder, stdin=json.dumps(profiled))
    scored = here("fid", *SETTINGS, cwd=folder, stdin=copied.out)
    assert scored.result["frechet"] == 0.0
    assert scored.result["paired"]["mse"] == 0.0
    assert scored.result["conditions"]["subject"]["path"] == str(copied.path)
    assert scored.result["conditions"]["reference"]["path"] == str(folder / "a.safetensors")


def test_a_changed_model_does_not(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 2, "--profile", "a.profile.safetensors")
    pruned = here(*words, cwd=folder)
    scored = here("fid", *SETTINGS, cwd=folder, stdin=pruned.out)
    assert scored.result["frechet"] > 0
    assert scored.result["paired"]["mse"] > 0


# profiles on the way


def test_prune_after_prune_profiles_with_the_settings_of_the_ancestor(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 3, "--profile", "a.profile.safetensors", "-o", "once.safetensors")
    once = here(*words, cwd=folder)
    assert not [note for note in once.notes if "profiling" in note]
    assert once.envelope["profile"] == str(folder / "a.profile.safetensors")
    twice = here("prune", "--keep", 2, cwd=folder, stdin=once.out)
    (note,) = [note for note in twice.notes if "profiling" in note]
    assert "once.safetensors" in note and "ancestor" in note
    kept = Path(twice.envelope["profile"])
    assert str(kept) in note and kept.parent == folder and kept.is_file()
    with safe_open(folder / "a.profile.safetensors", "np") as first, safe_open(kept, "np") as second:
        told = [json.loads(file.metadata()["ditmoe"]) for file in (first, second)]
    assert told[0]["calibration"] == told[1]["calibration"]
    assert told[0]["checkpoint"] != told[1]["checkpoint"]
    assert told[1]["experts"] == [3, 3]
    # the second time the kept profile is used, and gives the same bytes
    again = here("prune", "--keep", 2, "-o", "again.safetensors", cwd=folder, stdin=once.out)
    assert any(str(kept) in note and "using" in note for note in again.notes)
    assert again.path.read_bytes() == twice.path.read_bytes()


def test_prune_after_quantize_profiles_what_it_prunes(folder: Path) -> None:
    envelope = {
        **here("inspect", "a.safetensors", cwd=folder).envelope,
        "profile": str(folder / "a.profile.safetensors"),
    }
    quantized = here("quantize", "--uniform", "--bits", 8, cwd=folder, stdin=json.dumps(envelope))
    pruned = here("prune", "--keep", 2, "--no-refit", cwd=folder, stdin=quantized.out)
    assert any("ancestor" in note for note in pruned.notes)
    described = here("inspect", pruned.path, cwd=folder).result
    assert described["history"] == ["quantize", "prune"]
    assert described["formats"]["int8"] > 0
    assert here("fid", *SETTINGS, cwd=folder, stdin=pruned.out).result["frechet"] > 0


def test_without_any_profile_one_is_made_and_kept(folder: Path) -> None:
    (folder / "a.profile.safetensors").unlink()
    pruned = here("prune", "a.safetensors", "--keep", 2, "--refit-tokens", 64, cwd=folder)
    assert any("no profile was given" in note for note in pruned.notes)
    made = Path(pruned.envelope["profile"])
    assert made.is_file() and made.name.startswith("a.")
    with safe_open(made, "np") as file:
        calibration = json.loads(file.metadata()["ditmoe"])["calibration"]
    assert (calibration["images"], calibration["steps"]) == (64, 20), "the defaults of profile-experts"


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_the_profile_of_an_unrelated_checkpoint_is_refused(options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    words = ("prune", "a.safetensors", "--keep", 2, "--profile", "other.profile.safetensors", *options)
    assert "other.profile.safetensors: is the profile of another checkpoint" in here(*words, cwd=folder).error(3)
    envelope = {
        **here("inspect", "a.safetensors", cwd=folder).envelope,
        "profile": str(folder / "other.profile.safetensors"),
    }
    assert "another checkpoint" in here("prune", "--keep", 2, *options, cwd=folder, stdin=json.dumps(envelope)).error(3)
    assert contents(folder) == before


def test_a_plan_for_another_checkpoint_is_refused(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--dry-run")
    (folder / "plan.json").write_text(here(*words, cwd=folder).out)
    for options in ((), ("--dry-run",)):
        message = here("apply", "other.safetensors", "--plan", "plan.json", *options, cwd=folder).error(3)
        assert "another checkpoint" in message


def test_the_container_does_not_matter_to_a_profile(folder: Path) -> None:
    """The fingerprint is of tensors and configuration: a sharded copy may use the original's profile."""
    copied = here("convert", "a.safetensors", "-o", "shards", "--max-shard-size", "50KB", cwd=folder)
    words = ("prune", copied.path, "--keep", 2, "--profile", "a.profile.safetensors", "-o", "p.safetensors")
    (closing,) = here(*words, cwd=folder).notes
    assert "narrowing all of them" in closing, "nothing is said of the profile"


# --keep


@pytest.mark.parametrize(("keep", "experts"), [("0.5", 2), ("2", 2), ("4", 4), ("1.0", 4), ("0.51", 3), ("0.75", 3)])
@pytest.mark.parametrize("router", ["slice", "ghost"])
def test_keep_is_a_ratio_or_a_count(keep: str, experts: int, router: str, folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", keep, "--router", router, "--profile", "a.profile.safetensors")
    pruned = here(*words, "--refit-tokens", 64, cwd=folder)
    assert [len(block) for block in pruned.result["kept"]] == [experts, experts]
    assert here("inspect", pruned.path, cwd=folder).result["config"]["num_experts"] == experts
    rows = tensor_shapes(pruned.path)["blocks.0.moe.gate.weight"][0]
    assert rows == (4 if router == "ghost" else experts)


@pytest.mark.parametrize(
    ("keep", "code"),
    [
        *(
            (keep, 2)
            for keep in ("0", "0.0", "1.5", "-1", "-0.5", "x", "", "nan", "inf", "1e3", "0,5", "50%", "1/2", "²")
        ),
        *((keep, 4) for keep in ("1", "0.25", "0.01", "5", "100", "1" + "0" * 30)),
    ],
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_other_keeps_are_refused(keep: str, code: int, options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    words = ("prune", "a.safetensors", "--keep", keep, "--profile", "a.profile.safetensors", *options)
    assert f"--keep {keep}" in here(*words, cwd=folder).error(code)
    assert contents(folder) == before


def test_keep_follows_an_explicit_top_k(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit")
    assert "top-3" in here(*words, "--top-k", 3, cwd=folder).error(4)
    assert here(*words, "--top-k", 2, cwd=folder).code == 0


# references


def images_of(path: Path) -> np.ndarray:
    with safe_open(path, "np") as file:
        return file.get_tensor("images")


def statistics(dimension: int) -> dict[str, np.ndarray]:
    return {"mu": np.zeros(dimension), "sigma": np.eye(dimension), "n": np.asarray(50)}


def make_reference(kind: str, folder: Path) -> Path:
    """The samples of the checkpoint (or statistics of the same width) in another form."""
    images = images_of(folder / "s.safetensors")
    if kind == "npz":
        np.savez(folder / "r.npz", arr_0=images)
        return folder / "r.npz"
    if kind == "folder":
        (folder / "png").mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image[:, :, 0]).save(folder / "png" / f"{i}.png")
        return folder / "png"
    if kind == "statistics npz":
        np.savez(folder / "r.npz", **statistics(64))
        return folder / "r.npz"
    if kind == "statistics":
        save_file(statistics(64), folder / "r.safetensors")
        return folder / "r.safetensors"
    return folder / {"samples": "s.safetensors", "checkpoint": "a.safetensors"}[kind]


@pytest.mark.parametrize("kind", ["npz", "folder", "samples", "checkpoint"])
def test_images_in_any_form_are_the_same_reference(kind: str, folder: Path) -> None:
    reference = make_reference(kind, folder)
    outcome = here("fid", "a.safetensors", "--ref", reference, *SETTINGS, cwd=folder)
    result = outcome.result
    assert result["frechet"] == pytest.approx(0, abs=1e-9), "it is what the checkpoint itself samples"
    assert result["reference_images"] == 4
    assert result["conditions"]["reference"]["path"] == str(reference)
    if kind in ("samples", "checkpoint"):
        assert result["paired"] == {"mse": 0.0, "max_abs": 0.0, "psnr": None, "n": 4}
    else:
        assert result["paired"] is None, "images of unknown origin pair with nothing"


@pytest.mark.parametrize("kind", ["statistics npz", "statistics"])
def test_statistics_are_a_reference(kind: str, folder: Path) -> None:
    reference = make_reference(kind, folder)
    result = here("fid", "s.safetensors", "--ref", reference, cwd=folder).result
    assert result["frechet"] > 0
    assert (result["images"], result["reference_images"]) == (4, 50)
    assert result["conditions"]["reference"]["kind"] == "statistics"
    assert here("fid", reference, "--ref", reference, "--extractor", "pixels", cwd=folder).result["frechet"] == 0


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_statistics_of_another_dimension_are_refused(suffix: str, folder: Path) -> None:
    reference = folder / f"wide.{suffix}"
    np.savez(reference, **statistics(65)) if suffix == "npz" else save_file(statistics(65), reference)
    message = here("fid", "s.safetensors", "--ref", reference, cwd=folder).error(3)
    assert str(reference) in message and "64" in message and "65" in message


def test_samples_pair_with_the_same_seeds_of_the_original(folder: Path) -> None:
    """`sample` in a pipe hands its images on, and fid samples the original with their seed, not its own default."""
    words = ("prune", "a.safetensors", "--keep", 2, "--profile", "a.profile.safetensors")
    pruned = here(*words, cwd=folder)
    sampled = here("sample", "--images", 3, "--steps", 2, "--seed", 5, "--cfg", 2, cwd=folder, stdin=pruned.out)
    assert sampled.envelope["checkpoint"] == str(pruned.path)
    scored = here("fid", cwd=folder, stdin=sampled.out)
    conditions = scored.result["conditions"]
    assert conditions["subject"]["path"] == sampled.envelope["samples"]
    for side in ("subject", "reference", "original"):
        sampling = conditions[side]["sampling"]
        assert (sampling["seed"], sampling["cfg"], sampling["images"], sampling["nfe"]) == (5, 2.0, 3, 4), side
    assert scored.result["paired"]["n"] == 3
    direct = here(
        *("fid", pruned.path, "--ref", "a.safetensors"),
        *("--images", 3, "--steps", 2, "--seed", 5, "--cfg", 2),
        cwd=folder,
    )
    assert direct.result["paired"]["mse"] == pytest.approx(scored.result["paired"]["mse"], rel=1e-6)
    explicit = here("fid", sampled.envelope["samples"], "--ref", "a.safetensors", cwd=folder)
    assert explicit.result["paired"] == scored.result["paired"]


def test_samples_do_not_outlive_a_change_of_the_model(folder: Path) -> None:
    sampled = here("sample", "a.safetensors", *SETTINGS, cwd=folder)
    quantized = here("quantize", "--uniform", "--bits", 4, cwd=folder, stdin=sampled.out)
    assert quantized.envelope["samples"] is None
    scored = here("fid", *SETTINGS, cwd=folder, stdin=quantized.out)
    assert scored.result["conditions"]["subject"]["path"] == str(quantized.path)


def test_latents_cannot_be_scored_without_a_decoder(folder: Path) -> None:
    make_pico().save(folder / "latent.safetensors")
    message = here("fid", "latent.safetensors", "--ref", "s.safetensors", *SETTINGS, cwd=folder).error(3)
    assert "latent" in message and "VAE" in message
    sampled = here("sample", "latent.safetensors", *SETTINGS, cwd=folder)
    assert tensor_shapes(Path(sampled.envelope["samples"]))["latents"] == (4, 4, 8, 8)


# extractors and the gate


def test_a_custom_extractor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        import numpy as np

        def make():
            return lambda images: images.reshape(len(images), -1)[:, :3].astype(float)

        def broken():
            return lambda images: images.astype(float)
    """
    (folder / "custom_features.py").write_text(textwrap.dedent(source))
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = ("fid", "a.safetensors", "--ref", "other.safetensors", *SETTINGS, "--extractor")
    outcome = here(*words, "custom_features:make", cwd=folder)
    assert outcome.result["frechet"] > 0
    assert outcome.result["conditions"]["extractor"]["name"] == "custom_features:make"
    assert "custom_features:broken" in here(*words, "custom_features:broken", cwd=folder).error(3)
    assert "nothing" in here(*words, "custom_features:nothing", cwd=folder).error(2)
    monkeypatch.delitem(sys.modules, "custom_features")


@pytest.mark.parametrize("name", ["vgg", "", "a:b:c", "custom features:make", "no_such_module_at_all:make"])
def test_unknown_extractors_are_usage_errors(name: str, folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "s.safetensors", "--extractor", name)
    assert "extractor" in here(*words, cwd=folder).error(2)


def test_inception_without_weights_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is a port that nobody listens on, so that no machine fetches anything."""
    for name in ("DITMOE_INCEPTION", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    words = ("fid", "a.safetensors", "--ref", "s.safetensors", *SETTINGS, "--extractor", "inception")
    message = here(*words, cwd=folder).error(3)
    assert "--weights" in message and "DITMOE_INCEPTION" in message
    assert not [file for file in (folder / "cache").rglob("*") if file.is_file()]


def test_inception_is_the_default_where_nothing_names_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITMOE_INCEPTION", str(folder / "nothing.pth"))
    make_pico(sampler="rf", in_channels=1).save_pt(folder / "m.pt")
    words = ("fid", "m.pt", "--heads", 2, "--ref", make_reference("npz", folder), *SETTINGS)
    assert "nothing.pth" in here(*words, cwd=folder).error(3)
    for weights in ("missing.pth", "a.safetensors"):
        assert weights in here(*words, "--weights", weights, cwd=folder).error(3)


def test_the_gate_fails_after_the_result_is_printed(folder: Path) -> None:
    words = ("fid", "a.safetensors", "--ref", "other.safetensors", *SETTINGS)
    passed = here(*words, "--max", "1e9", cwd=folder)
    assert passed.code == 0
    failed = here(*words, "--max", "0.5", "-o", "score.safetensors", cwd=folder)
    assert failed.code == 6
    assert failed.result["frechet"] == passed.result["frechet"] > 0.5
    assert failed.err.splitlines()[-1].startswith("ditmoe: error: frechet") and "--max 0.5" in failed.err
    assert here("fid", "a.safetensors", "--ref", "a.safetensors", *SETTINGS, "--max", "0", cwd=folder).code == 0
    with safe_open(folder / "score.safetensors", "np") as file:
        assert float(file.get_tensor("frechet")) == failed.result["frechet"]
        assert json.loads(file.metadata()["ditmoe"])["schema"] == "ditmoe.score/1"
