"""Stages chained through pipes: each with another; slow, every ordered pair, for both layouts and both families.

Each checkpoint that comes out is opened and evaluated in fp32, bf16 and fp16. What cannot follow is refused in one
line, and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Outcome, here, outputs
from compressing import compress_in_few_trials
from conftest import make_pico
from healing import heal_on_few_states
from torch import Tensor

from ditmoe_cli import load_model, open_checkpoint
from ditmoe_cli.model.checkpoint import Checkpoint

Combination = tuple[str, str]
COMBINATIONS: list[Combination] = list(product(("timm", "flash"), ("rf", "ddpm")))
PROFILING = "profile-experts --images 8 --steps 2 --bins 2 --cfg 1.5"
SAMPLING = "--images 4 --steps 2 --cfg 1.5"

WRITING = {
    "prune": "prune --keep 0.7 --refit-tokens 256",
    "slice": "prune --keep 0.7 --router slice --no-refit",
    "constants": "prune --keep 0.7 --constants --refit-tokens 256",
    "narrow": "prune --neurons 0.5 --multiple 8 --refit-tokens 256",
    "uneven": "prune --neurons 0.5 --multiple 8 --allocate global --no-refit",
    "merge": "merge --groups 0.7 --refit-tokens 256",
    "delta": "merge --delta svd --delta-ratio 1.0",
    "nf4": "quantize --uniform --bits 4",
    "mix": "quantize --bits 6 --allow 4,8 --group-size 32 --rounding nearest",
    "compress": "compress --ratio 0.5 --allow 4,8",
    "bf16": "convert --dtype bf16",
    "plain": "convert --dequantize",
}
FEW_STEPS = "distill --steps 2 --teacher-steps 2 --iterations 1 --batch 4"
EXPORTING = {"upstream": "export --to upstream"}
FOLLOWING = {**WRITING, **EXPORTING, "heal": "heal --steps 2 --batch 4", "distill": FEW_STEPS}
PACKED = ("delta", "nf4", "mix", "compress")
READING = {
    "inspect": "inspect",
    "profile": PROFILING,
    "sample": f"sample {SAMPLING}",
    "fid": f"fid {SAMPLING} --extractor pixels",
    "compare": f"compare {SAMPLING}",
    "report": "report profile --replicates 20",
}
IN_A_DTYPE = ("profile", "sample", "fid", "compare")


def refusal(first: str, second: str) -> str | None:
    """What the message says where the second stage cannot follow the first; None where it can."""
    if first in PACKED and second in {*PACKED, "prune", "constants", "narrow", "uneven", "merge"}:
        return "already"
    if first == "uneven" and second in ("merge", "delta"):
        return "differ" if second == "merge" else "only experts of one shape"
    if (first, second) in (("merge", "merge"), ("constants", "constants")):
        return "already"
    if second == "heal" and first == "plain":
        return "is the original itself"
    if second == "upstream" and first in ("prune", "constants", "merge", "uneven"):
        return "upstream's code cannot load it"
    return None


def predicted(source: Path | Checkpoint, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the model of a checkpoint predicts of one batch, at times from image to noise."""
    model = load_model(source, dtype=dtype)
    config = model.config
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, config.in_channels, config.input_size, config.input_size, generator=generator)
    times = [0.1, 0.4, 0.7, 1.0] if config.sampler == "rf" else [10.0, 300.0, 600.0, 999.0]
    with torch.inference_mode():
        return model(noise, torch.tensor(times), torch.tensor([0, 1, 2, 3])).double()


