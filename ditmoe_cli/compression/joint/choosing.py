"""The choice of structure and bits: solved with measured errors, carried out, judged, and solved again.

1. The errors of widths (`compression.replay.eliminations`) and of formats (`compression.precision.sensitivity`) are
   measured, and the program is solved. A trial of its formats gives the amplifications of errors of that size.
2. The program is solved for several weights κ of structure against bits, and each plan is carried out whole, on fewer
   tokens than the final one: it is narrowed, rounded and refitted (`compression.joint.carrying`), and its error is that
   of the guided prediction on calibration images that nothing is fitted on. κ moves towards less error.
3. So is the plan of two stages that the program thinks best, unless it thinks it much worse: one share of neurons for
   the whole model by their energies, then the formats of least error.

The plan of least tried error is carried out on all tokens; its weights are then computed already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ditmoe_cli.compression.apply import loop_name
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.computed import Computing
from ditmoe_cli.compression.joint.carrying import HeldErrors, carry_out_together
from ditmoe_cli.compression.joint.expert_options import WidthCurve, default_multiple
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, JointRequest, Measures, plan_of, size_of
from ditmoe_cli.compression.plan import CompressionPlan, Experts
from ditmoe_cli.compression.precision.sensitivity import REFERENCE, Sensitivities, measured_sensitivities
from ditmoe_cli.compression.precision.trial import try_formats
from ditmoe_cli.compression.prune.neuron_budget import NeuronBudget, ranked_energies, widths_within
from ditmoe_cli.compression.rebuild import orders_of
from ditmoe_cli.compression.replay.eliminations import Curves, neuron_curves
from ditmoe_cli.compression.replay.local_errors import place_of
from ditmoe_cli.compression.working_sizes import MOST_TRIED, SEARCH_TOKENS
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.workfolder import WorkFolder

FIRST_KAPPA = 4.0
"""The weight of structure that was best on trained models: GPTQ and the refit leave about a quarter of Q."""
WORTH_TRYING = 1.25
"""Predicted error, over that of the program's own plan, up to which a plan in two stages is tried.

It is predicted as if it kept the program's neurons and not those of highest energy, so that it is worse in truth.
"""
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)  # of neurons, of plans in two stages


@dataclass(frozen=True)
class Tried:
    """A draft that was carried out: the plan, its errors on held-out images, and the bytes of its file."""

    draft: Draft
    plan: CompressionPlan
    held: HeldErrors
    bytes: int


@dataclass(frozen=True)
class Way:
    """How drafts of any size are made: by the program with a weight κ, or in two stages where that is None."""

    kappa: float | None = FIRST_KAPPA

    def draft(self, program: JointProgram, calibrated: Calibrated, limit: int) -> Draft:
        """Return the draft of least predicted error within `limit` bytes, of the first κ where two stages find none."""
        made = best_of_two_stages(program, calibrated, limit) if self.kappa is None else None
        return program.solved(limit, self.kappa or FIRST_KAPPA) if made is None else made


def measure(request: JointRequest, calibrated: Calibrated) -> tuple[Curves, Sensitivities]:
    """Return the errors of widths and of formats, measured or kept.

    Mixtures that are offered no format are measured in one all the same: errors of widths are amplified alike.
    """
    curves, rounded = neuron_curves(calibrated), request.measured_formats
    return curves, measured_sensitivities(calibrated, rounded | _for_amplification(request, rounded))


def _for_amplification(request: JointRequest, rounded: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the format to measure each matrix of a mixture in, where none of the mixture is offered any."""
    own: dict[int, list[str]] = {}
    for stem in request.ladders:
        own.setdefault(split_name(f"{stem}.").block or 0, []).extend(f"{stem}.{matrix}.weight" for matrix in MATRICES)
    return {
        name: (REFERENCE,) for names in own.values() if not any(rounded.get(name) for name in names) for name in names
    }


def measures_of(request: JointRequest, curves: Curves, sensitivities: Sensitivities) -> Measures:
    """Return measured errors as the program takes them: those of a mixture's formats before amplification."""
    amplification = [kinds.get("mixture", 0.0) for kinds in sensitivities.amplification]
    formats: dict[str, Mapping[str, float]] = {}
    dense: dict[str, Mapping[str, float]] = {}
    for name, errors_of_formats in sensitivities.errors.items():
        place = place_of(name)
        if place is None or place[1] != "mixture":
            dense[name] = errors_of_formats
            continue
        factor = amplification[place[0]] or 1.0
        formats[name] = {fmt: error / factor for fmt, error in errors_of_formats.items()}
    return Measures(width_curves(request, curves), formats, dense, amplification)


