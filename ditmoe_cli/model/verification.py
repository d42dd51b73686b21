"""Whether a checkpoint is what was written, and says of itself what its tensors show."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ditmoe_cli.files.casting import CastReader
from ditmoe_cli.files.integrity import Integrity, Problem, examine
from ditmoe_cli.files.reader import CheckpointHeader, TensorReader
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Given

_USUAL: Mapping[str, Any] = {"null_class": True, "router_mode": "plain"}  # what is not written where it holds


@dataclass(frozen=True)
class Verification:
    """What reading a whole checkpoint has shown: its fingerprint, and all that is wrong with it.

    Tensors that are no DiT-MoE's have no configuration, and so no fingerprint.
    """

    integrity: Integrity
    fingerprint: str | None
    problems: tuple[Problem, ...]


def verify(checkpoint: Checkpoint, given: Given | None = None) -> Verification:
    """Read a whole checkpoint, and compare it with what its metadata, archives and index say of it.

    `given` are the settings that the checkpoint was opened with in place of its own.
    """
    header, reader = as_stored(checkpoint)
    found = examine(header, reader)
    cast = checkpoint.reader.casts if isinstance(checkpoint.reader, CastReader) else ()
    checkpoint.hashes.update({name: text for name, text in found.hashes.items() if name not in cast})
    problems = (*found.problems, *_configuration(checkpoint, given or Given()))
    return Verification(found, checkpoint.fingerprint, problems)


def verify_tensors(header: CheckpointHeader, reader: TensorReader) -> Verification:
    """Read all tensors of a file that is no DiT-MoE's, as `verify` does those of a checkpoint."""
    found = examine(header, reader)
    return Verification(found, None, found.problems)


def as_stored(checkpoint: Checkpoint) -> tuple[CheckpointHeader, TensorReader]:
    """Return the header and the reader of the tensors as the files hold them, in fp64 where they do."""
    if not isinstance(checkpoint.reader, CastReader):
        return checkpoint.header, checkpoint.reader
    doubles = {name: replace(info, dtype="F64") for name, info in checkpoint.reader.casts.items()}
    return replace(checkpoint.header, tensors={**checkpoint.header.tensors, **doubles}), checkpoint.reader.reader


def _configuration(checkpoint: Checkpoint, given: Given) -> Iterator[Problem]:
    """Yield where the configuration in the metadata, or in ``config.json`` beside it, is not that of the tensors."""
    provenance = checkpoint.header.provenance
    if provenance is None:
        return  # hints of other programs are warned of where they contradict the tensors
    actual = {**_USUAL, **checkpoint.config.to_json()}
    asked = {name for name in ("num_heads", "top_k", "sampler", "num_classes") if getattr(given, name) is not None}
    yield from _contradicted("the metadata", provenance.config, actual, asked)
    yield from _contradicted("config.json", checkpoint.header.hints, actual, asked)


_LONGEST = 60  # characters of a value in a message


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _contradicted(
    where: str, told: Mapping[str, Any], actual: Mapping[str, Any], asked: Collection[str]
) -> Iterator[Problem]:
    for name, value in told.items():
        if name in actual and actual[name] != value and name not in asked:
            text = f"{where} says {name} {_shown(value)}, but the tensors show {_shown(actual[name])}"
            yield Problem("configuration", name, text)
