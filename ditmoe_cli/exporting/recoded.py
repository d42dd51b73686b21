"""Checkpoints in the tensors of other programs: some weights are stored anew, all other tensors are copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.exported import CARD, PICTURE, Export, Wanted
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.reader import open_reader, tensor_bytes
from ditmoe_cli.files.staging import CHECKPOINT_FILES
from ditmoe_cli.files.streaming import Count, chunks, counted, one_at_a_time, sha256_of
from ditmoe_cli.files.writer import Job, Output, Target
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint
from ditmoe_cli.progress import BYTES, phase

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recoded:
    """A weight in the tensors of another program.

    Attributes:
        tensors: what it is stored in.
        values: returns these tensors by name, of the stored tensors of the weight by name.
    """

    tensors: tuple[TensorInfo, ...]
    values: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recoding:
    """The tensors of a checkpoint as they are written.

    Attributes:
        checkpoint: the checkpoint.
        recoded: the weights that are stored anew, by name; all others are copied.
    """

    checkpoint: Checkpoint
    recoded: Mapping[str, Recoded] = field(default_factory=dict)

    @cached_property
    def _copied(self) -> list[TensorInfo]:
        """The tensors that are copied; those that store a weight anew are not."""
        weights, stored = self.checkpoint.weights, self.checkpoint.header.tensors
        kept = {member for name in weights if name not in self.recoded for member in weights[name].members}
        replaced = {member for name in self.recoded for member in weights[name].members}
        return [info for name, info in stored.items() if name in kept or name not in replaced]

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        """All tensors, in natural order."""
        made = (info for each in self.recoded.values() for info in each.tensors)
        return sorted((*self._copied, *made), key=lambda info: natural_key(info.name))

    def jobs(self, progress: Count) -> list[Job]:
        """Return jobs that put all tensors, a weight each, and tell `progress` of their bytes.

        What is read is hashed on the way, for the fingerprint. They raise `BadInputError` for NaN and infinite weights,
        and for bytes that stand for no codes.
        """
        count, weights = one_at_a_time(progress), self.checkpoint.weights
        jobs: list[Job] = [partial(self._copy, info.name, count) for info in self._copied]
        return jobs + [partial(self._recode, weights[name], each, count) for name, each in self.recoded.items()]

    def _copy(self, name: str, count: Count, target: Target) -> None:
        checkpoint = self.checkpoint
        checkpoint.hashes[name] = target.put(name, counted(checkpoint.finite_parts(name), count))

    def _recode(self, weight: Weight, recoded: Recoded, count: Count, target: Target) -> None:
        checkpoint = self.checkpoint
        for member in weight.members:
            if member not in checkpoint.hashes:
                checkpoint.hashes[member] = sha256_of(chunks(checkpoint.reader.raw(member)))
        try:
            made = recoded.values({member: checkpoint.shared_tensor(member) for member in weight.members})
        except BadInputError as error:
            raise BadInputError(f"{checkpoint.path}: {error}") from None
        for info in recoded.tensors:
            target.put(info.name, counted(chunks(tensor_bytes(made[info.name])), count))


@dataclass(frozen=True)
class RecodedFiles(Export):
    """A safetensors file, or a folder of them with a ``config.json``, some weights of which are stored anew.

    Attributes:
        target: the name of what it is for, which the history keeps.
        opening: what opens it.
        recoded: the weights that are stored anew, by name.
        settings: what ``config.json`` says besides the configuration.
    """

    target: str
    opening: str
    recoded: Mapping[str, Recoded] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    contents: ClassVar[re.Pattern[str]] = re.compile(
        "|".join((CHECKPOINT_FILES.pattern, re.escape(CARD), re.escape(PICTURE)))
    )

    @cached_property
    def _recoding(self) -> Recoding:
        return Recoding(self.checkpoint, self.recoded)

    @property
    def _output(self) -> Output:
        wanted = self.wanted
        return Output(
            wanted.path, wanted.force, wanted.shard_bytes, self.settings, beside=wanted.card, contents=self.contents
        )

    @property
    def nbytes(self) -> int:
        """The exact bytes of all files."""
        return self._output.predicted_bytes(self._recoding.tensors, self.recorded(self.target, UNREAD))

    def write(self) -> None:
        """Write all files, or none, a weight at a time.

        Raises what the jobs of `Recoding` and `check_target` do.
        """
        recoding, path = self._recoding, self.wanted.path
        total = sum(info.nbytes for info in recoding.tensors)
        with phase(f"writing {path.name}", total, BYTES) as progress:
            self._output.write(
                recoding.tensors,
                recoding.jobs(progress),
                self.recorded(self.target, UNREAD),
                self.inputs,
                lambda: self.recorded(self.target),
            )

    def difference(self) -> str | None:
        """Return how what stands at the path differs; None where it is this export, whole."""
        try:
            header, _ = open_reader(self.wanted.path)
        except BadInputError:
            return "is damaged"
        if header.provenance != self.recorded(self.target):
            return "is no export of this input"
        return self._output.damage({}) or self._other_picture()

    def _other_picture(self) -> str | None:
        """Return that the picture of the card is another; the card itself may have been edited."""
        shown, file = self.wanted.card.get(PICTURE), self.wanted.path / PICTURE
        if shown is None or (file.is_file() and file.read_bytes() == shown):
            return None
        return f"its {PICTURE} is another"

    def facts(self) -> dict[str, Any]:
        """Return what opens it."""
        return {"open": self.opening}

    def usage(self) -> Sequence[tuple[str, str]]:
        """Return what opens it."""
        return [("open with", self.opening)]


def quantized_weights(checkpoint: Checkpoint, target: str) -> dict[str, Weight]:
    """Return the weights that are stored in other tensors than themselves, by name.

    Raises `BadInputError` where there is none, for a `target` whose layout is of such weights.
    """
    packed = {name: weight for name, weight in checkpoint.weights.items() if weight.stored_as is not None}
    if not packed:
        raise BadInputError(
            f"{checkpoint.path}: no weight is quantised, and {target} is a layout of quantised ones; leave "
            f"⟨dequantize⟩ out, or compress it first (ditmoe compress ⟨target⟩ {target})"
        )
    return packed


@dataclass(frozen=True)
class QuantizedLayout:
    """How a program stores quantised weights.

    Attributes:
        target: the name of the target.
        opening: what opens its folders.
        recoded: returns a weight that the layout holds in its tensors; None where they are those that store it.
        config: returns the ``quantization_config`` of a ``config.json``, of all weights by name; None for none.
    """

    target: str
    opening: str
    recoded: Callable[[Weight], Recoded] | None = None
    config: Callable[[Mapping[str, Weight]], dict[str, Any]] | None = None

    def laid_out(self, checkpoint: Checkpoint, wanted: Wanted, _: Callable[[str], None]) -> RecodedFiles:
        """Lay a checkpoint out whose weights the layout holds. Raises `BadInputError` where none is quantised."""
        packed = quantized_weights(checkpoint, self.target)
        recoded = {} if self.recoded is None else {name: self.recoded(weight) for name, weight in packed.items()}
        settings = {} if self.config is None else {"quantization_config": self.config(checkpoint.weights)}
        return RecodedFiles(checkpoint, wanted, self.target, self.opening, recoded, settings)
