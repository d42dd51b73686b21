"""Schedules of compute in files: what is written is read, and what is malformed or of another model is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_pico
from schedules import EULER, all_full, by_evaluation, every_second, statistics_for, write_schedule

from ditmoe_cli.diffusion.compute_schedule import (
    CONSTANT,
    ENERGY,
    SCALE,
    SLOPES,
    ComputeSchedule,
    ScheduledSampling,
    check_schedule,
    read_schedule,
    schedule_document,
)
from ditmoe_cli.diffusion.schedule import SOLVERS
from ditmoe_cli.diffusion.weak_guidance import Guide
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.arrays import write_arrays
from ditmoe_cli.model.block_choices import ComputeTable, parse_choice, table_of
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.compute_cost import block_cost, fixed_cost

GUIDED = ScheduledSampling("heun", 3, cfg=1.5, interval=(0.3, 1.0), guide=Guide("top1", 0.5, (0.0, 0.9)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of two blocks and four experts each."""
    return open_checkpoint(make_pico(sampler="rf").save(tmp_path_factory.mktemp("scheduled") / "a.safetensors"))


def mixed_table(way: ScheduledSampling) -> ComputeTable:
    """A table in which blocks and branches differ."""
    one = [parse_choice(text) for text in ("full", "reuse-slots")]
    two = [parse_choice(text) for text in ("forecast-attention+top-p:0.5", "saliency:0.25+skip-shared")]
    cells = []
    for evaluation in range(len(way.times)):
        full = [parse_choice("full")] * 2
        branch = full if evaluation == 0 else one if evaluation % 2 else two
        cells.append([branch, full] if way.null else [branch])
    return table_of(cells, way.null)


# what is written is read


@pytest.mark.parametrize("way", [EULER, GUIDED, ScheduledSampling("ab3", 5, 4.0)])
@pytest.mark.parametrize("bins", [1, 3])
def test_a_schedule_comes_back_from_its_file(
    checkpoint: Checkpoint, tmp_path: Path, way: ScheduledSampling, bins: int
) -> None:
    arrays = statistics_for(checkpoint.config, bins)
    path = write_schedule(tmp_path / "s.safetensors", checkpoint.path, mixed_table(way), way, "mine", bins, arrays)
    found = read_schedule(path)
    assert found == ComputeSchedule(path, checkpoint.fingerprint, way, "mine", mixed_table(way), bins)
    assert found.statistics().keys() == arrays.keys()
    assert all(np.array_equal(found.statistics()[name], array) for name, array in arrays.items())
    assert check_schedule(found, checkpoint, way) is found
    again = write_schedule(tmp_path / "t.safetensors", checkpoint.path, mixed_table(way), way, "mine", bins, arrays)
    assert found.digest == read_schedule(again).digest and path.read_bytes() == again.read_bytes()


def test_residuals_come_back_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    table = replace(all_full(EULER), residual=0.125)
    path = write_schedule(tmp_path / "s.safetensors", checkpoint.path, table)
    assert read_schedule(path).table == table and read_schedule(path).statistics() == {}


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_as_sampling_asks(checkpoint: Checkpoint, tmp_path: Path, solver: Any) -> None:
    way = ScheduledSampling(solver, 4, cfg=2.0, guide=Guide("top1", 0.5))
    found = read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, all_full(way), way))
    assert found.nfe == sum(way.guidance.evaluations(t) for t in way.times) == 3 * len(way.times)
    config = checkpoint.config
    once = fixed_cost(config) + sum(block_cost(config, block) for block in config.blocks)
    assert way.operations(config) == 2 * len(way.times) * once


def test_the_null_class_is_counted_where_it_is_predicted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    way = replace(EULER, cfg=2.0)
    table = by_evaluation(way, lambda _: "full", null=("compute", "reuse", "off"))
    assert read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, table, way)).nfe == 4


def test_ways_are_told_in_words() -> None:
    assert EULER.told == "3 steps of euler at cfg 1"
    assert GUIDED.told == "3 steps of heun at cfg 1.5 from 0.3 to 1, guided by top1 at 0.5 from 0 to 0.9"
    named = ComputeSchedule(Path("s"), "f", replace(EULER, guide=Guide("top1", 1.0)), "m", all_full(EULER), 1)
    assert named.is_for(EULER) and not named.is_for(replace(EULER, cfg=2.0))


# malformed files


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


