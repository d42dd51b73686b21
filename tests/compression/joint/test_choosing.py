"""The search for a plan: κ on known curves, drafts in two stages, what trials keep, and what is left as it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compressing import calibrated, compress_on_few_tokens, opened, profile_of
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.apply import loop_name
from ditmoe_cli.compression.joint import choosing
from ditmoe_cli.compression.joint.carrying import Carried, HeldErrors
from ditmoe_cli.compression.joint.choosing import (
    FIRST_KAPPA,
    MOST_TRIED,
    Trials,
    _vertex,
    best_of_two_stages,
    best_within,
    least_kappa,
    measure,
    measures_of,
    settled_program,
)
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, JointRequest, plan_of, size_of
from ditmoe_cli.compression.plan import Experts
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.sensitivity import Sensitivities
from ditmoe_cli.compression.replay import eliminations
from ditmoe_cli.compression.replay.eliminations import Curves
from ditmoe_cli.files.names import SHARED
from ditmoe_cli.files.workfolder import WorkFolder, open_work
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]
WHERE = Output(Path("/nowhere/out.safetensors"))


# κ


def counted(error: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    tried: list[float] = []

    def watched(kappa: float) -> float:
        tried.append(kappa)
        return error(kappa)

    return watched, tried


@given(least=st.floats(-0.9, 2.9), steepness=st.floats(0.05, 3.0), floor=st.floats(1e-6, 10.0))
def test_the_least_of_a_parabola_is_found(least: float, steepness: float, floor: float) -> None:
    """On logarithmic scales, and two octaves around the first κ at least."""
    place = math.log2(FIRST_KAPPA) - 1.0 + least
    error, tried = counted(lambda kappa: floor * math.exp(steepness * (math.log2(kappa) - place) ** 2))
    found = least_kappa(error)
    assert math.log2(found) == pytest.approx(place, abs=1e-3)
    assert len(tried) == len(set(tried)) <= MOST_TRIED, "no κ twice"
    assert tried[0] == FIRST_KAPPA


@pytest.mark.parametrize(("exponent", "factor"), [(-1.0, 2.0 ** (MOST_TRIED - 1)), (1.0, 2.0 ** (2 - MOST_TRIED))])
def test_errors_that_only_fall_or_rise_lead_to_the_last_kappa(exponent: float, factor: float) -> None:
    error, tried = counted(lambda kappa: kappa**exponent)
    assert least_kappa(error) == FIRST_KAPPA * factor and len(tried) == MOST_TRIED
    steps = {abs(math.log2(after / before)) for before, after in itertools.pairwise(sorted(tried))}
    assert steps == {1.0}


def test_errors_that_do_not_depend_on_kappa_end_the_search() -> None:
    error, tried = counted(lambda _: 0.5)
    assert least_kappa(error) in tried and len(tried) <= MOST_TRIED
    assert math.isfinite(least_kappa(lambda _: 0.0)), "nor do errors of 0"


@given(st.lists(st.floats(1e-6, 1e3), min_size=MOST_TRIED, max_size=MOST_TRIED))
def test_whatever_the_errors_the_result_lies_among_what_was_tried(errors: list[float]) -> None:
    values = iter(errors)
    error, tried = counted(lambda _: next(values))
    found = least_kappa(error)
    least = [kappa for kappa, own in zip(tried, errors, strict=False) if own == min(errors[: len(tried)])]
    assert min(tried) <= found <= max(tried) and any(kappa / 2 <= found <= kappa * 2 for kappa in least)


def test_vertices() -> None:
    parabola = {place: math.exp((place - 1.25) ** 2) for place in (0.0, 1.0, 2.0)}
    assert _vertex(parabola) == pytest.approx(1.25)
    assert _vertex({0.0: 1.0, 1.0: 2.0}) == 0.0, "no value on its other side"
    assert _vertex({0.0: 3.0, 1.0: 2.0, 2.0: 1.0}) == 2.0
    assert _vertex({0.0: 1.0, 1.0: 0.0, 2.0: 1.0}) == 1.0, "0 has no logarithm"
    assert _vertex({0.0: 1.0, 1.0: 1.0, 2.0: 1.0}) in (0.0, 1.0, 2.0), "a flat one"


# measures


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        compress_on_few_tokens(patched)
        patched.setattr(eliminations, "ELIMINATION_TOKENS", 256)
        yield


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, experts=3, widths=((64,) * 3,) * 2)
    checkpoint = opened(pico, tmp_path_factory.mktemp("choosing"))
    return checkpoint, profile_of(checkpoint)


@pytest.fixture(scope="module")
def measured(asked: Given) -> tuple[Curves, Sensitivities]:
    return measure(request_of(asked[0]), calibrated(*asked))


@pytest.fixture(scope="module")
def program(asked: Given, measured: tuple[Curves, Sensitivities]) -> JointProgram:
    request = request_of(asked[0])
    return JointProgram(request, measures_of(request, *measured))


def request_of(checkpoint: Checkpoint, **fields: Any) -> JointRequest:
    candidates = Candidates(**{"allowed": ("3", "8", "16"), "group_size": 32, **fields})
    return JointRequest(checkpoint, WHERE, candidates, candidate_formats(checkpoint, candidates), {})


def program_with(asked: Given, **fields: Any) -> JointProgram:
    request = request_of(asked[0], **fields)
    return JointProgram(request, measures_of(request, *measure(request, calibrated(*asked))))


def test_measures_are_those_of_curves_and_of_formats(asked: Given, measured: tuple[Curves, Sensitivities]) -> None:
    request = request_of(asked[0])
    curves, sensitivities = measured
    measures = measures_of(request, curves, sensitivities)
    assert measures.curves.keys() == request.ladders.keys()
    for stem, curve in measures.curves.items():
        block, name = int(stem.split(".")[1]), stem.split(".", 2)[2]
        assert curve.widths == request.ladders[stem]
        assert curve.errors == tuple(float(curves[block][name].errors[width]) for width in curve.widths)
        assert curve.growth == tuple(float(curves[block][name].growth[width]) for width in curve.widths)
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            whole = sensitivities.errors[f"{stem}.{matrix}.weight"]
            own = {
                fmt: measures.amplification[block] * e for fmt, e in measures.formats[f"{stem}.{matrix}.weight"].items()
            }
            assert own == pytest.approx(whole)
    assert set(measures.dense) == set(request.dense)


@pytest.mark.parametrize(
    "fields",
    [
        {"floors": {"experts": 16, "shared": 16}},
        pytest.param({"protected": ("shared",)}, marks=pytest.mark.slow),
    ],
)
def test_structure_costs_something_where_no_format_is_offered_too(fields: dict[str, Any], asked: Given) -> None:
    """Else experts would go for nothing."""
    program = program_with(asked, **fields)
    assert all(amplification > 0 for amplification in program.measures.amplification)
    whole = size_of(program.request, Draft({stem: w[-1] for stem, w in program.request.ladders.items()}, {}))
    draft = program.solved(whole + 10**5, FIRST_KAPPA)
    assert all(draft.widths[stem] == widths[-1] for stem, widths in program.request.ladders.items())


def test_what_is_protected_keeps_its_neurons_and_its_format(asked: Given) -> None:
    for group, is_own in (("shared", True), ("experts", False)):
        program = program_with(asked, protected=(group,))
        draft = program.solved(program.least, FIRST_KAPPA)
        for stem, width in draft.widths.items():
            if stem.endswith(SHARED) == is_own:
                assert width == 64
                assert not any(name.startswith(f"{stem}.") for name in draft.formats)
        assert any(width != 64 for width in draft.widths.values()), "others change"


# plans in two stages


def test_drafts_in_two_stages_keep_to_the_ladder_and_to_their_share(
    asked: Given, program: JointProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(1.2 * program.least)
    drafts = {}
    for share in choosing.SHARES:
        monkeypatch.setattr(choosing, "SHARES", (share,))
        drafts[share] = best_of_two_stages(program, calibrated(*asked), limit)
    monkeypatch.undo()
    found = {share: draft for share, draft in drafts.items() if draft is not None}
    assert found and len(found) < len(drafts), "the widest do not fit in so few bytes"
    for share, draft in found.items():
        assert draft.energies and size_of(program.request, draft) <= limit
        assert all(width in program.request.ladders[stem] for stem, width in draft.widths.items())
        routed = {stem: width for stem, width in draft.widths.items() if not stem.endswith(SHARED)}
        assert all(routed.values()), "no expert goes"
        assert sum(routed.values()) == pytest.approx(share * 64 * len(routed), rel=0.15)
        assert all(width == 64 for stem, width in draft.widths.items() if stem not in routed)
        assert plan_of(program.request, draft, {}).stage(Experts).selection is None


def test_the_best_in_two_stages_is_that_of_least_predicted_error(
    asked: Given, program: JointProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(1.4 * program.least)
    best = best_of_two_stages(program, calibrated(*asked), limit)
    assert best is not None and best.solution is not None
    errors = []
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        monkeypatch.setattr(choosing, "SHARES", (share,))
        draft = best_of_two_stages(program, calibrated(*asked), limit)
        errors += [draft.solution.error] if draft is not None and draft.solution is not None else []
    assert best.solution.error == min(errors)
    monkeypatch.setattr(choosing, "SHARES", (0.9,))
    assert best_of_two_stages(program, calibrated(*asked), program.least) is None


# trials


@pytest.fixture
def work(tmp_path: Path) -> Any:
    with open_work(tmp_path / "out.safetensors", "key", lambda _: None) as folder:
        yield folder


@pytest.fixture
def trials_of(
    asked: Given, measured: tuple[Curves, Sensitivities], work: WorkFolder
) -> Callable[[JointProgram], Trials]:
    return lambda program: Trials(program.request, calibrated(*asked), measured[0], work)


def loops(work: WorkFolder) -> set[str]:
    """The names of the loops that the folder keeps pieces of."""
    return {path.name.split(".")[0] for path in work.folder.glob("block-*.safetensors")}


def test_only_the_weights_of_the_plan_that_is_carried_out_stay(
    asked: Given,
    trials_of: Callable[[JointProgram], Trials],
    work: WorkFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, _ = settled_program(request_of(asked[0]), calibrated(*asked), lambda _: 10**5)
    trials = trials_of(program)
    drafts = [program.solved(int(program.least * share), 4.0) for share in (1.1, 1.5)]
    errors = [trials.error(draft) for draft in drafts]
    assert loops(work) == set() and all(error > 0 for error in errors)
    assert trials.best.held.error == min(errors)
    tried = trials.carried_out(drafts[1])
    assert loops(work) == {loop_name(tried.plan)}
    monkeypatch.setattr(choosing, "carry_out_together", None)  # what was tried is not carried out again
    assert [trials.error(draft) for draft in drafts] == errors
    assert [trials_of(program).error(draft) for draft in drafts] == errors, "nor by a run that goes on"


def test_the_plan_of_least_tried_error_is_carried_out(
    program: JointProgram,
    trials_of: Callable[[JointProgram], Trials],
    work: WorkFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of two stages where it is better than all others, and one of the program where it is worse."""
    limit = int(1.4 * program.least)
    calls: list[float] = []
    for two_stages_error, energies in ((0.01, True), (0.9, False)):

        def carried(*given: Any, error: float = two_stages_error, **_: Any) -> Carried:
            calls.append(error if given[1].selection is None else 0.5)
            return Carried((), 0.5, (), HeldErrors((calls[-1],), (1.0,)))

        calls.clear()
        work.clear()
        monkeypatch.setattr(choosing, "carry_out_together", carried)
        monkeypatch.setattr(choosing, "WORTH_TRYING", math.inf)
        best = best_within(program, trials_of(program), limit)
        assert best.draft.energies is energies and size_of(program.request, best.draft) <= limit
        assert two_stages_error in calls and len(calls) <= MOST_TRIED + 2


def test_a_plan_without_formats_is_tried_and_carried_out_too(
    program: JointProgram, trials_of: Callable[[JointProgram], Trials], work: WorkFolder
) -> None:
    narrow = {stem: 64 if stem.endswith(SHARED) else 32 for stem in program.request.ladders}
    trials = trials_of(program)
    assert 0 < trials.error(Draft(narrow, {})) < 1
    tried = trials.carried_out(Draft(narrow, {}))
    assert 0 < tried.held.error < 1 and loops(work) == {loop_name(tried.plan)}
