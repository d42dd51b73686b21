"""Measure commands on checkpoints of published sizes against copying the bytes that they read and write.

    python examples/benchmarks/streaming.py --model XL --folder /data/tmp
    python examples/benchmarks/streaming.py --model G --folder /data/tmp
    python examples/benchmarks/streaming.py --model XL --folder /data/tmp --busy 1 --only prune
    python examples/benchmarks/streaming.py --model S --folder /data/tmp --container train --only convert

Writes the model with random weights (`synthetic_checkpoint.py`), runs each command on it as a process of its own,
inspects the output, and deletes it before the next. G takes 33 GB for the model and as much for one output, and half an
hour. Prints a Markdown table:

- seconds: from the start of the process to its end, the import of torch and the flush to disk included.
- CPU: seconds of user and system time of all its threads.
- copying: seconds in which a loop of this script reads as many bytes of the input as its weights have, and writes as
  many as the output has, 8 MiB at a time and in turn, and waits for the disk at the end (fsync). Measured when the
  output is deleted again. Of inspect --verify, which writes nothing, it reads the file that is verified.
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
from synthetic_checkpoint import CONTAINERS, DTYPES, MODELS, config_of
from synthetic_checkpoint import main as write_model

from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.files.header import DTYPE_BYTES
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import DiTMoEConfig, expected_weights
from ditmoe_cli.model.parameters import weight_group

CHUNK = 8 * 2**20
POLL = 0.05  # seconds
COLUMNS = (
    *("", "seconds", "CPU", "copying", "ratio", "per 1e9 weights", "anonymous, MiB", "resident, MiB", "from disk, GB"),
    *("to disk, GB", "bytes"),
)
SLOW = ("int4", "merge")  # left out of G unless named
VERIFIED = ("prune", "nf4")  # commands whose outputs are verified too


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
    """The folder of all files, the model (a file or a folder), and the busy processes that runs have beside them."""

    folder: Path
    model: Path
    busy: int

    @property
    def made(self) -> Path:
        """The output of a command."""
        return self.folder / "out.safetensors"


def files_of(path: Path) -> list[Path]:
    """Return a file, or the files in a folder, at any depth."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def release(path: Path) -> None:
    """Drop the pages of a file, or of the files in a folder, from the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def chunks(path: Path, size: int) -> Iterator[memoryview]:
    """Yield the first bytes of a file, or of the files in a folder, in a buffer that is used again."""
    buffer, left = memoryview(bytearray(CHUNK)), size
    for file in files_of(path):
        with file.open("rb", buffering=0) as reading:
            while left and (count := reading.readinto(buffer[: min(left, CHUNK)])):
                left -= count
                yield buffer[:count]


def copying(source: Path, scratch: Path, written: int) -> float:
    """Return the seconds of reading a checkpoint's weights, and writing so many bytes in turn, on disk at the end."""
    size = sum(info.nbytes for info in open_checkpoint(source).header.tensors.values())
    release(source)
    start, done = time.perf_counter(), 0
    with scratch.open("wb", buffering=0) as writing:
        for chunk in chunks(source, size):
            done += chunk.nbytes
            while (left := written * done // size - writing.tell()) > 0:
                writing.write(chunk[:left])
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


def run(place: Place, words: Sequence[str | Path], source: Path) -> Run:
    """Run a ditmoe command on a cold `source`, and watch it. Raises `SystemExit` with what it said where it fails."""
    release(source)
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


@dataclass(frozen=True)
class Command:
    """A row: its label, the words of the command without checkpoint and output, and whether it packs weights."""

    label: str
    words: tuple[str | Path, ...]
    packs: bool = False


def cells(label: str, found: Run, copied: float = 0.0, size: int = 0, weights: int = 0) -> list[str]:
    """Return the cells of a row; of what there is none, a dash."""
    return [
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
        f"{size:,}" if size else "-",
    ]


def inspected(place: Place, of: str) -> Iterator[list[str]]:
    """Inspect what a command wrote, and verify it where that is in `VERIFIED`; yield the cells of their rows."""
    yield cells(f"inspect, of what {of} wrote", run(place, ("inspect", place.made), place.made))
    if of in VERIFIED:
        verified = run(place, ("inspect", place.made, "--verify"), place.made)
        yield cells(f"inspect --verify, of what {of} wrote", verified, copying(place.made, place.folder / "copy", 0))


def measured(place: Place, name: str, command: Command) -> Iterator[list[str]]:
    """Run a command, and inspect and delete what it wrote; yield the cells of the rows."""
    words = (command.words[0], place.model, *command.words[1:], *(() if name == "inspect" else ("-o", place.made)))
    beside = []
    if place.busy:
        with busy(place.busy):
            beside = [run(place, words, place.model).seconds]
        place.made.unlink(missing_ok=True)
    found = run(place, words, place.model)
    if not place.made.exists():
        yield [*cells(command.label, found), *(f"{seconds:.1f}" for seconds in beside)]
        return
    size, weights = place.made.stat().st_size, packed(place.made) if command.packs else 0
    rows = list(inspected(place, name))
    place.made.unlink()
    row = cells(command.label, found, copying(place.model, place.folder / "copy", size), size, weights)
    yield [*row, *(f"{seconds:.1f} ({seconds / found.seconds:.2f})" for seconds in beside)]
    yield from ([*row, *("-" for _ in beside)] for row in rows)


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


Row = Callable[[Place, str, DiTMoEConfig], Command]


def plain(label: str, *words: str, packs: bool = False) -> Row:
    """Return a row whose words depend on nothing."""
    return lambda *_: Command(label, words, packs)


def _apply(place: Place, source: str, config: DiTMoEConfig) -> Command:
    plan = plan_of(place, source, config)
    return Command("apply: half the experts, in NF4", ("apply", "--plan", plan), packs=True)


def _merge(place: Place, source: str, config: DiTMoEConfig) -> Command:
    words = ("merge", "--groups", "0.5", "--method", "average", "--no-refit")
    return Command(" ".join(words), (*words, "--profile", profile_of(place, source, config)))


def _uniform(*words: str) -> Row:
    return plain(" ".join(("quantize --uniform", *words)), "quantize", "--uniform", *words, packs=True)


_PRUNE = ("prune", "--keep", "0.5", "--method", "random", "--no-refit")
ROWS: dict[str, Row] = {
    "inspect": plain("inspect", "inspect"),
    "convert": plain("convert", "convert"),
    "prune": plain(" ".join(_PRUNE), *_PRUNE),
    "nf4": _uniform("--format", "nf4"),
    "int4": _uniform("--format", "int", "--bits", "4"),
    "int8": _uniform("--format", "int8"),
    "apply": _apply,
    "merge": _merge,
}


def lines(place: Place, names: Sequence[str], config: DiTMoEConfig) -> Iterator[str]:
    """Yield the rows of the table."""
    source = open_checkpoint(place.model).fingerprint if {"apply", "merge"} & set(names) else ""
    for name in names:
        for row in measured(place, name, ROWS[name](place, source, config)):
            yield f"| {' | '.join(row)} |"


def check_space(folder: Path, config: DiTMoEConfig, dtype: str) -> None:
    """Exit where the folder has no room for the model and an output as large."""
    weights = sum(int(np.prod(shape)) for shape in expected_weights(config).values())
    needed = 2 * weights * DTYPE_BYTES[DTYPES[dtype]] * 1.01
    if (free := shutil.disk_usage(folder).free) < needed:
        raise SystemExit(f"{folder}: {needed / 1e9:.0f} GB are needed, and {free / 1e9:.0f} GB are free")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, run the benchmark and print its table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="S")
    parser.add_argument("--depth", type=int, help="fewer blocks, for a try")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where all files are written, and deleted at the end"
    )
    parser.add_argument("--container", choices=CONTAINERS, default="safetensors", help="of the model")
    parser.add_argument("--busy", type=int, default=0, help="run each command once more beside so many busy processes")
    parser.add_argument("--only", action="append", choices=ROWS, help="this command; can be repeated")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ending = {"safetensors": ".safetensors", "deepspeed": ""}.get(options.container, ".pt")
    place = Place(folder, folder / f"model{ending}", options.busy)
    shape = MODELS[options.model]
    config = config_of(shape if options.depth is None else replace(shape, depth=options.depth))
    names = options.only or [name for name in ROWS if options.model != "G" or name not in SLOW]
    check_space(folder, config, shape.dtype)
    write_model(
        [str(place.model), "--model", options.model, "--depth", str(config.depth), "--container", options.container]
    )
    heading = (*COLUMNS, f"beside {options.busy} busy") if options.busy else COLUMNS
    print(f"| {' | '.join(heading)} |\n{'|---' * len(heading)}|", flush=True)
    try:
        for line in lines(place, names, config):
            print(line, flush=True)
    finally:
        for name in (place.made.name, "copy", "plan.json", "profile.safetensors", "stdout.json", "stderr.txt"):
            (folder / name).unlink(missing_ok=True)
        for made in (place.model, folder / "cache"):
            shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
