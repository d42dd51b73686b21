"""Sizes against errors: plans within their sizes, errors that do not rise, marks of goals, trials and GPUs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from compressing import opened
from conftest import make_pico

from ditmoe_cli.compression.joint import size_curve as curves
from ditmoe_cli.compression.joint.compressing import unmeasured
from ditmoe_cli.compression.joint.expert_options import WidthCurve
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, JointRequest, Measures
from ditmoe_cli.compression.joint.size_curve import SizeCurve, grid, middle_of, size_curve
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import CompressionPlan, Experts, Formats
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import quantized_members
from ditmoe_cli.model.gpu_memory import guided_memory

KAPPA, TRIED = 4.0, 0.03


def random_measures(request: JointRequest, seed: int) -> Measures:
    """Errors that fall with widths and bits."""
    draw = random.Random(seed).uniform
    plain = unmeasured(request)
    widths = {
        stem: WidthCurve(c.widths, (*sorted((draw(0.1, 9) for _ in c.widths[1:]), reverse=True), 0.0), c.growth)
        for stem, c in plain.curves.items()
    }

    def of_formats(offered: tuple[str | None, ...]) -> dict[str, float]:
        formats = [fmt for fmt in offered if fmt]
        return dict(zip(formats, sorted((draw(0.01, 5) for _ in formats), reverse=True), strict=True))

    formats = {name: of_formats(offered) for name, offered in request.offered.items()}
    return Measures(widths, formats, formats, tuple(draw(0.5, 2) for _ in plain.amplification))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> JointProgram:
    checkpoint = opened(make_pico(experts=3, hidden=64), tmp_path_factory.mktemp("curve"))
    candidates = Candidates(("2", "4", "8", "16"), 64, symmetric=False)
    output = Output(checkpoint.path.parent / "small.safetensors")
    request = JointRequest(checkpoint, output, candidates, candidate_formats(checkpoint, candidates), {"size": 1})
    return JointProgram(request, random_measures(request, 1))


@pytest.fixture(scope="module")
def curve_of(program: JointProgram) -> Callable[..., SizeCurve]:
    def made(goal: int | None = None, tried: Callable[[Draft], float] = lambda _: TRIED) -> SizeCurve:
        return size_curve(program, KAPPA, tried, "0" * 64, goal)

    return made


@pytest.fixture(scope="module")
def seen() -> list[Draft]:
    """The drafts that the usual curve tries."""
    return []


@pytest.fixture(scope="module")
def usual(curve_of: Callable[..., SizeCurve], seen: list[Draft]) -> SizeCurve:
    """The curve without a goal."""

    def tried(draft: Draft) -> float:
        seen.append(draft)
        return TRIED

    return curve_of(tried=tried)


def test_a_grid_is_logarithmic_from_the_least_to_the_most() -> None:
    sizes = grid(1000, 64_000, 7)
    assert sizes == [1000, 2000, 4000, 8000, 16_000, 32_000, 64_000] and middle_of(sizes) == 8000
    assert grid(5, 7, 13) == [5, 6, 7]


def test_larger_sizes_have_less_error_and_plans_within_them(usual: SizeCurve, program: JointProgram) -> None:
    curve, request = usual, program.request
    before = request.checkpoint.header.file_bytes
    assert len(curve.points) >= 12 and curve.bytes_before == before
    assert curve.points[0].size == program.least
    for point in curve.points:
        assert point.bytes == planned_output(request.checkpoint, point.plan).predicted_bytes(request.output)
        assert point.bytes <= point.size <= before
        assert point.plan.options["size"] == point.size
    for smaller, larger in zip(curve.points, curve.points[1:], strict=False):
        assert smaller.size < larger.size
        assert smaller.predicted_error > larger.predicted_error
        assert smaller.expected_error > larger.expected_error


def test_expected_errors_are_predicted_ones_scaled_to_the_one_that_was_tried(
    usual: SizeCurve, seen: list[Draft]
) -> None:
    curve = usual
    (draft,) = seen
    assert draft.solution is not None and draft.solution.error == curve.tried.predicted_error
    assert curve.tried.expected_error == pytest.approx(TRIED)
    for point in curve.points:
        assert point.expected_error == pytest.approx(point.predicted_error * TRIED / curve.tried.predicted_error)
    assert 0 < curve.points.index(curve.tried) < len(curve.points) - 1


def test_a_size_that_is_asked_for_is_a_point(
    curve_of: Callable[..., SizeCurve], usual: SizeCurve, program: JointProgram
) -> None:
    before = program.request.checkpoint.header.file_bytes
    goal = int((program.least * before) ** 0.5) + 1000
    (marked,) = (point for point in curve_of(goal).points if point.is_goal)
    assert marked.size == goal
    assert not any(point.is_goal for point in usual.points)
    with pytest.raises(InfeasibleError):
        curve_of(program.least - 1)


def test_a_gpu_is_named_at_the_largest_plan_that_it_holds(
    curve_of: Callable[..., SizeCurve], usual: SizeCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = [point.memory for point in usual.points]
    room = (2 * memories[0] + memories[-1]) // 3
    monkeypatch.setattr(curves, "GIGABYTE", 1)
    monkeypatch.setattr(curves, "GPUS", (memories[0] - 1, room, max(memories)))
    points = curve_of().points
    named = [point for point in points if point.gpus]
    assert [point.gpus for point in named] == [(room,)], "one holds none, one holds all"
    assert named[0].memory <= room < points[points.index(named[0]) + 1].memory
    assert len(points) > len(memories), "it has a plan of its own"


def test_memory_counts_packed_weights_as_stored_and_others_in_half_precision(program: JointProgram) -> None:
    checkpoint = program.request.checkpoint
    plain = guided_memory([w.info for w in checkpoint.weights.values()], checkpoint.config)
    name = "blocks.0.moe.experts.0.up_proj.weight"
    info = checkpoint.weights[name].info
    plan = CompressionPlan("quantize", checkpoint.fingerprint, stages=(Formats({name: "int8-g64"}),))
    planned = planned_output(checkpoint, plan)
    packed = guided_memory(planned.infos, planned.config)
    stored = sum(member.nbytes for member in quantized_members(info, "int8-g64"))
    assert packed - plain == stored - 2 * info.numel + 4 * info.numel, "it is packed, and one matrix stands unpacked"


def test_a_plan_that_changes_nothing_has_no_stages(program: JointProgram) -> None:
    """Where the checkpoint's own size holds everything as it is, as of pickles, which take more bytes than tensors."""
    solving = curves._Solving(program, KAPPA, "0" * 64)
    largest = solving.at(2 * program.request.checkpoint.header.file_bytes)
    assert largest.plan.stages == () and largest.error == 0
    assert solving.at(program.least).plan.stage(Experts).selection == "elimination"
