"""Plans carried out: exact bytes, exact weights, and networks that compute what the plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressing import (
    EXPERT_OF,
    applied,
    folder,
    formats_of,
    naive_outputs,
    network,
    opened,
    outputs,
    pruned,
    pruning,
    quantised,
    quantising,
    renumbered,
    state,
    stored,
)
from conftest import REPOSITORY, Pico, make_pico
from hypothesis import given, settings
from hypothesis import strategies as st
from seeing import Seen
from torch.testing import assert_close

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import Formats, parse_plan
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.errors import BadInputError, InfeasibleError, OutputExistsError
from ditmoe_cli.files.header import TensorInfo, encode_header
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import Format
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.config import BlockConfig, expected_weights
from ditmoe_cli.progress import watched_by

EXPERTS, TOP_K = 5, 2
SMALL = make_pico(hidden=16, experts=EXPERTS, widths=((24,) * EXPERTS,) * 2, input_size=4)
UNEVEN = make_pico(hidden=16, widths=((16, 24, 40, 8), (32, 8, 16, 24, 48)), input_size=4)
MODES = ("slice", "ghost")
FEW = 6  # each example writes files and flushes them

keep_sets = st.sets(st.integers(0, EXPERTS - 1), min_size=TOP_K).map(lambda keep: tuple(sorted(keep)))
two_keeps = st.tuples(keep_sets, keep_sets)
two_modes = st.tuples(st.sampled_from(MODES), st.sampled_from(MODES))


def rows(keeps: Sequence[Sequence[int]], modes: Sequence[str], experts: int = EXPERTS) -> list[Sequence[int]]:
    """The router rows that still count in each block's softmax."""
    return [range(experts) if mode == "ghost" else keep for keep, mode in zip(keeps, modes, strict=True)]


@settings(max_examples=FEW)
@given(
    keeps=st.none() | two_keeps,
    modes=two_modes,
    formats=st.lists(st.sampled_from([None, "nf4", "int8"]), min_size=8, max_size=8),
    shard_bytes=st.none() | st.integers(1, 40_000),
)
def test_bytes_are_predicted_to_the_last_one(
    keeps: tuple[tuple[int, ...], ...] | None,
    modes: tuple[str, str],
    formats: list[Format | None],
    shard_bytes: int | None,
) -> None:
    with folder() as where:
        checkpoint = opened(SMALL, where)
        plan = pruning(checkpoint, keeps, modes) if keeps else quantising(checkpoint, {})
        names = formats_of(plan_uniform(checkpoint, "nf4"))
        chosen = {name: formats[i % len(formats)] for i, name in enumerate(names)}
        formatted = Formats({name: fmt for name, fmt in chosen.items() if fmt})
        plan = replace(plan, stages=(*(plan.stages if keeps else ()), formatted))
        path = where / ("out" if shard_bytes else "out.safetensors")
        output = Output(path, shard_bytes=shard_bytes or 1)
        planned = planned_output(checkpoint, plan)
        with watched_by(seen := Seen()):
            written = apply(checkpoint, plan, output).bytes
        files = [path] if path.is_file() else list(path.iterdir())
        assert written == planned.predicted_bytes(output) == sum(file.stat().st_size for file in files)
        assert seen.phase("writing").done == sum(info.nbytes for info in planned.infos)
        again = open_checkpoint(path)
        assert again.config == planned.config
        assert again.assumptions == again.warnings == ()
        assert list(again.header.tensors.values()) == planned.infos
        packed = {renumbered(name, keeps or [range(EXPERTS)] * 2) for name in formatted.formats}
        assert {w.info.name for w in again.weights.values() if w.format} == packed - {None}


@pytest.mark.parametrize("name", ["copy.safetensors", "copy"])
def test_a_plain_copy_keeps_every_byte_of_every_tensor(name: str, tmp_path: Path) -> None:
    source = quantised(opened(make_pico(dtype=torch.bfloat16), tmp_path), 8, tmp_path / "int8.safetensors")
    copy = applied(source, None, tmp_path / name)
    assert stored(copy) == stored(source)
    assert copy.fingerprint == source.fingerprint
    assert copy.header.provenance == source.header.provenance
    assert applied(copy, None, tmp_path / "back.safetensors").path.read_bytes() == source.path.read_bytes()


