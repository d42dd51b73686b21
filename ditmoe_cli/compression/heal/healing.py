"""What is asked of healing, and what can be refused before it begins. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ditmoe_cli.compression.planner import label_of
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor, tensors_to_train
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.names import split_name
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.lineage import Lineage, kinship
from ditmoe_cli.routing.profile import RoutingProfile

Scope = Literal["auto", "block", "model"]
SCOPES: tuple[Scope, ...] = ("auto", "block", "model")
Codes = Literal["fixed", "learn"]
CODES: tuple[Codes, ...] = ("fixed", "learn")
DEFAULT_MINUTES, DEFAULT_BATCH = 10.0, 128
LOW_RANK = "lora:"
_FEWEST_IMAGES = 2


@dataclass(frozen=True)
class Healing:
    """A request to heal a checkpoint.

    Attributes:
        original: fingerprint of the checkpoint that it was made from.
        minutes: how long to train; None where `steps` say so.
        steps: steps of training, in block scope for each block.
        scope: ``block``, ``model`` or ``auto``: blocks first, then the model where memory suffices.
        train: groups of weights to train (`trained_groups.GROUPS`), or ``lora:R`` alone: all, matrices by updates of
            rank R.
        codes: of quantised weights: ``fixed``, or ``learn`` for those of integer formats.
        batch: states of a step.
        rate: learning rate, relative to the size of weights; None for the default.
        seed: of noise and orders.
    """

    original: str
    minutes: float | None = DEFAULT_MINUTES
    steps: int | None = None
    scope: Scope = "auto"
    train: tuple[str, ...] = GROUPS
    codes: Codes = "fixed"
    batch: int = DEFAULT_BATCH
    rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise UsageError("give ⟨minutes⟩, as 10, or ⟨steps⟩, as 2000, and not both")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(f"⟨minutes⟩ {self.minutes:g}: give a time above 0")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"⟨steps⟩ {self.steps}: give at least 1")
        if self.rate is not None and not 0 < self.rate < 1:
            raise UsageError(f"⟨rate⟩ {self.rate:g}: give a share of a weight's size, above 0 and below 1, as 0.01")
        self._check_train()

    def _check_train(self) -> None:
        """Raise `UsageError` for what cannot be trained."""
        low_rank = [name for name in self.train if name.startswith(LOW_RANK)]
        if low_rank and len(self.train) > 1:
            raise UsageError(
                f"⟨train⟩ {','.join(self.train)}: {low_rank[0]} stands alone; it trains matrices by updates of low "
                "rank, and all other weights as they are"
            )
        if low_rank and not (low_rank[0][len(LOW_RANK) :].isdecimal() and self.rank):
            raise UsageError(f"⟨train⟩ {low_rank[0]}: give a rank of 1 or more, as {LOW_RANK}8")
        unknown = [name for name in self.train if name not in GROUPS and not low_rank]
        if unknown or not self.train:
            raise UsageError(f"⟨train⟩ {','.join(unknown)}: choose from all, {', '.join(GROUPS)}, or {LOW_RANK}R")

    @property
    def rank(self) -> int | None:
        """The rank of updates; None where weights are trained as they are."""
        return int(self.train[0][len(LOW_RANK) :]) if self.train and self.train[0].startswith(LOW_RANK) else None

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        length = f"{self.minutes:g}min" if self.minutes is not None else f"{self.steps}steps"
        groups = "" if set(self.train) == set(GROUPS) else "+".join(self.train).replace(":", "")
        batch = self.batch != DEFAULT_BATCH and f"batch{self.batch}"
        rate = self.rate is not None and f"rate{self.rate:g}"
        seed = f"seed{self.seed}" if self.seed else ""
        codes = self.codes == "learn" and "codes"
        return label_of(f"heal-{length}", self.scope != "auto" and self.scope, groups, codes, batch, rate, seed)

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for histories; defaults are left out."""
        asked = {name: value for name, value in asdict(self).items() if name not in ("original", "train")}
        defaults = asdict(Healing(self.original))
        found = {name: value for name, value in asked.items() if value is not None and value != defaults[name]}
        groups = {} if set(self.train) == set(GROUPS) else {"train": ",".join(self.train)}
        return {"original": self.original, **found, **groups}


