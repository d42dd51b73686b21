"""``ditmoe report`` as a program: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_helpers import FIELDS, contents, here, on_terminal
from conftest import make_pico
from safetensors.torch import load_file, save_file

PROFILING = ("profile-experts", "a.safetensors", "--images", 6, "--steps", 4, "--bins", 4)
QUICK = ("--replicates", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and profiles of it, a full one and a fast one; not to be written to."""
    folder = tmp_path_factory.mktemp("report")
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    piped = here(*PROFILING, "-o", "p.safetensors", cwd=folder)
    (folder / "envelope.json").write_text(piped.out)
    assert here(*PROFILING, "--fast", "-o", "fast.safetensors", cwd=folder).code == 0
    return folder


def test_the_envelope_holds_the_derived_numbers(folder: Path) -> None:
    envelope = here("report", "profile", "p.safetensors", *QUICK, cwd=folder).envelope
    assert envelope.keys() == FIELDS
    assert envelope["profile"] == str(folder / "p.safetensors")
    result = envelope["result"]
    selected = load_file(folder / "p.safetensors")["selected"].sum(dim=(1, 2)).double()
    ratio = selected / selected.mean(dim=1, keepdim=True)
    for block, expected in zip(result["blocks"], ratio.tolist(), strict=True):
        assert block["load_ratio"] == pytest.approx(expected)
    assert [claim["name"] for claim in result["claims"]] == ["preferences", "depth", "steps"]
    assert result["page"] is None
    assert result["missing"] == []


def test_a_profile_comes_through_a_pipe(folder: Path) -> None:
    piped = here("report", "profile", *QUICK, cwd=folder, stdin=(folder / "envelope.json").read_text())
    named = here("report", "profile", "p.safetensors", *QUICK, cwd=folder)
    assert piped.result == named.result
    assert piped.envelope["checkpoint"] == str(folder / "a.safetensors")
    assert [step["command"] for step in piped.envelope["history"]] == ["profile-experts", "report"]


def test_a_terminal_shows_a_table(folder: Path) -> None:
    code, shown = on_terminal("report", "profile", "p.safetensors", *QUICK, cwd=folder, NO_COLOR="1")
    assert code == 0
    assert "Specialisation by position fades with depth: " in shown
    assert "top-k mass" in shown
    assert "dead: " in shown
    assert "{" not in shown
    assert "\033[1m" not in shown


def test_page_and_figures_are_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("report", "profile", folder / "p.safetensors", *QUICK, "-o", "r.html", "--png", "figures")
    outcome = here(*words, "-q", cwd=tmp_path)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path / 'r.html'}\n", "")
    first = contents(tmp_path)
    assert "figures/load.png" in first
    assert "http" not in (tmp_path / "r.html").read_text()
    here(*words, cwd=tmp_path).error(5)
    (tmp_path / "figures" / "stale.png").write_bytes(b"")
    figures = (*words[:5], "--png", "figures", "--force")
    assert here(*figures, cwd=tmp_path).result["png"] == str(tmp_path / "figures")
    assert contents(tmp_path) == first
    (tmp_path / "figures" / "mine.txt").write_bytes(b"")
    assert "mine.txt" in here(*figures, cwd=tmp_path).error(5)


def test_weights_of_the_profiled_checkpoint_are_compared(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("report", "profile", folder / "p.safetensors", *QUICK, "-o", tmp_path / "r.html", "--weights")
    assert here(*words, "a.safetensors", cwd=folder).code == 0
    assert 'id="similarity-weights"' in (tmp_path / "r.html").read_text()
    (tmp_path / "r.html").unlink()
    assert "profile of another checkpoint" in here(*words, "demo:digits", cwd=folder).error(3)
    assert not (tmp_path / "r.html").exists()


def test_a_fast_profile_is_reported_on(folder: Path) -> None:
    outcome = here("report", "profile", "fast.safetensors", *QUICK, cwd=folder)
    assert outcome.result["missing"] == ["easy_ep", "output.gram", "output.all_token_mean", "output.cka"]


def test_without_matplotlib_numbers_are_printed_and_figures_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditmoe_cli.routing.report.figures.find_spec", lambda _: None)
    words = ("report", "profile", folder / "p.safetensors", *QUICK)
    assert here(*words, cwd=tmp_path).code == 0
    for output in (("-o", "r.html"), ("--png", "figures")):
        assert "pip install 'ditmoe[report]'" in here(*words, *output, cwd=tmp_path).error(3)
    assert not list(tmp_path.iterdir())


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "p.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    tensors = load_file(folder / "p.safetensors")
    document = {"schema": "ditmoe.profile/9", "experts": [4, 4]}
    save_file(tensors, tmp_path / "later.safetensors", {"ditmoe": json.dumps(document)})
    for name in ("nowhere.safetensors", "cut.safetensors", "later.safetensors", folder / "a.safetensors"):
        assert str(name) in here("report", "profile", name, cwd=tmp_path).error(3)
    assert "stdin is empty" in here("report", "profile", cwd=tmp_path, stdin="").error(3)
    inspected = here("inspect", folder / "a.safetensors", cwd=tmp_path).out
    assert "names no profile" in here("report", "profile", cwd=tmp_path, stdin=inspected).error(3)


@pytest.mark.parametrize("name", ["image.steps", "coactivation", "router.margin"])
def test_missing_or_misshapen_tensors_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    from ditmoe_cli.routing.profile import read_profile, write_profile

    good = read_profile(folder / "p.safetensors")
    tensors = load_file(folder / "p.safetensors")
    shorter = {**tensors, name: tensors[name][..., 1:].contiguous()}
    lacking = {key: value for key, value in tensors.items() if key != name}
    for variant in (shorter, lacking):
        path = tmp_path / "bad.safetensors"
        write_profile(path, variant, good.checkpoint, good.calibration, good.experts, True, ())
        assert name in here("report", "profile", path, cwd=tmp_path).error(3)


def test_usage(folder: Path) -> None:
    assert "choose profile" in here("report", "plan", "p.safetensors", cwd=folder).error(2)
    assert "WHAT" in here("report", cwd=folder).error(2)
    assert ".html" in here("report", "profile", "p.safetensors", "-o", "r.pdf", cwd=folder).error(2)
    assert "--replicates" in here("report", "profile", "p.safetensors", "--replicates", 2, cwd=folder).error(2)
