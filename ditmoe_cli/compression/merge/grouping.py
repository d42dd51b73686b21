"""Steps that grouping methods share: groups from labels, centres, and similarities of a block's experts.

E experts form N groups; a cell is a branch and a step bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.compression.merge.inputs import GroupingInputs, Groups
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.routing.measures import mean_of, output_cosine

Array = NDArray[np.float64]


def partition(experts: int, count: int, labels: Callable[[], Iterable[int]]) -> Groups:
    """Return `count` groups of `experts` experts of equal label; `labels()` returns one label per expert.

    It is called only where the count leaves a choice. Raises `InfeasibleError` for a count outside 1..E.
    """
    if not 1 <= count <= experts:
        raise InfeasibleError(f"{experts} experts cannot be merged into {count}; ask for 1 to {experts}")
    if count == 1:
        return (tuple(range(experts)),)
    if count == experts:
        return tuple((expert,) for expert in range(experts))
    members: dict[int, list[int]] = {}
    for expert, label in enumerate(labels()):
        members.setdefault(label, []).append(expert)
    groups = list(members.values())
    while len(groups) < count:  # clusterings leave clusters empty where experts coincide
        groups.append([max(groups, key=len).pop()])
    return tuple(sorted(map(tuple, groups)))


def most_selected(selected: Array, count: int) -> list[int]:
    """Return the `count` experts that are selected most, the most selected first; ties fall to the lower number."""
    ranked: list[int] = np.argsort(-selected, kind="stable")[:count].tolist()
    return ranked


def nearest_centres(centres: list[int], closeness: Array) -> list[int]:
    """Return for each expert the position in `centres` of the closest centre, for a centre its own position.

    `closeness` is (E, N), higher meaning closer; ties fall to the earlier centre.
    """
    closest: list[int] = closeness.argmax(axis=1).tolist()
    own = {centre: position for position, centre in enumerate(centres)}
    return [own.get(expert, position) for expert, position in enumerate(closest)]


def router_similarity(logit_grams: Array) -> Array:
    """Return (E, E) in [0, 1]: (cos + 1) / 2 of the experts' router logits over tokens, cos averaged over cells.

    `logit_grams` (cells, E, E) are sums of l_i l_j. Logits depend on the timestep, so a cosine over all tokens would
    compare timesteps rather than experts. Cells without tokens are left out; without any tokens all are 1/2.
    """
    seen = np.trace(logit_grams, axis1=1, axis2=2) > 0
    cosine = mean_of(output_cosine(logit_grams[seen]).sum(axis=0), seen.sum())
    return (cosine + 1.0) / 2.0


def mean_outputs(inputs: GroupingInputs) -> Array:
    """Return the experts' mean outputs (E, cells, D). Raises `BadInputError` where the profile has none."""
    if inputs.means is None:
        raise BadInputError("grouping by mean outputs needs a profile that keeps tokens; profile without ⟨fast⟩")
    return inputs.means.swapaxes(0, 1).astype(np.float64)
