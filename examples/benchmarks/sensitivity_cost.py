"""Measure what a map of sensitivity takes in one block of a large model, on random weights, and what a whole one would.

python examples/benchmarks/sensitivity_cost.py --model XL --images 8

Timed are the block as a map runs it behind the one that leaves a part out, five parts of each state side by side, and
the block without each part. A map of L blocks runs the first L (L - 1) / 2 times, the second L times. Seconds are those
of the processor, over all threads.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from interleaved import random_model
from refit_cost import peak_bytes
from synthetic_checkpoint import MODELS, config_of

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.model.block_choices import parse_choice
from ditmoe_cli.model.dit import Block
from ditmoe_cli.routing.sensitivity.left_out_parts import block_output
from ditmoe_cli.routing.sensitivity.map_effort import map_estimate
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS


def main() -> None:
    """Time one block; print seconds, peak memory, and the estimate for all blocks at the rate of that block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="XL")
    parser.add_argument("--images", type=int, default=8, help="states of one step, without guidance")
    options = parser.parse_args()
    device, config = torch.device("cpu"), config_of(MODELS[options.model])
    (block,) = random_model(replace(config, blocks=config.blocks[:1]), device).prepack().blocks
    assert isinstance(block, Block)
    choices, parts = [parse_choice(part) for part in PARTS], len(PARTS)
    x = torch.randn(options.images, config.num_patches, config.hidden_size, device=device)
    modulation = 0.1 * torch.randn(options.images, 6 * config.hidden_size, device=device)
    seconds = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.process_time()
            attended = block.attend_modulated(x, modulation)
            out = torch.cat([block_output(block, choice, x, modulation, attended) for choice in choices])
            middle = time.process_time()
            passed = block.mix(block.attend_modulated(out, modulation.repeat(parts, 1)), 0, None)
            float(passed.sum())
            seconds.append((middle - start, time.process_time() - middle))
    own, behind = (min(times) for times in zip(*seconds, strict=True))
    depth = config.depth
    state = (depth * own + depth * (depth - 1) / 2 * behind) / options.images
    spec = SampleSpec(16, 16, 1.0, 0, "ab2", (0,))
    memory = map_estimate(config, spec, 16, tuple(PARTS), options.images).memory
    print(
        f"{options.model}, {options.images} states on {torch.get_num_threads()} threads: the block without each part "
        f"{own:.1f} s, behind it {behind:.1f} s; peak {peak_bytes(device) / 1e9:.1f} GB with one block\n"
        f"all {depth} blocks: {state:.0f} s a state and branch, {state * 256 / 3600:.1f} h for 16 images at 16 steps "
        f"without guidance; memory {memory / 1e9:.0f} GB, estimated"
    )


if __name__ == "__main__":
    main()
