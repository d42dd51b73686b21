"""``ditmoe bench`` as a command: all kinds of checkpoints, pipes, the gate, and memory of processes of its own."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from cli_helpers import Outcome, contents, here, on_terminal, outside, piped
from conftest import make_pico

from ditmoe_cli.cli.commands.bench import ratio_text, seconds_text
from ditmoe_cli.evaluation import bench as benching
from ditmoe_cli.evaluation import memory_use
from ditmoe_cli.evaluation.bench import Spread
from ditmoe_cli.evaluation.memory_use import GROUPS, KINDS, resident_bytes
from ditmoe_cli.evaluation.step_parts import OTHER, PARTS
from ditmoe_cli.model.dit import DiTMoE

SETTINGS = ("--batch", 2, "--repeats", 1)
FILES = {
    "plain": "a.safetensors",
    "nf4": "nf4.safetensors",
    "int8": "int8.safetensors",
    "sliced": "slice.safetensors",
    "ghosted": "ghost.safetensors",
    "merged": "merged.safetensors",
    "svd": "svd.safetensors",
    "ternary": "ternary.safetensors",
    "unequal": "unequal.safetensors",
    "pickle": "a.pt",
    "shards": "shards",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in every form that the other commands give it."""
    folder = tmp_path_factory.mktemp("bench")
    pico = make_pico(sampler="rf", in_channels=1, seed=3)
    pico.save(folder / "a.safetensors")
    pico.save(folder / "shards", shard_bytes=50_000)
    pico.save_pt(folder / "a.pt", num_heads=2, image_size=64)
    widths = ((64, 40, 8), (16, 64, 32))
    make_pico(sampler="rf", in_channels=1, widths=widths, experts=3).save(folder / "unequal.safetensors")
    calibrate = ("--images", 2, "--steps", 2, "--bins", 1, "-o", "p.safetensors")
    assert here("profile-experts", "a.safetensors", *calibrate, cwd=folder).code == 0
    prune = ("prune", "a.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--router")
    merge = ("merge", "a.safetensors", "--profile", "p.safetensors")
    for name, words in {
        "nf4": ("quantize", "a.safetensors", "--uniform", "--bits", 4),
        "int8": ("quantize", "a.safetensors", "--uniform", "--bits", 8),
        "slice": (*prune, "slice"),
        "ghost": (*prune, "ghost"),
        "merged": (*merge, "--groups", 2, "--no-refit"),
        "svd": (*merge, "--delta", "svd"),
        "ternary": (*merge, "--delta", "ternary"),
    }.items():
        outcome = here(*words, "-o", f"{name}.safetensors", cwd=folder)
        assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def benched(made: Path) -> Callable[[str], Outcome]:
    """Measure a checkpoint by its name in `FILES`, once for all tests, and hold that nothing is written."""

    @cache
    def measured(name: str) -> Outcome:
        before = contents(made)
        heads = ("--heads", 2) if name == "pickle" else ()
        outcome = here("bench", FILES[name], *SETTINGS, *heads, "--cfg", 1.5, cwd=made)
        assert contents(made) == before, "nothing is written"
        return outcome

    return measured


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_checkpoint(name: str, made: Path, benched: Callable[[str], Outcome]) -> None:
    outcome = benched(name)
    result, envelope = outcome.result, outcome.envelope
    assert envelope["checkpoint"] == envelope["original"] == str(made / FILES[name])
    assert [step["command"] for step in envelope["history"]] == ["bench"]
    sizes = result["bytes"]
    files = list((made / "shards").glob("*.safetensors")) if name == "shards" else [made / FILES[name]]
    assert sizes["file"] == sum(file.stat().st_size for file in files), "an index is no weight"
    for side in ("weights", "fp32"):
        assert set(sizes[side]["kinds"]) == set(KINDS) and set(sizes[side]["groups"]) == set(GROUPS)
        for by in ("kinds", "groups"):
            assert sum(sizes[side][by].values()) == sizes[side]["total"]
    is_packed = name in ("nf4", "int8")
    assert (sizes["ratio"] < 1) is is_packed
    assert (sizes["buffer"]["bytes"] > 0) is (sizes["buffer"]["name"] is not None) is is_packed
    assert result["memory"]["needed"] >= sizes["weights"]["total"] + sizes["buffer"]["bytes"]
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"])
    assert result["conditions"] == {
        "batch": 2,
        "repeats": 1,
        "cfg": 1.5,
        "seed": 0,
        "device": "cpu",
        "t": 0.5,
        "threads": torch.get_num_threads(),
        "waiting": benching.waiting(),
        "dtype": "fp32",
        "clock": "wall",
    }
    parts = result["parts"]
    assert set(parts["seconds"]) == set(parts["shares"]) == {*PARTS, OTHER}
    assert sum(parts["seconds"].values()) == pytest.approx(parts["traced_seconds"])
    assert sum(parts["shares"].values()) == pytest.approx(1)
    assert all(seconds > 0 for seconds in parts["seconds"].values())
    assert result["flops_per_second"] == pytest.approx(result["flops"] / result["seconds"])
    assert result["share_of_peak"] == pytest.approx(result["flops_per_second"] / result["peak_flops_per_second"])
    assert result["difference"] is None


