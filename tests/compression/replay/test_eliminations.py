"""Curves of errors over widths: the guided Gram by hand, the unit of formats' errors, and what is kept of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import calibrated, measure_few_tokens, opened, profile_of
from conftest import make_pico
from keeping import result_after_interrupts
from replaying import WIDTH, error_by_hand, output, plain, some_tokens
from torch import Tensor

from ditmoe_cli.compression.algebra import elimination
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.precision.expert_errors import expert_errors
from ditmoe_cli.compression.replay import eliminations
from ditmoe_cli.compression.replay.eliminations import Curves, NeuronCurve, expert_curve, neuron_curves
from ditmoe_cli.compression.replay.kept_measures import KeptMeasures, kept_measures
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]


class _Block:
    """Of a block, only the mixture counts here."""

    def __init__(self, moe: SparseMoE) -> None:
        self.moe = moe


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Next to no ridge, so that errors are those of plain least squares."""
    monkeypatch.setattr(elimination, "RIDGE", 1e-9)


def curves_of(moe: SparseMoE, tokens: BlockTokens) -> dict[str, NeuronCurve]:
    block: Any = _Block(moe)
    return dict(eliminations.block_curves(block, tokens))


def separable(tokens: BlockTokens, seed: int = 0) -> BlockTokens:
    """The tokens with a residual gate a_t c_d, of which curves are exact."""
    generator = torch.Generator().manual_seed(seed)
    sizes, channel = (torch.rand(n, generator=generator) + 0.2 for n in (len(tokens.gamma), WIDTH))
    return replace(tokens, gamma=sizes[:, None] * channel)


def without(moe: SparseMoE, stem: str) -> SparseMoE:
    """A copy in which an expert gives 0."""
    changed = copy.deepcopy(moe)
    changed.get_submodule(stem).down_proj.weight.zero_()  # type: ignore[union-attr,operator]
    return changed


def energy_of_change(tokens: BlockTokens, moe: SparseMoE, changed: SparseMoE) -> float:
    """Σ ‖guided change‖² of the block's output, for each pair."""
    reference = tokens.energy(output(moe, tokens) - moe.shared_experts(tokens.inputs))
    return error_by_hand(tokens, moe, changed) * reference / tokens.pairs


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("branches", "cfg"), [(1, 1.0), (2, 0.0), (2, 1.5), (2, 4.0)])
def test_an_expert_without_neurons_costs_its_part_of_the_guided_output(branches: int, cfg: float) -> None:
    """In the unit of errors of formats: what a mixture rebuilt without the expert adds to the guided stream."""
    moe, tokens = plain(), separable(some_tokens(200, branches, cfg))
    curves = curves_of(moe, tokens)
    names = [f"experts.{e}" for e in range(len(moe.experts))] + ["shared_experts"]
    assert list(curves) == [f"moe.{name}" for name in names]
    for name in names:
        expected = energy_of_change(tokens, moe, without(moe, name))
        assert float(curves[f"moe.{name}"].errors[0]) == pytest.approx(expected, rel=1e-4), name


@pytest.mark.usefixtures("exact")
def test_the_unit_is_that_of_errors_of_formats() -> None:
    """A format that leaves nothing of the down projection costs what width 0 does."""
    moe, tokens = plain(), separable(some_tokens(200, 2, 3.0))
    norms = tokens.gamma.norm(dim=1) * tokens.inputs.norm(dim=1)
    gates = moe.gate(tokens.inputs).gate_of(1)
    expert = copy.deepcopy(moe.experts[1])
    expert.down_proj.weight.mul_(1e-3)  # every value below half a step of the one large value in its row
    expert.down_proj.weight[:, 0] = 1.0
    curve = expert_curve(expert, tokens, *scales_of(tokens, gates))
    ((_, _, rounded),) = expert_errors(expert, tokens, gates, norms, {"down_proj.weight": ("int2-g64-sym",)})
    only_first = copy.deepcopy(expert)
    only_first.down_proj.weight[:, 1:] = 0.0
    changed = copy.deepcopy(moe)
    changed.experts[1] = only_first
    whole = copy.deepcopy(moe)
    whole.experts[1] = expert
    expected = energy_of_change(tokens, whole, changed)
    assert float(rounded) == pytest.approx(expected, rel=0.05), "the small values are rounded to 0"
    by_hand = least_error(expert.down_proj.weight.double(), psi_of(moe.experts[1], tokens, gates), tokens, [])
    assert float(curve.errors[0]) == pytest.approx(by_hand, rel=1e-4)


def scales_of(tokens: BlockTokens, gates: Tensor) -> tuple[Tensor, Tensor]:
    """s g a of tokens with a separable residual gate, and c."""
    channel = tokens.gamma.square().mean(dim=0).sqrt()
    return gates * tokens.coefficients * (tokens.gamma / channel).square().mean(dim=1).sqrt(), channel


