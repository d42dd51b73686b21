"""What experts add, as a routing profile counted it, for rules of slots: E‖γ ⊙ f‖² by bin, branch, block and expert.

A profile saw more tokens than a schedule measures. Its bins are of its own steps: bin b of B takes those of the profile
at the same share of the way. Torch-free but for `profiled_energies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.scheduling.whole_methods import PLANNED

if TYPE_CHECKING:
    from torch import Tensor

_NORMS = "norm_square"


def takes_energies(method: str) -> bool:
    """Return whether a method has thresholds of what experts add."""
    return method == PLANNED or method.partition(":")[0] == "saliency"


def check_profiled(profile: RoutingProfile, config: DiTMoEConfig, guided: bool) -> RoutingProfile:
    """Return a profile that tells what experts add.

    Raises `BadInputError` for one without norms, for one that never asked the null class where that guides, and for a
    model whose router maps rows to experts, of which a profile counts no constants.
    """
    if _NORMS not in profile.tables.optional:
        raise BadInputError(
            f"{profile.path}: has no table {_NORMS!r}, by which thresholds of saliency are chosen; profile again, or "
            "leave ⟨profile⟩ out"
        )
    if guided and not any(any(step) for block in profile.tables.selected for step in block[1]):
        raise BadInputError(
            f"{profile.path}: was made at ⟨cfg⟩ {profile.tables.cfg:g} and never asked the null class, which guides "
            "here; profile with that guidance, or leave ⟨profile⟩ out"
        )
    mapped = next((index for index, block in enumerate(config.blocks) if block.mapped), None)
    if mapped is not None:
        raise BadInputError(
            f"{profile.path}: counts experts, and the router of block {mapped} selects other rows; leave ⟨profile⟩ out"
        )
    return profile


def profiled_energies(profile: RoutingProfile, bins: int) -> Tensor:
    """Return E‖γ ⊙ f‖² (B, 2, L, R); the mean of its bin, branch and block for an expert that no token chose there."""
    import torch

    norms = torch.tensor(profile.tables.table(_NORMS), dtype=torch.float64)  # (L, 2, profile's bins, E)
    counts = torch.tensor(profile.tables.selected, dtype=torch.float64)
    mean = norms.sum(dim=3, keepdim=True) / counts.sum(dim=3, keepdim=True).clamp_min(1)
    energies = torch.where(counts > 0, norms / counts.clamp_min(1), mean)
    own = energies.shape[2]
    places = [min(own - 1, int((b + 0.5) / bins * own)) for b in range(bins)]
    return energies[:, :, places].permute(2, 1, 0, 3).float().contiguous()
