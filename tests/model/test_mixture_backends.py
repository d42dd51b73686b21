"""All backends give the same outputs, in one order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import info_of, weight_of
from test_experts import experts
from torch import Tensor

from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.products import ROW_STEP
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights
from ditmoe_cli.model import mixture_backends as module
from ditmoe_cli.model.experts import SwiGLU, packed_stack
from ditmoe_cli.model.mixture_backends import Dispatch, GroupedExperts, LoopedExperts, backend_for


@given(data=st.data(), tokens=st.integers(1, 20), top_k=st.integers(1, 3), count=st.integers(1, 5))
def test_a_dispatch_is_a_permutation_by_expert(data: st.DataObject, tokens: int, top_k: int, count: int) -> None:
    chosen = st.lists(st.integers(-2, count - 1), min_size=tokens * top_k, max_size=tokens * top_k)
    selected = torch.tensor(data.draw(chosen)).reshape(tokens, top_k)
    dispatch = Dispatch.of(selected, count)
    assert sorted(dispatch.order.tolist()) == list(range(tokens * top_k))
    constants = int((selected < 0).sum())
    slots = selected.reshape(-1)
    for expert, places in enumerate(dispatch.ranges(constants)):
        assert dispatch.order[places].tolist() == (slots == expert).nonzero().squeeze(1).tolist()
        assert torch.equal(dispatch.tokens[places], dispatch.order[places] // top_k)
    ordered = slots[dispatch.order].unsqueeze(1)
    assert torch.equal(dispatch.by_slot(ordered).squeeze(2), selected)


def outputs_by_hand(made: list[SwiGLU], u: Tensor, dispatch: Dispatch, selected: Tensor) -> Tensor:
    slots = selected.reshape(-1)
    rows = [
        made[int(slots[place])](u[int(place) // selected.shape[1]]) for place in dispatch.order if slots[place] >= 0
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("backend", [LoopedExperts(), GroupedExperts()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("constants", [False, True])
def test_backends_agree(backend: LoopedExperts | GroupedExperts, constants: bool) -> None:
    made, generator = experts(8, 8, 8, 8), torch.Generator().manual_seed(0)
    u = torch.randn(30, 16, generator=generator)
    selected = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(30)])
    selected[selected == 2] = 3  # an expert that nobody chose
    if constants:
        selected[::3, 1] = -2
    dispatch, number = Dispatch.of(selected, 4), int((selected < 0).sum())
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    found = backend.outputs(
        list(made), u, dispatch, number, lambda e, slots, phi: seen.__setitem__(e, (slots, phi.clone()))
    )
    torch.testing.assert_close(found, outputs_by_hand(made, u, dispatch, selected), rtol=1e-4, atol=1e-4)
    assert sorted(seen) == [0, 1, 3]
    for e, (slots, phi) in seen.items():
        assert (selected.reshape(-1)[slots] == e).all()
        torch.testing.assert_close(phi, made[e].neurons(u[slots // 2]))


def packed_experts(unpacked: UnpackedWeights, *formats: str) -> list[SwiGLU]:
    """Experts of 32 neurons and width 64, each in its format."""
    made = list(experts(*[32] * len(formats), width=64))
    for expert, fmt in zip(made, formats, strict=True):
        for name, layer in list(expert.named_children()):
            assert isinstance(layer, torch.nn.Linear)
            weight = layer.weight.detach()
            members = pack(weight, info_of(weight), fmt)
            setattr(expert, name, PackedLinear(weight_of(weight, fmt), members, False, unpacked))
    return made


@pytest.mark.parametrize("budget", [0, 40_000, None])
def test_packed_experts_run_in_grouped_products_as_in_the_loop(budget: int | None) -> None:
    made = packed_experts(UnpackedWeights(budget), "nf4", "int4-g32", "int3-g32-sym", "int8")
    u, generator = torch.randn(30, 64), torch.Generator().manual_seed(0)
    selected = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(30)])
    dispatch = Dispatch.of(selected, 4)
    looped = LoopedExperts().outputs(made, u, dispatch, 0, None)
    for _ in range(3):
        torch.testing.assert_close(GroupedExperts().outputs(made, u, dispatch, 0, None), looped, rtol=1e-4, atol=1e-5)


def test_packed_experts_of_other_shapes_or_beside_plain_ones_are_not_stacked() -> None:
    made = packed_experts(UnpackedWeights(0), "nf4", "nf4")
    stack = packed_stack(made)
    assert stack is not None and stack.sizes == (64, 32)
    gate = made[0].gate_proj.weight()  # type: ignore[operator]
    assert torch.equal(stack.gate_up(torch.float32)[0, :32], gate)
    assert packed_stack([*made, *experts(32, width=64)]) is None
    assert packed_stack([made[0], *packed_experts(UnpackedWeights(0), "nf4"), *experts(8, width=64)]) is None
    assert packed_stack([]) is None


def test_a_cpu_takes_the_loop() -> None:
    made = experts(8, 8)
    assert backend_for(list(made), torch.randn(3, 16)).name == "loop"


def test_rounded_up_rows_leave_outputs_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    made, u = experts(8, 8, 8), torch.randn(21, 16)
    selected = torch.stack([torch.randperm(3)[:2] for _ in range(21)])
    dispatch = Dispatch.of(selected, 3)
    plain = LoopedExperts().outputs(list(made), u, dispatch, 0, None)
    monkeypatch.setattr(module, "padded_rows", lambda rows, _: rows + ROW_STEP)
    seen: list[int] = []
    padded = LoopedExperts().outputs(
        list(made), u, dispatch, 0, lambda _, slots, phi: seen.append(len(phi) - len(slots))
    )
    torch.testing.assert_close(padded, plain)
    assert seen == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weighted_sum_is_taken_over_slots(dtype: torch.dtype) -> None:
    selected = torch.stack([torch.randperm(4)[:3] for _ in range(9)])
    dispatch, weights = Dispatch.of(selected, 4), torch.rand(9, 3, dtype=dtype)
    for ordered in (torch.randn(27, 5, dtype=dtype), torch.randn(27, 5, dtype=torch.bfloat16)):
        found = dispatch.weighted_sum(ordered, weights)
        expected = (weights.unsqueeze(2) * dispatch.by_slot(ordered)).sum(dim=1)
        torch.testing.assert_close(found, expected)
        assert found.dtype == dtype
