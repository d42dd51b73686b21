"""Kill commands in every phase, fill their disk, send them signals, and check what each leaves.

    python tests/kill_points.py --points 240

Each point starts one of the commands below, waits for a random phase of it, and lets one thing happen: SIGKILL,
SIGTERM, SIGINT or SIGHUP, the latter three twice at half of the points, a limit on files' sizes, or a full disk. Then

- the target is absent, the old one or the complete new one, to the byte, and over an old one never absent,
- but for SIGKILL nothing hidden is left except the work folder, the exit code is that of the signal (1 of a full disk),
  and stderr holds no traceback,
- the next run in that folder deletes what was left; at every eighth point, and at each one that left work, the same
  command runs again, to the bytes of a run that nothing happened to.

In the end the inputs are unchanged: bytes, inodes and times of change. What is on the disk when it happens tells the
phase: nothing yet, a work folder, the hidden output in parts or whole, both outputs while the old one is deleted, all
done. Not collected by pytest. Disks are filled where mounting a tmpfs is allowed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ditmoe_cli.files.staging import staged

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = "demo:digits"
LARGE, PROFILE, PLAN, HALF = "large.safetensors", "p.safetensors", "plan.json", "half.safetensors"
SHARDS = ("--max-shard-size", "15MB")
PRUNING = ("--keep", "0.5", "--refit-tokens", "1024", "--profile", PROFILE)
MIXING = ("--bits", "3.5", "--allow", "3,4", "--tokens", "256", "--profile", PROFILE)
MERGING = ("--groups", "2", "--refit-tokens", "1024", "--profile", PROFILE)
COMPRESSING = ("--ratio", "0.3", "--allow", "4,8", "--profile", PROFILE)
HEALING = ("--original", DEMO, "--steps", "20", "--batch", "32", "--profile", PROFILE)
DISTILLING = ("--original", DEMO, "--steps", "2", "--teacher-steps", "4", "--iterations", "20", "--batch", "32")
UNIFORM = ("--uniform", "--bits", "4")
WAYS = ("KILL", "TERM", "KILL", "INT", "KILL", "HUP", "KILL", "LIMIT", "KILL", "TERM", "INT", "FULL")
EXITS = {"KILL": -9, "TERM": 143, "INT": 130, "HUP": 129, "LIMIT": 1, "FULL": 1}
PHASES = ("starting", "computing", "writing", "flushing", "deleting the old", "done")
_LONGEST = 1800  # seconds of a run: one that hangs ends then, and one on a busy machine before


@dataclass(frozen=True)
class Case:
    """A command, and the name of its output: a folder where it has no ending."""

    words: tuple[str, ...]
    target: str = "x.safetensors"
    computes: bool = False

    @property
    def label(self) -> str:
        kind = "file" if Path(self.target).suffix else "folder"
        return f"{self.words[0]}{' (computed)' if self.computes else ''}, {kind}"


CASES = (
    Case(("convert", LARGE)),
    Case(("convert", LARGE, *SHARDS), "x"),
    Case(("export", LARGE, "--to", "upstream"), "x.pt"),
    Case(("export", LARGE, "--to", "diffusers", *SHARDS), "x"),
    Case(("quantize", LARGE, *UNIFORM)),
    Case(("quantize", LARGE, *UNIFORM, "--max-shard-size", "3MB"), "x"),
    Case(("apply", LARGE, "--plan", PLAN)),
    Case(("apply", LARGE, "--plan", PLAN, "--max-shard-size", "3MB"), "x"),
    Case(("prune", LARGE, "--keep", "4", "--no-refit", "--profile", "large.profile.safetensors")),
    Case(("prune", LARGE, "--keep", "4", "--no-refit", "--profile", "large.profile.safetensors", *SHARDS), "x"),
    Case(("merge", LARGE, "--groups", "4", "--no-refit", "--profile", "large.profile.safetensors")),
    Case(("merge", LARGE, "--groups", "4", "--no-refit", "--profile", "large.profile.safetensors", *SHARDS), "x"),
    Case(("prune", DEMO, *PRUNING), computes=True),
    Case(("prune", DEMO, *PRUNING, "--max-shard-size", "1MB"), "x", computes=True),
    Case(("quantize", DEMO, *MIXING), computes=True),
    Case(("merge", DEMO, *MERGING), computes=True),
    Case(("compress", DEMO, *COMPRESSING), computes=True),
    Case(("heal", HALF, *HEALING), computes=True),
    Case(("distill", HALF, *DISTILLING), computes=True),
    Case(("profile-experts", DEMO, "--images", "32", "--steps", "8"), computes=True),
    Case(("sample", DEMO, "--images", "32", "--steps", "8"), computes=True),
)


def started(case: Case, folder: Path, force: bool, limit: int | None = None) -> subprocess.Popen[str]:
    """Start a command as a program of two threads."""
    words = [sys.executable, "-m", "ditmoe_cli", *case.words, "-o", case.target, *(["--force"] if force else [])]

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background and nohup ignore them, and pass that on
            signal.signal(number, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2", "DITMOE_PROGRESS": "0"}
    return subprocess.Popen(
        words,
        cwd=folder,
        env={**environment, "XDG_CACHE_HOME": str(folder.parent / "cache")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def run(case: Case, folder: Path, force: bool = False) -> float:
    """Run a command to its end and return its seconds. Raises where it fails."""
    start = time.monotonic()
    with started(case, folder, force) as child:
        _, said = child.communicate(timeout=_LONGEST)
    if child.returncode:
        raise RuntimeError(f"{' '.join(case.words)}: exit {child.returncode}: {said}")
    return time.monotonic() - start


Bytes = dict[str, str]


def files_of(place: Path) -> list[Path]:
    """Return a file, or the files in a folder and in those within."""
    return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]


def digests(place: Path) -> Bytes | None:
    """Return the SHA-256 of a file or of the files in a folder, by their paths; None where nothing stands."""
    if place.is_file():
        return {"": hashlib.sha256(place.read_bytes()).hexdigest()}
    if place.is_dir():
        return {str(file.relative_to(place)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(place)}
    return None


def hidden(folder: Path) -> set[str]:
    """Return the names of hidden files in a folder."""
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@dataclass(frozen=True)
class Known:
    """What a case gives when nothing happens: digests of its output, its bytes, its largest file's, and seconds."""

    new: Bytes
    size: int
    largest: int
    seconds: float


