"""Samples through a workspace: batch size, processes and restarts change no image, and finished rows are kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import with_slow
from conftest import make_pico
from numpy.typing import NDArray
from safetensors.numpy import load_file
from seeing import Seen

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, BrokenImageError, DitmoeError, OutputExistsError, UsageError
from ditmoe_cli.evaluation import samples
from ditmoe_cli.evaluation.samples import (
    SAMPLES,
    LoadedModels,
    Sampling,
    Targets,
    check_targets,
    fill,
    read_origin,
    write_samples,
)
from ditmoe_cli.evaluation.worker import Notify, Runtime, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.processes import WHOLE, Share
from ditmoe_cli.progress import phase, watched_by

IMAGES = 7
SPEC = SampleSpec(images=IMAGES, steps=3, cfg=1.0, seed=5, solver="euler", classes=(0, 2, 1))
Change = Callable[[Any], None]


def silent(_: str) -> None:
    """Drop the message."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of pixels and one of latents; tests do not write to it."""
    sampled = tmp_path_factory.mktemp("models")
    make_pico(sampler="rf", in_channels=1, hidden=16, depth=1).save(sampled / "pixels.safetensors")
    make_pico(sampler="rf", hidden=16, depth=1).save(sampled / "latents.safetensors")
    return sampled


@pytest.fixture(params=with_slow(["pixels", "latents"]))
def what(request: pytest.FixtureRequest, folder: Path) -> Sampling:
    """Return a sampling of seven images, or latents."""
    return Sampling(open_checkpoint(folder / f"{request.param}.safetensors"), SPEC)


@pytest.fixture
def pixels(folder: Path) -> Sampling:
    """Return a sampling of seven images."""
    return Sampling(open_checkpoint(folder / "pixels.safetensors"), SPEC)


def worker(batch: int, share: Share = WHOLE, notify: Notify = silent) -> Worker:
    """Return a process on the CPU that shows no progress."""
    return Worker(Runtime(batch=batch), share, notify)


def whole(what: Sampling) -> NDArray[Any]:
    """Return all samples at once, without a workspace."""
    return _sampled(LoadedModels(build_model(what.checkpoint, torch.device("cpu"))), what, range(what.spec.images))


def assert_equal_but_rounding(result: NDArray[Any], expected: NDArray[Any]) -> None:
    assert result.shape == expected.shape and result.dtype == expected.dtype
    if result.dtype == np.uint8:
        assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
        assert result.std() > 10, "else there is nothing to see"
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@dataclass
class Watch:
    """Counts sampled images, and fails at the image `fail_at`."""

    sampled: list[int] = field(default_factory=list)
    fail_at: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, model: Any, what: Sampling, indices: Any) -> NDArray[Any]:
        if self.fail_at is not None and self.fail_at in indices:
            raise BadInputError("failed on purpose")
        with self.lock:
            self.sampled += list(indices)
        return _sampled(model, what, indices)


_sampled = samples.sample


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Return the record of the images that `fill` samples."""
    result = Watch()
    monkeypatch.setattr(samples, "sample", result)
    return result


# batches, processes, restarts


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_size_changes_nothing(what: Sampling, batch: int, tmp_path: Path) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    after: dict[int, NDArray[Any]] = {}
    fill(work, what, worker(batch), after.__setitem__)
    assert_equal_but_rounding(work.array(SAMPLES), whole(what))
    assert sorted(after) == list(range(0, IMAGES, batch))
    assert all(np.array_equal(values, work.array(SAMPLES)[first : first + batch]) for first, values in after.items())
    assert work.array(SAMPLES).shape == (IMAGES, *what.shape)


def together(work: Workspace, what: Sampling, batch: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill a workspace by `world` threads that wait for each other as processes do."""
    barrier, errors = threading.Barrier(world, timeout=60), []
    answers: list[Any] = []

    def answer_all(self: Share, find: Callable[[], Any]) -> Any:
        if self.first:
            answers.append(find())
        barrier.wait()
        result = answers[-1]
        barrier.wait()
        return result

    monkeypatch.setattr(Share, "wait", lambda self: barrier.wait() if self.world > 1 else None)
    monkeypatch.setattr(Share, "from_first", answer_all)

    def run(rank: int) -> None:
        try:
            fill(work, what, worker(batch, Share(rank, world)))
            assert work.done(SAMPLES).all(), "nobody returns before all is done"
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []


