"""Files of checkpoints from Python: what inspect, convert and export do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from ditmoe_cli.api.argument_checks import ending, one_of, refuse_idle
from ditmoe_cli.api.calling import AnyCheckpoint, AnyPath, alone, public
from ditmoe_cli.api.card_contents import CardContents, contents_of
from ditmoe_cli.api.conversion_runs import converted_result, label_of_conversion
from ditmoe_cli.api.export_runs import ExportDestination, ExportedCheckpoint, ForeseenExport, exported_result
from ditmoe_cli.api.inspection_runs import (
    Carding,
    DifferingCheckpoints,
    InspectedCheckpoint,
    InspectedTensors,
    Looking,
    contrasted,
    inspected,
)
from ditmoe_cli.api.model_cards import Measurement
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.opening import NOTHING_GIVEN, opened
from ditmoe_cli.api.output_names import checkpoint_path, destination
from ditmoe_cli.api.sample_runs import SampledImages
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.errors import UsageError
from ditmoe_cli.exporting.targets import TARGETS
from ditmoe_cli.files.pipelines import model_folder
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.conversions import Storage

Cast = Literal["fp32", "bf16", "fp16"]


@public
def inspect(
    checkpoint: AnyCheckpoint,
    other: AnyCheckpoint | None = None,
    *,
    tensors: bool = False,
    card: Annotated[AnyPath, ending(".md")] | None = None,
    scores: Sequence[AnyPath | Measurement] | None = None,
    picture: Annotated[AnyPath, ending(".png")] | None = None,
    samples: Sequence[AnyPath | SampledImages] | None = None,
    force: bool = False,
    verify: bool = False,
    values: bool = False,
) -> InspectedCheckpoint | InspectedTensors | DifferingCheckpoints:
    """Look at a checkpoint, or at what differs in another one, as ``ditmoe inspect``; heads may stay unknown.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        other: another one, to compare with the first: the result is then a `DifferingCheckpoints`.
        tensors: whether to list the stored tensors, or with `other` each weight that differs. Of a file that is no
            DiT-MoE the result is then an `InspectedTensors`.
        card: file ``….md`` to write a model card to.
        scores: what `score` and `compare` found, or files of what the commands printed, for the card.
        picture: PNG of pairs of images, for the card.
        samples: samples of the checkpoint and of its original, by the same seeds, to draw such pairs of.
        force: whether to replace what stands at `card`.
        verify: whether to read all bytes, and compare them with the hashes in the files.
        values: whether to measure how far the weights of `other` are from the first's.

    Raises:
        UsageError: an argument has no effect beside the others.
        BadInputError: a file is missing or is no checkpoint, or `verify` shows that it is not what was written.
        OutputExistsError: something else stands at `card`.
    """
    alone()
    looking = Looking(tensors, verify, values)
    carding = Carding(*contents_of(scores, picture, samples), card=None if card is None else Path(card), force=force)
    if other is not None:
        refuse_idle(carding, "with other, which has a card of its own", "card", "scores", "picture", "samples", "force")
        found = contrasted(_looked_at(checkpoint), _looked_at(other), looking, NOTHING_GIVEN)
        found.require_whole()
        return found
    if card is None:
        refuse_idle(carding, "without ⟨card⟩", "scores", "picture", "samples", "force")
    refuse_idle(looking, "without other, the checkpoint to compare with", "values")
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    result = inspected(lambda: _looked_at(checkpoint), path, looking, carding, NOTHING_GIVEN)
    result.require_whole()
    return result


def _looked_at(checkpoint: AnyCheckpoint) -> Checkpoint:
    """Return a checkpoint, opened, whose number of heads may be unknown."""
    return opened(checkpoint, allow_unknown=True)


@public
def convert(
    checkpoint: AnyCheckpoint,
    *,
    dtype: Cast | None = None,
    dequantize: bool = False,
    from_diffusers: bool = False,
    output: Annotated[AnyPath, checkpoint_path] | None = None,
    force: bool = False,
    max_shard_size: int | str = "10GB",
    dry_run: bool = False,
) -> WrittenCheckpoint | ForeseenCheckpoint:
    """Write a checkpoint of any layout as safetensors, as ``ditmoe convert``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        dtype: of all weights that are not quantised; as stored where none is given.
        dequantize: whether quantised weights, and experts that are differences, are stored as plain weights.
        from_diffusers: whether `checkpoint` is the folder of a diffusers pipeline, whose model alone is read.
        output, force, max_shard_size, dry_run: as for `compress`.

    Raises:
        UsageError: an argument has no effect beside the others.
        BadInputError: the checkpoint cannot be used.
        OutputExistsError: something else stands at the output.
    """
    alone()
    if from_diffusers and isinstance(checkpoint, Checkpoint):
        raise UsageError("⟨from_diffusers⟩ has no effect on an opened checkpoint; give the folder of the pipeline")
    named = checkpoint if isinstance(checkpoint, Checkpoint) else resolve_path(checkpoint, note).absolute()
    found = opened(model_folder(named) if from_diffusers and isinstance(named, Path) else named)
    storage = Storage(dtype, dequantize)
    label, path = label_of_conversion(storage), named if isinstance(named, Path) else named.path
    to = destination(output, force, max_shard_size).at(path, label)
    return converted_result(found, storage, to, dry_run=dry_run)


@public
def export(
    checkpoint: AnyCheckpoint,
    *,
    to: Annotated[str, one_of(*TARGETS)],
    dtype: Cast | None = None,
    dequantize: bool = False,
    scores: Sequence[AnyPath | Measurement] | None = None,
    picture: Annotated[AnyPath, ending(".png")] | None = None,
    samples: Sequence[AnyPath | SampledImages] | None = None,
    output: AnyPath | None = None,
    force: bool = False,
    max_shard_size: int | str = "10GB",
    vae: str | None = None,
    dry_run: bool = False,
) -> ExportedCheckpoint | ForeseenExport:
    """Write a checkpoint in the layout of another program, as ``ditmoe export``.

    Args:
        checkpoint: a path, ``demo:digits``, a name on the hub, or an opened checkpoint.
        to: the program: ``"diffusers"``, ``"upstream"``, ``"compressed-tensors"``, ``"sdnq"`` or ``"bitsandbytes"``.
        dtype, dequantize: as for `convert`.
        scores, picture, samples: for the model card of a folder, as for `inspect`.
        output: the file or folder; by default named after the checkpoint and the program, in the working folder.
        vae: what decodes latents, for diffusers: a folder that is copied, or a name on the hub.
        force, max_shard_size: as for `compress`.
        dry_run: whether to write nothing, and to return what would be written, a `ForeseenExport`.

    Raises:
        UsageError: an argument has no effect beside the others.
        BadInputError: the checkpoint cannot be used, or the layout cannot express it.
        OutputExistsError: something else stands at the output.
    """
    alone()
    found, target = opened(checkpoint), TARGETS[to]
    given = destination(output, force, max_shard_size)
    place = ExportDestination(given.output, given.force, max_shard_size=given.max_shard_size, vae=vae)
    contents = CardContents(*contents_of(scores, picture, samples))
    wanted = place.wanted(target, found.path, Storage(dtype, dequantize))
    return exported_result(found, target, wanted, contents, dry_run=dry_run)
