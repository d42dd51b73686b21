"""``ditmoe sample``: pictures for others, VAEs, solvers, and runs that are cut off or shared."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import slow_but
from cli_helpers import command, contents, here, in_two_processes, series, start
from conftest import make_pico
from PIL import Image
from safetensors.numpy import load_file

from ditmoe_cli.evaluation.image_grids import sample_grid
from ditmoe_cli.evaluation.images import read_images
from ditmoe_cli.evaluation.samples import read_origin

SETTINGS = ("--images", 5, "--steps", 2)
VIEWS = ("--png", "png", "--npz", "a.npz", "--grid", "g.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models on grey and colour pixels, and on latents of both families; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    make_pico(sampler="rf", in_channels=1).save(folder / "grey.safetensors")
    make_pico(sampler="rf", in_channels=3).save(folder / "colour.safetensors")
    make_pico(sampler="rf").save(folder / "latent.safetensors")
    make_pico(sampler="ddpm").save(folder / "ddpm.safetensors")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random VAEs of two pixels per latent, of four and of three latent channels."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vaes")
    for channels in (4, 3):
        torch.manual_seed(channels)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=channels,
        )
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        vae.save_pretrained(folder / f"vae{channels}")
    return folder


def listing(folder: Path) -> set[str]:
    """All names in a folder, hidden ones too."""
    return {path.name for path in folder.iterdir()}


# pictures


@pytest.mark.parametrize("model", ["grey", "colour"])
@pytest.mark.parametrize("there", [False, True])
def test_pictures_are_the_images(model: str, there: bool, folder: Path) -> None:
    if there:
        (folder / "png").mkdir()
    before = listing(folder)
    outcome = here("sample", f"{model}.safetensors", *SETTINGS, *VIEWS, "-o", "s.safetensors", cwd=folder)
    assert outcome.err == ""
    arrays = load_file(folder / "s.safetensors")
    images = arrays["images"]
    assert images.shape == (5, 8, 8, 1 if model == "grey" else 3) and images.std() > 10
    assert np.array_equal(read_images(folder / "png").images, images)
    assert sorted(listing(folder / "png")) == [f"{i:06d}.png" for i in range(5)]
    npz = read_images(folder / "a.npz")
    assert np.array_equal(npz.images, np.broadcast_to(images, (5, 8, 8, 3)))
    assert npz.labels is not None and npz.labels.tolist() == arrays["labels"].tolist() == [0, 1, 2, 0, 1]
    with Image.open(folder / "g.png") as grid:
        expected = sample_grid(images, arrays["labels"])
        assert np.array_equal(np.asarray(grid).reshape(expected.shape), expected)
    result = outcome.result
    told = {name: result[name] for name in ("png", "npz", "grid")}
    assert told == {"png": str(folder / "png"), "npz": str(folder / "a.npz"), "grid": str(folder / "g.png")}
    assert result["bytes"] == (folder / "s.safetensors").stat().st_size
    assert listing(folder) - before == {"s.safetensors", "png", "a.npz", "g.png"} - before
    again = here("sample", f"{model}.safetensors", *SETTINGS, *VIEWS, "-o", "s.safetensors", "--force", cwd=folder)
    assert again.code == 0, "ours are replaced by force"


def test_force_replaces_more_pictures_by_fewer(folder: Path) -> None:
    words = ("sample", "grey.safetensors", "--steps", 1, "--png", "png", "--force", "--images")
    for images in (4, 2):
        assert here(*words, images, cwd=folder).code == 0
    assert sorted(listing(folder / "png")) == ["000000.png", "000001.png"]


# VAEs


def test_a_vae_turns_latents_into_images(vaes: Path, folder: Path) -> None:
    from ditmoe_cli.diffusion.vae import open_vae
    from ditmoe_cli.evaluation.images import to_uint8

    vae = vaes / "vae4"
    decoded = here("sample", "latent.safetensors", *SETTINGS, "--vae", vae, *VIEWS, "-o", "i.safetensors", cwd=folder)
    plain = here("sample", "latent.safetensors", *SETTINGS, "-o", "z.safetensors", cwd=folder)
    images, latents = (load_file(folder / name) for name in ("i.safetensors", "z.safetensors"))
    assert images["images"].shape == (5, 16, 16, 3) and latents["latents"].shape == (5, 4, 8, 8)
    decoder = open_vae(str(vae))
    expected = to_uint8(decoder.decode(torch.from_numpy(latents["latents"])))
    assert np.abs(images["images"].astype(int) - expected.astype(int)).max() <= 1
    assert expected.std() > 1, "else there is nothing to see"
    assert np.array_equal(read_images(folder / "png").images, images["images"])
    for name in ("labels", "seed"):
        assert np.array_equal(images[name], latents[name])
    assert decoded.result["vae"]["name"] == "vae4" and plain.result["vae"] is None
    origin = read_origin(folder / "i.safetensors")
    assert origin is not None and origin.vae == decoder.to_json() == decoded.result["vae"]


def test_the_vae_is_no_target(vaes: Path, folder: Path) -> None:
    shutil.copytree(vaes / "vae4", folder / "vae")
    before = contents(folder)
    for target in (("-o", "vae/diffusion_pytorch_model.safetensors"), ("--png", "vae")):
        words = ("sample", "latent.safetensors", *SETTINGS, "--vae", "vae", *target, "--force")
        assert "is the input itself" in here(*words, cwd=folder).error(5)
    assert contents(folder) == before


# refusals

THERE = ("s.safetensors", "a.npz", "g.png", "png/000000.png", "photos/cat.png")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("latent", "--png", "new"), 3, "give --vae"),
        (("latent", "--npz", "new.npz"), 3, "give --vae"),
        (("latent", "--grid", "new.png"), 3, "give --vae"),
        (("latent", "--vae", "nowhere"), 3, "nowhere: no such folder"),
        (("latent", "--vae", "photos"), 3, "holds no VAE"),
        (("latent", "--vae", "photos", "--png", "photos", "--force"), 5, "is the input itself"),
        (("grey", "--vae", "nowhere"), 2, "makes pixels"),
        (("grey", "--vae", "nowhere", *VIEWS, "--force"), 2, "makes pixels"),
        (("grey", "-o", "new.safetensors", "--npz", "new.npz", "--grid", "./new.npz"), 2, "ends in .png"),
        (("grey", "--png", "new.png", "--grid", "./new.png"), 2, "new.png: named twice"),
        (("grey", "-o", "new.safetensors", "--png", "new.safetensors"), 2, "named twice"),
        (("grey", "-o", "png/new.safetensors", "--png", "png", "--force"), 2, "lies in png"),
        (("grey", "--npz", "new.zip"), 2, "new.zip: give a name that ends in .npz"),
        (("grey", "--grid", "new.jpg"), 2, "ends in .png"),
        (("grey", "-o", "s.safetensors"), 5, "s.safetensors: exists already"),
        (("grey", "--png", "png"), 5, "png: exists already"),
        (("grey", "--npz", "a.npz"), 5, "a.npz: exists already"),
        (("grey", "--grid", "g.png"), 5, "g.png: exists already"),
        (("grey", "--png", "photos", "--force"), 5, "holds cat.png"),
        (("grey", "--png", "g.png"), 5, "g.png: exists already"),
        (("grey", "--png", "."), 2, "lies in ."),
        (("grey", "--png", ".", "-o", "../new.safetensors", "--force"), 5, "is the input itself"),
        (("grey", "--png", "nowhere/png"), 3, "nowhere: no such folder"),
        (("grey", "--grid", "nowhere/g.png"), 3, "nowhere: no such folder"),
        (("grey", "--cfg-interval", "0.5"), 2, "--cfg-interval 0.5"),
        (("grey", "--cfg-interval", "0.8,0.2"), 2, "--cfg-interval 0.8,0.2"),
        (("grey", "--cfg-interval", "0.2,0.8"), 2, "--cfg-interval 0.2,0.8: nothing is guided at a scale of 1"),
        (("grey", "--cfg-interval", "0,1.5"), 2, "--cfg-interval 0,1.5"),
        (("grey", "--cfg-interval", "nan,1"), 2, "--cfg-interval nan,1"),
        (("grey", "--cfg-interval", "a,b"), 2, "--cfg-interval a,b"),
        (("grey", "--upstream-exact"), 2, "--upstream-exact"),  # with --steps, as all here
        (("ddpm", "--solver", "heun"), 2, "--solver heun: is not for ddpm"),
        (("grey", "--solver", "ddpm-dpmpp-2m"), 2, "is not for rf"),
        (("ddpm", "--solver", "dpmpp-2m", "--steps", "1000"), 2, "--steps 1000: must be between 1 and 999"),
        (("ddpm", "--steps", "1000"), 2, "--steps 1000: must be between 1 and 999"),
        (("ddpm", "--solver", "ddim", "--steps", "1001"), 2, "--steps 1001: must be between 1 and 1000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_leave_nothing(words: tuple[str, ...], code: int, said: str, folder: Path) -> None:
    for name in THERE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"mine")
    before = contents(folder)
    model, *options = words
    message = here("sample", f"{model}.safetensors", *SETTINGS, *options, cwd=folder).error(code)
    assert said in message
    assert contents(folder) == before


def test_a_vae_of_other_channels(vaes: Path, folder: Path) -> None:
    before = contents(folder)
    for views in ((), VIEWS):
        words = ("sample", "latent.safetensors", *SETTINGS, "--vae", vaes / "vae3", *views)
        message = here(*words, cwd=folder).error(3)
        assert "latent.safetensors: makes latents of 4 channels" in message and "vae3 decodes 3" in message
    assert contents(folder) == before


# solvers and guidance


def test_an_interval_of_guidance_saves_evaluations(folder: Path) -> None:
    found: dict[str, Any] = {}
    for name, options in {
        "plain": (),
        "all": ("--cfg", 3),
        "told": ("--cfg", 3, "--cfg-interval", "0,1"),
        "some": ("--cfg", 3, "--cfg-interval", "0.3,0.6"),
    }.items():
        words = ("sample", "grey.safetensors", "--images", 4, "--steps", 10, *options, "-o", f"{name}.safetensors")
        found[name] = here(*words, cwd=folder).result
    assert {name: result["nfe"] for name, result in found.items()} == {"plain": 10, "all": 20, "told": 20, "some": 14}
    assert found["some"]["spec"]["interval"] == [0.3, 0.6]
    assert (folder / "all.safetensors").read_bytes() == (folder / "told.safetensors").read_bytes()
    images = [load_file(folder / f"{name}.safetensors")["images"] for name in ("plain", "all", "some")]
    assert all(not np.array_equal(a, b) for a, b in ((images[0], images[1]), (images[0], images[2]), images[1:]))
    origin = read_origin(folder / "some.safetensors")
    assert origin is not None and origin.spec.interval == (0.3, 0.6)


@pytest.mark.parametrize(
    ("model", "solver", "steps"), slow_but([("grey", "euler", 50)], [("grey", "euler", 50), ("ddpm", "ddpm", 250)])
)
def test_upstreams_own_sampling(model: str, solver: str, steps: int, folder: Path) -> None:
    words = ("sample", f"{model}.safetensors", "--images", 1)
    exact = here(*words, "--upstream-exact", "-o", "exact.safetensors", cwd=folder)
    assert (exact.result["spec"]["solver"], exact.result["spec"]["steps"]) == (solver, steps)
    assert exact.result["nfe"] == steps
    here(*words, "--solver", solver, "--steps", steps, "-o", "told.safetensors", cwd=folder)
    assert (folder / "exact.safetensors").read_bytes() == (folder / "told.safetensors").read_bytes()
    for options in (("--steps", steps), ("--solver", solver)):
        message = here(*words, "--upstream-exact", *options, "-o", "x.safetensors", cwd=folder).error(2)
        assert "--upstream-exact" in message and options[0] in message
    assert not (folder / "x.safetensors").exists()


@pytest.mark.parametrize(("model", "name"), [("grey", "dpmpp-2m"), ("latent", "dpmpp-2m"), ("ddpm", "ddpm-dpmpp-2m")])
def test_one_name_is_the_solver_of_both_families(model: str, name: str, folder: Path) -> None:
    words = ("sample", f"{model}.safetensors", *SETTINGS, "--solver", "dpmpp-2m", "-o", "s.safetensors")
    result = here(*words, cwd=folder).result
    assert (result["spec"]["solver"], result["nfe"]) == (name, 2)
    found = load_file(folder / "s.safetensors")["images" if model == "grey" else "latents"]
    assert np.isfinite(found.astype(float)).all() and found.std() > 0


def test_heun_samples_but_cannot_be_followed_by_step(folder: Path) -> None:
    assert here("sample", "grey.safetensors", *SETTINGS, "--solver", "heun", cwd=folder).result["nfe"] == 3
    before = contents(folder)
    for words in (("profile-experts", "grey.safetensors"), ("compare", "grey.safetensors", "grey.safetensors")):
        message = here(*words, *SETTINGS, "--bins", 2, "--solver", "heun", cwd=folder).error(2)
        assert "--solver heun" in message and "twice in some steps" in message
    assert contents(folder) == before


# cut off, and gone on with

LONG = ("--images", 16, "--steps", 20, "--batch", 1, "-o", "s.safetensors")


def wait_for(condition: Callable[[], object], child: subprocess.Popen[str], seconds: float = 600) -> None:
    """Wait until something is so, while a child is at work."""
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, f"ended before: {child.communicate()}"
        assert time.monotonic() < end, "not within its time"
        time.sleep(0.005)


def marks(folder: Path) -> int:
    """How many batches are done in the workspaces of a folder."""
    return len(list(folder.glob(".*.work/*.done")))


@pytest.fixture(scope="module")
def straight(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run makes."""
    folder = tmp_path_factory.mktemp("straight")
    assert here("sample", made / "grey.safetensors", *LONG, cwd=folder).code == 0
    return folder / "s.safetensors"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_run_that_was_cut_off_is_gone_on_with(
    number: signal.Signals, code: int, folder: Path, straight: Path
) -> None:
    before = listing(folder)
    child = start(command("sample", "grey.safetensors", *LONG), folder)
    wait_for(lambda: marks(folder) >= 3, child)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (code, "") and "Traceback" not in err
    done = marks(folder)
    assert 3 <= done < 16
    left = listing(folder) - before
    assert {name.split(".")[-1] for name in left} == ({"work", "lock"} if number == signal.SIGKILL else {"work"})
    assert all(name.startswith(".s.safetensors.") for name in left)
    outcome = here("sample", "grey.safetensors", *LONG, cwd=folder)
    assert outcome.notes == [f"ditmoe: going on with {done} of 16 images that an earlier run left"]
    assert listing(folder) - before == {"s.safetensors"}
    assert (folder / "s.safetensors").read_bytes() == straight.read_bytes()


