"""The planner of a compression to a size: structure and bits from one budget. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from ditmoe_cli.compression.block_layout import require_original
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.estimates import carrying_out, elimination_estimate, measuring_estimate, repeated
from ditmoe_cli.compression.joint.damage import FEWEST_HELD, too_few
from ditmoe_cli.compression.joint.expert_options import WidthCurve
from ditmoe_cli.compression.joint.joint_program import Draft, JointProgram, JointRequest, Measures, plan_of
from ditmoe_cli.compression.plan import CompressionPlan, Experts, Retraining
from ditmoe_cli.compression.planner import Planner, Work, label_of
from ditmoe_cli.compression.precision.budget import size_label
from ditmoe_cli.compression.precision.candidates import Candidates, Offered, candidate_formats, format_counts
from ditmoe_cli.compression.precision.mixed import held_formats
from ditmoe_cli.compression.working_sizes import MOST_TRIED, SEARCH_TOKENS, judged_images
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import BadInputError, InfeasibleError, UsageError
from ditmoe_cli.files.names import MATRICES, SHARED, in_expert
from ditmoe_cli.files.workfolder import WorkFolder, open_work
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.effort import Estimate, branches_at
from ditmoe_cli.progress import each
from ditmoe_cli.routing.profile import RoutingProfile

_LIKELY_BITS = 6  # a weight, in plans that turn out best


@dataclass(frozen=True)
class Goal:
    """What a compression is to reach: one of its attributes.

    Attributes:
        size: a file of at most so many bytes.
        ratio: the same as a share of the checkpoint's.
        max_damage: the smallest file whose tried error is at most this, by its upper 95 % bound (`joint.damage`).
    """

    size: int | None = None
    ratio: float | None = None
    max_damage: float | None = None

    def __post_init__(self) -> None:
        if len(self.options()) != 1:
            raise UsageError("give one of ⟨size⟩, as 1.2GiB, ⟨ratio⟩, as 0.25, and ⟨max_damage⟩, as 0.02")
        if self.max_damage is not None and not 0 < self.max_damage < math.inf:
            raise UsageError(
                f"⟨max_damage⟩ {self.max_damage:g}: give a relative squared error of the guided prediction, above 0"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError(f"⟨ratio⟩ {self.ratio:g}: give a share of the checkpoint's bytes, above 0 and below 1")

    @property
    def label(self) -> str:
        """The goal as part of a file's name."""
        if self.max_damage is not None:
            return f"damage{self.max_damage:g}"
        return f"size{size_label(self.size)}" if self.size is not None else f"ratio{self.ratio:g}"

    def options(self) -> dict[str, Any]:
        """Return what was asked for by its name, for the options of a plan."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def limit(self, checkpoint: Checkpoint) -> int:
        """Return the largest file allowed, in bytes: for a damage one byte less than the checkpoint's.

        Raises `InfeasibleError` where the checkpoint is no larger.
        """
        before = checkpoint.header.file_bytes
        if self.max_damage is not None:
            return before - 1
        limit = self.size if self.size is not None else int((self.ratio or 0.0) * before)
        if limit >= before:
            raise InfeasibleError(
                f"{checkpoint.path}: has {before:,} bytes, and {limit:,} are allowed: there is nothing to do; "
                "give a smaller ⟨size⟩"
            )
        return limit


@dataclass(frozen=True)
class Compressing(Planner):
    """The planner of a compression to a size.

    Attributes:
        goal: the size to reach.
        candidates: the formats to choose from.
        stacked: whether all experts of a block take one width, and one format for each of their matrices.
        retraining: trains weights in the end; None for none.
        clock: numbers that the clock chose for that in an earlier run, as its history has them; None for none.
    """

    goal: Goal
    candidates: Candidates
    stacked: bool = False
    retraining: Retraining | None = None
    clock: tuple[int, ...] | None = None
    command: ClassVar[str] = "compress"
    needs_profile: ClassVar[bool] = True
    measures: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """The ending of the default output's name."""
        trained = ""
        if self.retraining is not None:
            few = self.retraining.student_steps
            trained = f"{'heal' if few is None else f'{few}steps'}{self.retraining.minutes:g}min"
        return label_of(
            f"{self.command}-{self.goal.label}", *self.candidates.labels(), self.stacked and "stack", trained
        )

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for the options of the plan."""
        stacked = {"tie": ",".join(("stack", *self.candidates.tied))} if self.stacked else {}
        return {**self.goal.options(), **self.candidates.options(), **stacked, **self._training_options()}

    def _training_options(self) -> dict[str, Any]:
        if self.retraining is None:
            return {}
        few = self.retraining.student_steps
        return {**({"heal": True} if few is None else {"steps": few}), "minutes": self.retraining.minutes}

    def check(self, work: Work) -> None:
        """Raise the errors of quantised checkpoints, and of a size below the smallest possible or above the file."""
        require_original(work.checkpoint)
        if work.checkpoint.distilled is not None and self.retraining is not None and self.retraining.student_steps:
            raise UsageError(
                f"⟨steps⟩ {self.retraining.student_steps}: {work.checkpoint.name} was distilled to "
                f"{told_steps(work.checkpoint.distilled)}, which its copies keep; leave it out"
            )
        if self.stacked:
            _require_alike(work.checkpoint)
        self.least_bytes(work)
        calibration = work.calibration()
        if self.goal.max_damage is not None and calibration is not None:
            judged = len(judged_images(int(calibration["images"])))
            if judged < FEWEST_HELD:
                raise BadInputError(too_few(judged))

    def least_bytes(self, work: Work) -> int:
        """Return the bytes of the smallest file. Raises `InfeasibleError` where they exceed the goal."""
        limit = self.goal.limit(work.checkpoint)
        request = self.request(work)
        least = JointProgram(request, unmeasured(request)).least
        if least > limit:
            raise InfeasibleError(
                f"{work.checkpoint.path}: {limit:,} bytes are allowed, and its smallest file takes {least:,} "
                f"({least / work.checkpoint.header.file_bytes:.3f} of it); give that ⟨size⟩ or more"
            )
        return least

    def estimates(self, work: Work, cfg: float) -> list[Estimate]:
        """Return what measuring takes, and carrying out plans of likely widths: those that are tried, and the best."""
        config, request, branches = work.checkpoint.config, self.request(work), branches_at(cfg)
        counts = {name: len(formats) for name, formats in request.measured_formats.items()}
        likely, settings = self._likely(request), {"cfg": cfg}
        plan, tried = (
            replace(plan_of(request, likely, {}, tokens=tokens), calibration=settings) for tokens in (0, SEARCH_TOKENS)
        )
        trials = carrying_out(work.checkpoint, tried, 0)[:-1] * (MOST_TRIED + 1)
        return [
            elimination_estimate(config, branches),
            measuring_estimate(config, counts, branches),
            repeated(trials, "trying {} plans"),
            *carrying_out(work.checkpoint, plan, 0)[:-1],
        ]  # training takes the time that is given it

    def _likely(self, request: JointRequest) -> Draft:
        """Return a draft of likely widths: what experts keep at `_LIKELY_BITS` a weight; formats do not matter here."""
        weights = sum(weight.info.numel for weight in request.checkpoint.weights.values())
        share = 8 * self.goal.limit(request.checkpoint) / weights / _LIKELY_BITS
        widths = {
            stem: max(1, min(own[-1], round(share * own[-1]))) if not stem.endswith(SHARED) else own[-1]
            for stem, own in request.ladders.items()
        }
        formats = {name: next(filter(None, own)) for name, own in request.offered.items() if any(own)}
        return Draft(widths, formats)

    def request(self, work: Work) -> JointRequest:
        """Return the request to the program."""
        free = replace(self.candidates, target=None)
        return JointRequest(
            work.checkpoint,
            work.output,
            self.candidates,
            candidate_formats(work.checkpoint, self.candidates),
            self.options(),
            self.command,
            self.stacked,
            work.calibration(),
            ("tried_error",) if self.goal.max_damage is None else ("tried_error", "damage"),
            self.retraining,
            candidate_formats(work.checkpoint, free) if self.candidates.choices.restrict else {},
        )

    def plan(self, work: Work, profile: RoutingProfile | None) -> CompressionPlan:
        """Return the plan of least tried error, whose weights stay in the work folder."""
        from ditmoe_cli.compression.joint.choosing import Trials, best_within, freer_error, settled_program
        from ditmoe_cli.compression.joint.size_search import smallest_within
        from ditmoe_cli.compression.replay.kept_measures import kept_measures

        assert profile is not None
        limit = self.goal.limit(work.checkpoint)
        kept = kept_measures(work.checkpoint, profile, work.device(), once(work.note))
        calibrated = Calibrated(work.checkpoint, profile, work.device(), kept=kept)
        request = holding(self.request(work))
        with tried_in(work) as folder:
            if self.goal.max_damage is not None:
                found = smallest_within(request, calibrated, folder, limit, self.goal.max_damage)
                program, curves, best, figures = found.program, found.curves, found.tried, found.figures
            else:
                program, curves = settled_program(request, calibrated, lambda _: limit)
                trials = Trials(request, calibrated, curves, folder)
                best = best_within(program, trials, limit)
                figures = {"tried_error": best.held.error}
            if self.stacked or self.candidates.tied:
                figures["untied_error"] = freer_error(program, request.untied, curves, best)
            if request.unrestricted:
                figures["free_error"] = freer_error(program, request.free, curves, best)
        return plan_of(request, best.draft, figures, profile.digest, retraining=self.retraining)

    def judged(self, work: Work, profile: RoutingProfile, plan: CompressionPlan, written: Path) -> Mapping[str, Any]:
        """Return the expected distance of the written file's images, where a damage was asked for."""
        del plan
        if self.goal.max_damage is None:
            return {}
        from ditmoe_cli.compression.joint.image_distance import expected_distance

        calibrated = Calibrated(work.checkpoint, profile, work.device())
        return {"paired_distance": asdict(expected_distance(calibrated, open_checkpoint(written)))}

    def undecided(self, checkpoint: Checkpoint) -> CompressionPlan:
        """Raise `BadInputError` that names the sizes that can be reached: errors are measured with a profile."""
        work = Work(checkpoint, Output(checkpoint.path.with_name(f"{self.label}.safetensors")), lambda: "cpu")
        raise BadInputError(
            f"{checkpoint.path}: which plan is best rests on measured errors; give a ⟨profile⟩. A file takes at most "
            f"{self.goal.limit(checkpoint):,} bytes, and {self.least_bytes(work):,} can be reached"
        )

    def details(self, checkpoint: Checkpoint, plan: CompressionPlan) -> Mapping[str, Any]:
        """Return the number of weights of each format, the share of neurons that stay, and the errors."""
        formats = format_counts(plan) if plan.together else {}
        return {"neurons": neurons_kept(checkpoint, plan), **formats}


