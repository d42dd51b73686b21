"""Weights that are computed: what is written, to the byte; what they are, by hand; and whole models that stay equal."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from compressing import (
    EXPERT_OF,
    applied,
    formats_of,
    network,
    opened,
    outputs,
    profile_of,
    pruned,
    pruning,
    quantised,
    state,
    stored,
)
from conftest import Pico, make_pico
from interrupting import goes_on_to_the_same_bytes
from replaying import error_by_hand
from seeing import Seen
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.compression import rebuild as rebuilding
from ditmoe_cli.compression.algebra.neurons import DEFAULT_ALPHA
from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats, Repair, parse_plan
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.replay import states as state_budget
from ditmoe_cli.compression.replay.states import calibration_states
from ditmoe_cli.compression.replay.tokens import reservoir_tokens
from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.progress import watched_by
from ditmoe_cli.routing.calibration_settings import profiled_spec
from ditmoe_cli.routing.profile import RoutingProfile

HIDDEN, WIDTH, EXPERTS, SHARED = 16, 24, 4, 20
SMALL = make_pico(hidden=HIDDEN, input_size=4, widths=((WIDTH,) * EXPERTS,) * 2, shared_width=SHARED)
ALL = tuple(range(EXPERTS))
REPAIR = Repair(tokens=512)
THOROUGH = Repair(tokens=4096)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the few unknowns here."""
    monkeypatch.setattr(state_budget, "FEWEST_TOKENS", 512)
    monkeypatch.setattr(rebuilding, "TOKENS_PER_UNKNOWN", 1)


Made = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The small model with its profile."""
    checkpoint = opened(SMALL, tmp_path_factory.mktemp("rebuild"))
    return checkpoint, profile_of(checkpoint, images=8)


def planned(
    checkpoint: Checkpoint, *blocks: BlockPlan, merging: str | None = None, repair: Repair | None = None
) -> CompressionPlan:
    """A plan of the blocks, the last one's for those that are not given; of any profile."""
    filled = (*blocks, *[blocks[-1]] * (checkpoint.config.depth - len(blocks)))
    return CompressionPlan("prune", checkpoint.fingerprint, stages=(Experts(filled, merging, repair),))


GHOST = BlockPlan((0, 2), "ghost")
PAIRS = BlockPlan((0, 1), "ghost", merged=((2, 0), (3, 1)))
PLANS: dict[str, tuple[tuple[BlockPlan, ...], str | None, Repair | None]] = {
    "ghost, refitted": ((GHOST,), None, REPAIR),
    "mass, refitted": ((replace(GHOST, router="mass"),), None, REPAIR),
    "slice, refitted": ((replace(GHOST, router="slice"),), None, Repair(False, True, False, False, 512)),
    "slice with residuals": ((replace(GHOST, router="slice"),), None, REPAIR),
    "a block that stays, refitted": ((BlockPlan(ALL, "ghost"), GHOST), None, REPAIR),
    "merged": ((PAIRS,), "m-smoe", None),
    "merged, refitted": ((PAIRS,), "sub-moe", REPAIR),
    "merged by tokens": ((PAIRS, replace(PAIRS, router="slice")), "mergemoe", None),
    "merged and dropped": ((BlockPlan((0, 1), "ghost", merged=((2, 0),)),), "average", REPAIR),
    "merged into one": ((BlockPlan((2,), "ghost", merged=((0, 2), (1, 2), (3, 2))),), "uncurl", REPAIR),
    "narrowed": ((BlockPlan(ALL, "ghost", widths=(8, 16, 24, 1)), BlockPlan(ALL, "ghost")), None, None),
    "narrowed, shared too, refitted": ((BlockPlan((1, 3), "ghost", widths=(8, 16), shared_width=4),), None, REPAIR),
    "constants": ((replace(GHOST, constants=True),), None, None),
    "constants of rank 3": ((replace(GHOST, constants=True, rank=3), GHOST), None, None),
    "constants, mass, refitted": ((replace(GHOST, router="mass", constants=True, rank=1),), None, REPAIR),
}


