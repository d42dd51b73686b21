"""Time whole guided sampling against upstream's algorithm: equal weights, steps and noise, in turn, in one run.

    python examples/benchmarks/sampling.py --model S --batch 1,8 --steps 4 --dtype fp32,bf16
    python examples/benchmarks/sampling.py --model XL --blocks 2 --batch 1 --steps 2 --family ddpm
    python examples/benchmarks/sampling.py --model XL --batch 1,8,32 --dtype bf16 --device cuda --json xl.json

Ours is what ``ditmoe sample`` runs for a batch. Upstream computes in fp32, and in half precision under autocast with
halved weights; its rectified flow evaluates the branches of guidance one after the other. Weights are random, on the
scale of trained ones. Differences are of latents, relative to those of upstream in fp32. `products` is the time of the
products with weights alone, each expert being given as many tokens: no code of as many operations is faster by more
than upstream's fp32 over it, the bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from interleaved import (
    DTYPES,
    Run,
    Timer,
    add_options,
    in_dtype,
    machine,
    numbers,
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
from upstream_algorithm import UpstreamDiT, precision, sample_ddpm, sample_flow, upstream_model

from ditmoe_cli.diffusion.forward_process import sampling_schedule
from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.linear import Linear

COLUMNS = ("model", "batch", "dtype", "ours ms a step", "upstream", "upstream fp32", "products")
COLUMNS += ("speed-up", "over fp32", "bound over fp32", "difference", "upstream's difference")


@dataclass(frozen=True)
class Work:
    """What is sampled: a batch of images in so many steps."""

    family: Literal["rf", "ddpm"]
    batch: int
    steps: int
    cfg: float

    def spec(self) -> SampleSpec:
        """Return it as ditmoe takes it; each image has a class of its own."""
        solver: Literal["euler", "ddpm"] = "euler" if self.family == "rf" else "ddpm"
        return SampleSpec(self.batch, self.steps, self.cfg, 0, solver, tuple(range(self.batch)))


def our_run(model: DiTMoE, work: Work) -> Run:
    """Return a call of ditmoe's sampling."""
    return lambda: sample_batch(model, work.spec(), range(work.batch))


def products_run(model: DiTMoE, work: Work) -> Run:
    """Return a call of the products with the matrices of all blocks, tokens being spread evenly over the experts."""
    config = model.config
    tokens = (1 if work.cfg == 1.0 else 2) * work.batch * config.num_patches
    layers: list[tuple[Linear, int]] = []
    for block in model.blocks:
        share = tokens * config.top_k // len(block.moe.experts)
        for module, rows in ((block.attn, tokens), (block.moe.experts, share), (block.moe.shared_experts, tokens)):
            layers += [(layer, rows) for layer in module.modules() if isinstance(layer, Linear)]
    shapes = {(rows, layer.in_features) for layer, rows in layers}
    inputs = {shape: torch.randn(shape, device=model.device).to(model.dtype) for shape in shapes}

    @torch.inference_mode()
    def run() -> Tensor:
        for _ in range(work.steps):
            for layer, rows in layers:
                out = layer(inputs[rows, layer.in_features])
        return out

    return run


def upstream_run(model: UpstreamDiT, work: Work, dtype: torch.dtype, device: torch.device) -> Run:
    """Return a call of upstream's sampling, with ditmoe's noise."""
    config, labels = model.config, torch.arange(work.batch, device=device)
    shape = (config.in_channels, config.input_size, config.input_size)
    schedule = sampling_schedule("ddpm", work.steps)

    def run() -> Tensor:
        stream = image_noise(0, range(work.batch), device)
        z = stream.draw(shape)

        def draw(_: Sequence[int]) -> Tensor:
            own = stream.draw(shape)
            return torch.cat((own, torch.zeros_like(own)))

        with precision(dtype, device):
            if work.family == "rf":
                return sample_flow(model, z, labels, work.cfg, work.steps)
            return sample_ddpm(model, z, labels, work.cfg, schedule, draw)

    return run


