"""A block's event with what all collectors derive from it, derived once."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.model.moe import MoEEvent


@dataclass(frozen=True)
class BatchEvent:
    """The event of one block for a batch of images at one step.

    Attributes:
        event: the block's event, of T = branches * images * patches tokens.
        images: the images' indices, the same in each branch.
        branches: 1, or 2 where guidance runs: conditional tokens first.
        bin: step bin.
        chosen: (T, k, E) choices as zeros and ones in fp32, so that sums over tokens are matrix products; zero where
            a slot went to a constant.
        outputs: (T, k, D) f in fp32.
        after_gamma: (T, k, D) γ ⊙ f in fp32, before the routing weight.
        raw_norms: (T, k) ‖f‖ in fp32.
        norms: (T, k) ‖γ ⊙ f‖ in fp32.
    """

    event: MoEEvent
    images: range
    branches: int
    bin: int
    chosen: Tensor
    outputs: Tensor
    after_gamma: Tensor
    raw_norms: Tensor
    norms: Tensor

    @property
    def selected(self) -> Tensor:
        """Return the experts that each token chose, (branches, images, patches, E)."""
        chosen = self.chosen.sum(dim=1)
        return chosen.reshape(self.branches, len(self.images), -1, chosen.shape[-1])


def batch_event(event: MoEEvent, images: range, step_bin: int, experts: int) -> BatchEvent:
    """Return the event of images with what collectors need of it; `experts` is the most of any block."""
    outputs = event.outputs.float()
    tokens, k, width = outputs.shape
    gamma = event.gamma[:, None, None].float()
    after_gamma = (outputs.reshape(len(event.gamma), -1, k, width) * gamma).reshape(tokens, k, width)
    return BatchEvent(
        event=event,
        images=images,
        branches=len(event.gamma) // len(images),
        bin=step_bin,
        chosen=event.routing.chosen(experts).float(),
        outputs=outputs,
        after_gamma=after_gamma,
        raw_norms=outputs.norm(dim=-1),
        norms=after_gamma.norm(dim=-1),
    )
