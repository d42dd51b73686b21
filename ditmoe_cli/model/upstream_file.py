"""Checkpoints as files that upstream's code loads: ``.pt`` archives of torch, written a weight at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.streaming import counted, one_at_a_time
from ditmoe_cli.files.torch_archive import SavedStateDict
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.upstream import arguments, obstacle
from ditmoe_cli.progress import BYTES, phase


@dataclass(frozen=True)
class UpstreamFile:
    """The file of a checkpoint at `path` for upstream's code.

    It holds ``{"ema": {name: tensor}, "args": {…}}``. Upstream's ``find_model`` returns what stands under ``ema``. The
    ``args`` are those of its ``DiT``, and ``rf``, which nothing else in the file tells. A flash model of one expert
    is a bare state dict, as ``upcycle.py`` reads it.
    """

    path: Path
    force: bool = False

    def archive(self, checkpoint: Checkpoint) -> SavedStateDict:
        """Lay a checkpoint of plain weights out. Raises `BadInputError` where upstream's code has no module for it."""
        config = checkpoint.config
        problem = obstacle(config)
        if problem is not None:
            raise BadInputError(f"{checkpoint.path}: upstream's code cannot load it: {problem}")
        tensors = list(checkpoint.header.tensors.values())
        if config.attention == "flash" and config.num_experts == 1:
            return SavedStateDict(tensors)
        return SavedStateDict(tensors, "ema", {"args": {**arguments(config), "rf": config.sampler == "rf"}})

    def write(self, checkpoint: Checkpoint) -> int:
        """Write the file, whole or not at all, and return its bytes.

        Raises `BadInputError` for NaN and infinite weights and as `archive` does, and `OutputExistsError`.
        """
        archive = self.archive(checkpoint)
        total = sum(info.nbytes for info in archive.tensors)
        with (
            staged(self.path, self.force, [checkpoint.path]) as staging,
            phase(f"writing {self.path.name}", total, BYTES) as progress,
        ):
            count = one_at_a_time(progress)

            def content(info: TensorInfo) -> Iterator[memoryview]:
                return counted(checkpoint.finite_parts(info.name), count)

            return archive.write(staging, content)
