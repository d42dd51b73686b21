"""Weights rounded block after block: what is written, how far it is from the original, and what depends on what."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from compressing import applied, formats_of, network, opened, profile_of, pruning, stored
from conftest import Pico, make_pico
from interrupting import goes_on_to_the_same_bytes
from rounding import guided_by_hand, relative, states_for
from torch import Tensor

from ditmoe_cli.compression.apply import Applied, apply
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import (
    CompressionPlan,
    Differences,
    Formats,
    Rounding,
    parse_plan,
)
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.replay import states as states_of_fits
from ditmoe_cli.compression.replay.states import States, calibration_states
from ditmoe_cli.compression.rounding import gptq_blocks as encoding
from ditmoe_cli.compression.rounding import layers_together
from ditmoe_cli.compression.rounding.gptq import Readers, Rounded, best_rounding
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.base import Grid
from ditmoe_cli.formats.grouped import GroupedFormat
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.registry import parse_format, quantized_members
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.profile import RoutingProfile

TOKENS = 512
FEW = Rounding(tokens=TOKENS)
SMALL: dict[str, Any] = {"hidden": 32, "input_size": 4, "experts": 3}
MIXED = ("int3-g32", "int4-g64-sym", "ternary-g64", "nf4", "int8", "int5-g128", "fp4-dq")
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "rf, unequal widths": (
        {"sampler": "rf", "in_channels": 1, "widths": ((32, 64, 40), (96, 33, 48)), "shared_width": 48},
        1.0,
    ),
    "guided ddpm, bf16, merged": ({"dtype": torch.bfloat16, "expert_of": ((0, 1, 2, 0), (2, 1, 0, -1))}, 1.5),
    "guided rf, flash": ({"sampler": "rf", "in_channels": 2, "attention": "flash"}, 3.0),
    "an expert that no row selects": ({"expert_of": ((0, 1, 0), (1, 1, 0))}, 1.5),
    "constants and residuals": (
        {
            "expert_of": ((0, 1, 2, -2), (2, 1, -2, 0)),
            "extras": {"constants": 1, "residual_constant": True, "residual_linear": True},
        },
        1.5,
    ),
}
QUICK = 2  # the first cases, which between them have a little of everything
Case = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(scope="module", params=with_slow(CASES, QUICK))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    options, cfg = CASES[request.param]
    # as wide in all blocks as in the first row of a map that names all experts
    widths = {"widths": ((64,) * 3,) * 2} if "expert_of" in options else {}
    return made(make_pico(**{**SMALL, **widths, **options}), tmp_path_factory.mktemp("encode"), cfg)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_rounded(small: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Applied]:
    """The small model rounded to assorted formats, whole in one file."""
    torch.manual_seed(1)
    return encoded(small, planned(small[0], assorted(small[0])), tmp_path_factory.mktemp("rounded") / "o.safetensors")


def made(pico: Pico, where: Path, cfg: float = 1.5) -> Case:
    checkpoint = opened(pico, where)
    return checkpoint, profile_of(checkpoint, images=8, cfg=cfg)


def planned(checkpoint: Checkpoint, formats: Mapping[str, str], rounding: Rounding | None = FEW) -> CompressionPlan:
    return CompressionPlan("quantize", checkpoint.fingerprint, stages=(Formats(formats, rounding),))


def all_at(checkpoint: Checkpoint, fmt: str) -> dict[str, str]:
    """All that may be quantised in one format."""
    return dict.fromkeys(candidate_formats(checkpoint, Candidates()), fmt)


def assorted(checkpoint: Checkpoint) -> dict[str, str]:
    """A format of each kind here and there; every seventh weight is left alone."""
    names = [name for i, name in enumerate(candidate_formats(checkpoint, Candidates())) if i % 7 != 6]
    return {name: MIXED[i % len(MIXED)] for i, name in enumerate(names)}


def encoded(case: Case, plan: CompressionPlan, path: Path) -> tuple[Checkpoint, Applied]:
    done = apply(case[0], plan, Output(path), profile=case[1])
    return open_checkpoint(path), done


def error_by_hand(case: Case, written: Checkpoint) -> float:
    """Of the guided prediction, on the states that were rounded on."""
    states, cfg = states_of(case)
    return relative(*(guided_by_hand(network(each), states, cfg) for each in (written, case[0])))


def states_of(case: Case) -> tuple[States, float]:
    """The conditional ones alone take `TOKENS`."""
    branches = 1 if case[1].calibration["cfg"] == 1.0 else 2
    return states_for(*case, TOKENS * branches)


# what is written


@dataclass(frozen=True)
class Done:
    """A plan of all kinds of formats carried out, and the weights that the stream went through meanwhile."""

    case: Case
    plan: CompressionPlan
    written: Checkpoint
    told: Applied
    rounded: Mapping[str, Tensor]


@pytest.fixture(scope="module")
def done(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Done:
    rounded: dict[str, Tensor] = {}
    pack = Grid.pack

    def watched(grid: Grid, weight: Tensor, info: TensorInfo) -> dict[str, Tensor]:
        if info.name.startswith("blocks."):
            rounded[info.name] = weight.clone()
        return pack(grid, weight, info)

    plan = planned(case[0], assorted(case[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grid, "pack", watched)
        return Done(case, plan, *encoded(case, plan, tmp_path_factory.mktemp("done") / "out.safetensors"), rounded)


def test_bytes_are_predicted_and_all_else_stays(done: Done) -> None:
    checkpoint, written = done.case[0], done.written
    expected = planned_output(checkpoint, done.plan)
    assert done.told.bytes == expected.predicted_bytes(Output(written.path)) == written.path.stat().st_size
    assert list(written.header.tensors.values()) == expected.infos
    assert {name for name, weight in written.weights.items() if weight.format} == formats_of(done.plan).keys()
    before, after = stored(checkpoint), stored(written)
    left = [name for name in before if name not in formats_of(done.plan)]
    assert left and all(after[name] == before[name] for name in left)
    assert written.config == checkpoint.config and written.ancestors[-1] == checkpoint.fingerprint


def test_what_is_written_is_what_the_stream_went_through(done: Done) -> None:
    """Rounded weights lie on their grids: packing and unpacking them changes nothing."""
    written, formats = done.written, formats_of(done.plan)
    assert done.rounded.keys() == {name for name in formats if name.startswith("blocks.")}
    for name, weight in done.rounded.items():
        found = written.weights[name]
        kinds = [
            replace(fmt, group=0) if isinstance(fmt, GroupedFormat) else fmt
            for fmt in (parse_format(found.format), parse_format(formats[name]))
        ]
        assert kinds[0] == kinds[1], "a row of fewer columns is one group, whatever the size of groups"
        assert list(found.members) == [member.name for member in quantized_members(found.info, formats[name])]
        members = {member: written.reader.tensor(member) for member in found.members}
        values = parse_format(found.format).dequantize(found.info, members)
        assert torch.equal(values, weight), name


def test_the_error_told_is_that_of_the_file(done: Done) -> None:
    assert done.told.measured.prediction_error is not None and done.told.measured.prediction_error > 1e-4
    assert done.told.measured.prediction_error == pytest.approx(error_by_hand(done.case, done.written), rel=0.01)


def test_the_agreement_told_is_that_of_the_file(done: Done) -> None:
    agreement = done.told.measured.top_k_agreement
    assert len(agreement) == 2 and all(0 < share <= 1 for share in agreement) and min(agreement) < 1
    states, cfg = states_of(done.case)
    ours, theirs = (selected(network(each), states, cfg) for each in (done.written, done.case[0]))
    for share, mine, other in zip(agreement, ours, theirs, strict=True):
        both = [len(set(a) & set(b)) / len(b) for a, b in zip(mine, other, strict=True)]
        assert share == pytest.approx(statistics.mean(both), abs=2e-3)


def selected(model: DiTMoE, states: States, cfg: float) -> list[list[list[int]]]:
    """The router rows that each token selects, by block, in all branches."""
    found: list[list[list[int]]] = [[] for _ in model.blocks]

    def watch(event: MoEEvent) -> None:
        found[event.block] += event.routing.rows.tolist()

    null = torch.full_like(states.labels, model.config.num_classes)
    with torch.no_grad():
        for labels in (states.labels, null)[: 1 if cfg == 1.0 else 2]:
            model(states.z, states.t, labels, watch)
    return found


def test_eight_bits_change_next_to_nothing(small: Case, tmp_path: Path) -> None:
    written, done = encoded(small, planned(small[0], all_at(small[0], "int8-g32")), tmp_path / "out.safetensors")
    assert done.measured.prediction_error is not None and 0 < done.measured.prediction_error < 2e-3
    assert all(0.97 <= share <= 1 for share in done.measured.top_k_agreement)
    assert sum(isinstance(layer, PackedLinear) for layer in network(written).modules()) == len(
        all_at(small[0], "int8-g32")
    )


def test_without_formats_nothing_changes(small: Case, tmp_path: Path) -> None:
    written, done = encoded(small, planned(small[0], {}), tmp_path / "out.safetensors")
    assert stored(written) == stored(small[0])
    assert (done.measured.prediction_error, done.measured.top_k_agreement) == (0.0, (1.0, 1.0))


def test_layers_outside_the_blocks_are_rounded_to_the_nearest_values(small: Case, tmp_path: Path) -> None:
    formats = {name: fmt for name, fmt in all_at(small[0], "int4-g32").items() if not name.startswith("blocks.")}
    assert len(formats) == 4
    found, done = encoded(small, planned(small[0], formats), tmp_path / "gptq.safetensors")
    plain = applied(small[0], planned(small[0], formats, None), tmp_path / "nearest.safetensors")
    assert stored(found) == stored(plain)
    assert done.measured.prediction_error == pytest.approx(error_by_hand(small, plain), rel=1e-3)


def test_equal_work_gives_equal_bytes(small: Case, small_rounded: tuple[Checkpoint, Applied], tmp_path: Path) -> None:
    torch.manual_seed(2)
    formats = assorted(small[0])
    turned = {name: formats[name] for name in reversed(list(formats))}
    again = encoded(small, parse_plan(planned(small[0], turned).to_json(), "plan"), tmp_path / "again.safetensors")
    assert again[0].path.read_bytes() == small_rounded[0].path.read_bytes()
    assert again[1] == small_rounded[1]


def test_sharded_outputs_hold_the_same(small: Case, small_rounded: tuple[Checkpoint, Applied], tmp_path: Path) -> None:
    plan = planned(small[0], assorted(small[0]))
    output = Output(tmp_path / "shards", shard_bytes=20_000)
    done = apply(small[0], plan, output, profile=small[1])
    assert done.bytes == planned_output(small[0], plan).predicted_bytes(output)
    assert stored(open_checkpoint(output.path)) == stored(small_rounded[0])


@pytest.mark.slow
def test_a_pruned_checkpoint_is_rounded_as_any_other(small: Case, tmp_path: Path) -> None:
    """Its ghost rows count in the softmax, and select nothing."""
    pruned = applied(small[0], pruning(small[0], [(0, 2), (1, 2)], "ghost"), tmp_path / "pruned.safetensors")
    case = pruned, profile_of(pruned, images=8)
    written, done = encoded(case, planned(pruned, assorted(pruned)), tmp_path / "out.safetensors")
    assert written.config == pruned.config and written.expert_map(0) == (0, -1, 1)
    assert done.measured.prediction_error == pytest.approx(error_by_hand(case, written), rel=0.01)


# what it is for


@pytest.mark.slow
def test_it_beats_the_nearest_values(tmp_path: Path) -> None:
    """At 3 bits, on the states that were rounded on and on others."""
    gains: dict[str, list[float]] = {"same": [], "fresh": []}
    for seed in range(2):
        (tmp_path / f"{seed}").mkdir()
        case = made(make_pico(**{**SMALL, "hidden": 64, "depth": 1, "seed": seed}), tmp_path / f"{seed}", 1.5)
        formats = all_at(case[0], "int3-g64")
        rounding = Rounding(tokens=1024)
        written, done = encoded(case, planned(case[0], formats, rounding), tmp_path / f"{seed}.gptq.safetensors")
        plain = applied(case[0], planned(case[0], formats, None), tmp_path / f"{seed}.nearest.safetensors")
        assert done.measured.prediction_error is not None
        gains["same"].append(done.measured.prediction_error / error_by_hand(case, plain))
        fresh = profile_of(case[0], "fresh", images=6, steps=5, cfg=1.5)
        other = case[0], fresh
        gains["fresh"].append(error_by_hand(other, written) / error_by_hand(other, plain))
    assert statistics.mean(gains["same"]) < 0.9 and max(gains["same"]) < 1
    assert statistics.mean(gains["fresh"]) < 0.95


def test_blocks_are_rounded_on_what_the_blocks_below_have_become(small: Case, tmp_path: Path) -> None:
    upper = {name: "int3-g32" for name in all_at(small[0], "x") if name.startswith("blocks.1.")}
    lower = {name: "int2-g32" for name in all_at(small[0], "x") if name.startswith("blocks.0.")}
    alone, both, below = (
        stored(encoded(small, planned(small[0], formats), tmp_path / f"{i}.safetensors")[0])
        for i, formats in enumerate((upper, {**upper, **lower}, lower))
    )
    packed = [name for name in alone if name.startswith("blocks.1.") and name.endswith("_packed")]
    changed = [name for name in packed if alone[name] != both[name]]
    assert len(changed) > len(packed) / 2
    assert all(both[name] == below[name] for name in both if name.startswith("blocks.0.")), "but not by those above"


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("attn.proj", "moe.experts.0.gate_proj"),
        pytest.param("adaLN_modulation.1", "attn.qkv", marks=pytest.mark.slow),
        pytest.param("attn.qkv", "attn.proj", marks=pytest.mark.slow),
        pytest.param("moe.experts.1.up_proj", "moe.experts.1.down_proj", marks=pytest.mark.slow),
        pytest.param("moe.shared_experts.gate_proj", "moe.shared_experts.down_proj", marks=pytest.mark.slow),
    ],
)
def test_within_a_block_what_comes_first_counts(early: str, late: str, small: Case, tmp_path: Path) -> None:
    """Whatever the order in which a plan lists them."""
    first, second = (f"blocks.0.{name}.weight" for name in (early, late))
    alone = {second: "int3-g32"}
    found = [
        stored(encoded(small, planned(small[0], formats), tmp_path / f"{i}.safetensors")[0])
        for i, formats in enumerate((alone, {**alone, first: "int2-g32"}, {first: "int2-g32", **alone}))
    ]
    members = [name for name in found[0] if name.startswith(second) and name != second]
    assert any(found[0][name] != found[1][name] for name in members)
    assert found[1] == found[2]
    assert all(found[1][f"{first}_packed"] == other[f"{first}_packed"] for other in found[2:])


@pytest.mark.parametrize("matrix", ["up_proj", "down_proj"])
def test_tokens_weigh_what_their_errors_do(
    matrix: str, small: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """γ², the branch's weight and the squared routing weight; few tokens are shrunk towards all of the block."""
    given: list[Readers] = []

    def watched(readers: Sequence[Readers]) -> list[tuple[Rounded, ...]]:
        given.extend(readers)
        return best_rounding(readers)

    monkeypatch.setattr(layers_together, "best_rounding", watched)
    encoded(
        small, planned(small[0], {f"blocks.0.moe.experts.1.{matrix}.weight": "int4-g64"}), tmp_path / "o.safetensors"
    )
    model, (states, cfg) = network(small[0]), states_of(small)
    events = []
    for labels in (states.labels, torch.full_like(states.labels, model.config.num_classes)):
        model(states.z, states.t, labels, lambda event: events.append(event) if event.block == 0 else None)
    moments, weights = {}, {}
    for side in (False, True):
        total: dict[str, list[Tensor]] = {"own": [], "all": []}
        for event, branch in zip(events, (cfg**2, (1 - cfg) ** 2), strict=True):
            u = event.inputs if matrix == "up_proj" else model.blocks[0].moe.experts[1].neurons(event.inputs)
            mine = (states.held == side).repeat_interleave(small[0].config.num_patches)
            weight = branch * event.gamma.square().mean(dim=1).repeat_interleave(small[0].config.num_patches)
            gate = event.routing.gate_of(1)
            for name, w in (("own", weight * gate.square()), ("all", weight)):
                total[name].append(torch.cat([u, w.unsqueeze(1)], dim=1)[mine].double())
        for name, parts in total.items():
            rows = torch.cat(parts)
            x, weights[name, side] = rows[:, :-1], rows[:, -1]
            moments[name, side] = (x * rows[:, -1:]).T @ x / rows[:, -1].sum()
    (readers,) = given
    held, hessian = readers.held.T @ readers.held, readers.hessian
    mean = moments["own", True] * weights["own", True].sum()
    scale = float(held.trace() / mean.trace())  # of the weights, which are scaled to a mean of 1
    torch.testing.assert_close(held.double(), mean * scale, rtol=1e-3, atol=1e-4 * float(held.diagonal().mean()))
    own = weights["own", False]
    tokens = float(own.sum() ** 2 / own.square().sum())
    assert readers.tokens == pytest.approx(tokens, rel=1e-3)
    share = tokens / (tokens + len(hessian))
    expected = share * moments["own", False] + (1 - share) * moments["all", False]
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-3, atol=1e-4)


