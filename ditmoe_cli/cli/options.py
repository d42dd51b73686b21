"""Groups of options that commands share (`groups` splices them into commands)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, cast

import typer

from ditmoe_cli.api import output_names as asked
from ditmoe_cli.api import output_names as output_names
from ditmoe_cli.api import planning_requests, sampling_requests
from ditmoe_cli.api.argument_checks import at_least, ending, one_of, whole_numbers
from ditmoe_cli.api.devices import named_device
from ditmoe_cli.api.output_names import DEFAULT_SHARD, Size, checkpoint_path, parse_size
from ditmoe_cli.api.planning_requests import fitted_tokens
from ditmoe_cli.cli.machine import Threads
from ditmoe_cli.cli.stage import Stage, incoming
from ditmoe_cli.files.casting import DTYPES as CASTS
from ditmoe_cli.files.hub_names import HUB_PREFIX, PUBLISHED
from ditmoe_cli.formats.unpacking_budget import set_default_budget
from ditmoe_cli.model.config import Given, Sampler
from ditmoe_cli.model.conversions import Storage
from ditmoe_cli.model.dtypes import AUTO, DTYPES

_DEMO = "demo:digits"


def unpacked_bytes(text: str) -> int | None:
    """Return the bytes of ``0`` or of a size such as ``2GiB``, None for ``auto``. Raises `ValueError`."""
    word = text.strip().lower()
    if word == "auto":
        return None
    if word == "0":
        return 0
    try:
        return parse_size(text).bytes
    except ValueError:
        raise ValueError("give auto, 0, or a size such as 2GiB") from None


@dataclass(frozen=True)
class Models(Threads):
    """How models of a command use the machine: in place of `Threads` in commands that run models."""

    weights_memory: Annotated[
        int | None,
        typer.Option(
            "--weights-memory",
            metavar="SIZE",
            parser=unpacked_bytes,
            help="Memory in which a model keeps quantised weights unpacked from step to step, beside the packed ones: "
            "auto, which is half of what is free, 0 or a size such as 2GiB. Results do not depend on it. "
            "[default: auto]",
        ),
    ] = None

    def apply(self) -> None:
        """Use as many threads, and have models that are loaded from now on keep as much."""
        super().apply()
        set_default_budget(self.weights_memory)


def complete_device(incomplete: str) -> list[str]:
    """Return the names of devices that begin so."""
    return [name for name in ("auto", "cpu", "cuda") if name.startswith(incomplete)]


def complete_checkpoint(incomplete: str) -> list[str]:
    """Return the names of embedded and published checkpoints that begin so; none where a file does."""
    with suppress(OSError):
        if any(file.name.startswith(incomplete) for file in Path().iterdir()):
            return []
    names = (_DEMO, *(HUB_PREFIX + name for name in PUBLISHED))
    return [name for name in names if incomplete and name.startswith(incomplete)]


ClockOpt = Annotated[
    tuple[int, ...] | None,
    typer.Option(
        "--clock",
        metavar="LIST",
        parser=whole_numbers,
        help="What the clock chose in an earlier training of as many minutes, as its recipe has it.",
    ),
]

DeviceOpt = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel="Machine",
        callback=named_device,
        autocompletion=complete_device,
        help="auto, cpu, cuda or cuda:N; auto is cuda where it can be used, else cpu.",
    ),
]


DtypeOpt = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        rich_help_panel="Machine",
        callback=one_of(AUTO, *DTYPES),
        help="What attention and experts compute in: fp32, bf16, fp16 or auto, which is bf16 where the device has it, "
        "the model gains by it and its predictions hardly change; routing and norms are fp32. On a CPU fp16 takes some "
        "six times as long as fp32.",
    ),
]


@dataclass(frozen=True)
class Overrides:
    """Overrides of a checkpoint's configuration, for what its file cannot tell."""

    panel: ClassVar[str] = "Checkpoint"

    heads: Annotated[
        int | None,
        typer.Option(
            "--heads", metavar="N", callback=at_least(1), help="Number of attention heads, where the file cannot tell."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="K",
            callback=at_least(1),
            help="Experts per token. [default: what the file says, else 2]",
        ),
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            metavar="rf|ddpm",
            callback=one_of("rf", "ddpm"),
            help="Family of the model, rectified flow or DDPM. [default: what the file says or its final layer shows]",
        ),
    ] = None
    num_classes: Annotated[
        int | None,
        typer.Option(
            "--num-classes",
            metavar="N",
            callback=at_least(1),
            help="Classes without the null class; as many as label rows where there is none. [default: what the file "
            "says, else one less than label rows]",
        ),
    ] = None

    @property
    def given(self) -> Given:
        """The overrides as the model's configuration takes them."""
        return Given(self.heads, self.top_k, cast(Sampler | None, self.sampler), self.num_classes)


