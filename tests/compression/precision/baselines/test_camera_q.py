"""CAMERA-Q: units and groups against brute force, the published split, and budgets that are kept and used."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import calibrated, measure_few_tokens, opened, profile_of
from conftest import make_pico
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.compression.precision.baselines.camera_q import Step, Unit, choose, grouped, steps, units_of
from ditmoe_cli.compression.precision.budget import Budget, FileSizes
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.few_widths import settle
from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.compression.precision.mixed import plan_mix
from ditmoe_cli.compression.replay.neuron_energies import measured_energies
from ditmoe_cli.compression.replay.neuron_order import orders_of
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, in_expert
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import parse_format, parse_pieces
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import weight_group
from ditmoe_cli.routing.profile import RoutingProfile

WHERE = Output(Path("/nowhere/out.safetensors"))
Given = tuple[Checkpoint, RoutingProfile]
Pool = list[list[Unit]]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, 512)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """Experts of several units, one of 100 neurons, and two too narrow to be cut."""
    widths = ((128, 96, 100), (64, 40, 16, 160))
    pico = make_pico(hidden=32, input_size=4, widths=widths, shared_width=128)
    checkpoint = opened(pico, tmp_path_factory.mktemp("camera"))
    return checkpoint, profile_of(checkpoint)


def request_for(asked: Given, limit: int = 10**9, **fields: Any) -> MixRequest:
    checkpoint, _ = asked
    candidates = Candidates(**{"group_size": 32, **fields})
    formats = candidate_formats(checkpoint, candidates)
    return MixRequest(checkpoint, candidates, formats, limit, FileSizes(checkpoint, WHERE))


def within(asked: Given, bits: float, **fields: Any) -> MixRequest:
    candidates = Candidates(**{"group_size": 32, **fields})
    return request_for(asked, Budget(bits=bits).limit(FileSizes(asked[0], WHERE), candidates), **fields)


def chosen(asked: Given, request: MixRequest) -> Mix:
    return choose(request, calibrated(*asked))


def between(asked: Given, share: float, **fields: Any) -> MixRequest:
    """As many bytes as the narrowest formats take, and a share of what the widest below 16 bits take more."""
    free = request_for(asked, **fields)
    fixed, names = settle(free, ("attn",))
    widths = [width for width in free.widths if width != "16"]
    least, most = (free.size(fixed, free.formats_at(names, width)) for width in (widths[0], widths[-1]))
    return request_for(asked, int(least + share * (most - least)), **fields)


def bits_of(formats: dict[str, str], name: str, neurons: int) -> list[int]:
    """The width of each neuron of a matrix, in the order in which they are stored."""
    fmt = formats[name]
    cut = parse_pieces(fmt)
    if cut is None:
        return [parse_format(fmt).bits] * neurons
    return [fmt.bits for fmt, n in zip(cut.formats, cut.counts, strict=True) for _ in range(n)]


# units and groups


@given(width=st.integers(1, 400), size=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99))
def test_units_are_an_experts_neurons_by_energy(width: int, size: int, seed: int) -> None:
    energy = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    units = units_of("e", energy, size)
    sizes = [unit.neurons for unit in units]
    assert sum(sizes) == width and all(each == size for each in sizes[:-1])
    assert sizes[-1] < 2 * size and (len(units) == 1 or size <= sizes[-1])
    ranked = iter(sorted(energy.double().tolist(), reverse=True))
    for unit in units:
        own = list(itertools.islice(ranked, unit.neurons))
        assert unit.expert == "e" and unit.energy == pytest.approx(sum(own) / len(own))


def pools(seed: int, blocks: int = 2) -> Pool:
    """Experts of one to five units, whose energies fall and now and then are equal."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for b in range(blocks):
        mine = []
        for e in range(3):
            count = int(torch.randint(1, 6, (), generator=generator))
            energies = sorted(torch.randint(0, 9, (count,), generator=generator).tolist(), reverse=True)
            mine += [Unit(f"{b}.{e}", 32 if i < count - 1 else 45, float(v)) for i, v in enumerate(energies)]
        found.append(mine)
    return found


