"""``ditmoe quantize``: fewer bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ditmoe_cli.cli.options import (
    CheckpointArg,
    Device,
    DryRun,
    Force,
    Heads,
    Json,
    OutputOpt,
    ProfileOpt,
    Quiet,
    SamplerOpt,
    ShardSize,
    TopK,
    given,
    parse_size,
)
from ditmoe_cli.cli.planning import Means, Target, print_methods, run_planner
from ditmoe_cli.cli.stage import incoming, open_stage
from ditmoe_cli.cli.terminal import Printing
from ditmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import Rounding
    from ditmoe_cli.compression.precision.mixed import MixedPrecision
    from ditmoe_cli.compression.precision.uniform import UniformPrecision

Bits = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--bits", metavar="B", help="As many bytes as with B bits everywhere, as 3.25; the mix is planned."),
]
Size = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--size", metavar="SIZE", help="Instead of --bits: bytes of the whole file, as 2.5GiB or 900MB."),
]
Uniform = Annotated[bool, typer.Option("--uniform", help="One format for all instead of a planned mix.")]
FormatOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--format", metavar="nf4|fp4|int8|int|ternary", help="Format of --uniform. [default: by its bits]"),
]
DoubleQuant = Annotated[bool, typer.Option("--double-quant", help="Quantise the scales of nf4 or fp4 too.")]
GroupSize = Annotated[int, typer.Option("--group-size", metavar="32|64|128", help="Weights that share a scale.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="Symmetric ranges, without zero points.")]
MethodOpt = Annotated[str, typer.Option("--method", metavar="NAME", help="How the mix is planned; see --list-methods.")]
ListOpt = Annotated[bool, typer.Option("--list-methods", help="Print the methods with their sources, and stop.")]
Allow = Annotated[str, typer.Option("--allow", metavar="B,...", help="Widths to choose from; 16 leaves a weight.")]
Floor = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--floor",
        metavar="GROUP=B",
        help="Fewest bits of experts, shared, attn, modulation or embedders; may be given again.",
    ),
]
Protect = Annotated[str, typer.Option("--protect", metavar="GROUP,...", help="Groups of weights to leave alone.")]
Tie = Annotated[str, typer.Option("--tie", metavar="gate,up", help="Matrices of an expert that share a format.")]
RoundingOpt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--rounding", metavar="gptq|nearest", help="[default: gptq, with --uniform nearest]"),
]
TokensOpt = Annotated[
    int, typer.Option("--tokens", metavar="N", help="Tokens to round on. [default: 8 an input, 20480 to 65536]")
]

SmoothOpt = Annotated[
    float, typer.Option("--smooth", metavar="A", help="Scale mixture inputs by their largest to the power of A first.")
]

ALLOWED = "2,3,4,5,6,8,16"


def run(
    checkpoint: CheckpointArg = None,
    bits: Bits = None,
    size: Size = None,
    method: MethodOpt = "replay",
    uniform: Uniform = False,
    fmt: FormatOpt = None,
    double_quant: DoubleQuant = False,
    group_size: GroupSize = 64,
    symmetric: Symmetric = False,
    allow: Allow = ALLOWED,
    floor: Floor = None,
    protect: Protect = "",
    tie: Tie = "",
    rounding: RoundingOpt = None,
    tokens: TokensOpt = 0,
    smooth: SmoothOpt = 0.0,
    list_methods: ListOpt = False,
    profile: ProfileOpt = None,
    device: Device = "cpu",
    heads: Heads = None,
    top_k: TopK = None,
    sampler: SamplerOpt = None,
    output: OutputOpt = None,
    force: Force = False,
    dry_run: DryRun = False,
    max_shard_size: ShardSize = "10GB",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store weights in fewer bits: a format for each, planned so that the prediction changes least.

    A planned mix needs a routing profile: the one in the envelope or --profile; else the checkpoint is profiled first.
    --uniform with --rounding nearest needs none. Router, patch and label embedding, norms and biases stay as they are.
    """
    if list_methods:
        from ditmoe_cli.compression.precision.precision_methods import METHODS

        return print_methods(METHODS, Printing(json))
    rounded = parse_rounding(rounding or ("nearest" if uniform else "gptq"), tokens, smooth)
    kind = (group_size, symmetric, double_quant)
    planned = parse_method(method, uniform)
    if uniform:
        refuse_mixing({"allow": allow != ALLOWED, "floor": bool(floor), "protect": bool(protect), "tie": bool(tie)})
        planner: UniformPrecision | MixedPrecision = parse_uniform(fmt, bits, size, *kind, rounded)
    else:
        planner = parse_mixed(planned, fmt, bits, size, kind, allow, floor, protect, tie, rounded)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    target = Target(output, force, max_shard_size, dry_run)
    return run_planner(planner, stage, open_stage(stage), target, Means(profile, device), Printing(json, quiet))


