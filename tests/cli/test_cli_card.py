"""Model cards: what a file records and given scores tell, nothing else; texts of files are no markup."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli_helpers import here
from conftest import make_pico
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ditmoe_cli import open_checkpoint
from ditmoe_cli.api.model_cards import code, escaped
from ditmoe_cli.files.provenance import Card, Provenance, Step

A, Q = "a.safetensors", "q.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a copy that was rounded on calibration states, scores of the copy, and pairs of images."""
    folder = tmp_path_factory.mktemp("cards")
    make_pico(sampler="rf", in_channels=1, input_size=4, experts=3).save(folder / A)
    few = ("--calibration-images", 2, "--calibration-steps", 2, "--tokens", 64)
    gptq = ("--uniform", "--bits", 3, "--rounding", "gptq", *few)
    assert here("quantize", A, *gptq, "-o", Q, cwd=folder).code == 0
    score = here("fid", Q, "--ref", A, "--images", 8, "--steps", 2, cwd=folder)
    compared = here("compare", A, Q, "--images", 2, "--steps", 2, "--grid", "pairs.png", cwd=folder)
    for name, outcome in (("fid", score), ("compare", compared)):
        assert outcome.code == 0, outcome.err
        (folder / f"{name}.json").write_text(outcome.out)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def card(folder: Path, *words: object, of: str = Q) -> str:
    outcome = here("inspect", of, "--card", "card.md", *words, cwd=folder)
    assert outcome.code == 0, outcome.err
    return (folder / "card.md").read_text()


def front(text: str) -> dict[str, object]:
    document = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(document, dict)
    return document


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.M)


def test_a_card_says_what_was_done_and_how_to_make_it_again(folder: Path) -> None:
    text = card(folder)
    assert front(text) == {
        "library_name": "ditmoe",
        "tags": ["diffusion", "dit-moe", "mixture-of-experts", "quantized"],
    }
    assert sections(text) == ["What was done", "Sizes", "Damage", "How to load it", "Recipe", "Source and licence"]
    assert "`quantize --format int3-g64 --rounding gptq --tokens 64 --uniform, prediction error" in text
    recipe = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert recipe is not None and recipe[1] == here("inspect", Q, "--recipe", cwd=folder).out
    assert "`int3-g64`" in text and f"ditmoe sample {Q}" in text and str(folder) not in text


def test_damage_is_what_was_measured_with_its_conditions(folder: Path) -> None:
    recorded = card(folder)
    assert "error of the guided prediction after rounding" in recorded and "`2` images, `2` steps" in recorded
    assert "frechet" not in recorded
    text = card(folder, "--scores", "fid.json", "--scores", "compare.json", "--force")
    score, compared = (json.loads((folder / f"{name}.json").read_text())["result"] for name in ("fid", "compare"))
    assert f"| `frechet` (`pixels`) | {score['frechet']:.3g} |" in text
    assert f"| mean squared error of pairs | {score['paired']['mse']:.3g} |" in text
    assert f"| relative error of the prediction | {compared['prediction']['relative_error']:.3g} |" in text
    assert "`8` images, `2` steps of `ab2`, cfg `1.0`, seed `0`" in text


def test_what_nobody_measured_is_absent(folder: Path) -> None:
    here("quantize", A, "--uniform", "--format", "int8", "-o", "plain.safetensors", cwd=folder)
    text = card(folder, of="plain.safetensors")
    assert "Damage" not in sections(text) and "Images of the same seeds" not in sections(text)
    source = card(folder, "--force", of=A)
    assert "Recipe" not in sections(source) and "What was done" not in sections(source)


def test_pairs_stand_beside_the_card(folder: Path) -> None:
    assert "](pairs.png)" in card(folder, "--picture", "pairs.png")
    (folder / "other").mkdir()
    elsewhere = here("inspect", Q, "--card", "other/card.md", "--picture", "pairs.png", cwd=folder)
    assert "is not in the folder of the card" in elsewhere.error(2)
    assert "no such file" in here("inspect", Q, "--card", "x.md", "--picture", "absent.png", cwd=folder).error(3)


