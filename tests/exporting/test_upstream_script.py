"""The command of upstream's sample.py: what its own parser makes of it, and which models it cannot sample."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from configs import upstream

from ditmoe_cli.exporting.upstream_script import sampling
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig

S = replace(upstream(12, 384, 6, 8, "timm"), sampler="ddpm")
XL, G = upstream(28, 1152, 16, 8, "flash"), upstream(40, 1408, 16, 16, "flash")


def parser() -> argparse.ArgumentParser:
    """The options of sample.py that build and choose, with their types, and its defaults that differ from ours."""
    made = argparse.ArgumentParser()
    made.add_argument("--model", default="DiT-G/2")
    made.add_argument("--ckpt")
    made.add_argument("--image-size", type=int, choices=[256, 512], default=256)
    made.add_argument("--num_experts", type=int, default=16)
    made.add_argument("--num_experts_per_tok", type=int, default=2)
    made.add_argument("--rf", type=bool, default=True)
    return made


@pytest.mark.parametrize(
    ("config", "model", "experts", "flow"),
    [(S, "DiT-S/2", 8, False), (XL, "DiT-XL/2", 8, True), (G, "DiT-G/2", 16, True)],
)
@pytest.mark.parametrize("pixels", [256, 512])
def test_published_models_are_sampled_with_their_own_settings(
    config: DiTMoEConfig, model: str, experts: int, flow: bool, pixels: int
) -> None:
    way = sampling(replace(config, input_size=pixels // 8), Path("a folder/x.pt"))
    assert way.reason is None
    program, script, *words = shlex.split(way.command or "")
    assert (program, script) == ("python", "sample.py")
    found = parser().parse_args(words)
    assert (found.model, found.ckpt, found.image_size) == (model, "a folder/x.pt", pixels)
    assert (found.num_experts, found.num_experts_per_tok, found.rf) == (experts, 2, flow)


NOT_SAMPLED: dict[str, Callable[[], DiTMoEConfig]] = {
    "no model of width 384, depth 3": lambda: replace(S, depth=3, blocks=S.blocks[:3]),
    "patch 4 and 16 heads": lambda: replace(G, patch_size=4),
    "and 12 heads": lambda: replace(S, num_heads=12),
    "latents of 4 channels": lambda: replace(S, in_channels=3, out_channels=6),
    "a learned sigma": lambda: replace(S, out_channels=4),
    "images of 256 or 512 pixels": lambda: replace(S, input_size=16),
    "1000 classes and a null class": lambda: replace(S, num_classes=10),
    "its experts have 1536 neurons": lambda: replace(S, blocks=(BlockConfig(8, (768,) * 8, 768),) * 12),
    "it builds DiT-S with timm attention": lambda: replace(S, attention="flash"),
    "it builds DiT-XL with flash attention": lambda: replace(XL, attention="timm"),
    "it samples DiT-S by DDPM only": lambda: replace(S, sampler="rf"),
}


@pytest.mark.parametrize("reason", NOT_SAMPLED)
def test_what_it_cannot_sample_is_told_with_the_reason(reason: str) -> None:
    way = sampling(NOT_SAMPLED[reason](), Path("x.pt"))
    assert way.command is None
    assert reason in (way.reason or "")
