"""What is asked of a compression: planners for targets, and what has no effect beside them."""

from __future__ import annotations

import pytest

from ditmoe_cli.api.compressing_requests import Goals, Loading, Retrained, Tying, compressing_of
from ditmoe_cli.api.notes import told_to
from ditmoe_cli.compression.joint.compressing import Compressing
from ditmoe_cli.compression.joint.for_upstream import ForUpstream
from ditmoe_cli.compression.planner import Planner
from ditmoe_cli.errors import UsageError
from ditmoe_cli.exporting.targets import TARGETS


def planner_for(target: str | None) -> tuple[Planner, list[str]]:
    said: list[str] = []
    with told_to(said.append):
        return compressing_of(Goals(ratio=0.25), Tying(), Retrained(), Loading(target)), said


@pytest.mark.parametrize("target", [None, *TARGETS])
def test_each_target_has_its_planner(target: str | None) -> None:
    planner, said = planner_for(target)
    if target == "upstream":
        assert isinstance(planner, ForUpstream) and planner.label == "compress-ratio0.25-upstream"
        return
    assert isinstance(planner, Compressing) and planner.candidates.target == target
    assert planner.label.endswith(target or "ratio0.25")
    assert said == (
        [f"⟨target⟩ {target} leaves nothing out: it holds whatever compress may choose"]
        if target == "diffusers"
        else []
    )


def test_one_target_takes_no_formats() -> None:
    with pytest.raises(UsageError, match="allow has no effect with target upstream, which takes no formats"):
        compressing_of(Goals(ratio=0.25), Tying(allow=("4",)), Retrained(), Loading("upstream"))