VARIED = (
    *("ghost, refitted", "slice with residuals", "merged, refitted", "merged by tokens", "merged into one"),
    *("narrowed, shared too, refitted", "constants, mass, refitted"),
)
REST = [(name, None) for name in PLANS if name not in VARIED]


def plan_called(name: str, checkpoint: Checkpoint) -> CompressionPlan:
    blocks, merging, repair = PLANS[name]
    return planned(checkpoint, *blocks, merging=merging, repair=repair)


@pytest.mark.parametrize(
    "name", with_slow(["ghost, refitted", "merged by tokens", "constants of rank 3", "merged", "narrowed"], quick=2)
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(name: str, made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    plan = plan_called(name, checkpoint)
    errors = []

    def run(target: Path) -> None:
        errors.append(apply(checkpoint, plan, Output(target), profile).measured)

    pieces = goes_on_to_the_same_bytes(run, tmp_path)
    assert pieces == ["block.0", "block.state.0", "block.1", "block.state.1"]
    assert all(each == errors[0] for each in errors), "errors of blocks that were done before are kept with them"


@pytest.mark.parametrize(
    ("name", "shard_bytes"),
    with_slow([*((name, None) for name in VARIED), ("constants, mass, refitted", 9_000), *REST], len(VARIED) + 1),
)
def test_bytes_are_predicted_and_the_output_runs(
    name: str, shard_bytes: int | None, made: Made, tmp_path: Path
) -> None:
    checkpoint, profile = made
    plan = plan_called(name, checkpoint)
    output = Output(tmp_path / ("out" if shard_bytes else "out.safetensors"), shard_bytes=shard_bytes or 1)
    expected = planned_output(checkpoint, plan)
    done = apply(checkpoint, plan, output, profile=profile)
    files = [output.path] if output.path.is_file() else list(output.path.iterdir())
    assert done.bytes == expected.predicted_bytes(output) == sum(file.stat().st_size for file in files)
    assert len(done.measured.refit_error) == (2 if plan.stage(Experts).repair else 0)
    assert all(0 < error <= 1 for error in done.measured.refit_error)
    again = open_checkpoint(output.path)
    assert again.config == expected.config
    assert again.assumptions == again.warnings == ()
    assert list(again.header.tensors.values()) == expected.infos
    assert again.ancestors == (checkpoint.fingerprint,)
    found = outputs(network(again))
    assert bool(found.isfinite().all())
    assert float((found - outputs(network(checkpoint))).abs().max()) > 1e-4


@pytest.mark.parametrize(
    "name", with_slow(["constants, mass, refitted", "a block that stays, refitted", "merged by tokens"])
)
def test_equal_work_gives_equal_bytes(name: str, made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    moved = opened(SMALL, tmp_path, "elsewhere.safetensors")
    plan = plan_called(name, checkpoint)
    torch.manual_seed(1)
    first = applied(checkpoint, plan, tmp_path / "first.safetensors", profile)
    torch.manual_seed(2)
    second = applied(moved, parse_plan(plan.to_json(), "plan"), tmp_path / "second.safetensors", profile)
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize("dtype", with_slow([torch.bfloat16, torch.float16]))
def test_computed_weights_keep_the_dtypes_of_what_they_come_from(dtype: torch.dtype, tmp_path: Path) -> None:
    router = "blocks.1.moe.gate.weight"
    pico = make_pico(hidden=HIDDEN, input_size=4, widths=((WIDTH,) * EXPERTS,) * 2, dtype=dtype)
    checkpoint = opened(pico.with_state(**{router: pico.state[router].float()}), tmp_path)
    plan = planned(checkpoint, replace(GHOST, constants=True, rank=1), repair=REPAIR)
    found = state(applied(checkpoint, plan, tmp_path / "out.safetensors", profile_of(checkpoint)))
    new = ("constants", "constants_up", "constants_down", "residual_constant", "residual_linear")
    for block, wanted in ((0, dtype), (1, torch.float32)):
        assert {found[f"blocks.{block}.moe.{name}"].dtype for name in (*new, "gate.weight")} == {wanted}
        assert found[EXPERT_OF.format(block)].dtype == torch.int32
    assert {tensor.dtype for name, tensor in found.items() if "proj.weight" in name} == {dtype}


def test_what_a_plan_leaves_alone_is_copied(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    plan = planned(checkpoint, replace(GHOST, constants=True), BlockPlan(ALL, "ghost"))
    before, after = stored(checkpoint), stored(applied(checkpoint, plan, tmp_path / "out.safetensors", profile))
    outside = [name for name in before if not name.startswith("blocks.0.moe.")]
    assert all(after[name] == before[name] for name in outside)
    assert {name for name in after if not name.startswith("blocks.0.moe.")} == set(outside)


@pytest.mark.parametrize("block", [BlockPlan(ALL, "ghost"), BlockPlan(ALL, "slice", widths=(WIDTH,) * EXPERTS)])
@pytest.mark.parametrize("repair", [None, REPAIR])
def test_nothing_to_do_does_nothing(block: BlockPlan, repair: Repair | None, made: Made, tmp_path: Path) -> None:
    """All experts at full width: what a refit is fitted to is 0 then, and the weights stay bit for bit."""
    checkpoint, profile = made
    plan = planned(checkpoint, replace(block, shared_width=SHARED), repair=repair)
    found = applied(checkpoint, plan, tmp_path / "out.safetensors", profile)
    assert stored(found) == stored(checkpoint)
    assert found.config == checkpoint.config


# refitting


@pytest.mark.parametrize("router", with_slow(["ghost", "mass", "slice"]))
def test_refitted_blocks_are_nearer_to_the_original(router: str, made: Made, tmp_path: Path) -> None:
    """On tokens of the reservoir, which the first block meets whatever becomes of it."""
    checkpoint, profile = made
    block = replace(GHOST, router=router)
    plain = applied(checkpoint, planned(checkpoint, block), tmp_path / "plain.safetensors")
    apply(checkpoint, planned(checkpoint, block, repair=THOROUGH), Output(tmp_path / "r.safetensors"), profile=profile)
    errors = [
        error_by_hand(reservoir_tokens(profile, 0), *(network(c).blocks[0].moe for c in (checkpoint, other)))
        for other in (plain, open_checkpoint(tmp_path / "r.safetensors"))
    ]
    assert errors[1] < 0.8 * errors[0]
    ends = [outputs(network(c)) for c in (checkpoint, plain, open_checkpoint(tmp_path / "r.safetensors"))]
    assert float((ends[2] - ends[0]).norm()) < float((ends[1] - ends[0]).norm())


def test_rows_and_neurons_are_not_touched_by_a_refit(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    refitted = state(
        applied(checkpoint, planned(checkpoint, GHOST, repair=REPAIR), tmp_path / "r.safetensors", profile)
    )
    copied = state(pruned(checkpoint, [GHOST.keep] * 2, "ghost", tmp_path / "c.safetensors"))
    changed = {name for name in copied if not torch.equal(copied[name], refitted[name])}
    assert changed == {name for name in copied if "down_proj" in name}
    assert {name.split(".")[-1] for name in refitted.keys() - copied.keys()} == {"residual_constant", "residual_linear"}


# narrowing


def expert(block: int, e: int | str, matrix: str) -> str:
    stem = f"experts.{e}" if isinstance(e, int) else e
    return f"blocks.{block}.moe.{stem}.{matrix}_proj.weight"


def test_the_neurons_of_highest_energy_stay(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    widths = (5, 24, 12, 1)
    found = state(
        applied(
            checkpoint, planned(checkpoint, BlockPlan(ALL, "ghost", widths=widths)), tmp_path / "n.safetensors", profile
        )
    )
    images = float(profile.tensor("gamma.images").sum())
    for block in range(2):
        gamma_square = profile.tensor("gamma.square")[block].double().sum(dim=(0, 1)) / images
        for e, width in enumerate(widths):
            old = [SMALL.state[expert(block, e, matrix)] for matrix in ("gate", "up", "down")]
            energy = [
                sum(float(gamma_square[d]) * float(old[2][d, i]) ** 2 for d in range(HIDDEN))
                * (
                    (1 - DEFAULT_ALPHA) * float(profile.tensor("neuron.energy")[block, e, i])
                    + DEFAULT_ALPHA * float(profile.tensor("neuron.max")[block, e, i])
                )
                for i in range(WIDTH)
            ]
            best = sorted(sorted(range(WIDTH), key=lambda i: -energy[i])[:width])
            assert torch.equal(found[expert(block, e, "gate")], old[0][best])
            assert torch.equal(found[expert(block, e, "up")], old[1][best])
            assert torch.equal(found[expert(block, e, "down")], old[2][:, best])


def without_every_second_neuron(shared: bool) -> Pico:
    """The small model where every second neuron, of the shared expert or of the others, adds nothing."""
    changes: dict[str, Tensor | None] = {}
    for name, tensor in SMALL.state.items():
        if "down_proj" in name and ("shared" in name) == shared:
            changes[name] = tensor.clone()
            changes[name][:, 1::2] = 0
    return SMALL.with_state(**changes)


@pytest.mark.parametrize(("shared", "repair"), [(False, REPAIR), (True, None)])
def test_neurons_that_add_nothing_go_without_a_trace(shared: bool, repair: Repair | None, tmp_path: Path) -> None:
    checkpoint = opened(without_every_second_neuron(shared), tmp_path)
    more: dict[str, Any] = {"shared_width": SHARED // 2} if shared else {"widths": (WIDTH // 2,) * EXPERTS}
    plan = planned(checkpoint, BlockPlan(ALL, "ghost", **more), repair=repair)
    found = applied(checkpoint, plan, tmp_path / "out.safetensors", profile_of(checkpoint))
    assert found.path.stat().st_size < checkpoint.path.stat().st_size
    name = expert(1, "shared_experts" if shared else 2, "gate")
    assert torch.equal(state(found)[name], state(checkpoint)[name][::2])
    assert_close(outputs(network(found)), outputs(network(checkpoint)), rtol=1e-4, atol=1e-5)


# constants


def events(
    pico_like: Checkpoint, checkpoint: Checkpoint, profile: RoutingProfile, states: int
) -> tuple[list[MoEEvent], Tensor]:
    """What the blocks of a model see of the calibration states, and each row's branch weight."""
    spec = profiled_spec(profile.calibration, checkpoint)
    found = calibration_states(profile, spec, states)
    null = torch.full_like(found.labels, checkpoint.config.num_classes)
    seen: list[MoEEvent] = []
    with torch.no_grad():
        network(pico_like)(found.z.repeat(2, 1, 1, 1), found.t.repeat(2), torch.cat([found.labels, null]), seen.append)
    return seen, torch.tensor([spec.cfg**2, (spec.cfg - 1) ** 2]).repeat_interleave(len(found))


def routed_to(checkpoint: Checkpoint, event: MoEEvent, branch: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the tokens that the original block sends to an expert, its outputs on them, and their weights w g²."""
    moe = network(checkpoint).blocks[event.block].moe
    routing = moe.gate(event.inputs)
    gates = (routing.weights * (routing.experts == e)).sum(dim=1).double()
    patches = len(event.inputs) // len(event.gamma)
    weights = (event.gamma.double().square().mean(dim=1) * branch).repeat_interleave(patches)
    mine = gates > 0
    inputs = event.inputs[mine]
    return inputs.double(), moe.experts[e](inputs).detach().double(), (weights * gates.square())[mine]


def test_constants_are_the_weighted_means_on_what_compressed_blocks_feed(made: Made, tmp_path: Path) -> None:
    """The second block's tokens are those behind the pruned first one; γ and guidance weigh them."""
    checkpoint, profile = made
    plan = planned(checkpoint, GHOST, replace(GHOST, constants=True))
    found = applied(checkpoint, plan, tmp_path / "out.safetensors", profile)
    assert state(found)[EXPERT_OF.format(1)].tolist() == [0, -2, 1, -3]
    means = []
    for model in (found, checkpoint):
        seen, branch = events(model, checkpoint, profile, 512 // 4)
        parts = (routed_to(checkpoint, seen[1], branch, e) for e in (1, 3))
        means.append(torch.stack([w @ f / w.sum() for _, f, w in parts]))
    assert_close(state(found)["blocks.1.moe.constants"].double(), means[0], rtol=1e-4, atol=1e-5)
    assert float((means[0] - means[1]).abs().max()) > 1e-3, "as the uncompressed block below feeds them they are others"


def test_linear_maps_beside_constants_leave_less_the_higher_their_rank(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    seen, branch = events(checkpoint, checkpoint, profile, 512 // 4)
    inputs, wanted, weights = routed_to(checkpoint, seen[0], branch, 1)
    errors = []
    for rank in (0, 4, HIDDEN):
        plan = planned(checkpoint, replace(GHOST, constants=True, rank=rank))
        tensors = state(applied(checkpoint, plan, tmp_path / f"{rank}.safetensors", profile))
        got = tensors["blocks.0.moe.constants"][0].double().expand(len(inputs), -1)
        if rank:
            down, up = (tensors[f"blocks.0.moe.constants_{part}"][0].double() for part in ("down", "up"))
            got = got + inputs @ down.T @ up.T
        errors.append(float(weights @ (wanted - got).square().sum(dim=1)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


# merging


def doubled(permuted: bool, **options: Any) -> Pico:
    """A model whose experts 2 and 3 are 0 and 1 again, their neurons in another order if `permuted`."""
    pico = make_pico(hidden=HIDDEN, input_size=4, widths=((WIDTH,) * EXPERTS,) * 2, **options)
    changes: dict[str, Tensor | None] = {}
    generator = torch.Generator().manual_seed(4)
    for block in range(2):
        for e in (2, 3):
            order = torch.randperm(WIDTH, generator=generator) if permuted else torch.arange(WIDTH)
            for matrix in ("gate", "up", "down"):
                twin = pico.state[expert(block, e - 2, matrix)]
                changes[expert(block, e, matrix)] = twin[:, order] if matrix == "down" else twin[order]
    return pico.with_state(**changes)


ALIGNING = ("m-smoe", "sub-moe", "uncurl")


@pytest.mark.parametrize(("merging", "permuted"), [(m, m in ALIGNING) for m in MERGES])
def test_merging_copies_of_one_expert_is_exact(merging: str, permuted: bool, tmp_path: Path) -> None:
    checkpoint = opened(doubled(permuted), tmp_path)
    profile = profile_of(checkpoint)
    expected = outputs(network(checkpoint))
    for repair in (None, REPAIR):
        plan = planned(checkpoint, PAIRS, merging=merging, repair=repair)
        found = applied(checkpoint, plan, tmp_path / f"{repair is None}.safetensors", profile)
        assert state(found)[EXPERT_OF.format(0)].tolist() == [0, 1, 0, 1]
        assert_close(outputs(network(found)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merging", [m for m in MERGES if m not in ALIGNING and m != "mergemoe"])
def test_methods_that_do_not_align_lose_permuted_copies(merging: str, tmp_path: Path) -> None:
    checkpoint = opened(doubled(permuted=True), tmp_path)
    plan = planned(checkpoint, PAIRS, merging=merging)
    found = applied(checkpoint, plan, tmp_path / "out.safetensors", profile_of(checkpoint))
    assert float((outputs(network(found)) - outputs(network(checkpoint))).abs().max()) > 1e-2


def test_merged_rows_that_are_sliced_go(tmp_path: Path) -> None:
    checkpoint = opened(doubled(permuted=True), tmp_path)
    plan = planned(checkpoint, replace(PAIRS, router="slice"), merging="m-smoe")
    found = applied(checkpoint, plan, tmp_path / "out.safetensors", profile_of(checkpoint))
    sliced = pruned(checkpoint, [(0, 1)] * 2, "slice", tmp_path / "sliced.safetensors")
    assert found.config == sliced.config
    assert_close(outputs(network(found)), outputs(network(sliced)), rtol=1e-4, atol=1e-5)


# checkpoints that are not plain


@pytest.mark.parametrize(
    "options",
    [
        {"expert_of": ((0, -1, 1, 2), (2, 1, 1, 0)), "widths": ((WIDTH,) * 3,) * 2},
        {
            "expert_of": ((0, -2, 1, 2), (2, 1, -2, 0)),
            "widths": ((WIDTH,) * 3,) * 2,
            "extras": {"constants": 1, "rank": 2},
        },
        {"widths": ((8, 16, 24), (24, 9, 8)), "extras": {"residual_constant": True, "residual_linear": True}},
        pytest.param(
            {"attention": "flash", "sampler": "rf", "learn_sigma": False, "widths": ((WIDTH,) * 3,) * 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ghosted and merged", "constants", "refitted", "flash"],
)
def test_what_was_compressed_before_is_refitted_too(options: Mapping[str, Any], tmp_path: Path) -> None:
    checkpoint = opened(make_pico(hidden=HIDDEN, input_size=4, **options), tmp_path)
    profile = profile_of(checkpoint, images=8)
    block = BlockPlan((0, 2), "ghost")
    plain = applied(checkpoint, planned(checkpoint, block), tmp_path / "plain.safetensors")
    output = Output(tmp_path / "out.safetensors")
    done = apply(checkpoint, planned(checkpoint, block, repair=THOROUGH), output, profile=profile)
    assert all(error < 1 for error in done.measured.refit_error)
    found = open_checkpoint(output.path)
    for name in ("gate.expert_of", "constants", "constants_up"):
        names = [f"blocks.{b}.moe.{name}" for b in (0, 1)]
        assert [state(found).get(n) is None for n in names] == [state(plain).get(n) is None for n in names]
        assert all(torch.equal(state(found)[n], state(plain)[n]) for n in names if n in state(plain))
    ends = [outputs(network(c)) for c in (checkpoint, plain, found)]
    assert float((ends[2] - ends[0]).norm()) < float((ends[1] - ends[0]).norm())


# refusals


def refused(checkpoint: Checkpoint, plan: CompressionPlan, profile: RoutingProfile | None, where: Path) -> str:
    """The message of a plan that is not carried out, in one line; nothing is left behind."""
    before = sorted(where.rglob("*"))
    with pytest.raises(BadInputError) as error:
        apply(checkpoint, plan, Output(where / "out.safetensors"), profile=profile)
    assert "\n" not in str(error.value)
    assert sorted(where.rglob("*")) == before
    return str(error.value)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where computed weights wait, to be looked into."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.parametrize("name", ["slice, refitted", "merged", "narrowed", "constants of rank 3"])
def test_computing_takes_the_profile_of_the_plan(name: str, made: Made, temporary: Path) -> None:
    checkpoint, profile = made
    plan = replace(plan_called(name, checkpoint), profile="0" * 64)
    assert "(profile)" in refused(checkpoint, plan, None, temporary.parent)
    message = refused(checkpoint, plan, profile, temporary.parent)
    assert "is not the profile that the plan was made with" in message and str(profile.path) in message
    apply(
        checkpoint, replace(plan, profile=profile.digest), Output(temporary.parent / "o.safetensors"), profile=profile
    )
    assert not list(temporary.iterdir())


def test_a_copying_plan_takes_no_profile(made: Made, tmp_path: Path) -> None:
    checkpoint, _ = made
    assert (
        applied(checkpoint, pruning(checkpoint, [(0, 1), (2, 3)]), tmp_path / "out.safetensors").config.num_experts == 2
    )


@pytest.mark.parametrize("name", ["ghost, refitted", "constants", "merged by tokens", "narrowed"])
def test_a_fast_profile_is_not_enough(name: str, made: Made, temporary: Path) -> None:
    checkpoint, _ = made
    fast = profile_of(opened(SMALL, temporary.parent, "again.safetensors"), images=8, fast=True)
    message = refused(checkpoint, plan_called(name, checkpoint), fast, temporary.parent)
    assert "without fast" in message and str(fast.path) in message


def test_a_fast_profile_is_enough_where_weights_alone_are_averaged(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    fast = profile_of(opened(SMALL, tmp_path, "again.safetensors"), images=8, fast=True)
    plan = plan_called("merged", checkpoint)
    found = [stored(applied(checkpoint, plan, tmp_path / f"{i}.safetensors", p)) for i, p in enumerate((profile, fast))]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["ghost, refitted", "merged", "narrowed", "constants"])
def test_what_is_packed_is_refused(name: str, made: Made, temporary: Path) -> None:
    checkpoint, profile = made
    packed = quantised(checkpoint, 8, temporary.parent / "packed.safetensors")
    plan = replace(plan_called(name, checkpoint), source=packed.fingerprint)
    message = refused(packed, plan, profile, temporary.parent)
    assert "is int8 already" in message and "refit=False" in message


def test_weights_that_outgrow_their_dtype_are_named(temporary: Path) -> None:
    """Half precision ends at 65,504: constants of an expert that makes more do not fit."""
    large = {name: 3e4 * t for name, t in SMALL.state.items() if ".experts.1.down_proj" in name}
    half = SMALL.with_state(**large)
    half = Pico(half.config, {name: tensor.half() for name, tensor in half.state.items()})
    checkpoint = opened(half, temporary.parent)
    profile = profile_of(checkpoint)
    plan = planned(checkpoint, BlockPlan((0, 2, 3), "ghost", constants=True))
    message = refused(checkpoint, plan, profile, temporary.parent)
    assert "the computed 'blocks." in message and "constants' holds" in message
    assert message.endswith("beyond the 65504 that fp16 can hold; make it wider first (ditmoe convert dtype fp32)")


def test_an_existing_output_is_refused_before_anything_is_computed(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    (tmp_path / "out.safetensors").write_text("mine")
    with watched_by(seen := Seen()), pytest.raises(OutputExistsError):
        apply(checkpoint, plan_called("ghost, refitted", checkpoint), Output(tmp_path / "out.safetensors"), profile)
    assert seen.phases == []


WRONG: dict[str, tuple[BlockPlan, str | None, str]] = {
    "no method to merge by": (PAIRS, None, "merging"),
    "an unknown method": (PAIRS, "k-means", "merging"),
    "narrowed while merging": (replace(PAIRS, widths=(8, 8)), "m-smoe", "widths"),
    "a rank above the width": (replace(GHOST, constants=True, rank=HIDDEN + 1), None, "rank 17"),
    "a rank without constants": (replace(GHOST, rank=1), None, "rank"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_edited_plan_that_cannot_be_is_refused(case: str, made: Made, temporary: Path) -> None:
    checkpoint, profile = made
    block, merging, said = WRONG[case]
    plan = planned(checkpoint, block, merging=merging)
    assert said in refused(checkpoint, plan, profile, temporary.parent)
    with pytest.raises(BadInputError):
        planned_output(checkpoint, plan)


def test_constants_where_nothing_is_dropped_are_none(made: Made, tmp_path: Path) -> None:
    checkpoint, profile = made
    plan = planned(checkpoint, BlockPlan(ALL, "ghost", constants=True, rank=2))
    assert stored(applied(checkpoint, plan, tmp_path / "out.safetensors", profile)) == stored(checkpoint)


def test_formats_of_weights_that_are_computed_are_refused(made: Made, temporary: Path) -> None:
    checkpoint, profile = made
    formats = formats_of(plan_uniform(checkpoint, "int8"))
    pruned = planned(checkpoint, GHOST, repair=REPAIR)
    plan = replace(pruned, stages=(*pruned.stages, Formats(formats)))
    assert "blocks.0.moe" in refused(checkpoint, plan, profile, temporary.parent)
    attention = {name: fmt for name, fmt in formats.items() if ".attn." in name}
    plan = replace(plan, stages=(*pruned.stages, Formats(attention)))
    found = applied(checkpoint, plan, temporary.parent / "out.safetensors", profile)
    assert {w.info.name for w in found.weights.values() if w.format} == set(attention)
