"""The contract of layouts of other programs: checkpoints laid out, all bytes known, before anything is written."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from ditmoe_cli.errors import OutputExistsError
from ditmoe_cli.files.provenance import EXPORTING, Provenance, Step
from ditmoe_cli.files.staging import CHECKPOINT_FILES, check_target
from ditmoe_cli.files.writer import DEFAULT_SHARD_BYTES
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.conversions import Storage

CARD, PICTURE = "README.md", "images.png"
"""The files of a model card in a folder."""


@dataclass(frozen=True)
class Wanted:
    """Where an export goes, and how its weights are stored.

    Attributes:
        path: the file or folder to write.
        force: whether to replace what stands there.
        shard_bytes: bytes of tensors in the largest file of a folder.
        storage: in which dtype, and whether quantised weights are stored as plain ones.
        vae: the VAE that decodes latents, where the layout holds one: a folder, or a name on the Hugging Face hub.
        card: the model card that a folder holds and the picture that it shows, as files by name.
    """

    path: Path
    force: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    storage: Storage = field(default_factory=Storage)
    vae: str | None = None
    card: Mapping[str, bytes] = field(default_factory=dict)

    def options(self, target: str) -> dict[str, Any]:
        """Return the options of an export to a target that shape its weights, by their names."""
        given = {"dequantize": self.storage.dequantize, "dtype": self.storage.dtype}
        return {"to": target, **{name: value for name, value in given.items() if value}}


@dataclass(frozen=True)
class Export(ABC):
    """A checkpoint as another program reads it: all its bytes are known from headers, and none is written yet.

    Attributes:
        checkpoint: the checkpoint, its weights stored as they will be written.
        wanted: where it goes.
        contents: what a folder of this layout may hold, as `check_target` takes it.
    """

    checkpoint: Checkpoint
    wanted: Wanted
    contents: ClassVar[re.Pattern[str]] = CHECKPOINT_FILES

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What is read, and must not be written."""
        return (self.checkpoint.path,)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The exact bytes of all files."""

    @abstractmethod
    def write(self) -> None:
        """Write all files, or none, a weight at a time.

        Raises `BadInputError` for NaN and infinite weights, and what `check_target` raises.
        """

    @abstractmethod
    def difference(self) -> str | None:
        """Return how what stands at the path differs, as ``is no copy of this input``; None where it is this export."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return how the other program opens it, for programs."""

    @abstractmethod
    def usage(self) -> Sequence[tuple[str, str]]:
        """Return the same for reading: labels and texts."""

    @property
    def source(self) -> Checkpoint:
        """The checkpoint on disk."""
        return self.checkpoint.original or self.checkpoint

    def recorded(self, target: str, fingerprint: str | None = None) -> Provenance:
        """Return the metadata of the checkpoint, its last step the export of the `source` to a target.

        Without the source's `fingerprint`, it is read.
        """
        old, known = self.checkpoint.provenance(), self.source.fingerprint if fingerprint is None else fingerprint
        return replace(old, history=(*old.history, Step(EXPORTING, known, "", self.options(target))))

    def copied_or_recorded(self, target: str, fingerprint: str | None = None) -> Provenance:
        """Return the metadata: that of a copy, or as `recorded` where weights are stored otherwise than on disk."""
        if self.checkpoint.original is None:
            return replace(self.checkpoint.provenance(), exported=self.options(target))
        return self.recorded(target, fingerprint)

    def options(self, target: str) -> dict[str, Any]:
        """Return the options of the export to a target that shape its files, by their names."""
        return self.wanted.options(target)

    def check(self) -> bool:
        """Return whether the export stands at its path already.

        Raises `OutputExistsError` where something else does, which is not to be replaced, and what `check_target`
        raises.
        """
        path = self.wanted.path
        if self.wanted.force or not path.exists():
            check_target(path, self.wanted.force, self.inputs, self.contents)
            return False
        check_target(path, True, self.inputs, self.contents)
        reason = self.difference()
        if reason is None:
            return True
        raise OutputExistsError(
            f"{path}: exists already, and {reason}; give ⟨force⟩ to replace it, or -o for another name"
        )