def stored(place: Path) -> int:
    """Return the bytes that a file, or a folder's files, take on the disk."""
    try:
        return sum(file.stat().st_blocks * 512 for file in files_of(place))
    except OSError:  # it went meanwhile
        return 0


def phase_of(target: Path, old: int | None, size: int) -> str:
    """Return what a run on `target`, where the inode `old` stood, is at, by what is on the disk."""
    try:
        names = hidden(target.parent)
        inode = target.stat().st_ino if target.exists() else None
    except OSError:
        return "writing"
    staging = next((name for name in names if ".ditmoe-tmp-" in name and not name.endswith(".lock")), None)
    if inode != old:
        return "deleting the old" if staging else "done"
    if staging:
        return "flushing" if stored(target.parent / staging) >= size else "writing"
    return "computing" if any(name.endswith(".work") for name in names) else "starting"


@dataclass
class Tally:
    """Outcomes, counted by whoever has the lock."""

    counts: Counter[tuple[str, ...]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Points:
    """All points of a run of this program: their inputs, and what outcomes are compared with."""

    def __init__(self, root: Path, cases: Sequence[Case], ways: Sequence[str], seed: int) -> None:
        self.root, self.cases, self.ways, self.seed = root, cases, ways, seed
        self.inputs = root / "inputs"
        self.inputs.mkdir()
        self.known: dict[Case, Known] = {}
        self.tally = Tally()

    def prepare(self) -> None:
        """Make the inputs, and run each case once."""
        script = REPOSITORY / "examples" / "benchmarks" / "synthetic_checkpoint.py"
        words = [sys.executable, str(script), str(self.inputs / LARGE), "--depth", "1", "--side", "8"]
        subprocess.run(words, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=True, capture_output=True)
        calibrating = ("--images", "8", "--steps", "2")
        run(Case(("profile-experts", LARGE, *calibrating), "large.profile.safetensors"), self.inputs)
        run(Case(("profile-experts", DEMO, "--images", "32", "--steps", "8"), PROFILE), self.inputs)
        run(Case(("prune", DEMO, "--keep", "4", "--no-refit", "--profile", PROFILE), HALF), self.inputs)
        planned = [sys.executable, "-m", "ditmoe_cli", "quantize", LARGE, *UNIFORM, "--dry-run", "--json"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with (self.inputs / PLAN).open("w") as file:
            subprocess.run(
                planned, cwd=self.inputs, env=environment, stdout=file, check=True, stderr=subprocess.DEVNULL
            )
        for case in self.cases:
            folder = self.fresh(f"known-{len(self.known)}")
            seconds = run(case, folder)
            new = digests(folder / case.target)
            if new is None or hidden(folder):
                raise RuntimeError(f"{case.label}: leaves {hidden(folder)}")
            place = folder / case.target
            largest = max(file.stat().st_size for file in files_of(place))
            self.known[case] = Known(new, stored(place), largest, seconds)
            say(f"{case.label}: {seconds:.1f} s, {self.known[case].size / 1e6:.1f} MB")
            shutil.rmtree(folder)

    def fresh(self, name: str, disk: int | None = None) -> Path:
        """Return a new folder with links to the inputs, on a disk of its own of so many bytes if given."""
        folder = self.root / name
        folder.mkdir()
        if disk is not None:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={disk}", "none", str(folder)], check=True)
        for source in self.inputs.iterdir():
            (folder / source.name).symlink_to(source)
        return folder

    def input_state(self) -> list[tuple[str, int, int, str]]:
        """Return all that must not change of the inputs."""
        return [
            (path.name, path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(self.inputs.iterdir())
        ]

    def play(self, number: int) -> None:
        """Play one point, and note its outcome."""
        draw = random.Random(self.seed * 1_000_003 + number)
        case = self.cases[number % len(self.cases)]
        way = self.ways[(number // len(self.cases) + number) % len(self.ways)]
        label = f"{number} {case.label}, {way}"
        try:
            for _ in range(3):  # once more where the command was done before its time had come
                outcome = self._play(number, case, way, draw)
                if outcome[0] != "done":
                    break
        except (AssertionError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            with self.tally.lock:
                self.tally.wrong.append(f"{label}: {error}")
            say(f"{label}: WRONG: {error}")
            return
        with self.tally.lock:
            self.tally.counts[(case.words[0], way, *outcome)] += 1
        say(f"{label}: {', '.join(outcome)}")

    def _play(self, number: int, case: Case, way: str, draw: random.Random) -> tuple[str, ...]:
        known = self.known[case]
        has_old, old = draw.random() < 0.6, None
        room = (
            3 * known.size
            + (2**28 if case.computes else 2**23)
            + (2 * (self.inputs / LARGE).stat().st_size if has_old else 0)
        )
        folder = self.fresh(f"point-{number}", room if way == "FULL" else None)
        target = folder / case.target
        if has_old:
            self._put_old(case, target)
            old = digests(target)
        before = target.stat().st_ino if has_old else None
        limit = draw.randrange(known.largest // 100, known.largest) if way == "LIMIT" else None
        with started(case, folder, has_old, limit) as child:
            wait = _waiting(case, known, draw)
            start = time.monotonic()
            while child.poll() is None and not wait(phase_of(target, before, known.size), target, start):
                time.sleep(0.0005)
            phase = "writing" if way == "LIMIT" else phase_of(target, before, known.size)
            if child.poll() is None:
                self._happen(way, child, folder, draw)
            _, said = child.communicate(timeout=_LONGEST)
        ballast = folder / "ballast"
        ballast.unlink(missing_ok=True)
        found = digests(target)
        assert found in (old, known.new), "neither the old one nor the new one"
        left = hidden(folder)
        work = {f".{case.target}.work", f".{case.target}.work.lock"} if way == "KILL" else {f".{case.target}.work"}
        kept = {name for name in left if name in work or ".work" in name}
        if child.returncode == 0:
            assert found == known.new and not left, f"ended well, but {left}"
            phase = "done"
        else:
            early = -getattr(signal, f"SIG{way}", -EXITS[way])  # before ditmoe heeds signals; shells say the same of it
            assert child.returncode in (EXITS[way], early), f"exit {child.returncode}: {said}"
            assert "Traceback" not in said and "internal error" not in said, said
            assert way == "KILL" or said.count("ditmoe: error: ") == 1, said
            assert way == "KILL" or left <= kept, f"left {left}"
        with staged(folder / "next") as staging:
            staging.write_text("")
        assert hidden(folder) <= kept, f"the next run left {hidden(folder)}"
        if number % 8 == 0 or kept:
            if found != known.new:
                run(case, folder, has_old)
            elif kept:
                run(case, folder)
            assert digests(target) == known.new, "other bytes"
            assert not hidden(folder), f"left {hidden(folder)} in the end"
        if way == "FULL":
            subprocess.run(["umount", "-l", str(folder)], check=True)
        shutil.rmtree(folder)
        return phase, "new" if found == known.new else "old" if has_old else "absent"

    def _put_old(self, case: Case, target: Path) -> None:
        """Put an old output in place, large enough that deleting it takes a moment."""
        if target.suffix:
            shutil.copy(self.inputs / LARGE, target)
        else:
            place = target / "transformer" if case.words[0] == "export" else target
            place.mkdir(parents=True)
            (place / "config.json").write_text("{}")
            for part in range(2):
                shutil.copy(self.inputs / LARGE, place / f"diffusion_pytorch_model-{part}.safetensors")

    def _happen(self, way: str, child: subprocess.Popen[str], folder: Path, draw: random.Random) -> None:
        if way == "FULL":
            _fill(folder / "ballast")
        elif way != "LIMIT":
            child.send_signal(getattr(signal, f"SIG{way}"))
            if way != "KILL" and draw.random() < 0.5:
                time.sleep(draw.uniform(0, 0.03))
                child.send_signal(getattr(signal, f"SIG{way}"))


def _waiting(case: Case, known: Known, draw: random.Random) -> Callable[[str, Path, float], bool]:
    """Return what tells that it is time: a moment of the run, or a share of a phase."""
    moment, share = draw.uniform(0.02, 0.9) * known.seconds, draw.random()
    kind = draw.choice(
        ["moment", "computing" if case.computes else "writing", "writing", "flushing", "deleting the old"]
    )
    rank = {phase: number for number, phase in enumerate(PHASES)}

    def is_time(phase: str, target: Path, start: float) -> bool:
        if kind == "moment":
            return time.monotonic() - start >= moment
        if kind == "writing" and phase == "writing":
            written = [
                stored(path) for path in target.parent.glob(f".{target.name}.ditmoe-tmp-*") if path.suffix != ".lock"
            ]
            return sum(written) >= share * known.size
        if kind == "computing" and phase == "computing":
            return len(list((target.parent / f".{target.name}.work").glob("*"))) >= 1 + share * 8
        return rank[phase] >= rank[kind] and (kind != "writing" or phase != "writing")

    return is_time


def _fill(ballast: Path) -> None:
    """Take all the room of a disk."""
    with ballast.open("wb", buffering=0) as file:
        disk = os.statvfs(ballast.parent)
        for size in (2**20, 2**16, 4096):
            try:
                while True:
                    file.write(bytes(min(size, max(4096, disk.f_bavail * disk.f_frsize))))
            except OSError:
                continue


def say(line: str) -> None:
    """Print a line at once, whole."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def report(tally: Tally) -> None:
    """Print the outcomes: by command and by what happened, and the phases that it happened in."""
    for title, chosen in (("command", 0), ("what happened", 1), ("phase", 2)):
        names = sorted({key[chosen] for key in tally.counts})
        say(f"\n| {title} | points | target absent | the old one | the new one |\n|---|---|---|---|---|")
        for name in names:
            by = Counter[str]()
            for key, count in tally.counts.items():
                if key[chosen] == name:
                    by[key[3]] += count
            say(f"| {name} | {by.total()} | {by['absent']} | {by['old']} | {by['new']} |")


def main() -> None:
    """Run all points and report those whose outcome is wrong; exit code 1 where any is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="points at a time")
    parser.add_argument("--only", metavar="COMMAND", action="append", help="may be repeated")
    parser.add_argument("--what", choices=EXITS, action="append", help="happens; may be repeated")
    given = parser.parse_args()
    cases = [case for case in CASES if not given.only or case.words[0] in given.only]
    root = Path(tempfile.mkdtemp(prefix="kill-points-"))
    ways = [way for way in WAYS if not given.what or way in given.what]
    if os.geteuid() != 0:
        say("no right to mount: disks are not filled")
        ways.remove("FULL")
    try:
        points = Points(root, cases, ways, given.seed)
        points.prepare()
        before = points.input_state()
        start = time.monotonic()
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(points.play, range(given.points)))
        if points.input_state() != before:
            points.tally.wrong.append("an input changed")
        report(points.tally)
        say(f"\n{given.points} points in {time.monotonic() - start:.0f} s, {len(points.tally.wrong)} wrong")
        for line in points.tally.wrong:
            say(line)
    finally:
        for left in root.glob("point-*"):
            subprocess.run(["umount", "-l", str(left)], capture_output=True, check=False)
        shutil.rmtree(root, ignore_errors=True)
    raise SystemExit(1 if points.tally.wrong else 0)


if __name__ == "__main__":
    main()
