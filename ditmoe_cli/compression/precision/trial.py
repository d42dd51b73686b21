"""Trials of a mix of formats: all weights rounded to the nearest at once, and the errors of each block alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.replay.amplification import Amplification, ErrorStreams, relative_error
from ditmoe_cli.compression.replay.guided import replayed_states, sent_rows
from ditmoe_cli.compression.replay.kept_measures import kept_blocks
from ditmoe_cli.compression.replay.neuron_order import Orders, reorder
from ditmoe_cli.compression.replay.rounded_layers import layers_of, rounded
from ditmoe_cli.compression.replay.stream import Stream, embedded
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.names import in_block, split_name
from ditmoe_cli.files.pacing import Pace
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks


@dataclass(frozen=True)
class Trial:
    """The measured errors of a mix.

    Attributes:
        error: relative squared error of the guided prediction, on `sent_rows` of `replayed_states`.
        amplification: amplification of each block and kind of weight, at errors of this mix's size; empty where it was
            not asked for.
    """

    error: float
    amplification: Amplification


def try_formats(
    calibrated: Calibrated, formats: Mapping[str, str], orders: Sequence[Orders] = (), *, amplifies: bool = False
) -> Trial:
    """Return the error of rounding every weight to its format and, where `amplifies`, the mix's amplifications.

    With `orders`, one mapping per block, the neurons of experts are put in order first; such a trial is not kept.
    Others are taken from what is kept, and an interrupted one goes on behind its last kept block. Raises
    `BadInputError` for a profile without states.
    """
    kept = calibrated.kept
    if kept is None or orders:
        return _tried(calibrated, formats, orders, amplifies, None)
    name = digest(dict(formats))
    before = kept.part("trials").get(name)
    if before is not None and (before["amplification"] or not amplifies):
        return Trial(before["error"], tuple(before["amplification"]))
    with kept.working({"trial": name, "amplifies": amplifies}) as work:
        trial = _tried(calibrated, formats, orders, amplifies, work)
        kept.add("trials", {name: {"error": trial.error, "amplification": list(trial.amplification)}})
    return trial


def _tried(
    calibrated: Calibrated,
    formats: Mapping[str, str],
    orders: Sequence[Orders],
    amplifies: bool,
    work: WorkFolder | None,
) -> Trial:
    """Return the errors of rounding every weight to its format; the streams behind each block are kept in `work`."""
    checkpoint = calibrated.checkpoint
    model = OffloadedDiTMoE(checkpoint, torch.device(calibrated.device), dtype=calibrated.dtype)
    with torch.inference_mode():
        states = replayed_states(calibrated, model)
        streams = ErrorStreams(model, states.at(sent_rows(states, model)), formats if amplifies else ())
        outside = {model.linear(name): fmt for name, fmt in formats.items() if split_name(name).block is None}
        with rounded(outside):
            changed = embedded(model, streams.states)
        start = _take_up(work, streams, changed, model.config.depth)
    pace = Pace()
    with resident_blocks(model, f"trying the plan for {checkpoint.name}", start) as blocks:
        for index, block in blocks:
            own_formats = {name: fmt for name, fmt in formats.items() if split_name(name).block == index}
            if orders:
                reorder(block, index, orders[index])
            within_block = {name.removeprefix(in_block(index, "")): fmt for name, fmt in own_formats.items()}
            streams.pass_through(index, block, streams.original.attended(block), within_block if amplifies else {})
            with rounded(layers_of(block, index, own_formats)):
                changed.x = changed.through(block)
            if work is not None and pace.is_due:
                with pace.keeping():
                    document = {"blocks": index + 1, "started": streams.errors()}
                    work.write("tried", {"rounded": changed.x.cpu(), **streams.state()}, document)
        expected = streams.predicted(streams.original)
        with rounded(outside):
            prediction = streams.predicted(changed)
        return Trial(relative_error(prediction, expected), streams.amplification() if amplifies else ())


def _take_up(work: WorkFolder | None, streams: ErrorStreams, changed: Stream, total: int) -> int:
    """Take up what an earlier run kept; return the number of blocks that it had passed."""
    if work is None:
        return 0
    work.tell(lambda: kept_blocks(work, "tried", total))
    piece = work.read("tried")
    if piece is None:
        return 0
    changed.x = piece.tensor("rounded").to(changed.x.device)
    streams.go_on(piece.tensor, piece.document["started"])
    blocks = int(piece.document["blocks"])
    work.notify(f"going on behind block {blocks} of {total} (kept in {work.folder})")
    return blocks
