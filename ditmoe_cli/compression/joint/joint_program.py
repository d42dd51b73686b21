"""The request for a compression within one budget: what may change, and the bytes allowed. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ditmoe_cli.compression.joint.expert_options import (
    ExpertDecision,
    ExpertOffer,
    Pick,
    WidthCurve,
    bytes_of_weight,
    default_multiple,
    ladder,
    picked,
)
from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.plan import (
    BlockPlan,
    CompressionPlan,
    Experts,
    Formats,
    PlanStage,
    Repair,
    Retraining,
    Rounding,
    Selection,
)
from ditmoe_cli.compression.precision.candidates import Candidates, Offered
from ditmoe_cli.compression.precision.lagrange import Group, Option, bytes_of, smallest_options
from ditmoe_cli.compression.precision.mix import UNTOUCHED, fitted
from ditmoe_cli.compression.precision.program import Solution, solve, solver_named
from ditmoe_cli.errors import InfeasibleError
from ditmoe_cli.files.names import MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint

_SECONDS = 30.0  # time limit of a solver
GAP = 1e-3  # relative gap of the program: errors that are measured are not known better
REPAIR = Repair(linear=False)
"""Without linear maps: of a block that drops an expert it would take D² numbers."""


@dataclass(frozen=True)
class Measures:
    """Measured errors, in the unit of the guided prediction before amplification, except for `dense`.

    Attributes:
        curves: the widths of each expert, by its full name.
        formats: the error of each format of each matrix of an expert, by the matrix's name.
        dense: the error of each format of all other weights, amplified.
        amplification: of each block's mixture.
    """

    curves: Mapping[str, WidthCurve]
    formats: Mapping[str, Mapping[str, float]]
    dense: Mapping[str, Mapping[str, float]]
    amplification: Sequence[float]


@dataclass(frozen=True)
class JointRequest:
    """A request for structure and bits from one budget.

    Attributes:
        checkpoint: the checkpoint to compress.
        output: where the result will be written, which its bytes depend on.
        candidates: the widths in bits to choose from, and how matrices are tied.
        offered: the formats that each weight may take; empty where weights keep their dtype.
        options: what was asked for, for the options of the plan.
        command: the command that plans.
        stacked: whether all experts of a block take one width, and one format for each of their matrices.
        calibration: settings of the calibration, which the history of the result keeps.
        measured: figures of the plan, beside those of the program, which the history of the result keeps.
        retraining: trains weights in the end; None for not.
        unrestricted: the formats that each weight might take if no target had to hold the result, which are measured
            too; empty where none has to.
    """

    checkpoint: Checkpoint
    output: Output
    candidates: Candidates
    offered: Offered
    options: Mapping[str, Any]
    command: str = "compress"
    stacked: bool = False
    calibration: Mapping[str, Any] | None = None
    measured: tuple[str, ...] = ("tried_error",)
    retraining: Retraining | None = None
    unrestricted: Offered = field(default_factory=dict)

    @property
    def untied(self) -> JointRequest:
        """The same request without ties."""
        return replace(self, stacked=False, candidates=replace(self.candidates, tied=()))

    @property
    def free(self) -> JointRequest:
        """The same request where no target has to hold the result."""
        candidates = replace(self.candidates, target=None)
        return replace(self, candidates=candidates, offered=self.unrestricted, unrestricted={})

    @property
    def measured_formats(self) -> dict[str, tuple[str, ...]]:
        """The formats of each weight that errors are measured of."""
        both = (self.offered, self.unrestricted)
        listed = {name: [fmt for offered in both for fmt in offered.get(name, ()) if fmt] for name in self.offered}
        return {name: tuple(dict.fromkeys(formats)) for name, formats in listed.items()}

    @cached_property
    def ladders(self) -> dict[str, tuple[int, ...]]:
        """The widths that each expert may choose from, by its full name: its own alone where it is protected."""
        found: dict[str, tuple[int, ...]] = {}
        config, protected = self.checkpoint.config, self.candidates.protected
        for index, block in enumerate(config.blocks):
            narrowest = min(block.expert_widths)
            may_go = len(block.expert_widths) > config.top_k and not block.constants and not self.stacked
            for number, width in enumerate(block.expert_widths):
                stem = in_block(index, f"moe.experts.{number}")
                own = narrowest if self.stacked else width  # one width that all have room for
                offered = ladder(own, default_multiple(own), may_go=may_go)
                found[stem] = (width,) if "experts" in protected else offered
            if block.shared_width:
                multiple = default_multiple(block.shared_width)
                offered = ladder(block.shared_width, multiple, may_go=False)
                found[in_block(index, SHARED)] = (block.shared_width,) if "shared" in protected else offered
        return found

    def decisions(self, measures: Measures) -> list[ExpertDecision]:
        """Return the decisions about experts: one for each, or one for all routed experts of a block.

        In each block as many experts as a token selects have to stay, those that would cost most when they went.
        """
        staying = self._staying(measures)
        offers: dict[str, list[ExpertOffer]] = {}
        for stem in self.ladders:
            index = split_name(f"{stem}.").block
            routed = not stem.endswith(SHARED)
            name = in_block(index or 0, "moe.experts") if self.stacked and routed else stem
            infos = tuple(self.checkpoint.weights[f"{stem}.{matrix}.weight"].info for matrix in MATRICES)
            formats = tuple(self._errors(info.name, measures.formats) for info in infos)
            curve = measures.curves[stem].without_zero if stem in staying else measures.curves[stem]
            offers.setdefault(name, []).append(ExpertOffer(stem, infos, curve, formats))
        blocks = {name: split_name(f"{name}.").block or 0 for name in offers}
        takes = self.candidates.take
        return [ExpertDecision(name, blocks[name], tuple(own), self._tied, takes) for name, own in offers.items()]

    @property
    def _tied(self) -> tuple[int, ...]:
        """Which of an expert's matrices take one format, as indices."""
        return tuple(index for index, name in enumerate(MATRICES) if name.removesuffix("_proj") in self.candidates.tied)

    def _staying(self, measures: Measures) -> set[str]:
        found: set[str] = set()
        for index, block in enumerate(self.checkpoint.config.blocks):
            stems = [in_block(index, f"moe.experts.{number}") for number in range(len(block.expert_widths))]
            found |= set(
                sorted(stems, key=lambda stem: -measures.curves[stem].errors[0])[: self.checkpoint.config.top_k]
            )
        return found

    def _errors(self, name: str, errors: Mapping[str, Mapping[str, float]]) -> dict[str | None, float]:
        """Return the error of each format that a matrix may take, none for its own dtype."""
        offered = self.offered.get(name, (None,))
        return {fmt: 0.0 if fmt is None else errors[name][fmt] for fmt in offered}

    @cached_property
    def dense(self) -> list[str]:
        """The weights outside of experts that may be quantised."""
        mixture = {f"{stem}.{matrix}.weight" for stem in self.ladders for matrix in MATRICES}
        return [name for name in self.offered if name not in mixture]

    def dense_groups(self, errors: Mapping[str, Mapping[str, float]]) -> list[Group]:
        """Return a group of the program for each weight outside of experts."""
        groups = []
        for name in self.dense:
            info = self.checkpoint.weights[name].info
            options = tuple(
                Option(fmt or UNTOUCHED, bytes_of_weight(info.shape, info.dtype, fmt), error)
                for fmt, error in self._errors(name, errors).items()
            )
            groups.append(Group(name, options))
        return groups


