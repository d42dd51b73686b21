"""Mixes of precisions: budgets kept to the byte, floors, ties and protected groups respected. No weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from compressing import opened, quantising
from conftest import make_pico

from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Formats, Rounding, parse_plan
from ditmoe_cli.compression.precision.budget import Budget, FileSizes
from ditmoe_cli.compression.precision.candidates import DEFAULT_ALLOWED, Candidates, candidate_formats
from ditmoe_cli.compression.precision.mix import Mix, SolvedMix, fitted, least_bytes, solve_mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import weight_group

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


def request_for(checkpoint: Checkpoint, limit: int, candidates: Candidates) -> MixRequest:
    formats = candidate_formats(checkpoint, candidates)
    return MixRequest(checkpoint, candidates, formats, limit, FileSizes(checkpoint, WHERE))


def mixed(checkpoint: Checkpoint, limit: int, candidates: Candidates | None = None, seed: int = 0) -> SolvedMix:
    """The mix of least error for drawn errors."""
    request = request_for(checkpoint, limit, candidates or Candidates())
    return solve_mix(request, drawn(checkpoint, request.candidates, seed)[0], least_bytes(request))


def plan_of(
    checkpoint: Checkpoint, mix: Mix, options: Mapping[str, Any] | None = None, rounding: Rounding | None = None
) -> CompressionPlan:
    every = {**(options or {}), **mix.options}
    return CompressionPlan(
        "quantize", checkpoint.fingerprint, "0" * 64, every, (Formats(mix.formats, rounding, mix.ordering),)
    )


def bytes_of(checkpoint: Checkpoint, plan: CompressionPlan) -> int:
    return planned_output(checkpoint, plan).predicted_bytes(WHERE)


@pytest.mark.parametrize("bits", [2.5, 3, 3.25, 4, 6, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_file_is_within_its_budget_and_nearly_as_large(bits: float, seed: int, checkpoint: Checkpoint) -> None:
    limit = Budget(bits=bits).limit(FileSizes(checkpoint, WHERE), Candidates())
    mix = mixed(checkpoint, limit, seed=seed)
    assert mix.size == bytes_of(checkpoint, quantising(checkpoint, mix.formats)) <= limit
    largest = max(weight.info.nbytes for weight in checkpoint.weights.values())
    assert limit - mix.size < largest or not set(drawn(checkpoint, Candidates())[1]) - set(mix.formats)


def test_more_bytes_never_mean_more_error(checkpoint: Checkpoint) -> None:
    # what a budget in bits leaves as it is must not be given away to the rest here
    asked = Candidates(protected=("modulation", "embedders"), floors={})
    found = [
        mixed(checkpoint, Budget(bits=b).limit(FileSizes(checkpoint, WHERE), asked), asked) for b in (2, 3, 4, 6, 8)
    ]
    errors = [mix.solution.error for mix in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_weights_of_more_error_get_more_bits(checkpoint: Checkpoint) -> None:
    mix = mixed(checkpoint, Budget(bits=3).limit(FileSizes(checkpoint, WHERE), Candidates()))
    errors, formats = drawn(checkpoint, Candidates())
    experts = [n for n in formats if ".experts." in n]
    width = {n: parse_format(mix.formats[n]).bits if n in mix.formats else 16 for n in experts}
    heat = {n: errors[n]["int4-g64"] / checkpoint.weights[n].info.numel for n in experts}
    ranked = sorted(experts, key=heat.__getitem__)
    third = len(ranked) // 3
    assert sum(width[n] for n in ranked[-third:]) > sum(width[n] for n in ranked[:third]) + third


def test_a_size_is_that_of_the_file(checkpoint: Checkpoint) -> None:
    limit = Budget(size=400_000).limit(FileSizes(checkpoint, WHERE), Candidates())
    assert limit == 400_000 >= mixed(checkpoint, limit).size


def test_too_little_is_infeasible_and_says_what_would_do(checkpoint: Checkpoint) -> None:
    with pytest.raises(InfeasibleError, match="narrowest formats take") as refused:
        least_bytes(request_for(checkpoint, 1000, Candidates()))
    least = int(str(refused.value).split(" take ")[1].split(";")[0].replace(",", ""))
    assert least_bytes(request_for(checkpoint, least, Candidates())) == least == mixed(checkpoint, least).size
    with pytest.raises(InfeasibleError, match=f"{least:,}"):
        mixed(checkpoint, least - 1)


@pytest.mark.parametrize("allowed", [DEFAULT_ALLOWED, ("1.58", "2"), ("8", "16")], ids=",".join)
@pytest.mark.parametrize("more", [*range(0, 400, 50), 1000, 3000])
def test_every_limit_that_the_narrowest_formats_meet_is_met(
    more: int, allowed: tuple[str, ...], checkpoint: Checkpoint
) -> None:
    """Also where headers of other lengths would take the few bytes that are left."""
    candidates = Candidates(allowed, floors={})
    least = least_bytes(request_for(checkpoint, 10**9, candidates))
    assert least <= mixed(checkpoint, least + more, candidates).size <= least + more


def test_floors_and_protected_groups_hold(checkpoint: Checkpoint) -> None:
    candidates = Candidates(floors={"attn": 6, "modulation": 8}, protected=("embedders",))
    limit = least_bytes(request_for(checkpoint, 10**9, candidates))
    mix = mixed(checkpoint, limit, candidates)
    groups = {name: weight_group(checkpoint.weights[name].info) for name in mix.formats}
    assert Counter(groups.values()).keys() == {"experts", "shared", "attn", "modulation"}
    bits = {"experts": 2, "shared": 2, "attn": 6, "modulation": 8}
    assert all(parse_format(fmt).bits == bits[groups[name] or ""] for name, fmt in mix.formats.items())


def test_tied_matrices_share_their_format(checkpoint: Checkpoint) -> None:
    tied = Candidates(tied=("gate", "up"))
    limit = Budget(bits=3).limit(FileSizes(checkpoint, WHERE), tied)
    mix, free = mixed(checkpoint, limit, tied), mixed(checkpoint, limit)
    gates = [name for name in mix.formats if name.endswith("gate_proj.weight")]
    assert gates and all(mix.formats[n] == mix.formats[n.replace("gate_proj", "up_proj")] for n in gates)
    assert free.solution.error <= mix.solution.error
    assert any(free.formats.get(n) != free.formats.get(n.replace("gate_proj", "up_proj")) for n in gates)


@pytest.mark.parametrize("rounding", [None, Rounding(tokens=5)])
def test_a_plan_survives_being_written(rounding: Rounding | None, checkpoint: Checkpoint) -> None:
    mix = mixed(checkpoint, Budget(bits=3).limit(FileSizes(checkpoint, WHERE), Candidates()))
    plan = plan_of(checkpoint, mix, {"bits": 3}, rounding=rounding)
    assert parse_plan(plan.to_json(), "here") == plan
    assert plan.options["gap"] <= 1e-4 and plan.options["bound"] <= plan.options["predicted_error"]


@pytest.mark.parametrize("slack", [0, 40, 47, 3_000])
def test_a_choice_that_leaves_bytes_does_not_use_up_the_rounds(slack: int) -> None:
    """A step to a wider format takes 1,000 bytes and lengthens the header by 8; the file has room for `slack` more."""
    asked: list[int] = []

    def choose(budget: int) -> int:
        asked.append(budget)
        return (budget - 10_000) // 1_000

    def size(steps: int) -> int:
        return 10_000 + 1_000 * steps + 8 * steps

    chosen = fitted(choose, size, limit=16_000 + slack, narrowest=10_000, room=6_000 + slack)
    assert chosen == 5 + slack // 1_000
    assert size(chosen) <= 16_000 + slack < size(chosen + 1)
    assert asked == sorted(asked, reverse=True)


def test_not_even_the_narrowest_choice_fits() -> None:
    with pytest.raises(InfeasibleError, match="no mix of formats"):
        fitted(lambda budget: budget, lambda choice: choice + 9, limit=100, narrowest=100, room=0)