def neurons_kept(checkpoint: Checkpoint, plan: CompressionPlan) -> float:
    """Return the share of routed experts' neurons that stay under a plan."""
    olds = checkpoint.config.blocks
    before = sum(sum(old.expert_widths) for old in olds)
    blocks = next((stage.blocks for stage in plan.stages if isinstance(stage, Experts)), ())
    if not blocks:
        return 1.0
    kept = (
        sum(block.widths or (old.expert_widths[e] for e in block.keep)) for block, old in zip(blocks, olds, strict=True)
    )
    return sum(kept) / before


def unmeasured(request: JointRequest) -> Measures:
    """Return measures without errors, by which the smallest file is known from headers."""
    curves = {
        stem: WidthCurve(widths, (0.0,) * len(widths), (1.0,) * len(widths)) for stem, widths in request.ladders.items()
    }
    formats = {name: {fmt: 0.0 for fmt in offered if fmt} for name, offered in request.offered.items()}
    return Measures(curves, formats, formats, (1.0,) * request.checkpoint.config.depth)


def holding(request: JointRequest) -> JointRequest:
    """Return the request without the formats that do not hold a weight's values."""
    checkpoint = request.checkpoint
    checked = each(request.measured_formats.items(), f"checking the values of {checkpoint.name}", "matrices")
    held = {name: {None, *held_formats(checkpoint, name, formats)} for name, formats in checked}

    def kept(offered: Offered) -> Offered:
        return {
            name: tuple(fmt for fmt in formats if fmt in held[name]) or (None,) for name, formats in offered.items()
        }

    return replace(request, offered=kept(request.offered), unrestricted=kept(request.unrestricted))