@pytest.mark.parametrize(
    ("given", "waiting"),
    [({"GOMP_SPINCOUNT": "1000"}, "spin 1000"), ({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}, "passive")],
)
def test_how_threads_wait_is_said(given: dict[str, str], waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert benching.waiting() == waiting


def test_experts_that_are_gone_take_no_memory(benched: Callable[[str], Outcome]) -> None:
    sizes = {name: benched(name).result["bytes"] for name in FILES}
    experts = {name: found["weights"]["groups"]["experts"] for name, found in sizes.items()}
    assert experts["sliced"] == experts["ghosted"] == experts["merged"] == experts["plain"] // 2
    assert experts["svd"] == experts["ternary"] == experts["plain"], "differences are put together to run"
    assert sizes["svd"]["file"] < sizes["plain"]["file"]
    assert max(experts["nf4"], experts["int8"]) < experts["plain"]
    assert sizes["shards"]["weights"] == sizes["plain"]["weights"]


def test_the_envelope_through_a_pipe(folder: Path) -> None:
    through = piped(
        "ditmoe quantize a.safetensors --uniform --bits 8 -o q.safetensors | ditmoe bench --batch 2", folder
    )
    given = here("bench", "q.safetensors", "--batch", 2, cwd=folder)
    assert through.envelope["checkpoint"] == str(folder / "q.safetensors")
    assert through.envelope["original"] == str(folder / "a.safetensors")
    assert [step["command"] for step in through.envelope["history"]] == ["quantize", "bench"]
    assert through.result["bytes"] == given.result["bytes"]
    again = here("inspect", cwd=folder, stdin=through.out)
    assert again.envelope["checkpoint"] == through.envelope["checkpoint"], "it hands its checkpoint on"


def test_the_gate_prints_first(folder: Path) -> None:
    words = ("bench", "a.safetensors", *SETTINGS, "--max-memory")
    assert here(*words, "1TB", cwd=folder).code == 0
    outcome = here(*words, "1kB", cwd=folder)
    assert outcome.code == 6
    needed = outcome.result["memory"]["needed"]
    assert re.search(
        rf"ditmoe: error: running takes {needed:,} bytes, above --max-memory 1kB \(1,000 bytes\)", outcome.err
    )
    silent = here(*words, "1kB", "-q", cwd=folder)
    assert (silent.code, silent.out) == (6, "")
    assert here(*words, "1TB", "-q", cwd=folder).out == ""


def test_the_gate_is_at_what_is_needed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_use, "resident_bytes", lambda: None)
    words = ("bench", "nf4.safetensors", *SETTINGS)
    result = here(*words, cwd=folder).result
    assert [result["memory"][name] for name in ("before", "loaded", "peak", "growth", "beyond")] == [None] * 5
    needed = result["bytes"]["weights"]["total"] + result["bytes"]["buffer"]["bytes"]
    assert result["memory"]["needed"] == needed
    assert here(*words, "--max-memory", f"{needed}B", cwd=folder).code == 0
    assert here(*words, "--max-memory", f"{needed - 1}B", cwd=folder).code == 6


def test_the_sampler_can_be_given(folder: Path) -> None:
    result = here("bench", "a.safetensors", *SETTINGS, "--sampler", "ddpm", cwd=folder).result
    assert result["conditions"]["t"] == 500


def test_out_of_memory_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiTMoE, "patches", lambda *_: torch.empty(1 << 50))
    assert here("bench", "a.safetensors", cwd=folder).error(1) == "out of memory; try a smaller --batch"


def test_what_is_kept_is_told_apart_from_what_is_needed(folder: Path) -> None:
    none, some, all_ = (
        here("bench", "nf4.safetensors", *SETTINGS, "--weights-memory", memory, cwd=folder).result["memory"]
        for memory in ("0", "10KiB", "auto")
    )
    assert none["kept"] == 0 < some["kept"] <= 10 * 1024 < all_["kept"]
    plain = here("bench", "a.safetensors", *SETTINGS, cwd=folder).result["memory"]
    assert plain["kept"] == 0


