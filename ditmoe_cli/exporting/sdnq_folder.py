"""Checkpoints as folders of diffusers pipelines whose models SDNQ loads, as diffusers asks it to. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ditmoe_cli.exporting import diffusers_folder
from ditmoe_cli.exporting.diffusers_folder import DiffusersFolder, model_settings
from ditmoe_cli.exporting.exported import Wanted
from ditmoe_cli.exporting.recoded import Recoding, quantized_weights
from ditmoe_cli.exporting.sdnq import quantization_config, recoded
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.files.writer import changed_tensor
from ditmoe_cli.model.checkpoint import Checkpoint

TARGET = "sdnq"


def laid_out(checkpoint: Checkpoint, wanted: Wanted, tell: Callable[[str], None]) -> SdnqFolder:
    """Lay a checkpoint out whose weights the layout holds. Raises `BadInputError` where none is quantised."""
    quantized_weights(checkpoint, TARGET)
    plain = diffusers_folder.laid_out(checkpoint, wanted, tell)
    return SdnqFolder(replace(plain.checkpoint, original=checkpoint.original or checkpoint), wanted, plain.vae)


@dataclass(frozen=True)
class SdnqFolder(DiffusersFolder):
    """The folder of a checkpoint that diffusers opens where SDNQ is installed; ``transformer/`` is in SDNQ's layout."""

    @cached_property
    def recoding(self) -> Recoding:
        """The tensors of the model: those of quantised weights in SDNQ's layout."""
        packed = quantized_weights(self.checkpoint, TARGET)
        return Recoding(self.checkpoint, {name: recoded(weight) for name, weight in packed.items()})

    @property
    def model_settings(self) -> dict[str, Any]:
        """The ``config.json`` of the model, all of whose layers are plain before SDNQ takes them."""
        quantization = quantization_config(self.checkpoint.weights)
        return {**model_settings(self.checkpoint), "packed": {}, "quantization_config": quantization}

    def _provenance(self, fingerprint: str | None = None) -> Provenance:
        """Return the metadata, of an export of the input; without its `fingerprint`, that is read."""
        return self.recorded(TARGET, fingerprint)

    def holds_input(self, model: Path) -> bool:
        """Return whether the folder of a model has this export's history and the tensors that it was written with."""
        header, _ = open_reader(model)
        files = {file.name: read_safetensors_header(file) for file in model.glob("*.safetensors")}
        return header.provenance == self._provenance() and changed_tensor(files, {}) is None

    def usage(self) -> Sequence[tuple[str, str]]:
        """Return how to open and sample it."""
        return [*super().usage(), ("needs", "pip install sdnq accelerate")]
