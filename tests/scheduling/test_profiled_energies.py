"""What experts add by a profile: means of its counts at the same share of the way, and profiles that cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.diffusion.compute_schedule import ENERGY, ScheduledSampling
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing.profile import RoutingProfile, RoutingTables, read_profile
from ditmoe_cli.scheduling.profiled_energies import check_profiled, profiled_energies, takes_energies
from ditmoe_cli.scheduling.way_states import Way, visited
from ditmoe_cli.scheduling.way_statistics import way_statistics

STEPS, BINS = 4, 4


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> RoutingProfile:
    """A guided profile of a pico in four steps, a bin each."""
    folder = tmp_path_factory.mktemp("profiled")
    made = make_pico(sampler="rf").save(folder / "a.safetensors")
    words = ("--images", 4, "--steps", STEPS, "--bins", BINS, "--cfg", 1.5, "--solver", "euler", "-o", "p.safetensors")
    assert here("profile-experts", made, *words, cwd=folder).code == 0
    return read_profile(folder / "p.safetensors")


def with_tables(profile: RoutingProfile, **changes: object) -> RoutingProfile:
    """The profile with other tables."""
    other = replace(profile)
    other.__dict__["tables"] = replace(profile.tables, **changes)
    return other


def test_energies_are_the_means_of_the_counts(profile: RoutingProfile) -> None:
    tables: RoutingTables = profile.tables
    found = profiled_energies(profile, BINS)
    assert found.shape == (BINS, 2, 2, 4) and found.dtype == torch.float32
    for b in range(BINS):
        for branch in range(2):
            for block in range(2):
                norms = tables.table("norm_square")[block][branch][b]
                counts = tables.selected[block][branch][b]
                mean = sum(norms) / sum(counts)
                wanted = [n / c if c else mean for n, c in zip(norms, counts, strict=True)]
                assert found[b, branch, block].tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("bins", "places"), [(1, [2]), (2, [1, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3])])
def test_bins_are_at_the_same_share_of_the_way(profile: RoutingProfile, bins: int, places: list[int]) -> None:
    own = profiled_energies(profile, BINS)
    assert torch.equal(profiled_energies(profile, bins), own[places])


def test_they_are_near_to_those_of_a_schedules_own_images(profile: RoutingProfile) -> None:
    """Both are means over tokens of one model, of other noise."""
    way = Way(make_pico(sampler="rf").model(), ScheduledSampling("euler", STEPS, 1.5), 0, (0, 1, 2))
    seen = visited(way, range(8))
    own = way_statistics(way, seen, range(8), range(STEPS)).arrays[ENERGY]
    theirs = profiled_energies(profile, STEPS)
    assert float((own - theirs).norm() / own.norm()) < 0.3
    given = way_statistics(way, seen, range(8), range(STEPS), theirs)
    assert torch.equal(given.arrays[ENERGY], theirs)


def test_profiles_that_cannot_tell_are_refused(profile: RoutingProfile) -> None:
    config = make_pico(sampler="rf").config
    assert check_profiled(profile, config, True) is profile
    with pytest.raises(BadInputError, match="has no table 'norm_square'"):
        check_profiled(with_tables(profile, optional={}), config, False)
    selected = [[branch, [[0] * 4] * BINS] for branch, _ in profile.tables.selected]
    unguided = with_tables(profile, selected=selected, cfg=1.0)
    assert check_profiled(unguided, config, False) is unguided
    with pytest.raises(BadInputError, match="made at cfg 1 and never asked the null class"):
        check_profiled(unguided, config, True)
    mapped = make_pico(sampler="rf", widths=((8, 8),) * 2, expert_of=((0, -1, 1),) * 2).config
    with pytest.raises(BadInputError, match="the router of block 0 selects other rows"):
        check_profiled(profile, mapped, False)


def test_which_methods_take_them() -> None:
    assert [takes_energies(m) for m in ("planned", "saliency:0.1", "odp", "a-sdm", "fora:2")] == [True, True] + [
        False
    ] * 3


def test_from_the_command_line(profile: RoutingProfile) -> None:
    folder = profile.path.parent
    words = ("schedule", "a.safetensors", "--solver", "euler", "--steps", 4, "--images", 8, "--anyway")
    saliency = (*words, "--method", "saliency:0.02")
    own = here(*saliency, "-o", "own.safetensors", cwd=folder)
    theirs = here(*saliency, "--profile", "p.safetensors", "-o", "theirs.safetensors", cwd=folder)
    assert own.result["flops"] != theirs.result["flops"]
    assert "is up to date" in here(*saliency, "--profile", "p.safetensors", "-o", "theirs.safetensors", cwd=folder).err
    stands = here(*saliency, "-o", "theirs.safetensors", cwd=folder)
    assert "theirs.safetensors" in stands.error(5)
    told = here(*words, "--method", "fora:2", "--profile", "p.safetensors", cwd=folder).error(2)
    assert told == "--profile: has no effect beside --method fora:2; leave one out"
    make_pico(sampler="rf", seed=1).save(folder / "b.safetensors")
    told = here("schedule", "b.safetensors", "--flops", 0.5, "--profile", "p.safetensors", cwd=folder).error(3)
    assert "is the profile of another checkpoint" in told
    told = here(*words[:2], "--flops", 0.5, "--profile", "own.safetensors", cwd=folder).error(3)
    assert "own.safetensors: profile metadata" in told
