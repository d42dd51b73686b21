"""Streaming counters over every token: how often, how strongly and together with which others experts are chosen.

Shapes: L blocks, 2 branches, B step bins, P positions, E experts, R router rows, D width, I images, T tokens of one
event. Sums are float64, counts integers. Sums over tokens are matrix products with one-hot choices: their order is
fixed, so equal runs give equal bytes on a GPU too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.routing.collect.batch_events import BatchEvent
from ditmoe_cli.routing.profile import BRANCHES

# sums over selected (token, expert) pairs: "gate" is the routing weight g, "norm" that of γ ⊙ f, "raw_norm" that of f
SLOT_SUMS = (
    "gate_mass",
    "gate_square",
    "norm",
    "norm_square",
    "gate_norm",
    "gate_square_norm_square",
    "raw_norm",
    "raw_norm_square",
    "raw_gate_norm",
)


class Counters:
    """Counts and small sums of a whole run: all that a ``fast`` profile holds.

    `add` takes one block's event at one step, `tensors` returns everything.
    """

    def __init__(self, config: DiTMoEConfig, images: int, bins: int, device: torch.device) -> None:
        self.config, self.bins = config, bins
        blocks, experts, rows = config.depth, config.num_experts, max(b.router_rows for b in config.blocks)
        patches = config.num_patches

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        def counts(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        table = (blocks, BRANCHES, bins)
        self.tokens = counts(BRANCHES, bins)
        self.counts = counts(*table, patches, experts)
        self.image_steps = counts(images, blocks, BRANCHES, bins, experts, dtype=torch.int32)
        self.image_positions = counts(images, blocks, BRANCHES, patches, experts, dtype=torch.int16)
        self.coactivation = counts(*table, experts, experts)
        self.block_transitions = counts(max(blocks - 1, 0), BRANCHES, bins, experts, experts)
        self.step_transitions = counts(*table, experts, experts)
        self.branch_pairs = counts(blocks, bins, experts, experts)
        self.neighbours = counts(*table, experts, experts)
        self.slot_sums = {name: sums(*table, experts) for name in SLOT_SUMS}
        self.norm_max = sums(*table, experts)
        self.router = {name: sums(*table) for name in ("entropy", "margin", "topk_mass", "logsumexp_square")}
        self.logit_sum = sums(*table, rows)
        self.logit_gram = sums(*table, rows, rows)
        self._previous: dict[tuple[int, int], Tensor] = {}  # choices by (first image, block), a step before or now

    def begin_batch(self) -> None:
        """Forget the trajectories of the batch before."""
        self._previous.clear()

    def add(self, batch: BatchEvent) -> None:
        """Add one block's event."""
        block, b, branches, chosen = batch.event.block, batch.bin, batch.branches, batch.chosen
        selected = batch.selected
        self._add_counts(block, b, slice(batch.images.start, batch.images.stop), selected)
        self._add_transitions(block, b, selected, batch.images.start)
        self._add_neighbours(block, b, selected)
        if block == 0:
            self.tokens[:branches, b] += selected.shape[1] * selected.shape[2]
        weights = batch.event.routing.weights.double()
        norms, raw_norms = batch.norms.double(), batch.raw_norms.double()
        features = torch.stack(
            (
                weights,
                weights**2,
                norms,
                norms**2,
                weights * norms,
                (weights * norms) ** 2,
                raw_norms,
                raw_norms**2,
                weights * raw_norms,
            )
        )
        sums = torch.einsum("sbte,nbts->nbe", *_by_slot(chosen, features, branches))
        for name, value in zip(SLOT_SUMS, sums, strict=True):
            self.slot_sums[name][block, :branches, b] += value
        largest = self.norm_max[block, :branches, b]
        spread = (chosen.double() * norms.unsqueeze(-1)).reshape(branches, -1, chosen.shape[-1]).amax(dim=1)
        self.norm_max[block, :branches, b] = torch.maximum(largest, spread)
        self._add_router(batch)

    def _add_counts(self, block: int, b: int, images: slice, selected: Tensor) -> None:
        """Add choices (branches, N, P, E) of `images`."""
        branches = len(selected)
        self.counts[block, :branches, b] += selected.sum(dim=1).long()
        per_image = selected.transpose(0, 1)
        self.image_steps[images, block, :branches, b] += per_image.sum(dim=2).int()
        self.image_positions[images, block, :branches] += per_image.short()
        flat = _flat(selected)
        self.coactivation[block, :branches, b] += (flat.transpose(1, 2) @ flat).long()
        if branches == BRANCHES:
            self.branch_pairs[block, b] += (flat[0].T @ flat[1]).long()

    def _add_neighbours(self, block: int, b: int, selected: Tensor) -> None:
        """Add the pairs (expert here, expert of the patch to the right or below) of choices (branches, N, P, E)."""
        branches, images, patches, experts = selected.shape
        side = math.isqrt(patches)
        grid = selected.reshape(branches, images, side, side, experts)
        for here, there in ((grid[:, :, :, :-1], grid[:, :, :, 1:]), (grid[:, :, :-1], grid[:, :, 1:])):
            pairs = _flat(here).transpose(1, 2) @ _flat(there)
            self.neighbours[block, :branches, b] += pairs.long()

    def _add_transitions(self, block: int, b: int, selected: Tensor, first: int) -> None:
        """Add the pairs (expert before, expert now) of each token: a block up, and a step back.

        `first` is the first image of the event: batches whose steps interleave are kept apart by it.
        """
        branches, flat = len(selected), _flat(selected)
        below, before = self._previous.get((first, block - 1)), self._previous.get((first, block))
        if below is not None:  # of this step: lower blocks are added first
            self.block_transitions[block - 1, :branches, b] += (below.transpose(1, 2) @ flat).long()
        if before is not None:
            self.step_transitions[block, :branches, b] += (before.transpose(1, 2) @ flat).long()
        self._previous[first, block] = flat

    def _add_router(self, batch: BatchEvent) -> None:
        block, routing, branches, b = batch.event.block, batch.event.routing, batch.branches, batch.bin
        logits = routing.logits.double().reshape(branches, -1, routing.logits.shape[-1])
        probabilities = logits.softmax(dim=-1)
        k = routing.experts.shape[1]
        best = probabilities.topk(min(k + 1, probabilities.shape[-1]), dim=-1).values
        margin = best[..., k - 1] - best[..., k] if best.shape[-1] > k else best[..., k - 1]
        weights = routing.weights.double().reshape(branches, -1, k)
        of_tokens = {
            "entropy": -(probabilities * probabilities.clamp_min(1e-300).log()).sum(dim=-1),
            "margin": margin,
            "topk_mass": weights.sum(dim=-1),
            "logsumexp_square": logits.logsumexp(dim=-1) ** 2,
        }
        for name, value in of_tokens.items():
            self.router[name][block, :branches, b] += value.sum(dim=1)
        rows = logits.shape[-1]
        self.logit_sum[block, :branches, b, :rows] += logits.sum(dim=1)
        self.logit_gram[block, :branches, b, :rows, :rows] += logits.transpose(1, 2) @ logits

    def live(self) -> dict[str, Tensor]:
        """Return the counters themselves, under the names that profiles store them by."""
        return {
            "counts": self.counts,
            "tokens": self.tokens,
            "image.steps": self.image_steps,
            "image.positions": self.image_positions,
            "coactivation": self.coactivation,
            "transitions.block": self.block_transitions,
            "transitions.step": self.step_transitions,
            "transitions.branch": self.branch_pairs,
            "transitions.neighbour": self.neighbours,
            **self.slot_sums,
            "norm_max": self.norm_max,
            **{f"router.{name}": value for name, value in self.router.items()},
            "router.logit_sum": self.logit_sum,
            "router.logit_gram": self.logit_gram,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the counters under the names that profiles store them by, on the CPU."""
        stored = {**self.live(), "selected": self.counts.sum(dim=3)}
        return {name: value.cpu().contiguous() for name, value in stored.items()}

    def before(self) -> dict[str, Tensor]:
        """Return the choices of the step before as bytes, by ``FIRST.BLOCK``: what transitions go on from."""
        return {f"{first}.{block}": flat.to(torch.uint8) for (first, block), flat in self._previous.items()}

    def set_before(self, choices: dict[str, Tensor]) -> None:
        """Set the choices of the step before, as `before` returned them."""
        for name, flat in choices.items():
            first, block = map(int, name.split("."))
            self._previous[first, block] = flat.to(self.counts.device, torch.float32)


def _flat(selected: Tensor) -> Tensor:
    """Return choices (branches, ..., E) as (branches, tokens, E)."""
    return selected.reshape(len(selected), -1, selected.shape[-1])


def _by_slot(chosen: Tensor, features: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """Return choices (k, branches, tokens, E) and features (n, branches, tokens, k) in float64, ready to contract."""
    tokens, k, experts = chosen.shape
    by_branch = chosen.double().reshape(branches, tokens // branches, k, experts).permute(2, 0, 1, 3)
    return by_branch, features.reshape(len(features), branches, tokens // branches, k)
