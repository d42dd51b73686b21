"""Drawing some of many terms so that their weighed sum estimates the sum of all.

Terms are drawn by importance: with probability π_i, about proportional to an expected size s_i, and a drawn term x_i is
counted as x_i / π_i. Then Σ_drawn x_i / π_i has the mean Σ x_i whatever the sizes are (Horvitz and Thompson 1952,
https://doi.org/10.1080/01621459.1952.10483446), and a small variance where x_i / s_i varies little: about the squared
coefficient of variation of that ratio over the number of draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 0
_FURTHEST = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Drawn:
    """Terms that were drawn.

    Attributes:
        terms: (m,) indices in rising order; a term may come twice.
        factors: (m,) what each counts for, 1 / π; 0 where there was nothing left to draw.
    """

    terms: Tensor
    factors: Tensor


def drawn(sizes: Tensor, count: int) -> Drawn:
    """Return min(count, n) draws of terms with the expected sizes (n,), which are at least 0; 0 is never drawn.

    π_i = min(1, c s_i), with c such that Σ π_i is `count`, and all π_i = 1 where there are no more terms than that. One
    term is drawn from each of the intervals of length 1 along Σ π_i, at a random place with a fixed seed, so that terms
    from all of the order are drawn. Nothing is asked of the device.
    """
    m = min(count, len(sizes))
    inclusion = _inclusion(sizes.double(), m)
    places = torch.arange(m, dtype=torch.float64)
    places += torch.rand(m, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    terms = torch.searchsorted(inclusion.cumsum(dim=0), places.to(sizes.device), right=True)
    within = terms < len(sizes)
    terms = terms.clamp_max(len(sizes) - 1)
    return Drawn(terms, torch.where(within, inclusion[terms].reciprocal(), 0.0).to(sizes.dtype))


def _inclusion(sizes: Tensor, count: int) -> Tensor:
    """Return π (n,) for `count` draws: min(1, c s) with Σ π = count, or 1 of each s > 0 where these are fewer.

    With the j largest capped, c_j = (count - j) / Σ of the others; the first j is taken whose next size stays below 1.
    """
    if count >= len(sizes):
        return (sizes > 0).double()
    ranked = sizes.sort(descending=True).values
    others = ranked.flip(0).cumsum(dim=0).flip(0)
    free = count - torch.arange(len(sizes), device=sizes.device)
    factors = torch.where(others > 0, free / others, _FURTHEST)
    fits = (factors * ranked <= 1) & (free > 0) | (others == 0)
    first = fits.to(torch.uint8).argmax()
    return torch.where(sizes > 0, (factors[first] * sizes).clamp_max(1.0), 0.0)
