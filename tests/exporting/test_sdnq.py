"""Weights in the layout of SDNQ: read by a reader written from its description, and by the package where installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pico
from foreign_models import bare_model, documented, exact_values, mixed_pico
from safetensors.torch import load_file
from stored_parts import wholly_packed
from torch import Tensor

from ditmoe_cli.exporting.exported import Wanted
from ditmoe_cli.exporting.sdnq import packed_codes, shortfall
from ditmoe_cli.exporting.targets import TARGETS, laid_out
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.differences import SvdDifference
from ditmoe_cli.formats.integer import BITS
from ditmoe_cli.formats.registry import parse_format
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.loading import load_model

FORMATS = (
    *(f"int{bits}-g{group}{sym}" for bits in BITS for group, sym in ((64, ""), (32, "-sym"))),
    *("ternary-g64", "int8", None),
)
WIDTHS = ((64, 96, 128), (40, 64, 72))  # of 96, 40 and 72 neurons groups are divided, or a row is one
EXTRAS = {"constants": 2, "rank": 3, "residual_constant": True, "residual_linear": True}
UNITS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3)}  # codes and bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of mixed formats, its first block's third expert a base plus a product of factors; and its export."""
    folder = tmp_path_factory.mktemp("sdnq")
    pico = mixed_pico(FORMATS, widths=WIDTHS, expert_of=((0, -2, 2, 1), (2, -1, 0, 1, -3)), extras=EXTRAS, sampler="rf")
    state = dict(pico.state)
    for matrix in ("gate", "up", "down"):
        name = f"blocks.0.moe.experts.2.{matrix}_proj.weight"
        for member in [
            member for member in state if member.startswith(name) or member == name.replace("weight", "SCB")
        ]:
            del state[member]
        shape = (64, 128) if matrix == "down" else (128, 64)
        generator = torch.Generator().manual_seed(len(matrix))
        state[f"blocks.0.moe.base.{matrix}_proj.weight"] = 0.1 * torch.randn(shape, generator=generator)
        factors = (torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator))
        state |= SvdDifference.pack(name, *(0.1 * factor for factor in factors))
    type(pico)(pico.config, state).save(folder / "a.safetensors")
    laid_out(TARGETS["sdnq"], open_checkpoint(folder / "a.safetensors"), Wanted(folder / "out"), print).write()
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / "a.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "out" / "transformer" / "config.json").read_text())[
        "quantization_config"
    ]
    return config


def stored(folder: Path) -> dict[str, Tensor]:
    (file,) = (folder / "out" / "transformer").glob("*.safetensors")
    return load_file(file)


