"""Checkpoints as files that upstream's code loads: ``.pt`` archives of torch, written a weight at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.exported import Export, Wanted
from ditmoe_cli.exporting.upstream import arguments
from ditmoe_cli.exporting.upstream_script import Sampling, sampling
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.streaming import counted, digested, one_at_a_time
from ditmoe_cli.files.torch_archive import SavedStateDict
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint, open_checkpoint
from ditmoe_cli.model.conversions import with_positions
from ditmoe_cli.progress import BYTES, phase

_TARGET = "upstream"


def laid_out(checkpoint: Checkpoint, wanted: Wanted, tell: Callable[[str], None]) -> UpstreamFile:
    """Lay a checkpoint of plain weights out that upstream's code has modules for."""
    whole = with_positions(checkpoint)
    if whole is not checkpoint:
        tell("pos_embed is rebuilt, since upstream's code loads no file without it")
    if checkpoint.distilled is not None:
        tell(
            f"warning: files of upstream's do not say that it was distilled to {told_steps(checkpoint.distilled)}: "
            "give these to whatever samples it"
        )
    return UpstreamFile(whole, wanted)


@dataclass(frozen=True)
class UpstreamFile(Export):
    """The file of a checkpoint for upstream's code.

    It holds ``{"ema": {name: tensor}, "args": {…}}``. Upstream's ``find_model`` returns what stands under ``ema``. The
    ``args`` are those of its ``DiT``, and ``rf``, which nothing else in the file tells. A flash model of one expert
    is a bare state dict, as ``upcycle.py`` reads it. Beside the pickle stands our metadata, which torch passes over.
    """

    @property
    def nbytes(self) -> int:
        """The exact bytes of the file."""
        return self._archive.nbytes

    @property
    def _archive(self) -> SavedStateDict:
        config, tensors = self.checkpoint.config, list(self.checkpoint.header.tensors.values())
        note = len(self._note(self.copied_or_recorded(_TARGET, UNREAD), {info.name: UNREAD for info in tensors}))
        if config.attention == "flash" and config.num_experts == 1:
            return SavedStateDict(tensors, note_bytes=note)
        args = {**arguments(config), "rf": config.sampler == "rf"}
        return SavedStateDict(tensors, "ema", {"args": args}, note)

    @staticmethod
    def _note(provenance: Provenance, hashes: Mapping[str, str]) -> bytes:
        return provenance.to_metadata(hashes)["ditmoe"].encode()

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises `BadInputError` for NaN and infinite weights, and what `check_target` raises.
        """
        archive, path = self._archive, self.wanted.path
        total = sum(info.nbytes for info in archive.tensors)
        with (
            staged(path, self.wanted.force, self.inputs) as staging,
            phase(f"writing {path.name}", total, BYTES) as progress,
        ):
            count, hashes = one_at_a_time(progress), dict[str, str]()

            def content(info: TensorInfo) -> Iterator[memoryview]:
                hashed = sha256()
                yield from digested(counted(self.checkpoint.finite_parts(info.name), count), hashed.update)
                hashes[info.name] = hashed.hexdigest()

            archive.write(staging, content, lambda: self._note(self.copied_or_recorded(_TARGET), hashes))

    def difference(self) -> str | None:
        """Return how what stands at the path differs; None where it has the same tensors and configuration."""
        path = self.wanted.path
        try:
            made, ours = open_checkpoint(path), self.copied_or_recorded(_TARGET)
            same = path.stat().st_size == self.nbytes and made.header.provenance == ours
            same = same and made.fingerprint == self.checkpoint.fingerprint
        except BadInputError:
            same = False
        return None if same else "is no copy of this input"

    def facts(self) -> dict[str, Any]:
        """Return the command of upstream's ``sample.py``, or why it has none, and the arguments of its ``DiT``."""
        way = self._sampling
        return {"sample": way.command, "no_sample": way.reason, "arguments": arguments(self.checkpoint.config)}

    @property
    def _sampling(self) -> Sampling:
        if self.checkpoint.distilled is not None:
            return Sampling(None, f"it has no {told_steps(self.checkpoint.distilled)}")
        return sampling(self.checkpoint.config, self.wanted.path)

    def usage(self) -> Sequence[tuple[str, str]]:
        """Return the same for reading."""
        way = self._sampling
        if way.command is not None:
            return [("sample with", way.command)]
        built = ", ".join(f"{name}={value}" for name, value in arguments(self.checkpoint.config).items())
        return [("sample.py", f"cannot sample it: {way.reason}; build it as DiT({built})")]
