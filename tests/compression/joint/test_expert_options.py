"""What an expert may become: fronts and options against all combinations, bytes from headers, ladders of widths."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditmoe_cli.compression.joint.expert_options import (
    MOST_WIDTHS,
    ExpertDecision,
    ExpertOffer,
    Pick,
    WidthCurve,
    _Point,
    bytes_of_weight,
    default_multiple,
    ladder,
    narrowed_info,
    picked,
    worthwhile,
)
from ditmoe_cli.compression.precision.candidates import Candidates
from ditmoe_cli.compression.precision.mix import UNTOUCHED
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import MATRICES
from ditmoe_cli.formats.registry import is_quantizable, quantized_members

FORMATS = ("int2-g32", "int3-g32", "int4-g64", "int8", None)
WIDTHS = (0, 32, 64, 96)


def infos(stem: str, width: int = 96, hidden: int = 64) -> tuple[TensorInfo, ...]:
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return tuple(TensorInfo(f"{stem}.{m}.weight", "BF16", shape) for m, shape in zip(MATRICES, shapes, strict=True))


def offer(stem: str = "blocks.0.moe.experts.0", seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> ExpertOffer:
    """An expert with random errors: more neurons and wider formats, less error."""
    rng = random.Random(seed)
    structure = sorted((rng.uniform(0.1, 9) for _ in widths[1:]), reverse=True)
    growth = (0.0, *sorted(rng.uniform(0.2, 1.4) for _ in widths[1:-1]), 1.0)
    of_formats = tuple(
        dict(zip(FORMATS, (*sorted((rng.uniform(0.01, 5) for _ in FORMATS[1:]), reverse=True), 0.0), strict=True))
        for _ in MATRICES
    )
    return ExpertOffer(stem, infos(stem), WidthCurve(widths, (*structure, 0.0), growth), of_formats)


# fronts

points = st.builds(lambda size, error: _Point(size, float(error), ()), st.integers(0, 12), st.integers(0, 12))


@given(st.lists(points, max_size=20))
def test_worthwhile_points_are_those_that_no_other_beats(some: list[_Point]) -> None:
    kept = worthwhile(some)
    expected = {
        (one.bytes, one.error)
        for one in some
        if not any(
            other.bytes <= one.bytes
            and other.error <= one.error
            and (other.bytes, other.error) != (one.bytes, one.error)
            for other in some
        )
    }
    assert [(point.bytes, point.error) for point in kept] == sorted(expected)
    assert all(point in some for point in kept)


def test_of_equal_points_the_first_stays() -> None:
    first, second = _Point(4, 1.0, ("nf4",)), _Point(4, 1.0, ("int4-g64",))
    assert worthwhile([first, second]) == (first,) and worthwhile([second, first]) == (second,)


# options of a decision


def all_options(
    decision: ExpertDecision, amplification: float, kappa: float, width: int | None = None
) -> list[tuple[int, float, Pick]]:
    """Every width with every combination of formats, by the formula of the module."""
    found = []
    first = decision.offers[0]
    for place, own in enumerate(first.curve.widths):
        if width not in (None, own):
            continue
        for formats in itertools.product(*first.formats) if own else [(None,) * 3]:
            size, error = 0, 0.0
            for each in decision.offers:
                error += kappa * each.curve.errors[place]
                for matrix, fmt in enumerate(formats if own else ()):
                    info = narrowed_info(each.infos[matrix], own, matrix == 2)
                    if fmt is not None and not is_quantizable(info, fmt):
                        break
                    size += info.nbytes if fmt is None else sum(m.nbytes for m in quantized_members(info, fmt))
                    error += each.curve.growth[place] * each.formats[matrix][fmt]
                else:
                    continue
                break
            else:
                found.append((size, amplification * error, Pick(own, formats)))
    return found


def undominated(options: list[tuple[int, float, Pick]]) -> list[tuple[int, float]]:
    kept: list[tuple[int, float]] = []
    for size, error, _ in sorted(options, key=lambda option: option[:2]):
        if not kept or error < kept[-1][1] * (1 - 1e-12):
            kept.append((size, error))
    return kept


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(("kappa", "width"), [(1.0, None), (4.0, None), (0.25, None), (2.0, 64), (2.0, 0)])
def test_options_are_exactly_the_undominated_ones_of_all_combinations(
    experts: int, kappa: float, width: int | None
) -> None:
    for seed in range(5):
        offers = tuple(offer(f"blocks.3.moe.experts.{e}", 10 * seed + e) for e in range(experts))
        decision = ExpertDecision("blocks.3.moe.experts", 3, offers)
        group, picks = decision.group(0.7, kappa, width)
        everything = all_options(decision, 0.7, kappa, width)
        found = [(option.bytes, option.error) for option in group.options]
        assert found == [pytest.approx(each, rel=1e-9) for each in undominated(everything)]
        by_pick = {pick: (size, error) for size, error, pick in everything}
        for option, pick in zip(group.options, picks, strict=True):
            assert (option.bytes, option.error) == pytest.approx(by_pick[pick], rel=1e-9)
            assert option.format.split() == [str(pick.width), *(fmt or UNTOUCHED for fmt in pick.formats)]


def test_formats_that_do_not_suit_a_narrower_matrix_are_not_offered_there() -> None:
    """Groups of 64 do not fit into 32 columns of the down projection, where they do in gate and up."""
    found = all_options(ExpertDecision("e", 0, (offer(),)), 1.0, 1.0, 32)
    allowed = {fmt for *_, pick in found for fmt in pick.formats[2:]}
    group, picks = ExpertDecision("e", 0, (offer(),)).group(1.0, 1.0, 32)
    fits = {fmt for fmt in FORMATS if fmt is None or is_quantizable(TensorInfo("w", "BF16", (64, 32)), fmt)}
    assert allowed == fits and {pick.formats[2] for pick in picks} <= fits and group.options


def test_experts_that_are_tied_share_formats_that_suit_all_of_them() -> None:
    one, other = offer("a", 1), offer("b", 2)
    narrowed = ExpertOffer("b", other.infos, other.curve, ({"int3-g32": 1.0, None: 0.0}, *other.formats[1:]))
    _, picks = ExpertDecision("both", 0, (one, narrowed)).group(1.0, 1.0)
    assert {pick.formats[0] for pick in picks if pick.width} <= {"int3-g32", None}


def test_the_full_width_as_it_is_costs_nothing() -> None:
    group, picks = ExpertDecision("e", 0, (offer(),)).group(3.0, 5.0)
    assert picks[-1] == Pick(96, (None, None, None)) and group.options[-1].error == 0.0
    assert group.options[-1].bytes == sum(info.nbytes for info in offer().infos)
    assert picks[0] == Pick(0, (None, None, None)) and group.options[0].bytes == 0


def test_structure_and_bits_scale_with_the_amplification() -> None:
    decision = ExpertDecision("e", 0, (offer(),))
    (one, picks), (twice, others) = decision.group(1.0, 2.0), decision.group(2.0, 2.0)
    assert picks == others
    assert [2 * option.error for option in one.options] == pytest.approx([option.error for option in twice.options])


def test_curves_of_experts_that_stay() -> None:
    curve = WidthCurve((0, 8, 16), (3.0, 1.0, 0.0), (0.0, 0.6, 1.0))
    assert curve.without_zero == WidthCurve((8, 16), (1.0, 0.0), (0.6, 1.0))
    assert curve.without_zero.without_zero == curve.without_zero


def test_picks_become_widths_and_formats_by_full_names() -> None:
    both = ExpertDecision("blocks.1.moe.experts", 1, (offer("a"), offer("b")))
    gone = ExpertDecision("c", 1, (offer("c"),))
    widths, formats = picked([both, gone], [Pick(64, ("nf4", None, "int8")), Pick(0, (None, None, None))])
    assert widths == {"a": 64, "b": 64, "c": 0}
    assert formats == {f"{e}.{m}.weight": f for e in "ab" for m, f in (("gate_proj", "nf4"), ("down_proj", "int8"))}


# bytes


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("fmt", [None, "int2-g32", "int4-g64", "int4-g64-sym", "nf4", "int8", "ternary-g64"])
def test_bytes_are_those_of_the_stored_tensors(fmt: str | None, dtype: str) -> None:
    info = TensorInfo("w", dtype, (48, 128))
    expected = info.nbytes if fmt is None else sum(member.nbytes for member in quantized_members(info, fmt))
    assert bytes_of_weight((48, 128), dtype, fmt) == expected > 0


def test_narrowed_matrices_lose_rows_of_gate_and_up_and_columns_of_down() -> None:
    gate, _, down = infos("e")
    assert narrowed_info(gate, 32, False) == TensorInfo(gate.name, "BF16", (32, 64))
    assert narrowed_info(down, 32, True) == TensorInfo(down.name, "BF16", (64, 32))


# ladders


@given(width=st.integers(1, 6000), may_go=st.booleans())
def test_ladders_rise_in_multiples_to_the_own_width(width: int, may_go: bool) -> None:
    multiple = default_multiple(width)
    found = ladder(width, multiple, may_go=may_go)
    assert list(found) == sorted(set(found)) and found[-1] == width
    assert (0 in found) == may_go
    assert all(offered % multiple == 0 for offered in found[:-1])
    assert len(found) <= MOST_WIDTHS + 3
    if width > multiple:
        assert multiple in found, "the narrowest that may be"
        gaps = [above - below for below, above in itertools.pairwise(each for each in found if each > multiple)]
        assert not gaps or max(gaps) <= 2 * max(multiple, width / MOST_WIDTHS) + multiple


@given(width=st.integers(1, 6000))
def test_multiples_are_powers_of_two_up_to_64(width: int) -> None:
    found = default_multiple(width)
    assert found & (found - 1) == 0 and 1 <= found <= 64
    assert found == 64 or found <= max(1, width // 16) < 2 * found or width < 32


@pytest.mark.parametrize(
    ("width", "expected"), [(1, 1), (16, 1), (32, 2), (64, 4), (96, 4), (384, 16), (1024, 64), (1536, 64), (5632, 64)]
)
def test_multiples_of_known_widths(width: int, expected: int) -> None:
    assert default_multiple(width) == expected


def test_a_target_holds_no_rows_that_are_no_whole_groups() -> None:
    """Rows of the matrix down are as long as an expert is wide, those of gate have 64 columns."""
    takes = Candidates(target="compressed-tensors").take
    decision = ExpertDecision("blocks.0.moe.experts.0", 0, (offer(),), takes=takes)

    def formats(matrix: int, width: int) -> set[str | None]:
        return {point.formats[0] for point in decision._of_unit((matrix,), WIDTHS.index(width), width)}

    assert formats(0, 96) == formats(2, 64) == set(FORMATS)
    assert formats(2, 96) == set(FORMATS) - {"int4-g64"}
