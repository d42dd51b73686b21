"""Measure commands on checkpoints of published sizes against copying the bytes that they read and write.

    python examples/benchmarks/streaming.py --model XL --folder /data/tmp
    python examples/benchmarks/streaming.py --model G --folder /data/tmp
    python examples/benchmarks/streaming.py --model XL --folder /data/tmp --busy --only prune

Writes the model with random weights (`synthetic_checkpoint.py`), runs each command on it as a process of its own, and
deletes what it made before the next. G takes 33 GB for the model and as much for one output. Prints a Markdown table:

- seconds: from the start of the process to its end, the import of torch and the flush to disk included.
- CPU: seconds of user and system time of all its threads.
- copying: seconds in which a loop of this script reads as many bytes as the input has, and writes as many as the
  output has, 8 MiB at a time and in turn, and waits for the disk at the end (fsync). Measured right after the command.
- ratio: seconds over those of copying.
- per 1e9 weights: seconds over the number of weights that the command packed, in 1e9.
- anonymous: the most anonymous memory (RssAnon) that was seen, looked at every 50 ms. Mapped files are not in it: the
  system takes their pages back when others need them. They are in resident (VmHWM), the peak that the kernel notes.
- from disk, to disk: GB that the process made the disk read and write, by the kernel's account (/proc/PID/io); what
  comes from the page cache is in neither.
- beside N busy: seconds with N processes beside it that never rest (``--busy N``), and their ratio to those without.

Before each command, and before each copying, the pages of the input are dropped from the page cache (posix_fadvise), so
that both start from disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from busy_machine import busy
from synthetic_checkpoint import MODELS, config_of
from synthetic_checkpoint import main as write_model

from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.parameters import weight_group

CHUNK = 8 * 2**20
POLL = 0.05  # seconds
COLUMNS = (
    *("", "seconds", "CPU", "copying", "ratio", "per 1e9 weights", "anonymous, MiB", "resident, MiB", "from disk, GB"),
    *("to disk, GB", "bytes"),
)
SLOW = ("int4", "merge")  # left out of G unless named


@dataclass(frozen=True)
class Run:
    """What a process took: seconds, CPU seconds, peaks of memory in bytes, bytes from and to the disk; its result."""

    seconds: float
    cpu: float
    anonymous: int
    resident: int
    read: int
    written: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """The folder of the files, the model's file, and how many busy processes there are in runs beside some."""

    folder: Path
    model: Path
    busy: int


def release(path: Path) -> None:
    """Drop the pages of a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def copying(source: Path, scratch: Path, written: int) -> float:
    """Return the seconds of reading a file, and writing so many bytes in turn, on disk at the end."""
    release(source)
    size = source.stat().st_size
    buffer = memoryview(bytearray(CHUNK))
    start, done = time.perf_counter(), 0
    with source.open("rb", buffering=0) as reading, scratch.open("wb", buffering=0) as writing:
        while count := reading.readinto(buffer):
            done += count
            while (left := written * done // size - writing.tell()) > 0:
                writing.write(buffer[: min(left, CHUNK)])
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return seconds


def fields(path: str) -> dict[str, int]:
    """Return the numbers of a file of /proc by name; kB as bytes."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0].rstrip(":"): int(words[1]) * (1024 if words[-1] == "kB" else 1)
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }


def run(place: Place, words: Sequence[str | Path]) -> Run:
    """Run a ditmoe command on a cold input, watching its memory. Raises `SystemExit` with its message if it fails."""
    release(place.model)
    command = [sys.executable, "-m", "ditmoe_cli", *map(str, words)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place.folder / "cache")}
    said, result = place.folder / "stderr.txt", place.folder / "stdout.json"
    with said.open("wb") as err, result.open("wb") as out:
        start, anonymous, resident = time.perf_counter(), 0, 0
        child = subprocess.Popen(command, cwd=place.folder, env=environment, stdout=out, stderr=err)
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            status = fields(f"/proc/{child.pid}/status")
            anonymous = max(anonymous, status.get("RssAnon", 0))
            resident = max(resident, status.get("VmHWM", 0))
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        disk = fields(f"/proc/{child.pid}/io")  # of a process that ended and was not yet waited for
        _, code, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(code)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {said.read_text()}")
    made = json.loads(result.read_text())["result"]
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, anonymous, resident, disk.get("read_bytes", 0), disk.get("write_bytes", 0), made)


