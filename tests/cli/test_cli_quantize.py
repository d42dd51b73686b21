"""``ditmoe quantize`` with all that it may do: bytes as predicted and within the budget, plans as asked for."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cases import slow_but
from cli_helpers import Outcome, bytes_of, contents, here, outputs, outside, piped, series, tensor_shapes
from compressing import measure_few_tokens
from conftest import make_pico

from ditmoe_cli.formats.base import NumberFormat
from ditmoe_cli.formats.integer import Integer
from ditmoe_cli.formats.pieces import Pieces
from ditmoe_cli.formats.registry import format_label, parse_format
from ditmoe_cli.formats.ternary import Ternary
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.parameters import weight_group
from ditmoe_cli.routing import calibration_settings

SETTINGS = ("--images", 4, "--steps", 2)
FEW = ("--tokens", 256)
LONGER_HISTORY = 600  # bytes by which the history of a mix may be longer than that of one format
PROFILE = ("--profile", "p.safetensors")
MIX = ("quantize", "a.safetensors", *PROFILE, *FEW)
UNIFORM = ("quantize", "a.safetensors", "--uniform")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile with what mixes measure, a fast one and another checkpoint's; not to be written to."""
    folder = tmp_path_factory.mktemp("quantize")
    for name, seed in (("a", 0), ("other", 1)):
        pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3, seed=seed)
        pico.save(folder / f"{name}.safetensors")
    for name, words in {"p": ("a",), "fast": ("a", "--fast"), "q": ("other",)}.items():
        source, *options = words
        command = ("profile-experts", f"{source}.safetensors", *SETTINGS, "--bins", 2, *options)
        assert here(*command, "-o", f"{name}.safetensors", cwd=folder).code == 0
    with pytest.MonkeyPatch.context() as patched:
        measure_few_tokens(patched, 512)
        assert here(*MIX, "--bits", 3, "--dry-run", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process."""
    measure_few_tokens(monkeypatch, 512)


def carried_out(words: tuple[object, ...], folder: Path) -> tuple[Outcome, dict[str, Any]]:
    """A command that writes what its dry run said, to the byte, and a model that samples; and the plan."""
    before = outputs(folder)
    predicted = here(*words, "--dry-run", cwd=folder)
    assert outputs(folder) == before
    written = here(*words, cwd=folder)
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    plan: dict[str, Any] = predicted.result["plan"]
    assert written.result["weights"] == len(plan["formats"])
    assert written.result["formats"] == Counter(plan["formats"].values())
    sampled = here("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
    assert sampled.code == 0, sampled.err
    return written, plan


def planned(words: tuple[object, ...], folder: Path) -> dict[str, Any]:
    """The plan of a dry run."""
    plan: dict[str, Any] = here(*words, "--dry-run", cwd=folder).result["plan"]
    return plan


def by_group(plan: dict[str, Any], folder: Path) -> dict[str, list[NumberFormat]]:
    """The formats of each group of weights."""
    weights = open_checkpoint(folder / "a.safetensors").weights
    found: dict[str, list[NumberFormat]] = {}
    for name, fmt in plan["formats"].items():
        found.setdefault(weight_group(weights[name].info) or "", []).append(parse_format(fmt))
    return found


def narrowest(folder: Path, *options: object) -> int:
    """The least bytes that a mix can take, from the line that refuses fewer."""
    said = here(*MIX, "--size", "1KB", *options, "--dry-run", cwd=folder).error(4)
    return int(said.split(" take ")[1].split(";")[0].replace(",", ""))


# mixes


@pytest.mark.parametrize("bits", slow_but([3.5], [2, 3.5, 8]))
def test_a_mix_is_no_larger_than_the_uniform_file(bits: float, folder: Path) -> None:
    written, plan = carried_out((*MIX, "--bits", bits), folder)
    below, above = (
        here(*UNIFORM, "--format", "int", "--bits", width, "--dry-run", cwd=folder).result["bytes"]
        for width in ((3, 4) if bits == 3.5 else (bits, bits))
    )
    assert written.result["bytes"] <= (below + above) / 2 + LONGER_HISTORY
    assert written.path.name == f"a.quantize-bits{bits:g}-tokens256.safetensors"
    assert (
        plan["options"]["bits"] == bits and plan["rounding"]["method"] == "gptq" and plan["rounding"]["tokens"] == 256
    )
    assert plan["profile"] is not None


def test_what_the_result_says(folder: Path) -> None:
    written, plan = carried_out((*MIX, "--size", f"{narrowest(folder) + 3000}B"), folder)
    result, options = written.result, plan["options"]
    for name in ("predicted_error", "tried_error", "gap", "solver"):
        assert result[name] == options[name]
    assert options["bound"] <= options["predicted_error"] * (1 + 1e-9)
    assert 0 < options["predicted_error"] < 10 and 0 < options["tried_error"] < 10 and 0 <= options["gap"] <= 1e-4
    assert 0 < result["prediction_error"] < 2 * options["tried_error"]
    assert len(result["top_k_agreement"]) == 2 and all(0 < share <= 1 for share in result["top_k_agreement"])
    assert 2 in {parse_format(fmt).bits for fmt in result["formats"]}
    assert written.envelope["profile"] == str(folder / "p.safetensors")
    assert [step["command"] for step in written.envelope["history"]] == ["quantize"]
    described = here("inspect", written.path, cwd=folder).result
    assert described["history"] == ["quantize"]
    assert sum(described["formats"].values()) >= result["weights"]


def test_a_size_is_kept_to_and_used(folder: Path) -> None:
    widths = ("--allow", "2,4,16")
    least = narrowest(folder, *widths)
    errors = []
    for size in (least, least + 2000, 300_000):
        predicted = here(*MIX, "--size", f"{size}B", *widths, "--dry-run", cwd=folder).result
        assert predicted["bytes"] <= size
        errors.append(predicted["plan"]["options"]["predicted_error"])
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_nothing_more_to_lose(folder: Path) -> None:
    """With all the bytes there are, every weight stays."""
    written, plan = carried_out((*MIX, "--size", "100MB"), folder)
    assert plan["formats"] == {} and written.result["predicted_error"] == written.result["prediction_error"] == 0
    assert written.result["top_k_agreement"] == [1.0, 1.0]


def test_allowed_widths_are_kept_to(folder: Path) -> None:
    size = narrowest(folder, "--allow", "3,8") + 5000
    plan = planned((*MIX, "--size", f"{size}B", "--allow", "3, 8"), folder)
    assert {parse_format(fmt).bits for fmt in plan["formats"].values()} == {3, 8}
    assert by_group(plan, folder).keys() == {"experts", "shared", "attn", "modulation", "embedders"}
    assert {scheme.bits for scheme in by_group(plan, folder)["modulation"]} == {8}, "the default floor is 4"
    ternary = planned((*MIX, "--size", f"{narrowest(folder, '--allow', '1.58,4')}B", "--allow", "1.58,4"), folder)
    assert all(isinstance(fmt, Ternary) for fmt in by_group(ternary, folder)["experts"])


def test_floors_are_kept_to(folder: Path) -> None:
    floors = ("--floor", "experts=4", "--floor", "attn=8", "--floor", "shared=2")
    plan = planned((*MIX, "--size", f"{narrowest(folder, *floors)}B", *floors), folder)
    bits = {group: {scheme.bits for scheme in schemes} for group, schemes in by_group(plan, folder).items()}
    assert bits == {"experts": {4}, "attn": {8}, "shared": {2}, "modulation": {4}, "embedders": {4}}


def test_protected_groups_stay(folder: Path) -> None:
    protected = ("--protect", "attn, embedders")
    plan = planned((*MIX, "--size", f"{narrowest(folder, *protected)}B", *protected), folder)
    assert by_group(plan, folder).keys() == {"experts", "shared", "modulation"}


def test_ties_bind(folder: Path) -> None:
    tied = planned((*MIX, "--bits", 3, "--protect", "modulation,embedders", "--tie", "gate,up"), folder)["formats"]
    loose = planned((*MIX, "--bits", 3, "--protect", "modulation,embedders"), folder)["formats"]
    gates = [name for name in open_checkpoint(folder / "a.safetensors").weights if name.endswith("gate_proj.weight")]
    assert len(gates) == 8
    assert all(tied.get(name) == tied.get(name.replace("gate", "up")) for name in gates)
    assert any(loose.get(name) != loose.get(name.replace("gate", "up")) for name in gates)


@pytest.mark.parametrize(
    "options",
    [pytest.param(("--group-size", 32, "--symmetric"), marks=pytest.mark.slow), ("--rounding", "nearest")],
    ids=str,
)
def test_formats_are_of_the_kind_asked_for(options: tuple[object, ...], folder: Path) -> None:
    words = tuple(word for word in MIX if word not in FEW) if "nearest" in options else MIX
    written, plan = carried_out((*words, "--bits", 4, *options), folder)
    for fmt in map(parse_format, plan["formats"].values()):
        assert isinstance(fmt, Integer)
        assert fmt.group == (32 if 32 in options else 64)
        assert fmt.symmetric == ("--symmetric" in options)
    assert (plan["rounding"] is None) == ("nearest" in options)
    assert ("prediction_error" in written.result) == ("nearest" not in options)


@pytest.mark.slow
def test_gptq_is_nearer_than_what_was_tried(folder: Path) -> None:
    """The trial rounds to the nearest values; both are of the same states, or nearly."""
    result = here(*MIX, "--bits", 3, "--protect", "modulation,embedders", cwd=folder).result
    assert result["prediction_error"] < result["tried_error"]


# neurons of different widths within an expert


CUT = (
    "quantize",
    "wide.safetensors",
    "--profile",
    "w.safetensors",
    "--method",
    "camera-q",
    "--bits",
    3.5,
    "--group-size",
    32,
)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A checkpoint whose experts are wide enough to be cut."""
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, widths=((192,) * 3,) * 2, shared_width=128)
    pico.save(tmp_path / "wide.safetensors")
    command = ("profile-experts", "wide.safetensors", *SETTINGS, "--bins", 2, "-o", "w.safetensors")
    assert here(*command, cwd=tmp_path).code == 0
    return tmp_path


