"""Weights rounded by GPTQ, block after block, on calibration states that come from the rounded blocks before.

Within a block: modulation, then attention's two layers, then every expert's gate and up on the tokens that chose it,
and its down on the neurons of the rounded two. A mixture's tokens are weighted by γ² times their branch's weight times
their squared routing weight, other layers' inputs by their branch's weight. An expert's Hessian is shrunk towards that
of all tokens of its block when few chose it. Layers outside the blocks are rounded to the nearest values. Where a
matrix is cut into pieces its neurons are put in order first, and columns pass their errors on across pieces.

The original model's states run alongside, to measure the error of the rounded model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.computed import Computing, as_stored
from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.compression.replay.amplification import relative_error
from ditmoe_cli.compression.replay.guided import image_slices, in_branches
from ditmoe_cli.compression.replay.neuron_order import planned_orders, reorder, unrounded
from ditmoe_cli.compression.replay.rounded_layers import linear, rounded
from ditmoe_cli.compression.replay.states import fitting_states
from ditmoe_cli.compression.replay.stream import CalibrationStream, Tokens, joined
from ditmoe_cli.compression.rounding.layers_together import Reading, round_layers
from ditmoe_cli.compression.rounding.smooth import block_scales, smooth_inputs, smoothed_names
from ditmoe_cli.compression.working_sizes import POOLED_TOKENS, TOKENS_PER_INPUT
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Attended, Block
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import Phase, each, phase
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
            selected = passed(original, block)
            reorder(block, index, orders[index])
            members = unrounded(checkpoint, stage, index, orders[index])
            members |= _smoothed(computing, stage, index, block)
            formats = {name: fmt for name, fmt in stage.formats.items() if split_name(name).block == index}
            with phase("rounding", len(formats), "matrices", share=0.9) as progress:
                rounding = BlockRounding(checkpoint, index, block, student, progress)
                before, attended = rounding.before_mixture(formats)
                of_mixture, selected_by_student = rounding.advanced(formats, attended)
            agreement = {"agreement": agreement_of(selected, selected_by_student)}
            kept.keep(index, members | before | of_mixture, agreement, {"original": original.x, "student": student.x})
        guided = in_branches(states, model)
        expected = guided.predicted(model, original.x, original.c)
        with rounded(outside):
            prediction = guided.predicted(model, student.x, student.c)
        error = relative_error(prediction, expected)
    return RoundedModel(error, tuple(kept.result(index).document["agreement"] for index in range(kept.total)))


def passed(stream: CalibrationStream, block: Block) -> Tensor:
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


def agreement_of(rows: Tensor, others: Tensor) -> float:
    """Return the share of selections (T, k) that both have."""
    return float((rows.unsqueeze(2) == others.unsqueeze(1)).any(dim=2).double().mean())


class BlockRounding:
    """One block whose layers are rounded in place, on the states of a stream that is in front of it."""

    def __init__(
        self, checkpoint: Checkpoint, index: int, block: Block, stream: CalibrationStream, progress: Phase
    ) -> None:
        self.checkpoint, self.index, self.block, self.stream = checkpoint, index, block, stream
        self.progress = progress

    def before_mixture(self, formats: Mapping[str, str]) -> tuple[dict[str, Tensor], Attended]:
        """Round modulation and attention, in this order; return the tensors that store them, and the states after both.

        The second layer of attention is rounded on what the rounded first one gives; attention is computed once.
        """
        block, stream = self.block, self.stream
        modulated = [name for name in formats if ".adaLN_modulation." in name]
        members = self._on_rows(formats, modulated, block.adaLN_modulation[0](stream.c))
        of_attention = [name for name in formats if ".attn." in name]
        first = [name for name in of_attention if "qkv" in name]
        batches = image_slices(len(stream.x))
        modulation = block.adaLN_modulation(stream.c)
        inputs = torch.cat([block.attention_inputs(stream.x[rows], modulation[rows]) for rows in batches])
        members |= self._on_rows(formats, first, inputs)
        mixed = torch.cat([block.attn.mixed(inputs[rows]) for rows in each(batches, "attending", "batches of states")])
        del inputs
        members |= self._on_rows(formats, [name for name in of_attention if name not in first], mixed)
        parts = [block.attended(stream.x[rows], modulation[rows], mixed[rows]) for rows in batches]
        return members, joined(parts)

    def _on_rows(self, formats: Mapping[str, str], names: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
        """Round the layer of a name, if there is one, on its inputs (..., in); return the tensors that store it."""
        if not names:
            return {}
        rows = inputs.flatten(0, -2)
        held, weights = self.stream.of_rows(len(rows))
        layers = {name: linear(self.block, name.removeprefix(in_block(self.index, ""))) for name in names}
        return dict(self.rounded([Reading(layers, formats, rows.__getitem__, weights * ~held, None, weights * held)]))

    def advanced(self, formats: Mapping[str, str], attended: Attended) -> tuple[dict[str, Tensor], Tensor]:
        """Round the mixture, and let the stream pass the block.

        Returns the tensors that store the experts and the shared expert, and the router rows (T, k) that tokens select.
        """
        members: dict[str, Tensor] = {}
        tokens, prefix = self.stream.tokens(attended), in_block(self.index, "")
        for readings in mixture_readings(self.block.moe, tokens, formats, prefix):
            members |= self.rounded(readings)
        rows: Tensor = self.block.moe.gate(attended.inputs.flatten(0, 1)).rows
        self.stream.advance(attended, self.block.moe)
        return members, rows

    def rounded(
        self, readings: Sequence[Reading], infos: Mapping[str, TensorInfo] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Round layers in place; yield the tensors that store them.

        Weights are those of the checkpoint by their names, or those of `infos`.
        """
        for layer in round_layers(readings):
            info = self.checkpoint.weights[layer.name].info if infos is None else infos[layer.name]
            yield from ((name, tensor.cpu()) for name, tensor in layer.grid.pack(layer.rounded.weight, info).items())
            self.progress(1)


