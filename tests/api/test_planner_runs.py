"""The way from a planner to its plan: what is asked of it, in which order, and when a profile is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from compressing import opened, profile_of
from conftest import make_pico

from ditmoe_cli.api.planner_runs import chosen, foreseen, prepared
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.planner import Planner, Work
from ditmoe_cli.errors import InfeasibleError, OutputExistsError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.profile_search import ProfileRequest


@dataclass(frozen=True)
class Scripted(Planner):
    """A planner that writes down what it is asked."""

    needs_profile: bool = True
    fails: bool = False
    asked: list[str] = field(default_factory=list)
    command: ClassVar[str] = "prune"
    label: ClassVar[str] = "scripted"

    def check(self, work: Work) -> None:
        del work
        self.asked.append("check")
        if self.fails:
            raise InfeasibleError("it cannot be")

    def warnings(self, profile: RoutingProfile) -> Iterable[str]:
        del profile
        yield "mind the gap"

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        self.asked.append("plan")
        return CompressionPlan("prune", work.checkpoint.fingerprint, profile.digest if profile else None)

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        self.asked.append("undecided")
        return CompressionPlan("prune", checkpoint.fingerprint, options={"undecided": True})

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
        del checkpoint, plan
        return {}


def device() -> str:
    raise AssertionError("no device is needed where nothing is measured")


@pytest.fixture
def work(tmp_path: Path) -> Work:
    (tmp_path / "out").mkdir()
    return Work(opened(make_pico(), tmp_path), Output(tmp_path / "out" / "o.safetensors"), device)


def choose(
    planner: Planner, work: Work, wanted: ProfileRequest, dry_run: bool
) -> tuple[CompressionPlan, RoutingProfile | None]:
    """The plan and the profile that it rests on, as commands get them."""
    work, basis = prepared(planner, work, wanted)
    if dry_run:
        return foreseen(planner, work, basis), basis.profile if basis else None
    with chosen(planner, work, basis) as choice:
        return choice.plan, choice.profile


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_planner_without_need_gets_no_profile(dry_run: bool, work: Work) -> None:
    planner = Scripted(needs_profile=False)
    plan, profile = choose(planner, work, ProfileRequest(Path("nowhere.safetensors")), dry_run)
    assert planner.asked == ["check", "plan"] and plan.profile is None and profile is None


def test_a_dry_run_without_a_profile_leaves_the_plan_open(work: Work) -> None:
    planner = Scripted()
    plan, profile = choose(planner, work, ProfileRequest(beside=work.output.path.parent), dry_run=True)
    assert planner.asked == ["check", "undecided"] and not plan.decided and profile is None


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_profile_that_is_given_decides(dry_run: bool, work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    planner, given = Scripted(), profile_of(work.checkpoint)
    plan, profile = choose(planner, work, ProfileRequest(given.path), dry_run)
    assert planner.asked == ["check", "plan"] and plan.profile == given.digest
    assert profile is not None and profile.path == given.path
    assert ("warning: mind the gap" in capsys.readouterr().err) is not dry_run


def test_what_cannot_be_done_is_refused_before_a_profile_is_looked_for(work: Work) -> None:
    planner = Scripted(fails=True)
    with pytest.raises(InfeasibleError, match="it cannot be"):
        choose(planner, work, ProfileRequest(Path("nowhere.safetensors")), dry_run=False)
    assert planner.asked == ["check"]


def test_an_output_that_exists_is_refused_before_anything_is_profiled(work: Work) -> None:
    work.output.path.write_bytes(b"old")
    planner = Scripted()
    with pytest.raises(OutputExistsError):
        choose(planner, work, ProfileRequest(beside=work.output.path.parent), dry_run=False)
    assert planner.asked == ["check"] and [path.name for path in work.output.path.parent.iterdir()] == ["o.safetensors"]
