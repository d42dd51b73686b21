"""Measure how long commands take beside busy processes, with one thread and with the default.

    python examples/benchmarks/busy_machine.py --busy 2 --runs 10

Runs each command on the demo checkpoint, on little data, beside processes that never rest. Runs with one thread and
with the default alternate. Prints a Markdown table of wall seconds: the median with one thread, median and worst with
the default, and the worst over the median with one thread.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

DEMO = "demo:digits"
FEW = ("--images", "16", "--steps", "4")
COMMANDS: dict[str, tuple[str, ...]] = {
    "profile-experts": ("profile-experts", DEMO, *FEW, "-o", "made.safetensors"),
    "prune": ("prune", DEMO, "--keep", "0.5", "--refit-tokens", "2048", "-o", "made.safetensors"),
    "quantize": (
        "quantize",
        DEMO,
        "--bits",
        "4",
        "--uniform",
        "--rounding",
        "gptq",
        "--tokens",
        "1024",
        "-o",
        "made.safetensors",
    ),
    "sample": ("sample", DEMO, "--images", "64", "--steps", "8", "-o", "made.safetensors"),
    "fid": ("fid", DEMO, "--ref", "reference.safetensors", "--images", "64", "--steps", "8", "--seed", "1", "--anyway"),
}
PROFILED = ("prune", "quantize")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep `count` processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ditmoe(words: Sequence[str], root: Path, *more: str) -> float:
    """Run a command in a new folder that holds the profile and the reference; return its wall seconds."""
    folder = root / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for kept in root.glob("*.safetensors"):
        shutil.copy(kept, folder)
    profile = (
        ("--profile", "profile.safetensors")
        if words[0] in PROFILED and (folder / "profile.safetensors").exists()
        else ()
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "ditmoe_cli", *words, *profile, *more]
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start


def row(name: str, root: Path, runs: int) -> str:
    """Return the table's row of a command."""
    one, default = [], []
    for _ in range(runs):
        one.append(ditmoe(COMMANDS[name], root, "--threads", "1"))
        default.append(ditmoe(COMMANDS[name], root))
    single = median(one)
    cells = (single, median(default), max(default), max(default) / single)
    return f"| `{name}` | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--busy", type=int, default=2, help="processes that never rest")
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--only", action="append", choices=COMMANDS, help="this command; can be repeated")
    found = options.parse_args(arguments)
    print("| | one thread, median s | default, median s | worst | worst / one thread |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for kept, words in (("profile", COMMANDS["profile-experts"]), ("reference", COMMANDS["sample"])):
            ditmoe(words, root)
            shutil.move(root / "run" / "made.safetensors", root / f"{kept}.safetensors")
        with busy(found.busy):
            for command in found.only or COMMANDS:
                print(row(command, root, found.runs), flush=True)


if __name__ == "__main__":
    main()
