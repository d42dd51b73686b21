"""What formats cost: replayed errors against rebuilt mixtures, amplified ones against models with a layer rounded."""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import applied, calibrated, measure_few_tokens, network, opened, profile_of, quantising
from conftest import Pico, make_pico
from replaying import WIDTH, error_by_hand, mixture, output, plain, some_tokens
from rounding import guided_by_hand, relative, states_for, with_rounded
from torch import Tensor

from ditmoe_cli.compression.precision import sensitivity
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.sensitivity import REFERENCE, Sensitivities, expert_errors, measured_sensitivities
from ditmoe_cli.compression.precision.trial import try_formats
from ditmoe_cli.compression.replay import amplification
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.routing.profile import RoutingProfile

TOKENS = 256
MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
FORMATS = ("int2-g32", "int4-g64-sym", "nf4")
SMALL: dict[str, Any] = {"hidden": 32, "input_size": 4, "experts": 3}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, TOKENS)


# one expert at a time


MIXTURES: dict[str, SparseMoE] = {
    "plain": plain(4),
    "merged": mixture(BlockConfig(6, (6, 7, 8), 12, mapped=True), 3, (2, 0, 1, 2, 0, -1)),
    "mass": mixture(BlockConfig(5, (6, 7, 8), 12, mapped=True, mass=True), 2, (0, -1, 1, 2, -1)),
    "constants": mixture(BlockConfig(5, (6, 7, 8), 12, mapped=True, constants=2, rank=1), 2, (0, -2, 1, 2, -3)),
}


def replayed(tokens: BlockTokens, moe: SparseMoE, stem: str, matrix: str, fmt: str) -> float:
    """The same error from a mixture whose one matrix was rounded."""
    changed = copy.deepcopy(moe)
    layer = changed.get_submodule(f"{stem}.{matrix.removesuffix('.weight')}")
    layer.weight.copy_(nearest(layer.weight, fmt))  # type: ignore[operator, arg-type]
    reference = tokens.energy(output(moe, tokens) - moe.shared_experts(tokens.inputs))
    return error_by_hand(tokens, moe, changed) * reference / tokens.pairs


@pytest.mark.parametrize(
    ("name", "branches", "cfg"), [("plain", 1, 1.0), ("plain", 2, 0.0), *((name, 2, 4.0) for name in MIXTURES)]
)
def test_errors_of_experts_are_those_of_rebuilt_mixtures(name: str, branches: int, cfg: float) -> None:
    moe, tokens = MIXTURES[name], some_tokens(30, branches, cfg)
    routing = moe.gate(tokens.inputs)
    formats = dict.fromkeys(MATRICES, FORMATS)
    cases = [(f"experts.{e}", expert, routing.gate_of(e)) for e, expert in enumerate(moe.experts)]
    cases.append(("shared_experts", moe.shared_experts, torch.ones(len(tokens.inputs))))
    for stem, expert, gates in cases:
        found = list(expert_errors(expert, tokens, gates, formats))
        assert [(matrix, fmt) for matrix, fmt, _ in found] == [(m, fmt) for m in MATRICES for fmt in FORMATS]
        for matrix, fmt, error in found:
            expected = replayed(tokens, moe, stem, matrix, fmt)
            assert error == pytest.approx(expected, rel=1e-3, abs=1e-9), f"{stem}.{matrix} {fmt}"
        assert max(error for _, _, error in found) > 0


def test_merged_rows_count_with_the_sum_of_their_weights() -> None:
    """Tokens that select both rows of an expert, whose weights add."""
    moe, tokens = MIXTURES["merged"], some_tokens(40)
    slots = (moe.gate(tokens.inputs).experts == 2).sum(dim=1)
    assert int(slots.max()) == 2, "the case above has some"


