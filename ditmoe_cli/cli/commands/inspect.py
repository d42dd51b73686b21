"""``ditmoe inspect``: what a checkpoint is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.cli.costs import step_text
from ditmoe_cli.cli.options import Source
from ditmoe_cli.cli.stage import Stage, open_stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit, human_bytes, note, with_options
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import parse_step
from ditmoe_cli.files.reader import CheckpointHeader, open_reader
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.config import UNKNOWN
from ditmoe_cli.model.conversions import packed_weights
from ditmoe_cli.model.parameters import count_parameters
from ditmoe_cli.model.upstream import obstacle

EXAMPLES = (
    "ditmoe inspect ckpt.pt",
    "ditmoe inspect demo:digits --json",
    "ditmoe inspect hf:dit-moe-s",
    "ditmoe inspect ckpt.pt --tensors --text",
)
_MOST_RUNS = 4  # of equal widths, printed for a block


@dataclass(frozen=True)
class Listing:
    """What is listed besides the description."""

    panel: ClassVar[str] = "Listing"

    tensors: Annotated[
        bool, typer.Option("--tensors", help="List the stored tensors too: name, dtype, shape and bytes.")
    ] = False


def run(source: Source, listing: Listing, printing: JsonPrinting) -> None:
    """Print what a checkpoint is.

    Prints architecture, parameters, bytes, layout, sampler family and every assumption. Reads headers only, so that
    size does not matter, and imports no torch for safetensors. Heads that the file does not tell are left open.
    """
    stage = source.stage()
    try:
        opened = open_stage(stage, allow_unknown=True)
    except BadInputError as error:
        header = _header_alone(stage) if listing.tensors else None
        if header is None:
            raise
        note(f"warning: {error.message}")
        emit(printing, stage.to_json(_bare(header, error)), tensor_rows(header.tensors), str(header.path))
        return
    result, stored = describe(opened), opened.header.tensors if listing.tensors else {}
    document = result | ({"stored": [_stored(info) for info in stored.values()]} if listing.tensors else {})
    emit(printing, stage.to_json(document), [*rows(result), *tensor_rows(stored)], str(opened.path))


def _header_alone(stage: Stage) -> CheckpointHeader | None:
    """Return the header of a file of tensors that are no DiT-MoE's; None where it cannot be read."""
    try:
        return open_reader(resolve_path(stage.checkpoint))[0] if stage.checkpoint else None
    except BadInputError:
        return None


def _bare(header: CheckpointHeader, problem: BadInputError) -> dict[str, Any]:
    return {
        "problem": with_options(problem.message),
        "layout": header.layout,
        "file_bytes": header.file_bytes,
        "tensors": len(header.tensors),
        "stored": [_stored(info) for info in header.tensors.values()],
    }


def _stored(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}


def tensor_rows(tensors: Mapping[str, TensorInfo]) -> list[Row]:
    """Return a row for each tensor, its columns aligned."""
    shapes = {name: " x ".join(map(str, info.shape)) or "scalar" for name, info in tensors.items()}
    width = max(map(len, shapes.values()), default=0)
    return [
        (name, f"{info.dtype:<4}  {shapes[name]:<{width}}  {info.nbytes:,} bytes") for name, info in tensors.items()
    ]


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the description of a checkpoint as JSON."""
    parameters = count_parameters(checkpoint)
    provenance = checkpoint.header.provenance
    formats = Counter(format_label(weight.format or weight.info.dtype) for weight in checkpoint.weights.values())
    config = checkpoint.config.to_json()
    if checkpoint.config.num_heads == UNKNOWN:
        config["num_heads"] = None
    return {
        "config": config,
        "parameters": {
            "total": parameters.total,
            "activated": parameters.activated,
            "routed": parameters.routed,
        },
        "layout": checkpoint.header.layout,
        "file_bytes": checkpoint.header.file_bytes,
        "tensor_bytes": sum(info.nbytes for info in checkpoint.header.tensors.values()),
        "tensors": len(checkpoint.header.tensors),
        "formats": dict(sorted(formats.items())),
        "expert_widths": [list(block.expert_widths) for block in checkpoint.config.blocks],
        "router_rows": [block.router_rows for block in checkpoint.config.blocks],
        "ghost_rows": [checkpoint.expert_map(i).count(-1) for i in range(checkpoint.config.depth)],
        "loads_upstream": loads_upstream(checkpoint),
        "extractor": checkpoint.card.extractor,
        "history": [step.command for step in provenance.history] if provenance else [],
        "steps": [step.to_json() for step in provenance.history] if provenance else [],
        "notes": [with_options(text) for text in checkpoint.notes],
        "assumptions": [with_options(text) for text in checkpoint.assumptions],
        "warnings": [with_options(text) for text in checkpoint.warnings],
    }


def loads_upstream(checkpoint: Checkpoint) -> bool:
    """Return whether upstream's code loads these tensors: plain weights of a model that it has modules for."""
    return obstacle(checkpoint.config) is None and not packed_weights(checkpoint)


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
        ("formats", ", ".join(f"{count} {name}" for name, count in result["formats"].items())),
        ("layout", result["layout"]),
        ("sampler", config["sampler"]),
        ("loads upstream", "yes" if result["loads_upstream"] else "no"),
        *(("history", step_text(parse_step(step))) for step in result["steps"] or ()),
        *(() if result["steps"] else (("history", "none"),)),
        *(("read", text) for text in result["notes"]),
        *(("assumed", text) for text in result["assumptions"]),
        *(("warning", text) for text in result["warnings"]),
    ]


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
