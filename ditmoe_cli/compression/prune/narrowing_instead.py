"""What narrowing all experts to the same bytes would have kept, beside what dropping experts keeps.

Both errors are those of the guided routed output before anything is refitted, over its energy, on the same evenly
spaced pairs of tokens of the profile's reservoir in the original model, summed over blocks. Experts are dropped as the
plan says, and tokens routed again; neurons go by their energies, which share one budget
(`compression.prune.neuron_budget`).

With n tokens, E experts of H neurons and top-k, a block takes 6 n D H (E + 2 k) operations and E D n numbers: at XL,
with 28 blocks and 2,048 tokens, 22 TFLOP, a few hundredths of what refitting takes there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.neurons import best_neurons, profiled_energies
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.plan import BlockPlan, Experts
from ditmoe_cli.compression.prune.neuron_budget import NeuronBudget, shared_widths
from ditmoe_cli.compression.replay.subsets import SubsetReplay
from ditmoe_cli.compression.replay.tokens import BlockTokens, ratio, reservoir_tokens
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.routing.profile import RoutingProfile

PAIRS = 1024  # that both errors are measured on


@dataclass(frozen=True)
class Alternatives:
    """Errors of the routed output, before refitting, in the same bytes.

    Attributes:
        dropping: that of the plan.
        narrowing: that of narrowing all experts instead.
        neurons: the share of neurons that all experts together would keep.
        multiple: the number that their widths would be multiples of.
    """

    dropping: float
    narrowing: float
    neurons: float
    multiple: int


def compared(calibrated: Calibrated, experts: Experts, multiple: int) -> Alternatives:
    """Return the error of a plan that drops experts, and that of narrowing instead, in widths of about `multiple`.

    Narrow experts are narrowed in smaller steps than that. Raises `BadInputError` for a profile without a reservoir.
    """
    checkpoint, profile = calibrated.checkpoint, calibrated.profile
    before = [block.expert_widths for block in checkpoint.config.blocks]
    kept = sum(widths[e] for widths, block in zip(before, experts.blocks, strict=True) for e in block.keep)
    share = kept / sum(map(sum, before))
    step = max(1, min(multiple, min(map(min, before)) // 16))
    everyone = [tuple(range(len(widths))) for widths in before]
    widths = shared_widths(checkpoint, profile, everyone, NeuronBudget(share, step, experts_may_go=False))
    sums = torch.zeros(3, dtype=torch.float64)
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with resident_blocks(model, f"comparing with narrower experts of {checkpoint.name}") as blocks:
        for index, block in blocks:
            tokens = reservoir_tokens(profile, index).spread(PAIRS, model.device)
            sums += torch.tensor(_of_block(block.moe, tokens, experts.blocks[index], profile, index, widths[index]))
    dropping, narrowing, reference = sums.tolist()
    return Alternatives(ratio(dropping, reference), ratio(narrowing, reference), share, step)


def _of_block(
    moe: SparseMoE, tokens: BlockTokens, plan: BlockPlan, profile: RoutingProfile, index: int, widths: Mapping[int, int]
) -> Sequence[float]:
    """Return the energies of both errors, and of the routed output."""
    replay = SubsetReplay(tokens, moe)
    dropping = float(replay.errors([plan.keep], plan.router)) * replay.reference if replay.reference else 0.0
    return dropping, tokens.energy(lost_output(moe, tokens, profile, index, widths)), replay.reference


def lost_output(
    moe: SparseMoE, tokens: BlockTokens, profile: RoutingProfile, index: int, widths: Mapping[int, int]
) -> Tensor:
    """Return the part of the routed output (T, D) that comes from the neurons beyond each expert's width."""
    routing = moe.gate(tokens.inputs)
    lost = torch.zeros_like(tokens.inputs)
    for number, expert in enumerate(moe.experts):
        assert isinstance(expert, SwiGLU)
        down, gates = expert.down_proj.weight, routing.gate_of(number)
        (energy,) = profiled_energies(profile, index, [(number, down)])
        phi = expert.neurons(tokens.inputs[used := gates.nonzero().squeeze(1)]).float()
        phi[:, best_neurons(energy, widths[number])] = 0
        lost[used] += gates[used, None] * (phi @ down.float().T)
    return lost
