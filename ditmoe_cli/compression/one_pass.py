"""The contents of a planned output, as jobs for the writer: each reads a weight once, checks, packs and puts it.

What is hashed on the way is remembered by the checkpoint: the hash of a tensor that is copied is that of the copy, and
those of all tensors are its fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import Lock

from ditmoe_cli.compression.output import Computed, Copied, Known, Packed, PlannedOutput, Rows
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.streaming import Count, chunks, counted, one_at_a_time, sha256_of
from ditmoe_cli.files.writer import Job, Output, Target
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import BYTES, phase


@dataclass(frozen=True)
class OnePass:
    """The one pass over a checkpoint that writes an output.

    Attributes:
        checkpoint: what it is made from.
        planned: its layout.
        computed: returns the bytes of a computed weight by its name; None where there are none.
    """

    checkpoint: Checkpoint
    planned: PlannedOutput
    computed: Callable[[str], memoryview] | None
    _keeping: Lock = field(default_factory=Lock)  # kept blocks are checked when they are first read

    @property
    def source(self) -> Checkpoint:
        """The checkpoint on disk, whose fingerprint the output records."""
        return self.checkpoint.original or self.checkpoint

    @cached_property
    def hashed_alone(self) -> list[str]:
        """Tensors that are read for the fingerprint alone; none where the fingerprint is known, or not asked for."""
        if self.source.claimed is None:
            return []
        contents = [tensor.content for tensor in self.planned.tensors]
        read = {content.tensor for content in contents if isinstance(content, Copied | Rows)}
        read |= {content.weight for content in contents if isinstance(content, Packed)}
        hashed = {*self.source.hashes, *(member for name in read for member in self._read_for(name))}
        return [name for name in self.source.header.tensors if name not in hashed]

    def _read_for(self, name: str) -> tuple[str, ...]:
        """Return the tensors on disk that a tensor of the checkpoint is read from."""
        weight = self.source.weights.get(name) if self.checkpoint is not self.source else None
        return (name,) if weight is None else weight.members

    @property
    def bytes(self) -> int:
        """How many bytes the jobs count."""
        alone = sum(self.source.header.tensors[name].nbytes for name in self.hashed_alone)
        return sum(info.nbytes for info in self.planned.infos) + alone

    def jobs(self, count: Count) -> list[Job]:
        """Return the jobs, in the order of the output. They `count` bytes that are written, or read without being."""
        jobs: list[Job] = []
        packed: dict[str, set[str]] = {}
        for tensor in self.planned.tensors:
            name = tensor.info.name
            match tensor.content:
                case Packed() as content:
                    if content.weight not in packed:
                        packed[content.weight] = set()
                        jobs.append(partial(self._pack, content, packed[content.weight], count))
                    packed[content.weight].add(name)
                case Copied(source):
                    jobs.append(partial(self._copy, name, source, count))
                case Rows(source, rows):
                    jobs.append(partial(self._take, name, source, rows, count))
                case Known(data):
                    jobs.append(partial(_put, name, memoryview(data), count))
                case Computed():
                    jobs.append(partial(self._keep, name, count))
        return jobs + [partial(self._hash_alone, name, count) for name in self.hashed_alone]

    def _copy(self, name: str, tensor: str, count: Count, target: Target) -> None:
        """Put a tensor as it is read, and remember its hash, which is that on disk unless reading converts it."""
        checkpoint, source = self.checkpoint, self.source
        if checkpoint is not source:
            self._hash(tensor)
            if checkpoint.header.tensors[tensor] == source.header.tensors.get(tensor) and tensor in source.hashes:
                checkpoint.hashes[tensor] = source.hashes[tensor]
        parts = counted(checkpoint.finite_parts(tensor), count)
        checkpoint.hashes[tensor] = target.put(name, parts, checkpoint.hashes.get(tensor))

    def _take(self, name: str, tensor: str, rows: tuple[int, ...], count: Count, target: Target) -> None:
        from ditmoe_cli.files.reader import tensor_bytes

        self._hash(tensor)
        _put(name, tensor_bytes(self.checkpoint.shared_tensor(tensor)[list(rows)]), count, target)

    def _pack(self, packed: Packed, members: set[str], count: Count, target: Target) -> None:
        """Put those members of a weight that the output has, rounded to the nearest values of its format."""
        from ditmoe_cli.files.reader import tensor_bytes

        self._hash(packed.weight)
        try:
            made = pack(self.checkpoint.shared_tensor(packed.weight), packed.target, packed.format)
        except BadInputError as error:
            raise BadInputError(f"{self.checkpoint.path}: {error}") from None
        for name, tensor in made.items():
            if name in members:
                _put(name, tensor_bytes(tensor), count, target)

    def _keep(self, name: str, count: Count, target: Target) -> None:
        assert self.computed is not None
        with self._keeping:
            data = self.computed(name)
        _put(name, data, count, target)

    def _hash(self, name: str) -> None:
        """Hash what a tensor is read from, as far as the fingerprint needs it."""
        source = self.source
        for member in self._read_for(name) if source.claimed is not None else ():
            if member in source.header.tensors and member not in source.hashes:
                source.hashes[member] = sha256_of(chunks(source.reader.raw(member)))

    def _hash_alone(self, name: str, count: Count, _: Target) -> None:
        self._hash(name)
        count(self.source.header.tensors[name].nbytes)


def _put(name: str, data: memoryview, count: Count, target: Target) -> None:
    target.put(name, counted(chunks(data), count))


def write_planned(
    checkpoint: Checkpoint,
    planned: PlannedOutput,
    output: Output,
    computed: Callable[[str], memoryview] | None = None,
    settled: Callable[[], PlannedOutput] | None = None,
) -> int:
    """Write an output as it is laid out, in one pass, and return its bytes.

    `computed` returns the bytes of computed tensors; `settled` is that of `apply.carry_out`.
    """
    one_pass = OnePass(checkpoint, planned, computed)
    with phase(f"writing {output.path.name}", one_pass.bytes, BYTES) as progress:
        jobs = one_pass.jobs(one_at_a_time(progress))
        final = None if settled is None else lambda: settled().provenance
        return output.write(planned.infos, jobs, planned.provenance, [checkpoint.path], final)
