"""Self-attention in both of upstream's layouts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.linear import Linear

NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention over a packed (3, heads, head_dim) projection.

    The timm layout names its layers ``qkv`` and ``proj``. The flash layout has the same matrices as ``Wqkv`` and
    ``out_proj``, and normalises queries and keys per head with LayerNorm, in the norm's dtype. `dtype` is what products
    are computed in; None for the dtype of the tokens.
    """

    dtype: torch.dtype | None = None

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.flash_layout = config.attention == "flash"
        width = config.hidden_size
        if self.flash_layout:
            self.Wqkv, self.out_proj = Linear(width, 3 * width), Linear(width, width)
            self.q_norm = nn.LayerNorm(self.head_dim, eps=NORM_EPS)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=NORM_EPS)
        else:
            self.qkv, self.proj = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (N, tokens, width) to (N, tokens, width), in the dtype of the products."""
        return self.projected(self.mixed(x))

    def projected(self, mixed: Tensor) -> Tensor:
        """Return the output (N, tokens, width) of what `mixed` returns."""
        out: Tensor = (self.out_proj if self.flash_layout else self.proj)(mixed)
        return out

    def mixed(self, x: Tensor) -> Tensor:
        """Return the heads' values of tokens x (N, tokens, width), mixed by attention, side by side."""
        return F.scaled_dot_product_attention(*self._heads(x)).transpose(1, 2).reshape(x.shape)

    def attended_to(self, x: Tensor) -> Tensor:
        """Return the mean of each column of the attention maps, over queries and heads, for tokens x: (N, tokens)."""
        q, k, _ = self._heads(x)
        means = [
            (queries.float() @ keys.float().mT / self.head_dim**0.5).softmax(dim=-1).mean(dim=(0, 1))
            for queries, keys in zip(q, k, strict=True)  # image by image: maps take tokens² values a head
        ]
        return torch.stack(means)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (N, heads, tokens, head_dim) of tokens x (N, tokens, width)."""
        n, tokens, _ = x.shape
        packed = (self.Wqkv if self.flash_layout else self.qkv)(x.to(self.dtype or x.dtype))
        q, k, v = packed.reshape(n, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.flash_layout:
            q, k = (norm(part.to(norm.weight.dtype)).to(v.dtype) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        return q, k, v
