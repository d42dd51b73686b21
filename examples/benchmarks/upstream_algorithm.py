"""Upstream's algorithm (feizc/DiT-MoE), written anew in plain torch, for the benchmarks to compare with.

Names of tensors are upstream's, so both models load one state dict. What takes time is done as upstream does it:

- tokens are sorted by expert, counts go to the host, each expert takes a slice of the tokens, and outputs are scattered
  into a sum
- the products of an expert are split in two (``parts``) for S and B, whole for XL and G, as its sample.py sets
- rectified flow evaluates the branches of guidance one after the other; DDPM runs both in one batch, and draws noise
  for both
- frequencies of the time embedding are computed on the host and copied, at each call
- in half precision, weights are halves under autocast, as its sample.py computes XL and G

Its flash-attn is torch's ``scaled_dot_product_attention`` here, with the same kernel on GPUs. Training is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.diffusion.forward_process import Schedule
from ditmoe_cli.model.config import DiTMoEConfig

NORM_EPS = 1e-6
GUIDED_CHANNELS = 3  # of DDPM's noise


class UpstreamExpert(nn.Module):
    """SwiGLU whose inner width is cut into `parts`: as many products, put together again."""

    def __init__(self, width: int, inner: int, parts: int) -> None:
        super().__init__()
        self.parts, self.size = parts, inner // parts
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (..., width) to (..., width)."""
        if self.parts == 1:
            out: Tensor = self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))
            return out
        gate, up = (self._rows(layer, u) for layer in (self.gate_proj, self.up_proj))
        inner = (F.silu(gate) * up).split(self.size, dim=-1)
        columns = self.down_proj.weight.split(self.size, dim=1)
        total = F.linear(inner[0], columns[0])
        for phi, column in zip(inner[1:], columns[1:], strict=True):
            total = total + F.linear(phi, column)
        return total

    def _rows(self, layer: nn.Linear, u: Tensor) -> Tensor:
        return torch.cat([F.linear(u, rows) for rows in layer.weight.split(self.size)], dim=-1)


class _Gate(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))


class UpstreamMixture(nn.Module):
    """Top-k of a softmax, an expert at a time over its slice of the sorted tokens, and the shared expert."""

    def __init__(self, width: int, experts: int, inner: int, shared: int, top_k: int, parts: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = _Gate(width, experts)
        self.experts = nn.ModuleList(UpstreamExpert(width, inner, parts) for _ in range(experts))
        self.shared_experts = UpstreamExpert(width, shared, parts)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens (N, tokens, width) to the routed plus the shared output."""
        flat = u.reshape(-1, u.shape[-1])
        scores = F.linear(flat, self.gate.weight).softmax(dim=-1)
        weights, chosen = scores.topk(self.top_k, dim=-1, sorted=False)
        routed = self.routed(flat, chosen.reshape(-1), weights.reshape(-1, 1))
        return routed.reshape(u.shape) + self.shared_experts(u)

    def routed(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_j g_j f_j(u) for tokens (T, width), the experts (T k,) they chose and their weights (T k, 1)."""
        total = torch.zeros_like(tokens)
        order = chosen.argsort()
        ends = chosen.bincount().cpu().numpy().cumsum(0)
        source = order // self.top_k
        start = 0
        for expert, end in zip(self.experts, ends, strict=False):  # the last experts may be chosen by none
            if end > start:
                rows = source[start:end]
                out = expert(tokens[rows])
                out.mul_(weights[order[start:end]])
                total = total.to(out.dtype)
                total.scatter_reduce_(0, rows[:, None].repeat(1, tokens.shape[1]), out, reduce="sum")
            start = end
        return total


class UpstreamAttention(nn.Module):
    """Attention of timm, or with the names of flash-attn and normalised queries and keys."""

    def __init__(self, width: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.head, self.flash = heads, width // heads, flash
        if flash:
            self.Wqkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.q_norm = nn.LayerNorm(self.head, eps=NORM_EPS)
            self.k_norm = nn.LayerNorm(self.head, eps=NORM_EPS)
        else:
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, tokens, width) to (N, tokens, width)."""
        n, tokens, width = x.shape
        if not self.flash:
            packed = self.qkv(x).reshape(n, tokens, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)
            q, k, v = packed.unbind(0)
            out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
            return out
        q, k, v = self.Wqkv(x).view(n, tokens, 3, self.heads, self.head).unbind(2)
        q, k = (norm(each).to(v.dtype) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)))
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(n, tokens, width))
        return joined


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class UpstreamBlock(nn.Module):
    """A block with adaptive normalisation."""

    def __init__(self, config: DiTMoEConfig, index: int, parts: int) -> None:
        super().__init__()
        width, block = config.hidden_size, config.blocks[index]
        inner = set(block.expert_widths)
        if len(inner) != 1 or block.mapped or len(block.expert_widths) != block.router_rows:
            raise ValueError(f"block {index}: upstream's code holds experts of one width, one for each router row")
        self.attn = UpstreamAttention(width, config.num_heads, config.attention == "flash")
        self.moe = UpstreamMixture(width, block.router_rows, inner.pop(), block.shared_width, config.top_k, parts)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (N, tokens, width) under conditions c (N, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulated(x, shift_a, scale_a))
        out: Tensor = x + gate_m.unsqueeze(1) * self.moe(modulated(x, shift_m, scale_m))
        return out


class _TimeEmbedder(nn.Module):
    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (N,)."""
        exponents = torch.arange(self.half, dtype=torch.float32) * (-math.log(10_000) / self.half)
        angles = t[:, None].float() * exponents.exp().to(t.device)
        out: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))
        return out


