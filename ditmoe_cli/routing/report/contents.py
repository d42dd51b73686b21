"""A profile's report as data, which the terminal, JSON, the HTML page and the figures show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.routing.measures import Agreement
from ditmoe_cli.routing.report.claims import Claim, Evidence
from ditmoe_cli.routing.report.information import InformationEstimate
from ditmoe_cli.routing.sensitivity.sensitivity_map import SensitivityMap

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BlockReport:
    """Numbers of one block with E experts, B step bins, P positions and C classes.

    Load, co-activation and transitions add both branches up; information and concentration are those of the conditional
    branch.

    Attributes:
        load: (E,) load ratio, 1 where the load is even.
        entropy: normalised entropy of the load; `effective`, `gini`, `variation` and `max_violation` measure it too.
        dead: experts that no token chose.
        starved: experts with less than a tenth of an even load, the dead among them.
        information: how much of the expert each variable explains.
        concentration: (B,) 1 - H(expert) / ln E.
        maps: p(e | x) / p(e), (branches, X, E), by variable: position, step, class; NaN where p(e) = 0.
        lift: (E, E) how often two experts are chosen together, over chance.
        mean_similarity: (E, E) cosine of mean outputs on all reservoir tokens; None in a ``fast`` profile.
        gram_similarity: (E, E) cosine of what is added to the residual stream; None in a ``fast`` profile.
        next_block: (E, E') lift of transitions to the block above; None in the last block.
        next_information: information between the expert and that in the block above; None in the last block.
        agreement: the share of a token's experts that is chosen again, by step bin: at the next ``step``, in the other
            ``branch``, by the ``neighbour`` patch.
        branch_distance: Jensen-Shannon distance between the branches' loads; None with one branch.
        output_cka: (E, E) alignment of outputs on all reservoir tokens; None in a ``fast`` profile.
        weight_similarity: (E, E) cosine of weights after matching neurons; None where the checkpoint was not given.
        saliency: (E,) by criterion.
        rank_agreement: Spearman's rank correlation of all pairs of criteria.
        router: (B,) means over tokens of the router's ``entropy``, ``margin`` and ``topk_mass``.
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
    agreement: Mapping[str, Agreement]
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
                name: {"kept": agreement.kept.tolist(), "by_chance": agreement.chance.tolist()}
                for name, agreement in self.agreement.items()
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
    """Everything derived from a profile.

    Attributes:
        name: name of the profile's file, printable.
        source: name of the checkpoint's file, None where it is not known.
        checkpoint: fingerprint of the checkpoint.
        missing: the tensors that the profile lacks, as a ``fast`` one does.
        sensitivity: the checkpoint's map of sensitivity, where one was given.
    """

    name: str
    source: str | None
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
    sensitivity: SensitivityMap | None = None

    @property
    def dead(self) -> list[tuple[int, int]]:
        """Return the (block, expert) pairs that no token chose."""
        return [(i, e) for i, block in enumerate(self.blocks) for e in block.dead]

    @property
    def starved(self) -> list[tuple[int, int]]:
        """Return the (block, expert) pairs with less than a tenth of an even load, but some."""
        return [(i, e) for i, block in enumerate(self.blocks) for e in block.starved if e not in block.dead]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, without maps and matrices."""
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
            **({"sensitivity": self.sensitivity.to_json()} if self.sensitivity is not None else {}),
        }
