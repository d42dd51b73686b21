"""The sensitivity of the guided prediction to each number format of each weight, as a squared error.

Calibration states run through the original blocks. In each block the error of a format is replayed on the tokens at
hand, where it enters the residual stream: after γ, routed by the original router, on guided pairs (see
`compression.replay.tokens`). How much of an error that enters there arrives in the prediction is measured, for
each block and kind of weight, by running states with a known error through the rest of the model:

    error(W, format) = a_bk Σ_pairs ‖s γ_c e_c - (s - 1) γ_u e_u‖² / pairs

with the amplification a_bk of block b and kind k (`compression.replay.amplification`). Weights outside the blocks are
measured by the prediction alone. Errors of a plan are assumed to add up; `compression.precision.trial` measures the
error of all together.

One block's weights are in memory at a time, beside the streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.amplification import Amplification, ErrorStreams, kind_of, relative_error
from ditmoe_cli.compression.replay.guided import GuidedStates, measured_states
from ditmoe_cli.compression.replay.kept_measures import kept_blocks
from ditmoe_cli.compression.replay.rounded_layers import linear, nearest, require_range, rounded
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.compression.replay.tokens import BlockTokens, attended_tokens
from ditmoe_cli.compression.working_sizes import EXPERT_TOKENS
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import phase

Tried = Mapping[str, Sequence[str]]
"""The formats to try for each weight."""
Errors = dict[str, dict[str, float]]
"""The error of each weight in each format."""

REFERENCE = "int3-g64"  # the format whose error runs through the model


@dataclass(frozen=True)
class Sensitivities:
    """Measured errors of formats.

    Attributes:
        errors: relative squared error of the guided prediction, by weight and format.
        amplification: of each block, by kind of weight: prediction error over error of the stream.
    """

    errors: Errors
    amplification: Amplification

    def at(self, amplification: Amplification) -> Sensitivities:
        """Return the errors at other amplifications; an amplification of 0 was not measured, and the old one stays."""
        new = tuple(
            {kind: measured.get(kind) or known for kind, known in old.items()}
            for old, measured in zip(self.amplification, amplification, strict=True)
        )
        return Sensitivities({name: self._scaled(name, new) for name in self.errors}, new)

    def _scaled(self, name: str, amplification: Amplification) -> dict[str, float]:
        """Return the errors of one weight at another amplification."""
        block, errors = split_name(name).block, self.errors[name]
        if block is None:
            return errors
        kind = kind_of(name.removeprefix(in_block(block, "")))
        old, new = self.amplification[block][kind], amplification[block][kind]
        return {fmt: error / old * new if old else error for fmt, error in errors.items()}


class _StreamError(NamedTuple):
    """The error of the stream that a format of a weight, named within its block, causes."""

    name: str
    format: str
    error: float


def measured_sensitivities(calibrated: Calibrated, formats: Tried) -> Sensitivities:
    """Return the errors of every weight that `formats` names, in each of its formats.

    What is kept of earlier measurements is used again, and new ones are kept; an interrupted measurement goes on behind
    its last kept block. Raises `BadInputError` for a profile without states, and for values that are not finite.
    """
    formats = {name: tuple(fmts) for name, fmts in formats.items() if fmts}
    kept = calibrated.kept
    if kept is None:
        return _combined(_measured(calibrated, formats, True, None), formats)
    weights = digest(sorted(formats))  # amplifications are of the errors of all of them together
    known = _Raw(kept.part("errors"), kept.part("amplification").get(weights, ()))
    missing = {name: tuple(f for f in fmts if f not in known.errors.get(name, {})) for name, fmts in formats.items()}
    count = sum(map(len, missing.values()))
    if not count and known.amplification:
        kept.note(f"using the errors of formats kept in {kept.path}")
        return _combined(known, formats)
    if count < sum(map(len, formats.values())):
        kept.note(f"using the errors of formats kept in {kept.path}; {count} more are measured")
    amplifies = not known.amplification
    with kept.working({"weights": weights, "missing": digest(missing), "amplifies": amplifies}) as work:
        new = _measured(calibrated, missing, amplifies, work)
        names = {*known.errors, *new.errors}
        raw = {name: {**known.errors.get(name, {}), **new.errors.get(name, {})} for name in names}
        kept.add("errors", raw)
        amplification = known.amplification or new.amplification
        kept.add("amplification", {weights: list(amplification)})
    return _combined(_Raw(raw, amplification), formats)


class _Raw(NamedTuple):
    """Errors as they are measured: in a block those of the stream there, elsewhere those of the prediction.

    `amplification` is empty where it was not measured.
    """

    errors: Mapping[str, Mapping[str, float]]
    amplification: Sequence[Mapping[str, float]]


def _combined(raw: _Raw, formats: Tried) -> Sensitivities:
    """Return the errors of the prediction: those of a block's stream, amplified."""
    errors: Errors = {}
    for name, fmts in formats.items():
        block = split_name(name).block
        if block is None:
            errors[name] = {fmt: raw.errors[name][fmt] for fmt in fmts}
        else:
            factor = raw.amplification[block][kind_of(name.removeprefix(in_block(block, "")))]
            errors[name] = {fmt: raw.errors[name][fmt] * factor for fmt in fmts}
        if not all(map(math.isfinite, errors[name].values())):
            raise BadInputError(f"the error of rounding {name!r} is not finite")
    return Sensitivities(errors, tuple(raw.amplification))


