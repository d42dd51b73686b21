"""The rows that tell what a stage does and what it cost: experts, widths, formats, errors, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ditmoe_cli.api.plan_facts import GROUPS, formats_by_group
from ditmoe_cli.api.step_texts import number
from ditmoe_cli.cli.terminal import Row
from ditmoe_cli.compression.plan import (
    BlockPlan,
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    Repair,
    Retraining,
    Rounding,
    Selection,
)
from ditmoe_cli.files.names import split_name
from ditmoe_cli.model.checkpoint import Checkpoint

_GUIDED = "the guided prediction, on held-out states"
_MOST_RUNS = 6  # of widths that are listed; more are told by their range


def in_runs(numbers: Iterable[int]) -> str:
    """Return ascending numbers with runs joined: ``0 2-5 7``."""
    runs: list[list[int]] = []
    for each in numbers:
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return " ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def widths_text(widths: Sequence[int]) -> str:
    """Return widths with equal neighbours counted, ``128 x3, 64``; their range where they differ more."""
    runs = [(width, len(list(same))) for width, same in groupby(widths)]
    if len(runs) > _MOST_RUNS:
        return f"{min(widths)} to {max(widths)}, {sum(widths) / len(widths):.0f} on average"
    return ", ".join(f"{width} x{count}" if count > 1 else f"{width}" for width, count in runs)


def range_text(values: Sequence[float], worst: int) -> str:
    """Return values of blocks by their range, and the block of the `worst`; values that read alike as one."""
    low, high = number(min(values)), number(max(values))
    if low == high:
        return f"{low} in each block" if len(values) > 1 else low
    return f"{low} to {high}, worst in block {worst}"


def blockwise(texts: Sequence[str]) -> list[Row]:
    """Return one row a block, neighbours of the same text joined."""
    rows: list[Row] = []
    for text, same in groupby(enumerate(texts), key=lambda pair: pair[1]):
        first, *others = (index for index, _ in same)
        rows.append((f"blocks {first}-{others[-1]}" if others else f"block {first}", text))
    return rows


def block_text(block: BlockPlan, experts: int | None) -> str:
    """Return what becomes of a block's experts; `experts` is how many there were, where that is known."""
    of = f" of {experts}" if experts is not None else ""
    everything = experts is not None and len(block.keep) == experts
    parts = [f"keeps {'all' if everything else in_runs(block.keep)}{of}"]
    leads = sorted({lead for _, lead in block.merged})
    parts += [f"merges {in_runs(e for e, into in block.merged if into == lead)} into {lead}" for lead in leads]
    if block.widths:
        parts.append(f"widths {widths_text(block.widths)}")
    if block.shared_width:
        parts.append(f"shared expert {block.shared_width}")
    if block.constants:
        parts.append(f"constants of rank {block.rank}" if block.rank else "constants")
    if not everything:
        parts.append(f"router {block.router}")
    return "; ".join(parts)


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counted formats: ``int3-g64 x20, int4-g64 x4``."""
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def group_rows(formats: Mapping[str, str], checkpoint: Checkpoint | None) -> list[Row]:
    """Return one row for each group of weights, with the formats of its matrices."""
    found = formats_by_group(formats, checkpoint)
    return [(GROUPS[group], counts_text(counts)) for group, counts in found.items()]


def format_rows(formats: Mapping[str, str]) -> list[Row]:
    """Return one row for each block, and one for the weights outside of blocks, with the formats by group."""
    blocks: dict[int | None, dict[str, str]] = {}
    for name, fmt in formats.items():
        blocks.setdefault(split_name(name).block, {})[name] = fmt
    depth = max((block for block in blocks if block is not None), default=-1) + 1
    texts = [_groups_text(blocks.get(index, {})) for index in range(depth)]
    outside: list[Row] = [("outside blocks", _groups_text(blocks[None]))] if None in blocks else []
    return blockwise(texts) + outside


def _groups_text(formats: Mapping[str, str]) -> str:
    found = formats_by_group(formats, None)
    parts = [f"{GROUPS[group]} {counts_text(counts)}" for group, counts in found.items()]
    return "; ".join(parts) or "unchanged"


def repair_text(repair: Repair | None) -> str:
    """Return how kept weights are refitted."""
    if repair is None:
        return "none"
    if repair.scale:
        fitted = "one factor for each expert"
    else:
        parts = [name for name, wanted in (("shared expert", repair.shared), ("constant", repair.constant)) if wanted]
        fitted = ", ".join(["routed experts", *parts, *(["linear map"] if repair.linear else [])])
    return f"{fitted}, on {f'{repair.tokens:,} tokens' if repair.tokens else 'as many tokens as suit it'}"


def rounding_text(rounding: Rounding | None) -> str:
    """Return how weights are rounded."""
    if rounding is None:
        return "to the nearest"
    tokens = f"{rounding.tokens:,} tokens" if rounding.tokens else "as many tokens as suit it"
    return f"{rounding.method}, on {tokens}" + (
        f", inputs smoothed by {rounding.smoothing:g}" * bool(rounding.smoothing)
    )


def selection_text(selection: Selection | None) -> str:
    """Return which neurons of narrowed experts stay."""
    if selection is None:
        return "those of highest energy stay"
    return "those whose loss costs most stay, once others make up for it"


def retraining_text(retraining: Retraining | None) -> str:
    """Return how long weights are trained."""
    if retraining is None:
        return "none"
    length = f"{retraining.minutes:g} min" if retraining.minutes is not None else f"{retraining.steps:,} steps"
    if retraining.student_steps is not None:
        return f"{length} of training to be sampled in {retraining.student_steps} steps"
    return f"{length} of training to predict as the original does"


def plan_rows(plan: CompressionPlan, checkpoint: Checkpoint | None = None, by_block: bool = False) -> list[Row]:
    """Return what a plan does: experts by block, differences, and formats by group, or by block and group."""
    rows: list[Row] = []
    for stage in plan.stages:
        match stage:
            case Experts():
                before = [len(b.expert_widths) for b in checkpoint.config.blocks] if checkpoint else None
                texts = [block_text(b, before[i] if before else None) for i, b in enumerate(stage.blocks)]
                rows += [("merging", stage.merging)] if stage.merging else []
                rows += blockwise(texts)
                if any(block.widths or block.shared_width for block in stage.blocks):
                    rows.append(("neurons", selection_text(stage.selection)))
                rows.append(("refit", repair_text(stage.repair)))
            case Differences():
                rows.append(("differences", f"{stage.kind} {stage.ratio:g}"))
            case Retraining():
                rows.append(("training", retraining_text(stage)))
            case Formats():
                rows += [("orders neurons", f"by {stage.ordering}")] if stage.ordering else []
                rows += format_rows(stage.formats) if by_block else group_rows(stage.formats, checkpoint)
                rows += [("rounding", rounding_text(stage.rounding))] if stage.formats else []
    return rows


def error_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the errors among the facts of a stage, and the agreement of routing, as far as they are known."""
    rows: list[Row] = []
    refit = facts.get("refit_error")
    if refit:
        rows.append(("refit error", f"{range_text(refit, refit.index(max(refit)))} (held out, of that before)"))
    named = (("predicted", "predicted_error"), ("tried", "tried_error"), ("after rounding", "prediction_error"))
    errors = [f"{label} {number(facts[name])}" for label, name in named if facts.get(name) is not None]
    if facts.get("gap") is not None:
        errors.append(f"gap {number(facts['gap'])} by {facts['solver']}")
    elif facts.get("solver"):
        errors.append(f"solver {facts['solver']}")
    if errors:
        rows.append(("prediction error", ", ".join(errors)))
    if facts.get("held_error"):
        before, after = facts["held_error"]
        what = "images, on held-out noise" if facts.get("retraining", {}).get("student_steps") else _GUIDED
        rows.append(("training", f"{number(before)} -> {number(after)} of {what}"))
    rows += _damage_rows(facts)
    rows += [
        (f"price of --{option}", f"{label} {_times_as_much(facts[own], facts[freer])}")
        for option, label, own, freer in _PRICES
        if facts.get(freer) is not None
    ]
    agreement = facts.get("top_k_agreement")
    if agreement:
        rows.append(("top-k agreement", range_text(agreement, agreement.index(min(agreement)))))
    return rows


