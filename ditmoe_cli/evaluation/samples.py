"""Samples of a checkpoint, and the files that hold them together with their checkpoint, spec and VAE.

Images are sampled batch by batch into a workspace on disk, by any number of processes. Noise and label of image i
depend on i alone, so batch size, number of processes and restarts change nothing beyond rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, check_schedule
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import ALWAYS, SOLVERS, evaluation_times
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.diffusion.weak_guidance import check_guide, parse_guide
from ditmoe_cli.errors import BadInputError, BrokenImageError, DitmoeError, OutputExistsError, UsageError
from ditmoe_cli.evaluation.batch_halving import computed_batches
from ditmoe_cli.evaluation.computed_share import COMPUTED, Computed, computed_by, parse_computed, rows_of
from ditmoe_cli.evaluation.image_exports import (
    PNG_FILES,
    holds_adm_npz,
    holds_pngs,
    write_adm_npz,
    write_png_folder,
)
from ditmoe_cli.evaluation.image_grids import holds_picture, sample_grid, write_png
from ditmoe_cli.evaluation.images import SAMPLES_SCHEMA, ImageSet, read_images, to_uint8, write_images
from ditmoe_cli.evaluation.sampled_models import SampledModel, model_of, parse_model
from ditmoe_cli.evaluation.worker import Notify, Runtime, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.arrays import read_document, write_arrays
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.header import is_safetensors, read_safetensors_header
from ditmoe_cli.files.provenance import Card, parse_card
from ditmoe_cli.files.staging import check_space, check_target, clean_leftovers
from ditmoe_cli.files.workfolder import work_key
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import parse_dtype, recorded_dtype, torch_dtype_of
from ditmoe_cli.processes import process_group
from ditmoe_cli.progress import Phase, phase

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.diffusion.predictor import Predictor
    from ditmoe_cli.diffusion.scheduled_guidance import Scheduled
    from ditmoe_cli.diffusion.vae import Decoder
    from ditmoe_cli.model.dit import Denoiser
    from ditmoe_cli.model.scheduled import ComputeCount

SAMPLES = "samples"  # name of their array in a workspace

Batch = NDArray[Any]


@dataclass(frozen=True)
class SamplesOrigin:
    """Origin of samples, as their file records it: the checkpoint, spec, card, and the VAE if any."""

    model: SampledModel
    spec: SampleSpec
    card: Card
    vae: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the origin as JSON, which tells of a distilled checkpoint how it was distilled."""
        return {
            "checkpoint": self.model.fingerprint,
            "spec": self.spec.to_json(),
            "card": asdict(self.card),
            "vae": self.vae,
            **self.model.to_json(),
        }


@dataclass(frozen=True)
class Sampling:
    """A checkpoint to sample, the spec, the decoder that turns its latents into images, and the checkpoint that guides.

    `decoder` and `weak` are None without any; `weak` is the checkpoint that the spec's guide names, if it names one,
    and `schedule` the schedule whose digest the spec has, if it has one.
    """

    checkpoint: Checkpoint
    spec: SampleSpec
    decoder: Decoder | None = None
    weak: Checkpoint | None = None
    schedule: ComputeSchedule | None = None

    @property
    def images(self) -> bool:
        """Whether samples are images; else they are latents."""
        return self.checkpoint.config.pixel_space or self.decoder is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one sample: (H, W, C) of images, (C, S, S) of latents."""
        config = self.checkpoint.config
        side, channels = config.input_size, config.in_channels
        if self.decoder is not None:
            return (side * self.decoder.upsampling, side * self.decoder.upsampling, 3)
        return (side, side, channels) if self.images else (channels, side, side)

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return self.spec.images * math.prod(self.shape) * (1 if self.images else 4)

    @property
    def origin(self) -> SamplesOrigin:
        """Origin that files of these samples record."""
        vae = self.decoder.to_json() if self.decoder is not None else None
        return SamplesOrigin(model_of(self.checkpoint), self.spec, self.checkpoint.card, vae)

    @property
    def key(self) -> str:
        """SHA-256 of the origin: samplings of equal keys give equal samples."""
        return hashlib.sha256(canonical_json(self.origin.to_json()).encode()).hexdigest()

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class label of each sample, int64 (N,)."""
        return np.asarray(self.spec.labels(range(self.spec.images)), dtype=np.int64)


