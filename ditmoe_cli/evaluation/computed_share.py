"""What a schedule of compute left to compute of sampled images: counted batch by batch, and told with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ditmoe_cli.diffusion.compute_schedule import ComputeSchedule
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.progress import human_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ditmoe_cli.model.scheduled import ComputeCount

COMPUTED = "computed"  # name of the array in a workspace


@dataclass(frozen=True)
class Computed:
    """What a schedule computed.

    Attributes:
        method: how its table was made.
        flops: the share of the model's operations that was computed, of those without a schedule.
        kept: the most bytes that were kept for later evaluations, an image.
        nfe: the evaluations of an image, all branches and a weaker model counted.
    """

    method: str
    flops: float
    kept: int
    nfe: int

    @property
    def told(self) -> str:
        """It in words, as ``fora:2: 0.523 of the operations, at most 64.0 KiB kept an image``."""
        return f"{self.method}: {self.flops:.3g} of the operations, at most {human_bytes(self.kept)} kept an image"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def parse_computed(document: Mapping[str, Any] | None) -> Computed | None:
    """Read it from JSON; None for None. Raises `KeyError`, `TypeError` or `ValueError` where it is malformed."""
    if document is None:
        return None
    named = (str(document["method"]), float(document["flops"]), int(document["kept"]), int(document["nfe"]))
    return Computed(*named)


def rows_of(count: ComputeCount, images: int) -> NDArray[Any]:
    """Return a row for each image of a batch, (N, 2): operations of all, in the first row, and bytes kept of each."""
    import numpy as np

    rows = np.zeros((images, 2))
    rows[0, 0], rows[:, 1] = count.total, count.most_kept / images
    return rows


def computed_by(schedule: ComputeSchedule, config: DiTMoEConfig, rows: NDArray[Any]) -> Computed:
    """Return what a schedule computed of images, from their rows (N, 2) as in `rows_of`.

    The share is rounded to nine digits, so that it does not depend on how images were divided into batches.
    """
    share = math.fsum(rows[:, 0]) / (len(rows) * schedule.sampling.operations(config))
    return Computed(schedule.method, float(f"{share:.9g}"), round(float(rows[:, 1].max())), schedule.nfe)
