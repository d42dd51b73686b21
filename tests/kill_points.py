"""Kill commands at random points, let them go on, and compare their bytes with those of a run that nobody killed.

    python tests/kill_points.py --points 200

Each point starts one of the commands below on the demo checkpoint, kills it (SIGKILL) after a random share of the time
that it takes, and starts it again until it ends by itself, at most `TRIES` times killed. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRIES = 3
DEMO = "demo:digits"
PROFILED = ("--profile", "p.safetensors")
COMMANDS: dict[str, tuple[str, ...]] = {
    "profile-experts": ("profile-experts", DEMO, "--images", "32", "--steps", "8"),
    "prune": ("prune", DEMO, "--keep", "0.5", "--refit-tokens", "2048", *PROFILED),
    "quantize": ("quantize", DEMO, "--bits", "3.5", "--allow", "3,4", "--tokens", "1024", *PROFILED),
    "sample": ("sample", DEMO, "--images", "32", "--steps", "8"),
}


def command(words: Sequence[str]) -> list[str]:
    """Return the words that start ditmoe as a program."""
    return [sys.executable, "-m", "ditmoe_cli", *words, "-o", "x.safetensors"]


def environment() -> dict[str, str]:
    """Return the environment of a run: one thread, and this package."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def ended(words: Sequence[str], folder: Path, limit: float | None) -> bool:
    """Run a command, kill it after `limit` seconds, and return whether it ended by itself. Raises where it failed."""
    with subprocess.Popen(
        command(words),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            _, said = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return False
    if child.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {child.returncode}: {said}")
    return True


def digest(folder: Path) -> str:
    """Return the SHA-256 of the output; raises where a hidden file was left beside it."""
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if left:
        raise RuntimeError(f"left behind: {left}")
    return hashlib.sha256((folder / "x.safetensors").read_bytes()).hexdigest()


def fresh(root: Path, name: str) -> Path:
    """Return a new folder that holds the profile that the planners take."""
    folder = root / name
    folder.mkdir()
    if (root / "p.safetensors").exists():
        shutil.copy(root / "p.safetensors", folder)
    return folder


def main() -> None:
    """Run all points and report those whose bytes differ; exit code 1 where any do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, action="append")
    given = parser.parse_args()
    chosen = {name: words for name, words in COMMANDS.items() if not given.only or name in given.only}
    draw, wrong = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        profiling = fresh(root, "profile")
        ended(COMMANDS["profile-experts"], profiling, None)
        shutil.move(profiling / "x.safetensors", root / "p.safetensors")
        seconds, expected = {}, {}
        for label, words in chosen.items():
            folder, start = fresh(root, label), time.monotonic()
            ended(words, folder, None)
            seconds[label], expected[label] = time.monotonic() - start, digest(folder)
            print(f"{label}: {seconds[label]:.1f} s, {expected[label][:12]}", flush=True)
        for point in range(given.points):
            label = list(chosen)[point % len(chosen)]
            folder, kills = fresh(root, f"point{point}"), []
            while True:
                limit = draw.uniform(0.05, 1.0) * seconds[label] if len(kills) < TRIES else None
                if ended(chosen[label], folder, limit):
                    break
                kills.append(f"{limit:.2f}")
            same = digest(folder) == expected[label]
            wrong += not same
            print(f"{point} {label}: killed after {', '.join(kills) or '-'} s: {'same' if same else 'OTHER BYTES'}")
            shutil.rmtree(folder)
    print(f"{given.points} points, {wrong} with other bytes")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
