"""What is asked of healing, and what can be refused before it begins. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ditmoe_cli.compression.training.trained_tensors import TrainedTensor
from ditmoe_cli.compression.training.training_pair import check_pair, requested_tensors, require_codes
from ditmoe_cli.compression.training.training_request import Clock, TrainingRequest, parse_clock
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.names import split_name
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

Scope = Literal["auto", "block", "model"]
SCOPES: tuple[Scope, ...] = ("auto", "block", "model")
_FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Healing(TrainingRequest):
    """A request to heal a checkpoint.

    Attributes:
        scope: ``block``, ``model`` or ``auto``: blocks first, then the model where memory suffices. In block scope
            each block takes as many steps as are asked for.
    """

    scope: Scope = "auto"

    trainings: ClassVar[tuple[str, ...]] = ("block", "model")
    command: ClassVar[str] = "heal"
    length: ClassVar[str] = "steps"

    @property
    def clocked(self) -> Clock | None:
        """What an earlier run chose by the clock. Raises `UsageError` for numbers of no healing in this scope."""
        if self.clock is None:
            return None
        clock = parse_clock(self.clock, self.trainings)
        scopes = [scope for scope, (steps, _, _) in clock.trainings.items() if steps]
        if self.scope != "auto" and scopes != [self.scope]:
            raise UsageError(f"⟨clock⟩ {','.join(map(str, self.clock))}: has other steps than of ⟨scope⟩ {self.scope}")
        return clock

    def own_label(self) -> str:
        """Return the scope, as part of a name."""
        return "" if self.scope == "auto" else self.scope


def check_healed(student: Checkpoint, original: Checkpoint) -> str | None:
    """Return a warning as `check_pair` does, or raise `BadInputError`, also where there is nothing to heal."""
    warning = check_pair(student, original)
    if student.fingerprint == original.fingerprint:
        raise BadInputError(f"{student.path}: is the original itself, and there is nothing to heal; compress it first")
    if student.distilled is not None and original.distilled is None:
        raise BadInputError(
            f"{student.path}: was distilled to {told_steps(student.distilled)}, and its original was not; train it on "
            "with ditmoe distill, or give the distilled checkpoint that it was made from as ⟨original⟩"
        )
    if student.distilled != original.distilled:
        raise BadInputError(
            f"{student.path}: is not sampled by the steps that {original.path} was distilled to; give the checkpoint "
            "that it was made from as ⟨original⟩"
        )
    return warning


def check_profile(profile: RoutingProfile | None, calibration: Mapping[str, Any]) -> None:
    """Raise `BadInputError` for a profile without states, or of so few images that none can be kept to judge by.

    `profile` is None where it is yet to be made with the settings `calibration`.
    """
    if profile is not None and not {"states.z", "image.final"} <= profile.header.tensors.keys():
        raise BadInputError(
            f"{profile.path}: keeps no states to train on; profile the original without ⟨fast⟩ and with a ⟨reservoir⟩"
        )
    if int(calibration["images"]) < _FEWEST_IMAGES:
        where = f"{profile.path}: " if profile is not None else ""
        raise BadInputError(
            f"{where}{calibration['images']} images are too few, since some of them judge: profile the original on at "
            f"least {_FEWEST_IMAGES}"
        )


def tensors_to_heal(student: Checkpoint, asked: Healing) -> dict[str, TrainedTensor]:
    """Return the student's stored tensors that are trained, by name; in scope ``block`` those of its blocks.

    Raises as `requested_tensors` and `require_codes` do.
    """
    found = requested_tensors(student, asked)
    if asked.scope == "block":
        found = {name: trained for name, trained in found.items() if split_name(name).block is not None}
        if not found:
            raise BadInputError(
                f"{student.path}: has no weights to train in {', '.join(asked.train)} of its blocks; give ⟨scope⟩ model"
            )
    require_codes(student, asked, found)
    return found
