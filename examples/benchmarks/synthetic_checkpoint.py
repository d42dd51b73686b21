"""Write a DiT-MoE of any size with random weights, one tensor in memory at a time.

python examples/benchmarks/synthetic_checkpoint.py s2.safetensors
python examples/benchmarks/synthetic_checkpoint.py 0.4b.safetensors --width 768 --depth 6

The default is upstream's S/2-8E2A (0.2 B parameters); with --width 1152 --depth 1 it is one block of XL.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, expected_weights


def config_of(width: int, depth: int, experts: int, side: int, channels: int) -> DiTMoEConfig:
    """Return upstream's configuration: heads of 64, experts of 4 widths, a shared one of 2 x 4 widths, top-2."""
    block = BlockConfig(experts, (4 * width,) * experts, 8 * width)
    return DiTMoEConfig(
        input_size=side,
        patch_size=2,
        in_channels=channels,
        out_channels=2 * channels,
        hidden_size=width,
        depth=depth,
        num_heads=width // 64,
        num_classes=1000,
        top_k=2,
        attention="timm",
        sampler="rf",
        blocks=(block,) * depth,
    )


def values(info: TensorInfo, generator: np.random.Generator) -> memoryview:
    """Return matrices with entries of variance 1 / columns, so that outputs keep their scale; ones and zeros else."""
    kind = np.float16 if info.dtype == "F16" else np.float32
    if len(info.shape) == 1:
        return np.full(info.shape, float(info.name.endswith("norm.weight")), kind).data.cast("B")
    columns = int(np.prod(info.shape[1:]))
    drawn = generator.standard_normal(info.shape, dtype=np.float32) * np.float32(columns**-0.5)
    return np.ascontiguousarray(drawn.astype(kind)).data.cast("B")


def main() -> None:
    """Write the checkpoint and print how many parameters it has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="of the latent: 32 is 256 pixels")
    parser.add_argument("--channels", type=int, default=4, help="4 of latents, 3 of pixels, which fid needs no VAE for")
    parser.add_argument("--half", action="store_true", help="store fp16 instead of fp32")
    options = parser.parse_args()
    config = config_of(options.width, options.depth, options.experts, options.side, options.channels)
    generator = np.random.default_rng(0)
    infos = [TensorInfo(n, "F16" if options.half else "F32", s) for n, s in expected_weights(config).items()]
    provenance = Provenance(config.to_json())
    size = Output(options.output, force=True).write(infos, lambda info: values(info, generator), provenance, [])
    print(f"{sum(info.numel for info in infos) / 1e9:.2f} B parameters, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