def test_an_expert_that_nobody_chose_costs_nothing() -> None:
    moe, tokens = plain(), some_tokens()
    found = expert_errors(moe.experts[0], tokens, torch.zeros(len(tokens.inputs)), dict.fromkeys(MATRICES, FORMATS))
    assert [error for _, _, error in found] == [0.0] * 9


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("copies", [1, 3, 7])
def test_evenly_spaced_tokens_stand_for_all(copies: int, branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that each come several times in a row, one each tells all."""
    moe, once = plain(4), some_tokens(50, branches)
    spread = (
        once.paired(column).repeat_interleave(copies, dim=0).transpose(0, 1).flatten(0, 1) for column in fields(once)
    )
    tokens = BlockTokens(*spread, branches=branches)
    formats = dict.fromkeys(MATRICES, ("int2-g32", "int4-g32"))
    exact = [error for _, _, error in expert_errors(moe.experts[1], once, gates_of(moe, once), formats)]
    chosen = int(once.paired(gates_of(moe, once)).ne(0).any(dim=1).sum())
    assert 10 < chosen < 50
    for most in (chosen * copies, chosen):
        monkeypatch.setattr(sensitivity, "EXPERT_TOKENS", most)
        found = [error for _, _, error in expert_errors(moe.experts[1], tokens, gates_of(moe, tokens), formats)]
        assert found == pytest.approx(exact, rel=1e-4)
    monkeypatch.setattr(sensitivity, "EXPERT_TOKENS", chosen // 2)
    some = [error for _, _, error in expert_errors(moe.experts[1], once, gates_of(moe, once), formats)]
    assert sum(some) == pytest.approx(sum(exact), rel=0.9) and some != exact


def test_tokens_of_all_positions_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every eighth of 16 patches would do: those that lose anything are at one position here."""
    moe, tokens = plain(4), some_tokens(16 * 30, 1)
    monkeypatch.setattr(sensitivity, "EXPERT_TOKENS", 60)
    everyone = torch.ones(480)
    gamma = tokens.gamma * (torch.arange(480) % 16 == 3).unsqueeze(1)
    found = list(expert_errors(moe.experts[0], replace(tokens, gamma=gamma), everyone, {MATRICES[0]: FORMATS}))
    assert all(error > 0 for _, _, error in found)


def fields(tokens: BlockTokens) -> tuple[Tensor, ...]:
    return tokens.inputs, tokens.gamma, tokens.coefficients, tokens.bins


def gates_of(moe: SparseMoE, tokens: BlockTokens) -> Tensor:
    gates: Tensor = moe.gate(tokens.inputs).gate_of(1)
    return gates


def test_one_matrix_alone_may_be_asked_for() -> None:
    moe, tokens = plain(), some_tokens()
    gates = torch.ones(len(tokens.inputs))
    everything = {found[:2]: found[2] for found in expert_errors(moe.experts[0], tokens, gates, {MATRICES[1]: FORMATS})}
    assert everything.keys() == {(MATRICES[1], fmt) for fmt in FORMATS}
    assert not list(expert_errors(moe.experts[0], tokens, gates, dict.fromkeys(MATRICES, ())))
    assert moe.experts[0].up_proj.weight.shape[1] == WIDTH


# whole models


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "rf": ({"sampler": "rf", "in_channels": 1}, 1.0),
    "guided rf": ({"sampler": "rf", "in_channels": 2, "attention": "flash"}, 3.0),
    "guided ddpm": ({"dtype": torch.bfloat16}, 1.5),
    "merged": ({"expert_of": ((0, 1, 2, 0), (2, 1, 0, -1)), "widths": ((32, 64, 48), (64, 40, 32))}, 1.5),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, RoutingProfile]:
    options, cfg = CASES[request.param]
    checkpoint = opened(make_pico(**{**SMALL, **options}), tmp_path_factory.mktemp("sensitivity"))
    return checkpoint, profile_of(checkpoint, cfg=cfg)


Case = tuple[Checkpoint, RoutingProfile]


def measured(case: Case, formats: Mapping[str, Sequence[str]]) -> Sensitivities:
    return measured_sensitivities(calibrated(*case), formats)


def end_to_end(case: Case, formats: Mapping[str, str]) -> float:
    """The error of the guided prediction of the whole model with layers rounded."""
    checkpoint, profile = case
    states, cfg = states_for(checkpoint, profile, TOKENS)
    wanted = guided_by_hand(network(checkpoint), states, cfg)
    return relative(guided_by_hand(with_rounded(network(checkpoint), formats), states, cfg), wanted)


def planned(checkpoint: Checkpoint, *bits: str) -> dict[str, tuple[str, ...]]:
    asked = Candidates(bits, floors={})
    return {name: tuple(filter(None, fmts)) for name, fmts in candidate_formats(checkpoint, asked).items()}


def test_layers_outside_the_blocks_are_measured_exactly(case: Case) -> None:
    names = [name for name in planned(case[0], "4") if not name.startswith("blocks.")]
    assert len(names) == 4
    formats = ("int2-g64", "int8")
    found = measured(case, dict.fromkeys(names, formats)).errors
    assert found.keys() == set(names)
    for name in names:
        for fmt in formats:
            assert found[name][fmt] == pytest.approx(end_to_end(case, {name: fmt}), rel=2e-3, abs=1e-10), (name, fmt)


