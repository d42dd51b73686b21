"""Statistics of rules for slots against plain sums over the tokens that an observer sees."""

from __future__ import annotations

import pytest
import torch
from ways import way_of

from ditmoe_cli.diffusion.compute_schedule import CONSTANT, ENERGY, SCALE, ScheduledSampling
from ditmoe_cli.model.conditions import conditions
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.scheduling.way_states import Way, visited
from ditmoe_cli.scheduling.way_statistics import way_statistics

GUIDED = ScheduledSampling("euler", 5, 2.0)
MEASURED = [1, 4]


def events(way: Way, count: int) -> dict[tuple[int, int, int], MoEEvent]:
    """What the mixtures of blocks did, by bin, branch and block."""
    seen, found = visited(way, range(4)), {}
    labels = way.labels(range(count))
    with torch.inference_mode():
        for place, k in enumerate(MEASURED):
            for branch, classes in enumerate((labels, torch.full_like(labels, 3))):
                t = way.sampling.times[k]
                at = conditions([t], classes, way.model.condition, way.model.config)

                def keep(event: MoEEvent, place: int = place, branch: int = branch) -> None:
                    found[place, branch, event.block] = event

                way.model.modulated(seen.states[k][:count], lambda n, m, at=at, t=t: at.at(n, m, t), keep)  # type: ignore[misc]
    return found


@pytest.mark.parametrize("top_k", [2, 3])
def test_energies_and_regressions_are_plain_sums(top_k: int) -> None:
    way = way_of(GUIDED, top_k=top_k)
    known = way_statistics(way, visited(way, range(4)), range(2), MEASURED)
    found = events(way, 2)
    rows, width = 4, way.model.config.hidden_size
    assert known.arrays[ENERGY].shape == (2, 2, 2, rows)
    assert known.arrays[SCALE].shape == known.arrays[CONSTANT].shape == (2, rows, width)
    for (place, branch, block), event in found.items():
        gamma = event.gamma.repeat_interleave(16, dim=0)
        for row in range(rows):
            tokens, slots = (event.routing.rows == row).nonzero(as_tuple=True)
            if len(tokens):
                energy = (gamma[tokens] * event.outputs[tokens, slots]).double().square().sum(dim=1).mean()
                assert float(known.arrays[ENERGY][place, branch, block, row]) == pytest.approx(float(energy), rel=1e-4)
    for block in range(2):
        mine = [event for place, event in found.items() if place[2] == block]
        for row in range(rows):
            f1, fr, p = [], [], []
            for event in mine:
                for slot in range(1, top_k):
                    taken = event.routing.rows[:, slot] == row
                    f1.append(event.outputs[taken, 0].double())
                    fr.append(event.outputs[taken, slot].double())
                    p.append(event.routing.weights[taken, slot].double())
            x, y, weight = torch.cat(f1), torch.cat(fr), torch.cat(p).square()[:, None]
            if len(x) < 5:
                continue
            # least squares of each channel, tokens weighted with p²
            for channel in range(0, width, 7):
                design = torch.stack((x[:, channel], torch.ones(len(x), dtype=torch.float64)), dim=1) * weight.sqrt()
                best = torch.linalg.lstsq(design, y[:, channel : channel + 1] * weight.sqrt()).solution.flatten()
                assert float(known.arrays[SCALE][block, row, channel]) == pytest.approx(
                    float(best[0]), rel=1e-3, abs=1e-5
                )
                assert float(known.arrays[CONSTANT][block, row, channel]) == pytest.approx(
                    float(best[1]), rel=1e-3, abs=1e-5
                )


def test_saliencies_and_the_median_of_second_weights() -> None:
    way = way_of(GUIDED)
    known = way_statistics(way, visited(way, range(4)), range(2), MEASURED)
    found = events(way, 2)
    for place, event in found.items():
        p, energy = event.routing.weights[:, 1], known.arrays[ENERGY][place][event.routing.rows[:, 1]]
        assert torch.allclose(known.saliencies(place), p.square() * energy)
    for block in range(2):
        ratios = torch.cat(
            [e.routing.weights[:, 1] / e.routing.weights[:, 0] for b, e in found.items() if b[2] == block]
        )
        assert known.median("odp", block) == pytest.approx(float(ratios.median()))
        saliencies = torch.cat([known.saliencies(place) for place in found if place[2] == block])
        assert known.median("saliency", block) == float(saliencies.median())


def test_rows_that_no_token_chose_have_the_mean_energy_and_no_regression() -> None:
    way = way_of(GUIDED, experts=64)
    known = way_statistics(way, visited(way, range(1)), range(1), [4])
    found = {(branch, block): rows.rows for (_, branch, block), rows in known.selections.items()}
    energy, scale = known.arrays[ENERGY], known.arrays[SCALE]
    for block in range(2):
        chosen = torch.cat([found[branch, block].flatten() for branch in range(2)])
        never = [row for row in range(64) if row not in chosen.tolist()]
        assert never and len(set(energy[0, :, block, never].flatten().tolist())) == 1
        assert float(energy[0, 0, block].min()) > 0
        assert not scale[block, never].any() and not known.arrays[CONSTANT][block, never].any()


def test_one_expert_a_token_has_nothing_to_leave_out() -> None:
    way = way_of(ScheduledSampling("euler", 5), top_k=1)
    known = way_statistics(way, visited(way, range(2)), range(2), MEASURED)
    assert known.selections == {} and torch.isfinite(known.arrays[ENERGY]).all()
    assert not known.arrays[SCALE].any()


def test_mapped_rows_have_statistics_of_their_own() -> None:
    way = way_of(GUIDED, widths=((16, 8, 24),) * 2, expert_of=((0, 1, -1, 2), (2, 0, 1, -1)))
    known = way_statistics(way, visited(way, range(4)), range(4), MEASURED)
    assert known.arrays[ENERGY].shape == (2, 2, 2, 4)
    energy = known.arrays[ENERGY]
    assert len(set(energy[..., 0, 2].flatten().tolist())) == 1  # a ghost, which is never selected, has the block's mean
    assert len(set(energy[..., 0, 1].flatten().tolist())) == 4