_PRICES = (
    ("tie", "predicted", "predicted_error", "untied_error"),
    ("target", "predicted", "predicted_error", "free_error"),
    ("target", "tried", "tried_error", "free_tried_error"),
)
"""Options that leave choices out, and the errors of plans of as many bytes with them and without."""


def _times_as_much(own: float, freer: float) -> str:
    """Return an error beside that without an option, and how many times as large it is."""
    return f"{number(own)}, {number(freer)} without{f', {own / freer:.2f} times as much' if freer else ''}"


def _damage_rows(facts: Mapping[str, Any]) -> list[Row]:
    """Return the bound of the tried error, that of the next smaller file, and the expected distance of images."""
    rows: list[Row] = []
    if facts.get("damage") is not None:
        smaller = facts.get("next_smaller")
        beside = f"; {number(smaller['damage'])} in {smaller['bytes']:,} bytes" if smaller else ""
        rows.append(("damage", f"at most {number(facts['damage'])} of the prediction (95 %){beside}"))
    distance = facts.get("paired_distance")
    if distance:
        spread = f"{number(distance['low'])} to {number(distance['high'])}"
        what = f"mean squared error of {distance['of']} to the original's, mean of {distance['images']} images"
        rows.append(("paired distance", f"{number(distance['mean'])} ({spread}, 95 %): {what}"))
    return rows