def width_curves(request: JointRequest, curves: Curves) -> dict[str, WidthCurve]:
    """Return the errors of the widths that each expert may choose from, by its full name."""
    found: dict[str, WidthCurve] = {}
    for index, block in enumerate(curves):
        for stem, curve in block.items():
            widths = request.ladders.get(in_block(index, stem), ())
            errors, growth = (tuple(each[list(widths)].tolist()) for each in (curve.errors, curve.growth))
            found[in_block(index, stem)] = WidthCurve(widths, errors, growth)
    return found


def freer_error(program: JointProgram, freer: JointRequest, curves: Curves, tried: Tried) -> float:
    """Return the predicted error of a freer request's plan of as many bytes, at the κ of what was `tried`.

    It is at most that of what was tried, which the freer plan may choose too.
    """
    own = float(tried.draft.figures["predicted_error"])
    measures = replace(program.measures, curves=width_curves(freer, curves))
    try:
        found = JointProgram(freer, measures).solved(tried.bytes, tried.draft.kappa)
        return min(own, float(found.figures["predicted_error"]))
    except InfeasibleError:  # a block's narrowest expert may offer widths that its others alone do not have
        return own


def settled_program(
    request: JointRequest, calibrated: Calibrated, limit: Callable[[JointProgram], int]
) -> tuple[JointProgram, Curves]:
    """Return the program with amplifications at the size of the errors that a file of so many bytes has.

    `limit` returns the bytes, given the program with amplifications of small errors. The curves of widths that it rests
    on are returned too: plans that are tried take their orders from them.
    """
    curves, sensitivities = measure(request, calibrated)
    unsettled = JointProgram(request, measures_of(request, curves, sensitivities))
    first = unsettled.solved(limit(unsettled), FIRST_KAPPA)
    if first.formats:
        trial = try_formats(calibrated, first.formats, amplifies=True)
        sensitivities = sensitivities.at(trial.amplification)
    return JointProgram(request, measures_of(request, curves, sensitivities)), curves


@dataclass
class Trials:
    """Plans that are carried out in a work folder: several on few tokens, to compare them, and one on all.

    Attributes:
        request: the request.
        calibrated: the checkpoint and its profile.
        curves: of the widths of its experts, which tell the order in which their neurons go.
        folder: keeps what was tried, and the weights of the plan that is carried out on all tokens.
        done: what was tried on few tokens, by the digest of its stages.
    """

    request: JointRequest
    calibrated: Calibrated
    curves: Curves
    folder: WorkFolder
    done: dict[str, Tried] = field(default_factory=dict)

    def error(self, draft: Draft) -> float:
        """Carry a draft out on `SEARCH_TOKENS`, unless that was done; return its error on held-out images."""
        plan = plan_of(self.request, draft, {}, self.calibrated.profile.digest, tokens=SEARCH_TOKENS)
        if plan.work_digest not in self.done:
            self.done[plan.work_digest] = self._tried(draft, plan, f"trying plan {len(self.done) + 1} for")
            self.folder.drop_loop(loop_name(plan))
        return self.done[plan.work_digest].held.error

    def carried_out(self, draft: Draft) -> Tried:
        """Carry a draft out on all tokens, and keep its weights."""
        plan = plan_of(self.request, draft, {}, self.calibrated.profile.digest)
        return self._tried(draft, plan, "compressing")

    def drop(self, tried: Tried) -> None:
        """Delete the weights of a plan that was carried out."""
        self.folder.drop_loop(loop_name(tried.plan))

    def _tried(self, draft: Draft, plan: CompressionPlan, title: str) -> Tried:
        return Tried(draft, plan, self._held(plan, title), size_of(self.request, draft))

    def _held(self, plan: CompressionPlan, title: str) -> HeldErrors:
        orders = self._orders if plan.stage(Experts).selection is not None else None
        return tried_errors(self.calibrated, self.folder, plan, title, orders)

    @cached_property
    def _orders(self) -> list[dict[str, Tensor]]:
        return orders_of(self.curves)

    @property
    def best(self) -> Tried:
        """What has the least error on held-out images; of equal ones the first."""
        return min(self.done.values(), key=lambda each: each.held.error)


def tried_errors(
    calibrated: Calibrated,
    folder: WorkFolder,
    plan: CompressionPlan,
    title: str,
    orders: Sequence[Mapping[str, Tensor]] | None = None,
) -> HeldErrors:
    """Carry a plan out into its loop of a work folder, unless that was done; return its errors on held-out images.

    `title` and `orders` are those of `carry_out_together`.
    """
    name = f"tried-{plan.work_digest[:12]}"
    piece = folder.read(name)
    if piece is not None:
        return HeldErrors(tuple(piece.document["errors"]), tuple(piece.document["references"]))
    checkpoint = calibrated.checkpoint
    loop = folder.loop(loop_name(plan), checkpoint.config.depth)
    computing = Computing(checkpoint, calibrated.profile, calibrated.device, folder, loop, kept=calibrated.kept)
    assert plan.together is not None
    held = carry_out_together(computing, *plan.together, title=title, orders=orders).held
    folder.write(name, {}, {"errors": list(held.errors), "references": list(held.references)})
    return held


