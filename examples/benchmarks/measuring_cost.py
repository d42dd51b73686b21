"""Measure the time and peak memory of measuring the errors of formats in one block of a large model, on random weights.

python examples/benchmarks/measuring_cost.py --width 1152 --experts 8 --tokens 8192

All matrices of the block are tried in all widths: routed and shared experts, attention and modulation. Passing on the
streams that carry errors to the prediction is not part of it.
"""

from __future__ import annotations

import argparse
import time
from itertools import chain

import torch
from refit_cost import peak_bytes

from ditmoe_cli.compression.precision.candidates import WIDTHS, Candidates
from ditmoe_cli.compression.precision.expert_errors import mixture_errors
from ditmoe_cli.compression.precision.sensitivity import Sent, dense_errors
from ditmoe_cli.compression.replay.guided import GuidedStates
from ditmoe_cli.compression.replay.local_errors import residual_of
from ditmoe_cli.compression.replay.stream import Stream
from ditmoe_cli.compression.replay.tokens import attended_tokens
from ditmoe_cli.compression.working_sizes import FEWEST_SENT, SENT_TOKENS
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.dit import Block

PATCHES = 256


def random_block(config: DiTMoEConfig, device: torch.device) -> Block:
    """Return a block with weights on the scale of trained ones."""
    block = Block(config, config.blocks[0]).to(device)
    for weight in block.parameters():
        weight.data = torch.randn(weight.shape, device=device) * weight.shape[-1] ** -0.5
    return block.eval().requires_grad_(False)


def random_states(images: int, width: int, device: torch.device) -> tuple[GuidedStates, Stream]:
    """Return guided states of both branches, and their stream before a block."""
    states = GuidedStates(
        z=torch.zeros(images, 4, 1, 1, device=device),
        t=torch.linspace(0.05, 1, images // 2, device=device).repeat(2),
        labels=torch.zeros(images, dtype=torch.int64, device=device),
        branches=2,
        cfg=1.5,
        sampler="rf",
    )
    stream = Stream(torch.randn(images, PATCHES, width, device=device), torch.randn(images, width, device=device))
    return states, stream


def main() -> None:
    """Measure one block; print seconds, processor time and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of both branches; 256 an image")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, width = torch.device(options.device), options.width
    shapes = BlockConfig(options.experts, (4 * width,) * options.experts, 2 * width)
    config = DiTMoEConfig(32, 2, 4, 8, width, 1, max(width // 72, 1), 1000, 2, "timm", "rf", (shapes,))
    candidates = Candidates()
    widths = [fmt for fmt in map(candidates.format_of, WIDTHS) if fmt is not None]
    with torch.inference_mode():
        block = random_block(config, device)
        states, stream = random_states(options.tokens // PATCHES, width, device)
        names = [n for n, p in block.named_parameters() if p.ndim == 2 and n != "moe.gate.weight"]
        formats = dict.fromkeys(names, widths)
        start, processor = time.perf_counter(), time.process_time()
        attended = stream.attended(block)
        after = torch.cat([block.mix(part, 0, None) for part in attended])
        rows = states.spread(SENT_TOKENS, PATCHES, FEWEST_SENT)
        before = Stream(stream.x[rows], stream.c[rows])
        sent = Sent(states.at(rows), before, residual_of(attended)[rows], after[rows])
        mixture = mixture_errors(block, attended_tokens(attended, states), formats)
        found = list(chain(dense_errors(block, sent, formats), mixture))
        errors = torch.stack([each.error for each in found]).tolist()  # numbers: the device is done by then
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    print(
        f"{seconds:.1f} s, {processor:.1f} s of processor time, peak {peak_bytes(device) / 2**30:.1f} GiB: "
        f"{len(names)} matrices in {len(widths)} formats, errors {min(errors):.2e} to {max(errors):.2e}"
    )


if __name__ == "__main__":
    main()
