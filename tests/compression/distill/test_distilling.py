"""Requests to distil: names, options, digests, stages, and what is refused before anything begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_pico
from distilling import FOUR, save_distilled
from healing import SMALL, pair

from ditmoe_cli.compression.distill.distilling import (
    STUDENT_SOLVER,
    TEACHER_SOLVER,
    TEACHER_STEPS,
    Distilling,
    check_distilled,
    tensors_to_distill,
)
from ditmoe_cli.compression.planner import request_digest
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.provenance import Distilled
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import Sampler

OTHERS: dict[str, dict[str, Any]] = {
    "distill-4steps-10min": {},
    "distill-2steps-10min": {"steps": 2},
    "distill-4steps-2.5min": {"minutes": 2.5},
    "distill-4steps-2000iterations": {"minutes": None, "iterations": 2000},
    "distill-4steps-10min-cfg1.5": {"cfg": 1.5},
    "distill-4steps-10min-guide0.5bytop1": {"guide": Guide("top1", 0.5)},
    "distill-4steps-10min-guide1bytop1": {"guide": Guide("top1", 1.0)},
    "distill-4steps-10min-own": {"states": "own"},
    "distill-4steps-10min-progressive": {"progressive": True},
    "distill-4steps-10min-from32": {"teacher_steps": 32},
    "distill-4steps-10min-router+norms": {"train": ("router", "norms")},
    "distill-4steps-10min-lora8": {"train": ("lora:8",)},
    "distill-4steps-10min-codes": {"codes": "learn"},
    "distill-4steps-10min-batch64": {"batch": 64},
    "distill-4steps-10min-rate0.002": {"rate": 0.002},
    "distill-4steps-10min-seed3": {"seed": 3},
    "distill-1steps-7iterations-cfg2-own-progressive-from8-down-codes-batch4-rate0.5-seed1": {
        "steps": 1,
        "minutes": None,
        "iterations": 7,
        "cfg": 2.0,
        "states": "own",
        "progressive": True,
        "teacher_steps": 8,
        "train": ("down",),
        "codes": "learn",
        "batch": 4,
        "rate": 0.5,
        "seed": 1,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_name_says_what_is_not_usual(name: str) -> None:
    assert Distilling("f", **OTHERS[name]).label == name


def test_each_setting_changes_the_request_and_is_an_option_of_the_history() -> None:
    asked = [Distilling("f", **fields) for fields in OTHERS.values()]
    digests = {request_digest(each, "source", None) for each in (*asked, Distilling("g"))}
    assert len(digests) == len(asked) + 1
    for each, fields in zip(asked, OTHERS.values(), strict=True):
        train = {"train": ",".join(fields["train"])} if "train" in fields else {}
        given = {name: value for name, value in fields.items() if name not in ("train", "guide") and value is not None}
        if "guide" in fields:
            given |= {"guide_by": fields["guide"].model, "guide_scale": fields["guide"].scale}
        assert each.options() == {"original": "f", **given, **train}


# steps of both


@pytest.mark.parametrize(
    ("family", "steps", "given", "taken"),
    [
        ("rf", 1, None, 24),
        ("rf", 4, None, 24),
        ("rf", 5, None, 25),
        ("rf", 16, None, 32),
        ("rf", 4, 4, 4),
        ("rf", 4, 40, 40),
        ("rf", 20, 40, 40),
        ("ddpm", 4, None, 20),
        ("ddpm", 8, None, 24),
        ("ddpm", 3, None, 21),
        ("ddpm", 3, 999, 999),
    ],
)
def test_the_originals_steps_are_a_multiple(family: Sampler, steps: int, given: int | None, taken: int) -> None:
    assert Distilling("f", steps=steps, teacher_steps=given).path_steps(family) == taken


@pytest.mark.parametrize(
    ("family", "steps", "given", "said"),
    [
        (
            "rf",
            25,
            None,
            "steps 25: the original itself takes 24 of ab3; give fewer, or more teacher_steps to ditmoe distill",
        ),
        ("ddpm", 21, None, "steps 21: the original itself takes 20"),
        ("ddpm", 4, 1000, "teacher_steps 1000: ddpm-dpmpp-2m takes at most 999"),
        ("rf", 4, 10**9, "teacher_steps 1000000000: ab3 takes at most 100000"),
    ],
)
def test_steps_that_the_original_does_not_take(family: Sampler, steps: int, given: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Distilling("f", steps=steps, teacher_steps=given).path_steps(family)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 0}, "steps 0: give at least 1"),
        ({"steps": -4}, "steps -4"),
        ({"teacher_steps": 6}, "teacher_steps 6: give a multiple of the 4 steps of the student"),
        ({"teacher_steps": 2}, "teacher_steps 2: give a multiple of the 4"),
        ({"teacher_steps": 0}, "teacher_steps 0: give a multiple"),
        ({"minutes": 0}, "minutes 0: give a time above 0"),
        ({"minutes": None}, "give minutes, as 10, or iterations, as 2000, and not both"),
        ({"iterations": 5}, "and not both"),
        ({"minutes": None, "iterations": 0}, "iterations 0: give at least 1"),
    ],
)
def test_requests_that_cannot_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Distilling("f", **fields)


@pytest.mark.parametrize(
    ("family", "steps", "given", "stages"),
    [
        ("rf", 8, None, (8,)),
        ("rf", 4, None, (8, 4)),
        ("rf", 2, None, (8, 4, 2)),
        ("rf", 1, None, (8, 4, 2, 1)),
        ("rf", 3, None, (3,)),
        ("rf", 1, 8, (4, 2, 1)),
        ("rf", 1, 6, (2, 1)),
        ("rf", 4, 8, (4,)),
        ("ddpm", 1, None, (8, 4, 2, 1)),
        ("ddpm", 2, None, (8, 4, 2)),
        ("ddpm", 4, None, (8, 4)),
        ("ddpm", 1, 20, (4, 2, 1)),
        ("ddpm", 1, 40, (8, 4, 2, 1)),
    ],
)
def test_stages_of_progress_divide_the_originals_steps_and_each_other(
    family: Sampler, steps: int, given: int | None, stages: tuple[int, ...]
) -> None:
    asked = Distilling("f", steps=steps, teacher_steps=given, progressive=True)
    assert asked.stages(family) == stages
    assert all(asked.path_steps(family) % count == 0 and stages[0] % count == 0 for count in stages)
    assert Distilling("f", steps=steps, teacher_steps=given).stages(family) == (steps,)


@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_how_both_are_sampled(family: Sampler) -> None:
    config = make_pico(sampler=family).config
    asked = Distilling("f", cfg=1.5, seed=3)
    spec = asked.teacher_spec(config, 9)
    assert (spec.images, spec.steps, spec.cfg, spec.seed) == (9, TEACHER_STEPS[family], 1.5, 3)
    assert spec.solver == TEACHER_SOLVER[family] and spec.classes == (0, 1, 2)
    teacher = (TEACHER_SOLVER[family], TEACHER_STEPS[family])
    assert asked.distilled(family) == Distilled(
        STUDENT_SOLVER[family], 4, cfg=1.5, teacher_solver=teacher[0], teacher_steps=teacher[1]
    )


def test_a_weaker_model_guides_and_its_guidance_is_told() -> None:
    config = make_pico(sampler="rf").config
    for guide in (Guide("top1", 0.5), Guide("f" * 64, 2.0, (0.2, 0.8))):
        asked = Distilling("f", cfg=1.5, guide=guide)
        assert asked.teacher_spec(config, 1).guide == guide
        few = asked.distilled("rf")
        assert (few.guide, few.guide_scale, few.guide_interval) == (guide.model, guide.scale, guide.interval)
    named = asked.options()
    assert named["guide_with"] == "f" * 64 and named["guide_scale"] == 2.0 and named["guide_interval"] == "0.2,0.8"
    assert "guide" not in named and "guide_by" not in named
    assert Distilling("f").distilled("rf").guide is None


# pairs


def test_a_student_may_be_the_original_itself(tmp_path: Path) -> None:
    original, student = (open_checkpoint(path) for path in pair(tmp_path))
    assert check_distilled(original, original, Distilling("f")) is None
    warning = check_distilled(student, original, Distilling("f"))
    assert warning is not None and "nothing tells whether" in warning


def test_what_is_distilled_already_teaches_nobody_and_learns_on(tmp_path: Path) -> None:
    path, _ = pair(tmp_path)
    original = open_checkpoint(path)
    few = open_checkpoint(
        save_distilled(make_pico(**SMALL, seed=4), tmp_path / "few.safetensors", original.fingerprint)
    )
    assert few.distilled == FOUR
    for student in (few, original):
        with pytest.raises(BadInputError, match=r"few\.safetensors: was distilled to 4 steps itself"):
            check_distilled(student, few, Distilling("f"))
    assert check_distilled(few, original, Distilling("f", steps=2)) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cfg": -1.0}, "cfg -1"),
        ({"cfg": float("nan")}, "cfg nan"),
        ({"cfg": float("inf")}, "cfg inf"),
        ({"steps": 25}, "the original itself takes 24"),
        ({"steps": 8, "progressive": True}, "progressive has no effect: between the 8 steps of the student"),
        ({"steps": 3, "progressive": True}, "progressive has no effect"),
        ({"steps": 4, "teacher_steps": 8, "progressive": True}, "progressive has no effect"),
        ({"steps": 1, "states": "own"}, "states own has no effect with steps 1"),
    ],
)
def test_settings_that_a_pair_cannot_have(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    original = open_checkpoint(pair(tmp_path)[0])
    with pytest.raises(UsageError, match=said):
        check_distilled(original, original, Distilling("f", **fields))


def test_own_states_matter_before_the_last_of_several_stages(tmp_path: Path) -> None:
    original = open_checkpoint(pair(tmp_path)[0])
    assert check_distilled(original, original, Distilling("f", steps=1, states="own", progressive=True)) is None


def test_guidance_takes_a_null_class(tmp_path: Path) -> None:
    original = open_checkpoint(pair(tmp_path, null_class=False)[0])
    with pytest.raises(UsageError, match=r"cfg 1\.5: the checkpoint was trained without class dropout"):
        check_distilled(original, original, Distilling("f", cfg=1.5))
    assert check_distilled(original, original, Distilling("f")) is None


def test_all_but_positions_is_trained_unless_told(tmp_path: Path) -> None:
    original = open_checkpoint(pair(tmp_path)[0])
    assert set(tensors_to_distill(original, Distilling("f"))) == set(original.weights) - {"pos_embed"}
    routers = tensors_to_distill(original, Distilling("f", train=("router",)))
    assert set(routers) == {f"blocks.{b}.moe.gate.weight" for b in range(2)}
    with pytest.raises(UsageError, match="codes learn has no effect"):
        tensors_to_distill(original, Distilling("f", codes="learn"))
    with pytest.raises(UsageError, match="lora:64: the width of"):
        tensors_to_distill(original, Distilling("f", train=("lora:64",)))
