"""The network, against definitions that can be written down in a line or computed by a loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from torch import Tensor

from ditmoe_cli.model.attention import Attention
from ditmoe_cli.model.dit import DiTMoE, modulated_norm


def inputs(model: DiTMoE, count: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    x = torch.randn(count, config.in_channels, config.input_size, config.input_size, generator=generator)
    t = torch.rand(count, generator=generator) * (1 if config.sampler == "rf" else 999)
    return x, t, torch.arange(count) % (config.num_classes + 1)


def test_modulated_norm_by_its_formula() -> None:
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    found = modulated_norm(x, shift, scale)
    token = x[1, 3]
    normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(found[1, 3], normed * (1 + scale[1]) + shift[1])


# ------------------------------------------------------------------ attention


def attention_by_hand(layer: Attention, x: Tensor) -> Tensor:
    """One image (tokens, width), one head at a time; q, k and v lie one after the other in the projection."""
    packed, width = (layer.Wqkv if layer.flash_layout else layer.qkv)(x), x.shape[1]
    heads = []
    for h in range(layer.num_heads):
        part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
        q, k, v = (packed[:, i * width : (i + 1) * width][:, part] for i in range(3))
        if layer.flash_layout:
            q, k = layer.q_norm(q), layer.k_norm(k)
        heads.append((q @ k.T / layer.head_dim**0.5).softmax(dim=-1) @ v)
    return (layer.out_proj if layer.flash_layout else layer.proj)(torch.cat(heads, dim=1))


@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_by_hand(pico: Callable[..., Pico], attention: str, heads: int) -> None:
    layer = pico(attention=attention, heads=heads).model().blocks[1].attn
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([attention_by_hand(layer, image) for image in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ the whole


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (4, 2), (3, 4), (4, 1)])
def test_output_has_the_shape_of_its_configuration(
    pico: Callable[..., Pico], learn_sigma: bool, channels: int, patch: int
) -> None:
    model = pico(learn_sigma=learn_sigma, in_channels=channels, patch=patch).model()
    x, t, y = inputs(model)
    assert model(x, t, y).shape == (3, channels * (2 if learn_sigma else 1), 8, 8)


@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (3, 4)])
def test_patches_come_back_where_they_were(pico: Callable[..., Pico], channels: int, patch: int) -> None:
    """Patch p at (i, j) holds pixel (p i + r, p j + s, c) at position (r p + s) C + c."""
    model = pico(in_channels=channels, patch=patch, learn_sigma=False).model()
    side = 8 // patch
    image = torch.arange(channels * 64.0).reshape(1, channels, 8, 8)
    tokens = torch.empty(1, side * side, patch * patch * channels)
    for i in range(side):
        for j in range(side):
            for r in range(patch):
                for s in range(patch):
                    for c in range(channels):
                        value = image[0, c, patch * i + r, patch * j + s]
                        tokens[0, i * side + j, (r * patch + s) * channels + c] = value
    assert torch.equal(model._unpatchify(tokens), image)


def test_images_do_not_see_each_other(pico: Callable[..., Pico]) -> None:
    model = pico(attention="flash").model()
    x, t, y = inputs(model, 5)
    together = model(x, t, y)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_time_and_label_reach_the_output(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    x, t, y = (value[:1] for value in inputs(model))
    base = model(x, t, y)
    assert (model(x, t + 50, y) - base).norm() > 0.05 * base.norm()
    assert (model(x, t, y + 1) - base).norm() > 0.05 * base.norm()
    model(x, t, torch.tensor([model.config.num_classes]))  # the null class has its row
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([model.config.num_classes + 1]))


def test_closed_gates_leave_only_the_embedding(pico: Callable[..., Pico]) -> None:
    """With adaLN at zero every block adds 0 · (...), and the output is the final layer on normed patches."""
    model = pico().model()
    for layer in [*(block.adaLN_modulation[1] for block in model.blocks), model.final_layer.adaLN_modulation[1]]:
        layer.weight.zero_()
        layer.bias.zero_()
    x, t, y = inputs(model)
    tokens = model.x_embedder(x) + model.pos_embed
    normed = torch.nn.functional.layer_norm(tokens, (32,), eps=1e-6)
    torch.testing.assert_close(model(x, t, y), model._unpatchify(model.final_layer.linear(normed)))


def test_the_gate_of_the_mixture_scales_what_it_adds(pico: Callable[..., Pico]) -> None:
    """gamma is the last of the six adaLN vectors: doubling it doubles the mixture's residual."""
    model = pico(depth=1, widths=((64,) * 4,)).model()
    block = model.blocks[0]
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    block.adaLN_modulation[1].weight[64:96] = 0  # the attention's gate, third of six, closed
    block.adaLN_modulation[1].bias[64:96] = 0
    once = block(x, c, 0, None) - x
    block.adaLN_modulation[1].weight[160:] *= 2
    block.adaLN_modulation[1].bias[160:] *= 2
    torch.testing.assert_close(block(x, c, 0, None) - x, 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_stay_near_the_whole(pico: Callable[..., Pico], dtype: torch.dtype) -> None:
    whole, half = pico(seed=4).model(), pico(seed=4).model().to(dtype)
    assert half.dtype == dtype
    x, t, y = inputs(whole)
    out = half(x, t, y)
    assert out.dtype == dtype
    assert (out.float() - whole(x, t, y)).norm() < 0.15 * whole(x, t, y).norm()


# ------------------------------------------------------------------ training


def test_the_balance_loss_of_a_blind_router_is_one_per_block(pico: Callable[..., Pico]) -> None:
    model = pico(depth=3, widths=((8,) * 4,) * 3).model()
    for block in model.blocks:
        block.moe.gate.weight.zero_()  # P_e = 1/E, so E sum f_e P_e = sum f_e = 1 whatever is chosen
    out, loss = model.forward_with_balance_loss(*inputs(model))
    assert math.isclose(float(loss), 3, rel_tol=1e-6)
    torch.testing.assert_close(out, model(*inputs(model)))


def test_the_balance_loss_of_a_collapsed_router_is_large(pico: Callable[..., Pico]) -> None:
    model = pico(depth=1, widths=((8,) * 4,), top_k=1).model()
    gate, embedding = model.blocks[0].moe.gate.weight, model.blocks[0].adaLN_modulation[1]
    gate.zero_()
    gate[2] = 100.0
    embedding.bias[96:128] = 10.0  # shift of the mixture's input: all channels positive
    embedding.weight.zero_()
    _, loss = model.forward_with_balance_loss(*inputs(model))
    assert math.isclose(float(loss), 4, rel_tol=1e-3), "E times one expert's share and probability of 1"


def test_the_balance_loss_trains_the_router(pico: Callable[..., Pico]) -> None:
    model = pico().model()
    gate = model.blocks[0].moe.gate.weight.requires_grad_(True)
    _, loss = model.forward_with_balance_loss(*inputs(model))
    loss.backward()
    before = float(loss.detach())
    with torch.no_grad():
        gate -= 0.05 * gate.grad / gate.grad.norm()
        _, after = model.forward_with_balance_loss(*inputs(model))
    assert float(after) < before


def test_every_weight_gets_a_gradient(pico: Callable[..., Pico]) -> None:
    model = pico(attention="flash", top_k=4).model().requires_grad_(True)
    model.pos_embed.requires_grad_(False)
    model(*inputs(model, 4)).square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []
