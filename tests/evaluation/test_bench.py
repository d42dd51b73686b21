"""The benchmark: bytes by closed forms, memory within known bounds, and a step equal to that of sampling."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from torch import Tensor

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation import bench as benching
from ditmoe_cli.evaluation.bench import (
    GROUPS,
    KINDS,
    WARM_UPS,
    Bench,
    Buffer,
    Footprint,
    Load,
    Memory,
    Sizes,
    bench,
    check_load,
    denoising_step,
    footprint,
    in_turn,
    kind_of,
    peak_during,
    polled,
    resident_bytes,
    thread_counts,
)
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.formats.registry import pack
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.config import expected_weights
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model, empty_model

FORMATS = ("nf4", "fp4", "nf4-dq", "int8", "int4-g32", "int3-g64-sym", "ternary-g64")
CPU = torch.device("cpu")


def packed(pico: Pico, fmt: str, part: str = ".moe.") -> Pico:
    """Return the pico with all expert matrices (or those whose name contains `part`) stored in a format."""
    state: dict[str, Tensor] = {}
    for name, tensor in pico.state.items():
        chosen = part in name and name.endswith("_proj.weight" if part == ".moe." else ".weight")
        state |= pack(tensor, TensorInfo(name, "F32", tuple(tensor.shape)), fmt) if chosen else {name: tensor}
    return Pico(pico.config, state)


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


@pytest.mark.parametrize("fmt", FORMATS)
def test_packed_weights_take_what_the_file_holds_of_them(fmt: str, tmp_path: Path) -> None:
    plain = make_pico()
    result = counted(saved(packed(plain, fmt), tmp_path))
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


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_sums_are_those_of_the_state_dict(fmt: str, tmp_path: Path) -> None:
    checkpoint = saved(packed(make_pico(attention="flash"), fmt), tmp_path)
    model = build_model(checkpoint, CPU)
    state = model.state_dict()
    assert footprint(checkpoint, model, empty_model(checkpoint)).weights.total == sum(t.nbytes for t in state.values())


def test_the_bias_of_a_packed_layer_is_plain(tmp_path: Path) -> None:
    pico = make_pico()
    result = counted(saved(packed(pico, "int8", ".attn.qkv"), tmp_path))
    width, depth = pico.config.hidden_size, pico.config.depth
    assert result.weights.kinds["packed"] == depth * 3 * width * width
    assert result.weights.kinds["scales"] == depth * 4 * 3 * width
    saved_bytes = depth * (3 * 3 * width * width - 4 * 3 * width)  # three of four bytes, less a scale a row
    assert result.weights.groups["attention"] == by_hand(pico)["attention"] - saved_bytes
    assert kind_of("blocks.0.attn.qkv.bias", {"blocks.0.attn.qkv"}) == "plain"


def test_the_buffer_is_the_largest_packed_matrix_in_fp32(tmp_path: Path) -> None:
    widths = ((64, 32), (48, 96))
    pico = make_pico(widths=widths, expert_of=((0, 1),) * 2, shared_width=40)
    assert counted(saved(packed(pico, "int8"), tmp_path, "all")).buffer == Buffer(
        4 * 96 * 32, "blocks.1.moe.experts.1.down_proj.weight"
    )
    first = packed(pico, "nf4", "blocks.0.moe.experts.1.up_proj")
    assert counted(saved(first, tmp_path, "one")).buffer == Buffer(4 * 32 * 32, "blocks.0.moe.experts.1.up_proj.weight")


# a step


@pytest.mark.parametrize(("sampler", "t"), [("rf", 0.5), ("ddpm", 500)])
@pytest.mark.parametrize("cfg", [1.0, 2.0, 0.0])
def test_a_pass_holds_both_branches_at_the_middle_time(
    cfg: float, sampler: str, t: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved(make_pico(sampler=sampler), tmp_path)
    seen: list[tuple[Tensor, float, Tensor]] = []
    prepared = DiTMoE.prepared

    def watched(self: DiTMoE, times: list[float], labels: Tensor) -> Callable[..., Tensor]:
        inner = prepared(self, times, labels)

        def predict(x: Tensor, t: float, observer: None = None) -> Tensor:
            seen.append((x, t, labels))
            return inner(x, t, observer)

        return predict

    monkeypatch.setattr(DiTMoE, "prepared", watched)
    load = Load(batch=5, repeats=2, cfg=cfg)
    result = bench(checkpoint, load)
    assert len(seen) == WARM_UPS + 2 and len(result.seconds) == 2
    for x, times, labels in seen:
        assert torch.equal(x, seen[0][0])
        assert len(x) == load.rows == (5 if cfg == 1 else 10)
        assert times == t
        assert labels.tolist() == [0, 1, 2, 0, 1] + ([] if cfg == 1 else [3] * 5)
    assert result.to_json()["conditions"]["t"] == t


def test_noise_belongs_to_seed_and_image(tmp_path: Path) -> None:
    model = build_model(saved(make_pico(), tmp_path), CPU)
    three, two, other = (denoising_step(model, Load(batch=n, seed=s))() for n, s in ((3, 4), (2, 4), (2, 5)))
    assert three.shape == (3, model.config.out_channels, 8, 8)
    assert torch.equal(three, denoising_step(model, Load(batch=3, seed=4))())
    assert torch.allclose(three[:2], two, atol=1e-5)
    assert not torch.allclose(two, other, atol=1e-2)


def test_what_does_not_depend_on_the_machine_is_equal_twice(tmp_path: Path) -> None:
    checkpoint = saved(packed(make_pico(), "nf4"), tmp_path)
    one, two = (bench(checkpoint, Load(batch=2, repeats=1)).to_json() for _ in range(2))
    assert one["bytes"] == two["bytes"]
    assert one["conditions"] == two["conditions"]


def test_the_least_time_counts() -> None:
    sizes = Sizes(10, dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0))
    result = Bench(
        Load(batch=6), 0.5, Footprint(1, sizes, sizes, Buffer(0, None)), Memory(1, 2, 3), {1: (0.5, 0.25, 2.0)}
    )
    document = result.to_json()
    assert document["seconds"] == 0.25
    assert document["images_per_second"] == 24


def test_the_fastest_number_of_threads_counts() -> None:
    sizes = Sizes(10, dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0))
    timed = {4: (0.5, 0.25), 2: (0.125, 2.0), 1: (0.125,)}
    result = Bench(Load(batch=6), 0.5, Footprint(1, sizes, sizes, Buffer(0, None)), Memory(1, 2, 3), timed)
    document = result.to_json()
    assert document["seconds"] == 0.125 and document["conditions"]["threads"] == 1, "of equally fast ones the fewest"
    assert document["seconds_by_threads"] == {"4": 0.25, "2": 0.125, "1": 0.125}


@pytest.mark.parametrize(("most", "counts"), [(1, (1,)), (2, (2, 1)), (6, (6, 3, 1)), (64, (64, 32, 16, 8, 4, 2, 1))])
def test_a_number_of_threads_and_its_halves_are_tried(most: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(most) == counts


def test_threads_are_tried_in_turn_and_left_as_they_were(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), []
    for count in in_turn((2, 1)):
        seen.append((count, torch.get_num_threads()))
    assert seen == [(2, 2), (1, 1)] and torch.get_num_threads() == before
    load = Load(batch=1, repeats=2, threads=(2, 1))
    result = bench(saved(make_pico(), tmp_path), load)
    assert {count: len(seconds) for count, seconds in result.timed.items()} == {2: 2, 1: 2}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "load", [Load(batch=0), Load(repeats=0), Load(cfg=-1.0), Load(cfg=math.inf), Load(cfg=math.nan)]
)
def test_values_out_of_range(load: Load) -> None:
    with pytest.raises(UsageError, match=r"(batch 0|repeats 0|cfg)"):
        check_load(load, make_pico().config)


def test_a_model_without_a_null_class_is_timed_without_guidance() -> None:
    config = make_pico(null_class=False).config
    assert check_load(Load(cfg=1.0), config) == Load(cfg=1.0)
    with pytest.raises(UsageError, match="no null class"):
        check_load(Load(cfg=1.5), config)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    broken = make_pico().with_state(final_layer__linear__bias=torch.full((32,), math.nan))
    with pytest.raises(BadInputError, match=r"final_layer\.linear\.bias"):
        bench(saved(broken, tmp_path), Load())


# memory


def footed(weights: int, buffer: int) -> Footprint:
    sizes = Sizes(weights, dict.fromkeys(KINDS, 0), dict.fromkeys(GROUPS, 0))
    return Footprint(0, sizes, sizes, Buffer(buffer, "x" if buffer else None))


@pytest.mark.parametrize(
    ("memory", "growth", "beyond", "needed"),
    [
        (Memory(100, 170, 250), 150, 40, 150),
        (Memory(100, 100, 120), 20, -90, 110),  # weights of a mapped file
        (Memory(None, None, None), None, None, 110),
    ],
)
def test_needed_is_never_below_weights_and_buffer(
    memory: Memory, growth: int | None, beyond: int | None, needed: int
) -> None:
    result = Bench(Load(), 0.5, footed(80, 30), memory, {1: (1.0,)})
    document = result.to_json()["memory"]
    assert (document["growth"], document["beyond"], document["needed"]) == (growth, beyond, needed)


def test_a_system_without_proc_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "resident_bytes", lambda: None)
    result = bench(saved(make_pico(), tmp_path), Load(repeats=1))
    assert result.memory == Memory(None, None, None)
    assert result.needed == result.footprint.least
    assert result.to_json()["memory"]["beyond"] is None


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
