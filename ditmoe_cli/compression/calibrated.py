"""A checkpoint with what computing on its calibration data takes: the group that measurements and fits are given."""

from __future__ import annotations

from dataclasses import dataclass

from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint and its calibration data.

    Attributes:
        checkpoint: the checkpoint.
        profile: a routing profile of it, or of an ancestor.
        device: the device to compute on.
    """

    checkpoint: Checkpoint
    profile: RoutingProfile
    device: str
