"""Structure and bits carried out together: what is written, what refitting is worth, and runs that go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from compressing import opened, profile_of, stored
from conftest import make_pico
from interrupting import goes_on_to_the_same_bytes
from rounding import guided_by_hand, relative, states_for

from ditmoe_cli.compression import rebuild
from ditmoe_cli.compression.apply import Applied, apply
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.joint import carrying
from ditmoe_cli.compression.joint.carrying import HeldErrors, by_image
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, Rounding
from ditmoe_cli.compression.replay import eliminations
from ditmoe_cli.compression.replay import states as states_of_fits
from ditmoe_cli.compression.replay.eliminations import neuron_curves
from ditmoe_cli.compression.replay.kept_measures import kept_measures
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]
TOKENS = 512
REPAIR = Repair(linear=False, tokens=TOKENS)
ROUNDING = Rounding(tokens=TOKENS)
ALL = (0, 1, 2)
SAME = (BlockPlan(ALL, "ghost"),) * 2
NARROW = (BlockPlan(ALL, "ghost", widths=(32, 64, 32)), BlockPlan(ALL, "ghost", widths=(64, 32, 32), shared_width=32))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_of_fits, "FEWEST_TOKENS", TOKENS)
    monkeypatch.setattr(eliminations, "ELIMINATION_TOKENS", TOKENS)
    for module in (carrying, rebuild):
        monkeypatch.setattr(module, "TOKENS_PER_UNKNOWN", 1)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, widths=((64,) * 3,) * 2)
    checkpoint = opened(pico, tmp_path_factory.mktemp("carrying"))
    return checkpoint, profile_of(checkpoint, images=8)


def formats_of_experts(fmt: str = "int4-g32") -> dict[str, str]:
    return {in_expert(b, e, f"{matrix}.weight"): fmt for b in range(2) for e in ALL for matrix in MATRICES}


def plan_of(
    given: Given, blocks: tuple[BlockPlan, ...], formats: dict[str, str] | None, **more: Any
) -> CompressionPlan:
    experts = Experts(blocks, **{"repair": REPAIR, **more})
    stages = (experts, Formats(formats, ROUNDING)) if formats is not None else (experts,)
    return CompressionPlan("compress", given[0].fingerprint, given[1].digest, stages=stages)


def written(given: Given, plan: CompressionPlan, path: Path) -> tuple[Applied, Checkpoint]:
    made = apply(given[0], plan, Output(path), profile=given[1])
    assert made.bytes == path.stat().st_size == planned_output(given[0], plan).predicted_bytes(Output(path))
    return made, open_checkpoint(path)


def error_of(given: Given, made: Checkpoint) -> float:
    """The error of the guided prediction of a whole model on the calibration states."""
    states, cfg = states_for(*given, 2 * TOKENS)
    device = torch.device("cpu")
    wanted, found = (guided_by_hand(build_model(each, device), states, cfg) for each in (given[0], made))
    return relative(found, wanted)


def test_a_plan_that_changes_nothing_rounds_as_quantize_does(given: Given, tmp_path: Path) -> None:
    formats = formats_of_experts()
    together, made = written(given, plan_of(given, SAME, formats, repair=None), tmp_path / "a.safetensors")
    alone = CompressionPlan("quantize", given[0].fingerprint, given[1].digest, stages=(Formats(formats, ROUNDING),))
    rounded, other = written(given, alone, tmp_path / "b.safetensors")
    errors = together.measured.prediction_error, rounded.measured.prediction_error
    assert errors[0] is not None and errors[1] is not None
    assert 0.7 < errors[0] / errors[1] < 1.4
    assert 0.6 < error_of(given, made) / error_of(given, other) < 1.6
    assert {name: about[:2] for name, about in stored(made).items()} == {
        name: about[:2] for name, about in stored(other).items()
    }, "the same tensors, of the same dtypes and shapes"


def test_the_error_that_is_said_is_that_of_the_written_model(given: Given, tmp_path: Path) -> None:
    applied, made = written(given, plan_of(given, NARROW, formats_of_experts()), tmp_path / "a.safetensors")
    assert applied.measured.prediction_error == pytest.approx(error_of(given, made), rel=0.3)
    assert len(applied.measured.refit_error) == len(applied.measured.top_k_agreement) == 2


@pytest.mark.slow
def test_refitting_makes_up_for_neurons_and_for_rounding(given: Given, tmp_path: Path) -> None:
    errors = []
    for name, repair in (("a", None), ("b", REPAIR)):
        plan = plan_of(given, NARROW, formats_of_experts("int3-g32"), repair=repair, selection="elimination")
        errors.append(written(given, plan, tmp_path / f"{name}.safetensors")[0].measured.prediction_error or 0.0)
    assert 0 < errors[1] < 0.9 * errors[0]


@pytest.mark.slow
def test_narrowing_without_formats_is_what_prune_does(given: Given, tmp_path: Path) -> None:
    """The same neurons, and down projections as near: nothing is rounded but to the dtypes of the weights."""
    together, made = written(given, plan_of(given, NARROW, {}), tmp_path / "a.safetensors")
    _, other = written(given, plan_of(given, NARROW, None), tmp_path / "b.safetensors")
    mine, theirs = stored(made), stored(other)
    assert mine.keys() == theirs.keys()
    for name, (dtype, shape, data) in theirs.items():
        assert mine[name][:2] == (dtype, shape)
        if ".down_proj." not in name:
            assert mine[name][2] == data, name
    assert together.measured.prediction_error == pytest.approx(error_of(given, other), rel=0.3)


def test_experts_that_go_and_others_that_are_renumbered(given: Given, tmp_path: Path) -> None:
    """Formats are given by old names; those of an expert that goes have no effect."""
    formats = formats_of_experts()
    formats |= {in_expert(b, 2, f"{matrix}.weight"): "int8" for b in range(2) for matrix in MATRICES}
    blocks = (BlockPlan((0, 2), "ghost", widths=(64, 32)), BlockPlan((1, 2), "slice"))
    _, made = written(given, plan_of(given, blocks, formats), tmp_path / "a.safetensors")
    for block in range(2):
        for expert, fmt in ((0, "int4-g32"), (1, "int8")):
            for matrix in MATRICES:
                assert str(made.weights[in_expert(block, expert, f"{matrix}.weight")].format) == fmt
        assert in_expert(block, 2, "up_proj.weight") not in made.weights
    assert made.config.blocks[0].expert_widths == (64, 32)
    assert 0 < error_of(given, made) < 1.5


@pytest.mark.slow
def test_merged_experts_are_rounded_in_the_format_of_the_kept_one(given: Given, tmp_path: Path) -> None:
    blocks = (BlockPlan((0, 1), "ghost", merged=((2, 0),)),) * 2
    formats = {in_expert(b, 0, f"{matrix}.weight"): "int4-g32" for b in range(2) for matrix in MATRICES}
    _, made = written(given, plan_of(given, blocks, formats, merging="m-smoe"), tmp_path / "a.safetensors")
    assert str(made.weights[in_expert(1, 0, "up_proj.weight")].format) == "int4-g32"
    assert made.weights[in_expert(1, 1, "up_proj.weight")].format is None
    assert 0 < error_of(given, made) < 1.5


@pytest.mark.parametrize(
    ("selection", "stops"), with_slow([("elimination", (2,)), ("elimination", None), (None, None)])
)
def test_a_run_that_goes_on_writes_the_same_bytes(selection: Any, stops: Any, given: Given, tmp_path: Path) -> None:
    """Errors of widths are kept beside the profile, and so are measured before."""
    plan = plan_of(given, NARROW, formats_of_experts(), selection=selection)

    def run(path: Path) -> None:
        apply(given[0], plan, Output(path), profile=given[1])

    if selection:
        neuron_curves(Calibrated(*given, "cpu", kept=kept_measures(*given, "cpu", print)))
    pieces = goes_on_to_the_same_bytes(run, tmp_path, stops=stops)
    assert len(pieces) == 4 and all("block-" in piece for piece in pieces)


def test_errors_by_image_add_up_over_states() -> None:
    images = torch.tensor([3, 7, 3])
    expected = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    prediction = expected + torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.5]])
    found = by_image(prediction, expected, images)
    assert found == HeldErrors((1.25, 4.0), (11.0, 4.0))
    assert found.error == pytest.approx(5.25 / 15)
    assert by_image(prediction[:0], expected[:0], images[:0]).error == 0.0
    assert replace(found, references=(0.0, 0.0)).error == 0.0
