"""All methods of mixed precision: budgets kept to the byte, equal choices, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import with_slow
from compressing import measure_few_tokens
from conftest import REPOSITORY, make_pico
from mixing import (
    SMALL,
    TOKENS,
    Given,
    chosen,
    profiled,
    request_for,
    size_of,
    uneven_pico,
    within,
)

from ditmoe_cli.cli.app import run as run_program
from ditmoe_cli.compression import output
from ditmoe_cli.compression.methods import DEFAULT_METHODS, MIXES
from ditmoe_cli.compression.output import check_plan
from ditmoe_cli.compression.plan import parse_plan
from ditmoe_cli.errors import BadInputError, InfeasibleError
from ditmoe_cli.model.parameters import weight_group

BASELINES = [name for name in MIXES if name != DEFAULT_METHODS["quantize"]]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, TOKENS)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(uneven_pico(), tmp_path_factory.mktemp("uneven"))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("bits", [3, 8])
def test_the_file_is_within_its_budget(name: str, bits: float, uneven: Given) -> None:
    request = within(uneven, bits)
    choice = chosen(MIXES[name], uneven, request)
    assert size_of(uneven[0], choice.formats) <= request.limit
    assert choice.options == {}, "nothing is predicted"
    groups = {weight_group(uneven[0].weights[n].info) for n in choice.formats}
    assert groups == {"attn", "shared", "experts"}, "all else stays as it is"


@pytest.mark.parametrize("name", MIXES)
def test_the_least_is_told_and_enough(name: str, small: Given) -> None:
    with pytest.raises(InfeasibleError, match="the budget is 1,000 bytes") as refused:
        chosen(MIXES[name], small, request_for(small, 1000))
    least = int(str(refused.value).split(" take ")[1].split(";")[0].replace(",", ""))
    assert size_of(small[0], chosen(MIXES[name], small, request_for(small, least)).formats) == least
    with pytest.raises(InfeasibleError, match=f"{least:,}"):
        chosen(MIXES[name], small, request_for(small, least - 1))


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_protected_stays(name: str, small: Given) -> None:
    formats = chosen(MIXES[name], small, request_for(small, protected=("experts", "attn"))).formats
    assert formats and all(".shared_experts." in weight for weight in formats)


@pytest.mark.parametrize("name", ["pmq", "block-score"])
def test_profiles_without_states_are_refused(name: str, tmp_path: Path) -> None:
    asked = profiled(make_pico(**SMALL), tmp_path, fast=True)
    with pytest.raises(BadInputError, match="keeps no states"):
        chosen(MIXES[name], asked, within(asked, 4))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(**SMALL), tmp_path_factory.mktemp("files"))


@pytest.fixture
def quantize(files: Given, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    def run(*words: object) -> tuple[int, dict[str, Any], str]:
        checkpoint, profile = files
        given = ("quantize", checkpoint.path, "--profile", profile.path, *words)
        code = run_program([str(word) for word in given])
        said = capsys.readouterr()
        return code, json.loads(said.out)["result"] if said.out else {}, said.err

    return run


@pytest.mark.parametrize(
    ("name", "rounding"),
    with_slow(
        [("replay", ("nearest",)), ("pmq", ("gptq", "--tokens", 256)), *((name, ("nearest",)) for name in BASELINES)], 2
    ),
    ids=str,
)
def test_dry_runs_tell_the_plan_and_its_bytes(
    name: str,
    rounding: tuple[object, ...],
    quantize: Callable[..., tuple[int, dict[str, Any], str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal input gives equal plans; a run lays its file out once, since mixes are compared by sizes of files alone."""
    layouts: list[object] = []

    def counted(*arguments: Any) -> None:
        layouts.append(arguments)
        check_plan(*arguments)

    monkeypatch.chdir(tmp_path)
    method = () if name == DEFAULT_METHODS["quantize"] else ("--method", name)
    words = ("--bits", 3.5, *method, "--allow", "2,3,4,6", "--rounding", *rounding)
    code, planned, _ = quantize(*words, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    monkeypatch.setattr(output, "check_plan", counted)
    code, result, _ = quantize(*words)
    assert code == 0 and len(layouts) == 1
    named = "-".join(["", *method[1:], "allow2,3,4,6", "nearest" if rounding == ("nearest",) else "tokens256"])
    target = tmp_path / f"original.quantize-bits3.5{named}.safetensors"
    assert list(tmp_path.iterdir()) == [target]
    assert result["bytes"] == target.stat().st_size == planned["bytes"]
    assert result["plan_digest"] == parse_plan(planned["plan"], "plan").digest
    assert {fmt.split("-")[0].rpartition(":")[2] for fmt in result["formats"]} <= {
        "int2",
        "int3",
        "int4",
        "int6",
        "pieces",
    }
    options = planned["plan"]["options"]
    assert options["method"] == result["method"] == name
    assert 0 < options["tried_error"] == result["tried_error"] < 1
    assert ("predicted_error" in options) == ("predicted_error" in result) == (name == "replay")


def test_methods_are_listed_without_torch() -> None:
    script = (
        "import sys; from ditmoe_cli.cli.app import run; code = run(['quantize', '--list-methods']); "
        "sys.exit(code or (9 if {'torch', 'numpy'} & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)["result"]["methods"]
    assert listed == {name: {"summary": m.summary, "source": m.source} for name, m in MIXES.items()}
    assert "2410.06270" in listed["pmq"]["source"] and "2406.08155" in listed["outlier"]["source"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bits", 3, "--method", "hawq"), "--method hawq"),
        (("--bits", 4, "--method", "pmq", "--uniform"), "leave out --uniform"),
    ],
    ids=str,
)
def test_unknown_methods_are_refused(
    words: tuple[object, ...], said: str, quantize: Callable[..., tuple[int, dict[str, Any], str]]
) -> None:
    code, _, err = quantize(*words)
    assert code == 2 and said in err
