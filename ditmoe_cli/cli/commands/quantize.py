"""``ditmoe quantize``: fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

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
    checked_device,
    checkpoint_output,
    given,
    parse_size,
)
from ditmoe_cli.cli.planning import preview, print_methods, valid_profile_for, write
from ditmoe_cli.cli.stage import Stage, default_output, incoming, open_stage
from ditmoe_cli.cli.terminal import Printing, progress
from ditmoe_cli.errors import BadInputError, UsageError

if TYPE_CHECKING:
    from ditmoe_cli.compression.plan import CompressionPlan, Rounding
    from ditmoe_cli.compression.precision.budget import Budget
    from ditmoe_cli.compression.precision.candidates import Candidates
    from ditmoe_cli.files.writer import Output
    from ditmoe_cli.model.opened import Checkpoint
    from ditmoe_cli.routing.profile import RoutingProfile

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
        asked: Asked = parse_uniform(fmt, bits, size, *kind, rounded)
    else:
        asked = parse_mixed(planned, fmt, bits, size, kind, allow, floor, protect, tie, rounded)
    stage = incoming(checkpoint, given(heads, top_k, sampler))
    opened = open_stage(stage)
    target = output or default_output(opened.path, f"quantize-{asked.label}")
    to = checkpoint_output(target, force, max_shard_size)
    plan, used = choose(stage, opened, asked, profile, dry_run, to, device)
    printing = Printing(json, quiet)
    if dry_run:
        return preview(stage, opened, plan, target, force, max_shard_size, printing)
    return write(
        *(stage, "quantize", opened, plan, target, force, max_shard_size, printing, details(plan), used, device)
    )


@dataclass(frozen=True)
class Asked:
    """What is asked for: one format, or a mix within a budget, planned by a method."""

    label: str
    rounding: Rounding | None
    uniform: str | None = None
    budget: Budget | None = None
    candidates: Candidates | None = None
    method: str = ""


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
) -> Asked:
    """Return what --uniform asks for. Raises `UsageError` for what does not go together."""
    from ditmoe_cli.compression.precision.uniform import format_named

    if size is not None:
        raise UsageError("--size plans a mix; give --bits with --uniform")
    name = format_named(fmt, bits, group_size, symmetric, double)
    return Asked(f"bits{bits:g}" if fmt is None and bits is not None else name, method, uniform=name)


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
) -> Asked:
    """Return what a planned mix is to be. Raises `UsageError` for unknown names and values out of range."""
    from ditmoe_cli.compression.precision.budget import Budget
    from ditmoe_cli.compression.precision.candidates import DEFAULT_FLOORS, Candidates
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
    return Asked(label, method, budget=budget, candidates=candidates, method=planned)


def parse_floor(text: str) -> tuple[str, float]:
    """Read ``--floor GROUP=B``."""
    group, _, width = text.partition("=")
    try:
        return group, float(width)
    except ValueError:
        raise UsageError(f"--floor {text}: give a group and its fewest bits, as attn=4") from None


def choose(
    stage: Stage, checkpoint: Checkpoint, asked: Asked, named: Path | None, dry_run: bool, output: Output, device: str
) -> tuple[CompressionPlan, RoutingProfile | None]:
    """Return the plan and the profile that it rests on, profiling the checkpoint where that is needed."""
    from ditmoe_cli.compression.precision.candidates import require_unquantised
    from ditmoe_cli.compression.precision.uniform import plan_uniform
    from ditmoe_cli.routing.calibrate import usable_profile

    require_unquantised(checkpoint)
    if asked.uniform is not None and asked.rounding is None:
        return plan_uniform(checkpoint, asked.uniform), None
    known = named or (Path(stage.profile) if stage.profile else None)
    offered = offer(checkpoint, asked, output)
    if not dry_run:
        found = valid_profile_for(checkpoint, known, output.path, device, output.force)
    else:
        usable = usable_profile(checkpoint, known)
        if usable is None and asked.uniform is not None:
            return plan_uniform(checkpoint, asked.uniform, asked.rounding), None
        if usable is None:
            raise BadInputError(f"{checkpoint.path}: which mix is best rests on measured errors; give a --profile")
        found = usable
    if offered is not None:
        return mixed(checkpoint, asked, found, output, device, *offered), found
    assert asked.uniform is not None
    return plan_uniform(checkpoint, asked.uniform, asked.rounding, found.digest), found


def offer(checkpoint: Checkpoint, asked: Asked, output: Output) -> tuple[dict[str, tuple[str | None, ...]], int] | None:
    """Return the formats that a mix may take and the bytes that its file may; None where one format is asked for.

    Refuses a budget that nothing fits, before anything is profiled.
    """
    from ditmoe_cli.compression.precision.budget import budget_bytes, check_budget
    from ditmoe_cli.compression.precision.candidates import candidate_formats

    if asked.budget is None or asked.candidates is None:
        return None
    formats = candidate_formats(checkpoint, asked.candidates)
    limit = budget_bytes(checkpoint, asked.budget, asked.candidates, output)
    check_budget(checkpoint, formats, asked.candidates, limit, output)
    return formats, limit


def mixed(
    checkpoint: Checkpoint,
    asked: Asked,
    profile: RoutingProfile,
    output: Output,
    device: str,
    formats: dict[str, tuple[str | None, ...]],
    limit: int,
) -> CompressionPlan:
    """Plan a mix by the method that is asked for, and try it."""
    from ditmoe_cli.compression.precision.budget import plan_mixed
    from ditmoe_cli.compression.precision.precision_methods import METHODS
    from ditmoe_cli.compression.precision.task import Task
    from ditmoe_cli.compression.precision.trial import trial

    assert asked.candidates is not None and asked.budget is not None
    place = checked_device(device)
    task = Task(checkpoint, profile, asked.candidates, formats, limit, output, place, progress)
    choice = METHODS[asked.method].choose(task)
    tried = choice.tried
    if tried is None:
        tried = trial(checkpoint, profile, choice.formats, place, progress).error
    options = {"method": asked.method, **asked.budget.options(), "tried_error": tried}
    return plan_mixed(checkpoint, profile.digest, choice, options, asked.rounding)


def details(plan: CompressionPlan) -> dict[str, Any]:
    """Return what a quantisation did, for the result."""
    from collections import Counter

    from ditmoe_cli.formats.weights import format_label

    said = ("method", "predicted_error", "tried_error", "gap", "solver")
    counts = dict(sorted(Counter(map(format_label, plan.formats.values())).items()))
    found = {name: plan.options[name] for name in said if name in plan.options}
    return {"weights": len(plan.formats), "formats": counts, **found}
