"""Settings of a calibration run as data: those of a profile's JSON, those asked for, and the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ditmoe_cli.diffusion.few_steps import check_unguided, own_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec, check_followable, check_spec
from ditmoe_cli.diffusion.schedule import CALIBRATION_SOLVER, choose_solver
from ditmoe_cli.diffusion.step_bins import MOST_BINS, choose_bins
from ditmoe_cli.errors import BadInputError, UsageError, named
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import Dtype, parse_dtype, recorded_dtype

STEPS = 20
FEWEST_IMAGES, MOST_IMAGES = 16, 64  # where no number is given
TOKENS = 131_072  # of all these images in all steps, about

SHARED_TOKENS = 4096  # of the reservoir, at most, that all experts of a block run on
SHARED_BATCH = 256  # of them in one estimate of HSIC, whose Gram matrices grow with their square
_GOLDEN = (5**0.5 - 1) / 2  # φ


def usual_images(patches: int, steps: int = STEPS) -> int:
    """Return the default number of images of so many patches: about `TOKENS` tokens in all steps, in whole eights.

    64 for 64 patches and less, 24 for 256, 16 for 512 and more: what is fitted needs so many different patches, not so
    many images (docs/results.md), and every eighth image is held out. In other `steps` than 20 they are as many
    evaluations, at most.
    """
    most = min(TOKENS // (steps * patches), MOST_IMAGES * STEPS // steps)
    return max(most // 8 * 8, FEWEST_IMAGES)


def usual_classes(images: int, classes: int) -> tuple[int, ...]:
    """Return the default labels of N calibration images of C classes: round(i C / N) of image i, and all where C <= N.

    Neighbouring labels of ImageNet are alike: 0 to 23 are fish and birds. Labels rise, and none comes twice.
    """
    if not 0 < images < classes:
        return tuple(range(classes))
    return tuple(round(i * classes / images) for i in range(images))


@dataclass(frozen=True)
class Calibration:
    """Settings of a calibration run.

    Attributes:
        spec: the images that are sampled, or noised where images were given.
        bins: step bins, from noise to image.
        reservoir: MoE inputs kept per block, in tokens.
        batch: images at once. Rounding may differ between batch sizes and tip a near-tie of the top-k, so a profile
            depends on it.
        data: digest of the images that were noised, None where the model's own trajectories were followed.
        fast: whether only counters are kept, neither moments nor a reservoir.
    """

    spec: SampleSpec
    bins: int = MOST_BINS
    reservoir: int = 20_480
    batch: int = 32
    data: str | None = None
    fast: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON, the sample spec's fields among them."""
        own = {"bins": self.bins, "reservoir": self.reservoir, "batch": self.batch, "fast": self.fast}
        return {**self.spec.conditions(), **own, "source": "data" if self.data else "trajectories", "data": self.data}


def check_settings(settings: Calibration) -> None:
    """Raise `UsageError` for steps that cannot be followed, more bins than steps, or a negative reservoir."""
    check_followable(settings.spec)
    choose_bins(settings.bins, settings.spec.steps)
    if settings.reservoir < 0:
        raise UsageError(f"⟨reservoir⟩ {settings.reservoir}: must be at least 0 tokens")
    if settings.batch < 1:
        raise UsageError(f"⟨batch⟩ {settings.batch}: must be at least 1")


@dataclass(frozen=True)
class WantedCalibration:
    """Calibration settings that were asked for; None leaves one as an ancestor's profile or the defaults have it.

    ⟨calibration_images⟩ and the like name them in messages.
    """

    images: int | None = None
    steps: int | None = None
    cfg: float | None = None
    seed: int | None = None
    classes: tuple[int, ...] | None = None
    dtype: Dtype | None = None

    def given(self) -> dict[str, Any]:
        """Return the settings that were asked for, by name."""
        names = ("images", "steps", "cfg", "seed", "classes", "dtype")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def over(self, base: Calibration, checkpoint: Checkpoint) -> Calibration:
        """Return `base` with the settings that were asked for. Raises `UsageError` for values out of range."""
        if not self.given():
            return base
        spec = replace(base.spec, **self.given())
        if self.classes is None and base.data is None and has_usual_classes(base.spec, checkpoint):
            spec = replace(spec, classes=usual_classes(spec.images, checkpoint.config.num_classes))
        bins = base.bins if base.bins <= spec.steps else choose_bins(None, spec.steps)
        try:
            check_unguided(checkpoint, spec.cfg)
            check_spec(spec, checkpoint.config, allow_null=base.data is not None)
        except UsageError as error:
            raise UsageError(named(error.message, setting)) from None
        return replace(base, spec=spec, bins=bins)

    def unlike(self, document: Mapping[str, Any]) -> str | None:
        """Return how a profile's settings differ from what was asked for, None where they are as asked."""
        conditions = SampleSpec(1, 1, 1.0, 0, "euler", self.classes or ()).conditions()
        asked = {**self.given(), **({"classes": conditions["classes"]} if self.classes else {})}
        for name, value in asked.items():
            made = recorded_dtype(document) if name == "dtype" else document.get(name)
            if made != value:
                return f"{setting(name)} {value}: the profile was made with {made}"
        return None


