"""The device of tests marked ``cuda``."""

from __future__ import annotations

import os

import torch

TRIED_ON = os.environ.get("DITMOE_TEST_DEVICE", "cuda")
"""A GPU, or what the variable names: ``cpu`` tries most of these tests on a machine without one."""


def can_try() -> bool:
    """Whether tests marked ``cuda`` can run here."""
    return TRIED_ON == "cpu" or torch.cuda.is_available()
