"""Record what the ditmoe commands print and write, as digests, and compare two recordings.

::

    python tests/record_digests.py OUT.json [--package DIR] [--only LABEL_PREFIX] [--jobs N] [--fresh]
    python tests/record_digests.py --compare A.json B.json

A recording runs the commands of `cases` in a temporary folder, over ``demo:digits``, the small checkpoints of
``tests/data`` and ``../shared/oracle`` and what comes of them. Each command has a label and a folder of its own, so
that commands which do not depend on each other run beside each other. Of each it keeps the exit code, stdout (JSON as
it is, times and memory masked), a digest of every file that it wrote, of safetensors also of every tensor and the
metadata, and stderr. Paths of the temporary folder and of the package are replaced by names, and progress is off: two
recordings of one tree on one machine are the same to the byte. Those of different machines or torch releases differ in
the last bits of computed values.

Processes are forked from a server that has imported torch, which halves the time; ``--fresh`` starts each anew.

A comparison prints each difference in one line and ends in exit code 1 if there is any. What succeeding commands say on
stderr is listed after that and does not count.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import pty
import queue
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
SCHEMA = "ditmoe.digests/1"
PRELOADED = ("torch", "torch._dynamo", "numpy", "PIL.Image")  # what most commands import, slowly
HIDDEN = ("highspy",)  # another solver, which would be used where it is installed
LIBRARIES = ("torch", "numpy", "scikit-learn", "scipy", "pulp", "pillow", "matplotlib", "typer", "safetensors", *HIDDEN)
SERVE = "--serve"
STREAMS = ("stdin", "stdout", "stderr")
MASKED = "<masked>"
TIMEOUT = 600  # seconds of one command
_PLACE = re.compile(r"\{([\w-]+)(\.out)?\}")
TIMES = ("result.seconds",)  # key paths that hold a time in any result
_SECONDS = re.compile(r"^((?:\x1b\[1m)?seconds +(?:\x1b\[0m)? *)[\d,.]+", re.M)  # in tables
_DEMO = re.compile(r"<PACKAGE>[^\s\"']*/digits\.safetensors")

Json = Any


# --- what is run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One command: its label, its words, and what it gets.

    In words ``{LABEL}`` is the folder of another case, ``{LABEL.out}`` the file that holds its stdout, and
    ``{inputs}`` the folder of inputs; they are what the case depends on. `stdin` is text, or ``{LABEL.out}``. `prepare`
    puts files into the case's folder first. `masked` are key paths of the result whose values are not kept. `code` is
    the exit code to expect; another one is told while recording. With `terminal` stdout is one.
    """

    label: str
    words: tuple[str, ...]
    stdin: str = ""
    code: int = 0
    masked: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], None] | None = None
    also: tuple[str, ...] = ()
    terminal: bool = False

    @property
    def needs(self) -> set[str]:
        """The labels of the cases that have to run before."""
        texts = (*self.words, self.stdin, *self.also)
        return {found.group(1) for text in texts for found in _PLACE.finditer(text)} - {"inputs"}


def case(label: str, line: str, *words: str, **options: Any) -> Case:
    """Return a case whose words are those of a line, and more."""
    return Case(label, (*line.split(), *words), **options)


DEMO = "demo:digits"
SMALL = "{convert-deepspeed}/c.safetensors"  # DDPM, on latents, flash attention, 2 blocks of 8 experts
ON_DEMO = f"{DEMO} --profile {{profile-demo}}/p.safetensors -o o.safetensors"
ON_SMALL = f"{SMALL} --profile {{profile-ddpm}}/p.safetensors -o o.safetensors"
FAST = "--images 8 --steps 4 --bins 2 --fast"
CALIBRATION = "--images 8 --steps 4 --bins 2 --reservoir 1024"
FEW = "--refit-tokens 512"
COMMANDS = (
    *("inspect", "convert", "profile-experts", "prune", "merge", "quantize", "plan", "apply", "sample", "fid"),
    *("report", "compare", "bench"),
)
ORACLES: Mapping[str, tuple[str, str]] = {  # file or folder, and what has to be said of it
    "deepspeed": ("deepspeed-dir/checkpoint", ""),
    "train-script": ("train-script/checkpoint.pt", "--heads 5"),
    "plain-ddpm": ("plain-ddpm/checkpoint.pt", "--heads 4"),
    "flash-rf": ("flash-rf/checkpoint.pt", "--sampler rf"),
}
PRODUCTS: Mapping[str, str] = {  # of the demo: one of each form that a checkpoint may have
    "ghost": "prune-reap",
    "slice": "prune-slice",
    "mass": "prune-mass",
    "refit": "prune-refit",
    "narrow": "prune-neurons-global",
    "rank": "prune-rank",
    "merged": "merge-m-smoe",
    "svd": "merge-delta-svd",
    "ternary-delta": "merge-delta-ternary",
    "nf4-nested": "quantize-nf4-nested",
    "int8": "quantize-int8",
    "int3": "quantize-int3",
    "ternary": "quantize-ternary",
    "mix": "quantize-mix-demo",
}
SMALL_PRODUCTS: Mapping[str, str] = {
    "constants": "prune-constants",
    "dense": "merge-dense",
    "mix": "quantize-mix",
    "camera-q": "quantize-camera-q",
    "smooth": "quantize-smooth",
}
FORMATS: Mapping[str, str] = {
    "nf4": "--bits 4",
    "nf4-nested": "--format nf4 --double-quant",
    "fp4": "--format fp4",
    "fp4-nested": "--format fp4 --double-quant",
    "int8": "--bits 8",
    **{f"int{bits}": f"--format int --bits {bits}" for bits in (2, 3, 4, 5, 6)},
    "int8-groups": "--format int --bits 8",
    **{f"int{bits}-sym": f"--format int --bits {bits} --symmetric --group-size 32" for bits in (2, 3, 4, 5, 6, 8)},
    "ternary": "--format ternary",
}


def cases(oracles: Sequence[str]) -> list[Case]:
    """Return all cases, those of the oracles at hand included."""
    found = [
        *about_the_program(),
        *opening(oracles),
        *profiling(oracles),
        *pruning(),
        *merging(),
        *quantizing(),
        *planning(),
        *sampling(oracles),
        *scoring(),
        *reporting(),
        *naming(),
        *for_people(),
        *failing(),
    ]
    labels = [each.label for each in found]
    assert len(labels) == len(set(labels)), "labels are given twice"
    return found


