"""The model of a guide: another routing that shares weights, or what is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import Pico

from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.diffusion.weak_models import weak_model
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.rerouting import RankedRouter


def test_a_checkpoint_is_loaded_and_a_routing_is_made(pico: Callable[..., Pico]) -> None:
    model, other = pico().model(), pico(seed=1).model()
    assert weak_model(model, Guide("f" * 64, 0.5), lambda: other) is other
    for routing, rank in (("top1", 0), ("rank2", 1)):
        made = weak_model(model, Guide(routing, 0.5), lambda: pytest.fail("loaded"))
        assert isinstance(made, DiTMoE)
        assert [block.moe.gate.rank for block in made.blocks] == [rank] * 2
        assert all(isinstance(block.moe.gate, RankedRouter) for block in made.blocks)


def test_nothing_is_loaded_where_nothing_guides(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    assert weak_model(model, None, lambda: pytest.fail("loaded")) is None
    assert weak_model(model, Guide("f" * 64, 0.0), lambda: pytest.fail("loaded")) is None