def test_scores_of_others_and_no_scores_are_refused(folder: Path) -> None:
    words = ("inspect", A, "--card", "x.md", "--scores")
    assert "is a score of" in here(*words, "fid.json", cwd=folder).error(3)
    assert "no such file" in here(*words, "absent.json", cwd=folder).error(3)
    for text in ("{", "[]", "{}", '{"conditions": {"b": {"identity": 1}}}', json.dumps({"metric": "x", "x": "y"})):
        (folder / "bad.json").write_text(text)
        assert "is no score" in here(*words, "bad.json", cwd=folder).error(3), text
    assert not (folder / "x.md").exists()


def test_a_card_is_replaced_with_force_alone(folder: Path) -> None:
    text = card(folder)
    assert any("is up to date" in note for note in here("inspect", Q, "--card", "card.md", cwd=folder).notes)
    (folder / "card.md").write_text("mine")
    assert "exists" in here("inspect", Q, "--card", "card.md", cwd=folder).error(5)
    assert card(folder, "--force") == text
    assert "--card" in here("inspect", Q, "--card", "card.txt", cwd=folder).error(2)
    assert "no effect without --card" in here("inspect", Q, "--scores", "fid.json", cwd=folder).error(2)
    assert "with OTHER" in here("inspect", A, Q, "--card", "card.md", cwd=folder).error(2)


