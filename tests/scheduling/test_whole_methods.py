"""Methods for the whole model: their tables by hand, the names that are known, and those that are refused."""

from __future__ import annotations

import pytest
from conftest import make_pico

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model.block_choices import check_table, full_table
from ditmoe_cli.scheduling.whole_methods import NAMES, check_method, needs_statistics, whole_table

CONFIG = make_pico(sampler="rf").config
TOP1 = make_pico(sampler="rf", top_k=1).config
WAY = ScheduledSampling("euler", 5)
GUIDED = ScheduledSampling("euler", 5, 2.0, (0.3, 0.9))  # at times 0.8, 0.6 and 0.4
NEEDLESS = ("planned", "full", "a-sdm", "residual:0.15", "fora:2", "taylor:3", "moeca:5", "follow:2")
OF_SLOTS = ("top1", "regressed", "top-p:0.4", "saliency", "saliency:0.1", "odp", "odp:0.5")


def texts(method: str, way: ScheduledSampling = WAY, branch: int = 0, block: int = 0) -> list[str]:
    medians = {"odp": 0.25, "saliency": 0.5}
    table = whole_table(method, CONFIG, way, lambda rule, block: medians[rule] * (block + 1))
    return [table.at(k, branch, block).text for k in range(table.evaluations)]


@pytest.mark.parametrize(("method", "between"), [("fora", "reuse"), ("taylor", "forecast"), ("moeca", "reuse-slots")])
def test_every_nth_evaluation_computes(method: str, between: str) -> None:
    assert texts(f"{method}:2") == ["full", between, "full", between, "full"]
    assert texts(f"{method}:3") == ["full", between, between, "full", between]
    assert texts(f"{method}:3", block=1) == texts(f"{method}:3")
    assert texts(f"{method}:1000") == ["full", *[between] * 4]


def test_the_null_branch_counts_its_own_predictions() -> None:
    assert GUIDED.null == ("off", "compute", "compute", "compute", "off")
    assert texts("fora:2", GUIDED) == ["full", "reuse", "full", "reuse", "full"]
    assert texts("fora:2", GUIDED, branch=1)[1:4] == ["full", "reuse", "full"]


def test_the_others() -> None:
    assert whole_table("full", CONFIG, WAY) == full_table(5, 2)
    assert set(texts("top1")) == {"top1"} and set(texts("regressed")) == {"regressed"}
    assert set(texts("top-p:0.4")) == {"top-p:0.4"} and set(texts("saliency:0.1")) == {"saliency:0.1"}
    assert set(texts("odp:0.5")) == {"odp:0.5"}
    assert set(texts("odp")) == {"odp:0.25"} and set(texts("odp", block=1)) == {"odp:0.5"}
    assert set(texts("saliency")) == {"saliency:0.5"} and set(texts("saliency", block=1)) == {"saliency:1.0"}
    residual = whole_table("residual:0.15", CONFIG, GUIDED)
    assert (residual.residual, {c.text for c in residual.choices}) == (0.15, {"full"})
    assert residual.null == GUIDED.null


def test_the_model_is_asked_in_every_nth_evaluation_of_both_branches() -> None:
    table = whole_table("follow:3", CONFIG, GUIDED)
    for branch in (0, 1):
        assert texts("follow:3", GUIDED, branch) == ["full", "follow", "follow", "full", "follow"]
    assert table.null == ("off", "off", "off", "compute", "off") and table.followed == (1, 2, 4)


@pytest.mark.parametrize("method", [*NEEDLESS[1:2], *NEEDLESS[3:], *OF_SLOTS])
@pytest.mark.parametrize("way", [WAY, GUIDED, ScheduledSampling("heun", 4, 1.5)], ids=lambda way: way.told)
def test_tables_can_be_carried_out(method: str, way: ScheduledSampling) -> None:
    table = check_table(whole_table(method, CONFIG, way))
    assert table.evaluations == len(way.times)
    assert all(
        mine in (full, "off" if table.follows(k) else full)
        for k, (mine, full) in enumerate(zip(table.null, way.null, strict=True))
    )


@pytest.mark.parametrize("method", [*NEEDLESS, *OF_SLOTS])
def test_known_names(method: str) -> None:
    assert check_method(method, CONFIG) == method


def test_which_rest_on_states() -> None:
    assert {method for method in (*NEEDLESS, *OF_SLOTS) if needs_statistics(method)} == {
        "regressed",
        "saliency",
        "saliency:0.1",
        "odp",
    }


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("fora", "method fora: give every how many evaluations all is computed, as in fora:2"),
        ("fora:1", "method fora:1: give every"),
        ("fora:0", "as in fora:2"),
        ("fora:-2", "as in fora:2"),
        ("fora:2.5", "as in fora:2"),
        ("fora:²", "as in fora:2"),
        ("taylor:x", "as in taylor:2"),
        ("moeca:1001", "as in moeca:2"),
        ("residual", "method residual: give a threshold of at least 0, as in residual:0.15"),
        ("residual:nan", "at least 0"),
        ("residual:-1", "at least 0"),
        ("residual:inf", "at least 0"),
        ("top-p", "'top-p': needs threshold; there are full, fora:N,"),
        ("top-p:", "'top-p:': a threshold is a finite number of at least 0"),
        ("top-p:much", "'top-p:much': a threshold is a finite number of at least 0"),
        ("saliency:-1", "a threshold is a finite number of at least 0"),
        ("odp:nan", "a threshold is a finite number of at least 0"),
        ("top1:2", "'top1:2': has no threshold"),
        ("full:2", "'full:2': is no choice of a block"),
        ("planned:2", "is no choice"),
        ("a-sdm:2", "is no choice"),
        ("deepcache", f"'deepcache': is no choice of a block; there are {', '.join(NAMES)}"),
        ("", "'': is no choice"),
        ("skip", "'skip': is no choice"),
    ],
)
def test_refusals(method: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_method(method, CONFIG)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("method", OF_SLOTS)
def test_one_expert_a_token_has_no_slots_to_leave_out(method: str) -> None:
    with pytest.raises(UsageError, match="the model takes one expert a token, so there is none to leave out"):
        check_method(method, TOP1)
    assert all(check_method(other, TOP1) for other in NEEDLESS)
