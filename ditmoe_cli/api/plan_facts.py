"""What a plan does to a checkpoint, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ditmoe_cli.compression.plan import FIGURES, CompressionPlan, Differences, Experts, Formats, Retraining
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import WeightGroup, group_of, weight_group

GROUPS: Mapping[WeightGroup, str] = {
    "experts": "routed experts",
    "shared": "shared experts",
    "attn": "attention",
    "modulation": "modulation",
    "embedders": "embedders",
}


def formats_by_group(formats: Mapping[str, str], checkpoint: Checkpoint | None) -> dict[WeightGroup, Counter[str]]:
    """Return how many matrices of each group have which format; with the checkpoint also those without one."""
    counts: dict[WeightGroup, Counter[str]] = {group: Counter() for group in GROUPS}
    for name, fmt in formats.items():
        group = group_of(name)
        if group is not None:
            counts[group][format_label(fmt)] += 1
    for name, weight in checkpoint.weights.items() if checkpoint else ():
        group = weight_group(weight.info)
        if group is not None and name not in formats:
            counts[group][format_label(weight.format or weight.info.dtype)] += 1
    return {group: counted for group, counted in counts.items() if counted}


def facts(plan: CompressionPlan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a plan does to a checkpoint as JSON: the facts that its rows tell."""
    found: dict[str, Any] = {name: plan.options[name] for name in FIGURES if name in plan.options}
    for stage in plan.stages:
        match stage:
            case Experts():
                found["experts_before"] = [len(block.expert_widths) for block in checkpoint.config.blocks]
                found["kept"] = [list(block.keep) for block in stage.blocks]
                if any(block.widths for block in stage.blocks):
                    found["widths"] = [list(block.widths) for block in stage.blocks]
            case Differences():
                found["delta"] = asdict(stage)
            case Retraining():
                found["retraining"] = stage.to_json()
            case Formats():
                groups = formats_by_group(stage.formats, checkpoint)
                found["formats_by_group"] = {group: dict(sorted(counts.items())) for group, counts in groups.items()}
    return found