@dataclass(frozen=True)
class Targets:
    """Paths to write samples to.

    Attributes:
        file: the safetensors file.
        png: a folder of PNG.
        npz: ADM's npz.
        grid: one PNG of the first images.
        force: whether existing targets are replaced.
        inputs: paths that are read beside the checkpoint and must not be written to.
    """

    file: Path
    png: Path | None = None
    npz: Path | None = None
    grid: Path | None = None
    force: bool = False
    inputs: tuple[Path, ...] = ()

    @property
    def exports(self) -> dict[str, Path]:
        """Targets beside the safetensors file, by kind: png, npz or grid."""
        paths = {"png": self.png, "npz": self.npz, "grid": self.grid}
        return {kind: path for kind, path in paths.items() if path is not None}


def open_decoder(checkpoint: Checkpoint, vae: str | None, device: str) -> Decoder | None:
    """Return the decoder of a checkpoint's latents; None where no VAE is given.

    Raises `UsageError` for models of pixels, `BadInputError` for a VAE that cannot be opened or does not fit.
    """
    if vae is None:
        return None
    if checkpoint.config.pixel_space:
        raise UsageError(f"⟨vae⟩ {vae}: {checkpoint.name} makes pixels, which need none; leave it out")
    from ditmoe_cli.diffusion.vae import check_fits, open_vae

    decoder = open_vae(vae, device)
    check_fits(decoder, checkpoint.config.in_channels, checkpoint.path)
    return decoder


def require_images(sampling: Sampling) -> None:
    """Raise `BadInputError` where samples are latents."""
    if not sampling.images:
        checkpoint = sampling.checkpoint
        raise BadInputError(
            f"{checkpoint.path}: makes latents of {checkpoint.config.in_channels} channels, which need a VAE "
            "to become images; give ⟨vae⟩ (a folder or a hub name)"
        )


# ------------------------------------------------------------------ sampling into a workspace


def fill(
    work: Workspace,
    sampling: Sampling,
    worker: Worker,
    after: Callable[[int, Batch], None] = lambda _first, _values: None,
) -> None:
    """Sample this process's share of the rows that a workspace lacks, and return once all processes have done theirs.

    `after(first, values)` is called with each batch and the index of its first image. Where memory runs out, batches
    are halved. Raises `BadInputError` where the model gives NaN or infinite values.
    """
    share = worker.share
    share.check_same("dtype", sampling.spec.dtype)
    if share.first:
        work.create(SAMPLES, sampling.shape, np.uint8 if sampling.images else np.float32)
        if sampling.schedule is not None:
            work.create(COMPUTED, (2,), np.float64)
    missing = share.from_first(lambda: work.missing([SAMPLES], worker.runtime.batch))
    remaining = sum(map(len, missing))
    if share.first and 0 < remaining < work.rows:
        worker.notify(f"going on with {work.rows - remaining} of {work.rows} images that an earlier run left")
    if share.first and not remaining:
        worker.notify(f"using the {work.rows} images of {sampling.checkpoint.name} that an earlier run kept")
    batches = share.of(missing)
    if batches:
        models = load_models(sampling, worker.runtime)

        def halved(size: int, half: int) -> None:
            worker.notify(f"out of memory with {size} images at a time; going on with {half}")
            _release_caches(models)

        title = f"sampling {sampling.checkpoint.name}"
        with _kept_on_interrupts(work, worker), phase(title, sum(map(len, batches)), "images") as progress:
            for indices, values in computed_batches(lambda part: sample(models, sampling, part), batches, halved):
                if sampling.schedule is not None:
                    work.put(COMPUTED, indices.start, rows_of(models.counts.pop(indices.start), len(indices)))
                work.put(SAMPLES, indices.start, values)
                progress(len(indices))
                after(indices.start, values)
    share.wait()
    work.require_whole([SAMPLES])
    share.wait()  # until all have looked: the first one deletes the folder once its outputs are written


