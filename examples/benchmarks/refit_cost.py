"""Measure seconds and peak memory of refitting one block of a large model's shapes, on random weights.

python examples/benchmarks/refit_cost.py --width 1152 --experts 8 --keep 4 --tokens 20480
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from ditmoe_cli.compression.rebuild import mixture_of
from ditmoe_cli.compression.repair.refit import refit
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.model.config import BlockConfig, mixture_shapes


def random_weights(width: int, block: BlockConfig) -> dict[str, torch.Tensor]:
    """Return a mixture's weights on the scale of trained ones, and a router map with ghosts for dropped experts."""
    shapes = mixture_shapes(width, block)
    return {
        name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items() if not name.endswith("expert_of")
    }


def on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10


def main() -> None:
    """Refit one block; print seconds and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    width, inner = options.width, 4 * options.width
    whole = BlockConfig(options.experts, (inner,) * options.experts, 2 * width)
    kept = BlockConfig(
        options.experts, (inner,) * options.keep, 2 * width, mapped=True, residual_constant=True, residual_linear=True
    )
    config = argparse.Namespace(hidden_size=width, top_k=2)
    weights = random_weights(width, whole)
    selects = torch.tensor([e if e < options.keep else -1 for e in range(options.experts)], dtype=torch.int32)
    shapes = mixture_shapes(width, kept)
    blank = {f"moe.residual_{name}": torch.zeros(shapes[f"moe.residual_{name}"]) for name in ("constant", "linear")}
    pruned = {name: tensor for name, tensor in weights.items() if name in shapes}
    tokens = Tokens(
        torch.randn(options.tokens, width).to(device),
        torch.ones(options.tokens, device=device),
        torch.arange(options.tokens, device=device) % 8 == 7,
    )
    with torch.inference_mode():
        original = mixture_of(on(device, weights).items(), config, whole, device)  # type: ignore[arg-type]
        reduced = {**pruned, **blank, "moe.gate.expert_of": selects}
        changed = mixture_of(on(device, reduced).items(), config, kept, device)  # type: ignore[arg-type]
        start = time.perf_counter()
        refitted = refit(original, changed, tokens, shared=True)
        error = refitted.error  # a number: the device is done by then
    seconds, systems = time.perf_counter() - start, len(refitted.strengths)
    print(f"{seconds:.1f} s, peak {peak_bytes(device) / 2**30:.1f} GiB, {systems} systems, error {error:.3f}")


if __name__ == "__main__":
    main()
