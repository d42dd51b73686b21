"""Outputs laid out from headers: where each tensor's bytes come from, stage by stage, and plans that cannot be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from compressing import opened, pruning, quantised, quantising
from conftest import REPOSITORY, make_pico

from ditmoe_cli.compression.output import Computed, Copied, Known, Packed, PlannedOutput, Rows, planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Differences, Experts, Formats, PlanStage, Rounding
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.checkpoint import Checkpoint

EXPERTS = 5
SMALL = make_pico(hidden=16, experts=EXPERTS, widths=((24,) * EXPERTS,) * 2, input_size=4)
QKV = "blocks.0.attn.qkv.weight"
GHOST = BlockPlan((0, 2, 4), "ghost")


@pytest.fixture
def small(tmp_path: Path) -> Checkpoint:
    return opened(SMALL, tmp_path)


def laid_out(checkpoint: Checkpoint, *stages: PlanStage) -> PlannedOutput:
    return planned_output(checkpoint, CompressionPlan("x", checkpoint.fingerprint, stages=stages))


def contents(planned: PlannedOutput) -> dict[str, object]:
    return {tensor.info.name: tensor.content for tensor in planned.tensors}


def test_a_copy_copies_every_tensor(small: Checkpoint) -> None:
    assert contents(planned_output(small, None)) == {name: Copied(name) for name in small.header.tensors}
    assert contents(laid_out(small)) == contents(planned_output(small, None))


def test_experts_that_stay_are_copied_under_new_numbers(small: Checkpoint) -> None:
    found = contents(laid_out(small, Experts((replace(GHOST, router="slice"), GHOST))))
    up = "moe.experts.{}.up_proj.weight"
    assert found[f"blocks.0.{up.format(2)}"] == Copied(f"blocks.0.{up.format(4)}")
    assert f"blocks.0.{up.format(3)}" not in found
    assert found["blocks.0.moe.gate.weight"] == Rows("blocks.0.moe.gate.weight", (0, 2, 4))
    assert found["blocks.1.moe.gate.weight"] == Copied("blocks.1.moe.gate.weight")
    assert isinstance(found["blocks.1.moe.gate.expert_of"], Known) and "blocks.0.moe.gate.expert_of" not in found
    assert found[QKV] == Copied(QKV)


def test_only_mixtures_that_are_changed_are_computed(small: Checkpoint) -> None:
    whole = BlockPlan(tuple(range(EXPERTS)), "ghost")
    found = contents(laid_out(small, Experts((whole, replace(whole, widths=(8,) * EXPERTS)))))
    computed = {name for name, content in found.items() if content == Computed()}
    assert computed == {name for name in small.header.tensors if name.startswith("blocks.1.moe.")}


def test_formats_follow_experts_to_their_new_numbers(small: Checkpoint) -> None:
    names = [f"blocks.1.moe.experts.{e}.up_proj.weight" for e in (1, 4)]
    found = contents(laid_out(small, Experts((GHOST, GHOST)), Formats(dict.fromkeys(names, "int8"))))
    packed = {name: content for name, content in found.items() if isinstance(content, Packed)}
    assert {content.weight for content in packed.values()} == {names[1]}, "the other one is dropped"
    assert "blocks.1.moe.experts.2.up_proj.SCB" in packed


def test_differences_take_the_place_of_experts(small: Checkpoint) -> None:
    found = contents(laid_out(small, Differences("svd", 0.5), Formats({QKV: "int8"})))
    assert {name for name, content in found.items() if content == Computed()} == {
        name for name in found if ".experts." in name or ".base." in name
    }
    assert not any(name.endswith("_proj.weight") and ".experts." in name for name in found)
    assert isinstance(found[QKV], Packed)


def test_gptq_computes_blocks_and_packs_the_rest(small: Checkpoint) -> None:
    formats = Formats({QKV: "int8", "t_embedder.mlp.0.weight": "int8"}, Rounding())
    found = contents(laid_out(small, formats))
    assert found[QKV] == Computed() and isinstance(found["t_embedder.mlp.0.weight"], Packed)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Experts((GHOST,) * 2), Differences("svd", 0.5)), "the differences last"),
        ((Experts((GHOST,) * 2), Formats({QKV: "int8"}, Rounding(smoothing=0.5))), "smoothing last"),
        ((Differences("svd", 0.5), Formats({QKV: "int8"}, Rounding())), "rounding last"),
        ((Experts((GHOST,) * 2), Formats({QKV: "int8"}, ordering="camera")), "reordering last"),
        ((Differences("svd", 0.5), Formats({QKV: "int8"}, ordering="camera")), "reordering last"),
        (
            (Differences("svd", 0.5), Formats({"blocks.0.moe.experts.0.up_proj.weight": "int8"})),
            "as int8 and as a difference",
        ),
        (
            (
                Experts((replace(GHOST, constants=True),) * 2),
                Formats({"blocks.0.moe.experts.0.up_proj.weight": "int8"}),
            ),
            "computes 'blocks.0.moe.experts.0.up_proj.weight' and stores it as int8",
        ),
    ],
)
def test_stages_that_do_not_go_together_are_refused(
    stages: tuple[PlanStage, ...], message: str, small: Checkpoint
) -> None:
    with pytest.raises(BadInputError, match=message):
        laid_out(small, *stages)


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ([(0, 1)], r"plan has 1 blocks.*has 2"),
        ([(0, 1)] * 3, r"plan has 3 blocks.*has 2"),
        ([(0, 1), (0, 5)], r"expert 5 of block 1, which has 5 experts"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(
    keeps: list[tuple[int, ...]], message: str, small: Checkpoint
) -> None:
    with pytest.raises(BadInputError, match=message):
        planned_output(small, pruning(small, keeps))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.9.attn.qkv.weight", "does not hold"),
        ("blocks.1.attn.qkv.weight", "shape or dtype does not allow"),
        ("blocks.0.attn.qkv.bias", "only matrices"),
        ("blocks.0.moe.gate.weight", "only matrices"),
        ("blocks.0.adaLN_modulation.1.bias", "only matrices"),
        ("final_layer.linear.bias", "only matrices"),
        ("x_embedder.proj.weight", "only matrices"),
        ("y_embedder.embedding_table.weight", "only matrices"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    checkpoint = opened(SMALL, tmp_path)
    plan = quantising(checkpoint, {name: "rows:int4-g64*1+int2-g64*1"})  # which no matrix of so many rows takes
    with pytest.raises(BadInputError, match=name) as error:
        planned_output(checkpoint, plan)
    assert message in str(error.value)


def test_what_is_quantised_already_is_refused_by_name(tmp_path: Path) -> None:
    packed = quantised(opened(SMALL, tmp_path), 8, tmp_path / "packed.safetensors")
    plan = quantising(packed, {"blocks.0.attn.qkv.weight": "nf4"})
    with pytest.raises(BadInputError, match=r"blocks\.0\.attn\.qkv\.weight' is int8 already"):
        planned_output(packed, plan)


TORCH_FREE = """
import sys
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Differences, Experts, Formats, Rounding
from ditmoe_cli.model.checkpoint import open_checkpoint
checkpoint = open_checkpoint("demo:digits")
block = BlockPlan((0, 1, 2, 3), "ghost", constants=True)
name = "blocks.0.attn.qkv.weight"
for stages in (
    (Experts((block,) * checkpoint.config.depth), Formats({name: "nf4"})),
    (Differences("svd", 0.25),),
    (Formats({name: "int4-g64"}, Rounding(smoothing=0.5), "camera"),),
):
    planned_output(checkpoint, CompressionPlan("x", checkpoint.fingerprint, stages=stages))
print(sorted({"torch", "numpy"} & sys.modules.keys()))
"""


def test_laying_out_imports_neither_torch_nor_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", TORCH_FREE], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