def packed(path: Path) -> int:
    """Return the number of weights of a checkpoint that are stored in a number format."""
    return sum(weight.info.numel for weight in open_checkpoint(path).weights.values() if weight.quantized)


def megabytes(count: int) -> str:
    """Return MiB without decimals."""
    return f"{count / 2**20:,.0f}"


def measured(place: Place, label: str, words: Sequence[str | Path], packs: bool = False) -> list[str]:
    """Run a command that writes ``out.safetensors`` or nothing; return the cells of its row. What it wrote stays."""
    made = place.folder / "out.safetensors"
    writes = "-o" in words
    beside = None
    if place.busy:
        with busy(place.busy):
            beside = run(place, words).seconds
        if writes:
            made.unlink()
    found = run(place, words)
    size = made.stat().st_size if writes else 0
    copied = copying(place.model, place.folder / "copy", size) if writes else None
    weights = packed(made) if packs else 0
    cells = [
        label,
        f"{found.seconds:.1f}",
        f"{found.cpu:.1f}",
        f"{copied:.1f}" if copied else "-",
        f"{found.seconds / copied:.2f}" if copied else "-",
        f"{found.seconds / weights * 1e9:.1f}" if weights else "-",
        megabytes(found.anonymous),
        megabytes(found.resident),
        f"{found.read / 1e9:.2f}",
        f"{found.written / 1e9:.2f}",
        f"{size:,}" if writes else "-",
    ]
    return cells if beside is None else [*cells, f"{beside:.1f} ({beside / found.seconds:.2f})"]


def kept_half(config: DiTMoEConfig) -> list[int]:
    """Return every second expert."""
    return list(range(0, config.num_experts, 2))


def plan_of(place: Place, source: str, config: DiTMoEConfig) -> Path:
    """Write a plan that drops every second expert and stores matrices of the others, and attention, in NF4."""
    opened = open_checkpoint(place.model)
    kept = {f".experts.{expert}." for expert in kept_half(config)}
    groups = {name: weight_group(weight.info) for name, weight in opened.weights.items()}
    formats = {
        name: "nf4"
        for name, group in groups.items()
        if group in ("shared", "attn") or (group == "experts" and any(expert in name for expert in kept))
    }
    document = {
        "schema": "ditmoe.plan/1",
        "command": "prune",
        "source": source,
        "profile": None,
        "options": {},
        "blocks": [{"keep": kept_half(config), "router": "ghost"}] * config.depth,
        "formats": formats,
    }
    path = place.folder / "plan.json"
    path.write_text(json.dumps(document))
    return path


def profile_of(place: Place, source: str, config: DiTMoEConfig) -> Path:
    """Write a profile of random counters, enough for ``merge --method average``."""
    generator = np.random.default_rng(0)
    bins, experts = 2, config.num_experts
    table = (config.depth, 2, bins, experts)
    selected = generator.integers(1, 10_000, table)
    counts = np.zeros((config.depth, 2, bins, config.num_patches, experts), np.int64)
    counts[:, :, :, 0] = selected
    arrays = {
        "counts": counts,
        "selected": selected,
        "tokens": np.full((2, bins), 10_000 * experts),
        "gate_mass": generator.random(table),
        "gate_norm": generator.random(table),
        "router.logit_gram": generator.random((*table, experts)),
    }
    calibration = {"images": 64, "steps": 20, "cfg": 1.0, "seed": 0, "bins": bins, "classes": None, "reservoir": 0}
    document = {"schema": "ditmoe.profile/1", "checkpoint": source, "calibration": calibration}
    path = place.folder / "profile.safetensors"
    write_arrays(path, arrays, {**document, "experts": [experts] * config.depth}, force=True)
    return path