@dataclass(frozen=True)
class LoadedModels:
    """The model to sample, the weaker one that guides it, if any, and the schedule of what it computes, if any.

    `counts` are what was computed of each batch by a schedule, by the index of its first image.
    """

    model: Denoiser
    weak: Denoiser | None = None
    scheduled: Scheduled | None = None
    counts: dict[int, ComputeCount] = field(default_factory=dict)


def load_models(sampling: Sampling, runtime: Runtime) -> LoadedModels:
    """Return the models of a sampling; they share the memory for unpacked weights. A schedule is replayed as no graph.

    Raises `BadInputError` for a guide whose checkpoint is not given, and for a schedule that does not fit.
    """
    import torch

    from ditmoe_cli.diffusion.weak_models import weak_model
    from ditmoe_cli.formats.unpacked_weights import unpacked_weights
    from ditmoe_cli.model.acceleration import Acceleration, accelerated
    from ditmoe_cli.model.loading import build_model

    check_guide(sampling.spec.guide, sampling.checkpoint, sampling.weak)
    unpacked, schedule = unpacked_weights(), sampling.schedule
    graphs = runtime.graphs if schedule is None else False

    def load(checkpoint: Checkpoint | None) -> Denoiser:
        assert checkpoint is not None  # as `check_guide` saw to
        plain = build_model(checkpoint, torch.device(runtime.device), torch_dtype_of(sampling.spec.dtype), unpacked)
        return accelerated(plain, Acceleration(runtime.compiled, graphs))

    model = load(sampling.checkpoint)
    weak = weak_model(model, sampling.spec.guide, lambda: load(sampling.weak))
    if schedule is None:
        return LoadedModels(model, weak)
    from ditmoe_cli.diffusion.scheduled_guidance import loaded_schedule

    check_schedule(schedule, sampling.checkpoint, sampling.spec.way)
    return LoadedModels(model, weak, loaded_schedule(schedule, model.device))


@contextmanager
def _kept_on_interrupts(work: Workspace, worker: Worker) -> Iterator[None]:
    """Notify how many images are kept where something other than the images themselves ends the sampling."""
    try:
        yield
    except DitmoeError:
        raise
    except BaseException:
        done = int(work.done(SAMPLES).sum())
        if done and worker.share.first:
            worker.notify(f"kept {done} of {work.rows} images; the same command goes on from there")
        raise


def _release_caches(models: LoadedModels) -> None:
    import torch

    from ditmoe_cli.model.acceleration import GraphedDiTMoE

    for model in (models.model, models.weak):
        if isinstance(model, GraphedDiTMoE):
            model.forget()
    if models.model.device.type == "cuda":
        torch.cuda.empty_cache()


def sample(models: LoadedModels, sampling: Sampling, indices: Sequence[int]) -> Batch:
    """Return the images uint8 (N, H, W, C), or latents fp32 (N, C, S, S), of the given indices.

    Raises `BadInputError`, which names the image, for NaN or infinite values.
    """
    spec, decoder = sampling.spec, sampling.decoder
    share = len(indices) * (1.0 if decoder is None else 0.5)
    with phase("evaluating", len(evaluation_times(spec.solver, spec.steps)), "steps", share=share) as progress:
        watchers = Watchers(through=lambda predict: _counted(predict, progress))
        latents = sample_batch(
            models.model, spec, indices, watchers, weak=models.weak, scheduled=counting(models, indices)
        )
    if not sampling.images:
        return np.asarray(latents.cpu().numpy())
    try:
        if decoder is None:
            return to_uint8(latents)
        with phase("decoding", len(indices), "images"):
            return to_uint8(decoder.decode(latents))
    except BrokenImageError as error:
        raise BadInputError(f"image {indices[error.index]} (seed {sampling.spec.seed}): {error.problem}") from None


def counting(models: LoadedModels, indices: Sequence[int]) -> Scheduled | None:
    """Return the schedule, which counts what it computes of a batch among the models' counts; None without any."""
    if models.scheduled is None:
        return None

    def counted(count: ComputeCount) -> None:
        models.counts[indices[0]] = count

    return replace(models.scheduled, counted=counted)


def _counted(predict: Predictor, progress: Phase) -> Predictor:
    """Return a predictor that counts its evaluations."""

    def counted(x: Tensor, t: float) -> Tensor:
        prediction = predict(x, t)
        progress(1)
        return prediction

    return counted