def test_the_reference_format_alone_is_measured_exactly(case: Case) -> None:
    """One weight of each kind in each block: what is sent through the model is that weight's own error."""
    attention = [name for name in planned(case[0], "4") if ".attn." in name]
    for block in range(2):
        of_experts = ("experts.1.down_proj", "experts.0.gate_proj") if block == 0 else ("shared_experts.up_proj",)
        for name in (
            next(name for name in attention if name.startswith(f"blocks.{block}.")),
            f"blocks.{block}.adaLN_modulation.1.weight",
            *(f"blocks.{block}.moe.{matrix}.weight" for matrix in of_experts),
        ):
            found = measured(case, {name: (REFERENCE, "int6-g64")})
            expected = end_to_end(case, {name: REFERENCE})
            assert found.errors[name][REFERENCE] == pytest.approx(expected, rel=0.01, abs=1e-10), name
            assert [len(each) for each in found.amplification] == [1 - block, block]


def test_other_formats_are_amplified_as_the_reference_is(case: Case) -> None:
    """Error over error of the stream is the same for all formats and weights of a kind; in the last block, by hand."""
    checkpoint, profile = case
    states, cfg = states_for(checkpoint, profile, TOKENS)
    for name in ("blocks.1.adaLN_modulation.1.weight", "blocks.1.moe.experts.1.up_proj.weight"):
        formats = (REFERENCE, "int2-g32", "int6-g64")
        found = measured(case, {name: formats})
        before = stream_by_hand(network(checkpoint), states, cfg)
        ((kind, amplification),) = found.amplification[1].items()
        assert kind == ("modulation" if "adaLN" in name else "mixture")
        for fmt in formats:
            after = stream_by_hand(with_rounded(network(checkpoint), {name: fmt}), states, cfg)
            local = float((after - before).square().sum()) / (before.shape[0] * before.shape[1])
            assert found.errors[name][fmt] == pytest.approx(amplification * local, rel=0.01), (name, fmt)


def stream_by_hand(model: Any, states: Any, cfg: float) -> Tensor:
    """The guided sum of the streams that the blocks end with, (N, P, D) in float64."""
    streams = []
    null = torch.full_like(states.labels, model.config.num_classes)
    with torch.no_grad():
        for scale, labels in ((cfg, states.labels), (1 - cfg, null)):
            x, c = model.embed(states.z, states.t, labels)
            for index, block in enumerate(model.blocks):
                x = block(x, c, index, None)
            streams.append(scale * x.double())
    return streams[0] + streams[1]


def test_errors_fall_with_the_bits_and_are_finite(case: Case) -> None:
    formats = planned(case[0], "2", "3", "5", "8")
    found = measured(case, formats)
    assert found.errors.keys() == formats.keys()
    sums = dict.fromkeys(next(iter(formats.values())), 0.0)
    falling = []
    for name, errors in found.errors.items():
        assert errors.keys() == set(formats[name])
        assert all(0 <= error < float("inf") for error in errors.values())
        ordered = [errors[fmt] for fmt in sorted(errors, key=lambda fmt: parse_format(fmt).bits)]
        falling += [wide <= narrow for narrow, wide in itertools.pairwise(ordered)]
        sums = {fmt: sums[fmt] + errors[fmt] for fmt in sums}
    totals = list(sums.values())
    assert totals == sorted(totals, reverse=True) and totals[0] > 100 * totals[-1] > 0
    assert statistics.mean(falling) > 0.95
    assert all(each.keys() == {"attention", "modulation", "mixture"} for each in found.amplification)
    assert all(value > 0 for each in found.amplification for value in each.values())


def test_small_errors_add_up(case: Case) -> None:
    formats = planned(case[0], "8")
    found = measured(case, formats).errors
    together = try_formats(calibrated(*case), {name: fmts[0] for name, fmts in formats.items()}).error
    # within 1.5 but for tokens that rounding tips to other experts, whose error falls more slowly than the square
    assert together / 2 < sum(error for errors in found.values() for error in errors.values()) < 2 * together


def test_a_trial_is_the_error_of_the_file(case: Case, tmp_path: Path) -> None:
    checkpoint, profile = case
    widths = [planned(checkpoint, bits) for bits in ("2", "8")]
    formats = {name: widths[i % 2][name][0] for i, name in enumerate(widths[0])}
    plan = quantising(checkpoint, formats)
    written = applied(checkpoint, plan, tmp_path / "out.safetensors")
    states, cfg = states_for(checkpoint, profile, TOKENS)
    predicted = (guided_by_hand(network(each), states, cfg) for each in (written, checkpoint))
    expected = relative(*predicted)
    assert try_formats(calibrated(*case), formats).error == pytest.approx(
        expected, rel=2e-3 if checkpoint_fp32(case) else 0.1
    )