def about_the_program() -> Iterator[Case]:
    """Yield help texts, the version and lists of methods."""
    yield case("help", "--help")
    yield case("version", "--version")
    for name in COMMANDS:
        yield case(f"help-{name}", f"{name} --help")
    for name in ("prune", "merge", "quantize"):
        yield case(f"methods-{name}", f"{name} --list-methods")


def opening(oracles: Sequence[str]) -> Iterator[Case]:
    """Yield what inspects and converts."""
    yield case("inspect-demo", f"inspect {DEMO}")
    yield case("convert-demo", f"convert {DEMO} -o c.safetensors")
    yield case("convert-folder", f"convert {DEMO} -o c --max-shard-size 1MB")
    yield case("convert-dry-run", f"convert {DEMO} -o c --max-shard-size 1MB --dry-run")
    yield case("convert-quiet", f"convert {DEMO} -q")
    yield case("export-upstream", f"export {DEMO} --to upstream -o c.pt")
    yield case("export-diffusers", f"export {DEMO} --to diffusers -o c --max-shard-size 1MB")
    yield case("inspect-folder", "inspect {convert-folder}/c")
    for name in oracles:
        path, said = ORACLES[name]
        yield case(f"inspect-{name}", f"inspect {{inputs}}/{path} {said}")
        yield case(f"convert-{name}", f"convert {{inputs}}/{path} {said} -o c.safetensors")
        yield case(f"inspect-converted-{name}", f"inspect {{convert-{name}}}/c.safetensors")
    for name, made in {**PRODUCTS, **{f"small-{n}": m for n, m in SMALL_PRODUCTS.items()}}.items():
        yield case(f"inspect-{name}", f"inspect {{{made}}}/o.safetensors")
        yield case(f"inspect-verify-{name}", f"inspect {{{made}}}/o.safetensors --verify")
    for name, made in PRODUCTS.items():
        yield case(f"inspect-two-{name}", f"inspect {DEMO} {{{made}}}/o.safetensors --values")


def profiling(oracles: Sequence[str]) -> Iterator[Case]:
    """Yield profiles."""
    yield case("profile-demo", f"profile-experts {DEMO} {CALIBRATION} -o p.safetensors")
    yield case(
        "profile-demo-cfg",
        f"profile-experts {DEMO} {CALIBRATION} --cfg 2 --solver ab2 --seed 3 --classes 0,3,7 -o p.safetensors",
    )
    yield case("profile-demo-fast", f"profile-experts {DEMO} {FAST} --batch 3 -o p.safetensors")
    yield case("profile-demo-offload", f"profile-experts {DEMO} {FAST} --offload -o p.safetensors")
    yield case("profile-ddpm", f"profile-experts {SMALL} {CALIBRATION} --cfg 1.5 -o p.safetensors")
    given = "--data {sample-demo}/s.safetensors"
    yield case("profile-data", f"profile-experts {DEMO} {FAST} {given} -o p.safetensors")
    for name in (name for name in oracles if name != "deepspeed"):
        kept = "--reservoir 256 --cfg 1.5 --solver dpmpp-2m" if name == "plain-ddpm" else "--fast"
        words = f"--images 2 --steps 2 --bins 1 {kept}"
        yield case(f"profile-{name}", f"profile-experts {{convert-{name}}}/c.safetensors {words} -o p.safetensors")


def pruning() -> Iterator[Case]:
    """Yield prunes: every method, every way with the router, with neurons and with what went."""
    copied = f"prune {ON_DEMO} --no-refit"
    for method in ("reap", "man", "msan", "easy-ep", "frequency", "gate-mass", "random", "naee", "diet"):
        yield case(f"prune-{method}", f"{copied} --keep 0.5 --method {method}")
    yield case("prune-slice", f"{copied} --keep 4 --router slice")
    yield case("prune-mass", f"{copied} --keep 0.3 --router mass")
    yield case("prune-rank", f"{copied} --keep 0.5 --residual-rank 4")
    yield case("prune-global", f"{copied} --keep 0.5 --allocate global")
    yield case("prune-neurons-global", f"{copied} --neurons 0.5 --allocate global --multiple 32")
    yield case("prune-keep-auto", f"{copied} --keep auto --neurons 0.4 --allocate global")
    yield case("prune-folder", f"prune {DEMO} --profile {{profile-demo}}/p.safetensors --no-refit --keep 0.5 -o o")
    yield case("prune-refit", f"prune {ON_DEMO} --keep 0.5 {FEW}")
    yield case("prune-neurons", f"prune {ON_DEMO} --neurons 0.5 {FEW}")
    cfg = f"prune {DEMO} --profile {{profile-demo-cfg}}/p.safetensors -o o.safetensors"
    yield case("prune-cfg", f"{cfg} --keep 3 --router slice {FEW}")
    fast = f"prune {DEMO} --profile {{profile-demo-fast}}/p.safetensors -o o.safetensors --no-refit"
    yield case("prune-fast", f"{fast} --keep 5 --method gate-mass")
    small = f"prune {ON_SMALL} {FEW}"
    yield case("prune-small", f"{small} --keep 0.5")
    yield case("prune-auto", f"{small} --keep 0.5 --router auto")
    yield case("prune-naee-global", f"{small} --keep 0.5 --method naee --allocate global --router slice")
    yield case("prune-keep-neurons", f"{small} --keep 4 --neurons 0.5 --multiple 32 --allocate global")
    yield case("prune-narrow-shared", f"{small} --keep 0.75 --neurons 0.5 --multiple 32 --narrow-shared")
    yield case("prune-constants", f"{small} --keep 0.5 --constants")
    yield case("prune-scale", f"{small} --keep 0.5 --scale")
    again = "prune --keep 3 --no-refit -o o.safetensors"
    yield case("prune-again", again, stdin="{prune-refit.out}")  # profiles anew, as the ancestor was
    yield case("prune-quantized", again, stdin="{quantize-nf4.out}")


