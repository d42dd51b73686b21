"""Computed weights in the dtype that they are written in: what does not fit is refused by the rule of `convert`."""

from __future__ import annotations

import pytest
import torch
from compressing import opened
from conftest import make_pico

from ditmoe_cli.compression.computed import as_stored
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.checkpoint import Checkpoint

WEIGHT = "blocks.0.moe.experts.0.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return opened(make_pico(), tmp_path_factory.mktemp("computed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_fits_is_cast(dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    values = torch.linspace(-3, 3, 12).view(3, 4)
    assert torch.equal(as_stored(checkpoint, WEIGHT, values, dtype), values.to(dtype))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (7e4, torch.float16, "holds 70000, beyond the 65504 that fp16 can hold"),
        (-3.4e38, torch.bfloat16, r"holds -3\.4e\+38, beyond the 3\.3895e\+38 that bf16 can hold"),
        (1e-8, torch.float16, "would lose 100% of its norm in fp16, which cannot hold values as small"),
        (float("nan"), torch.float32, "holds NaN or infinite values"),
        (float("inf"), torch.float16, "holds NaN or infinite values"),
    ],
)
def test_what_does_not_fit_names_the_way_out(
    value: float, dtype: torch.dtype, message: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(BadInputError, match=f"{WEIGHT}' {message}") as error:
        as_stored(checkpoint, WEIGHT, torch.full((2, 4), value), dtype)
    assert ("ditmoe convert dtype fp32" in str(error.value)) == ("NaN" not in message)


def test_what_is_added_to_weights_may_round_to_nothing(checkpoint: Checkpoint) -> None:
    tiny = torch.full((2, 4), 1e-9)
    assert not as_stored(checkpoint, "blocks.0.moe.constants", tiny, torch.float16).any()
    codes = torch.tensor([0, 1, 2], dtype=torch.int32)
    assert torch.equal(as_stored(checkpoint, "blocks.0.moe.gate.expert_of", codes, torch.int32), codes)
