"""Which checkpoints pair with a distilled copy, and how each is sampled beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_pico
from distilling import FOUR, SMALL, DistilledPair, distilled_pair, moved, save_distilled

from ditmoe_cli.diffusion.few_steps import usual_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.evaluation.sampled_models import (
    SampledModel,
    are_copies,
    guidance_warning,
    guided_as,
    have_same_noise,
    model_of,
    other_guidance,
    parse_model,
    spec_beside,
)
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint

SPEC = SampleSpec(8, 16, 1.0, 3, "ab2", (0, 1))
COPY = SampledModel("few", FOUR, ("original", "narrowed"))
ORIGINAL = SampledModel("original")


def spec_of(checkpoint: Checkpoint) -> SampleSpec:
    solver, steps = usual_sampling(checkpoint)
    return SampleSpec(64, steps, 1.0, 0, solver, (0, 1, 2))


@pytest.fixture
def pair(tmp_path: Path) -> DistilledPair:
    return distilled_pair(tmp_path)


def test_a_copy_pairs_with_those_that_it_was_made_from_alone() -> None:
    assert are_copies(COPY, ORIGINAL) and are_copies(ORIGINAL, COPY)
    assert are_copies(COPY, SampledModel("narrowed"))
    for other in (SampledModel("another"), SampledModel("few"), None):
        assert not are_copies(COPY, other)
    assert not are_copies(ORIGINAL, ORIGINAL)


def test_a_copy_of_a_copy_pairs_with_both(pair: DistilledPair, tmp_path: Path) -> None:
    few = open_checkpoint(pair.few)
    two = save_distilled(
        moved(make_pico(sampler="rf", **SMALL), 0.05), tmp_path / "two.safetensors", few.fingerprint, FOUR
    )
    assert are_copies(model_of(open_checkpoint(two)), model_of(few))


@pytest.mark.parametrize(
    ("changes", "of_strangers", "of_copies"),
    [
        ({}, True, True),
        ({"steps": 4, "solver": "euler"}, False, True),
        ({"cfg": 1.5, "interval": (0.1, 0.9)}, False, True),
        ({"guide": Guide("top1", 0.5)}, False, True),
        ({"seed": 4}, False, False),
        ({"images": 9}, False, False),
        ({"classes": (1, 0)}, False, False),
    ],
)
def test_noise_is_the_same_where_seed_images_and_classes_are(
    changes: dict[str, Any], of_strangers: bool, of_copies: bool
) -> None:
    other = replace(SPEC, **changes)
    assert have_same_noise(SPEC, other, copies=False) is of_strangers
    assert have_same_noise(SPEC, other, copies=True) is of_copies
    assert not have_same_noise(SPEC, None, copies=True) and not have_same_noise(None, SPEC, copies=True)


def test_an_original_is_guided_as_its_copy_is(pair: DistilledPair) -> None:
    assert guided_as(SPEC, ORIGINAL, [COPY]).cfg == 1.5
    assert guided_as(SPEC, SampledModel("another"), [COPY]) == SPEC
    assert guided_as(SPEC, replace(COPY, fingerprint="original"), [COPY]) == SPEC, "it has its own in its weights"
    ranked = replace(COPY, distilled=replace(FOUR, guide="rank2", guide_scale=0.5))
    assert guided_as(SPEC, ORIGINAL, [ranked]).guide == Guide("rank2", 0.5)
    weak = open_checkpoint(pair.original)
    by_weak = replace(COPY, distilled=replace(FOUR, guide=weak.fingerprint, guide_scale=0.5))
    assert guided_as(SPEC, ORIGINAL, [by_weak]).guide is None
    assert guided_as(SPEC, ORIGINAL, [by_weak], weak).guide == Guide(weak.fingerprint, 0.5)


def test_a_side_follows_the_subject_unless_it_was_distilled_otherwise(pair: DistilledPair) -> None:
    original, few = open_checkpoint(pair.original), open_checkpoint(pair.few)
    models = model_of(original), model_of(few)
    assert spec_beside(original, spec_of, SPEC, SampledModel("another"), [models[0]]) == SPEC
    subject = replace(SPEC, steps=4, solver="euler", dtype="bf16")
    assert spec_beside(few, spec_of, subject, models[1], models) == subject
    beside = spec_beside(original, spec_of, subject, models[1], models)
    assert beside == replace(subject, steps=16, solver="ab2", cfg=1.5)
    assert spec_beside(few, spec_of, SPEC, models[0], models) == replace(SPEC, steps=4, solver="euler")
    assert spec_beside(few, spec_of, None, None, models) == spec_of(few)


def test_other_guidance_is_told_in_words() -> None:
    assert other_guidance(COPY, replace(SPEC, cfg=1.5)) is None
    assert other_guidance(COPY, SPEC) == "no guidance at sampling, guidance 1.5 in the weights"
    guided = replace(SPEC, cfg=1.5, guide=Guide("top1", 0.5))
    assert other_guidance(COPY, guided) == (
        "guidance 1.5 and guidance 0.5 by its top1 experts at sampling, guidance 1.5 in the weights"
    )
    few, original = Path("few.safetensors"), Path("original.safetensors")
    warning = guidance_warning(few, COPY, original, ORIGINAL, SPEC)
    assert warning is not None and warning.startswith("warning: original.safetensors against few.safetensors: no guid")
    for model in (SampledModel("another"), replace(COPY, fingerprint="original"), None):
        assert guidance_warning(few, COPY, original, model, SPEC) is None


def test_a_model_is_read_as_it_was_written() -> None:
    for model in (ORIGINAL, COPY, replace(COPY, distilled=replace(FOUR, guide="top1", guide_interval=(0.1, 0.9)))):
        assert parse_model(model.fingerprint, json.loads(json.dumps(model.to_json()))) == model
    assert ORIGINAL.to_json() == {}


@pytest.mark.parametrize("told", [{"steps": 4}, {"solver": "euler", "steps": 4, "teachers": "x"}, {"unknown": 1}])
def test_what_is_malformed_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        parse_model("few", {"distilled": told})