def test_cards_of_exports_show_scores_and_pairs(folder: Path) -> None:
    words = ("export", Q, "--to", "diffusers", "-o", "shown", "--scores", "fid.json", "--picture", "pairs.png")
    predicted = here(*words, "--dry-run", cwd=folder).result["bytes"]
    assert here(*words, cwd=folder).code == 0
    files = [file for file in (folder / "shown").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == predicted
    text = (folder / "shown" / "README.md").read_text()
    assert "](images.png)" in text and "| `frechet` (`pixels`) |" in text
    assert (folder / "shown" / "images.png").read_bytes() == (folder / "pairs.png").read_bytes()
    assert here(*words, cwd=folder).result["up_to_date"]
    assert "no such file" in here(*words[:-1], "absent.png", cwd=folder).error(3)
    to = ("export", Q, "--to", "upstream", "-o", "none.pt")
    assert "--picture has no effect with --to upstream" in here(*to, "--picture", "pairs.png", cwd=folder).error(2)


@pytest.fixture
def samples(folder: Path) -> tuple[object, ...]:
    """The options that name samples of the copy and of its original, by the same seeds."""
    for name in (A, Q):
        done = here("sample", name, "--images", 3, "--steps", 2, "-o", f"{name}.samples.safetensors", cwd=folder)
        assert done.code == 0, done.err
    return ("--samples", f"{Q}.samples.safetensors", "--samples", f"{A}.samples.safetensors")


def test_pairs_are_drawn_of_samples_in_any_order(folder: Path, samples: tuple[object, ...]) -> None:
    text = card(folder, *samples)
    assert "](card.png)" in text and "This copy: `3` images, `2` steps of `ab2`, cfg `1.0`, seed `0`." in text
    drawn, (first, one, second, two) = (folder / "card.png").read_bytes(), samples
    compared = ("compare", A, Q, "--images", 3, "--steps", 2, "--grid", "grid.png")
    assert here(*compared, cwd=folder).code == 0
    with Image.open(folder / "card.png") as picture, Image.open(folder / "grid.png") as grid:
        assert np.array_equal(np.asarray(picture), np.asarray(grid)), "as compare draws it"
    again = here("inspect", Q, "--card", "card.md", second, two, first, one, cwd=folder)
    assert sum("is up to date" in note for note in again.notes) == 2
    (folder / "card.png").write_bytes(b"mine")
    assert "card.png: exists" in here("inspect", Q, "--card", "card.md", *samples, cwd=folder).error(5)
    assert card(folder, *samples, "--force") == text and (folder / "card.png").read_bytes() == drawn
    export = ("export", Q, "--to", "diffusers", "-o", "drawn", *samples)
    predicted = here(*export, "--dry-run", cwd=folder).result["bytes"]
    assert here(*export, cwd=folder).result["bytes"] == predicted
    assert (folder / "drawn" / "images.png").read_bytes() == drawn
    assert here(*export, cwd=folder).result["up_to_date"]


def test_scores_of_samples_are_the_checkpoint_s_that_they_are_of(folder: Path, samples: tuple[object, ...]) -> None:
    _, ours, _, theirs = samples
    (folder / "s.json").write_text(here("fid", ours, "--ref", theirs, "--extractor", "pixels", cwd=folder).out)
    assert "| `frechet` (`pixels`) |" in card(folder, "--scores", "s.json")
    words = ("inspect", A, "--card", "x.md", "--scores", "s.json")
    assert "is a score of" in here(*words, cwd=folder).error(3)
    (folder / str(ours)).unlink()
    assert "is a score of" in here("inspect", Q, *words[2:], cwd=folder).error(3)


def test_samples_that_make_no_pairs_are_refused(folder: Path, samples: tuple[object, ...]) -> None:
    def refused(*words: object, of: str = Q, code: int = 3) -> str:
        return here("inspect", of, "--card", "x.md", *words, cwd=folder).error(code)

    _, ours, _, theirs = samples
    assert "takes two files" in refused("--samples", ours, code=2)
    assert "give one of both" in refused(*samples, "--picture", "pairs.png", code=2)
    assert "which q.safetensors was not made from" in refused("--samples", ours, "--samples", ours).replace(
        f"{folder}/", ""
    )
    assert "the samples are others'" in refused("--samples", theirs, "--samples", theirs)
    assert "holds no samples of ditmoe" in refused("--samples", ours, "--samples", "pairs.png")
    assert "no such file" in refused("--samples", ours, "--samples", "absent.safetensors")
    other = ("sample", A, "--images", 3, "--steps", 2, "--seed", 1, "-o", "other.safetensors")
    assert here(*other, cwd=folder).code == 0
    assert "other seeds, labels or settings" in refused("--samples", ours, "--samples", "other.safetensors")
    assert not (folder / "x.md").exists() and not (folder / "x.png").exists()


@pytest.mark.parametrize("target", ["compressed-tensors", "bitsandbytes", "sdnq"])
def test_folders_of_all_programs_have_a_card(folder: Path, target: str, samples: tuple[object, ...]) -> None:
    source = Q
    if target == "bitsandbytes":
        source, samples = "n.safetensors", ()
        make_pico(hidden=64, sampler="rf", in_channels=1, input_size=4).save(folder / "wide.safetensors")
        assert here("quantize", "wide.safetensors", "--uniform", "--bits", 8, "-o", source, cwd=folder).code == 0
    words = ("export", source, "--to", target, "-o", "out", *samples)
    predicted = here(*words, "--dry-run", cwd=folder).result["bytes"]
    done = here(*words, cwd=folder)
    assert done.code == 0, done.err
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == predicted == done.result["bytes"]
    text = (folder / "out" / "README.md").read_text()
    library = "diffusers" if target == "sdnq" else target
    assert front(text)["library_name"] == library and f"With {library}:" in text
    shown = {
        "compressed-tensors": "fill(model, 'out')",
        "bitsandbytes": "linear(file, name)",
        "sdnq": "sdnq accelerate",
    }
    assert shown[target] in text
    (folder / "out" / "README.md").write_text("mine")
    assert here(*words, cwd=folder).result["up_to_date"] and (folder / "out" / "README.md").read_text() == "mine"
    if samples:
        (folder / "out" / "images.png").write_bytes(b"other")
        assert "its images.png is another" in here(*words, cwd=folder).error(5)
    assert here(*words, "--force", cwd=folder).code == 0
    assert (folder / "out" / "README.md").read_text() == text
    plain = here("export", source, "--to", target, "-o", "out", "--force", cwd=folder)
    assert plain.code == 0 and not (folder / "out" / "images.png").exists(), plain.err


def test_source_and_licence_are_carried_over(tmp_path: Path) -> None:
    model = make_pico()
    origin = f"hf:owner/some-model/dit.pt@{'0' * 40}"
    model.save(tmp_path / "folder", provenance=Provenance(model.config.to_json(), card=Card(), origin=origin))
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    text = card(tmp_path, of="folder")
    assert front(text)["base_model"] == "owner/some-model" and front(text)["license"] == "cc-by-nc-4.0"
    for broken in ("---\nlicense: [a]\n---\n", "---\nlicense: '<script>'\n---\n", "no front matter", "---\n&\n---\n"):
        (tmp_path / "folder" / "README.md").write_text(broken)
        assert "license" not in front(card(tmp_path, "--force", of="folder"))


def test_a_licence_in_the_metadata_goes_with_all_copies(folder: Path) -> None:
    tensors, metadata = load_file(folder / A), {"license": "cc-by-nc-4.0"}
    with safe_open(folder / A, "numpy") as file:
        save_file(tensors, folder / "l.safetensors", {**file.metadata(), **metadata})
    for words in (("--uniform", "--bits", 8, "-o", "one.safetensors"), ("--uniform", "--bits", 4, "-o", "other")):
        assert here("quantize", "l.safetensors", *words, cwd=folder).code == 0
    converted = here("convert", "one.safetensors", "--dequantize", "-o", "two.safetensors", cwd=folder)
    assert converted.code == 0, converted.err
    for of in ("l.safetensors", "one.safetensors", "other", "two.safetensors"):
        text = card(folder, "--force", of=of)
        assert front(text)["license"] == "cc-by-nc-4.0" and "as the metadata of the source says" in text
    assert "licence" not in open_checkpoint(folder / Q).provenance().to_metadata({})["ditmoe"], "as before"


def test_files_beside_a_source_tell_its_licence_and_those_beside_a_copy_do_not(folder: Path) -> None:
    (folder / "LICENSE").write_text("Permission is hereby granted, free of charge, to any person obtaining a copy")
    plain = {name: value.copy() for name, value in load_file(folder / A).items()}
    save_file(plain, folder / "source.safetensors")
    assert front(card(folder, of="source.safetensors"))["license"] == "mit"
    assert "license" not in front(card(folder, "--force"))
    (folder / "LICENSE").write_text("You may do this and that.")
    other = card(folder, "--force", of="source.safetensors")
    assert front(other)["license"] == "other" and "that of the file `LICENSE` of the source" in other


def test_the_card_of_the_source_in_the_hub_s_cache_tells_the_licence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    commit = folder / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    shutil.copy(folder / A, commit / "dit.safetensors")
    quantized = here(
        "quantize", commit / "dit.safetensors", "--uniform", "--bits", 8, "-o", "h.safetensors", cwd=folder
    )
    assert quantized.code == 0 and "license" not in front(card(folder, of="h.safetensors"))
    (commit / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    document = front(card(folder, "--force", of="h.safetensors"))
    assert document["base_model"] == "owner/name" and document["license"] == "apache-2.0"


def test_texts_of_files_are_no_markup(tmp_path: Path) -> None:
    model, evil = make_pico(), "`</code><script>alert(1)</script> | x\n# heading"
    step = Step("prune", "0" * 64, "", {"method": evil}, made={"ditmoe": "```\n# heading"})
    model.save(tmp_path / "e.safetensors", provenance=Provenance(model.config.to_json(), (step,)))
    text = card(tmp_path, of="e.safetensors")
    outside = re.sub(r"(`+).*?\1", "", text, flags=re.S)
    assert "<script>" not in outside and "# heading" not in outside.replace("## ", "")


def test_spans_hold_any_text() -> None:
    assert code("a") == "`a`" and code("a`b") == "``a`b``" and code("`") == "`` ` ``" and code("a\nb|c") == "`a b¦c`"
    assert escaped("a<b>_c_|d") == "a&lt;b\\>\\_c\\_\\|d"


def test_exported_pipelines_have_a_card(folder: Path) -> None:
    predicted = here("export", Q, "--to", "diffusers", "-o", "out", "--dry-run", cwd=folder).result["bytes"]
    done = here("export", Q, "--to", "diffusers", "-o", "out", cwd=folder)
    assert done.code == 0, done.err
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) == predicted
    text = (folder / "out" / "README.md").read_text()
    assert "DiffusionPipeline.from_pretrained('out', trust_remote_code=True)" in text
    assert front(text)["library_name"] == "diffusers"
    assert "quantized" in str(front(text)["tags"]) and "ditmoe sample" not in text
    (folder / "out" / "README.md").write_text("mine")
    again = here("export", Q, "--to", "diffusers", "-o", "out", cwd=folder)
    assert again.result["up_to_date"] and (folder / "out" / "README.md").read_text() == "mine"