def merging() -> Iterator[Case]:
    """Yield merges: every method, and experts as differences."""
    for method in ("m-smoe", "hc-smoe", "mergemoe", "sub-moe", "average", "uncurl"):
        yield case(f"merge-{method}", f"merge {ON_DEMO} --groups 0.5 --method {method} --no-refit")
    yield case("merge-refit", f"merge {ON_SMALL} --groups 3 {FEW}")
    yield case("merge-slice", f"merge {ON_SMALL} --groups 4 --method hc-smoe --router slice {FEW}")
    yield case("merge-dense", f"merge {ON_SMALL} --groups 1 --method average --no-refit")
    yield case("merge-delta-svd", f"merge {ON_DEMO} --delta svd")
    yield case("merge-delta-ternary", f"merge {ON_DEMO} --delta ternary --delta-ratio 0.4")
    fast = f"merge {DEMO} --profile {{profile-demo-fast}}/p.safetensors -o o.safetensors"
    yield case("merge-delta-fast", f"{fast} --delta svd --delta-ratio 0.1")
    yield case("merge-dry-run", f"merge {ON_SMALL} --groups 3 {FEW} --dry-run")
    yield case("merge-open", f"merge {SMALL} --groups 3 --dry-run")
    yield case("merge-delta-dry-run", f"merge {ON_DEMO} --delta svd --dry-run")


def quantizing() -> Iterator[Case]:
    """Yield quantisations: every uniform format, every method of a mix, and their options."""
    plain = f"quantize {DEMO} -o o.safetensors --uniform"
    for name, words in FORMATS.items():
        yield case(f"quantize-{name}", f"{plain} {words}")
    yield case("quantize-gptq", f"quantize {ON_DEMO} --uniform --format int --bits 3 --rounding gptq --tokens 512")
    yield case("quantize-folder", f"quantize {DEMO} --uniform --bits 8 -o o --max-shard-size 500KB")
    yield case("quantize-dry-run", f"{plain} --bits 4 --double-quant --dry-run")
    yield case("quantize-pruned", "quantize --uniform --bits 4 -o o.safetensors", stdin="{prune-refit.out}")
    yield case("quantize-merged", "quantize {merge-m-smoe}/o.safetensors --uniform --bits 8 -o o.safetensors")
    yield case("quantize-mix-demo", f"quantize {ON_DEMO} --bits 3.25 --allow 3,4,16 --tokens 512")
    small = f"quantize {ON_SMALL} --group-size 32"
    yield case("quantize-mix", f"{small} --bits 3.25 --tokens 512")
    nearest = f"{small} --rounding nearest"
    yield case("quantize-size", f"{nearest} --size 240KB --allow 2,4,8 --tie gate,up --floor attn=4 --floor shared=4")
    yield case("quantize-protect", f"{nearest} --bits 4 --allow 2,4,8 --protect shared,attn --symmetric")
    yield case("quantize-smooth", f"{small} --bits 3 --method outlier --tokens 512 --smooth 0.5")
    yield case("quantize-pmq", f"{nearest} --bits 3 --method pmq")
    yield case("quantize-block-score", f"{nearest} --bits 3.5 --method block-score")
    yield case("quantize-outlier", f"{nearest} --bits 2.5 --method outlier")
    yield case("quantize-camera-q", f"{small} --bits 3 --method camera-q --tokens 512")


def planning() -> Iterator[Case]:
    """Yield plans, shown and compared, and what carries them out."""
    yield case("plan-prune", f"prune {ON_DEMO} --keep 0.5 --no-refit --dry-run")
    yield case("plan-open", f"prune {DEMO} --keep 0.5 --dry-run")
    yield case("plan-replayed", f"prune {ON_SMALL} --keep 0.5 --method naee --allocate global {FEW} --dry-run")
    yield case("plan-mix", f"quantize {ON_SMALL} --group-size 32 --size 215KB --allow 2,3,4 --tokens 512 --dry-run")
    yield case("plan-show", "plan {plan-prune.out}")
    yield case("plan-show-mix", "plan {plan-mix.out}")
    yield case("plan-diff", "plan {plan-prune.out} {plan-replayed.out}")
    yield case("plan-diff-edited", "plan {plan-prune.out} {apply-edited}/plan.json")
    edited = f"apply {DEMO} --plan plan.json -o o.safetensors"
    yield case("apply-edited", edited, prepare=edit_plan, also=("{plan-prune.out}",))
    yield case("apply-prune", f"apply {DEMO} --plan {{plan-prune.out}} -o o.safetensors")
    yield case("apply-replayed", f"apply {ON_SMALL} --plan {{plan-replayed.out}}")
    yield case("apply-mix", f"apply {ON_SMALL} --plan {{plan-mix.out}}")
    yield case("apply-merge", f"apply {ON_SMALL} --plan {{merge-dry-run.out}}")
    yield case("apply-delta", f"apply {ON_DEMO} --plan {{merge-delta-dry-run.out}}")
    yield case("apply-dry-run", f"apply {SMALL} --plan {{plan-mix.out}} -o o --max-shard-size 200KB --dry-run")


def edit_plan(folder: Path, streams: Path) -> None:
    """Write a plan in which block 0 keeps another expert, block 1 slices and block 2 stands as it was."""
    plan = json.loads((streams / "plan-prune.out").read_text())["result"]["plan"]
    first = plan["blocks"][0]
    spare = next(expert for expert in range(8) if expert not in first["keep"])
    first["keep"] = sorted([*first["keep"], spare])
    plan["blocks"][1]["router"] = "slice"
    plan["blocks"][2] = {"keep": list(range(8)), "router": "ghost"}
    (folder / "plan.json").write_text(json.dumps(plan))


def sampling(oracles: Sequence[str]) -> Iterator[Case]:
    """Yield samples: every solver, every output, every form of checkpoint."""
    views = "--png pngs --grid g.png --npz s.npz -o s.safetensors"
    yield case("sample-demo", f"sample {DEMO} --images 12 --steps 4 {views}")
    few = "--images 4 -o s.safetensors"
    for solver in ("euler", "heun", "ab4", "dpmpp-2m"):
        yield case(f"sample-{solver}", f"sample {DEMO} --solver {solver} --steps 5 {few}")
    guided = f"--steps 5 --cfg 2 --cfg-interval 0.2,0.8 --classes 3,7 --seed 5 --batch 3 {few}"
    yield case("sample-guided", f"sample {DEMO} {guided}")
    weak = "--guide-with {prune-reap}/o.safetensors --guide-scale 0.5 --guide-interval 0.1,0.9"
    yield case("sample-weak", f"sample {DEMO} --steps 5 --cfg 1.5 {weak} {few}")
    yield case("sample-top1", f"sample {SMALL} --steps 3 --guide-by top1 --guide-scale 1 {few}")
    yield case("sample-upstream", f"sample {DEMO} --upstream-exact {few}")
    for solver in ("ddim", "ddim-trailing", "ddpm", "dpmpp-2m"):
        yield case(f"sample-small-{solver}", f"sample {SMALL} --solver {solver} --steps 4 --cfg 1.5 {few}")
    for name in (name for name in oracles if name != "deepspeed"):
        yield case(f"sample-{name}", f"sample {{convert-{name}}}/c.safetensors --steps 3 --cfg 1.5 {few}")
    for name, made in {**PRODUCTS, **{f"small-{n}": m for n, m in SMALL_PRODUCTS.items()}}.items():
        yield case(f"sample-of-{name}", f"sample {{{made}}}/o.safetensors --steps 3 {few}")


