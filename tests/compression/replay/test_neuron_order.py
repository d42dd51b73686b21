"""Neurons in order, matrices in pieces: energies against a slow count, exactness, bytes, and what reads them back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import with_slow
from compressing import applied, calibrated, measure_few_tokens, network, opened, outputs, profile_of, pruning, stored
from conftest import make_pico
from interrupting import goes_on_to_the_same_bytes
from rounding import guided_by_hand, relative, states_for
from torch import Tensor

from ditmoe_cli.compression.apply import Applied, apply
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Differences, Experts, Formats, Rounding, parse_plan
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.trial import try_formats
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.replay import neuron_order as order
from ditmoe_cli.compression.replay.neuron_energies import measured_energies
from ditmoe_cli.compression.replay.neuron_order import expert_stem, falling, is_ordered, reorder
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, in_expert, split_name
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.pieces import Pieces, neuron_axis
from ditmoe_cli.formats.registry import parse_format, parse_pieces
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.expert_weights import read_weight
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.routing.profile import RoutingProfile

TOKENS = 512
FEW = Rounding(tokens=TOKENS)
Given = tuple[Checkpoint, RoutingProfile]


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        measure_few_tokens(patched, TOKENS)
        yield


def made(folder: Path, **settings: Any) -> Given:
    widths = ((96, 64, 100), (64, 160, 40))
    checkpoint = opened(make_pico(**{"hidden": 32, "input_size": 4, "widths": widths, **settings}), folder)
    return checkpoint, profile_of(checkpoint, images=8)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return made(tmp_path_factory.mktemp("order"))


def experts_of(checkpoint: Checkpoint) -> dict[str, int]:
    """Every expert, routed or shared, and its width."""
    found = {}
    for b, block in enumerate(checkpoint.config.blocks):
        found |= {in_expert(b, e, "")[:-1]: width for e, width in enumerate(block.expert_widths)}
        found[in_block(b, SHARED)] = block.shared_width
    return found


def cut(checkpoint: Checkpoint) -> dict[str, str]:
    """All experts in two pieces or three, as wide as they allow, in mixed formats; attention at 4 bits."""
    formats = {name: "int4-g64" for name in checkpoint.weights if name.endswith(("qkv.weight", "proj.weight"))}
    formats = {name: fmt for name, fmt in formats.items() if ".attn." in name}
    for stem, width in experts_of(checkpoint).items():
        counts = (32, 32, width - 64) if width >= 96 else (32, width - 32)
        for matrix in MATRICES:
            name = f"{stem}.{matrix}.weight"
            if width >= 64:
                kinds = ("int6-g64", "int3-g32-sym", "ternary-g64")[-len(counts) :]
                formats[name] = Pieces(neuron_axis(name), tuple(map(parse_format, kinds)), counts).name
            else:
                formats[name] = "int3-g64"
    return formats


def planned(asked: Given, formats: Mapping[str, str], **fields: Any) -> CompressionPlan:
    checkpoint, profile = asked
    return CompressionPlan("quantize", checkpoint.fingerprint, profile.digest, stages=(Formats(formats, **fields),))


def written_by(asked: Given, plan: CompressionPlan, path: Path) -> tuple[Applied, Checkpoint]:
    """What a plan does and writes: as many bytes as predicted, and tensors as laid out."""
    checkpoint, profile = asked
    expected, output = planned_output(checkpoint, plan), Output(path)
    done = apply(checkpoint, parse_plan(plan.to_json(), "plan"), output, profile=profile)
    assert done.bytes == expected.predicted_bytes(output) == path.stat().st_size
    found = open_checkpoint(path)
    assert list(found.header.tensors.values()) == expected.infos
    assert found.config == checkpoint.config
    return done, found


@pytest.fixture(scope="module")
def pieced(asked: Given, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """All weights of `cut` rounded to the nearest values, in order."""
    path = tmp_path_factory.mktemp("pieced") / "out.safetensors"
    return written_by(asked, planned(asked, cut(asked[0]), ordering="camera"), path)[1]


# names


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("blocks.0.moe.experts.3.up_proj.weight", "blocks.0.moe.experts.3"),
        ("blocks.10.moe.shared_experts.down_proj.weight", "blocks.10.moe.shared_experts"),
        ("blocks.0.moe.experts.3.up_proj.bias", None),
        ("blocks.0.moe.base.up_proj.weight", None),
        ("blocks.0.attn.proj.weight", None),
        ("blocks.0.moe.gate.weight", None),
        ("moe.shared_experts.up_proj.weight", None),
    ],
)
def test_matrices_of_experts_are_told_by_name(name: str, stem: str | None) -> None:
    assert expert_stem(name) == stem


def test_all_matrices_of_an_expert_with_pieces_are_reordered(asked: Given) -> None:
    gate = "blocks.0.moe.experts.0.gate_proj.weight"
    plan = planned(asked, {gate: cut(asked[0])[gate]}, ordering="camera")
    mine = {name for name in asked[0].weights if is_ordered(plan.stage(Formats), name)}
    assert mine == {f"blocks.0.moe.experts.0.{matrix}.weight" for matrix in MATRICES}
    assert not any(is_ordered(replace(plan.stage(Formats), ordering=None), name) for name in mine)


# orders


def test_energies_fall_and_equal_ones_keep_their_order() -> None:
    assert falling(torch.tensor([1.0, 3.0, 1.0, 2.0, 3.0])).tolist() == [1, 4, 3, 0, 2]


# exactness


def test_neurons_may_stand_in_any_order(asked: Given) -> None:
    model = network(asked[0])
    turned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for b, block in enumerate(turned.blocks):
        mine = {n: w for n, w in experts_of(asked[0]).items() if split_name(f"{n}.x").block == b}
        reorder(block, b, {n: torch.randperm(w, generator=generator) for n, w in mine.items()})
    changed = [n for n, p in turned.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(changed) == 3 * 8 and all("_proj" in name for name in changed)
    assert torch.allclose(outputs(turned), outputs(model), rtol=1e-4, atol=1e-5)


def test_what_is_written_is_the_nearest_to_reordered_weights(asked: Given, pieced: Checkpoint) -> None:
    checkpoint, profile = asked
    formats, written = cut(checkpoint), pieced
    energies = {n: e for block in measured_energies(calibrated(checkpoint, profile)) for n, e in block.items()}
    for name, weight in written.weights.items():
        before, stem = checkpoint.reader.tensor(name), expert_stem(name)
        if name not in formats:
            assert torch.equal(read_weight(written, name), before)
            continue
        assert weight.info.shape == before.shape
        assert getattr(weight.stored_as, "counts", ()) == getattr(parse_pieces(formats[name]), "counts", ())
        if isinstance(weight.stored_as, Pieces) and stem is not None:
            turned = energies[stem].argsort(descending=True, stable=True)
            before = before[turned] if neuron_axis(name) == 0 else before[:, turned]
        expected = nearest(before, formats[name])
        assert torch.equal(read_weight(written, name).float(), expected.half().float()), name
    assert sum(isinstance(weight.stored_as, Pieces) for weight in written.weights.values()) == 3 * 7


def test_without_an_ordering_neurons_stay_where_they_are(asked: Given, tmp_path: Path) -> None:
    """And no profile is needed, nor looked at."""
    formats = cut(asked[0])
    plan = planned(asked, formats)
    assert not plan.computes
    written = applied(asked[0], plan, tmp_path / "out.safetensors")
    for name, fmt in formats.items():
        expected = nearest(asked[0].reader.tensor(name), fmt)
        assert torch.equal(read_weight(written, name).float(), expected.half().float())


@pytest.mark.parametrize(
    "rounding",
    [None, pytest.param(FEW, marks=pytest.mark.slow), replace(FEW, smoothing=0.5)],
    ids=["nearest", "gptq", "smoothed"],
)
def test_matrices_without_a_format_are_reordered_too(rounding: Rounding | None, asked: Given, tmp_path: Path) -> None:
    """Only gate is cut: with up and down out of step the expert would be another function."""
    fine = {n: "rows:int8-g32*32+int8-g32*" + str(w - 32) for n, w in experts_of(asked[0]).items() if w >= 64}
    formats = {f"{stem}.gate_proj.weight": fmt for stem, fmt in fine.items()}
    plan = planned(asked, formats, ordering="camera", rounding=rounding)
    _, written = written_by(asked, plan, tmp_path / "out.safetensors")
    assert {n for n, w in written.weights.items() if w.format is not None} == formats.keys()
    assert relative(outputs(network(written)), outputs(network(asked[0]))) < 1e-3
    up = next(iter(fine)) + ".up_proj.weight"
    assert written.weights[up].info == asked[0].weights[up].info
    assert not torch.equal(read_weight(written, up), read_weight(asked[0], up))


@pytest.mark.parametrize("dtype", with_slow([torch.bfloat16, torch.float16]), ids=str)
def test_dtypes_of_plain_matrices_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    asked = made(tmp_path, dtype=dtype)
    gate = in_expert(1, 1, "gate_proj.weight")
    plan = planned(asked, {gate: cut(asked[0])[gate]}, ordering="camera")
    _, written = written_by(asked, plan, tmp_path / "out.safetensors")
    for matrix, axis in (("up_proj", 0), ("down_proj", 1)):
        name = in_expert(1, 1, f"{matrix}.weight")
        before, after = asked[0].reader.tensor(name), written.reader.tensor(name)
        assert after.dtype == dtype and not torch.equal(after, before)
        assert sorted(map(str, after.unbind(axis))) == sorted(map(str, before.unbind(axis)))


# rounding


@pytest.mark.parametrize("smoothing", with_slow([0.0, 0.5]))
def test_gptq_tells_the_error_of_the_file(smoothing: float, asked: Given, pieced: Checkpoint, tmp_path: Path) -> None:
    plan = planned(asked, cut(asked[0]), ordering="camera", rounding=replace(FEW, smoothing=smoothing))
    done, written = written_by(asked, plan, tmp_path / "out.safetensors")
    states, cfg = states_for(*asked, 2 * TOKENS)
    error = relative(*(guided_by_hand(network(each), states, cfg) for each in (written, asked[0])))
    assert done.measured.prediction_error == pytest.approx(error, rel=0.01)
    worse = relative(*(guided_by_hand(network(each), states, cfg) for each in (pieced, asked[0])))
    assert 1e-4 < error < worse


def test_errors_are_passed_on_across_pieces() -> None:
    """The columns of a second piece make up for what the first one lost."""
    from by_rule import error_of, solved

    from ditmoe_cli.compression.rounding.gptq import plain
    from ditmoe_cli.formats.registry import grid_of

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 96, generator=generator)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian = x.T @ x / len(x)
    grid = grid_of(weight, "columns:int2-g32*32+int4-g64*64")
    together = solved(weight, hessian, grid, 0.01, act_order=False)
    apart = plain(weight, grid)
    first, rest = slice(0, 32), slice(32, 96)
    for here, fmt in ((first, "int2-g32"), (rest, "int4-g64")):
        own = grid_of(weight[:, here], fmt)
        apart[:, here] = solved(weight[:, here], hessian[here, here], own, 0.01, act_order=False)
    assert error_of(together - weight, hessian) < 0.7 * error_of(apart - weight, hessian)
    every = torch.arange(96)
    assert torch.equal(grid.round(together, every), together), "on its grids"


def test_a_trial_tells_the_error_of_the_nearest_values(asked: Given, pieced: Checkpoint) -> None:
    checkpoint, profile = asked
    formats = cut(checkpoint)
    orders = order.orders_of(measured_energies(calibrated(checkpoint, profile)), formats)
    assert [len(mine) for mine in orders] == [4, 3], "40 neurons are too few to be cut"
    tried = try_formats(calibrated(checkpoint, profile), formats, orders)
    states, cfg = states_for(checkpoint, profile, TOKENS)
    error = relative(*(guided_by_hand(network(each), states, cfg) for each in (pieced, checkpoint)))
    assert tried.error == pytest.approx(error, rel=0.02)
    assert try_formats(calibrated(checkpoint, profile), formats).error != pytest.approx(error, rel=0.02)


# what becomes of such files


def test_they_run_resident_and_offloaded(pieced: Checkpoint) -> None:
    model = network(pieced)
    assert sum(isinstance(layer, PackedLinear) and ":" in layer.format for layer in model.modules()) == 3 * 7
    whole = network(pieced)
    for name, weight in pieced.weights.items():
        if weight.quantized:
            layer = torch.nn.Linear(*reversed(weight.info.shape), bias=f"{name[:-6]}bias" in pieced.weights)
            old = whole.get_submodule(name.removesuffix(".weight"))
            layer.weight.data = old.weight()
            if layer.bias is not None:
                layer.bias.data = old.bias
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            setattr(whole.get_submodule(parent), leaf, layer)
    assert torch.allclose(outputs(model), outputs(whole), rtol=1e-5, atol=1e-6)
    offloaded = OffloadedDiTMoE(pieced, torch.device("cpu"), 3, 3)
    config = model.config
    x = torch.randn(3, config.in_channels, 4, 4, generator=torch.Generator().manual_seed(5))
    y = torch.arange(3) % (config.num_classes + 1)
    with torch.no_grad():
        resident, read = (kind.prepared([450.0], y)(x, 450.0) for kind in (model, offloaded))
        assert torch.equal(read, resident)


def test_experts_are_pruned_with_their_bytes(pieced: Checkpoint, tmp_path: Path) -> None:
    keeps = [(0, 2), (1, 2)]
    small = applied(pieced, pruning(pieced, keeps), tmp_path / "pruned.safetensors")
    before, after = stored(pieced), stored(small)
    for b, keep in enumerate(keeps):
        for new, old in enumerate(keep):
            mine = {n: t for n, t in before.items() if n.startswith(in_expert(b, old, ""))}
            assert mine == {
                n.replace(in_expert(b, new, ""), in_expert(b, old, "")): t
                for n, t in after.items()
                if n.startswith(in_expert(b, new, ""))
            }
    assert small.config.blocks[1].expert_widths == (160, 40)


def test_a_copy_keeps_every_byte(pieced: Checkpoint, tmp_path: Path) -> None:
    again = applied(pieced, None, tmp_path / "copy.safetensors")
    assert stored(again) == stored(pieced) and again.fingerprint == pieced.fingerprint


def test_other_changes_are_refused(pieced: Checkpoint) -> None:
    with pytest.raises(BadInputError, match="already; quantise the checkpoint"):
        candidate_formats(pieced, Candidates())
    with pytest.raises(BadInputError, match="already"):
        plan_uniform(pieced, "nf4")
    everything = tuple(BlockPlan((0, 1, 2), "ghost", widths=(32, 32, 32)) for _ in range(2))
    narrowing = CompressionPlan("prune", pieced.fingerprint, stages=(Experts(everything),))
    with pytest.raises(BadInputError, match="cannot be refitted, merged or narrowed"):
        planned_output(pieced, narrowing)
    with pytest.raises(BadInputError, match="already; store differences"):
        planned_output(pieced, CompressionPlan("merge", pieced.fingerprint, stages=(Differences("svd", 0.5),)))


def test_plans_that_reorder_what_they_compute_are_refused(asked: Given) -> None:
    blocks = tuple(BlockPlan((0, 1), "ghost") for _ in range(2))
    plan = planned(asked, {}, ordering="camera")
    for first in (Experts(blocks), Differences("svd", 0.5)):
        with pytest.raises(BadInputError, match="has a reordering; make that two plans"):
            planned_output(asked[0], replace(plan, stages=(first, *plan.stages)))


def test_plans_that_reorder_need_their_profile(asked: Given, tmp_path: Path) -> None:
    plan = planned(asked, cut(asked[0]), ordering="camera")
    assert plan.computes
    with pytest.raises(BadInputError, match="give the one that it was made with"):
        apply(asked[0], plan, Output(tmp_path / "out.safetensors"))
    fast = profile_of(asked[0], "fast", images=8, fast=True)
    with pytest.raises(BadInputError, match="keeps no states"):
        apply(asked[0], replace(plan, profile=fast.digest), Output(tmp_path / "out.safetensors"), profile=fast)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("gate", "rows:int4-g64*32+int4-g64*65"),
        ("gate", "columns:int4-g64*32+int4-g64*64"),
        ("down", "rows:int4-g64*16+int4-g64*16"),
        ("down", "columns:int4-g64*4+int4-g64*92"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_by_weight(name: str, fmt: str, asked: Given) -> None:
    weight = in_expert(0, 0, f"{name}_proj.weight")
    with pytest.raises(BadInputError, match=rf"'{weight}' as .*its shape or dtype"):
        planned_output(asked[0], planned(asked, {weight: fmt}))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_file_without_one_of_its_pieces_is_refused(lost: int, pieced: Checkpoint, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    name = in_expert(0, 0, "up_proj.weight")
    gone = [member for member in pieced.weights[name].members if f".pieces.{lost}." in member]
    tensors = {n: t for n, t in load_file(pieced.path).items() if n not in gone}
    assert len(tensors) == len(pieced.header.tensors) - len(gone)
    with safe_open(pieced.path, "pt") as file:
        save_file(tensors, tmp_path / "cut.safetensors", file.metadata())
    with pytest.raises(BadInputError, match=r"experts\.0\.(up|gate)_proj"):
        open_checkpoint(tmp_path / "cut.safetensors")


def test_broken_weights_are_named_and_leave_nothing_behind(tmp_path: Path) -> None:
    asked = made(tmp_path)
    name = in_expert(0, 0, "up_proj.weight")
    plan = planned(asked, {name: cut(asked[0])[name]}, ordering="camera")
    broken = make_pico(hidden=32, input_size=4, widths=((96, 64, 100), (64, 160, 40)))
    weight: Tensor = broken.state[name].clone()
    weight[0, 0] = float("nan")
    other = opened(broken.with_state(**{name: weight}), tmp_path, "broken.safetensors")
    with pytest.raises(BadInputError, match=rf"'{name}' holds NaN"):
        apply(other, replace(plan, source=other.fingerprint), Output(tmp_path / "out.safetensors"), profile=asked[1])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(asked: Given, tmp_path: Path) -> None:
    """And measures the order of the neurons once."""
    checkpoint, profile = asked
    plan = planned(asked, cut(checkpoint), ordering="camera")
    pieces = goes_on_to_the_same_bytes(lambda target: apply(checkpoint, plan, Output(target), profile), tmp_path)
    assert pieces == ["orders", "block.0", "block.state.0", "block.1", "block.state.1"]
