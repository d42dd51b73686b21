"""Budgets in bits and bytes, and the sizes of files with any formats. No weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compressing import formats_of, opened, pruned, quantising
from conftest import make_pico

from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.precision.budget import Budget, FileSizes
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.recorded import planned_step
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint

WHERE = Output(Path("/nowhere/out.safetensors"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pico = make_pico(hidden=64, heads=2, input_size=4, widths=((64, 32, 64, 96), (64,) * 4))
    return opened(pico, tmp_path_factory.mktemp("planner"))


def bytes_of(checkpoint: Checkpoint, plan: CompressionPlan) -> int:
    return planned_output(checkpoint, plan).predicted_bytes(WHERE)


@pytest.mark.parametrize(
    "output", [WHERE, Output(Path("/nowhere/folder")), Output(Path("/nowhere/folder"), shard_bytes=30_000)], ids=str
)
@pytest.mark.parametrize("fmt", [None, "int3-g64", "nf4", "int8", "ternary-g64", "rows:int4-g64*32+int2-g64*32"])
def test_sizes_are_those_of_the_file(fmt: str | None, output: Output, checkpoint: Checkpoint) -> None:
    """Also of folders, shards, and files with a history."""
    formats = {}
    if fmt is not None:
        names = candidate_formats(checkpoint, Candidates())
        formats = {n: fmt for n in names if not fmt.startswith("rows:") or n == "blocks.0.moe.experts.0.up_proj.weight"}
    plan = quantising(checkpoint, formats)
    assert FileSizes(checkpoint, output).of(formats) == planned_output(checkpoint, plan).predicted_bytes(output)


def test_sizes_of_a_file_with_a_history(checkpoint: Checkpoint, tmp_path: Path) -> None:
    child = pruned(checkpoint, [(0, 1, 2)] * 2, "ghost", tmp_path / "pruned.safetensors")
    plan = plan_uniform(child, "int4-g64")
    sizes = FileSizes(child, WHERE, planned_step(plan, child.config.experts))
    assert sizes.of(formats_of(plan)) == planned_output(child, plan).predicted_bytes(WHERE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_budget_in_bits_is_the_uniform_files_size(bits: int, checkpoint: Checkpoint) -> None:
    plan = plan_uniform(checkpoint, f"int{bits}-g64")
    sizes = FileSizes(checkpoint, WHERE, planned_step(plan, checkpoint.config.experts))
    assert Budget(bits=bits).limit(sizes, Candidates()) == bytes_of(checkpoint, plan)


def test_between_two_widths_the_budget_is_between_theirs(checkpoint: Checkpoint) -> None:
    sizes = [Budget(bits=bits).limit(FileSizes(checkpoint, WHERE), Candidates()) for bits in (3, 3.25, 3.5, 4)]
    assert abs(sizes[1] - (0.75 * sizes[0] + 0.25 * sizes[3])) <= 1
    assert abs(sizes[2] - (sizes[0] + sizes[3]) / 2) <= 1
    assert Budget(bits=7).limit(FileSizes(checkpoint, WHERE), Candidates()) > sizes[3]


@pytest.mark.parametrize(
    "given", [{}, {"bits": 3, "size": 5}, {"bits": 1.5}, {"bits": 9}, {"bits": float("nan")}], ids=str
)
def test_budgets_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="bits"):
        Budget(**given)
