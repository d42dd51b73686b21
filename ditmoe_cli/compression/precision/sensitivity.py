"""The sensitivity of the guided prediction to each number format of each weight, as a squared error.

Calibration states run through the original blocks. In each block the error of a format is replayed on the tokens at
hand, where it enters the residual stream: after γ, routed by the original router, on guided pairs (see
`compression.replay.tokens`). How much of an error that enters there arrives in the prediction is measured, for
each kind of weight, by running states with a known error through the rest of the model:

    error(W, format) = a_bk Σ_pairs ‖s γ_c e_c - (s - 1) γ_u e_u‖² / pairs

with the amplification a_bk of block b and kind k (`compression.replay.amplification`). Matrices of mixtures are
replayed on tokens that are drawn (`compression.precision.expert_errors`), those of attention and modulation on fewer
states (`dense_errors`), those outside the blocks by the prediction itself, since errors of the time embedding in equal
conditions arrive by amplifications that differ tenfold. Errors of a plan are assumed to add up;
`compression.precision.trial` measures the error of all together.

One block's weights are in memory at a time, beside the streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.expert_errors import LocalError, mixture_errors
from ditmoe_cli.compression.replay.amplification import Amplification, ErrorStreams, relative_error
from ditmoe_cli.compression.replay.guided import GuidedStates, replayed_states, sent_rows
from ditmoe_cli.compression.replay.kept_measures import kept_blocks
from ditmoe_cli.compression.replay.local_errors import behind, kind_of, place_of, positions, residual_of
from ditmoe_cli.compression.replay.rounded_layers import linear, require_range, rounded
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.compression.replay.tokens import attended_tokens
from ditmoe_cli.compression.working_sizes import EMBEDDING_TOKENS, FEWEST_EMBEDDED
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.names import in_block, split_name
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Block
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
        place, errors = place_of(name), self.errors[name]
        if place is None:
            return errors
        block, kind = place
        old, new = self.amplification[block][kind], amplification[block][kind]
        return {fmt: error / old * new if old else error for fmt, error in errors.items()}


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
        place = place_of(name)
        factor = raw.amplification[place[0]][place[1]] if place else 1.0
        errors[name] = {fmt: raw.errors[name][fmt] * factor for fmt in fmts}
        if not all(map(math.isfinite, errors[name].values())):
            raise BadInputError(f"the error of rounding {name!r} is not finite")
    return Sensitivities(errors, tuple(raw.amplification))


def _measured(calibrated: Calibrated, formats: Tried, amplifies: bool, work: WorkFolder | None) -> _Raw:
    """Measure errors of formats and, where `amplifies`, amplifications of all weights that `formats` names."""
    checkpoint = calibrated.checkpoint
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with torch.inference_mode():
        measurement = _Measurement(model, replayed_states(calibrated, model), formats, amplifies, checkpoint)
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
        self.model, self.formats = model, formats
        self.amplifies, self.checkpoint = amplifies, checkpoint
        self.errors: Errors = {}
        self.streams = ErrorStreams(model, states, formats if amplifies else ())
        self.sent = sent_rows(states, model)
        outside = [name for name in self.formats if split_name(name).block is None]
        require_range({name: model.linear(name).weight for name in outside})
        self.of_embedding = OfEmbedding(model, states, formats)

    def pass_through(self, index: int, block: Block) -> None:
        """Measure a block's weights, and let all streams pass the block."""
        formats = {
            name.removeprefix(in_block(index, "")): fmts
            for name, fmts in self.formats.items()
            if split_name(name).block == index
        }
        require_range({in_block(index, name): linear(block, name).weight for name in formats})
        streams = self.streams
        before = streams.original.at(self.sent)
        self.of_embedding.pass_through(block)
        attended = streams.original.attended(block)
        streams.pass_through(index, block, attended, dict.fromkeys(formats, REFERENCE) if self.amplifies else {})
        sent = Sent(
            streams.states.at(self.sent), before, residual_of(attended)[self.sent], streams.original.x[self.sent]
        )
        found = []
        with phase("trying formats", sum(map(len, formats.values())), "roundings", share=0.8) as progress:
            of_mixture = mixture_errors(block, attended_tokens(attended, streams.states), formats)
            for each in chain(dense_errors(block, sent, formats), of_mixture):
                found.append(each)
                progress(1)
        self._add(found, in_block(index, ""))

    def _add(self, found: Sequence[LocalError], prefix: str) -> None:
        """Add errors, with one transfer from the device. Raises `BadInputError` where one is not finite."""
        if not found:
            return
        for (name, fmt, _), error in zip(found, torch.stack([each.error for each in found]).tolist(), strict=True):
            if not math.isfinite(error):
                raise BadInputError(f"{self.checkpoint.path}: the error of rounding {prefix + name!r} is not finite")
            self.errors.setdefault(prefix + name, {})[fmt] = error

    def keep(self, work: WorkFolder, blocks: int) -> None:
        """Keep all errors and streams behind the first `blocks` blocks, in place of those kept before."""
        document = {"blocks": blocks, "errors": self.errors, "started": self.streams.errors()}
        work.write("measured", {**self.streams.state(), **self.of_embedding.state()}, document)

    def take_up(self, work: WorkFolder | None) -> int:
        """Take up what an earlier run kept; return the number of blocks that it had passed."""
        if work is None:
            return 0
        total = self.model.config.depth
        work.tell(lambda: kept_blocks(work, "measured", total))
        piece = work.read("measured")
        if piece is None:
            return 0
        self.errors = {name: dict(errors) for name, errors in piece.document["errors"].items()}
        self.streams.go_on(piece.tensor, piece.document["started"])
        self.of_embedding.go_on(piece.tensor)
        blocks = int(piece.document["blocks"])
        work.notify(f"going on behind block {blocks} of {total} (kept in {work.folder})")
        return blocks

    def result(self) -> _Raw:
        """Return all errors, those of weights outside the blocks included."""
        streams = self.streams
        self._add(self.of_embedding.errors(streams.original), "")
        if any(name.startswith("final_layer.") for name in self.formats):
            expected = streams.predicted(streams.original)
            for name, fmts in self.formats.items():
                if name.startswith("final_layer."):
                    for fmt in fmts:
                        with rounded({self.model.linear(name): fmt}):
                            error = relative_error(streams.predicted(streams.original), expected)
                        self._add([LocalError(name, fmt, torch.tensor(error, dtype=torch.float64))], "")
        return _Raw(self.errors, streams.amplification() if self.amplifies else ())


