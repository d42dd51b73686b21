"""Settings of a calibration run as data: those of a profile's JSON, and the defaults of command and planners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import CALIBRATION_SOLVER, choose_solver
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint

IMAGES = 64
STEPS = 20


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
    bins: int = 10
    reservoir: int = 20_480
    batch: int = 32
    data: str | None = None
    fast: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON, the sample spec's fields among them."""
        own = {"bins": self.bins, "reservoir": self.reservoir, "batch": self.batch, "fast": self.fast}
        return {**self.spec.conditions(), **own, "source": "data" if self.data else "trajectories", "data": self.data}


def default_calibration(checkpoint: Checkpoint) -> Calibration:
    """Return the settings of a plain ``ditmoe profile-experts``."""
    solver = CALIBRATION_SOLVER[checkpoint.config.sampler]
    classes = tuple(range(checkpoint.config.num_classes))
    return Calibration(SampleSpec(IMAGES, STEPS, 1.0, 0, solver, classes))


def parse_calibration(document: Mapping[str, Any], checkpoint: Checkpoint) -> Calibration:
    """Read the settings of an ancestor's profile from its JSON, to profile `checkpoint` alike.

    Raises `BadInputError` where they are malformed, or name images that were given then and are not now.
    """
    if document.get("data") is not None:
        raise BadInputError(
            f"the profile of an ancestor of {checkpoint.path} was made from ⟨data⟩; profile {checkpoint.path} with the "
            "same data and give that as ⟨profile⟩"
        )
    spec = profiled_spec(document, checkpoint)
    try:
        bins, reservoir, batch = (int(document[name]) for name in ("bins", "reservoir", "batch"))
        if not 1 <= bins <= spec.steps or reservoir < 0 or batch < 1:
            raise ValueError(f"bins {bins}, reservoir {reservoir}, batch {batch}")
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise _malformed(error) from None
    return Calibration(spec, bins, reservoir, batch, fast=document.get("fast") is True)


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
        )
        return check_spec(spec, checkpoint.config, allow_null=document.get("data") is not None)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise _malformed(error) from None


def _malformed(error: Exception) -> BadInputError:
    return BadInputError(f"the profile's calibration settings are malformed ({error})")
