"""``ditmoe inspect``: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api import inspection_runs as asked
from ditmoe_cli.api.argument_checks import ending, refuse_idle
from ditmoe_cli.api.inspection_runs import InspectedCheckpoint, InspectedTensors, Looking, contrasted, inspected
from ditmoe_cli.api.step_texts import step_text
from ditmoe_cli.cli.card_options import CardContents
from ditmoe_cli.cli.checkpoint_comparison import comparison_rows, difference_count, value_rows
from ditmoe_cli.cli.options import Source, complete_checkpoint
from ditmoe_cli.cli.stage import Stage, incoming, open_stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit, with_options
from ditmoe_cli.compression.recipe import recipe_of
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import GateError, as_option
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Distilled, parse_step
from ditmoe_cli.files.reader import CheckpointHeader
from ditmoe_cli.model.checkpoint import Checkpoint, unread_export
from ditmoe_cli.model.config import Given
from ditmoe_cli.model.verification import Verification
from ditmoe_cli.progress import human_bytes

EXAMPLES = (
    "ditmoe inspect ckpt.pt",
    "ditmoe inspect demo:digits --json",
    "ditmoe inspect hf:dit-moe-s",
    "ditmoe inspect ckpt.pt --tensors --text",
    "ditmoe inspect small.safetensors --verify",
    "ditmoe inspect small.safetensors --recipe > small.yaml",
    "ditmoe inspect small.safetensors --card card.md --scores fid.json --picture pairs.png",
    "ditmoe inspect ckpt.pt small.safetensors --values",
)
_MOST_RUNS = 4  # of equal widths, printed for a block


@dataclass(frozen=True)
class Inspected(Source):
    """The checkpoint to describe, and another one to compare it with."""

    other: Annotated[
        str | None,
        typer.Argument(
            metavar="OTHER", autocompletion=complete_checkpoint, help="Another checkpoint, to print what differs in it."
        ),
    ] = None

    def stages(self) -> tuple[Stage, Stage | None]:
        """Return the stage to describe, and that of the other checkpoint, whose original is the first."""
        first = self.stage()
        return first, replace(incoming(self.other, self.given), original=first.checkpoint) if self.other else None


@dataclass(frozen=True)
class Listing:
    """What is listed besides the description."""

    panel: ClassVar[str] = "Listing"

    tensors: Annotated[
        bool,
        typer.Option(
            "--tensors",
            help="List the stored tensors: name, dtype, shape and bytes. With OTHER, list each weight that differs.",
        ),
    ] = False
    recipe: Annotated[
        bool,
        typer.Option(
            "--recipe", help="Print the commands that made the checkpoint, as YAML that ditmoe run carries out."
        ),
    ] = False


@dataclass(frozen=True)
class Carding(asked.Carding, CardContents):
    """A model card to be written, and what it shows beside what the file records."""

    card: Annotated[
        Path | None,
        typer.Option(
            "--card", metavar="FILE", callback=ending(".md"), help="Write a model card with the hub's front matter."
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing card.")] = False


@dataclass(frozen=True)
class Checking:
    """What is read besides headers."""

    panel: ClassVar[str] = "Reading"

    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read all bytes and compare them with the hashes in the files; exit with code 3 where one differs. "
            "With OTHER, compare bytes instead of hashes.",
        ),
    ] = False
    values: Annotated[
        bool,
        typer.Option("--values", help="With OTHER, measure how far its weights are from the first's: |B - A| / |A|."),
    ] = False
    same: Annotated[
        bool, typer.Option("--same", help="With OTHER, exit with code 6 unless both are the same model, byte for byte.")
    ] = False


def run(source: Inspected, listing: Listing, carding: Carding, checking: Checking, printing: JsonPrinting) -> None:
    """Print what a checkpoint is, or what differs in another one.

    Prints architecture, parameters, bytes, layout, sampler family and every assumption. Reads headers only, so that
    size does not matter, and imports no torch for safetensors. Heads that the file does not tell are left open. With
    OTHER, prints what differs in configuration, weights and history.
    """
    stage, other = source.stages()
    if other is not None:
        refuse_idle(listing, "with OTHER, which has a recipe of its own", "recipe")
        refuse_idle(carding, "with OTHER, which has a card of its own", "card", "scores", "picture", "samples", "force")
        return compare(stage, other, listing, checking, printing)
    if carding.card is None:
        refuse_idle(carding, "without --card", "scores", "picture", "samples", "force")
    refuse_idle(checking, "without OTHER, the checkpoint to compare with", "values", "same")
    if listing.recipe and (export := _unread(stage)) is not None:
        return show_recipe(stage, export, printing)
    looking = Looking(listing.tensors, checking.verify and not listing.recipe)
    opening = partial(open_stage, stage, allow_unknown=True)
    found = inspected(opening, stage.checkpoint, looking, carding, source.given)
    if isinstance(found, InspectedTensors):
        return show(stage, found, tensor_rows(found.header.tensors), printing)
    if listing.recipe:
        return show_recipe(stage, found.checkpoint, printing)
    printed = rows(found.to_json(as_option))
    return show(stage, found, printed, printing, tensor_rows(found.checkpoint.header.tensors if found.lists else {}))


def _unread(stage: Stage) -> CheckpointHeader | None:
    """Return the header of an export that only another program reads; None for anything else."""
    return unread_export(stage.checkpoint) if stage.checkpoint is not None and Path(stage.checkpoint).is_dir() else None


def show_recipe(stage: Stage, found: Checkpoint | CheckpointHeader, printing: JsonPrinting) -> None:
    """Print the recipe of a checkpoint or an export: as YAML, or within the result where JSON is asked for."""
    recipe = recipe_of(found)
    if printing.as_json:
        return emit(printing, stage.to_json({"recipe": recipe.document()}), [], None)
    return print(recipe.text(), end="", flush=True)


def show(
    stage: Stage,
    found: InspectedCheckpoint | InspectedTensors,
    first: Sequence[Row],
    printing: JsonPrinting,
    last: Sequence[Row] = (),
) -> None:
    """Print what was found. Raises `BadInputError` where something is wrong with it."""
    verified = found.verified
    sound = replace(stage, checkpoint=None) if verified is not None and verified.problems else stage
    printed = [*first, *(verification_rows(verified) if verified is not None else ()), *last]
    path = found.checkpoint.path if isinstance(found, InspectedCheckpoint) else found.header.path
    emit(printing, sound.to_json(found.to_json(as_option)), printed, str(path))
    found.require_whole()


def compare(stage: Stage, other: Stage, listing: Listing, checking: Checking, printing: JsonPrinting) -> None:
    """Print what differs between the checkpoints of two stages.

    Raises `BadInputError` where one is not what was written, and `GateError` where they should be the same and are not.
    """
    a, b = open_stage(stage, allow_unknown=True), open_stage(other, allow_unknown=True)
    looking = Looking(listing.tensors, checking.verify, checking.values)
    found = contrasted(a, b, looking, Given(**(stage.given or {})))
    broken = [problem for each in found.verified for problem in each.problems]
    sound = replace(other, checkpoint=None) if broken else other
    printed = [*comparison_rows(a, b, found.found, listing.tensors), *value_rows(found.distances)]
    for label, each in zip("AB", found.verified, strict=False):
        printed += [(f"{label} {name}", text) for name, text in verification_rows(each)]
        printed.append((f"{label} fingerprint", f"{each.fingerprint} by all bytes"))
    emit(printing, sound.to_json(found.to_json()), printed, None)
    found.require_whole()
    if checking.same and not found.same:
        raise GateError(
            f"{a.path} and {b.path} are not the same: {difference_count(found.found)}, which --same does not allow"
        )


def verification_rows(verified: Verification) -> list[Row]:
    """Return what reading a whole checkpoint has shown as a table: all that is wrong, or what was compared."""
    found = verified.integrity
    read = f"{len(found.hashes):,} tensors, {found.bytes:,} bytes"
    if verified.problems:
        return [("wrong", problem.text) for problem in verified.problems]
    compared = [f"{read} are what ditmoe wrote, by their SHA-256"] if found.recorded else []
    if found.members:
        compared.append(f"{read}: {found.members:,} members of the archive are what was saved, by their CRC-32")
    if not compared:
        compared.append(f"{read} read; the file has no hashes to compare with, but no value is NaN or infinite")
    return [("verified", text) for text in compared]


def tensor_rows(tensors: Mapping[str, TensorInfo]) -> list[Row]:
    """Return a row for each tensor, its columns aligned."""
    shapes = {name: " x ".join(map(str, info.shape)) or "scalar" for name, info in tensors.items()}
    width = max(map(len, shapes.values()), default=0)
    return [
        (name, f"{info.dtype:<4}  {shapes[name]:<{width}}  {info.nbytes:,} bytes") for name, info in tensors.items()
    ]


def rows(result: dict[str, Any]) -> list[Row]:
    """Return the description as a table."""
    config, parameters = result["config"], result["parameters"]
    side = config["input_size"]
    share = parameters["routed"] / parameters["total"]
    return [
        (
            "architecture",
            f"depth {config['depth']}, width {config['hidden_size']}, {_heads(config['num_heads'])}, "
            f"patch {config['patch_size']}, {config['attention']} attention",
        ),
        (
            "experts",
            f"{span(config['num_experts'])} per block, top-{config['top_k']}, width {span(config['expert_width'])}, "
            f"shared {span(config['shared_width'])}",
        ),
        *width_rows(result["expert_widths"]),
        (
            "images",
            f"{config['in_channels']} x {side} x {side} in, {config['out_channels']} channels out, "
            f"{config['num_classes']} classes and {'a' if config.get('null_class', True) else 'no'} null class",
        ),
        (
            "parameters",
            f"{parameters['total']:,} total, {parameters['activated']:,} activated, "
            f"{parameters['routed']:,} routed ({share:.1%})",
        ),
        ("bytes", f"{result['file_bytes']:,} ({human_bytes(result['file_bytes'])})"),
        ("on a GPU", f"{human_bytes(result['gpu_bytes'])} to sample an image with guidance, in bf16, expected"),
        ("formats", ", ".join(f"{count} {name}" for name, count in result["formats"].items())),
        ("layout", result["layout"]),
        ("sampler", config["sampler"]),
        *([("distilled", distilled_text(result["distilled"]))] if "distilled" in result else []),
        ("loads upstream", "yes" if result["loads_upstream"] else f"no: {result['upstream_obstacle']}"),
        *fingerprint_rows(result),
        *(("history", with_options(step_text(parse_step(step)))) for step in result["steps"] or ()),
        *(() if result["steps"] else (("history", "none"),)),
        *(("read", text) for text in result["notes"]),
        *(("assumed", text) for text in result["assumptions"]),
        *(("warning", text) for text in result["warnings"]),
    ]


def distilled_text(document: dict[str, Any]) -> str:
    """Return by which steps a checkpoint is sampled, and from which it was distilled."""
    distilled = Distilled(**document)
    teacher = f", from {distilled.teacher_steps} of {distilled.teacher_solver}" if distilled.teacher_solver else ""
    return f"to {told_steps(distilled)}{teacher}"


def fingerprint_rows(result: dict[str, Any]) -> list[Row]:
    """Return the fingerprint by all bytes where they were read, else by the hashes in the metadata where there are."""
    if result.get("verified"):
        return [("fingerprint", f"{result['verified']['fingerprint']} by all bytes")]
    return [("fingerprint", f"{result['fingerprint']} as written")] if result["fingerprint"] else []


def _heads(number: int | None) -> str:
    return "heads unknown (give --heads)" if number is None else f"{number} heads"


def span(value: Any) -> str:
    """Return a number that blocks share, or the least and the largest of a list, which may hold lists, as ``24–96``."""
    numbers = sorted(set(_flat(value)))
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}" if numbers else "none"


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def width_rows(widths: Sequence[Sequence[int]]) -> list[Row]:
    """Return the experts of each block by width, ``8 x 96``, blocks that are alike in one row; none where all are."""
    if len({width for block in widths for width in block}) <= 1 and len(set(map(len, widths))) <= 1:
        return []
    rows: list[Row] = []
    for text, group in groupby(enumerate(map(_widths, widths)), key=lambda item: item[1]):
        blocks = [index for index, _ in group]
        label = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]}–{blocks[-1]}"
        rows.append((label, f"experts {text}"))
    return rows


def _widths(widths: Sequence[int]) -> str:
    runs = [f"{len(list(group))} x {width}" for width, group in groupby(sorted(widths, reverse=True))]
    return ", ".join(runs) if len(runs) <= _MOST_RUNS else f"{len(widths)} x {span(list(widths))}"