class OfEmbedding:
    """Streams of about `EMBEDDING_TOKENS` tokens under a time embedding with one matrix rounded, for each format."""

    def __init__(self, model: OffloadedDiTMoE, states: GuidedStates, formats: Tried) -> None:
        self.model = model
        self._rows = states.spread(EMBEDDING_TOKENS, model.config.num_patches, FEWEST_EMBEDDED)
        self.states = states.at(self._rows)
        self._streams: dict[tuple[str, str], Stream] = {}
        for name, fmts in formats.items():
            if name.startswith("t_embedder."):
                for fmt in fmts:
                    with rounded({model.linear(name): fmt}):
                        self._streams[name, fmt] = embedded(model, self.states)

    def pass_through(self, block: Block) -> None:
        """Let all streams pass a block."""
        for stream in self._streams.values():
            stream.x = stream.through(block)

    def state(self) -> dict[str, Tensor]:
        """Return the tokens of all streams behind the blocks passed so far, on the CPU, by name."""
        return {f"embedding.{name}:{fmt}": stream.x.cpu() for (name, fmt), stream in self._streams.items()}

    def go_on(self, state: Callable[[str], Tensor]) -> None:
        """Take the streams up where `state` left them."""
        for (name, fmt), stream in self._streams.items():
            stream.x = state(f"embedding.{name}:{fmt}").to(self.model.device)

    def errors(self, original: Stream) -> list[LocalError]:
        """Return the errors of the prediction, relative to that of the `original` stream, behind all blocks."""
        if not self._streams:
            return []
        same = original.at(self._rows)
        expected = self.states.predicted(self.model, same.x, same.c)
        found = []
        for (name, fmt), stream in self._streams.items():
            error = relative_error(self.states.predicted(self.model, stream.x, stream.c), expected)
            found.append(LocalError(name, fmt, torch.tensor(error, dtype=torch.float64)))
        return found


@dataclass(frozen=True)
class Sent:
    """The states that formats of attention and modulation are tried on, in the original block.

    Attributes:
        states: the states.
        before: their stream before the block.
        residual: (N, P, D) their tokens between attention and mixture.
        after: (N, P, D) those behind the block.
    """

    states: GuidedStates
    before: Stream
    residual: Tensor
    after: Tensor


def dense_errors(block: Block, sent: Sent, formats: Tried) -> Iterator[LocalError]:
    """Yield the errors of attention and modulation, each measured as `compression.replay.local_errors` says.

    A format of attention takes attention alone, one of the modulation the mixture of `SENT_POSITIONS` tokens an image
    too.
    """
    where = positions(sent.after.shape[1]).to(sent.after.device)
    after = sent.after[:, where]
    for name, fmts in formats.items():
        kind = kind_of(name)
        for fmt in fmts if kind != "mixture" else ():
            with rounded({linear(block, name): fmt}):
                parts = sent.before.attended(block)
            if kind == "attention":
                difference = residual_of(parts) - sent.residual
            else:
                difference = behind(block, parts, where) - after
            yield LocalError(name, fmt, sent.states.energy(difference))