def _measured(calibrated: Calibrated, formats: Tried, amplifies: bool, work: WorkFolder | None) -> _Raw:
    """Measure errors of formats and, where `amplifies`, amplifications of all weights that `formats` names."""
    checkpoint = calibrated.checkpoint
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with torch.inference_mode():
        measurement = _Measurement(model, measured_states(calibrated, model), formats, amplifies, checkpoint)
        start = measurement.take_up(work)
    pace = Pace()
    with resident_blocks(model, f"measuring {checkpoint.name}", start) as blocks:
        for index, block in blocks:
            measurement.pass_through(index, block)
            if work is not None and pace.is_due:
                with pace.keeping():
                    measurement.keep(work, index + 1)
        return measurement.result()


class _Measurement:
    """States that pass the blocks, and the errors measured there."""

    def __init__(
        self, model: OffloadedDiTMoE, states: GuidedStates, formats: Tried, amplifies: bool, checkpoint: Checkpoint
    ) -> None:
        self.model, self.states, self.formats = model, states, formats
        self.amplifies, self.checkpoint = amplifies, checkpoint
        self.stream = embedded(model, states)
        self.error_streams = ErrorStreams(model, states)
        self.errors: Errors = {}
        for name in self.formats:
            if split_name(name).block is None:
                require_range(model.linear(name).weight, name)
        self.of_embedders = dict(self._embedder_streams())

    def _embedder_streams(self) -> Iterator[tuple[tuple[str, str], Stream]]:
        """Yield streams of states that were embedded by rounded weights, by (weight, format)."""
        for name in self.formats:
            if split_name(name).block is None and name.startswith("t_embedder."):
                layer = self.model.linear(name)
                for fmt in self.formats[name]:
                    with rounded({layer: fmt}):
                        yield (name, fmt), embedded(self.model, self.error_streams.states)

    def pass_through(self, index: int, block: Block) -> None:
        """Measure a block's weights, and let all streams pass the block."""
        formats = {
            name.removeprefix(in_block(index, "")): fmts
            for name, fmts in self.formats.items()
            if split_name(name).block == index
        }
        for name in formats:
            require_range(linear(block, name).weight, in_block(index, name))
        after = self.error_streams.original.through(block)
        for stream in self.of_embedders.values():
            stream.x = stream.through(block)
        attended = self.stream.attended(block)
        of_mixture = mixture_errors(block, attended_tokens(attended, self.states), formats)
        with phase("trying formats", sum(map(len, formats.values())), "roundings", share=0.8) as progress:
            for name, fmt, error in chain(self._dense_errors(block, formats, after), of_mixture):
                self._add(in_block(index, name), fmt, error)
                progress(1)
        sent = dict.fromkeys(formats, REFERENCE) if self.amplifies else {}
        self.error_streams.pass_through(index, block, sent, after)
        self.stream.x = torch.cat([block.mix(part, index, None) for part in attended])

    def _add(self, name: str, fmt: str, error: float) -> None:
        """Add an error. Raises `BadInputError` where it is not finite."""
        if not math.isfinite(error):
            raise BadInputError(f"{self.checkpoint.path}: the error of rounding {name!r} is not finite")
        self.errors.setdefault(name, {})[fmt] = error

    def keep(self, work: WorkFolder, blocks: int) -> None:
        """Keep all errors and streams behind the first `blocks` blocks, in place of those kept before."""
        embedders = {f"embedder.{name}:{fmt}": stream.x.cpu() for (name, fmt), stream in self.of_embedders.items()}
        state = {"stream": self.stream.x.cpu(), **self.error_streams.state(), **embedders}
        document = {"blocks": blocks, "errors": self.errors, "started": self.error_streams.errors()}
        work.write("measured", state, document)

    def take_up(self, work: WorkFolder | None) -> int:
        """Take up what an earlier run kept; return the number of blocks that it had passed."""
        if work is None:
            return 0
        total = self.model.config.depth
        work.tell(lambda: kept_blocks(work, "measured", total))
        piece = work.read("measured")
        if piece is None:
            return 0
        device = self.model.device
        self.errors = {name: dict(errors) for name, errors in piece.document["errors"].items()}
        self.stream.x = piece.tensor("stream").to(device)
        self.error_streams.go_on(piece.tensor, piece.document["started"])
        for (name, fmt), stream in self.of_embedders.items():
            stream.x = piece.tensor(f"embedder.{name}:{fmt}").to(device)
        blocks = int(piece.document["blocks"])
        work.notify(f"going on behind block {blocks} of {total} (kept in {work.folder})")
        return blocks

    def _dense_errors(self, block: Block, formats: Tried, after: Tensor) -> Iterator[_StreamError]:
        """Yield the errors of attention and modulation, from the original's tokens behind the block."""
        streams = self.error_streams
        for name, fmts in formats.items():
            if kind_of(name) == "mixture":
                continue
            for fmt in fmts:
                with rounded({linear(block, name): fmt}):
                    error = streams.states.energy(streams.original.through(block) - after)
                yield _StreamError(name, fmt, error)

    def result(self) -> _Raw:
        """Return all errors, those of weights outside the blocks included."""
        streams = self.error_streams
        expected = streams.predicted(streams.original)
        for (name, fmt), stream in self.of_embedders.items():
            self._add(name, fmt, relative_error(streams.predicted(stream), expected))
        for name, fmts in self.formats.items():
            if name.startswith("final_layer."):
                for fmt in fmts:
                    with rounded({self.model.linear(name): fmt}):
                        self._add(name, fmt, relative_error(streams.predicted(streams.original), expected))
        return _Raw(self.errors, streams.amplification() if self.amplifies else ())