Row = Callable[[Place, str, DiTMoEConfig], list[str]]


def _uniform(label: str, *words: str) -> Row:
    given = ("quantize", "model.safetensors", "--uniform", *words, "-o", "out.safetensors")
    return lambda place, *_: measured(place, label, given, packs=True)


def _apply(place: Place, source: str, config: DiTMoEConfig) -> list[str]:
    words = ("apply", place.model, "--plan", plan_of(place, source, config), "-o", "out.safetensors")
    return measured(place, "apply: half the experts, in NF4", words, packs=True)


def _merge(place: Place, source: str, config: DiTMoEConfig) -> list[str]:
    profile = profile_of(place, source, config)
    words = ("merge", place.model, "--groups", "0.5", "--method", "average", "--no-refit", "--profile", profile)
    return measured(place, "merge --groups 0.5 --method average --no-refit", (*words, "-o", "out.safetensors"))


ROWS: dict[str, Row] = {
    "inspect": lambda place, *_: measured(place, "inspect", ("inspect", "model.safetensors")),
    "convert": lambda place, *_: measured(place, "convert", ("convert", "model.safetensors", "-o", "out.safetensors")),
    "prune": lambda place, *_: measured(
        place,
        "prune --keep 0.5 --method random --no-refit",
        ("prune", place.model, "--keep", "0.5", "--method", "random", "--no-refit", "-o", "out.safetensors"),
    ),
    "nf4": _uniform("quantize --uniform --format nf4", "--format", "nf4"),
    "int4": _uniform("quantize --uniform --format int --bits 4", "--format", "int", "--bits", "4"),
    "int8": _uniform("quantize --uniform --format int8", "--format", "int8"),
    "apply": _apply,
    "merge": _merge,
}


def lines(place: Place, names: Sequence[str], config: DiTMoEConfig) -> Iterator[str]:
    """Yield the rows of the table; each output is inspected, which is a row too, and deleted."""
    source = open_checkpoint(place.model).fingerprint if {"apply", "merge"} & set(names) else ""
    made = place.folder / "out.safetensors"
    for name in names:
        yield f"| {' | '.join(ROWS[name](place, source, config))} |"
        if made.exists():
            row = measured(place, f"inspect, of what {name} wrote", ("inspect", made))
            yield f"| {' | '.join(row)} |"
            made.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, run the benchmark and print its table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="S")
    parser.add_argument("--depth", type=int, help="fewer blocks, for a try")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where all files are written, and deleted at the end"
    )
    parser.add_argument("--busy", type=int, default=0, help="run each command once more beside so many busy processes")
    parser.add_argument("--only", action="append", choices=ROWS, help="this command; can be repeated")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    place = Place(options.folder.absolute(), options.folder.absolute() / "model.safetensors", options.busy)
    shape = MODELS[options.model]
    config = config_of(shape if options.depth is None else replace(shape, depth=options.depth))
    names = options.only or [name for name in ROWS if options.model != "G" or name not in SLOW]
    write_model([str(place.model), "--model", options.model, "--depth", str(config.depth)])
    heading = (*COLUMNS, f"beside {options.busy} busy") if options.busy else COLUMNS
    print(f"| {' | '.join(heading)} |\n{'|---' * len(heading)}|", flush=True)
    try:
        for line in lines(place, names, config):
            print(line, flush=True)
    finally:
        for name in ("model.safetensors", "out.safetensors", "copy", "plan.json", "profile.safetensors"):
            (place.folder / name).unlink(missing_ok=True)
        shutil.rmtree(place.folder / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
