"""What a block becomes, told from headers: what rows select, which stay, and of which shapes the result is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compressing import opened, quantised
from conftest import Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.block_layout import BlockLayout, block_layouts
from ditmoe_cli.compression.computed import expert_map_bytes
from ditmoe_cli.compression.plan import BlockPlan, Experts, Repair
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import BlockConfig, parse_expert_map

EXPERTS = 5
ROWS = 5


def pico(selects: Sequence[int] = tuple(range(ROWS)), **options: Any) -> Pico:
    """One block whose rows select `selects`."""
    experts = max(selects) + 1
    return make_pico(
        hidden=16, input_size=4, depth=1, widths=((24,) * experts,), expert_of=(tuple(selects),), **options
    )


PLAIN = make_pico(hidden=16, input_size=4, depth=1, widths=((24,) * EXPERTS,))
GHOSTED = pico((0, -1, 1, 2, -1))
MERGED = pico((0, 0, 1, 2, 2))
CONSTANT = pico((0, -2, 1, 2, -3), extras={"constants": 2, "rank": 1})
RESIDUAL = make_pico(
    hidden=16,
    input_size=4,
    depth=1,
    widths=((24,) * EXPERTS,),
    extras={"residual_constant": True, "residual_linear": True},
)


def layout(
    source: Pico | Checkpoint,
    where: Path,
    keep: Sequence[int],
    router: str,
    *,
    repair: Repair | None = None,
    **more: Any,
) -> BlockLayout:
    checkpoint = opened(source, where) if isinstance(source, Pico) else source
    block = BlockPlan(tuple(keep), router, **more)  # type: ignore[arg-type]
    (found,) = block_layouts(checkpoint, Experts((block,), "m-smoe", repair))
    return found


ALL = tuple(range(ROWS))
CASES: dict[str, tuple[Pico, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "ghost": (PLAIN, {"keep": (0, 2, 4), "router": "ghost"}, ALL, (0, -1, 1, -1, 2)),
    "mass": (PLAIN, {"keep": (0, 2, 4), "router": "mass"}, ALL, (0, -1, 1, -1, 2)),
    "slice": (PLAIN, {"keep": (0, 2, 4), "router": "slice"}, (0, 2, 4), (0, 1, 2)),
    "constants": (PLAIN, {"keep": (0, 2, 4), "router": "ghost", "constants": True}, ALL, (0, -2, 1, -3, 2)),
    "merged": (PLAIN, {"keep": (0, 2), "router": "ghost", "merged": ((1, 0), (3, 2), (4, 0))}, ALL, (0, 0, 1, 1, 0)),
    "merged, sliced": (
        PLAIN,
        {"keep": (1, 4), "router": "slice", "merged": ((0, 4), (2, 1), (3, 4))},
        (1, 4),
        (0, 1),
    ),
    "merged and dropped": (PLAIN, {"keep": (0, 4), "router": "ghost", "merged": ((1, 0),)}, ALL, (0, 0, -1, -1, 1)),
    "merged and constant": (
        PLAIN,
        {"keep": (0, 4), "router": "ghost", "merged": ((1, 0),), "constants": True},
        ALL,
        (0, 0, -2, -3, 1),
    ),
    "ghosts stay": (GHOSTED, {"keep": (0, 2), "router": "ghost"}, ALL, (0, -1, -1, 1, -1)),
    "ghosts go": (GHOSTED, {"keep": (0, 2), "router": "slice"}, (0, 3), (0, 1)),
    "ghosts do not become constants": (
        GHOSTED,
        {"keep": (0, 2), "router": "ghost", "constants": True},
        ALL,
        (0, -1, -2, 1, -1),
    ),
    "ghosts while merging": (GHOSTED, {"keep": (1, 2), "router": "ghost", "merged": ((0, 2),)}, ALL, (1, -1, 0, 1, -1)),
    "ghosts while merging, sliced": (GHOSTED, {"keep": (1, 2), "router": "slice", "merged": ((0, 2),)}, (2, 3), (0, 1)),
    "rows that share an expert": (MERGED, {"keep": (0, 2), "router": "ghost"}, ALL, (0, 0, -1, 1, 1)),
    "rows that share an expert, sliced": (MERGED, {"keep": (0, 2), "router": "slice"}, (0, 1, 3, 4), (0, 0, 1, 1)),
    "rows that share a constant": (
        MERGED,
        {"keep": (0, 1), "router": "ghost", "constants": True},
        ALL,
        (0, 0, 1, -2, -2),
    ),
    "constants stay": (CONSTANT, {"keep": (0, 2), "router": "ghost"}, ALL, (0, -2, -1, 1, -3)),
    "constants are not sliced": (CONSTANT, {"keep": (0, 2), "router": "slice"}, (0, 1, 3, 4), (0, -2, 1, -3)),
    "narrowed": (PLAIN, {"keep": ALL, "router": "ghost", "widths": (8,) * 5}, ALL, ALL),
}


@pytest.mark.parametrize("case", CASES)
def test_what_rows_select(case: str, tmp_path: Path) -> None:
    source, plan, rows, selects = CASES[case]
    found = layout(source, tmp_path, **plan)
    assert (found.rows, found.selects) == (rows, selects)
    old, new = source.config.blocks[0], found.config
    assert new.router_rows == len(rows)
    assert len(new.expert_widths) == len(plan["keep"]) == len(found.members)
    assert new.mapped == (selects != tuple(range(len(plan["keep"]))))
    assert new.mass == (plan["router"] == "mass")
    assert new.constants == old.constants + (len(found.dropped) if plan.get("constants") else 0)
    assert new.rank == old.rank
    assert found.rebuilt == any(name in plan for name in ("constants", "merged", "widths"))
    assert sorted([*found.dropped, *(e for group in found.members for e in group)]) == list(
        range(len(old.expert_widths))
    )


class Headers:
    """As much of a checkpoint of one block as a layout looks at: rows may select one of 4 experts."""

    def __init__(self, selects: tuple[int, ...]) -> None:
        self.config, self.weights, self.selects = pico((0, 1, 2, 3), top_k=1).config, {}, selects

    def expert_map(self, block: int) -> tuple[int, ...]:
        assert block == 0
        return self.selects


@given(
    selects=st.lists(st.integers(-1, 3), min_size=4, max_size=7),
    keep=st.sets(st.integers(0, 3), min_size=1),
    router=st.sampled_from(["ghost", "mass"]),
    constants=st.booleans(),
    data=st.data(),
)
def test_rows_that_stay_select_what_became_of_what_they_selected(
    selects: list[int], keep: set[int], router: str, constants: bool, data: st.DataObject
) -> None:
    selects = [*selects, 0, 1, 2, 3]
    kept, others = sorted(keep), [e for e in range(4) if e not in keep]
    merged = tuple((e, data.draw(st.sampled_from(kept))) for e in others if data.draw(st.booleans()))
    dropped = [e for e in others if e not in dict(merged)]
    block = BlockPlan(tuple(kept), router, merged=merged, constants=constants)  # type: ignore[arg-type]
    (found,) = block_layouts(Headers(tuple(selects)), Experts((block,), "m-smoe"))  # type: ignore[arg-type]
    assert found.rows == tuple(range(len(selects)))
    assert found.dropped == tuple(dropped)
    for old, new in zip(selects, found.selects, strict=True):
        if old == -1:
            assert new == -1
        elif old in dropped:
            assert new == (-2 - dropped.index(old) if constants else -1)
        else:
            assert old in found.members[new]
    assert [members[0] for members in found.members] == kept
    assert {e: members[0] for members in found.members for e in members[1:]} == dict(merged)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8))
def test_maps_are_written_as_they_are_read(selects: list[int]) -> None:
    assert parse_expert_map(memoryview(expert_map_bytes(selects))) == tuple(selects)


@pytest.mark.parametrize("repair", [Repair(), Repair(constant=False), Repair(linear=False), None])
def test_residual_maps_come_with_a_repair_where_experts_went(repair: Repair | None, tmp_path: Path) -> None:
    checkpoint = opened(PLAIN, tmp_path)
    some, everything = (
        layout(checkpoint, tmp_path, keep, "ghost", repair=repair).config for keep in ((0, 1), range(EXPERTS))
    )
    assert (some.residual_constant, some.residual_linear) == (
        (repair.constant, repair.linear) if repair else (False, False)
    )
    assert everything == PLAIN.config.blocks[0]


def test_residual_maps_that_are_there_stay(tmp_path: Path) -> None:
    checkpoint = opened(RESIDUAL, tmp_path)
    for repair in (None, Repair(constant=False, linear=False)):
        found = layout(checkpoint, tmp_path, (0, 1), "slice", repair=repair).config
        assert found.residual_constant and found.residual_linear


def test_the_mass_mode_stays_once_it_is_there(tmp_path: Path) -> None:
    massive = pico((0, -1, 1, 2, -1), extras={"mass": True})
    for router in ("ghost", "slice", "mass"):
        (tmp_path / router).mkdir()
        assert layout(massive, tmp_path / router, (0, 2), router).config.mass
    assert not layout(PLAIN, tmp_path, range(EXPERTS), "mass").config.mass, (
        "with nothing dropped there is no mass to add"
    )


def test_widths_follow_the_plan_and_the_kept(tmp_path: Path) -> None:
    uneven = make_pico(hidden=16, input_size=4, depth=1, widths=((8, 16, 24, 32),), shared_width=20)
    checkpoint = opened(uneven, tmp_path)
    assert layout(checkpoint, tmp_path, (1, 3), "slice").config == BlockConfig(2, (16, 32), 20)
    narrow = layout(checkpoint, tmp_path, (1, 3), "slice", widths=(9, 10), shared_width=7)
    assert narrow.config == BlockConfig(2, (9, 10), 7)
    for more, said in (
        ({"widths": (17, 8)}, "17 neurons of expert 1 of block 0, which has 16"),
        ({"shared_width": 21}, "21 neurons of the shared expert of block 0, which has 20"),
    ):
        with pytest.raises(BadInputError, match=said):
            layout(checkpoint, tmp_path, (1, 3), "slice", **more)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"keep": (0, 5)}, "expert 5 of block 0, which has 5 experts"),
        ({"keep": (0, 1), "merged": ((7, 0),)}, "expert 7 of block 0, which has 5 experts"),
    ],
)
def test_experts_that_are_not_there(plan: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=said):
        layout(PLAIN, tmp_path, router="ghost", **plan)


def test_fewer_experts_than_top_k_need_rows_that_share_one(tmp_path: Path) -> None:
    checkpoint = opened(PLAIN, tmp_path)
    for router in ("ghost", "mass", "slice"):
        with pytest.raises(InfeasibleError, match=r"keep 1 of 5 experts.*top-2"):
            layout(checkpoint, tmp_path, (3,), router)
    together = {"merged": tuple((e, 3) for e in (0, 1, 2, 4))}
    assert layout(checkpoint, tmp_path, (3,), "ghost", **together).selects == (0,) * 5
    with pytest.raises(InfeasibleError, match="top-2"):
        layout(checkpoint, tmp_path, (3,), "slice", **together)
    constants = layout(checkpoint, tmp_path, (3,), "ghost", constants=True)
    assert constants.selects == (-2, -3, -4, 0, -5), "a slot may go to a constant"


def test_constants_are_not_replaced_by_constants(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="has constants already"):
        layout(CONSTANT, tmp_path, (0, 2), "ghost", constants=True)


@pytest.mark.parametrize(
    "more",
    [{"repair": Repair()}, {"merged": ((1, 0),)}, {"widths": (8, 8)}, {"shared_width": 8}, {"constants": True}],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_packed_is_not_computed(bits: int, more: dict[str, Any], tmp_path: Path) -> None:
    packed = quantised(opened(PLAIN, tmp_path), bits, tmp_path / "packed.safetensors")
    with pytest.raises(BadInputError, match=r"packed\.safetensors: 'blocks\.0\.moe.*already.*refit=False"):
        layout(packed, tmp_path, (0, 4), "ghost", **more)
    assert layout(packed, tmp_path, (0, 4), "ghost").selects == (0, -1, -1, -1, 1)


def test_only_the_blocks_that_are_computed_have_to_be_plain(tmp_path: Path) -> None:
    two = make_pico(hidden=16, input_size=4, widths=((24,) * 3,) * 2)
    packed = quantised(opened(two, tmp_path), 8, tmp_path / "packed.safetensors")
    copied = BlockPlan((0, 1), "ghost")
    assert [found.rebuilt for found in block_layouts(packed, Experts((copied, copied)))] == [False, False]
    with pytest.raises(BadInputError, match=r"blocks\.1\."):
        block_layouts(packed, Experts((copied, replace(copied, constants=True))))
