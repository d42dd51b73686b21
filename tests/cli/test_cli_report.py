"""``ditmoe report`` as a program: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path

import pytest
from cli_helpers import FIELDS, contents, here, on_terminal
from conftest import make_pico
from reporting import Planted, even
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("few_tokens")

PROFILING = ("profile-experts", "a.safetensors", "--images", 6, "--steps", 4, "--bins", 4)
QUICK = ("--replicates", 20)
SMALL = Planted(even(blocks=1, bins=1, positions=1, classes=1, branches=1), images=2, cfg=1.0)  # three figures


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


def test_the_profile_of_a_checkpoint_is_found_under_its_usual_name(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "a.safetensors", tmp_path)
    words = ("report", "profile", tmp_path / "a.safetensors", *QUICK)
    assert "no profile of it lies here or beside it; make one with ditmoe profile-experts" in here(
        *words, cwd=folder
    ).error(3)
    shutil.copy(folder / "p.safetensors", tmp_path / "a.profile.safetensors")
    outcome = here(*words, cwd=folder)
    assert f"ditmoe: using the profile {tmp_path / 'a.profile.safetensors'}" in outcome.notes
    assert outcome.result == here("report", "profile", "p.safetensors", *QUICK, cwd=folder).result


def test_a_terminal_shows_a_table(folder: Path) -> None:
    code, shown = on_terminal("report", "profile", "p.safetensors", *QUICK, cwd=folder, NO_COLOR="1")
    assert code == 0
    assert "Specialisation by position fades with depth: " in shown
    assert "top-k mass" in shown
    assert "dead: " in shown
    assert "{" not in shown
    assert "\033[1m" not in shown


def test_page_and_figures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    SMALL.save(tmp_path / "p.safetensors")
    words = ("report", "profile", "p.safetensors", *QUICK, "-o", "r.html", "--png", "figures")
    outcome = here(*words, "-q", cwd=tmp_path)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path / 'r.html'}\n", "")
    first = contents(tmp_path)
    assert "figures/load.png" in first
    assert "http" not in (tmp_path / "r.html").read_text()
    assert here(*words, cwd=tmp_path).err == "ditmoe: r.html is up to date\nditmoe: figures is up to date\n"
    (tmp_path / "figures" / "stale.png").write_bytes(b"")
    here(*words, cwd=tmp_path).error(5)
    figures = (*words[:5], "--png", "figures", "--force")
    assert here(*figures, cwd=tmp_path).result["png"] == str(tmp_path / "figures")
    assert contents(tmp_path) == first
    (tmp_path / "figures" / "mine.txt").write_bytes(b"")
    assert "mine.txt" in here(*figures, cwd=tmp_path).error(5)


@pytest.mark.slow
def test_a_report_that_is_there_is_not_made_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    SMALL.save(tmp_path / "p.safetensors")
    words = ("report", "profile", "p.safetensors", *QUICK)
    both = (*words, "-o", "r.html", "--png", "figures")
    first, files = here(*both, cwd=tmp_path), contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("ditmoe_cli.routing.report.build.build_report", None)  # nothing is computed
        again = here(*both, cwd=tmp_path)
        assert (again.code, again.out) == (0, first.out)
        assert again.err == "ditmoe: r.html is up to date\nditmoe: figures is up to date\n"
        told = here(*both, "--text", cwd=tmp_path)
        assert (told.code, "wrote" in told.out) == (0, False)
        assert "top-k mass" in told.out
        assert contents(tmp_path) == files
        for other in (("--seed", 1), ("--replicates", 21)):
            assert "exists already" in here(*words, "-o", "r.html", *other, cwd=tmp_path).error(5)
        fast = folder / "fast.safetensors"
        assert "exists already" in here("report", "profile", fast, *QUICK, "-o", "r.html", cwd=tmp_path).error(5)
        patched.setattr("ditmoe_cli.api.report_runs.__version__", "0")
        assert "exists already" in here(*words, "-o", "r.html", cwd=tmp_path).error(5)
    (tmp_path / "r.html").unlink()
    assert "figures is up to date" in here(*both, cwd=tmp_path).err
    assert contents(tmp_path) == files, "only what is missing is made, to the same bytes"
    assert "up to date" not in here(*both, "--force", cwd=tmp_path).err
    assert contents(tmp_path) == files


def test_a_page_in_a_folder_of_figures_is_refused(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("report", "profile", folder / "p.safetensors", *QUICK, "-o", "figures/r.html", "--png", "figures")
    here(*words, cwd=tmp_path).error(3)
    (tmp_path / "figures").mkdir()
    assert "--png figures" in here(*words, "--force", cwd=tmp_path).error(2)
    assert not list((tmp_path / "figures").iterdir())


def test_targets_that_cannot_be_written_are_refused_before_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("ditmoe_cli.routing.report.build.build_report", None)
    words = ("report", "profile", folder / "p.safetensors", *QUICK)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to("folder.html")
    for option, target in (("-o", "no/r.html"), ("-o", "/proc/r.html"), ("--png", "no/figures"), ("--png", "/proc/f")):
        assert target.split("/")[-2] in here(*words, option, target, cwd=tmp_path).error(3)
    for target in ("folder.html", "link.html"):
        assert target in here(*words, "-o", target, cwd=tmp_path).error(5)


@pytest.mark.slow
def test_any_file_name_is_reported_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    name = "<b>\"'&a$\\frac{1$\udcff\n图.safetensors"
    SMALL.save(tmp_path / name)
    outcome = here("report", "profile", name, *QUICK, "-o", "r.html", "--png", "figures", "-q", cwd=tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    shown = "".join(c if c.isprintable() else "\ufffd" for c in name)
    assert f"<h1>Routing profile {escape(shown)}</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "load.png").is_file()


@pytest.mark.slow
def test_pruned_checkpoints_with_unequal_blocks_are_reported_on_and_their_weights_compared(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    pruned = here(
        "prune",
        folder / "a.safetensors",
        "--keep",
        0.5,
        "--method",
        "frequency",
        "--allocate",
        "global",
        "--profile",
        folder / "p.safetensors",
        "-o",
        "b.safetensors",
        cwd=tmp_path,
    )
    assert pruned.code == 0, pruned.err
    assert here("profile-experts", "b.safetensors", *PROFILING[2:], "-o", "q.safetensors", cwd=tmp_path).code == 0
    words = ("report", "profile", "q.safetensors", *QUICK, "-o", "r.html", "--weights")
    outcome = here(*words, "b.safetensors", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "r.html").read_text()
    assert "checkpoint b.safetensors" in page and 'id="similarity-weights"' in page
    assert "exists already" in here(*words[:-1], cwd=tmp_path).error(5), "not the report without weights"
    (tmp_path / "r.html").unlink()
    assert "profile of another checkpoint" in here(*words, folder / "a.safetensors", cwd=tmp_path).error(3)
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


def test_replicates_are_bounded(folder: Path) -> None:
    message = here("report", "profile", "p.safetensors", "--replicates", 10**12, cwd=folder).error(2)
    assert message == "--replicates 1000000000000: give at most 100000, since all are in memory at once"


def test_usage(folder: Path) -> None:
    assert "choose profile" in here("report", "plan", "p.safetensors", cwd=folder).error(2)
    assert "WHAT" in here("report", cwd=folder).error(2)
    assert ".html" in here("report", "profile", "p.safetensors", "-o", "r.pdf", cwd=folder).error(2)
    assert "--replicates" in here("report", "profile", "p.safetensors", "--replicates", 2, cwd=folder).error(2)
