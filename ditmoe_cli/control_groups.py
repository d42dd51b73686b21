"""Control groups of Linux, which limit what the processes of a container may use: where those of this process are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the process's control groups that a `controller` may limit, and of all groups around them.

    Reads /proc/self/cgroup ("0::/pod/one", in version 1 "4:cpu,cpuacct:/pod/one") and /proc/self/mountinfo. In a
    container the path may be that of the host, which lies above what is mounted.
    """
    groups = [line.split(":", 2) for line in text_of(root / "proc/self/cgroup").splitlines()]
    for mount, point, kind, controllers in _mounts(root):
        for _, names, path in (group for group in groups if len(group) == 3):
            unified = kind == "cgroup2" and not names
            if unified or (kind == "cgroup" and controller in names.split(",") and controller in controllers):
                base = root / point.lstrip("/")
                inside = Path(path).relative_to(mount) if Path(path).is_relative_to(mount) else Path()
                folder = base / inside if ".." not in inside.parts else base
                yield folder
                yield from (above for above in folder.parents if above.is_relative_to(base))


def _mounts(root: Path) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield root, mount point, type and controllers of each mounted hierarchy of control groups."""
    for line in text_of(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, ends = left.split(), right.split()
        if len(fields) > 4 and len(ends) > 2 and ends[0] in ("cgroup", "cgroup2"):
            yield fields[3], fields[4], ends[0], ends[2].split(",")


def text_of(file: Path) -> str:
    """Return the text of a file of the system, nothing where there is none."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