@pytest.mark.parametrize(
    "rounding", [pytest.param(FEW, marks=pytest.mark.slow), ("--rounding", "nearest")], ids=["gptq", "nearest"]
)
def test_experts_in_pieces_from_end_to_end(rounding: tuple[object, ...], wide: Path) -> None:
    """The file is as large as predicted, is sampled by a process that never quantised, and goes on through others."""
    words, folder = (*CUT, *rounding), wide
    predicted = here(*words, "--dry-run", cwd=folder)
    written = here(*words, cwd=folder)
    assert written.result["bytes"] == predicted.result["bytes"] == bytes_of(written.path)
    plan = predicted.result["plan"]
    assert plan["ordering"] == "camera" and written.path.name.startswith("wide.quantize-bits3.5-camera-q-g32-")
    cut = {name: fmt for name, fmt in plan["formats"].items() if ":" in fmt}
    assert len(cut) >= 6 and all((fmt.split(":")[0] == "columns") == ("down_proj" in name) for name, fmt in cut.items())
    assert written.result["formats"] == Counter(map(format_label, plan["formats"].values()))
    weights = open_checkpoint(written.path).weights
    assert {name for name, weight in weights.items() if isinstance(weight.stored_as, Pieces)} == cut.keys()
    assert 0 < written.result["tried_error"] < 1 and ("prediction_error" in written.result) == (rounding == FEW)
    described = here("inspect", written.path, cwd=folder).result
    labels = set(map(format_label, cut.values()))
    assert described["history"] == ["quantize"] and labels and not any("*" in label for label in described["formats"])
    if rounding == FEW:
        sampled = outside("sample", written.path, "--images", 2, "--steps", 2, "-o", "s.safetensors", cwd=folder)
        assert sampled.code == 0, sampled.err
    again = here("convert", written.path, "-o", "copy.safetensors", cwd=folder)
    assert open_checkpoint(again.path).fingerprint == open_checkpoint(written.path).fingerprint
    compared = here("compare", written.path, again.path, *SETTINGS, "--bins", 2, cwd=folder)
    assert compared.code == 0, compared.err
    measured = here("bench", written.path, "--batch", 1, cwd=folder)
    assert measured.code == 0, measured.err
    said = here("quantize", written.path, "--bits", 3, cwd=folder).error(3)
    assert "already; quantise the checkpoint" in said
    pruned = here("prune", written.path, "--keep", 2, "--method", "random", "--no-refit", cwd=folder)
    assert pruned.code == 0, pruned.err
    assert any(isinstance(weight.stored_as, Pieces) for weight in open_checkpoint(pruned.path).weights.values())
    merging = ("merge", written.path, "--method", "average", "--groups", 2)
    assert "already" in here(*merging, cwd=folder).error(3)