def mixture_readings(
    moe: SparseMoE, tokens: Tokens, formats: Mapping[str, str], prefix: str = ""
) -> Iterator[list[Reading]]:
    """Yield experts' gate and up that are to be rounded on `tokens`, then their down, on neurons of the rounded two.

    `formats` are by the names of weights, which begin with `prefix`. An expert's tokens are those that chose it,
    weighted by their squared routing weights.
    """
    routing = moe.gate(tokens.inputs)
    stride = len(tokens.inputs) // POOLED_TOKENS | 1  # odd: an even one would take few columns of 16 × 16 patches only
    pooled = torch.zeros_like(tokens.weights)
    pooled[::stride] = (tokens.weights * ~tokens.held)[::stride]
    every_token = torch.ones_like(tokens.weights)
    experts: list[tuple[str, nn.Module, Callable[[], Tensor]]] = [
        *((f"moe.experts.{e}", expert, partial(routing.gate_of, e)) for e, expert in enumerate(moe.experts)),
        (SHARED, moe.shared_experts, lambda: every_token),
    ]
    for matrices in (MATRICES[:2], MATRICES[2:]):
        readings = []
        for stem, expert, gates in experts:
            named = {f"{prefix}{stem}.{matrix}.weight": expert.get_submodule(matrix) for matrix in matrices}
            layers = {name: layer for name, layer in named.items() if name in formats and isinstance(layer, nn.Linear)}
            if layers:
                assert isinstance(expert, SwiGLU)
                weights = tokens.weights * gates().square()
                inputs = _inputs(expert, tokens, neurons=matrices == MATRICES[2:])
                fitted, held = weights * ~tokens.held, weights * tokens.held
                readings.append(Reading(layers, formats, inputs, fitted, pooled, held))
        yield readings


def _inputs(expert: SwiGLU, tokens: Tokens, neurons: bool) -> Callable[[Tensor], Tensor]:
    """Return what gives the inputs of an expert, or its neurons, for the indices of tokens."""
    return lambda rows: expert.neurons(tokens.inputs[rows]) if neurons else tokens.inputs[rows]
