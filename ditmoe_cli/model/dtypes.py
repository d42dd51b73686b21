"""The dtypes that a model computes in.

Attention and experts compute in it; the stream between blocks, norms, modulation, routing and the sum over experts stay
fp32 whatever it is, so that the same tokens go to the same experts as far as their values allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")
AUTO = "auto"


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


def relative_difference(found: Tensor, exact: Tensor) -> float:
    """Return ‖found - exact‖ / ‖exact‖ of tensors of any one shape, in fp64."""
    import torch

    wide = exact.double()
    return float((found.double() - wide).norm() / wide.norm().clamp_min(torch.finfo(torch.float64).tiny))
