"""Steps that methods with few widths share: what is settled first, and the most that the budget allows. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.parameters import WeightGroup

DENSE: tuple[WeightGroup, ...] = ("attn", "shared")  # weights that every token uses
DENSE_WIDTH = "4"  # their width in MC-MoE


def widest_that_fits(request: MixRequest, fixed: Mapping[str, str], names: Sequence[str]) -> int:
    """Return the index in `MixRequest.widths` of the widest width that all of `names` can have beside `fixed`.

    Raises `InfeasibleError` with the least bytes where none fits.
    """
    size = 0
    for index in reversed(range(len(request.widths))):
        size = request.size(fixed, request.formats_at(names, request.widths[index]))
        if size <= request.limit:
            return index
    raise InfeasibleError(
        f"the budget is {request.limit:,} bytes, and the narrowest formats of this method take {size:,}; give more"
    )


def settle(request: MixRequest, settled: Sequence[WeightGroup] = DENSE) -> tuple[dict[str, str], list[str]]:
    """Return formats that stand from the start, and the weights that are left to decide.

    The groups of `settled`, of attention and the shared expert, get `DENSE_WIDTH`, as in MC-MoE; where even the
    narrowest formats of the others do not fit beside that, they are left to decide too.
    """
    dense = request.weights_of(*settled)
    rest = request.weights_of("experts", *(group for group in DENSE if group not in settled))
    fixed = request.formats_at(dense, DENSE_WIDTH)
    if request.size(fixed, request.formats_at(rest, request.widths[0])) <= request.limit:
        return fixed, rest
    return {}, [*rest, *dense]


def widened(request: MixRequest, fixed: Mapping[str, str], units: Sequence[Sequence[str]]) -> Mix:
    """Give the first n units of weights, most important first, the wider of two widths, and the rest the narrower.

    The narrower is the widest that all can have within the budget, the wider the next one of `MixRequest.widths`; n is
    the largest that the budget allows. Files grow with n.
    """
    names = [name for unit in units for name in unit]
    index = widest_that_fits(request, fixed, names)
    if index == len(request.widths) - 1:
        return Mix({**fixed, **request.formats_at(names, request.widths[index])})
    narrow, wide = (request.formats_at(names, width) for width in request.widths[index : index + 2])

    def formats(n: int) -> dict[str, str]:
        first = {name for unit in units[:n] for name in unit}
        chosen = {name: (wide if name in first else narrow).get(name) for name in names}
        return {**fixed, **{name: fmt for name, fmt in chosen.items() if fmt is not None}}

    return Mix(most_that_fits(request, formats, len(units)))


def most_that_fits(request: MixRequest, formats: Callable[[int], dict[str, str]], too_many: int) -> dict[str, str]:
    """Return ``formats(n)`` of the largest n below `too_many` whose file the budget allows, else of 0.

    Files grow with n.
    """
    fits = 0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if request.size(formats(middle)) <= request.limit else (fits, middle)
    return formats(fits)
