"""A student and the original that it is trained towards: whether both correspond. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.compression.training.trained_tensors import TrainedTensor, tensors_to_train
from ditmoe_cli.compression.training.training_request import LOW_RANK, TrainingRequest
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.lineage import Lineage, kinship


def check_pair(student: Checkpoint, original: Checkpoint) -> str | None:
    """Return a warning where `student` is not known to be made from `original`, None where it is, or is the same.

    Raises `BadInputError` where it was not, and where their shapes do not correspond.
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
        return None
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
    history = student.provenance().history
    if any(step.options.get("original") == original.fingerprint for step in history):
        return None  # it was trained towards it before
    made = next((step for step in history if step.command != "convert"), None)
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


def requested_tensors(student: Checkpoint, asked: TrainingRequest) -> dict[str, TrainedTensor]:
    """Return the student's stored tensors that are trained, by name.

    Raises `BadInputError` for none, and `UsageError` for updates of a rank above the width of the model.
    """
    width = student.config.hidden_size
    if asked.rank is not None and asked.rank > width:
        raise UsageError(
            f"⟨train⟩ {LOW_RANK}{asked.rank}: the width of {student.name} is {width}; give a lower rank, as {LOW_RANK}8"
        )
    return tensors_to_train(student, asked.groups, asked.codes == "learn", asked.rank)


def require_codes(student: Checkpoint, asked: TrainingRequest, tensors: Mapping[str, TrainedTensor]) -> None:
    """Raise `UsageError` where codes are to be learned, and none of those that are trained can be."""
    if asked.codes == "learn" and not any(has_codes(trained.weight) for trained in tensors.values()):
        raise UsageError(
            f"⟨codes⟩ learn has no effect: of {student.name} no weight that is trained is of an integer format; "
            "leave it out"
        )


def kept_codes(tensors: Mapping[str, TrainedTensor]) -> str | None:
    """Return a line about the formats whose codes stay as they are where codes are learned; None where none do."""
    packed = {trained.weight.info.name: trained.weight for trained in tensors.values() if trained.part is not None}
    formats = sorted({format_label(str(weight.format)) for weight in packed.values() if not has_codes(weight)})
    return f"codes of {', '.join(formats)} stay as they are, and scales are trained" if formats else None


def has_codes(weight: Weight) -> bool:
    """Return whether training may change the codes of a weight."""
    return weight.stored_as is not None and weight.stored_as.has_whole_codes
