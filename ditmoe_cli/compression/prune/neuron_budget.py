"""Widths of experts that share one budget of neurons, over all blocks.

Energies (`camera.energies`) are taken after γ, so that neurons of different blocks compare.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.neurons import DEFAULT_ALPHA, energies, pooled_widths
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import in_expert
from ditmoe_cli.model.expert_weights import read_weight
from ditmoe_cli.model.opened import Checkpoint
from ditmoe_cli.progress import ProgressBar
from ditmoe_cli.routing.profile import RoutingProfile


def neuron_energies(profile: RoutingProfile, block: int, downs: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """Return the energies (H,) of experts, each given as its number in the profile and its W_down (D, H).

    Raises `BadInputError` for a --fast profile, which has none.
    """
    energy, largest = (_table(profile, f"neuron.{name}", block) for name in ("energy", "max"))
    gamma = mean_gamma_square(profile, block)
    found = []
    for expert, down in downs:
        squares, most, scale = (t.to(down.device) for t in (energy[expert], largest[expert], gamma))
        inner = down.shape[1]
        found.append(energies(down, squares[:inner], most[:inner], scale, DEFAULT_ALPHA))
    return found


def mean_gamma_square(profile: RoutingProfile, block: int) -> Tensor:
    """Return E[γ²] (D,) over steps and branches. Raises `BadInputError` for a --fast profile."""
    return _table(profile, "gamma.square", block).sum(dim=(0, 1)) / profile.tensor("gamma.images").sum()


def _table(profile: RoutingProfile, name: str, block: int) -> Tensor:
    if name not in profile.header.tensors:
        raise BadInputError(f"{profile.path}: the profile has no {name!r}; profile again without --fast")
    return profile.block_tensor(name, block)


def shared_widths(
    checkpoint: Checkpoint,
    profile: RoutingProfile,
    keeps: Sequence[tuple[int, ...]],
    ratio: float,
    multiple: int,
    may_go: bool,
    bar: ProgressBar,
) -> list[dict[int, int]]:
    """Return, for each block, how many neurons each expert that stays keeps.

    The experts in `keeps` share ⌊ratio · Σ their widths⌋ neurons, pooled over all blocks, and have at least `multiple`
    each. If they `may_go`, those with none do, but for a block's top-k of highest energy in their best `multiple`
    neurons. Raises `InfeasibleError` where the neurons do not suffice, and `BadInputError` for a --fast profile.
    """
    pool: list[Tensor] = []
    least: list[int] = []
    with bar(f"ranking neurons of {checkpoint.path.name}", len(keeps)) as progress:
        for block, keep in enumerate(keeps):
            downs = [(e, read_weight(checkpoint, in_expert(block, e, "down_proj.weight")).float()) for e in keep]
            found = neuron_energies(profile, block, downs)
            needed = _strongest(found, multiple, checkpoint.config.top_k if may_go else len(keep))
            least += [multiple if i in needed else 0 for i in range(len(keep))]
            pool += found
            progress(1)
    total = int(ratio * sum(map(len, pool)) + 1e-9)  # 0.29 * 100 is 28.999999999999996 in floating point
    widths = iter(pooled_widths(pool, total, multiple, least))
    return [{e: w for e, w in zip(keep, itertools.islice(widths, len(keep)), strict=True) if w} for keep in keeps]


def _strongest(energies: Sequence[Tensor], multiple: int, count: int) -> set[int]:
    """Return the `count` experts whose best `multiple` neurons hold most energy; ties fall to the lower number."""
    held = [float(each.sort(descending=True).values[:multiple].sum()) for each in energies]
    return set(torch.tensor(held, dtype=torch.float64).argsort(descending=True, stable=True)[:count].tolist())
