"""Samples of a checkpoint, and the files that hold them with all that decided what they show.

Images are made batch by batch into a workspace on disk, by any number of processes: noise and label of image i are its
own, so batch size, number of processes and restarts change nothing beyond rounding.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import ALWAYS, SOLVERS
from ditmoe_cli.errors import BadInputError, BrokenImageError, UsageError, is_out_of_memory
from ditmoe_cli.evaluation.images import SAMPLES_SCHEMA, ImageSet, to_uint8, write_images
from ditmoe_cli.evaluation.mosaic import write_png
from ditmoe_cli.evaluation.sample_files import PNG_FILES, sample_grid, write_adm_npz, write_png_folder
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.files.arrays import read_document, write_arrays
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.provenance import Card, parse_card
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.processes import Share, process_group
from ditmoe_cli.progress import ProgressBar

if TYPE_CHECKING:
    from ditmoe_cli.diffusion.vae import Decoder
    from ditmoe_cli.model.dit import Denoiser

SAMPLES = "samples"  # the workspace's array of them

Say = Callable[[str], None]
Batch = NDArray[Any]


@dataclass(frozen=True)
class Runtime:
    """Where and how to sample; none of it changes an image beyond rounding."""

    device: str = "cpu"
    batch: int = 64


@dataclass(frozen=True)
class SampledBy:
    """What a samples file says of its origin: the checkpoint's fingerprint, spec and card, and the VAE if any."""

    checkpoint: str
    spec: SampleSpec
    card: Card
    vae: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the origin as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sampling:
    """What is sampled: a checkpoint, how, and the decoder of its latents where they are to become images."""

    checkpoint: Checkpoint
    spec: SampleSpec
    decoder: Decoder | None = None

    @property
    def images(self) -> bool:
        """Whether images come out, and not latents."""
        return self.checkpoint.config.pixel_space or self.decoder is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one of them: (H, W, C) of images, (C, S, S) of latents."""
        config = self.checkpoint.config
        side, channels = config.input_size, config.in_channels
        if self.decoder is not None:
            return (side * self.decoder.upsampling, side * self.decoder.upsampling, 3)
        return (side, side, channels) if self.images else (channels, side, side)

    @property
    def origin(self) -> SampledBy:
        """What its files say of it."""
        vae = self.decoder.to_json() if self.decoder is not None else None
        return SampledBy(self.checkpoint.fingerprint, self.spec, self.checkpoint.card, vae)

    @property
    def key(self) -> str:
        """SHA-256 of all that decides what comes out."""
        return hashlib.sha256(canonical_json(self.origin.to_json()).encode()).hexdigest()


@dataclass(frozen=True)
class Targets:
    """What to write: samples as safetensors, and as PNG, ADM's npz or one picture beside them.

    `inputs` are what is read beside the checkpoint, and is no place to write to.
    """

    file: Path
    png: Path | None = None
    npz: Path | None = None
    grid: Path | None = None
    force: bool = False
    inputs: tuple[Path, ...] = ()

    @property
    def views(self) -> dict[str, Path]:
        """The targets that hold images for others, by kind."""
        named = {"png": self.png, "npz": self.npz, "grid": self.grid}
        return {kind: path for kind, path in named.items() if path is not None}


def decoded_by(checkpoint: Checkpoint, vae: str | None, device: str) -> Decoder | None:
    """Return the decoder for a checkpoint's latents; None where no VAE is named.

    Raises `UsageError` for models that make pixels, `BadInputError` for a VAE that cannot be had or does not fit.
    """
    if vae is None:
        return None
    if checkpoint.config.pixel_space:
        raise UsageError(f"⟨vae⟩ {vae}: {checkpoint.path.name} makes pixels, which need none; leave it out")
    from ditmoe_cli.diffusion.vae import check_fits, open_vae

    decoder = open_vae(vae, device)
    check_fits(decoder, checkpoint.config.in_channels, checkpoint.path)
    return decoder


def require_images(what: Sampling) -> None:
    """Raise `BadInputError` for samples that are latents."""
    if not what.images:
        raise BadInputError(
            f"{what.checkpoint.path}: makes latents of {what.checkpoint.config.in_channels} channels, which need a VAE "
            "to become images; give ⟨vae⟩ (a folder or a hub name)"
        )


def fill(
    work: Workspace,
    what: Sampling,
    runtime: Runtime,
    share: Share,
    bar: ProgressBar,
    say: Say,
    after: Callable[[int, Batch], None] = lambda _first, _values: None,
) -> None:
    """Sample this process's share of what a workspace lacks, and return once all processes have done theirs.

    `after(first, values)` is told of every batch that was made. Where memory runs out, the batch is halved from there
    on. Raises `BadInputError` where the model makes NaN or infinite values.
    """
    import torch

    from ditmoe_cli.model.loading import build_model

    if share.first:
        work.create(SAMPLES, what.shape, np.uint8 if what.images else np.float32)
    left = share.from_first(lambda: work.missing([SAMPLES], runtime.batch))
    remaining = sum(map(len, left))
    if share.first and 0 < remaining < work.rows:
        say(f"going on with {work.rows - remaining} of {work.rows} images that an earlier run left")
    mine = share.of(left)
    if mine:
        model = build_model(what.checkpoint, torch.device(runtime.device))
        with bar(f"sampling {what.checkpoint.path.name}", sum(map(len, mine))) as progress:
            for indices, values in made(model, what, mine, say):
                work.put(SAMPLES, indices.start, values)
                progress(len(indices))
                after(indices.start, values)
    share.wait()
    work.require_whole([SAMPLES])


def made(model: Denoiser, what: Sampling, batches: Iterable[range], say: Say) -> Iterable[tuple[range, Batch]]:
    """Yield the samples of each batch, halving batches from where memory runs out; a single image that does not fit
    ends in the error that it met."""
    queue, limit = deque(batches), None
    while queue:
        indices = queue.popleft()
        if limit is not None and len(indices) > limit:
            queue.extendleft(reversed(split(indices, limit)))
            continue
        try:
            values = sampled(model, what, indices)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(indices) == 1:
                raise
        else:
            yield indices, values
            continue
        limit = len(indices) // 2
        queue.appendleft(indices)
        say(f"out of memory with {len(indices)} images at a time; going on with {limit}")
        _release(model)  # here, where the error no longer holds on to what was computed


def split(indices: range, most: int) -> list[range]:
    """Return a batch in parts of at most `most` images."""
    return [range(start, min(start + most, indices.stop)) for start in range(indices.start, indices.stop, most)]


def _release(model: Denoiser) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def sampled(model: Denoiser, what: Sampling, indices: Sequence[int]) -> Batch:
    """Return the images uint8 (N, H, W, C), or latents fp32 (N, C, S, S), of some indices.

    Raises `BadInputError`, which names the image, where one holds NaN or infinite values.
    """
    latents = sample_batch(model, what.spec, indices)
    if not what.images:
        return np.asarray(latents.cpu().numpy())
    try:
        return to_uint8(latents if what.decoder is None else what.decoder.decode(latents))
    except BrokenImageError as error:
        raise BadInputError(f"image {indices[error.index]} (seed {what.spec.seed}): {error.problem}") from None


def check_targets(what: Sampling, targets: Targets, will_decode: bool = False) -> None:
    """Refuse targets that cannot be written, and pictures of latents that nobody decodes, before sampling.

    A view that stands as the work at hand has written it is none of them; before the decoder is known, as any work on
    this file has.
    """
    works = _works_on(targets.file) if will_decode and what.decoder is None else [_work(what, targets).folder]
    if targets.views and not will_decode:
        require_images(what)
    listed = [("file", targets.file), *targets.views.items()]
    for kind, target in listed:
        if sum(target.resolve() == other.resolve() for _, other in listed) > 1:
            raise UsageError(f"{target}: named twice; give each output a name of its own")
        if targets.png is not None and targets.png.resolve() in target.resolve().parents:
            raise UsageError(f"{target}: lies in {targets.png}, which holds the PNG alone; name a place beside it")
        inputs = [what.checkpoint.path, *targets.inputs]
        if any(_is_written(kind, target, work) for work in works):
            continue
        if kind == "png":
            check_target(target.absolute(), targets.force or _is_empty(target), inputs, PNG_FILES)
        else:
            check_target(target.absolute(), targets.force, inputs)


def _work(what: Sampling, targets: Targets) -> Workspace:
    """Return where samples stay until all targets are written."""
    file = targets.file.absolute()
    return Workspace(file.with_name(f".{file.name}.{what.key[:12]}.work"), what.spec.images)


def _works_on(file: Path) -> list[Path]:
    """Return the folders of all work on a samples file that was left unfinished."""
    return list(file.absolute().parent.glob(f".{escape(file.name)}.*.work"))


def _is_written(kind: str, view: Path, work: Path) -> bool:
    """Tell whether a view is, to the time of its files, what the work in a folder wrote: another's never is."""
    return work.is_dir() and view.exists() and not view.is_symlink() and _mark(kind, view, work).exists()


