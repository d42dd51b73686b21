"""Measure time, memory and error of refitting one block of a large model's shapes, on random weights.

Experts have half of the energy of their weights in common, so that those that stay can make up for some of what went.

python examples/benchmarks/refit_cost.py --width 1152 --experts 8 --keep 4 --tokens 20480
python examples/benchmarks/refit_cost.py --width 1152 --experts 8 --neurons 0.5 --tokens 20480
python examples/benchmarks/refit_cost.py --width 1152 --experts 8 --neurons 0.5 --rounded --tokens 20480
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import Tensor

from ditmoe_cli.compression.rebuild import mixture_of
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.replay.outputs import held_error
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.config import BlockConfig, mixture_shapes
from ditmoe_cli.model.moe import SparseMoE

TOP_K = 2
FRESH = 2048  # tokens that the error is measured on


def random_weights(width: int, block: BlockConfig) -> dict[str, Tensor]:
    """Return a mixture's weights on the scale of trained ones; of experts, each matrix is partly that of all."""
    weights: dict[str, Tensor] = {}
    common: dict[str, Tensor] = {}
    for name, shape in mixture_shapes(width, block).items():
        weight = torch.randn(shape) * shape[-1] ** -0.5
        if ".experts." in name:
            matrix = name.split(".")[-2]
            if matrix not in common:
                common[matrix] = torch.randn(shape) * shape[-1] ** -0.5
            weight = (weight + common[matrix]) * 0.5**0.5
        weights[name] = weight
    return weights


def kept(width: int, experts: int, keep: int) -> tuple[BlockConfig, dict[str, Tensor]]:
    """Return the shapes of a block that keeps its first experts, the other rows being ghosts, and what it adds."""
    config = BlockConfig(
        experts, (4 * width,) * keep, 2 * width, mapped=True, residual_constant=True, residual_linear=True
    )
    shapes = mixture_shapes(width, config)
    names = ("moe.residual_constant", "moe.residual_linear")
    selects = torch.tensor([e if e < keep else -1 for e in range(experts)], dtype=torch.int32)
    return config, {name: torch.zeros(shapes[name]) for name in names} | {"moe.gate.expert_of": selects}


def narrowed(name: str, weight: Tensor, inner: int) -> Tensor:
    """Return an expert's matrix with its first `inner` neurons; other weights as they are."""
    if ".experts." not in name:
        return weight
    return weight[:, :inner] if ".down_proj" in name else weight[:inner]


def mixtures(options: argparse.Namespace) -> tuple[SparseMoE, SparseMoE]:
    """Return a mixture, and the same with experts dropped or narrowed."""
    width, experts, inner = options.width, options.experts, 4 * options.width
    config, device = argparse.Namespace(hidden_size=width, top_k=TOP_K), torch.device(options.device)
    whole = BlockConfig(experts, (inner,) * experts, 2 * width)
    weights = random_weights(width, whole)
    if options.neurons:
        inner = int(options.neurons * inner)
        smaller, more = BlockConfig(experts, (inner,) * experts, 2 * width), {}
    else:
        smaller, more = kept(width, experts, options.keep)
    shapes = mixture_shapes(width, smaller)
    reduced = {name: narrowed(name, weight, inner) for name, weight in weights.items() if name in shapes} | more
    if options.rounded:
        reduced = {
            n: weight.bfloat16().float() if "gate_p" in n or "up_p" in n else weight for n, weight in reduced.items()
        }
    return (
        mixture_of(((name, weight.to(device)) for name, weight in weights.items()), config, whole, device),  # type: ignore[arg-type]
        mixture_of(((name, weight.to(device)) for name, weight in reduced.items()), config, smaller, device),  # type: ignore[arg-type]
    )


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def main() -> None:
    """Refit one block; print seconds, peak memory, and the errors on held-out and on fresh tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--keep", type=int, default=4, help="experts that stay")
    parser.add_argument("--neurons", type=float, default=0.0, help="share of neurons that stay, in place of --keep")
    parser.add_argument("--rounded", action="store_true", help="round gate and up first, as compress does")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    original, changed = mixtures(options)
    inputs = torch.randn(options.tokens + FRESH, options.width, device=device)
    weights, held = torch.ones(len(inputs), device=device), torch.arange(len(inputs), device=device) % 8 == 7
    tokens = Tokens(inputs[: options.tokens], weights[: options.tokens], held[: options.tokens])
    fresh = Tokens(inputs[options.tokens :], weights[options.tokens :], weights[options.tokens :] > 0)
    with torch.inference_mode():
        before = held_error(original, changed, fresh)
        start, cpu = time.perf_counter(), time.process_time()
        refitted = refit(original, changed, tokens, shared=True)  # ends with a number: the device is done by then
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        after = held_error(original, changed, fresh)
    print(
        f"{seconds:.1f} s, {cpu:.1f} s of processor time, peak {peak_bytes(device) / 2**30:.2f} GiB, "
        f"{len(refitted.strengths)} systems, error {refitted.error:.3f}, on fresh tokens {after / before:.3f}"
    )


if __name__ == "__main__":
    main()
