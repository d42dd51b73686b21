"""Everything ditmoe raises on purpose, with the exit code each error ends in.

::

    DitmoeError            1  the system failed us (disk full, out of memory)
    ├── UsageError         2  option values out of range, unknown names
    ├── BadInputError      3  paths, files, envelopes or extras that are not what they should be
    │   └── BrokenImageError  one image of a batch holds NaN
    ├── InfeasibleError    4  a request that cannot be met (keep below top-k, budget too small)
    ├── OutputExistsError  5  the output is there already, or writing to it would be unsafe
    └── GateError          6  a threshold that the user set was not met

Each message is one line: what is wrong, where, and what to do next. It names a setting as ``⟨group_size⟩``; a Python
caller reads ``group_size``, and the command line turns it into ``--group-size`` (`named`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

_SETTING = re.compile("⟨([a-z_]+)⟩")


def named(message: str, name_of: Callable[[str], str] = str) -> str:
    """Return a message with each ``⟨setting⟩`` replaced by what `name_of` calls the setting."""
    return _SETTING.sub(lambda match: name_of(match[1]), message)


class DitmoeError(Exception):
    """Base of all deliberate errors; ends the command with exit code 1."""

    exit_code = 1

    @property
    def message(self) -> str:
        """The message as it was raised, its settings marked."""
        return super().__str__()

    def __str__(self) -> str:
        return named(self.message)


class UsageError(DitmoeError):
    """An option's value is out of range or names something unknown."""

    exit_code = 2


class BadInputError(DitmoeError):
    """An input is missing, damaged, or not what it should be."""

    exit_code = 3


class BrokenImageError(BadInputError):
    """An image of a batch holds NaN or infinite values: its `index` there, and what is the `matter`."""

    def __init__(self, index: int, matter: str) -> None:
        super().__init__(f"image {index} of the batch holds {matter}")
        self.index = index
        self.matter = matter


class InfeasibleError(DitmoeError):
    """What was asked for cannot be met by this checkpoint."""

    exit_code = 4


class OutputExistsError(DitmoeError):
    """The output exists, or is no place to write to."""

    exit_code = 5


class GateError(DitmoeError):
    """A gate such as ``fid --max`` was not passed."""

    exit_code = 6


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory ran out: Python's, a GPU's, or torch's on the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)  # how torch words it
