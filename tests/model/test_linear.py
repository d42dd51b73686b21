"""Linear layers compute in the dtype of what they multiply."""

from __future__ import annotations

import pytest
import torch

from ditmoe_cli.model.linear import Linear


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_cast_to_the_dtype_of_the_input(stored: torch.dtype, computed: torch.dtype, bias: bool) -> None:
    layer, x = Linear(5, 3, bias=bias).to(stored), torch.randn(2, 5, dtype=computed)
    expected = torch.nn.functional.linear(x, layer.weight.to(computed), layer.bias.to(computed) if bias else None)
    assert layer(x).dtype == computed
    assert torch.equal(layer(x), expected)
    assert layer.weight.dtype == stored