def inside(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document[name].update(changes)


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def remove(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        del document[path[-1]]

    return remove


FIELDS = ("checkpoint", "sampling", "method", "bins", "table", "measured")
MALFORMED = {
    **{f"no {name}": without(name) for name in FIELDS},
    **{f"no sampling.{name}": without("sampling", name) for name in EULER.to_json()},
    **{f"no table.{name}": without("table", name) for name in ("choices", "cells", "null", "residual")},
    "sampling is a list": changed(sampling=[1]),
    "table is a text": changed(table="full"),
    "measured is a number": changed(measured=3),
    "zero bins": changed(bins=0),
    "bins beyond evaluations": changed(bins=4),
    "bins in words": changed(bins="many"),
    "an unknown solver": inside("sampling", solver="magic"),
    "a solver that is a list": inside("sampling", solver=["euler"]),
    "steps in words": inside("sampling", steps="3"),
    "steps that are true": inside("sampling", steps=True),
    "no steps": inside("sampling", steps=0),
    "too many steps": inside("sampling", steps=10**9),
    "guidance in words": inside("sampling", cfg="much"),
    "one noise level": inside("sampling", interval=[0.5]),
    "noise levels in words": inside("sampling", interval=["low", "high"]),
    "a guide without a scale": inside("sampling", guide={"model": "top1", "interval": [0, 1]}),
    "a guide that is a number": inside("sampling", guide=3),
    "an unknown choice": inside("table", choices=["guess"]),
    "a choice that is a number": inside("table", choices=[3]),
    "a choice said twice": inside("table", choices=["reuse-mixture+skip-mixture"]),
    "a threshold of nan": inside("table", choices=["top-p:nan"]),
    "a negative threshold": inside("table", choices=["saliency:-1"]),
    "a rule without a threshold": inside("table", choices=["odp"]),
    "a reused block that was not computed": inside("table", choices=["reuse"]),
    "reused slots that were not computed": inside("table", choices=["reuse-slots"]),
    "no choices": inside("table", choices=[]),
    "a cell beyond the choices": inside("table", cells=[[[0, 1]]] * 3),
    "a negative cell": inside("table", cells=[[[0, -1]]] * 3),
    "a cell that is true": inside("table", cells=[[[0, True]]] * 3),
    "a cell that is a fraction": inside("table", cells=[[[0, 0.5]]] * 3),
    "cells of other depths": inside("table", cells=[[[0, 0]], [[0]], [[0, 0]]]),
    "two branches without guidance": inside("table", cells=[[[0, 0]] * 2] * 3),
    "too few evaluations": inside("table", cells=[[[0, 0]]] * 2),
    "no evaluations": inside("table", cells=[]),
    "cells that are a number": inside("table", cells=3),
    "a null class without guidance": inside("table", null=["off"] * 3),
    "a residual in words": inside("table", residual="small"),
    "a negative residual": inside("table", residual=-0.1),
    "an infinite residual": inside("table", residual="inf"),
    "a residual beside choices": inside("table", residual=0.1, choices=["skip"]),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_schedules_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    document = schedule_document(checkpoint.fingerprint, EULER, "by hand", all_full(EULER), 1, {})
    change(document)
    write_arrays(tmp_path / "s.safetensors", {}, document)
    with pytest.raises(BadInputError, match=r"s\.safetensors: the schedule is malformed \(.*\); make it again"):
        read_schedule(tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("null", "said"),
    [
        (["off", "compute", "compute"], "evaluation 2 takes the null class, which does not guide there"),
        (["reuse", "compute", "off"], "the null class is reused before it was predicted"),
        (["maybe", "compute", "off"], "the null class is 'maybe'"),
        (["compute", "off"], "2 choices of the null class for 3 evaluations"),
        ([], "evaluation 0 has not 1 branches of 2 blocks"),
    ],
)
def test_the_null_class_is_where_it_guides(checkpoint: Checkpoint, tmp_path: Path, null: list[str], said: str) -> None:
    way = replace(EULER, cfg=2.0, interval=(0.5, 1.0))  # the last time is below it
    document = schedule_document(checkpoint.fingerprint, way, "by hand", all_full(way), 1, {})
    assert document["table"]["null"] == ["compute", "compute", "off"]
    document["table"]["null"] = null
    write_arrays(tmp_path / "s.safetensors", {}, document)
    with pytest.raises(BadInputError, match=said):
        read_schedule(tmp_path / "s.safetensors")


def test_files_that_are_no_schedules_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = write_schedule(tmp_path / "s.safetensors", checkpoint.path, every_second(EULER))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "text.safetensors").write_text("full")
    write_arrays(tmp_path / "other.safetensors", {}, {"schema": "ditmoe.samples/1"})
    for name in ("missing", "cut", "text", "other"):
        with pytest.raises(BadInputError, match=f"{name}.safetensors"):
            read_schedule(tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInputError, match="no such schedule; make one with ditmoe schedule"):
        read_schedule(tmp_path)


def test_followed_predictions_need_their_slopes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    table, path = every_second(EULER, saved="follow"), tmp_path / "s.safetensors"
    with pytest.raises(BadInputError, match="has no tensor 'slopes'"):
        read_schedule(write_schedule(path, checkpoint.path, table))
    for shape in ((3, 4, 2), (2, 4, 2), (3, 3, 2), (3, 4)):
        found = read_schedule(
            write_schedule(path, checkpoint.path, table, arrays={SLOPES: np.zeros(shape, np.float32)})
        )
        assert (found.nfe, found.table.followed) == (2, (1,))
        if shape == (3, 4, 2):
            assert check_schedule(found, checkpoint, EULER) is found
        else:
            with pytest.raises(BadInputError, match="tensor 'slopes' is F32"):
                check_schedule(found, checkpoint, EULER)


@pytest.mark.parametrize(("rule", "needed"), [("saliency:0.1", (ENERGY,)), ("regressed", (SCALE, CONSTANT))])
def test_rules_need_their_statistics(
    checkpoint: Checkpoint, tmp_path: Path, rule: str, needed: tuple[str, ...]
) -> None:
    table = by_evaluation(EULER, lambda _: rule)
    arrays = statistics_for(checkpoint.config)
    for name in needed:
        others = {key: array for key, array in arrays.items() if key != name}
        path = write_schedule(tmp_path / "s.safetensors", checkpoint.path, table, arrays=others)
        with pytest.raises(BadInputError, match=f"has no tensor '{name}', which its rules need"):
            read_schedule(path)
    own = {name: arrays[name] for name in needed}
    found = read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, table, arrays=own))
    assert found.statistics().keys() == own.keys()


