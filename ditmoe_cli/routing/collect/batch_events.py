"""One block's event with what every collector derives from it, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.model.moe import MoEEvent


@dataclass(frozen=True)
class Seen:
    """What one block did to the images at hand at one step.

    Attributes:
        event: the block's event, of T = branches * images * patches tokens.
        images: their indices, the same in each branch.
        branches: 1, or 2 where guidance runs: conditional tokens first.
        bin: step bin.
        chosen: (T, k, E) choices as zeros and ones in fp32, so that sums over tokens are matrix products; zero where
            a slot went to a constant.
        outputs: (T, k, D) f in fp32.
        reaching: (T, k, D) γ ⊙ f, the output as the residual stream meets it, before the routing weight.
    """

    event: MoEEvent
    images: Sequence[int]
    branches: int
    bin: int
    chosen: Tensor
    outputs: Tensor
    reaching: Tensor

    @property
    def patches(self) -> int:
        """Tokens of an image."""
        return len(self.chosen) // (self.branches * len(self.images))

    @property
    def selected(self) -> Tensor:
        """Return the experts that each token chose, (branches, N, P, E)."""
        chosen = self.chosen.sum(dim=1)
        return chosen.reshape(self.branches, len(self.images), -1, chosen.shape[-1])


def see(event: MoEEvent, images: Sequence[int], b: int, experts: int) -> Seen:
    """Derive what collectors need of an event of `images` in step bin `b`; `experts` is the most of any block."""
    outputs = event.outputs.float()
    tokens, k, width = outputs.shape
    reaching = outputs.reshape(len(event.gamma), -1, k, width) * event.gamma[:, None, None].float()
    return Seen(
        event=event,
        images=images,
        branches=len(event.gamma) // len(images),
        bin=b,
        chosen=event.routing.chosen(experts).float(),
        outputs=outputs,
        reaching=reaching.reshape(tokens, k, width),
    )