def test_a_copy_of_a_pickle_holds_its_tensors(tmp_path: Path) -> None:
    pico = make_pico()
    pico.save_pt(tmp_path / "model.pt", "train", num_heads=2)
    copy = applied(open_checkpoint(tmp_path / "model.pt", num_heads=2), None, tmp_path / "copy.safetensors")
    found = state(copy)
    assert found.keys() == pico.state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in pico.state.items())
    assert copy.config == pico.config
    assert copy.ancestors == ()


def test_equal_work_gives_equal_bytes(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    pruned = pruning(checkpoint, [(0, 2, 4), (1, 2)])
    plan = replace(pruned, stages=(*pruned.stages, Formats({"blocks.0.attn.qkv.weight": "nf4"})))
    moved = opened(SMALL, tmp_path, "elsewhere.safetensors")
    first = applied(checkpoint, plan, tmp_path / "first.safetensors")
    second = applied(moved, parse_plan(plan.to_json(), "plan"), tmp_path / "second.safetensors")
    assert first.path.read_bytes() == second.path.read_bytes()


@settings(max_examples=FEW)
@given(two_keeps)
def test_slicing_selects_experts_under_upstream_names(keeps: tuple[tuple[int, ...], ...]) -> None:
    expected = {}
    for name, tensor in SMALL.state.items():
        new = renumbered(name, keeps)
        if new is not None:
            expected[new] = tensor[list(keeps[int(name.split(".")[1])])] if ".moe.gate." in name else tensor
    with folder() as where:
        found = state(pruned(opened(SMALL, where), keeps, "slice", where / "out.safetensors"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=FEW)
@given(two_keeps, two_modes)
def test_a_pruned_network_routes_among_the_kept_as_its_mode_says(
    keeps: tuple[tuple[int, ...], ...], modes: tuple[str, str]
) -> None:
    with folder() as where:
        found = outputs(network(pruned(opened(SMALL, where), keeps, modes, where / "out.safetensors")))
    # sliced: dropped logits are -inf; ghost: they stay in the softmax, but are not selected
    assert_close(found, naive_outputs(SMALL, rows(keeps, modes), keeps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_modes_make_a_difference_and_are_right_for_both_layouts(mode: str, attention: str, tmp_path: Path) -> None:
    pico = make_pico(attention=attention, experts=4)
    keeps = [(0, 3), (1, 2, 3)]
    model = network(pruned(opened(pico, tmp_path), keeps, mode, tmp_path / "out.safetensors"))
    expected = {m: naive_outputs(pico, rows(keeps, [m] * 2, 4), keeps) for m in MODES}
    assert_close(outputs(model), expected[mode], rtol=1e-4, atol=1e-5)
    assert (expected["slice"] - expected["ghost"]).abs().max() > 1e-2
    assert (expected[mode] - outputs(pico.model())).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_keeping_all_experts_is_the_identity(mode: str, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    kept = pruned(checkpoint, [range(EXPERTS)] * 2, mode, tmp_path / "out.safetensors")
    assert stored(kept) == stored(checkpoint)
    assert kept.config == checkpoint.config
    assert torch.equal(outputs(network(kept)), outputs(network(checkpoint)))


@pytest.mark.parametrize("mode", MODES)
def test_experts_of_different_widths_are_pruned(mode: str, tmp_path: Path) -> None:
    keeps = [(1, 2), (0, 3, 4)]
    checkpoint = pruned(opened(UNEVEN, tmp_path), keeps, mode, tmp_path / "out.safetensors")
    assert [block.expert_widths for block in checkpoint.config.blocks] == [(24, 40), (32, 24, 48)]
    over = [range(4), range(5)] if mode == "ghost" else keeps
    assert_close(outputs(network(checkpoint)), naive_outputs(UNEVEN, over, keeps), rtol=1e-4, atol=1e-5)


def test_blocks_may_keep_different_counts_and_modes(tmp_path: Path) -> None:
    checkpoint = pruned(opened(SMALL, tmp_path), [(0, 1, 2, 3, 4), (3, 4)], MODES, tmp_path / "out.safetensors")
    first, second = checkpoint.config.blocks
    assert (first.router_rows, len(first.expert_widths), first.mapped) == (5, 5, False)
    assert (second.router_rows, len(second.expert_widths), second.mapped) == (5, 2, True)
    assert state(checkpoint)[EXPERT_OF.format(1)].tolist() == [-1, -1, -1, 0, 1]


def through(keeps: Sequence[Sequence[int]], then: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """The original experts that remain after keeping `keeps`, and `then` of what was left."""
    return [tuple(first[i] for i in second) for first, second in zip(keeps, then, strict=True)]


@st.composite
def two_prunings(draw: st.DrawFn) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    first = [draw(keep_sets) for _ in range(2)]
    second = [sorted(draw(st.sets(st.integers(0, len(keep) - 1), min_size=TOP_K))) for keep in first]
    return first, second


@settings(max_examples=FEW)
@given(two_prunings(), st.sampled_from(MODES))
def test_pruning_twice_in_one_mode_is_pruning_once(
    prunings: tuple[list[Sequence[int]], list[Sequence[int]]], mode: str
) -> None:
    first, second = prunings
    with folder() as where:
        checkpoint = opened(SMALL, where)
        twice = pruned(pruned(checkpoint, first, mode, where / "1.safetensors"), second, mode, where / "2.safetensors")
        once = pruned(checkpoint, through(first, second), mode, where / "once.safetensors")
        assert stored(twice) == stored(once)
        assert twice.config == once.config


@settings(max_examples=FEW)
@given(two_prunings())
def test_slicing_what_was_ghosted_deletes_the_ghosts_too(
    prunings: tuple[list[Sequence[int]], list[Sequence[int]]],
) -> None:
    first, second = prunings
    with folder() as where:
        checkpoint = opened(SMALL, where)
        ghost = pruned(checkpoint, first, "ghost", where / "ghost.safetensors")
        twice = pruned(ghost, second, "slice", where / "twice.safetensors")
        assert stored(twice) == stored(pruned(checkpoint, through(first, second), "slice", where / "1.safetensors"))


@settings(max_examples=FEW)
@given(two_prunings())
def test_ghosting_what_was_sliced_keeps_the_rows_that_were_left(
    prunings: tuple[list[Sequence[int]], list[Sequence[int]]],
) -> None:
    first, second = prunings
    with folder() as where:
        sliced = pruned(opened(SMALL, where), first, "slice", where / "sliced.safetensors")
        found = outputs(network(pruned(sliced, second, "ghost", where / "twice.safetensors")))
    assert_close(found, naive_outputs(SMALL, first, through(first, second)), rtol=1e-4, atol=1e-5)


def with_an_unwanted_expert(unwanted: int) -> Pico:
    """A pico model whose first block never routes to `unwanted`: its logit is far below zero for every token."""
    pico = make_pico(experts=4, hidden=32)
    direction = torch.ones(32) / 32**0.5
    shift = pico.state["blocks.0.adaLN_modulation.1.bias"].clone()
    shift[3 * 32 : 4 * 32] += 20 * direction
    router = pico.state["blocks.0.moe.gate.weight"].clone()
    router -= (router @ direction)[:, None] * direction  # the other logits do not see the shift
    router[unwanted] -= 2 * direction
    return pico.with_state(blocks__0__adaLN_modulation__1__bias=shift, blocks__0__moe__gate__weight=router)


def test_dropping_an_expert_that_no_token_chose_changes_nothing(tmp_path: Path) -> None:
    unwanted = 2
    pico = with_an_unwanted_expert(unwanted)
    chosen: list[set[int]] = []
    expected = outputs(pico.model(), lambda event: chosen.append(set(event.routing.experts.flatten().tolist())))
    assert chosen[0] == {0, 1, 3}
    keep = [e for e in range(4) if e != unwanted]
    ghost = pruned(opened(pico, tmp_path), [keep, range(4)], "ghost", tmp_path / "out.safetensors")
    assert torch.equal(outputs(network(ghost)), expected)


@pytest.mark.parametrize(("bits", "mode"), [(4, "slice"), (8, "ghost")])
def test_pruning_and_quantising_commute_and_move_packed_bytes(bits: int, mode: str, tmp_path: Path) -> None:
    keeps = [(0, 4), (1, 2, 4)]
    original = opened(SMALL, tmp_path)
    packed = quantised(original, bits, tmp_path / "packed.safetensors")
    packed_first = pruned(packed, keeps, mode, tmp_path / "a.safetensors")
    pruned_first = quantised(
        pruned(original, keeps, mode, tmp_path / "b.safetensors"), bits, tmp_path / "c.safetensors"
    )
    assert stored(packed_first) == stored(pruned_first)
    assert {w.format for w in packed_first.weights.values()} == {None, "nf4" if bits == 4 else "int8"}
    before, after = stored(packed), stored(packed_first)
    for name, content in before.items():
        if "moe.experts.4." in name:
            block = int(name.split(".")[1])
            assert after[name.replace("experts.4.", f"experts.{keeps[block].index(4)}.")] == content
    assert torch.equal(outputs(network(packed_first)), outputs(network(pruned_first)))


def test_one_plan_may_prune_and_quantise(tmp_path: Path) -> None:
    keeps = [(0, 4), (1, 2, 4)]
    original = opened(SMALL, tmp_path)
    alone = pruning(original, keeps)
    both = replace(alone, stages=(*alone.stages, *plan_uniform(original, "nf4").stages))
    one = applied(original, both, tmp_path / "one.safetensors")
    steps = quantised(pruned(original, keeps, "ghost", tmp_path / "1.safetensors"), 4, tmp_path / "2.safetensors")
    assert stored(one) == stored(steps)


def test_history_names_every_step(tmp_path: Path) -> None:
    original = opened(SMALL, tmp_path)
    plan = pruning(original, [(0, 1, 2), (1, 2, 3)])
    smaller = applied(original, plan, tmp_path / "pruned.safetensors")
    smallest = quantised(smaller, 8, tmp_path / "smallest")
    assert original.ancestors == ()
    assert smaller.ancestors == (original.fingerprint,)
    assert smallest.ancestors == (original.fingerprint, smaller.fingerprint)
    assert len({original.fingerprint, smaller.fingerprint, smallest.fingerprint}) == 3
    provenance = smallest.header.provenance
    assert provenance is not None
    assert [step.command for step in provenance.history] == ["prune", "quantize"]
    assert [step.plan for step in provenance.history] == [plan.digest, plan_uniform(smaller, "int8").digest]
    assert smallest.card == original.card
    assert smallest.card.extractor == "pixels"


def test_a_plan_for_another_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    other = opened(make_pico(hidden=16, experts=EXPERTS, seed=1), tmp_path, "other.safetensors")
    with pytest.raises(BadInputError, match="another checkpoint"):
        apply(checkpoint, pruning(other, [(0, 1), (0, 1)]), Output(tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()


def test_an_edited_plan_does_what_it_says(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    document = json.loads(json.dumps(pruning(checkpoint, [(0, 1), (0, 1)]).to_json()))
    document["blocks"][1] = {"keep": [2, 3, 4], "router": "slice"}
    document["formats"] = {"blocks.1.moe.experts.3.up_proj.weight": "int8"}
    edited = parse_plan(document, "edited")
    found = applied(checkpoint, edited, tmp_path / "out.safetensors")
    assert [len(block.expert_widths) for block in found.config.blocks] == [2, 3]
    assert [w.info.name for w in found.weights.values() if w.format] == ["blocks.1.moe.experts.1.up_proj.weight"]
    name = "blocks.1.moe.experts.{}.down_proj.weight"
    assert torch.equal(state(found)[name.format(0)], SMALL.state[name.format(2)])


@pytest.mark.parametrize("mode", MODES)
def test_fewer_experts_than_top_k_are_infeasible(mode: str, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    with pytest.raises(InfeasibleError, match=r"block 1 would keep 1 of 5 experts.*top-2"):
        apply(checkpoint, pruning(checkpoint, [(0, 1), (3,)], mode), Output(tmp_path / "out.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


BROKEN = ("blocks.1.moe.experts.4.down_proj.weight", "blocks.0.moe.gate.weight", "final_layer.linear.bias")


@pytest.mark.parametrize(
    ("name", "value", "target"),
    [
        (name, float(("nan", "inf", "-inf")[(i + j) % 3]), target)
        for i, name in enumerate(BROKEN)
        for j, target in enumerate(("out.safetensors", "out"))
    ],
)
def test_broken_weights_are_named_and_leave_nothing_behind(
    name: str, value: float, target: str, tmp_path: Path
) -> None:
    tensor = SMALL.state[name].clone()
    tensor.view(-1)[-1] = value
    checkpoint = opened(SMALL.with_state(**{name: tensor}), tmp_path)
    plans = [
        None,
        pruning(checkpoint, [(0, 1), (1, 4)]),
        plan_uniform(checkpoint, "nf4"),
        plan_uniform(checkpoint, "int8"),
    ]
    for plan in plans:
        with pytest.raises(BadInputError, match=name.replace(".", r"\.")):
            apply(checkpoint, plan, Output(tmp_path / target))
        assert [path.name for path in tmp_path.iterdir()] == ["original.safetensors"]


def test_an_expert_that_goes_may_be_broken(tmp_path: Path) -> None:
    tensor = SMALL.state[BROKEN[0]].clone()
    tensor[0, 0] = float("nan")
    checkpoint = opened(SMALL.with_state(**{BROKEN[0]: tensor}), tmp_path)
    keeps = [range(EXPERTS), (0, 1, 2, 3)]
    healed = pruned(checkpoint, keeps, "ghost", tmp_path / "out.safetensors")
    assert torch.equal(
        outputs(network(healed)),
        outputs(network(pruned(opened(SMALL, tmp_path, "b.safetensors"), keeps, "ghost", tmp_path / "c.safetensors"))),
    )


def test_an_existing_output_and_the_input_are_safe(tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    content = checkpoint.path.read_bytes()
    plan = pruning(checkpoint, [(0, 1), (0, 1)])
    for force in (False, True):
        with pytest.raises(OutputExistsError):
            apply(checkpoint, plan, Output(checkpoint.path, force))
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        apply(checkpoint, plan, Output(out))
    assert out.read_bytes() == b"old"
    apply(checkpoint, plan, Output(out, force=True))
    assert open_checkpoint(out).ancestors == (checkpoint.fingerprint,)
    assert checkpoint.path.read_bytes() == content


def test_an_edited_plan_keeps_top_k_selectable_rows_of_a_merged_router(tmp_path: Path) -> None:
    pico = make_pico(hidden=16, input_size=4, widths=((24,) * 3,) * 2, expert_of=((0, 0, 1, 2, -1), (2, 1, 0, -1, -1)))
    checkpoint = opened(pico, tmp_path)
    kept = pruned(checkpoint, [(0, 2), (0, 2)], ("slice", "ghost"), tmp_path / "out.safetensors")
    found = state(kept)
    assert found[EXPERT_OF.format(0)].tolist() == [0, 0, 1]
    assert found[EXPERT_OF.format(1)].tolist() == [1, -1, 0, -1, -1]
    assert torch.equal(found["blocks.0.moe.gate.weight"], pico.state["blocks.0.moe.gate.weight"][[0, 1, 3]])
    assert torch.equal(found["blocks.1.moe.gate.weight"], pico.state["blocks.1.moe.gate.weight"])


MEMORY_PROBE = """
import resource, sys
from pathlib import Path
import filelock  # before memory is measured: `apply` imports it late
import torch
from ditmoe_cli.files.writer import Output
from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.model.checkpoint import open_checkpoint

source, target, *allowances = sys.argv[1:]
checkpoint = open_checkpoint(source)
fingerprint = checkpoint.fingerprint
torch.set_num_threads(1)
torch.ones(4096).isfinite().all()
plans = {
    "prune": CompressionPlan("prune", fingerprint, stages=(Experts((BlockPlan(tuple(range(0, 16, 2)), "ghost"),)),)),
    "nf4": plan_uniform(checkpoint, "nf4"),
    "int8": plan_uniform(checkpoint, "int8"),
}
_, hard = resource.getrlimit(resource.RLIMIT_DATA)
for (what, plan), allowed in zip(plans.items(), allowances, strict=True):
    print(what)
    private = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (private + int(allowed), hard))  # the mapped input does not count
    apply(checkpoint, plan, Output(Path(target), force=True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits private memory as Linux counts it")
def test_memory_follows_one_tensor_and_not_the_checkpoint(tmp_path: Path) -> None:
    config = replace(SMALL.config, hidden_size=256, num_heads=8, depth=1, blocks=(BlockConfig(16, (2048,) * 16, 1024),))
    infos = [TensorInfo(name, "F32", shape) for name, shape in expected_weights(config).items()]
    path, target = tmp_path / "large.safetensors", tmp_path / "out.safetensors"
    total = sum(info.nbytes for info in infos)
    with path.open("wb") as file:  # zeros, which take no space on disk
        file.write(encode_header(infos, Provenance(config.to_json()).to_metadata({})))
        file.truncate(file.tell() + total)
    largest = max(info.nbytes for info in infos)
    allowances = [times * largest + (8 << 20) for times in (4, 8, 8)]
    assert 3.5 * max(allowances) < total
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEMORY_PROBE, path, target, *map(str, allowances)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["prune", "nf4", "int8"]
