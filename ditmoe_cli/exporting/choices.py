"""What a planner may choose for a target, so that the target's layout holds the result. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.base import StoredFormat
from ditmoe_cli.formats.registry import Format, parse_format

Shortfall = Callable[[TensorInfo, StoredFormat], str | None]
"""Return why a layout does not hold a weight in a format; None where it does."""


@dataclass(frozen=True)
class Choices:
    """What a planner may choose; by default everything.

    Attributes:
        shortfall: of the layout; None where it holds all weights in all formats.
        widths: the formats of a width in bits, narrowest first; None for integer and ternary ones of all widths.
        alike: whether all blocks have as many experts of one width, and weights no format.
    """

    shortfall: Shortfall | None = None
    widths: Mapping[str, tuple[Format, ...]] | None = None
    alike: bool = False

    @property
    def restrict(self) -> bool:
        """Whether there is anything that a planner may not choose."""
        return self != Choices()

    def hold(self, info: TensorInfo, fmt: Format) -> bool:
        """Return whether the layout holds a weight in a format."""
        return self.shortfall is None or self.shortfall(info, parse_format(fmt)) is None