def _mark(kind: str, view: Path, work: Path) -> Path:
    """Return the mark of a view that stands: a file named by the hash of its path and its files' sizes and times.

    It is empty, since the view may have taken the last of a disk.
    """
    files = sorted(view.iterdir()) if view.is_dir() else [view]
    stated = [(file.name, found.st_size, found.st_mtime_ns) for file in files for found in [file.lstat()]]
    named = canonical_json([kind, str(view.resolve()), stated])
    return work / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.written"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def write_samples(what: Sampling, runtime: Runtime, targets: Targets, bar: ProgressBar, say: Say) -> int | None:
    """Sample and write `images` uint8, or `latents` fp32 (N, C, S, S); return the bytes of the safetensors file.

    Under torchrun the work is shared; rank 0 writes, and the others return None. What a run that was cut off has made
    stays in a hidden folder beside the target, and the same command goes on with it.
    """
    check_targets(what, targets)
    work = _work(what, targets)
    with process_group() as share, work.held(say) if share.first else nullcontext():
        if share.first:
            check_targets(what, targets)  # a run that this one waited for may have written them
        fill(work, what, runtime, share, bar, say)
        if not share.first:
            return None
        size = _write(what, targets, work)
        work.remove()
    return size


def _write(what: Sampling, targets: Targets, work: Workspace) -> int:
    """Write all targets, the safetensors file last: where it stands, everything does.

    Each view is marked in the workspace once it stands, and left alone by a run that finds it so.
    """
    from ditmoe_cli.diffusion.noise import image_seed

    spec, inputs, force = what.spec, [what.checkpoint.path, *targets.inputs], targets.force
    seeds = np.asarray([image_seed(spec.seed, i) for i in range(spec.images)], dtype=np.int64)
    labels = np.asarray(spec.labels(range(spec.images)), dtype=np.int64)
    values = work.array(SAMPLES)
    writers: Mapping[str, Callable[[Path], int]] = {
        "png": lambda path: write_png_folder(path, values, force=force, inputs=inputs),
        "npz": lambda path: write_adm_npz(path, values, labels, force, inputs),
        "grid": lambda path: write_png(path, sample_grid(values), force, inputs),
    }
    for kind, view in targets.views.items():
        if not _is_written(kind, view, work.folder):
            writers[kind](view)
            _mark(kind, view, work.folder).touch()
    origin = what.origin.to_json()
    if what.images:
        return write_images(targets.file, values, labels, seeds, origin, force, inputs)
    arrays = {"latents": values, "labels": labels, "seed": seeds}
    return write_arrays(targets.file, arrays, {**origin, "schema": SAMPLES_SCHEMA}, force, inputs)


def image_set(what: Sampling, values: Batch) -> ImageSet:
    """Return sampled images with their labels."""
    return ImageSet(values, np.asarray(what.spec.labels(range(len(values))), dtype=np.int64))


def read_origin(path: Path) -> SampledBy | None:
    """Return what a samples file says of its origin; None for images of others."""
    if path.suffix != ".safetensors":
        return None
    document = read_document(read_safetensors_header(path), SAMPLES_SCHEMA, path)
    return None if document is None else _parse_origin(document, path)


def _parse_origin(document: Mapping[str, Any], path: Path) -> SampledBy:
    try:
        spec = dict(document["spec"])
        spec["classes"] = tuple(map(int, spec["classes"]))
        low, high = spec.get("interval", ALWAYS)  # files are older than both
        spec["interval"] = (float(low), float(high))
        vae = document.get("vae")
        if spec["solver"] not in SOLVERS or not (vae is None or isinstance(vae, dict)):
            raise ValueError(f"solver {spec['solver']}, vae {vae}")
        return SampledBy(str(document["checkpoint"]), SampleSpec(**spec), parse_card(document["card"]), vae)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{path}: the samples' metadata is malformed ({error})") from None
