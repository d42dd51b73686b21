"""Measure time and memory of eliminating the neurons of one block's experts, of a large model's shapes.

python examples/benchmarks/elimination_cost.py --width 1152 --experts 8 --tokens 32768
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace
from typing import cast

import torch
from refit_cost import TOP_K, peak_bytes, random_weights

from ditmoe_cli.compression.rebuild import mixture_of
from ditmoe_cli.compression.replay.eliminations import block_curves
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.dit import Block


def main() -> None:
    """Eliminate the neurons of one block; print seconds, peak memory, and errors at half of the width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    width, device = options.width, torch.device(options.device)
    shapes = BlockConfig(options.experts, (4 * width,) * options.experts, 2 * width)
    config = SimpleNamespace(hidden_size=width, top_k=TOP_K)
    weights = ((name, weight.to(device)) for name, weight in random_weights(width, shapes).items())
    moe = mixture_of(weights, config, shapes, device)  # type: ignore[arg-type]
    inputs = torch.randn(options.tokens, width, device=device)
    ones, bins = torch.ones(options.tokens, device=device), torch.zeros(options.tokens, dtype=torch.int64)
    tokens = BlockTokens(inputs, torch.ones_like(inputs), ones, bins, 1)
    with torch.inference_mode():
        start, cpu = time.perf_counter(), time.process_time()
        curves = dict(block_curves(cast(Block, SimpleNamespace(moe=moe)), tokens))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    first = curves["moe.experts.0"].errors
    half = float(first[len(first) // 2] / first[0])
    print(
        f"{seconds:.1f} s, {cpu:.1f} s of processor time, peak {peak_bytes(device) / 2**30:.2f} GiB, {len(curves)} "
        f"experts, error of half the neurons {half:.3f} of the output"
    )


if __name__ == "__main__":
    main()
