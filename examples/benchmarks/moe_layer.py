"""Time one mixture of experts against upstream's algorithm, in turn, in one run.

    python examples/benchmarks/moe_layer.py --model S --tokens 256,1024 --dtype fp32,bf16
    python examples/benchmarks/moe_layer.py --model XL --tokens 1024,16384 --dtype bf16 --device cuda --json xl.json

Shapes are those of the published models, weights and tokens random: a softmax of random logits routes tokens about
evenly. Inputs are fp32, as the stream of both is, and so is the output of ours; in half precision upstream runs under
autocast with halved weights. `of peak` is the share of the operations a second of a large square product in the same
dtype, measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from interleaved import (
    DTYPES,
    Run,
    Timer,
    add_options,
    in_dtype,
    machine,
    numbers,
    peak_rate,
    plain,
    random_model,
    ratio,
    relative_difference,
    report,
    table,
    timer_of,
)
from synthetic_checkpoint import MODELS, config_of
from torch import Tensor
from upstream_algorithm import UpstreamMixture, parts_of, precision

from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.effort import mixture_flops

COLUMNS = ("model", "tokens", "dtype", "ours ms", "upstream ms", "upstream fp32 ms")
COLUMNS += ("speed-up", "over fp32", "ours TFLOP/s", "of peak", "difference")


def upstream_mixture(config: DiTMoEConfig, model: DiTMoE, dtype: torch.dtype) -> UpstreamMixture:
    """Return upstream's mixture with the weights of the model's first block, in a dtype."""
    block, prefix = config.blocks[0], "blocks.0.moe."
    with torch.device("meta"):
        shape = (config.hidden_size, block.router_rows, block.expert_widths[0], block.shared_width, config.top_k)
        made = UpstreamMixture(*shape, parts_of(config))
    state = {name.removeprefix(prefix): value.to(dtype) for name, value in model.state_dict().items() if prefix in name}
    made.load_state_dict(state, strict=True, assign=True)
    return made.eval()


def upstream_run(mixture: UpstreamMixture, u: Tensor, dtype: torch.dtype) -> Run:
    """Return a call of upstream's mixture."""

    def run() -> Tensor:
        with torch.no_grad(), precision(dtype, u.device):
            out: Tensor = mixture(u)
            return out

    return run


def our_run(model: DiTMoE, u: Tensor) -> Run:
    """Return a call of our mixture."""
    gamma = torch.zeros(len(u), u.shape[-1], device=u.device)

    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = model.blocks[0].moe(u, 0, gamma, None)
            return out

    return run


def measure(config: DiTMoEConfig, tokens: int, dtypes: Sequence[str], timer: Timer, rounds: int) -> dict[str, Any]:
    """Return seconds by name, and how far outputs are from upstream's in fp32, for one number of tokens."""
    torch.manual_seed(0)
    model = random_model(config, timer.device)
    u = torch.randn(1, tokens, config.hidden_size, device=timer.device)
    runs: dict[str, Run] = {}
    for name in dict.fromkeys(("fp32", *dtypes)):
        dtype = DTYPES[name]
        runs[f"upstream {name}"] = upstream_run(upstream_mixture(config, model, dtype), u, dtype)
    for name in dtypes:
        runs[f"ours {name}"] = our_run(in_dtype(model, DTYPES[name]), u)
    outputs = {name: run() for name, run in runs.items()}
    differences = {name: relative_difference(out, outputs["upstream fp32"]) for name, out in outputs.items()}
    return {"tokens": tokens, "seconds": timer.in_turn(runs, rounds), "differences": differences}


def row_of(model: str, dtype: str, flops: float, peak: float, found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one dtype."""
    seconds = found["seconds"]
    ours, theirs, fp32 = (seconds[name] for name in (f"ours {dtype}", f"upstream {dtype}", "upstream fp32"))
    rate = flops / min(ours)
    return {
        "model": model,
        "tokens": found["tokens"],
        "dtype": dtype,
        "ours": ours,
        "upstream": theirs,
        "upstream fp32": fp32,
        "speed-up": ratio(theirs, ours),
        "over fp32": ratio(fp32, ours),
        "flops": rate,
        "peak": peak,
        "difference": found["differences"][f"ours {dtype}"],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as texts."""
    times = [f"{1000 * min(row[key]):.2f}" for key in ("ours", "upstream", "upstream fp32")]
    speed = [f"{row['flops'] / 1e12:.3g}", f"{row['flops'] / row['peak']:.0%}", f"{row['difference']:.1e}"]
    return [row["model"], str(row["tokens"]), row["dtype"], *times, str(row["speed-up"]), str(row["over fp32"]), *speed]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="S", help="of upstream's; G has 16 experts, others 8")
    parser.add_argument("--tokens", type=numbers, default=[256, 1024, 4096], help="256 an image and branch of guidance")
    add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    timer = timer_of(options)
    config = config_of(MODELS[options.model])
    config = replace(config, depth=1, blocks=config.blocks[:1])
    peaks = {name: peak_rate(timer, DTYPES[name]) for name in options.dtype}
    rows = []
    for tokens in options.tokens:
        found = measure(config, tokens, options.dtype, timer, options.rounds)
        flops = tokens * mixture_flops(config, config.blocks[0])
        rows += [row_of(options.model, name, flops, peaks[name], found) for name in options.dtype]
    report(options.json, machine(timer), plain(rows), table(COLUMNS, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
