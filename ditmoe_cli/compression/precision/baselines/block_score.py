"""QuantMoE-Bench's block importance: blocks whose mixtures turn the residual stream most get more bits.

Li et al. 2024, https://arxiv.org/abs/2406.08155. With x (D,) the residual stream that a block's mixture adds to, and
x + γ ⊙ y what it leaves, the block's score is the mean over tokens of

    cos(x, x + γ ⊙ y);

a low score means an important block. The paper trains a predictor of this cosine; here it is measured on calibration
states that run through the original blocks, both guidance branches alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.few_widths import settle, widened
from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.replay.original_blocks import original_blocks
from ditmoe_cli.files.names import split_name


def cosine(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the mean cosine of tokens before and after, parts of (N, P, D) each, over all N and P."""
    parts = [F.cosine_similarity(b.double(), a.double(), dim=-1) for b, a in zip(before, after, strict=True)]
    return sum(float(part.sum()) for part in parts) / sum(part.numel() for part in parts)


def scores(calibrated: Calibrated) -> list[float]:
    """Return each block's cosine. Raises `BadInputError` for a profile without states."""
    with original_blocks(calibrated) as blocks:
        return [cosine([part.residual for part in each.attended], each.outputs) for each in blocks]


def choose(request: MixRequest, calibrated: Calibrated) -> Mix:
    """Return a mix of two adjacent widths that gives blocks of the lowest cosine the wider one.

    Raises `InfeasibleError` where the narrowest formats do not fit, and `BadInputError` for a profile without states.
    """
    fixed, names = settle(request)
    units: dict[int, list[str]] = {}
    for name in names:
        block = split_name(name).block
        assert block is not None  # attention, shared expert and experts are all in blocks
        units.setdefault(block, []).append(name)
    measured = scores(calibrated)
    return widened(request, fixed, [units[block] for block in sorted(units, key=measured.__getitem__)])
