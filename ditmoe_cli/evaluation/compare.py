"""Comparison of checkpoint B with checkpoint A on the same seeds and labels, step by step and block by block.

Both models predict from the states z of A's sampling trajectories, so that predictions differ by B's weights alone.
Final latents and images come from each model's own trajectory, where errors accumulate. Under guidance predictions are
the guided ones; blocks and routing are compared on both branches.

A distilled checkpoint has steps of its own. Beside a model of other steps, final latents and images alone are compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule, check_schedule
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, check_followable, sample_batch
from ditmoe_cli.diffusion.step_bins import choose_bins, steps_of_bins
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.diffusion.weak_guidance import check_guide
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.computed_share import Computed, computed_by, rows_of
from ditmoe_cli.evaluation.features.extractors import PixelExtractor, averaged
from ditmoe_cli.evaluation.image_grids import pair_grid, write_png
from ditmoe_cli.evaluation.images import to_uint8
from ditmoe_cli.evaluation.kept_results import keep, read_kept, result_key
from ditmoe_cli.evaluation.scores.intervals import Interval, bootstrap, bootstrap_frechet, interval_of
from ditmoe_cli.evaluation.scores.paired_error import PairedError, paired_error
from ditmoe_cli.evaluation.scores.ssim import ssim
from ditmoe_cli.evaluation.worker import Notify, Runtime
from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.names import ROUTER, in_block
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import torch_dtype_of
from ditmoe_cli.progress import Phase, phase

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.diffusion.predictor import Predictor
    from ditmoe_cli.diffusion.scheduled_guidance import Scheduled
    from ditmoe_cli.evaluation.scheduled_side import ScheduledSide
    from ditmoe_cli.model.dit import Denoiser, DiTMoE
    from ditmoe_cli.model.moe import MoEEvent
    from ditmoe_cli.model.scheduled import ComputeCount

    RowMap = Tensor | None

_BYTES_A_VALUE = 40  # of two final latents in fp32 and their copies and errors in fp64
COMPARISON_SCHEMA = "ditmoe.comparison/1"
_SAME_ARCHITECTURE = (
    *("sampler", "depth", "hidden_size", "patch_size", "input_size", "in_channels", "num_classes"),
    "null_class",
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class CheckpointPair:
    """Checkpoints A and B to compare, the spec that samples both, and the step bins of the results.

    `weak` is the checkpoint that guides both, if any. `own` is the spec of B where that is another one. `schedule` is
    that of B, if it has one; A computes everything.
    """

    a: Checkpoint
    b: Checkpoint
    spec: SampleSpec
    bins: int
    weak: Checkpoint | None = None
    own: SampleSpec | None = None
    schedule: ComputeSchedule | None = None

    @property
    def sampled(self) -> tuple[tuple[Checkpoint, SampleSpec], tuple[Checkpoint, SampleSpec]]:
        """A and B, and how each is sampled."""
        return (self.a, self.spec), (self.b, self.own or self.spec)

    @property
    def paths(self) -> tuple[Path, Path]:
        """Paths of A and B."""
        return self.a.path, self.b.path

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Paths of all checkpoints."""
        more = [each.path for each in (self.weak, self.schedule) if each is not None]
        return (*self.paths, *more)


@dataclass(frozen=True)
class ModelPair:
    """Models A and B, their paths, and for each block which of A's router rows each of B's is (None if unknown).

    `weak` are the models that guide A and B, if any: one checkpoint's, or other routings of each. `scheduled` says what
    B computes, if it is not everything.
    """

    a: DiTMoE
    b: DiTMoE
    paths: tuple[Path, Path]
    rows: tuple[RowMap, ...]
    weak: tuple[Denoiser, Denoiser] | None = None
    scheduled: Scheduled | None = None