def groups_by_hand(pool: Pool, share: float, groups: int) -> dict[str, list[int]]:
    """Which group each neuron of each expert is in, best neuron first."""
    found: dict[str, list[int]] = {}
    for units in pool:
        ranked = sorted(units, key=lambda unit: -unit.energy)
        total, before = sum(unit.neurons for unit in units), 0
        for unit in ranked:
            middle = (before + unit.neurons / 2) / total
            group = (1 if middle <= share else 0) + (1 if groups == 3 and middle <= share / 4 else 0)
            found.setdefault(unit.expert, []).extend([group] * unit.neurons)
            before += unit.neurons
    return found


@given(seed=st.integers(0, 500), share=st.floats(0, 1), groups=st.integers(2, 3))
def test_groups_are_the_ranked_shares(seed: int, share: float, groups: int) -> None:
    pool = pools(seed)
    moves = steps(pool, groups)
    taken = [step for step in moves if step.share <= share]
    assert taken == moves[: len(taken)], "by share"
    found = grouped(pool, taken)
    expected = groups_by_hand(pool, share, groups)
    assert {e: [g for g, n in runs for _ in range(n)] for e, runs in found.items()} == expected
    assert all(group == sorted(group, reverse=True) for group in expected.values()), "the widest first"
    assert all(len({g for g, _ in runs}) == len(runs) for runs in found.values())


def test_every_unit_is_moved_once_into_each_group() -> None:
    pool = pools(3)
    moves = steps(pool, 3)
    units = sum(map(len, pool))
    assert sum(step.group == 1 for step in moves) == units
    assert 0 < sum(step.group == 2 for step in moves) < units
    assert all(isinstance(step, Step) and 0 < step.share <= 1 for step in moves)
    assert steps(pool, 1) == []


def test_forty_percent_are_the_published_groups() -> None:
    """10 % at 8 bits, 30 % at 4 and 60 % at 2."""
    pool = [[Unit("e", 32, 10.0 - i) for i in range(10)]]
    found = grouped(pool, [step for step in steps(pool, 3) if step.share <= 0.4])
    assert found == {"e": [(2, 32), (1, 96), (0, 192)]}


# what is chosen


@pytest.mark.parametrize(
    ("bits", "fields"),
    [
        *((bits, {}) for bits in (2.3, 3.6)),
        *((bits, {"allowed": ("2", "4", "8")}) for bits in (2.8, 4.5)),
        *((bits, {"symmetric": True, "group_size": 64}) for bits in (3, 6.5)),
    ],
    ids=str,
)
def test_the_budget_is_kept_and_used(bits: float, fields: dict[str, Any], asked: Given) -> None:
    request = within(asked, bits, **fields)
    if settle(request, ("attn",))[0] == {}:
        return
    choice = chosen(asked, request)
    size = request.size(choice.formats)
    assert size <= request.limit
    # a step is a unit of three matrices; a new piece costs its tensors' headers too
    assert request.limit - size < 3 * 63 * 32 * 4 // 8 + 3 * 4 * 250
    assert choice.tried_error is not None and 0 < choice.tried_error < 2
    assert choice.ordering == ("camera" if any(":" in fmt for fmt in choice.formats.values()) else None)


def test_all_blocks_give_the_same_share_of_their_best_neurons_more(asked: Given) -> None:
    formats = dict(chosen(asked, between(asked, 0.25, allowed=("2", "4", "8", "16"), floors={"shared": 2})).formats)
    energies = measured_energies(calibrated(*asked))
    shares = []
    for block in energies:
        units: list[tuple[float, int, int]] = []
        for expert, energy in block.items():
            each = bits_of(formats, f"{expert}.up_proj.weight", len(energy))
            assert each == bits_of(formats, f"{expert}.gate_proj.weight", len(energy))
            if len(energy) >= 32:
                assert each == bits_of(formats, f"{expert}.down_proj.weight", len(energy))
            first = 0
            for unit in units_of(expert, energy, 32):
                (bits,) = set(each[first : first + unit.neurons])
                units.append((unit.energy, bits, unit.neurons))
                first += unit.neurons
        units.sort(reverse=True)
        assert [bits for _, bits, _ in units] == sorted((bits for _, bits, _ in units), reverse=True)
        total = sum(neurons for *_, neurons in units)
        shares.append([sum(n for _, bits, n in units if bits >= least) / total for least in (8, 4)])
    for first, wider in shares:
        assert 0 < first < wider < 1 and abs(first - wider / 4) < 0.1
    assert abs(shares[0][1] - shares[1][1]) < 0.15