def check_pair(student: Checkpoint, original: Checkpoint) -> str | None:
    """Return a warning where `student` is not known to be made from `original`, None where it is.

    Raises `BadInputError` where it was not, where both are the same, and where their shapes do not correspond.
    """
    for name in _ALIKE:
        ours, theirs = (getattr(checkpoint.config, name) for checkpoint in (student, original))
        if ours != theirs:
            given = f", or ⟨{_GIVEN[name]}⟩ where its file cannot tell" if name in _GIVEN else ""
            raise BadInputError(
                f"{student.path}: its {_ALIKE[name]} is {ours}, and that of {original.path} is {theirs}; "
                f"give the checkpoint that it was made from as ⟨original⟩{given}"
            )
    if student.fingerprint == original.fingerprint:
        raise BadInputError(f"{student.path}: is the original itself, and there is nothing to heal; compress it first")
    relation = kinship(
        Lineage(original.fingerprint, original.provenance().history),
        Lineage(student.fingerprint, student.provenance().history),
    ).relation
    if relation == "ancestor":
        return None
    if relation == "siblings":
        return f"{student.name} was not made from {original.name}: both were made from a third checkpoint"
    if relation == "descendant":
        raise BadInputError(f"{original.path}: was made from {student.path}; give them the other way round")
    made = next((step for step in student.provenance().history if step.command != "convert"), None)
    if made is not None:
        raise BadInputError(
            f"{student.path}: was made from another checkpoint ({made.source[:12]}) than {original.path} "
            f"({original.fingerprint[:12]}); give that one as ⟨original⟩"
        )
    return f"nothing tells whether {student.name} was made from {original.name}; their shapes correspond"


_ALIKE = {
    "sampler": "family",
    "hidden_size": "width",
    "depth": "number of blocks",
    "attention": "kind of attention",
    "num_heads": "number of attention heads",
    "top_k": "number of experts a token",
    "patch_size": "patch size",
    "input_size": "size of inputs",
    "in_channels": "number of channels",
    "out_channels": "number of output channels",
    "num_classes": "number of classes",
    "label_rows": "number of label rows",
}
_GIVEN = {"sampler": "sampler", "num_heads": "heads", "top_k": "top_k", "num_classes": "num_classes"}


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

    Raises `BadInputError` for none, and `UsageError` where codes are asked for and none can be trained, and for updates
    of a rank above the width of the model.
    """
    width = student.config.hidden_size
    if asked.rank is not None and asked.rank > width:
        raise UsageError(
            f"⟨train⟩ {LOW_RANK}{asked.rank}: the width of {student.name} is {width}; give a lower rank, as {LOW_RANK}8"
        )
    groups = asked.train if asked.rank is None else GROUPS
    found = tensors_to_train(student, groups, asked.codes == "learn", asked.rank)
    if asked.scope == "block":
        found = {name: trained for name, trained in found.items() if split_name(name).block is not None}
        if not found:
            raise BadInputError(
                f"{student.path}: has no weights to train in {', '.join(asked.train)} of its blocks; give ⟨scope⟩ model"
            )
    if asked.codes == "learn" and not any(has_codes(trained.weight) for trained in found.values()):
        raise UsageError(
            f"⟨codes⟩ learn has no effect: of {student.name} no weight that is trained is of an integer format; "
            "leave it out"
        )
    return found


def kept_codes(tensors: Mapping[str, TrainedTensor]) -> str | None:
    """Return a line about the formats whose codes stay as they are where codes are learned; None where none do."""
    packed = {trained.weight.info.name: trained.weight for trained in tensors.values() if trained.part is not None}
    formats = sorted({format_label(str(weight.format)) for weight in packed.values() if not has_codes(weight)})
    return f"codes of {', '.join(formats)} stay as they are, and scales are trained" if formats else None


def has_codes(weight: Weight) -> bool:
    """Return whether training may change the codes of a weight."""
    return weight.stored_as is not None and weight.stored_as.has_whole_codes
