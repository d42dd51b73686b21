"""``ditmoe convert``: any layout to safetensors, or to what upstream's code loads."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.cli.foretelling import estimate_of, estimate_row, foretell
from ditmoe_cli.cli.groups import one_of, refuse_idle
from ditmoe_cli.cli.options import Destination, Source, checkpoint_path
from ditmoe_cli.cli.planning import Job, preview, reuse, size_facts, size_rows, unread, write
from ditmoe_cli.cli.reuse import made_before
from ditmoe_cli.cli.stage import Stage, open_stage, stem
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.cli.upstream_script import Sampling, sampling
from ditmoe_cli.compression.estimates import carrying_out
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import BadInputError, OutputExistsError, UsageError
from ditmoe_cli.files.casting import DTYPES
from ditmoe_cli.files.pipelines import model_folder
from ditmoe_cli.files.staging import check_space, check_target
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.conversions import in_dtype, packed_weights, recorded, unpacked, with_positions
from ditmoe_cli.model.throughput import known_rate, likely_device
from ditmoe_cli.model.upstream import arguments
from ditmoe_cli.model.upstream_file import UpstreamFile

EXAMPLES = (
    "ditmoe convert ckpt.pt -o ckpt.safetensors",
    "ditmoe convert run/checkpoints -o shards --max-shard-size 5GB",
    "ditmoe convert ckpt.pt --dtype bf16",
    "ditmoe convert pruned.safetensors --to-upstream -o pruned.pt",
    "ditmoe convert DiT-MoE-XL-8E2A --from-diffusers",
)
_UPSTREAM_ENDINGS = (".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """How the output's weights are stored."""

    panel: ClassVar[str] = "Weights"

    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="NAME",
            callback=one_of(*DTYPES),
            help="Dtype of all weights that are not quantised: fp32, bf16 or fp16. [default: as stored]",
        ),
    ] = None
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Store quantised weights, and experts that are differences, as plain weights."
        ),
    ] = False

    def name(self, upstream: bool) -> str:
        """Return what the name of an output tells of its weights; what upstream loads is plain in any case."""
        return f"{'-dequantize' if self.dequantize and not upstream else ''}{f'-{self.dtype}' if self.dtype else ''}"

    def of(self, source: Checkpoint, upstream: bool) -> Checkpoint:
        """Return the checkpoint with its weights stored so, and for upstream's code as plain and whole ones."""
        packed = packed_weights(source)
        converted, done = source, dict[str, object]()
        if packed and (self.dequantize or upstream):
            converted, done = unpacked(source), {"dequantize": True}
        if packed and upstream and not self.dequantize:
            note(f"{packed} weights are dequantised, since upstream's code loads plain ones only")
        if self.dequantize and not packed:
            note("warning: --dequantize has no effect: all weights are plain")
        if upstream and with_positions(converted) is not converted:
            converted = with_positions(converted)
            note("pos_embed is rebuilt, since upstream's code loads no file without it")
        if self.dtype is not None:
            cast = self._cast(converted, self.dtype)
            converted, done = cast, done if cast is converted else {**done, "dtype": self.dtype}
        return converted if upstream else recorded(converted, source, done)

    def _cast(self, checkpoint: Checkpoint, dtype: str) -> Checkpoint:
        kept = sum(weight.quantized for weight in checkpoint.weights.values())
        if kept:
            note(f"{kept} quantised weights stay as they are; --dtype is for the others (or give --dequantize)")
        cast = in_dtype(checkpoint, dtype)
        if cast is checkpoint:
            note(f"warning: --dtype {dtype} has no effect: the weights are stored in it")
        return cast


@dataclass(frozen=True)
class Layouts:
    """Layouts of other programs."""

    panel: ClassVar[str] = "Layout"

    to_upstream: Annotated[
        bool,
        typer.Option(
            "--to-upstream",
            help="Write FILE.pt, which upstream's code (feizc/DiT-MoE) loads, instead of safetensors.",
        ),
    ] = False
    from_diffusers: Annotated[
        bool,
        typer.Option(
            "--from-diffusers",
            help="Read the model in the folder of a diffusers pipeline, and nothing else there.",
        ),
    ] = False

    def opened(self, stage: Stage) -> Checkpoint:
        """Return the stage's checkpoint."""
        if not self.from_diffusers or stage.checkpoint is None:
            return open_stage(stage)
        folder = model_folder(Path(stage.checkpoint))
        return open_stage(replace(stage, checkpoint=str(folder)))


def converted_path(path: Path) -> Path:
    """Return where a conversion is written. Raises `ValueError` for an ending that we do not write."""
    return path if path.suffix in _UPSTREAM_ENDINGS else checkpoint_path(path)


