"""What two checkpoints differ in, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ditmoe_cli.api.checkpoint_facts import differing_settings
from ditmoe_cli.api.plan_facts import GROUPS
from ditmoe_cli.api.step_texts import number, step_text
from ditmoe_cli.cli.costs import blockwise, in_runs
from ditmoe_cli.cli.terminal import Row, with_options
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.files.provenance import Distilled, Step
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.checkpoint_differences import Change, Differences, Group, grouped
from ditmoe_cli.model.lineage import Kept
from ditmoe_cli.model.parameters import count_parameters
from ditmoe_cli.progress import human_bytes

_MOST_RESTS = 6  # endings of names that a row lists
_LONGEST = 48  # characters of a setting


def comparison_rows(a: Checkpoint, b: Checkpoint, found: Differences, each: bool) -> list[Row]:
    """Return what two checkpoints differ in as a table: weights that differ alike in one row, or `each` in its own."""
    counts = count_parameters(a), count_parameters(b)
    sizes = a.header.file_bytes, b.header.file_bytes
    changes = [_change_row(change) for change in found.changes] if each else map(_group_row, grouped(found.changes))
    return [
        ("A", f"{a.path}, {a.header.layout}"),
        ("B", f"{b.path}, {b.header.layout}"),
        ("same", _same_text(found)),
        ("parameters", _counted(counts[0].total, counts[1].total)),
        ("activated", _counted(counts[0].activated, counts[1].activated)),
        ("bytes", f"{_counted(*sizes)}, {human_bytes(sizes[0])} | {human_bytes(sizes[1])}"),
        *((name, f"{_setting(name, x)} | {_setting(name, y)}") for name, (x, y) in differing_settings(found).items()),
        *_history_rows(found),
        *_kept_rows(found.kept),
        *changes,
        ("equal", f"{found.equal:,} weights{_evidence(found)}"),
    ]


def difference_count(found: Differences) -> str:
    """Return how much two checkpoints differ in, in words."""
    weights, fields = len(found.changes), len(found.configuration)
    parts = [_plural(weights, "weight differs", "weights differ")] if weights else []
    parts += [_plural(fields, "setting of the configuration", "settings of the configuration")] if fields else []
    return " and ".join(parts)


def _same_text(found: Differences) -> str:
    return "yes, weights and configuration are equal" if found.same else f"no: {difference_count(found)}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _counted(a: int, b: int) -> str:
    change = f" ({b / a - 1:+.1%})" if a and a != b else ""
    return f"{a:,} | {b:,}{change}"


def _setting(name: str, value: Any) -> str:
    if name == "distilled":
        return "no" if value is None else told_steps(Distilled(**value))
    text = "unknown" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _evidence(found: Differences) -> str:
    """Return what equal bytes were told by; nothing where no two weights could be equal."""
    a, b = (", ".join(sorted(found.evidence[side])) for side in "ab")
    if not a:
        return ""
    if a == b == "metadata":
        return ", by the hashes in the metadata of both (--verify reads the bytes)"
    if a == b == "bytes":
        return ", by their bytes"
    return f", by A's {_told_by(a)} and B's {_told_by(b)} (--verify reads all bytes)"


def _told_by(evidence: str) -> str:
    return {"metadata": "hashes in its metadata", "bytes": "bytes"}.get(evidence, "hashes in its metadata, else bytes")


def _history_rows(found: Differences) -> list[Row]:
    kin = found.kin
    told = {
        "same": "both are the same, made in the same steps",
        "ancestor": "B was made from A",
        "descendant": "A was made from B",
        "siblings": "both were made from one checkpoint",
        "unknown": "neither history names the other, or a checkpoint that both come from",
    }[kin.relation]
    shared = f", after {_plural(len(kin.shared), 'step', 'steps')} that they share" if kin.shared else ""
    return [("history", told + shared), *_steps("A", kin.a), *_steps("B", kin.b)]


def _steps(label: str, steps: Iterable[Step]) -> list[Row]:
    return [(f"made {label}", with_options(step_text(step))) for step in steps]


def _kept_rows(kept: Sequence[Kept | None]) -> list[Row]:
    """Return which experts of the checkpoint that both come from are left, blocks that are alike in one row."""
    rows: list[Row] = []
    a, b = kept
    if a is not None and a == b:
        return blockwise([f"both have experts {in_runs(block)}" for block in a])
    for label, blocks in zip("AB", kept, strict=True):
        rows += blockwise([f"{label} has experts {in_runs(block)}" for block in blocks]) if blocks else []
    return rows


def _group_row(group: Group) -> Row:
    blocks = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in group.blocks)
    single = len(group.blocks) == 1 and group.blocks[0][0] == group.blocks[0][1]
    label = f"block{'' if single else 's'} {blocks}" if blocks else "outside blocks"
    count = _plural(len(group.names), "weight", "weights")
    return (label, f"{_names(group)}: {_how(group.kind, group.a, group.b)} ({count})")


def _names(group: Group) -> str:
    rests = ", ".join(rest.removesuffix(".weight") for rest in group.rests[:_MOST_RESTS])
    rests += f" and {_plural(len(group.rests) - _MOST_RESTS, 'other', 'others')}" if group.rests[_MOST_RESTS:] else ""
    if group.experts is None:
        return f"experts (not the same ones in each block) {rests}"
    single = len(group.experts) == 1
    return f"expert{'' if single else 's'} {in_runs(group.experts)} {rests}" if group.experts else rests


def _how(kind: str, a: str | None, b: str | None) -> str:
    match kind:
        case "only in A":
            return f"only in A, {a}"
        case "only in B":
            return f"only in B, {b}"
        case "other bytes":
            return f"{a}, other bytes"
    return f"{a} in other pieces" if a == b else f"{a} → {b}"


def _change_row(change: Change) -> Row:
    a, b = (
        f"{side.format} {' x '.join(map(str, side.shape)) or 'scalar'}" if side else None
        for side in (change.a, change.b)
    )
    return (change.name, _how(change.kind, a, b))


def value_rows(measured: Mapping[str, Any] | None) -> list[Row]:
    """Return distances as a table, each with its worst block."""
    rows: list[Row] = []
    names: Mapping[str, str] = {str(group): text for group, text in GROUPS.items()}
    for group, told in (measured or {}).items():
        blocks = {block: value for block, value in told["blocks"].items() if value is not None}
        worst = max(blocks, key=lambda block: blocks[block]) if len(set(blocks.values())) > 1 else None
        where = f", {number(blocks[worst])} in block {worst}" if worst is not None else ""
        relative = "infinite" if told["relative"] is None else number(told["relative"])
        count = _plural(told["weights"], "weight", "weights")
        rows.append(("|B - A| / |A|", f"{names.get(group, group)} {relative}{where} ({count})"))
    return rows