def _require_alike(checkpoint: Checkpoint) -> None:
    """Raise `BadInputError` where experts of a block are stored in several dtypes, which are no one format."""
    for index, block in enumerate(checkpoint.config.blocks):
        for matrix in MATRICES:
            names = [in_expert(index, number, f"{matrix}.weight") for number in range(len(block.expert_widths))]
            dtypes = sorted({checkpoint.weights[name].info.dtype for name in names})
            if len(dtypes) > 1:
                raise BadInputError(
                    f"{checkpoint.path}: experts of block {index} are stored as {' and '.join(dtypes)}, and ⟨tie⟩ "
                    "stack gives them one format; store them alike first (ditmoe convert ⟨dtype⟩ bf16)"
                )


def once(note: Callable[[str], None]) -> Callable[[str], None]:
    """Return what notes each line once: where measurements cannot be kept, each of them would say so."""
    said: set[str] = set()

    def noted(line: str) -> None:
        if line not in said:
            said.add(line)
            note(line)

    return noted


@contextmanager
def tried_in(work: Work) -> Iterator[WorkFolder]:
    """Yield the folder that keeps what is tried: one that goes in the end where the work has none."""
    if work.folder is not None:
        yield work.folder
        return
    with TemporaryDirectory(prefix="ditmoe-") as folder, open_work(Path(folder, "tried"), "", lambda _: None) as own:
        yield own
