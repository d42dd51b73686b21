"""Derived numbers: against direct computation on hand-made profiles, and the claims of planted routing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reporting import Planted, by_class, by_position, by_step, even

from ditmoe_cli.compression.methods import SALIENCIES
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.routing.report.build import build_report
from ditmoe_cli.routing.report.contents import ProfileReport
from ditmoe_cli.routing.report.tables import CRITERIA


def report_of(planted: Planted, folder: Path, replicates: int = 60, seed: int = 0) -> ProfileReport:
    return build_report(planted.save(folder / "p.safetensors"), replicates, seed)


def verdicts(chances: np.ndarray, folder: Path) -> list[str]:
    return [claim.verdict for claim in report_of(Planted(chances), folder).claims]


def test_routing_by_step_alone(tmp_path: Path) -> None:
    report = report_of(Planted(by_step()), tmp_path)
    assert [claim.verdict for claim in report.claims] == ["partly", "does not hold", "holds"]
    preferences, depth, steps = (claim.sentence for claim in report.claims)
    assert "do not depend on position" in preferences
    assert ", depend on step" in preferences
    assert "do not depend on class" in preferences
    assert "no specialisation by position that could fade" in depth
    assert steps.startswith("Concentration of load falls from ")


def test_other_planted_routings(tmp_path: Path) -> None:
    assert verdicts(even(), tmp_path) == ["does not hold"] * 3
    assert verdicts(by_class(), tmp_path)[:2] == ["does not hold"] * 2
    assert verdicts(by_position(fading=False), tmp_path) == ["partly", "does not hold", "does not hold"]
    assert verdicts(by_position(fading=True), tmp_path) == ["partly", "holds", "does not hold"]
    assert verdicts(by_step() * by_position(fading=True), tmp_path) == ["holds", "holds", "holds"]


def test_load_and_saliency_match_direct_computation(tmp_path: Path) -> None:
    chances = even()
    chances[1, ..., 3] = 0
    chances[2, ..., 0] = 0.05
    planted = Planted(chances, fast=False)
    report, tables = report_of(planted, tmp_path), planted.tables()
    assert report.dead == [(1, 3)]
    assert report.starved == [(2, 0)]
    for i, block in enumerate(report.blocks):
        n = tables["counts"][i].sum(axis=(0, 1, 2))
        share = n / n.sum()
        assert np.allclose(block.load, 4 * share)
        used = share[share > 0]
        assert block.entropy == pytest.approx(-(used * np.log(used)).sum() / np.log(4))
        assert np.allclose(block.saliency["frequency"], share)
        alive = n > 0
        assert np.allclose(block.saliency["REAP"], np.where(alive, 2 * (1 + np.arange(4)), 0))
        assert np.allclose(block.saliency["MSAN"], np.where(alive, 9, 0))
        assert set(block.saliency) == {"frequency", "gate mass", "REAP", "MAN", "MSAN", "EASY-EP"}
        assert np.allclose(block.agreement["step"].kept, 1), "each expert was followed by itself"
        by_bin = tables["selected"][i].sum(axis=0) / tables["selected"][i].sum(axis=(0, 2))[:, None]
        assert np.allclose(block.agreement["step"].chance, (by_bin**2).sum(axis=1))
        assert np.allclose(block.agreement["neighbour"].kept, 0.25), "any expert beside any other"
        p, q = (tables["selected"][i].sum(axis=1) + 0.0) / tables["selected"][i].sum(axis=(1, 2))[:, None]
        m = (p + q) / 2
        divergence = sum((x[x > 0] * np.log2(x[x > 0] / m[x > 0])).sum() / 2 for x in (p, q))
        assert block.branch_distance == pytest.approx(np.sqrt(divergence), abs=1e-9)
        assert block.output_cka is not None and np.array_equal(block.output_cka, np.eye(4))
        assert block.gram_similarity is not None
        assert np.allclose(block.gram_similarity, np.eye(4))
    assert report.missing == ()


@pytest.mark.parametrize("cfg", [0.5, 1.0, 3.0])
def test_reports_and_planners_agree_on_every_saliency(cfg: float, tmp_path: Path) -> None:
    """The branches' selections differ, so that a saliency which weights them differs from one that does not."""
    profile = Planted(by_step(), cfg=cfg, fast=False).save(tmp_path / "p.safetensors")
    blocks = build_report(profile, 20, 0).blocks
    scored = {name.replace("-", " "): method for name, method in SALIENCIES.items() if name != "random"}
    reported = {name.lower().replace("-", " "): [block.saliency[name] for block in blocks] for name in CRITERIA}
    assert reported.keys() == scored.keys()
    for name, method in scored.items():
        assert [values.tolist() for values in reported[name]] == method.score(profile.tables, 0), name
    conditional, unconditional = profile.tensor("selected").sum(dim=2).double().transpose(0, 1)
    assert not torch.allclose(conditional, unconditional)