@dataclass(frozen=True)
class Models:
    """Both implementations over the same weights, by the name of a dtype."""

    ours: dict[str, DiTMoE]
    upstream: dict[str, UpstreamDiT]

    def runs(self, work: Work, device: torch.device) -> dict[str, Run]:
        """Return everything that is timed, by name."""
        upstream = {
            f"upstream {name}": upstream_run(each, work, DTYPES[name], device) for name, each in self.upstream.items()
        }
        ours = {f"ours {name}": our_run(each, work) for name, each in self.ours.items()}
        return upstream | ours | {f"products {name}": products_run(each, work) for name, each in self.ours.items()}


def both(config: DiTMoEConfig, dtypes: Sequence[str], device: torch.device) -> Models:
    """Return models of random weights; ours are laid out for products, as for `ditmoe sample`."""
    torch.manual_seed(0)
    whole = random_model(config, device)
    ours = {name: in_dtype(whole, DTYPES[name]) for name in dict.fromkeys(("fp32", *dtypes))}
    upstream = {name: upstream_model(config, ours[name].state_dict(), dtype=DTYPES[name]) for name in ours}
    return Models({name: ours[name].prepack() for name in dtypes}, upstream)


def rows_of(model: str, work: Work, models: Models, timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """Return the figures of each dtype for one batch."""
    runs = models.runs(work, timer.device)
    results = {name: run() for name, run in runs.items()}
    images = {name: result for name, result in results.items() if not name.startswith("products")}
    differences = {name: relative_difference(each, images["upstream fp32"]) for name, each in images.items()}
    seconds = timer.in_turn(runs, rounds, warm_ups=0)  # these results were one
    return [
        {
            "model": model,
            "batch": work.batch,
            "steps": work.steps,
            "dtype": name,
            "ours": seconds[f"ours {name}"],
            "upstream": seconds[f"upstream {name}"],
            "upstream fp32": seconds["upstream fp32"],
            "products": seconds[f"products {name}"],
            "speed-up": ratio(seconds[f"upstream {name}"], seconds[f"ours {name}"]),
            "over fp32": ratio(seconds["upstream fp32"], seconds[f"ours {name}"]),
            "bound over fp32": ratio(seconds["upstream fp32"], seconds[f"products {name}"]),
            "difference": differences[f"ours {name}"],
            "upstream's difference": differences[f"upstream {name}"],
        }
        for name in models.ours
    ]


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as texts."""
    times = [f"{1000 * min(row[key]) / row['steps']:.1f}" for key in ("ours", "upstream", "upstream fp32", "products")]
    differences = [f"{row[key]:.1e}" for key in ("difference", "upstream's difference")]
    speed = [str(row[key]) for key in ("speed-up", "over fp32", "bound over fp32")]
    return [row["model"], str(row["batch"]), row["dtype"], *times, *speed, *differences]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all rows; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="S", help="of upstream's; G has 16 experts, others 8")
    parser.add_argument("--blocks", type=int, help="as many of the model's; default: all")
    parser.add_argument("--family", choices=("rf", "ddpm"), default="rf", help="Euler steps, or ancestral ones")
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="images")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cfg", type=float, default=1.5, help="guidance scale")
    add_options(parser, rounds=3)
    options = parser.parse_args(arguments)
    timer = timer_of(options)
    config = config_of(MODELS[options.model])
    depth = min(options.blocks or config.depth, config.depth)
    config = replace(config, depth=depth, blocks=config.blocks[:depth], sampler=options.family)
    models = both(config, options.dtype, timer.device)
    rows = []
    for batch in options.batch:
        work = Work(options.family, batch, options.steps, options.cfg)
        rows += rows_of(options.model, work, models, timer, options.rounds)
    report(options.json, machine(timer), plain(rows), table(COLUMNS, [cells(row) for row in rows]))


if __name__ == "__main__":
    main()