# ------------------------------------------------------------------ writing


def check_targets(sampling: Sampling, targets: Targets, will_decode: bool = False) -> None:
    """Raise before sampling where a target cannot be written, or where images of latents are asked for.

    Samples that this sampling made earlier do not count as existing (`is_made`), nor do exports beside them, or those
    that an unfinished run of it wrote. With `will_decode` the VAE is not open yet and the key is unknown; then samples
    of any VAE and exports of any unfinished run on the same file are let through.

    Raises `UsageError` for targets that meet, `OutputExistsError` for existing ones and inputs, `BadInputError` for
    latents.
    """
    undecided = will_decode and sampling.decoder is None
    folders = _unfinished(targets.file) if undecided else [_work(sampling, targets).folder]
    if targets.exports and not will_decode:
        require_images(sampling)
    listed = [("file", targets.file), *targets.exports.items()]
    inputs = _inputs(sampling, targets)
    made = is_made(sampling, targets, undecided)
    if not made and not targets.force:
        _refuse_other_samples(sampling, targets.file)
    for kind, target in listed:
        if sum(target.resolve() == other.resolve() for _, other in listed) > 1:
            raise UsageError(f"{target}: named twice; give each output a name of its own")
        if targets.png is not None and targets.png.resolve() in target.resolve().parents:
            raise UsageError(f"{target}: lies in {targets.png}, which holds the PNG alone; name a place beside it")
        if any(_is_written(kind, target, folder) for folder in folders) or (made and target.exists()):
            continue
        if kind == "png":
            check_target(target.absolute(), targets.force or _is_empty(target), inputs, PNG_FILES)
        else:
            check_target(target.absolute(), targets.force, inputs)


def _inputs(sampling: Sampling, targets: Targets) -> list[Path]:
    """Return what is read, and must not be written to."""
    weak = [sampling.weak.path] if sampling.weak is not None else []
    schedule = [sampling.schedule.path] if sampling.schedule is not None else []
    return [sampling.checkpoint.path, *weak, *schedule, *targets.inputs]


def is_made(sampling: Sampling, targets: Targets, undecided: bool = False) -> bool:
    """Return whether the samples file is there, from the same checkpoint and settings; none is to be replaced.

    With `undecided` the VAE is not open yet, and samples that any VAE decoded count.
    """
    file = targets.file
    if targets.force or file.is_symlink() or not file.is_file():
        return False
    try:
        theirs, tensors = read_origin(file), read_safetensors_header(file).tensors
    except BadInputError:
        return False
    if theirs is None:
        return False
    ours = sampling.origin
    if undecided:
        return canonical_json(replace(theirs, vae=None).to_json()) == canonical_json(ours.to_json())
    stored = tensors.get("images" if sampling.images else "latents")
    whole = stored is not None and stored.info.shape == (sampling.spec.images, *sampling.shape)
    return whole and canonical_json(theirs.to_json()) == canonical_json(ours.to_json())


def _refuse_other_samples(sampling: Sampling, file: Path) -> None:
    """Raise `OutputExistsError` for samples of ours that were made in another way, naming how they differ."""
    try:
        theirs = read_origin(file) if file.is_file() and not file.is_symlink() else None
    except BadInputError:
        return
    if theirs is None:
        return
    there, here = theirs.to_json(), sampling.origin.to_json()
    differing = [name for name in ("checkpoint", "vae") if there[name] != here[name]]
    before, now = there["spec"], here["spec"]
    names = dict.fromkeys((*now, *before))  # a guide has its place only where there is one
    differing += [f"{name} {before.get(name)}" for name in names if before.get(name) != now.get(name)]
    if differing:
        raise OutputExistsError(
            f"{file.absolute()}: exists already, sampled in another way (other {', '.join(differing)[:200]}); give "
            "⟨force⟩ to replace it, or ⟨output⟩ for another name"
        )


