"""Two widths: as many wide ones as fit, and what is settled first."""

from __future__ import annotations

import pytest
import torch
from compressing import measure_few_tokens
from conftest import make_pico
from mixing import (
    SMALL,
    TOKENS,
    Given,
    chosen,
    profiled,
    request_for,
    size_of,
    uneven_pico,
)

from ditmoe_cli.compression.methods import MIXES
from ditmoe_cli.compression.precision.few_widths import settle, widened
from ditmoe_cli.files.names import in_expert
from ditmoe_cli.model.parameters import weight_group


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, TOKENS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(uneven_pico(), tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("allowed", [("2", "3", "8"), ("3", "16")], ids=str)
def test_as_many_get_the_wider_width_as_fit(allowed: tuple[str, ...], seed: int, uneven: Given) -> None:
    free = request_for(uneven, allowed=allowed)
    fixed, names = settle(free)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    units = [[names[i] for i in order[start : start + 3]] for start in range(0, len(order), 3)]
    least, most = (free.size(fixed, free.formats_at(names, width)) for width in (allowed[-2], allowed[-1]))
    for tenths in (0, 3, 9):
        limit = least + (most - least) * tenths // 10
        formats = widened(request_for(uneven, limit, allowed=allowed), fixed, units).formats
        sizes = []
        for n in range(len(units) + 1):
            wide = {name for unit in units[:n] for name in unit}
            parts = (
                free.formats_at([n for n in names if n in wide], allowed[-1]),
                free.formats_at([n for n in names if n not in wide], allowed[-2]),
            )
            sizes.append((free.size(fixed, *parts), {**fixed, **parts[0], **parts[1]}))
        best = max(n for n, (size, _) in enumerate(sizes) if size <= limit)
        assert formats == sizes[best][1]
        assert tenths == 0 or 0 < best < len(units)
    assert widened(free, fixed, units).formats == {**fixed, **free.formats_at(names, allowed[-1])}


def test_attention_and_shared_get_4_bits_unless_that_leaves_too_little(small: Given) -> None:
    floors = {"attn": 2.0, "shared": 3.0}
    free = request_for(small, floors=floors)
    fixed, names = settle(free)
    groups = {weight_group(small[0].weights[name].info) for name in fixed}
    assert groups == {"attn", "shared"} and all(fmt == "int4-g64" for fmt in fixed.values())
    limit = free.size(fixed, free.formats_at(names, "2"))
    assert settle(request_for(small, limit, floors=floors)) == (fixed, names)
    nothing, everything = settle(request_for(small, limit - 1, floors=floors))
    assert nothing == {} and sorted(everything) == sorted([*fixed, *names])
    for method in ("outlier", "block-score"):
        formats = chosen(MIXES[method], small, request_for(small, limit - 1, floors=floors)).formats
        assert size_of(small[0], formats) < limit
        assert {formats[name] for name in formats if ".attn." in name} <= {"int2-g64", "int3-g64"}
        assert {formats[name] for name in formats if ".shared_experts." in name} == {"int3-g64"}, "their floor"


def test_a_weight_takes_the_next_width_that_it_may(uneven: Given) -> None:
    request = request_for(uneven, allowed=("2", "4", "16"), floors={"experts": 3})
    wide, narrow = (in_expert(0, e, "down_proj.weight") for e in (0, 4))
    assert [request.format_at(wide, width) for width in ("2", "3", "4", "5", "16")] == ["int4-g64"] * 3 + [None] * 2
    assert request.format_at(narrow, "2") is None, "4 columns suit no format"
    assert request_for(uneven, allowed=("2", "4")).format_at(wide, "8") == "int4-g64"
    assert request.formats_at([wide, narrow], "2") == {wide: "int4-g64"}
