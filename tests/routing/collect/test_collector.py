"""Calibration runs, recounted token by token from what the model was fed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from cases import with_slow
from conftest import Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st
from profiling import Counted, Naive, Trajectory, branch_labels, count_by_hand, trajectory
from seeing import Seen
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.diffusion.noise import image_noise
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.step_bins import step_bin
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.progress import watched_by
from ditmoe_cli.routing.calibration_settings import Calibration, check_settings
from ditmoe_cli.routing.collect.collector import PURPOSE, collect
from ditmoe_cli.routing.collect.reservoir import select_states

BF16 = {"rtol": 2**-7, "atol": 1e-4}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MEANS_OF_BF16 = {"rtol": 1e-2, "atol": 1e-3}
TRAVELLED = {"rtol": 1e-3, "atol": 1e-3}  # the first DDPM step divides by sqrt(alpha_bar), which is below 1 / 150


@dataclass(frozen=True)
class Case:
    """A calibration: a model, what is sampled, and how it is kept."""

    pico: Pico
    spec: SampleSpec
    bins: int
    reservoir: int
    clean: Tensor | None = None

    def run(self, batch: int = 2) -> dict[str, Tensor]:
        settings = Calibration(self.spec, self.bins, self.reservoir, batch)
        with watched_by(seen := Seen()):
            collected = collect(self.pico.model(), settings, clean=self.clean)
        sampling, *comparing = seen.phases
        assert sampling.done == sampling.total == self.spec.images * self.spec.steps
        assert [each.done for each in comparing] == [self.pico.config.depth] * ("output.cka" in collected)
        return collected

    @cached_property
    def found(self) -> dict[str, Tensor]:
        return self.run()

    @cached_property
    def seen(self) -> Trajectory:
        return trajectory(self.pico, self.spec, self.clean)

    @cached_property
    def counted(self) -> Counted:
        return count_by_hand(self.pico, self.spec, self.bins, self.seen)


def small(**options: object) -> Pico:
    return make_pico(**{"hidden": 16, "input_size": 4, "seed": 3, **options})  # type: ignore[arg-type]


SPEC = SampleSpec(images=3, steps=5, cfg=1.0, seed=11, solver="ddim", classes=(0, 1, 2))
UNEVEN = ((24, 24, 24), (8, 16, 32, 24, 8))
GHOSTS = ((0, -1, 1, 2, -1), (-1, 1, 0, 2, -1))
CASES = {
    "one branch": Case(small(), SPEC, 2, 14),
    "guided": Case(small(top_k=1), replace(SPEC, cfg=4.0), 3, 40),
    "rectified flow, uneven blocks": Case(
        small(sampler="rf", widths=UNEVEN), replace(SPEC, cfg=1.5, solver="euler", classes=(2,)), 5, 10_000
    ),
    "ancestral, ghosts": Case(
        small(widths=((24,) * 3,) * 2, expert_of=GHOSTS), replace(SPEC, cfg=0.0, solver="ddpm", seed=12), 2, 9
    ),
    "merged rows, all experts": Case(small(widths=((24,) * 2,) * 2, expert_of=((0, 1, 1),) * 2, top_k=3), SPEC, 1, 12),
    "given images": Case(
        small(), replace(SPEC, cfg=1.5), 2, 30, torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    ),
}


@pytest.fixture(params=with_slow(sorted(CASES, key=lambda name: name in ("one branch", "guided")), 4))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_every_token_is_counted_k_times(case: Case) -> None:
    config, spec = case.pico.config, case.spec
    counts, tokens = case.found["counts"], case.found["tokens"]
    branches = 1 if spec.cfg == 1.0 else 2
    steps_in = torch.bincount(torch.tensor([step_bin(s, spec.steps, case.bins) for s in range(spec.steps)]))
    assert torch.equal(tokens[0], steps_in * spec.images * config.num_patches)
    assert torch.equal(tokens[1], tokens[0] * (branches - 1))
    per_position = (tokens // config.num_patches * config.top_k)[None, :, :, None]
    assert torch.equal(counts.sum(-1), per_position.expand(*counts.shape[:-1]))
    assert torch.equal(case.found["selected"], counts.sum(dim=3))


def test_counters_are_those_counted_by_hand(case: Case) -> None:
    assert torch.equal(case.found["counts"], case.counted.counts)
    assert_close(case.found["gate_mass"], case.counted.gate_mass, **CLOSE)
    assert_close(case.found["gate_norm"], case.counted.gate_norm, **CLOSE)


def test_experts_that_a_block_lacks_stay_zero() -> None:
    case = CASES["rectified flow, uneven blocks"]
    for name in ("counts", "selected", "gate_mass", "gate_norm"):
        assert case.found[name].shape[-1] == 5
        assert not case.found[name][0, ..., 3:].any()
        assert case.found[name][1, ..., 3:].any()


def test_states_are_what_the_model_was_fed(case: Case) -> None:
    found, spec = case.found, case.spec
    keys = list(zip(found["states.image"].tolist(), found["states.bin"].tolist(), strict=True))
    assert keys == sorted(set(keys))
    selection = select_states(spec, case.bins, case.pico.config.num_patches, case.reservoir)
    assert set(keys) == set(selection.step_of)
    for state, (image, b) in enumerate(keys):
        step = selection.step_of[image, b]
        assert step_bin(step, spec.steps, case.bins) == b
        assert found["states.t"][state] == pytest.approx(case.seen.t[step])
        assert found["states.label"][state] == spec.classes[image % len(spec.classes)]
        assert_close(found["states.z"][state], case.seen.z[step][image], **TRAVELLED)


def test_the_reservoir_holds_the_mixtures_inputs_at_those_states(case: Case) -> None:
    found, naive = case.found, Naive(case.pico)
    null = case.pico.config.num_classes
    where = torch.stack([found[f"reservoir.{name}"] for name in ("state", "branch", "position")]).T.tolist()
    assert where == sorted(where)
    for state in range(len(found["states.z"])):
        for branch, _ in enumerate(branch_labels(case.pico, case.spec)):
            label = null if branch else int(found["states.label"][state])
            t = float(found["states.t"][state])
            positions = [p for s, b, p in where if (s, b) == (state, branch)]
            rows = [i for i, (s, b, _) in enumerate(where) if (s, b) == (state, branch)]
            for block, mixture in enumerate(naive.mixtures(found["states.z"][state : state + 1], t, [label])):
                inputs = found["reservoir.inputs"][block, rows]
                assert_close(inputs.double(), mixture.u[0, positions], **BF16)
                assert_close(found["reservoir.gamma"][block, state, branch].double(), mixture.gamma[0], **CLOSE)


def test_branches_are_paired(case: Case) -> None:
    state, branch, position = (case.found[f"reservoir.{name}"] for name in ("state", "branch", "position"))
    pairs = [set(zip(state[branch == b].tolist(), position[branch == b].tolist(), strict=True)) for b in (0, 1)]
    assert len(pairs[0]) == int((branch == 0).sum()) > 0
    assert pairs[1] == (set() if case.spec.cfg == 1.0 else pairs[0])
    if case.spec.cfg == 1.0:
        assert not case.found["reservoir.gamma"][:, :, 1].any()


def test_a_run_repeats_to_the_bit(case: Case) -> None:
    again = case.run()
    assert again.keys() == case.found.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in case.found.items())


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_change_rounding_at_most(batch: int, case: Case) -> None:
    other = case.run(batch)
    assert other.keys() == case.found.keys()
    for name, tensor in case.found.items():
        if not tensor.is_floating_point():
            assert torch.equal(other[name], tensor), name
        else:
            looser = {"states.z": TRAVELLED, "image.final": TRAVELLED, "reservoir.inputs": BF16}
            looser |= {"output.all_token_mean": MEANS_OF_BF16, "output.cka": MEANS_OF_BF16}
            assert_close(other[name], tensor, **looser.get(name, CLOSE))


def test_another_seed_is_another_run() -> None:
    case = CASES["one branch"]
    other = replace(case, spec=replace(case.spec, seed=case.spec.seed + 1)).run()
    assert not torch.equal(other["counts"], case.found["counts"])
    assert not torch.equal(other["reservoir.position"], case.found["reservoir.position"])


@pytest.mark.parametrize("given_images", [False, True])
def test_calibration_noise_is_never_that_of_images(given_images: bool) -> None:
    clean = torch.zeros(3, 4, 4, 4) if given_images else None
    case = Case(small(sampler="rf"), replace(SPEC, solver="euler"), SPEC.steps, 10_000, clean)
    found = case.run()
    first = found["states.z"][found["states.bin"] == 0]
    cpu = torch.device("cpu")
    assert torch.equal(first, image_noise(SPEC.seed, range(3), cpu, PURPOSE).draw((4, 4, 4)))
    assert not torch.isclose(first, image_noise(SPEC.seed, range(3), cpu).draw((4, 4, 4))).any()


def test_given_images_are_noised_by_their_own_noise_at_every_time() -> None:
    clean = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    spec = replace(SPEC, solver="euler")
    found = Case(small(sampler="rf"), spec, spec.steps, 10_000, clean).run()
    noise = image_noise(spec.seed, range(3), torch.device("cpu"), PURPOSE).draw((4, 4, 4))
    t, image = found["states.t"].reshape(-1, 1, 1, 1), found["states.image"].long()
    assert sorted(set(found["states.t"].tolist())) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert_close(found["states.z"], (1 - t) * clean[image] + t * noise[image], **CLOSE)


def test_where_each_image_ended_is_kept(case: Case) -> None:
    """With --fast too, and when no state is; of given images it is the image."""
    spec = case.spec
    final = case.clean
    if final is None:
        final = sample_batch(case.pico.model(), spec, range(spec.images), purpose=PURPOSE)
    assert_close(case.found["image.final"], final, **TRAVELLED)
    fast = collect(case.pico.model(), Calibration(spec, case.bins, 0, 2, fast=True), clean=case.clean)
    assert torch.equal(fast["image.final"], case.found["image.final"])


def test_without_room_for_one_token_a_bin_nothing_is_kept() -> None:
    case = CASES["guided"]
    for reservoir in (0, 5):
        found = replace(case, reservoir=reservoir).run()
        assert not [
            name for name in found if name.startswith(("states.", "reservoir.", "output.all_token", "output.cka"))
        ]
        assert torch.equal(found["counts"], case.found["counts"])


def test_a_half_precision_model_is_counted_too() -> None:
    case = CASES["one branch"]
    model = case.pico.model().bfloat16()
    found = collect(model, Calibration(case.spec, case.bins, case.reservoir, 2))
    assert torch.equal(found["counts"].sum(-1), case.found["counts"].sum(-1))
    assert_close(found["gate_norm"].sum(-1), case.found["gate_norm"].sum(-1), rtol=0.05, atol=0.0)


def test_values_that_overflow_are_refused_by_block() -> None:
    pico = small()
    names = [f"blocks.1.moe.experts.{e}.down_proj.weight" for e in range(4)]
    broken = pico.with_state(**{name: torch.full_like(pico.state[name], 3e38) for name in names})
    with pytest.raises(BadInputError, match=r"block 1 produced NaN or infinite values at step 0"):
        replace(CASES["one branch"], pico=broken).run()


@st.composite
def selections(draw: st.DrawFn) -> tuple[SampleSpec, int, int, int]:
    steps = draw(st.integers(1, 40))
    spec = replace(
        SPEC,
        images=draw(st.integers(1, 40)),
        steps=steps,
        cfg=draw(st.sampled_from([1.0, 1.5])),
        seed=draw(st.integers(0, 2**32)),
    )
    return spec, draw(st.integers(1, steps)), draw(st.integers(1, 64)), draw(st.integers(0, 3000))


@given(selections())
def test_the_reservoir_is_filled_evenly_and_never_over(drawn: tuple[SampleSpec, int, int, int]) -> None:
    spec, bins, patches, reservoir = drawn
    branches = 1 if spec.cfg == 1.0 else 2
    selection = select_states(spec, bins, patches, reservoir)
    assert selection.step_of.keys() == selection.positions.keys()
    images = {image for image, _ in selection.step_of}
    assert images == set(range(len(images)))
    assert len(selection.step_of) == len(images) * bins
    for (image, b), step in selection.step_of.items():
        assert image < spec.images
        assert step_bin(step, spec.steps, bins) == b
    assert len({len(positions) for positions in selection.positions.values()}) <= 1
    for positions in selection.positions.values():
        assert positions == sorted(set(positions))
        assert 0 <= positions[0] <= positions[-1] < patches
    tokens = branches * sum(map(len, selection.positions.values()))
    everything = spec.images * bins * branches * patches
    assert tokens <= reservoir
    if reservoir >= everything:
        assert tokens == everything
    if reservoir >= bins * branches:
        assert 2 * tokens >= min(reservoir, everything)


@given(selections(), st.integers(1, 40))
def test_what_is_kept_of_an_image_does_not_depend_on_the_others(
    drawn: tuple[SampleSpec, int, int, int], more: int
) -> None:
    spec, bins, patches, _ = drawn
    plenty = 10**9
    few = select_states(spec, bins, patches, plenty)
    many = select_states(replace(spec, images=spec.images + more), bins, patches, plenty)
    assert few.step_of.items() <= many.step_of.items()
    assert all(many.positions[key] == positions for key, positions in few.positions.items())


def bins_of(steps: int, bins: int) -> Iterator[int]:
    return (step_bin(step, steps, bins) for step in range(steps))


@given(st.integers(1, 300).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(1, steps))))
def test_bins_divide_the_steps_evenly_from_noise_to_image(case: tuple[int, int]) -> None:
    steps, bins = case
    sequence = list(bins_of(steps, bins))
    assert sequence == sorted(sequence)
    sizes = [sequence.count(b) for b in range(bins)]
    assert sum(sizes) == steps
    assert max(sizes) - min(sizes) <= 1


def test_settings_out_of_range_are_refused() -> None:
    check_settings(Calibration(SPEC, bins=1, reservoir=0))
    check_settings(Calibration(SPEC, bins=SPEC.steps, reservoir=0))
    for bins in (0, -1, SPEC.steps + 1):
        with pytest.raises(UsageError, match=f"bins {bins}"):
            check_settings(Calibration(SPEC, bins=bins))
    with pytest.raises(UsageError, match="reservoir -1"):
        check_settings(Calibration(SPEC, bins=1, reservoir=-1))
