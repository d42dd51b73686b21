"""The programs that checkpoints are exported to. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.exporting import (
    diffusers_folder,
    loading_code,
    pack_quantized,
    sdnq,
    sdnq_folder,
    upstream,
    upstream_file,
)
from ditmoe_cli.exporting.choices import Choices, Shortfall
from ditmoe_cli.exporting.diffusers_folder import DiffusersFolder
from ditmoe_cli.exporting.exported import Export, Wanted
from ditmoe_cli.exporting.recoded import QuantizedLayout, RecodedFiles
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import StoredFormat
from ditmoe_cli.formats.bitsandbytes import BLOCK, FourBit, Int8
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
        vae: whether it holds a VAE.
        plain: whether quantised weights are stored as plain ones in any case.
        extra: the extra of this package that installs the program; None where it is no package.
        library: the library that opens its folders, where it is another program's.
        loading: returns the Python that opens a folder of that name, for its model card; None where there is no folder.
        choices: what a planner may choose so that the layout expresses the result.
    """

    name: str
    summary: str
    reader: str
    endings: tuple[str, ...]
    obstacle: Callable[[Checkpoint], str | None]
    lays_out: Callable[[Checkpoint, Wanted, Tell], Export]
    folder: bool = False
    vae: bool = False
    plain: bool = False
    extra: str | None = None
    library: str | None = None
    loading: Callable[[str], str] | None = None
    choices: Choices = field(default_factory=Choices)

    @property
    def output(self) -> str:
        """What is written, as ``FILE.pt``."""
        files = " or ".join(f"FILE{ending}" for ending in self.endings)
        return " or ".join(part for part in (files, "a folder" if self.folder else "") if part)

    def is_file(self, path: Path) -> bool:
        """Return whether an output is a single file. Raises `UsageError` for an ending that the layout has not."""
        if path.suffix in self.endings:
            return True
        if self.folder and path.suffix not in ENDINGS_OF_FILES:
            return False
        raise UsageError(f"⟨output⟩ {path}: ⟨to⟩ {self.name} writes {self.output}")


ENDINGS_OF_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz", ".json")


def _upstream_obstacle(checkpoint: Checkpoint) -> str | None:
    return upstream.obstacle(checkpoint.config)


def _bitsandbytes_shortfall(info: TensorInfo, fmt: StoredFormat) -> str | None:
    """Return why bitsandbytes does not read a weight in a format; None where it does."""
    if isinstance(fmt, Int8):
        return None
    if not isinstance(fmt, FourBit):
        return f"is {fmt.name}, and it reads nf4, fp4 and int8"
    if info.shape[1] % BLOCK:
        return f"has rows of {info.shape[1]}, and its dequantiser on CPUs is right for whole blocks of {BLOCK} only"
    return None


def _unheld(target: str, shortfall: Shortfall) -> Callable[[Checkpoint], str | None]:
    """Return an obstacle: the first weight that a layout of quantised weights does not hold, and why."""

    def obstacle(checkpoint: Checkpoint) -> str | None:
        for weight in checkpoint.weights.values():
            reason = None if weight.stored_as is None else shortfall(weight.info, weight.stored_as)
            if reason is not None:
                remedy = f"compress its original for that (ditmoe compress ⟨target⟩ {target})"
                return f"{weight.info.name!r} {reason}; {remedy}"
        return None

    return obstacle


def _sdnq_obstacle(checkpoint: Checkpoint) -> str | None:
    return _unheld("sdnq", sdnq.shortfall)(checkpoint) or diffusers_folder.obstacle(checkpoint)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "upstream",
            "one .pt that upstream's code (feizc/DiT-MoE) loads, of plain weights",
            "upstream's code",
            (".pt", ".pth"),
            _upstream_obstacle,
            upstream_file.laid_out,
            plain=True,
            choices=Choices(alike=True),
        ),
        Target(
            "diffusers",
            "a folder with its own code that DiffusionPipeline opens, weights packed or not",
            "diffusers",
            (),
            diffusers_folder.obstacle,
            diffusers_folder.laid_out,
            folder=True,
            vae=True,
            extra="vae",
            loading=loading_code.pipeline,
        ),
        Target(
            "compressed-tensors",
            "a folder of integer weights in whole groups, each matrix of its own bits",
            "compressed-tensors",
            (),
            _unheld("compressed-tensors", pack_quantized.shortfall),
            pack_quantized.LAYOUT.laid_out,
            folder=True,
            extra="test",
            loading=loading_code.compressed_tensors,
            choices=Choices(pack_quantized.shortfall),
        ),
        Target(
            "sdnq",
            "the folder of diffusers, its weights of mixed integer widths as SDNQ stores them",
            "sdnq",
            (),
            _sdnq_obstacle,
            sdnq_folder.laid_out,
            folder=True,
            vae=True,
            library="diffusers",
            loading=loading_code.sdnq_pipeline,
            choices=Choices(sdnq.shortfall),
        ),
        Target(
            "bitsandbytes",
            "nf4, fp4 and int8 weights as they are",
            "bitsandbytes",
            (".safetensors",),
            _unheld("bitsandbytes", _bitsandbytes_shortfall),
            QuantizedLayout("bitsandbytes", "bitsandbytes, a matrix at a time").laid_out,
            folder=True,
            extra="bnb",
            loading=loading_code.bitsandbytes,
            choices=Choices(_bitsandbytes_shortfall, {"4": ("nf4-dq", "nf4"), "8": ("int8",)}),
        ),
    )
}


CONTENTS = re.compile(f"{DiffusersFolder.contents.pattern}|{RecodedFiles.contents.pattern}")
"""What a folder that some export wrote may hold, as `check_target` takes it."""


def laid_out(target: Target, checkpoint: Checkpoint, wanted: Wanted, tell: Tell) -> Export:
    """Lay a checkpoint out for a target.

    Raises `BadInputError` where the layout cannot express it, and `UsageError` for a path or a VAE that it has not.
    `tell` takes lines on what is written otherwise than it is stored.
    """
    target.is_file(wanted.path)
    if wanted.vae is not None and not target.vae:
        raise UsageError(f"⟨vae⟩ has no effect with ⟨to⟩ {target.name}, which writes none")
    problem = target.obstacle(checkpoint)
    if problem is not None:
        raise BadInputError(f"{checkpoint.path}: {target.reader} cannot load it: {problem}")
    packed = packed_weights(checkpoint)
    storage = wanted.storage
    if target.plain and packed and not storage.dequantize:
        tell(f"{packed} weights are dequantised, since {target.reader} loads plain ones only")
        storage = replace(storage, dequantize=True)
    stored, _ = storage.of(checkpoint, tell)
    if stored is not checkpoint:
        stored = replace(stored, original=checkpoint)
    return target.lays_out(stored, wanted, tell)
