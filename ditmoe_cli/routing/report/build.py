"""Deriving a report from a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import UsageError
from ditmoe_cli.progress import phase
from ditmoe_cli.routing import measures
from ditmoe_cli.routing.profile import RoutingProfile
from ditmoe_cli.routing.report.claims import VARIABLES, Estimate, Evidence, judge
from ditmoe_cli.routing.report.contents import BlockReport, ProfileReport
from ditmoe_cli.routing.report.information import (
    InformationEstimate,
    class_information,
    information_with_interval,
    normalised_mutual_information,
)
from ditmoe_cli.routing.report.marks import printable
from ditmoe_cli.routing.report.tables import ProfileTables, read_tables
from ditmoe_cli.routing.report.trends import Bootstrap, bootstrap_curve, estimate, trend
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap

Array = NDArray[np.float64]

FULL_ONLY = ("easy_ep", "output.gram", "output.all_token_mean", "output.cka")


def build_report(
    profile: RoutingProfile,
    replicates: int,
    seed: int,
    weights: Sequence[Array] | None = None,
    source: str | None = None,
    sensitivity: SensitivityMap | None = None,
) -> ProfileReport:
    """Derive a report; `weights` are cosines of the experts' weights (E, E) of each block, where they are known.

    `source` is the name of the profiled checkpoint, `sensitivity` its map, where these are known.

    Raises `UsageError` for settings that give no interval, `BadInputError` for a damaged profile.
    """
    if replicates < 20 or seed < 0:
        raise UsageError("an interval needs ⟨replicates⟩ of at least 20, and a ⟨seed⟩ of at least 0")
    bootstrap, tables = Bootstrap(replicates, seed), read_tables(profile)
    with phase(f"resampling {profile.path.name}", len(profile.experts), "blocks") as advance:
        blocks = []
        position = []
        for block, experts in enumerate(profile.experts):
            blocks.append(_block(tables, block, bootstrap, None if weights is None else weights[block]))
            of_images = tables.positions[:, block, 0, :, :experts]
            position.append(bootstrap_curve(of_images, normalised_mutual_information, bootstrap))
            advance(1)
    curves = _concentration_curves(tables, bootstrap)
    third = max(round(len(blocks) / 3), 1) if len(blocks) > 1 else 0
    evidence = Evidence(
        information=_mean_information(blocks),
        depth=trend(np.stack(position, axis=1), third),
        steps=trend(curves, tables.bins // 2),
        concentration=tuple(estimate(curves[:, b]) for b in range(curves.shape[1])),
    )
    return ProfileReport(
        name=printable(profile.path.name),
        source=printable(source) if source is not None else None,
        checkpoint=profile.checkpoint,
        calibration=profile.calibration,
        replicates=replicates,
        seed=seed,
        branches=tables.branches,
        classes=tuple(sorted(set(tables.labels))),
        blocks=tuple(blocks),
        evidence=evidence,
        claims=judge(evidence),
        missing=tuple(name for name in FULL_ONLY if name not in profile.header.tensors),
        sensitivity=sensitivity,
    )


def _block(tables: ProfileTables, block: int, bootstrap: Bootstrap, weights: Array | None) -> BlockReport:
    """Derive one block's part; `weights` are the cosines of its experts' weights (E, E)."""
    e = tables.experts[block]
    counts = tables.counts[block, :, :, :, :e]
    load = counts.sum(axis=(0, 1, 2))
    together = tables.coactivation[block, :, :, :e, :e].sum(axis=(0, 1))
    above = _next_block(tables, block)
    saliency = {name: np.array(scores[block]) for name, scores in tables.saliency.items()}
    return BlockReport(
        load=measures.load_ratio(load),
        entropy=float(measures.normalised_entropy(load)),
        effective=float(measures.effective_experts(load)),
        gini=float(measures.gini(load)),
        variation=float(measures.coefficient_of_variation(load)),
        max_violation=float(measures.max_violation(load)),
        dead=tuple(measures.dead(load)),
        starved=tuple(measures.starved(load)),
        information=_information(tables, block, bootstrap),
        concentration=1.0 - measures.normalised_entropy(counts[0].sum(axis=1)),
        maps=_maps(tables, block),
        lift=_pair_lift(together, float(tables.tokens.sum())),
        mean_similarity=_mean_similarity(tables, block, e),
        gram_similarity=_gram_similarity(tables, block, e),
        next_block=None if above is None else _lift(above),
        next_information=None if above is None else float(normalised_mutual_information(above)),
        agreement=_agreement(tables, block),
        branch_distance=_branch_distance(tables, counts.sum(axis=(1, 2))),
        output_cka=None if tables.cka is None else tables.cka[block, :e, :e].astype(np.float64),
        weight_similarity=weights,
        saliency=saliency,
        rank_agreement=_rank_agreement(saliency),
        router={
            name: measures.mean_of(values[block].sum(axis=0), tables.tokens.sum(axis=0))
            for name, values in tables.router.items()
        },
    )


def _information(tables: ProfileTables, block: int, bootstrap: Bootstrap) -> dict[str, InformationEstimate]:
    """Return the information between expert and each variable that takes two values or more."""
    e = tables.experts[block]
    replicates, seed = bootstrap.replicates, bootstrap.seed
    steps, positions = tables.steps[:, block, :, :, :e], tables.positions[:, block, 0, :, :e]
    result = {}
    if positions.shape[1] > 1:
        result["position"] = information_with_interval(
            positions, replicates=replicates, seed=seed, null="shift-within-image"
        )
    if tables.bins > 1:
        result["step"] = information_with_interval(
            steps[:, 0], replicates=replicates, seed=seed, null="shift-within-image"
        )
    if len(set(tables.labels)) > 1:
        per_image = steps[:, 0].sum(axis=1)
        result["class"] = class_information(per_image, tables.labels, replicates=replicates, seed=seed)
    if tables.branches > 1:
        result["branch"] = information_with_interval(steps.sum(axis=2), replicates=replicates, seed=seed)
    return result


def _maps(tables: ProfileTables, block: int) -> dict[str, Array]:
    """Return p(e | x) / p(e), (branches, X, E)."""
    e, used = tables.experts[block], tables.branches
    counts = tables.counts[block, :used, :, :, :e]
    per_image = tables.steps[:, block, :used, :, :e].sum(axis=2)
    labels = np.array(tables.labels)
    by_class = np.stack([per_image[labels == c].sum(axis=0) for c in sorted(set(tables.labels))], axis=1)
    by_variable = {"position": counts.sum(axis=1), "step": counts.sum(axis=2), "class": by_class}
    return {name: _ratio_to_load(table) for name, table in by_variable.items()}


def _ratio_to_load(table: NDArray[Any]) -> Array:
    """Return p(e | x) / p(e) of counts (..., X, E), NaN where it is unknown."""
    load = measures.shares(table.sum(axis=-2))[..., None, :]
    known = (load > 0) & (table.sum(axis=-1, keepdims=True) > 0)
    return np.where(known, measures.mean_of(measures.shares(table), load), np.nan)


def _lift(pairs: Array) -> Array:
    """Return p(i, j) / (p(i) p(j)) of counts of pairs (E, E')."""
    return measures.mean_of(pairs * pairs.sum(), pairs.sum(axis=1, keepdims=True) * pairs.sum(axis=0, keepdims=True))


def _next_block(tables: ProfileTables, block: int) -> Array | None:
    """Return counts of the pairs (expert here, expert in the block above), None for the last block."""
    if block >= len(tables.next_block):
        return None
    here, above = tables.experts[block : block + 2]
    pairs: Array = tables.next_block[block, :, :, :here, :above].sum(axis=(0, 1)).astype(np.float64)
    return pairs


def _pair_lift(together: NDArray[Any], tokens: float) -> Array:
    """Return how often two experts are chosen together, over how often k drawn at random without repeats would be."""
    k = float(measures.mean_of(np.trace(together), tokens))
    by_chance = measures.random_pair_lift(len(together), k)
    return measures.mean_of(measures.coactivation_lift(together, tokens), by_chance)


def _agreement(tables: ProfileTables, block: int) -> dict[str, measures.Agreement]:
    """Return by step bin the share of a token's experts that is chosen again, for each pairing that was counted."""
    e = tables.experts[block]
    selected = tables.selected[block, :, :, :e].sum(axis=(0, 2))
    k = measures.mean_of(selected, tables.tokens.sum(axis=0))
    pairs = {
        "step": tables.next_step[block].sum(axis=0),
        "branch": tables.branch[block],
        "neighbour": tables.neighbour[block].sum(axis=0),
    }
    return {name: measures.agreement(table[:, :e, :e], k) for name, table in pairs.items() if table.any()}


def _branch_distance(tables: ProfileTables, by_branch: NDArray[Any]) -> float | None:
    """Return the Jensen-Shannon distance between the branches' loads (2, E); None with one branch."""
    if tables.branches == 1:
        return None
    return float(measures.jensen_shannon_distance(by_branch[0], by_branch[1]))


def _mean_similarity(tables: ProfileTables, block: int, e: int) -> Array | None:
    """Return the cosine of the experts' mean outputs, those of all branches and bins side by side."""
    if tables.means is None:
        return None
    means = tables.means[block, :, :, :e].astype(np.float64).transpose(2, 0, 1, 3).reshape(e, -1)
    return measures.output_cosine(means @ means.T)


def _gram_similarity(tables: ProfileTables, block: int, e: int) -> Array | None:
    """Return the cosine of what the experts add to the residual stream, where two are chosen together."""
    if tables.gram is None:
        return None
    return measures.output_cosine(tables.gram[block, :, :, :e, :e].sum(axis=(0, 1)))


def _rank_agreement(saliency: Mapping[str, Array]) -> Array:
    """Return Spearman's rank correlation of all pairs of criteria; 0 where one ranks all experts alike."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(values) for values in saliency.values()])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    return measures.output_cosine(centred @ centred.T)


def _concentration_curves(tables: ProfileTables, bootstrap: Bootstrap) -> Array:
    """Return 1 - H(expert) / ln E by step bin, averaged over blocks, (1 + R, B)."""

    def concentration(counts: Array) -> Array:
        return 1.0 - measures.normalised_entropy(counts)

    curves = [
        bootstrap_curve(tables.steps[:, block, 0, :, :e], concentration, bootstrap)
        for block, e in enumerate(tables.experts)
    ]
    mean: Array = np.mean(curves, axis=0)
    return mean


def _mean_information(blocks: Sequence[BlockReport]) -> dict[str, Estimate]:
    """Return the information averaged over blocks. Averaged ends cover at least as often as those of each block."""

    def mean(name: str, end: str) -> float:
        return float(np.mean([getattr(block.information[name], end) for block in blocks]))

    names = [name for name in VARIABLES if name in blocks[0].information]
    return {name: Estimate(mean(name, "corrected"), mean(name, "low"), mean(name, "high")) for name in names}
