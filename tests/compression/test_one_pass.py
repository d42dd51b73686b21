"""The one pass: bytes as of a checkpoint that was read before, no byte hashed twice, and claims found out in time."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.api import conversion_runs, plan_application, planner_runs
from ditmoe_cli.compression.output import PlannedOutput, planned_output
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.files import streaming, writer
from ditmoe_cli.model.checkpoint import UNREAD, Checkpoint, open_checkpoint

COMMANDS = {
    "convert": ("convert", "a.safetensors"),
    "convert --dtype": ("convert", "a.safetensors", "--dtype", "bf16"),
    "convert --dequantize": ("convert", "packed.safetensors", "--dequantize"),
    "convert fp64": ("convert", "wide.pt", "--dtype", "bf16"),
    "quantize": ("quantize", "a.safetensors", "--uniform", "--format", "nf4"),
    "quantize shards": ("quantize", "shards", "--uniform", "--bits", "4"),
    "quantize pt": ("quantize", "a.pt", "--uniform", "--format", "int8"),
    "prune": ("prune", "a.safetensors", "--keep", 2, "--no-refit", "--profile", "p.safetensors"),
    "prune at random": ("prune", "a.safetensors", "--keep", 2, "--no-refit", "--method", "random"),
    "apply": ("apply", "a.safetensors", "--plan", "plan.json"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in several containers, the profiles of two, and the plans of both."""
    folder = tmp_path_factory.mktemp("one_pass")
    for name, seed in (("a", 0), ("other", 1)):
        pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, seed=seed)
        pico.save(folder / f"{name}.safetensors")
        words = (
            "--images",
            2,
            "--steps",
            2,
            "--bins",
            2,
            "--cfg",
            1.5,
            "-o",
            f"{'p' if name == 'a' else 'q'}.safetensors",
        )
        assert here("profile-experts", f"{name}.safetensors", *words, cwd=folder).code == 0
        plan = here(
            "prune", f"{name}.safetensors", "--keep", 2, "--no-refit", "--method", "random", "--dry-run", cwd=folder
        )
        (folder / ("plan.json" if name == "a" else "others.json")).write_text(plan.out)
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3)
    pico.save(folder / "shards", shard_bytes=20_000)
    pico.save_pt(folder / "a.pt", "train", num_experts=3, num_heads=2)
    doubled = {name.replace(".", "__"): value.double() for name, value in pico.state.items()}
    pico.with_state(**doubled).save_pt(folder / "wide.pt", "train", num_experts=3, num_heads=2)
    packed = ("quantize", "a.safetensors", "--uniform", "--format", "nf4", "-o", "packed.safetensors")
    assert here(*packed, cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.mark.parametrize(("name", "threads"), [(name, 1 + i % 2) for i, name in enumerate(COMMANDS)])
def test_a_checkpoint_that_is_read_while_writing_gives_the_bytes_of_one_that_was_read_before(
    name: str, threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "usable_threads", lambda: threads)
    late = here(*COMMANDS[name], "-o", "late.safetensors", cwd=folder)
    for module in (planner_runs, conversion_runs, plan_application):
        monkeypatch.setattr(module, "unread", lambda checkpoint, *_: checkpoint)
    early = here(*COMMANDS[name], "-o", "early.safetensors", cwd=folder)
    assert late.result["plan_digest"] == early.result["plan_digest"]
    assert (folder / "late.safetensors").read_bytes() == (folder / "early.safetensors").read_bytes()


@pytest.mark.parametrize("name", COMMANDS)
def test_no_byte_is_hashed_twice(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of the input once, and each of the output that is no copy of it."""
    hashed: list[int] = []

    class Counting:
        def __init__(self) -> None:
            self.hash = hashlib.sha256()

        def update(self, data: memoryview) -> None:
            hashed.append(data.nbytes)
            self.hash.update(data)

        def hexdigest(self) -> str:
            return self.hash.hexdigest()

    source = open_checkpoint(folder / str(COMMANDS[name][1]))
    monkeypatch.setattr(streaming, "sha256", Counting)
    monkeypatch.setattr(writer, "sha256", Counting)
    assert here(*COMMANDS[name], "-o", "out.safetensors", cwd=folder).code == 0
    monkeypatch.undo()
    assert source.fingerprint
    made = open_checkpoint(folder / "out.safetensors")
    assert made.fingerprint
    copies = Counter(source.hashes.values())
    new = [info.nbytes for info in made.header.tensors.values() if not copies[made.hashes[info.name]]]
    assert sum(hashed) == sum(info.nbytes for info in source.header.tensors.values()) + sum(new)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("prune", "--keep", 2, "--no-refit", "--profile", "q.safetensors"), "is the profile of another checkpoint"),
        (("prune", "--keep", 2, "--profile", "q.safetensors"), "is the profile of another checkpoint"),
        (("apply", "--plan", "others.json"), "the plan is for another checkpoint"),
    ],
)
def test_a_profile_or_plan_of_another_checkpoint_leaves_nothing(
    words: tuple[str, ...], reason: str, folder: Path
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    command, *options = words
    assert reason in here(command, "a.safetensors", *options, "-o", "out.safetensors", cwd=folder).error(3)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_plan_that_the_metadata_speaks_against_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner_runs, "carry_out", lambda *_: pytest.fail("it is written"))
    words = ("apply", "packed.safetensors", "--plan", "plan.json", "-o", "out.safetensors")
    assert "the plan is for another checkpoint" in here(*words, cwd=folder).error(3)


def test_an_output_is_laid_out_once_before_it_is_read_and_once_after(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out: list[str] = []

    def counting(checkpoint: Checkpoint, plan: CompressionPlan | None) -> PlannedOutput:
        laid_out.append(checkpoint.fingerprint)
        return planned_output(checkpoint, plan)

    monkeypatch.setattr(planner_runs, "planned_output", counting)
    assert here(*COMMANDS["prune at random"], "-o", "out.safetensors", cwd=folder).code == 0
    assert laid_out == [UNREAD, open_checkpoint(folder / "a.safetensors").fingerprint]


def test_what_stands_at_the_output_is_compared_with_the_input_as_it_is(folder: Path) -> None:
    words = (*COMMANDS["quantize"], "-o", "out.safetensors")
    assert here(*words, cwd=folder).code == 0
    assert here(*words, cwd=folder).result["up_to_date"]
    shutil.copy(folder / "other.safetensors", folder / "a.safetensors")
    assert "another input" in here(*words, cwd=folder).error(5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_broken_tensor_is_named_whatever_the_threads(
    threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "usable_threads", lambda: threads)
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3)
    names = [name for name in pico.state if name.endswith("down_proj.weight")][1:4]
    broken = {name.replace(".", "__"): torch.full_like(pico.state[name], torch.nan) for name in names}
    pico.with_state(**broken).save(folder / "broken.safetensors")
    for words in (("convert",), ("quantize", "--uniform", "--format", "nf4")):
        said = here(words[0], "broken.safetensors", *words[1:], "-o", "out.safetensors", cwd=folder).error(3)
        assert names[0] in said
        assert "NaN or infinite" in said
        assert not (folder / "out.safetensors").exists()


def test_the_claimed_fingerprint_stands_until_it_is_settled(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "a.safetensors")
    claimed = replace(checkpoint, claimed=UNREAD)
    assert claimed.fingerprint == UNREAD
    assert claimed.settled().fingerprint == checkpoint.fingerprint != UNREAD
    assert claimed.hashes.keys() == checkpoint.header.tensors.keys(), "kept, so that nothing is read again"