@dataclass(frozen=True)
class Draft:
    """A choice of structure and bits.

    Attributes:
        widths: of each expert, by its full name; 0 for one that goes.
        formats: of each weight that gets one.
        solution: the solution of the program; None for a choice that none made.
        energies: whether neurons of highest energy stay, as in plans of two stages.
        kappa: the weight κ of structure that the program was solved with.
    """

    widths: Mapping[str, int]
    formats: Mapping[str, str]
    solution: Solution | None = None
    energies: bool = False
    kappa: float = 1.0

    @property
    def figures(self) -> dict[str, Any]:
        """Figures of the choice, for the options of a plan; errors of formats are over κ."""
        found = self.solution
        if found is None:
            return {}
        solver = solver_named(found.solver, found.failures)
        return {
            "predicted_error": found.error / self.kappa,
            "bound": found.bound / self.kappa,
            "gap": found.gap,
            "solver": solver,
        }


def plan_of(
    request: JointRequest,
    draft: Draft,
    figures: Mapping[str, Any],
    profile: str | None = None,
    *,
    tokens: int = 0,
    retraining: Retraining | None = None,
) -> CompressionPlan:
    """Return the plan that carries a draft out, fitted on `tokens`, 0 for as many as suit it.

    `retraining` trains weights in the end; None for not.
    """
    blocks = tuple(_block_plan(request, draft.widths, index) for index in range(request.checkpoint.config.depth))
    selection: Selection | None = None if draft.energies else "elimination"
    experts = Experts(blocks, repair=replace(REPAIR, tokens=tokens), selection=selection)
    formats = Formats(dict(draft.formats), Rounding(tokens=tokens))
    stages: tuple[PlanStage, ...] = (experts, formats)
    if retraining is not None:
        stages = (experts, formats, retraining)
    options = {**request.options, **draft.figures, **figures}
    source, calibration = request.checkpoint.fingerprint, request.calibration
    return CompressionPlan(request.command, source, profile, options, stages, calibration=calibration)


