"""Schedules on a GPU: every choice of a block gives what it gives on the CPU, plans are made there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import make_pico
from devices import TRIED_ON
from safetensors.torch import load_file

from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_with
from ditmoe_cli.model.block_choices import FOLLOW, FULL, BlockChoice, ComputeTable, full_table, parse_choice, table_of
from ditmoe_cli.model.scheduled import ComputeCount

pytestmark = pytest.mark.cuda

CHOICES = (
    *("reuse", "forecast", "skip", "reuse-attention", "forecast-mixture", "reuse-slots", "top1", "regressed"),
    *("top-p:0.5", "odp:0.5", "saliency:0.05", "forecast-attention+top1", "skip-shared"),
)
SPEC = SampleSpec(images=4, steps=4, cfg=1.5, seed=0, solver="euler", classes=(0, 1, 2))
NULL = ("compute",) * SPEC.steps


def sampled(table: ComputeTable, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ComputeCount]:
    model = make_pico(sampler="rf").model().to(device)
    model.compute_in(dtype)
    generator = torch.Generator().manual_seed(1)
    arrays = {
        "energy": torch.rand(2, 2, 2, 4, generator=generator).to(device),
        "scale": torch.randn(2, 4, 32, generator=generator).to(device),
        "constant": torch.randn(2, 4, 32, generator=generator).to(device),
    }
    counts: list[ComputeCount] = []
    arrays["slopes"] = 0.5 * torch.rand(SPEC.steps, 4, 2, generator=generator).to(device)
    scheduled = scheduled_with(table, arrays, 2, counts.append)
    return sample_batch(model, SPEC, range(SPEC.images), scheduled=scheduled).cpu(), counts[0]


def alternating(choice: BlockChoice) -> ComputeTable:
    return table_of([[[FULL] * 2] * 2, [[FULL] * 2] * 2, [[choice, FULL], [choice] * 2], [[choice] * 2] * 2], NULL)


@pytest.mark.parametrize("text", CHOICES)
def test_choices_give_what_they_give_on_the_cpu(text: str) -> None:
    table = alternating(parse_choice(text))
    mine, counted = sampled(table, TRIED_ON, torch.float32)
    its, expected = sampled(table, "cpu", torch.float32)
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    assert counted.total == pytest.approx(expected.total, rel=1e-3)
    assert counted.most_kept == expected.most_kept


@pytest.mark.parametrize("text", ["top1", "odp:0.5", "reuse-slots", "forecast"])
def test_choices_in_bf16_are_near(text: str) -> None:
    table = alternating(parse_choice(text))
    mine, _ = sampled(table, TRIED_ON, torch.bfloat16)
    its, _ = sampled(table, "cpu", torch.float32)
    assert float((mine - its).square().sum() / its.square().sum()) < 0.02


def test_everything_computed_is_no_schedule_to_the_bit() -> None:
    model = make_pico(sampler="rf").model().to(TRIED_ON)
    table = full_table(SPEC.steps, 2, NULL)
    mine = sample_batch(model, SPEC, range(4), scheduled=Scheduled(table))
    assert torch.equal(mine, sample_batch(model, SPEC, range(4)))


def test_predictions_follow_the_state() -> None:
    choices = [FULL, FULL, FOLLOW, FOLLOW]
    table = table_of([[[choice] * 2] * 2 for choice in choices], ("compute", "compute", "off", "off"))
    mine, counted = sampled(table, TRIED_ON, torch.float32)
    its, expected = sampled(table, "cpu", torch.float32)
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    assert counted.most_kept == expected.most_kept > 0


def test_images_skip_blocks_by_residuals() -> None:
    table = full_table(SPEC.steps, 2, NULL, residual=0.5)
    mine, _ = sampled(table, TRIED_ON, torch.float32)
    its, _ = sampled(table, "cpu", torch.float32)
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)


def test_a_schedule_is_chosen_and_followed(tmp_path: Path) -> None:
    make_pico(sampler="rf").save(tmp_path / "a.safetensors")
    on = ("--device", TRIED_ON)
    words = ("--solver", "euler", "--steps", 4, "--images", 8, "--bins", 2, "--flops", 0.7, "--anyway")
    assert here("schedule", "a.safetensors", *words, "-o", "s.safetensors", *on, cwd=tmp_path).code == 0
    asked = ("--schedule", "s.safetensors", "--images", 4, *on)
    assert here("sample", "a.safetensors", *asked, "-o", "x.safetensors", cwd=tmp_path).code == 0
    assert load_file(tmp_path / "x.safetensors")["latents"].isfinite().all()
