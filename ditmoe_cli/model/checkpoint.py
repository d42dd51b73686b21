"""Opening a checkpoint: its header and configuration at once, its tensors one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.casting import CastReader, doubles_as_floats
from ditmoe_cli.files.fingerprint import fingerprint
from ditmoe_cli.files.finite import all_finite, finite_values
from ditmoe_cli.files.hub_names import hub_name_of, is_hub_name, told_name
from ditmoe_cli.files.names import EXPERT_OF, in_block
from ditmoe_cli.files.provenance import Card, Distilled, Provenance
from ditmoe_cli.files.reader import CheckpointHeader, TensorReader, open_reader, shared_tensor
from ditmoe_cli.files.streaming import chunks, hash_tensors
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.weights import logical_weights
from ditmoe_cli.model.config import GHOST, DiTMoEConfig, Given, Sampler, infer_config, parse_expert_map
from ditmoe_cli.progress import BYTES, human_bytes, phase

if TYPE_CHECKING:
    import torch

DEMO_PREFIX = "demo:"
UNREAD_LAYOUTS = ("compressed-tensors", "sdnq")
"""Values of ``quant_method`` in a ``config.json`` beside weights that are not read."""
UNREAD = "0" * 64
"""Stands for the fingerprint of a checkpoint that is yet to be read."""
_DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"


@dataclass(frozen=True, repr=False)
class Checkpoint(Brief):
    """An opened checkpoint: headers in memory, tensors read on demand.

    `weights` maps the names of the model's weights to their stored tensors; a quantised weight has several.

    Attributes:
        claimed: the fingerprint that a profile or plan says it has, `UNREAD` where none does: taken for true until all
            tensors are read, as they are while a result is written. None: `fingerprint` reads them.
        original: the checkpoint on disk, where this one is converted from it as it is read.
        hashes: SHA-256 of the tensors that were read, by name.
    """

    header: CheckpointHeader
    reader: TensorReader
    weights: Mapping[str, Weight]
    config: DiTMoEConfig
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    claimed: str | None = None
    original: Checkpoint | None = None
    hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)  # names of tensors that were checked

    @property
    def path(self) -> Path:
        """The file or folder that was opened."""
        return self.header.path

    @property
    def name(self) -> str:
        """The name of that file or folder; of a repository in the hub's cache, the repository's."""
        return told_name(self.path)

    @property
    def notes(self) -> tuple[str, ...]:
        """Which weights were read, where the file holds a choice."""
        return self.header.notes

    @property
    def card(self) -> Card:
        """How the checkpoint's images are scored and read."""
        return self.header.provenance.card if self.header.provenance else Card()

    @property
    def distilled(self) -> Distilled | None:
        """By which few steps the checkpoint is sampled; None where it was not distilled."""
        return self.header.provenance.distilled if self.header.provenance else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tensors and the configuration. Reads what is not yet hashed, without torch for safetensors."""
        return self._computed_fingerprint if self.claimed is None else self.claimed

    @cached_property
    def _computed_fingerprint(self) -> str:
        stored = self.header.tensors.values()
        left = [info for info in stored if info.name not in self.hashes]
        with phase(f"fingerprinting {self.name}", sum(info.nbytes for info in left), BYTES) as progress:
            self.hashes.update(hash_tensors(left, self.reader.raw, progress))
        return fingerprint(stored, self.hashes, self.config.to_json())

    @property
    def recorded_hashes(self) -> Mapping[str, str]:
        """SHA-256 of tensors as the file's metadata says, without reading them; not of those that are cast."""
        cast = self.reader.casts if isinstance(self.reader, CastReader) else ()
        return {name: text for name, text in self.header.recorded.items() if name not in cast}

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of tensors that were read and hashed, and whose hash in the metadata is another one."""
        source = self if self.original is None else self.original
        recorded, hashes = source.recorded_hashes, source.hashes
        return tuple(name for name, text in recorded.items() if hashes.get(name, text) != text)

    @cached_property
    def written_fingerprint(self) -> str | None:
        """The fingerprint by the hashes in the metadata, as the file was written; None where one is missing."""
        stored, recorded = self.header.tensors.values(), self.recorded_hashes
        if any(info.name not in recorded for info in stored):
            return None
        return fingerprint(stored, recorded, self.config.to_json())

    @property
    def ancestors(self) -> tuple[str, ...]:
        """Fingerprints of the checkpoints that this one was computed from, oldest first."""
        return self.header.provenance.ancestors if self.header.provenance else ()

    @property
    def teachers(self) -> tuple[str, ...]:
        """Fingerprints of the checkpoints that this one is a distilled copy of; none where it was not distilled."""
        return self.header.provenance.teachers if self.header.provenance else ()

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """Settings of the last calibration that an ancestor was profiled with; None where the file names none.

        Those from before it was distilled do not count.
        """
        return self.header.provenance.calibration if self.header.provenance else None

    def _brief(self) -> list[Fact]:
        shapes = [weight.info.shape for weight in self.weights.values()]
        steps = self.header.provenance.history if self.header.provenance else ()
        packed = sum(weight.quantized for weight in self.weights.values())
        config = [fact for fact in self.config._brief() if fact[0] not in ("inputs", "classes")]
        return [
            ("", self.name),
            ("bytes", human_bytes(self.header.file_bytes)),
            ("parameters", f"{sum(math.prod(shape) for shape in shapes):,}"),
            *config,
            *([("quantised weights", packed)] if packed else []),
            *([("made by", " | ".join(step.command for step in steps))] if steps else []),
            *([("distilled to", f"{self.distilled.steps} steps")] if self.distilled else []),
            *(("warning", warning) for warning in self.warnings),
        ]

    def provenance(self) -> Provenance:
        """Return the metadata that a copy of this checkpoint would carry."""
        config = self.config.to_json()
        old = self.header.provenance or Provenance(config)
        origin = old.origin if old.origin is not None or old.history else public_name(self.path)
        licence = old.licence if old.licence is not None else self.header.licence
        return replace(old, config=config, origin=origin, licence=licence, exported={})

    def settled(self) -> Checkpoint:
        """Return the checkpoint with the fingerprint that it has, not that claimed; reads what is not yet hashed."""
        if self.original is None:
            return replace(self, claimed=None)
        original, old = self.original.settled(), self.provenance()
        *before, conversion = old.history
        history = (*before, replace(conversion, source=original.fingerprint))
        return replace(
            self, header=replace(self.header, provenance=replace(old, history=history)), original=original, claimed=None
        )

    def broken(self, name: str) -> BadInputError:
        """Return the error of a tensor that is not finite."""
        return BadInputError(f"{self.path}: tensor {name!r} holds NaN or infinite values; the weights are broken")

    def finite_parts(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor a few at a time, which are then in the cache of the core that checked them.

        Raises `BadInputError` where they hold NaN or infinite values.
        """
        dtype = self.header.tensors[name].dtype
        for part in chunks(self.reader.raw(name)):
            if not finite_values(part, dtype):
                raise self.broken(name)
            yield part

    def finite_tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor. Raises `BadInputError` where it holds NaN or infinite values."""
        return self._require_finite(name, self.reader.tensor(name))

    def shared_tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor as `finite_tensor` does, in the file's memory where it can: it must not be changed."""
        return self._require_finite(name, shared_tensor(self.reader.raw(name), self.header.tensors[name]))

    def _require_finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that is looked through when it is first read."""
        if name not in self._finite:
            if not all_finite(tensor):
                raise self.broken(name)
            self._finite.add(name)
        return tensor

    def expert_map(self, block: int) -> tuple[int, ...]:
        """Return what each router row of a block selects: an expert e >= 0, nothing (-1), or constant k (-2 - k).

        Raises `BadInputError` where a row selects an expert or constant that the block lacks.
        """
        config = self.config.blocks[block]
        if not config.mapped:
            return tuple(range(config.router_rows))
        rows = parse_expert_map(self.reader.raw(in_block(block, EXPERT_OF)))
        bad = next((row for row in rows if not GHOST - config.constants <= row < len(config.expert_widths)), None)
        if bad is not None:
            raise BadInputError(
                f"{self.path}: tensor {in_block(block, EXPERT_OF)!r} holds {bad}, which names none of the "
                f"{len(config.expert_widths)} experts and {config.constants} constants of block {block}"
            )
        return rows


def public_name(path: Path) -> str | None:
    """Return the name of a checkpoint that holds on every machine: ``demo:NAME``, or ``hf:…``; None for any other."""
    if path.absolute().parent == _DEMO_FOLDER:
        return f"{DEMO_PREFIX}{path.stem}"
    return hub_name_of(path.absolute())


def resolve_path(path: str | os.PathLike[str], notify: Callable[[str], None] = lambda _: None) -> Path:
    """Return the path of a checkpoint; ``demo:NAME`` is an embedded one, ``hf:…`` one on the hub, which is fetched.

    `notify` takes lines on what is fetched. Raises `BadInputError` for an empty name or an unknown demo, and what
    `fetched` does.
    """
    text = os.fspath(path)
    if not text:  # as of a variable that is not set; the working folder is "."
        raise BadInputError("the name of a checkpoint is empty; give a path")
    if is_hub_name(text):
        from ditmoe_cli.files.hub import fetched

        return fetched(text, notify)
    if not text.startswith(DEMO_PREFIX):
        return Path(path)
    file = _DEMO_FOLDER / f"{text.removeprefix(DEMO_PREFIX)}.safetensors"
    if file.parent != _DEMO_FOLDER or not file.is_file():
        known = ", ".join(sorted(f"{DEMO_PREFIX}{demo.stem}" for demo in _DEMO_FOLDER.glob("*.safetensors")))
        raise BadInputError(f"{text}: no such demo checkpoint; there is {known}")
    return file


def open_checkpoint(
    path: str | Path,
    *,
    num_heads: int | None = None,
    top_k: int | None = None,
    sampler: Sampler | None = None,
    num_classes: int | None = None,
    allow_unknown: bool = False,
) -> Checkpoint:
    """Open a checkpoint of any layout, without reading its weights.

    Args:
        path: a file, a folder, ``demo:digits``, or ``hf:OWNER/REPO/FILE@REVISION`` on the Hugging Face hub.
        num_heads: attention heads, for timm layouts of unusual width.
        top_k: experts per token; by default that of the file, else 2.
        sampler: ``"rf"`` or ``"ddpm"``; by default that of the file, else that which its final layer shows.
        num_classes: classes without the null class; as many as the label table has rows where there is none.
        allow_unknown: whether to open a file that leaves its head count open, with 0 heads, to look at but not to run.

    Raises:
        BadInputError: the file is missing, damaged, not a DiT-MoE, or leaves its head count open.
    """
    resolved = resolve_path(path)
    with phase(f"opening {told_name(resolved)}"):
        return _opened(path, resolved, Given(num_heads, top_k, sampler, num_classes), allow_unknown)


def checkpoint_or_export(path: str | Path) -> Checkpoint | CheckpointHeader:
    """Open a checkpoint; of an export that another program alone reads return the header, which has its history.

    Raises `BadInputError` as `open_checkpoint` does.
    """
    try:
        return open_checkpoint(path)
    except BadInputError:
        header = unread_export(path)
        if header is None:
            raise
        return header


def unread_export(path: str | Path) -> CheckpointHeader | None:
    """Return the header of an export in a layout that ditmoe writes and does not read; None for anything else."""
    try:
        header, _ = open_reader(resolve_path(path))
    except BadInputError:
        return None
    return header if _unread_layout(header) is not None and header.provenance is not None else None


def _unread_layout(header: CheckpointHeader) -> str | None:
    """Return the layout that is not read, in which a ``config.json`` says that weights are quantised."""
    quantization = header.hints.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in UNREAD_LAYOUTS else None


def _refuse_exported(path: str | Path, header: CheckpointHeader) -> None:
    """Raise `BadInputError` where weights are quantised in a layout that is not read."""
    method = _unread_layout(header)
    if method is not None:
        raise BadInputError(
            f"{path}: holds weights in the layout of {method}, which ditmoe writes and does not read; name the "
            "checkpoint that it was exported from"
        )


def _opened(path: str | Path, resolved: Path, given: Given, allow_unknown: bool) -> Checkpoint:
    header, reader = open_reader(resolved)
    _refuse_exported(path, header)
    doubles = doubles_as_floats(header.tensors)
    if doubles:
        told = f"{len(doubles)} tensors in fp64 are read as fp32"
        header = replace(header, tensors={**header.tensors, **doubles}, notes=(*header.notes, told))
        reader = CastReader(reader, doubles, header.path)
    try:
        weights = logical_weights(header.tensors, lambda name: bytes(reader.raw(name)))
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    infos = {name: weight.info for name, weight in weights.items()}
    hints = {**header.hints, **(header.provenance.config if header.provenance else {})}

    def plain(name: str) -> memoryview:
        return memoryview(b"") if weights[name].quantized else reader.raw(name)

    inferred = infer_config(infos, plain, hints, given, str(path), allow_unknown)
    warnings = (*header.warnings, *inferred.warnings)
    checkpoint = Checkpoint(header, reader, weights, inferred.config, inferred.assumptions, warnings)
    for block in range(inferred.config.depth):
        checkpoint.expert_map(block)
    return checkpoint
