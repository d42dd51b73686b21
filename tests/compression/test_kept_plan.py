"""Plans that are kept: one that is chosen anew goes with none of the pieces of another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditmoe_cli.compression.kept_plan import keep_plan, kept_plan
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.files.workfolder import open_work, work_key

KEY = work_key({"request": "a"})


def test_blocks_of_a_plan_that_is_lost_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "x", KEY, print) as work:
        keep_plan(work, CompressionPlan("quantize", "source", options={"budget": 1}))
        work.loop("block", 2).keep(0, {"w": torch.zeros(2)})
        raise KeyboardInterrupt
    with open_work(tmp_path / "x", KEY, print) as work:
        assert work.loop("block", 2).start == 1 and kept_plan(work) is not None
        work.drop("plan")
        assert kept_plan(work) is None
        other = CompressionPlan("quantize", "source", options={"budget": 2})
        keep_plan(work, other)
        assert kept_plan(work) == other
        assert work.loop("block", 2).start == 0
