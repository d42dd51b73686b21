"""What a profile says, derived once for all who show it: the terminal, JSON, the HTML page and its figures.

Maps are given per branch. Load, co-activation and transitions add both branches up. Saliency is that of
`routing.saliency`, by which planners choose. Information and trends are those of the conditional branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.routing import measures as statistics
from ditmoe_cli.routing import saliency
from ditmoe_cli.routing.profile import RoutingProfile, RoutingTables
from ditmoe_cli.routing.report.claims import Claim, Evidence, Interval, Trend, judge
from ditmoe_cli.routing.report.information import (
    InformationEstimate,
    class_information,
    information_with_interval,
    normalised_mutual_information,
)
from ditmoe_cli.routing.saliency import Scores

Array = NDArray[np.float64]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

VARIABLES = ("position", "step", "class", "branch")
CRITERIA: Mapping[str, Callable[[RoutingTables], Scores]] = {
    "frequency": saliency.frequency,
    "gate mass": saliency.gate_mass,
    "REAP": saliency.reap,
    "MAN": saliency.man,
    "MSAN": saliency.msan,
    "EASY-EP": saliency.easy_ep,
}
ROUTER = ("entropy", "margin", "topk_mass")
FULL_ONLY = ("easy_ep", "output.gram", "output.all_token_mean", "output.cka")
CONFIDENCE = 0.95
_ENDS = ("corrected", "low", "high")


@dataclass(frozen=True)
class BlockReport:
    """One block: E experts, B step bins, P positions, C classes; branches are the conditional one, then the other.

    `maps` are p(e | x) / p(e), (branches, X, E) for position, step and class, NaN where p(e) = 0. `next_block` is the
    lift of transitions to the block above, (E, E'). `mean_similarity` is the cosine of mean outputs on all tokens,
    `gram_similarity` that of what was added to the residual stream, `output_cka` the alignment of outputs on all
    reservoir tokens; they are None in a profile made with --fast. `weight_similarity` is the cosine of weights after
    neurons were matched, None where the checkpoint was not given. `agreement` tells by step bin what share of a
    token's experts is chosen again: at the next step, in the other branch, by the neighbouring patch.
    """

    load: Array
    entropy: float
    effective: float
    gini: float
    variation: float
    max_violation: float
    dead: tuple[int, ...]
    starved: tuple[int, ...]
    information: Mapping[str, InformationEstimate]
    concentration: Array
    maps: Mapping[str, Array]
    lift: Array
    mean_similarity: Array | None
    gram_similarity: Array | None
    next_block: Array | None
    next_information: float | None
    agreement: Mapping[str, statistics.Agreement]
    branch_distance: float | None
    output_cka: Array | None
    weight_similarity: Array | None
    saliency: Mapping[str, Array]
    rank_agreement: Array
    router: Mapping[str, Array]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, without maps and matrices."""
        return {
            "experts": len(self.load),
            "load_ratio": self.load.tolist(),
            "normalised_entropy": self.entropy,
            "effective_experts": self.effective,
            "gini": self.gini,
            "coefficient_of_variation": self.variation,
            "max_violation": self.max_violation,
            "dead": list(self.dead),
            "starved": list(self.starved),
            "information": {name: asdict(estimate) for name, estimate in self.information.items()},
            "concentration": self.concentration.tolist(),
            "next_information": self.next_information,
            "agreement": {
                name: {"kept": found.kept.tolist(), "by_chance": found.chance.tolist()}
                for name, found in self.agreement.items()
            },
            "branch_distance": self.branch_distance,
            "similarity": {
                "mean_outputs": _mean_off_diagonal(self.mean_similarity),
                "output_cka": _mean_off_diagonal(self.output_cka),
                "weights": _mean_off_diagonal(self.weight_similarity),
            },
            "saliency": {name: values.tolist() for name, values in self.saliency.items()},
            "rank_agreement": {"criteria": list(self.saliency), "spearman": self.rank_agreement.tolist()},
            "router": {name: values.tolist() for name, values in self.router.items()},
        }


def _mean_off_diagonal(matrix: Array | None) -> float | None:
    """Return the mean over pairs of different experts; None where there is none."""
    if matrix is None or len(matrix) < 2:
        return None
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


@dataclass(frozen=True)
class ProfileReport:
    """Everything derived from a profile; `missing` names what a profile made with --fast lacks."""

    checkpoint: str
    calibration: Mapping[str, Any]
    replicates: int
    seed: int
    branches: int
    classes: tuple[int, ...]
    blocks: tuple[BlockReport, ...]
    evidence: Evidence
    claims: tuple[Claim, ...]
    missing: tuple[str, ...]

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Return the (block, expert) pairs that no token chose."""
        return [(i, e) for i, block in enumerate(self.blocks) for e in block.dead]

    @property
    def starved(self) -> list[tuple[int, int]]:
        """Return the (block, expert) pairs with less than a tenth of an even load, but some."""
        return [(i, e) for i, block in enumerate(self.blocks) for e in block.starved if e not in block.dead]

    def to_json(self) -> dict[str, Any]:
        """Return the derived numbers, without maps and matrices."""
        return {
            "checkpoint": self.checkpoint,
            "calibration": dict(self.calibration),
            "replicates": self.replicates,
            "seed": self.seed,
            "claims": [claim.to_json() for claim in self.claims],
            "evidence": self.evidence.to_json(),
            "dead": [list(pair) for pair in self.dead],
            "starved": [list(pair) for pair in self.starved],
            "missing": list(self.missing),
            "blocks": [block.to_json() for block in self.blocks],
        }


@dataclass(frozen=True)
class _Source:
    """A profile's tensors, checked for shape, with what all parts of a report need to know."""

    profile: RoutingProfile
    replicates: int
    seed: int
    labels: tuple[int, ...]
    shape: Mapping[str, int]

    @property
    def branches(self) -> int:
        return 2 if self.read("tokens", "2B")[1].any() else 1

    def has(self, name: str) -> bool:
        return name in self.profile.header.tensors

    def require(self, *names: str) -> None:
        """Raise `BadInputError` where the profile lacks one of the tensors."""
        for name in names:
            if not self.has(name):
                raise BadInputError(f"{self.profile.path}: the profile has no tensor {name!r}; profile again")

    def read(self, name: str, axes: str) -> NDArray[Any]:
        """Return a tensor whose axes have the sizes that the letters stand for.

        Raises `BadInputError` where it is missing or of another shape.
        """
        self.require(name)
        shape = self.profile.header.tensors[name].info.shape
        expected = [int(axis) if axis.isdigit() else self.shape.get(axis) for axis in axes]
        if len(shape) != len(axes) or any(want not in (None, size) for want, size in zip(expected, shape, strict=True)):
            known = ["any" if size is None else size for size in expected]
            raise BadInputError(f"{self.profile.path}: tensor {name!r} has shape {list(shape)}, not {known}")
        array: NDArray[Any] = self.profile.tensor(name).numpy()
        return array


def build_report(
    profile: RoutingProfile, replicates: int, seed: int, bar: Bar, weights: Sequence[Array] | None = None
) -> ProfileReport:
    """Derive a report; `weights` are cosines of the experts' weights (E, E) of each block, where they are known.

    Raises `UsageError` for useless settings, `BadInputError` for a damaged profile."""
    if replicates < 20 or seed < 0:
        raise UsageError("an interval needs --replicates of at least 20, and a --seed of at least 0")
    source = _open(profile, replicates, seed)
    tensors, saliencies = _Tensors.of(source), _saliencies(source)
    with bar("deriving statistics", len(profile.experts)) as advance:
        blocks = []
        position = []
        for block in range(len(profile.experts)):
            blocks.append(_block(source, tensors, block, saliencies[block], weights))
            position.append(_position_curve(source, tensors, block))
            advance(1)
    curves = _concentration_curves(source, tensors)
    evidence = Evidence(
        _mean_information(blocks),
        _trend(_joined(position), _thirds(len(blocks))),
        _trend(curves, _halves(source.shape["B"])),
        tuple(_interval(curves[:, b]) for b in range(curves.shape[1])),
    )
    classes = tuple(sorted(set(source.labels)))
    missing = tuple(name for name in FULL_ONLY if not source.has(name))
    return ProfileReport(
        profile.checkpoint,
        profile.calibration,
        replicates,
        seed,
        source.branches,
        classes,
        tuple(blocks),
        evidence,
        judge(evidence),
        missing,
    )


def _open(profile: RoutingProfile, replicates: int, seed: int) -> _Source:
    """Return a profile's tensors with the labels of its images."""
    if not profile.experts or min(profile.experts) < 1:
        raise BadInputError(f"{profile.path}: the profile has no blocks with experts")
    wide = profile.header.tensors["counts"].info.shape
    shape = {"L": wide[0], "B": wide[2], "P": wide[3], "E": wide[4]}
    if not all(shape.values()):
        raise BadInputError(f"{profile.path}: the profile is empty: {shape}")
    images = _Source(profile, replicates, seed, (), shape).read("image.steps", "IL2BE").shape[0]
    if not images:
        raise BadInputError(f"{profile.path}: the profile holds no image")
    return _Source(profile, replicates, seed, _labels(profile, images), {**shape, "I": images})


def _labels(profile: RoutingProfile, images: int) -> tuple[int, ...]:
    """Return the label of each image: the calibration's classes, in turn."""
    try:
        classes = profile.calibration["classes"]
        listed = range(int(classes.split("-")[1]) + 1) if isinstance(classes, str) else [int(c) for c in classes]
        return tuple(listed[i % len(listed)] for i in range(images))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInputError(f"{profile.path}: the profile's calibration settings are malformed ({error!r})") from None


@dataclass(frozen=True)
class _Tensors:
    """The tables that every block reads its part of."""

    counts: NDArray[Any]
    steps: NDArray[Any]
    positions: NDArray[Any]
    selected: NDArray[Any]
    coactivation: NDArray[Any]
    next_block: NDArray[Any]
    next_step: NDArray[Any]
    branch: NDArray[Any]
    neighbour: NDArray[Any]
    router: Mapping[str, NDArray[Any]]
    tokens: NDArray[Any]
    gram: NDArray[Any] | None
    means: NDArray[Any] | None
    cka: NDArray[Any] | None

    @classmethod
    def of(cls, source: _Source) -> _Tensors:
        return cls(
            source.read("counts", "L2BPE"),
            source.read("image.steps", "IL2BE"),
            source.read("image.positions", "IL2PE"),
            source.read("selected", "L2BE"),
            source.read("coactivation", "L2BEE"),
            source.read("transitions.block", "T2BEE"),
            source.read("transitions.step", "L2BEE"),
            source.read("transitions.branch", "LBEE"),
            source.read("transitions.neighbour", "L2BEE"),
            {name: source.read(f"router.{name}", "L2B") for name in ROUTER},
            source.read("tokens", "2B"),
            source.read("output.gram", "L2BEE") if source.has("output.gram") else None,
            source.read("output.all_token_mean", "L2BED") if source.has("output.all_token_mean") else None,
            source.read("output.cka", "LEE") if source.has("output.cka") else None,
        )


def _block(
    source: _Source,
    tensors: _Tensors,
    block: int,
    scores: Mapping[str, Array],
    weights: Sequence[Array] | None,
) -> BlockReport:
    """Derive one block's part."""
    e = source.profile.experts[block]
    counts = tensors.counts[block, :, :, :, :e]
    load = counts.sum(axis=(0, 1, 2))
    together = tensors.coactivation[block, :, :, :e, :e].sum(axis=(0, 1))
    above = _next_block(source, tensors, block)
    return BlockReport(
        load=statistics.load_ratio(load),
        entropy=float(statistics.normalised_entropy(load)),
        effective=float(statistics.effective_experts(load)),
        gini=float(statistics.gini(load)),
        variation=float(statistics.coefficient_of_variation(load)),
        max_violation=float(statistics.max_violation(load)),
        dead=tuple(statistics.dead(load)),
        starved=tuple(statistics.starved(load)),
        information=_information(source, tensors, block),
        concentration=1.0 - statistics.normalised_entropy(counts[0].sum(axis=1)),
        maps=_maps(source, tensors, block),
        lift=_pair_lift(together, float(tensors.tokens.sum())),
        mean_similarity=_mean_similarity(tensors, block, e),
        gram_similarity=_gram_similarity(tensors, block, e),
        next_block=None if above is None else _lift(above),
        next_information=None if above is None else float(normalised_mutual_information(above)),
        agreement=_agreement(source, tensors, block),
        branch_distance=_branch_distance(source, counts.sum(axis=(1, 2))),
        output_cka=None if tensors.cka is None else tensors.cka[block, :e, :e].astype(np.float64),
        weight_similarity=None if weights is None else weights[block],
        saliency=scores,
        rank_agreement=_rank_agreement(scores),
        router={
            name: statistics.mean_of(values[block].sum(axis=0), tensors.tokens.sum(axis=0))
            for name, values in tensors.router.items()
        },
    )


def _information(source: _Source, tensors: _Tensors, block: int) -> dict[str, InformationEstimate]:
    """Return the information between expert and each variable that takes two values or more."""
    e = source.profile.experts[block]
    settings: dict[str, Any] = {"replicates": source.replicates, "seed": source.seed}
    steps = tensors.steps[:, block, :, :, :e]
    found = {}
    if source.shape["P"] > 1:
        positions = tensors.positions[:, block, 0, :, :e]
        found["position"] = information_with_interval(positions, null="shift-within-image", **settings)
    if source.shape["B"] > 1:
        found["step"] = information_with_interval(steps[:, 0], null="shift-within-image", **settings)
    if len(set(source.labels)) > 1:
        found["class"] = class_information(steps[:, 0].sum(axis=1), source.labels, **settings)
    if source.branches > 1:
        found["branch"] = information_with_interval(steps.sum(axis=2), **settings)
    return found


def _maps(source: _Source, tensors: _Tensors, block: int) -> dict[str, Array]:
    """Return p(e | x) / p(e), (branches, X, E)."""
    e, used = source.profile.experts[block], source.branches
    counts = tensors.counts[block, :used, :, :, :e]
    per_image = tensors.steps[:, block, :used, :, :e].sum(axis=2)
    labels = np.array(source.labels)
    by_class = np.stack([per_image[labels == c].sum(axis=0) for c in sorted(set(source.labels))], axis=1)
    tables = {"position": counts.sum(axis=1), "step": counts.sum(axis=2), "class": by_class}
    return {name: _ratio_to_load(table) for name, table in tables.items()}


def _ratio_to_load(table: NDArray[Any]) -> Array:
    """Return p(e | x) / p(e) of counts (..., X, E), NaN where it is unknown."""
    load = statistics.shares(table.sum(axis=-2))[..., None, :]
    known = (load > 0) & (table.sum(axis=-1, keepdims=True) > 0)
    return np.where(known, statistics.mean_of(statistics.shares(table), load), np.nan)


def _lift(pairs: Array) -> Array:
    """Return p(i, j) / (p(i) p(j)) of counts of pairs (E, E')."""
    return statistics.mean_of(pairs * pairs.sum(), pairs.sum(axis=1, keepdims=True) * pairs.sum(axis=0, keepdims=True))


def _next_block(source: _Source, tensors: _Tensors, block: int) -> Array | None:
    """Return counts of the pairs (expert here, expert in the block above), None for the last block."""
    if block >= len(tensors.next_block):
        return None
    here, above = source.profile.experts[block : block + 2]
    pairs: Array = tensors.next_block[block, :, :, :here, :above].sum(axis=(0, 1)).astype(np.float64)
    return pairs


def _pair_lift(together: NDArray[Any], tokens: float) -> Array:
    """Return how often two experts are chosen together, over how often k drawn at random without repeats would be."""
    k = float(statistics.mean_of(np.trace(together), tokens))
    by_chance = statistics.random_pair_lift(len(together), k)
    return statistics.mean_of(statistics.coactivation_lift(together, tokens), by_chance)


def _agreement(source: _Source, tensors: _Tensors, block: int) -> dict[str, statistics.Agreement]:
    """Return by step bin what share of its experts a token keeps, where there is anything to agree with."""
    e = source.profile.experts[block]
    selected = tensors.selected[block, :, :, :e].sum(axis=(0, 2))
    k = statistics.mean_of(selected, tensors.tokens.sum(axis=0))
    pairs = {
        "step": tensors.next_step[block].sum(axis=0),
        "branch": tensors.branch[block],
        "neighbour": tensors.neighbour[block].sum(axis=0),
    }
    return {name: statistics.agreement(table[:, :e, :e], k) for name, table in pairs.items() if table.any()}


def _branch_distance(source: _Source, by_branch: NDArray[Any]) -> float | None:
    """Return the Jensen-Shannon distance between the branches' loads (2, E)."""
    return float(statistics.jensen_shannon_distance(*by_branch)) if source.branches > 1 else None


def _mean_similarity(tensors: _Tensors, block: int, e: int) -> Array | None:
    """Return the cosine of the experts' mean outputs, those of all branches and bins side by side."""
    if tensors.means is None:
        return None
    means = tensors.means[block, :, :, :e].astype(np.float64).transpose(2, 0, 1, 3).reshape(e, -1)
    return statistics.output_cosine(means @ means.T)


def _gram_similarity(tensors: _Tensors, block: int, e: int) -> Array | None:
    """Return the cosine of what the experts add to the residual stream, where two are chosen together."""
    if tensors.gram is None:
        return None
    return statistics.output_cosine(tensors.gram[block, :, :, :e, :e].sum(axis=(0, 1)))


def _saliencies(source: _Source) -> list[dict[str, Array]]:
    """Return the experts' saliency by every criterion that the profile has the sums for, for each block."""
    source.require("norm", "norm_square")
    tables = source.profile.tables
    known = [name for name in CRITERIA if name != "EASY-EP" or source.has("easy_ep")]
    scores = {name: CRITERIA[name](tables) for name in known}
    return [{name: np.array(scores[name][block]) for name in known} for block in range(len(tables.experts))]


def _rank_agreement(scores: Mapping[str, Array]) -> Array:
    """Return Spearman's rank correlation of all pairs of criteria; 0 where one ranks all experts alike."""
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    ranks = np.stack([rankdata(values) for values in scores.values()])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    return statistics.output_cosine(centred @ centred.T)


# intervals of what compares blocks or bins: the same images are drawn for all of them


def _drawn(source: _Source) -> Array:
    """Return how often each image is drawn in each replicate, (R, I)."""
    images = source.shape["I"]
    drawn = np.random.default_rng([source.seed, 2]).multinomial(images, np.full(images, 1 / images), source.replicates)
    return drawn.astype(np.float64)


def _curve(source: _Source, tables: NDArray[Any], statistic: Callable[[Array], Array]) -> Array:
    """Return a statistic of pooled tables (I, ...), and its bootstrap replicates with twice the bias taken off.

    Shape (1 + R, ...); the first row is the value less its bias.
    """
    flat = tables.reshape(len(tables), -1).astype(np.float64)
    value = statistic(flat.sum(axis=0).reshape(1, *tables.shape[1:]))
    replicates = statistic((_drawn(source) @ flat).reshape(source.replicates, *tables.shape[1:]))
    bias = replicates.mean(axis=0) - value[0]
    curves: Array = np.maximum(np.concatenate((value - bias, replicates - 2 * bias)), 0.0)
    return curves


def _position_curve(source: _Source, tensors: _Tensors, block: int) -> Array:
    """Return the information between expert and position, (1 + R,)."""
    positions = tensors.positions[:, block, 0, :, : source.profile.experts[block]]
    return _curve(source, positions, normalised_mutual_information)


def _concentration_curves(source: _Source, tensors: _Tensors) -> Array:
    """Return 1 - H(expert) / ln E by step bin, averaged over blocks, (1 + R, B)."""

    def concentration(counts: Array) -> Array:
        return 1.0 - statistics.normalised_entropy(counts)

    curves = [
        _curve(source, tensors.steps[:, block, 0, :, :e], concentration)
        for block, e in enumerate(source.profile.experts)
    ]
    mean: Array = np.mean(curves, axis=0)
    return mean


def _joined(curves: list[Array]) -> Array:
    """Return curves (1 + R,) of all blocks as (1 + R, L)."""
    return np.stack(curves, axis=1)


def _thirds(blocks: int) -> int:
    """Return the size of a third of the blocks, at least one; 0 where there are not two."""
    return max(round(blocks / 3), 1) if blocks > 1 else 0


def _halves(bins: int) -> int:
    """Return the size of half of the bins."""
    return bins // 2


def _trend(curves: Array, size: int) -> Trend | None:
    """Return the change from the first `size` columns of curves (1 + R, X) to the last; None without any spread."""
    if size == 0 or not np.ptp(curves[1:], axis=0).any():
        return None
    early, late = curves[:, :size].mean(axis=1), curves[:, -size:].mean(axis=1)
    return Trend(_interval(early), _interval(late), _interval(late / np.maximum(early, 1e-6)))


def _interval(curve: Array) -> Interval:
    """Return value and interval of (1 + R,)."""
    low, high = np.quantile(curve[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(curve[0]), float(low), float(high))


def _mean_information(blocks: list[BlockReport]) -> dict[str, Interval]:
    """Return the information averaged over blocks. Averaged ends cover at least as often as those of each block."""
    return {
        name: Interval(*(float(np.mean([getattr(b.information[name], end) for b in blocks])) for end in _ENDS))
        for name in VARIABLES
        if name in blocks[0].information
    }
