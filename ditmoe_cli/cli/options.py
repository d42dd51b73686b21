"""Options that commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import Repair
    from ditmoe_cli.files.writer import Output
    from ditmoe_cli.model.config import Given

CheckpointArg = Annotated[
    Optional[str],  # noqa: UP045 - typer shows it so
    typer.Argument(metavar="CHECKPOINT", help="A file, a folder or demo:digits; else the envelope on stdin."),
]
Heads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--heads", metavar="N", help="Attention heads, where the file cannot tell."),
]
TopK = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--top-k", metavar="K", help="Experts per token. [default: what the file says, else 2]"),
]
SamplerOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--sampler",
        metavar="rf|ddpm",
        help="Family of the weights. [default: what the file says or its final layer shows]",
    ),
]
OutputOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "-o",
        "--output",
        metavar="PATH",
        help="FILE.safetensors, or a folder for diffusers' sharded layout. [default: named after the input]",
    ),
]
FileOutputOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--output", metavar="FILE", help="FILE.safetensors to write. [default: named after the input]"),
]
ProfileOpt = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--profile", metavar="FILE", help="Profile to choose by. [default: the envelope's, else a new one]"),
]
RefitOpt = Annotated[
    bool,
    typer.Option("--refit/--no-refit", help="Solve the down projections anew, so that they stand in for what went."),
]
RefitTokensOpt = Annotated[
    int, typer.Option("--refit-tokens", metavar="N", help="Tokens to refit on. [default: 32 an unknown, at most 65536]")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Plan only: write nothing, predict the exact bytes."),
]
ShardSize = Annotated[
    str,
    typer.Option("--max-shard-size", metavar="SIZE", help="Largest file of a folder, as 5GB or 500MB."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on a terminal too.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only the output's path.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Sampling steps.")]
Cfg = Annotated[
    float,
    typer.Option("--cfg", metavar="S", help="Guidance scale; 1 is no guidance."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the noise.")]
SolverOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--solver",
        metavar="NAME",
        help="euler, heun, ab2, ab4 or dpmpp-2m for rf; ddim, ddpm or dpmpp-2m for ddpm. [default: ab2; ddim]",
    ),
]
CalibrationSolver = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--solver",
        metavar="NAME",
        help="euler, ab2, ab4 or dpmpp-2m for rf; ddim, ddpm or dpmpp-2m for ddpm. [default: euler; ddim]",
    ),
]
StepsOpt = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--steps", metavar="N", help="Sampling steps. [default: 16 for rf, 20 for ddpm]"),
]
IntervalOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--cfg-interval", metavar="LOW,HIGH", help="Guide between these noise levels, 0 to 1. [default: all]"),
]
UpstreamExact = Annotated[
    bool, typer.Option("--upstream-exact", help="Upstream's sampling: 50 Euler steps for rf, 250 ancestral for ddpm.")
]
VaeOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--vae", metavar="PATH", help="The latents' AutoencoderKL: diffusers folder or hub name."),
]
Classes = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--classes", metavar="LIST", help="Labels to cycle through, as 0,3,7. [default: all]"),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Images at a time; changes no image.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:N.")]


def given(heads: int | None, top_k: int | None, sampler: str | None) -> Given:
    """Return what the user said of the checkpoint. Raises `UsageError` for values out of range."""
    from ditmoe_cli.errors import UsageError
    from ditmoe_cli.model.config import Given

    if sampler not in (None, "rf", "ddpm"):
        raise UsageError(f"--sampler {sampler}: choose rf or ddpm")
    for name, value in (("--heads", heads), ("--top-k", top_k)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
    return Given(heads, top_k, sampler)  # type: ignore[arg-type]


def checked_device(name: str) -> str:
    """Return a device's name. Raises `UsageError` where it is neither cpu nor a GPU that this machine has."""
    import torch

    from ditmoe_cli.errors import UsageError
    from ditmoe_cli.processes import own_device

    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are fp32, in every thread
    try:
        device = torch.device(own_device(name))
        if device.type not in ("cpu", "cuda"):
            raise ValueError("choose cpu, cuda or cuda:N")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"--device {name}: not usable here ({str(error).splitlines()[0][:100]})") from None
    return str(device)


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, option: str) -> int:
    """Return the bytes of a size such as ``5GB`` or ``2.5GiB``. Raises `UsageError`."""
    from ditmoe_cli.errors import UsageError

    cleaned = text.strip().upper()
    unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if cleaned.endswith(u)), None)
    try:
        size = int(float(cleaned.removesuffix(unit or "").removesuffix("B")) * (_UNITS[unit] if unit else 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(f"{option} {text}: give a size such as 5GB, 500MB or 2.5GiB")
    return size


def checkpoint_output(path: Path, force: bool, shard_size: str) -> Output:
    """Return where a checkpoint goes. Raises `UsageError` for an ending that we do not write."""
    from ditmoe_cli.errors import UsageError
    from ditmoe_cli.files.writer import Output

    is_slip = path.suffix.startswith(".safe") and path.suffix != ".safetensors"
    if is_slip or path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".npz", ".json"):
        raise UsageError(f"--output {path}: checkpoints are written as FILE.safetensors or into a folder")
    return Output(path.absolute(), force, parse_size(shard_size, "--max-shard-size"))


def require_safetensors(path: Path) -> Path:
    """Return `path`, or raise `UsageError` where it does not end in .safetensors."""
    from ditmoe_cli.errors import UsageError

    if path.suffix != ".safetensors":
        raise UsageError(f"--output {path}: give a name that ends in .safetensors")
    return path


def parse_repair(refit: bool, tokens: int, router: str, scale: bool = False) -> Repair | None:
    """Return how to refit, or scale instead.

    What upstream has no word for is left out of sliced checkpoints, which are to load there.
    """
    from ditmoe_cli.compression.plan import Repair
    from ditmoe_cli.errors import UsageError

    if tokens < 0:
        raise UsageError(f"--refit-tokens {tokens}: must be at least 0")
    if not refit and scale:
        raise UsageError("--scale is a repair; leave out --no-refit")
    beyond = router != "slice" and not scale
    return Repair(scale, not scale, beyond, beyond, tokens) if refit else None
