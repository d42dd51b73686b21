"""What each number format of each weight would cost, in squared error of the guided prediction.

Calibration states run through the original blocks. In each block the error of a format is replayed on the tokens at
hand, where it enters the residual stream: after γ, routed by the original router, on guided pairs (see
`compression.replay.subsets`). How much of an error that enters there arrives in the prediction is measured, for
each block and kind of weight, by sending states with a known error through the rest of the model:

    error(W, format) = a_bk Σ_pairs ‖s γ_c e_c - (s - 1) γ_u e_u‖² / pairs

with the amplification a_bk of block b and kind k (`ditmoe_cli.compression.replay.amplification`). Weights outside the
blocks are measured by the prediction alone. Errors of a plan are taken to add up;
`ditmoe_cli.compression.precision.trial` tells how nearly they do.

One block's weights are in memory at a time, beside the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.compression.replay.amplification import (
    Amplification,
    Probes,
    Stream,
    embedded,
    kind_of,
    measured_states,
)
from ditmoe_cli.compression.replay.guided import Conditions, relative_error, slices
from ditmoe_cli.compression.replay.rounded_layers import linear, nearest, require_range, rounded
from ditmoe_cli.compression.replay.subsets import BlockTokens
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, in_expert, split_name
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.moe import SwiGLU
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile

Formats = Mapping[str, Sequence[str]]
Errors = dict[str, dict[str, float]]

REFERENCE = "int3-g64"  # the format whose error is sent through the model
EXPERT_TOKENS = 2_048  # most guided tokens of one expert


@dataclass(frozen=True)
class Sensitivities:
    """What was measured.

    Attributes:
        errors: of each weight and format, in relative squared error of the guided prediction.
        amplification: of each block, by kind of weight: prediction error over error of the stream.
    """

    errors: Errors
    amplification: Amplification

    def at(self, amplification: Amplification) -> Sensitivities:
        """Return the errors with amplifications measured anew; where one was not (0), the old one stays."""
        new = tuple(
            {kind: found.get(kind) or known for kind, known in old.items()}
            for old, found in zip(self.amplification, amplification, strict=True)
        )
        return Sensitivities({name: self._scaled(name, new) for name in self.errors}, new)

    def _scaled(self, name: str, amplification: Amplification) -> dict[str, float]:
        block, errors = split_name(name).block, self.errors[name]
        if block is None:
            return errors
        kind = kind_of(name.removeprefix(in_block(block, "")))
        old, new = self.amplification[block][kind], amplification[block][kind]
        return {fmt: error / old * new if old else error for fmt, error in errors.items()}


def measure(
    checkpoint: Checkpoint, profile: RoutingProfile, formats: Formats, device: str, bar: ProgressBar
) -> Sensitivities:
    """Measure every weight that `formats` names, in each of its formats.

    Raises `BadInputError` for a profile without states, and for values that are not finite.
    """
    model = OffloadedDiTMoE(checkpoint, torch.device(device))
    with torch.inference_mode(), resident_blocks(model, bar, f"measuring {checkpoint.path.name}") as blocks:
        found = _Measurement(model, measured_states(checkpoint, profile, model), formats)
        for index, block in blocks:
            found.block(index, block)
        return found.result(checkpoint)


class _Measurement:
    """States on their way through the blocks, and what they tell."""

    def __init__(self, model: OffloadedDiTMoE, states: Conditions, formats: Formats) -> None:
        self.model, self.states = model, states
        self.formats = {name: fmts for name, fmts in formats.items() if fmts}
        self.stream = Stream(*embedded(model, states))
        self.probes = Probes(model, states)
        self.local: dict[int, list[tuple[str, str, str, float]]] = {}
        for name in self.formats:
            if split_name(name).block is None:
                require_range(model.linear(name).weight, name)
        self.early = dict(self._embedders())

    def _embedders(self) -> Iterator[tuple[tuple[str, str], Stream]]:
        """Yield streams of states that were embedded by rounded weights."""
        for name in self.formats:
            if split_name(name).block is None and name.startswith("t_embedder."):
                layer = self.model.linear(name)
                for fmt in self.formats[name]:
                    with rounded({layer: fmt}):
                        yield (name, fmt), Stream(*embedded(self.model, self.probes.states))

    def block(self, index: int, block: Block) -> None:
        """Measure a block's weights, and let all streams pass it."""
        named = {
            n.removeprefix(in_block(index, "")): fmts
            for n, fmts in self.formats.items()
            if split_name(n).block == index
        }
        for name in named:
            require_range(linear(block, name).weight, in_block(index, name))
        after = self.probes.base.through(block)
        for stream in self.early.values():
            stream.x = stream.through(block)
        seen = [block.attend(self.stream.x[rows], self.stream.c[rows]) for rows in slices(len(self.stream.x))]
        of_mixture = self._of_mixture(index, block, named, block_tokens_of(seen, self.states))
        self.local[index] = [*self._of_streams(index, block, named, after), *of_mixture]
        self.probes.pass_through(index, block, dict.fromkeys(named, REFERENCE), after)
        self.stream.x = torch.cat([block.mix(part, index, None) for part in seen])

    def _of_streams(
        self, index: int, block: Block, named: Formats, after: Tensor
    ) -> Iterator[tuple[str, str, str, float]]:
        """Yield (kind, weight, format, error of the stream) of attention and modulation."""
        for name, formats in named.items():
            if kind_of(name) == "mixture":
                continue
            for fmt in formats:
                with rounded({linear(block, name): fmt}):
                    error = self.probes.states.energy(self.probes.base.through(block) - after)
                yield kind_of(name), in_block(index, name), fmt, error

    def _of_mixture(
        self, index: int, block: Block, named: Formats, tokens: BlockTokens
    ) -> Iterator[tuple[str, str, str, float]]:
        """Yield the same of experts and the shared expert, replayed on this block's tokens."""
        routing = block.moe.gate(tokens.inputs)
        for e, expert in enumerate(block.moe.experts):
            gates = routing.gate_of(e)
            matrices = {
                f"{m}.weight": named.get(in_expert(0, e, f"{m}.weight").removeprefix(in_block(0, "")), ())
                for m in MATRICES
            }
            for matrix, fmt, error in expert_errors(expert, tokens, gates, matrices):
                yield "mixture", in_expert(index, e, matrix), fmt, error
        everyone = torch.ones_like(gates)
        matrices = {f"{m}.weight": named.get(f"{SHARED}.{m}.weight", ()) for m in MATRICES}
        for matrix, fmt, error in expert_errors(block.moe.shared_experts, tokens, everyone, matrices):
            yield "mixture", in_block(index, f"{SHARED}.{matrix}"), fmt, error

    def result(self, checkpoint: Checkpoint) -> Sensitivities:
        """Compare what arrived, and measure what stands after the blocks."""
        probes, errors = self.probes, Errors()
        wanted, amplification = probes.predicted(probes.base), probes.amplification()
        for index, entries in self.local.items():
            for kind, name, fmt, local in entries:
                errors.setdefault(name, {})[fmt] = local * amplification[index][kind]
        for (name, fmt), stream in self.early.items():
            errors.setdefault(name, {})[fmt] = relative_error(probes.predicted(stream), wanted)
        for name, formats in self.formats.items():
            if name.startswith("final_layer."):
                for fmt in formats:
                    with rounded({self.model.linear(name): fmt}):
                        errors.setdefault(name, {})[fmt] = relative_error(probes.predicted(probes.base), wanted)
        for name, found in errors.items():
            if not all(torch.tensor(list(found.values())).isfinite()):
                raise BadInputError(f"{checkpoint.path}: the error of rounding {name!r} is not finite")
        return Sensitivities(errors, amplification)


