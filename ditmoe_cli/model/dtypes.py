"""The dtype that a model computes in: asked for, or chosen by the machine and a measurement of the checkpoint.

Attention and experts compute in it; the stream between blocks, norms, modulation, routing and the sum over experts stay
fp32 whatever it is, so that the same tokens go to the same experts as far as their values allow.

``auto`` is bf16 where the device has it in hardware, the model is wide enough to gain by it, and one evaluation of
noise in bf16 differs from that in fp32 by at most `MOST_DIFFERENCE`; else fp32, which is told where it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ditmoe_cli.files.cache import keep_number, kept_numbers, torch_version
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.progress import phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ditmoe_cli.model.offload import OffloadedDiTMoE

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")
AUTO = "auto"

MOST_DIFFERENCE = 0.03  # ‖v_bf16 - v_fp32‖ / ‖v_fp32‖ of predictions that ``auto`` accepts
NARROWEST = 384  # width from which products in bf16 are faster by more than casting costs
_IMAGES, _SEED = 2, 0  # of noise, that the difference is measured on
_FILE = "dtypes.json"  # of the cache
_NOT_FINITE = 1e30  # for predictions that are not finite, since JSON holds neither NaN nor infinity
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64 and, the last, of Arm


def parse_dtype(name: str) -> Dtype:
    """Return a dtype by its name. Raises `ValueError` for others."""
    if name not in DTYPES:
        raise ValueError(f"choose {', '.join(DTYPES)}")
    return name


def recorded_dtype(settings: Mapping[str, Any]) -> Any:
    """Return what settings in a file name as their dtype, unchecked; those of older versions name none: fp32."""
    return settings.get("dtype", "fp32")


def torch_dtype_of(name: Dtype) -> torch.dtype:
    """Return torch's dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def has_bf16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether a device multiplies bf16 in hardware: CPUs by their flags, GPUs by compute capability 8.0.

    Takes torch for a GPU alone.
    """
    if device.startswith("cuda"):
        import torch

        with suppress(RuntimeError, AssertionError):  # of a GPU that is not there, which is told where it is used
            return torch.cuda.is_available() and torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
        return False
    with suppress(OSError):
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        return bool(_CPU_FLAGS & set(flags.split()))
    return False


def chosen_dtype(
    checkpoint: Checkpoint, device: str, measures: bool = True, note: Callable[[str], None] = lambda _: None
) -> Dtype:
    """Return the dtype that ``auto`` is for a checkpoint on a device; `note` takes why bf16 was measured not to do.

    The difference is measured where it is not known, and kept in the cache; without `measures`, as for dry runs, which
    take no torch, an unknown one counts as small, and a GPU as one that has bf16.
    """
    if checkpoint.config.hidden_size < NARROWEST:
        return "fp32"
    if (measures or not device.startswith("cuda")) and not has_bf16(device):
        return "fp32"
    known = kept_numbers(_FILE).get(_key(checkpoint, device))
    if known is None and measures:
        known = measured_difference(checkpoint, device, "bf16")
        keep_number(_FILE, _key(checkpoint, device), known)
    if known is None or known <= MOST_DIFFERENCE:
        return "bf16"
    far = "are not finite" if known == _NOT_FINITE else f"differ by {known:.1%}, more than {MOST_DIFFERENCE:.0%}"
    note(f"computing {checkpoint.name} in fp32: its predictions in bf16 {far}")
    return "fp32"


def measured_difference(checkpoint: Checkpoint, device: str, dtype: Dtype) -> float:
    """Return ‖v - v_fp32‖ / ‖v_fp32‖ of predictions v in a dtype, for noise at a time in the middle of the range.

    1e30 where predictions are not finite.
    """
    import torch

    from ditmoe_cli.model.offload import OffloadedDiTMoE

    with phase(f"comparing {dtype} with fp32", 2, "passes") as progress, torch.inference_mode():
        predictions = []
        for kind in (torch.float32, torch_dtype_of(dtype)):
            model = OffloadedDiTMoE(checkpoint, torch.device(device), _IMAGES, _IMAGES, dtype=kind)
            predictions.append(_prediction(model))
            progress(1)
    exact, rounded = predictions
    difference = float((rounded - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return difference if math.isfinite(difference) else _NOT_FINITE


def _prediction(model: OffloadedDiTMoE) -> Tensor:
    """Return what a model predicts for noise, in fp64."""
    import torch

    config = model.config
    shape = (_IMAGES, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(model.device)
    labels = torch.arange(_IMAGES, device=model.device) % config.num_classes
    return model.prepared([config.middle_time], labels)(x, config.middle_time).double()


def _key(checkpoint: Checkpoint, device: str) -> str:
    return f"{checkpoint.fingerprint} {device.partition(':')[0]} torch {torch_version()}"