def scoring() -> Iterator[Case]:
    """Yield scores and comparisons."""
    few = "--images 16 --steps 4"
    yield case("fid-pipe", f"fid {few}", stdin="{quantize-pruned.out}")
    several = "--images 132 --steps 2 --convention clean-fid --metrics all --bootstrap 20 -o score.safetensors"
    yield case("fid-metrics", f"fid {{prune-refit}}/o.safetensors --ref {DEMO} {several}")
    yield case("fid-recall", f"fid {{prune-slice}}/o.safetensors --ref {DEMO} {few} --metrics pr --cfg 1.5")
    yield case("fid-statistics", f"fid {DEMO} {few} --save-statistics s.npz")
    kernel = "--convention clean-fid --metrics kid"
    yield case("fid-stored", f"fid {{sample-demo}}/s.safetensors --save-statistics s.safetensors {kernel}")
    stored = "--ref {fid-statistics}/s.npz --original demo:digits --images 8 --steps 4"
    of_paths = ("result.conditions.reference.identity",)  # the digest of a file that holds paths
    yield case("fid-to-statistics", f"fid {{prune-reap}}/o.safetensors {stored}", masked=of_paths)
    yield case("fid-images", "fid {sample-demo}/pngs --ref {sample-euler}/s.safetensors --extractor pixels")
    yield case("fid-npz", "fid {sample-demo}/s.npz --save-statistics s.npz --extractor pixels")
    yield case("gate-fid", f"fid {{prune-reap}}/o.safetensors --ref {DEMO} {few} --max 0.01", code=6)
    drawn = "--images 4 --steps 4 --bins 2 --grid g.png -o c.safetensors"
    yield case("compare-sliced", f"compare {DEMO} {{prune-slice}}/o.safetensors {drawn}")
    yield case("compare-pipe", "compare --images 4 --steps 4 --bins 2 --cfg 2", stdin="{quantize-pruned.out}")
    latent = "--images 2 --steps 3 --bins 1 --solver ddim --cfg 1.5 {quantize-mix}/o.safetensors"
    yield case("compare-small", f"compare {SMALL} {latent}")
    guided = "--images 4 --steps 4 --guide-by rank2 --guide-scale 0.5"
    yield case("compare-guided", f"compare {DEMO} {{prune-slice}}/o.safetensors {guided}")
    yield case("compare-same", f"compare {DEMO} {{convert-demo}}/c.safetensors --images 2 --steps 2 --bins 1")
    gate = "--images 2 --steps 2 --bins 1 --max-error 0.0001"
    yield case("gate-compare", f"compare {DEMO} {{prune-reap}}/o.safetensors {gate}", code=6)


def reporting() -> Iterator[Case]:
    """Yield reports of profiles and benches."""
    some = "--replicates 20"
    yield case("report-demo", f"report profile {{profile-demo}}/p.safetensors {some}")
    page = f"-o r.html --png figures --weights {DEMO} {some}"
    yield case("report-page", f"report profile {{profile-demo-cfg}}/p.safetensors {page}")
    yield case("report-pipe", f"report profile {some} --seed 1", stdin="{profile-demo-fast.out}")
    few = "--images 2 --steps 4 --cfg 1.5 -o s.json"
    yield case("report-sensitivity", f"report sensitivity {DEMO} {few} --png s.png")
    yield case("report-sensitivity-few", f"report sensitivity {SMALL} {few} --bins 2 --parts top1,skip")
    timed = ("seconds", "seconds_by_threads", "images_per_second", "conditions.threads")
    measured = tuple(f"result.{name}" for name in ("memory", *timed))
    yield case("bench-demo", f"bench {DEMO} --batch 2 --repeats 1 --json", masked=measured)
    yield case("bench-mix", "bench {quantize-mix-demo}/o.safetensors --batch 1 --repeats 1 --cfg 2", masked=measured)


def naming() -> Iterator[Case]:
    """Yield what tells how outputs are called that are not named."""
    for label, line in {
        "convert": f"convert {DEMO}",
        "prune": f"prune {DEMO} --keep 0.5",
        "narrow": f"prune {DEMO} --keep 4 --neurons 0.25",
        "merge": f"merge {DEMO} --groups 0.5",
        "delta": f"merge {DEMO} --delta ternary",
        "bits": f"quantize {DEMO} --uniform --bits 4",
        "format": f"quantize {DEMO} --uniform --format int --bits 3 --symmetric --group-size 128",
        "mix": "quantize {convert-deepspeed}/c.safetensors --bits 8 --method pmq --group-size 32 --allow 8,16 "
        "--profile {profile-ddpm}/p.safetensors",
        "apply": f"apply {DEMO} --plan {{plan-prune.out}}",
    }.items():
        yield case(f"name-{label}", f"{line} --dry-run -q")
    yield case("name-profile", f"profile-experts {DEMO} --images 1 --steps 1 --bins 1 --fast -q")
    yield case("name-samples", "sample {quantize-nf4}/o.safetensors --images 1 --steps 1 -q")


