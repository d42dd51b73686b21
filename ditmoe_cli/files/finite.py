"""Whether a tensor is whole: neither NaN nor infinite, found out as fast as memory is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor of any dtype holds neither NaN nor infinite values; an empty one holds none.

    NaN and infinite values stay so in a sum, so one that is finite has only finite terms. A sum that is not may have
    left the range of its dtype: then the least and the largest value tell, of which NaN makes NaN.
    """
    tensor = tensor.detach()
    if not tensor.is_floating_point() or math.isfinite(float(tensor.sum())):
        return True
    return all(math.isfinite(float(end)) for end in tensor.aminmax())
