"""Measure time and memory of healing one block, of a large model's shapes, narrowed to a share of its neurons.

    python examples/benchmarks/healing_cost.py --model XL --neurons 0.5 --batch 16 --steps 4

Weights and states are random; a step's time depends on neither. Prints the seconds of a step, and of letting the states
pass both blocks, which each block takes thrice.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from refit_cost import peak_bytes
from synthetic_checkpoint import MODELS, config_of
from torch import Tensor

from ditmoe_cli.compression.training.training_loop import Course, Objective, train
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.dtypes import torch_dtype_of


def random_block(config: DiTMoEConfig, device: torch.device) -> Block:
    """Return the first block of a configuration with random weights."""
    with torch.device(device):
        block = Block(config, config.blocks[0])
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=config.hidden_size**-0.5)
    return block.requires_grad_(False)


def narrowed(config: DiTMoEConfig, share: float) -> DiTMoEConfig:
    """Return a configuration of one block whose experts keep a share of their neurons."""
    block = config.blocks[0]
    widths = tuple(round(share * width) for width in block.expert_widths)
    return replace(config, blocks=(replace(block, expert_widths=widths),))


def main() -> None:
    """Train one block for some steps; print seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="XL", choices=MODELS)
    parser.add_argument("--neurons", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="fp32", help="what attention and experts compute in")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), torch_dtype_of(options.dtype)
    config = replace(config_of(MODELS[options.model]), depth=1)
    config = replace(config, blocks=config.blocks[:1])
    teacher, student = random_block(config, device), random_block(narrowed(config, options.neurons), device)
    for block in (teacher, student):
        block.compute_in(dtype)
    count = options.batch * options.steps
    x = torch.randn(count, config.num_patches, config.hidden_size, device=device)
    c = torch.randn(count, config.hidden_size, device=device)
    start = time.perf_counter()
    with torch.no_grad():
        target = torch.cat([teacher(*part, 0, None) for part in zip(x.split(8), c.split(8), strict=True)])
    passing = time.perf_counter() - start
    weights = {name: weight.requires_grad_(True) for name, weight in student.named_parameters()}

    def losses(rows: Tensor) -> Tensor:
        places = rows.to(device)
        return (student(x[places], c[places], 0, None) - target[places]).square().flatten(1).mean(dim=1)

    def judge() -> float:
        with torch.no_grad():
            return float(losses(torch.arange(min(8, count))).mean())

    begin, cpu = time.perf_counter(), time.process_time()
    result = train(weights, Objective(count, losses, judge), Course(options.steps, options.batch, checks=1), "training")
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    trained = sum(weight.numel() for weight in weights.values())
    print(
        f"{seconds / options.steps:.1f} s a step of {options.batch} states ({cpu / options.steps:.1f} s of processor "
        f"time), {passing / count * 1000:.0f} ms for a state to pass the original, {trained / 1e6:.0f} M weights, peak "
        f"{peak_bytes(device) / 2**30:.2f} GiB, error {result.before:.3g} -> {result.after:.3g}"
    )


if __name__ == "__main__":
    main()
