"""Unpacked weights: kept within a budget, in turns beyond it, and the same whatever is kept."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed import KINDS, info_of, random, weight_of
from torch import Tensor

from ditmoe_cli.formats import unpacked_weights
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.formats.products import prepacked
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.formats.unpacked_weights import UnpackedWeights, free_on

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(6, 96), (33, 96), (5, 130), (96, 64)]


def layers_of(unpacked: UnpackedWeights, shapes: list[tuple[int, int]] = SHAPES) -> list[PackedLinear]:
    made = []
    for i, shape in enumerate(shapes):
        weight, fmt = random(shape, seed=i), KINDS[i % len(KINDS)]
        made.append(PackedLinear(weight_of(weight, fmt), pack(weight, info_of(weight), fmt), False, unpacked))
    return made


def outputs(layers: list[PackedLinear], dtype: torch.dtype, steps: int = 2) -> list[Tensor]:
    return [
        layer(torch.linspace(-1, 1, 3 * layer.shape[1]).reshape(3, -1).to(dtype))
        for _ in range(steps)
        for layer in layers
    ]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(16, 70).map(lambda n: 2 * n)), min_size=1, max_size=4),
    budget=st.sampled_from([0, 1, 5_000, 20_000, None]),
    dtype=st.sampled_from(DTYPES),
)
def test_whatever_is_kept_products_are_the_same_and_the_budget_holds(
    shapes: list[tuple[int, int]], budget: int | None, dtype: torch.dtype
) -> None:
    unpacked = UnpackedWeights(budget)
    layers = layers_of(unpacked, shapes)
    expected = outputs(layers_of(UnpackedWeights(0), shapes), dtype)
    for found, exact in zip(outputs(layers, dtype), expected, strict=True):
        assert torch.equal(found, exact)
        assert budget is None or unpacked.kept_bytes <= budget
    if budget is None:
        assert unpacked.kept_bytes == sum(rows * columns for rows, columns in shapes) * dtype.itemsize


def test_the_first_layers_that_ask_again_are_kept_and_stay() -> None:
    unpacked = UnpackedWeights(4 * (6 * 96 + 33 * 96) + 100)
    layers = layers_of(unpacked)
    first, again, third = ([layer.matrix(torch.float32).data_ptr() for layer in layers] for _ in range(3))
    assert again[:2] == third[:2] and unpacked.kept_bytes == 4 * (6 * 96 + 33 * 96)
    assert len({*third[2:]}) == 1 and {*third[2:]} <= {*first}, "the others take turns in one buffer"


def test_who_asks_once_takes_no_part_of_the_budget() -> None:
    """Such as modulation, which is computed once for all steps."""
    unpacked = UnpackedWeights()
    layers = layers_of(unpacked)
    outputs(layers, torch.float32, steps=1)
    assert unpacked.kept_bytes == 0
    outputs(layers[1:2], torch.float32, steps=1)
    assert unpacked.kept_bytes == 4 * 33 * 96


def test_what_is_kept_is_not_unpacked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    [layer] = layers_of(UnpackedWeights(), [(6, 96)])
    expected = outputs([layer], torch.float32)[-1]
    monkeypatch.setattr(layer, "_unpack", lambda *_: pytest.fail("unpacked"))
    assert torch.equal(outputs([layer], torch.float32)[-1], expected)


def test_another_dtype_takes_the_place() -> None:
    unpacked = UnpackedWeights()
    [layer] = layers_of(unpacked, [(6, 96)])
    layer.matrix(torch.float32)
    for dtype in (*DTYPES, torch.float32):
        assert torch.equal(layer.matrix(dtype), layer.weight().to(dtype))
        assert unpacked.kept_bytes == 6 * 96 * dtype.itemsize


def test_layers_that_are_gone_or_moved_give_their_part_back() -> None:
    unpacked = UnpackedWeights()
    layers = layers_of(unpacked)
    outputs(layers, torch.float32)
    whole = unpacked.kept_bytes
    layers.pop()
    gc.collect()
    assert unpacked.kept_bytes == whole - 4 * 96 * 64
    layers[0].to("meta")
    assert unpacked.kept_bytes == whole - 4 * (96 * 64 + 6 * 96)


def test_a_pause_keeps_nothing_new() -> None:
    unpacked = UnpackedWeights()
    layers = layers_of(unpacked)
    outputs(layers[:1], torch.float32)
    with unpacked.paused():
        outputs(layers, torch.float32)
        assert unpacked.kept_bytes == 4 * 6 * 96
    outputs(layers, torch.float32, steps=1)
    assert unpacked.kept_bytes == sum(4 * rows * columns for rows, columns in SHAPES)


@pytest.mark.parametrize("budget", [0, 4 * 9 * 96, None])
def test_layers_that_ask_together_lie_one_after_the_other(budget: int | None) -> None:
    unpacked = UnpackedWeights(budget)
    layers = layers_of(unpacked, [(6, 96), (33, 96), (6, 96)])
    for _ in range(3):
        both = unpacked.together(layers[:2], torch.bfloat16)
        assert torch.equal(both.view(39, 96), torch.cat([layer.weight(torch.bfloat16) for layer in layers[:2]]))
        alone = layers[2].matrix(torch.bfloat16)
        assert torch.equal(alone, layers[2].weight(torch.bfloat16))
    assert unpacked.kept_bytes == {0: 0, None: 2 * 45 * 96}.get(budget, 2 * 6 * 96)
    swapped = unpacked.together([layers[0], layers[2]], torch.bfloat16)
    assert torch.equal(swapped.view(12, 96)[6:], layers[2].weight(torch.bfloat16)), "others beside the first"
    if budget is None:
        layers[2].to(torch.float32)  # forgets what lies beside it too
        assert unpacked.kept_bytes == 0


def test_copies_begin_with_nothing_and_count_for_themselves() -> None:
    unpacked = UnpackedWeights(10_000)
    model = torch.nn.ModuleList(layers_of(unpacked))
    expected = outputs(list(model), torch.float32)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    theirs = {layer.unpacked for layer in twin}
    assert len(theirs) == 1 and unpacked not in theirs
    [other] = theirs
    assert other.kept_bytes == 0
    assert all(map(torch.equal, outputs(list(twin), torch.float32), expected))  # type: ignore[arg-type]
    assert 0 < other.kept_bytes <= 10_000


def test_threads_do_not_share_what_is_not_kept() -> None:
    layers = layers_of(UnpackedWeights(0))
    mine = layers[0].matrix(torch.float32)
    expected = mine.clone()
    thread = threading.Thread(target=outputs, args=(layers, torch.float32))
    thread.start()
    thread.join()
    assert torch.equal(mine, expected)


def test_matrices_of_inference_mode_serve_outside_of_it() -> None:
    for budget in (0, None):
        layers = layers_of(UnpackedWeights(budget))
        with torch.inference_mode():
            outputs(layers, torch.float32)
        x = torch.ones(2, 96, requires_grad=True)
        layers[0](x).sum().backward()
        assert x.grad is not None and torch.allclose(x.grad, layers[0].weight().sum(0).expand(2, -1), atol=1e-4)


def test_without_a_number_half_of_the_free_memory_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_weights, "free_memory", lambda: 2 * 4.0 * 6 * 96)
    unpacked = UnpackedWeights()
    layers = layers_of(unpacked)
    outputs(layers, torch.float32)
    assert unpacked.kept_bytes == 4 * 6 * 96
    monkeypatch.setattr(unpacked_weights, "free_memory", lambda: 1e12)
    outputs(layers, torch.float32)
    assert unpacked.kept_bytes == 4 * 6 * 96, "asked for once"


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacked_weights, "free_memory", lambda: 1200.0)
    assert free_on(torch.device("cpu")) == 1200
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert free_on(torch.device("cpu")) == 400
    monkeypatch.setattr(unpacked_weights, "free_memory", lambda: float("inf"))
    assert free_on(torch.device("cpu")) == 0, "where the system does not tell, nothing is kept"


def test_a_budget_below_0_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 bytes"):
        UnpackedWeights(-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_are_kept_as_products_take_them(dtype: torch.dtype) -> None:
    unpacked = UnpackedWeights()
    [layer] = layers_of(unpacked, [(400, 384)])
    expected = outputs(layers_of(UnpackedWeights(0), [(400, 384)]), dtype)
    for found, exact in zip(outputs([layer], dtype), expected, strict=True):
        assert torch.equal(found, exact)
    kept = layer.matrix(dtype)
    assert unpacked.kept_bytes == 400 * 384 * dtype.itemsize
    assert kept.is_mkldnn == prepacked(layer.weight(dtype)).is_mkldnn
    assert torch.equal(unpacked.together([layer], dtype).view(400, 384), layer.weight(dtype)), "for grouped products"
