"""Run a command on a pseudo-terminal and tell its longest silences: how long nothing was drawn, and since which text.

python examples/benchmarks/silent_gaps.py ditmoe profile-experts 0.4b.safetensors --images 8
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
COLUMNS = 120


def words_of(chunk: bytes) -> str:
    """Return the last line of what was drawn, without its control sequences."""
    lines = [CONTROL.sub("", line).strip() for line in chunk.decode(errors="replace").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def gaps(command: list[str]) -> tuple[int, list[tuple[float, float, str]]]:
    """Run a command; return its exit code, and (seconds of silence, when it began, the text before it) of each gap."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    start = last = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    found, said = [], "its start"
    with contextlib.suppress(OSError):  # the other end closed: EIO
        while chunk := os.read(master, 65536):
            now = time.monotonic()
            found.append((now - last, last - start, said))
            last, said = now, words_of(chunk) or said
    now = time.monotonic()
    found.append((now - last, last - start, said))
    os.close(master)
    return child.wait(), found


def main() -> None:
    """Print the longest gaps of the command in the arguments, and end with its exit code."""
    code, found = gaps(sys.argv[1:])
    total = max(start + silent for silent, start, _ in found)
    print(f"exit {code} after {total:.1f} s; silent for")
    for silent, start, said in sorted(found, reverse=True)[:5]:
        print(f"  {silent:5.1f} s from {start:6.1f} s on, after: {said[:100]}")
    sys.exit(code)


if __name__ == "__main__":
    main()
