"""``ditmoe compare`` as a command: arguments and pipes, the gate, what it writes and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import contents, here, on_terminal, piped, series, tensor_shapes
from conftest import make_pico
from PIL import Image

from ditmoe_cli.files.arrays import read_arrays

SETTINGS = ("--images", 3, "--steps", 2, "--bins", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints to compare: pixels, the same pruned both ways and quantised, fewer other experts, and latents."""
    folder = tmp_path_factory.mktemp("compare")
    make_pico(sampler="rf", in_channels=1, seed=3).save(folder / "a.safetensors")
    make_pico(sampler="rf", in_channels=1, experts=2, seed=4).save(folder / "fewer.safetensors")
    make_pico(sampler="ddpm", seed=3).save(folder / "latent.safetensors")
    prune = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit")
    for router in ("ghost", "slice"):
        assert here(*prune, "--router", router, "-o", f"{router}.safetensors", cwd=folder).code == 0
    assert here("quantize", "a.safetensors", "--uniform", "--bits", 8, "-o", "int8.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, and a cache of one's own beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(made, tmp_path / "folder"))


def test_two_arguments(folder: Path) -> None:
    before = contents(folder)
    outcome = here("compare", "a.safetensors", "ghost.safetensors", *SETTINGS, cwd=folder)
    envelope, result = outcome.envelope, outcome.result
    assert envelope["original"] == str(folder / "a.safetensors")
    assert envelope["checkpoint"] == str(folder / "ghost.safetensors")
    assert [step["command"] for step in envelope["history"]] == ["compare"]
    assert result["prediction"]["kind"] == "velocity"
    assert 0 < result["prediction"]["relative_error"] < 1
    assert len(result["prediction"]["steps"]["t"]) == len(result["prediction"]["bins"]["mse"]) == 2
    assert 0 < result["routing"]["overlap"] < 1
    assert result["images"]["n"] == 3 and 0 < result["images"]["ssim"] < 1
    assert result["conditions"]["a"]["path"] == envelope["original"]
    assert result["conditions"]["sampling"]["images"] == 3
    assert contents(folder) == before, "nothing is written unasked"


def test_a_pipe_compares_its_original_with_its_checkpoint(folder: Path) -> None:
    words = " ".join(map(str, SETTINGS))
    script = f"ditmoe quantize a.safetensors --uniform --bits 8 -o q.safetensors | ditmoe compare {words}"
    through = piped(script, folder)
    given = here("compare", "a.safetensors", "q.safetensors", *SETTINGS, cwd=folder)
    assert through.result == given.result
    assert through.envelope["original"] == str(folder / "a.safetensors")
    assert [step["command"] for step in through.envelope["history"]] == ["quantize", "compare"]
    assert 0 < through.result["prediction"]["relative_error"] < 0.01


def test_a_checkpoint_and_itself(folder: Path) -> None:
    inspected = here("inspect", "a.safetensors", cwd=folder)
    for outcome in (
        here("compare", "a.safetensors", "a.safetensors", *SETTINGS, "--max-error", 0, cwd=folder),
        here("compare", *SETTINGS, "--max-error", 0, "--cfg", 2, cwd=folder, stdin=inspected.out),
    ):
        assert outcome.code == 0
        assert outcome.result["prediction"]["relative_error"] == outcome.result["latents"]["mse"] == 0
        assert outcome.result["routing"]["overlap"] == outcome.result["images"]["ssim"] == 1


@pytest.mark.slow
def test_upstreams_own_sampling(folder: Path) -> None:
    for name, settings in {"a": ("euler", 50, 50), "latent": ("ddpm", 250, 250)}.items():
        words = ("compare", f"{name}.safetensors", f"{name}.safetensors", "--images", 2, "--upstream-exact")
        result = here(*words, cwd=folder).result
        sampling = result["conditions"]["sampling"]
        assert (sampling["solver"], sampling["steps"], sampling["nfe"]) == settings
        assert len(result["prediction"]["steps"]["t"]) == sampling["steps"]
        assert result["latents"]["mse"] == 0
    words = ("compare", "a.safetensors", "a.safetensors", "--upstream-exact")
    for option in (("--steps", 4), ("--solver", "euler")):
        assert "leave out --solver and --steps" in here(*words, *option, cwd=folder).error(2)


def test_heun_has_no_steps_to_follow(folder: Path) -> None:
    words = ("compare", "a.safetensors", "a.safetensors", *SETTINGS, "--solver", "heun")
    assert "evaluates the model twice in some steps" in here(*words, cwd=folder).error(2)


def test_sliced_experts_are_told_by_their_router_rows(folder: Path) -> None:
    sliced, ghosted = (
        here("compare", "a.safetensors", f"{name}.safetensors", *SETTINGS, cwd=folder).result["routing"]
        for name in ("slice", "ghost")
    )
    assert sliced["note"] is None
    assert all(0 < share < 1 for share in sliced["blocks"]["overlap"])
    # what the first block is given does not depend on what becomes of its rows
    assert sliced["blocks"]["overlap"][0] == ghosted["blocks"]["overlap"][0]


def test_fewer_rows_that_are_others_have_no_names(folder: Path) -> None:
    result = here("compare", "a.safetensors", "fewer.safetensors", *SETTINGS, cwd=folder).result
    assert result["routing"]["overlap"] is None
    assert result["routing"]["blocks"]["overlap"] == [None, None]
    assert "router rows were deleted" in result["routing"]["note"]


def test_the_gate_prints_first(folder: Path) -> None:
    words = ("compare", "a.safetensors", "ghost.safetensors", *SETTINGS)
    error = here(*words, cwd=folder).result["prediction"]["relative_error"]
    assert here(*words, "--max-error", error, cwd=folder).code == 0
    outcome = here(*words, "--max-error", error * 0.99, "-o", "c.safetensors", cwd=folder)
    assert outcome.code == 6
    assert outcome.result["prediction"]["relative_error"] == error
    assert re.search(r"ditmoe: error: velocity relative error .* is above --max-error", outcome.err)
    assert (folder / "c.safetensors").exists()


def test_files_and_quiet(folder: Path) -> None:
    words = ("compare", "a.safetensors", "fewer.safetensors", *SETTINGS)
    outcome = here(*words, "-o", "c.safetensors", "--grid", "g.png", "-q", cwd=folder)
    assert outcome.out == f"{folder / 'c.safetensors'}\n"
    assert tensor_shapes(folder / "c.safetensors")["depth.bins.added"] == (2, 2)
    stored = read_arrays(folder / "c.safetensors", ["prediction.relative_error", "routing.overlap"])
    result = here(*words, cwd=folder).result
    assert stored["prediction.relative_error"] == result["prediction"]["relative_error"]
    assert np.isnan(stored["routing.overlap"])
    with Image.open(folder / "g.png") as image:
        assert image.format == "PNG" and image.mode == "L"
    assert here(*words, "--grid", "h.png", "-q", cwd=folder).out == f"{folder / 'h.png'}\n"
    assert here(*words, "-q", cwd=folder).out == ""


@pytest.mark.parametrize("option", [("-o", "c.safetensors"), ("--grid", "c.png")])
def test_outputs_that_exist_stay(option: tuple[str, str], folder: Path) -> None:
    (folder / option[1]).write_bytes(b"mine")
    before = contents(folder)
    words = ("compare", "a.safetensors", "a.safetensors", *SETTINGS, *option)
    assert option[1] in here(*words, cwd=folder).error(5)
    assert contents(folder) == before
    assert here(*words, "--force", cwd=folder).code == 0
    assert (folder / option[1]).read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["a.safetensors", "ghost.safetensors"])
