"""The diffusion transformer with mixtures of experts (Fei et al. 2024, https://arxiv.org/abs/2407.11633)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.model import fused_kernels
from ditmoe_cli.model.attention import NORM_EPS, Attention
from ditmoe_cli.model.conditions import PARTS, Modulate, conditions
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder
from ditmoe_cli.model.linear import Linear
from ditmoe_cli.model.moe import MoEEvent, Observer, SparseMoE


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift for x (N, tokens, width) in `dtype`; scale and shift are (N, width)."""
    if x.dtype == torch.float32 and fused_kernels.usable(x, shift, scale):
        return fused_kernels.modulated_norm(x, shift, scale, NORM_EPS, dtype or x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(dtype or x.dtype)


def gated_sum(residual: Tensor, gate: Tensor, added: Tensor) -> Tensor:
    """Return residual + gate ⊙ added (N, tokens, width) for gate (N, width), in the dtype of the residual."""
    if residual.dtype == torch.float32 and fused_kernels.usable(residual, gate, added):
        return fused_kernels.gated_sum(residual, gate, added)
    return torch.addcmul(residual, gate.unsqueeze(1), added)


def modulation(width: int, parts: int) -> nn.Sequential:
    """Return adaLN: SiLU, then a linear layer from conditions (N, width) to `parts` vectors per image."""
    return nn.Sequential(nn.SiLU(), Linear(width, parts * width))


@dataclass(frozen=True)
class Attended:
    """The state of a block between its attention and its mixture, for N images.

    Attributes:
        residual: (N, tokens, width) the stream that the mixture adds to.
        inputs: (N, tokens, width) the inputs of the mixture.
        gamma: (N, width) the residual gate of the mixture.
    """

    residual: Tensor
    inputs: Tensor
    gamma: Tensor


class Block(nn.Module):
    """A block: x + gate ⊙ attention, then x + γ ⊙ (routed + shared).

    The stream x, norms, modulation, routing and the sum over experts keep the dtype of x; attention and experts compute
    in the dtype that `compute_in` sets.
    """

    def __init__(self, config: DiTMoEConfig, block: BlockConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.moe = SparseMoE(config.hidden_size, block, config.top_k)
        self.adaLN_modulation = modulation(config.hidden_size, PARTS)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute attention and experts in `dtype`; as made, a block computes in the dtype of its inputs."""
        self.attn.dtype = self.moe.dtype = dtype

    def attend(self, x: Tensor, c: Tensor) -> Attended:
        """Return the state after attention on x (N, tokens, width) under conditions c (N, width)."""
        return self.attend_modulated(x, self.adaLN_modulation(c))

    def attend_modulated(self, x: Tensor, modulation: Tensor) -> Attended:
        """Return the state after attention on x (N, tokens, width) with its modulation (N, 6 · width)."""
        return self.attended_by(x, modulation, self.attn(self.attention_inputs(x, modulation)))

    def attention_inputs(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return what attention reads of x (N, tokens, width) with its modulation (N, 6 · width)."""
        shift, scale, *_ = modulation.chunk(PARTS, dim=1)
        return modulated_norm(x, shift, scale, self.attn.dtype)

    def attended(self, x: Tensor, modulation: Tensor, mixed: Tensor) -> Attended:
        """Return the state after attention, whose heads' values (N, tokens, width) are `mixed` (`Attention.mixed`)."""
        return self.attended_by(x, modulation, self.attn.projected(mixed))

    def attended_by(self, x: Tensor, modulation: Tensor, attention: Tensor | None) -> Attended:
        """Return the state after attention, whose output is `attention` (N, tokens, width); None for none."""
        _, _, gate, shift, scale, gamma = modulation.chunk(PARTS, dim=1)
        x = x if attention is None else gated_sum(x, gate, attention)
        return Attended(x, modulated_norm(x, shift, scale), gamma)

    def gates(self, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate of attention and that of the mixture, γ, (N, width) each."""
        _, _, gate, _, _, gamma = modulation.chunk(PARTS, dim=1)
        return gate, gamma

    def forward(self, x: Tensor, c: Tensor, index: int, observer: Observer | None) -> Tensor:
        """Map tokens x (N, tokens, width) under conditions c (N, width)."""
        return self.mix(self.attend(x, c), index, observer)

    def mix(self, attended: Attended, index: int, observer: Observer | None) -> Tensor:
        """Return the output of the block (N, tokens, width) from its state after attention."""
        mixed = self.moe(attended.inputs, index, attended.gamma, observer, attended.residual)
        return gated_sum(attended.residual, attended.gamma, mixed)


class FinalLayer(nn.Module):
    """Map tokens to patches of the output."""

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = modulation(config.hidden_size, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Map (N, tokens, width), with its modulation (N, 2 · width), to (N, tokens, patch² · out_channels)."""
        shift, scale = modulation.chunk(2, dim=1)
        out: Tensor = self.linear(modulated_norm(x, shift, scale))
        return out


ModulationOf = Callable[[str, Modulate], Tensor]
"""Takes the name of what is modulated and the layer that would compute it, and returns the modulation."""


class Prediction(Protocol):
    """A model that is asked for images of given labels, at times that were announced."""

    def __call__(self, x: Tensor, t: float, observer: Observer | None = None, /) -> Tensor:
        """Predict for x (N, C, H, W), all at time t."""


class DiTMoE(nn.Module):
    """Predict the noise, or the velocity, of noisy images: ``model(x, t, y)``.

    x is (N, C, H, W), t (N,), and y (N,) holds integer labels; the null class, where there is one, is
    ``config.num_classes``. The output has ``config.out_channels`` channels. Times are 0 to 999 for DDPM, in (0, 1] for
    rectified flow.
    """

    def __init__(self, config: DiTMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_patches, config.hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.final_layer = FinalLayer(config)
        self._dtype: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that attention and experts compute in."""
        return self._dtype or self.pos_embed.dtype

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute attention and experts in `dtype`, the rest in fp32; weights of other dtypes are cast at each use."""
        self._dtype = dtype
        for block in self.blocks:
            assert isinstance(block, Block)
            block.compute_in(dtype)

    def prepack(self) -> Self:
        """Lay the large matrices of the blocks out for products on a CPU, one by one, and return the model.

        It then takes as much memory as before, and predicts the same, but its weights can be neither read nor changed.
        Modulations stay as they are, since they are computed once for a batch.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (*block.attn.modules(), *block.moe.modules()):
                if type(layer) is Linear:
                    layer.prepack()
        return self

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pos_embed.device

    def forward(self, x: Tensor, t: Tensor, y: Tensor, observer: Observer | None = None) -> Tensor:
        """Predict; `observer` is shown every block's mixture."""
        tokens, c = self.embed(x, t, y)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens, c, index, observer)
        return self.unembed(tokens, c)

    def prepared(self, times: Sequence[float], labels: Tensor) -> Prediction:
        """Return the model for images of `labels` (N,), asked at any of `times`, its conditions computed once."""
        run = conditions(times, labels, self.condition, self.config)

        def predict(x: Tensor, t: float, observer: Observer | None = None) -> Tensor:
            return self.modulated(x, lambda name, modulate: run.at(name, modulate, t), observer)

        return predict

    def modulated(self, x: Tensor, modulation_of: ModulationOf, observer: Observer | None = None) -> Tensor:
        """Predict for x (N, C, H, W), all modulations (N, parts · width) being given by `modulation_of`."""
        tokens = self.patches(x)
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            modulation = modulation_of(f"blocks.{index}", block.adaLN_modulation)
            tokens = block.mix(block.attend_modulated(tokens, modulation), index, observer)
        return self.unpatched(tokens, modulation_of("final", self.final_layer.adaLN_modulation))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first block: tokens (N, patches, width) of images x, and conditions c (N, width)."""
        return self.patches(x), self.condition(t, y)

    def patches(self, x: Tensor) -> Tensor:
        """Return the tokens (N, patches, width) of images x."""
        tokens: Tensor = self.x_embedder(x.to(self.pos_embed.dtype))
        return tokens + self.pos_embed

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the conditions (N, width) of times and labels (N,)."""
        out: Tensor = self.t_embedder(t, self.pos_embed.dtype) + self.y_embedder(y)
        return out

    def unembed(self, tokens: Tensor, c: Tensor) -> Tensor:
        """Return the output (N, out_channels, H, W) from the tokens that the last block returned."""
        return self.unpatched(tokens, self.final_layer.adaLN_modulation(c))

    def unpatched(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """Return the output as `unembed` does, given the modulation (N, 2 · width) of the final layer."""
        return self._unpatchify(self.final_layer(tokens, modulation))

    def forward_with_balance_loss(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Predict as in training, with the balance loss summed over blocks (to be scaled by alpha).

        Per block: E Σ_e f_e P_e, f_e the share of slots that went to expert e, P_e its mean probability; 1 when
        balanced. Gradient flows through P alone (GShard, https://arxiv.org/abs/2006.16668).
        """
        losses: list[Tensor] = []

        def watch(event: MoEEvent) -> None:
            probabilities = event.routing.probabilities
            rows = probabilities.shape[1]
            share = torch.bincount(event.routing.rows.reshape(-1), minlength=rows) / event.routing.rows.numel()
            losses.append(rows * (share.to(probabilities.dtype) * probabilities.mean(dim=0)).sum())

        out = self(x, t, y, watch)
        return out, torch.stack(losses).sum()

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        patch, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        grid = tokens.reshape(-1, side, side, patch, patch, self.config.out_channels)
        return torch.einsum("nhwpqc->nchpwq", grid).reshape(-1, self.config.out_channels, side * patch, side * patch)


class Denoiser(Protocol):
    """A model as samplers use it: `DiTMoE`, or one that keeps its weights elsewhere."""

    @property
    def config(self) -> DiTMoEConfig:
        """The model's configuration."""

    @property
    def device(self) -> torch.device:
        """The device of inputs."""

    def prepared(self, times: Sequence[float], labels: Tensor, /) -> Prediction:
        """Return the model for images of `labels` (N,), asked at any of `times`."""