@dataclass(frozen=True)
class Source(Overrides):
    """The checkpoint to work on: an argument, else that of the envelope on stdin."""

    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            autocompletion=complete_checkpoint,
            help="A file, a folder, demo:digits, or hf:OWNER/REPO/FILE on the Hugging Face hub. "
            "[default: the one that the pipe names]",
        ),
    ] = None

    def stage(self, shared: bool = False) -> Stage:
        """Return the stage to work on. With `shared`, torchrun's processes may share the work."""
        return incoming(self.checkpoint, self.given, shared)


@dataclass(frozen=True)
class Weights:
    """How the output's weights are stored."""

    panel: ClassVar[str] = "Weights"

    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            callback=one_of(*CASTS),
            help="Dtype of all weights that are not quantised: fp32, bf16 or fp16. [default: as stored]",
        ),
    ] = None
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Store quantised weights, and experts that are differences, as plain weights."
        ),
    ] = False

    @property
    def storage(self) -> Storage:
        """The settings as conversions take them."""
        return Storage(self.dtype, self.dequantize)


@dataclass(frozen=True)
class Destination(asked.Destination):
    """Where a checkpoint goes."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            callback=checkpoint_path,
            help="FILE.safetensors, or a folder for diffusers' sharded layout. [default: named after the input]",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the exact bytes of the output, and write none.")
    ] = False
    max_shard_size: Annotated[
        Size,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            parser=parse_size,
            help="Size of the largest file of a folder, as 5GB or 500MB. [default: 10GB]",
        ),
    ] = DEFAULT_SHARD


@dataclass(frozen=True)
class FileDestination(output_names.FileDestination):
    """Where a single safetensors file goes."""

    panel: ClassVar[str] = "Output"

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            callback=ending(".safetensors"),
            help="FILE.safetensors to write. [default: named after the input]",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False


@dataclass(frozen=True)
class Running(sampling_requests.Running):
    """Where a model runs, and on how many images at a time."""

    panel: ClassVar[str] = "Machine"

    batch: Annotated[
        int,
        typer.Option("--batch", metavar="N", callback=at_least(1), help="Images at a time; no image depends on it."),
    ] = 64
    device: DeviceOpt = "auto"


@dataclass(frozen=True)
class Accelerating(sampling_requests.Accelerating, Running):
    """Where a model runs that is asked many times, and how it is sped up there."""

    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile attention and shared experts first: some ten seconds, which long runs regain."
        ),
    ] = False
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Replay evaluations as CUDA graphs, to the same images: a GPU then does not wait for the host. Takes "
            "bf16 and experts of one width. [default: where that is so]",
        ),
    ] = None


@dataclass(frozen=True)
class Computing:
    """Where models are computed, and in what."""

    panel: ClassVar[str] = "Machine"

    device: DeviceOpt = "auto"
    dtype: DtypeOpt = AUTO


@dataclass(frozen=True)
class Measuring(planning_requests.Measuring):
    """Profile, device and dtype that a plan is made with."""

    panel: ClassVar[str] = "Plan"

    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="Routing profile of the checkpoint. [default: the one that the pipe names, else "
            "NAME.profile.safetensors, else a new one]",
        ),
    ] = None
    device: DeviceOpt = "auto"
    dtype: DtypeOpt = AUTO

    def profile_for(self, stage: Stage) -> Path | None:
        """Return the profile that is given, else the envelope's."""
        return self.profile or (Path(stage.profile) if stage.profile else None)


@dataclass(frozen=True)
class Planning(Measuring):
    """Profile, device and dtype that a plan is made with, or the list of methods instead."""

    panel: ClassVar[str] = "Plan"

    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="Print all methods with their sources, and exit.")
    ] = False


@dataclass(frozen=True)
class Refitting(planning_requests.Refitting):
    """How the remaining experts are fitted to the original output."""

    panel: ClassVar[str] = "Refitting"

    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit",
            help="Solve the remaining experts' down projections anew, so that each block's output changes least.",
        ),
    ] = True
    refit_tokens: Annotated[
        int,
        typer.Option(
            "--refit-tokens",
            metavar="N",
            callback=fitted_tokens,
            show_default=False,
            help="Calibration tokens to refit on. [default: 32 for each unknown, at most 65536]",
        ),
    ] = 0
