"""Experts turned into a base and differences, one block in memory at a time.

The base is the mean of a block's experts by how often each is selected, their neurons aligned to those of the expert
that is selected most. Differences are taken from the base as it is stored, which makes up for its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.matching import matchings
from ditmoe_cli.compression.algebra.truncated_svd import truncated
from ditmoe_cli.compression.algebra.whitening import covariance_of
from ditmoe_cli.compression.computed import Computing, as_stored
from ditmoe_cli.compression.delta.compeft import ternary
from ditmoe_cli.compression.delta.delta_sizes import delta_tensors, rank_of_ratio
from ditmoe_cli.compression.delta.expert_base import base_of, difference
from ditmoe_cli.compression.new_mixture import expert_weights, named
from ditmoe_cli.compression.plan import Differences
from ditmoe_cli.compression.replay.tokens import BlockTokens, reservoir_tokens
from ditmoe_cli.files.names import BASE, in_block
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.differences import SvdDifference, TernaryDifference
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile, require_profile_of

Covariances = tuple[Tensor | None, Tensor | None, Tensor | None]


def encode(computing: Computing, stage: Differences) -> None:
    """Compute and keep every block's base and differences, going on behind those that an unfinished run has left.

    Factors of ``svd`` are the nearest on the tokens that the profile keeps; of a profile without tokens, the nearest in
    all directions alike. Raises what `delta_tensors` raises, and `BadInputError` for a profile of another checkpoint
    and where weights overflow their dtype.
    """
    checkpoint, profile = computing.checkpoint, computing.profile
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    dtypes = {info.name: torch_dtype(info.dtype) for info in delta_tensors(checkpoint, stage)}
    model = OffloadedDiTMoE(checkpoint, torch.device(computing.device), dtype=computing.dtype)
    title = f"taking the differences of {checkpoint.name}"
    with resident_blocks(model, title, computing.blocks.start) as blocks:
        for index, block in blocks:
            encoded = _encoded(block.moe, index, stage, profile, dtypes)
            stored = {name: as_stored(checkpoint, name, tensor, dtypes[name]) for name, tensor in encoded}
            computing.blocks.keep(index, stored)


def _encoded(
    moe: SparseMoE, index: int, stage: Differences, profile: RoutingProfile, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that store a block's experts, by name, before they are rounded."""
    experts = [expert_weights(expert) for expert in moe.experts]
    selected = profile.block_tensor("selected", index)[..., : len(experts)].sum(dim=(0, 1)).tolist()
    tokens = _tokens(profile, index) if stage.kind == "svd" else None
    orders = matchings(experts, selected)
    bases = named(in_block(index, BASE), base_of(experts, selected, orders))
    yield from bases.items()
    base = ExpertWeights(*(tensor.to(dtypes[name]).float() for name, tensor in bases.items()))
    with phase("storing differences", 3 * len(experts), "matrices", share=0.8) as progress:
        for e, (expert, order) in enumerate(zip(experts, orders, strict=True)):
            covariances = _covariances(moe, e, order, tokens) if tokens else (None, None, None)
            matrices = named(in_block(index, f"moe.experts.{e}"), difference(expert, base, order))
            for (name, matrix), covariance in zip(matrices.items(), covariances, strict=True):
                yield from _packed(name, matrix, stage, covariance).items()
                progress(1)


def _packed(name: str, matrix: Tensor, stage: Differences, covariance: Tensor | None) -> dict[str, Tensor]:
    """Return the members that store a difference (m, n); `covariance` (n, n) is that of its inputs."""
    if stage.kind == "svd":
        rows, columns = matrix.shape
        factors = truncated(matrix, rank_of_ratio(rows, columns, stage.ratio), covariance)
        return SvdDifference.pack(name, factors.left, factors.right)
    rounded = ternary(matrix, stage.ratio)
    return TernaryDifference.pack(name, rounded.codes, rounded.scale)


def _tokens(profile: RoutingProfile, index: int) -> BlockTokens | None:
    return reservoir_tokens(profile, index) if "reservoir.inputs" in profile.header.tensors else None


def _covariances(moe: SparseMoE, expert: int, order: Sequence[int], tokens: BlockTokens) -> Covariances:
    """Return Σ_t w_t x xᵀ of the inputs x of an expert's gate, up and down: u, u, and neurons φ(u) in `order`, in fp64.

    w = g² c² mean(γ²) is the weight of a squared error of the expert's output in the guided output: g is the expert's
    routing weight, 0 where a token went elsewhere, c the branch's coefficient and γ the block's residual gate.
    """
    module, device = moe.experts[expert], moe.gate.weight.device
    assert isinstance(module, SwiGLU)
    inputs = tokens.inputs.to(device)
    routing = moe.gate(inputs)
    gates = routing.gate_of(expert)
    effects = (tokens.coefficients.double().square() * tokens.gamma.double().square().mean(dim=1)).to(device)
    used = gates > 0
    u, weights = inputs[used], gates[used].double().square() * effects[used]
    of_inputs = covariance_of(u, weights)
    return of_inputs, of_inputs, covariance_of(module.neurons(u)[:, order], weights)
