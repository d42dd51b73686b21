"""Dropping experts against narrowing them: both errors by hand, and when a command says them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import here
from compressing import calibrated, network, opened, profile_of
from conftest import make_pico
from replaying import guided_by_hand, output, some_tokens

from ditmoe_cli.compression.algebra.neurons import best_neurons, profiled_energies
from ditmoe_cli.compression.plan import BlockPlan, Experts
from ditmoe_cli.compression.prune.narrowing_instead import compared
from ditmoe_cli.compression.prune.neuron_budget import NeuronBudget, shared_widths
from ditmoe_cli.compression.replay.tokens import reservoir_tokens
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.routing.profile import RoutingProfile

Given = tuple[Checkpoint, RoutingProfile]
KEEPS = ((0, 2), (1, 2, 3))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    pico = make_pico(hidden=32, input_size=4, widths=((64,) * 4,) * 2)
    checkpoint = opened(pico, tmp_path_factory.mktemp("narrowing"))
    return checkpoint, profile_of(checkpoint, cfg=2.0)


def dropped(moe: SparseMoE, keep: tuple[int, ...]) -> SparseMoE:
    """A copy whose routers select kept experts only."""
    changed = copy.deepcopy(moe)
    changed.gate.expert_of = torch.tensor([e if e in keep else -1 for e in range(len(moe.experts))], dtype=torch.int32)
    return changed


def narrowed(moe: SparseMoE, profile: RoutingProfile, block: int, widths: Any) -> SparseMoE:
    """A copy without the neurons beyond each expert's width."""
    changed = copy.deepcopy(moe)
    for e, expert in enumerate(changed.experts):
        down: Any = expert.down_proj.weight
        (energy,) = profiled_energies(profile, block, [(e, down)])
        kept = best_neurons(energy, widths[e]).tolist()
        down[:, [neuron for neuron in range(down.shape[1]) if neuron not in kept]] = 0.0
    return changed


def test_both_errors_are_those_of_changed_mixtures(given: Given) -> None:
    checkpoint, profile = given
    stage = Experts(tuple(BlockPlan(keep, "ghost") for keep in KEEPS))
    found = compared(calibrated(*given), stage, 64)
    assert (found.neurons, found.multiple) == (5 / 8, 4)
    everyone = [(0, 1, 2, 3)] * 2
    widths = shared_widths(checkpoint, profile, everyone, NeuronBudget(5 / 8, 4, experts_may_go=False))
    assert sum(sum(block.values()) for block in widths) <= 5 * 64, "no more bytes than those of five experts"
    errors, reference = [0.0, 0.0], 0.0
    for index, block in enumerate(network(checkpoint).blocks):
        tokens = reservoir_tokens(profile, index)
        moe: Any = block.moe
        whole = output(moe, tokens)
        reference += float(guided_by_hand(tokens, whole - moe.shared_experts(tokens.inputs)).square().sum())
        for place, changed in enumerate((dropped(moe, KEEPS[index]), narrowed(moe, profile, index, widths[index]))):
            errors[place] += float(guided_by_hand(tokens, output(changed, tokens) - whole).square().sum())
    assert (found.dropping, found.narrowing) == pytest.approx([error / reference for error in errors], rel=1e-3)
    assert found.narrowing > 0 and found.dropping > 0


def test_pairs_are_spread_evenly_and_stay_together() -> None:
    tokens = some_tokens(12)
    for count, places in ((4, [1, 4, 7, 10]), (12, list(range(12))), (50, list(range(12)))):
        some = tokens.spread(count, torch.device("cpu"))
        rows = [*places, *(place + 12 for place in places)]
        assert torch.equal(some.inputs, tokens.inputs[rows]) and torch.equal(some.gamma, tokens.gamma[rows])
        assert torch.equal(some.coefficients, tokens.coefficients[rows]) and some.branches == 2


# the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile, and a fast one; not to be written to."""
    folder = tmp_path_factory.mktemp("closing")
    make_pico(sampler="rf", in_channels=1, input_size=4, widths=((32,) * 4,) * 2).save(folder / "a.safetensors")
    settings = ("--images", 4, "--steps", 2, "--bins", 2)
    for name, more in (("p", ()), ("fast", ("--fast",))):
        command = ("profile-experts", "a.safetensors", *settings, *more, "-o", f"{name}.safetensors")
        assert here(*command, cwd=folder).code == 0
    return folder


def pruned(made: Path, tmp_path: Path, *words: object, profile: str = "p") -> Any:
    folder = Path(shutil.copytree(made, tmp_path / "folder"))
    few = () if "--no-refit" in words else ("--refit-tokens", 256)
    found = here("prune", "a.safetensors", "--profile", f"{profile}.safetensors", *words, *few, "--json", cwd=folder)
    assert found.code == 0, found.err
    return found


def test_prune_ends_with_what_narrowing_would_have_kept(made: Path, tmp_path: Path) -> None:
    found = pruned(made, tmp_path, "--keep", 2)
    errors = found.result["routed_error"]
    last = found.err.splitlines()[-1]
    assert f"dropping experts leaves {errors['dropping']:.3g} of" in last
    assert f"would leave {errors['narrowing']:.3g} (--neurons 0.5 --allocate global --multiple 2)" in last
    assert errors["neurons"] == 0.5 and errors["narrowing"] > 0 and errors["dropping"] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("--keep", 4),
        ("--keep", 2, "--no-refit"),
        ("--keep", 2, "--constants"),
        ("--keep", 2, "--neurons", 0.5, "--multiple", 4),
        ("--neurons", 0.5, "--multiple", 4),
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_compare(
    words: tuple[object, ...], made: Path, tmp_path: Path
) -> None:
    found = pruned(made, tmp_path, *words)
    assert "routed_error" not in found.result and "dropping experts leaves" not in found.err


def test_a_fast_profile_cannot_tell(made: Path, tmp_path: Path) -> None:
    found = pruned(made, tmp_path, "--keep", 2, "--no-refit", profile="fast")
    assert "routed_error" not in found.result
