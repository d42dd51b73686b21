"""Names of dtypes, and how far values in one are from those in another."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.model.dtypes import DTYPES, parse_dtype, relative_difference, torch_dtype_of


def test_names_are_those_of_torch() -> None:
    assert [torch_dtype_of(parse_dtype(name)) for name in DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(ValueError, match="choose fp32, bf16, fp16"):
        parse_dtype("auto")


def test_differences_are_over_the_norm_of_the_exact() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_difference(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_difference(torch.zeros(2), torch.zeros(2)) == 0