predicted_once = cache(predicted)
"""Of a stage that many others follow."""


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@dataclass
class Chains:
    """Pipes of one combination: the profiled original, and what each first stage made of it, in a folder of its own."""

    combination: Combination
    folder: Path
    made: dict[str, Outcome] = field(default_factory=dict)

    def profiled(self) -> Outcome:
        """The pipe that all begin with."""
        if "" not in self.made:
            layout, family = self.combination
            make_pico(attention=layout, sampler=family, experts=6, in_channels=1).save(self.folder / "m.safetensors")
            self.made[""] = here(*PROFILING.split(), "m.safetensors", cwd=self.folder)
        return self.made[""]

    def after(self, first: str) -> tuple[Outcome, Path]:
        """What a first stage printed, and the folder of what it wrote."""
        folder = self.folder / first
        if first not in self.made:
            folder.mkdir()
            self.made[first] = here(*WRITING[first].split(), cwd=folder, stdin=self.profiled().out)
            assert self.made[first].code == 0, self.made[first].err
        return self.made[first], folder


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """For compressions and healing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        compress_in_few_trials(monkeypatch)
        heal_on_few_states(monkeypatch)
        yield


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> dict[Combination, Chains]:
    """The pipes of each combination, each stage of which is made when a test first asks for it."""
    return {each: Chains(each, tmp_path_factory.mktemp("-".join(each))) for each in COMBINATIONS}


def check_checkpoint(outcome: Outcome, before: Path, commands: list[str]) -> None:
    """Hold that a result opens, tells its history, and predicts finite values that its dtype and its stage explain."""
    checkpoint = open_checkpoint(outcome.path)
    assert [step["command"] for step in outcome.envelope["history"]] == commands
    assert Path(outcome.envelope["original"]).name == "m.safetensors"
    assert checkpoint.config.num_heads == 2
    exact = predicted(checkpoint)
    assert exact.isfinite().all()
    assert distance(exact, predicted_once(before)) < 0.35, "independent predictions differ by 1.4"
    assert distance(predicted(checkpoint, torch.bfloat16), exact) < 0.05
    assert distance(predicted(checkpoint, torch.float16), exact) < 0.02


def follow(chain: Chains, first: str, second: str) -> None:
    """Hold that the second stage follows the first, or says why it cannot and leaves everything as it was."""
    one, folder = chain.after(first)
    before = outputs(folder)
    two = here(*FOLLOWING[second].split(), cwd=folder, stdin=one.out)
    said = refusal(first, second)
    if said is not None:
        assert said in two.error(3)
        assert outputs(folder) == before
        return
    assert two.code == 0, two.err
    commands = ["profile-experts", WRITING[first].split()[0], FOLLOWING[second].split()[0]]
    if second in EXPORTING:
        exported = Path(two.envelope["history"][-1]["options"]["output"])
        assert two.path == one.path, "the pipe goes on with what was exported"
        assert distance(predicted(exported), predicted_once(one.path)) < 1e-3, "integers are unpacked to fp16 there"
        return
    check_checkpoint(two, one.path, commands)
    if second == "plain" and first not in PACKED:
        assert torch.equal(predicted(two.path), predicted_once(one.path))


def combination_of(first: str) -> Combination:
    """The one combination in which a first stage is followed each time; all four have their turn."""
    return COMBINATIONS[list(WRITING).index(first) % len(COMBINATIONS)]


# each stage once as the first and once as the second, with each reason to refuse
COVERING = [
    ("prune", "merge"),
    ("slice", "narrow"),
    ("constants", "nf4"),
    ("narrow", "prune"),
    ("uneven", "slice"),
    ("merge", "delta"),
    ("delta", "plain"),
    ("nf4", "heal"),
    ("mix", "bf16"),
    ("compress", "distill"),
    ("bf16", "constants"),
    ("slice", "uneven"),
    ("plain", "upstream"),
    ("delta", "mix"),  # which follows others in test_all_stages_in_one_pipe
    ("nf4", "compress"),  # and this in test_cli_compress.py
    *(("nf4", "merge"), ("uneven", "merge"), ("uneven", "delta"), ("merge", "merge"), ("plain", "heal")),
    ("uneven", "upstream"),
]


@pytest.mark.parametrize(("first", "second"), COVERING)
def test_every_stage_follows_another_or_says_why_not(
    first: str, second: str, chains: dict[Combination, Chains]
) -> None:
    follow(chains[combination_of(first)], first, second)


@pytest.mark.slow
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("first", WRITING)
def test_every_stage_follows_every_other_under_both_layouts_and_families(
    first: str, opposite: bool, chains: dict[Combination, Chains]
) -> None:
    """Under the first stage's own combination, and under that of the other layout and the other family."""
    own = combination_of(first)
    combination = COMBINATIONS[-1 - COMBINATIONS.index(own)] if opposite else own
    for second in FOLLOWING:
        covered = not opposite and (first, second) in COVERING
        if covered or (second in ("mix", "compress") and first not in (*PACKED, "prune", "uneven")):
            continue  # each time, or too long
        follow(chains[combination], first, second)


PLAIN_ONLY = ("prune", "merge", "delta", "nf4")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("delta", "prune"),
        ("nf4", "merge"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("mix", "delta"), ("compress", "nf4"))),
    ],
)
def test_a_refusal_of_packed_weights_names_what_helps(
    first: str, second: str, chains: dict[Combination, Chains]
) -> None:
    one, folder = chains[combination_of(first)].after(first)
    for each in PLAIN_ONLY:
        assert "convert --dequantize" in here(*WRITING[each].split(), cwd=folder, stdin=one.out).error(3)
    plain = here("convert", "--dequantize", cwd=folder, stdin=one.out)
    two = here(*WRITING[second].split(), cwd=folder, stdin=plain.out)
    check_checkpoint(
        two, plain.path, ["profile-experts", WRITING[first].split()[0], "convert", WRITING[second].split()[0]]
    )