def parse_method(method: str, uniform: bool) -> str:
    """Return the method by which a mix is planned. Raises `UsageError` for unknown ones, and where none is planned."""
    from ditmoe_cli.compression.precision.precision_methods import DEFAULT_METHOD, METHODS

    if method not in METHODS:
        raise UsageError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")
    if uniform and method != DEFAULT_METHOD:
        raise UsageError(f"--method {method}: plans a mix; leave out --uniform")
    return method


def refuse_mixing(given: dict[str, bool]) -> None:
    """Raise `UsageError` for the first option given that shapes a mix, where one format is asked for."""
    for name, there in given.items():
        if there:
            raise UsageError(f"--{name}: shapes a planned mix; leave out --uniform")


def parse_rounding(method: str, tokens: int, smoothing: float = 0.0) -> Rounding | None:
    """Return how weights are rounded. Raises `UsageError` for unknown names."""
    from ditmoe_cli.compression.plan import Rounding

    if method not in ("gptq", "nearest"):
        raise UsageError(f"--rounding {method}: choose gptq or nearest")
    if tokens < 0 or (tokens and method == "nearest"):
        raise UsageError(f"--tokens {tokens}: give at least 1, and --rounding gptq")
    if not 0 <= smoothing <= 1 or (smoothing and method == "nearest"):
        raise UsageError(f"--smooth {smoothing:g}: give 0 to 1, and --rounding gptq")
    return Rounding("gptq", tokens, smoothing) if method == "gptq" else None


def parse_uniform(
    fmt: str | None,
    bits: float | None,
    size: str | None,
    group_size: int,
    symmetric: bool,
    double: bool,
    method: Rounding | None,
) -> UniformPrecision:
    """Return what --uniform asks for. Raises `UsageError` for what does not go together."""
    from ditmoe_cli.compression.precision.uniform import UniformPrecision, format_named

    if size is not None:
        raise UsageError("--size plans a mix; give --bits with --uniform")
    name = format_named(fmt, bits, group_size, symmetric, double)
    label = f"bits{bits:g}" if fmt is None and bits is not None else name
    return UniformPrecision(name, method, f"quantize-{label}")


def parse_mixed(
    planned: str,
    fmt: str | None,
    bits: float | None,
    size: str | None,
    kind: tuple[int, bool, bool],
    allow: str,
    floor: list[str] | None,
    protect: str,
    tie: str,
    method: Rounding | None,
) -> MixedPrecision:
    """Return what a planned mix is to be. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.precision.budget import Budget
    from ditmoe_cli.compression.precision.candidates import DEFAULT_FLOORS, Candidates
    from ditmoe_cli.compression.precision.mixed import MixedPrecision
    from ditmoe_cli.compression.precision.precision_methods import DEFAULT_METHOD

    group_size, symmetric, double = kind
    if fmt is not None or double:
        raise UsageError("--format and --double-quant: a mix has formats of its own; give --uniform, or --allow")
    if bits is None and size is None:
        raise UsageError("--bits is missing: give a width, as 4 or 3.25, or a --size")
    budget = Budget(bits, parse_size(size, "--size") if size is not None else None)
    floors = {**DEFAULT_FLOORS, **dict(parse_floor(text) for text in floor or ())}
    listed = [tuple(filter(None, text.replace(" ", "").split(","))) for text in (allow, protect, tie)]
    candidates = Candidates(listed[0], group_size, symmetric, floors, listed[1], listed[2])
    label = f"bits{bits:g}" if bits is not None else f"size{size}"
    label += "" if planned == DEFAULT_METHOD else f"-{planned}"
    return MixedPrecision(budget, candidates, planned, method, f"quantize-{label}")


def parse_floor(text: str) -> tuple[str, float]:
    """Read ``--floor GROUP=B``."""
    group, _, width = text.partition("=")
    try:
        return group, float(width)
    except ValueError:
        raise UsageError(f"--floor {text}: give a group and its fewest bits, as attn=4") from None