def test_a_terminal_gets_a_table(folder: Path) -> None:
    code, text = on_terminal("bench", "nf4.safetensors", *SETTINGS, cwd=folder, NO_COLOR="1")
    assert code == 0
    for line in (
        r"weights +\d+\.\d\d kB, 0\.\d{3} of fp32$",
        r"by kind +packed \S+ kB, scales \S+ kB, plain \S+ kB$",
        r"by group +experts .*, shared .*, attention .*, rest ",
        r"unpacked at a time +\S+ kB \((blocks\.0|t_embedder|final_layer)\.\S+\.weight\)$",
        r"private memory +.* before loading, .* after, .* at its peak$",
        r"step +\S+ m?s for 2 images, one branch, on cpu, 1 thread in fp32$",
        r"images per second +\d",
        r"speed +\S+ GFLOP/s, \d+% of \S+ GFLOP/s in fp32, of a large product$",
        r"parts of a step +attention \S+ m?s \d+%, router .*, experts .*, shared .*, other \S+ m?s \d+%$",
    ):
        assert re.search(line, text, re.MULTILINE), (line, text)
    assert "{" not in text
    code, text = on_terminal("bench", "nf4.safetensors", *SETTINGS, "--json", cwd=folder)
    assert json.loads(text[text.index("{") :])["result"]["conditions"]["batch"] == 2


def test_several_checkpoints_are_measured_side_by_side(folder: Path) -> None:
    files = ("a.safetensors", "nf4.safetensors")
    before = contents(folder)
    outcome = here("bench", *files, *SETTINGS, "--cfg", 2, cwd=folder)
    result = outcome.result
    assert contents(folder) == before, "nothing is written"
    assert outcome.envelope["checkpoint"] is None, "there is no one checkpoint to go on with"
    assert result["interleaved"] is True
    assert [file["path"] for file in result["files"]] == [str(folder / name) for name in files]
    assert result["files"][0]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0, "least": 1.0}
    single = {name: here("bench", name, *SETTINGS, "--cfg", 2, cwd=folder).result for name in files}
    for name, file in zip(files, result["files"], strict=True):
        assert file["ratio"]["median"] == pytest.approx(file["seconds"] / result["files"][0]["seconds"])
        assert set(file) == {*single[name], "path", "ratio"}
        assert file["bytes"] == single[name]["bytes"]
        assert file["flops"] == single[name]["flops"]


def test_several_checkpoints_make_two_tables(folder: Path) -> None:
    shutil.copy(folder / "nf4.safetensors", folder / "shards")
    words = ("bench", "a.safetensors", "shards/nf4.safetensors", *SETTINGS, "--text")
    lines = here(*words, cwd=folder).out.splitlines()
    assert len(lines) == 8
    assert re.match(
        r"file +step +median +ratio to the first +images/s +weights +needed +GFLOP/s +of peak +an image +NFE$", lines[0]
    )
    assert re.match(r"a\.safetensors +\S+ m?s +\S+ m?s +1 +\d", lines[1])
    assert re.match(r"nf4\.safetensors +\S+ m?s +\S+ m?s +\d+\.\d{3} \(\d\S+ to \d\S+\) +\d", lines[2])
    assert re.match(r"measured +2 images, one branch, on cpu, 1 thread in fp32; 1 round in turn$", lines[3])
    assert re.match(
        r"parts of a step +attention +router +permutation +experts +shared +modulation +head +other", lines[4]
    )
    assert [line.split()[0] for line in lines[5:]] == ["a.safetensors", "nf4.safetensors", "peak"]
    words = ("bench", "nf4.safetensors", "shards/nf4.safetensors", *SETTINGS, "--text")
    lines = here(*words, cwd=folder).out.splitlines()
    assert lines[1].startswith(str(folder / "nf4.safetensors")), "files of one name are told apart by their paths"


@pytest.mark.slow
def test_checkpoints_that_do_not_fit_together_follow_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "available_bytes", lambda _: 1000.0)
    outcome = here("bench", "a.safetensors", "nf4.safetensors", *SETTINGS, "--text", cwd=folder)
    assert "do not fit in memory together: each was timed after the other" in outcome.err
    assert "1 time one after the other" in outcome.out
    assert here("bench", "a.safetensors", "nf4.safetensors", *SETTINGS, cwd=folder).result["interleaved"] is False


