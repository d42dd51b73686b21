"""Errors of probes are what whole predictions are off by: a table in which one block does what the probe says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import with_slow
from torch import Tensor
from ways import by_probe, way_of

from ditmoe_cli.diffusion.compute_schedule import ScheduledSampling
from ditmoe_cli.diffusion.guidance import away_from_weak, combine
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.model.block_choices import FULL, parse_choice
from ditmoe_cli.scheduling.patterns import Probe, joint_patterns, periodic_patterns, probes_of
from ditmoe_cli.scheduling.replays import branch_scales, earlier, replayed
from ditmoe_cli.scheduling.way_states import Way, visited
from ditmoe_cli.scheduling.way_statistics import way_statistics

EVALUATION, COUNT = 5, 2
RULES = ("top1", "regressed", "top-p:0.6", "odp:0.7", "saliency:0.02", "skip-shared")
SKIPS = ("skip", "skip-attention", "skip-mixture")
MIXED = ("reuse-attention+top1", "forecast-attention+saliency:0.02")
PROBES = [
    *(Probe(parse_choice(text)) for text in (*RULES, *SKIPS)),
    *(Probe(parse_choice(text), 1, 2) for text in MIXED),
    *dict.fromkeys(probe for p in periodic_patterns() if p.period == 3 for probe in probes_of(p)),
    Probe(parse_choice("forecast"), 1, 4),
    Probe(parse_choice("reuse"), 4),
]
JOINT = [p for pattern in joint_patterns() if pattern.period == 3 for p in probes_of(pattern)]
LATENTS = {"attention": "flash", "in_channels": 4, "learn_sigma": True}
WAYS = {
    "rf": ScheduledSampling("euler", 7),
    "guided": ScheduledSampling("euler", 7, 2.5),
    "ddpm": ScheduledSampling("ddim", 7, 2.5),
}


def guided(way: Way, branches: list[Tensor], weak: Tensor | None = None) -> Tensor:
    """The channels of a guided prediction that move the image."""
    family, channels = way.sampling.guidance.family, way.model.config.in_channels
    output = branches[0] if len(branches) == 1 else combine(*branches, way.sampling.cfg, family)
    if weak is not None:
        assert way.sampling.guide is not None
        output = away_from_weak(output, branches[0], weak, way.sampling.guide.scale, family)
    return output[:, :channels].double()


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().flatten(1).sum(dim=1).mean())


@pytest.mark.parametrize(
    ("name", "changes"), with_slow([("rf", {}), ("ddpm", LATENTS), ("guided", {}), ("guided", LATENTS)], quick=2)
)
def test_an_error_is_what_the_whole_prediction_is_off_by(name: str, changes: dict[str, object]) -> None:
    way = way_of(WAYS[name], **changes)
    seen = visited(way, range(4))
    known = way_statistics(way, seen, range(COUNT), [EVALUATION])
    branches = range(2 if way.sampling.null else 1)
    cells = {(branch, block): PROBES for branch in branches for block in range(2)}
    found = replayed(way, seen, range(COUNT), EVALUATION, 0, cells, JOINT, known)
    whole = guided(way, by_probe(way, seen, COUNT, EVALUATION, Probe(FULL), known)[0])
    assert error(whole, seen.predictions[EVALUATION][:COUNT, : way.model.config.in_channels].double()) < 1e-7
    for branch in branches:
        for block in range(2):
            for probe in PROBES:
                by_table, _ = by_probe(way, seen, COUNT, EVALUATION, probe, known, branch, (block,))
                expected = error(guided(way, by_table), whole)
                told = found.cells[branch, block][probe].error
                assert told == pytest.approx(expected, rel=1e-3, abs=1e-9), (branch, block, probe)
        for probe in JOINT:
            by_table, _ = by_probe(way, seen, COUNT, EVALUATION, probe, known, branch)
            assert found.joint[branch][probe].error == pytest.approx(error(guided(way, by_table), whole), rel=1e-3)
    if len(branches) == 1:
        assert (found.null_off, found.null_reused) == (0.0, {})


@pytest.mark.parametrize("changes", [{}, {"in_channels": 4}], ids=["pixels", "latents"])
@pytest.mark.parametrize("name", ["guided", "ddpm"])
def test_the_null_class_reused_or_left_out(name: str, changes: dict[str, object]) -> None:
    way = way_of(WAYS[name], **changes)
    seen = visited(way, range(COUNT))
    known = way_statistics(way, seen, range(COUNT), [EVALUATION])
    found = replayed(way, seen, range(COUNT), EVALUATION, 0, {}, (), known)
    at = [by_probe(way, seen, COUNT, k, Probe(FULL), known)[0] for k in range(EVALUATION + 1)]
    cond, whole = at[-1][0], guided(way, at[-1])
    assert found.null_off == pytest.approx(error(guided(way, [cond]), whole), rel=1e-4)
    assert sorted(found.null_reused) == list(range(1, EVALUATION + 1))
    for age, told in found.null_reused.items():
        before = at[EVALUATION - age]
        assert told == pytest.approx(error(guided(way, [cond, cond - (before[0] - before[1])]), whole), rel=1e-4)


def test_a_weaker_model_makes_errors_of_the_conditional_branch_count_more() -> None:
    sampling = replace(WAYS["guided"], guide=Guide("top1", 0.5))
    plain = way_of(WAYS["guided"])
    way = replace(plain, sampling=sampling)
    seen, probe = visited(plain, range(COUNT)), Probe(parse_choice("skip-mixture"))
    known = way_statistics(plain, seen, range(COUNT), [EVALUATION])
    cells = {(branch, 1): [probe] for branch in range(2)}
    found = replayed(way, seen, range(COUNT), EVALUATION, 0, cells, (), known)
    weak = torch.zeros(())
    for branch in range(2):
        one, other = (by_probe(plain, seen, COUNT, EVALUATION, p, known, branch, (1,))[0] for p in (Probe(FULL), probe))
        weak = torch.zeros_like(one[0])
        expected = error(guided(way, one, weak), guided(way, other, weak))
        assert found.cells[branch, 1][probe].error == pytest.approx(expected, rel=1e-3)


def test_scales_of_branches() -> None:
    way = ScheduledSampling("euler", 5, 2.5, (0.3, 0.9), Guide("top1", 0.5, (0.0, 0.7)))
    assert [branch_scales(way, k) for k in range(5)] == [(1.0,), (2.5, 1.5), (3.0, 1.5), (3.0, 1.5), (1.5,)]
    assert branch_scales(ScheduledSampling("euler", 5, 0.5), 0) == (0.5, 0.5)
    assert branch_scales(ScheduledSampling("euler", 5), 0) == (1.0,)


def test_slots_are_those_that_tokens_compute() -> None:
    way = way_of(WAYS["rf"])
    seen = visited(way, range(COUNT))
    known = way_statistics(way, seen, range(COUNT), [EVALUATION])
    texts = {"top1": 1.0, "regressed": 1.0, "top-p:1.0": 2.0, "top-p:0.0": 1.0, "odp:0.0": 2.0, "saliency:0.0": 2.0}
    probes = {Probe(parse_choice(text)): slots for text, slots in texts.items()}
    found = replayed(way, seen, range(COUNT), EVALUATION, 0, {(0, 0): list(probes)}, (), known).cells[0, 0]
    assert {probe: each.slots for probe, each in found.items()} == probes
    for probe in probes:
        if probe.choice.text in ("top-p:1.0", "odp:0.0", "saliency:0.0"):
            assert found[probe].error < 1e-9


def test_rows_that_pass_together_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditmoe_cli.scheduling import replays

    way = way_of(WAYS["guided"])
    seen = visited(way, range(COUNT))
    known = way_statistics(way, seen, range(COUNT), [EVALUATION])
    cells = {(branch, 0): PROBES[:12] for branch in range(2)}
    found = replayed(way, seen, range(COUNT), EVALUATION, 0, cells, (), known)
    monkeypatch.setattr(replays, "MOST_ROWS", 1)
    again = replayed(way, seen, range(COUNT), EVALUATION, 0, cells, (), known)
    for cell in cells:
        for probe in PROBES[:12]:
            assert found.cells[cell][probe].error == pytest.approx(again.cells[cell][probe].error, rel=1e-4, abs=1e-10)


def test_what_a_choice_may_take_from() -> None:
    assert earlier(0) == range(1)
    assert earlier(20) == range(5, 21)