@dataclass(frozen=True)
class Sums:
    """Sums over images and values for each step, from which all results are computed.

    Attributes:
        times: (steps,) time that the models were given.
        prediction: (steps, 3) ‖v_B - v_A‖², ‖v_A‖², and number of values.
        blocks: (steps, depth, 6) for each block f on A's stream x and B's own stream x':
            ‖f_B(x) - f_A(x)‖², ‖f_A(x) - x‖², ‖f_B(x') - f_A(x)‖², ‖f_A(x)‖², router rows that both selected, slots.
    """

    times: Array
    prediction: Array
    blocks: Array

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over the images of both."""
        return Sums(self.times, self.prediction + other.prediction, self.blocks + other.blocks)

    def binned(self, bins: int) -> Sums:
        """Return sums over the steps of each bin, with the time of its first step."""
        first = [steps[0] for steps in steps_of_bins(len(self.times), bins)]
        prediction, blocks = (np.add.reduceat(part, first, axis=0) for part in (self.prediction, self.blocks))
        return Sums(self.times[first], prediction, blocks)


@dataclass(frozen=True)
class ImageErrors:
    """Errors over all pixels of paired images, and their mean structural similarity."""

    paired: PairedError
    ssim: float

    def to_json(self) -> dict[str, Any]:
        """Return the errors as JSON."""
        return {**asdict(self.paired), "ssim": self.ssim}


@dataclass(frozen=True)
class Divergence:
    """The results of a comparison.

    Attributes:
        sums: along A's trajectories; None where B is sampled by other steps.
        bins: step bins of the results.
        kind: of the prediction, ``"velocity"`` or ``"noise"``.
        latents: (3,) ‖z_B - z_A‖², ‖z_A‖² and number of values, of the final latents of each model's own trajectory.
        error: Σ‖z_B - z_A‖² / Σ‖z_A‖² with its interval over images; None for a single image.
        quick: Fréchet distance of the final images of the same seeds with its interval; None for a single image.
        images: errors between final images; None for latents.
        note: why routing overlap is unknown in some blocks; None where it is known in all.
        conditions: both checkpoints and the sampling.
        computed: what B's schedule computed; None without one.
    """

    sums: Sums | None
    bins: int
    kind: str
    latents: Array
    error: Interval | None
    quick: Interval | None
    images: ImageErrors | None
    note: str | None
    conditions: dict[str, Any]
    computed: Computed | None = None

    def arrays(self) -> dict[str, Array]:
        """Return the numbers by name: NaN where unknown, infinity for an error relative to zero."""
        stepwise = {} if self.sums is None else by_steps(self.sums, self.bins)
        numbers = {name: values for name, values in stepwise.items() if name.startswith("prediction.")}
        numbers |= {
            "latents.relative_error": relative(self.latents),
            "latents.mse": mean_square(self.latents),
            "latents.low": np.asarray(self.error.low if self.error else np.nan),
            "latents.high": np.asarray(self.error.high if self.error else np.nan),
            "quick.frechet": np.asarray(self.quick.estimate if self.quick else np.nan),
            "quick.low": np.asarray(self.quick.low if self.quick else np.nan),
            "quick.high": np.asarray(self.quick.high if self.quick else np.nan),
        }
        numbers |= stepwise
        if self.images is not None:
            values = {name: np.nan if value is None else value for name, value in self.images.to_json().items()}
            numbers |= {f"images.{name}": np.asarray(value) for name, value in values.items()}
        return {name: np.asarray(value, dtype=np.float64) for name, value in numbers.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the numbers nested by their names, null where unknown or infinite, with note and conditions.

        Prediction, depth and routing are null where steps differ.
        """
        document: dict[str, Any] = {"conditions": self.conditions, "images": None}
        for name, values in self.arrays().items():
            if name.startswith(("images.", "quick.")):
                continue
            *groups, leaf = name.split(".")
            place = document
            for group in groups:
                place = place.setdefault(group, {})
            place[leaf] = finite_json(values.tolist())
        if self.sums is None:
            document |= {"prediction": None, "depth": None, "routing": None}
        else:
            document["prediction"]["kind"] = self.kind
            document["routing"]["note"] = self.note
        document["quick"] = asdict(self.quick) if self.quick else None
        computed = {"computed": self.computed.to_json()} if self.computed else {}
        return {**document, "images": self.images.to_json() if self.images else None, **computed}


@dataclass(frozen=True)
class Outputs:
    """Files to write: the numbers as safetensors, and a grid of image pairs as PNG."""

    numbers: Path | None = None
    grid: Path | None = None
    force: bool = False

    @property
    def named(self) -> dict[str, Path]:
        """The files that are asked for, by name."""
        return {name: path for name, path in (("numbers", self.numbers), ("grid", self.grid)) if path is not None}


@dataclass(frozen=True)
class KeptComparison:
    """The result of a comparison as JSON, and the seconds that it took."""

    result: Mapping[str, Any]
    seconds: float