def test_the_gate_of_ratios(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle((2.0, 3.0))
    monkeypatch.setattr(benching, "_seconds", lambda *_: next(seconds))
    monkeypatch.setattr(benching, "rounds", lambda checkpoints, count: [list(range(checkpoints))] * count)
    words = ("bench", "a.safetensors", "nf4.safetensors", *SETTINGS, "--max-ratio")
    assert here(*words, 1.5, cwd=folder).code == 0
    outcome = here(*words, 1.4, cwd=folder)
    assert outcome.code == 6 and outcome.result["files"][1]["ratio"]["median"] == 1.5
    than = rf"1\.5 times as long as one of {folder / 'a.safetensors'}, above --max-ratio 1\.4"
    assert re.search(rf"ditmoe: error: {folder / 'nf4.safetensors'}: a step takes {than}", outcome.err)
    alone = here("bench", "a.safetensors", "--max-ratio", 2, cwd=folder)
    assert alone.error(2) == "--max-ratio has no effect with one checkpoint; give OTHERS"
    assert "--max-ratio 0.0: give a ratio above 0" in here(*words, 0, cwd=folder).error(2)


def test_the_gate_of_memory_names_which_of_several(folder: Path) -> None:
    outcome = here("bench", "nf4.safetensors", "a.safetensors", *SETTINGS, "--max-memory", "1kB", cwd=folder)
    assert outcome.code == 6 and f"{folder / 'nf4.safetensors'}: running takes" in outcome.err


def test_processor_time_is_that_of_one_thread(folder: Path) -> None:
    result = here("bench", "a.safetensors", *SETTINGS, "--processor-time", cwd=folder).result
    assert (result["conditions"]["clock"], result["conditions"]["threads"]) == ("processor", 1)
    assert result["seconds"] > 0
    refused = here("bench", "a.safetensors", "--processor-time", "--threads", 2, cwd=folder).error(2)
    assert refused.startswith("--processor-time times one thread of the CPU")


@pytest.mark.slow
def test_a_dtype_is_measured_against_fp32(folder: Path) -> None:
    words = ("bench", "a.safetensors", "nf4.safetensors", *SETTINGS, "--dtype", "bf16")
    files = here(*words, cwd=folder).result["files"]
    for file in files:
        assert file["conditions"]["dtype"] == "bf16"
        assert 0 < file["difference"]["prediction"] < 0.1 and 0 <= file["difference"]["rerouted"] < 0.2
    text = here(*words, "--text", cwd=folder).out
    assert re.search(r"^measured .* on cpu, 1 thread in bf16; ", text, re.MULTILINE)
    assert re.search(r"^nf4\.safetensors against fp32 +prediction 0\.\d+ off, \d+\.\d\d% of tokens", text, re.MULTILINE)
    alone = here("bench", "a.safetensors", *SETTINGS, "--dtype", "bf16", "--text", cwd=folder).out
    assert re.search(r"^against fp32 +prediction 0\.\d+ off", alone, re.MULTILINE)
    assert "against fp32" not in here("bench", "a.safetensors", *SETTINGS, "--text", cwd=folder).out


def test_durations_and_ratios_are_short() -> None:
    assert [seconds_text(seconds) for seconds in (0.0123456, 0.9, 12.3456)] == ["12.35 ms", "900 ms", "12.35 s"]
    assert ratio_text(Spread(1.0, 1.0, 1.0, 1.0)) == "1"
    assert ratio_text(Spread(1.23456, 1.2, 1.3, 1.2)) == "1.235 (1.200 to 1.300)"


@pytest.mark.slow
@pytest.mark.skipif(resident_bytes() is None, reason="no /proc here")
def test_packed_weights_take_less_memory_than_plain_ones(tmp_path: Path) -> None:
    """Some 58 MB of weights, and margins of many of them for allocators."""
    make_pico(hidden=256, depth=4, experts=8, sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    assert here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "b.safetensors", cwd=tmp_path).code == 0
    plain, packed = (outside("bench", f"{name}.safetensors", *SETTINGS, cwd=tmp_path).result for name in "ab")
    weights = plain["bytes"]["weights"]["total"]
    assert weights > 50_000_000
    assert packed["bytes"]["fp32"] == plain["bytes"]["fp32"]
    for result in (plain, packed):
        memory = result["memory"]
        assert 0 < memory["before"] < memory["loaded"] <= memory["peak"]
        least = result["bytes"]["weights"]["total"] + result["bytes"]["buffer"]["bytes"]
        assert memory["growth"] == memory["peak"] - memory["before"]
        assert memory["beyond"] == memory["growth"] - least
    assert plain["memory"]["growth"] > 0.8 * weights
    assert packed["memory"]["growth"] < 0.6 * weights
