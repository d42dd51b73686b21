"""Weights computed block by block: merging, narrowing, constants, refitting.

Calibration states run through the blocks that are compressed already, so that each block is fitted on the inputs that
it will have. Its target is the original mixture's output on the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from ditmoe_cli.compression.block_layout import BlockLayout, block_layouts
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.computed import Computing, as_stored, source_dtype
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.new_mixture import Source, expert_map, new_weights, weights_of
from ditmoe_cli.compression.plan import Experts, Repair
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.repair.rescale import rescale
from ditmoe_cli.compression.replay.eliminations import Curves, neuron_curves
from ditmoe_cli.compression.replay.states import fitting_states
from ditmoe_cli.compression.replay.stream import CalibrationStream, Tokens
from ditmoe_cli.compression.working_sizes import TOKENS_PER_UNKNOWN
from ditmoe_cli.files.names import EXPERT_OF, in_block
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.expert_weights import StoredMixture
from ditmoe_cli.model.experts import SwiGLU, reserve
from ditmoe_cli.model.loading import put
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE, release
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import phase


def rebuild(computing: Computing, stage: Experts) -> tuple[float, ...]:
    """Compute and keep every block's new weights, going on behind those that an unfinished run has left.

    Returns, where weights are refitted, each block's held-out error over that before. Raises `BadInputError` for a
    profile that lacks what is needed, and where weights overflow their dtype.
    """
    layouts = block_layouts(computing.checkpoint, stage)
    if not needs_tokens(stage):
        _rebuild_stored(computing, stage, layouts)
        return ()
    _rebuild_running(computing, stage, layouts)
    kept = computing.blocks
    return tuple(kept.result(index).document["error"] for index in range(kept.total)) if stage.repair else ()


def _rebuild_stored(computing: Computing, stage: Experts, layouts: Sequence[BlockLayout]) -> None:
    """Compute each block's weights from the stored ones, which are read one expert at a time."""
    checkpoint, kept, device = computing.checkpoint, computing.blocks, torch.device(computing.device)
    title, orders = _title(checkpoint, stage), neuron_orders(computing, stage)
    with torch.inference_mode(), phase(title, kept.total, "blocks", start=kept.start) as progress:
        for index in range(kept.start, kept.total):
            mixture = StoredMixture(checkpoint, index, device)
            source = Source(mixture, index, layouts[index], stage, computing.profile, orders=orders[index])
            stored = _stored(checkpoint, index, layouts[index], new_weights(source))
            kept.keep(index, {in_block(index, name): tensor for name, tensor in stored.items()})
            progress(1)


def _rebuild_running(computing: Computing, stage: Experts, layouts: Sequence[BlockLayout]) -> None:
    """Compute each block's weights on the tokens that arrive at it."""
    checkpoint, config, kept = computing.checkpoint, computing.checkpoint.config, computing.blocks
    orders = neuron_orders(computing, stage)
    model = OffloadedDiTMoE(checkpoint, torch.device(computing.device), dtype=computing.dtype)
    with resident_blocks(model, _title(checkpoint, stage), kept.start) as blocks:
        stream = _stream(computing, stage, layouts, model)
        for index, block in blocks:
            layout, moe, repair = layouts[index], block.moe, stage.repair
            attended = stream.attend(block)
            tokens = stream.tokens(attended)
            arriving, profile = (moe, tokens), computing.profile
            source = Source(weights_of(moe), index, layout, stage, profile, arriving, orders[index])
            changed = mixture_of(new_weights(source), config, layout.config, model.device, computing.dtype)
            del source, arriving  # they would keep the old weights beside the new ones
            error = {"error": repaired(moe, changed, tokens, repair)} if repair else {}
            release(block)  # its new weights take its place before the next block is read
            stored = _stored(checkpoint, index, layout, weights_of(changed).items())
            stream.advance(attended, _as_stored(stored, computing, layout))
            named = {in_block(index, name): tensor for name, tensor in stored.items()}
            kept.keep(index, named, error, {"x": stream.x})


def _title(checkpoint: Checkpoint, stage: Experts) -> str:
    return f"refitting {checkpoint.name}" if stage.repair else f"computing the weights of {checkpoint.name}"


def repaired(original: SparseMoE, changed: SparseMoE, tokens: Tokens, repair: Repair) -> float:
    """Fit `changed` to `original` in place; return its held-out error over that before."""
    if repair.scale:
        return rescale(original, changed, tokens)
    return refit(original, changed, tokens, repair.shared).error


def needs_tokens(stage: Experts) -> bool:
    """Tell whether weights are computed from tokens, not from the old weights and the profile's sums alone."""
    fitted = stage.merging is not None and MERGES[stage.merging].needs_tokens
    return stage.repair is not None or fitted or any(b.constants or b.shared_width for b in stage.blocks)


def neuron_orders(computing: Calibrated, stage: Experts) -> list[dict[str, Tensor]]:
    """Return the orders in which neurons of each block's experts go; nothing where energies tell which stay.

    Raises `BadInputError` for a profile without states.
    """
    if stage.selection is None:
        return [{} for _ in range(computing.checkpoint.config.depth)]
    return orders_of(neuron_curves(computing))


def orders_of(curves: Curves) -> list[dict[str, Tensor]]:
    """Return the orders (H,) in which neurons of each block's experts go."""
    return [{stem: curve.order.long() for stem, curve in block.items()} for block in curves]


def _stream(
    computing: Computing, stage: Experts, layouts: Sequence[BlockLayout], model: OffloadedDiTMoE
) -> CalibrationStream:
    """Return the calibration states in front of the block to start with.

    There are enough for the unknowns of an output of any block.
    """
    width = computing.checkpoint.config.hidden_size
    unknowns = max(sum(layout.config.expert_widths) + layout.config.shared_width + width for layout in layouts)
    tokens = stage.repair.tokens if stage.repair else 0
    stream = CalibrationStream(model, fitting_states(computing, unknowns, TOKENS_PER_UNKNOWN, tokens))
    stream.go_on(computing.blocks.state, "x")
    return stream


def _as_stored(stored: Mapping[str, Tensor], computing: Computing, layout: BlockLayout) -> SparseMoE:
    """Return a mixture with its weights rounded as they are written."""
    config, device = computing.checkpoint.config, torch.device(computing.device)
    rounded = ((name, tensor.to(device, torch.float32)) for name, tensor in stored.items() if name != EXPERT_OF)
    weights = chain(rounded, expert_map(layout, device).items())
    return mixture_of(weights, config, layout.config, device, computing.dtype)


def mixture_of(
    weights: Iterable[tuple[str, Tensor]],
    config: DiTMoEConfig,
    block: BlockConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> SparseMoE:
    """Return a mixture with these weights, by names within the block, that computes in `dtype`.

    Its experts lie together in memory as those of a model do: so equal weights give equal outputs, to the last bit.
    """
    with torch.device("meta"):
        moe = SparseMoE(config.hidden_size, block, config.top_k)
    reserve(cast("list[SwiGLU]", list(moe.experts)), device, torch.float32)
    reserve([moe.shared_experts], device, torch.float32)
    for name, tensor in weights:
        put(moe, name.removeprefix("moe."), tensor)
    moe.dtype = dtype
    return moe.eval()


def _stored(
    checkpoint: Checkpoint, index: int, layout: BlockLayout, weights: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """Return weights in the dtypes that they are written in, on the CPU."""
    stored = {}
    for name, tensor in weights:
        dtype = torch_dtype(source_dtype(checkpoint, index, layout, name))
        stored[name] = as_stored(checkpoint, in_block(index, name), tensor, dtype)
    return stored
