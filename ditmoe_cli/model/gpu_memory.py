"""The memory that a model takes on a GPU, from its stored tensors alone. Torch-free.

Quantised weights stay packed as they are stored; others of attention, experts and modulation are kept in bf16, which
GPUs of compute capability 8.0 or more multiply, and the few that are left in fp32 (`follows_dtype`). Beside them stand
the largest matrix unpacked in fp32, the activations of an image in both branches of guidance (`activation_bytes`), and
what the driver and CUDA's context keep. A VAE that decodes the images is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ditmoe_cli.files.header import FLOATING, TensorInfo
from ditmoe_cli.files.names import ROUTER, split_name
from ditmoe_cli.model.config import DiTMoEConfig, expected_weights
from ditmoe_cli.model.effort import activation_bytes

GIGABYTE = 10**9
RESERVED_BYTES = 700_000_000
"""Assumed of a GPU's memory: what its driver, CUDA's context and the libraries' work space take."""
_HALF_BYTES, _FLOAT_BYTES = 2, 4
_BRANCHES = 2


def follows_dtype(name: str) -> bool:
    """Return whether a weight is kept in the dtype that the model computes in: attention, experts and modulation.

    Others are few and stay fp32: embedders, norms, routers, the final layer.
    """
    parts = split_name(name)
    return not (parts.block is None or parts.rest == ROUTER or "_norm." in parts.rest)


def guided_memory(tensors: Iterable[TensorInfo], config: DiTMoEConfig) -> int:
    """Return the bytes that a GPU needs to sample one guided image with a model of these stored tensors.

    Args:
        tensors: the tensors of its file, packed ones in place of quantised weights.
        config: its configuration, with the widths that they have.
    """
    shapes = expected_weights(config)
    weights = 0
    for info in tensors:
        if info.name in shapes and info.dtype in FLOATING:
            del shapes[info.name]
            weights += info.numel * (_HALF_BYTES if follows_dtype(info.name) else _FLOAT_BYTES)
        else:
            weights += info.nbytes
    packed = (shape for name, shape in shapes.items() if name.endswith(".weight"))
    unpacked = _FLOAT_BYTES * max((math.prod(shape) for shape in packed), default=0)
    return weights + unpacked + activation_bytes(config, _BRANCHES) + RESERVED_BYTES