def by_steps(sums: Sums, bins: int) -> dict[str, Array]:
    """Return errors of predictions, of blocks and of routing by name: over all, by step, by bin and by block.

    The relative error of the prediction is Σ‖v_B - v_A‖² / Σ‖v_A‖² over all steps and images.
    """
    binned, blocks = sums.binned(bins), sums.blocks.sum(axis=0)
    return {
        "prediction.relative_error": relative(sums.prediction.sum(axis=0)),
        "prediction.mse": np.asarray(mean_square(sums.prediction.sum(axis=0))),
        "prediction.steps.t": sums.times,
        "prediction.steps.relative_error": relative(sums.prediction),
        "prediction.steps.mse": mean_square(sums.prediction),
        "prediction.bins.relative_error": relative(binned.prediction),
        "prediction.bins.mse": mean_square(binned.prediction),
        "depth.added": added(blocks),
        "depth.cumulative": cumulative(blocks),
        "depth.bins.added": added(binned.blocks),
        "depth.bins.cumulative": cumulative(binned.blocks),
        "routing.overlap": np.asarray(overlap(blocks.sum(axis=0))),
        "routing.blocks.overlap": overlap(blocks),
        "routing.bins.overlap": overlap(binned.blocks),
    }


def relative(sums: Array) -> Array:
    """Return error / reference of sums (..., error, reference, …): 0 for no error, infinity for a reference of 0."""
    error, reference = sums[..., 0], sums[..., 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / reference)


def mean_square(sums: Array) -> Array:
    """Return the mean squared error of sums (..., error, reference, count)."""
    mean: Array = sums[..., 0] / sums[..., 2]
    return mean


def added(blocks: Array) -> Array:
    """Return the error that each block alone adds, ‖f_B(x) - f_A(x)‖ / ‖f_A(x) - x‖, of block sums (..., 6)."""
    return np.sqrt(relative(blocks[..., 0:2]))


def cumulative(blocks: Array) -> Array:
    """Return the error of B's residual stream after each block, ‖x'_B - x_A‖ / ‖x_A‖, of block sums (..., 6)."""
    return np.sqrt(relative(blocks[..., 2:4]))


def overlap(blocks: Array) -> Array:
    """Return the mean of |A_k ∩ B_k| / k of block sums (..., 6); NaN where rows are unknown."""
    with np.errstate(invalid="ignore"):
        return blocks[..., 4] / blocks[..., 5]


def finite_json(values: Any) -> Any:
    """Return nested lists of numbers with None for NaN and infinity, which JSON lacks."""
    if isinstance(values, list):
        return [finite_json(value) for value in values]
    return values if np.isfinite(values) else None


def require_same_architecture(a: Checkpoint, b: Checkpoint) -> None:
    """Raise `BadInputError` where B's blocks cannot run on A's states; experts may differ in any way."""
    pairs = [(name, getattr(a.config, name), getattr(b.config, name)) for name in _SAME_ARCHITECTURE]
    differing = ", ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs)
    if differing:
        raise BadInputError(
            f"{b.path}: has {differing} of {a.path}; compare checkpoints that differ in their experts or formats only"
        )


def matching_rows(a: Checkpoint, b: Checkpoint) -> tuple[RowMap, ...]:
    """Return for each block which of A's router rows each of B's is, (R_B,); None where that is unknown.

    Files with ghosts or quantised weights keep all rows and their order. Where rows were deleted, the remaining ones
    are recognised by equal weights.
    """
    return tuple(_matching_rows(a, b, block) for block in range(a.config.depth))


def _matching_rows(a: Checkpoint, b: Checkpoint, block: int) -> RowMap:
    import torch

    counts = [checkpoint.config.blocks[block].router_rows for checkpoint in (a, b)]
    if counts[0] == counts[1]:
        return torch.arange(counts[0])
    ours, theirs = (checkpoint.finite_tensor(in_block(block, ROUTER)).float() for checkpoint in (a, b))
    equal = (theirs.unsqueeze(1) == ours.unsqueeze(0)).all(dim=-1)
    once = bool((equal.sum(dim=1) == 1).all()) and bool((equal.sum(dim=0) <= 1).all())
    return equal.int().argmax(dim=1) if once else None


