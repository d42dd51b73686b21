"""The benchmark: times by clocks that tests wind, rounds, ratios, and a step equal to that of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from distilling import distilled_pair
from packed import packed_pico
from torch import Tensor

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation import bench as benching
from ditmoe_cli.evaluation import memory_use
from ditmoe_cli.evaluation.bench import (
    WARM_UPS,
    Bench,
    Difference,
    Load,
    Speed,
    Spread,
    bench,
    best_count,
    check_load,
    denoising_step,
    difference,
    in_turn,
    rounds,
    spread,
    thread_counts,
)
from ditmoe_cli.evaluation.memory_use import GROUPS, KINDS, Buffer, Footprint, Memory, Sizes
from ditmoe_cli.evaluation.step_parts import OTHER, PARTS
from ditmoe_cli.model import throughput
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.throughput import Rate

CPU = torch.device("cpu")
NOTHING = Sizes(10, dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0))
SPEED = Speed(3.0e9, Rate(2.0e10, 1, measured=True), dict.fromkeys((*PARTS, OTHER), 0.5))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(throughput, "_SIDE", 64)


def saved(pico: Pico, folder: Path, name: str = "a") -> Checkpoint:
    return open_checkpoint(pico.save(folder / f"{name}.safetensors"))


def result_of(
    timed: dict[int, tuple[float, ...]],
    threads: int = 1,
    batch: int = 6,
    memory: Memory | None = None,
    spec: SampleSpec | None = None,
) -> Bench:
    """A result with these seconds by number of threads."""
    footprint = Footprint(1, NOTHING, NOTHING, Buffer(0, None))
    spec = spec or SampleSpec(batch, 16, 1.0, 0, "ab2", (0,))
    return Bench(Load(batch=batch), spec, 0.5, footprint, memory or Memory(1, 2, 3), timed, threads, SPEED)


def only(checkpoint: Checkpoint, load: Load) -> Bench:
    [result] = bench([checkpoint], load).results
    return result


# a step


@pytest.mark.parametrize(("cfg", "sampler", "t"), [(1.0, "rf", 0.5), (2.0, "ddpm", 500), (0.0, "rf", 0.5)])
def test_a_pass_holds_both_branches_at_the_middle_time(
    cfg: float, sampler: str, t: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(make_pico(sampler=sampler), tmp_path)
    seen: list[tuple[Tensor, float, Tensor]] = []
    prepared = DiTMoE.prepared

    def watched(self: DiTMoE, times: list[float], labels: Tensor) -> Callable[..., Tensor]:
        inner = prepared(self, times, labels)

        def predict(x: Tensor, t: float, observer: None = None) -> Tensor:
            seen.append((x, t, labels))
            return inner(x, t, observer)

        return predict

    monkeypatch.setattr(DiTMoE, "prepared", watched)
    load = Load(batch=5, repeats=2, cfg=cfg)
    result = only(checkpoint, load)
    assert len(seen) == load.passes == WARM_UPS + 1 + 2 + 1 + 2 and len(result.seconds) == 2
    for x, times, labels in seen:
        assert torch.equal(x, seen[0][0])
        assert len(x) == load.rows == (5 if cfg == 1 else 10)
        assert times == t
        assert labels.tolist() == [0, 1, 2, 0, 1] + ([] if cfg == 1 else [3] * 5)
    assert result.to_json()["conditions"]["t"] == t


def test_noise_belongs_to_seed_and_image(tmp_path: Path) -> None:
    model = build_model(saved(make_pico(), tmp_path), CPU)
    three, two, other = (denoising_step(model, Load(batch=n, seed=s))() for n, s in ((3, 4), (2, 4), (2, 5)))
    assert three.shape == (3, model.config.in_channels, 8, 8)
    assert torch.equal(three, denoising_step(model, Load(batch=3, seed=4))())
    assert torch.allclose(three[:2], two, atol=1e-5)
    assert not torch.allclose(two, other, atol=1e-2)


def test_what_does_not_depend_on_the_machine_is_equal_twice(tmp_path: Path) -> None:
    checkpoint = saved(packed_pico(make_pico(), "nf4"), tmp_path)
    one, two = (only(checkpoint, Load(batch=2, repeats=1)).to_json() for _ in range(2))
    assert one["bytes"] == two["bytes"]
    assert one["conditions"] == two["conditions"]
    assert one["flops"] == two["flops"]


def test_the_least_time_counts() -> None:
    """A step of 3 GFLOP in 0.25 s, where a large product does 20 GFLOP/s."""
    document = result_of({1: (0.5, 0.25, 2.0)}).to_json()
    assert (document["seconds"], document["median_seconds"]) == (0.25, 0.5)
    assert document["images_per_second"] == 24
    assert document["flops_per_second"] == 1.2e10
    assert document["share_of_peak"] == 0.6
    assert document["parts"]["traced_seconds"] == 4
    assert document["parts"]["shares"] == dict.fromkeys((*PARTS, OTHER), 0.125)


def test_the_number_of_threads_that_is_best_for_all_counts() -> None:
    """By the product of least seconds; of equally good numbers the fewest threads."""
    assert best_count({4: [(0.5, 0.25)], 2: [(0.125, 2.0)], 1: [(0.125,)]}) == 1
    assert best_count({2: [(1.0,), (4.0,)], 1: [(2.0,), (1.5,)]}) == 1
    assert best_count({2: [(1.0,), (2.0,)], 1: [(2.0,), (1.5,)]}) == 2
    document = result_of({4: (0.5, 0.25), 1: (0.125, 0.5)}, threads=1).to_json()
    assert document["seconds"] == 0.125 and document["conditions"]["threads"] == 1
    assert document["seconds_by_threads"] == {"4": 0.25, "1": 0.125}


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (2, 1)), (6, (6, 3, 1)), (64, (64, 32, 16, 8, 4, 2, 1))])
def test_a_number_of_threads_and_its_halves_are_tried(most: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(most) == counts


def test_threads_are_tried_in_turn_and_left_as_they_were(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    for count in in_turn((2, 1)):
        seen.append((count, torch.get_num_threads()))
    assert seen == [(2, 2), (1, 1)] and torch.get_num_threads() == before
    load = Load(batch=1, repeats=2, threads=(2, 1))
    result = only(saved(make_pico(), tmp_path), load)
    assert {count: len(seconds) for count, seconds in result.timed.items()} == {2: 2, 1: 2}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "load",
    [
        *(Load(batch=0), Load(repeats=0), Load(cfg=-1.0), Load(cfg=math.inf), Load(cfg=math.nan)),
        *(Load(processor_time=True, threads=(2,)), Load(processor_time=True, device="cuda")),
    ],
)
def test_values_out_of_range(load: Load) -> None:
    with pytest.raises(UsageError, match=r"(batch 0|repeats 0|cfg|processor_time)"):
        check_load(load, make_pico().config)


def test_a_model_without_a_null_class_is_timed_without_guidance() -> None:
    config = make_pico(null_class=False).config
    assert check_load(Load(cfg=1.0), config) == Load(cfg=1.0)
    with pytest.raises(UsageError, match="no null class"):
        check_load(Load(cfg=1.5), config)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    broken = make_pico().with_state(final_layer__linear__bias=torch.full((32,), math.nan))
    with pytest.raises(BadInputError, match=r"final_layer\.linear\.bias"):
        bench([saved(broken, tmp_path)], Load())


# memory


def footed(weights: int, buffer: int) -> Footprint:
    sizes = Sizes(weights, dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0))
    return Footprint(0, sizes, sizes, Buffer(buffer, "x" if buffer else None))


@pytest.mark.parametrize(
    ("memory", "growth", "beyond", "needed"),
    [
        (Memory(100, 170, 250), 150, 40, 150),
        (Memory(100, 100, 120), 20, -90, 110),  # weights of a mapped file
        (Memory(None, None, None), None, None, 110),
    ],
)
def test_needed_is_never_below_weights_and_buffer(
    memory: Memory, growth: int | None, beyond: int | None, needed: int
) -> None:
    result = replace(result_of({1: (1.0,)}, memory=memory), footprint=footed(80, 30))
    document = result.to_json()["memory"]
    assert (document["growth"], document["beyond"], document["needed"]) == (growth, beyond, needed)


def test_a_system_without_proc_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_use, "resident_bytes", lambda: None)
    result = only(saved(make_pico(), tmp_path), Load(repeats=1))
    assert result.memory == Memory(None, None, None)
    assert result.needed == result.footprint.least
    assert result.to_json()["memory"]["beyond"] is None


# several


class Wound:
    """A clock that stands still but while a model predicts: then it goes on by the seconds of that model's depth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int, int], float]) -> None:
        self.now, self.asked = 0.0, list[int]()
        unpatched = DiTMoE.unpatched

        def timed(model: DiTMoE, tokens: Tensor, modulation: Tensor) -> Tensor:
            self.asked.append(model.config.depth)
            self.now += seconds(model.config.depth, len(self.asked))
            return unpatched(model, tokens, modulation)

        monkeypatch.setattr(DiTMoE, "unpatched", timed)

    def __call__(self) -> float:
        return self.now


