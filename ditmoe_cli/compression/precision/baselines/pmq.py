"""PMQ, the pre-loading mixed-precision quantisation of MC-MoE: bits by an expert's use and rounding error.

Huang et al. 2024, https://arxiv.org/abs/2410.06270. Each block has a budget of its own. An expert e is one decision,
since its matrices share a width b. The widths of a block minimise the sum over its experts of

    φ_e^α w_e^β ε_eb^γ        α = β = 1, γ = 2
    φ_e   share of tokens that select e
    w_e   Σ_t g_te / tokens, g the routing weight, 0 for tokens that do not select e
    ε_eb  ‖F(u) - F_eb(u)‖_F, of the mixture's output when e alone is rounded to b bits

at calibration tokens u, all of equal weight: neither γ of the block nor guidance enters. Where a block's budget allows,
at least one expert gets the widest and one the second-widest width. Attention and the shared expert get 4 bits,
everything else stays as it is.

The paper's widths are 1, 2 and 3 bits at 1.57 to 2.54 bits per expert. Here three adjacent ones of the allowed widths
are offered: the first that does not fit for all experts, and the two below it, or the three narrowest where there are
no two below. Budgets are in bytes, and each block gets the same share of the difference between its narrowest and its
widest formats; for blocks of one shape that is the same number of bits. As with all methods here, weights are rounded
to the nearest values of formats whose ranges are searched for; the paper takes the ranges of the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.few_widths import DENSE, DENSE_WIDTH, widest_that_fits
from ditmoe_cli.compression.precision.lagrange import Group, Option
from ditmoe_cli.compression.precision.mix import Mix, fitted
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.precision.program import Solution, solve
from ditmoe_cli.compression.replay.original_blocks import OriginalBlock, original_blocks
from ditmoe_cli.compression.replay.rounded_layers import layers_of, rounded
from ditmoe_cli.compression.working_sizes import EXPERT_TOKENS
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.names import in_expert, split_name
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.progress import each
from ditmoe_cli.routing.profile import RoutingTables

ALPHA, BETA, GAMMA = 1.0, 1.0, 2.0
OFFERED = 3  # number of widths that an expert may have

Expert = tuple[int, int]  # block, expert
Members = Mapping[Expert, Sequence[str]]
Changes = Mapping[Expert, Mapping[str, float]]  # ε by width


def choose(request: MixRequest, calibrated: Calibrated) -> Mix:
    """Return the mix of least Σ φ^α w^β ε^γ in each block.

    Raises `InfeasibleError` where no formats fit, and `BadInputError` for a profile without states.
    """
    members = _members(request)
    fixed, experts = request.formats_at(request.weights_of(*DENSE), DENSE_WIDTH), request.weights_of("experts")
    fits = widest_that_fits(request, fixed, experts)
    if not members:
        return Mix(fixed)
    widths = offered(request.widths, fits)
    blocks = _groups(request, members, widths, _costs(request, calibrated, members, widths))
    order = list(members)

    def mix_of(budget: int) -> Mix:
        budgets = shares(blocks, budget)
        chosen = [block_choice(groups, own, widths) for groups, own in zip(blocks, budgets, strict=True)]
        chosen_widths = [widths[o] for solution in chosen for o in solution.choice]
        parts = (request.formats_at(members[expert], width) for expert, width in zip(order, chosen_widths, strict=True))
        formats = {**fixed, **{name: fmt for part in parts for name, fmt in part.items()}}
        failures = dict.fromkeys(failure for solution in chosen for failure in solution.failures)
        return Mix(formats, failures=tuple(failures))

    room = request.limit - request.size(fixed, request.formats_at(experts, widths[0]))
    narrowest = sum(group.options[0].bytes for groups in blocks for group in groups)
    return fitted(mix_of, lambda mix: request.size(mix.formats), request.limit, narrowest, room)


def _members(request: MixRequest) -> dict[Expert, list[str]]:
    """Return the matrices of each expert, block by block."""
    members: dict[Expert, list[str]] = {}
    for name in request.weights_of("experts"):
        parts = split_name(name)
        assert parts.block is not None and parts.expert is not None
        members.setdefault((parts.block, parts.expert), []).append(name)
    return dict(sorted(members.items()))


def offered(widths: Sequence[str], fits: int) -> tuple[str, ...]:
    """Return three adjacent widths: the one after index `fits` and the two below it; fewer where there are fewer."""
    start = max(min(fits + 1, len(widths) - 1) - (OFFERED - 1), 0)
    return tuple(widths[start : start + OFFERED])


def usage(tables: RoutingTables, tokens: int) -> dict[Expert, tuple[float, float]]:
    """Return (φ, w) of each expert, over all `tokens` of all steps and branches."""

    def share(table: Sequence[Sequence[Sequence[float]]], expert: int) -> float:
        return sum(step[expert] for branch in table for step in branch) / tokens

    return {
        (b, e): (share(tables.selected[b], e), share(tables.gate_mass[b], e))
        for b, experts in enumerate(tables.experts)
        for e in range(experts)
    }


def _costs(
    request: MixRequest, calibrated: Calibrated, members: Members, widths: Sequence[str]
) -> dict[Expert, list[float]]:
    """Return φ^α w^β ε^γ of each expert at each width."""
    profile = calibrated.profile
    used = usage(profile.tables, int(profile.tensor("tokens").sum()))
    changes = output_changes(request, calibrated, members, widths)
    return {
        expert: [used[expert][0] ** ALPHA * used[expert][1] ** BETA * changes[expert][w] ** GAMMA for w in widths]
        for expert in members
    }


def output_changes(request: MixRequest, calibrated: Calibrated, members: Members, widths: Sequence[str]) -> Changes:
    """Return ε of each expert in `members` at each width. Raises `BadInputError` for a profile without states."""
    with original_blocks(calibrated) as blocks:
        changes = (_block_changes(block, request, members, widths) for block in blocks)
        return {expert: change for of_block in changes for expert, change in of_block}


def _block_changes(
    original: OriginalBlock, request: MixRequest, members: Members, widths: Sequence[str]
) -> Iterator[tuple[Expert, dict[str, float]]]:
    """Yield ε of one block's experts at each width."""
    u = torch.cat([part.inputs.flatten(0, 1) for part in original.attended])
    moe = original.block.moe
    routing = moe.gate(u)
    own = [expert for expert in members if expert[0] == original.index]
    for expert in each(own, "rounding", "experts", share=0.6):
        choices = [
            layers_of(original.block, original.index, request.formats_at(members[expert], width)) for width in widths
        ]
        module = moe.experts[expert[1]]
        assert isinstance(module, SwiGLU)
        changes = changes_of(module, u, routing.gate_of(expert[1]), choices)
        yield expert, dict(zip(widths, changes, strict=True))


