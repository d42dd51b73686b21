"""The model of a guide, for samplers."""

from __future__ import annotations

from collections.abc import Callable

from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.model.dit import Denoiser
from ditmoe_cli.model.rerouting import with_one_rank


def weak_model(model: Denoiser, guide: Guide | None, load: Callable[[], Denoiser]) -> Denoiser | None:
    """Return the weaker model that guides `model`: another routing of it, or what `load` returns; None without any.

    Another routing shares the model's weights. It is made once, after these are laid out or compiled (`accelerated`).
    """
    if guide is None or guide.scale == 0.0:
        return None
    return load() if guide.rank is None else with_one_rank(model, guide.rank)