def mixture_errors(block: Block, tokens: BlockTokens, formats: Tried) -> Iterator[_StreamError]:
    """Yield the errors of a block's experts, then of its shared expert, replayed on the tokens of its mixture."""
    routing = block.moe.gate(tokens.inputs)
    for e, expert in enumerate(block.moe.experts):
        yield from _of_expert(f"moe.experts.{e}", expert, tokens, routing.gate_of(e), formats)
    every_token = torch.ones_like(routing.gate_of(0))
    yield from _of_expert(SHARED, block.moe.shared_experts, tokens, every_token, formats)


def _of_expert(
    stem: str, expert: nn.Module, tokens: BlockTokens, gates: Tensor, formats: Tried
) -> Iterator[_StreamError]:
    """Yield the errors of one expert's matrices."""
    of_matrices = {f"{matrix}.weight": formats.get(f"{stem}.{matrix}.weight", ()) for matrix in MATRICES}
    for matrix, fmt, error in expert_errors(expert, tokens, gates, of_matrices):
        yield _StreamError(f"{stem}.{matrix}", fmt, error)


def expert_errors(
    expert: nn.Module, tokens: BlockTokens, gates: Tensor, formats: Tried
) -> Iterator[tuple[str, str, float]]:
    """Yield (matrix, format, Σ ‖guided error‖² / pairs) of rounding one matrix of an expert at a time.

    `gates` (T,) is its routing weight, 0 for tokens that did not select it. Where more than `EXPERT_TOKENS` guided
    tokens selected it, evenly spaced ones are taken.
    """
    assert isinstance(expert, SwiGLU)
    used = tokens.paired(gates).ne(0).any(dim=1).nonzero().squeeze(1)
    if not len(used):
        yield from ((matrix, fmt, 0.0) for matrix, fmts in formats.items() for fmt in fmts)
        return
    stride = -(-len(used) // EXPERT_TOKENS) | 1  # odd, an even one would take a few columns of 16 × 16 patches only
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
