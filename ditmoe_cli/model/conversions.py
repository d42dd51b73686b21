"""A checkpoint in another dtype or storage than its file has, converted a weight at a time as it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.casting import DTYPES, CastReader
from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.making import written_here
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.files.reader import TensorReader, tensor_bytes
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig

if TYPE_CHECKING:
    import torch

POSITIONS = "pos_embed"


@dataclass(frozen=True)
class UnpackingReader:
    """Read the weights that the model sees, in their logical dtypes, by a reader of the tensors that store them.

    Raises `BadInputError`, naming file and tensor, for bytes that stand for no codes.
    """

    reader: TensorReader
    weights: Mapping[str, Weight]
    path: Path

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a weight."""
        return self.reader.raw(name) if self.weights[name].format is None else tensor_bytes(self.tensor(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Return a weight on the CPU."""
        weight = self.weights[name]
        try:
            return weight.unpack({member: self.reader.tensor(member) for member in weight.members})
        except BadInputError as error:
            raise BadInputError(f"{self.path}: {error}") from None


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose weights are all stored as the model sees them: no quantised ones, no differences."""
    if not packed_weights(checkpoint):
        return checkpoint
    reader = UnpackingReader(checkpoint.reader, checkpoint.weights, checkpoint.path)
    names = sorted(checkpoint.weights, key=natural_key)
    infos = {name: checkpoint.weights[name].info for name in names}
    plain = {name: Weight(info, None, (name,)) for name, info in infos.items()}
    return _read_by(checkpoint, reader, infos, plain)


def packed_weights(checkpoint: Checkpoint) -> int:
    """Return the number of weights that are stored in other tensors than themselves."""
    return sum(weight.format is not None for weight in checkpoint.weights.values())


def in_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return a checkpoint whose weights are cast to a dtype of `DTYPES`; quantised ones stay.

    Reading raises `BadInputError` as `CastReader` does.
    """
    code = DTYPES[dtype]
    weights = {name: _in_dtype(weight, code) for name, weight in checkpoint.weights.items()}
    stored = checkpoint.header.tensors
    casts = {
        member.name: member
        for weight in weights.values()
        if not weight.quantized
        for member in (weight.stored_as.members(weight.info).values() if weight.stored_as else (weight.info,))
        if stored[member.name].dtype != member.dtype
    }
    if not casts:
        return checkpoint
    reader = CastReader(checkpoint.reader, casts, checkpoint.path)
    return _read_by(checkpoint, reader, {**checkpoint.header.tensors, **casts}, weights)


def _in_dtype(weight: Weight, code: str) -> Weight:
    """Return a weight with another logical dtype, unless it is quantised or holds integers."""
    if weight.quantized or weight.info.dtype not in FLOATING:
        return weight
    return replace(weight, info=replace(weight.info, dtype=code))


@dataclass(frozen=True)
class Storage:
    """How weights are to be stored: cast to a `dtype` of `DTYPES` (None: as they are), quantised ones as plain."""

    dtype: str | None = None
    dequantize: bool = False

    @property
    def name(self) -> str:
        """What the name of an output tells of it, such as ``-dequantize-bf16``."""
        return f"{'-dequantize' if self.dequantize else ''}{f'-{self.dtype}' if self.dtype else ''}"

    def of(self, source: Checkpoint, tell: Callable[[str], None]) -> tuple[Checkpoint, dict[str, object]]:
        """Return a checkpoint whose weights are stored so, and what was done of it, by the names of the settings.

        `tell` takes lines on what has no effect.
        """
        converted, done = source, dict[str, object]()
        if self.dequantize:
            converted = unpacked(source)
            if converted is source:
                tell("warning: ⟨dequantize⟩ has no effect: all weights are plain")
            else:
                done["dequantize"] = True
        if self.dtype is None:
            return converted, done
        kept = sum(weight.quantized for weight in converted.weights.values())
        if kept:
            tell(f"{kept} quantised weights stay as they are; ⟨dtype⟩ is for the others (or give ⟨dequantize⟩)")
        cast = in_dtype(converted, self.dtype)
        if cast is converted:
            tell(f"warning: ⟨dtype⟩ {self.dtype} has no effect: the weights are stored in it")
        else:
            done["dtype"] = self.dtype
        return cast, done


@dataclass(frozen=True)
class _PositionReader:
    """Read by another reader, and the fixed position embedding that its file lacks."""

    reader: TensorReader
    config: DiTMoEConfig

    def raw(self, name: str) -> memoryview:
        """Return the bytes of a tensor."""
        return tensor_bytes(self.tensor(name)) if name == POSITIONS else self.reader.raw(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        from ditmoe_cli.model.embedders import sincos_position_embedding

        if name != POSITIONS:
            return self.reader.tensor(name)
        return sincos_position_embedding(self.config.hidden_size, self.config.input_size // self.config.patch_size)


def with_positions(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that holds its fixed position embedding, rebuilt in fp32 where the file lacks it.

    Its `original` is then the checkpoint on disk.
    """
    if POSITIONS in checkpoint.weights:
        return checkpoint
    config = checkpoint.config
    info = TensorInfo(POSITIONS, "F32", (1, config.num_patches, config.hidden_size))
    tensors = {**checkpoint.header.tensors, POSITIONS: info}
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    weights = {**checkpoint.weights, POSITIONS: Weight(info, None, (POSITIONS,))}
    whole = _read_by(checkpoint, _PositionReader(checkpoint.reader, config), ordered, weights)
    return replace(whole, original=checkpoint.original or checkpoint)


def recorded(checkpoint: Checkpoint, options: Mapping[str, object], source: Checkpoint) -> Checkpoint:
    """Return a checkpoint that was converted from `source` with the step in its history."""
    if checkpoint is source:
        return checkpoint
    old = source.provenance()
    step = Step("convert", source.fingerprint, "", dict(options), made=written_here())
    provenance = replace(old, config=checkpoint.config.to_json(), history=(*old.history, step))
    return replace(checkpoint, header=replace(checkpoint.header, provenance=provenance), original=source)


def _read_by(
    checkpoint: Checkpoint, reader: TensorReader, tensors: Mapping[str, TensorInfo], weights: Mapping[str, Weight]
) -> Checkpoint:
    """Return a checkpoint of the same configuration with other tensors, which nothing is known of yet."""
    header = replace(checkpoint.header, tensors=tensors)
    return Checkpoint(header, reader, weights, checkpoint.config, checkpoint.assumptions, checkpoint.warnings)
