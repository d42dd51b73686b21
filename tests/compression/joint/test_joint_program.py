"""The program over structure and bits: against all choices of a small request, and what its plans say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compressing import opened
from conftest import make_pico

from ditmoe_cli.compression.estimates import carrying_out
from ditmoe_cli.compression.joint import joint_program
from ditmoe_cli.compression.joint.expert_options import WidthCurve, bytes_of_weight, narrowed_info
from ditmoe_cli.compression.joint.joint_program import (
    GAP,
    Draft,
    JointProgram,
    JointRequest,
    Measures,
    plan_of,
    size_of,
)
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import Experts, Formats, parse_plan
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import is_quantizable
from ditmoe_cli.model.checkpoint import Checkpoint

WHERE = Output(Path("/nowhere/out.safetensors"))
SLACK = 2048  # bytes by which headers of different choices may differ
EXPERTS_ONLY: dict[str, Any] = {"allowed": ("3", "16"), "protected": ("shared", "attn", "modulation", "embedders")}


@pytest.fixture(autouse=True)
def few_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, half and all of an expert."""
    halves = lambda width, _, *, may_go: ((0,) * may_go) + (width // 2, width)  # noqa: E731
    monkeypatch.setattr(joint_program, "ladder", halves)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One block of three experts, of which a token selects one."""
    pico = make_pico(hidden=64, input_size=4, depth=1, experts=3, top_k=1, widths=((128,) * 3,), shared_width=64)
    return opened(pico, tmp_path_factory.mktemp("program"))


def request_of(checkpoint: Checkpoint, *, stacked: bool = False, **fields: Any) -> JointRequest:
    candidates = Candidates(**{**EXPERTS_ONLY, **fields})
    offered = candidate_formats(checkpoint, candidates)
    return JointRequest(checkpoint, WHERE, candidates, offered, {"size": 1}, stacked=stacked)


def random_measures(request: JointRequest, seed: int) -> Measures:
    """Errors that fall with widths and bits."""
    rng = random.Random(seed)

    def falling(count: int) -> tuple[float, ...]:
        return (*sorted((rng.uniform(0.1, 9) for _ in range(count - 1)), reverse=True), 0.0)

    curves = {
        stem: WidthCurve(widths, falling(len(widths)), tuple(width / widths[-1] for width in widths))
        for stem, widths in request.ladders.items()
    }
    formats = {}
    for name, offered in request.offered.items():
        real = [fmt for fmt in offered if fmt]
        formats[name] = dict(zip(real, falling(len(real) + 1), strict=False))
    depth = request.checkpoint.config.depth
    return Measures(curves, formats, formats, tuple(rng.uniform(0.2, 2) for _ in range(depth)))


def error_of(request: JointRequest, measures: Measures, draft: Draft, kappa: float) -> float:
    """The error of a draft by the formula, weight by weight."""
    total = 0.0
    for stem, width in draft.widths.items():
        curve, block = measures.curves[stem], int(stem.split(".")[1])
        place = curve.widths.index(width)
        rounded = sum(
            measures.formats[name][draft.formats[name]]
            for name in (f"{stem}.{matrix}.weight" for matrix in MATRICES)
            if name in draft.formats
        )
        total += measures.amplification[block] * (kappa * curve.errors[place] + curve.growth[place] * rounded)
    dense = [name for name in draft.formats if name in request.dense]
    return total + sum(measures.dense[name][draft.formats[name]] for name in dense)


def all_drafts(request: JointRequest) -> list[Draft]:
    """Every choice of widths and of formats of routed experts that leaves top-k of them."""
    per_expert = []
    for stem, widths in request.ladders.items():
        infos = [request.checkpoint.weights[f"{stem}.{matrix}.weight"].info for matrix in MATRICES]
        own: list[tuple[str, int, dict[str, str]]] = []
        for width in widths:
            offers = [request.offered.get(info.name, (None,)) if width else (None,) for info in infos]
            for formats in itertools.product(*offers):
                fit = [
                    fmt is None or is_quantizable(narrowed_info(info, width, place == 2), fmt)
                    for place, (info, fmt) in enumerate(zip(infos, formats, strict=True))
                ]
                if all(fit):
                    named = {info.name: fmt for info, fmt in zip(infos, formats, strict=True) if fmt}
                    own.append((stem, width, named))
        per_expert.append(own)
    drafts = []
    for choice in itertools.product(*per_expert):
        widths = {stem: width for stem, width, _ in choice}
        routed = [width for stem, width in widths.items() if not stem.endswith(SHARED)]
        if sum(width > 0 for width in routed) >= request.checkpoint.config.top_k:
            drafts.append(Draft(widths, {k: v for *_, formats in choice for k, v in formats.items()}))
    return drafts


def strongest(measures: Measures) -> str:
    """The expert whose loss would cost most, which has to stay."""
    routed = {stem: curve.errors[0] for stem, curve in measures.curves.items() if not stem.endswith(SHARED)}
    return max(routed, key=lambda stem: routed[stem])


@pytest.mark.parametrize(("seed", "kappa"), [(0, 0.5), (1, 4.0)])
def test_the_solution_is_the_best_of_all_choices(checkpoint: Checkpoint, kappa: float, seed: int) -> None:
    """No choice of a file as small is better, and none that leaves room for headers is either."""
    request = request_of(checkpoint)
    measures = random_measures(request, seed)
    program, stays = JointProgram(request, measures), strongest(measures)
    drafts = [draft for draft in all_drafts(request) if draft.widths[stays]]
    in_order = sorted(
        ((error_of(request, measures, draft, kappa), draft) for draft in drafts), key=lambda both: both[0]
    )
    least, most = program.least, size_of(request, in_order[0][1])
    beside = most - bytes_of(request, in_order[0][1])  # of headers and other weights, about
    for share in (0.1, 0.35, 0.7):
        limit = int(least + share * (most - least))
        found = program.solved(limit, kappa)
        error = error_of(request, measures, found, kappa)
        assert size_of(request, found) <= limit
        assert found.solution is not None and found.solution.error == pytest.approx(error, rel=1e-9)
        assert found.solution.bound <= error and found.solution.gap <= GAP + 1e-9
        best, roomy = (
            next(e for e, draft in in_order if bytes_of(request, draft) <= room and size_of(request, draft) <= allowed)
            for allowed in (limit, limit - SLACK)
            for room in [allowed - beside + SLACK]
        )
        assert best * (1 - 1e-9) <= error <= roomy * (1 + GAP) + 1e-12


def test_more_bytes_never_cost_more_error_and_all_of_them_cost_none(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint, allowed=("2", "3", "4", "8", "16"), protected=(), group_size=32)
    program = JointProgram(request, random_measures(request, 5))
    whole = size_of(request, Draft({stem: widths[-1] for stem, widths in request.ladders.items()}, {}))
    limits = [program.least + (whole + 8 * SLACK - program.least) * part // 8 for part in range(9)]
    errors = [program.solved(limit, 2.0).solution for limit in limits]
    found = [solution.error for solution in errors if solution]
    assert len(found) == 9
    assert all(later <= earlier * (1 + GAP) for earlier, later in itertools.pairwise(found))
    assert found[-1] == 0.0
    untouched = program.solved(limits[-1], 2.0)
    assert untouched.formats == {} and all(untouched.widths[stem] == w[-1] for stem, w in request.ladders.items())


def test_experts_of_least_loss_may_go_and_the_top_k_may_not(tmp_path: Path) -> None:
    pico = make_pico(hidden=64, input_size=4, depth=2, experts=4, top_k=2, widths=((64,) * 4,) * 2)
    request = request_of(opened(pico, tmp_path))
    for seed in range(4):
        measures = random_measures(request, seed)
        program = JointProgram(request, measures)
        draft = program.solved(program.least + SLACK, 1.0)
        for block in range(2):
            stems = [in_block(block, f"moe.experts.{e}") for e in range(4)]
            lost = {stem: measures.curves[stem].errors[0] for stem in stems}
            assert all(draft.widths[stem] for stem in sorted(stems, key=lambda stem: -lost[stem])[:2])
            assert draft.widths[in_block(block, SHARED)] > 0
        keeps = [block.keep for block in plan_of(request, draft, {}).stage(Experts).blocks]
        assert keeps == [tuple(e for e in range(4) if draft.widths[in_block(b, f"moe.experts.{e}")]) for b in range(2)]
        assert any(len(keep) == 2 for keep in keeps), "the least leaves no more than it has to"


def test_widths_that_are_fixed_stay(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    program = JointProgram(request, random_measures(request, 3))
    widths = {stem: offered[-2 if stem.endswith("1") else -1] for stem, offered in request.ladders.items()}
    whole = size_of(request, Draft(widths, {}))
    draft = program.solved(whole - 20_000, 1.0, widths)
    assert draft.widths == widths and draft.formats
    with pytest.raises(InfeasibleError, match="smallest file takes"):
        program.solved(program.least, 1.0, widths)


def test_experts_of_a_stack_have_one_width_and_one_format_a_matrix(tmp_path: Path) -> None:
    pico = make_pico(hidden=64, input_size=4, depth=2, experts=3, top_k=1, widths=((128,) * 3,) * 2)
    request = request_of(opened(pico, tmp_path), stacked=True, allowed=("2", "3", "8", "16"), group_size=32)
    free = request_of(request.checkpoint, allowed=("2", "3", "8", "16"), group_size=32)
    measures = random_measures(request, 1)
    program = JointProgram(request, measures)
    assert not any(0 in widths for widths in request.ladders.values()), "none goes"
    alone = JointProgram(free, random_measures(free, 1))
    for share in (0.1, 0.5):
        draft = program.solved(int(program.least * (1 + share)), 1.0)
        for block in range(2):
            stems = [in_block(block, f"moe.experts.{e}") for e in range(3)]
            assert len({draft.widths[stem] for stem in stems}) == 1
            for matrix in MATRICES:
                assert len({draft.formats.get(f"{stem}.{matrix}.weight") for stem in stems}) == 1
    assert alone.least <= program.least


def test_a_budget_below_the_smallest_file_says_what_that_takes(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    program = JointProgram(request, random_measures(request, 0))
    with pytest.raises(InfeasibleError) as caught:
        program.solved(program.least - 1, 1.0)
    assert f"{program.least - 1:,}" in str(caught.value) and f"{program.least:,}" in str(caught.value)
    smallest = program.solved(program.least, 1.0)
    assert size_of(request, smallest) == program.least


def test_the_smallest_file_is_that_of_all_choices(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    measures = random_measures(request, 7)
    drafts = [draft for draft in all_drafts(request) if draft.widths[strongest(measures)]]
    least = min(drafts, key=lambda draft: bytes_of(request, draft))
    assert JointProgram(request, measures).least == size_of(request, least)


def bytes_of(request: JointRequest, draft: Draft) -> int:
    """The bytes of the experts' weights."""
    total = 0
    for stem, width in draft.widths.items():
        for place, matrix in enumerate(MATRICES if width else ()):
            info = request.checkpoint.weights[f"{stem}.{matrix}.weight"].info
            narrow = narrowed_info(info, width, place == 2)
            total += bytes_of_weight(narrow.shape, narrow.dtype, draft.formats.get(info.name))
    return total


# plans


def test_plans_say_what_drafts_do(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    stems = list(request.ladders)
    assert stems[-1].endswith(SHARED)
    widths: Mapping[str, int] = {stems[0]: 0, stems[1]: 64, stems[2]: 128, stems[3]: 32}
    formats = {f"{stems[1]}.gate_proj.weight": "int3-g64"}
    plan = plan_of(request, Draft(widths, formats), {"tried_error": 0.25}, "f" * 64)
    (block,) = plan.stage(Experts).blocks
    assert (block.keep, block.widths, block.shared_width, block.router) == ((1, 2), (64, 128), 32, "ghost")
    assert plan.stage(Experts).selection == "elimination" and plan.stage(Formats).formats == formats
    assert plan.options["tried_error"] == 0.25 and plan.options["size"] == 1 and plan.profile == "f" * 64
    assert parse_plan(plan.document(), "here").digest == plan.digest
    two_stages = plan_of(request, Draft(widths, formats, energies=True), {})
    assert two_stages.stage(Experts).selection is None


def test_a_plan_that_narrows_nothing_names_no_widths(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    whole = {stem: widths[-1] for stem, widths in request.ladders.items()}
    (block,) = plan_of(request, Draft(whole, {}), {}).stage(Experts).blocks
    assert block.widths == () and block.shared_width is None and block.keep == (0, 1, 2)


def test_a_plan_without_formats_is_carried_out_as_those_with_formats_are(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    plan = plan_of(request, Draft({stem: widths[-1] // 2 for stem, widths in request.ladders.items()}, {}), {})
    assert plan.together is not None and parse_plan(plan.document(), "here").together == plan.together
    assert planned_output(checkpoint, plan).predicted_bytes(WHERE) > 0
    assert carrying_out(checkpoint, plan, 10**5)


def test_bytes_do_not_depend_on_figures_that_are_measured_later(checkpoint: Checkpoint) -> None:
    request = request_of(checkpoint)
    program = JointProgram(request, random_measures(request, 2))
    draft = program.solved(program.least + 30_000, 1.0)
    for tried in (0.0, 1e-300, 1 / 3, 12345.678):
        plan = replace(plan_of(request, draft, {"tried_error": tried}, "0" * 64), request="0" * 64)
        assert planned_output(request.checkpoint, plan).predicted_bytes(WHERE) == size_of(request, draft)