def rows_note(rows: Sequence[RowMap], schedule: ComputeSchedule | None = None) -> str | None:
    """Return why experts of A and B cannot be matched in some blocks, or by a schedule; None where they can be."""
    if schedule is not None and schedule.table.residual is not None:
        return "unknown where blocks are reused together, by the residual of the first"
    unknown = ", ".join(str(block) for block, known in enumerate(rows) if known is None)
    return f"unknown where router rows were deleted and the others changed: blocks {unknown}" if unknown else None


def compare_checkpoints(pair: CheckpointPair, runtime: Runtime, outputs: Outputs) -> Divergence:
    """Compare B with A and write the outputs; settings are checked before anything is sampled.

    Raises `BadInputError` where the checkpoints differ in architecture, a model gives NaN, or a grid of latents is
    asked for, and `UsageError` for more bins than steps.
    """
    check_pair(pair, outputs)
    a, spec = pair.a, pair.spec
    rows = matching_rows(a, pair.b) if pair.own is None else ()
    found = _followed(pair, rows, runtime) if pair.own is None else _sampled(pair, runtime)
    sums, (final_a, final_b) = found.sums, found.finals
    images = [_images(final) for final in (final_a, final_b)] if a.config.pixel_space else None
    features_a, features_b = (_features(a, final) for final in (images or (final_a, final_b)))
    with phase("comparing features"):
        quick = quick_score(features_a, features_b)
    result = Divergence(
        sums=sums,
        bins=pair.bins,
        kind="velocity" if a.config.sampler == "rf" else "noise",
        latents=_difference(final_a, final_b),
        error=latent_error(final_a, final_b),
        quick=quick,
        images=image_errors(images[0], images[1], a.card.grey_levels) if images else None,
        note=rows_note(rows, pair.schedule),
        conditions=_conditions(pair),
        computed=computed_by(pair.schedule, pair.b.config, found.computed) if pair.schedule is not None else None,
    )
    grid = pair_grid(images[0], images[1], spec.labels(range(spec.images))) if images and outputs.grid else None
    _write(result, grid, outputs, pair.inputs)
    return result


def _followed(pair: CheckpointPair, rows: tuple[RowMap, ...], runtime: Runtime) -> Followed:
    """Return the sums along A's trajectories, and the final latents of A and of B."""
    import torch

    from ditmoe_cli.diffusion.scheduled_guidance import loaded_schedule
    from ditmoe_cli.model.loading import build_model

    a, b, spec = pair.a, pair.b, pair.spec
    device, dtype = torch.device(runtime.device), torch_dtype_of(spec.dtype)
    model_a, model_b = (build_model(each, device, dtype).prepack() for each in (a, b))
    scheduled = None if pair.schedule is None else loaded_schedule(pair.schedule, model_b.device)
    models = ModelPair(model_a, model_b, pair.paths, rows, _weak_models(pair, (model_a, model_b)), scheduled)
    with phase(f"comparing {b.name} with {a.name}", 2 * spec.images * spec.steps, "steps") as progress:
        parts = [follow(models, spec, indices, progress) for indices in batches(spec.images, runtime.batch)]
    found = parts[0]
    for part in parts[1:]:
        found += part
    return found


def _sampled(pair: CheckpointPair, runtime: Runtime) -> Followed:
    """Return the final latents of A and of B, each sampled in its own way, one after the other."""
    from ditmoe_cli.evaluation.samples import Sampling, counting, load_models

    finals, computed = [], [np.zeros((0, 2))]
    for schedule, (checkpoint, spec) in zip((None, pair.schedule), pair.sampled, strict=True):
        models = load_models(Sampling(checkpoint, spec, weak=pair.weak, schedule=schedule), runtime)
        parts = []
        with phase(f"sampling {checkpoint.name}", spec.images, "images") as progress:
            for indices in batches(spec.images, runtime.batch):
                try:
                    by = counting(models, indices)
                    final = sample_batch(models.model, spec, indices, weak=models.weak, scheduled=by)
                except BadInputError as error:
                    raise BadInputError(f"{checkpoint.path}: {error}") from None
                parts.append(final.cpu().numpy())
                computed += [rows_of(models.counts[indices[0]], len(indices))] if schedule is not None else []
                progress(len(indices))
        finals.append(np.concatenate(parts))
    return Followed(None, (finals[0], finals[1]), np.concatenate(computed))