# other models and ways


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"solver": "ab2"}, "for 3 steps of euler at cfg 1, not for 3 steps of ab2 at cfg 1"),
        ({"steps": 4}, "not for 4 steps of euler at cfg 1"),
        ({"cfg": 1.5}, "not for 3 steps of euler at cfg 1.5;"),
        ({"cfg": 1.5, "interval": (0.0, 0.5)}, "not for 3 steps of euler at cfg 1.5 from 0 to 0.5"),
        ({"guide": Guide("rank2", 0.25)}, "not for 3 steps of euler at cfg 1, guided by rank2 at 0.25"),
    ],
)
def test_other_ways_are_refused_and_both_are_named(
    checkpoint: Checkpoint, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    found = read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, all_full(EULER)))
    with pytest.raises(BadInputError, match=said):
        check_schedule(found, checkpoint, replace(EULER, **change))


def test_other_checkpoints_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = open_checkpoint(make_pico(sampler="rf", seed=1).save(tmp_path / "b.safetensors"))
    found = read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, all_full(EULER)))
    with pytest.raises(BadInputError, match=f"of another checkpoint \\({checkpoint.fingerprint[:12]}\\), not of"):
        check_schedule(found, other, EULER)


@pytest.mark.parametrize("blocks", [1, 3])
def test_blocks_that_the_model_lacks_are_refused(checkpoint: Checkpoint, tmp_path: Path, blocks: int) -> None:
    found = read_schedule(write_schedule(tmp_path / "s.safetensors", checkpoint.path, all_full(EULER, blocks)))
    with pytest.raises(BadInputError, match=f"plans {blocks} blocks, the model has 2"):
        check_schedule(found, checkpoint, EULER)


@pytest.mark.parametrize("name", [ENERGY, SCALE, CONSTANT])
def test_statistics_of_other_shapes_bins_and_dtypes_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    arrays = statistics_for(checkpoint.config)
    for wrong in (arrays[name][..., :-1], arrays[name][None], arrays[name].astype(np.float64)):
        path = write_schedule(
            tmp_path / "s.safetensors", checkpoint.path, all_full(EULER), arrays={**arrays, name: wrong}
        )
        with pytest.raises(BadInputError, match=f"tensor '{name}' is .*, not F32 .* as the model needs"):
            check_schedule(read_schedule(path), checkpoint, EULER)
    more = statistics_for(checkpoint.config, bins=2)
    path = write_schedule(tmp_path / "s.safetensors", checkpoint.path, all_full(EULER), bins=3, arrays=more)
    with pytest.raises(BadInputError, match=r"'energy' is F32 \[2, 2, 2, 4\], not F32 \[3, 2, 2, 4\]"):
        check_schedule(read_schedule(path), checkpoint, EULER)
