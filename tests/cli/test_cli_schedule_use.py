"""Schedules in use: sample, fid, compare and bench take them, record them, and refuse those of other ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import here, in_two_processes
from conftest import Pico, make_pico
from distilling import SMALL, distilled_pair
from safetensors.numpy import load_file
from schedules import EULER, all_full, by_evaluation, every_second, statistics_for, write_schedule

from ditmoe_cli.cli.stage import Stage, parse_stage
from ditmoe_cli.diffusion.compute_schedule import SLOPES, ScheduledSampling, read_schedule
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.model.checkpoint import open_checkpoint

QUICK = ("--images", 4, "--steps", 3, "--solver", "euler")
FOUR = ("--images", 4)


def pixels(**changes: Any) -> Pico:
    """Return a model of pixels."""
    return make_pico(**{"sampler": "rf", "in_channels": 1, "widths": ((16,) * 4,) * 2, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another, and schedules of the first: everything computed, every second step reused, none computed."""
    made = tmp_path_factory.mktemp("scheduled")
    a = pixels().save(made / "a.safetensors")
    b = pixels(seed=1).save(made / "b.safetensors")
    write_schedule(made / "full.safetensors", a, all_full(EULER), method="full")
    write_schedule(made / "half.safetensors", a, every_second(EULER), method="fora:2")
    write_schedule(made / "other.safetensors", b, all_full(EULER))
    return made


def images(path: Path) -> np.ndarray[Any, Any]:
    return load_file(path)["images"]


# sample


