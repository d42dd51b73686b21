"""``ditmoe compress --curve`` and ``--plan-only``; plans that are shown, compared, edited and applied."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import bytes_of, here, outputs
from compressing import compress_in_few_trials
from conftest import make_pico

import ditmoe_cli
from ditmoe_cli.errors import UsageError

PROFILE = ("--profile", "p.safetensors")
CURVE = ("compress", "a.safetensors", *PROFILE, "--allow", "2,4,8,16", "--curve")
COMPRESS = ("compress", "a.safetensors", *PROFILE, "--allow", "2,4,8,16", "--ratio", 0.301)


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        compress_in_few_trials(patched)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile with what is kept beside it, a curve and a plan; not to be written to."""
    folder = tmp_path_factory.mktemp("curve")
    make_pico(sampler="rf", in_channels=1, input_size=4, experts=3).save(folder / "a.safetensors")
    command = ("profile-experts", "a.safetensors", "--images", 4, "--steps", 2, "--bins", 2, "-o", "p.safetensors")
    assert here(*command, cwd=folder).code == 0
    before = set(outputs(folder))
    (folder / "curve.json").write_text(here(*CURVE, "--ratio", 0.301, cwd=folder).out)
    (folder / "there.safetensors").write_text("whatever stands at the output stays")
    (folder / "plan.json").write_text(here(*COMPRESS, "--plan-only", "-o", "there.safetensors", cwd=folder).out)
    kept = {"p.neurons.safetensors", "p.measured.json"}
    assert {path.name for path in folder.iterdir()} == before | kept | {"curve.json", "plan.json", "there.safetensors"}
    assert (folder / "there.safetensors").read_text().endswith("stays")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def test_a_curve_leaves_the_pipe_with_the_checkpoint_and_has_a_plan_for_each_size(made: Path) -> None:
    envelope = read(made / "curve.json")
    assert Path(envelope["checkpoint"]).name == "a.safetensors" and Path(envelope["profile"]).name == "p.safetensors"
    points = envelope["result"]["points"]
    assert len(points) >= 10 and sum(point["goal"] for point in points) == sum(point["tried"] for point in points) == 1
    before = envelope["result"]["bytes_before"]
    assert next(point["size"] for point in points if point["goal"]) == int(0.301 * before)
    for smaller, larger in pairwise(points):
        assert smaller["bytes"] <= smaller["size"] < larger["size"] <= before
        assert smaller["predicted_error"] > larger["predicted_error"]


@pytest.mark.parametrize("place", [0, 6, -1])
def test_every_point_is_a_plan_that_apply_takes(folder: Path, place: int) -> None:
    point = read(folder / "curve.json")["result"]["points"][place]
    (folder / "point.json").write_text(json.dumps(point["plan"]))
    words = ("apply", "a.safetensors", "--plan", "point.json", *PROFILE, "-o", "o.safetensors")
    written = here(*words, cwd=folder)
    assert written.result["bytes"] == point["bytes"] == bytes_of(written.path)
    if point["tried"]:
        assert written.result["prediction_error"] > 0


def test_a_curve_from_python_is_the_command_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = {"allow": (2, 4, 8, 16), "profile": "p.safetensors"}
    found = ditmoe_cli.size_curve("a.safetensors", ratio=0.301, **arguments)  # type: ignore[arg-type]
    assert found.to_json() == read(folder / "curve.json")["result"] and found.profile.name == "p.safetensors"
    foreseen = ditmoe_cli.apply("a.safetensors", found.points[0].plan, output="o.safetensors", dry_run=True)
    assert foreseen.bytes == found.points[0].bytes
    for refused in ({"force": True}, {"target": "upstream"}, {"size": 1000, "ratio": 0.5}):
        with pytest.raises(UsageError):
            ditmoe_cli.size_curve("a.safetensors", **{**arguments, **refused})  # type: ignore[arg-type]


def test_a_curve_as_a_whole_is_no_plan(folder: Path) -> None:
    for words in (("plan", "curve.json"), ("apply", "a.safetensors", "--plan", "curve.json")):
        assert "result.points[i].plan" in here(*words, cwd=folder).error(3)


@pytest.mark.slow
def test_a_curve_is_a_table_for_people_and_is_drawn(folder: Path) -> None:
    if find_spec("matplotlib") is None:
        assert "report" in here(*CURVE, "--png", "c.png", cwd=folder).error(3)
        pytest.skip("no matplotlib")
    from PIL import Image

    drawn = here(*CURVE, "--ratio", 0.301, "--png", "c.png", "--text", cwd=folder)
    head, *lines = drawn.out.splitlines()
    assert all(word in head for word in ("neurons", "predicted error", "expected error", "on a GPU"))
    points = read(folder / "curve.json")["result"]["points"]
    for point, line in zip(points, lines, strict=False):
        assert f"  {point['bytes']:,}  " in line
        assert ("asked for" in line) == point["goal"] and ("tried" in line) == point["tried"]
    assert lines[-1] == "wrote      c.png"
    with Image.open(folder / "c.png") as image:
        assert image.format == "PNG" and image.width > image.height > 300
        assert len(image.getcolors(1 << 20) or ()) > 10
    assert "exists" in here(*CURVE, "--png", "c.png", cwd=folder).error(5)
    first = (folder / "c.png").read_bytes()
    again = here(*CURVE, "--ratio", 0.301, "--png", "c.png", "--force", "-q", cwd=folder)
    assert again.out == f"{folder.resolve() / 'c.png'}\n"
    assert (folder / "c.png").read_bytes() == first, "equal curves, equal bytes"


