"""Plans that rest on replayed errors, against the errors of rebuilt blocks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import pytest
from compressing import applied, blocks_of, network, opened, profile_of
from conftest import make_pico
from replaying import error_by_hand

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.methods import SALIENCIES, SEARCHES
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, RouterMode
from ditmoe_cli.compression.prune.pruning import Pruning, plan_prune, plan_replayed
from ditmoe_cli.compression.replay.tokens import BlockTokens, reservoir_tokens
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.routing.profile import RoutingProfile

EXPERTS = 4
PICO = make_pico(hidden=16, input_size=4, widths=((24,) * EXPERTS,) * 3, depth=3)
Made = tuple[Checkpoint, RoutingProfile]
MODES = get_args(RouterMode)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    checkpoint = opened(PICO, tmp_path_factory.mktemp("replayed"))
    return checkpoint, profile_of(checkpoint)


@pytest.fixture(scope="module")
def errors(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, tuple[int, ...], str], float]:
    """The error in the guided output of every block, subset and mode, of checkpoints that are written and read."""
    checkpoint, profile = made
    where, found = tmp_path_factory.mktemp("subsets"), {}
    subsets = [s for n in (2, 3, 4) for s in itertools.combinations(range(EXPERTS), n)]
    tokens = [reservoir_tokens(profile, index) for index in range(3)]
    original = network(checkpoint)
    for number, (subset, mode) in enumerate(itertools.product(subsets, MODES)):
        plan = CompressionPlan("prune", checkpoint.fingerprint, stages=(Experts((BlockPlan(subset, mode),) * 3),))
        changed = network(applied(checkpoint, plan, where / f"{number}.safetensors"))
        for index in range(3):
            pair = (original.blocks[index].moe, changed.blocks[index].moe)
            found[index, subset, mode] = error_by_hand(tokens[index], *pair) * reference(tokens[index], pair[0])
    return found


def reference(tokens: BlockTokens, moe: SparseMoE) -> float:
    """The energy of the original routed output, which replayed errors are relative to."""
    out = moe(tokens.inputs[None], 0, tokens.gamma, None)[0] - moe.shared_experts(tokens.inputs)
    return tokens.energy(out.detach())


Errors = dict[tuple[int, tuple[int, ...], str], float]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_naee_takes_the_subset_of_least_error(count: int, mode: RouterMode, made: Made, errors: Errors) -> None:
    plan = plan_replayed(Calibrated(*made, "cpu"), Pruning(Keep(count=count), "naee", mode))
    for index, block in enumerate(blocks_of(plan)):
        assert block.router == mode and len(block.keep) == count
        least = min(errors[index, s, mode] for s in itertools.combinations(range(EXPERTS), count))
        assert errors[index, block.keep, mode] == pytest.approx(least, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("method", [*SALIENCIES, *SEARCHES])
def test_auto_takes_each_blocks_mode_of_least_error(method: str, made: Made, errors: Errors) -> None:
    plan = plan_replayed(Calibrated(*made, "cpu"), Pruning(Keep(count=2), method, None))
    assert plan.options["router"] == "auto"
    for index, block in enumerate(blocks_of(plan)):
        least = min(errors[index, block.keep, mode] for mode in MODES)
        assert errors[index, block.keep, block.router] == pytest.approx(least, rel=1e-3)
    if method in SALIENCIES:  # what is kept is what the score says, whatever the mode
        plain = plan_prune(*made, Pruning(Keep(count=2), method))
        assert [block.keep for block in blocks_of(plan)] == [block.keep for block in blocks_of(plain)]


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_budget_is_spread_so_that_the_sum_of_errors_is_least(
    mode: RouterMode, made: Made, errors: Errors
) -> None:
    plan = plan_replayed(Calibrated(*made, "cpu"), Pruning(Keep(count=3), "naee", mode, shared_budget=True))
    counts = [len(block.keep) for block in blocks_of(plan)]
    assert sum(counts) == 9 and min(counts) >= 2
    best = {
        (index, n): min(errors[index, s, mode] for s in itertools.combinations(range(EXPERTS), n))
        for index in range(3)
        for n in (2, 3, 4)
    }
    spreads = [spread for spread in itertools.product((2, 3, 4), repeat=3) if sum(spread) == 9]
    least = min(sum(best[index, n] for index, n in enumerate(spread)) for spread in spreads)
    assert sum(errors[i, block.keep, mode] for i, block in enumerate(blocks_of(plan))) == pytest.approx(least, rel=1e-3)
    assert plan.options["allocate"] == "global"


@pytest.mark.parametrize("method", ["reap", "diet"])
def test_a_budget_of_everything_keeps_everything(method: str, made: Made) -> None:
    plan = plan_replayed(Calibrated(*made, "cpu"), Pruning(Keep(ratio=1.0), method, shared_budget=True))
    assert [block.keep for block in blocks_of(plan)] == [tuple(range(EXPERTS))] * 3


def test_planning_twice_is_planning_once(made: Made) -> None:
    pruning = Pruning(Keep(count=3), "diet", None, shared_budget=True)
    assert plan_replayed(Calibrated(*made, "cpu"), pruning) == plan_replayed(Calibrated(*made, "cpu"), pruning)


def test_replaying_takes_a_reservoir_of_the_same_checkpoint(made: Made, tmp_path: Path) -> None:
    checkpoint = opened(PICO, tmp_path)
    pruning = Pruning(Keep(count=3), "naee")
    for more, said in (({"fast": True}, "without fast"), ({"reservoir": 0}, "with a larger reservoir")):
        profile = profile_of(checkpoint, said.split()[-1].strip("-"), **more)  # type: ignore[arg-type]
        with pytest.raises(BadInputError, match=rf"{profile.path.name}: keeps no tokens.*{said}"):
            plan_replayed(Calibrated(checkpoint, profile, "cpu"), pruning)
    other = opened(
        make_pico(hidden=16, input_size=4, widths=((24,) * 4,) * 3, depth=3, seed=1), tmp_path, "b.safetensors"
    )
    with pytest.raises(BadInputError, match="another checkpoint"):
        plan_replayed(Calibrated(other, made[1], "cpu"), pruning)
    with pytest.raises(InfeasibleError, match="top-2"):
        plan_replayed(Calibrated(*made, "cpu"), Pruning(Keep(count=1), "naee"))