def psi_of(expert: Any, tokens: BlockTokens, gates: Tensor) -> Tensor:
    """The guided parts of an expert's neurons Σ_b s_b γ_b g_b φ_b by pair, channel and neuron, (n, D, H)."""
    phi = expert.neurons(tokens.inputs).double()
    psi = torch.zeros(tokens.pairs, WIDTH, phi.shape[1], dtype=torch.float64)
    for i in range(len(phi)):
        weight = float(tokens.coefficients[i]) * float(gates[i]) * tokens.gamma[i].double()
        psi[i % tokens.pairs] += weight[:, None] * phi[i]
    return psi


def least_error(down: Tensor, psi: Tensor, tokens: BlockTokens, kept: list[int]) -> float:
    """The squared error for each pair of the best down projection on some neurons, channel by channel."""
    total = 0.0
    for row, own in zip(down, psi.unbind(dim=1), strict=True):
        target = own @ row
        fit = own[:, kept] @ torch.linalg.lstsq(own[:, kept], target[:, None]).solution[:, 0] if kept else 0 * target
        total += float((target - fit).square().sum())
    return total / tokens.pairs


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("branches", [1, 2])
def test_errors_are_those_of_down_projections_fitted_to_guided_outputs(branches: int) -> None:
    """Times (n + k) / (n - k), what k of n degrees of freedom make of it on other tokens."""
    moe, tokens = plain(), separable(some_tokens(60, branches, 2.5))
    gates = moe.gate(tokens.inputs).gate_of(2)
    used = int((tokens.paired(gates) != 0).any(dim=1).sum())
    expert: Any = moe.experts[2]
    curve = expert_curve(expert, tokens, *scales_of(tokens, gates))
    psi = psi_of(expert, tokens, gates)
    neurons = len(curve.order)
    for width in range(neurons):
        expected = least_error(expert.down_proj.weight.double(), psi, tokens, curve.order[:width].tolist())
        factor = (used + width) / (used - width)
        assert float(curve.errors[width]) == pytest.approx(factor * expected, rel=1e-3), width
    assert float(curve.errors[neurons]) == 0.0
    assert float(curve.growth[0]) == 0.0 and float(curve.growth[neurons]) == pytest.approx(1.0)


def test_an_expert_that_nobody_chose_costs_nothing() -> None:
    tokens = some_tokens()
    expert: Any = plain().experts[0]
    curve = expert_curve(expert, tokens, *scales_of(tokens, torch.zeros(len(tokens.inputs))))
    assert torch.equal(curve.order.sort().values, torch.arange(len(curve.order), dtype=torch.int32))
    assert float(curve.errors.max()) < 1e-30 and curve.errors.isfinite().all()
    assert curve.growth.isfinite().all()


def test_fewer_tokens_than_neurons_still_give_finite_errors() -> None:
    expert: Any = plain().experts[0]
    tokens = some_tokens(3)
    curve = expert_curve(expert, tokens, *scales_of(tokens, torch.ones(len(tokens.inputs))))
    assert curve.errors.isfinite().all() and (curve.errors >= 0).all()


def test_tokens_some_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, tokens = plain(), some_tokens(50)
    whole = curves_of(moe, tokens)
    monkeypatch.setattr(eliminations, "_CHUNK", 7)
    for name, curve in curves_of(moe, tokens).items():
        assert torch.equal(curve.order, whole[name].order)
        assert curve.errors.tolist() == pytest.approx(whole[name].errors.tolist(), rel=1e-4)


# whole models


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, widths=((48, 32, 40), (32, 24, 16)))
    checkpoint = opened(pico, tmp_path_factory.mktemp("eliminations"))
    return checkpoint, profile_of(checkpoint)


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        measure_few_tokens(patched, 256)
        patched.setattr(eliminations, "ELIMINATION_TOKENS", 256)
        yield


def same(some: Curves, others: Curves) -> bool:
    """Whether curves are equal to the last bit."""
    return [set(block) for block in some] == [set(block) for block in others] and all(
        torch.equal(getattr(curve, field), getattr(other[name], field))
        for one, other in zip(some, others, strict=True)
        for name, curve in one.items()
        for field in ("order", "errors", "growth")
    )


class Keeping:
    """Curves kept in a folder of their own, and what is told about them."""

    def __init__(self, given: Given, folder: Path, key: str = "") -> None:
        self.notes: list[str] = []
        usual = kept_measures(*given, "cpu", self.notes.append)
        kept = KeptMeasures(folder / "p.measured.json", key or usual.key, self.notes.append)
        self.path = folder / "p.neurons.safetensors"
        self.calibrated = Calibrated(*given, "cpu", kept=kept)

    def curves(self) -> Curves:
        return neuron_curves(self.calibrated)


