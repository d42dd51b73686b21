"""Weights rounded by GPTQ, block after block, on calibration states that come from the rounded blocks before.

Within a block: modulation, then attention's two layers, then every expert's gate and up on the tokens that chose it,
and its down on the neurons of the rounded two. A mixture's tokens are weighted by γ² times their branch's weight times
their squared routing weight, other layers' inputs by their branch's weight. An expert's Hessian is shrunk towards that
of all tokens of its block when few chose it. Layers outside the blocks are rounded to the nearest values. Where a
matrix is cut into pieces its neurons are put in order first, and columns pass their errors on across pieces.

The original model's states run alongside, to measure the error of the rounded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.computed import Computing, as_stored
from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.compression.replay.amplification import relative_error
from ditmoe_cli.compression.replay.guided import in_branches
from ditmoe_cli.compression.replay.neuron_order import planned_orders, reorder, unrounded
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.states import fitting_states
from ditmoe_cli.compression.replay.stream import CalibrationStream, Tokens
from ditmoe_cli.compression.rounding.gptq import Hessian, best_rounding, hessian_of, shrunk
from ditmoe_cli.compression.rounding.smooth import block_scales, smooth_inputs, smoothed_names
from ditmoe_cli.compression.working_sizes import POOLED_TOKENS, TOKENS_PER_INPUT
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.formats.registry import grid_of
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import Phase, phase
from ditmoe_cli.routing.profile import require_profile_of


@dataclass(frozen=True)
class RoundedModel:
    """The distance of the rounded model from the original on the calibration states.

    Attributes:
        error: Σ ‖Δ prediction‖² / Σ ‖prediction‖², guided.
        agreement: of each block, the share of selections that both models make.
    """

    error: float
    agreement: tuple[float, ...]


def round_blocks(computing: Computing, stage: Formats) -> RoundedModel:
    """Round the weights that a stage gives formats and keep them, going on behind the blocks of an unfinished run.

    Raises `BadInputError` for a profile of another checkpoint or without states, and for values that are not finite.
    """
    checkpoint = computing.checkpoint
    require_profile_of(computing.profile, checkpoint.fingerprint, checkpoint.path)
    model = OffloadedDiTMoE(checkpoint, torch.device(computing.device), dtype=computing.dtype)
    widest = max((checkpoint.weights[name].info.shape[1] for name in stage.formats), default=1)
    states = fitting_states(computing, widest, TOKENS_PER_INPUT, stage.rounding.tokens if stage.rounding else 0)
    outside = {model.linear(n): fmt for n, fmt in stage.formats.items() if split_name(n).block is None}
    orders = planned_orders(computing, stage)
    kept = computing.blocks
    with resident_blocks(model, f"rounding {checkpoint.name}", kept.start) as blocks:
        original = CalibrationStream(model, states)
        with rounded(outside):
            student = CalibrationStream(model, states)
        original.go_on(kept.state, "original")
        student.go_on(kept.state, "student")
        for index, block in blocks:
            selected = _advanced(original, block)
            reorder(block, index, orders[index])
            members = unrounded(checkpoint, stage, index, orders[index])
            members |= _smoothed(computing, stage, index, block)
            formats = {name: fmt for name, fmt in stage.formats.items() if split_name(name).block == index}
            with phase("rounding", len(formats), "matrices", share=0.9) as progress:
                rounding = _BlockRounding(checkpoint, index, block, student, progress)
                members |= rounding.before_mixture(formats)
                of_mixture, selected_by_student = rounding.advanced(formats)
            agreement = {"agreement": _agreement(selected, selected_by_student)}
            kept.keep(index, members | of_mixture, agreement, {"original": original.x, "student": student.x})
        guided = in_branches(states, model)
        expected = guided.predicted(model, original.x, original.c)
        with rounded(outside):
            prediction = guided.predicted(model, student.x, student.c)
        error = relative_error(prediction, expected)
    return RoundedModel(error, tuple(kept.result(index).document["agreement"] for index in range(kept.total)))


def _advanced(stream: CalibrationStream, block: Block) -> Tensor:
    """Let a stream pass a block, and return the router rows (T, k) that its tokens select."""
    attended = stream.attend(block)
    rows: Tensor = block.moe.gate(attended.inputs.flatten(0, 1)).rows
    stream.advance(attended, block.moe)
    return rows


def _smoothed(computing: Computing, stage: Formats, index: int, block: Block) -> dict[str, Tensor]:
    """Smooth a block's inputs in place, if the stage does so; return the changed weights that get no format."""
    checkpoint, profile = computing.checkpoint, computing.profile
    names = smoothed_names(checkpoint, stage, index)
    if not names:
        return {}
    if "input.max" not in profile.header.tensors:
        raise BadInputError(f"{profile.path}: the profile has no 'input.max'; profile again without ⟨fast⟩")
    assert stage.rounding is not None
    largest = profile.block_tensor("input.max", index).to(block.moe.gate.weight.device)
    smooth_inputs(block, block_scales(block, largest, stage.rounding.smoothing))
    tensors = {in_block(index, name): tensor for name, tensor in block.state_dict().items()}
    dtypes = {name: torch_dtype(checkpoint.weights[name].info.dtype) for name in names}
    return {name: as_stored(checkpoint, name, tensors[name], dtypes[name]) for name in names}


