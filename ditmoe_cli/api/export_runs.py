"""Checkpoints in the layouts of other programs, written or foreseen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.card_contents import CardContents
from ditmoe_cli.api.foretelling import foretell
from ditmoe_cli.api.model_cards import Loading
from ditmoe_cli.api.notes import note
from ditmoe_cli.api.output_names import Destination, stem
from ditmoe_cli.api.written_checkpoints import ForeseenCheckpoint, size_facts
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.compression.estimates import carrying_out
from ditmoe_cli.exporting.exported import CARD, PICTURE, Wanted
from ditmoe_cli.exporting.targets import Target, laid_out
from ditmoe_cli.files.staging import check_space
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conversions import Storage
from ditmoe_cli.model.throughput import known_rate, likely_device


@dataclass(frozen=True)
class ExportDestination(Destination):
    """Where an export goes, and the VAE that it holds or names."""

    vae: str | None = None

    def wanted(self, target: Target, checkpoint: Path, storage: Storage) -> Wanted:
        """Return where the export goes; without ⟨output⟩ it is named after the input, the program and the weights."""
        told = replace(storage, dequantize=storage.dequantize and not target.plain).name
        ending = target.endings[0] if target.endings else ""
        path = self.output or Path(f"{stem(checkpoint)}.{target.name}{told}{ending}")
        if target.is_file(path):
            refuse_idle(self, "on a single file", "max_shard_size")
        return Wanted(path.absolute(), self.force, self.max_shard_size.bytes, storage, self.vae)


@dataclass(frozen=True, repr=False)
class ExportedCheckpoint(Brief):
    """A checkpoint in the layout of another program, written now or before.

    Attributes:
        path: the file or folder.
        bytes: its size.
        bytes_before: the size of the checkpoint.
        target: the name of the program.
        facts: how that opens it, by name.
        usage: the same for reading: labels and texts.
        seconds: how long it took; None where it was there already.
    """

    path: Path
    bytes: int
    bytes_before: int
    target: str
    facts: Mapping[str, Any]
    usage: Sequence[tuple[str, str]]
    seconds: float | None = None

    def __fspath__(self) -> str:
        """Return its path, so that it stands wherever a checkpoint is taken."""
        return str(self.path)

    @property
    def ratio(self) -> float:
        """Its size as a share of the checkpoint's."""
        return self.bytes / self.bytes_before

    @property
    def up_to_date(self) -> bool:
        """Whether it was there already."""
        return self.seconds is None

    def _brief(self) -> list[Fact]:
        return [
            ("", self.path),
            ("bytes", f"{self.bytes_before:,} to {self.bytes:,} ({self.ratio:.3f} of the checkpoint)"),
            *self.usage,
            ("up to date", "") if self.seconds is None else ("seconds", f"{self.seconds:,.1f}"),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return sizes, and how it is opened, by name."""
        done = {"up_to_date": True} if self.up_to_date else {"seconds": self.seconds}
        return {**size_facts(self.bytes, self.bytes_before), self.target: dict(self.facts), **done}


@dataclass(frozen=True, repr=False)
class ForeseenExport(ForeseenCheckpoint):
    """An export that would be written: beside its bytes, how the program `target` would open it."""

    target: str
    facts: Mapping[str, Any]
    usage: Sequence[tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Return sizes, estimate, and how it would be opened, by name."""
        return {**super().to_json(), self.target: dict(self.facts)}


def exported_result(
    checkpoint: Checkpoint, target: Target, wanted: Wanted, carding: CardContents, *, dry_run: bool = False
) -> ExportedCheckpoint | ForeseenExport:
    """Export a checkpoint, or foresee that in a dry run, unless the same export is there already.

    Raises `BadInputError` where the layout cannot express it, and `UsageError` for what has no effect on the layout.
    """
    started = time.monotonic()
    export = laid_out(target, checkpoint, wanted, note)
    if target.loading is not None and not target.is_file(wanted.path):
        code, options = target.loading(wanted.path.name), export.options(target.name)
        loading = Loading(target.library or target.reader, code, wanted.path.name, options)
        text, picture = carding.card_of(checkpoint, PICTURE, loading)
        card = {CARD: text.encode(), **({} if picture is None else {PICTURE: picture})}
        export = replace(export, wanted=replace(wanted, card=card))
    else:
        refuse_idle(carding, f"with ⟨to⟩ {target.name} as a file, which has no card", "scores", "picture", "samples")
    path, size, before = wanted.path, export.nbytes, checkpoint.header.file_bytes
    estimates = carrying_out(export.checkpoint, None, size)
    told = (target.name, export.facts(), export.usage())
    if export.check():
        note(f"{path} is up to date")
        return ExportedCheckpoint(path, size, before, *told)
    if dry_run:
        return ForeseenExport(path, size, before, None, estimates, known_rate(likely_device("cpu")), *told)
    check_space(path, size)
    foretell(estimates, lambda: "cpu")
    export.write()
    return ExportedCheckpoint(path, size, before, *told, round(time.monotonic() - started, 1))
