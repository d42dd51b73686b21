"""What merging rests on, and what grouping returns. Importing this needs neither torch nor numpy."""

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
"""All experts of a block in disjoint groups: members ascending, groups ordered by their first."""


@dataclass(frozen=True)
class GroupingInputs:
    """What the grouping of one block's E experts may rest on; a cell is a branch and a step bin.

    Attributes:
        selected: (E,) how often each expert is selected.
        logit_grams: (cells, E, E) sums over a cell's tokens of the router logits' products l_i l_j.
        means: (cells, E, D) mean output of each expert over all tokens of the reservoir in the cell, routed to it or
            not, 0 where there are none; None where the profile kept no reservoir.
        experts: reads the block's experts, which is expensive.
    """

    selected: NDArray[np.float64]
    logit_grams: NDArray[np.float64]
    means: NDArray[np.floating[Any]] | None
    experts: Callable[[], Sequence[ExpertWeights]]


@dataclass(frozen=True)
class MergeTokens:
    """Tokens that one group of n members is merged for.

    Attributes:
        inputs: (T, D) what enters the mixture, u, in fp32.
        gates: (T, n) routing weight g of each member where the token selected it, else 0.
        weights: (T,) how much an error at the token weighs: γ² and guidance.
        held: (T,) whether the token's image is held out, to choose by.
    """

    inputs: Tensor
    gates: Tensor
    weights: Tensor
    held: Tensor

    @property
    def importance(self) -> Tensor:
        """(T,) what the merged expert's squared error at a token weighs: its gate is Σ_j g_j, so (Σ_j g_j)² w."""
        return self.gates.sum(dim=1).square() * self.weights

    def part(self, mask: Tensor) -> MergeTokens:
        """Return the tokens of a mask (T,)."""
        return MergeTokens(self.inputs[mask], self.gates[mask], self.weights[mask], self.held[mask])
