"""Which groups each weight of a model belongs to."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_pico

from ditmoe_cli.compression.training.trained_groups import GROUPS, trained_groups
from ditmoe_cli.model.config import expected_weights

EXTENDED: dict[str, Any] = {
    "expert_of": ((0, 1, 2, 3, -2, -3),) * 2,
    "extras": {"constants": 2, "rank": 3, "residual_constant": True, "residual_linear": True},
}
BY_HAND = {
    "blocks.1.moe.gate.weight": {"router"},
    "blocks.0.moe.gate.expert_of": set(),
    "pos_embed": set(),
    "blocks.0.moe.experts.3.up_proj.weight": {"experts"},
    "blocks.0.moe.experts.3.gate_proj.weight": {"experts"},
    "blocks.0.moe.experts.13.down_proj.weight": {"experts", "down"},
    "blocks.0.moe.shared_experts.down_proj.weight": {"shared"},
    "blocks.0.moe.constants": {"experts", "down"},
    "blocks.0.moe.constants_up": {"experts", "down"},
    "blocks.0.moe.constants_down": {"experts", "down"},
    "blocks.0.moe.residual_constant": {"experts", "down"},
    "blocks.0.moe.residual_linear": {"experts", "down"},
    "blocks.0.attn.qkv.weight": {"attention"},
    "blocks.0.attn.q_norm.weight": {"norms"},
    "blocks.0.attn.k_norm.bias": {"norms"},
    "blocks.0.adaLN_modulation.1.bias": {"norms"},
    "final_layer.adaLN_modulation.1.weight": {"norms"},
    "final_layer.linear.bias": {"embedders"},
    "x_embedder.proj.weight": {"embedders"},
    "t_embedder.mlp.2.weight": {"embedders"},
    "y_embedder.embedding_table.weight": {"embedders"},
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_groups_of_a_weight(name: str) -> None:
    assert trained_groups(name) == BY_HAND[name]


@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("options", [{}, EXTENDED], ids=["upstream's", "extended"])
def test_every_weight_but_maps_and_positions_has_a_group(attention: str, options: dict[str, Any]) -> None:
    names = expected_weights(make_pico(attention=attention, **options).config)
    without = {name for name in names if not trained_groups(name)}
    assert without == {name for name in names if name == "pos_embed" or name.endswith("expert_of")}
    assert all(trained_groups(name) <= set(GROUPS) for name in names)
    assert set(GROUPS) == set().union(*map(trained_groups, names)), "no group is empty"
    assert {"constants", "constants_up", "residual_linear"} <= {n.split(".")[-1] for n in names} or not options