def setting(name: str) -> str:
    """Return how messages mark a setting of the calibration."""
    return "⟨dtype⟩" if name == "dtype" else f"⟨calibration_{name}⟩"


def told(document: Mapping[str, Any]) -> str:
    """Return calibration settings in words, as ``cfg 1.5, 20 steps, 64 images``."""
    given = ", noised from data" if document.get("data") else ""
    dtype = recorded_dtype(document)
    rounded = "" if dtype == "fp32" else f", in {dtype}"
    return f"cfg {document['cfg']:g}, {document['steps']} steps, {document['images']} images{given}{rounded}"


def default_calibration(checkpoint: Checkpoint, dtype: Dtype = "fp32") -> Calibration:
    """Return the settings of a plain ``ditmoe profile-experts``, which computes in `dtype`.

    A distilled checkpoint is followed by its own solver and steps, whose times alone it knows.
    """
    solver, steps = own_sampling(checkpoint) or (CALIBRATION_SOLVER[checkpoint.config.sampler], STEPS)
    images = usual_images(checkpoint.config.num_patches, steps)
    classes = usual_classes(images, checkpoint.config.num_classes)
    return Calibration(SampleSpec(images, steps, 1.0, 0, solver, classes, dtype=dtype), bins=choose_bins(None, steps))


def spread_classes(classes: int) -> tuple[int, ...]:
    """Return all classes in an order of which every beginning is spread evenly over them: by the fractions of c φ."""
    return tuple(sorted(range(classes), key=lambda c: c * _GOLDEN % 1.0))


def has_usual_classes(spec: SampleSpec, checkpoint: Checkpoint) -> bool:
    """Return whether the labels are those of no ⟨classes⟩, so that they change with the number of images."""
    return spec.classes == usual_classes(spec.images, checkpoint.config.num_classes)


def parse_calibration(document: Mapping[str, Any], checkpoint: Checkpoint) -> Calibration:
    """Read the settings of an ancestor's profile from its JSON, to profile `checkpoint` alike.

    Raises `BadInputError` where they are malformed.
    """
    data = document.get("data")
    if not isinstance(data, str | None):
        raise _malformed(ValueError(f"data {data!r}"))
    spec = profiled_spec(document, checkpoint)
    try:
        bins, reservoir, batch = (int(document[name]) for name in ("bins", "reservoir", "batch"))
        if not 1 <= bins <= spec.steps or reservoir < 0 or batch < 1:
            raise ValueError(f"bins {bins}, reservoir {reservoir}, batch {batch}")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise _malformed(error) from None
    return Calibration(spec, bins, reservoir, batch, data, document.get("fast") is True)


def profiled_spec(document: Mapping[str, Any], checkpoint: Checkpoint) -> SampleSpec:
    """Return the images that were sampled, or noised, for a profile of `checkpoint` with these settings.

    Given images without labels have the null class, one above the model's own. Raises `BadInputError` where the
    settings are malformed.
    """
    try:
        classes = document["classes"]
        spec = SampleSpec(
            images=int(document["images"]),
            steps=int(document["steps"]),
            cfg=float(document["cfg"]),
            seed=int(document["seed"]),
            solver=choose_solver(document["solver"], checkpoint.config.sampler),
            classes=tuple(range(int(classes[2:]) + 1)) if isinstance(classes, str) else tuple(map(int, classes)),
            dtype=parse_dtype(recorded_dtype(document)),
        )
        return check_spec(spec, checkpoint.config, allow_null=document.get("data") is not None)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> BadInputError:
    return BadInputError(f"the profile's calibration settings are malformed ({error})")
