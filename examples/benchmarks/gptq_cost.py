"""Measure seconds, processor time and peak memory of rounding one mixture by GPTQ, on random weights.

    python examples/benchmarks/gptq_cost.py --width 1152 --experts 8 --tokens 20480 --format int4-g64

The tokens' channels are correlated as those of trained models are: their covariance has the eigenvalues 1/i. Prints
also the mean, over matrices, of the held-out error over that of rounding to the nearest.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from statistics import mean

import torch
from refit_cost import peak_bytes, random_weights

from ditmoe_cli.compression.rebuild import mixture_of
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.compression.rounding.gptq_blocks import mixture_readings
from ditmoe_cli.compression.rounding.layers_together import RoundedLayer, round_layers
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.moe import SparseMoE


def correlated(count: int, width: int, device: torch.device) -> Tokens:
    """Return random tokens of equal weights, every eighth held out."""
    rotation = torch.linalg.qr(torch.randn(width, width)).Q
    scales = torch.arange(1, width + 1) ** -0.5
    inputs = torch.randn(count, width) @ (scales[:, None] * rotation)
    inputs *= inputs.square().mean().rsqrt()
    held = torch.arange(count) % 8 == 7
    return Tokens(inputs.to(device), torch.ones(count, device=device), held.to(device))


def round_and_pack(moe: SparseMoE, tokens: Tokens, fmt: str) -> list[RoundedLayer]:
    """Round and pack all matrices of a mixture."""
    names = [f"moe.experts.{e}" for e in range(len(moe.experts))] + ["moe.shared_experts"]
    formats = {f"{name}.{matrix}.weight": fmt for name in names for matrix in MATRICES}
    found = []
    for readings in mixture_readings(moe, tokens, formats):
        for layer in round_layers(readings):
            layer.grid.pack(layer.rounded.weight, TensorInfo(layer.name, "F16", layer.grid.shape))
            found.append(layer)
    return found


def main() -> None:
    """Round one mixture; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--format", default="int4-g64", help="as in plans: int4-g64, nf4, int8, ternary-g64")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, width = torch.device(options.device), options.width
    block = BlockConfig(options.experts, (4 * width,) * options.experts, 2 * width)
    config = argparse.Namespace(hidden_size=width, top_k=2)
    with torch.inference_mode():
        weights = ((name, weight.to(device)) for name, weight in random_weights(width, block).items())
        moe = mixture_of(weights, config, block, device)  # type: ignore[arg-type]
        tokens = correlated(options.tokens, width, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start, used = time.perf_counter(), time.process_time()
        layers = round_and_pack(moe, tokens, options.format)  # errors are numbers: the device is done by then
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    error = mean(layer.rounded.error for layer in layers)
    dampings = Counter(layer.rounded.damping for layer in layers)
    print(
        f"{len(layers)} matrices as {options.format}: {seconds:.1f} s, {processor:.1f} s of processor time, "
        f"peak {peak_bytes(device) / 2**30:.2f} GiB; error {error:.3f} of the nearest values'; "
        f"dampings {', '.join(f'{damping}: {count}' for damping, count in dampings.items())}"
    )


if __name__ == "__main__":
    main()
