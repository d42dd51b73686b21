"""``ditmoe heal --train lora:R``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import slow_but
from cli_helpers import here
from conftest import Pico

from ditmoe_cli.files.header import read_safetensors_header

pytestmark = pytest.mark.usefixtures("few_tokens")

PROFILE = ("--calibration-images", "16", "--calibration-steps", "3")
WORDS = ("heal", "s.safetensors", "--original", "a.safetensors", "--batch", "8", *PROFILE)


@pytest.fixture(scope="module")
def folder(pico: Callable[..., Pico], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an original and a student in bf16, whose experts are far from the original's."""
    folder = tmp_path_factory.mktemp("low-rank")
    original = pico(sampler="rf", in_channels=1, depth=1, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    noisy = {
        name.replace(".", "__"): tensor + 0.5 * tensor.std() * torch.randn(tensor.shape, generator=generator).bfloat16()
        for name, tensor in original.state.items()
        if "experts" in name
    }
    original.save(folder / "a.safetensors")
    original.with_state(**noisy).save(folder / "s.safetensors")
    return folder


@pytest.mark.parametrize("scope", slow_but(["auto"], ["block", "model", "auto"]))
def test_updates_of_low_rank_heal_in_each_scope(folder: Path, scope: str) -> None:
    steps = 3 if scope == "block" else 8
    outcome = here(*WORDS, "--steps", steps, "--train", "lora:4", "--scope", scope, cwd=folder)
    before, after = outcome.result["held_error"]
    assert after < 0.9 * before
    assert outcome.path.name.startswith(f"s.heal-{steps}steps") and "lora4" in outcome.path.name
    student, healed = (read_safetensors_header(path).tensors for path in (folder / "s.safetensors", outcome.path))
    assert {n: t.info for n, t in student.items()} == {n: t.info for n, t in healed.items()}, "the same layout"
    assert outcome.envelope["history"][-1]["options"]["train"] == "lora:4"
    assert "up to date" in here(*WORDS, "--steps", steps, "--train", "lora:4", "--scope", scope, cwd=folder).err, (
        "a second run finds it"
    )


def test_a_dry_run_counts_the_values_of_updates_and_their_memory(folder: Path) -> None:
    few, many, whole = (
        here(*WORDS, "--train", train, "--dry-run", cwd=folder).result for train in ("lora:1", "lora:4", "all")
    )
    assert few["trained_weights"] < many["trained_weights"] < whole["trained_weights"]
    assert abs(few["bytes"] - whole["bytes"]) < 200, "metadata alone differs"
    assert few["estimate"]["memory"] < whole["estimate"]["memory"]
    assert many["trained_weights"] - few["trained_weights"] > 3 * 32, "of each matrix three rows and columns more"


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("lora:0", "lora:0: give a rank of 1 or more, as lora:8"),
        ("lora:", "give a rank"),
        ("lora:x", "lora:x: give a rank"),
        ("lora:-2", "give a rank"),
        ("lora:1.5", "give a rank"),
        ("lora:33", "lora:33: the width of s.safetensors is 32; give a lower rank"),
        ("lora:8,router", "lora:8 stands alone"),
        ("router,lora:8", "lora:8 stands alone"),
        ("lora", "choose from all, router, norms, shared, down, experts, attention, embedders, or lora:R"),
    ],
)
def test_ranks_that_cannot_be_are_refused(folder: Path, train: str, told: str) -> None:
    message = here(*WORDS, "--train", train, "--steps", "1", cwd=folder).error(2)
    assert "--train" in message and told in message