def test_too_few_neurons_are_not_cut(asked: Given) -> None:
    formats = dict(chosen(asked, within(asked, 3)).formats)
    for expert in (1, 2):  # 40 and 16 neurons
        gate, up, down = (formats[in_expert(1, expert, f"{m}.weight")] for m in MATRICES)
        assert gate == up and parse_pieces(gate) is None and parse_pieces(down) is None
    assert any(parse_pieces(fmt) for fmt in formats.values())


def test_floors_hold_within_pieces(asked: Given) -> None:
    formats = dict(chosen(asked, between(asked, 0.3, floors={"shared": 4, "experts": 3})).formats)
    for name, fmt in formats.items():
        least = 4 if SHARED in name else 3
        cut = parse_pieces(fmt)
        assert all(each.bits >= least for each in (cut.formats if cut else (parse_format(fmt),)))


def test_attention_gets_4_bits_and_all_else_stays(asked: Given) -> None:
    formats = dict(chosen(asked, within(asked, 3)).formats)
    groups = {name: weight_group(asked[0].weights[name].info) for name in formats}
    assert set(groups.values()) == {"attn", "shared", "experts"}
    assert {formats[name] for name, group in groups.items() if group == "attn"} == {"int4-g32"}


def test_attention_gets_what_the_others_begin_with_where_that_leaves_too_little(asked: Given) -> None:
    floors = {"attn": 2.0, "shared": 2.0}
    free = request_for(asked, floors=floors)
    fixed, names = settle(free, ("attn",))
    limit = free.size(fixed, free.formats_at(names, "2"))
    assert settle(request_for(asked, limit, floors=floors), ("attn",)) == (fixed, names)
    request = request_for(asked, limit - 1, floors=floors)
    formats = dict(chosen(asked, request).formats)
    assert request.size(formats) < limit
    assert {fmt for name, fmt in formats.items() if ".attn." in name} == {"int2-g32"}


def test_protected_groups_are_not_ranked(asked: Given) -> None:
    formats = dict(chosen(asked, between(asked, 0.3, protected=("shared",))).formats)
    assert formats and not any(SHARED in name for name in formats)
    with_all = dict(chosen(asked, request_for(asked)).formats)
    assert {fmt for name, fmt in with_all.items() if ".attn." not in name} == {"int8-g32"}, "16 bits are no group"


def test_ties_and_unused_profiles(asked: Given, tmp_path: Path) -> None:
    request = within(asked, 3)
    first, second = chosen(asked, request), chosen(asked, request)
    assert first == second
    plan = plan_mix(calibrated(*asked), first, {}, None)
    assert plan.stage(Formats) == Formats(first.formats, ordering="camera")
    assert plan_mix(calibrated(*asked), Mix({}), {}, None).stage(Formats) == Formats()
    checkpoint = opened(make_pico(hidden=32, input_size=4), tmp_path)
    stateless = (checkpoint, profile_of(checkpoint, fast=True))
    with pytest.raises(BadInputError, match="keeps no states"):
        chosen(stateless, within(stateless, 3))


def test_neurons_that_matter_get_the_bits(tmp_path: Path) -> None:
    """A shared expert of which 32 neurons carry nearly everything."""
    pico = make_pico(hidden=32, input_size=4, widths=((64,) * 3,) * 2, shared_width=128)
    strong = torch.arange(0, 128, 4)
    changes = {}
    for b in range(2):
        name = in_block(b, f"{SHARED}.down_proj.weight")
        weight = pico.state[name] / 50
        weight[:, strong] *= 500
        changes[name] = weight
    checkpoint = opened(pico.with_state(**changes), tmp_path)
    found = (checkpoint, profile_of(checkpoint))
    formats = dict(chosen(found, between(found, 0.2, allowed=("2", "4", "8"), floors={"shared": 2})).formats)
    for b in range(2):
        name = in_block(b, f"{SHARED}.down_proj.weight")
        assert bits_of(formats, name, 128)[:32] == [max(bits_of(formats, name, 128))] * 32
        orders = orders_of(measured_energies(calibrated(*found)), formats)
        assert set(orders[b][in_block(b, SHARED)][:32].tolist()) == set(strong.tolist())
        assert bits_of(formats, name, 128)[-1] == 2
    assert all(f"{in_block(0, SHARED)}.{matrix}.weight" in formats for matrix in MATRICES)
