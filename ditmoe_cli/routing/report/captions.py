"""What stands under the figures of a report: only what a figure of this profile shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ditmoe_cli.routing.report.contents import Array, ProfileReport
from ditmoe_cli.routing.report.painters import has_gaps, is_cut

INFORMATION = (
    "Share of the expert choices' entropy that each variable explains, with 95 % intervals; ticks: what chance reaches."
)
LIFT = (
    "How much more often two experts are chosen for the same token than if top-k drew different experts at random; 0 "
    "is chance. Grey: an expert with itself."
)
MEANS = "Cosine of the experts' mean outputs on the same tokens, routed to them or not."
GRAM = "Cosine of what two experts add to the residual stream, summed over tokens that chose both."
CKA = (
    "Centred kernel alignment of the experts' outputs on the same tokens: 1 for outputs equal but for a rotation, a "
    "scale and a constant."
)
WEIGHTS = (
    "Cosine of the experts' weights after their neurons were matched. Unrelated experts reach more than 0, as the best "
    "matching is taken."
)
NEXT = "How much more often an expert of one block is followed by an expert of the next than by chance."
ROUTER = "Entropy of the router's probabilities, margin between the last chosen and the first left out, and top-k mass."
SENSITIVITY = (
    "Σ‖v − v'‖² / Σ‖v‖² of guided predictions v, and v' where one block does without a part, at states of the "
    "checkpoint's own sampling. All panels have one logarithmic scale."
)
_KEPT = {
    "step": "at the next step",
    "branch": "by the same token of the other branch",
    "neighbour": "by the patch to its right or below",
}


def listed(words: Iterable[str]) -> str:
    """Return words as a list in prose: "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def load(report: ProfileReport) -> str:
    """Return the caption of the loads."""
    crosses = " (crosses: dead)" if report.dead else ""
    return (
        f"Load ratio of each expert, less 1{crosses}, and the normalised entropy of each block's load.{_fewer(report)}"
    )


def saliency(report: ProfileReport) -> str:
    """Return the caption of the criteria."""
    return f"Each criterion over its mean in the block, less 1: what is orange would be kept first.{_fewer(report)}"


def _fewer(report: ProfileReport) -> str:
    """Return what grey means in a table of experts by block, where it has any."""
    unequal = len({len(block.load) for block in report.blocks}) > 1
    return " Grey: the block has fewer experts." if unequal else ""


def concentration(report: ProfileReport) -> str:
    """Return the caption of the concentrations."""
    several = len(report.blocks) > 1
    what = "mean over blocks with its 95 % interval; thin lines: each block" if several else "with its 95 % interval"
    return f"1 − H(expert) / ln E in each step bin, {what}."


def maps(report: ProfileReport, tables: Sequence[Array], limit: float, variables: Sequence[str], patches: bool) -> str:
    """Return the caption of a map that shows `tables` of all blocks, as `patches` or not, on the scale of all maps."""
    several = {"blocks": len(report.blocks) > 1, "variables": len(variables) > 1, "branches": report.branches > 1}
    sharing = [name for name, is_so in several.items() if is_so]
    sentences = ["p(expert | x) / p(expert) − 1."]
    if patches:
        sentences.append("Each square is the image, each of its cells a patch; a row is a block, a column an expert.")
    if sharing:
        sentences.append(f"All {listed(sharing)} share one scale.")
    if is_cut(tables, limit):
        sentences.append("Values beyond its end are cut.")
    if has_gaps(tables):
        sentences.append("Grey: experts never chosen.")
    return " ".join(sentences)


def kept(names: Sequence[str]) -> str:
    """Return the caption of the choices kept, for the pairings `names`."""
    ways = listed(_KEPT[name] for name in names)
    return f"Share of a token's experts that are chosen again: {ways}; dashed: if choices were independent."