def changes_of(expert: SwiGLU, u: Tensor, gates: Tensor, choices: Iterable[Mapping[nn.Linear, str]]) -> Iterator[float]:
    """Yield ‖g ⊙ (f(u) - f'(u))‖_F of an expert with its layers rounded to each choice of formats.

    `gates` g (T,) is its routing weight at tokens u (T, D), 0 where it was not selected. Where more than
    `EXPERT_TOKENS` tokens selected it, evenly spaced ones are taken.
    """
    used = gates.nonzero().squeeze(1)
    some = used[:: max(-(-len(used) // EXPERT_TOKENS), 1)]
    u, scale = u[some], gates[some].unsqueeze(1)
    before = expert(u)
    for formats in choices:
        with rounded(formats):
            change = scale * (expert(u) - before)
        yield float(change.double().square().sum() * len(used) / max(len(some), 1)) ** 0.5


def _groups(
    request: MixRequest, members: Members, widths: Sequence[str], costs: Mapping[Expert, Sequence[float]]
) -> list[list[Group]]:
    """Return the groups of each block's program: one per expert, with its widths as options."""
    blocks: dict[int, list[Group]] = {}
    for expert, names in members.items():
        options = tuple(
            Option(width, sum(request.sizes.of_weight(n, request.format_at(n, width)) for n in names), cost)
            for width, cost in zip(widths, costs[expert], strict=True)
        )
        blocks.setdefault(expert[0], []).append(Group(in_expert(*expert, "")[:-1], options))
    return list(blocks.values())


def shares(blocks: Sequence[Sequence[Group]], budget: int) -> list[int]:
    """Return each block's share of a budget, in bytes: least + (budget - Σ least) (most - least) / Σ (most - least)."""
    least = [sum(min(option.bytes for option in group.options) for group in groups) for groups in blocks]
    most = [sum(max(option.bytes for option in group.options) for group in groups) for groups in blocks]
    room = max(sum(most) - sum(least), 1)
    spare = min(max(budget - sum(least), 0), room)
    return [low + spare * (high - low) // room for low, high in zip(least, most, strict=True)]


def block_choice(groups: Sequence[Group], budget: int, widths: Sequence[str]) -> Solution:
    """Return the widths of a block's experts, of least cost within `budget` bytes, as indices of `widths`.

    Each of the two widest is given to at least one expert, unless that does not fit or there is one expert only.
    """
    demands = range(len(widths))[-2:] if len(groups) > 1 else ()
    return _least(groups, budget, demands, {}) or solve(groups, budget)


def _least(groups: Sequence[Group], budget: int, demands: Sequence[int], fixed: Mapping[int, int]) -> Solution | None:
    """Return the solution of least error in which each option of `demands` is taken by a group; None where none fits.

    `fixed` holds the options of groups that have no choice. Where the solution lacks a demand, it is fixed for each
    other group in turn.
    """
    options = [group.options if g not in fixed else (group.options[fixed[g]],) for g, group in enumerate(groups)]
    try:
        solution = solve([replace(group, options=own) for group, own in zip(groups, options, strict=True)], budget)
    except InfeasibleError:
        return None
    solution = replace(solution, choice=tuple(fixed.get(g, o) for g, o in enumerate(solution.choice)))
    missing = next((option for option in demands if option not in solution.choice), None)
    if missing is None:
        return solution
    tried = (_least(groups, budget, demands, {**fixed, g: missing}) for g in range(len(groups)) if g not in fixed)
    return min(filter(None, tried), key=lambda each: (each.error, each.bytes), default=None)
