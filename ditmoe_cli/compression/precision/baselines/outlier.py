"""QuantMoE-Bench's outlier score: matrices whose columns have outliers get more bits.

Li et al. 2024, https://arxiv.org/abs/2406.08155. The score of a linear layer W (out, in) is

    max_j  max_i |W_ij| / mean_i |W_ij|,

over input columns j. Matrices, or groups of tied ones, are ranked by it (`widened`). No calibration data is used.
"""

from __future__ import annotations

from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.candidates import ties
from ditmoe_cli.compression.precision.few_widths import settle, widened
from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.progress import phase


def outlier_score(weight: Tensor) -> float:
    """Return max_j max_i |W_ij| / mean_i |W_ij| of a weight (out, in): 1 to out, or 0 where all entries are 0."""
    size = weight.double().abs()
    mean = size.mean(dim=0)
    return float((size.amax(dim=0) / mean).where(mean > 0, 0.0).max())


def choose(request: MixRequest, calibrated: Calibrated) -> Mix:  # noqa: ARG001
    """Return a mix of two adjacent widths that gives matrices of the highest scores the wider one.

    Raises `InfeasibleError` where the narrowest formats do not fit, `BadInputError` for weights that are not finite.
    """
    fixed, names = settle(request)
    scores: dict[str, float] = {}
    units: dict[str, list[str]] = {}
    decisions = ties(names, request.candidates.tied)
    with phase(f"looking for outliers in {request.checkpoint.name}", len(names), "matrices") as progress:
        for name in names:
            score = outlier_score(request.checkpoint.finite_tensor(name))
            units.setdefault(decisions[name], []).append(name)
            scores[decisions[name]] = max(score, scores.get(decisions[name], 0.0))
            progress(1)
    return widened(request, fixed, [units[unit] for unit in sorted(units, key=scores.__getitem__, reverse=True)])