@dataclass(frozen=True)
class Conversion(Destination):
    """Where a conversion goes."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            callback=converted_path,
            help="FILE.safetensors, or a folder for diffusers' sharded layout; FILE.pt with --to-upstream. "
            "[default: named after the input]",
        ),
    ] = None

    def upstream_file(self, source: Path, settings: str) -> UpstreamFile:
        """Return the file for upstream's code; without --output it is named after the input and `settings`."""
        refuse_idle(self, "on a single file", "max_shard_size")
        path = self.output or Path(f"{stem(source)}.upstream{settings}.pt")
        if path.suffix not in _UPSTREAM_ENDINGS:
            raise UsageError(f"--output {path}: with --to-upstream, name FILE.pt")
        return UpstreamFile(path.absolute(), self.force)

    def check(self, upstream: bool) -> None:
        """Raise `UsageError` for a file of upstream's where none is written."""
        if not upstream and self.output is not None and self.output.suffix in _UPSTREAM_ENDINGS:
            raise UsageError(f"--output {self.output}: give --to-upstream to write a file for upstream's code")


def run(source: Source, weights: Weights, layouts: Layouts, to: Conversion, printing: Printing) -> None:
    """Write a checkpoint of any layout as safetensors, or for upstream's code.

    The output carries its whole configuration. Tensors keep their upstream names and, without --dtype, their bytes;
    where a training checkpoint holds averaged (EMA) weights, those are written.
    """
    to.check(layouts.to_upstream)
    stage = source.stage()
    opened = layouts.opened(stage)
    named = Path(stage.checkpoint or opened.path)
    if layouts.to_upstream:
        file = to.upstream_file(named, weights.name(upstream=True))
        file.archive(unpacked(opened))  # refuses what cannot be written, before anything is said
        return _write_upstream(stage, weights.of(opened, upstream=True), file, to.dry_run, printing)
    output = to.at(named, f"converted{weights.name(upstream=False)}")
    stored = opened if to.dry_run else unread(opened, output)
    job = Job("convert", stage, weights.of(stored, upstream=False), output, printing)
    made = made_before(job.output, job.checkpoint, None)
    if made is not None:
        return reuse(job, made, dry_run=to.dry_run)
    return preview(job, None) if to.dry_run else write(job, None)


def _write_upstream(
    stage: Stage, checkpoint: Checkpoint, file: UpstreamFile, dry_run: bool, printing: Printing
) -> None:
    """Write a checkpoint for upstream's code, preview it or find it up to date, and print the result."""
    started, path = time.monotonic(), file.path
    if checkpoint.distilled is not None:
        note(
            f"warning: files of upstream's do not say that it was distilled to {told_steps(checkpoint.distilled)}: "
            "give these to whatever samples it"
        )
    size = file.archive(checkpoint).nbytes
    estimates, rate = carrying_out(checkpoint, None, size), known_rate(likely_device("cpu"))
    result = {**size_facts(checkpoint, size), **_for_upstream(checkpoint, path)}
    rows: list[Row] = [*size_rows(result), _sample_row(result["upstream"])]
    up_to_date = _is_up_to_date(file, checkpoint, size)
    if dry_run and not up_to_date:
        result |= {"estimate": estimate_of(estimates, rate), "dry_run": True, "plan": None}
        rows = [("would write", path), *rows, estimate_row(estimates, rate)]
        emit(printing, stage.to_json(result), rows, str(path), editable=True)
        return
    if up_to_date:
        note(f"{path} is up to date")
        result |= {"dry_run": True} if dry_run else {}
        result, rows = {**result, "up_to_date": True}, [("up to date", path), *rows]
    else:
        check_space(path, size)
        foretell(estimates, lambda: "cpu")
        file.write(checkpoint)
        seconds = round(time.monotonic() - started, 1)
        result, rows = {**result, "seconds": seconds}, [("wrote", path), *rows, ("seconds", f"{seconds:,.1f}")]
    done = stage.done("convert", {"to_upstream": True}, checkpoint=path, samples=None)
    emit(printing, done.to_json({**result, "plan_digest": None}), rows, str(path))


def _for_upstream(checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    """Return how upstream's code builds and samples a model."""
    way = sampling(checkpoint.config, path)
    if checkpoint.distilled is not None:
        way = Sampling(None, f"it has no {told_steps(checkpoint.distilled)}")
    told = {"sample": way.command, "no_sample": way.reason, "arguments": arguments(checkpoint.config)}
    return {"upstream": told}


def _sample_row(told: dict[str, Any]) -> Row:
    if told["sample"] is not None:
        return ("sample with", told["sample"])
    built = ", ".join(f"{name}={value}" for name, value in told["arguments"].items())
    return ("sample.py", f"cannot sample it: {told['no_sample']}; build it as DiT({built})")


def _is_up_to_date(file: UpstreamFile, checkpoint: Checkpoint, size: int) -> bool:
    """Return whether the file is there with the same tensors and configuration.

    Raises `OutputExistsError` where another one is, which is not to be replaced, and what `check_target` raises.
    """
    path = file.path
    check_target(path, True, [checkpoint.path])
    if file.force or not path.exists():
        return False
    try:
        same = path.stat().st_size == size and open_checkpoint(path).fingerprint == checkpoint.fingerprint
    except BadInputError:
        same = False
    if not same:
        raise OutputExistsError(
            f"{path}: exists already, and is no copy of this input; give ⟨force⟩ to replace it, or -o for another name"
        )
    return True
