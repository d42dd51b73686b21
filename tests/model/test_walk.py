"""Walking the blocks of a model: all of them, in order, and of an offloaded model one in memory at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import Pico
from seeing import Seen

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.offload import OffloadedDiTMoE, release
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import watched_by

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[None, "int3-g64", "nf4"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pico: Callable[..., Pico]
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("walk")
    plain = open_checkpoint(pico(depth=3).save(folder / "plain.safetensors"))
    if request.param is None:
        return plain
    apply(plain, plan_uniform(plain, request.param), Output(folder / "packed.safetensors"))
    return open_checkpoint(folder / "packed.safetensors")


def tensors(block: Block) -> list[torch.Tensor]:
    return [*block.parameters(), *block.buffers()]


def test_blocks_come_in_order_and_whole(checkpoint: Checkpoint) -> None:
    resident = build_model(checkpoint, CPU)
    with resident_blocks(OffloadedDiTMoE(checkpoint, CPU)) as blocks:
        for expected, (index, block) in enumerate(blocks):
            assert index == expected and not block.training
            whole = resident.blocks[index].state_dict()
            assert block.state_dict().keys() == whole.keys()
            assert all(torch.equal(tensor, whole[name]) for name, tensor in block.state_dict().items())
    assert expected == 2


def test_a_walk_may_start_at_any_block(checkpoint: Checkpoint) -> None:
    for start in range(4):
        with resident_blocks(OffloadedDiTMoE(checkpoint, CPU), start=start) as blocks:
            assert [index for index, _ in blocks] == list(range(start, 3))


def test_one_block_is_in_memory_though_the_caller_holds_them_all(checkpoint: Checkpoint) -> None:
    model = OffloadedDiTMoE(checkpoint, CPU)
    held: list[Block] = []
    alive: list[list[weakref.ref[torch.Tensor]]] = []
    with resident_blocks(model) as blocks:
        for _, block in blocks:
            assert all(tensor.is_meta for old in held for tensor in tensors(old))
            assert not any(ref() for refs in alive for ref in refs)
            assert not any(tensor.is_meta for tensor in tensors(block))
            held.append(block)
            alive.append([weakref.ref(tensor) for tensor in tensors(block)])
    assert len(held) == 3 and all(tensor.is_meta for old in held for tensor in tensors(old))
    assert all(tensor.is_meta for block in model._model.blocks for tensor in block.parameters())


def test_changes_to_a_block_end_with_its_step(checkpoint: Checkpoint) -> None:
    model = OffloadedDiTMoE(checkpoint, CPU)
    for _ in range(2):
        with resident_blocks(model) as blocks:
            for _, block in blocks:
                assert bool(block.moe.gate.weight.any())
                block.moe.gate.weight.zero_()


def test_results_that_share_weights_outlive_the_block(checkpoint: Checkpoint) -> None:
    with resident_blocks(OffloadedDiTMoE(checkpoint, CPU)) as blocks:
        routers = [block.moe.gate.weight for _, block in blocks]
    expected = build_model(checkpoint, CPU)
    assert all(torch.equal(a, b.moe.gate.weight) for a, b in zip(routers, expected.blocks, strict=True))


def test_progress_counts_blocks_and_ends_with_an_error(checkpoint: Checkpoint) -> None:
    model = OffloadedDiTMoE(checkpoint, CPU)
    with (
        watched_by(seen := Seen()),
        pytest.raises(ValueError, match="in the second"),
        resident_blocks(model, "walking") as blocks,
    ):
        for index, block in blocks:
            last = block
            if index == 1:
                raise ValueError("in the second")
    (walked,) = seen.phases
    assert (walked.title, walked.total, walked.unit, walked.done) == ("walking", 3, "blocks", 1)
    assert seen.ended == ["walking"]
    assert all(tensor.is_meta for tensor in tensors(last)), "freed though the error was raised within the step"


def test_a_block_may_be_released_early(checkpoint: Checkpoint) -> None:
    with resident_blocks(OffloadedDiTMoE(checkpoint, CPU)) as blocks:
        for _, block in blocks:
            release(block)
            assert all(tensor.is_meta for tensor in tensors(block))


def test_a_resident_model_keeps_its_blocks(checkpoint: Checkpoint) -> None:
    model = build_model(checkpoint, CPU)
    with resident_blocks(model) as blocks:
        walked = [block for _, block in blocks]
    assert walked == list(model.blocks)
    assert not any(tensor.is_meta for block in walked for tensor in tensors(block))