def for_people() -> Iterator[Case]:
    """Yield what commands print on a terminal."""
    kernel = "--images 16 --steps 2 --convention clean-fid --metrics kid --bootstrap 9"
    for label, line in {
        "inspect": "inspect {quantize-mix-demo}/o.safetensors",
        "inspect-small": f"inspect {SMALL}",
        "inspect-two": f"inspect {DEMO} {{quantize-mix-demo}}/o.safetensors --verify",
        "convert": f"convert {DEMO} --dry-run",
        "profile": f"profile-experts {DEMO} --images 2 --steps 2 --bins 1 --fast -o p.safetensors",
        "prune": f"prune {ON_DEMO} --keep 0.5 --no-refit --dry-run",
        "merge": f"merge {SMALL} --groups 3 --dry-run",
        "quantize": f"quantize {DEMO} --uniform --bits 4 -o o.safetensors",
        "methods": "quantize --list-methods",
        "plan": "plan {plan-prune.out}",
        "plan-mix": "plan {plan-mix.out}",
        "plan-merge": "plan {merge-dry-run.out}",
        "plan-diff": "plan {plan-prune.out} {plan-replayed.out}",
        "plan-same": "plan {plan-prune.out} {plan-prune.out}",
        "sample": f"sample {DEMO} --images 2 --steps 2 --npz s.npz -o s.safetensors",
        "fid": f"fid {{prune-reap}}/o.safetensors --ref {DEMO} {kernel}",
        "compare": f"compare {DEMO} {{prune-slice}}/o.safetensors --images 2 --steps 2 --bins 1",
        "report": "report profile {profile-demo}/p.safetensors --replicates 20",
    }.items():
        yield case(f"table-{label}", line, terminal=True)


def failing() -> Iterator[Case]:
    """Yield what is refused."""
    yield case("error-nothing", "", code=2)
    yield case("error-option", f"prune {DEMO} --nope", code=2)
    yield case("error-command", "compress", code=2)
    yield case("error-missing", "inspect nowhere.safetensors", code=3)
    yield case("error-heads", "inspect {inputs}/train-script/checkpoint.pt --heads 3", code=3)
    yield case("error-damaged", "inspect damaged.safetensors", prepare=write_damaged, code=3)
    yield case("error-method", f"prune {DEMO} --keep 0.5 --method nope", code=2)
    yield case("error-top-k", f"prune {DEMO} --keep 1", code=4)
    yield case("error-exists", f"convert {DEMO} -o damaged.safetensors", prepare=write_damaged, code=5)
    yield case("error-ending", f"convert {DEMO} -o c.pt", code=2)
    yield case("error-budget", f"quantize {ON_DEMO} --size 1KB", code=4)
    yield case("error-bits", f"quantize {DEMO} --uniform --bits 7", code=2)
    foreign = "--profile {profile-ddpm}/p.safetensors"
    yield case("error-profile", f"prune {DEMO} --keep 0.5 -o o.safetensors {foreign}", code=3)
    fast = f"merge {DEMO} --profile {{profile-demo-fast}}/p.safetensors -o o.safetensors"
    yield case("error-fast", f"{fast} --groups 4 --method hc-smoe", code=3)
    yield case("error-quantized", "quantize {quantize-nf4}/o.safetensors --uniform --bits 8", code=3)
    yield case("error-merged", "merge {merge-m-smoe}/o.safetensors --groups 2", code=3)
    yield case("error-plan", f"apply {SMALL} --plan {{plan-prune.out}}", code=3)
    yield case("error-open-plan", f"apply {DEMO} --plan {{plan-open.out}}", code=3)
    yield case("error-no-profile", f"apply {SMALL} --plan {{plan-mix.out}}", code=3)
    yield case("error-solver", f"sample {DEMO} --solver ddim", code=2)
    yield case("error-metric", f"fid {DEMO} --ref {DEMO} --metrics kid", code=2)
    yield case("error-few-images", f"fid {DEMO} --ref {DEMO} --images 9 --steps 1 --metrics fid-inf", code=3)
    yield case("error-architecture", f"compare {DEMO} {SMALL}", code=3)
    yield case("error-report", "report model", code=2)
    yield case("error-empty-pipe", "prune --keep 0.5", code=2)
    yield case("error-other-pipe", "sample", stdin='{"schema": "ditmoe.plan/1"}', code=3)


def write_damaged(folder: Path, _: Path) -> None:
    """Write a checkpoint that ends within its header."""
    (folder / "damaged.safetensors").write_bytes(struct.pack("<Q", 1000) + b'{"__metadata__": {')


# --- how it is run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A command to run: its words, where, and the files that its streams are."""

    words: tuple[str, ...]
    folder: Path
    stdin: Path
    stdout: Path
    stderr: Path
    variables: Mapping[str, str]

    def to_json(self) -> str:
        """Return it in one line."""
        paths = {name: str(getattr(self, name)) for name in ("folder", *STREAMS)}
        return json.dumps({"words": self.words, "variables": dict(self.variables), **paths})


def serve() -> None:
    """Fork a process for each request on stdin that runs ``python -m ditmoe_cli``, and tell its exit code and seconds.

    The package itself is imported by each process anew. The first answer is where it is found.
    """
    sys.path[0] = ""
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
    for name in PRELOADED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    spec = importlib.util.find_spec("ditmoe_cli")
    print_line(json.dumps(spec.origin if spec else None))
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            become(json.loads(line))
            return
        _, status, used = os.wait4(child, 0)
        print_line(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]))


def become(request: Mapping[str, Json]) -> None:
    """Be the process that a request asks for; ends in `SystemExit` where the program does."""
    os.chdir(request["folder"])
    os.environ.update(request["variables"])
    for number, name in enumerate(STREAMS):
        opened = open_stream(Path(request[name]), number > 0)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.argv = ["ditmoe", *request["words"]]
    runpy.run_module("ditmoe_cli", run_name="__main__", alter_sys=True)


def open_stream(path: Path, written: bool) -> int:
    """Open a file or a terminal, which does not become the one that controls the process."""
    return os.open(path, (os.O_WRONLY | os.O_CREAT if written else os.O_RDONLY) | os.O_NOCTTY, 0o644)