def test_what_an_expert_is_given_decides_how_it_is_rounded(tmp_path: Path) -> None:
    """Equal weights of two experts are rounded alike to the nearest values, and otherwise by GPTQ."""
    names = [f"blocks.0.moe.experts.{e}.down_proj.weight" for e in (0, 1)]
    pico = make_pico(**SMALL)
    twin = made(pico.with_state(**{names[1]: pico.state[names[0]]}), tmp_path)
    formats = dict.fromkeys(names, "int3-g32")
    for rounding, equal in ((None, True), (FEW, False)):
        found = stored(encoded(twin, planned(twin[0], formats, rounding), tmp_path / f"{equal}.safetensors")[0])
        assert (found[f"{names[0]}_packed"][2] == found[f"{names[1]}_packed"][2]) == equal


def test_tokens_may_be_given(small: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patches, taken = small[0].config.num_patches, []

    def watched(*args: Any) -> States:
        states = calibration_states(*args)
        taken.append(args[2])
        return states

    monkeypatch.setattr(states_of_fits, "calibration_states", watched)
    monkeypatch.setattr(states_of_fits, "FEWEST_TOKENS", 0)
    formats = {"t_embedder.mlp.0.weight": "int4-g64"}
    for tokens, wanted in ((400, 400 // patches), (0, 8 * 256 // patches)):  # 8 for each input of the time embedding
        encoded(small, planned(small[0], formats, Rounding(tokens=tokens)), tmp_path / f"{tokens}.safetensors")
        assert taken.pop() == wanted


# what is refused


def refused(case: Case, plan: CompressionPlan, where: Path, profile: RoutingProfile | None) -> Iterator[str]:
    """The line that says why; nothing is left behind."""
    before = sorted(where.iterdir())
    with pytest.raises(BadInputError) as caught:
        apply(case[0], plan, Output(where / "out.safetensors"), profile=profile)
    assert sorted(where.iterdir()) == before
    yield str(caught.value)


def test_differences_that_are_rounded_are_refused(small: Case, tmp_path: Path) -> None:
    formats = Formats({"blocks.0.attn.qkv.weight": "int4-g64"}, Rounding())
    plan = CompressionPlan("quantize", small[0].fingerprint, stages=(Differences("svd", 0.25), formats))
    (said,) = refused(small, plan, tmp_path, small[1])
    assert "make that two plans, rounding last" in said


def test_profiles_that_do_not_fit_are_refused(small: Case, tmp_path: Path) -> None:
    plan = planned(small[0], all_at(small[0], "int4-g64"))
    (said,) = refused(small, plan, tmp_path, None)
    assert "(profile)" in said
    (tmp_path / "other").mkdir()
    other = made(make_pico(**{**SMALL, "seed": 1}), tmp_path / "other")
    (said,) = refused(small, plan, tmp_path, other[1])
    assert str(other[1].path) in said
    fast = profile_of(small[0], "fast", fast=True)
    (said,) = refused(small, plan, tmp_path, fast)
    assert "keeps no states" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stem", ["blocks.1.moe.experts.2.up_proj", "blocks.0.attn.proj", "t_embedder.mlp.0"])
def test_broken_weights_are_refused_by_name(value: float, stem: str, small: Case, tmp_path: Path) -> None:
    name = f"{stem}.weight"
    (tmp_path / "in").mkdir()
    pico = make_pico(**SMALL)
    weight = pico.state[name].clone()
    weight[3, 5] = value
    broken = opened(pico.with_state(**{name: weight}), tmp_path / "in")
    plan = planned(broken, all_at(broken, "int4-g64"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "require_profile_of", lambda *_: None)
        (said,) = refused((broken, small[1]), plan, tmp_path, small[1])
    assert name in said


def test_values_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    name = "blocks.1.moe.experts.2.down_proj.weight"
    pico = make_pico(**SMALL)
    weight = pico.state[name].clone()
    weight[3, 5] = 1e5
    (tmp_path / "in").mkdir()
    large = made(pico.with_state(**{name: weight}), tmp_path / "in")
    (said,) = refused(large, planned(large[0], all_at(large[0], "int4-g64")), tmp_path, large[1])
    assert name in said


def test_a_model_that_predicts_nothing_loses_nothing(tmp_path: Path) -> None:
    """As before training, when the final layer is 0."""
    pico = make_pico(**SMALL)
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    case = made(pico.with_state(**{name: torch.zeros_like(pico.state[name]) for name in names}), tmp_path)
    formats = {name: "int3-g64" for name in all_at(case[0], "int3-g64") if not name.startswith("blocks.0.")}
    _, done = encoded(case, planned(case[0], formats), tmp_path / "out.safetensors")
    assert done.measured.prediction_error == 0.0


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(small: Case, tmp_path: Path) -> None:
    """The errors too, which are measured behind the last block."""
    checkpoint, profile = small
    plan = planned(checkpoint, dict.fromkeys(candidate_formats(checkpoint, Candidates()), "int3-g32"))
    errors = []

    def run(target: Path) -> None:
        errors.append(apply(checkpoint, plan, Output(target), profile).measured)

    assert goes_on_to_the_same_bytes(run, tmp_path) == ["block.0", "block.state.0", "block.1", "block.state.1"]
    assert all(each == errors[0] for each in errors)