def test_with_everything_computed_images_are_those_without_a_schedule(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    assert here("sample", a, *QUICK, "-o", "plain.safetensors", cwd=tmp_path).code == 0
    found = here("sample", a, *FOUR, "--schedule", folder / "full.safetensors", "-o", "full.safetensors", cwd=tmp_path)
    assert np.array_equal(images(tmp_path / "full.safetensors"), images(tmp_path / "plain.safetensors"))
    assert found.result["computed"] == {"method": "full", "flops": 1.0, "kept": 0, "nfe": 3}
    assert "a.safetensors: sampled as its schedule plans, by 3 steps of euler at cfg 1" in found.err


@pytest.mark.parametrize("family", ["rf", "ddpm"])
@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_families_layouts_and_bf16(tmp_path: Path, family: str, attention: str, dtype: str) -> None:
    a = pixels(sampler=family, attention=attention).save(tmp_path / "a.safetensors")
    way = ScheduledSampling("euler" if family == "rf" else "ddim", 3, cfg=1.5)
    write_schedule(tmp_path / "full.schedule.safetensors", a, all_full(way), way)
    words = ("sample", a, *FOUR, "--dtype", dtype)
    solver = ("--solver", way.solver, "--steps", 3, "--cfg", 1.5)
    assert here(*words, *solver, "-o", "x.safetensors", cwd=tmp_path).code == 0
    assert here(*words, "--schedule", "full.schedule.safetensors", "-o", "y.safetensors", cwd=tmp_path).code == 0
    assert np.array_equal(images(tmp_path / "x.safetensors"), images(tmp_path / "y.safetensors"))


def test_samples_record_what_was_computed(folder: Path, tmp_path: Path) -> None:
    a, half = folder / "a.safetensors", folder / "half.safetensors"
    found = here("sample", a, *FOUR, "--schedule", half, cwd=tmp_path)
    digest = read_schedule(half).digest
    assert found.result["spec"]["schedule"] == digest
    computed = found.result["computed"]
    config = open_checkpoint(a).config
    kept = 2 * 2 * config.num_patches * config.hidden_size * 4  # attention and mixture of two blocks, in fp32
    assert (computed["method"], computed["nfe"], computed["kept"]) == ("fora:2", 3, kept)
    assert 0.6 < computed["flops"] < 0.8  # two of three steps, and the ends of the third
    again = here("sample", a, *FOUR, "--schedule", half, cwd=tmp_path)
    assert "up to date" in again.err and again.result == found.result


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_change_neither_images_nor_what_is_told(folder: Path, tmp_path: Path, batch: int) -> None:
    words = ("sample", folder / "a.safetensors", *FOUR, "--schedule", folder / "half.safetensors")
    whole = here(*words, "-o", "x.safetensors", cwd=tmp_path).result
    parts = here(*words, "--batch", batch, "-o", "y.safetensors", cwd=tmp_path).result
    assert whole == parts
    assert np.array_equal(images(tmp_path / "x.safetensors"), images(tmp_path / "y.safetensors"))


def test_interrupted_samples_go_on_by_the_schedule(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ditmoe_cli.evaluation import samples

    words = ("sample", folder / "a.safetensors", *FOUR, "--schedule", folder / "half.safetensors", "--batch", 2)
    whole = here(*words, "-o", "whole.safetensors", cwd=tmp_path)
    asked = samples.sample

    def broken(models: Any, sampling: Any, part: Any) -> Any:
        if part[0] == 2:
            raise KeyboardInterrupt
        return asked(models, sampling, part)

    monkeypatch.setattr(samples, "sample", broken)
    assert here(*words, "-o", "x.safetensors", cwd=tmp_path).code == 130
    monkeypatch.setattr(samples, "sample", asked)
    found = here(*words, "-o", "x.safetensors", cwd=tmp_path)
    assert "going on with 2 of 4 images" in found.err
    assert found.result == whole.result
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.slow
def test_processes_share_the_work(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "a.safetensors", *FOUR, "--schedule", folder / "half.safetensors", "--batch", 2)
    alone = here(*words, "-o", "x.safetensors", cwd=tmp_path)
    first, second = in_two_processes(*words, "-o", "y.safetensors", cwd=tmp_path)
    assert (first.code, second.code, second.out) == (0, 0, "")
    assert first.result == alone.result
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_schedule_and_none_are_other_images_for_one_file(folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder / "a.safetensors", *QUICK, "-o", "x.safetensors")
    assert here(*words, "--schedule", folder / "half.safetensors", cwd=tmp_path).code == 0
    assert "sampled in another way (other schedule" in here(*words, cwd=tmp_path).error(5)


def test_a_schedule_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.safetensors"
    target.write_bytes((folder / "half.safetensors").read_bytes())
    words = ("sample", folder / "a.safetensors", *FOUR, "--schedule", target)
    here(*words, "-o", target, "--force", cwd=tmp_path).error(5)
    assert target.read_bytes() == (folder / "half.safetensors").read_bytes()


def test_guides_of_schedules(folder: Path, tmp_path: Path) -> None:
    """A routing guides as the schedule says; another checkpoint has to be given."""
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    by = replace(EULER, guide=Guide("top1", 0.5))
    by_b = replace(EULER, guide=Guide(open_checkpoint(b).fingerprint, 0.5))
    for name, way in (("by", by), ("with", by_b)):
        write_schedule(tmp_path / f"{name}.schedule.safetensors", a, all_full(way), way)
    plain = here("sample", a, *QUICK, "--guide-by", "top1", "--guide-scale", 0.5, "-o", "x.safetensors", cwd=tmp_path)
    found = here("sample", a, *FOUR, "--schedule", "by.schedule.safetensors", "-o", "y.safetensors", cwd=tmp_path)
    assert found.result["nfe"] == plain.result["nfe"] == 6
    assert np.array_equal(images(tmp_path / "x.safetensors"), images(tmp_path / "y.safetensors"))
    words = ("sample", a, *FOUR, "--schedule", "with.schedule.safetensors")
    assert f"guided by {by_b.guide.told}, not for 3 steps" in here(*words, cwd=tmp_path).error(3)  # type: ignore[union-attr]
    assert here(*words, "--guide-with", b, "--guide-scale", 0.5, cwd=tmp_path).result["nfe"] == 6


def test_compressed_checkpoints_have_schedules_of_their_own(tmp_path: Path) -> None:
    """Of three widths and a ghost: the rules need statistics by router row."""
    a = pixels(widths=((16, 8, 24),) * 2, expert_of=((0, 1, -1, 2), (2, 0, 1, -1))).save(tmp_path / "a.safetensors")
    config = open_checkpoint(a).config
    words = ("sample", a, "--images", 4)
    assert here(*words, "--steps", 3, "--solver", "euler", "-o", "plain.safetensors", cwd=tmp_path).code == 0
    for choice, least in (("full", 0.7), ("saliency:0.05", 0.4), ("regressed", 0.4), ("top-p:0.4", 0.4)):
        table = by_evaluation(EULER, lambda _, choice=choice: choice)  # type: ignore[misc]
        name = f"{choice.partition(':')[0]}.schedule.safetensors"
        write_schedule(tmp_path / name, a, table, arrays=statistics_for(config))
        found = here(*words, "--schedule", name, "-o", f"{choice[:4]}.safetensors", cwd=tmp_path).result
        assert least < found["computed"]["flops"] <= 1.05
    assert np.array_equal(images(tmp_path / "full.safetensors"), images(tmp_path / "plain.safetensors"))


def test_a_distilled_copy_is_scheduled_at_its_own_steps(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path, **SMALL)
    way = ScheduledSampling("euler", 4)
    write_schedule(tmp_path / "few.schedule.safetensors", pair.few, every_second(way), way)
    words = ("--schedule", "few.schedule.safetensors", "--images", 8)
    assert here("sample", pair.few, *words, cwd=tmp_path).result["computed"]["flops"] < 0.7
    found = here("fid", pair.few, "--ref", pair.original, *words, cwd=tmp_path).result["conditions"]
    assert found["subject"]["sampling"]["schedule"] and "schedule" not in found["reference"]["sampling"]
    assert (found["subject"]["sampling"]["steps"], found["reference"]["sampling"]["steps"]) == (4, 16)


# refusals


@pytest.mark.parametrize(
    ("schedule", "words", "code", "said"),
    [
        ("other", (), 3, "is a schedule of another checkpoint ("),
        ("full", ("--steps", 4), 3, "is a schedule for 3 steps of euler at cfg 1, not for 4 steps of euler at cfg 1"),
        ("full", ("--solver", "heun"), 3, "for 3 steps of euler at cfg 1, not for 3 steps of heun at cfg 1"),
        ("full", ("--cfg", 1.5), 3, "for 3 steps of euler at cfg 1, not for 3 steps of euler at cfg 1.5"),
        ("full", ("--upstream-exact",), 3, "for 3 steps of euler at cfg 1, not for 50 steps of euler at cfg 1"),
        (
            "full",
            ("--guide-by", "top1", "--guide-scale", 1),
            3,
            "not for 3 steps of euler at cfg 1, guided by top1 at 1",
        ),
        ("full", ("--cuda-graphs",), 2, "--cuda-graphs: a graph replays one step"),
        ("full", ("--solver", "ab2", "--steps", 16), 3, "not for 16 steps of ab2 at cfg 1"),
        ("missing", (), 3, "missing.safetensors: no such schedule; make one with ditmoe schedule"),
        ("a", (), 3, "schema is 'ditmoe.checkpoint/1', expected 'ditmoe.schedule/1'"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "fid"])
def test_schedules_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, command: str, schedule: str, words: tuple[object, ...], code: int, said: str
) -> None:
    chosen = ("--images", 4, "--schedule", folder / f"{schedule}.safetensors")
    assert said in here(command, folder / "a.safetensors", *chosen, *words, cwd=tmp_path).error(code)
    assert list(tmp_path.iterdir()) == []


def test_images_are_not_scored_by_a_schedule(folder: Path, tmp_path: Path) -> None:
    a, half = folder / "a.safetensors", folder / "half.safetensors"
    made = Path(here("sample", a, *QUICK, cwd=tmp_path).envelope["samples"])
    said = here("fid", made, "--ref", a, "--schedule", half, cwd=tmp_path).error(2)
    assert said.startswith(f"--schedule {half}: {made} holds no checkpoint to sample by it")


# fid


def test_fid_samples_the_subject_alone_by_a_schedule(folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    many = ("--images", 8)
    exact = here("fid", a, *many, "--schedule", folder / "full.safetensors", cwd=tmp_path).result
    assert (exact["frechet"] < 1e-6, exact["paired"]["mse"], exact["paired"]["n"]) == (True, 0, 8)
    found = here("fid", a, *many, "--schedule", folder / "half.safetensors", cwd=tmp_path).result
    sides = {side: found["conditions"][side]["sampling"] for side in ("subject", "reference", "original")}
    assert sides["subject"]["computed"]["method"] == "fora:2"
    assert "schedule" not in sides["reference"] and sides["original"] == sides["reference"]
    assert found["paired"]["mse"] > 0
    kept = here("fid", a, *many, "--schedule", folder / "half.safetensors", cwd=tmp_path)
    assert "kept from an earlier run" in kept.err and kept.result == found
    against = here("fid", a, "--ref", b, *many, "--schedule", folder / "half.safetensors", cwd=tmp_path).result
    assert against["paired"]["n"] == 8 and against["conditions"]["reference"]["sampling"]["steps"] == 3


def test_samples_by_a_schedule_pair_with_those_without(folder: Path, tmp_path: Path) -> None:
    a, many = folder / "a.safetensors", ("--images", 8)
    half = ("--schedule", folder / "half.safetensors")
    assert here("sample", a, *many, *half, "-o", "half.safetensors", cwd=tmp_path).code == 0
    by_file = here("fid", "half.safetensors", "--ref", a, cwd=tmp_path).result
    at_once = here("fid", a, *many, *half, cwd=tmp_path).result
    assert by_file["paired"] == at_once["paired"] and by_file["frechet"] == at_once["frechet"]
    told = [each["conditions"]["subject"]["sampling"] for each in (by_file, at_once)]
    assert told[0] == told[1]


# pipes


def test_envelopes_name_the_schedule_until_the_checkpoint_is_another(folder: Path, tmp_path: Path) -> None:
    a, half = folder / "a.safetensors", folder / "half.safetensors"
    plain = Stage(checkpoint=str(a), original=str(a))
    assert "schedule" not in plain.to_json({})
    stage = replace(plain, schedule=str(half))
    assert parse_stage(json.dumps(stage.to_json({}))) == stage
    assert stage.done("sample", {}, samples=tmp_path / "s.safetensors").schedule == str(half)
    assert stage.done("prune", {}, checkpoint=tmp_path / "p.safetensors").schedule is None
    envelope = json.dumps(stage.to_json({}))
    sampled = here("sample", *FOUR, cwd=tmp_path, stdin=envelope)
    assert sampled.result["computed"]["method"] == "fora:2" and sampled.envelope["schedule"] == str(half)
    scored = here("fid", cwd=tmp_path, stdin=sampled.out).result
    assert scored["paired"]["mse"] > 0
    at_once = here("fid", "--images", 4, cwd=tmp_path, stdin=envelope).result
    assert at_once["paired"] == scored["paired"]


def test_a_malformed_schedule_in_an_envelope_is_named(folder: Path, tmp_path: Path) -> None:
    document = Stage(checkpoint=str(folder / "a.safetensors")).to_json({})
    said = here("sample", cwd=tmp_path, stdin=json.dumps({**document, "schedule": 3})).error(3)
    assert said == "stdin: field 'schedule' of the envelope is malformed"


# compare


def test_compare_is_exactly_0_where_everything_is_computed(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    made = here("compare", a, a, *FOUR, "--schedule", folder / "full.safetensors", cwd=tmp_path)
    assert made.envelope["schedule"] == str(folder / "full.safetensors")
    found = made.result
    assert found["prediction"]["relative_error"] == found["latents"]["relative_error"] == found["images"]["mse"] == 0
    assert found["depth"]["cumulative"] == found["depth"]["added"] == [0, 0]
    assert found["routing"]["overlap"] == 1
    assert found["computed"]["flops"] == 1 and found["conditions"]["b"]["schedule"]


def test_compare_follows_the_schedule_step_by_step(folder: Path, tmp_path: Path) -> None:
    """Steps that compute everything from the other's state are exact; routing is that of steps that route."""
    a, half = folder / "a.safetensors", folder / "half.safetensors"
    found = here("compare", a, a, *FOUR, "--schedule", half, cwd=tmp_path).result
    by_step = found["prediction"]["steps"]["relative_error"]
    assert by_step[0] == by_step[2] == 0 and by_step[1] > 0
    overlaps = found["routing"]["bins"]["overlap"]
    assert overlaps[0] == overlaps[2] == [1, 1] and overlaps[1] == [None, None]
    assert found["depth"]["bins"]["added"][0] == [0, 0] and min(found["depth"]["bins"]["added"][1]) > 0
    assert found["images"]["mse"] > 0 and 0.6 < found["computed"]["flops"] < 0.8
    again = here("compare", a, a, *FOUR, "--schedule", half, cwd=tmp_path)
    assert "kept from an earlier run" in again.err and again.result == found
    other = here("compare", a, a, *FOUR, "--schedule", folder / "full.safetensors", cwd=tmp_path)
    assert other.result["computed"]["method"] == "full" and other.result["images"]["mse"] == 0
    parts = here("compare", a, a, *FOUR, "--schedule", half, "--batch", 3, "--force", cwd=tmp_path).result
    assert parts["computed"] == found["computed"] and parts["images"] == found["images"]


@pytest.mark.parametrize("null", [("compute",) * 3, ("compute", "reuse", "off")])
def test_compare_under_guidance(folder: Path, tmp_path: Path, null: tuple[str, ...]) -> None:
    a = folder / "a.safetensors"
    way = replace(EULER, cfg=1.5)
    write_schedule(tmp_path / "s.safetensors", a, by_evaluation(way, lambda _: "full", null=null), way)
    found = here("compare", a, a, *FOUR, "--schedule", "s.safetensors", cwd=tmp_path).result
    errors = found["prediction"]["steps"]["relative_error"]
    assert [error > 0 for error in errors] == [choice != "compute" for choice in null]
    assert found["depth"]["cumulative"] == pytest.approx([0, 0], abs=1e-6)  # of the branches that are computed
    assert found["computed"]["nfe"] == 3 + null.count("compute")
    assert found["computed"]["flops"] == pytest.approx((3 + null.count("compute")) / 6)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
def test_compare_where_predictions_follow(folder: Path, tmp_path: Path, cfg: float) -> None:
    """Evaluations: asked, followed by what was predicted, asked. Blocks are those of evaluations that are asked."""
    a, way = folder / "a.safetensors", replace(EULER, cfg=cfg)
    null = ("compute", "off", "compute") if cfg > 1 else None
    table = by_evaluation(way, lambda k: "follow" if k == 1 else "full", null=null)
    write_schedule(tmp_path / "s.safetensors", a, table, way, arrays={SLOPES: np.zeros((3, 1, 2), np.float32)})
    found = here("compare", a, a, *FOUR, "--schedule", "s.safetensors", cwd=tmp_path).result
    errors = found["prediction"]["steps"]["relative_error"]
    assert errors[0] < 1e-6 and errors[2] < 1e-6 and errors[1] > 0.01
    assert found["depth"]["bins"]["added"][1] == [0, 0] and found["routing"]["bins"]["overlap"][1] == [None, None]
    assert found["computed"]["flops"] == pytest.approx(2 / 3) and found["images"]["mse"] > 0


def test_compare_by_residuals_knows_no_single_blocks(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    for threshold in (0.0, 100.0):
        table = replace(all_full(EULER), residual=threshold)
        write_schedule(tmp_path / f"{threshold}.safetensors", a, table)
        found = here("compare", a, a, *FOUR, "--schedule", f"{threshold}.safetensors", cwd=tmp_path).result
        assert found["depth"]["added"] == [None, None]
        assert found["routing"]["overlap"] is None and "reused together" in found["routing"]["note"]
        assert (found["prediction"]["relative_error"] > 0) == (threshold > 0)


def test_compare_measures_a_compressed_copy_by_its_schedule(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    small = pixels(widths=((8,) * 4,) * 2).save(tmp_path / "small.safetensors")
    write_schedule(tmp_path / "s.safetensors", small, every_second(EULER, saved="reuse-mixture"))
    found = here("compare", a, small, *FOUR, "--schedule", "s.safetensors", cwd=tmp_path)
    assert found.result["conditions"]["sampling"]["steps"] == 3
    plain = here("compare", a, small, *QUICK, cwd=tmp_path).result
    steps = [each["prediction"]["steps"]["relative_error"] for each in (found.result, plain)]
    assert steps[0][0] == steps[1][0] and steps[0][1] != steps[1][1]
    said = here("compare", small, a, *FOUR, "--schedule", "s.safetensors", cwd=tmp_path).error(3)
    assert "is a schedule of another checkpoint" in said


def test_compare_samples_a_distilled_copy_by_its_schedule_and_the_original_as_usual(tmp_path: Path) -> None:
    pair = distilled_pair(tmp_path, **SMALL)
    way = ScheduledSampling("euler", 4)
    write_schedule(tmp_path / "few.schedule.safetensors", pair.few, every_second(way), way)
    words = ("--schedule", "few.schedule.safetensors", "--images", 4)
    found = here("compare", pair.original, pair.few, *words, cwd=tmp_path).result
    assert found["prediction"] is None and found["computed"]["flops"] < 0.7
    assert (found["conditions"]["sampling"]["steps"], found["conditions"]["sampling_b"]["steps"]) == (16, 4)
    plain = here("compare", pair.original, pair.few, "--images", 4, cwd=tmp_path).result
    assert plain["images"]["mse"] != found["images"]["mse"]


def test_tables_tell_what_was_computed(folder: Path, tmp_path: Path) -> None:
    from cli_helpers import on_terminal

    a, half = folder / "a.safetensors", folder / "half.safetensors"
    bench = ("bench", a, "--batch", 2, "--repeats", 1, "--threads", 1)
    for words in (("sample", a, *FOUR), ("fid", a, *FOUR), ("compare", a, a, *FOUR), bench):
        code, text = on_terminal(*words, "--schedule", half, cwd=tmp_path)
        said = " ".join(text.split())
        assert code == 0 and "fora:2: " in said and " 0.6" in said and "kept an image" in said, text


# bench


def test_bench_tells_the_share_of_operations_and_of_seconds(folder: Path, tmp_path: Path) -> None:
    a, b, half = (folder / f"{name}.safetensors" for name in ("a", "b", "half"))
    quick = ("--batch", 2, "--repeats", 3, "--threads", 1, "--schedule", half)
    found = here("bench", a, *quick, cwd=tmp_path).result["schedule"]
    sampled = here("sample", a, *FOUR, "--schedule", half, cwd=tmp_path).result["computed"]
    assert {name: found[name] for name in sampled} == sampled
    assert (found["solver"], found["steps"], found["digest"]) == ("euler", 3, read_schedule(half).digest)
    assert 0 < found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert found["step_seconds"] == pytest.approx(found["seconds"] / 3)
    several = here("bench", b, a, *quick, cwd=tmp_path).result
    assert len(several["files"]) == 2 and several["schedule"]["flops"] == found["flops"]
    assert "schedule" not in here("bench", a, *quick[:-2], cwd=tmp_path).result
    said = here("bench", b, *quick, cwd=tmp_path).error(3)
    assert "is a schedule of another checkpoint" in said
    assert "not for 3 steps of euler at cfg 2" in here("bench", a, *quick, "--cfg", 2, cwd=tmp_path).error(3)
    assert list(tmp_path.glob("*.safetensors")) == list(tmp_path.glob("a.samples*"))


def test_bench_takes_guidance_from_the_schedule(folder: Path, tmp_path: Path) -> None:
    a = folder / "a.safetensors"
    way = replace(EULER, cfg=1.5, guide=Guide("top1", 0.5))
    write_schedule(
        tmp_path / "s.safetensors", a, by_evaluation(way, lambda _: "full", null=("compute", "off", "off")), way
    )
    words = ("bench", a, "--batch", 2, "--repeats", 1, "--threads", 1, "--schedule", "s.safetensors")
    found = here(*words, cwd=tmp_path).result
    assert found["schedule"]["nfe"] == 3 + 1 + 3 and found["schedule"]["flops"] == pytest.approx(4 / 6)
    assert found["conditions"]["cfg"] == 1.5 and found["conditions"]["guide"]["model"] == "top1"


# from Python


def test_functions_take_schedules(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ditmoe_cli

    monkeypatch.chdir(tmp_path)
    a, half = folder / "a.safetensors", folder / "half.safetensors"
    made = ditmoe_cli.sample(a, images=4, schedule=half)
    assert made.computed is not None and made.computed.method == "fora:2" and made.nfe == 3
    assert "fora:2: 0.6" in repr(made)
    scored = ditmoe_cli.score(a, images=4, schedule=half)
    assert scored.paired is not None and scored.paired.mse > 0
    assert ditmoe_cli.score(made, ref=a).paired == scored.paired
    compared = ditmoe_cli.compare(a, a, images=4, schedule=half)
    assert compared.figures["computed"] == made.computed.to_json() and "fora:2" in repr(compared)
    benched = ditmoe_cli.bench(a, batch=2, repeats=1, threads=1, schedule=half)
    assert benched.scheduled is not None and benched.scheduled.computed.flops == made.computed.flops