def complete_samples(sampling: Sampling, targets: Targets, notify: Notify) -> int:
    """Write the exports that samples made earlier (`is_made`) lack; return the bytes of the safetensors file.

    Raises `OutputExistsError` for an export that holds other images.
    """
    file = targets.file.absolute()
    if targets.exports:
        require_images(sampling)
        made = read_images(file)
        assert made.labels is not None
        writers = _writers(sampling, targets, made.images, made.labels)
        for kind, export in targets.exports.items():
            if not export.exists():
                writers[kind](export)
            elif not _HOLD[kind](export, made):
                raise OutputExistsError(
                    f"{export.absolute()}: exists already, and holds other images than {file.name}; give ⟨force⟩ to "
                    "replace both, or another name"
                )
    notify(f"{file}: up to date")
    clean_leftovers(file)
    _work(sampling, targets).discard()
    return file.stat().st_size


_HOLD: Mapping[str, Callable[[Path, ImageSet], bool]] = {
    "png": lambda path, made: holds_pngs(path, made.images),
    "npz": lambda path, made: holds_adm_npz(path, made),
    "grid": lambda path, made: holds_picture(path, sample_grid(made.images, made.labels)),
}


def _work(sampling: Sampling, targets: Targets) -> Workspace:
    """Return the workspace that holds samples until all targets are written."""
    file = targets.file.absolute()
    key = work_key({"sampling": sampling.key})  # another version may sample otherwise
    return Workspace(file.with_name(f".{file.name}.{key[:12]}.work"), sampling.spec.images)


def _unfinished(file: Path) -> list[Path]:
    """Return the folders of all unfinished runs on a samples file."""
    return list(file.absolute().parent.glob(f".{escape(file.name)}.*.work"))


def _is_written(kind: str, export: Path, folder: Path) -> bool:
    """Return whether an export is unchanged since the run in a workspace's folder wrote it."""
    return (
        folder.is_dir() and export.exists() and not export.is_symlink() and _written_mark(kind, export, folder).exists()
    )


def _written_mark(kind: str, export: Path, folder: Path) -> Path:
    """Return the mark of a written export: an empty file named by the hash of its path and its files' sizes and times.

    Nothing is stored in it, since the export may have taken the last of a disk.
    """
    files = sorted(export.iterdir()) if export.is_dir() else [export]
    stats = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.lstat()]]
    identity = canonical_json([kind, str(export.resolve()), stats])
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.written"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def write_samples(sampling: Sampling, runtime: Runtime, targets: Targets, notify: Notify) -> int | None:
    """Sample and write `images` uint8, or `latents` fp32 (N, C, S, S); return the bytes of the safetensors file.

    Under torchrun the work is shared; rank 0 writes, and the others return None. An interrupted run leaves its samples
    in a hidden folder beside the target, from which the same command continues; folders of runs of other settings on
    the same target, which never will, are deleted.
    """
    check_targets(sampling, targets)
    work = _work(sampling, targets)
    with process_group() as share, work.locked(notify) if share.first else nullcontext():
        if share.first:
            check_targets(sampling, targets)  # another run may have written them before this one got the lock
            _check_space(sampling, targets, work)
            _discard_others(targets.file, work, notify)
        if share.from_first(lambda: is_made(sampling, targets)):
            work.remove()
            return complete_samples(sampling, targets, notify) if share.first else None
        fill(work, sampling, Worker(runtime, share, notify))
        if not share.first:
            return None
        size = _write(sampling, targets, work)
        work.remove()
    return size


def _discard_others(file: Path, work: Workspace, notify: Notify) -> None:
    """Delete the folders of unfinished runs on a samples file but that of `work`, unless a run uses them."""
    for folder in _unfinished(file):
        if folder != work.folder:
            notify(f"{folder.name}: deleting what an interrupted run of other settings left")
            Workspace(folder, 0).discard()


def _check_space(sampling: Sampling, targets: Targets, work: Workspace) -> None:
    """Raise `DitmoeError` where the samples, their workspace, and their exports do not fit on the disk."""
    count, nbytes = sampling.spec.images, sampling.nbytes
    labels = 16 * count
    made = sum(file.stat().st_size for file in work.folder.glob("*.npy")) if work.folder.is_dir() else 0
    needed = {targets.file: nbytes + labels + max(0, nbytes - made)}
    for kind, export in targets.exports.items():
        height, width, channels = sampling.shape
        stored = {"png": channels, "npz": 3, "grid": 0}[kind]
        needed[export] = count * height * width * stored // (2 if kind == "png" else 1)  # PNG packs, by half at best
    disks: dict[int, list[Path]] = {}
    for target in needed:
        disks.setdefault(target.absolute().parent.stat().st_dev, []).append(target)
    for together in disks.values():
        check_space(together[0].absolute(), sum(needed[target] for target in together))