def _weak_models(pair: CheckpointPair, models: tuple[DiTMoE, DiTMoE]) -> tuple[Denoiser, Denoiser] | None:
    """Return the models that guide A and B; a checkpoint is loaded once. None without any."""
    from ditmoe_cli.diffusion.weak_models import weak_model
    from ditmoe_cli.model.loading import build_model

    loaded: list[Denoiser] = []

    def load() -> Denoiser:
        assert pair.weak is not None  # as `check_guide` saw to
        if not loaded:
            loaded.append(build_model(pair.weak, models[0].device, torch_dtype_of(pair.spec.dtype)).prepack())
        return loaded[0]

    of_a, of_b = (weak_model(model, pair.spec.guide, load) for model in models)
    return None if of_a is None or of_b is None else (of_a, of_b)


def check_pair(pair: CheckpointPair, outputs: Outputs) -> None:
    """Raise where a comparison cannot be made, or its outputs cannot be written; see `compare_checkpoints`."""
    a, spec = pair.a, pair.spec
    require_same_architecture(a, pair.b)
    if pair.own is None:
        check_followable(spec)
        choose_bins(pair.bins, spec.steps)
    for each, sampling in pair.sampled:
        check_guide(sampling.guide, each, pair.weak)
    if pair.schedule is not None:
        check_schedule(pair.schedule, pair.b, (pair.own or spec).way)
    _check_memory(pair)
    if outputs.grid is not None and not a.config.pixel_space:
        raise BadInputError(
            f"{a.path}: makes latents of {a.config.in_channels} channels, which need a VAE to become images; "
            "leave out ⟨grid⟩"
        )
    for target in (outputs.numbers, outputs.grid):
        if target is not None:
            check_target(target.absolute(), outputs.force, pair.inputs)


def _check_memory(pair: CheckpointPair) -> None:
    """Raise `UsageError` where the final latents of both models, and their errors in fp64, exceed this machine."""
    config, images = pair.a.config, pair.spec.images
    needed = images * config.in_channels * config.input_size**2 * _BYTES_A_VALUE
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"⟨images⟩ {images}: all final latents are held, which takes {needed / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB; give fewer"
        )


def comparison_key(pair: CheckpointPair, device: str) -> str:
    """Return the key under which the result of a comparison is kept."""
    conditions = _conditions(pair)
    for side in ("a", "b"):
        del conditions[side]["path"]
    return result_key("compare", {**conditions, "device": device})


def kept_comparison(key: str, pair: CheckpointPair, outputs: Outputs) -> KeptComparison | None:
    """Return what an earlier run kept, with these paths; None where it lacks one of the outputs that are asked for."""
    document = read_kept(key)
    try:
        if document is None or not all(
            path.is_file() and not path.is_symlink() and file_digest(path) == document["files"].get(name)
            for name, path in outputs.named.items()
        ):
            return None
        result, seconds = dict(document["result"]), float(document["seconds"])
        conditions = dict(result["conditions"])
        for side, path in zip(("a", "b"), pair.paths, strict=True):
            conditions[side] = {**conditions[side], "path": str(path)}
        return KeptComparison({**result, "conditions": conditions}, seconds)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def keep_comparison(key: str, kept: KeptComparison, outputs: Outputs, notify: Notify) -> None:
    """Keep a result, with the digests of the outputs that were written beside it."""
    files = {name: file_digest(path) for name, path in outputs.named.items()}
    keep(key, {"result": dict(kept.result), "seconds": kept.seconds, "files": files}, notify)


def _conditions(pair: CheckpointPair) -> dict[str, Any]:
    own = {} if pair.own is None else {"sampling_b": {**pair.own.conditions(), "nfe": pair.own.nfe}}
    schedule = {} if pair.schedule is None else {"schedule": pair.schedule.digest}
    return {
        "a": {"path": str(pair.a.path), "identity": pair.a.fingerprint},
        "b": {"path": str(pair.b.path), "identity": pair.b.fingerprint, **schedule},
        "sampling": {**pair.spec.conditions(), "nfe": pair.spec.nfe},
        **own,
        "bins": pair.bins if pair.own is None else None,
        "grey_levels": pair.a.card.grey_levels,
    }


