"""Experts stored as a base and differences: exact bytes, what is restored, what reads it, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from cli_helpers import here
from compressing import (
    blocks_of,
    calibrated_once,
    folder,
    formats_of,
    network,
    opened,
    outputs,
    pruning,
    quantised,
    quantising,
    silence_cholesky,
    state,
    stored,
)
from conftest import REPOSITORY, Pico, make_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupting import goes_on_to_the_same_bytes
from replaying import error_by_hand
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.cli.plan_differences import plan_differences
from ditmoe_cli.compression.algebra.matching import matchings
from ditmoe_cli.compression.algebra.truncated_svd import truncated
from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.delta.delta_plan import plan_delta
from ditmoe_cli.compression.delta.delta_sizes import rank_of_ratio
from ditmoe_cli.compression.delta.expert_base import base_of, difference
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import (
    CompressionPlan,
    Differences,
    Experts,
    Formats,
    Repair,
    parse_plan,
)
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.replay.tokens import reservoir_tokens
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.differences import DeltaFormat
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.expert_weights import read_expert
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import RoutingProfile

EXPERTS, HIDDEN, WIDTH, DEPTH = 4, 16, 24, 2
MATRICES = ("gate_proj", "up_proj", "down_proj")
KINDS: tuple[DeltaFormat, ...] = ("svd", "ternary")
SMALL = make_pico(hidden=HIDDEN, widths=((WIDTH,) * EXPERTS,) * DEPTH, input_size=4)
LEFT, TERNARY = (f"blocks.0.moe.experts.1.up_proj.weight.delta_{part}" for part in ("left", "ternary"))


def expert(block: int, e: int, matrix: str) -> str:
    return f"blocks.{block}.moe.experts.{e}.{matrix}.weight"


def planted(noise: float, shuffled: bool = True) -> Pico:
    """A pico model whose experts are one another plus a difference of rank 1, their neurons in another order."""
    generator = torch.Generator().manual_seed(1)
    changes: dict[str, Tensor | None] = {}
    for block in range(DEPTH):
        for e in range(EXPERTS):
            order = torch.randperm(WIDTH, generator=generator) if shuffled else torch.arange(WIDTH)
            for matrix in MATRICES:
                common = SMALL.state[expert(block, 0, matrix)]
                row, column = (torch.randn(size, generator=generator) for size in common.shape)
                whole = common + noise * torch.outer(row, column) / HIDDEN
                changes[expert(block, e, matrix)] = whole[:, order] if matrix == "down_proj" else whole[order]
    return SMALL.with_state(**{name.replace(".", "__"): tensor for name, tensor in changes.items()})


def profile_of(checkpoint: Checkpoint, *, fast: bool = False) -> RoutingProfile:
    """A small profile, kept beside the checkpoint."""
    spec = SampleSpec(images=4, steps=4, cfg=1.5, seed=1, solver="ddim", classes=(0, 1))
    path = checkpoint.path.parent / f"{checkpoint.path.stem}{'.fast' if fast else ''}.profile.safetensors"
    path.unlink(missing_ok=True)
    return calibrated_once(checkpoint, Calibration(spec, 2, 64, 4, fast=fast), path)


def encoded(
    checkpoint: Checkpoint, delta: Differences, path: Path, profile: RoutingProfile | None = None
) -> Checkpoint:
    """The checkpoint with its experts stored as differences."""
    used = profile or profile_of(checkpoint)
    apply(checkpoint, plan_delta(checkpoint, delta, used), Output(path), profile=used)
    return open_checkpoint(path)


def codes_by_hand(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Base 3, the first of five codes lowest."""
    digits = [[byte // 3**power % 3 - 1 for power in range(5)] for byte in packed.tolist()]
    return torch.tensor(digits).flatten()[: shape[0] * shape[1]].reshape(shape).float()


def by_hand(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every expert's matrices from the tensors of a file, in fp32."""
    found = {}
    for block in range(DEPTH):
        for e in range(EXPERTS):
            for matrix in MATRICES:
                name = expert(block, e, matrix)
                base = tensors[f"blocks.{block}.moe.base.{matrix}.weight"].float()
                if f"{name}.delta_left" in tensors:
                    difference = tensors[f"{name}.delta_left"].float() @ tensors[f"{name}.delta_right"].float()
                else:
                    codes = codes_by_hand(tensors[f"{name}.delta_ternary"], tuple(base.shape))
                    difference = tensors[f"{name}.delta_scale"] * codes
                found[name] = base + difference
    return found


def distance(checkpoint: Checkpoint, original: Pico) -> float:
    """How far the outputs are from the original's, relative to them."""
    expected = outputs(original.model())
    return float((outputs(network(checkpoint)) - expected).norm() / expected.norm())


@settings(max_examples=8)
@given(
    kind=st.sampled_from(KINDS),
    ratio=st.floats(0.2, 1.0),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    shard_bytes=st.none() | st.integers(1, 40_000),
    attention=st.booleans(),
)
def test_bytes_are_predicted_to_the_last_one(
    kind: DeltaFormat, ratio: float, dtype: torch.dtype, shard_bytes: int | None, attention: bool
) -> None:
    pico = make_pico(hidden=HIDDEN, widths=((WIDTH,) * 3, (8,) * 5), input_size=4, dtype=dtype)
    with folder() as where:
        checkpoint = opened(pico, where)
        profile = profile_of(checkpoint, fast=True)
        plan = plan_delta(checkpoint, Differences(kind, ratio), profile)
        if attention:
            plan = replace(plan, stages=(*plan.stages, Formats({"blocks.0.attn.qkv.weight": "nf4"})))
        path = where / ("out" if shard_bytes else "out.safetensors")
        output = Output(path, shard_bytes=shard_bytes or 1)
        planned = planned_output(checkpoint, plan)
        written = apply(checkpoint, plan, output, profile=profile).bytes
        files = [path] if path.is_file() else list(path.iterdir())
        assert written == planned.predicted_bytes(output) == sum(file.stat().st_size for file in files)
        again = open_checkpoint(path)
        assert again.config == planned.config == checkpoint.config
        assert list(again.header.tensors.values()) == planned.infos
        infos = {name: weight.info for name, weight in again.weights.items()}
        assert infos == {name: weight.info for name, weight in checkpoint.weights.items()}
        formats = {weight.info.name: weight.format for weight in again.weights.values() if weight.format}
        assert formats == {name: kind for name in pico.state if ".experts." in name} | (
            formats_of(plan) if attention else {}
        )


@pytest.mark.parametrize(("kind", "dtype"), [("svd", torch.bfloat16), ("ternary", torch.float32)])
def test_the_network_is_that_of_base_plus_differences(kind: DeltaFormat, dtype: torch.dtype, tmp_path: Path) -> None:
    pico = make_pico(hidden=HIDDEN, widths=((WIDTH,) * EXPERTS,) * DEPTH, input_size=4, dtype=dtype)
    found = encoded(opened(pico, tmp_path), Differences(kind, 0.5), tmp_path / "out.safetensors")
    tensors = state(found)
    assert not tensors.keys() & {expert(0, 0, matrix) for matrix in MATRICES}
    dense = {name: tensor.to(dtype).float() for name, tensor in by_hand(tensors).items()}
    others = {name: tensors[name].float() for name in pico.state if name in tensors}
    assert all(torch.equal(others[name], pico.state[name].float()) for name in others)
    expected = outputs(Pico(pico.config, {**others, **dense}).model())
    assert_close(outputs(network(found)), expected, rtol=1e-4, atol=1e-4)
    read = read_expert(found, 1, 2)
    for matrix, weight in zip(MATRICES, (read.gate, read.up, read.down), strict=True):
        assert_close(weight, dense[expert(1, 2, matrix)], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("shuffled", with_slow([True, False]))
def test_differences_of_low_rank_are_restored(shuffled: bool, tmp_path: Path) -> None:
    """Four experts that differ by rank 1 each differ from their mean by rank 4 at most, which ratio 0.5 leaves."""
    pico = planted(0.5, shuffled)
    found = encoded(opened(pico, tmp_path), Differences("svd", 0.5), tmp_path / "out.safetensors")
    assert state(found)[LEFT].shape == (WIDTH, 4)
    assert distance(found, pico) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_are_restored_whatever_the_order_of_their_neurons(kind: DeltaFormat, tmp_path: Path) -> None:
    pico = planted(0.0)
    found = encoded(opened(pico, tmp_path), Differences(kind, 0.2), tmp_path / "out.safetensors")
    assert distance(found, pico) < 1e-5


def test_more_of_the_differences_is_nearer(tmp_path: Path) -> None:
    pico = planted(4.0)
    checkpoint = opened(pico, tmp_path)
    profile = profile_of(checkpoint)
    for kind, ratios in (("svd", (0.15, 0.5)), ("ternary", (0.02, 0.5))):
        paths = {ratio: tmp_path / f"{kind}{ratio}.safetensors" for ratio in ratios}
        errors = [
            distance(encoded(checkpoint, Differences(kind, ratio), path, profile), pico)
            for ratio, path in paths.items()
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > errors[-1]


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_ternary_codes_are_as_dense_as_asked_for(density: float, tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences("ternary", density), tmp_path / "out.safetensors")
    packed, scale = state(found)[TERNARY], state(found)[TERNARY.replace("delta_ternary", "delta_scale")]
    assert int(codes_by_hand(packed, (WIDTH, HIDDEN)).count_nonzero()) == math.ceil(density * WIDTH * HIDDEN)
    assert float(scale) > 0


def test_factors_are_the_nearest_on_the_profiles_tokens(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    profile, delta = profile_of(checkpoint), Differences("svd", 0.4)
    seen = encoded(checkpoint, delta, tmp_path / "seen.safetensors", profile)
    blind = encoded(checkpoint, delta, tmp_path / "blind.safetensors", profile_of(checkpoint, fast=True))
    original = network(checkpoint)
    for block in range(DEPTH):
        tokens = reservoir_tokens(profile, block)
        errors = [
            error_by_hand(tokens, original.blocks[block].moe, network(c).blocks[block].moe) for c in (seen, blind)
        ]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_that_no_token_selects_keeps_its_difference(
    kind: DeltaFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = SMALL.state["blocks.0.moe.gate.weight"].clone()
    router[1] = router[0]  # rows of equal probability: of ties the first ones are selected
    router[2] = router[0]
    pico = SMALL.with_state(blocks__0__moe__gate__weight=router)
    silence_cholesky(monkeypatch)
    checkpoint = opened(pico, tmp_path)
    profile = profile_of(checkpoint)
    selected = profile.block_tensor("selected", 0).sum(dim=(0, 1)).tolist()
    unused = [e for e, count in enumerate(selected) if not count]
    assert unused
    found = encoded(checkpoint, Differences(kind, 1.0), tmp_path / "out.safetensors", profile)
    if kind == "svd":  # the nearest in all directions alike
        experts = [read_expert(checkpoint, 0, e) for e in range(EXPERTS)]
        orders = matchings(experts, selected)
        base = base_of(experts, selected, orders)
        for e in unused:
            names = (f"{expert(0, e, matrix)}.delta" for matrix in MATRICES)
            stored_ones = [state(found)[f"{name}_left"] @ state(found)[f"{name}_right"] for name in names]
            for matrix, after in zip(difference(experts[e], base, orders[e]).matrices, stored_ones, strict=True):
                nearest = truncated(matrix, rank_of_ratio(*matrix.shape, 1.0))
                assert_close(after, nearest.left @ nearest.right, rtol=1e-4, atol=1e-5)
    assert bool(outputs(network(found)).isfinite().all())


def test_a_base_is_the_mean_by_selection_and_stored_once(tmp_path: Path) -> None:
    pico = planted(0.5, shuffled=False)
    checkpoint = opened(pico, tmp_path)
    profile = profile_of(checkpoint)
    tensors = state(encoded(checkpoint, Differences("ternary", 0.5), tmp_path / "out.safetensors", profile))
    for block in range(DEPTH):
        selected = profile.block_tensor("selected", block).sum(dim=(0, 1)).double()
        for matrix in MATRICES:
            experts = torch.stack([pico.state[expert(block, e, matrix)] for e in range(EXPERTS)]).double()
            mean = (experts * (selected / selected.sum())[:, None, None]).sum(dim=0)
            assert_close(tensors[f"blocks.{block}.moe.base.{matrix}.weight"].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", with_slow(KINDS))
def test_equal_work_gives_equal_bytes(kind: DeltaFormat, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    profile = profile_of(checkpoint)
    plan = plan_delta(checkpoint, Differences(kind, 0.3), profile)
    again = parse_plan(json.loads(json.dumps(plan.to_json())), "plan")
    assert again == plan
    for name, one in (("a", plan), ("b", again)):
        apply(checkpoint, one, Output(tmp_path / f"{name}.safetensors"), profile=profile)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("kind", with_slow(KINDS))
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(kind: DeltaFormat, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    profile = profile_of(checkpoint)
    plan = plan_delta(checkpoint, Differences(kind, 0.3), profile)
    pieces = goes_on_to_the_same_bytes(lambda target: apply(checkpoint, plan, Output(target), profile), tmp_path)
    assert pieces == ["block.0", "block.state.0", "block.1", "block.state.1"]


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_takes_differences_along_and_the_base_once(kind: DeltaFormat, tmp_path: Path) -> None:
    keeps = [(0, 3), (1, 2, 3)]
    whole = encoded(opened(SMALL, tmp_path), Differences(kind, 0.4), tmp_path / "delta.safetensors")
    plan = pruning(whole, keeps)
    plan = replace(plan, stages=(*plan.stages, Formats({"blocks.1.attn.qkv.weight": "int8"})))
    output = Output(tmp_path / "pruned.safetensors")
    assert apply(whole, plan, output).bytes == planned_output(whole, plan).predicted_bytes(output)
    pruned = open_checkpoint(output.path)
    for block, keep in enumerate(keeps):
        for new, old in enumerate(keep):
            moved, before = read_expert(pruned, block, new), read_expert(whole, block, old)
            assert all(torch.equal(getattr(moved, name), getattr(before, name)) for name in ("gate", "up", "down"))
    assert sum(".base." in info.name for info in planned_output(whole, plan).infos) == 3 * DEPTH
    assert bool(outputs(network(pruned)).isfinite().all())


def test_what_was_merged_or_ghosted_before_keeps_its_rows(tmp_path: Path) -> None:
    rows = ((0, -1, 1, 2, 3), (3, 0, 0, 1, 2))
    pico = make_pico(hidden=HIDDEN, widths=((WIDTH,) * EXPERTS,) * DEPTH, input_size=4, expert_of=rows)
    found = encoded(opened(pico, tmp_path), Differences("svd", 1.0), tmp_path / "out.safetensors")
    assert found.config == pico.config
    assert [found.expert_map(block) for block in range(DEPTH)] == list(rows)


def test_a_plain_copy_keeps_every_byte(tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences("svd", 0.4), tmp_path / "out.safetensors")
    apply(found, None, Output(tmp_path / "copy", shard_bytes=20_000))
    copy = open_checkpoint(tmp_path / "copy")
    assert stored(copy) == stored(found)
    assert copy.fingerprint == found.fingerprint


# what is refused


def refused(checkpoint: Checkpoint, plan: CompressionPlan, match: str, kind: type[Exception] = BadInputError) -> None:
    with pytest.raises(kind, match=match) as error:
        planned_output(checkpoint, plan)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_cannot_share_a_base_are_refused(kind: DeltaFormat, tmp_path: Path) -> None:
    uneven = make_pico(hidden=HIDDEN, widths=((16, 24, 16), (8, 8, 8)), input_size=4)
    with pytest.raises(BadInputError, match=r"experts\.1\.gate_proj\.weight' is F32 \[24, 16\].*share a base"):
        plan_delta(opened(uneven, tmp_path), Differences(kind, 0.5), None)
    half = SMALL.state[expert(1, 2, "down_proj")].half()
    mixed = opened(SMALL.with_state(**{expert(1, 2, "down_proj"): half}), tmp_path, "mixed.safetensors")
    with pytest.raises(BadInputError, match=r"experts\.2\.down_proj\.weight' is F16 .*share a base"):
        plan_delta(mixed, Differences(kind, 0.5), None)


@pytest.mark.parametrize("kind", with_slow(KINDS))
def test_what_is_packed_already_is_refused(kind: DeltaFormat, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    for name, packed in (
        ("int8", quantised(checkpoint, 8, tmp_path / "int8.safetensors")),
        (kind, encoded(checkpoint, Differences(kind, 0.5), tmp_path / "delta.safetensors")),
    ):
        with pytest.raises(BadInputError, match=rf"gate_proj\.weight' is {name} already; store differences of the"):
            plan_delta(packed, Differences("svd", 0.5), None)


@pytest.mark.parametrize("kind", with_slow(KINDS))
def test_differences_are_neither_quantised_nor_refitted(kind: DeltaFormat, tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences(kind, 0.5), tmp_path / "delta.safetensors")
    with pytest.raises(BadInputError, match=f"is {kind} already"):
        plan_uniform(found, "nf4")
    name = expert(0, 1, "up_proj")
    refused(found, quantising(found, {name: "nf4"}), f"{name}' is {kind} already")
    blocks = blocks_of(pruning(found, [(0, 1), (0, 1)]))
    refit = CompressionPlan("prune", found.fingerprint, stages=(Experts(blocks, repair=Repair()),))
    refused(found, refit, f"is {kind} already, and what is packed cannot be refitted")


def test_a_plan_does_one_thing_to_experts(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    plan = plan_delta(checkpoint, Differences("svd", 0.5), None)
    for experts in (*pruning(checkpoint, [range(EXPERTS)] * DEPTH).stages, Experts(repair=Repair())):
        refused(checkpoint, replace(plan, stages=(experts, *plan.stages)), "make that two plans")
    name = expert(0, 0, "gate_proj")
    refused(
        checkpoint, replace(plan, stages=(*plan.stages, Formats({name: "nf4"}))), f"{name}' as nf4 and as a difference"
    )


def test_ratios_that_cannot_be_are_refused(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    with pytest.raises(InfeasibleError, match=r"0\.1 leaves rank 0 .* give at least 0\.105"):
        plan_delta(checkpoint, Differences("svd", 0.1), None)
    plan_delta(checkpoint, Differences("svd", 0.105), None)
    with pytest.raises(UsageError):
        plan_delta(checkpoint, Differences("svd", 1.5), None)


def test_the_profile_must_be_there_and_be_the_plans(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    profile = profile_of(checkpoint)
    plan = plan_delta(checkpoint, Differences("svd", 0.5), profile)
    other = opened(planted(0.5), tmp_path, "other.safetensors")
    output = Output(tmp_path / "out.safetensors")
    with pytest.raises(BadInputError, match=r"\(profile\)"):
        apply(checkpoint, plan, output)
    with pytest.raises(BadInputError, match="not the profile that the plan was made with"):
        apply(checkpoint, plan, output, profile=profile_of(checkpoint, fast=True))
    with pytest.raises(BadInputError, match="profile of another checkpoint"):
        plan_delta(other, Differences("svd", 0.5), profile)
    with pytest.raises(BadInputError, match="leaves open"):
        apply(checkpoint, plan_delta(checkpoint, Differences("svd", 0.5), None), output, profile=profile)
    with pytest.raises(BadInputError, match="profile of another checkpoint"):
        apply(checkpoint, replace(plan, profile=None), output, profile=profile_of(other))
    assert not output.path.exists()


def test_what_overflows_its_dtype_is_refused(tmp_path: Path) -> None:
    huge = {expert(0, e, "up_proj"): torch.full((WIDTH, HIDDEN), 6e4 * (-1) ** e).half() for e in range(EXPERTS)}
    pico = make_pico(hidden=HIDDEN, widths=((WIDTH,) * EXPERTS,) * DEPTH, input_size=4, dtype=torch.float16)
    checkpoint = opened(pico, tmp_path)
    broken = opened(pico.with_state(**huge), tmp_path, "huge.safetensors")
    made = profile_of(checkpoint)
    profile = replace(made, checkpoint=broken.fingerprint)
    with pytest.raises(BadInputError, match=r"up_proj\.weight\.delta_right' holds .* beyond the 65504 that fp16"):
        encoded(broken, Differences("svd", 0.5), tmp_path / "out.safetensors", profile)
    assert not (tmp_path / "out.safetensors").exists()


def test_bytes_that_stand_for_no_codes_are_named(tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences("ternary", 0.5), tmp_path / "delta.safetensors")
    codes = state(found)[TERNARY].clone()
    codes[3] = 250
    damaged = open_checkpoint(Pico(SMALL.config, {**state(found), TERNARY: codes}).save(tmp_path / "bad.safetensors"))
    with pytest.raises(BadInputError, match=f"{TERNARY}.*250 stands for no five codes"):
        network(damaged)


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_are_no_numbers_are_named(kind: DeltaFormat, tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences(kind, 0.5), tmp_path / "delta.safetensors")
    members = found.weights[expert(0, 2, "up_proj")].members
    for i, name in enumerate(name for name in members if state(found)[name].is_floating_point()):
        broken = {**state(found), name: torch.full_like(state(found)[name], float("nan"))}
        path = Pico(SMALL.config, broken).save(tmp_path / f"{i}.safetensors")
        with pytest.raises(BadInputError, match=f"{name}.*NaN"):
            network(open_checkpoint(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_member_is_named_on_opening(kind: DeltaFormat, tmp_path: Path) -> None:
    found = encoded(opened(SMALL, tmp_path), Differences(kind, 0.5), tmp_path / "delta.safetensors")
    weight = found.weights[expert(1, 3, "gate_proj")]
    assert len(weight.members) == 3
    for i, member in enumerate(weight.members):
        rest = {name: tensor for name, tensor in state(found).items() if name != member}
        path = Pico(SMALL.config, rest).save(tmp_path / f"{i}.safetensors")
        with pytest.raises(BadInputError, match=member):
            open_checkpoint(path)


# plans


def test_a_delta_enters_a_plans_json_digest_and_differences() -> None:
    plain = CompressionPlan("merge", "a" * 64)
    plan = replace(plain, stages=(Differences("svd", 0.25),))
    assert plan.to_json()["delta"] == {"kind": "svd", "ratio": 0.25}
    assert len({plain.digest, plan.digest, replace(plan, stages=(Differences("svd", 0.5),)).digest}) == 3
    assert len(plan_differences(plain, plan)) == 1
    assert plan.computes and not plain.computes
    ternary = {"kind": "ternary", "ratio": 1}
    assert parse_plan({**plan.to_json(), "delta": ternary}, "p").stages == (Differences("ternary", 1.0),)


@pytest.mark.parametrize(
    "delta",
    [
        5,
        "svd",
        {},
        {"kind": "svd"},
        {"kind": "svd", "ratio": 0.5, "rank": 3},
        {"kind": "int8", "ratio": 0.5},
        {"kind": ["svd"], "ratio": 0.5},
        {"kind": "svd", "ratio": 0},
        {"kind": "svd", "ratio": 1.5},
        {"kind": "svd", "ratio": "0.5"},
        {"kind": "svd", "ratio": True},
        {"kind": "svd", "ratio": float("nan")},
    ],
)
def test_a_malformed_delta_is_refused(delta: object) -> None:
    document = {**CompressionPlan("merge", "a" * 64).to_json(), "delta": delta}
    with pytest.raises(BadInputError, match=r"^my\.json: .*delta"):
        parse_plan(document, "my.json")


# the command line


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a command that must succeed, and return its envelope."""

    def run(*arguments: object, stdin: str | None = None) -> dict[str, Any]:
        outcome = here(*arguments, cwd=tmp_path, stdin=stdin)
        assert outcome.code == 0, outcome.err
        document = json.loads(outcome.out)
        assert isinstance(document, dict)
        return document

    return run


@pytest.mark.parametrize("kind", with_slow(KINDS))
def test_a_dry_run_a_saved_plan_and_a_pipe_agree(
    kind: DeltaFormat, tmp_path: Path, cli: Callable[..., dict[str, Any]]
) -> None:
    pico = make_pico(sampler="rf", in_channels=1, hidden=HIDDEN, widths=((WIDTH,) * EXPERTS,) * DEPTH)
    pico.save(tmp_path / "a.safetensors")
    profiled = cli("profile-experts", "a.safetensors", "--images", 4, "--steps", 2, "--bins", 2, "-o", "p.safetensors")
    settings = ("--calibration-images", 4, "--calibration-steps", 2)  # which the history keeps
    open_plan = cli("merge", "a.safetensors", "--delta", kind, "--dry-run", *settings)["result"]
    dry = cli("merge", "a.safetensors", "--delta", kind, "--dry-run", "--profile", "p.safetensors")
    (tmp_path / "dry.json").write_text(json.dumps(dry))
    made = cli("merge", "--delta", kind, stdin=json.dumps(profiled))
    assert made["result"]["bytes"] == dry["result"]["bytes"] == open_plan["bytes"]
    assert open_plan["plan"] is None
    ratio = {"svd": 0.25, "ternary": 0.5}[kind]
    assert made["result"]["delta"] == dry["result"]["plan"]["delta"] == {"kind": kind, "ratio": ratio}
    path = Path(made["checkpoint"])
    assert path.name == f"a.merge-{kind}{ratio:g}.safetensors"
    assert path.stat().st_size == made["result"]["bytes"]
    replayed = cli("apply", "a.safetensors", "--plan", "dry.json", "--profile", "p.safetensors", "-o", "b.safetensors")
    assert Path(replayed["checkpoint"]).read_bytes() == path.read_bytes()
    assert cli("inspect", stdin=json.dumps(made))["result"]["formats"][kind] == 3 * EXPERTS * DEPTH
    sampled = cli("sample", "--images", 2, "--steps", 2, "-o", "s.safetensors", stdin=json.dumps(made))
    assert Path(sampled["samples"]).is_file()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--delta", "svd", "--groups", "2"), 2, "exclude each other"),
        (("--delta-ratio", "0.5"), 2, "needs --delta"),
        (("--delta-ratio", "0.5", "--groups", "2"), 2, "needs --delta"),
        (("--delta", "pca"), 2, "choose svd or ternary"),
        (("--delta", "svd", "--delta-ratio", "0"), 2, "above 0 and at most 1"),
        (("--delta", "ternary", "--delta-ratio", "nan"), 2, "above 0 and at most 1"),
        (("--delta", "svd", "--delta-ratio", "0.001"), 4, "leaves rank 0"),
        ((), 2, "or --delta"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    outcome = here("merge", "demo:digits", *options, cwd=tmp_path)
    assert outcome.code == code
    assert message in outcome.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from ditmoe_cli.cli.app import run\n"
        "code = run(['merge', 'demo:digits', '--delta', 'ternary', '--dry-run'])\n"
        "print(code, {'torch', 'numpy'} & set(sys.modules))\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"