def _writers(
    sampling: Sampling, targets: Targets, values: NDArray[Any], labels: NDArray[np.int64]
) -> Mapping[str, Callable[[Path], int]]:
    """Return the function that writes each kind of export."""
    inputs, force = _inputs(sampling, targets), targets.force
    return {
        "png": lambda path: write_png_folder(path, values, force=force, inputs=inputs),
        "npz": lambda path: write_adm_npz(path, values, labels, force, inputs),
        "grid": lambda path: write_png(path, sample_grid(values, labels), force, inputs),
    }


def _write(sampling: Sampling, targets: Targets, work: Workspace) -> int:
    """Write all targets, the safetensors file last, so that it shows that all are written; return its bytes.

    Each export is marked in the workspace once it is whole, and not written again by the run that continues.
    """
    from ditmoe_cli.diffusion.noise import image_seed

    spec, inputs, force = sampling.spec, _inputs(sampling, targets), targets.force
    seeds = np.asarray([image_seed(spec.seed, i) for i in range(spec.images)], dtype=np.int64)
    labels, values = sampling.labels, work.array(SAMPLES)
    writers = _writers(sampling, targets, values, labels)
    for kind, export in targets.exports.items():
        if not _is_written(kind, export, work.folder):
            writers[kind](export)
            _written_mark(kind, export, work.folder).touch()
    computed = computed_of(sampling, work)
    origin = {**sampling.origin.to_json(), **({"computed": computed.to_json()} if computed else {})}
    if sampling.images:
        return write_images(targets.file, ImageSet(values, labels), seeds, origin, force, inputs)
    arrays = {"latents": values, "labels": labels, "seed": seeds}
    return write_arrays(targets.file, arrays, {**origin, "schema": SAMPLES_SCHEMA}, force, inputs)


def computed_of(sampling: Sampling, work: Workspace) -> Computed | None:
    """Return what a schedule computed of the images of a whole workspace; None without a schedule."""
    if sampling.schedule is None:
        return None
    return computed_by(sampling.schedule, sampling.checkpoint.config, work.array(COMPUTED))


# ------------------------------------------------------------------ reading


def read_computed(path: Path) -> Computed | None:
    """Return what a schedule computed of samples in a file; None where it computed everything, or tells nothing."""
    document = read_document(read_safetensors_header(path), SAMPLES_SCHEMA, path) if is_safetensors(path) else None
    try:
        return None if document is None else parse_computed(document.get("computed"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: the samples' metadata is malformed ({error})") from None


def read_origin(path: Path) -> SamplesOrigin | None:
    """Return the origin that a samples file records; None for images of other programs.

    Raises `BadInputError` where the metadata is malformed.
    """
    if not is_safetensors(path):
        return None
    document = read_document(read_safetensors_header(path), SAMPLES_SCHEMA, path)
    return None if document is None else _parse_origin(document, path)


def _parse_origin(document: Mapping[str, Any], path: Path) -> SamplesOrigin:
    try:
        spec = dict(document["spec"])
        spec["classes"] = tuple(map(int, spec["classes"]))
        low, high = spec.get("interval", ALWAYS)  # older files have neither an interval nor a VAE nor a dtype
        spec["dtype"] = parse_dtype(recorded_dtype(spec))
        spec["interval"] = (float(low), float(high))
        spec["guide"] = parse_guide(spec.get("guide"))
        vae, schedule = document.get("vae"), spec.get("schedule")
        if not isinstance(schedule, str | None):
            raise TypeError(f"schedule {schedule}")
        if spec["solver"] not in SOLVERS or not (vae is None or isinstance(vae, dict)):
            raise ValueError(f"solver {spec['solver']}, vae {vae}")
        model = parse_model(str(document["checkpoint"]), document)
        return SamplesOrigin(model, SampleSpec(**spec), parse_card(document["card"]), vae)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path}: the samples' metadata is malformed ({error})") from None
