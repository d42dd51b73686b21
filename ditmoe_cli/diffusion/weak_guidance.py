"""Guidance by a weaker model: what it is, when it takes an evaluation, and what is refused. Torch-free.

With v the prediction of the model, classifier-free guidance applied, and v_c, v_weak,c the conditional branches of the
model and of the weaker one, the guided prediction is v + W (v_c - v_weak,c) (https://arxiv.org/abs/2406.02507).

The weaker model is another checkpoint, or the model itself with one expert of each token alone: ``top1`` takes the
first by routing weight, ``rank2`` the second (https://arxiv.org/abs/2405.14507). Their weights are those that they have
in the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.diffusion.schedule import ALWAYS, Interval, is_guided, noise_level
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Sampler

RANKS: Mapping[str, int] = {"top1": 0, "rank2": 1}
"""The rank of the one expert of each token, best first, by the name of the routing."""
_MUST_AGREE = ("sampler", "in_channels", "out_channels", "input_size", "num_classes")


@dataclass(frozen=True)
class Guide:
    """A weaker model to guide away from.

    Attributes:
        model: the fingerprint of its checkpoint, or a routing of the guided model: ``top1`` or ``rank2``.
        scale: W; 0 is no guidance, and takes no evaluation.
        interval: noise levels, 0 (image) to 1 (noise), inside which it guides.
    """

    model: str
    scale: float
    interval: Interval = ALWAYS

    @property
    def rank(self) -> int | None:
        """The rank of the expert that the guided model takes alone; None where another checkpoint guides."""
        return RANKS.get(self.model)

    @property
    def told(self) -> str:
        """The guide in words, as ``top1 at 0.5``; a checkpoint by the beginning of its fingerprint."""
        named = self.model if self.rank is not None else f"{self.model[:12]}…"
        low, high = self.interval
        return f"{named} at {self.scale:g}" + ("" if self.interval == ALWAYS else f" from {low:g} to {high:g}")

    @property
    def label(self) -> str:
        """The guide as part of a name, as ``guide0.5bytop1``; a checkpoint by the beginning of its fingerprint."""
        interval = "" if self.interval == ALWAYS else "from{:g}to{:g}".format(*self.interval)
        return f"guide{self.scale:g}by{self.model[:8]}{interval}"

    def to_json(self) -> dict[str, Any]:
        """Return the guide as JSON."""
        return {"model": self.model, "scale": self.scale, "interval": list(self.interval)}


def parse_guide(document: Mapping[str, Any] | None) -> Guide | None:
    """Read a guide from JSON; None for None. Raises `KeyError`, `TypeError` or `ValueError` where it is malformed."""
    if document is None:
        return None
    low, high = document["interval"]
    if not isinstance(document["model"], str):
        raise TypeError(f"guide {document['model']}")
    return Guide(document["model"], float(document["scale"]), (float(low), float(high)))


@dataclass(frozen=True)
class Guidance:
    """How predictions of weights of a family are guided: by the null class at `scale` in `interval`, and by `guide`."""

    family: Sampler
    scale: float = 1.0
    interval: Interval = ALWAYS
    guide: Guide | None = None

    def takes_null_class(self, t: float) -> bool:
        """Return whether the null class is predicted at time t."""
        return is_guided(t, self.scale, self.family, self.interval)

    def takes_weak(self, t: float) -> bool:
        """Return whether the weaker model predicts at time t: scale other than 0, noise level inside the interval."""
        if self.guide is None or self.guide.scale == 0.0:
            return False
        low, high = self.guide.interval
        return low <= noise_level(t, self.family) <= high

    def evaluations(self, t: float) -> int:
        """Return the evaluations of an image at time t, of all branches and both models."""
        return 1 + self.takes_null_class(t) + self.takes_weak(t)


def check_guide_settings(guide: Guide) -> None:
    """Raise `UsageError` for a scale that is negative or not finite, and for noise levels that are none."""
    if not 0.0 <= guide.scale < math.inf:
        raise UsageError(f"⟨guide_scale⟩ {guide.scale}: must be a finite guidance scale of at least 0")
    low, high = guide.interval
    if not 0.0 <= low < high <= 1.0:
        raise UsageError(f"⟨guide_interval⟩ {low:g},{high:g}: give two noise levels, 0 <= LOW < HIGH <= 1")


def check_guide(guide: Guide | None, checkpoint: Checkpoint, weak: Checkpoint | None) -> None:
    """Raise where a checkpoint cannot be guided so; `weak` is the checkpoint that the guide names, if it names one.

    Raises `UsageError` for settings out of range, for a distilled checkpoint, and for another routing of a model that
    has one expert a token; `BadInputError` for a weaker checkpoint of another family, latents or classes, for a
    distilled one, and for the guided one itself.
    """
    if guide is None:
        return
    check_guide_settings(guide)
    if checkpoint.distilled is not None:
        raise UsageError(
            f"⟨guide_scale⟩ {guide.scale:g}: {checkpoint.name} was distilled to {told_steps(checkpoint.distilled)}, "
            "and is sampled by its own steps alone; leave it out"
        )
    if guide.rank is not None:
        if checkpoint.config.top_k <= 1:
            raise UsageError(
                f"⟨guide_by⟩ {guide.model}: {checkpoint.name} takes one expert a token, so that no other routing is "
                "weaker; give a weaker checkpoint with ⟨guide_with⟩"
            )
        return
    if weak is None or weak.fingerprint != guide.model:
        raise BadInputError(
            f"{checkpoint.path}: is to be guided by the checkpoint of fingerprint {guide.model[:12]}…; give that one "
            f"with ⟨guide_with⟩, at ⟨guide_scale⟩ {guide.scale:g}"
        )
    if weak.fingerprint == checkpoint.fingerprint:
        raise BadInputError(
            f"{weak.path}: is the checkpoint that it would guide, and a model is not guided by itself; give a weaker "
            "copy, such as one with half the experts"
        )
    if weak.distilled is not None:
        raise BadInputError(
            f"{weak.path}: was distilled to {told_steps(weak.distilled)}, and guides at no others; give a weaker copy "
            "that was not distilled"
        )
    pairs = [(name, getattr(checkpoint.config, name), getattr(weak.config, name)) for name in _MUST_AGREE]
    differing = ", ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs)
    if differing:
        raise BadInputError(
            f"{weak.path}: cannot guide {checkpoint.path}, since it has {differing}; give a weaker copy of that model"
        )
