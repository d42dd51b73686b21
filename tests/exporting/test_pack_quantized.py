"""Integer weights as compressed-tensors stores them: opened by the library, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import bare_model, documented, exact_values, mixed_pico
from safetensors.torch import load_file

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.exported import Wanted
from ditmoe_cli.exporting.pack_quantized import LAYOUT, shortfall
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.integer import BITS
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint

FORMATS = (*(f"int{bits}-g{g}{sym}" for bits in BITS for g, sym in ((64, ""), (32, "-sym"))), "int8", None)
WIDTHS = ((64, 64, 128), (64, 24, 192))  # of 24 neurons a row is one group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    mixed_pico(FORMATS, widths=WIDTHS).save(folder / "a.safetensors")
    LAYOUT.laid_out(open_checkpoint(folder / "a.safetensors"), Wanted(folder / "out"), print).write()
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / "a.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    return config


def test_the_library_opens_it_to_our_values(folder: Path, checkpoint: Checkpoint) -> None:
    """Of integer formats in fp16, in which both compute; of int8 in fp32. All else is untouched."""
    pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    model = bare_model(checkpoint)
    documented("Integers for compressed-tensors")["fill"](model, folder / "out")
    found, expected = model.state_dict(), exact_values(checkpoint)
    for name, weight in checkpoint.weights.items():
        values = expected[name] if weight.format in (None, "int8") else expected[name].half()
        assert torch.equal(found[name], values), name
    assert {weight.format for weight in checkpoint.weights.values()} >= set(FORMATS)


def test_codes_scales_and_zero_points_are_the_bytes_that_we_store(folder: Path, checkpoint: Checkpoint) -> None:
    (file,) = (folder / "out").glob("*.safetensors")
    theirs, ours = load_file(file), {name: checkpoint.reader.tensor(name) for name in checkpoint.header.tensors}
    for weight in checkpoint.weights.values():
        if weight.format == "int8":
            continue
        for member in weight.members:
            if member.endswith("_shape"):
                assert theirs[member].dtype == torch.int64 and theirs[member].tolist() == list(weight.info.shape)
            else:
                assert torch.equal(theirs[member], ours[member]), member
    assert not any(name.endswith((".SCB", ".weight_format")) for name in theirs)


def test_modules_are_listed_by_how_they_are_quantised_and_plain_ones_ignored(
    folder: Path, checkpoint: Checkpoint
) -> None:
    config = config_of(folder)
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    packed = {name.removesuffix(".weight") for name, weight in checkpoint.weights.items() if weight.format}
    assert len(targets) == len(set(targets)) and set(targets) == packed
    plain = {"blocks.0.attn.qkv", "blocks.0.moe.gate", "t_embedder.mlp.0", "final_layer.linear"}
    assert plain <= set(config["ignore"]) and packed.isdisjoint(config["ignore"])
    told = [group["weights"] for group in config["config_groups"].values()]
    assert len({json.dumps(args, sort_keys=True) for args in told}) == len(told)
    assert {args["group_size"] for args in told if args["strategy"] == "channel"} == {None}


@pytest.mark.parametrize(
    ("shape", "fmt", "said"),
    [
        ((8, 96), "int4-g64", "whole groups, here of 64"),
        ((8, 64), "nf4", "is nf4"),
        ((8, 64), "fp4-dq", "is fp4-dq"),
        ((8, 64), "ternary-g64", "is ternary-g64"),
        ((64, 64), "rows:int4-g64*32+int2-g64*32", "one width a matrix"),
    ],
)
def test_what_it_does_not_hold(shape: tuple[int, int], fmt: str, said: str) -> None:
    assert said in (shortfall(TensorInfo("x.weight", "F16", shape), parse_format(fmt)) or "")


@pytest.mark.parametrize("columns", [64, 128, 48, 8])
def test_rows_of_whole_groups_or_of_one_are_held(columns: int) -> None:
    assert shortfall(TensorInfo("x.weight", "F16", (8, columns)), parse_format("int3-g64")) is None


def test_values_that_are_infinite_in_the_dtype_of_the_library_are_refused(tmp_path: Path) -> None:
    """The last step of a grid may lie beyond fp16, whose end we keep to; the library would make it infinite."""
    pico = mixed_pico(("int4-g64",))
    scale = pico.state["blocks.0.moe.experts.0.gate_proj.weight_scale"]
    scale[0, 0] = 30000.0
    pico.save(tmp_path / "a.safetensors")
    with pytest.raises(BadInputError, match=r"blocks\.0\.moe\.experts\.0\.gate_proj\.weight.* beyond fp16"):
        LAYOUT.laid_out(open_checkpoint(tmp_path / "a.safetensors"), Wanted(tmp_path / "out"), print).write()
    assert not (tmp_path / "out").exists()
