"""CAMERA-Q: neurons of experts in groups of widths by their energy (Xu et al. 2025, https://arxiv.org/abs/2508.02322).

A neuron with its row of W_gate and W_up and its column of W_down is a micro-expert. The paper ranks all micro-experts
of a block's routed and shared experts by their energy (`compression.algebra.neurons`) and gives the first 10 % 8 bits,
the next 30 % 4 bits and the others 2 bits. So rows and columns of one matrix have different widths; to store them in
consecutive pieces, an expert's neurons are put in the order of their energy first.

Budget: the last group has the widest width b that fits for all neurons, the other two the next two of
`MixRequest.widths` below 16 bits. The first two groups together have a share s of a block's neurons, the first a
quarter of that, as in the paper, where s is 40 %. s is as large as the budget allows, in steps of single units, and
the same in all blocks up to one step.

Units: columns of down that share a scale should share a width too, or pieces would take more scales than the whole. So
an expert's neurons, highest energy first, are cut into units of the group size, the last of which takes the rest; units
are ranked by their mean energy, and a unit belongs to the group that its middle falls into. Experts of a single unit
have one width.

Attention gets 4 bits, as in the other baselines here, or b where that leaves too little; all else stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.few_widths import most_that_fits, settle, widest_that_fits
from ditmoe_cli.compression.precision.mix import UNTOUCHED, Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.precision.trial import try_formats
from ditmoe_cli.compression.replay.neuron_energies import measured_energies
from ditmoe_cli.compression.replay.neuron_order import expert_stem, has_pieces, orders_of
from ditmoe_cli.formats.pieces import Pieces, neuron_axis
from ditmoe_cli.formats.registry import parse_format

FIRST_OF_WIDER = 0.25  # 10 % of 40 %


@dataclass(frozen=True)
class Unit:
    """Neurons of one expert that share a width: their number, and their mean energy."""

    expert: str
    neurons: int
    energy: float


@dataclass(frozen=True)
class Step:
    """The move of a unit into the next wider group, at the share s of neurons in the wider groups."""

    share: float
    block: int
    group: int
    expert: str


def choose(request: MixRequest, calibrated: Calibrated) -> Mix:
    """Return a mix that gives the same share of each block's neurons, those of highest energy, wider formats.

    Raises `InfeasibleError` where the narrowest formats do not fit, and `BadInputError` for a profile without states.
    """
    fixed, names = settle(request, ("attn",))
    widths = tuple(width for width in request.widths if width != UNTOUCHED)
    index = widest_that_fits(request, fixed, names)
    if index >= len(widths) - 1:
        return Mix({**fixed, **request.formats_at(names, (widths or request.widths)[-1])})
    widths = widths[index : index + 3]
    pool = {name: expert for name in names if (expert := expert_stem(name)) is not None}
    fixed = {**fixed, **request.formats_at([name for name in names if name not in pool], widths[0])}
    energies = measured_energies(calibrated)
    ranked, size = set(pool.values()), request.candidates.group_size
    blocks = [
        [unit for expert, each in block.items() if expert in ranked for unit in units_of(expert, each, size)]
        for block in energies
    ]
    taken = steps(blocks, len(widths))

    def formats(n: int) -> dict[str, str]:
        groups = grouped(blocks, taken[:n])
        chosen = {name: matrix_format(request, name, groups[expert], widths) for name, expert in pool.items()}
        return {**fixed, **{name: fmt for name, fmt in chosen.items() if fmt is not None}}

    chosen = most_that_fits(request, formats, len(taken) + 1)
    tried_error = try_formats(calibrated, chosen, orders_of(energies, chosen)).error
    cut = any(has_pieces(chosen, expert) for expert in pool.values())
    return Mix(chosen, tried_error=tried_error, ordering="camera" if cut else None)


def units_of(expert: str, energies: Tensor, size: int) -> list[Unit]:
    """Return an expert's neurons (H,) in units of `size`, those of highest energy first.

    The last unit takes the rest, up to twice `size`; fewer neurons than that are a single unit.
    """
    ranked = energies.double().sort(descending=True).values
    count = max(len(ranked) // size, 1)
    sizes = [size] * (count - 1) + [len(ranked) - size * (count - 1)]
    return [Unit(expert, len(part), float(part.mean())) for part in ranked.split(sizes)]  # type: ignore[no-untyped-call]


def steps(blocks: Sequence[Sequence[Unit]], groups: int) -> list[Step]:
    """Return the moves of all blocks' units from the narrowest of `groups` groups to wider ones, by rising share s.

    A unit whose middle lies at the share m of a block's neurons, ranked by energy, enters the second group where s
    exceeds m, and the widest of three where s / 4 does. Moves above s = 1 are left out.
    """
    moves = []
    for block, units in enumerate(blocks):
        ranked = sorted(units, key=lambda unit: -unit.energy)
        total, before = sum(unit.neurons for unit in units), 0
        for unit in ranked:
            middle = (before + unit.neurons / 2) / total
            shares = (middle, middle / FIRST_OF_WIDER)[: groups - 1]
            moves += [Step(share, block, g, unit.expert) for g, share in enumerate(shares, 1) if share <= 1]
            before += unit.neurons
    return sorted(moves, key=lambda step: (step.share, step.block, step.group))


def grouped(blocks: Sequence[Sequence[Unit]], taken: Sequence[Step]) -> dict[str, list[tuple[int, int]]]:
    """Return, for each expert, its groups as (group, number of neurons), the widest first.

    The steps of an expert move its units in their order, from the first on.
    """
    sizes: dict[str, list[int]] = {}
    for unit in itertools.chain.from_iterable(blocks):
        sizes.setdefault(unit.expert, []).append(unit.neurons)
    moved: dict[str, dict[int, int]] = {expert: {} for expert in sizes}
    for step in taken:
        moved[step.expert][step.group] = moved[step.expert].get(step.group, 0) + 1
    neurons_of_groups = {}
    for expert, units in sizes.items():
        group = [sum(i < moves for moves in moved[expert].values()) for i in range(len(units))]
        runs = itertools.groupby(zip(group, units, strict=True), key=lambda pair: pair[0])
        neurons_of_groups[expert] = [(g, sum(neurons for _, neurons in run)) for g, run in runs]
    return neurons_of_groups


def matrix_format(
    request: MixRequest, name: str, groups: Sequence[tuple[int, int]], widths: Sequence[str]
) -> str | None:
    """Return the format of a matrix whose neurons are in `groups`: in pieces unless all neurons get the same format.

    None where the matrix stays as it is.
    """
    counts: dict[str | None, int] = {}
    for group, neurons in groups:
        fmt = request.format_at(name, widths[group])
        counts[fmt] = counts.get(fmt, 0) + neurons
    formats = tuple(fmt for fmt in counts if fmt is not None)
    if len(counts) == 1 or not formats:
        return next(iter(counts))
    assert len(formats) == len(counts)  # either all widths below 16 bits suit a weight, or none does
    return Pieces(neuron_axis(name), tuple(map(parse_format, formats)), tuple(counts.values())).name
