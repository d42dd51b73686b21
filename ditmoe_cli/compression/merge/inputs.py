"""Inputs of grouping and merging. Torch-free and numpy-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ditmoe_cli.model.expert_weights import ExpertWeights

Groups = tuple[tuple[int, ...], ...]
"""Disjoint groups of all experts of a block: members ascending, groups ordered by their first member."""


@dataclass(frozen=True)
class GroupingInputs:
    """Measurements to group one block's E experts by; a cell is a branch and a step bin.

    Attributes:
        selected: (E,) how often each expert is selected.
        logit_grams: (cells, E, E) sums over a cell's tokens of the router logits' products l_i l_j.
        means: (cells, E, D) mean output of each expert over all tokens of the reservoir in the cell, whether routed to
            it or not, 0 where the cell has none; None where the profile kept no reservoir.
        experts: reads the block's experts from disk, which is slow.
    """

    selected: NDArray[np.float64]
    logit_grams: NDArray[np.float64]
    means: NDArray[np.floating[Any]] | None
    experts: Callable[[], Sequence[ExpertWeights]]


@dataclass(frozen=True)
class MergeTokens:
    """The calibration tokens that select a group of n members.

    Attributes:
        inputs: (T, D) what enters the mixture, u, in fp32.
        gates: (T, n) routing weight g of each member that the token selects, else 0.
        weights: (T,) weight w of a squared error at the token: mean γ² and guidance.
        held: (T,) whether the token's image is held out, to choose by.
    """

    inputs: Tensor
    gates: Tensor
    weights: Tensor
    held: Tensor

    @property
    def importance(self) -> Tensor:
        """The weight (Σ_j g_j)² w (T,) of the merged expert's squared error at a token, its gate being Σ_j g_j."""
        return self.gates.sum(dim=1).square() * self.weights

    def part(self, mask: Tensor) -> MergeTokens:
        """Return the tokens of a mask (T,)."""
        return MergeTokens(self.inputs[mask], self.gates[mask], self.weights[mask], self.held[mask])