@pytest.mark.slow
def test_a_plan_only_is_carried_out_to_the_bytes_that_compress_writes(folder: Path) -> None:
    document = read(folder / "plan.json")
    assert document["result"]["plan_only"] and Path(document["checkpoint"]).name == "a.safetensors"
    apply = ("apply", "a.safetensors", "--plan", "plan.json", *PROFILE, "-o", "applied.safetensors")
    applied = here(*apply, cwd=folder)
    direct = here(*COMPRESS, "-o", "direct.safetensors", cwd=folder)
    assert applied.path.read_bytes() == direct.path.read_bytes()
    assert document["result"]["bytes"] == bytes_of(direct.path)


def test_a_plan_is_shown_with_both_stages(folder: Path) -> None:
    text = here("plan", "plan.json", "--text", cwd=folder).out
    rows = dict(line.split("  ", 1) for line in text.splitlines())
    assert "widths" in text and rows["neurons"].strip().startswith("those whose loss costs most stay")
    assert "routed experts int" in text and rows["rounding"].strip().startswith("gptq")
    assert "predicted" in rows["prediction error"] and "tried" in rows["prediction error"]


def edited(folder: Path, change: Any) -> str:
    plan = read(folder / "plan.json")["result"]["plan"]
    change(plan)
    (folder / "edited.json").write_text(json.dumps(plan))
    return "edited.json"


def _narrower(plan: dict[str, Any]) -> None:
    block = next(block for block in plan["blocks"] if block.get("widths"))
    block["widths"] = [max(block["widths"][0] - 4, 4), *block["widths"][1:]]


def _wider_format(plan: dict[str, Any]) -> None:
    name = next(name for name, fmt in plan["formats"].items() if "experts" in name and fmt != "int8-g64")
    plan["formats"][name] = "int8-g64"


@pytest.mark.parametrize("change", [_narrower, _wider_format])
def test_an_edited_plan_is_compared_and_applied(folder: Path, change: Any) -> None:
    name = edited(folder, change)
    differences = here("plan", "plan.json", name, cwd=folder).result["differences"]
    assert [each["what"].split()[0] for each in differences] == ["block"]
    apply = ("apply", "a.safetensors", "--plan", name, *PROFILE, "-o", "o.safetensors")
    foreseen = here(*apply, "--dry-run", cwd=folder).result["bytes"]
    applied = here(*apply, cwd=folder)
    assert bytes_of(applied.path) == foreseen
    assert any("edited" in note for note in applied.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan["blocks"][0].update(widths=[6400, 4, 4]), "6400"),
        (lambda plan: plan["blocks"][0].update(widths=[4]), "widths"),
        (lambda plan: plan["blocks"][0].update(shared_width=9999), "9999"),
        (lambda plan: plan["formats"].update({next(iter(plan["formats"])): "int9-g64"}), "int9"),
        (lambda plan: plan["formats"].update({"blocks.0.moe.experts.77.up_proj.weight": "int4-g64"}), "experts.77"),
        (lambda plan: plan.update(selection="luck"), "selection"),
    ],
)
def test_an_edited_plan_that_cannot_be_carried_out_is_refused_in_one_line(folder: Path, change: Any, said: str) -> None:
    name = edited(folder, change)
    before = outputs(folder)
    refused = here("apply", "a.safetensors", "--plan", name, *PROFILE, "-o", "o.safetensors", cwd=folder)
    assert refused.code in (3, 4) and said in refused.error(refused.code)
    assert outputs(folder) == before


def test_two_plans_are_compared_by_their_errors_in_one_row(folder: Path) -> None:
    point = read(folder / "curve.json")["result"]["points"][0]
    (folder / "point.json").write_text(json.dumps(point["plan"]))
    differences = here("plan", "plan.json", "point.json", cwd=folder).result["differences"]
    told = {each["what"]: (each["a"], each["b"]) for each in differences}
    assert "tried" in told["prediction error"][0] and "tried" not in told["prediction error"][1]
    assert not any("predicted_error" in what or "gap" in what for what in told)
    assert told["option size"][0] == "not given"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--curve", "--plan-only"), "--plan-only"),
        (("--curve", "--dry-run"), "--dry-run"),
        (("--curve", "-o", "b.safetensors"), "--output"),
        (("--curve", "--force"), "--force"),
        (("--curve", "--max-damage", 0.1), "--max-damage"),
        (("--ratio", 0.301, "--png", "c.png"), "--png"),
        (("--ratio", 0.301, "--plan-only", "--dry-run"), "--dry-run"),
        (("--curve", "--png", "c.pdf"), ".png"),
    ],
)
def test_options_that_exclude_each_other_are_refused(folder: Path, options: tuple[object, ...], said: str) -> None:
    assert said in here("compress", "a.safetensors", *PROFILE, *options, cwd=folder).error(2)


def test_a_size_that_no_plan_reaches_is_refused_before_anything_is_measured(folder: Path) -> None:
    assert "smallest file" in here(*CURVE, "--size", "1kB", cwd=folder).error(4)
    assert "nothing to do" in here(*CURVE, "--size", "1GB", cwd=folder).error(4)
