"""Which blocks streams with errors start at, and what is interpolated between them."""

from __future__ import annotations

import pytest

from ditmoe_cli.compression.replay.amplification import anchors, interpolated
from ditmoe_cli.compression.replay.local_errors import place_of, positions


def test_few_blocks_all_have_streams_and_many_share_four() -> None:
    assert anchors([3, 1, 1, 0, 2]) == [0, 1, 2, 3]
    assert anchors(range(28)) == [0, 9, 18, 27]
    assert anchors(range(5, 17)) == [5, 9, 12, 16]
    assert anchors([]) == []


def test_between_anchors_the_geometric_mean_is_taken() -> None:
    known = {0: 16.0, 4: 1.0, 8: 0.0}
    assert [interpolated(known, i) for i in (0, 4, 8)] == [16.0, 1.0, 0.0]
    assert interpolated(known, 2) == pytest.approx(4.0) and interpolated(known, 1) == pytest.approx(8.0)
    assert interpolated(known, 6) == pytest.approx(0.5), "linear towards 0"


def test_each_weight_has_its_place() -> None:
    places = {
        "blocks.3.attn.qkv.weight": (3, "attention"),
        "blocks.0.adaLN_modulation.1.weight": (0, "modulation"),
        "blocks.7.moe.experts.2.up_proj.weight": (7, "mixture"),
        "t_embedder.mlp.0.weight": None,
        "final_layer.linear.weight": None,
    }
    assert {name: place_of(name) for name in places} == places


def test_positions_are_spread_over_the_image_and_all_of_a_small_one() -> None:
    assert positions(16).tolist() == list(range(16))
    some = positions(256)
    assert len(set(some.tolist())) == 64 and some.tolist() == sorted(some.tolist())
    assert {int(i) % 16 // 4 for i in some} == {0, 1, 2, 3} == {int(i) // 64 for i in some}