def test_no_input_is_written_over(name: str, folder: Path) -> None:
    before = contents(folder)
    words = ("compare", "a.safetensors", "ghost.safetensors", *SETTINGS, "-o", name, "--force")
    assert "is the input itself" in here(*words, cwd=folder).error(5)
    assert contents(folder) == before


def test_latents_have_no_images(folder: Path) -> None:
    words = ("compare", "latent.safetensors", "latent.safetensors", *SETTINGS)
    result = here(*words, "--cfg", 1.5, cwd=folder).result
    assert result["images"] is None
    assert result["prediction"]["kind"] == "noise"
    assert "need a VAE" in here(*words, "--grid", "g.png", cwd=folder).error(3)
    assert not (folder / "g.png").exists()


def test_other_architectures_name_both_values(folder: Path) -> None:
    message = here("compare", "a.safetensors", "latent.safetensors", *SETTINGS, cwd=folder).error(3)
    assert "sampler ddpm instead of rf" in message and "in_channels 4 instead of 1" in message
    assert "a.safetensors" in message and "latent.safetensors" in message


def test_a_pipe_without_an_original(folder: Path) -> None:
    envelope = json.dumps({"schema": "ditmoe.stage/1", "checkpoint": str(folder / "a.safetensors")})
    assert "names no original" in here("compare", *SETTINGS, cwd=folder, stdin=envelope).error(3)


