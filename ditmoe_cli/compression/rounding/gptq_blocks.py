"""Weights rounded by GPTQ, block after block, on what the already rounded blocks below make of calibration states.

Within a block: modulation, then attention's two layers, then every expert's gate and up on the tokens that chose it,
and its down on the neurons of the rounded two. A mixture's tokens weigh γ², their branch's weight and the square of
their routing weight, all else its branch's weight. An expert's Hessian is shrunk towards that of all tokens of its
block when few chose it. Layers outside the blocks are rounded to the nearest values. Where a matrix is cut into pieces
its neurons are put in order first; all its columns then pass their errors on, across pieces too.

The original model's states run along, so that it can be told how far the rounded one is from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.computed import Computing, as_stored
from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.compression.replay.guided import conditions, relative_error
from ditmoe_cli.compression.replay.neuron_order import planned_orders, reorder, unrounded
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.states import calibration_states
from ditmoe_cli.compression.replay.stream import Stream, Tokens
from ditmoe_cli.compression.rounding.gptq import Hessian, best_rounding, hessian_of, shrunk
from ditmoe_cli.compression.rounding.smooth import block_scales, smooth_inputs
from ditmoe_cli.compression.rounding.smoothed import smoothed_names
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.registry import grid_of
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.moe import SwiGLU
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile, require_profile_of

TOKENS_PER_INPUT = 8
FEWEST_TOKENS, MOST_TOKENS = 20_480, 65_536
POOLED_TOKENS = 4_096  # of a block, that stand in for those of an expert that few chose


@dataclass(frozen=True)
class Encoded:
    """How far the rounded model is from the original on the calibration states.

    Attributes:
        error: Σ ‖Δ prediction‖² / Σ ‖prediction‖², guided.
        agreement: of each block, the share of selected experts that both models select.
    """

    error: float
    agreement: tuple[float, ...]


def encode(computing: Computing, stage: Formats) -> Encoded:
    """Round the weights of all blocks that have formats into the spool.

    Raises `BadInputError` for a profile of another checkpoint or without states, and for values that are not finite.
    """
    checkpoint, profile = computing.checkpoint, computing.profile
    require_profile_of(profile, checkpoint.fingerprint, checkpoint.path)
    model = OffloadedDiTMoE(checkpoint, torch.device(computing.device))
    spec = profiled_spec(profile.calibration, checkpoint)
    states = calibration_states(profile, spec, _wanted(checkpoint, stage))
    outside = {model.linear(n): fmt for n, fmt in stage.formats.items() if split_name(n).block is None}
    orders = planned_orders(computing, stage)
    agreement = []
    with torch.inference_mode(), resident_blocks(model, computing.bar, f"rounding {checkpoint.path.name}") as blocks:
        teacher = Stream(model, states)
        with rounded(outside):
            student = Stream(model, states)
        for index, block in blocks:
            formats = {n: fmt for n, fmt in stage.formats.items() if split_name(n).block == index}
            seen = teacher.attend(block)
            chosen = block.moe.gate(seen.inputs.flatten(0, 1)).rows
            teacher.advance(seen, block.moe)
            del seen
            reorder(block, index, orders[index])
            members = unrounded(checkpoint, stage, index, orders[index])
            members |= _smoothed(checkpoint, stage, profile, index, block)
            rounding = _BlockRounding(checkpoint, index, block, student)
            members |= rounding.before_mixture(formats)
            seen = student.attend(block)
            members |= rounding.mixture(formats, student.tokens(seen))
            agreement.append(_agreement(chosen, block.moe.gate(seen.inputs.flatten(0, 1)).rows))
            student.advance(seen, block.moe)
            del seen
            computing.spool.write(index, members)
        probe = conditions(model, states, spec)
        wanted = probe.predicted(model, teacher.x, teacher.c)
        with rounded(outside):
            found = probe.predicted(model, student.x, student.c)
        error = relative_error(found, wanted)
    return Encoded(error, tuple(agreement))


def _smoothed(
    checkpoint: Checkpoint, stage: Formats, profile: RoutingProfile, index: int, block: Block
) -> dict[str, Tensor]:
    """Smooth a block's inputs in place, where that is asked for; return what of it is written as plain weights."""
    names = smoothed_names(checkpoint, stage, index)
    if not names:
        return {}
    if "input.max" not in profile.header.tensors:
        raise BadInputError(f"{profile.path}: the profile has no 'input.max'; profile again without --fast")
    assert stage.rounding is not None
    largest = profile.block_tensor("input.max", index).to(block.moe.gate.weight.device)
    smooth_inputs(block, block_scales(block, largest, stage.rounding.smoothing))
    tensors = {in_block(index, name): tensor for name, tensor in block.state_dict().items()}
    dtypes = {name: torch_dtype(checkpoint.weights[name].info.dtype) for name in names}
    return {name: as_stored(checkpoint, name, tensors[name], dtypes[name]) for name in names}