def depths(folder: Path, *counts: int) -> list[Checkpoint]:
    return [saved(make_pico(depth=depth), folder, f"depth{depth}") for depth in counts]


def test_steps_of_several_checkpoints_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Depth d takes d seconds, and the machine gets slower all the time: no ratio shows it but by a round's share."""
    clock = Wound(monkeypatch, lambda depth, passed: depth * 1.001**passed)
    load = Load(batch=1, repeats=8, threads=(1,))
    found = bench(depths(tmp_path, 2, 1, 3), load, clock)
    assert found.interleaved
    assert [len(result.seconds) for result in found.results] == [8, 8, 8]
    timed = clock.asked[3 * (WARM_UPS + 1) :][: 3 * 8]
    turns = [tuple(timed[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(turn) == [1, 2, 3] for turn in turns), "each once a round"
    assert len(set(turns)) > 2, "in changing order"
    for ratio, expected in zip(found.ratios, (1.0, 0.5, 1.5), strict=True):
        assert ratio.low <= ratio.median <= ratio.high
        assert ratio.median == pytest.approx(expected, rel=0.003)
    assert found.ratios[0] == Spread(1.0, 1.0, 1.0, 1.0)
    assert all(result.threads == 1 for result in found.results)


def test_parts_of_a_step_add_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Wound(monkeypatch, lambda depth, _: float(depth))
    for result, depth in zip(bench(depths(tmp_path, 2, 1), Load(batch=1), clock).results, (2, 1), strict=True):
        assert result.seconds == (depth,) * 5
        assert result.speed.parts == dict.fromkeys(PARTS, 0.0) | {OTHER: depth}


def test_what_does_not_fit_together_is_timed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = depths(tmp_path, 2, 1)
    needs = sum(memory_use.loaded_bytes(each) for each in checkpoints)
    monkeypatch.setattr(benching, "available_bytes", lambda _: float(needs))
    clock = Wound(monkeypatch, lambda depth, passed: depth * (1 + passed % 2))
    load = Load(batch=1, repeats=4, threads=(2, 1))
    found = bench(checkpoints, load, clock)
    assert not found.interleaved
    assert clock.asked == sorted(clock.asked, reverse=True), "all of the first, then all of the second"
    first, second = found.results
    assert set(first.timed) == {2, 1} and set(second.timed) == {first.threads}, "on as many threads as the first"
    assert found.ratios[1].least == 0.5
    assert first.load == second.load == load
    monkeypatch.setattr(benching, "available_bytes", lambda _: 1e12)
    assert bench(checkpoints, load, clock).interleaved


def test_rounds_hold_each_checkpoint_once_and_are_the_same_twice() -> None:
    assert rounds(1, 3) == [[0]] * 3
    found = rounds(4, 50)
    assert found == rounds(4, 50)
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert {order[0] for order in found} == {0, 1, 2, 3}


def test_the_spread_of_ratios_by_hand() -> None:
    """Ratios of rounds 1, 2, 3, 4 and 5: quartiles 2 and 4; the least seconds are those of different rounds."""
    assert spread((1.0, 4.0, 3.0, 8.0, 5.0), (1.0, 2.0, 1.0, 2.0, 1.0)) == Spread(3.0, 2.0, 4.0, 1.0)
    assert spread((3.0,), (2.0,)) == Spread(1.5, 1.5, 1.5, 1.5)


# dtypes


def test_another_dtype_is_measured_against_fp32(tmp_path: Path) -> None:
    checkpoint = saved(make_pico(sampler="rf"), tmp_path)
    exact, rounded = (only(checkpoint, Load(batch=4, repeats=1, dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert exact.difference is None and exact.to_json()["difference"] is None
    assert rounded.difference is not None
    assert 1e-4 < rounded.difference.prediction < 0.1
    assert 0 <= rounded.difference.rerouted < 0.2
    assert rounded.to_json()["conditions"]["dtype"] == "bf16"
    assert rounded.footprint.weights.total < exact.footprint.weights.total


def test_the_difference_of_predictions_by_hand() -> None:
    """A prediction of norm 5 that is off by 1; of 2 + 2 tokens one has other experts, whatever their order."""
    reference = torch.tensor([3.0, 4.0]), [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [0, 2]])]
    other = torch.tensor([3.0, 5.0]), [torch.tensor([[1, 0], [2, 3]]), torch.tensor([[0, 3], [2, 0]])]
    assert difference(reference, reference) == Difference(0.0, 0.0)
    found = difference(other, reference)
    assert (found.prediction, found.rerouted) == (pytest.approx(0.2), 0.25)


# what an image takes


@pytest.mark.parametrize(
    ("spec", "nfe", "in_a_pass"),
    [
        (SampleSpec(6, 16, 1.0, 0, "ab2", (0,)), 16, 1),
        (SampleSpec(6, 16, 1.5, 0, "ab2", (0,)), 32, 2),
        (SampleSpec(6, 4, 1.0, 0, "euler", (0,)), 4, 1),
        (SampleSpec(6, 4, 1.0, 0, "euler", (0,), guide=Guide("top1", 0.5, (0.0, 0.6))), 6, 2),
    ],
)
def test_an_image_takes_its_evaluations(spec: SampleSpec, nfe: int, in_a_pass: int) -> None:
    """The fastest pass of 6 images takes 3 s, for one or two evaluations of each."""
    found = result_of({1: (4.0, 3.0)}, spec=spec)
    assert found.spec.nfe == nfe
    assert found.image_seconds == pytest.approx(3.0 / 6 / in_a_pass * nfe)
    image = found.to_json()["image"]
    assert image == {"solver": spec.solver, "steps": spec.steps, "nfe": nfe, "seconds": found.image_seconds}


def test_a_distilled_copy_is_timed_without_guidance_and_its_original_with_the_copys(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path)
    original, few = open_checkpoint(pair.original), open_checkpoint(pair.few)
    found = bench([original, few], Load(batch=2, repeats=1, threads=(1,)))
    assert [result.load.cfg for result in found.results] == [1.5, 1.0]
    assert [(result.spec.steps, result.spec.nfe) for result in found.results] == [(16, 32), (4, 4)]
    a, b = (result.speed.flops for result in found.results)
    assert a > 1.9 * b, "both branches"
    alone = bench([original], Load(batch=2, repeats=1, threads=(1,))).results[0]
    assert (alone.load.cfg, alone.spec.nfe) == (1.0, 16)
    with pytest.raises(UsageError, match=r"few\.safetensors was distilled"):
        bench([original, few], Load(cfg=1.5))
