"""What is known of checkpoints from their files, and what two of them differ in, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ditmoe_cli.errors import BadInputError, as_argument, named
from ditmoe_cli.exporting.upstream import obstacle
from ditmoe_cli.files.reader import CheckpointHeader
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.checkpoint_differences import Differences, Group, grouped
from ditmoe_cli.model.config import UNKNOWN
from ditmoe_cli.model.conversions import POSITIONS, packed_weights
from ditmoe_cli.model.gpu_memory import guided_memory
from ditmoe_cli.model.parameters import count_parameters
from ditmoe_cli.model.verification import Verification

NameOf = Callable[[str], str]


def describe(checkpoint: Checkpoint, name_of: NameOf = as_argument) -> dict[str, Any]:
    """Return what a checkpoint is by name; `name_of` gives the names of settings in texts, as `named` takes it."""
    parameters = count_parameters(checkpoint)
    provenance = checkpoint.header.provenance
    formats = Counter(format_label(weight.format or weight.info.dtype) for weight in checkpoint.weights.values())
    config = checkpoint.config.to_json()
    if checkpoint.config.num_heads == UNKNOWN:
        config["num_heads"] = None
    barrier = upstream_obstacle(checkpoint)
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
        "gpu_bytes": guided_memory(checkpoint.header.tensors.values(), checkpoint.config),
        "tensors": len(checkpoint.header.tensors),
        "formats": dict(sorted(formats.items())),
        "expert_widths": [list(block.expert_widths) for block in checkpoint.config.blocks],
        "router_rows": [block.router_rows for block in checkpoint.config.blocks],
        "ghost_rows": [checkpoint.expert_map(i).count(-1) for i in range(checkpoint.config.depth)],
        "loads_upstream": barrier is None,
        "upstream_obstacle": named(barrier, name_of) if barrier is not None else None,
        "extractor": checkpoint.card.extractor,
        **({"distilled": asdict(checkpoint.distilled)} if checkpoint.distilled is not None else {}),
        "fingerprint": checkpoint.written_fingerprint,
        "history": [step.command for step in provenance.history] if provenance else [],
        "steps": [step.to_json() for step in provenance.history] if provenance else [],
        "notes": [named(text, name_of) for text in checkpoint.notes],
        "assumptions": [named(text, name_of) for text in checkpoint.assumptions],
        "warnings": [named(text, name_of) for text in checkpoint.warnings],
    }


def upstream_obstacle(checkpoint: Checkpoint) -> str | None:
    """Return why upstream's code does not load these tensors; None where it does."""
    packed = packed_weights(checkpoint)
    if (problem := obstacle(checkpoint.config)) is not None:
        return problem
    if packed:
        return f"{packed} weights are quantised or differences, which export ⟨to⟩ upstream writes whole"
    return None if POSITIONS in checkpoint.weights else "pos_embed is absent, which export ⟨to⟩ upstream rebuilds"


def describe_tensors(header: CheckpointHeader, problem: BadInputError, name_of: NameOf = as_argument) -> dict[str, Any]:
    """Return what a file of tensors is that are no DiT-MoE's, for the reason that `problem` gives."""
    return {
        "problem": named(problem.message, name_of),
        "layout": header.layout,
        "file_bytes": header.file_bytes,
        "tensors": len(header.tensors),
        "stored": stored_tensors(header),
    }


def stored_tensors(header: CheckpointHeader) -> list[dict[str, Any]]:
    """Return name, dtype, shape and bytes of all stored tensors."""
    return [
        {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
        for info in header.tensors.values()
    ]


def verification_json(verified: Verification) -> dict[str, Any]:
    """Return what reading a whole checkpoint has shown by name."""
    found = verified.integrity
    return {
        "sound": not verified.problems,
        "fingerprint": verified.fingerprint,
        "tensors": len(found.hashes),
        "bytes": found.bytes,
        "hashes": found.recorded,
        "archive_members": found.members,
        "problems": [asdict(problem) for problem in verified.problems],
    }


def comparison_json(a: Checkpoint, b: Checkpoint, found: Differences, each: bool) -> dict[str, Any]:
    """Return what two checkpoints differ in by name; with `each`, every weight that differs too."""
    document: dict[str, Any] = {
        "same": found.same,
        "a": _side(a),
        "b": _side(b),
        "configuration": {name: {"a": x, "b": y} for name, (x, y) in differing_settings(found).items()},
        "relation": found.kin.relation,
        "steps": {
            name: [step.to_json() for step in steps]
            for name, steps in (("shared", found.kin.shared), ("a", found.kin.a), ("b", found.kin.b))
        },
        "kept": {
            name: [list(block) for block in kept] if kept else None for name, kept in zip("ab", found.kept, strict=True)
        },
        "compared_by": {name: sorted(evidence) for name, evidence in found.evidence.items()},
        "equal": found.equal,
        "differing": len(found.changes),
        "groups": [_group_json(group) for group in grouped(found.changes)],
    }
    return document | ({"changes": [asdict(change) for change in found.changes]} if each else {})


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.header.layout,
        "parameters": asdict(count_parameters(checkpoint)),
        "file_bytes": checkpoint.header.file_bytes,
        "tensors": len(checkpoint.header.tensors),
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "blocks": [list(run) for run in group.blocks],
        "experts": None if group.experts is None else list(group.experts),
        "weights": len(group.names),
        "rests": list(group.rests),
        "a": group.a,
        "b": group.b,
    }


def differing_settings(found: Differences) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two checkpoints that differ; None where a file does not tell its number of heads."""
    return {
        name: (x or None, y or None) if name == "num_heads" else (x, y) for name, (x, y) in found.configuration.items()
    }


def measured_distances(a: Checkpoint, b: Checkpoint, found: Differences) -> dict[str, Any]:
    """Return how far the weights of B are from A's by group by name, of those that both have in one shape."""
    from ditmoe_cli.model.weight_distances import distances

    return {
        group: {
            "relative": distance.relative,
            "weights": distance.weights,
            "blocks": {str(block): value for block, value in distance.by_block.items()},
        }
        for group, distance in distances(a, b, found.pairs).items()
    }