def _wanted(checkpoint: Checkpoint, stage: Formats) -> int:
    """Return how many states to fit on: enough tokens for the number of inputs of the widest layer."""
    inputs = max((checkpoint.weights[name].info.shape[1] for name in stage.formats), default=1)
    asked = stage.rounding.tokens if stage.rounding else 0
    tokens = asked or min(max(TOKENS_PER_INPUT * inputs, FEWEST_TOKENS), MOST_TOKENS)
    return max(tokens // checkpoint.config.num_patches, 16)


def _agreement(chosen: Tensor, others: Tensor) -> float:
    """Return the share of selections (T, k) that both have."""
    return float((chosen.unsqueeze(2) == others.unsqueeze(1)).any(dim=2).double().mean())


class _BlockRounding:
    """One block whose layers are rounded in place."""

    def __init__(self, checkpoint: Checkpoint, index: int, block: Block, stream: Stream) -> None:
        self.checkpoint, self.index, self.block, self.stream = checkpoint, index, block, stream

    def before_mixture(self, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store modulation and attention, in the order in which they are rounded."""
        early = [name for name in formats if ".adaLN_modulation." in name]
        # what leaves attention is seen once what enters it is rounded
        early += sorted((name for name in formats if ".attn." in name), key=lambda name: "qkv" not in name)
        for name in early:
            layer = linear(self.block, name.removeprefix(in_block(self.index, "")))
            with _inputs_of(layer) as inputs:
                if ".attn." in name:
                    self.stream.attend(self.block)
                else:
                    self.block.adaLN_modulation(self.stream.c)
            found = torch.cat(inputs)
            held, weights = self.stream.of_rows(len(found))
            own, rest = (hessian_of(found[side], weights[side]) for side in (~held, held))
            yield from self._rounded(name, formats[name], layer, own, own, rest)

    def mixture(self, formats: Mapping[str, str], tokens: Tokens) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store the experts and the shared one, rounded on what they are given."""
        routing = self.block.moe.gate(tokens.inputs)
        for e, expert in enumerate(self.block.moe.experts):
            yield from self._expert(formats, f"moe.experts.{e}", expert, tokens, routing.gate_of(e))
        everyone = torch.ones_like(tokens.weights)
        yield from self._expert(formats, SHARED, self.block.moe.shared_experts, tokens, everyone)

    def _expert(
        self, formats: Mapping[str, str], stem: str, expert: nn.Module, tokens: Tokens, gates: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the members of an expert: gate and up on its inputs, down on the neurons of the rounded two."""
        assert isinstance(expert, SwiGLU)
        weights = tokens.weights * gates.square()
        stride = len(gates) // POOLED_TOKENS | 1  # odd, or of 16 × 16 patches a few columns would stand for all
        some = torch.arange(0, len(gates), stride, device=gates.device)
        fitted = some[~tokens.held[some]]
        for matrices, neurons in ((MATRICES[:2], False), (MATRICES[2:], True)):
            names = {f"{in_block(self.index, stem)}.{m}.weight": getattr(expert, m) for m in matrices}
            if not any(name in formats for name in names):
                continue

            def moment(rows: Tensor, scales: Tensor, neurons: bool = neurons) -> Hessian:
                inputs = tokens.inputs[rows]
                return hessian_of(expert.neurons(inputs) if neurons else inputs, scales[rows])

            used = gates != 0
            own, held = (moment((used & side).nonzero().squeeze(1), weights) for side in (~tokens.held, tokens.held))
            pooled = moment(fitted, tokens.weights)
            for name, layer in names.items():
                if name in formats:
                    yield from self._rounded(name, formats[name], layer, own, pooled, held)

    def _rounded(
        self, name: str, fmt: str, layer: nn.Linear, own: Hessian, pooled: Hessian, held: Hessian
    ) -> Iterator[tuple[str, Tensor]]:
        """Round a layer in place; yield the tensors that store it."""
        weight = layer.weight.float()
        hessian = shrunk(own, pooled, weight.shape[1])
        grid = grid_of(weight, fmt, hessian.diagonal(), name=name)
        layer.weight.data = best_rounding(weight, hessian, grid.round, held, tokens=own.tokens).weight
        info = self.checkpoint.weights[name].info
        yield from ((n, t.cpu()) for n, t in grid.pack(layer.weight.data, info).items())


@contextmanager
def _inputs_of(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """Collect what a layer is given, a row each."""
    inputs: list[Tensor] = []
    with ExitStack() as stack:
        hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
        stack.callback(hook.remove)
        yield inputs