@pytest.fixture(scope="module")
def kept(given: Given, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curves, bytes]:
    """The curves, and the file that keeps them."""
    keeping = Keeping(given, tmp_path_factory.mktemp("kept"))
    return keeping.curves(), keeping.path.read_bytes()


def test_every_expert_has_a_curve_of_its_width(given: Given) -> None:
    curves = neuron_curves(calibrated(*given))
    for block, own in zip(given[0].config.blocks, curves, strict=True):
        widths = [*block.expert_widths, block.shared_width]
        assert [len(curve.order) for curve in own.values()] == widths
        assert all(len(c.errors) == len(c.growth) == len(c.order) + 1 for c in own.values())
        assert all(float(curve.errors[0]) > float(curve.errors[-1]) == 0.0 for curve in own.values())


def test_curves_of_a_block_do_not_depend_on_others_behind_it(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are seen on the original model's states, and in order."""
    seen: list[tuple[int, ...]] = []
    block_curves: Callable[..., Any] = eliminations.block_curves

    def watched(block: Block, tokens: BlockTokens) -> Any:
        seen.append(tuple(len(expert.gate_proj.weight) for expert in block.moe.experts))  # type: ignore[union-attr,arg-type]
        return block_curves(block, tokens)

    monkeypatch.setattr(eliminations, "block_curves", watched)
    neuron_curves(calibrated(*given))
    assert seen == [(48, 32, 40), (32, 24, 16)]


def test_curves_are_measured_once_and_kept_to_the_last_bit(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = Keeping(given, tmp_path)
    first = keeping.curves()
    assert same(first, neuron_curves(calibrated(*given))) and keeping.path.exists()
    monkeypatch.setattr(eliminations, "OffloadedDiTMoE", None)  # no model is needed any more
    assert same(keeping.curves(), first)
    assert keeping.notes == [f"using the errors of widths kept in {keeping.path}"]
    assert [path.name for path in tmp_path.iterdir()] == [keeping.path.name], "and nothing else is left"


def test_the_file_of_another_key_is_measured_anew(given: Given, tmp_path: Path) -> None:
    Keeping(given, tmp_path, "another").curves()
    keeping = Keeping(given, tmp_path)
    before = keeping.path.read_bytes()
    assert same(keeping.curves(), neuron_curves(calibrated(*given)))
    assert keeping.notes == [] and keeping.path.read_bytes() != before, "the key is the new one"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return data[:0]


def another_number(ending: str) -> Callable[[bytes], bytes]:
    """Write over the last number of the first array of that ending: what is left is a whole file."""

    def changed(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        where = json.loads(data[8:start])
        begin, end = next(about["data_offsets"] for name, about in sorted(where.items()) if name.endswith(ending))
        assert end - begin > 16
        return data[: start + end - 8] + data[start + begin : start + begin + 8] + data[start + end :]

    return changed


def unsigned(data: bytes) -> bytes:
    assert data.count(b"digest") == 1
    return data.replace(b"digest", b"nobody")


DAMAGES = {"cut": cut, "empty": empty, "unsigned": unsigned}
CHANGES = {ending: another_number(f".{ending}") for ending in ("order", "errors", "growth")}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), *CHANGES.values()], ids=[*DAMAGES, *CHANGES])
def test_a_damaged_file_is_measured_anew(
    damage: Callable[[bytes], bytes], kept: tuple[Curves, bytes], given: Given, tmp_path: Path
) -> None:
    keeping, (first, whole) = Keeping(given, tmp_path), kept
    keeping.path.write_bytes(damage(whole))
    assert keeping.path.read_bytes() != whole
    assert same(keeping.curves(), first)
    assert keeping.notes == [] and keeping.path.read_bytes() == whole


def test_an_interrupted_measurement_goes_on_to_the_same_curves(given: Given, tmp_path: Path) -> None:
    keeping = Keeping(given, tmp_path)

    def measured() -> Curves:
        result = keeping.curves()
        keeping.path.unlink()
        return result

    expected = neuron_curves(calibrated(*given))
    assert same(result_after_interrupts(measured), expected)
    assert list(tmp_path.iterdir()) == []
    assert any(note.startswith("going on with block 2 of 2") for note in keeping.notes)


def test_where_nothing_can_be_written_measuring_says_so_and_goes_on(given: Given, tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "file").write_text("no folder")
    kept = KeptMeasures(tmp_path / "file" / "p.measured.json", "key", notes.append)
    assert same(neuron_curves(Calibrated(*given, "cpu", kept=kept)), neuron_curves(calibrated(*given)))
    assert len(notes) == 2 and "without keeping" in notes[0] and "errors of widths are not kept" in notes[1]
