"""The outlier score against a loop, and the matrix that it picks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from hypothesis import given
from hypothesis import strategies as st
from mixing import (
    SMALL,
    chosen,
    experts_of,
    profiled,
    request_for,
    size_of,
)

from ditmoe_cli.compression.precision.baselines import outlier
from ditmoe_cli.compression.precision.few_widths import settle
from ditmoe_cli.files.names import in_expert


def test_the_outlier_score_is_the_worst_columns() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [1.0, 1.0, 0.0], [4.0, 0.0, 0.0]])
    assert outlier.outlier_score(weight) == pytest.approx(3 / (4 / 3))  # 4 / 2 in the first column
    assert outlier.outlier_score(weight[:, :1]) == pytest.approx(2.0)
    assert outlier.outlier_score(torch.zeros(3, 2)) == 0.0


@given(rows=st.integers(1, 6), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_outlier_score_is_that_of_a_loop(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = outlier.outlier_score(weight)
    by_column = [[abs(v) for v in column] for column in weight.T.tolist()]
    assert found == pytest.approx(max(max(column) / (sum(column) / rows) for column in by_column))
    assert 1 - 1e-9 <= found <= rows + 1e-9
    assert outlier.outlier_score(weight * torch.arange(1.0, columns + 1)) == pytest.approx(found, rel=1e-5)


def with_outlier(name: str, row: int = 3, column: int = 5) -> Pico:
    pico = make_pico(**SMALL)
    weight = pico.state[name].clone()
    weight[row, column] = 50.0
    return pico.with_state(**{name: weight})


@pytest.mark.parametrize(
    ("matrix", "tied"), [("up", ()), ("down", ()), ("gate", ("gate", "up")), ("up", ("gate", "up"))], ids=str
)
def test_the_matrix_with_an_outlier_gets_the_wide_format(matrix: str, tied: tuple[str, ...], tmp_path: Path) -> None:
    asked = profiled(with_outlier(in_expert(1, 2, f"{matrix}_proj.weight")), tmp_path, fast=True)
    planted = {in_expert(1, 2, f"{each}_proj.weight") for each in tied or (matrix,)}
    free = request_for(asked, tied=tied)
    fixed, experts = settle(free)
    narrow, wide = free.formats_at(experts, "2"), free.formats_at(experts, "3")
    limit = size_of(asked[0], {**fixed, **narrow, **{n: wide[n] for n in planted}})
    formats = chosen(outlier, asked, request_for(asked, limit, tied=tied)).formats
    assert experts_of(formats, "3") == planted and experts_of(formats, "2") == set(experts) - planted
    assert size_of(asked[0], formats) == limit
    assert not experts_of(chosen(outlier, asked, request_for(asked, limit - 1, tied=tied)).formats, "3")
