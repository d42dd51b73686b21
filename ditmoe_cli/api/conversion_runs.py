"""Checkpoints of any layout written as safetensors, or foreseen."""

from __future__ import annotations

from ditmoe_cli.api.earlier_results import made_before
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.planner_runs import foresee, found_again, unread, write
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, WrittenCheckpoint
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conversions import Storage, recorded


def label_of_conversion(storage: Storage) -> str:
    """Return the ending of the default output's name."""
    return f"converted{storage.name}"


def converted_result(
    checkpoint: Checkpoint, storage: Storage, output: Output, *, dry_run: bool = False
) -> WrittenCheckpoint | ForeseenCheckpoint:
    """Write a checkpoint, its weights stored as wanted, or foresee that in a dry run, unless it is there already."""
    stored = checkpoint if dry_run else unread(checkpoint, output)
    converted = recorded(*storage.of(stored, note), source=stored)
    made = made_before(output, converted, None)
    if made is not None:
        return found_again(converted, output, made, dry_run=dry_run)
    return foresee(converted, output, None) if dry_run else write(converted, output, None)
