"""Default names of outputs: short for the usual settings, and another one for every other result."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli.api.sampling_requests import short_list

NAMES = {
    "prune --keep 0.5": "a.prune-keep0.5",
    "prune --keep 2": "a.prune-keep2",
    "prune --keep 2 --method frequency": "a.prune-keep2-frequency",
    "prune --keep 2 --method random --seed 3": "a.prune-keep2-random-seed3",
    "prune --keep 2 --router slice": "a.prune-keep2-slice",
    "prune --keep 2 --router auto": "a.prune-keep2-auto",
    "prune --keep 2 --allocate global": "a.prune-keep2-global",
    "prune --keep 2 --no-refit": "a.prune-keep2-norefit",
    "prune --keep 2 --scale": "a.prune-keep2-scale",
    "prune --keep 2 --refit-tokens 64": "a.prune-keep2-tokens64",
    "prune --keep 2 --constants": "a.prune-keep2-constants",
    "prune --keep 2 --residual-rank 2": "a.prune-keep2-rank2",
    "prune --neurons 0.5 --multiple 8": "a.prune-neurons0.5-multiple8",
    "prune --keep 2 --neurons 0.5 --multiple 8": "a.prune-keep2-neurons0.5-multiple8",
    "prune --neurons 0.5 --multiple 16": "a.prune-neurons0.5-multiple16",
    "prune --neurons 0.5 --multiple 8 --narrow-shared": "a.prune-neurons0.5-multiple8-shared",
    "merge --groups 2": "a.merge-groups2",
    "merge --groups 2 --method hc-smoe": "a.merge-groups2-hc-smoe",
    "merge --groups 2 --router slice --no-refit": "a.merge-groups2-slice-norefit",
    "merge --delta svd": "a.merge-svd0.25",
    "merge --delta ternary": "a.merge-ternary0.5",
    "quantize --uniform --bits 4": "a.quantize-nf4",
    "quantize --uniform --format nf4 --double-quant": "a.quantize-nf4-dq",
    "quantize --uniform --bits 8": "a.quantize-int8",
    "quantize --uniform --bits 3": "a.quantize-int3-g64",
    "quantize --uniform --bits 3 --group-size 32 --symmetric": "a.quantize-int3-g32-sym",
    "quantize --uniform --bits 4 --rounding gptq": "a.quantize-nf4-gptq",
    "quantize --uniform --bits 4 --rounding gptq --tokens 512": "a.quantize-nf4-gptq-tokens512",
    "quantize --bits 4": "a.quantize-bits4",
    "quantize --bits 3.25": "a.quantize-bits3.25",
    "quantize --size 0.25MB": "a.quantize-size250KB",
    "quantize --size 0.25MiB": "a.quantize-size256KiB",
    "quantize --size 250001": "a.quantize-size250001",
    "quantize --bits 4 --method pmq": "a.quantize-bits4-pmq",
    "quantize --bits 4 --allow 3,4,8": "a.quantize-bits4-allow3,4,8",
    "quantize --bits 4 --floor attn=4": "a.quantize-bits4-floorattn4",
    "quantize --bits 4 --protect shared": "a.quantize-bits4-protectshared",
    "quantize --bits 4 --tie gate,up": "a.quantize-bits4-tiegate,up",
    "quantize --bits 4 --symmetric": "a.quantize-bits4-sym",
    "quantize --bits 4 --group-size 32": "a.quantize-bits4-g32",
    "quantize --bits 4 --rounding nearest": "a.quantize-bits4-nearest",
    "quantize --bits 4 --smooth 0.5": "a.quantize-bits4-smooth0.5",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    assert (
        here(
            "profile-experts",
            "a.safetensors",
            *("--images", 4, "--steps", 2, "--bins", 2, "-o", "p.safetensors"),
            cwd=folder,
        ).code
        == 0
    )
    return folder


def planned(line: str) -> str:
    """The default name of what a planner would write, from the planner alone."""
    names: list[str] = []

    def run_planner(planner: Any, *_: object) -> None:
        names.append(f"a.{planner.label}")

    command = line.split()[0]
    with mock.patch(f"ditmoe_cli.cli.commands.{command}.run_planner", run_planner):
        outcome = here(command, "a.safetensors", *line.split()[1:], cwd=Path())
    assert outcome.code == 0, outcome.err
    return names[0]


@pytest.mark.parametrize("line", NAMES)
def test_the_name_says_what_is_not_usual(line: str) -> None:
    assert planned(line) == NAMES[line]


def test_no_two_results_have_one_name() -> None:
    assert len(set(NAMES.values())) == len(NAMES)


def test_one_result_has_one_name() -> None:
    assert planned("quantize --uniform --format nf4") == planned("quantize --uniform --bits 4")
    assert planned("prune --keep 1.0 --neurons 0.5") == planned("prune --neurons 0.5")


SAMPLES = {
    "": "a.samples-images2-steps2",
    "--seed 1": "a.samples-images2-steps2-seed1",
    "--cfg 1.5": "a.samples-images2-steps2-cfg1.5",
    "--cfg 1.5 --cfg-interval 0.2,0.8": "a.samples-images2-steps2-cfg1.5-from0.2to0.8",
    "--solver heun": "a.samples-images2-heun-steps2",
    "--classes 0,2": "a.samples-images2-steps2-classes0,2",
}


def test_samples_of_other_settings_have_other_names(folder: Path) -> None:
    for options, name in SAMPLES.items():
        outcome = here("sample", "a.safetensors", "--images", 2, "--steps", 2, *options.split(), cwd=folder)
        assert outcome.code == 0, outcome.err
        assert Path(outcome.envelope["samples"]) == folder / f"{name}.safetensors"


def test_a_long_list_of_classes_makes_no_long_name() -> None:
    assert short_list((0, 3, 7)) == "0,3,7"
    lists = [tuple(range(start, 1000)) for start in (0, 1)]
    names = {short_list(numbers) for numbers in lists}
    assert len(names) == 2 and all(len(name) < 16 for name in names)


def test_outputs_of_two_plans_have_two_names(folder: Path) -> None:
    paths = []
    for keep in (2, 3):
        words = ("--keep", keep, "--no-refit", "--profile", "p.safetensors", "--dry-run")
        plan = here("prune", "a.safetensors", *words, cwd=folder)
        (folder / "plan.json").write_text(plan.out)
        paths.append(here("apply", "a.safetensors", "--plan", "plan.json", cwd=folder).path)
    assert paths[0] != paths[1]
    assert all(path.name.startswith("a.prune-") for path in paths)
