"""Methods that say for the whole model what is computed, one line each, as their authors have them. Torch-free.

| method | every block, in both branches |
|---|---|
| `full` | computes all |
| `fora:N` | computes in every N-th evaluation, reuses all in others (https://arxiv.org/abs/2407.01425) |
| `taylor:N` | the same, extrapolated (https://arxiv.org/abs/2503.06923, of first order) |
| `moeca:N` | the same, routed anew, by outputs of experts (https://arxiv.org/abs/2606.15615) |
| `follow:N` | computes in every N-th evaluation; in others predictions follow the state (`followed_predictions`) |
| `top1`, `regressed` | leaves out all but the first expert; the others by regression on the first |
| `top-p:T`, `saliency:T` | leaves out experts by their threshold (`model/block_choices.py`) |
| `odp`, `saliency` | the same by thresholds of their own, medians of p_2 / p_1 and of p_2² E‖γ ⊙ f‖² in each block |
| `residual:T` | lets images skip the blocks behind the first one, where that changes little |
| `a-sdm` | reuses blocks in some steps, chosen by the program alone (https://arxiv.org/abs/2406.00210) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.block_choices import (
    FOLLOW,
    FULL,
    BlockChoice,
    ComputeTable,
    NullChoice,
    Rule,
    SlotRule,
    full_table,
    parse_choice,
    parse_rule,
    table_of,
)
from ditmoe_cli.model.config import DiTMoEConfig

PLANNED = "planned"
INHERITED = "a-sdm"
_BETWEEN: Mapping[str, str] = {"fora": "reuse", "taylor": "forecast", "moeca": "reuse-slots", "follow": "follow"}
NAMES = (
    *("full", "fora:N", "taylor:N", "moeca:N", "follow:N", "top1", "regressed"),
    *("top-p:T", "saliency", "saliency:T", "odp", "odp:T", "residual:T", "a-sdm"),
)
NEED_STATISTICS = ("regressed", "saliency", "odp")
"""Methods whose rules for slots rest on the model's own states; `odp` where it has no threshold."""
BY_MEDIANS: tuple[Rule, ...] = ("odp", "saliency")
"""Rules whose thresholds are medians of each block, where none is given."""


def check_method(method: str, config: DiTMoEConfig) -> str:
    """Return the method. Raises `UsageError` for one that is unknown, malformed, or without effect on a model."""
    name, _, value = method.partition(":")
    if name in ("full", INHERITED, PLANNED) and not value:
        return method
    if name in _BETWEEN:
        if not (value.isascii() and value.isdigit() and 2 <= int(value) <= 1000):
            raise UsageError(f"⟨method⟩ {method}: give every how many evaluations all is computed, as in {name}:2")
        return method
    if name == "residual":
        _threshold(method, value)
        return method
    try:
        parse_rule(f"{method}:0" if method in BY_MEDIANS else method)
    except ValueError as error:
        raise UsageError(f"⟨method⟩ {error}; there are {', '.join(NAMES)}") from None
    if config.top_k < 2:
        raise UsageError(
            f"⟨method⟩ {method}: the model takes one expert a token, so there is none to leave out; choose fora:N, "
            "taylor:N or residual:T"
        )
    return method


def _threshold(method: str, value: str) -> float:
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold < math.inf:
        raise UsageError(f"⟨method⟩ {method}: give a threshold of at least 0, as in residual:0.15")
    return threshold


def needs_statistics(method: str) -> bool:
    """Return whether the rules of a method rest on the model's own states."""
    return method.partition(":")[0] in NEED_STATISTICS and not method.startswith("odp:")


def whole_table(
    method: str,
    config: DiTMoEConfig,
    sampling: ScheduledSampling,
    median: Callable[[Rule, int], float] = lambda _rule, _block: 0.0,
) -> ComputeTable:
    """Return the table of a method; ``median(rule, block)`` is the threshold of a rule that has none of its own."""
    name, _, argument = method.partition(":")
    if name == "residual":
        return full_table(len(sampling.times), config.depth, sampling.null, float(argument))
    if name in _BETWEEN:
        between, period = parse_choice(_BETWEEN[name]), int(argument)
        computed = [FULL] * config.depth
        if between == FOLLOW:
            return _asked_every(period, config, sampling)
        return _repeated(sampling, lambda place: [between] * config.depth if place % period else computed)
    rule = next((each for each in BY_MEDIANS if each == method), None)
    if rule is not None:
        choices = [BlockChoice(slots=SlotRule(rule, median(rule, block))) for block in range(config.depth)]
        return _repeated(sampling, lambda _: choices)
    return _repeated(sampling, lambda _: [parse_choice(method)] * config.depth)


def _asked_every(period: int, config: DiTMoEConfig, sampling: ScheduledSampling) -> ComputeTable:
    """Return the table in which the model is asked in every `period`-th evaluation."""
    branches = 2 if sampling.null else 1
    choices = [FOLLOW if evaluation % period else FULL for evaluation in range(len(sampling.times))]
    cells = [[[choice] * config.depth] * branches for choice in choices]
    null: list[NullChoice] = ["off" if k % period else choice for k, choice in enumerate(sampling.null)]
    return table_of(cells, null)


def _repeated(sampling: ScheduledSampling, blocks: Callable[[int], Sequence[BlockChoice]]) -> ComputeTable:
    """Return the table whose blocks do in each branch what they are said to in each of its evaluations."""
    branches = 2 if sampling.null else 1
    places = [0] * branches
    cells = []
    for evaluation in range(len(sampling.times)):
        cells.append([blocks(place) for place in places])
        places[0] += 1
        if branches == 2:
            places[1] += sampling.null[evaluation] == "compute"
    return table_of(cells, sampling.null)
