"""What the tests of replay share: mixtures with random weights, tokens, and mixtures rebuilt with fewer experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditmoe_cli.compression.plan import RouterMode
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.config import GHOST, BlockConfig
from ditmoe_cli.model.moe import SparseMoE

WIDTH = 8


def mixture(config: BlockConfig, top_k: int = 2, selects: Sequence[int] = (), seed: int = 0) -> SparseMoE:
    """A mixture of random weights on a scale at which routing makes a difference; `selects` is its router map."""
    generator = torch.Generator().manual_seed(seed)
    moe = SparseMoE(WIDTH, config, top_k).requires_grad_(False)
    for parameter in (*moe.parameters(), *(b for b in moe.buffers() if b.is_floating_point())):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / WIDTH**0.5)
    moe.gate.weight.mul_(2)
    if config.mapped:
        moe.gate.expert_of = torch.tensor(selects, dtype=torch.int32)
    return moe


def plain(experts: int = 5, top_k: int = 2, seed: int = 0) -> SparseMoE:
    """A mixture as upstream has it, experts of different widths."""
    widths = tuple(6 + e % 3 for e in range(experts))
    return mixture(BlockConfig(experts, widths, 12), top_k, seed=seed)


def some_tokens(pairs: int = 12, branches: int = 2, cfg: float = 1.5, bins: int = 3, seed: int = 0) -> BlockTokens:
    """Random tokens; those of a pair differ little, as branches do."""
    generator = torch.Generator().manual_seed(seed)

    def alike() -> Tensor:
        common = torch.randn(pairs, WIDTH, generator=generator)
        return torch.cat([common + 0.3 * torch.randn(pairs, WIDTH, generator=generator) for _ in range(branches)])

    coefficients = torch.tensor([cfg, 1 - cfg] if branches == 2 else [1.0]).repeat_interleave(pairs)
    return BlockTokens(alike(), alike(), coefficients, torch.arange(pairs).remainder(bins).repeat(branches), branches)


def guided_by_hand(tokens: BlockTokens, values: Tensor) -> Tensor:
    """What outputs (T, D) add to the guided output of each pair, (n, D), in float64."""
    n = len(values) // tokens.branches
    added = torch.zeros(n, values.shape[1], dtype=torch.float64)
    for i, value in enumerate(values.double()):
        added[i % n] += float(tokens.coefficients[i]) * tokens.gamma[i].double() * value
    return added


def output(moe: SparseMoE, tokens: BlockTokens) -> Tensor:
    """Routed plus shared output, (T, D)."""
    out: Tensor = moe(tokens.inputs[None], 0, tokens.gamma, None)
    return out[0]


def error_by_hand(tokens: BlockTokens, original: SparseMoE, changed: SparseMoE) -> float:
    routed = output(original, tokens) - original.shared_experts(tokens.inputs)
    change = guided_by_hand(tokens, output(changed, tokens) - output(original, tokens))
    return float(change.square().sum() / guided_by_hand(tokens, routed).square().sum())


def reduced(moe: SparseMoE, config: BlockConfig, keep: Sequence[int], mode: RouterMode) -> SparseMoE:
    """Rebuild `moe`, which is of `config`, with the experts `keep` alone, in a router mode."""
    old = list(range(config.router_rows)) if moe.gate.expert_of is None else moe.gate.expert_of.tolist()
    selects = [e if e < 0 else list(keep).index(e) if e in keep else GHOST for e in old]
    rows = [row for row, new in enumerate(selects) if mode != "slice" or new != GHOST]
    smaller = replace(
        config,
        router_rows=len(rows),
        expert_widths=tuple(config.expert_widths[e] for e in keep),
        mapped=True,
        mass=config.mass or mode == "mass",
    )
    result = SparseMoE(WIDTH, smaller, moe.gate.top_k).requires_grad_(False)
    result.experts = type(moe.experts)(moe.experts[e] for e in keep)
    result.shared_experts = moe.shared_experts
    result.gate.weight.copy_(moe.gate.weight[rows])
    for name, buffer in moe.named_buffers(recurse=False):
        setattr(result, name, buffer)
    result.gate.expert_of = torch.tensor([selects[row] for row in rows], dtype=torch.int32)
    return result
