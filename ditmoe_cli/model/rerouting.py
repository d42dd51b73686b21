"""Other routings of a model: views of it that share its weights, and so take no memory of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ditmoe_cli.model.acceleration import GraphedDiTMoE
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.dit import Block, Denoiser, DiTMoE
from ditmoe_cli.model.router import Router, Routing


class RankedRouter(Router):
    """A router that keeps the selection of one rank alone, with the routing weight that it has among all of them."""

    def __init__(self, width: int, block: BlockConfig, top_k: int, rank: int) -> None:
        super().__init__(width, block, top_k)
        self.rank = rank

    def forward(self, u: Tensor) -> Routing:
        """Route tokens u (T, width) to one row each."""
        routing = super().forward(u)
        kept = slice(self.rank, self.rank + 1)
        return replace(
            routing, experts=routing.experts[:, kept], weights=routing.weights[:, kept], rows=routing.rows[:, kept]
        )


def with_one_rank(model: Denoiser, rank: int) -> Denoiser:
    """Return the model with each token's expert of that rank (0 the best, below top-k) alone, weighted as before.

    The sum over experts Σ_k p_k f_k(u) becomes p_r f_r(u); a residual constant or map then stands for the mass 1 - p_r.
    All weights are those of the model, which is a `DiTMoE` or a `GraphedDiTMoE`. Raises `TypeError` for another.
    """
    if isinstance(model, GraphedDiTMoE):
        return GraphedDiTMoE(_ranked(model.model, rank), model.capture)
    if not isinstance(model, DiTMoE):
        raise TypeError(f"{type(model).__name__} is not in memory as a whole")
    return _ranked(model, rank)


def _ranked(model: DiTMoE, rank: int) -> DiTMoE:
    with torch.device("meta"):
        view = DiTMoE(model.config)
    for name in ("x_embedder", "t_embedder", "y_embedder", "pos_embed", "final_layer"):
        setattr(view, name, getattr(model, name))
    for index, (mine, its) in enumerate(zip(view.blocks, model.blocks, strict=True)):
        assert isinstance(mine, Block) and isinstance(its, Block)
        mine.attn, mine.adaLN_modulation = its.attn, its.adaLN_modulation
        mine.moe.experts, mine.moe.shared_experts = its.moe.experts, its.moe.shared_experts
        mine.moe.dtype = its.moe.dtype
        for name, buffer in its.moe.named_buffers(recurse=False):
            setattr(mine.moe, name, buffer)
        with torch.device("meta"):
            router = RankedRouter(model.config.hidden_size, model.config.blocks[index], its.moe.gate.top_k, rank)
        router.weight, router.expert_of = its.moe.gate.weight, its.moe.gate.expert_of
        mine.moe.gate = router
    view._dtype = model._dtype
    return view.train(model.training)
