"""The device that a name means, and what is computed in on it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache

from ditmoe_cli.api.notes import note, note_nothing
from ditmoe_cli.diffusion.automatic_dtype import chosen_dtype
from ditmoe_cli.errors import UsageError, first_line
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import AUTO, Dtype, parse_dtype
from ditmoe_cli.model.throughput import likely_device
from ditmoe_cli.processes import first_process, own_device


def named_device(name: str) -> str:
    """Return the name of a device. Raises `ValueError` for none of torch's, as far as it can be told without torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("choose auto, cpu, cuda or cuda:N")
    return name


def checked_device(name: str) -> str:
    """Return the name of a device, for ``auto`` the one to use. Raises `UsageError` where it cannot be used here."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # fp32 convolutions are fp32, in every thread
    if name == "auto":
        return best_device()
    try:
        device = torch.device(own_device(name))
        if device.type not in ("cpu", "cuda"):
            raise ValueError("choose auto, cpu, cuda or cuda:N")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels of Triton start on the current one
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"⟨device⟩ {name}: not usable here ({str(error).splitlines()[0][:100]})") from None
    return str(device)


@cache
def best_device() -> str:
    """Return ``cuda`` where torch can compute on it, else ``cpu``; say which where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    device = own_device("cuda")
    try:
        torch.empty(1, device=device)
        name = torch.cuda.get_device_name(device)
    except (RuntimeError, AssertionError) as error:
        note(f"the GPU cannot be used ({first_line(error)[:100]}); computing on the cpu")
        return "cpu"
    if os.environ.get("RANK", "0") == "0":
        note(f"computing on {device} ({name})")
    return device


def dtype_on(name: str, device: str, measures: bool = True) -> Callable[[Checkpoint], Dtype]:
    """Return what gives a checkpoint's dtype on a device; ``auto`` is chosen for the first, and holds for all.

    Without `measures`, as for dry runs, it is chosen without computing anything.
    """
    chosen: list[Dtype] = [] if name == AUTO else [parse_dtype(name)]

    def dtype_of(checkpoint: Checkpoint) -> Dtype:
        if not chosen:
            tell = note if first_process() else note_nothing
            chosen.append(chosen_dtype(checkpoint, own_device(likely_device(device)), measures, tell))
        return chosen[0]

    return dtype_of
