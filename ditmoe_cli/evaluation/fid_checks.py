"""Checks of a ``fid`` comparison: sides that do not fit together are refused before anything is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.weak_guidance import parse_guide
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features.extraction import Extraction
from ditmoe_cli.evaluation.fid_sides import Comparison, Item, Side, SideKey, check_statistics
from ditmoe_cli.evaluation.sampled_models import SampledModel, are_copies, have_same_noise, model_of
from ditmoe_cli.evaluation.samples import Sampling
from ditmoe_cli.evaluation.scores.extrapolation import sizes_for
from ditmoe_cli.evaluation.scores.metrics import Request
from ditmoe_cli.model.dtypes import recorded_dtype

_MUST_AGREE = ("steps", "cfg", "solver", "classes", "interval", "dtype", "guide")
_MUST_AGREE_OF_COPIES = ("classes", "dtype")  # the others belong to the model where it is distilled


@dataclass(frozen=True)
class Inputs:
    """A comparison before anything is sampled.

    Attributes:
        comparison: its items.
        sides: sides that are read from disk, by key.
        samplings: samplings of checkpoints, by key.
        spec: of the subject's images; None for statistics and images of other programs.
    """

    comparison: Comparison
    sides: Mapping[SideKey, Side]
    samplings: Mapping[SideKey, Sampling]
    spec: SampleSpec | None

    def shape(self, key: SideKey) -> tuple[int, ...] | None:
        """Return the shape (H, W, C) of a side's images; None where it is not known."""
        return self.samplings[key].shape if key in self.samplings else self.sides[key].shape

    def source(self, key: SideKey) -> dict[str, Any] | None:
        """Return the sampling and the VAE of a side's images; None where these are not known."""
        if key in self.samplings:
            sampling = self.samplings[key]
            return {"sampling": sampling.spec.conditions(), "vae": sampling.origin.vae}
        source = self.sides[key].source
        return source if source is not None and source["sampling"] is not None else None

    def model(self, key: SideKey) -> SampledModel | None:
        """Return the checkpoint that a side's images come from; None where it is not known."""
        return model_of(self.samplings[key].checkpoint) if key in self.samplings else self.sides[key].model

    def spec_of(self, key: SideKey) -> SampleSpec | None:
        """Return how a side's images are sampled; None where that is not known."""
        return self.samplings[key].spec if key in self.samplings else self.sides[key].spec

    def are_copies(self, key: SideKey) -> bool:
        """Return whether of a side's checkpoint and the subject's one is a distilled copy of the other."""
        return are_copies(self.model(key), self.model(self.comparison.subject.key))

    def original_pairs(self) -> bool:
        """Return whether the original's images have the noise and labels of the subject's."""
        key = self.comparison.original.key
        return have_same_noise(self.spec, self.spec_of(key), copies=self.are_copies(key))


def check_inputs(inputs: Inputs, extraction: Extraction, request: Request, anyway: bool) -> None:
    """Raise `BadInputError` where a side lacks images, or sides differ in extractor, size or settings.

    `anyway` lets differing sizes and settings through.
    """
    subject, reference = inputs.comparison.subject, inputs.comparison.reference
    side = inputs.sides.get(subject.key)
    if request.resamples and side is not None and side.statistics is not None:
        raise BadInputError(f"{subject.path}: holds statistics, and ⟨bootstrap⟩ needs images alone")
    _check_images(inputs, subject, request.needs_subject_features, extraction, request)
    _check_images(inputs, reference, request.needs_reference_features, extraction, request)
    for item, other in ((subject, reference), (reference, subject)):
        if item.key in inputs.sides and other.key in inputs.samplings:
            check_statistics(inputs.sides[item.key], inputs.samplings[other.key], extraction)
    if not anyway:
        _check_shapes(inputs)
        theirs, ours = inputs.source(reference.key), inputs.source(subject.key)
        if theirs is not None and ours is not None:
            must_agree = _MUST_AGREE_OF_COPIES if inputs.are_copies(reference.key) else _MUST_AGREE
            _check_settings(reference.path, theirs, ours, must_agree)


def _check_images(
    inputs: Inputs, item: Item, settings: tuple[str, ...], extraction: Extraction, request: Request
) -> None:
    """Raise where a side has no images, or too few, for its distance and for the `settings` that need features."""
    path, side = item.path, inputs.sides.get(item.key)
    if side is not None and side.images is None:
        if settings:
            raise BadInputError(f"{path}: holds statistics, and {settings[0]} needs images")
        if "sfid" in request.scores and side.statistics is not None and side.statistics.spatial is None:
            raise BadInputError(f"{path}: has no spatial statistics (mu_s, sigma_s); sFID needs them, or images")
        return
    count = len(side.images) if side is not None and side.images is not None else inputs.samplings[item.key].spec.images
    if count < 2:
        raise BadInputError(f"{path}: a distance needs at least 2 images, got {count}")
    for setting, fewest in request.fewest:
        if setting in settings and count < fewest:
            raise BadInputError(f"{path}: {setting} takes at least {fewest} images, got {count}")
    if "⟨metrics⟩ fid-inf" in settings:
        try:
            sizes_for(count, extraction.probe(inputs.shape(item.key) or ()).features.shape[1])
        except BadInputError as error:
            raise BadInputError(f"{path}: ⟨metrics⟩ fid-inf: {error}") from None


def _check_shapes(inputs: Inputs) -> None:
    subject, reference, original = inputs.comparison.items
    shape = inputs.shape(subject.key)
    for item in (reference, *([original] if inputs.original_pairs() else [])):
        other = inputs.shape(item.key)
        if shape is not None and other is not None and shape != other:
            sizes = f"{subject.path} has images of {_by(shape)}, {item.path} has images of {_by(other)}"
            raise BadInputError(f"sizes or channels differ: {sizes}; make both alike, or give ⟨anyway⟩")


def _told(name: str, value: Any) -> Any:
    """Return a setting as messages tell it: guides in words, others as they are recorded."""
    guide = parse_guide(value) if name == "guide" else None
    return value if guide is None else guide.told


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _check_settings(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], must_agree: tuple[str, ...]
) -> None:
    """Raise for a reference of other sampling settings; another seed or number of images is allowed."""
    sides = [{**side["sampling"], "dtype": recorded_dtype(side["sampling"])} for side in (theirs, ours)]
    pairs = [(name, *(_told(name, side.get(name)) for side in sides)) for name in must_agree]
    there, here = (side["vae"]["digest"] if side.get("vae") else None for side in (theirs, ours))
    pairs.append(("VAE", there, here))
    differing = ", ".join(f"{name} {there} there, {here} here" for name, there, here in pairs if there != here)
    if differing:
        raise BadInputError(f"{path}: was sampled under other settings ({differing}); give the same, or ⟨anyway⟩")
