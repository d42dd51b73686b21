"""Steps that methods of few widths share: dense weights first, then the widest that the budget allows. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.model.parameters import WeightGroup

DENSE: tuple[WeightGroup, ...] = ("attn", "shared")  # weights that every token uses
DENSE_WIDTH = "4"  # their width in MC-MoE


def widest_that_fits(request: MixRequest, fixed: Mapping[str, str], names: Sequence[str]) -> int:
    """Return the index in `MixRequest.widths` of the widest width that fits for all of `names`, beside `fixed`.

    Raises `InfeasibleError` with the least bytes where no width fits.
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
    """Return the formats that are fixed from the start, and the weights that remain to be decided.

    The groups `settled` get `DENSE_WIDTH`, as attention and the shared expert do in MC-MoE. Where even the narrowest
    formats of the others do not fit beside that, nothing is fixed.
    """
    dense = request.weights_of(*settled)
    rest = request.weights_of("experts", *(group for group in DENSE if group not in settled))
    fixed = request.formats_at(dense, DENSE_WIDTH)
    if request.size(fixed, request.formats_at(rest, request.widths[0])) <= request.limit:
        return fixed, rest
    return {}, [*rest, *dense]


def widened(request: MixRequest, fixed: Mapping[str, str], units: Sequence[Sequence[str]]) -> Mix:
    """Return the mix that gives the first n units of weights the wider of two widths, and the rest the narrower.

    Units come most important first. The narrower width is the widest that fits for all, the wider is the next one of
    `MixRequest.widths`; n is the largest that the budget allows. Files grow with n.
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
    """Return ``formats(n)`` of the largest n below `too_many` whose file fits the budget, else ``formats(0)``.

    Files grow with n.
    """
    fits = 0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if request.size(formats(middle)) <= request.limit else (fits, middle)
    return formats(fits)