# what reads a checkpoint passes it on


def check_reading(name: str, outcome: Outcome, before: dict[str, Any]) -> None:
    """Hold that a command that changes no checkpoint passes the pipe on, with numbers that a user can work with."""
    after, result = outcome.envelope, outcome.result
    told = [] if name == "inspect" else [READING[name].split()[0]]
    assert [step["command"] for step in after["history"]] == [step["command"] for step in before["history"]] + told
    for path in ("checkpoint", "original", "given", *(["profile"] if name != "profile" else [])):
        assert after[path] == before[path]
    assert after["samples"] == before["samples"] or name == "sample"
    if name == "profile":
        assert Path(after["profile"]).is_file()
    if name == "sample":
        assert Path(after["samples"]).is_file() and result["nfe"] == 4
    if name == "fid":
        assert 0 <= result["frechet"] < float("inf") and result["paired"]["n"] == 4
    if name == "compare":
        assert 0 <= result["prediction"]["relative_error"] < 0.5 and 0 < result["routing"]["overlap"] <= 1
    if name == "report":
        assert len(result["blocks"]) == 2 and result["claims"]


ONE_OF_A_KIND = ("constants", "uneven", "delta", "nf4")  # experts fewer, of several shapes, differences, packed


@pytest.mark.parametrize(
    "first", [pytest.param(each, marks=() if each in ONE_OF_A_KIND else pytest.mark.slow) for each in WRITING]
)
def test_every_result_can_be_read_by_each_command(first: str, chains: dict[Combination, Chains]) -> None:
    chain = chains[combination_of(first)]
    made, folder = chain.after(first)
    for name, words in READING.items():
        read = here(*words.split(), cwd=folder, stdin=made.out)
        assert read.code == 0, read.err
        check_reading(name, read, made.envelope)


@pytest.mark.parametrize(
    ("first", "dtype"),
    [
        ("prune", "fp16"),
        ("nf4", "bf16"),
        *(
            pytest.param(first, dtype, marks=pytest.mark.slow)
            for first, dtype in (("prune", "bf16"), ("prune", "auto"), ("nf4", "fp32"), ("nf4", "fp16"))
        ),
    ],
)
def test_every_result_can_be_read_in_each_dtype(first: str, dtype: str, chains: dict[Combination, Chains]) -> None:
    chain = chains[combination_of(first)]
    made, folder = chain.after(first)
    for name in IN_A_DTYPE:
        words = (*READING[name].split(), "--dtype", dtype, "--force")
        read = here(*words, cwd=folder, stdin=made.out)
        assert read.code == 0, read.err
        check_reading(name, read, made.envelope)
        if name == "sample":  # the original is sampled as the samples were
            scored = here(*READING["fid"].split(), cwd=folder, stdin=read.out)
            assert scored.code == 0, scored.err
            check_reading("fid", scored, read.envelope)


def test_each_reading_command_passes_a_checkpoint_to_every_other(chains: dict[Combination, Chains]) -> None:
    made, folder = chains[combination_of("merge")].after("merge")
    for name, words in READING.items():
        read = here(*words.split(), cwd=folder, stdin=made.out)
        for following, others in {**READING, "nf4": WRITING["nf4"]}.items():
            outcome = here(*others.split(), cwd=folder, stdin=read.out)
            assert outcome.code == 0, f"{name} | {following}: {outcome.err}"
            if following in READING:
                check_reading(following, outcome, read.envelope)
        assert outcome.envelope["samples"] is None, "samples are of the checkpoint before"


# all at once

STAGES = (
    WRITING["prune"],
    WRITING["merge"],
    WRITING["narrow"],
    WRITING["mix"],
    READING["sample"],
    READING["fid"],
    READING["compare"],
    READING["report"],
    WRITING["plain"],
)


@pytest.mark.parametrize(
    "combination",
    [
        ("timm", "rf"),
        pytest.param(("flash", "ddpm"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_all_stages_in_one_pipe(combination: Combination, chains: dict[Combination, Chains], tmp_path: Path) -> None:
    before = outcome = chains[combination].profiled()
    written = []
    for stage in STAGES:
        outcome = here(*stage.split(), cwd=tmp_path, stdin=before.out)
        assert outcome.code == 0, f"{stage}: {outcome.err}"
        if stage in WRITING.values():
            written.append(outcome.path)
        before = outcome
    commands = [stage.split()[0] for stage in (PROFILING, *STAGES)]
    check_checkpoint(outcome, written[-2], commands)

    sizes = [path.stat().st_size for path in written]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] < sizes[4], "each stage makes it smaller; plain weights are larger"
    assert set(open_checkpoint(written[-1]).config.experts) == {4}, "0.7 of 6 rounded up, and 0.7 of these"
