"""Measurements that are kept beside the profile: used again to the last bit, completed, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compressing import measure_few_tokens
from conftest import make_pico
from keeping import result_after_interrupts
from mixing import Given, profiled

from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.precision import sensitivity, trial
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.sensitivity import Sensitivities, measured_sensitivities
from ditmoe_cli.compression.precision.trial import try_formats
from ditmoe_cli.compression.prune import replayed_choice
from ditmoe_cli.compression.prune.pruning import Pruning, plan_replayed
from ditmoe_cli.compression.replay.kept_measures import KeptMeasures, kept_measures


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, 128)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return profiled(make_pico(hidden=32, input_size=4, experts=3), tmp_path_factory.mktemp("measured"), cfg=1.5)


class Keeping:
    """A checkpoint with a profile and measurements kept in a folder of their own, and what is told about these."""

    def __init__(self, asked: Given, folder: Path) -> None:
        self.notes: list[str] = []
        usual = kept_measures(*asked, "cpu", self.notes.append)
        self.kept = KeptMeasures(folder / "p.measured.json", usual.key, self.notes.append)
        self.calibrated = Calibrated(*asked, "cpu", kept=self.kept)


def formats(asked: Given, *widths: str) -> dict[str, tuple[str, ...]]:
    offered = candidate_formats(asked[0], Candidates(allowed=widths, floors={}))
    return {name: tuple(fmt for fmt in fmts if fmt) for name, fmts in offered.items()}


_unkept: dict[tuple[str, ...], Sensitivities] = {}


def unkept(asked: Given, *widths: str) -> Sensitivities:
    """The errors of these widths, measured once without keeping them."""
    if widths not in _unkept:
        _unkept[widths] = measured_sensitivities(Calibrated(*asked, "cpu"), formats(asked, *widths))
    return _unkept[widths]


def test_errors_are_the_same_kept_or_not_and_are_measured_once(
    asked: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew = unkept(asked, "2", "4")
    keeping = Keeping(asked, tmp_path)
    assert measured_sensitivities(keeping.calibrated, formats(asked, "2", "4")) == anew
    monkeypatch.setattr(sensitivity, "OffloadedDiTMoE", None)  # no model is needed any more
    assert measured_sensitivities(keeping.calibrated, formats(asked, "2", "4")) == anew
    assert keeping.notes == [f"using the errors of formats kept in {keeping.kept.path}"]


def test_only_new_formats_are_measured_to_the_same_errors(asked: Given, tmp_path: Path) -> None:
    keeping = Keeping(asked, tmp_path)
    measured_sensitivities(keeping.calibrated, formats(asked, "2"))
    both = measured_sensitivities(keeping.calibrated, formats(asked, "2", "4"))
    assert both == unkept(asked, "2", "4")
    more = sum(map(len, formats(asked, "4").values()))
    assert keeping.notes == [f"using the errors of formats kept in {keeping.kept.path}; {more} more are measured"]


@pytest.mark.slow
def test_other_weights_together_have_amplifications_of_their_own(asked: Given, tmp_path: Path) -> None:
    keeping, every = Keeping(asked, tmp_path), formats(asked, "3")
    measured_sensitivities(keeping.calibrated, every)
    some = {name: fmts for name, fmts in every.items() if ".experts.0." not in name}
    assert measured_sensitivities(keeping.calibrated, some) == measured_sensitivities(Calibrated(*asked, "cpu"), some)


def test_an_interrupted_measurement_goes_on_to_the_same_errors(asked: Given, tmp_path: Path) -> None:
    keeping = Keeping(asked, tmp_path)

    def measured() -> Any:
        result = measured_sensitivities(keeping.calibrated, formats(asked, "3"))
        content = json.loads(keeping.kept.path.read_text())
        keeping.kept.path.unlink()
        return result, content

    expected = measured()
    assert result_after_interrupts(measured) == expected
    assert list(tmp_path.iterdir()) == []
    assert any(note.startswith("going on behind block 1 of 2") for note in keeping.notes)
    assert "kept 1 of 2 blocks; the same command goes on" in keeping.notes


def test_an_interrupted_trial_goes_on_to_the_same_errors(asked: Given, tmp_path: Path) -> None:
    keeping, mix = Keeping(asked, tmp_path), {name: fmts[0] for name, fmts in formats(asked, "3").items()}

    def tried() -> Any:
        result = try_formats(keeping.calibrated, mix)
        keeping.kept.path.unlink()
        return result

    expected = try_formats(Calibrated(*asked, "cpu"), mix)
    assert result_after_interrupts(tried) == expected


@pytest.mark.slow
def test_amplifications_are_not_gone_on_with_where_they_were_not_measured(
    asked: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = Keeping(asked, tmp_path)
    measured_sensitivities(keeping.calibrated, formats(asked, "2"))
    keep = sensitivity._Measurement.keep

    def stopped(*given: Any) -> None:
        keep(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sensitivity._Measurement, "keep", stopped)
        with pytest.raises(KeyboardInterrupt):
            measured_sensitivities(keeping.calibrated, formats(asked, "3"))
    keeping.kept.path.unlink()  # and the amplifications in it
    anew = unkept(asked, "3")
    assert measured_sensitivities(keeping.calibrated, formats(asked, "3")) == anew


def test_a_trial_is_made_once(asked: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, mix = Keeping(asked, tmp_path), {name: fmts[0] for name, fmts in formats(asked, "3").items()}
    first = try_formats(keeping.calibrated, mix)
    monkeypatch.setattr(trial, "OffloadedDiTMoE", None)  # no model is needed any more
    assert try_formats(keeping.calibrated, mix) == first


@pytest.mark.parametrize("shared_budget", [False, True])
@pytest.mark.parametrize("method", ["naee", "diet"])
def test_interrupted_choices_go_on_with_the_blocks_that_are_left(
    method: str, shared_budget: bool, asked: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruning = Pruning(Keep(count=2), method, None if method == "diet" and not shared_budget else "ghost")
    pruning = Pruning(pruning.keep, method, pruning.router, shared_budget=shared_budget)
    expected = plan_replayed(Calibrated(*asked, "cpu"), pruning)
    keeping, of_block, blocks = Keeping(asked, tmp_path), replayed_choice._of_block, list[int]()

    def counted(profile: Any, criterion: Any, index: int, *rest: Any) -> Any:
        if blocks == [0]:
            blocks.append(-1)
            raise KeyboardInterrupt
        blocks.append(index)
        return of_block(profile, criterion, index, *rest)

    monkeypatch.setattr(replayed_choice, "_of_block", counted)
    with pytest.raises(KeyboardInterrupt):
        plan_replayed(keeping.calibrated, pruning)
    assert plan_replayed(keeping.calibrated, pruning) == expected
    assert plan_replayed(keeping.calibrated, pruning) == expected
    assert blocks == [0, -1, 1], "each block once"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "ditmoe.measured/1", "key": "other", "trials": {}}'])
def test_a_file_that_is_damaged_or_of_another_key_is_begun_anew(content: str, asked: Given, tmp_path: Path) -> None:
    kept = Keeping(asked, tmp_path).kept
    kept.path.write_text(content)
    assert kept.part("trials") == {}
    kept.add("trials", {"a": 0.1})
    kept.add("trials", {"b": 1e-300})
    assert kept.part("trials") == {"a": 0.1, "b": 1e-300}


def test_numbers_that_were_changed_in_the_file_are_not_used(asked: Given, tmp_path: Path) -> None:
    kept = Keeping(asked, tmp_path).kept
    kept.add("trials", {"a": 0.125})
    kept.path.write_text(kept.path.read_text().replace("0.125", "0.126"))
    assert kept.part("trials") == {}


def test_a_file_that_another_run_is_writing_is_not_written_into(asked: Given, tmp_path: Path) -> None:
    kept = Keeping(asked, tmp_path).kept
    others = kept.path.with_name(f"{kept.path.name}.new")
    others.write_text("half of it")
    kept.add("trials", {"a": 0.125})
    assert others.read_text() == "half of it" and kept.part("trials") == {"a": 0.125}


def test_where_nothing_can_be_written_measuring_says_so_and_goes_on(asked: Given, tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "file").write_text("no folder")
    kept = KeptMeasures(tmp_path / "file" / "p.measured.json", "key", notes.append)
    mix = {name: fmts[0] for name, fmts in formats(asked, "3").items()}
    assert try_formats(Calibrated(*asked, "cpu", kept=kept), mix) == try_formats(Calibrated(*asked, "cpu"), mix)
    assert len(notes) == 2 and "without keeping" in notes[0] and "not kept" in notes[1]


def test_beside_another_run_measuring_is_not_kept(asked: Given, tmp_path: Path) -> None:
    keeping, mix = Keeping(asked, tmp_path), {name: fmts[0] for name, fmts in formats(asked, "3").items()}
    with keeping.kept.working({"other": 1}):
        try_formats(keeping.calibrated, mix)
    assert "without keeping" in keeping.notes[0]
    assert len(keeping.kept.part("trials")) == 1
