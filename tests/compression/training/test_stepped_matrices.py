"""Which weights step as matricesand what that takes."""

from __future__ import annotations

import pytest

from ditmoe_cli.compression.training.stepped_matrices import matrix_flops, stacked_matrices


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("blocks.3.attn.qkv.weight", (192, 64), 3),
        ("blocks.3.adaLN_modulation.1.weight", (384, 64), 6),
        ("blocks.3.attn.proj.weight", (64, 64), 1),
        ("blocks.3.moe.experts.10.down_proj.weight", (64, 17), 1),
        ("blocks.3.moe.experts.10.down_proj.weight", (64, 15), 0),
        ("blocks.3.moe.shared_experts.up_proj.weight", (128, 64), 1),
        ("blocks.3.moe.gate.weight", (16, 64), 0),
        ("blocks.3.moe.constants", (16, 64), 0),
        ("blocks.3.attn.qkv.bias", (192,), 0),
        ("final_layer.linear.weight", (32, 64), 0),
        ("y_embedder.embedding_table.weight", (1001, 64), 0),
    ],
)
def test_matrices_of_blocks_step_so(name: str, shape: tuple[int, ...], count: int) -> None:
    assert stacked_matrices(name, shape) == count


def test_operations_by_hand() -> None:
    """Five rounds of X Xᵀ, A² and B X: 2 m² n + 2 m³ + 2 m² n each."""
    assert matrix_flops("blocks.0.attn.proj.weight", (64, 64)) == 5 * 6 * 64**3
    assert matrix_flops("blocks.0.attn.qkv.weight", (192, 64)) == 3 * 5 * 6 * 64**3
    wide, high = (
        matrix_flops(f"blocks.0.moe.experts.0.{n}.weight", s) for n, s in (("a", (32, 256)), ("b", (256, 32)))
    )
    assert wide == high == 5 * (4 * 32**2 * 256 + 2 * 32**3)
    assert matrix_flops("final_layer.linear.weight", (64, 64)) == 0
