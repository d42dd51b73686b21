"""Mixes of precisions: budgets kept to the byte, floors, ties and protected groups respected. No weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from compressing import opened, quantised
from conftest import make_pico

from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Rounding, parse_plan
from ditmoe_cli.compression.precision.budget import (
    Budget,
    Mix,
    budget_bytes,
    check_budget,
    plan_mixed,
    solve_mix,
)
from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED, Candidates, candidate_formats, ties
from ditmoe_cli.compression.precision.uniform import format_named, plan_uniform
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.opened import Checkpoint, weight_group

WHERE = Output(Path("/nowhere/out.safetensors"))
Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    pico = make_pico(hidden=64, heads=2, input_size=4, widths=((64, 32, 64, 96), (64,) * 4))
    return opened(pico, tmp_path_factory.mktemp("planner"))


def drawn(checkpoint: Checkpoint, candidates: Candidates, seed: int = 0) -> tuple[Errors, dict[str, Any]]:
    """Errors that fall with the width, of very different weights."""
    random, formats = Random(seed), candidate_formats(checkpoint, candidates)
    scales = {name: random.lognormvariate(0, 2) for name in formats}
    errors = {
        name: {fmt: scales[name] * random.uniform(0.9, 1.1) * 4.0 ** -parse_format(fmt).bits for fmt in fmts if fmt}
        for name, fmts in formats.items()
    }
    return errors, formats


def mixed(checkpoint: Checkpoint, limit: int, candidates: Candidates | None = None, seed: int = 0) -> Mix:
    asked = candidates or Candidates()
    errors, formats = drawn(checkpoint, asked, seed)
    return solve_mix(checkpoint, errors, formats, asked, limit, WHERE)


def bytes_of(checkpoint: Checkpoint, plan: CompressionPlan) -> int:
    return planned_output(checkpoint, plan).predicted_bytes(WHERE)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_budget_in_bits_is_the_uniform_files_size(bits: int, checkpoint: Checkpoint) -> None:
    plan = plan_uniform(checkpoint, f"int{bits}-g64")
    assert budget_bytes(checkpoint, Budget(bits=bits), Candidates(), WHERE) == bytes_of(checkpoint, plan)


def test_between_two_widths_the_budget_is_between_theirs(checkpoint: Checkpoint) -> None:
    sizes = [budget_bytes(checkpoint, Budget(bits=bits), Candidates(), WHERE) for bits in (3, 3.25, 3.5, 4)]
    assert abs(sizes[1] - (0.75 * sizes[0] + 0.25 * sizes[3])) <= 1
    assert abs(sizes[2] - (sizes[0] + sizes[3]) / 2) <= 1
    assert budget_bytes(checkpoint, Budget(bits=7), Candidates(), WHERE) > sizes[3]


@pytest.mark.parametrize("bits", [2.5, 3, 3.25, 4, 6, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_file_is_within_its_budget_and_nearly_as_large(bits: float, seed: int, checkpoint: Checkpoint) -> None:
    limit = budget_bytes(checkpoint, Budget(bits=bits), Candidates(), WHERE)
    mix = mixed(checkpoint, limit, seed=seed)
    plan = plan_mixed(checkpoint, "digest", mix, {"bits": bits}, None)
    assert mix.size == bytes_of(checkpoint, plan) <= limit
    largest = max(weight.info.nbytes for weight in checkpoint.weights.values())
    assert limit - mix.size < largest or not set(drawn(checkpoint, Candidates())[1]) - set(mix.formats)


def test_more_bytes_never_mean_more_error(checkpoint: Checkpoint) -> None:
    # what a budget in bits leaves as it is must not be given away to the rest here
    asked = Candidates(protected=("modulation", "embedders"), floors={})
    found = [mixed(checkpoint, budget_bytes(checkpoint, Budget(bits=b), asked, WHERE), asked) for b in (2, 3, 4, 6, 8)]
    errors = [mix.solution.error for mix in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_weights_of_more_error_get_more_bits(checkpoint: Checkpoint) -> None:
    mix = mixed(checkpoint, budget_bytes(checkpoint, Budget(bits=3), Candidates(), WHERE))
    errors, formats = drawn(checkpoint, Candidates())
    experts = [n for n in formats if ".experts." in n]
    width = {n: parse_format(mix.formats[n]).bits if n in mix.formats else 16 for n in experts}
    heat = {n: errors[n]["int4-g64"] / checkpoint.weights[n].info.numel for n in experts}
    ranked = sorted(experts, key=heat.__getitem__)
    third = len(ranked) // 3
    assert sum(width[n] for n in ranked[-third:]) > sum(width[n] for n in ranked[:third]) + third


def test_a_size_is_that_of_the_file(checkpoint: Checkpoint) -> None:
    limit = budget_bytes(checkpoint, Budget(size=400_000), Candidates(), WHERE)
    assert limit == 400_000 >= mixed(checkpoint, limit).size


def test_too_little_is_infeasible_and_says_what_would_do(checkpoint: Checkpoint) -> None:
    candidates = Candidates()
    _, formats = drawn(checkpoint, candidates)
    with pytest.raises(InfeasibleError, match="narrowest formats take") as refused:
        check_budget(checkpoint, formats, candidates, 1000, WHERE)
    least = int(str(refused.value).split(" take ")[1].split(";")[0].replace(",", ""))
    assert check_budget(checkpoint, formats, candidates, least, WHERE) == least == mixed(checkpoint, least).size
    with pytest.raises(InfeasibleError, match=f"{least:,}"):
        mixed(checkpoint, least - 1)


@pytest.mark.parametrize("allowed", [DEFAULT_ALLOWED, ("1.58", "2"), ("8", "16")], ids=",".join)
@pytest.mark.parametrize("more", [*range(0, 400, 50), 1000, 3000])
def test_every_limit_that_the_narrowest_formats_meet_is_met(
    more: int, allowed: tuple[str, ...], checkpoint: Checkpoint
) -> None:
    """Also where headers of other lengths would take the few bytes that are left."""
    candidates = Candidates(allowed, floors={})
    least = check_budget(checkpoint, drawn(checkpoint, candidates)[1], candidates, 10**9, WHERE)
    assert least <= mixed(checkpoint, least + more, candidates).size <= least + more


def test_floors_and_protected_groups_hold(checkpoint: Checkpoint) -> None:
    candidates = Candidates(floors={"attn": 6, "modulation": 8}, protected=("embedders",))
    limit = check_budget(checkpoint, drawn(checkpoint, candidates)[1], candidates, 10**9, WHERE)
    mix = mixed(checkpoint, limit, candidates)
    groups = {name: weight_group(checkpoint.weights[name].info) for name in mix.formats}
    assert Counter(groups.values()).keys() == {"experts", "shared", "attn", "modulation"}
    bits = {"experts": 2, "shared": 2, "attn": 6, "modulation": 8}
    assert all(parse_format(fmt).bits == bits[groups[name] or ""] for name, fmt in mix.formats.items())


def test_tied_matrices_share_their_format(checkpoint: Checkpoint) -> None:
    tied = Candidates(tied=("gate", "up"))
    limit = budget_bytes(checkpoint, Budget(bits=3), tied, WHERE)
    mix, free = mixed(checkpoint, limit, tied), mixed(checkpoint, limit)
    gates = [name for name in mix.formats if name.endswith("gate_proj.weight")]
    assert gates and all(mix.formats[n] == mix.formats[n.replace("gate_proj", "up_proj")] for n in gates)
    assert free.solution.error <= mix.solution.error
    assert any(free.formats.get(n) != free.formats.get(n.replace("gate_proj", "up_proj")) for n in gates)


def test_ties_name_decisions_of_their_own() -> None:
    names = [f"blocks.0.moe.experts.{e}.{m}_proj.weight" for e in (0, 1) for m in ("gate", "up", "down")]
    assert len(set(ties(names, ("gate", "up")).values())) == 4
    assert len(set(ties(names, ("gate", "up", "down")).values())) == 2
    assert ties(names, ()) == {name: name for name in names}
    attention = "blocks.0.attn.qkv.weight"
    assert ties([attention], ("gate", "up")) == {attention: attention}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"allowed": ("2", "7")}, "--allow 7"),
        ({"floors": {"router": 8}}, "--floor router"),
        ({"protected": ("gate",)}, "--protect gate"),
        ({"tied": ("gate", "side")}, "--tie side"),
        ({"tied": ("gate",)}, "at least two"),
        ({"group_size": 48}, "--group-size 48"),
    ],
    ids=str,
)
def test_unknown_names_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(Candidates(), **fields)


@pytest.mark.parametrize(
    "given", [{}, {"bits": 3, "size": 5}, {"bits": 1.5}, {"bits": 9}, {"bits": float("nan")}], ids=str
)
def test_budgets_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--bits"):
        Budget(**given)


def test_floors_that_leave_nothing_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(UsageError, match="attn=8"):
        candidate_formats(checkpoint, Candidates(allowed=("2", "3"), floors={"attn": 8}))


def test_what_is_packed_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    packed = quantised(checkpoint, 8, tmp_path / "packed.safetensors")
    with pytest.raises(BadInputError, match="is int8 already"):
        candidate_formats(packed, Candidates())
    with pytest.raises(BadInputError, match="is int8 already"):
        plan_uniform(packed, "nf4")


def test_router_norms_and_tables_are_never_planned(checkpoint: Checkpoint) -> None:
    planned = candidate_formats(checkpoint, Candidates())
    left = {name.split(".")[-2] for name in checkpoint.weights if name not in planned and name.endswith(".weight")}
    assert left == {"gate", "proj", "embedding_table"}  # router, patch embedding, label table
    assert "blocks.0.moe.gate.weight" not in planned and "x_embedder.proj.weight" not in planned


@pytest.mark.parametrize("rounding", [None, Rounding(tokens=5)])
def test_a_plan_survives_being_written(rounding: Rounding | None, checkpoint: Checkpoint) -> None:
    mix = mixed(checkpoint, budget_bytes(checkpoint, Budget(bits=3), Candidates(), WHERE))
    plan = plan_mixed(checkpoint, "0" * 64, mix, {"bits": 3}, rounding)
    assert parse_plan(plan.to_json(), "here") == plan
    assert plan.options["gap"] <= 1e-4 and plan.options["bound"] <= plan.options["predicted_error"]


@pytest.mark.parametrize(
    ("kind", "bits", "found"),
    [
        (None, 4, "nf4"),
        (None, 8, "int8"),
        (None, 3, "int3-g64"),
        (None, 1.58, "ternary-g64"),
        ("int", 4, "int4-g64"),
        ("int", 8, "int8-g64"),
        ("fp4", None, "fp4"),
        ("ternary", None, "ternary-g64"),
    ],
)
def test_formats_by_kind_and_width(kind: str | None, bits: float | None, found: str) -> None:
    assert format_named(kind, bits, 64, False, False) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((None, None, 64, False, False), "--bits is missing"),
        (("hqq", 4, 64, False, False), "--format hqq"),
        (("nf4", 3, 64, False, False), "4 bits, not --bits 3"),
        (("int", 7, 64, False, False), "--bits 7"),
        (("int", None, 64, False, False), "--bits None"),
        (("nf4", 4, 64, True, False), "--symmetric"),
        (("int", 4, 64, False, True), "--double-quant"),
        (("int", 4, 48, False, False), "--group-size 48"),
        (("nf4", 4, 32, False, False), "--group-size 32"),
    ],
    ids=str,
)
def test_formats_that_do_not_exist_are_refused(words: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        format_named(*words)