def _write(result: Divergence, grid: NDArray[np.uint8] | None, outputs: Outputs, inputs: Sequence[Path]) -> None:
    if outputs.grid is not None and grid is not None:
        write_png(outputs.grid, grid, outputs.force, inputs)
    if outputs.numbers is not None:
        document = {"kind": result.kind, "note": result.note, "conditions": result.conditions}
        write_arrays(outputs.numbers, result.arrays(), {"schema": COMPARISON_SCHEMA, **document}, outputs.force, inputs)


def _images(final: NDArray[np.float32]) -> NDArray[np.uint8]:
    import torch

    return to_uint8(torch.from_numpy(final))


def image_errors(a: NDArray[np.uint8], b: NDArray[np.uint8], grey_levels: int) -> ImageErrors:
    """Return the errors of images b against a, uint8 (N, H, W, C); MSE on the scale 0..grey_levels.

    SSIM is the same on either scale, since its constants scale with the range of the data.
    """
    return ImageErrors(paired_error(b, a, grey_levels), float(ssim(a, b, 255.0).mean()))


def quick_score(a: Array, b: Array) -> Interval | None:
    """Return the Fréchet distance of features a and b (N, D) of images of the same seeds, with its 95 % interval.

    Of all scores tried it ranks compressed models best by few images (docs/results.md, Few images), since both sets
    share their noise. The interval is that of `bootstrap_frechet` over pairs. None for a single pair.
    """
    if len(a) < 2:
        return None
    if np.array_equal(a, b):  # exactly 0 in every resample too, where rounding would not give that
        return interval_of(0.0, [0.0, 0.0], 0.95, "centred")
    return bootstrap_frechet(a, b, paired=True)


def _features(checkpoint: Checkpoint, final: NDArray[Any]) -> Array:
    """Return features (N, D) of images uint8 (N, H, W, C) as ``pixels`` does, of latents (N, C, S, S) likewise."""
    if final.dtype == np.uint8:
        return PixelExtractor(checkpoint.card.grey_levels)(final)
    return averaged(final.transpose(0, 2, 3, 1).astype(np.float64))


def latent_error(a: NDArray[Any], b: NDArray[Any]) -> Interval | None:
    """Return Σ‖bᵢ - aᵢ‖² / Σ‖aᵢ‖² of final latents (N, C, S, S) and its 95 % bootstrap interval over pairs i.

    None for a single pair.
    """
    if len(a) < 2:
        return None
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (a, b))
    errors, sizes = ((b - a) ** 2).sum(axis=1), (a**2).sum(axis=1)
    return bootstrap(
        lambda error, size: float(relative(np.stack((error.sum(), size.sum())))), [errors, sizes], paired=True
    )


