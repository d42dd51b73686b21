"""Compare all methods of fewer experts by image error, bytes and time.

    python examples/benchmarks/expert_reduction.py demo:digits --keep 4 --images 1797 --calibrations 3
    python examples/benchmarks/expert_reduction.py cifar10.pt --keep 4 --images 400 --steps 15 --real images.npz --short

Prints a Markdown table: paired mean squared pixel error, Fréchet distance to the original's samples and to real images
(pixels, averaged to 8 x 8 where they are larger), bytes of the file, and seconds that the command took, means over
calibration seeds (for ``random``, drawing seeds), whose noise is never that of the evaluation. `--only` picks rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import mean

from measuring import Bench, Variant, bench, chosen, parser

PRUNERS = ("reap", "man", "msan", "easy-ep", "gate-mass", "frequency", "random", "naee", "diet")
MERGERS = ("m-smoe", "hc-smoe", "mergemoe", "sub-moe", "average", "uncurl")


def prune(keep: str, method: str, *more: str) -> Variant:
    """Return a pruning row."""
    return Variant(" ".join(("prune", method, *more)), ("prune", "--keep", keep, "--method", method, *more))


def merge(groups: str, method: str, *more: str) -> Variant:
    """Return a merging row."""
    return Variant(" ".join(("merge", method, *more)), ("merge", "--groups", groups, "--method", method, *more))


def narrow(share: str, *more: str) -> Variant:
    """Return a row with all experts narrowed to a share of their neurons."""
    return Variant(" ".join(("prune --neurons", share, *more)), ("prune", "--neurons", share, *more))


def variants(keep: str, short: bool) -> list[Variant]:
    """Return the rows for blocks of `keep` experts of 8, or as many bytes; at most eight of them if `short`."""
    share = str(int(keep) / 8)
    first = [
        prune(keep, "reap", "--router", "slice", "--no-refit"),
        prune(keep, "reap", "--router", "slice"),
        prune(keep, "reap", "--no-refit"),
        prune(keep, "reap"),
        prune(keep, "reap", "--allocate", "global"),
        narrow(share),
        narrow(share, "--allocate", "global"),
        merge(keep, "m-smoe"),
    ]
    if short:
        return first
    plain = [prune(keep, method, "--no-refit") for method in PRUNERS if method != "reap"]
    fitted = [prune(keep, method) for method in PRUNERS if method != "reap"]
    repairs = [
        merge(keep, "m-smoe", "--no-refit"),
        prune(keep, "reap", "--router", "mass", "--no-refit"),
        prune(keep, "reap", "--router", "auto", "--no-refit"),
        prune(keep, "reap", "--router", "mass"),
        prune(keep, "reap", "--constants", "--no-refit"),
        prune(keep, "reap", "--constants"),
        prune(keep, "reap", "--residual-rank", "8", "--no-refit"),
        prune(keep, "reap", "--residual-rank", "8"),
        narrow(share, "--no-refit"),
        narrow(share, "--allocate", "global", "--multiple", "32"),
        narrow(share, "--allocate", "global", "--keep", "auto"),
    ]
    merged = [merge(keep, method, *more) for method in MERGERS if method != "m-smoe" for more in (("--no-refit",), ())]
    return [*first, *plain, *fitted, *repairs, *merged]


def table(made: Bench, rows: Sequence[Variant], seeds: Sequence[int]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        "| | paired MSE | Fréchet to the original | to real images | bytes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for variant in rows:
        runs = [made.measure(variant, seed) for seed in seeds]
        columns = [[getattr(run, name) for run in runs] for name in ("error", "to_original", "to_real")]
        spread = f" ({min(columns[1]):.3g} to {max(columns[1]):.3g})" if len(runs) > 1 else ""
        error, original, real = (f"{mean(column):.3g}" for column in columns)
        seconds = mean(run.seconds for run in runs)
        lines.append(f"| {variant.label} | {error} | {original}{spread} | {real} | {runs[0].size:,} | {seconds:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--keep", default="4", help="experts to keep in each block")
    options = found.parse_args(arguments)
    rows = chosen(variants(options.keep, options.short), options)
    with bench(options) as made:
        print("\n".join(table(made, rows, range(options.calibrations))))


if __name__ == "__main__":
    main()
