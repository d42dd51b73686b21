"""The programs that checkpoints are exported to. Torch-free; what lays an export out is imported when it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.export import upstream
from ditmoe_cli.export.exported import Export, Wanted
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conversions import packed_weights

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A program that reads checkpoints in a layout of its own.

    Attributes:
        name: what ⟨to⟩ takes.
        summary: what is written, in a few words.
        reader: what the program is called in messages.
        endings: endings of a single file that it may be; the first is that of a default name. None for folders.
        obstacle: returns what the layout cannot express of a checkpoint, and what to do instead; None for nothing.
        lays_out: returns the export of a checkpoint that has no obstacle, whose weights are stored as wanted. Lines on
            what is written otherwise than it is stored go to the last argument.
        folder: whether it may be a folder.
        plain: whether quantised weights are stored as plain ones in any case.
        extra: the extra of this package that installs the program; None where it is no package.
    """

    name: str
    summary: str
    reader: str
    endings: tuple[str, ...]
    obstacle: Callable[[Checkpoint], str | None]
    lays_out: Callable[[Checkpoint, Wanted, Tell], Export]
    folder: bool = False
    plain: bool = False
    extra: str | None = None

    @property
    def output(self) -> str:
        """What is written, as ``FILE.pt``."""
        files = " or ".join(f"FILE{ending}" for ending in self.endings)
        return " or ".join(part for part in (files, "a folder" if self.folder else "") if part)

    def is_file(self, path: Path) -> bool:
        """Return whether an output is a single file. Raises `UsageError` for an ending that the layout has not."""
        if path.suffix in self.endings:
            return True
        if self.folder and path.suffix not in _ENDINGS_OF_FILES:
            return False
        raise UsageError(f"⟨output⟩ {path}: ⟨to⟩ {self.name} writes {self.output}")


_ENDINGS_OF_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".json")


def _upstream_obstacle(checkpoint: Checkpoint) -> str | None:
    return upstream.obstacle(checkpoint.config)


def _for_upstream(checkpoint: Checkpoint, wanted: Wanted, tell: Tell) -> Export:
    from ditmoe_cli.export.upstream_file import laid_out

    return laid_out(checkpoint, wanted, tell)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "upstream",
            "one .pt that upstream's code (feizc/DiT-MoE) loads, of plain weights",
            "upstream's code",
            (".pt", ".pth"),
            _upstream_obstacle,
            _for_upstream,
            plain=True,
        ),
    )
}


def laid_out(target: Target, checkpoint: Checkpoint, wanted: Wanted, tell: Tell) -> Export:
    """Lay a checkpoint out for a target. Raises `BadInputError` where the layout cannot express it.

    `tell` takes lines on what is written otherwise than it is stored.
    """
    target.is_file(wanted.path)
    problem = target.obstacle(checkpoint)
    if problem is not None:
        raise BadInputError(f"{checkpoint.path}: {target.reader} cannot load it: {problem}")
    packed = packed_weights(checkpoint)
    storage = wanted.storage
    if target.plain and packed and not storage.dequantize:
        tell(f"{packed} weights are dequantised, since {target.reader} loads plain ones only")
        storage = replace(storage, dequantize=True)
    stored, _ = storage.of(checkpoint, tell)
    return target.lays_out(stored, wanted, tell)