def _agreement(rows: Tensor, others: Tensor) -> float:
    """Return the share of selections (T, k) that both have."""
    return float((rows.unsqueeze(2) == others.unsqueeze(1)).any(dim=2).double().mean())


class _BlockRounding:
    """One block whose layers are rounded in place."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, block: Block, stream: CalibrationStream, progress: Phase
    ) -> None:
        self.checkpoint, self.index, self.block, self.stream = checkpoint, index, block, stream
        self.progress = progress

    def before_mixture(self, formats: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store modulation and attention, in the order in which they are rounded."""
        early = [name for name in formats if ".adaLN_modulation." in name]
        # first layers first, since the second's inputs come from the rounded first layer
        early += sorted((name for name in formats if ".attn." in name), key=lambda name: "qkv" not in name)
        for name in early:
            layer = linear(self.block, name.removeprefix(in_block(self.index, "")))
            with _inputs_of(layer) as inputs:
                if ".attn." in name:
                    self.stream.attend(self.block)
                else:
                    self.block.adaLN_modulation(self.stream.c)
            rows = torch.cat(inputs)
            held, weights = self.stream.of_rows(len(rows))
            own, held_out = (hessian_of(rows[side], weights[side]) for side in (~held, held))
            yield from self._rounded(name, formats[name], layer, own, own, held_out)

    def advanced(self, formats: Mapping[str, str]) -> tuple[dict[str, Tensor], Tensor]:
        """Round the mixture, and let the stream pass the block.

        Returns the tensors that store the experts and the shared expert, and the router rows (T, k) that tokens select.
        """
        attended = self.stream.attend(self.block)
        members = dict(self._mixture(formats, self.stream.tokens(attended)))
        rows: Tensor = self.block.moe.gate(attended.inputs.flatten(0, 1)).rows
        self.stream.advance(attended, self.block.moe)
        return members, rows

    def _mixture(self, formats: Mapping[str, str], tokens: Tokens) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that store the experts and the shared expert, rounded on their inputs."""
        routing = self.block.moe.gate(tokens.inputs)
        for e, expert in enumerate(self.block.moe.experts):
            yield from self._expert(formats, f"moe.experts.{e}", expert, tokens, routing.gate_of(e))
        every_token = torch.ones_like(tokens.weights)
        yield from self._expert(formats, SHARED, self.block.moe.shared_experts, tokens, every_token)

    def _expert(
        self, formats: Mapping[str, str], stem: str, expert: nn.Module, tokens: Tokens, gates: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the members of an expert: gate and up on its inputs, down on the neurons of the rounded two."""
        assert isinstance(expert, SwiGLU)
        weights = tokens.weights * gates.square()
        stride = len(gates) // POOLED_TOKENS | 1  # odd: an even one would take a few columns of 16 × 16 patches only
        spaced = torch.arange(0, len(gates), stride, device=gates.device)
        fitted = spaced[~tokens.held[spaced]]
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
        self.progress(1)


@contextmanager
def _inputs_of(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """Yield a list that the layer's inputs (rows, in) are added to, call by call."""
    inputs: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].flatten(0, -2))):
        yield inputs
