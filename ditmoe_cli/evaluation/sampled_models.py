"""The checkpoints that images come from, and how each is sampled beside a distilled copy of it.

A distilled copy is sampled by few steps of its own, its original as usual and with the guidance that is in the copy's
weights. Noise and label of image i are the same for both, so that their images pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.diffusion.few_steps import told_guidance
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.schedule import ALWAYS
from ditmoe_cli.diffusion.weak_guidance import RANKS, Guide
from ditmoe_cli.files.provenance import Distilled, parse_distilled
from ditmoe_cli.model.checkpoint import Checkpoint

_TEACHERS = "teachers"


@dataclass(frozen=True)
class SampledModel:
    """A checkpoint: its fingerprint, how it was distilled, and the fingerprints of those that it is a copy of."""

    fingerprint: str
    distilled: Distilled | None = None
    teachers: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return how it was distilled, as JSON; nothing where it was not."""
        if self.distilled is None:
            return {}
        return {"distilled": {**asdict(self.distilled), _TEACHERS: list(self.teachers)}}

    def is_taught_by(self, other: SampledModel) -> bool:
        """Return whether it is a distilled copy of the other checkpoint, or was made from such a copy."""
        return other.fingerprint in self.teachers


def model_of(checkpoint: Checkpoint) -> SampledModel:
    """Return what images of a checkpoint come from."""
    distilled = checkpoint.distilled
    if distilled is None:
        return SampledModel(checkpoint.fingerprint)
    return SampledModel(checkpoint.fingerprint, distilled, checkpoint.teachers)


def parse_model(fingerprint: str, document: Mapping[str, Any]) -> SampledModel:
    """Read a checkpoint from the JSON of images of it. Raises `ValueError` or `TypeError` where it is malformed."""
    told = document.get("distilled")
    if told is None:
        return SampledModel(fingerprint)
    teachers = told.get(_TEACHERS, [])
    if not isinstance(teachers, list) or not all(isinstance(teacher, str) for teacher in teachers):
        raise ValueError(f"teachers {teachers!r}")
    distilled = parse_distilled({name: value for name, value in told.items() if name != _TEACHERS})
    return SampledModel(fingerprint, distilled, tuple(teachers))


def are_copies(a: SampledModel | None, b: SampledModel | None) -> bool:
    """Return whether one of two checkpoints is a distilled copy of the other, or was made from such a copy."""
    return a is not None and b is not None and (a.is_taught_by(b) or b.is_taught_by(a))


def have_same_noise(a: SampleSpec | None, b: SampleSpec | None, *, copies: bool) -> bool:
    """Return whether image i of both has one noise and label, and nothing but the models makes images differ.

    Of `copies`, solver, steps and guidance belong to the models; a schedule of compute does so always.
    """
    if a is None or b is None:
        return False
    return a.whole == b.whole or (copies and (a.images, a.seed, a.classes) == (b.images, b.seed, b.classes))


def guided_as(
    spec: SampleSpec, model: SampledModel, others: Iterable[SampledModel | None], weak: Checkpoint | None = None
) -> SampleSpec:
    """Return the spec of an original with the guidance that is in the weights of its distilled copy among `others`.

    Guidance by a weaker checkpoint is left out, unless that is `weak`: it is not at hand.
    """
    copy = distilled_copy(model, others)
    if copy is None or copy.distilled is None or model.distilled is not None:
        return spec
    distilled = copy.distilled
    known = distilled.guide in RANKS or (weak is not None and weak.fingerprint == distilled.guide)
    guide = Guide(str(distilled.guide), distilled.guide_scale, distilled.guide_interval) if known else None
    return replace(spec, cfg=distilled.cfg, interval=ALWAYS, guide=guide)


def distilled_copy(model: SampledModel, others: Iterable[SampledModel | None]) -> SampledModel | None:
    """Return the first of `others` that is a distilled copy of a checkpoint; None without any."""
    return next((other for other in others if other is not None and other.is_taught_by(model)), None)


def other_guidance(copy: SampledModel, spec: SampleSpec) -> str | None:
    """Return how an original's guidance differs from that in the weights of its distilled copy; None where it does not.

    It does where samples were made beforehand, and where a weaker checkpoint guided that is not at hand.
    """
    if copy.distilled is None:
        return None
    sampled = replace(copy.distilled, cfg=spec.cfg, guide=None, guide_scale=0.0, guide_interval=ALWAYS)
    if spec.guide is not None:
        model, scale, interval = spec.guide.model, spec.guide.scale, spec.guide.interval
        sampled = replace(sampled, guide=model, guide_scale=scale, guide_interval=interval)
    if sampled == copy.distilled:
        return None
    return f"{told_guidance(sampled)} at sampling, {told_guidance(copy.distilled)} in the weights"


def guidance_warning(
    copied: Path, copy: SampledModel | None, other: Path, model: SampledModel | None, spec: SampleSpec | None
) -> str | None:
    """Return a warning where `other` is an original of the copy at `copied` and is sampled with other guidance."""
    if copy is None or model is None or spec is None or not copy.is_taught_by(model) or model.distilled is not None:
        return None
    difference = other_guidance(copy, spec)
    if difference is None:
        return None
    return f"warning: {other.name} against {copied.name}: {difference}, which scores tell of too"


def spec_beside(
    checkpoint: Checkpoint,
    spec_of: Callable[[Checkpoint], SampleSpec],
    subject: SampleSpec | None,
    subject_model: SampledModel | None,
    others: Iterable[SampledModel | None],
    weak: Checkpoint | None = None,
) -> SampleSpec:
    """Return how a checkpoint is sampled beside a subject of spec `subject`: so too, if they have the same few steps.

    Where not, by the solver, steps and guidance that `spec_of` gives it, with the subject's noise, labels and dtype,
    and with the guidance that is in the weights of its copy among `others`. The same where there is no subject's spec.
    A schedule of compute is the subject's alone.
    """
    model = model_of(checkpoint)
    if subject is not None and model.distilled == (subject_model.distilled if subject_model else None):
        return subject.whole
    own = spec_of(checkpoint)
    if subject is not None:
        own = replace(own, images=subject.images, seed=subject.seed, classes=subject.classes, dtype=subject.dtype)
    return guided_as(own, model, others, weak)
