"""Errors of an expert's matrices: against rebuilt mixtures where all tokens are drawn, unbiased where some are."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import with_slow
from replaying import WIDTH, error_by_hand, mixture, output, plain, some_tokens
from torch import Tensor

from ditmoe_cli.compression.precision import expert_errors as module
from ditmoe_cli.compression.precision.expert_errors import expert_errors
from ditmoe_cli.compression.replay import drawing
from ditmoe_cli.compression.replay.rounded_layers import nearest
from ditmoe_cli.compression.replay.tokens import BlockTokens
from ditmoe_cli.model.config import BlockConfig
from ditmoe_cli.model.moe import SparseMoE

MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
FORMATS = ("int2-g32", "int4-g64-sym", "nf4")


def found_errors(moe: SparseMoE, expert: int, tokens: BlockTokens, gates: Tensor) -> list[tuple[str, str, float]]:
    """The errors of an expert, or of the shared one for -1, as numbers."""
    chosen = moe.shared_experts if expert < 0 else moe.experts[expert]
    norms = tokens.gamma.norm(dim=1) * tokens.inputs.norm(dim=1)
    formats = dict.fromkeys(MATRICES, FORMATS)
    return [(m, fmt, float(error)) for m, fmt, error in expert_errors(chosen, tokens, gates, norms, formats)]


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
    ("name", "branches", "cfg"),
    with_slow([("merged", 2, 4.0), ("plain", 1, 1.0), ("plain", 2, 0.0), ("mass", 2, 4.0), ("constants", 2, 4.0)], 2),
)
def test_errors_of_experts_are_those_of_rebuilt_mixtures(name: str, branches: int, cfg: float) -> None:
    moe, tokens = MIXTURES[name], some_tokens(30, branches, cfg)
    routing = moe.gate(tokens.inputs)
    cases = [(f"experts.{e}", e, routing.gate_of(e)) for e in range(len(moe.experts))]
    cases.append(("shared_experts", -1, torch.ones(len(tokens.inputs))))
    for stem, expert, gates in cases:
        found = found_errors(moe, expert, tokens, gates)
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
    tokens = some_tokens()
    found = found_errors(plain(), 0, tokens, torch.zeros(len(tokens.inputs)))
    assert [error for _, _, error in found] == [0.0] * 9


@pytest.mark.parametrize("branches", with_slow([2, 1]))
def test_some_drawn_tokens_tell_of_all_without_bias(branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over many seeds is the error of all tokens; single draws are near it."""
    moe, tokens = plain(4), some_tokens(600, branches)
    gates = moe.gate(tokens.inputs).gate_of(1)
    monkeypatch.setattr(module, "EXPERT_DRAWS", 10**6)
    exact = torch.tensor([error for _, _, error in found_errors(moe, 1, tokens, gates)])
    monkeypatch.setattr(module, "EXPERT_DRAWS", 40)
    runs = []
    for seed in range(60):
        monkeypatch.setattr(drawing, "_SEED", seed)
        runs.append([error for _, _, error in found_errors(moe, 1, tokens, gates)])
    relative = torch.tensor(runs) / exact - 1
    deviation = relative.std(dim=0)
    assert deviation.max() < 0.6
    assert (relative.mean(dim=0).abs() < 4 * deviation / 60**0.5).all()
    assert deviation.min() > 0, "they are not all drawn"


def test_one_matrix_alone_may_be_asked_for() -> None:
    moe, tokens = plain(), some_tokens()
    gates, norms = torch.ones(len(tokens.inputs)), torch.ones(len(tokens.inputs))
    found = list(expert_errors(moe.experts[0], tokens, gates, norms, {MATRICES[1]: FORMATS}))
    assert [each[:2] for each in found] == [(MATRICES[1], fmt) for fmt in FORMATS]
    assert not list(expert_errors(moe.experts[0], tokens, gates, norms, dict.fromkeys(MATRICES, ())))
    assert moe.experts[0].up_proj.weight.shape[1] == WIDTH