class Forks:
    """A server of forked processes, which has one at a time."""

    def __init__(self, package: Path, variables: Mapping[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(package, variables),
            text=True,
        )
        assert self.server.stdin is not None and self.server.stdout is not None
        self.requests, self.answers = self.server.stdin, self.server.stdout
        check_origin(json.loads(self.answers.readline() or "null"), package)

    def run(self, request: Request) -> tuple[int, float]:
        """Run a command and return its exit code and the seconds of CPU time that it took."""
        self.requests.write(request.to_json() + "\n")
        self.requests.flush()
        watch = threading.Timer(TIMEOUT, self.server.kill)
        watch.start()
        answer = self.answers.readline()
        watch.cancel()
        if not answer:
            raise SystemExit(f"record_digests: no end of {' '.join(request.words)}")
        code, seconds = json.loads(answer)
        return code, seconds

    def close(self) -> None:
        """End the server."""
        self.requests.close()
        self.server.wait()


class Fresh:
    """Processes that are started anew each, as a user starts them."""

    def __init__(self, package: Path, variables: Mapping[str, str]) -> None:
        self.variables = environment(package, variables)
        code = "import importlib.util as u, json; print(json.dumps(u.find_spec('ditmoe_cli').origin))"
        told = subprocess.run([sys.executable, "-c", code], env=self.variables, capture_output=True, text=True)
        check_origin(json.loads(told.stdout or "null"), package)

    def run(self, request: Request) -> tuple[int, float]:
        """Run a command and return its exit code and the seconds that it took."""
        streams = [open_stream(getattr(request, name), number > 0) for number, name in enumerate(STREAMS)]
        stdin, stdout, stderr = streams
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "ditmoe_cli", *request.words],
                cwd=request.folder,
                env={**self.variables, **request.variables},
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                timeout=TIMEOUT,
            )
            return done.returncode, time.monotonic() - start
        finally:
            for stream in streams:
                os.close(stream)

    def close(self) -> None:
        """Do nothing: there is nothing left."""


