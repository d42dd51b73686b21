"""What healing gains, by steps of training, and what its settings change.

    python examples/benchmarks/healing.py demo:digits --steps-of-healing 0,300,1000,3000 --folder demo.healing
    python examples/benchmarks/healing.py demo:digits --ablations --steps-of-healing 1000 --only "neurons 0.25"
    python examples/benchmarks/healing.py cifar10.pt --images 256 --steps 15 --real images.npz --only "neurons 0.5"

Prints a Markdown table: for each compressed checkpoint, before healing (0 steps) and after, the paired mean squared
pixel error, the Fréchet distance to the original's samples and to real images (pixels, averaged to 8 x 8 where they are
larger), the error of the guided prediction on held-out states, and seconds of the processor. Means over calibration
seeds, whose noise, as that of healing, is never that of the evaluation. Started again with the same `--folder` it goes
on. ``--ablations`` heals each checkpoint in several ways, for as many steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean

from measuring import Bench, Variant, bench, chosen, ditmoe, parser

STUDENTS = (
    Variant("keep 0.5", ("prune", "--keep", "0.5")),
    Variant("neurons 0.5", ("prune", "--neurons", "0.5", "--allocate", "global")),
    Variant("neurons 0.35", ("prune", "--neurons", "0.35", "--allocate", "global")),
    Variant("neurons 0.25", ("prune", "--neurons", "0.25", "--allocate", "global")),
    Variant("neurons 0.125", ("prune", "--neurons", "0.125", "--allocate", "global")),
    Variant("merge 4", ("merge", "--groups", "4")),
    Variant("3 bits", ("quantize", "--bits", "3")),
    Variant("2 bits", ("quantize", "--bits", "2")),
)
ABLATIONS = {
    "default": (),
    "blocks, then model": ("--scope", "auto"),
    "blocks alone": ("--scope", "block"),
    "model alone": ("--scope", "model"),
    "rate 0.003": ("--rate", "0.003"),
    "rate 0.03": ("--rate", "0.03"),
    "router, norms, shared, down": ("--train", "router,norms,shared,down"),
    "batch 32": ("--batch", "32"),
}


@dataclass(frozen=True)
class Score:
    """One healed checkpoint: errors, and the seconds of the processor that healing took."""

    error: float
    to_original: float
    to_real: float
    held: float | None
    seconds: float


def scored(made: Bench, student: Variant, seed: int, steps: int, label: str, words: Sequence[str]) -> Score:
    """Return the score of a student healed in so many steps; kept in the folder."""
    stem = f"{student.label.replace(' ', '')}.{seed}"
    healed = f"{stem}.{steps}.{label.replace(' ', '-').replace(',', '')}"
    record = made.folder / f"{healed}.json"
    if record.exists():
        return Score(**json.loads(record.read_text()))
    start, held = f"{stem}.safetensors", None
    if not (made.folder / start).exists():
        profile = ("--profile", f"profile{seed}.safetensors")
        ditmoe(student.words[0], made.checkpoint, *student.words[1:], *profile, "-o", start, folder=made.folder)
    before, name = _processor(), start
    if steps:
        name = f"{healed}.safetensors"
        asked = (
            "--original",
            made.checkpoint,
            "--profile",
            f"profile{seed}.safetensors",
            "--steps",
            str(steps),
            *words,
        )
        result = ditmoe("heal", start, *asked, "-o", name, "--force", folder=made.folder)
        held = result["held_error"][1]
    seconds = _processor() - before
    samples = f"{healed}.samples.safetensors"
    ditmoe("sample", name, *made.sampling, "-o", samples, "--force", folder=made.folder)
    against = ("fid", samples, "--extractor", "pixels", "--ref")
    original = ditmoe(*against, "original.safetensors", folder=made.folder)
    real = ditmoe(*against, made.real, folder=made.folder)
    score = Score(original["paired"]["mse"], original["frechet"], real["frechet"], held, seconds)
    record.write_text(json.dumps(asdict(score)))
    print(f"{healed}: {score}", file=sys.stderr, flush=True)
    return score


def _processor() -> float:
    """Return the seconds of the processor that finished commands took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def line(student: str, steps: int, label: str, scores: Sequence[Score]) -> str:
    """Return the row of a student: means over calibration seeds."""
    held = [score.held for score in scores if score.held is not None]
    cells = [
        f"{mean(score.error for score in scores):.3g}",
        f"{mean(score.to_original for score in scores):.3g}",
        f"{mean(score.to_real for score in scores):.3g}",
        f"{mean(held):.2g}" if held else "",
        f"{mean(score.seconds for score in scores):.0f}",
    ]
    return f"| {student} | {steps:,} | {label} | {' | '.join(cells)} |"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--steps-of-healing", default="0,300,1000,3000")
    found.add_argument("--ablations", action="store_true", help="several ways to heal, instead of the default alone")
    return found.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = parsed(arguments)
    ways = ABLATIONS if options.ablations else {"default": ()}
    print("| checkpoint | steps | healed | paired MSE | to the original | to real images | held out | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    with bench(options) as made:
        for student in chosen(STUDENTS, options):
            for steps in map(int, options.steps_of_healing.split(",")):
                for label, words in ways.items() if steps else [("not", ())]:
                    seeds = range(options.calibrations)
                    scores = [scored(made, student, seed, steps, label, words) for seed in seeds]
                    print(line(student.label, steps, label, scores), flush=True)


if __name__ == "__main__":
    main()