def _difference(a: NDArray[Any], b: NDArray[Any]) -> Array:
    """Return ‖b - a‖², ‖a‖² and the number of values, (3,)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray([((b - a) ** 2).sum(), (a**2).sum(), a.size], dtype=np.float64)


@dataclass(frozen=True)
class Followed:
    """Sums along A's trajectories, None where B has other steps, and the final latents (N, C, S, S) of A and of B.

    `computed` are the rows (N, 2) of what a schedule of B computed (`rows_of`), none without one.
    """

    sums: Sums | None
    finals: tuple[NDArray[np.float32], NDArray[np.float32]]
    computed: Array

    def __add__(self, other: Followed) -> Followed:
        """Return what was found of the images of both."""
        sums = self.sums + other.sums if self.sums is not None and other.sums is not None else None
        first, second = (np.concatenate(finals) for finals in zip(self.finals, other.finals, strict=True))
        return Followed(sums, (first, second), np.concatenate((self.computed, other.computed)))


def follow(models: ModelPair, spec: SampleSpec, indices: Sequence[int], progress: Phase) -> Followed:
    """Sample the images `indices` with A, running both models on each state, then sample them with B.

    `progress` is called with the number of images after each step of A, and before each of B's own. Raises
    `BadInputError` for NaN and infinite values, naming the checkpoint, the block and the step.
    """
    import torch

    from ditmoe_cli.evaluation.scheduled_side import ScheduledSide

    a, b, scheduled = models.a, models.b, models.scheduled
    labels = torch.tensor(spec.labels(indices), device=a.device)
    side = None if scheduled is None else ScheduledSide(b, scheduled, spec.guidance, len(indices))
    counts: list[ComputeCount] = []
    times: list[float] = []
    predictions, blocks = [], []
    weak_a, weak_b = models.weak or (None, None)

    def watch(z: Tensor, t: float) -> None:
        x, times_of_rows, y = _branches(z, t, labels, a.config.num_classes, spec.cfg)
        follows = side is not None and side.follows
        v_a, v_b, by_block = run_blocks(models, x, times_of_rows, y, side)
        step = f"step {len(times) + 1} of {spec.steps}"
        blocks.append(by_block.cpu().numpy())
        blockwise = side is None or side.blockwise
        weak_v_a, weak_v_b = _weak_predictions(models, spec, z, t, labels) or (None, None)
        if not blockwise or np.isfinite(blocks[-1]).all():  # else it is a model itself that is broken
            _require_finite_guide(spec, step, weak_v_a, weak_v_b)
        v_a = _guided(v_a, spec, weak_v_a)
        if side is None:
            v_b = _guided(v_b, spec, weak_v_b)
        elif not follows:
            v_b = side.kept(z, _guided_weakly(*side.guided(v_b), spec, weak_v_b))
        v_a, v_b = (v[:, : z.shape[1]].double() for v in (v_a, v_b))
        predicted = torch.stack(((v_b - v_a).square().sum(), v_a.square().sum())).cpu().numpy()
        times.append(float(t))
        _require_finite(blocks[-1] if blockwise else np.zeros((0, 6)), predicted, models.paths, step)
        predictions.append([*predicted, v_a.numel()])
        progress(len(indices))

    final_a = sample_batch(a, spec, indices, Watchers(on_step=watch), weak=weak_a)
    try:
        each_step = Watchers(through=lambda predict: _announced(predict, lambda: progress(len(indices))))
        by = None if scheduled is None else replace(scheduled, counted=counts.append)
        final_b = sample_batch(b, spec, indices, each_step, weak=weak_b, scheduled=by)
    except BadInputError as error:
        raise BadInputError(f"{models.paths[1]}: {error}") from None
    sums = Sums(np.asarray(times), np.asarray(predictions, dtype=np.float64), np.stack(blocks))
    computed = [np.zeros((0, 2)), *(rows_of(count, len(indices)) for count in counts)]
    return Followed(sums, (final_a.cpu().numpy(), final_b.cpu().numpy()), np.concatenate(computed))


def _announced(predict: Predictor, tell: Callable[[], None]) -> Predictor:
    """Return a predictor that tells of each evaluation before it begins."""

    def announced(x: Tensor, t: float) -> Tensor:
        tell()
        return predict(x, t)

    return announced


def _branches(z: Tensor, t: float, labels: Tensor, null: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, t and y of the guidance branches: at scale 1 the conditional one, else both, the conditional first."""
    import torch

    times = torch.full((len(z),), t, device=z.device)
    if scale == 1.0:
        return z, times, labels
    return torch.cat((z, z)), torch.cat((times, times)), torch.cat((labels, torch.full_like(labels, null)))


