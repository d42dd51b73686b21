"""The size of a profile, known before anything is sampled, and whether this machine can hold it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.staging import check_space
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.progress import readable_bytes
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.counters import Counters
from ditmoe_cli.routing.collect.moments import Moments
from ditmoe_cli.routing.collect.reservoir import reservoir_counts
from ditmoe_cli.routing.profile import BRANCHES


def check_footprint(config: DiTMoEConfig, settings: Calibration, path: Path) -> None:
    """Refuse a calibration whose profile does not fit into memory, or onto the disk of `path`.

    Raises `InfeasibleError`, and `DitmoeError` for the disk.
    """
    collected, kept = collected_bytes(config, settings), reservoir_bytes(config, settings)
    needed, memory = collected + 2 * kept, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:  # tokens are in memory twice where they are put in order
        spec = settings.spec
        raise InfeasibleError(
            f"a profile of {spec.images} images, {settings.bins} bins and a reservoir of {settings.reservoir} tokens "
            f"takes {readable_bytes(needed)} of memory, and this machine has {readable_bytes(memory)}; ask for fewer"
        )
    check_space(path, collected + kept)


def collected_bytes(config: DiTMoEConfig, settings: Calibration) -> int:
    """Return the bytes of counters, moments and final images."""
    images, nowhere = settings.spec.images, torch.device("meta")
    live = Counters(config, images, settings.bins, nowhere).live()
    if not settings.fast:
        live |= Moments(config, settings.bins, nowhere).live()
    return sum(tensor.nbytes for tensor in live.values()) + images * _state_bytes(config)


def reservoir_bytes(config: DiTMoEConfig, settings: Calibration) -> int:
    """Return the bytes of states, and of tokens in bf16 with their γ in fp32."""
    if settings.fast:
        return 0
    branches = 1 if settings.spec.cfg == 1.0 else BRANCHES
    counts = reservoir_counts(settings.spec, settings.bins, config.num_patches, settings.reservoir)
    states = counts.images * settings.bins
    tokens = states * branches * counts.per_state
    width = config.depth * config.hidden_size
    return states * _state_bytes(config) + 2 * tokens * width + 4 * BRANCHES * states * width


def _state_bytes(config: DiTMoEConfig) -> int:
    return 4 * config.in_channels * config.input_size**2