def require_equal(found: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Values are exact; those with a product of factors within the rounding of fp32."""
    expected = exact_values(checkpoint)
    assert found.keys() == expected.keys()
    for name, weight in checkpoint.weights.items():
        if weight.format == "svd":
            assert torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(found[name].float(), expected[name]), name


def codes_by_description(packed: Tensor, bits: int) -> list[int]:
    """The codes of packed bytes, by the description in `sdnq`, a bit at a time."""
    count, size = UNITS[bits]
    found: list[int] = []
    for unit in packed.reshape(-1, size).tolist():

        def bit(byte: int, place: int, unit: list[int] = unit) -> int:
            return unit[byte] >> place & 1

        own = [0] * count
        places: dict[int, list[tuple[int, int]]]
        if bits in (2, 4):
            places = {k: [(0, bits * k + b) for b in range(bits)] for k in range(count)}
        elif bits == 3:
            places = {i: [(i, b) for b in range(3)] for i in range(3)}
            places |= {3 + i: [(i, 3 + b) for b in range(3)] for i in range(3)}
            places |= {6 + i: [(i, 6), (i, 7), (2, 6 + i)] for i in range(2)}
        elif bits == 5:
            places = {i: [(i, b) for b in range(5)] for i in range(5)}
            places |= {5 + i: [(i, 5), (i, 6), (i, 7), (3 + i, 5), (3 + i, 6)] for i in range(2)}
            places[7] = [(2, 5), (2, 6), (2, 7), (4, 7), (3, 7)]
        else:
            places = {i: [(i, b) for b in range(6)] for i in range(3)}
            places[3] = [(2, 6), (2, 7), (1, 6), (1, 7), (0, 6), (0, 7)]
        for code, own_places in places.items():
            own[code] = sum(bit(byte, place) << b for b, (byte, place) in enumerate(own_places))
        found += own
    return found


@pytest.mark.parametrize("bits", list(UNITS))
def test_codes_are_packed_as_described(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (6, 40), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    assert codes_by_description(packed_codes(codes, bits), bits) == codes.flatten().tolist()


def test_a_reader_of_the_description_gets_our_values(folder: Path, checkpoint: Checkpoint) -> None:
    tensors, config = stored(folder), config_of(folder)
    dtypes = {name: dtype for dtype, names in config["modules_dtype_dict"].items() for name in names}
    found = {name: tensors[name] for name in checkpoint.weights if name not in dtypes}
    for name, dtype in dtypes.items():
        stem, shape = name.removesuffix(".weight"), checkpoint.weights[name].info.shape
        scale, codes = tensors[f"{stem}.scale"], tensors[name]
        bits = int(dtype.removeprefix("u").removeprefix("int")) if "int" in dtype else 0
        if bits in UNITS:
            least = 0 if dtype.startswith("u") else 2 ** (bits - 1)
            codes = torch.tensor(codes_by_description(codes, bits)).reshape(*scale.shape[:-1], -1) - least
        group = config["modules_quant_config"].get(name, {}).get("group_size", config["group_size"])
        assert codes.shape[-1] == (shape[1] if group == -1 else group)
        values = codes.float() * scale + tensors.get(f"{stem}.zero_point", torch.zeros(()))
        found[name] = values.reshape(shape)
        if f"{stem}.svd_up" in tensors:
            rank = config["modules_quant_config"][name]["svd_rank"]
            assert tensors[f"{stem}.svd_up"].shape == (shape[0], rank)
            found[name] = found[name] + tensors[f"{stem}.svd_up"] @ tensors[f"{stem}.svd_down"]
    require_equal(found, checkpoint)
    assert set(config["modules_to_not_convert"]).isdisjoint(dtypes)


def test_the_package_opens_it_to_our_values(
    folder: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    pytest.importorskip("accelerate")
    sdnq = pytest.importorskip("sdnq.dequantizer", exc_type=ImportError)
    model = documented("Mixed widths for SDNQ")["load"](
        lambda **_: bare_model(checkpoint), folder / "out" / "transformer"
    )
    model = sdnq.dequantize_sdnq_model(model)
    require_equal(model.state_dict(), checkpoint)


def test_diffusers_opens_it_by_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its predictions are ours in fp32, in which it stays packed; in bf16 they are near."""
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    pytest.importorskip("accelerate")
    pytest.importorskip("sdnq.dequantizer", exc_type=ImportError)
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    wholly_packed(make_pico(sampler="rf", attention="flash"), "int4-g32").save(tmp_path / "b.safetensors")
    laid_out(TARGETS["sdnq"], open_checkpoint(tmp_path / "b.safetensors"), Wanted(tmp_path / "out"), print).write()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times, labels = torch.tensor([0.3, 0.8]), torch.tensor([0, 2])
    for source, out in ((folder / "a.safetensors", folder / "out"), (tmp_path / "b.safetensors", tmp_path / "out")):
        expected = load_model(source, dtype=torch.float32)(noise, times, labels)[:, :4]
        for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            pipeline = diffusers.DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True, torch_dtype=dtype)
            found = pipeline.transformer(noise, times, labels).sample
            assert (found - expected).norm() <= near * expected.norm()
            kinds = {type(module).__name__ for module in pipeline.transformer.modules()}
            assert "SDNQLinear" in kinds and "PackedLinear" not in kinds


@pytest.mark.parametrize(
    ("shape", "fmt", "said"),
    [
        ((8, 64), "nf4", "is nf4"),
        ((8, 64), "fp4-dq", "is fp4-dq"),
        ((64, 64), "rows:int4-g64*32+int2-g64*32", "one width a matrix"),
        ((3, 37), "int4-g64", "eight at a time"),
        ((8, 100), "int4-g64", "only groups of 4 divide"),
    ],
)
def test_what_it_does_not_hold(shape: tuple[int, int], fmt: str, said: str) -> None:
    assert said in (shortfall(TensorInfo("x.weight", "F16", shape), parse_format(fmt)) or "")


@pytest.mark.parametrize(("columns", "fmt"), [(72, "int4-g64"), (96, "int3-g64-sym"), (12, "int4-g64"), (100, "int8")])
def test_ragged_rows_are_held(columns: int, fmt: str) -> None:
    assert shortfall(TensorInfo("x.weight", "F16", (8, columns)), parse_format(fmt)) is None


def test_a_ternary_difference_is_no_low_rank_one() -> None:
    from ditmoe_cli.formats.differences import TernaryDifference

    info = TensorInfo("blocks.0.moe.experts.0.up_proj.weight", "F16", (8, 64))
    assert "is ternary" in (shortfall(info, TernaryDifference()) or "")
    assert shortfall(info, SvdDifference(3)) is None
