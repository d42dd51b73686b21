"""The exceptions that ditmoe raises deliberately, and the exit code of each.

::

    DitmoeError            1  a failure of the system (disk full, out of memory)
    ├── UsageError         2  an option value out of range, an unknown name
    ├── BadInputError      3  a missing, damaged or unsuitable path, file, envelope or extra
    │   └── BrokenImageError  an image of a batch holds NaN or infinite values
    ├── InfeasibleError    4  a request that cannot be met (keep below top-k, budget too small)
    ├── OutputExistsError  5  the output exists, or writing to it would be unsafe
    └── GateError          6  a threshold that the user set was not met

Each message is one line with the problem, its place and the remedy. It names a setting as ``⟨group_size⟩``, which `str`
shows as ``group_size`` and the command line as the option of that name (`named`). ``⟨no_refit⟩`` is a
switch turned off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_SETTING = re.compile("⟨([a-z_]+)⟩")


def as_argument(setting: str) -> str:
    """Return a setting as Python users give it: ``refit=False`` for ``no_refit``."""
    return f"{setting.removeprefix('no_')}=False" if setting.startswith("no_") else setting


def as_option(setting: str) -> str:
    """Return a setting as the command line has it: with two dashes before it, and dashes between its words."""
    return "--" + setting.replace("_", "-")


def named(message: str, name_of: Callable[[str], str] = as_argument) -> str:
    """Return a message with each ``⟨setting⟩`` replaced by ``name_of(setting)``."""
    return _SETTING.sub(lambda match: name_of(match[1]), message)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that names what is nearest to an unknown word; nothing where nothing is near."""
    from difflib import get_close_matches  # which nothing else takes

    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 160 characters; the error's type where it has no message."""
    lines = str(error).splitlines()
    return lines[0][:160] if lines and lines[0] else type(error).__name__


class DitmoeError(Exception):
    """Base class of all deliberate errors; exit code 1."""

    exit_code = 1

    @property
    def message(self) -> str:
        """The message with its settings marked, in one line, whatever a file's values hold."""
        return " ".join(super().__str__().splitlines())

    def __str__(self) -> str:
        return named(self.message)


class UsageError(DitmoeError):
    """An option's value is out of range or names something unknown."""

    exit_code = 2


class BadInputError(DitmoeError):
    """An input is missing, damaged or of another kind than expected."""

    exit_code = 3


class BrokenImageError(BadInputError):
    """An image holds NaN or infinite values: `index` is its index in the batch, `problem` the rest of the message."""

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"image {index} of the batch holds {problem}")
        self.index = index
        self.problem = problem


class InfeasibleError(DitmoeError):
    """A request cannot be met with this checkpoint."""

    exit_code = 4


class OutputExistsError(DitmoeError):
    """The output exists, or writing to it would be unsafe."""

    exit_code = 5


class GateError(DitmoeError):
    """A threshold that the user set was exceeded."""

    exit_code = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: Python's, a GPU's, or torch's on the CPU."""
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_type or "DefaultCPUAllocator: can't allocate memory" in str(error)  # raised as a RuntimeError
