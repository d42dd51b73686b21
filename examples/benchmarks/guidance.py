"""Measure whether calibrating at one guidance scale serves sampling at another.

    python examples/benchmarks/guidance.py demo:digits --images 512 --calibrations 2
    python examples/benchmarks/guidance.py cifar10.pt --images 128 --steps 15 --calibrations 1

The checkpoint is profiled at each guidance scale and compressed with each profile; each result is sampled at each
scale. Prints a Markdown table: mean squared pixel error of images paired by their seeds with the original's at the same
scale, by calibration scale (rows) and sampling scale (columns), means over calibration seeds. The last column is the
geometric mean of each row's errors over those of calibrating at the sampling scale itself: 1 is as good as knowing it.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from measuring import Variant, ditmoe

SCALES = ("1", "1.5", "4")
VARIANTS = (
    Variant("prune --keep 0.5", ("prune", "--keep", "0.5")),
    Variant("prune --neurons 0.5 --allocate global", ("prune", "--neurons", "0.5", "--allocate", "global")),
    Variant("quantize --bits 3", ("quantize", "--bits", "3")),
)


def errors(
    checkpoint: str, variant: Variant, cfg: str, seeds: int, folder: Path, sampling: Sequence[str]
) -> list[float]:
    """Return a variant's paired error at each sampling scale, calibrated at `cfg`; means over calibration seeds."""
    by_seed = []
    for seed in range(seeds):
        profile, made = f"profile-{cfg}-{seed}.safetensors", f"{variant.words[0]}-{cfg}-{seed}.safetensors"
        if not (folder / profile).exists():
            ditmoe("profile-experts", checkpoint, "--cfg", cfg, "--seed", str(seed), "-o", profile, folder=folder)
        command, *words = variant.words
        ditmoe(command, checkpoint, *words, "--profile", profile, "-o", made, "--force", folder=folder)
        by_seed.append([_paired(made, scale, folder, sampling) for scale in SCALES])
    return [mean(column) for column in zip(*by_seed, strict=True)]


def _paired(made: str, scale: str, folder: Path, sampling: Sequence[str]) -> float:
    ditmoe("sample", made, *sampling, "--cfg", scale, "-o", "samples.safetensors", "--force", folder=folder)
    score = ditmoe(
        "fid", "samples.safetensors", "--ref", f"original-{scale}.safetensors", "--extractor", "pixels", folder=folder
    )
    return float(score["paired"]["mse"])


def regrets(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each row's geometric mean of errors over those of the row that is calibrated at the sampling scale."""
    matched = [table[scale][column] for column, scale in enumerate(SCALES)]
    return {
        cfg: math.exp(mean(math.log(error / own) for error, own in zip(row, matched, strict=True)))
        for cfg, row in table.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("checkpoint", help="a file, a folder or demo:digits")
    options.add_argument("--images", default="512")
    options.add_argument("--steps", default="16")
    options.add_argument("--calibrations", type=int, default=2)
    found = options.parse_args(arguments)
    checkpoint = str(Path(found.checkpoint).resolve()) if Path(found.checkpoint).exists() else found.checkpoint
    sampling = ("--images", found.images, "--steps", found.steps)
    print(f"| | calibrated at | {' | '.join(f'sampled at {scale}' for scale in SCALES)} | against knowing it |")
    print(f"|---|---|{'---|' * (len(SCALES) + 1)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for scale in SCALES:
            output = f"original-{scale}.safetensors"
            ditmoe("sample", checkpoint, *sampling, "--cfg", scale, "-o", output, folder=folder)
        for variant in VARIANTS:
            table = {cfg: errors(checkpoint, variant, cfg, found.calibrations, folder, sampling) for cfg in SCALES}
            for cfg, regret in regrets(table).items():
                cells = " | ".join(f"{error:.4g}" for error in table[cfg])
                print(f"| {variant.label} | {cfg} | {cells} | {regret:.2f} |", flush=True)
            print(f"measured {variant.label}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
