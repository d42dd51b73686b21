"""``ditmoe inspect``: what a checkpoint is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ditmoe_cli.cli.costs import step_text
from ditmoe_cli.cli.options import Source
from ditmoe_cli.cli.stage import open_stage
from ditmoe_cli.cli.terminal import JsonPrinting, Row, emit, human_bytes, with_options
from ditmoe_cli.files.provenance import parse_step
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import count_parameters

EXAMPLES = (
    "ditmoe inspect ckpt.pt",
    "ditmoe inspect demo:digits --json",
)


def run(source: Source, printing: JsonPrinting) -> None:
    """Print what a checkpoint is.

    Prints architecture, parameters, bytes, layout, sampler family and every assumption. Reads headers only, so that
    size does not matter, and imports no torch for safetensors.
    """
    stage = source.stage()
    opened = open_stage(stage)
    result = describe(opened)
    emit(printing, stage.to_json(result), rows(result), str(opened.path))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the description of a checkpoint as JSON."""
    parameters = count_parameters(checkpoint)
    provenance = checkpoint.header.provenance
    formats = Counter(format_label(weight.format or weight.info.dtype) for weight in checkpoint.weights.values())
    return {
        "config": checkpoint.config.to_json(),
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
        "router_rows": [block.router_rows for block in checkpoint.config.blocks],
        "ghost_rows": [checkpoint.expert_map(i).count(-1) for i in range(checkpoint.config.depth)],
        "loads_upstream": loads_upstream(checkpoint),
        "extractor": checkpoint.card.extractor,
        "history": [step.command for step in provenance.history] if provenance else [],
        "steps": [step.to_json() for step in provenance.history] if provenance else [],
        "assumptions": [with_options(text) for text in checkpoint.assumptions],
        "warnings": [with_options(text) for text in checkpoint.warnings],
    }


def loads_upstream(checkpoint: Checkpoint) -> bool:
    """Return whether upstream's code loads these tensors: plain weights, and blocks alike in experts and widths."""
    blocks = checkpoint.config.blocks
    alike = len({(block.expert_widths, block.shared_width) for block in blocks}) == 1
    widths = len(set(blocks[0].expert_widths)) == 1
    return (
        alike and widths and all(b.upstream for b in blocks) and not any(w.format for w in checkpoint.weights.values())
    )


def rows(result: dict[str, Any]) -> list[Row]:
    """Return the description as a table."""
    config, parameters = result["config"], result["parameters"]
    side = config["input_size"]
    share = parameters["routed"] / parameters["total"]
    return [
        (
            "architecture",
            f"depth {config['depth']}, width {config['hidden_size']}, {config['num_heads']} heads, "
            f"patch {config['patch_size']}, {config['attention']} attention",
        ),
        (
            "experts",
            f"{config['num_experts']} per block, top-{config['top_k']}, width {config['expert_width']}, "
            f"shared {config['shared_width']}",
        ),
        (
            "images",
            f"{config['in_channels']} x {side} x {side} in, {config['out_channels']} channels out, "
            f"{config['num_classes']} classes",
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
        *(("assumed", text) for text in result["assumptions"]),
        *(("warning", text) for text in result["warnings"]),
    ]
