"""The number of experts that a block keeps, as a ratio or a count. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditmoe_cli.errors import UsageError


@dataclass(frozen=True)
class Keep:
    """The number of experts that a block keeps: a ratio of its experts, a count, or (neither) all that keep neurons."""

    ratio: float | None = None
    count: int | None = None

    @property
    def auto(self) -> bool:
        """Whether only experts without remaining neurons are dropped."""
        return self.ratio is None and self.count is None

    def of(self, experts: int) -> int:
        """Return the number kept of `experts`, before any are dropped for lack of neurons; a ratio is rounded up."""
        if self.count is not None:
            return self.count
        return math.ceil((1.0 if self.ratio is None else self.ratio) * experts - 1e-9)

    def __str__(self) -> str:
        return "auto" if self.auto else str(self.count if self.count is not None else self.ratio)


def parse_keep(text: str, setting: str = "keep") -> Keep:
    """Return the count that a setting's text stands for: with a decimal point a ratio in (0, 1], else at least 1.

    ``auto`` is known to the setting ``keep`` only. Raises `UsageError` for other text.
    """
    if text == "auto" and setting == "keep":
        return Keep()
    try:
        if text.lstrip("+-").isdigit():
            if int(text) < 1:
                raise UsageError(f"⟨{setting}⟩ {text}: keep at least one expert")
            return Keep(count=int(text))
        ratio = float(text)
    except ValueError:
        raise UsageError(f"⟨{setting}⟩ {text}: give a ratio such as 0.5 or a count such as 4") from None
    if not 0.0 < ratio <= 1.0:
        raise UsageError(f"⟨{setting}⟩ {text}: a ratio must be above 0 and at most 1.0; a count has no decimal point")
    return Keep(ratio=ratio)
