"""``ditmoe compress``: a size that is kept to, ties with their price, what upstream loads, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import slow_but
from cli_helpers import Outcome, bytes_of, here, outputs, piped
from compressing import compress_in_few_trials
from conftest import make_pico
from healing import heal_on_few_states
from torch import Tensor

from ditmoe_cli.cli.costs import error_rows
from ditmoe_cli.exporting.targets import TARGETS
from ditmoe_cli.exporting.upstream import obstacle
from ditmoe_cli.files import pacing, streaming, writer
from ditmoe_cli.files.names import MATRICES, in_expert
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint

SETTINGS = ("--images", 8, "--steps", 2, "--bins", 2)
SMALL: dict[str, Any] = {"sampler": "rf", "in_channels": 1, "input_size": 4, "hidden": 32}
COMPRESS = ("compress", "a.safetensors", "--profile", "p.safetensors")
COPY = "a.compress-ratio0.3.safetensors"
UNEVEN = ((64, 32, 64, 96), (64,) * 4)


@dataclass(frozen=True)
class Made:
    """Checkpoints and their profiles in a folder, and how the compression of one of them ended."""

    folder: Path
    written: Outcome


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One of even experts, with what was measured for its copy of 0.3, and one of several widths.

    What is measured is kept beside the profile, and so measured once for all tests.
    """
    folder = tmp_path_factory.mktemp("compress") / "folder"
    folder.mkdir()
    make_pico(**SMALL, experts=3, widths=((64,) * 3,) * 2).save(folder / "a.safetensors")
    make_pico(**SMALL, widths=UNEVEN).save(folder / "uneven.safetensors")
    with pytest.MonkeyPatch.context() as monkeypatch:
        compress_in_few_trials(monkeypatch)
        for name, profile in (("a", "p"), ("uneven", "uneven.profile")):
            words = ("profile-experts", f"{name}.safetensors", *SETTINGS, "-o", f"{profile}.safetensors")
            assert here(*words, cwd=folder).code == 0
        written = here(*COMPRESS, "--ratio", 0.3, cwd=folder)
        assert written.code == 0, written.err
    return Made(folder, written)


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "folder"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process."""
    compress_in_few_trials(monkeypatch)


def alike(checkpoint: Checkpoint) -> list[tuple[set[int], list[set[str]]]]:
    """Of each block, the widths of its experts, and the formats of each kind of matrix, from headers."""
    found = []
    for index, block in enumerate(checkpoint.config.blocks):
        of_matrices = []
        for matrix in MATRICES:
            names = [in_expert(index, number, f"{matrix}.weight") for number in range(len(block.expert_widths))]
            weights = [checkpoint.weights[name] for name in names]
            of_matrices.append({str(weight.format or weight.info.dtype) for weight in weights})
        found.append((set(block.expert_widths), of_matrices))
    return found


def test_a_size_is_kept_to_and_the_file_is_what_the_dry_run_said(folder: Path, made: Made) -> None:
    written = made.written
    (folder / COPY).unlink()  # or the dry run would tell of it
    predicted = here(*COMPRESS, "--ratio", 0.3, "--dry-run", cwd=folder)
    assert predicted.result["bytes"] <= 0.3 * (folder / "a.safetensors").stat().st_size
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    assert written.path.name == COPY
    assert 0 < written.result["tried_error"] < 1 and 0 < written.result["prediction_error"] < 1
    assert "untied_error" not in written.result
    sampled = here("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
    assert sampled.code == 0, sampled.err
    shutil.copy(made.folder / COPY, folder)
    again = here(*COMPRESS, "--ratio", 0.3, cwd=folder)
    assert again.result["up_to_date"] is True and again.result["kept"] == written.result["kept"]
    assert again.result["widths"] == written.result["widths"]
    counted, known = (
        {group: sum(counts.values()) for group, counts in each.result["formats_by_group"].items()}
        for each in (again, written)
    )
    assert counted == known
    notes = written.notes
    assert len(notes) == len(set(notes)) and not any("going on" in note for note in notes), notes


@pytest.mark.slow
def test_stacked_experts_are_alike_in_each_block(folder: Path) -> None:
    """Whatever widths they had; the profile is found beside the checkpoint."""
    written = here("compress", "uneven.safetensors", "--ratio", 0.3, "--tie", "stack", cwd=folder)
    result = written.result
    assert 0 < result["untied_error"] <= result["predicted_error"]
    for widths, formats in alike(open_checkpoint(written.path)):
        assert len(widths) == 1 and all(len(each) == 1 for each in formats)
    assert written.path.name == "uneven.compress-ratio0.3-stack.safetensors"
    assert dict(error_rows(result))["price of --tie"].startswith("predicted ")


@pytest.mark.slow
def test_tied_matrices_take_one_format(folder: Path) -> None:
    written = here(*COMPRESS, "--ratio", 0.25, "--tie", "gate,up", "--allow", "2,4,8", cwd=folder)
    assert 0 < written.result["untied_error"] <= written.result["predicted_error"]
    weights = open_checkpoint(written.path).weights
    gates = {name: weight.format for name, weight in weights.items() if name.endswith("gate_proj.weight")}
    assert gates and all(weights[name.replace("gate", "up")].format == fmt for name, fmt in gates.items())


def test_experts_of_several_dtypes_are_not_stacked(folder: Path) -> None:
    pico = make_pico(**SMALL)
    pico.state["blocks.1.moe.experts.2.up_proj.weight"] = pico.state["blocks.1.moe.experts.2.up_proj.weight"].half()
    pico.save(folder / "mixed.safetensors")
    said = here("compress", "mixed.safetensors", "--ratio", 0.3, "--tie", "stack", cwd=folder).error(3)
    assert "block 1" in said and "F16 and F32" in said


@pytest.mark.parametrize("target", slow_but(["bitsandbytes"], ["compressed-tensors", "bitsandbytes", "sdnq"]))
def test_a_target_holds_what_is_planned_for_it(target: str, folder: Path) -> None:
    written = here(*COMPRESS, "--ratio", 0.3, "--target", target, cwd=folder)
    result = written.result
    assert result["bytes"] <= 0.3 * (folder / "a.safetensors").stat().st_size
    assert 0 < result["free_error"] <= result["predicted_error"]
    assert dict(error_rows(result))["price of --target"].startswith("predicted ")
    assert written.path.name == f"a.compress-ratio0.3-{target}.safetensors"
    assert TARGETS[target].obstacle(open_checkpoint(written.path)) is None
    exported = here("export", written.path, "--to", target, "-o", "out", cwd=folder)
    assert exported.code == 0, exported.err
    assert any(result["formats"])


def test_what_upstream_loads(folder: Path) -> None:
    words = ("compress", "a.safetensors", "--ratio", 0.8, "--target", "upstream", "-o", "u.safetensors")
    written = here(*words, "--profile", "p.safetensors", cwd=folder)
    before, after = (open_checkpoint(folder / name) for name in ("a.safetensors", "u.safetensors"))
    assert obstacle(after.config) is None and written.result["bytes"] <= 0.8 * before.header.file_bytes
    assert all(weight.format is None for weight in after.weights.values())
    assert {len(block.expert_widths) for block in after.config.blocks} == {written.result["experts"]}
    assert {width for block in after.config.blocks for width in block.expert_widths} == {written.result["width"]}
    assert 0 < written.result["free_tried_error"] < written.result["tried_error"] < 2
    assert dict(error_rows(written.result))["price of --target"].startswith("tried ")
    converted = here("export", "u.safetensors", "--to", "upstream", "-o", "u.pt", cwd=folder)
    assert converted.code == 0, converted.err
    assert (folder / "u.pt").stat().st_size > 0
    assert here(*words, "--profile", "p.safetensors", cwd=folder).result["up_to_date"] is True


@pytest.mark.parametrize("option", [("--allow", "4"), ("--floor", "attn=4"), ("--tie", "stack"), ("--protect", "attn")])
def test_upstream_takes_no_formats(option: tuple[str, str], folder: Path) -> None:
    said = here(*COMPRESS, "--ratio", 0.8, "--target", "upstream", *option, cwd=folder).error(2)
    assert said.startswith(option[0]) and "--target upstream" in said


def test_what_upstream_cannot_load_in_any_case(folder: Path) -> None:
    make_pico(**SMALL, shared_width=32).save(folder / "b.safetensors")
    words = ("compress", "b.safetensors", "--ratio", 0.8, "--target", "upstream")
    assert "shared expert" in here(*words, cwd=folder).error(3)


def test_a_checkpoint_without_shared_experts_is_refused(folder: Path) -> None:
    """No layout has them of width 0."""
    make_pico(**SMALL, shared_width=0).save(folder / "b.safetensors")
    assert "shared_experts" in refused(folder, 3, "compress", "b.safetensors", "--ratio", 0.5)


def refused(folder: Path, code: int, *words: object) -> str:
    """The line that refuses a command, which leaves everything as it was."""
    before = outputs(folder)
    said = here(*words, cwd=folder).error(code)
    assert outputs(folder) == before
    return said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--size"),
        (("--size", "1MB", "--ratio", 0.5), 2, "--ratio"),
        (("--ratio", 0), 2, "above 0"),
        (("--ratio", 1), 2, "below 1"),
        (("--ratio", "nan"), 2, "above 0"),
        (("--size", "1GB"), 4, "nothing to do"),
        (("--size", "9KB"), 4, "smallest file takes"),
        (("--ratio", 0.1, "--target", "upstream"), 4, "the smallest file that upstream's code loads takes"),
        (("--ratio", 0.3, "--target", "nobody"), 2, "--target"),
        (("--ratio", 0.3, "--target", "bitsandbytes", "--allow", "4,3"), 2, "--allow 3 has no effect with --target"),
        (("--ratio", 0.5, "--tie", "gate"), 2, "--tie"),
        (("--ratio", 0.5, "--tie", "stack,left"), 2, "--tie left"),
        (("--ratio", 0.5, "--protect", "experts,shared,attn,modulation,embedders"), 2, "--protect"),
        (("--ratio", 0.5, "--floor", "attn=4", "--protect", "attn"), 2, "--floor"),
    ],
)
def test_what_cannot_be_asked_for(words: tuple[object, ...], code: int, said: str, folder: Path) -> None:
    assert said in refused(folder, code, *COMPRESS, *words)


def test_the_smallest_size_that_is_named_does(folder: Path) -> None:
    said = refused(folder, 4, *COMPRESS, "--size", "9KB")
    least = int(said.split(" takes ")[1].split(" ")[0].replace(",", ""))
    written = here(*COMPRESS, "--size", f"{least}B", cwd=folder)
    assert written.result["bytes"] <= least


def test_a_dry_run_without_a_profile_names_the_sizes_within_reach(folder: Path) -> None:
    (folder / "p.safetensors").unlink()
    said = refused(folder, 3, "compress", "a.safetensors", "--ratio", 0.5, "--dry-run")
    assert "--profile" in said and "can be reached" in said


def test_a_quantised_checkpoint_is_asked_for_its_original(folder: Path) -> None:
    assert here("quantize", "a.safetensors", "--uniform", "--bits", 4, "-o", "q.safetensors", cwd=folder).code == 0
    said = refused(folder, 3, "compress", "q.safetensors", "--ratio", 0.5)
    assert "compress the checkpoint that it came from" in said


def test_a_fast_profile_does_not_do(folder: Path) -> None:
    fast = ("profile-experts", "a.safetensors", *SETTINGS, "--fast", "-o", "f.safetensors")
    assert here(*fast, cwd=folder).code == 0
    said = refused(folder, 3, "compress", "a.safetensors", "--ratio", 0.5, "--profile", "f.safetensors")
    assert "--fast" in said


def test_values_that_are_not_finite(folder: Path) -> None:
    pico = make_pico(**SMALL)
    pico.state["blocks.1.moe.experts.0.up_proj.weight"][0, 0] = torch.nan
    pico.save(folder / "nan.safetensors")
    said = here("compress", "nan.safetensors", "--ratio", 0.5, cwd=folder).error(3)
    assert "blocks.1.moe.experts.0.up_proj.weight" in said or "NaN" in said


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"sampler": "ddpm", "depth": 1}, marks=pytest.mark.slow),
        pytest.param({"widths": ((4, 6, 7), (3, 5, 4))}, marks=pytest.mark.slow),
        {"widths": ((64,) * 2, (64,) * 4), "expert_of": ((0, 1, -2, -1), (0, 0, 1, 2, 3)), "extras": {"constants": 2}},
    ],
    ids=["ddpm, one block", "narrow", "ghosts, merged and constants"],
)
def test_checkpoints_of_all_kinds(fields: dict[str, Any], tmp_path: Path) -> None:
    make_pico(**{**SMALL, **fields}).save(tmp_path / "m.safetensors")
    profiling = f"ditmoe profile-experts m.safetensors {' '.join(map(str, SETTINGS))}"
    outcome = piped(f"{profiling} | ditmoe compress --ratio 0.5 --allow 4,8", tmp_path)
    assert outcome.result["bytes"] <= 0.5 * (tmp_path / "m.safetensors").stat().st_size
    assert here("inspect", outcome.path, cwd=tmp_path).code == 0


# interruptions

PHASES = ("neurons.state.0", "measured", "tried", "block-*.state.0", "tried-*", "block-*.1", "plan")
"""Pieces behind which a run ends, one after the other: block states are of trials, and then of the final plan."""


class Interrupted(BaseException):
    """What ends a run, as a KeyboardInterrupt would."""


@contextmanager
def interrupted_behind(pattern: str) -> Iterator[list[str]]:
    """Let runs end behind the first piece of that name; yields the names of all that they keep."""
    kept: list[str] = []
    write = WorkFolder.write

    def until(self: WorkFolder, name: str, tensors: Mapping[str, Tensor], document: Any = None) -> None:
        write(self, name, tensors, document)
        kept.append(name)
        if fnmatch(name, pattern):
            raise Interrupted

    with mock.patch.object(pacing, "WORK_PER_KEEPING", 0.0), mock.patch.object(WorkFolder, "write", until):
        yield kept


def forget(folder: Path) -> None:
    """Delete the measurements of a profile and the copy that came with it."""
    for name in ("p.measured.json", "p.neurons.safetensors", COPY):
        (folder / name).unlink()


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_each_phase_goes_on_to_the_same_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*COMPRESS, "--ratio", 0.3)
    expected, before = (folder / COPY).read_bytes(), outputs(folder)
    forget(folder)
    seen: list[str] = []
    for phase in PHASES:
        with pytest.raises(Interrupted), interrupted_behind(phase) as kept:
            here(*words, cwd=folder)
        assert not set(kept) & {name for name in seen if name.startswith(("neurons", "tried-"))}, "done once"
        assert not (folder / COPY).exists()
        seen += kept
    with monkeypatch.context() as writing, pytest.raises(Interrupted):
        writing.setattr(streaming, "write_at", mock.Mock(side_effect=Interrupted))
        writing.setattr(writer, "write_at", mock.Mock(side_effect=Interrupted))
        here(*words, cwd=folder)
    done = here(*words, cwd=folder)
    assert done.code == 0 and not any("trying plan" in note for note in done.notes), done.err
    assert (folder / COPY).read_bytes() == expected
    assert set(outputs(folder)) == set(before), "nothing but what is measured is left"


@pytest.mark.slow
def test_healing_keeps_to_the_size_and_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heal_on_few_states(monkeypatch)
    make_pico(**SMALL).save(tmp_path / "m.safetensors")
    profiling = f"ditmoe profile-experts m.safetensors {' '.join(map(str, SETTINGS))}"
    words = "--ratio 0.5 --allow 4,8 --heal --minutes 0.001"
    outcome = piped(f"{profiling} | ditmoe compress {words}", tmp_path)
    assert outcome.path.name == "m.compress-ratio0.5-allow4,8-heal0.001min.safetensors"
    assert outcome.result["bytes"] <= 0.5 * (tmp_path / "m.safetensors").stat().st_size
    assert len(outcome.result["held_error"]) == 2 and outcome.result["retraining"]["minutes"] == 0.001
    (step,) = open_checkpoint(outcome.path).provenance().history
    assert (step.command, step.options["heal"]) == ("compress", True)
    again = piped(f"{profiling} | ditmoe compress {words}", tmp_path)
    assert again.result["up_to_date"] and again.result["retraining"]["minutes"] == 0.001
    clock = ",".join(text.strip() for text in step.measured["clock"])
    assert piped(f"{profiling} | ditmoe compress {words} --clock 8,1,2,0,3,2,0", tmp_path).code == 5
    chosen = piped(f"{profiling} | ditmoe compress {words} --clock {clock} -o chosen.safetensors", tmp_path)
    assert chosen.path.read_bytes() == outcome.path.read_bytes(), "the clock chose all that time decides"
    assert not list(tmp_path.glob(".*"))
