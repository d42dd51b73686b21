"""Upstream names: taken apart, put together, unwrapped, sorted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.files.names import NameParts, in_block, in_expert, natural_key, split_name, unwrapped

NUMBERS = st.integers(0, 1000)


@given(block=NUMBERS, expert=NUMBERS)
def test_expert_names_round_trip(block: int, expert: int) -> None:
    name = in_expert(block, expert, "up_proj.weight")
    assert split_name(name) == NameParts(block, expert, "up_proj.weight")
    assert split_name(in_block(block, "attn.qkv.bias")) == NameParts(block, None, "attn.qkv.bias")


def test_one_and_ten_are_two_experts() -> None:
    assert split_name("blocks.1.moe.experts.10.up_proj.weight").expert == 10
    assert split_name("blocks.10.moe.experts.1.up_proj.weight") == NameParts(10, 1, "up_proj.weight")


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.moe.shared_experts.up_proj.weight",  # contains "experts."
        "blocks.0.moe.experts.x.up_proj.weight",
        "blocks.0.moe.experts.1",
    ],
)
def test_what_is_no_routed_expert(name: str) -> None:
    assert split_name(name) == NameParts(0, None, name.removeprefix("blocks.0."))


@pytest.mark.parametrize("name", ["pos_embed", "final_layer.linear.weight", "blocks.x.y", "my.blocks.0.a"])
def test_what_is_in_no_block(name: str) -> None:
    assert split_name(name) == NameParts(None, None, name)


WRAPPERS = st.lists(st.sampled_from(["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]))


@given(before=WRAPPERS, inside=WRAPPERS)
def test_wrappers_come_off_wherever_they_stand(pico: Callable[..., Any], before: list[str], inside: list[str]) -> None:
    for name in pico().state:
        first, *rest = name.split(".")
        stored = [*before, first, *inside, *rest]
        found, parts = unwrapped(".".join(stored))
        assert found == name
        assert [stored[index] for index in parts] == name.split(".")


def test_a_name_of_wrappers_alone_stays() -> None:
    assert unwrapped("module") == ("module", [0])
    assert unwrapped("model.a")[0] == "model.a"


@given(numbers=st.lists(NUMBERS, unique=True))
def test_natural_order_is_numeric(numbers: list[int]) -> None:
    names = [in_expert(2, n, "up_proj.weight") for n in numbers]
    assert sorted(names, key=natural_key) == [in_expert(2, n, "up_proj.weight") for n in sorted(numbers)]


@given(names=st.lists(st.text(alphabet="a.1²٣½-", max_size=6) | st.text(max_size=6)))
def test_any_names_can_be_sorted(names: list[str]) -> None:
    assert sorted(sorted(names, key=natural_key)) == sorted(names)