# several processes


def torchrun(*words: object) -> list[str]:
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone")
    return [sys.executable, "-m", *launcher, "-m", "ditmoe_cli", *map(str, words)]


def rank_of(child: int) -> str | None:
    """The rank of a process that torchrun started; None for others."""
    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    return next((value[5:].decode() for value in variables if value.startswith(b"RANK=")), None)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_a_rank_that_dies_ends_the_job_and_the_next_one_goes_on(folder: Path, straight: Path) -> None:
    before = listing(folder)
    job = start(torchrun("sample", "grey.safetensors", *LONG), folder)
    try:
        wait_for(lambda: marks(folder) >= 4, job)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        (victim,) = [int(child) for child in children if rank_of(int(child)) == "1"]
        os.kill(victim, signal.SIGKILL)
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
        job.communicate()
    assert job.returncode != 0 and out == ""
    assert "internal error" not in err, "the other one says what happened, if it had time to notice"
    assert 4 <= marks(folder) < 40 and not (folder / "s.safetensors").exists()
    printing, silent = in_two_processes("sample", "grey.safetensors", *LONG, cwd=folder)
    assert printing.envelope["samples"] == str(folder / "s.safetensors")
    assert (silent.code, silent.out) == (0, ""), "one process prints"
    assert (printing.err + silent.err).count("going on with") == 1, "and one speaks"
    assert listing(folder) - before == {"s.safetensors"}
    assert (folder / "s.safetensors").read_bytes() == straight.read_bytes()


def test_a_second_run_is_up_to_date_without_torch(folder: Path) -> None:
    words = ("sample", "grey.safetensors", *SETTINGS, *VIEWS, "-o", "s.safetensors")
    first = here(*words, cwd=folder)
    before = contents(folder)
    ((again, heavy),) = series([words], folder)
    assert again.envelope == first.envelope
    assert again.notes[-1] == f"ditmoe: {folder / 's.safetensors'}: up to date"
    assert "torch" not in heavy
    assert contents(folder) == before
    other = here(*words, "--seed", 1, cwd=folder)
    assert "s.safetensors: exists already, sampled in another way (other seed 0)" in other.error(5)
    assert here(*words, "--force", cwd=folder).envelope == first.envelope
    assert contents(folder) == before


def test_decoded_samples_are_up_to_date_by_their_vae(folder: Path, vaes: Path) -> None:
    words = ("sample", "latent.safetensors", *SETTINGS, "-o", "s.safetensors")
    first = here(*words, "--vae", vaes / "vae4", cwd=folder)
    again = here(*words, "--vae", vaes / "vae4", cwd=folder)
    assert again.envelope == first.envelope
    assert "up to date" in again.notes[-1]
    assert "other vae" in here(*words, cwd=folder).error(5)
