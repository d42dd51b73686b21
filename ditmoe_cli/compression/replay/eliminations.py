"""The order in which neurons of each expert may go, and the refitted error of every width, on calibration states.

Calibration states run through the original blocks. For each expert the Gram matrix is that of its neurons' parts of the
guided output: with the pairs of conditional and unconditional token, s_b the branches' coefficients, g the routing
weight and γ the residual gate, taken as a_t c_d for token t and channel d,

    ψ = Σ_b s_b a_b g_b φ_b,      v_jd = c_d W_down[d, j].

`compression.algebra.elimination` does the rest. Errors are squared errors of the guided stream for each pair, as those
of formats are (`compression.precision.expert_errors`); those of a fit of k neurons to n pairs are (n + k) / (n - k)
times as large on other tokens (Akaike's final prediction error, 1970, https://doi.org/10.1007/BF02506337).

An expert of H neurons takes 2 n D H operations for each of its two products, n H² for the Gram, and 4 H³ in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.elimination import eliminate
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.guided import in_branches
from ditmoe_cli.compression.replay.states import fitting_states
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.compression.replay.tokens import BlockTokens, attended_tokens
from ditmoe_cli.compression.working_sizes import ELIMINATION_TOKENS, TOKENS_PER_NEURON
from ditmoe_cli.errors import BadInputError, DitmoeError
from ditmoe_cli.files.arrays import read_arrays, read_document, write_arrays
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.names import SHARED, in_block
from ditmoe_cli.files.workfolder import KeptLoop
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import each

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 2048  # pairs whose neurons are computed at a time
_LEAST_FREEDOM = 8  # of n pairs at least an eighth counts as left over: more neurons have no error to trust


@dataclass(frozen=True)
class NeuronCurve:
    """What fewer neurons of one expert cost.

    Attributes:
        order: (H,) neurons, the last to go first.
        errors: (H + 1,) squared error of the guided stream with the first k neurons refitted, fp64.
        growth: (H + 1,) Σ ‖v‖² G of the refitted neurons over that of all, fp64: by how much errors of their rounding
            differ from those of the whole expert.
    """

    order: Tensor
    errors: Tensor
    growth: Tensor


NEURONS_SCHEMA = "ditmoe.neurons/1"
Curves = Sequence[Mapping[str, NeuronCurve]]
"""The curves of each block's experts, by their names within the block."""


def neuron_curves(calibrated: Calibrated) -> Curves:
    """Return the curves of all experts: kept ones, or measured and then kept beside the profile.

    An interrupted measurement goes on behind its last block. Raises `BadInputError` for a profile without states.
    """
    kept, depth = calibrated.kept, calibrated.checkpoint.config.depth
    if kept is None:
        return _parsed(_measured(calibrated, None), depth)
    path = kept.path.with_suffix("").with_suffix(".neurons.safetensors")
    found = _kept(path, kept.key)
    if found is not None:
        kept.note(f"using the errors of widths kept in {path}")
        return _parsed(found, depth)
    with kept.working({"neurons": NEURONS_SCHEMA}) as work:
        loop = work.loop("neurons", depth) if work is not None else None
        tensors = _measured(calibrated, loop)
        try:
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            document = {"schema": NEURONS_SCHEMA, "key": kept.key, "digest": _digest(arrays)}
            write_arrays(path, arrays, document, force=True)
        except (DitmoeError, OSError) as error:
            kept.note(f"the errors of widths are not kept: {error}")
    return _parsed(tensors, depth)


