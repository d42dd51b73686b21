"""Bytes of loaded checkpoints by closed forms, and memory within known bounds."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest
import torch
from cases import with_slow
from conftest import Pico, make_pico
from packed import packed_pico

from ditmoe_cli.evaluation.memory_use import (
    Buffer,
    Footprint,
    footprint,
    kind_of,
    loaded_bytes,
    peak_during,
    polled,
    resident_bytes,
)
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.config import expected_weights
from ditmoe_cli.model.loading import build_model, empty_model

FORMATS = ("nf4", "fp4", "nf4-dq", "int8", "int4-g32", "int3-g64-sym", "ternary-g64")
CPU = torch.device("cpu")


def saved(pico: Pico, folder: Path, name: str = "a") -> Checkpoint:
    return open_checkpoint(pico.save(folder / f"{name}.safetensors"))


def counted(checkpoint: Checkpoint) -> Footprint:
    return footprint(checkpoint, build_model(checkpoint, CPU), empty_model(checkpoint))


def by_hand(pico: Pico) -> dict[str, int]:
    """Return the bytes of a plain fp32 model by group, from the widths of its layers."""
    config, width = pico.config, pico.config.hidden_size
    weights = sum(math.prod(shape) for name, shape in expected_weights(config).items() if "expert_of" not in name)
    maps = sum(block.router_rows for block in config.blocks if block.mapped)
    norms = 4 * config.head_dim if config.attention == "flash" else 0
    experts = 4 * sum(3 * width * inner for block in config.blocks for inner in block.expert_widths)
    shared = 4 * sum(3 * width * block.shared_width for block in config.blocks)
    attention = 4 * config.depth * (4 * width * width + 4 * width + norms)
    rest = 4 * (weights + maps) - experts - shared - attention
    return {"experts": experts, "shared": shared, "attention": attention, "rest": rest}


PLAIN = {
    "timm": make_pico(),
    "flash": make_pico(attention="flash", sampler="rf", in_channels=1),
    "mapped": make_pico(expert_of=((0, 1, -1, 2), (2, 0, 1, 1)), experts=3, widths=((64,) * 3,) * 2),
    "unequal": make_pico(widths=((64, 32, 8, 40), (16, 64)), expert_of=((0, 1, 2, 3), (0, 1))),
    "extended": make_pico(
        widths=((64, 64),) * 2,
        expert_of=((0, 1, -2, -3),) * 2,
        extras={"constants": 2, "rank": 3, "residual_constant": True, "residual_linear": True},
    ),
    "half": make_pico(dtype=torch.float16),
    "no embedding": make_pico(input_size=64).with_state(pos_embed=None),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_weights_take_four_bytes_each(name: str, tmp_path: Path) -> None:
    pico = PLAIN[name]
    checkpoint = saved(pico, tmp_path)
    result = counted(checkpoint)
    assert result.weights.groups == by_hand(pico)
    assert result.weights.kinds == {"packed": 0, "scales": 0, "plain": sum(by_hand(pico).values())}
    assert result.weights == result.fp32
    assert result.ratio == 1
    assert result.buffer == Buffer(0, None)
    assert result.least == result.weights.total
    assert result.file == (tmp_path / "a.safetensors").stat().st_size


@pytest.mark.parametrize(
    "fmt", with_slow(["nf4-dq", "int8", "int3-g64-sym", "ternary-g64", "nf4", "fp4", "int4-g32"], 4)
)
def test_packed_weights_take_what_the_file_holds_of_them(fmt: str, tmp_path: Path) -> None:
    plain = make_pico()
    result = counted(saved(packed_pico(plain, fmt), tmp_path))
    matrices = [tensor for name, tensor in plain.state.items() if name.endswith("_proj.weight")]
    weights = sum(matrix.numel() for matrix in matrices)
    rows = sum(len(matrix) for matrix in matrices)
    assert weights == sum(by_hand(plain)[group] for group in ("experts", "shared")) // 4
    exact = {
        "nf4": weights // 2,
        "fp4": weights // 2,
        "nf4-dq": weights // 2,
        "int8": weights,
        "int4-g32": weights // 2,
        "int3-g64-sym": sum(len(m) * 4 * math.ceil(m.shape[1] * 3 / 32) for m in matrices),
        "ternary-g64": sum(math.ceil(m.numel() / 5) for m in matrices),
    }
    table = 256 * 8  # of all pairs of codes
    scales = {
        "nf4": weights // 64 * 4 + len(matrices) * table,
        "fp4": weights // 64 * 4 + len(matrices) * table,
        "nf4-dq": sum(m.numel() // 64 + 4 * math.ceil(m.numel() / 64 / 256) + 256 * 4 + table for m in matrices),
        "int8": rows * 4,
        "int4-g32": sum(m.shape[1] // 32 * (len(m) * 2 + 4 * math.ceil(len(m) * 4 / 32)) for m in matrices),
        "int3-g64-sym": rows * 2,
        "ternary-g64": rows * 2,
    }
    assert result.weights.kinds["packed"] == exact[fmt]
    assert result.weights.kinds["scales"] == scales[fmt]
    assert result.weights.kinds["plain"] == result.fp32.total - 4 * weights
    assert result.fp32.groups == by_hand(plain)
    assert {g: result.weights.groups[g] for g in ("attention", "rest")} == {
        g: result.fp32.groups[g] for g in ("attention", "rest")
    }
    assert sum(result.weights.groups.values()) == sum(result.weights.kinds.values()) == result.weights.total
    assert result.ratio == result.weights.total / result.fp32.total


def test_pieces_count_as_the_layers_that_they_are(tmp_path: Path) -> None:
    plain = make_pico()
    width, inner = plain.config.hidden_size, plain.config.blocks[0].expert_widths[0]
    names = [f"blocks.0.moe.experts.1.{matrix}_proj.weight" for matrix in ("up", "down")]
    state = dict(plain.state)
    for name, axis in zip(names, ("rows", "columns"), strict=True):
        fmt = f"{axis}:int8-g32*{inner // 2}+int4-g32*{inner // 2}"
        state |= pack(state.pop(name), TensorInfo(name, "F32", tuple(plain.state[name].shape)), fmt)
    result = counted(saved(Pico(plain.config, state), tmp_path))
    assert width == 32 and inner == 64, "a piece is one group, and its zero points take whole words"
    assert result.weights.kinds["packed"] == 2 * width * inner // 2 * (8 + 4) // 8
    assert result.weights.kinds["scales"] == 2 * (inner + 2 * width) + 2 * 4 * (32 * 8 // 32 + 32 * 4 // 32)
    assert result.weights.kinds["plain"] == result.fp32.total - 2 * 4 * width * inner
    assert result.buffer == Buffer(4 * width * inner, names[1])


@pytest.mark.parametrize("fmt", ["fp32", "nf4", "int8"])
def test_what_loading_takes_is_known_from_headers(fmt: str, tmp_path: Path) -> None:
    """But for tables of codes, which 4-bit weights have in a model alone, and names of formats, which stay in files."""
    pico = make_pico(attention="flash", dtype=torch.float16)
    checkpoint = saved(pico if fmt == "fp32" else packed_pico(pico, fmt), tmp_path)
    told, taken = loaded_bytes(checkpoint), counted(checkpoint).weights.total
    assert abs(told - taken) <= (0 if fmt == "fp32" else 0.25 * taken)


@pytest.mark.parametrize("fmt", with_slow(["nf4-dq", "int3-g64-sym", *(fmt for fmt in FORMATS if "-dq" not in fmt)], 2))
def test_the_sums_are_those_of_the_state_dict(fmt: str, tmp_path: Path) -> None:
    checkpoint = saved(packed_pico(make_pico(attention="flash"), fmt), tmp_path)
    model = build_model(checkpoint, CPU)
    state = model.state_dict()
    assert footprint(checkpoint, model, empty_model(checkpoint)).weights.total == sum(t.nbytes for t in state.values())


def test_the_bias_of_a_packed_layer_is_plain(tmp_path: Path) -> None:
    pico = make_pico()
    result = counted(saved(packed_pico(pico, "int8", ".attn.qkv"), tmp_path))
    width, depth = pico.config.hidden_size, pico.config.depth
    assert result.weights.kinds["packed"] == depth * 3 * width * width
    assert result.weights.kinds["scales"] == depth * 4 * 3 * width
    saved_bytes = depth * (3 * 3 * width * width - 4 * 3 * width)  # three of four bytes, less a scale a row
    assert result.weights.groups["attention"] == by_hand(pico)["attention"] - saved_bytes
    assert kind_of("blocks.0.attn.qkv.bias", {"blocks.0.attn.qkv"}) == "plain"


def test_the_buffer_is_the_largest_packed_matrix_in_fp32(tmp_path: Path) -> None:
    widths = ((64, 32), (48, 96))
    pico = make_pico(widths=widths, expert_of=((0, 1),) * 2, shared_width=40)
    assert counted(saved(packed_pico(pico, "int8"), tmp_path, "all")).buffer == Buffer(
        4 * 96 * 32, "blocks.1.moe.experts.1.down_proj.weight"
    )
    first = packed_pico(pico, "nf4", "blocks.0.moe.experts.1.up_proj")
    assert counted(saved(first, tmp_path, "one")).buffer == Buffer(4 * 32 * 32, "blocks.0.moe.experts.1.up_proj.weight")


# memory


def test_the_status_of_a_process(tmp_path: Path) -> None:
    status = tmp_path / "status"
    assert resident_bytes(status) is None
    status.write_text("VmRSS:\t   99 kB\n")
    assert resident_bytes(status) is None
    status.write_text("VmRSS:\t   99 kB\nRssAnon:\t     12 kB\nRssFile:\t   87 kB\n")
    assert resident_bytes(status) == 12 * 1024


def test_a_peak_is_seen_though_it_passes() -> None:
    value, risen = [7], threading.Event()

    def read() -> int:
        if value[0] == 50:
            risen.set()
        return value[0]

    with polled(read) as peak:
        assert peak() == 7
        value[0] = 50
        assert risen.wait(10)
        value[0] = 3
    assert peak() == 50


def test_the_last_value_counts_too() -> None:
    values = iter([5, *[1] * 1_000_000])
    with polled(lambda: next(values)) as peak:
        time.sleep(0.01)
    assert peak() == 5
    last = [1]
    with polled(lambda: last[0]) as peak:
        last[0] = 9
    assert peak() == 9


def test_nothing_is_polled_where_nothing_can_be_read() -> None:
    before = threading.active_count()
    with polled(lambda: None) as peak:
        assert threading.active_count() == before
    assert peak() is None


@pytest.mark.skipif(resident_bytes() is None, reason="no /proc here")
def test_memory_that_is_let_go_again_counts_in_the_peak() -> None:
    size = 1 << 26
    before = resident_bytes()
    assert before is not None

    def work() -> None:
        block = torch.ones(size // 4)
        time.sleep(0.05)
        del block

    peak, after = peak_during(CPU, work), resident_bytes()
    assert peak is not None and after is not None
    assert peak - before > 0.9 * size
    assert after - before < 0.5 * size