@pytest.mark.slow
def test_a_saved_plan_in_pieces_gives_the_same_bytes(wide: Path) -> None:
    words, folder = (*CUT, "--rounding", "nearest"), wide
    (folder / "plan.json").write_text(here(*words, "--dry-run", cwd=folder).out)
    direct = here(*words, "-o", "direct.safetensors", cwd=folder)
    apply = ("apply", "wide.safetensors", "--plan", "plan.json", "-o", "applied.safetensors")
    assert "--profile" in here(*apply, cwd=folder).error(3)
    assert here(*apply, "--dry-run", cwd=folder).result["bytes"] == direct.result["bytes"]
    again = here(*apply, "--profile", "w.safetensors", cwd=folder)
    assert again.path.read_bytes() == direct.path.read_bytes()
    shown = here("plan", "plan.json", cwd=folder)
    assert shown.code == 0 and shown.result["plan"]["ordering"] == "camera"


# where profiles come from


def test_without_a_profile_one_is_made_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_settings, "usual_images", lambda *_: 2)
    monkeypatch.setattr(calibration_settings, "STEPS", 2)
    words = ("quantize", "a.safetensors", "--bits", 3, *FEW)
    first = here(*words, "-o", "one.safetensors", cwd=folder)
    (note,) = first.notes
    assert "no profile was given" in note and first.envelope["profile"] in note
    assert Path(first.envelope["profile"]).is_file()
    second = here(*words, "-o", "two.safetensors", cwd=folder)
    assert any("using the profile kept in" in note for note in second.notes)
    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_dry_run_of_a_mix_asks_for_a_profile(folder: Path) -> None:
    before = contents(folder)
    assert "--profile" in here("quantize", "a.safetensors", "--bits", 3, "--dry-run", cwd=folder).error(3)
    assert contents(folder) == before