def test_the_last_thing_is_to_wait_for_those_that_still_look_into_the_workspace(
    pixels: Sampling, tmp_path: Path
) -> None:
    """The first process, done with its outputs, deletes it."""
    work = Workspace(tmp_path / "w", IMAGES)

    class Met(Share):
        """A process that all others have met at its second waiting, when the first one deletes the workspace."""

        waited = 0

        def wait(self) -> None:
            Met.waited += 1
            if Met.waited == 2:
                work.remove()

    fill(work, pixels, worker(64, Met()))
    assert Met.waited == 2 and not work.folder.exists()


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (3, 1), (5, 3)])
def test_the_number_of_processes_changes_nothing(
    what: Sampling, world: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    together(work, what, batch, world, monkeypatch)
    assert sorted(watch.sampled) == list(range(IMAGES)), "each image is sampled once"
    assert_equal_but_rounding(work.array(SAMPLES), whole(what))


@pytest.mark.parametrize("again", [1, 2, 5])
def test_a_restart_makes_only_what_is_missing(what: Sampling, again: int, tmp_path: Path, watch: Watch) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    messages: list[str] = []
    watch.fail_at = 4
    with pytest.raises(BadInputError, match="failed on purpose"), work.locked(silent):
        fill(work, what, worker(2))
    assert watch.sampled == [0, 1, 2, 3] and work.done(SAMPLES).sum() == 4
    watch.fail_at, watch.sampled = None, []
    fill(work, what, worker(again, notify=messages.append))
    assert watch.sampled == [4, 5, 6]
    assert messages == ["going on with 4 of 7 images that an earlier run left"]
    assert_equal_but_rounding(work.array(SAMPLES), whole(what))
    fill(work, what, worker(again, notify=messages.append))
    assert watch.sampled == [4, 5, 6], "a third run has nothing to do"
    assert messages[1:] == [f"using the 7 images of {what.checkpoint.path.name} that an earlier run kept"]


def test_several_processes_go_on_where_one_stopped(
    pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    work.create(SAMPLES, pixels.shape, np.uint8)
    work.put(SAMPLES, 2, whole(pixels)[2:4])
    together(work, pixels, 1, 3, monkeypatch)
    assert sorted(watch.sampled) == [0, 1, 4, 5, 6]
    assert_equal_but_rounding(work.array(SAMPLES), whole(pixels))


# out of memory


def tight(most: int, error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let models raise `error` for more than `most` images; return the list of the sizes that they are called with."""
    sizes: list[int] = []

    def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise error

    def build(*args: Any) -> Any:
        model = build_model(*args)
        model.x_embedder.register_forward_pre_hook(hook)
        return model

    monkeypatch.setattr("ditmoe_cli.model.loading.build_model", build)
    return sizes


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_batches_are_halved_where_memory_runs_out(
    what: Sampling, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    messages: list[str] = []
    expected, sizes = whole(what), tight(2, error, monkeypatch)
    fill(work, what, worker(5, notify=messages.append))
    assert messages == ["out of memory with 5 images at a time; going on with 2"]
    assert [size for size in sizes if size > 2] == [5], "once is enough"
    assert_equal_but_rounding(work.array(SAMPLES), expected)


def test_halving_goes_on_as_far_as_one(pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workspace(tmp_path / "w", IMAGES)
    messages: list[str] = []
    tight(1, MemoryError(), monkeypatch)
    fill(work, pixels, worker(64, notify=messages.append))
    assert [line.split(";")[0].split("with ")[1] for line in messages] == ["7 images at a time", "3 images at a time"]
    assert_equal_but_rounding(work.array(SAMPLES), whole(pixels))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_one_image_that_does_not_fit_ends_in_its_error(
    pixels: Sampling, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight(0, error, monkeypatch)
    with pytest.raises(type(error)):
        write_samples(pixels, Runtime(batch=4), Targets(tmp_path / "s.safetensors"), silent)
    assert list(tmp_path.iterdir()) == []


def test_other_failures_are_not_taken_for_memory(
    pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tight(0, RuntimeError("the size of tensor a must match"), monkeypatch)
    with pytest.raises(RuntimeError, match="must match"):
        fill(Workspace(tmp_path / "w", IMAGES), pixels, worker(4))
    assert sizes == [4]


# NaN


def poisoned(image: int, evaluation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model return NaN for an image, recognised by its noise, from an evaluation of its batch on."""
    from ditmoe_cli.diffusion.noise import image_noise

    noise = image_noise(SPEC.seed, [image], torch.device("cpu"), "image").draw((1, 8, 8))[0]

    def build(*args: Any) -> Any:
        model = build_model(*args)
        where: list[int] = []
        count = [0]

        def given(_module: Any, inputs: tuple[Any, ...]) -> None:
            count[0] += 1
            if count[0] % SPEC.steps == 1:
                where[:] = [i for i, x in enumerate(inputs[0]) if torch.equal(x, noise)]

        def hook(_module: Any, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if (count[0] - 1) % SPEC.steps + 1 >= evaluation:
                output = output.clone()
                output[where] = torch.nan
            return output

        model.x_embedder.register_forward_pre_hook(given)
        model.final_layer.register_forward_hook(hook)
        return model

    monkeypatch.setattr("ditmoe_cli.model.loading.build_model", build)


@pytest.mark.parametrize(("image", "evaluation", "batch"), [(0, 1, 3), (4, 2, 3), (6, 3, 1)])
def test_nan_names_image_seed_and_evaluation(
    pixels: Sampling, image: int, evaluation: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(image, evaluation, monkeypatch)
    with pytest.raises(BadInputError) as caught:
        write_samples(pixels, Runtime(batch=batch), Targets(tmp_path / "s.safetensors"), silent)
    assert f"in image {image} (seed 5) at evaluation {evaluation} of 3" in str(caught.value)
    left = list(tmp_path.iterdir())
    if image < batch:
        assert left == [], "nothing was done"
    else:
        (kept,) = left
        assert kept.name.startswith(".s.safetensors.") and kept.name.endswith(".work")
        assert Workspace(kept, IMAGES).done(SAMPLES).tolist() == [i < image // batch * batch for i in range(IMAGES)]


@dataclass
class Fragile:
    """A decoder of latents to their channels' mean that breaks one image, recognised by its latents."""

    broken: torch.Tensor
    upsampling: int = 1
    name: str = "vae-small"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        for index, each in enumerate(latents):
            if torch.allclose(each, self.broken, atol=1e-4):
                raise BrokenImageError(index, f"NaN or infinite values after decoding by {self.name}")
        return latents.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_an_image_that_breaks_in_decoding_is_named_by_its_own_number(folder: Path, batch: int, tmp_path: Path) -> None:
    latents = Sampling(open_checkpoint(folder / "latents.safetensors"), SPEC)
    decoder: Any = Fragile(torch.from_numpy(whole(latents)[5]))
    with pytest.raises(BadInputError, match=r"^image 5 \(seed 5\): NaN or infinite values after decoding by vae-small"):
        write_samples(
            replace(latents, decoder=decoder),
            Runtime(batch=batch),
            Targets(tmp_path / "s.safetensors"),
            silent,
        )


# whole runs


def run(what: Sampling, file: Path, batch: int = 64, messages: list[str] | None = None, **targets: Any) -> NDArray[Any]:
    """Write samples and read them back."""
    size = write_samples(
        what,
        Runtime(batch=batch),
        Targets(file, **targets),
        silent if messages is None else messages.append,
    )
    assert size == file.stat().st_size
    return load_file(file)["images" if what.images else "latents"]


def test_a_success_leaves_the_file_alone(what: Sampling, tmp_path: Path) -> None:
    result = run(what, tmp_path / "s.safetensors", 3)
    assert_equal_but_rounding(result, whole(what))
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    origin = read_origin(tmp_path / "s.safetensors")
    assert origin == what.origin


def test_a_run_that_failed_is_gone_on_with(what: Sampling, tmp_path: Path, watch: Watch) -> None:
    file = tmp_path / "s.safetensors"
    messages: list[str] = []
    watch.fail_at = 5
    with pytest.raises(BadInputError, match="failed on purpose"):
        run(what, file, 1)
    (kept,) = tmp_path.iterdir()
    assert kept.is_dir() and kept.name.startswith(".s.safetensors.")
    watch.fail_at, watch.sampled = None, []
    result = run(what, file, 1, messages)
    assert watch.sampled == [5, 6] and messages == ["going on with 5 of 7 images that an earlier run left"]
    assert [child.name for child in tmp_path.iterdir()] == ["s.safetensors"]
    straight = run(what, tmp_path / "straight.safetensors", 1)
    assert np.array_equal(result, straight)
    assert file.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"steps": 4}, {"cfg": 2.0}, {"images": 6}, {"classes": (0,)}, {"interval": (0.0, 0.5)}]
)
def test_another_request_does_not_go_on_with_it(
    pixels: Sampling, change: dict[str, Any], tmp_path: Path, watch: Watch
) -> None:
    file = tmp_path / "s.safetensors"
    watch.fail_at = 3
    with pytest.raises(BadInputError):
        run(pixels, file, 1)
    watch.fail_at, watch.sampled = None, []
    other = replace(pixels, spec=replace(SPEC, **change))
    assert other.key != pixels.key
    run(other, file, 1)
    assert watch.sampled == list(range(other.spec.images))


def test_a_failure_to_write_does_not_cost_the_images(
    pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    file = tmp_path / "s.safetensors"

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(samples, "write_images", full)
        with pytest.raises(OSError, match="No space"):
            run(pixels, file)
    watch.sampled = []
    run(pixels, file)
    assert watch.sampled == []
    assert [child.name for child in tmp_path.iterdir()] == ["s.safetensors"]


def failing(name: str, monkeypatch: pytest.MonkeyPatch, what: Sampling, file: Path, **targets: Any) -> None:
    """Run on a disk that is full when `samples` calls its function `name`."""

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(samples, name, full)
        with pytest.raises(OSError, match="No space"):
            run(what, file, **targets)


def views(folder: Path) -> dict[str, Any]:
    return {"png": folder / "png", "npz": folder / "a.npz", "grid": folder / "g.png"}


@pytest.mark.parametrize("failed", ["write_adm_npz", "write_png", "write_images"])
@pytest.mark.parametrize("empty", [False, True])
def test_a_failure_between_the_targets_is_gone_on_with(
    pixels: Sampling, failed: str, empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    file, straight = tmp_path / "s.safetensors", tmp_path / "straight"
    straight.mkdir()
    run(pixels, straight / file.name, **views(straight))
    if empty:
        (tmp_path / "png").mkdir()
    failing(failed, monkeypatch, pixels, file, **views(tmp_path))
    assert not file.exists() and len(list((tmp_path / "png").iterdir())) == IMAGES
    watch.sampled = []
    run(pixels, file, **views(tmp_path))
    assert watch.sampled == []
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.npz", "g.png", "png", file.name, "straight"]
    for sampled in (path for path in straight.rglob("*") if path.is_file()):
        assert sampled.read_bytes() == (tmp_path / sampled.relative_to(straight)).read_bytes(), sampled.name


def test_it_is_known_before_the_decoder_is(pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sample --vae` checks before it opens the VAE, when the key is not known."""
    targets = Targets(tmp_path / "s.safetensors", **views(tmp_path))
    failing("write_images", monkeypatch, pixels, targets.file, **views(tmp_path))
    other = replace(pixels, spec=replace(SPEC, seed=6))
    check_targets(other, targets, will_decode=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        check_targets(other, targets)


def added(folder: Path) -> None:
    (folder / "png" / "000099.png").write_bytes(b"other")


def rewritten(folder: Path) -> None:
    """Write the same bytes at another time, as another program might."""
    content = (folder / "a.npz").read_bytes()
    (folder / "a.npz").unlink()
    (folder / "a.npz").write_bytes(content)
    os.utime(folder / "a.npz", ns=(1, 1))


def replaced(folder: Path) -> None:
    (folder / "g.png").write_bytes(b"other")


def linked(folder: Path) -> None:
    (folder / "g.png").rename(folder / "other.png")
    (folder / "g.png").symlink_to(folder / "other.png")


@pytest.mark.parametrize("change", [added, rewritten, replaced, linked])
def test_what_is_not_as_this_work_left_it_is_refused(
    pixels: Sampling, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s.safetensors"
    failing("write_images", monkeypatch, pixels, file, **views(tmp_path))
    change(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError):
        run(pixels, file, **views(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", [{"seed": 6}, {"steps": 4}])
def test_what_other_work_wrote_is_refused(
    pixels: Sampling, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    file = tmp_path / "s.safetensors"
    failing("write_images", monkeypatch, pixels, file, npz=tmp_path / "a.npz")
    watch.sampled = []
    with pytest.raises(OutputExistsError, match=r"a\.npz: exists already"):
        run(replace(pixels, spec=replace(SPEC, **change)), file, npz=tmp_path / "a.npz")
    with pytest.raises(OutputExistsError, match=r"a\.npz: exists already"):
        run(pixels, tmp_path / "t.safetensors", npz=tmp_path / "a.npz")
    assert watch.sampled == []


# samples that are there


def test_samples_that_are_there_are_taken_and_their_exports_completed(
    pixels: Sampling, tmp_path: Path, watch: Watch
) -> None:
    file, messages = tmp_path / "s.safetensors", list[str]()
    images = run(pixels, file, npz=tmp_path / "a.npz")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    watch.sampled = []
    assert np.array_equal(run(pixels, file, messages=messages, **views(tmp_path)), images)
    assert watch.sampled == [] and messages == [f"{file}: up to date"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list((tmp_path / "png").iterdir())) == IMAGES
    straight = tmp_path / "straight"
    straight.mkdir()
    run(pixels, straight / file.name, **views(straight))
    for made in (path for path in straight.rglob("*") if path.is_file()):
        assert made.read_bytes() == (tmp_path / made.relative_to(straight)).read_bytes(), made.name
    run(pixels, file, **views(tmp_path))
    assert watch.sampled == list(range(IMAGES)), "for the straight run alone"


def test_force_samples_anew(pixels: Sampling, tmp_path: Path, watch: Watch) -> None:
    file = tmp_path / "s.safetensors"
    run(pixels, file)
    watch.sampled = []
    run(pixels, file, force=True)
    assert watch.sampled == list(range(IMAGES))


@pytest.mark.parametrize("name", ["png", "npz", "grid"])
def test_exports_of_other_images_are_refused(pixels: Sampling, name: str, tmp_path: Path, watch: Watch) -> None:
    other = replace(pixels, spec=replace(SPEC, seed=6))
    export = views(tmp_path)[name]
    run(other, tmp_path / "o.safetensors", **{name: export})
    run(pixels, tmp_path / "s.safetensors")
    watch.sampled = []
    with pytest.raises(OutputExistsError, match=r"holds other images than s\.safetensors"):
        run(pixels, tmp_path / "s.safetensors", **{name: export})
    assert watch.sampled == []
    run(other, tmp_path / "o.safetensors", **{name: export})


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 6}, "other seed 5"), ({"steps": 4}, "other steps 3"), ({"images": 4}, "other images 7")],
)
def test_samples_made_in_another_way_are_refused_and_the_difference_named(
    pixels: Sampling, change: dict[str, Any], named: str, tmp_path: Path, watch: Watch
) -> None:
    file = tmp_path / "s.safetensors"
    run(pixels, file)
    watch.sampled = []
    with pytest.raises(OutputExistsError, match=named):
        run(replace(pixels, spec=replace(SPEC, **change)), file)
    assert watch.sampled == []


def test_samples_of_another_checkpoint_are_refused(pixels: Sampling, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    run(pixels, file)
    other = make_pico(sampler="rf", in_channels=pixels.shape[2], seed=9).save(tmp_path / "other.safetensors")
    with pytest.raises(OutputExistsError, match="other checkpoint"):
        run(Sampling(open_checkpoint(other), SPEC), file)


def test_a_run_of_other_settings_deletes_what_an_interrupted_one_left(
    pixels: Sampling, tmp_path: Path, watch: Watch
) -> None:
    file, messages = tmp_path / "s.safetensors", list[str]()
    watch.fail_at = 5
    with pytest.raises(BadInputError):
        run(pixels, file, 1)
    (left,) = tmp_path.iterdir()
    watch.fail_at = None
    run(replace(pixels, spec=replace(SPEC, seed=6)), file, messages=messages)
    assert messages == [f"{left.name}: deleting what an interrupted run of other settings left"]
    assert [child.name for child in tmp_path.iterdir()] == ["s.safetensors"]


def test_what_another_version_left_is_not_gone_on_with(
    pixels: Sampling, tmp_path: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch.fail_at = 5
    with pytest.raises(BadInputError):
        run(pixels, tmp_path / "s.safetensors", 1)
    watch.fail_at, watch.sampled = None, []
    monkeypatch.setattr("ditmoe_cli.files.workfolder.__version__", "another")
    run(pixels, tmp_path / "s.safetensors")
    assert sorted(watch.sampled) == list(range(SPEC.images))


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")])
def test_an_interrupt_says_what_is_kept(
    pixels: Sampling, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    def ended(model: Any, what: Sampling, indices: Any) -> NDArray[Any]:
        if 4 in indices:
            raise error
        return _sampled(model, what, indices)

    messages: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(samples, "sample", ended)
        with pytest.raises(type(error) if isinstance(error, Exception | SystemExit) else KeyboardInterrupt):
            run(pixels, tmp_path / "s.safetensors", 2, messages=messages)
    assert messages == ["kept 4 of 7 images; the same command goes on from there"]
    run(pixels, tmp_path / "s.safetensors", messages=messages)
    assert messages[1:] == ["going on with 4 of 7 images that an earlier run left"]
    assert watch.sampled == [4, 5, 6]


def test_samples_that_do_not_fit_on_the_disk_are_refused_before_sampling(
    pixels: Sampling, tmp_path: Path, watch: Watch
) -> None:
    many = replace(pixels, spec=replace(SPEC, images=10**9))
    with pytest.raises(DitmoeError, match=r"s\.safetensors: needs .* GB, and .* free"):
        run(many, tmp_path / "s.safetensors")
    assert watch.sampled == [] and list(tmp_path.iterdir()) == []


def test_a_picture_is_no_folder_of_pictures(pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "s.safetensors"
    failing("write_images", monkeypatch, pixels, file, grid=tmp_path / "x.png")
    with pytest.raises(OutputExistsError, match="exists already"):
        run(pixels, file, png=tmp_path / "x.png")


def test_what_another_run_wrote_meanwhile_is_found_before_sampling(
    pixels: Sampling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    file, first, messages = tmp_path / "s.safetensors", threading.Event(), list[str]()
    go = threading.Event()

    def slow(model: Any, what: Sampling, indices: Any) -> NDArray[Any]:
        first.set()
        assert go.wait(timeout=30)
        return watch(model, what, indices)

    def second() -> None:
        run(pixels, file, messages=messages)

    monkeypatch.setattr(samples, "sample", slow)
    threads = [threading.Thread(target=run, args=(pixels, file)), threading.Thread(target=second)]
    threads[0].start()
    assert first.wait(timeout=30)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(timeout=30)
    assert messages[-1] == f"{file}: up to date" and watch.sampled == list(range(IMAGES))
    assert [child.name for child in tmp_path.iterdir()] == ["s.safetensors"]


def test_files_from_before_vaes_and_intervals_are_read(pixels: Sampling, tmp_path: Path) -> None:
    from ditmoe_cli.evaluation.images import SAMPLES_SCHEMA, ImageSet, write_images

    origin = pixels.origin.to_json()
    del origin["vae"], origin["spec"]["interval"]
    write_images(tmp_path / "old.safetensors", ImageSet(whole(pixels)), range(IMAGES), origin)
    assert read_origin(tmp_path / "old.safetensors") == pixels.origin
    for part in ({"vae": "sd"}, {"spec": {**origin["spec"], "interval": [0.5]}}, {"spec": {"solver": "euler"}}):
        document = {**origin, **part, "schema": SAMPLES_SCHEMA}
        write_images(tmp_path / "bad.safetensors", ImageSet(whole(pixels)), range(IMAGES), document, force=True)
        with pytest.raises(BadInputError, match=r"bad\.safetensors: the samples' metadata is malformed"):
            read_origin(tmp_path / "bad.safetensors")


# targets


def test_targets_that_meet_are_refused(pixels: Sampling, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "out").mkdir()
    file = tmp_path / "s.safetensors"
    for targets in (
        Targets(file, npz=file),
        Targets(file, npz=tmp_path / "link" / "s.safetensors"),
        Targets(file, grid=tmp_path / "out" / ".." / "s.safetensors"),
        Targets(file, png=tmp_path / "x", grid=tmp_path / "x"),
    ):
        with pytest.raises(UsageError, match="named twice"):
            check_targets(pixels, targets)
    for targets in (
        Targets(tmp_path / "out" / "s.safetensors", png=tmp_path / "out"),
        Targets(file, png=tmp_path / "out", grid=tmp_path / "out" / "g.png"),
    ):
        with pytest.raises(UsageError, match="lies in"):
            check_targets(pixels, targets)


def test_an_empty_folder_is_a_place_for_png_alone(pixels: Sampling, tmp_path: Path) -> None:
    for name in ("s.safetensors", "a.npz", "g.png", "png"):
        (tmp_path / name).mkdir()
    file = tmp_path / "new.safetensors"
    for targets in (
        Targets(tmp_path / "s.safetensors"),
        Targets(file, npz=tmp_path / "a.npz"),
        Targets(file, grid=tmp_path / "g.png"),
    ):
        with pytest.raises(OutputExistsError, match="exists already"):
            check_targets(pixels, targets)
    run(pixels, file, png=tmp_path / "png")
    assert len(list((tmp_path / "png").iterdir())) == IMAGES


def test_what_is_read_is_no_target(pixels: Sampling, tmp_path: Path) -> None:
    vae = tmp_path / "vae"
    vae.mkdir()
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"weights")
    for targets in (Targets(weights), Targets(tmp_path / "s.safetensors", png=vae)):
        with pytest.raises(OutputExistsError, match="is the input itself"):
            check_targets(pixels, replace(targets, force=True, inputs=(vae,)))
    with pytest.raises(OutputExistsError, match="is the input itself"):
        check_targets(pixels, Targets(pixels.checkpoint.path, force=True))


# ------------------------------------------------------------------ progress


def test_steps_within_a_batch_count(what: Sampling) -> None:
    """A batch is all that a small run has: what is done of it grows with each evaluation of the model."""
    with watched_by(seen := Seen()):
        fractions = []

        class Watched:
            """A model that notes what is done when it is asked."""

            def __init__(self, model: Any) -> None:
                self.model, self.config, self.device = model, model.config, model.device

            def prepared(self, *arguments: Any) -> Any:
                asked = self.model.prepared(*arguments)

                def predict(*values: Any) -> Any:
                    fractions.append(seen.phases[-1].fraction)
                    return asked(*values)

                return predict

        model = Watched(build_model(what.checkpoint, torch.device("cpu")))
        with phase("sampling", what.spec.images, "images") as progress:
            samples.sample(LoadedModels(model), what, range(what.spec.images))  # type: ignore[arg-type]
            progress(what.spec.images)
    assert fractions == pytest.approx(np.arange(len(fractions)) / len(fractions)) and len(fractions) > 1
