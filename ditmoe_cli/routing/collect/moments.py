"""Streaming moments of inputs, outputs and neurons, which a full profile holds beside the counters.

Shapes as in `counters`; H is the widest expert. Sums over tokens are accumulated in float64 where they are small and in
float32 where they are wide.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.collect.batch_events import BatchEvent
from ditmoe_cli.routing.profile import BRANCHES

# sums over the pairs of experts that a token chose, beside the gated Gram
PAIR_SUMS = ("output.raw_gram", "output.cosine", "gate_ratio", "gate_ratio_square")
_TINY = torch.finfo(torch.float32).tiny


class Moments:
    """Grams, means, energies and extremes of a whole run.

    `add` takes one block's event at one step, `add_neurons` one expert's neurons, `tensors` returns everything.
    """

    def __init__(self, config: DiTMoEConfig, bins: int, device: torch.device) -> None:
        self.config = config
        blocks, experts, width = config.depth, config.num_experts, config.hidden_size
        inner = max(max(block.expert_widths) for block in config.blocks)

        def wide(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        table = (blocks, BRANCHES, bins)
        self.easy_ep = torch.zeros(*table, experts, dtype=torch.float64, device=device)
        self.output_gram = torch.zeros(*table, experts, experts, dtype=torch.float64, device=device)
        self.pairs = {name: torch.zeros_like(self.output_gram) for name in PAIR_SUMS}
        self.output_sum = wide(*table, experts, width)
        self.output_gate_square_sum = wide(*table, experts, width)
        self.input_max = wide(blocks, experts, width)
        self.input_square = wide(blocks, experts, width)
        self.gamma_sum = wide(*table, width)
        self.gamma_square = wide(*table, width)
        self.images = torch.zeros(BRANCHES, bins, dtype=torch.int64, device=device)
        self.neuron_energy = wide(blocks, experts, inner)
        self.neuron_max = wide(blocks, experts, inner)

    def add_neurons(self, block: int, expert: int, weights: Tensor, activations: Tensor) -> None:
        """Add a = g φ of one expert's tokens: weights g (n,), activations φ (n, inner)."""
        squares = (activations.float() * weights.float().unsqueeze(-1)).square_()
        inner = squares.shape[1]
        self.neuron_energy[block, expert, :inner] += squares.sum(dim=0)
        largest = self.neuron_max[block, expert, :inner]
        self.neuron_max[block, expert, :inner] = torch.maximum(largest, squares.amax(dim=0))

    def add(self, batch: BatchEvent) -> None:
        """Add one block's event."""
        event, branches, b, outputs = batch.event, batch.branches, batch.bin, batch.outputs
        block, width = event.block, outputs.shape[-1]
        slots, rows = _by_branch(batch.chosen, branches), outputs.reshape(branches, -1, width)
        weights = event.routing.weights.float()
        self.output_sum[block, :branches, b] += slots @ rows
        self.output_gate_square_sum[block, :branches, b] += (slots * _in_branches(weights**2, branches)) @ rows
        self._add_pairs(batch, weights)
        self._add_inputs(event, batch.chosen)
        per_branch = event.gamma.float().reshape(branches, -1, width)
        self.gamma_sum[block, :branches, b] += per_branch.sum(dim=1)
        self.gamma_square[block, :branches, b] += per_branch.square().sum(dim=1)
        if block == 0:
            self.images[:branches, b] += per_branch.shape[1]
        if event.residual is not None:
            self._add_easy_ep(batch, event.residual, weights)

    def _add_pairs(self, batch: BatchEvent, weights: Tensor) -> None:
        """Add sums over the pairs i, j of experts of each token.

        The gated Gram matrix is A_ij = Σ_t ⟨γ g_i f_i, γ g_j f_j⟩, the cost of removing both; r = g_i / (g_i + g_j).
        """
        outputs, chosen, branches = batch.outputs, batch.chosen, batch.branches
        raw = outputs @ outputs.mT  # (T, k, k)
        norms = batch.raw_norms.clamp_min(_TINY)
        ours, theirs = weights.unsqueeze(2), weights.unsqueeze(1)
        ratio = ours / (ours + theirs).clamp_min(_TINY)
        cosine = raw / (norms.unsqueeze(1) * norms.unsqueeze(2))
        gated = ours * theirs * (batch.after_gamma @ batch.after_gamma.mT)
        values = torch.stack((gated, raw, cosine, ratio, ratio**2)).double()
        spread = torch.einsum("ntab,tbf->ntaf", values, chosen.double())
        sums = _by_branch(chosen.double(), branches) @ spread.reshape(len(values), branches, -1, chosen.shape[-1])
        cell = batch.event.block, slice(branches), batch.bin
        self.output_gram[cell] += sums[0]
        for name, value in zip(PAIR_SUMS, sums[1:], strict=True):
            self.pairs[name][cell] += value

    def _add_inputs(self, event: MoEEvent, chosen: Tensor) -> None:
        """Add Σ u² and max |u| of the tokens routed to each expert."""
        inputs = event.inputs.float()
        experts = chosen.shape[2]
        self.input_square[event.block] += chosen.amax(dim=1).T @ inputs.square()
        magnitudes = inputs.abs()
        largest = inputs.new_zeros(experts + 1, inputs.shape[1])  # the last row takes slots of constants
        with warnings.catch_warnings():  # torch calls `index_reduce_` beta
            warnings.simplefilter("ignore", UserWarning)
            for selected in event.routing.experts.T:
                largest.index_reduce_(0, selected.where(selected >= 0, experts), magnitudes, "amax")
        self.input_max[event.block] = torch.maximum(self.input_max[event.block], largest[:experts])

    def _add_easy_ep(self, batch: BatchEvent, residual: Tensor, weights: Tensor) -> None:
        """Add Σ_t g ‖γ f‖ s_t with s_t = max(1 - cos(x, x + γ r), 0), x the residual and r the routed output."""
        x = residual.float().reshape(-1, residual.shape[-1])
        added = (weights.unsqueeze(1) @ batch.after_gamma).squeeze(1)
        similarity = F.cosine_similarity(x, x + added, dim=-1)
        weighted = weights * batch.norms * (1 - similarity).clamp_min(0).unsqueeze(-1)
        sums = _by_branch(batch.chosen.double(), batch.branches) @ weighted.double().reshape(batch.branches, -1, 1)
        self.easy_ep[batch.event.block, : batch.branches, batch.bin] += sums.squeeze(-1)

    def live(self) -> dict[str, Tensor]:
        """Return the moments themselves, under the names that profiles store them by."""
        return {
            "easy_ep": self.easy_ep,
            "output.gram": self.output_gram,
            **self.pairs,
            "output.sum": self.output_sum,
            "output.gate_square_sum": self.output_gate_square_sum,
            "input.max": self.input_max,
            "input.square": self.input_square,
            "gamma.sum": self.gamma_sum,
            "gamma.square": self.gamma_square,
            "gamma.images": self.images,
            "neuron.energy": self.neuron_energy,
            "neuron.max": self.neuron_max,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments under the names that profiles store them by, on the CPU."""
        return {name: value.cpu().contiguous() for name, value in self.live().items()}


def _by_branch(chosen: Tensor, branches: int) -> Tensor:
    """Return choices (T, k, E) as (branches, E, tokens k), ready to sum over tokens and slots."""
    return chosen.reshape(branches, -1, chosen.shape[-1]).transpose(1, 2)


def _in_branches(values: Tensor, branches: int) -> Tensor:
    """Return values of slots (T, k) as (branches, 1, tokens k)."""
    return values.reshape(branches, 1, -1)