def test_a_dry_run_of_one_format_needs_none(folder: Path) -> None:
    words = (*UNIFORM, "--bits", 3, "--rounding", "gptq", *FEW)
    predicted = here(*words, "--dry-run", cwd=folder).result
    assert predicted["plan"]["profile"] is None and predicted["plan"]["rounding"]["method"] == "gptq"
    written = here(*words, *PROFILE, cwd=folder).result
    assert abs(written["bytes"] - predicted["bytes"]) <= 8  # settings of that profile have another digit or two


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("profile", "said"),
    [("fast", "without --fast"), ("q", "another checkpoint"), ("a", "a.safetensors"), ("none", "none.safetensors")],
)
def test_profiles_that_do_not_do(profile: str, said: str, options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    words = ("quantize", "a.safetensors", "--bits", 3, "--profile", f"{profile}.safetensors", *options)
    assert said in here(*words, cwd=folder).error(3)
    assert contents(folder) == before


def test_a_fast_profile_cannot_be_rounded_on(folder: Path) -> None:
    before = contents(folder)
    words = (*UNIFORM, "--bits", 3, "--rounding", "gptq", "--profile", "fast.safetensors")
    assert "without --fast" in here(*words, cwd=folder).error(3)
    assert contents(folder) == before


# one format for all


ONE_FORMAT: dict[str, tuple[tuple[object, ...], ...]] = {
    "nf4": (("--bits", 4), ("--format", "nf4")),
    "int8": (("--bits", 8), ("--format", "int8")),
    "int3-g64": (("--bits", 3),),
    "nf4-dq": (("--format", "nf4", "--double-quant"),),
    "fp4": (("--format", "fp4"),),
    "int5-g32-sym": (("--format", "int", "--bits", 5, "--group-size", 32, "--symmetric"),),
    "ternary-g64": (("--bits", 1.58), ("--format", "ternary")),
    "ternary-g128": (("--format", "ternary", "--group-size", 128),),
}


@pytest.mark.parametrize("fmt", ONE_FORMAT)
def test_one_format_for_all(fmt: str, folder: Path) -> None:
    options, *others = ONE_FORMAT[fmt]
    written, plan = carried_out((*UNIFORM, *options), folder)
    assert set(plan["formats"].values()) == {fmt} and written.result["formats"] == {fmt: 28}
    assert by_group(plan, folder).keys() == {"experts", "shared", "attn"}
    assert plan["options"] == {"uniform": True, "format": fmt} and "prediction_error" not in written.result
    assert all(planned((*UNIFORM, *other, "-o", "o.safetensors"), folder) == plan for other in others)


@pytest.mark.parametrize("fmt", slow_but(["nf4-dq"], ["nf4-dq", "int8", "int5-g32-sym", "ternary-g64"]))
def test_one_format_rounded_by_gptq(fmt: str, folder: Path) -> None:
    words = (*UNIFORM, *ONE_FORMAT[fmt][0], "--rounding", "gptq", *PROFILE, *FEW)
    written, plan = carried_out(words, folder)
    assert set(plan["formats"].values()) == {fmt} and written.result["formats"] == {fmt: 28}
    assert plan["options"] == {"uniform": True, "format": fmt, "rounding": "gptq", "tokens": 256}
    assert plan["profile"] is not None
    assert 0 < written.result["prediction_error"] < 2 and len(written.result["top_k_agreement"]) == 2


# plans and pipes


@pytest.mark.parametrize(
    "words",
    [
        (*MIX, "--bits", 3),
        pytest.param((*UNIFORM, "--bits", 3, "--rounding", "gptq", *PROFILE, *FEW), marks=pytest.mark.slow),
    ],
)
def test_a_saved_plan_gives_the_same_bytes(words: tuple[object, ...], folder: Path) -> None:
    (folder / "plan.json").write_text(here(*words, "--dry-run", cwd=folder).out)
    direct = here(*words, "-o", "direct.safetensors", cwd=folder)
    apply = ("apply", "a.safetensors", "--plan", "plan.json", "-o", "applied.safetensors")
    before = contents(folder)
    assert "--profile" in here(*apply, cwd=folder).error(3)
    assert "is not the profile" in here(*apply, "--profile", "fast.safetensors", cwd=folder).error(3)
    assert contents(folder) == before
    assert here(*apply, "--dry-run", cwd=folder).result["bytes"] == direct.result["bytes"]
    applied = here(*apply, *PROFILE, cwd=folder)
    assert applied.path.read_bytes() == direct.path.read_bytes()
    assert applied.result["prediction_error"] == direct.result["prediction_error"]


def test_a_pipe_of_all_stages(folder: Path) -> None:
    outcome = piped(
        "ditmoe profile-experts a.safetensors --images 4 --steps 2 --bins 2 "
        "| ditmoe quantize --bits 3 --allow 3,8 --tokens 256 | ditmoe inspect",
        folder,
    )
    assert [step["command"] for step in outcome.envelope["history"]] == ["profile-experts", "quantize"]
    assert outcome.result["history"] == ["quantize"] and outcome.notes == []
    assert outcome.path == folder / "a.quantize-bits3-allow3,8-tokens256.safetensors"
    assert "blocks.0.moe.experts.0.gate_proj.weight_packed" in tensor_shapes(outcome.path)


def test_what_was_pruned_is_quantised(folder: Path) -> None:
    """The profile is its parent's, so it is profiled anew with the same settings."""
    pruned = here("prune", "a.safetensors", *PROFILE, "--keep", 2, "--refit-tokens", 64, cwd=folder)
    quantised = here("quantize", "--bits", 3, *FEW, cwd=folder, stdin=pruned.out)
    assert any("ancestor" in line for line in quantised.notes)
    mine = sorted(file.name.removeprefix(pruned.path.stem) for file in folder.glob(f"{pruned.path.stem}.*"))
    measured, anew, *rest = mine
    assert anew.endswith(".profile.safetensors"), "a profile of what was pruned"
    assert measured == anew.replace(".safetensors", ".measured.json"), "errors of formats, for other budgets"
    assert rest == [".quantize-bits3-tokens256.safetensors", ".safetensors"]
    assert here("inspect", quantised.path, cwd=folder).result["history"] == ["prune", "quantize"]
    assert here("sample", quantised.path, "--images", 1, "--steps", 1, cwd=folder).code == 0


def test_dry_runs_of_one_format_are_light(folder: Path) -> None:
    commands = [
        (*UNIFORM, "--bits", 3, "--dry-run"),
        (*UNIFORM, "--format", "nf4", "--double-quant", "--dry-run"),
        (*UNIFORM, "--format", "ternary", "--rounding", "gptq", "--dry-run"),
        (*UNIFORM, "--bits", 3, "--rounding", "gptq", *PROFILE, "--dry-run"),
    ]
    for words, (outcome, heavy) in zip(commands, series(commands, folder), strict=True):
        assert outcome.code == 0, outcome.err
        assert not heavy, f"{words} imports {heavy}"


# what is refused, in one line and without a trace


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "--bits is missing"),
        (("--bits", 1.5), 2, "--bits 1.5"),
        (("--bits", 9), 2, "--bits 9"),
        (("--bits", 0), 2, "--bits 0"),
        (("--bits", -3), 2, "--bits -3"),
        (("--bits", "nan"), 2, "--bits nan"),
        (("--bits", "three"), 2, "--bits"),
        (("--bits", 3, "--size", "1MB"), 2, "either --bits"),
        (("--size", "much"), 2, "much"),
        (("--size", "1KB"), 4, "narrowest formats take"),
        (("--bits", 3, "--allow", "8", "--protect", "modulation,embedders"), 4, "narrowest formats take"),
        (("--bits", 3, "--allow", "7"), 2, "--allow 7"),
        (("--bits", 3, "--allow", ""), 2, "--allow"),
        (("--bits", 3, "--allow", "2,3"), 2, "--protect modulation"),
        (("--bits", 3, "--floor", "attn"), 2, "--floor attn"),
        (("--bits", 3, "--floor", "attn=many"), 2, "--floor attn=many"),
        (("--bits", 3, "--floor", "attn=17"), 2, "attn=17"),
        (("--bits", 3, "--floor", "attn=nan"), 2, "--floor attn=nan"),
        (("--bits", 3, "--floor", "router=8"), 2, "--floor router"),
        (("--bits", 3, "--protect", "router"), 2, "--protect router"),
        (("--bits", 3, "--protect", "experts,shared,attn,modulation,embedders"), 2, "--protect"),
        (("--bits", 3, "--tie", "gate"), 2, "at least two"),
        (("--bits", 3, "--tie", "gate,qkv"), 2, "--tie qkv"),
        (("--bits", 3, "--group-size", 48), 2, "--group-size 48"),
        (("--bits", 3, "--format", "nf4"), 2, "--uniform"),
        (("--bits", 3, "--double-quant"), 2, "--double-quant"),
        (("--bits", 3, "--rounding", "awq"), 2, "--rounding awq"),
        (("--bits", 3, "--rounding", "nearest"), 2, "--tokens 256"),
        (("--bits", 3, "--tokens", -1), 2, "--tokens -1"),
        (("--bits", 3, "--device", "abacus"), 2, "abacus"),
        (("--uniform", "--bits", 7), 2, "--bits 7"),
        (("--uniform", "--size", "1MB"), 2, "--size"),
        (("--uniform", "--bits", 4, "--group-size", 32), 2, "--group-size 32"),
        (("--uniform", "--bits", 4, "--allow", "2,4"), 2, "--allow"),
        (("--uniform", "--bits", 4, "--floor", "attn=4"), 2, "--floor"),
        (("--uniform", "--bits", 4, "--protect", "attn"), 2, "--protect"),
        (("--uniform", "--bits", 4, "--tie", "gate,up"), 2, "--tie"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_values(words: tuple[object, ...], code: int, said: str, options: tuple[str, ...], folder: Path) -> None:
    before = contents(folder)
    rounding = ("--rounding", "gptq") if "--uniform" in words else ()
    assert said in here(*MIX, *rounding, *words, *options, cwd=folder).error(code)
    assert contents(folder) == before


def test_too_small_a_budget_is_refused_before_anything_is_profiled(folder: Path) -> None:
    before = contents(folder)
    refused = here("quantize", "a.safetensors", "--size", "1KB", cwd=folder)
    assert "narrowest formats take" in refused.error(4) and "profil" not in refused.err
    assert contents(folder) == before


def test_too_small_a_budget_says_what_would_do(folder: Path) -> None:
    before = contents(folder)
    least = narrowest(folder)
    assert f"the budget is {least - 1:,} bytes" in here(*MIX, "--size", f"{least - 1}B", cwd=folder).error(4)
    assert contents(folder) == before
    assert here(*MIX, "--size", f"{least}B", cwd=folder).result["bytes"] <= least


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize("first", [("--uniform", "--bits", 4), ("--bits", 3, *PROFILE, *FEW)], ids=["nf4", "mix"])
def test_what_is_quantised_already_is_refused_by_name(
    first: tuple[object, ...], options: tuple[str, ...], folder: Path
) -> None:
    assert here("quantize", "a.safetensors", *first, "-o", "once.safetensors", cwd=folder).code == 0
    before = contents(folder)
    for words in (("--bits", 3), ("--uniform", "--bits", 8), ("--uniform", "--bits", 3, "--rounding", "gptq")):
        said = here("quantize", "once.safetensors", *words, *options, cwd=folder).error(3)
        assert "once.safetensors" in said and "'blocks.0." in said and "already" in said
    assert contents(folder) == before


def test_an_output_that_exists_is_refused_before_anything_is_measured(folder: Path) -> None:
    before = contents(folder)
    assert "other.safetensors" in here(*MIX, "--bits", 3, "-o", "other.safetensors", cwd=folder).error(5)
    assert "a.safetensors" in here(*MIX, "--bits", 3, "-o", "a.safetensors", "--force", cwd=folder).error(5)
    assert contents(folder) == before


def test_broken_weights_leave_no_trace(folder: Path) -> None:
    name = "blocks.1.moe.experts.2.up_proj.weight"
    pico = make_pico(sampler="rf", in_channels=1, input_size=4, experts=3)
    value = pico.state[name].clone()
    value[1, 2] = float("nan")
    pico.with_state(**{name: value}).save(folder / "broken.safetensors")
    before = contents(folder)
    for words in (("--bits", 3), ("--uniform", "--bits", 3), ("--uniform", "--bits", 3, "--rounding", "gptq")):
        assert name in here("quantize", "broken.safetensors", *words, cwd=folder).error(3)
    assert contents(folder) == before


def test_plans_that_were_edited_are_checked(folder: Path) -> None:
    plan = planned((*MIX, "--bits", 3), folder)
    name = "blocks.0.attn.qkv.weight"
    for formats, said in (
        ({name: "int7-g64"}, "int7-g64"),
        ({"blocks.0.moe.gate.weight": "int4-g64"}, "never the router"),
        ({"blocks.7.attn.qkv.weight": "int4-g64"}, "does not hold"),
    ):
        (folder / "plan.json").write_text(json.dumps({**plan, "formats": formats}))
        before = contents(folder)
        assert said in here("apply", "a.safetensors", "--plan", "plan.json", *PROFILE, cwd=folder).error(3)
        assert contents(folder) == before
