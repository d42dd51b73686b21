"""Settings of guidance by a weaker model: when it takes an evaluation, how it is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Pico, make_pico

from ditmoe_cli.diffusion.weak_guidance import (
    Guidance,
    Guide,
    check_guide,
    check_guide_settings,
    parse_guide,
)
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_evaluations_at_a_time_are_those_of_all_branches(family: str) -> None:
    full = 1.0 if family == "rf" else 999.0
    guidance = Guidance(family, 2.0, (0.2, 0.5), Guide("top1", 0.5, (0.4, 0.8)))  # type: ignore[arg-type]
    counts = [guidance.evaluations(level * full) for level in (0.1, 0.3, 0.45, 0.7, 0.9)]
    assert counts == [1, 2, 3, 2, 1]


def test_a_scale_of_zero_takes_no_evaluation() -> None:
    assert not Guidance("rf", guide=Guide("top1", 0.0)).takes_weak(0.5)
    assert not Guidance("rf").takes_weak(0.5)
    assert Guidance("rf", guide=Guide("top1", 0.1)).takes_weak(0.5)


def test_guides_are_read_as_they_were_written() -> None:
    for guide in (Guide("rank2", 0.5), Guide("ab" * 32, 2.0, (0.25, 0.75)), None):
        assert parse_guide(json.loads(json.dumps(guide.to_json() if guide else None))) == guide
    for change in ({"model": 3}, {"scale": "wide"}, {"interval": [0.1]}, {"interval": None}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            parse_guide({**Guide("top1", 1.0).to_json(), **change})


@pytest.mark.parametrize("scale", [-0.5, NAN, INF])
def test_scales_out_of_range_are_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="guide_scale"):
        check_guide_settings(Guide("top1", scale))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.1, 1.5), (NAN, 1.0)])
def test_noise_levels_out_of_order_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="guide_interval"):
        check_guide_settings(Guide("top1", 1.0, interval))


def saved(folder: Path, name: str, model: Pico) -> Checkpoint:
    return open_checkpoint(model.save(folder / f"{name}.safetensors"))


def test_weaker_checkpoints_may_have_other_blocks_widths_and_patches(tmp_path: Path) -> None:
    strong = saved(tmp_path, "strong", make_pico(sampler="rf"))
    for name, changes in {
        "shallow": {"depth": 1},
        "narrow": {"hidden": 16},
        "coarse": {"patch": 4},
        "few": {"experts": 2},
        "others": {"seed": 1},
        "plain": {"null_class": False},
    }.items():
        weak = saved(tmp_path, name, make_pico(sampler="rf", **changes))  # type: ignore[arg-type]
        check_guide(Guide(weak.fingerprint, 0.5), strong, weak)
    check_guide(Guide("rank2", 0.5), strong, None)
    check_guide(None, strong, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": "ddpm"}, "sampler ddpm instead of rf"),
        ({"in_channels": 3}, "in_channels 3 instead of 4"),
        ({"input_size": 4}, "input_size 4 instead of 8"),
        ({"num_classes": 5}, "num_classes 5 instead of 3"),
    ],
)
def test_a_checkpoint_of_another_kind_cannot_guide(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    strong = saved(tmp_path, "strong", make_pico(sampler="rf"))
    weak = saved(tmp_path, "weak", make_pico(**{"sampler": "rf", **changes}))  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=rf"weak.safetensors: cannot guide .*{said}.*; give a weaker copy"):
        check_guide(Guide(weak.fingerprint, 0.5), strong, weak)


def test_a_checkpoint_does_not_guide_itself(tmp_path: Path) -> None:
    strong = saved(tmp_path, "strong", make_pico(sampler="rf"))
    again = saved(tmp_path, "again", make_pico(sampler="rf"))
    with pytest.raises(BadInputError, match=r"again\.safetensors: is the checkpoint that it would guide"):
        check_guide(Guide(again.fingerprint, 0.5), strong, again)


def test_the_checkpoint_that_guides_must_be_the_one_that_is_named(tmp_path: Path) -> None:
    strong, weak = (saved(tmp_path, name, make_pico(sampler="rf", seed=seed)) for seed, name in enumerate("ab"))
    for given in (None, weak):
        with pytest.raises(BadInputError, match="guided by the checkpoint of fingerprint ffffffffffff…; give that one"):
            check_guide(Guide("f" * 64, 0.5), strong, given)


@pytest.mark.parametrize("routing", ["top1", "rank2"])
def test_one_expert_a_token_leaves_no_other_routing(tmp_path: Path, routing: str) -> None:
    strong = saved(tmp_path, "strong", make_pico(sampler="rf", top_k=1))
    with pytest.raises(UsageError, match=f"guide_by {routing}: strong.safetensors takes one expert a token"):
        check_guide(Guide(routing, 0.5), strong, None)