def _block_plan(request: JointRequest, widths: Mapping[str, int], index: int) -> BlockPlan:
    old = request.checkpoint.config.blocks[index]
    own = [widths[in_block(index, f"moe.experts.{number}")] for number in range(len(old.expert_widths))]
    keep = tuple(number for number, width in enumerate(own) if width)
    narrowed = any(own[number] != old.expert_widths[number] for number in keep)
    shared = widths.get(in_block(index, SHARED))
    return BlockPlan(
        keep=keep,
        router="ghost",
        widths=tuple(own[number] for number in keep) if narrowed else (),
        shared_width=None if shared in (None, old.shared_width) else shared,
    )


def size_of(request: JointRequest, draft: Draft) -> int:
    """Return the exact bytes of a draft's file."""
    figures = dict.fromkeys(("predicted_error", "gap", *request.measured), 0.0)
    plan = plan_of(request, draft, figures, "0" * 64, retraining=request.retraining)
    plan = replace(plan, request="0" * 64)
    return planned_output(request.checkpoint, plan).predicted_bytes(request.output)


class JointProgram:
    """The program over structure and bits with measured errors, to be solved for several sizes and κ."""

    def __init__(self, request: JointRequest, measures: Measures) -> None:
        self.request, self.measures = request, measures
        self._decisions = request.decisions(measures)
        self._dense = request.dense_groups(measures.dense)
        self._known_least: dict[tuple[tuple[str, int], ...], int] = {}

    @property
    def least(self) -> int:
        """The bytes of the smallest file that the program may choose."""
        return self._least({})

    def _least(self, widths: Mapping[str, int]) -> int:
        key = tuple(sorted(widths.items()))
        if key not in self._known_least:
            groups, picks = self._groups(1.0, widths)
            self._known_least[key] = size_of(self.request, self._draft(groups, picks, smallest_options(groups)))
        return self._known_least[key]

    def solved(self, limit: int, kappa: float, widths: Mapping[str, int] | None = None) -> Draft:
        """Return the draft of least error whose file takes at most `limit` bytes; with `widths`, by experts' names, of
        these widths.

        Raises `InfeasibleError` where nothing fits.
        """
        fixed = widths or {}
        least = self._least(fixed)
        if least > limit:
            raise InfeasibleError(f"the budget is {limit:,} bytes, and the smallest file takes {least:,}; give more")
        groups, picks = self._groups(kappa, fixed)
        fewest = bytes_of(groups, smallest_options(groups))

        def within(budget: int) -> Draft:
            solution = solve(groups, budget, gap=GAP, time_limit=_SECONDS)
            return replace(self._draft(groups, picks, solution.choice), solution=solution, kappa=kappa)

        return fitted(within, lambda draft: size_of(self.request, draft), limit, fewest, limit - least)

    def _groups(self, kappa: float, widths: Mapping[str, int]) -> tuple[list[Group], list[tuple[Pick, ...]]]:
        amplification = self.measures.amplification
        found = []
        for decision in self._decisions:
            width = widths.get(decision.offers[0].stem)
            found.append(decision.group(amplification[decision.block], kappa, width))
        return [group for group, _ in found] + self._dense, [picks for _, picks in found]

    def _draft(self, groups: Sequence[Group], picks: Sequence[tuple[Pick, ...]], choice: Sequence[int]) -> Draft:
        chosen = [own[o] for own, o in zip(picks, choice, strict=False)]
        widths, formats = picked(self._decisions, chosen)
        dense = zip(groups[len(picks) :], choice[len(picks) :], strict=True)
        labels = {group.name: group.options[o].format for group, o in dense}
        return Draft(widths, formats | {name: fmt for name, fmt in labels.items() if fmt != UNTOUCHED})
