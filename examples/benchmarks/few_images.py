"""Compare how few images rank compressed models with how many do.

    python examples/benchmarks/few_images.py demo:digits variants/*.safetensors --images 20000 --steps 10

Samples the original and each variant from the same seeds, and prints how scores of few images rank the variants, beside
the Fréchet distance of all of them: Kendall's and Spearman's rank correlation, and the share of pairs that are ordered
alike. Features are those of `--extractor`. With `--samples` the files are samples, not checkpoints, the original's
first.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from measuring import ditmoe, real_digits
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from ditmoe_cli.evaluation.features.extractors import activations, make_extractor
from ditmoe_cli.evaluation.images import ImageSet, read_images
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance

Array = NDArray[np.float64]


def sampled(checkpoint: str, options: argparse.Namespace, folder: Path) -> Path:
    """Sample a checkpoint into the folder, unless the samples are there; return the file."""
    path = folder / f"{Path(checkpoint).stem.replace(':', '-')}.samples.safetensors"
    if not path.exists():
        words = ("--images", str(options.images), "--steps", str(options.steps), "--batch", "256", "-q")
        ditmoe("sample", checkpoint, *words[:-1], "-o", path.name, folder=folder)
    return path


def frechet(a: Array, b: Array) -> float:
    """Return the Fréchet distance of two sets of features."""
    return frechet_distance(feature_statistics(a), feature_statistics(b))


def squares(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Return the mean squared distance of paired rows."""
    return float(((a.reshape(len(a), -1).astype(float) - b.reshape(len(b), -1)) ** 2).sum(axis=1).mean())


def agreement(found: Sequence[float], truth: Sequence[float]) -> str:
    """Return Kendall's and Spearman's correlation and the share of pairs in one order, as cells of a table."""
    a, b = np.asarray(found), np.asarray(truth)
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    alike = np.mean([(a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in pairs])
    return f"{kendalltau(a, b).statistic:.3f} | {spearmanr(a, b).statistic:.3f} | {100 * alike:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--paired", type=int, default=256)
    parser.add_argument("--few", type=int, nargs="+", default=[256, 1000, 5000])
    parser.add_argument("--extractor", nargs="+", default=["pixels", "digit_features:classifier"])
    parser.add_argument("--grey-levels", type=int, default=16)
    parser.add_argument("--real", type=Path, help="real images; scikit-learn's digits by default")
    parser.add_argument("--samples", action="store_true", help="the files are samples, not checkpoints")
    parser.add_argument("--folder", type=Path, help="where samples are kept for another run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        listed = [str(Path(v).resolve()) if Path(v).exists() else v for v in (options.original, *options.variants)]
        files = [Path(v) for v in listed] if options.samples else [sampled(v, options, folder) for v in listed]
        images = [read_images(file).images[: options.images] for file in files]
        real = read_images(options.real or real_digits(Path(name) / "real.npz"))
        for extractor in options.extractor:
            taken = make_extractor(extractor, grey_levels=options.grey_levels)
            features = [activations(taken, ImageSet(each), batch=256).features for each in images]
            table(extractor, images, features, activations(taken, real, batch=256).features, options)


def table(
    extractor: str, images: list[NDArray[np.uint8]], features: list[Array], real: Array, options: argparse.Namespace
) -> None:
    """Print one extractor's table."""
    (first, *others), (pixels, *altered) = features, images
    n, total = options.paired, len(first)
    to_original = [frechet(each, first) for each in others]
    to_real = [frechet(each, real) for each in others]
    scores: dict[str, Callable[[int], float]] = {
        f"paired image error, {n} images": lambda i: squares(altered[i][:n], pixels[:n]),
        f"paired feature distance, {n} images": lambda i: squares(others[i][:n], first[:n]),
    }
    for few in options.few:
        scores[f"Fréchet, {few:,} paired images"] = lambda i, few=few: frechet(others[i][:few], first[:few])
        if 2 * few <= total:
            scores[f"Fréchet, {few:,} images of other seeds"] = lambda i, few=few: frechet(
                others[i][few : 2 * few], first[:few]
            )
    print(
        f"\n{len(others)} variants, features: {extractor}; distances to the original {min(to_original):.3g} to ", end=""
    )
    print(f"{max(to_original):.3g} at {total:,} images, to real images {min(to_real):.3g} to {max(to_real):.3g}\n")
    print(f"| score | to the original at {total:,}: Kendall | Spearman | pairs | to real images: Kendall | ", end="")
    print("Spearman | pairs |\n|---|---|---|---|---|---|---|")
    for name, score in scores.items():
        found = [score(i) for i in range(len(others))]
        print(f"| {name} | {agreement(found, to_original)} | {agreement(found, to_real)} |", flush=True)


if __name__ == "__main__":
    main()