def best_within(program: JointProgram, trials: Trials, limit: int) -> Tried:
    """Return the best plan whose file takes at most `limit` bytes, of several κ and of two stages, carried out."""
    way = best_way(program, trials, limit)
    return trials.carried_out(way.draft(program, trials.calibrated, limit))


def best_way(program: JointProgram, trials: Trials, limit: int) -> Way:
    """Return the way of least error for a file of at most `limit` bytes, of several κ and of two stages."""
    drafts: dict[float, Draft] = {}

    def error(kappa: float) -> float:
        drafts[kappa] = program.solved(limit, kappa)
        return trials.error(drafts[kappa])

    kappa = least_kappa(error)
    joint = trials.best
    two_stages = best_of_two_stages(program, trials.calibrated, limit)
    is_tried = two_stages is not None and _predicted(two_stages) <= WORTH_TRYING * _predicted(drafts[FIRST_KAPPA])
    if two_stages is not None and is_tried and trials.error(two_stages) < joint.held.error:
        return Way(None)
    return Way(kappa)


def _predicted(draft: Draft) -> float:
    return math.inf if draft.solution is None else draft.solution.error


def least_kappa(error: Callable[[float], float]) -> float:
    """Return the κ of least error, from at most `MOST_TRIED` errors.

    κ are a factor of 2 apart, and go in the direction in which the error falls, until it rises. The result is where the
    parabola through the least error and its neighbours has its least, on logarithmic scales: errors on few images are
    noisy, and their least is flat.
    """
    start = math.log2(FIRST_KAPPA)
    found = {start: error(FIRST_KAPPA), start + 1: error(2 * FIRST_KAPPA)}
    step = 1.0 if found[start + 1] < found[start] else -1.0
    while len(found) < MOST_TRIED:
        place = max(found) + 1 if step > 0 else min(found) - 1
        found[place] = error(2.0**place)
        if found[place] > min(found.values()):
            break
    return float(2.0 ** _vertex(found))


def _vertex(found: Mapping[float, float]) -> float:
    """Return where the parabola through the least value and its neighbours is least, of values an equal step apart.

    That is the place of the least value itself where it is at an end, or not above 0.
    """
    places = sorted(found)
    least = min(places, key=lambda place: found[place])
    index = places.index(least)
    if not 0 < index < len(places) - 1 or found[least] <= 0:
        return least
    before, middle, after = (math.log(found[place]) for place in places[index - 1 : index + 2])
    curvature = before - 2 * middle + after
    return least + (before - after) / (2 * curvature) * (places[index] - places[index - 1]) if curvature > 0 else least


def best_of_two_stages(program: JointProgram, calibrated: Calibrated, limit: int) -> Draft | None:
    """Return the draft in two stages of least predicted error: widths by energies, then formats; None if none fits."""
    request, found = program.request, list[Draft]()
    everyone = [tuple(range(len(block.expert_widths))) for block in request.checkpoint.config.blocks]
    energies = ranked_energies(request.checkpoint, calibrated.profile, everyone)
    for share in SHARES:
        try:
            found.append(program.solved(limit, FIRST_KAPPA, widths=_energy_widths(request, energies, share)))
        except InfeasibleError:
            continue
    best = min(found, key=_predicted, default=None)
    return None if best is None else replace(best, energies=True)


def _energy_widths(request: JointRequest, energies: Sequence[Sequence[Tensor]], share: float) -> dict[str, int]:
    """Return the width of each expert at a share of neurons that experts share by their `energies`."""
    config = request.checkpoint.config
    everyone = [tuple(range(len(block.expert_widths))) for block in config.blocks]
    multiple = default_multiple(max(width for block in config.blocks for width in block.expert_widths))
    chosen = widths_within(energies, everyone, NeuronBudget(share, multiple, experts_may_go=False), config.top_k)
    if request.stacked:
        chosen = [dict.fromkeys(block, round(sum(block.values()) / len(block))) for block in chosen]
    widths = {
        in_block(index, f"moe.experts.{number}"): _on_ladder(request, in_block(index, f"moe.experts.{number}"), width)
        for index, block in enumerate(chosen)
        for number, width in block.items()
    }
    shared = {in_block(i, SHARED): block.shared_width for i, block in enumerate(config.blocks) if block.shared_width}
    return widths | shared


def _on_ladder(request: JointRequest, stem: str, width: int) -> int:
    """Return the nearest width that is offered, and of two the wider one."""
    return min(filter(None, request.ladders[stem]), key=lambda offered: (abs(offered - width), -offered))
