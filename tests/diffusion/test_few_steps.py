"""By which steps a distilled checkpoint is sampled, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from distilling import FOUR, FOUR_DDPM, distilled_pair

from ditmoe_cli.diffusion.few_steps import (
    _ROUTINGS,
    check_unguided,
    other_steps,
    own_sampling,
    told_steps,
    usual_sampling,
)
from ditmoe_cli.diffusion.weak_guidance import RANKS
from ditmoe_cli.errors import BadInputError, UsageError, named
from ditmoe_cli.files.provenance import Distilled
from ditmoe_cli.model.checkpoint import open_checkpoint


@pytest.mark.parametrize("sampler", ["rf", "ddpm"])
def test_a_distilled_checkpoint_has_steps_of_its_own_and_the_original_its_familys(sampler: str, tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path, sampler=sampler)
    few, original = open_checkpoint(pair.few), open_checkpoint(pair.original)
    own = ("euler", 4) if sampler == "rf" else ("ddim-trailing", 4)
    assert own_sampling(few) == usual_sampling(few) == own
    assert own_sampling(original) is None
    assert usual_sampling(original) == (("ab2", 16) if sampler == "rf" else ("ddpm-dpmpp-2m", 20))


@pytest.mark.parametrize(
    ("distilled", "said"),
    [
        (FOUR, "4 steps of euler, with guidance 1.5 in its weights"),
        (replace(FOUR, steps=1, cfg=1.0), "1 step of euler, without guidance"),
        (replace(FOUR_DDPM, solver="ddpm-dpmpp-2m"), "4 steps of dpmpp-2m, with guidance 1.5 in its weights"),
        (
            replace(FOUR, cfg=1.0, guide="top1", guide_scale=0.5),
            "4 steps of euler, with guidance 0.5 by its top1 experts in its weights",
        ),
        (
            replace(FOUR, guide="ab" * 32, guide_scale=0.5),
            "4 steps of euler, with guidance 1.5 and guidance 0.5 by a weaker copy in its weights",
        ),
    ],
)
def test_how_it_was_distilled_is_told_in_words(distilled: Distilled, said: str) -> None:
    assert told_steps(distilled) == said


def test_guidance_is_refused_for_a_distilled_checkpoint_alone(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path)
    few, original = open_checkpoint(pair.few), open_checkpoint(pair.original)
    for checkpoint, cfg in ((few, 1.0), (original, 1.0), (original, 4.0)):
        check_unguided(checkpoint, cfg)
    said = "few.safetensors was distilled to 4 steps of euler, with guidance 1.5 in its weights, and its null branch"
    with pytest.raises(UsageError) as refused:
        check_unguided(few, 1.5)
    assert named(refused.value.message).startswith(f"cfg 1.5: {said}")
    with pytest.raises(UsageError) as refused:
        check_unguided(few, 1.0, (0.2, 0.8))
    assert named(refused.value.message).startswith(f"cfg_interval 0.2,0.8: {said}")


def test_other_steps_are_warned_of(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path)
    few, original = open_checkpoint(pair.few), open_checkpoint(pair.original)
    assert other_steps(few, "euler", 4) is other_steps(original, "ab2", 3) is None
    for solver, steps, said in (("euler", 8, "8 steps of euler"), ("ab2", 4, "4 steps of ab2")):
        warning = other_steps(few, solver, steps)  # type: ignore[arg-type]
        assert warning is not None and "\n" not in warning
        assert warning.startswith(f"warning: few.safetensors: distilled to 4 steps of euler, and sampled by {said}: ")


@pytest.mark.parametrize("changes", [{"solver": "ddim"}, {"solver": "nonsense"}, {"steps": 1001}])
def test_steps_that_cannot_be_are_refused_by_file(changes: dict[str, object], tmp_path: Path) -> None:
    few = open_checkpoint(distilled_pair(tmp_path, replace(FOUR, **changes)).few)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"few\.safetensors: its metadata says that it was distilled to"):
        own_sampling(few)


def test_routings_are_those_that_guide() -> None:
    assert set(_ROUTINGS) == set(RANKS)