def environment(package: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of all processes: one thread, no progress, no torchrun, the package first on the path."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "COLUMNS", "TERM")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("DITMOE", "TORCHELASTIC"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    own = {"DITMOE_PROGRESS": "0", "PYTHONPATH": str(package), "PYTHONIOENCODING": "utf-8"}
    return {**kept, **threads, **own, **variables}


def check_origin(origin: str | None, package: Path) -> None:
    """End the program where another package than the one that is meant would run."""
    if origin is None or not Path(origin).resolve().is_relative_to(package):
        raise SystemExit(f"record_digests: ditmoe_cli is found at {origin}, not below {package}")


def print_line(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """Say something on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# --- what is kept --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """Replaces the paths of one run by names that stand for them in all runs."""

    roots: Mapping[str, str]

    def text(self, text: str) -> str:
        """Return text without paths of this run."""
        for path, name in self.roots.items():
            text = text.replace(path, name)
        return _DEMO.sub("<DEMO>", text)

    def inside(self, data: bytes) -> bool:
        """Tell whether bytes hold paths of this run, in UTF-8 or as numpy writes texts."""
        return any(path.encode(coding) in data for path in self.roots for coding in ("utf-8", "utf-32-le"))

    def json(self, value: Json) -> Json:
        """Return a document without paths of this run."""
        if isinstance(value, dict):
            return {self.text(name): self.json(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self.json(each) for each in value]
        return self.text(value) if isinstance(value, str) else value


def sha256(data: bytes | str) -> str:
    """Return the SHA-256 of bytes, or of text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def shape(value: Json, path: str = "") -> set[str]:
    """Return the key paths of a document with the kinds of what is there; entries of lists share ``[]``."""
    if isinstance(value, dict):
        return {f"{path}: object"}.union(*(shape(v, f"{path}.{k}" if path else k) for k, v in value.items()))
    if isinstance(value, list):
        return {f"{path}: array"}.union(*(shape(each, f"{path}[]") for each in value))
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {f"{path}: {kinds[type(value)]}"}


def masked(value: Json, paths: Sequence[str]) -> Json:
    """Return a document with the leaves below some key paths replaced."""
    return _masked(value, "", paths)


def _masked(value: Json, path: str, paths: Sequence[str]) -> Json:
    if isinstance(value, dict):
        return {k: _masked(v, f"{path}.{k}" if path else k, paths) for k, v in value.items()}
    below = any(path == each or path.startswith(f"{each}.") for each in paths)
    return MASKED if below else value


def read_json(text: str) -> Json:
    """Return the document that a text is; None where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict | list) else None


def file_digest(path: Path, names: Names) -> dict[str, Json]:
    """Return the digest of a file that a command wrote.

    Of text and metadata it is taken with paths replaced. A file that holds paths has no size and no digest as a whole,
    since both depend on them.
    """
    data = path.read_bytes()
    if path.suffix in (".json", ".html", ".txt"):
        return {"sha256": sha256(names.text(data.decode()))}
    whole = {"bytes": len(data), "sha256": sha256(data)}
    if path.suffix == ".safetensors":
        return {**({} if names.inside(data) else whole), **safetensors_digest(data, names)}
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        hold = any(names.inside(member) for member in members.values())
        digests = {name: npy_digest(member, names) for name, member in members.items()}
        return {**({} if hold else whole), "members": digests}
    return whole


def npy_digest(data: bytes, names: Names) -> str:
    """Return the digest of an array; of one that is a text, which is in UTF-32, that of the text."""
    (length,) = struct.unpack("<H", data[8:10]) if data[:6] == b"\x93NUMPY" and len(data) > 10 else (0,)
    if b"'<U" in data[10 : 10 + length]:
        return sha256(names.text(data[10 + length :].decode("utf-32-le").rstrip("\0")))
    return sha256(data)


def safetensors_digest(data: bytes, names: Names) -> dict[str, Json]:
    """Return the metadata of a safetensors file, and the dtype, shape and digest of each tensor in the file's order.

    The digests of tensors that metadata hold are told by one.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
    except (struct.error, ValueError):
        return {}
    kept: dict[str, Json] = {}
    for name, text in (header.pop("__metadata__", None) or {}).items():
        document = read_json(text)
        kept[name] = names.json(text if document is None else document)
        if isinstance(document, dict) and isinstance(document.get("tensors"), dict):
            kept[name]["tensors"] = sha256(json.dumps(document["tensors"]))
    content = memoryview(data)[8 + length :]
    tensors = {
        name: f"{info['dtype']} {info['shape']} {hashlib.sha256(content[slice(*info['data_offsets'])]).hexdigest()}"
        for name, info in header.items()
    }
    return {"metadata": kept, "tensors": tensors}


def command_record(each: Case, words: Sequence[str], code: int, folder: Path, streams: Path, names: Names) -> Json:
    """Return what is kept of a command that has run."""
    out, err = ((streams / f"{each.label}.{ending}").read_text("utf-8") for ending in ("out", "err"))
    lines = names.text(err).splitlines()
    document = read_json(out)
    record: dict[str, Json] = {"command": names.text(" ".join(("ditmoe", *words))), "exit": code, "stderr": lines}
    if document is None:
        text = _SECONDS.sub(rf"\g<1>{MASKED}", names.text(out))
        record["stdout"] = text.splitlines()
        record["stdout_sha256"] = sha256(text)
    else:
        named = names.json(document)
        plain = masked(named, (*each.masked, *TIMES))
        record["shape"] = sorted(shape(named))
        record["stdout"] = plain
        # of the text as it stands, so that the order of keys and the form of numbers count
        record["stdout_sha256"] = sha256(names.text(out) if plain == named else json.dumps(plain))
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    record["files"] = {str(file.relative_to(folder)): file_digest(file, names) for file in files}
    return record


@dataclass
class Run:
    """One recording while it is made: its folder and what it has found."""

    folder: Path
    package: Path
    names: Names
    records: dict[str, Json] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def streams(self) -> Path:
        """The folder of what commands read and print."""
        return self.folder / "streams"

    def filled(self, text: str) -> str:
        """Return words with places in them filled in."""

        def place(found: re.Match[str]) -> str:
            label, stream = found.groups()
            return str(self.streams / f"{label}.out" if stream else self.folder / label)

        return _PLACE.sub(place, text)

    def carry_out(self, each: Case, runner: Forks | Fresh) -> None:
        """Run a case and keep what comes of it."""
        folder = self.folder / each.label
        folder.mkdir()
        if each.prepare is not None:
            each.prepare(folder, self.streams)
        stdin = self.streams / f"{each.label}.in"
        piped = _PLACE.fullmatch(each.stdin)
        stdin.write_bytes(Path(self.filled(each.stdin)).read_bytes() if piped else each.stdin.encode())
        out, err = (self.streams / f"{each.label}.{ending}" for ending in ("out", "err"))
        words = tuple(self.filled(word) for word in each.words)
        cache = {"XDG_CACHE_HOME": str(self.folder / "caches" / each.label)}
        with terminal(out) if each.terminal else nullcontext(out) as stdout:
            code, self.seconds[each.label] = runner.run(Request(words, folder, stdin, stdout, err, cache))
        self.records[each.label] = command_record(each, words, code, folder, self.streams, self.names)
        if code != each.code:
            tell(f"{each.label}: exit code {code}, expected {each.code}: {err.read_text('utf-8').strip()}")


@contextmanager
def terminal(file: Path) -> Iterator[Path]:
    """Yield the path of a terminal of 100 columns; what is printed there is in `file` at the end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield Path(os.ttyname(slave))
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
        file.write_bytes(b"".join(chunks).replace(b"\r\n", b"\n"))


def chosen(every: Sequence[Case], prefix: str) -> list[Case]:
    """Return the cases whose labels start with a prefix, and all that they depend on."""
    by_label = {each.label: each for each in every}
    wanted, waiting = set[str](), [label for label in by_label if label.startswith(prefix)]
    while waiting:
        label = waiting.pop()
        if label not in wanted:
            wanted.add(label)
            waiting += by_label[label].needs
    return [each for each in every if each.label in wanted]


def run_all(run: Run, todo: Sequence[Case], jobs: int, fresh: bool) -> None:
    """Run cases, `jobs` at a time, each when those that it depends on are done."""
    by_label = {each.label: each for each in todo}
    order = TopologicalSorter({each.label: each.needs for each in todo})
    order.prepare()
    ready: queue.Queue[Case | None] = queue.Queue()
    ended: queue.Queue[str | BaseException] = queue.Queue()
    variables = {"MPLCONFIGDIR": str(run.folder / "matplotlib")}

    def work() -> None:
        try:
            runner = (Fresh if fresh else Forks)(run.package, variables)
            while (each := ready.get()) is not None:
                run.carry_out(each, runner)
                ended.put(each.label)
            runner.close()
        except BaseException as error:  # handed to the main thread
            ended.put(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    while order.is_active():
        for label in order.get_ready():
            ready.put(by_label[label])
        outcome = ended.get()
        if isinstance(outcome, BaseException):
            raise outcome
        order.done(outcome)
    for _ in workers:
        ready.put(None)
    for worker in workers:
        worker.join()


def gather_inputs(folder: Path) -> list[str]:
    """Copy the oracles at hand into a folder and return their names."""
    found = []
    for name, (path, _) in ORACLES.items():
        own = Path(path).parent
        places = (TESTS / "data" / own, REPOSITORY.parent / "shared" / "oracle" / own)
        place = next((place for place in places if place.is_dir()), None)
        if place is not None:
            shutil.copytree(place, folder / own, copy_function=shutil.copyfile)
            found.append(name)
    return found


def tree_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256(file.read_bytes()) for file in files}


def describe_machine() -> dict[str, str | None]:
    """Return what computed values depend on beside the package."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "machine": platform.machine(), "processor": processor(), **versions}


def processor() -> str:
    """Return the processor's name, as far as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def record(out: Path, package: Path, prefix: str, jobs: int, fresh: bool) -> None:
    """Run the cases and write a recording."""
    root = Path(tempfile.mkdtemp(prefix="ditmoe-digests-")).resolve()
    start = time.monotonic()
    try:
        (root / "streams").mkdir()
        (root / "inputs").mkdir()
        oracles = gather_inputs(root / "inputs")
        todo = chosen(cases(oracles), prefix)
        if not todo:
            raise SystemExit(f"record_digests: no label starts with {prefix!r}")
        run = Run(root, package, Names({str(root): "<TMP>", str(package): "<PACKAGE>"}))
        run_all(run, todo, jobs, fresh)
        document = {
            "schema": SCHEMA,
            "environment": describe_machine(),
            "only": prefix,
            "inputs": tree_digests(root / "inputs"),
            "cases": {each.label: run.records[each.label] for each in todo},
        }
    finally:
        shutil.rmtree(root, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    slowest = sorted(run.seconds.items(), key=lambda item: -item[1])[:8]
    total, passed = sum(run.seconds.values()), time.monotonic() - start
    tell(f"{len(todo)} commands in {passed:.0f} s ({total:.0f} s of their own), written to {out}")
    tell("slowest: " + ", ".join(f"{label} {seconds:.1f} s" for label, seconds in slowest))


# --- how recordings differ -----------------------------------------------------------------------------------------

NAMED = 4  # tensors of a file that are named before the rest is counted
MOST = 25  # values of one document that are shown


def differences(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield the lines in which two recordings differ, what succeeding commands say on stderr left out."""
    partial = bool(a["only"] or b["only"])
    yield from mapping_difference("inputs", a["inputs"], b["inputs"])
    for label in list(dict.fromkeys([*a["cases"], *b["cases"]])):
        both = [document["cases"].get(label) for document in (a, b)]
        if None not in both:
            yield from (f"{label}: {line}" for line in case_difference(*both))
        elif not partial:
            yield f"{label}: recorded in {'B' if both[0] is None else 'A'} alone"


def case_difference(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield the lines in which two records of one command differ."""
    for name in ("command", "exit"):
        if a[name] != b[name]:
            yield f"{name}: {brief(a[name])} -> {brief(b[name])}"
    if (a["exit"] or b["exit"]) and a["stderr"][-1:] != b["stderr"][-1:]:
        yield f"error: {brief(a['stderr'][-1:])} -> {brief(b['stderr'][-1:])}"
    yield from stdout_difference(a, b)
    for name in sorted(a["files"].keys() | b["files"].keys()):
        both = [record["files"].get(name) for record in (a, b)]
        if None in both:
            yield f"{name}: written by {'B' if both[0] is None else 'A'} alone"
        else:
            yield from (f"{name}: {line}" for line in file_difference(*both))


def stdout_difference(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield the lines in which two outputs differ."""
    if a["stdout_sha256"] == b["stdout_sha256"]:
        return
    kinds = [set(each.get("shape", ())) for each in (a, b)]
    if all(kinds):
        listed = list(json_difference(a["stdout"], b["stdout"]))
        for name, alone in (("A", kinds[0] - kinds[1]), ("B", kinds[1] - kinds[0])):
            listed += [f"{line} in {name} alone" for line in sorted(alone) if not listed]  # of masked values
    elif any(kinds):
        listed = [f"{brief(a['stdout'])} -> {brief(b['stdout'])}"]
    else:
        listed = list(text_difference(a["stdout"], b["stdout"]))
    yield from (f"stdout: {line}" for line in listed[:MOST] or ["equal values in another order or form"])
    if len(listed) > MOST:
        yield f"stdout: and {len(listed) - MOST} more"


def text_difference(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    """Yield the lines that one of two texts has alone."""
    for line in difflib.ndiff(a, b):
        if line[0] in "-+":
            yield f"{'A' if line[0] == '-' else 'B'} has {brief(line[2:])}"


def json_difference(a: Json, b: Json, path: str = "") -> Iterator[str]:
    """Yield the key paths in which two documents differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in list(dict.fromkeys([*a, *b])):
            below = f"{path}.{key}" if path else key
            if key not in a or key not in b:
                yield f"{below}: {f'{brief(a[key])} in A' if key in a else f'{brief(b[key])} in B'} alone"
            else:
                yield from json_difference(a[key], b[key], below)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{path}: {len(a)} entries -> {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from json_difference(x, y, f"{path}[{i}]")
    elif a != b or type(a) is not type(b):
        yield f"{path}: {brief(a)} -> {brief(b)}"


def file_difference(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield the lines in which two digests of a file differ."""
    if a == b:
        return
    told = []
    if a.get("bytes") != b.get("bytes"):
        told.append(f"bytes: {a.get('bytes')} -> {b.get('bytes')}")
    told += [f"metadata {line}" for line in json_difference(a.get("metadata"), b.get("metadata"))][:MOST]
    for kind in ("tensors", "members"):
        told += list(mapping_difference(kind, a.get(kind) or {}, b.get(kind) or {}))
    yield from told or ["content"]


def mapping_difference(kind: str, a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield which names two mappings hold alone, and under which they differ, in a line each."""
    common = [name for name in a if name in b]
    for what, listed in (
        ("in A alone", [name for name in a if name not in b]),
        ("in B alone", [name for name in b if name not in a]),
        ("differ", [name for name in common if a[name] != b[name]]),
    ):
        if listed:
            more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
            yield f"{kind} {what}: {', '.join(listed[:NAMED])}{more} ({len(listed)} of {len(a)})"
    if common != [name for name in b if name in a]:
        yield f"{kind}: in another order"


def brief(value: Json) -> str:
    """Return a value in few words."""
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:110]}…{text[-45:]}"


def notes(a: Mapping[str, Json], b: Mapping[str, Json]) -> Iterator[str]:
    """Yield the lines in which two recordings differ that do not count."""
    for line in json_difference(a["environment"], b["environment"]):
        yield f"environment: {line}"
    for label in [label for label in a["cases"] if label in b["cases"]]:
        both = [document["cases"][label] for document in (a, b)]
        failed = any(each["exit"] for each in both)  # the last line, which is the error, has been compared
        told = (each["stderr"][:-1] if failed else each["stderr"] for each in both)
        yield from (f"{label}: stderr: {line}" for line in text_difference(*told))


def compare(first: Path, second: Path) -> int:
    """Print in what two recordings differ; return the exit code."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    for document, path in ((a, first), (b, second)):
        if document.get("schema") != SCHEMA:
            raise SystemExit(f"record_digests: {path} is no recording")
    found = list(differences(a, b))
    for line in (*found, *(f"(does not count) {line}" for line in notes(a, b))):
        print_line(line)
    common = len(a["cases"].keys() & b["cases"].keys())
    tell(f"{common} commands compared, {len(found)} differences")
    return 1 if found else 0


def main() -> int:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json", help="the recording to write")
    parser.add_argument("--package", type=Path, default=REPOSITORY, metavar="DIR", help="what holds ditmoe_cli")
    parser.add_argument("--only", default="", metavar="PREFIX", help="labels that start so, and what they depend on")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="commands at a time [2]")
    parser.add_argument("--fresh", action="store_true", help="start each command in an interpreter of its own")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="two recordings")
    given = parser.parse_args()
    if given.compare:
        return compare(*given.compare)
    if given.out is None:
        parser.error("name the recording to write, or --compare two")
    package = given.package.resolve()
    record(given.out, package.parent if package.name == "ditmoe_cli" else package, given.only, given.jobs, given.fresh)
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == [SERVE]:
        serve()
    else:
        sys.exit(main())
