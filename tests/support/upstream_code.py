"""How upstream's code (feizc/DiT-MoE) takes a file: its `find_model`, and the modules that its ``DiT`` builds.

Written from the names, shapes and constructor arguments of its models.py and download.py; the modules compute nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def find_model(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file: what stands under ``ema``, else under ``model``, else the file itself."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("ema", "model"):
        if key in checkpoint:
            checkpoint = checkpoint[key]
            break
    assert isinstance(checkpoint, dict)
    return checkpoint


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int, experts: int, flash: bool) -> None:
        super().__init__()
        self.attn, self.moe = nn.Module(), nn.Module()
        self.attn.add_module("Wqkv" if flash else "qkv", nn.Linear(width, 3 * width))
        self.attn.add_module("out_proj" if flash else "proj", nn.Linear(width, width))
        for norm in ("q_norm", "k_norm") if flash else ():
            self.attn.add_module(norm, nn.LayerNorm(width // heads))
        self.moe.gate = nn.Module()
        self.moe.gate.weight = nn.Parameter(torch.zeros(experts, width))
        self.moe.experts = nn.ModuleList(_Mlp(width, ratio * width) for _ in range(experts))
        self.moe.shared_experts = _Mlp(width, 2 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class UpstreamDiT(nn.Module):
    """The modules of upstream's ``DiT`` for its keyword arguments."""

    def __init__(self, **args: Any) -> None:
        super().__init__()
        width, patch, channels = args["hidden_size"], args["patch_size"], args["in_channels"]
        out = channels * 2 if args["learn_sigma"] else channels
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(args["num_classes"] + (args["class_dropout_prob"] > 0), width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (args["input_size"] // patch) ** 2, width))
        shape = (width, args["num_heads"], args["mlp_ratio"], args["num_experts"], args["use_flash_attn"])
        self.blocks = nn.ModuleList(_Block(*shape) for _ in range(args["depth"]))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