def block_tokens_of(seen: Sequence[Attended], states: Conditions) -> BlockTokens:
    """Return the tokens that a block's mixture is given, in guided pairs."""
    inputs = torch.cat([part.inputs for part in seen])
    patches = inputs.shape[1]
    gamma = torch.cat([part.gamma for part in seen]).repeat_interleave(patches, dim=0)
    each = inputs.shape[0] * patches // states.branches
    coefficients = torch.tensor(states.coefficients, device=inputs.device).repeat_interleave(each)
    bins = torch.zeros(len(coefficients), dtype=torch.int64, device=inputs.device)
    return BlockTokens(inputs.flatten(0, 1), gamma, coefficients, bins, states.branches)


def expert_errors(
    expert: nn.Module, tokens: BlockTokens, gates: Tensor, formats: Formats
) -> Iterator[tuple[str, str, float]]:
    """Yield (matrix, format, Σ ‖guided error‖² / pairs) of rounding one matrix of an expert at a time.

    `gates` (T,) is its routing weight, 0 for tokens that went elsewhere. Of more than `EXPERT_TOKENS` guided tokens
    evenly spaced ones stand for all.
    """
    assert isinstance(expert, SwiGLU)
    used = tokens.paired(gates).ne(0).any(dim=1).nonzero().squeeze(1)
    if not len(used):
        yield from ((matrix, fmt, 0.0) for matrix, fmts in formats.items() for fmt in fmts)
        return
    stride = -(-len(used) // EXPERT_TOKENS) | 1  # odd, or of 16 × 16 patches a few columns would stand for all
    pairs = used[::stride].contiguous()
    rows = torch.cat([pairs + branch * tokens.pairs for branch in range(tokens.branches)])
    rows = rows[gates[rows] != 0]
    where = torch.searchsorted(pairs, rows % tokens.pairs)
    u = tokens.inputs[rows]
    scale = (gates * tokens.coefficients)[rows].unsqueeze(1) * tokens.gamma[rows]
    share = len(used) / len(pairs) / tokens.pairs
    gate, up, down = (layer.weight for layer in (expert.gate_proj, expert.up_proj, expert.down_proj))
    opened, lifted = F.silu(u @ gate.T), u @ up.T
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "gate_proj.weight": lambda w: ((F.silu(u @ w.T) - opened) * lifted) @ down.T,
        "up_proj.weight": lambda w: (opened * (u @ (w - up).T)) @ down.T,
        "down_proj.weight": lambda w: (opened * lifted) @ (w - down).T,
    }
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    for matrix, fmts in formats.items():
        for fmt in fmts:
            error = changes[matrix](nearest(weights[matrix], fmt)) * scale
            total = error.new_zeros(len(pairs), error.shape[1]).index_add_(0, where, error)
            yield matrix, fmt, float(total.double().square().sum()) * share