def test_maps_are_deviations_from_the_load(tmp_path: Path) -> None:
    planted = Planted(by_position(fading=False) * by_class())
    report, tables = report_of(planted, tmp_path), planted.tables()
    n = tables["counts"][0, 1].sum(axis=0)
    expected = (n / n.sum(axis=1, keepdims=True)) / (n.sum(axis=0) / n.sum())
    assert np.allclose(report.blocks[0].maps["position"][1], expected)
    of_class = tables["image.steps"][2::5, 0, 0].sum(axis=(0, 1))
    load = tables["image.steps"][:, 0, 0].sum(axis=(0, 1))
    assert np.allclose(report.blocks[0].maps["class"][0, 2], (of_class / of_class.sum()) / (load / load.sum()))


def test_maps_of_dead_experts_are_unknown(tmp_path: Path) -> None:
    chances = even(blocks=2)
    chances[..., 1] = 0
    block = report_of(Planted(chances), tmp_path).blocks[0]
    assert np.isnan(block.maps["step"][..., 1]).all()
    assert np.isfinite(block.maps["step"][..., 0]).all()


def test_a_fast_profile_lacks_moments_only(tmp_path: Path) -> None:
    report = report_of(Planted(even()), tmp_path)
    assert report.missing == ("easy_ep", "output.gram", "output.all_token_mean", "output.cka")
    assert "EASY-EP" not in report.blocks[0].saliency
    assert report.blocks[0].mean_similarity is None


@pytest.mark.parametrize(
    ("sizes", "images", "variables"),
    [
        ({"classes": 1, "branches": 1}, 10, {"position", "step"}),
        ({"bins": 1, "blocks": 1}, 10, {"position", "class", "branch"}),
        ({"positions": 1, "experts": 1}, 10, {"step", "class", "branch"}),
        ({}, 1, {"position", "step", "branch"}),
    ],
)
def test_what_a_small_profile_cannot_tell(
    sizes: dict[str, int], images: int, variables: set[str], tmp_path: Path
) -> None:
    report = report_of(Planted(by_step(**sizes), images=images), tmp_path, 20)
    assert set(report.blocks[0].information) == variables
    assert report.branches == sizes.get("branches", 2)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["claims"][0]["verdict"] != "holds"


def test_equal_seeds_give_equal_reports(tmp_path: Path) -> None:
    planted = Planted(by_step(blocks=2))
    first, again, other = (report_of(planted, tmp_path, seed=seed).to_json() for seed in (0, 0, 1))
    assert first == again
    assert first["evidence"] != other["evidence"]


def test_listed_classes_label_images_in_turn(tmp_path: Path) -> None:
    profile = Planted(by_class(blocks=1), images=10).save(tmp_path / "p.safetensors", classes=[7, 3, 5, 1, 0])
    assert build_report(profile, 20, 0).classes == (0, 1, 3, 5, 7)


def test_damaged_profiles_and_useless_settings_are_refused(tmp_path: Path) -> None:
    profile = Planted(even(blocks=1)).save(tmp_path / "p.safetensors", classes=[])
    with pytest.raises(BadInputError, match="calibration settings"):
        build_report(profile, 20, 0)
    good = Planted(even(blocks=1)).save(tmp_path / "p.safetensors")
    for replicates, seed in ((5, 0), (20, -1)):
        with pytest.raises(UsageError, match="replicates"):
            build_report(good, replicates, seed)
