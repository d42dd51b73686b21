"""Compare all methods of fewer bits by image error, bytes and time.

    python examples/benchmarks/quantization.py demo:digits --images 1797 --calibrations 1
    python examples/benchmarks/quantization.py cifar10.pt --images 400 --steps 15 --real images.npz --short

Prints a Markdown table: paired mean squared pixel error, Fréchet distance to the original's samples and to real images,
true bits per weight (of all floating weights), bytes of the file, and seconds that the command took. `--only` picks
rows. With `--plot FILE.png` error is drawn against bytes (needs matplotlib).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from measuring import Measured, Variant, bench, chosen, ditmoe, parser

BITS = ("2", "2.5", "3", "3.5", "4", "5", "6", "8")
UNIFORM = ("2", "3", "4", "5", "6", "8")


def variants(short: bool) -> list[Variant]:
    """Return the rows; eight of them if `short`."""
    if short:
        mixed = [Variant(f"mix, {bits} bits", ("quantize", "--bits", bits)) for bits in ("2", "3", "4", "5")]
        return [*mixed, *(uniform(bits) for bits in ("2", "3", "4", "5"))]
    mixed = [
        Variant(" ".join((f"mix, {bits} bits", *more)), ("quantize", "--bits", bits, *more))
        for bits in BITS
        for more in ((), ("--rounding", "nearest"))
    ]
    even = [uniform(bits, *more) for bits in UNIFORM for more in ((), ("--rounding", "gptq"))]
    named = [
        Variant(name, ("quantize", "--uniform", "--format", *words))
        for name, words in (
            ("nf4", ("nf4",)),
            ("nf4, double quantisation", ("nf4", "--double-quant")),
            ("fp4", ("fp4",)),
            ("int8 of bitsandbytes", ("int8",)),
            ("ternary", ("ternary",)),
        )
    ]
    return [*mixed, *even, *named]


def uniform(bits: str, *more: str) -> Variant:
    """Return a row of one uniform format, groups of 64."""
    words = ("quantize", "--uniform", "--format", "int", "--bits", bits, *more)
    return Variant(" ".join((f"uniform, {bits} bits", *more)), words)


@dataclass(frozen=True)
class Row:
    """A variant and its runs."""

    variant: Variant
    runs: list[Measured]

    def line(self, parameters: int) -> str:
        """Return the row as Markdown."""
        columns = [mean(getattr(run, name) for run in self.runs) for name in ("error", "to_original", "to_real")]
        error, original, real = (f"{column:.3g}" for column in columns)
        size, seconds = self.runs[0].size, mean(run.seconds for run in self.runs)
        bits = 8 * size / parameters
        return f"| {self.variant.label} | {error} | {original} | {real} | {bits:.2f} | {size:,} | {seconds:.0f} |"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw paired error against bytes, a line for each way of choosing formats."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for start, label in (("mix", "planned mix"), ("uniform", "uniform")):
        for gptq in (True, False):
            mine = [
                row
                for row in rows
                if row.variant.label.startswith(start)
                and gptq == ("gptq" in row.variant.label or (start == "mix" and "nearest" not in row.variant.label))
            ]
            points = sorted((row.runs[0].size, mean(run.error for run in row.runs)) for row in mine)
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{label}, {'GPTQ' if gptq else 'nearest'}")
    axes.set(xlabel="bytes", ylabel="paired mean squared error", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--plot", type=Path, help="PNG of error against bytes")
    options = found.parse_args(arguments)
    plot_to = options.plot.resolve() if options.plot else None
    rows = []
    print("| | paired MSE | Fréchet to the original | to real images | bits per weight | bytes | seconds |")
    print("|---|---|---|---|---|---|---|")
    with bench(options) as made:
        parameters = ditmoe("inspect", made.checkpoint, folder=made.folder)["parameters"]["total"]
        for variant in chosen(variants(options.short), options):
            rows.append(Row(variant, [made.measure(variant, seed) for seed in range(options.calibrations)]))
            print(rows[-1].line(parameters), flush=True)
            print(rows[-1].line(parameters), file=sys.stderr, flush=True)
    if plot_to:
        plot(rows, plot_to)


if __name__ == "__main__":
    main()
