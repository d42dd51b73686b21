"""Embedders of patches, times and labels, and the position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model.config import FREQUENCIES, DiTMoEConfig
from ditmoe_cli.model.linear import Linear

_MAX_PERIOD = 10_000.0


class PatchEmbed(nn.Module):
    """Map images (N, C, H, W) to tokens (N, patches, width), row by row."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches of x by a matrix product: in TF32, as GPUs may convolve, near-ties of top-k would change."""
        n, channels, height, width = x.shape
        patch = self.proj.kernel_size[0]
        grid = x.reshape(n, channels, height // patch, patch, width // patch, patch)
        patches = torch.einsum("nchpwq->nhwcpq", grid).reshape(n, -1, channels * patch * patch)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Map times (N,) to (N, width): cosines and sines of 128 frequencies, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed times t (N,); angles are computed in fp32, whatever the model's dtype."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(_MAX_PERIOD) / half * steps)
        out: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype))
        return out


class _Table(nn.Embedding):
    """An embedding that draws no values on the meta device, where torch would import its compiler to do so."""

    def reset_parameters(self) -> None:
        """Draw values from N(0, 1)."""
        if not self.weight.is_meta:
            super().reset_parameters()


class LabelEmbedder(nn.Module):
    """Map labels (N,) to (N, width); the last row of the table is the null class, where there is one."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.embedding_table = _Table(config.label_rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels y (N,)."""
        out: Tensor = self.embedding_table(y)
        return out


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """Return the fixed 2-D position embedding (1, side², width): half the channels for columns, half for rows.

    Each half is sine, then cosine, of position / 10000^(i / (width/4)), as in MAE and DiT.
    """
    omega = 1.0 / _MAX_PERIOD ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat((columns, rows), dim=-1).reshape(1, side * side, width).float()