def test_one_argument_is_not_taken_for_half_of_a_pipe(folder: Path) -> None:
    """`here` without stdin fails a command that reads it."""
    assert "give A and B" in here("compare", "a.safetensors", *SETTINGS, cwd=folder).error(2)


def test_a_terminal_gets_a_table(folder: Path) -> None:
    words = ("compare", "a.safetensors", "fewer.safetensors", *SETTINGS)
    code, text = on_terminal(*words, cwd=folder, NO_COLOR="1")
    assert code == 0
    for line in (
        r"velocity error +relative \d\.\d+, mse ",
        r"by step bin +\S+ \S+$",
        r"final images +mse .*psnr .* dB, ssim 0\.\d+ over 3 pairs",
        r"routing overlap +n/a \(unknown where router rows were deleted",
        r"block 1 +adds \d\.\d+, cumulative \d\.\d+, overlap n/a",
    ):
        assert re.search(line, text, re.MULTILINE), (line, text)
    assert str(folder / "fewer.safetensors") in text


def test_default_bins_follow_few_steps(folder: Path) -> None:
    result = here("compare", "a.safetensors", "ghost.safetensors", "--images", 2, "--steps", 3, cwd=folder).result
    assert result["conditions"]["bins"] == 3
    assert len(result["prediction"]["bins"]["mse"]) == 3


PAIR = ("compare", "a.safetensors", "ghost.safetensors", *SETTINGS)


def test_a_second_run_takes_the_kept_result_without_torch(folder: Path) -> None:
    first = here(*PAIR, cwd=folder)
    ((again, heavy),) = series([PAIR], folder)
    assert again.envelope == first.envelope
    assert "torch" not in heavy
    assert again.notes[-1] == "ditmoe: the result is kept from an earlier run; --force measures anew"
    for more in (("--seed", 1), ("--force",)):
        assert "kept from" not in here(*PAIR, *more, cwd=folder).err


def test_outputs_are_up_to_date_or_written_or_refused(folder: Path) -> None:
    words = (*PAIR, "--grid", "g.png", "-o", "c.safetensors")
    here(*PAIR, cwd=folder)
    assert "kept from" not in here(*words, cwd=folder).err, "they are not there yet"
    before = contents(folder)
    assert "kept from" in here(*words, cwd=folder).err
    assert contents(folder) == before
    assert "exists already" in here(*words, "--seed", 1, cwd=folder).error(5)
    (folder / "g.png").write_bytes(b"other")
    assert "exists already" in here(*words, cwd=folder).error(5)


def test_several_checkpoints_make_one_table(folder: Path) -> None:
    names = ("ghost.safetensors", "int8.safetensors")
    single = [here("compare", "a.safetensors", name, *SETTINGS, cwd=folder).result for name in names]
    words = ("compare", "a.safetensors", *names, *SETTINGS)
    outcome = here(*words, "--force", cwd=folder)
    files = outcome.result["files"]
    assert [file["path"] for file in files] == [str(folder / name) for name in names]
    assert [file["bytes"] for file in files] == [(folder / name).stat().st_size for name in names]
    for file, one in zip(files, single, strict=True):
        assert {name: file[name] for name in one} == one
    code, screen = on_terminal(*words, cwd=folder, NO_COLOR="1")
    assert code == 0 and "2 of 2 results are kept from an earlier run" in screen
    lines = [line for line in screen.splitlines() if not line.startswith("ditmoe: ")]
    assert lines[0].split() == ["file", "bytes", "relative", "error", "image", "mse", "quick", "frechet", "seconds"]
    assert [line.split()[0] for line in lines[1:]] == list(names)
    assert "ghost.safetensors: velocity relative error" in here(*words, "--max-error", 0, cwd=folder).err


def test_one_bad_checkpoint_of_several_is_refused_before_any_work(folder: Path) -> None:
    words = ("compare", "a.safetensors", "ghost.safetensors", "latent.safetensors", *SETTINGS)
    assert "latent.safetensors: has sampler" in here(*words, cwd=folder).error(3)
    assert not (folder.parent / "cache").exists()
    several = ("compare", "a.safetensors", "ghost.safetensors", "int8.safetensors", *SETTINGS, "--grid", "g.png")
    assert "g.png: holds one comparison, and 2 checkpoints are given" in here(*several, cwd=folder).error(2)


def test_images_that_exceed_memory_are_refused(folder: Path) -> None:
    words = ("compare", "a.safetensors", "ghost.safetensors", "--images", 10**9)
    assert "--images 1000000000: all final latents are held" in here(*words, cwd=folder).error(2)
