"""Configurations of upstream models, and headers of whole models."""

from __future__ import annotations

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, expected_weights


def infos_of(config: DiTMoEConfig) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, "I32" if name.endswith("expert_of") else "F32", shape)
        for name, shape in expected_weights(config).items()
    }


def upstream(depth: int, width: int, heads: int, experts: int, attention: str) -> DiTMoEConfig:
    block = BlockConfig(experts, (4 * width,) * experts, 2 * width)
    flavour = "flash" if attention == "flash" else "timm"
    return DiTMoEConfig(32, 2, 4, 8, width, depth, heads, 1000, 2, flavour, "rf", (block,) * depth)