def checkpoint_fp32(case: Case) -> bool:
    return all(weight.info.dtype in ("F32", "I32") for weight in case[0].weights.values())


def test_nothing_rounded_is_no_error_and_nothing_changed(case: Case) -> None:
    assert try_formats(calibrated(*case), {}).error == 0
    found = measured(case, {})
    assert found.errors == {} and found.amplification == ({}, {})
    name = "final_layer.linear.weight"
    some = {each: fmts for i, (each, fmts) in enumerate(planned(case[0], "3").items()) if i % 3 == 0 or each == name}
    first = measured(case, some)
    assert first == measured(case, some), "equal work, equal numbers"
    assert measured(case, {name: ("int3-g64",)}).errors[name] == first.errors[name], "rounded layers are put back"


def test_fewer_states_are_sent_than_replayed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers stay alike where the streams that carry errors hold a quarter of the states."""
    formats = planned(case[0], "4")
    everything = measured(case, formats).errors
    monkeypatch.setattr(amplification, "SENT_TOKENS", TOKENS // 4)
    some = measured(case, formats).errors
    total, others = (sum(sum(e.values()) for e in errors.values()) for errors in (everything, some))
    assert others == pytest.approx(total, rel=0.6) and others != total


# what cannot be measured


def profiled(pico: Pico, where: Path, **options: Any) -> Case:
    checkpoint = opened(pico, where)
    return checkpoint, profile_of(checkpoint, **options)


def test_a_profile_without_states_is_refused(tmp_path: Path) -> None:
    case = profiled(make_pico(**SMALL), tmp_path, fast=True)
    with pytest.raises(BadInputError, match="keeps no states"):
        measured(case, planned(case[0], "4"))


def test_broken_weights_are_refused_by_name(tmp_path: Path) -> None:
    pico, name = make_pico(**SMALL), "blocks.1.moe.experts.2.up_proj.weight"
    profile = profiled(pico, tmp_path)[1]
    value = pico.state[name].clone()
    value[3, 5] = float("nan")
    broken = opened(pico.with_state(**{name: value}), tmp_path, "broken.safetensors")
    with pytest.raises(BadInputError, match=name):
        measured((broken, profile), planned(broken, "4"))
    with pytest.raises(BadInputError, match=name):
        try_formats(calibrated(broken, profile), {})


def test_values_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    """Scales are fp16; where they overflow the line says of which tensor."""
    pico, name = make_pico(**SMALL), "blocks.1.moe.experts.2.down_proj.weight"
    profile = profiled(pico, tmp_path)[1]
    value = pico.state[name].clone()
    value[3, 5] = 1e5
    large = opened(pico.with_state(**{name: value}), tmp_path, "large.safetensors")
    with pytest.raises(BadInputError, match=name):
        measured((large, profile), planned(large, "4"))


def test_a_model_that_predicts_nothing_loses_nothing(tmp_path: Path) -> None:
    """As before training, when the final layer is 0."""
    pico = make_pico(**SMALL)
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    untrained = pico.with_state(**{name: torch.zeros_like(pico.state[name]) for name in names})
    case = profiled(untrained, tmp_path)
    formats = planned(case[0], "3")
    found = measured(case, formats).errors
    assert {error for errors in found.values() for error in errors.values()} == {0.0}
    assert try_formats(calibrated(*case), {name: fmts[0] for name, fmts in formats.items()}).error == 0.0


def test_errors_follow_amplifications_measured_anew() -> None:
    inside, outside = "blocks.1.attn.qkv.weight", "final_layer.linear.weight"
    old = Sensitivities({inside: {"int2-g64": 6.0}, outside: {"int2-g64": 5.0}}, ({"mixture": 1.0}, {"attention": 2.0}))
    new = old.at(({"mixture": 3.0}, {"attention": 4.0}))
    assert new.errors == {inside: {"int2-g64": 12.0}, outside: {"int2-g64": 5.0}}
    assert new.amplification == ({"mixture": 3.0}, {"attention": 4.0})
    assert old.at(({}, {})) == old == old.at(({}, {"attention": 0.0})), "what was not measured stays"


def test_a_trial_amplifies_what_it_rounds_and_nothing_else(case: Case) -> None:
    formats = {name: "int3-g32" for name in planned(case[0], "3") if name.startswith("blocks.1.attn.")}
    found = try_formats(calibrated(*case), formats)
    assert found.amplification[0] == {} and found.amplification[1].keys() == {"attention"}
    assert found.amplification[1]["attention"] > 0
    assert found.error == pytest.approx(end_to_end(case, formats), rel=1e-3)
