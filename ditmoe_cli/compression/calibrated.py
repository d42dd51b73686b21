"""A checkpoint with what computing on its calibration data takes: the group that measurements and fits are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import parse_dtype, recorded_dtype, torch_dtype_of
from ditmoe_cli.routing.profile import RoutingProfile

if TYPE_CHECKING:
    import torch

    from ditmoe_cli.compression.replay.kept_measures import KeptMeasures


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint and its calibration data.

    Attributes:
        checkpoint: the checkpoint.
        profile: a routing profile of it, or of an ancestor.
        device: the device to compute on.
        kept: measurements that are kept beside the profile; None keeps none.
    """

    checkpoint: Checkpoint
    profile: RoutingProfile
    device: str
    kept: KeptMeasures | None = field(default=None, kw_only=True)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute attention and experts in: that of the calibration."""
        return torch_dtype_of(parse_dtype(recorded_dtype(self.profile.calibration)))
