"""Configurations of upstream's sizes, and how many values training changes of them."""

from __future__ import annotations

from ditmoe_cli.compression.training.trained_groups import trained_groups, trained_values
from ditmoe_cli.compression.training.trained_tensors import TrainedSize
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, expected_weights


def sized(hidden: int, depth: int, experts: int, inner: int, shared: int) -> DiTMoEConfig:
    """DiT-MoE of some width, depth, experts and their widths, on latents of 32 x 32."""
    return DiTMoEConfig(
        input_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        hidden_size=hidden,
        depth=depth,
        num_heads=16,
        num_classes=1000,
        top_k=2,
        attention="flash",
        sampler="rf",
        blocks=(BlockConfig(experts, (inner,) * experts, shared, False),) * depth,
        null_class=True,
    )


def of_xl(inner: int) -> DiTMoEConfig:
    """DiT-MoE-XL with experts of some width."""
    return sized(1152, 28, 8, inner, 2304)


def of_g(inner: int) -> DiTMoEConfig:
    """DiT-MoE-G with experts of some width."""
    return sized(1408, 40, 16, inner, 2816)


def trained(config: DiTMoEConfig, rank: int | None) -> TrainedSize:
    """What training changes of a plain model, matrices by updates of a rank where it is given."""
    shapes = expected_weights(config)
    infos = [TensorInfo(name, "F32", tuple(shape)) for name, shape in shapes.items() if trained_groups(name)]
    return TrainedSize(sum(trained_values(info, rank) for info in infos))
