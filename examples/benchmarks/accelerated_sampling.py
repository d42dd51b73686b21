"""Time guided sampling as it is, replayed as CUDA graphs, and compiled, against upstream's algorithm, in turn.

    python examples/benchmarks/accelerated_sampling.py --model XL --batch 1,8,32 --device cuda --json xl.json
    python examples/benchmarks/accelerated_sampling.py --model XL --batch 1 --ways plain,compiled,both --device cuda

Models, noise and differences are those of sampling.py. What a first run takes, to make kernels, to capture or to
compile, is not part of the times, and is told beside them.
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
    names_of,
    numbers,
    plain,
    ratio,
    relative_difference,
    report,
    table,
    timer_of,
)
from sampling import Models, Work, both, upstream_run
from synthetic_checkpoint import MODELS, config_of

from ditmoe_cli.diffusion.sampling import sample_batch
from ditmoe_cli.model.acceleration import Acceleration, accelerated
from ditmoe_cli.model.dit import DiTMoE

COLUMNS = ("model", "batch", "dtype", "way", "ms a step", "upstream", "speed-up", "first run, s", "difference")
WAYS = {
    "plain": Acceleration(graphs=False),
    "graphs": Acceleration(graphs=True),
    "compiled": Acceleration(compiled=True, graphs=False),
    "both": Acceleration(compiled=True, graphs=True),
}


def our_run(model: DiTMoE, how: Acceleration, work: Work) -> Run:
    """Return a call of ditmoe's sampling; compiling happens in a copy."""
    denoiser = accelerated(in_dtype(model, model.dtype) if how.compiled else model, how)
    return lambda: sample_batch(denoiser, work.spec(), range(work.batch))


def rows_of(
    model: str, work: Work, models: Models, ways: Sequence[str], timer: Timer, rounds: int
) -> list[dict[str, Any]]:
    """Return the figures of each dtype and way for one batch."""
    exact = upstream_run(models.upstream["fp32"], work, torch.float32, timer.device)()
    rows = []
    for dtype, mine in models.ours.items():
        runs = {way: our_run(mine, WAYS[way], work) for way in ways}
        runs["upstream"] = upstream_run(models.upstream[dtype], work, DTYPES[dtype], timer.device)
        first = {name: timer.seconds(run) for name, run in runs.items()}
        images = {name: run() for name, run in runs.items()}
        seconds = timer.in_turn(runs, rounds, warm_ups=0)
        rows += [
            {
                "model": model,
                "batch": work.batch,
                "steps": work.steps,
                "dtype": dtype,
                "way": way,
                "ours": seconds[way],
                "upstream": seconds["upstream"],
                "speed-up": ratio(seconds["upstream"], seconds[way]),
                "first": first[way],
                "difference": relative_difference(images[way], exact),
                "upstream's difference": relative_difference(images["upstream"], exact),
            }
            for way in ways
        ]
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as texts."""
    times = [f"{1000 * min(row[key]) / row['steps']:.1f}" for key in ("ours", "upstream")]
    last = [str(row["speed-up"]), f"{row['first']:.1f}", f"{row['difference']:.1e}"]
    return [row["model"], str(row["batch"]), row["dtype"], row["way"], *times, *last]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="XL", help="of upstream's; G has 16 experts, others 8")
    parser.add_argument("--blocks", type=int, help="as many of the model's; default: all")
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="images")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale")
    parser.add_argument("--ways", type=names_of(WAYS), default=["plain", "graphs"], help="of " + ", ".join(WAYS))
    add_options(parser, rounds=3)
    parser.set_defaults(dtype=["bf16"])
    options = parser.parse_args(arguments)
    timer = timer_of(options)
    config = config_of(MODELS[options.model])
    depth = min(options.blocks or config.depth, config.depth)
    config = replace(config, depth=depth, blocks=config.blocks[:depth])
    models, rows = both(config, options.dtype, timer.device), []
    for batch in options.batch:
        work = Work("rf", batch, options.steps, options.cfg)
        rows += rows_of(options.model, work, models, options.ways, timer, options.rounds)
    report(options.json, machine(timer), plain(rows), table(COLUMNS, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
