"""Plans that train weights: their layout, what they measure, and what goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from compressing import opened, profile_of
from conftest import make_pico

from ditmoe_cli.compression.apply import Applied, apply
from ditmoe_cli.compression.heal import healed_weights, healing_memory
from ditmoe_cli.compression.heal.healed_output import HealingRecord
from ditmoe_cli.compression.heal.healed_weights import heal
from ditmoe_cli.compression.heal.healing import Healing
from ditmoe_cli.compression.joint import trained_stages
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import (
    BlockPlan,
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    Repair,
    Retraining,
    Rounding,
    parse_plan,
)
from ditmoe_cli.compression.replay import states as states_of_fits
from ditmoe_cli.compression.training.training_session import TrainingWork
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]
TOKENS = 256
NARROW = (BlockPlan((0, 2), "ghost", widths=(32, 64)), BlockPlan((0, 1, 2), "ghost", widths=(64, 32, 32)))
EXPERTS = Experts(NARROW, repair=Repair(linear=False, tokens=TOKENS))
FORMATS = {
    in_expert(block, expert, f"{matrix}.weight"): "int4-g32"
    for block in range(2)
    for expert in range(3)
    for matrix in MATRICES
}
ROUNDED = Formats(FORMATS, Rounding(tokens=TOKENS))


@pytest.fixture(autouse=True, scope="module")
def few_states() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(states_of_fits, "FEWEST_TOKENS", TOKENS)
        patched.setattr(healed_weights, "HELD_STATES", 16)
        patched.setattr(healing_memory, "BLOCK_TOKENS", 64)
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, sampler="rf", widths=((64,) * 3,) * 2)
    checkpoint = opened(pico, tmp_path_factory.mktemp("healed"))
    return checkpoint, profile_of(checkpoint, images=8)


def plan_of(given: Given, *stages: Experts | Retraining | Formats) -> CompressionPlan:
    checkpoint, profile = given
    settings = profile.calibration
    return CompressionPlan("compress", checkpoint.fingerprint, profile.digest, {}, stages, calibration=settings)


def written(given: Given, path: Path, *stages: Experts | Retraining | Formats) -> Applied:
    return apply(given[0], plan_of(given, *stages), Output(path), given[1])


TRAINED = (EXPERTS, ROUNDED, Retraining(steps=3))


@pytest.fixture(scope="module")
def trained(given: Given, tmp_path_factory: pytest.TempPathFactory) -> tuple[Applied, Checkpoint]:
    """What carrying out all of `TRAINED` gives."""
    path = tmp_path_factory.mktemp("trained") / "whole.safetensors"
    return written(given, path, *TRAINED), open_checkpoint(path)


def layout(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.header.tensors.items()}


def changes_values_and_nothing_else(
    given: Given, plain: Checkpoint, done: Applied, trained: Checkpoint, *order: Experts | Retraining | Formats
) -> None:
    assert layout(trained) == layout(plain) and trained.config == plain.config
    assert done.bytes == planned_output(given[0], plan_of(given, *order)).predicted_bytes(Output(Path("x.safetensors")))
    (step,) = trained.provenance().history
    assert (step.command, step.source) == ("compress", given[0].fingerprint)
    before, after = map(float, step.measured["held_error"])
    assert after > 0 and before == pytest.approx(done.measured.held_error[0], rel=1e-3)


def test_training_changes_values_and_nothing_else(
    given: Given, trained: tuple[Applied, Checkpoint], tmp_path: Path
) -> None:
    written(given, tmp_path / "plain.safetensors", EXPERTS, ROUNDED)
    changes_values_and_nothing_else(given, open_checkpoint(tmp_path / "plain.safetensors"), *trained, *TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [EXPERTS, ROUNDED], ids=["experts", "formats"])
def test_training_one_stage_changes_values_and_nothing_else(
    given: Given, tmp_path: Path, stage: Experts | Formats
) -> None:
    written(given, tmp_path / "plain.safetensors", stage)
    training = Retraining(steps=5)
    done = written(given, tmp_path / "trained.safetensors", stage, training)
    plain, trained = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("plain", "trained"))
    changes_values_and_nothing_else(given, plain, done, trained, stage, training)


def test_training_alone_never_does_harm(given: Given, tmp_path: Path) -> None:
    """The held-out error of the result is at most that of the refitted experts."""
    done = written(given, tmp_path / "a.safetensors", EXPERTS, Retraining(steps=4))
    before, after = done.measured.held_error
    assert after <= before


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    given: Given, trained: tuple[Applied, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stopped.safetensors"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trained_stages, "heal", stop)
        with pytest.raises(KeyboardInterrupt):
            written(given, path, *TRAINED)
    kept = tmp_path / ".stopped.safetensors.work" / "stages" / "compressed.safetensors"
    assert not path.exists() and kept.exists()
    made = kept.stat().st_mtime_ns
    seen: list[int] = []

    def noted(work: TrainingWork, profile: RoutingProfile, asked: Healing) -> HealingRecord:
        seen.append(kept.stat().st_mtime_ns)
        return heal(work, profile, asked)

    with monkeypatch.context() as patched:
        patched.setattr(trained_stages, "heal", noted)
        written(given, path, *TRAINED)
    assert seen == [made], "what was compressed is not made anew"
    assert path.read_bytes() == trained[1].path.read_bytes()
    assert not (tmp_path / ".stopped.safetensors.work").exists()


def test_differences_are_not_trained(given: Given) -> None:
    plan = replace(plan_of(given), stages=(Differences("svd", 0.5), Retraining(steps=1)))
    with pytest.raises(BadInputError, match="make that two plans"):
        planned_output(given[0], plan)


def test_what_was_compressed_is_distilled_to_few_steps(given: Given, tmp_path: Path) -> None:
    stages = (EXPERTS, ROUNDED, Retraining(steps=6, student_steps=2))
    done = written(given, tmp_path / "few.safetensors", *stages)
    made = open_checkpoint(tmp_path / "few.safetensors")
    assert made.distilled is not None and (made.distilled.solver, made.distilled.steps) == ("euler", 2)
    assert made.distilled.cfg == given[1].calibration["cfg"]
    before, after = done.measured.held_error
    assert 0 < after <= before
    assert done.bytes == planned_output(given[0], plan_of(given, *stages)).predicted_bytes(
        Output(Path("x.safetensors"))
    )
    plan = plan_of(given, *stages)
    assert parse_plan(plan.document(), "x").retraining == plan.retraining