def _kept(path: Path, key: str) -> dict[str, Tensor] | None:
    """Return what is kept in a file; None where it is absent, damaged, changed or of another key."""
    try:
        header = read_safetensors_header(path)
        document = read_document(header, NEURONS_SCHEMA, path)
        if document is None or document.get("key") != key:
            return None
        arrays = read_arrays(path, header.tensors)
    except (BadInputError, OSError, ValueError):
        return None
    if document.get("digest") != _digest(arrays):
        return None
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of arrays: of their names, dtypes, shapes and values."""
    return digest(
        {
            name: [array.dtype.str, list(array.shape), sha256(array.tobytes()).hexdigest()]
            for name, array in arrays.items()
        }
    )


def _parsed(tensors: Mapping[str, Tensor], depth: int) -> Curves:
    blocks: list[dict[str, NeuronCurve]] = [{} for _ in range(depth)]
    for name in tensors:
        stem, _, field = name.rpartition(".")
        if field == "order":
            parts = (tensors[f"{stem}.{each}"] for each in ("order", "errors", "growth"))
            block = int(stem.split(".")[1])
            blocks[block][stem.removeprefix(in_block(block, ""))] = NeuronCurve(*parts)
    return blocks


def _measured(calibrated: Calibrated, loop: KeptLoop | None) -> dict[str, Tensor]:
    """Return the curves of all blocks: of those that are left measured, and each kept."""
    checkpoint = calibrated.checkpoint
    start = loop.start if loop is not None else 0
    found: dict[str, Tensor] = {}
    for index in range(start):
        assert loop is not None
        piece = loop.result(index)
        found |= {name: piece.tensor(name) for name in piece.names}
    if start == checkpoint.config.depth:
        return found
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    neurons = max(sum(block.expert_widths) for block in checkpoint.config.blocks)
    wanted = min(TOKENS_PER_NEURON * neurons, ELIMINATION_TOKENS)
    with torch.inference_mode():
        states = in_branches(fitting_states(calibrated, 0, 0, wanted), model)
        stream = embedded(model, states)
    if loop is not None and loop.state is not None:
        stream.x = loop.state.tensor("x").to(stream.x.device)
    with resident_blocks(model, f"measuring the neurons of {checkpoint.name}", start) as blocks:
        for index, block in blocks:
            attended = stream.attended(block)
            tokens = attended_tokens(attended, states)
            stream = Stream(torch.cat([block.mix(part, index, None) for part in attended]), stream.c)
            del attended
            own: dict[str, Tensor] = {}
            for name, curve in block_curves(block, tokens):
                stem = in_block(index, name)
                own |= {f"{stem}.order": curve.order, f"{stem}.errors": curve.errors, f"{stem}.growth": curve.growth}
            if loop is not None:
                loop.keep(index, own, {}, {"x": stream.x})
            found |= own
    return found


def block_curves(block: Block, tokens: BlockTokens) -> Iterator[tuple[str, NeuronCurve]]:
    """Yield the curve of each expert of a block, the shared one last, on the tokens of its mixture."""
    routing = block.moe.gate(tokens.inputs)
    tiny = torch.finfo(torch.float32).tiny
    channel = tokens.gamma.square().mean(dim=0).clamp_min(tiny).sqrt()
    size = (tokens.gamma / channel).square().mean(dim=1).sqrt()
    experts = [*enumerate(block.moe.experts), (None, block.moe.shared_experts)]
    for number, expert in each(experts, "eliminating neurons", "experts", share=0.8):
        assert isinstance(expert, SwiGLU)
        gates = torch.ones_like(size) if number is None else routing.gate_of(number)
        name = SHARED if number is None else f"moe.experts.{number}"
        yield name, expert_curve(expert, tokens, gates * tokens.coefficients * size, channel)


def expert_curve(expert: SwiGLU, tokens: BlockTokens, scales: Tensor, channel: Tensor) -> NeuronCurve:
    """Return the curve of one expert.

    `scales` (T,) are s g a of each token, 0 where it did not select the expert, and `channel` (D,) is c.
    """
    down = expert.down_proj.weight
    paired = tokens.paired(scales)
    pairs = (paired != 0).any(dim=1).nonzero().squeeze(1)
    gram = torch.zeros(down.shape[1], down.shape[1], device=down.device)
    for some in torch.split(pairs, _CHUNK):
        parts = (
            expert.neurons(tokens.inputs[some + branch * tokens.pairs]).float() * paired[some, branch, None]
            for branch in range(tokens.branches)
        )
        psi = torch.stack(list(parts)).sum(dim=0)
        gram.addmm_(psi.T, psi)
    if not bool(gram.diagonal().isfinite().all()):
        raise BadInputError("neurons of an expert are NaN or infinite on the calibration states")
    eliminated = eliminate(gram, (down * channel[:, None]).T)
    widths = torch.arange(len(eliminated.errors), dtype=torch.float64, device=down.device)
    count = float(len(pairs))
    unseen = (count + widths) / (count - widths).clamp_min(max(count / _LEAST_FREEDOM, 1.0))
    whole = eliminated.energies[-1].clamp_min(torch.finfo(torch.float64).tiny)
    return NeuronCurve(
        eliminated.order.to(torch.int32).cpu(),
        (eliminated.errors * unseen / max(tokens.pairs, 1)).cpu(),
        (eliminated.energies / whole).cpu(),
    )
