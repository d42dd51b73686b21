"""Tokens of one block in guided pairs, and the error that a change to the block's mixture causes on them.

A block adds γ ⊙ y to the residual stream, y its routed plus shared output. Under guidance s an error e of y changes the
guided output by s γ_c ⊙ e_c - (s - 1) γ_u ⊙ e_u, with the conditional and the unconditional token of one image, step
and position. The energy of e is the squared norm of that change, summed over all such pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_cli.compression.replay.guided import GuidedStates
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.dit import Attended
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class BlockTokens:
    """T tokens of one block: the conditional ones first, then their unconditional partners in the same order.

    Attributes:
        inputs: (T, D) mixture inputs u, fp32.
        gamma: (T, D) residual gate γ.
        coefficients: (T,) s of conditional tokens and -(s - 1) of unconditional ones; 1 without guidance.
        bins: (T,) step bin.
        branches: 2 under guidance, else 1.
    """

    inputs: Tensor
    gamma: Tensor
    coefficients: Tensor
    bins: Tensor
    branches: int

    @property
    def pairs(self) -> int:
        """The number n of guided tokens: pairs, or single tokens without guidance."""
        return len(self.inputs) // self.branches

    def paired(self, values: Tensor) -> Tensor:
        """Return values of tokens (T, ...) as (n, B, ...) of B branches."""
        return values.reshape(self.branches, self.pairs, *values.shape[1:]).transpose(0, 1)

    def weighed(self, values: Tensor) -> Tensor:
        """Return the part of outputs (T, ..., D) in the guided output: times γ and their branch's coefficient."""
        scale = self.coefficients.unsqueeze(1) * self.gamma
        return values * scale.reshape(len(scale), *(1,) * (values.ndim - 2), -1)

    def energy(self, values: Tensor) -> float:
        """Return Σ ‖s γ_c ⊙ v_c - (s - 1) γ_u ⊙ v_u‖² over the pairs of outputs v (T, D)."""
        return float(self.paired(self.weighed(values)).sum(dim=1).double().square().sum())

    def chunks(self, pairs: int, device: torch.device) -> Iterator[BlockTokens]:
        """Yield at most `pairs` pairs at a time, on `device`."""
        for start in range(0, self.pairs, pairs):
            yield self._of_pairs(slice(start, start + pairs), device)

    def spread(self, pairs: int, device: torch.device) -> BlockTokens:
        """Return at most `pairs` pairs, evenly spaced, on `device`."""
        count = min(pairs, self.pairs)
        return self._of_pairs((2 * torch.arange(count) + 1) * self.pairs // max(2 * count, 1), device)

    def _of_pairs(self, which: slice | Tensor, device: torch.device) -> BlockTokens:
        columns = (self.inputs, self.gamma, self.coefficients, self.bins)
        parts = [self.paired(column)[which].transpose(0, 1) for column in columns]
        inputs, gamma, coefficients, bins = (part.flatten(0, 1).to(device) for part in parts)
        return BlockTokens(inputs, gamma, coefficients, bins, self.branches)


def reservoir_tokens(profile: RoutingProfile, block: int) -> BlockTokens:
    """Return the tokens of one block in a profile's reservoir. Raises `BadInputError` where it is empty."""
    if "reservoir.inputs" not in profile.header.tensors:
        setting = "without ⟨fast⟩" if profile.calibration.get("fast") else "with a larger ⟨reservoir⟩"
        raise BadInputError(f"{profile.path}: keeps no tokens to replay; profile {setting}")
    branch, state = (profile.tensor(f"reservoir.{name}").long() for name in ("branch", "state"))
    order = branch.argsort(stable=True)
    branch, state = branch[order], state[order]
    cfg = float(profile.calibration["cfg"])
    return BlockTokens(
        inputs=profile.block_tensor("reservoir.inputs", block).float()[order],
        gamma=profile.block_tensor("reservoir.gamma", block)[state, branch],
        coefficients=torch.tensor([cfg, 1.0 - cfg])[branch],
        bins=profile.tensor("states.bin").long()[state],
        branches=int(branch.max()) + 1,
    )


def attended_tokens(parts: Sequence[Attended], states: GuidedStates) -> BlockTokens:
    """Return the input tokens of a block's mixture for `states`, from the parts that its attention returned."""
    inputs = torch.cat([part.inputs for part in parts])
    patches = inputs.shape[1]
    gamma = torch.cat([part.gamma for part in parts]).repeat_interleave(patches, dim=0)
    tokens_of_branch = inputs.shape[0] * patches // states.branches
    coefficients = torch.tensor(states.coefficients, device=inputs.device).repeat_interleave(tokens_of_branch)
    bins = torch.zeros(len(coefficients), dtype=torch.int64, device=inputs.device)
    return BlockTokens(inputs.flatten(0, 1), gamma, coefficients, bins, states.branches)


def ratio(error: float, reference: float) -> float:
    """Return error / reference; where the reference is 0, 0 for no error and infinity for any other."""
    if reference:
        return error / reference
    return math.inf if error else 0.0
