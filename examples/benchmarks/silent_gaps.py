"""Run a command on a pseudo-terminal, or off one, and tell its longest silences.

python examples/benchmarks/silent_gaps.py ditmoe profile-experts 0.4b.safetensors --images 8
python examples/benchmarks/silent_gaps.py --lines --seconds 60 ditmoe prune 0.4b.safetensors

A silence is how long nothing was drawn or written, with the text before it. Off a terminal one of up to a minute is
right after a line that says what is under way. With --seconds the command is interrupted after so many, as by Ctrl-C.
The CPU time of the command tells how much of a silence other programs may have caused.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
COLUMNS = 120


@dataclass(frozen=True)
class Silence:
    """Seconds in which nothing was written, when they began, and the last line before them."""

    seconds: float
    start: float
    after: str


def words_of(chunk: bytes) -> str:
    """Return the last line of what was drawn, without its control sequences."""
    lines = [CONTROL.sub("", line).strip() for line in chunk.decode(errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def ends(lines: bool) -> tuple[int, int]:
    """Return the end that we read and the end that the command writes to, of a pseudo-terminal or a pipe."""
    if lines:
        return os.pipe()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    return master, slave


def silences(command: list[str], lines: bool, seconds: float) -> tuple[int, list[Silence]]:
    """Run a command for at most some seconds (0: to its end); return its exit code and its silences."""
    ours, theirs = ends(lines)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    start = last = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    found, said, is_interrupted = [], "its start", False
    with contextlib.suppress(OSError):  # the other end of a terminal closed: EIO
        while True:
            if seconds and not is_interrupted and time.monotonic() - start > seconds:
                child.send_signal(signal.SIGINT)
                is_interrupted = True
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            if not (chunk := os.read(ours, 65536)):
                break
            now = time.monotonic()
            found.append(Silence(now - last, last - start, said))
            last, said = now, words_of(chunk) or said
    code = child.wait()
    found.append(Silence(time.monotonic() - last, last - start, said))
    os.close(ours)
    return code, found


def main() -> None:
    """Print the longest silences of the command in the arguments, and end with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", action="store_true", help="off a terminal, through a pipe")
    parser.add_argument("--seconds", type=float, default=0.0, help="interrupt the command after so many")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored in a shell's background, and inherited
    code, found = silences(options.command, options.lines, options.seconds)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = found[-1].start + found[-1].seconds
    print(f"exit {code} after {total:.1f} s, {spent.ru_utime + spent.ru_stime:.1f} s of them CPU time; silent for")
    for each in sorted(found, key=lambda each: -each.seconds)[:5]:
        print(f"  {each.seconds:5.1f} s from {each.start:6.1f} s on, after: {each.after[:100]}")
    sys.exit(code)


if __name__ == "__main__":
    main()