def _weak_predictions(
    models: ModelPair, spec: SampleSpec, z: Tensor, t: float, labels: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return what the weaker models of A and B predict for z (N, C, S, S) at time t; None where they do not guide."""
    if models.weak is None or not spec.guidance.takes_weak(t):
        return None
    of_a, of_b = models.weak
    first = of_a.prepared([t], labels)(z, t).float()
    return first, first if of_b is of_a else of_b.prepared([t], labels)(z, t).float()


def _require_finite_guide(spec: SampleSpec, step: str, *predictions: Tensor | None) -> None:
    """Raise `BadInputError` where a prediction of a weaker model is not finite."""
    for prediction in predictions:
        if prediction is not None and spec.guide is not None and not bool(prediction.isfinite().all()):
            raise BadInputError(
                f"the weaker model that guides, {spec.guide.told}, makes NaN or infinite values at {step}; are its "
                "weights whole?"
            )


def _guided(output: Tensor, spec: SampleSpec, weak: Tensor | None = None) -> Tensor:
    """Return the guided prediction from the output of the branches and that of the weaker model, if any, in fp32."""
    from ditmoe_cli.diffusion.guidance import combine

    output = cond = output.float()
    if spec.cfg != 1.0:
        cond, uncond = output.chunk(2)
        output = combine(cond, uncond, spec.cfg, spec.family)
    return _guided_weakly(output, cond, spec, weak)


def _guided_weakly(output: Tensor, cond: Tensor, spec: SampleSpec, weak: Tensor | None) -> Tensor:
    """Return an output, guided by what the weaker model predicts, if any; `cond` is its conditional branch."""
    from ditmoe_cli.diffusion.guidance import away_from_weak

    if weak is None or spec.guide is None:
        return output
    return away_from_weak(output, cond, weak, spec.guide.scale, spec.family)


def run_blocks(
    models: ModelPair, x: Tensor, t: Tensor, y: Tensor, side: ScheduledSide | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run both models on the same input, and each of B's blocks on A's stream and conditioning too.

    Returns both outputs (N, out_channels, H, W), and each block's sums as in `Sums`, (depth, 6) in fp64. Where B is the
    `side` of a schedule, its output and the sums are of the branches that it computes, and the sums NaN where its
    blocks cannot be told apart; where it follows, its output is the guided prediction, and the sums are 0.
    """
    import torch

    a, b = models.a, models.b
    rows = slice(None) if side is None else slice(side.images * len(side.branches))
    if side is not None and side.follows:
        return a(x, t, y), side.followed(x[: side.images]), torch.zeros((len(models.rows), 6), dtype=torch.float64)
    if side is not None and not side.blockwise:
        found = side.predict(x[rows], float(t[0]), b.condition(t[rows], y[rows]))
        return a(x, t, y), found, torch.full((len(models.rows), 6), torch.nan, dtype=torch.float64)
    stream_a, c_a = a.embed(x, t, y)
    stream_b, c_b = b.embed(x[rows], t[rows], y[rows])
    sums = []
    for index, row_of in enumerate(models.rows):
        after, rows_a = _run_block(a, index, stream_a, c_a)
        if side is None:
            alone, _ = _run_block(b, index, stream_a, c_a)
            stream_b, selected = _run_block(b, index, stream_b, c_b)
            rows_b: RowMap = selected
        else:
            made = side.block(index, stream_b, stream_a[rows], (c_b, c_a[rows]), float(t[0]))
            alone, stream_b, rows_b = made.alone, made.own, made.rows
        before, then = stream_a[rows], after[rows]
        errors = (alone - then, then - before, stream_b - then, then)
        squares = torch.stack([error.double().square().sum() for error in errors])
        shared = torch.zeros_like(squares[:2])
        if row_of is not None and rows_b is not None:
            shared = _shared(rows_a, rows_b, row_of)
        sums.append(torch.cat((squares, shared)))
        stream_a = after
    output = b.unembed(stream_b, c_b) if side is None else side.finish(stream_b, c_b)
    return a.unembed(stream_a, c_a), output, torch.stack(sums)


def _shared(a: Tensor, b: Tensor, row_of: Tensor) -> Tensor:
    """Return what rows of A and of B share (`shared_rows`), B's being A's `row_of`, of the tokens that B routed."""
    routed = b[:, 0] >= 0
    return shared_rows(a[: len(b)][routed], row_of.to(b.device)[b[routed]])


def shared_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return Σ|A_k ∩ B_k| and Σk of selected rows (T, k), as (2,) in fp64; k is the larger of both."""
    import torch

    shared = (a.unsqueeze(2) == b.unsqueeze(1)).any(dim=-1).sum()
    slots = torch.full_like(shared, len(a) * max(a.shape[1], b.shape[1]))
    return torch.stack((shared, slots)).double()


def _run_block(model: DiTMoE, index: int, stream: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return a block's output and the router rows (T, k) that it selected."""
    selected: list[Tensor] = []

    def watch(event: MoEEvent) -> None:
        selected.append(event.routing.rows)

    return model.blocks[index](stream, c, index, watch), selected[0]


def _require_finite(blocks: Array, predicted: Array, paths: tuple[Path, Path], step: str) -> None:
    """Raise `BadInputError` for the first block, else for the final layer, where sums are not finite."""
    broken = np.flatnonzero(~np.isfinite(blocks).all(axis=1))
    if broken.size:
        block = int(broken[0])
        name = paths[0] if not np.isfinite(blocks[block, [1, 3]]).all() else paths[1]
        raise BadInputError(f"{name}: block {block} makes NaN or infinite values at {step}; are its weights whole?")
    if not np.isfinite(predicted).all():
        name = paths[1] if np.isfinite(predicted[1]) else paths[0]
        raise BadInputError(f"{name}: the final layer makes NaN or infinite values at {step}; are its weights whole?")
