"""Run what is to be known of a GPU: tests, benchmarks at XL shapes, and commands on a synthetic S, in minutes.

    bash examples/benchmarks/gpu.sh --output results             # some five minutes on an H100
    bash examples/benchmarks/gpu.sh --output results --sections device,tests
    bash examples/benchmarks/gpu.sh --output results --small     # tiny sizes on a CPU, to see that all of it runs

Writes gpu.json and gpu.md to the output folder, anew after each section, so that what was measured stays if a later
one is cut off. Every step is a process of its own with a time limit; one that fails or is cut off leaves the others
alone, and is told in its row. Steps that would begin beyond the budget are left out. Tests run beside the commands on
the synthetic S, since both wait for the host most of the time; nothing runs beside the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parents[1]
DITMOE = (sys.executable, "-m", "ditmoe_cli")
JSON = "JSON"  # stands for the file that a step writes its figures to
NARROW = ("--width", "64", "--depth", "2", "--side", "8", "--dtype", "fp32")
FEWEST_SECONDS = 5  # that a step needs to begin
KEPT_LINES = 25  # of what a failed step said


@dataclass(frozen=True)
class Step:
    """A process, and the seconds that it may take at most."""

    name: str
    words: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Section:
    """Steps that run one after the other; where one fails, those that `need` it are left out."""

    name: str
    title: str
    steps: tuple[Step, ...]
    chained: bool = False


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    device: str
    small: bool

    def of(self, full: str, small: str) -> str:
        """Return one of both."""
        return small if self.small else full


def script(name: str, *words: str) -> tuple[str, ...]:
    """Return the words that run a benchmark beside this one."""
    return (sys.executable, str(BENCHMARKS / f"{name}.py"), *words)


def tests_of(device: str) -> tuple[str, ...]:
    """Return the words that run the tests marked ``cuda``: of all files, on a GPU; on a CPU those that can be tried."""
    folder = ROOT / "tests"
    files = [file for file in sorted(folder.rglob("test_*.py")) if "mark.cuda" in file.read_text(encoding="utf-8")]
    if device == "cpu":
        files = [folder / "cuda" / "test_cuda_mixture.py"]
    return (sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", "-p", "no:cacheprovider", *map(str, files))


def sections(sizes: Sizes, folder: Path) -> tuple[tuple[Section, ...], ...]:
    """Return all sections; those of an inner tuple run side by side."""
    on = ("--device", sizes.device)
    rounds = ("--rounds", sizes.of("5", "1"))
    peaks = ("--dtype", "fp32") if sizes.small else ()
    few = ("--rounds", sizes.of("3", "1"))
    model = sizes.of("XL", "S")
    size = ("--width", sizes.of("1152", "64"), "--tokens", sizes.of("20480", "1024"), *on)
    sampled = ("--model", model, *few, "--steps", sizes.of("4", "1"), *(["--blocks", "1"] if sizes.small else []), *on)
    device = Section(
        "device", "The device", (Step("facts", script("device_facts", *on, *rounds, *peaks, "--json", JSON), 60),)
    )
    tests = Section("tests", "Tests marked cuda", (Step("pytest -m cuda", tests_of(sizes.device), 150),))
    mixture = Section(
        "mixture",
        "The mixture of one block",
        (
            Step(
                "moe_layer",
                script(
                    "moe_layer",
                    *("--model", model, "--tokens", sizes.of("256,1024,4096,16384,65536", "16")),
                    *("--dtype", sizes.of("fp32,bf16", "bf16"), *rounds, *on, "--json", JSON),
                ),
                80,
            ),
        ),
    )
    sampling = Section(
        "sampling",
        "Guided sampling of a whole model",
        (
            Step(
                "plain and graphs",
                script(
                    "accelerated_sampling",
                    *(*sampled, "--batch", sizes.of("1,8,32", "1"), "--ways", sizes.of("plain,graphs", "plain")),
                    *("--json", JSON),
                ),
                90,
            ),
            Step(
                "compiled",
                script(
                    "accelerated_sampling",
                    *(*sampled, "--batch", sizes.of("1,8", "1"), "--ways", sizes.of("plain,compiled,both", "plain")),
                    *("--json", JSON),
                ),
                100,
            ),
        ),
    )
    nf4 = Section(
        "nf4",
        "NF4",
        (
            Step(
                "nf4_step",
                script(
                    "nf4_step",
                    *("--model", model, "--tokens", sizes.of("512,4096,16384", "16"), "--dtype", "bf16"),
                    *("--rounds", sizes.of("10", "1"), *on, "--json", JSON),
                ),
                60,
            ),
        ),
    )
    block = Section(
        "block",
        "Compressing one block",
        (
            Step("refit, 4 of 8 experts", script("refit_cost", *size), 60),
            Step("refit, half of the neurons", script("refit_cost", *size, "--neurons", "0.5"), 60),
            Step("GPTQ, int4-g64", script("gptq_cost", *size), 60),
            Step("measuring seven formats", script("measuring_cost", *size), 60),
        ),
    )
    return (device,), (whole(sizes, folder), tests), (mixture,), (sampling,), (nf4,), (block,)


def whole(sizes: Sizes, folder: Path) -> Section:
    """Return profile, prune, quantize and fid of a synthetic S, or of a narrow model."""
    on = ("--device", sizes.device)
    shape = ("--model", "S") if not sizes.small else ("--model", "XL", *NARROW)
    drawn = ("--images", sizes.of("64", "8"), "--steps", sizes.of("20", "2"))
    files = {name: str(folder / f"{name}.safetensors") for name in ("s", "profile", "half", "mix", "mixed-profile")}
    profile = ("--profile", files["profile"])
    refit = () if not sizes.small else ("--refit-tokens", "512")
    rounded = () if not sizes.small else ("--tokens", "512")
    quantize = ("quantize", files["half"], "--bits", "4", *rounded, *on, "-o", files["mix"])
    score = ("--original", files["s"], "--ref", files["s"], "--extractor", "pixels", "--images", sizes.of("64", "8"))
    return Section(
        "whole",
        "From checkpoint to mixed precision",
        (
            Step("write", script("synthetic_checkpoint", files["s"], "--channels", "3", *shape), 30),
            Step("profile", (*DITMOE, "profile-experts", files["s"], *drawn, *on, "-o", files["profile"]), 60),
            Step(
                "prune --neurons 0.5 --allocate global",
                (
                    *(*DITMOE, "prune", files["s"], "--neurons", "0.5", "--allocate", "global"),
                    *(*refit, *profile, *on, "-o", files["half"]),
                ),
                90,
            ),
            Step("quantize --bits 4", (*DITMOE, *quantize), 150),
            Step("fid", (*DITMOE, "fid", files["mix"], *score, "--steps", sizes.of("16", "2"), *on), 60),
        ),
        chained=True,
    )


class Report:
    """What was found so far, written to gpu.json and gpu.md whenever there is more."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self._folder, self._lock, self._start = folder, Lock(), time.monotonic()
        self.found: dict[str, Any] = {"schema": "ditmoe.gpu/1", "device": sizes.device, "small": sizes.small}
        self.found["sections"] = {}

    @property
    def seconds(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self._start

    def add(self, section: Section, outcome: Mapping[str, Any]) -> None:
        """Add what a step gave."""
        with self._lock:
            place = self.found["sections"].setdefault(section.name, {"title": section.title, "steps": []})
            place["steps"].append(dict(outcome))
            self.found["seconds"] = round(self.seconds, 1)
            if section.name == "device" and outcome["figures"]:
                self.found["machine"] = outcome["figures"]["machine"]
            (self._folder / "gpu.json").write_text(json.dumps(self.found, indent=1))
            (self._folder / "gpu.md").write_text(markdown(self.found))
            print(f"{self.seconds:6.1f} s  {section.name}: {outcome['name']}: {outcome['state']}", flush=True)


def run(step: Step, limit: float, folder: Path) -> dict[str, Any]:
    """Run a step; return how it ended, its seconds, its figures and what it printed."""
    file = folder / f"{step.name.replace(' ', '-').replace(',', '')}.json"
    file.unlink(missing_ok=True)
    words = [str(file) if word == JSON else word for word in step.words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    start = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
        state = "done" if process.returncode == 0 else f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        state = f"cut off after {limit:.0f} s"
    return {
        "name": step.name,
        "command": shlex.join(shown(step.words)),
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "printed": out.splitlines()[-200:],
        "figures": json.loads(file.read_text()) if file.exists() else None,
        "said": [] if state == "done" else [*err.splitlines(), *out.splitlines()][-KEPT_LINES:],
    }


def shown(words: Sequence[str]) -> list[str]:
    """Return a command as one would type it in the project's root."""
    plain = [word.replace(f"{ROOT}/", "") for word in words if word != JSON]
    plain = [word for word in plain if word != "--json"]
    if tuple(words[:3]) == DITMOE:
        return ["ditmoe", *plain[3:]]
    return ["python", *plain[1:]]


def run_section(section: Section, budget: float, folder: Path, report: Report) -> None:
    """Run the steps of a section that fit into the budget."""
    failed = False
    for step in section.steps:
        left = budget - report.seconds
        if left < FEWEST_SECONDS or (failed and section.chained):
            state = "left out: " + ("the budget is spent" if left < FEWEST_SECONDS else "a step before it failed")
            nothing = {"seconds": 0.0, "printed": [], "figures": None, "said": []}
            report.add(
                section, {"name": step.name, "command": shlex.join(shown(step.words)), "state": state, **nothing}
            )
            continue
        outcome = run(step, min(step.limit, left), folder)
        failed |= outcome["state"] != "done"
        report.add(section, outcome)


def markdown(found: Mapping[str, Any]) -> str:
    """Return the report in Markdown, to be pasted into docs/results.md: figures of scripts, and a row a step."""
    about = ", ".join(f"{key} {value}" for key, value in found.get("machine", {}).items())
    lines = [f"Taken in {found['seconds']:.0f} s: {about or found['device']}.", ""]
    steps = ["| step | seconds | result |", "|---|---:|---|"]
    for place in found["sections"].values():
        tables = [
            line for step in place["steps"] for line in [*step["printed"], ""] if line.startswith("|") or not line
        ]
        if any(tables):
            commands = [step["command"] for step in place["steps"]]
            lines += [f"**{place['title']}**", "", *(f"    {command}" for command in commands), "", *tables]
        steps += [row_of(step) for step in place["steps"]]
    return squeezed([*lines, "**All steps**", "", *steps])


def row_of(step: Mapping[str, Any]) -> str:
    """Return the row of a step: its last line, where that is no table, or how it ended."""
    last = next((line for line in reversed(step["printed"]) if line.strip()), "")
    if step["state"] != "done":
        last = f"**{step['state']}**: {' '.join(step['said'][-1:])}".rstrip(": ")
    elif last.startswith("|"):
        last = "done"
    elif last.startswith("{"):
        last = result_of(last)
    return f"| {step['name']} | {step['seconds']:.1f} | {last[:200].replace('|', '/')} |"


def result_of(line: str) -> str:
    """Return the numbers that a command's envelope says, or that it is done."""
    try:
        result = json.loads(line)["result"]
    except (ValueError, KeyError):
        return "done"
    told = {
        key: result[key] for key in ("frechet", "bits", "bytes", "ratio") if isinstance(result.get(key), (int, float))
    }
    return ", ".join(f"{key} {value:.4g}" for key, value in told.items()) or "done"


def squeezed(lines: Sequence[str]) -> str:
    """Return lines with at most one empty one in a row."""
    kept = [line for before, line in zip(["", *lines], lines, strict=False) if line or before]
    return "\n".join(kept).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections; return 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--budget", type=float, default=450, help="seconds in all")
    parser.add_argument("--sections", help="of device, whole, tests, mixture, sampling, nf4, block; default: all")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args(arguments)
    sizes = Sizes("cpu" if options.small else options.device, options.small)
    if sizes.device == "cpu":
        os.environ["DITMOE_TEST_DEVICE"] = "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options.output, sizes)
    with tempfile.TemporaryDirectory() as name:
        groups = sections(sizes, Path(name))
        known = [section.name for group in groups for section in group]
        wanted = options.sections.split(",") if options.sections else known
        if unknown := [each for each in wanted if each not in known]:
            parser.error(f"--sections {unknown[0]}: choose from {', '.join(known)}")
        for group in groups:
            chosen = [section for section in group if section.name in wanted]
            with ThreadPoolExecutor(max(len(chosen), 1)) as pool:
                for done in [pool.submit(run_section, each, options.budget, Path(name), report) for each in chosen]:
                    done.result()
    states = [step["state"] for place in report.found["sections"].values() for step in place["steps"]]
    return 0 if all(state == "done" for state in states) else 1


if __name__ == "__main__":
    raise SystemExit(main())