class _PatchEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to tokens (N, patches, width)."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class _LabelEmbedder(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels (N,)."""
        out: Tensor = self.embedding_table(y)
        return out


class _FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (N, tokens, width) to patches of the output."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulated(x, shift, scale))
        return out


class UpstreamDiT(nn.Module):
    """Predict noise or velocity: ``model(x, t, y)``, for a configuration that upstream's code can hold."""

    def __init__(self, config: DiTMoEConfig, parts: int) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        self.x_embedder = _PatchEmbedder(config.in_channels, width, config.patch_size)
        self.t_embedder = _TimeEmbedder(width)
        self.y_embedder = _LabelEmbedder(config.label_rows, width)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList(UpstreamBlock(config, index, parts) for index in range(config.depth))
        self.final_layer = _FinalLayer(width, config.patch_size**2 * config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict for images x (N, C, H, W) at times t (N,) with labels y (N,)."""
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._image(self.final_layer(tokens, c))

    def _image(self, patches: Tensor) -> Tensor:
        channels, size = self.config.out_channels, self.config.patch_size
        side = math.isqrt(patches.shape[1])
        grid = patches.reshape(len(patches), side, side, size, size, channels)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(patches), channels, side * size, side * size)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """Predict the doubled batch, guided on three channels; of x only the first half is read."""
        first = x[: len(x) // 2]
        out = self(torch.cat((first, first)), t, y)
        cond, uncond = out[:, :GUIDED_CHANNELS].chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat((torch.cat((guided, guided)), out[:, GUIDED_CHANNELS:]), dim=1)


def parts_of(config: DiTMoEConfig) -> int:
    """Return in how many parts upstream's sample.py splits products: S and B in two, XL and G not at all."""
    return 1 if config.attention == "flash" else 2


def upstream_model(
    config: DiTMoEConfig, state: Mapping[str, Tensor], parts: int | None = None, dtype: torch.dtype = torch.float32
) -> UpstreamDiT:
    """Return upstream's model with the tensors of a state dict in a dtype; those that have it are shared.

    Raises `ValueError` for a configuration that upstream's code cannot hold.
    """
    with torch.device("meta"):
        model = UpstreamDiT(config, parts_of(config) if parts is None else parts)
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=True, assign=True)
    return model.eval()


def precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which upstream computes in a dtype: autocast, but for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@torch.no_grad()
def sample_flow(model: UpstreamDiT, z: Tensor, y: Tensor, scale: float | None, steps: int) -> Tensor:
    """Return z after Euler steps of rectified flow; the branches of guidance are evaluated one after the other.

    `scale` None leaves guidance out, as upstream does without null labels.
    """
    n, channels = len(z), z.shape[1]
    null = torch.tensor([model.config.num_classes] * n, device=z.device)
    step = torch.tensor([1.0 / steps] * n, device=z.device).reshape(n, 1, 1, 1)
    for i in range(steps, 0, -1):
        t = torch.tensor([i / steps] * n, device=z.device)
        velocity = model(z, t, y)[:, :channels]
        if scale is not None:
            uncond = model(z, t, null)[:, :channels]
            velocity = uncond + scale * (velocity - uncond)
        z = z - step * velocity
    return z


Draw = Callable[[Sequence[int]], Tensor]


@torch.no_grad()
def sample_ddpm(
    model: UpstreamDiT, z: Tensor, y: Tensor, scale: float, schedule: Schedule, draw: Draw | None = None
) -> Tensor:
    """Return z after ancestral steps with guidance, of the doubled batch at every step.

    ``draw(shape)`` draws the noise of a step, for both branches; the second half is not used. The model has a learned
    variance.
    """
    n, channels = len(z), z.shape[1]
    x = torch.cat((z, z))
    labels = torch.cat((y, torch.full_like(y, model.config.num_classes)))
    before = schedule.alphas_bar_prev
    posterior = schedule.betas * (1 - before) / (1 - schedule.alphas_bar)
    lowest = torch.cat((posterior[1:2], posterior[1:])).log()
    for i in range(len(schedule.timesteps) - 1, -1, -1):
        t = torch.tensor([schedule.timesteps[i]] * (2 * n), device=z.device)
        out = model.forward_with_cfg(x, t, labels, scale)
        eps, share = out[:, :channels], (out[:, channels:] + 1) / 2
        kept, beta = schedule.alphas_bar[i], schedule.betas[i]
        clean = _at(kept.rsqrt(), x) * x - _at((1 / kept - 1).sqrt(), x) * eps
        mean = _at(beta * before[i].sqrt() / (1 - kept), x) * clean
        mean = mean + _at((1 - before[i]) * (1 - beta).sqrt() / (1 - kept), x) * x
        log_variance = share * _at(beta.log(), x) + (1 - share) * _at(lowest[i], x)
        noise = torch.randn_like(x) if draw is None else draw(x.shape)
        x = mean + (i > 0) * (0.5 * log_variance).exp() * noise
    return x[:n]


def _at(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a coefficient of the schedule as fp32 of an image's shape, copied to its device at each step."""
    return coefficient.float().to(like.device).expand(like.shape)
