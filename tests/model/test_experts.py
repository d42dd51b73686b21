"""What lies together in memory is told by addresses, so replaced weights are never overlooked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ditmoe_cli.model.experts import SwiGLU, paired, reserve, stacked

CPU = torch.device("cpu")


def experts(*inners: int, width: int = 16) -> list[SwiGLU]:
    with torch.device("meta"):
        made = [SwiGLU(width, inner) for inner in inners]
    reserve(made, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for expert in made:
        for weight in expert.parameters():
            weight.data.normal_(generator=generator)
    return made


def test_reserved_experts_are_a_stack() -> None:
    made = experts(8, 8, 8)
    stack = stacked(made)
    assert stack is not None
    assert stack.gate_up.shape == (3, 16, 16) and stack.down.shape == (3, 16, 8)
    for e, expert in enumerate(made):
        both = torch.cat((expert.gate_proj.weight, expert.up_proj.weight))
        pair = paired(expert)
        assert pair is not None
        assert torch.equal(stack.gate_up[e], both) and torch.equal(pair, both)
        assert torch.equal(stack.down[e], expert.down_proj.weight)


def test_ragged_experts_are_pairs_but_no_stack() -> None:
    made = experts(8, 4, 12)
    assert stacked(made) is None
    for expert in made:
        pair = paired(expert)
        assert pair is not None
        assert torch.equal(pair, torch.cat((expert.gate_proj.weight, expert.up_proj.weight)))


def replace_down(expert: SwiGLU) -> None:
    expert.down_proj.weight = nn.Parameter(expert.down_proj.weight + 1, requires_grad=False)


def replace_gate_data(expert: SwiGLU) -> None:
    expert.gate_proj.weight.data = expert.gate_proj.weight.data.clone()


def cut(expert: SwiGLU) -> None:
    expert.up_proj.weight = nn.Parameter(expert.up_proj.weight[:4], requires_grad=False)


def in_place(expert: SwiGLU) -> None:
    expert.up_proj.weight.data.mul_(2)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize(
    ("change", "is_pair", "is_stack"),
    [
        (replace_down, True, False),
        (replace_gate_data, False, False),
        (cut, False, False),
        (in_place, True, True),
        (lambda expert: expert.half(), False, False),
    ],
)
def test_replaced_weights_leave_the_stack(
    change: Callable[[SwiGLU], object], is_pair: bool, is_stack: bool, number: int
) -> None:
    made = experts(8, 8, 8)
    change(made[number])
    assert (stacked(made) is not None) == is_stack
    assert (paired(made[number]) is not None) == is_pair
    drawn = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    u = drawn.to(made[number].down_proj.weight.dtype)
    if change is not cut:
        gate, up = made[number].gate_proj, made[number].up_proj
        torch.testing.assert_close(made[number].neurons(u), nn.functional.silu(gate(u)) * up(u), rtol=1e-5, atol=1e-4)


def test_nothing_is_no_stack() -> None:
    assert stacked([]) is None
    assert stacked([SwiGLU(16, 8), SwiGLU(16, 8)]) is None, "of memory of their own"


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_gradients_reach_every_matrix() -> None:
    made = experts(8, 8)
    for expert in made:
        expert.requires_grad_(True)
        assert paired(expert) is None
        expert(torch.randn(5, 16)).sum().backward()
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in expert.parameters())
    assert stacked(made) is None
    with torch.no_grad():
        assert stacked(made) is not None and paired(made[0]) is not None


def test_layers_that_took_a_place_are_called() -> None:
    (expert,) = experts(8)
    put = Doubling(16, 8, bias=False)
    put.weight = expert.gate_proj.weight
    expert.gate_proj = put
    u = torch.randn(5, 16)
    torch.testing.assert_close(expert.neurons(u), nn.functional.silu(put(u)) * expert.up_proj(u))
