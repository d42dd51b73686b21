"""What is asked of distilling, and what can be refused before it begins. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ditmoe_cli.compression.planner import label_of
from ditmoe_cli.compression.training.trained_tensors import TrainedTensor
from ditmoe_cli.compression.training.training_pair import check_pair, requested_tensors, require_codes
from ditmoe_cli.compression.training.training_request import Clock, TrainingRequest, parse_clock
from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec, most_steps
from ditmoe_cli.diffusion.schedule import ALWAYS, DEFAULT_SOLVER, DEFAULT_STEPS, Solver, evaluation_times
from ditmoe_cli.diffusion.weak_guidance import Guide, check_guide
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.files.provenance import Distilled
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import DiTMoEConfig, Sampler

States = Literal["teacher", "own"]
STATES: tuple[States, ...] = ("teacher", "own")
DEFAULT_STUDENT_STEPS = 4
_MOST_STAGES = 8  # steps that are learned first
TEACHER_SOLVER: Mapping[Sampler, Solver] = {**DEFAULT_SOLVER, "rf": "ab3"}
TEACHER_STEPS: Mapping[Sampler, int] = {**DEFAULT_STEPS, "rf": 24}
STUDENT_SOLVER: Mapping[Sampler, Solver] = {"rf": "euler", "ddpm": "ddim-trailing"}


@dataclass(frozen=True)
class Distilling(TrainingRequest):
    """A request to distil an original's paths, from noise to images, into few steps of a student.

    Attributes:
        steps: N, of the student, one evaluation each.
        cfg: scale of the classifier-free guidance that the original is sampled with; 1 for none.
        guide: the weaker model that guides the original too; None.
        teacher_steps: steps of the original, a multiple of N; None for those of `TEACHER_STEPS`, or the next multiple.
        states: where the student is asked: ``teacher``, on the original's paths; ``own``, half of the time where its
            own steps have led it.
        progressive: whether it learns 8, 4, 2, … steps before N, as far as they divide the original's.
    """

    steps: int = DEFAULT_STUDENT_STEPS
    cfg: float = 1.0
    guide: Guide | None = None
    teacher_steps: int | None = None
    states: States = "teacher"
    progressive: bool = False

    command: ClassVar[str] = "distill"
    usual_rate: ClassVar[float] = 0.003

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"⟨steps⟩ {self.steps}: give at least 1")
        if self.teacher_steps is not None and (self.teacher_steps < self.steps or self.teacher_steps % self.steps):
            raise UsageError(
                f"⟨teacher_steps⟩ {self.teacher_steps}: give a multiple of the {self.steps} steps of the student"
            )

    @property
    def name(self) -> str:
        """The command and the steps, as part of a name."""
        return f"{self.command}-{self.steps}steps"

    def own_label(self) -> str:
        """Return guidance, states and the original's steps, as part of a name."""
        return label_of(
            self.cfg != 1.0 and f"cfg{self.cfg:g}",
            self.guide is not None and self.guide.label,
            self.states != "teacher" and self.states,
            self.progressive and "progressive",
            self.teacher_steps is not None and f"from{self.teacher_steps}",
        )

    def options(self) -> dict[str, Any]:
        """Return what was asked for, by the names of the options, for histories; defaults are left out."""
        found = super().options()
        guide: Guide | None = found.pop("guide", None)
        if guide is None:
            return found
        interval = {} if guide.interval == ALWAYS else {"guide_interval": "{:g},{:g}".format(*guide.interval)}
        which = "guide_with" if guide.rank is None else "guide_by"
        return {**found, which: guide.model, "guide_scale": guide.scale, **interval}

    def path_steps(self, family: Sampler) -> int:
        """Return the steps of the original: those given, else the fewest multiple of N that it takes.

        Where 8 steps are learned first, it is a multiple of 8.

        Raises `UsageError` for a student of more steps than the original's, and for more than its solver takes.
        """
        usual, most = TEACHER_STEPS[family], most_steps(TEACHER_SOLVER[family])
        if self.teacher_steps is not None and self.teacher_steps > most:
            raise UsageError(f"⟨teacher_steps⟩ {self.teacher_steps}: {TEACHER_SOLVER[family]} takes at most {most}")
        if self.teacher_steps is None and self.steps > usual:
            raise UsageError(
                f"⟨steps⟩ {self.steps}: the original itself takes {usual} of {TEACHER_SOLVER[family]}; give fewer, or "
                "more ⟨teacher_steps⟩ to ditmoe distill"
            )
        unit = _MOST_STAGES if self.progressive and _MOST_STAGES % self.steps == 0 else self.steps
        return self.teacher_steps or -(-usual // unit) * unit

    def stages(self, family: Sampler) -> tuple[int, ...]:
        """Return the numbers of steps that are learned one after the other, N the last."""
        taught = self.path_steps(family)
        before = [count for count in (_MOST_STAGES, 4, 2) if self.steps < count < taught and count % self.steps == 0]
        return (*(count for count in before if self.progressive and taught % count == 0), self.steps)

    def trainings(self, family: Sampler) -> tuple[str, ...]:
        """Return the names of the trainings, one for each number of steps that is learned."""
        return tuple(f"distilling-{steps}" for steps in self.stages(family))

    def clocked(self, family: Sampler) -> Clock | None:
        """Return what an earlier run chose by the clock. Raises `UsageError` for numbers of no such distilling."""
        return None if self.clock is None else parse_clock(self.clock, self.trainings(family))

    def teacher_spec(self, config: DiTMoEConfig, images: int) -> SampleSpec:
        """Return how the original is sampled. Raises `UsageError` for guidance without a null class."""
        family, classes = config.sampler, tuple(range(config.num_classes))
        solver = TEACHER_SOLVER[family]
        spec = SampleSpec(images, self.path_steps(family), self.cfg, self.seed, solver, classes, guide=self.guide)
        return check_spec(spec, config)

    def evaluations(self, family: Sampler) -> int:
        """Return how often the original is evaluated for a path, in one branch."""
        return len(evaluation_times(TEACHER_SOLVER[family], self.path_steps(family)))

    def distilled(self, family: Sampler) -> Distilled:
        """Return by which few steps the student is sampled, and what is in its weights."""
        guide = self.guide or Guide("", 0.0)
        return Distilled(
            STUDENT_SOLVER[family],
            self.steps,
            cfg=self.cfg,
            guide=guide.model or None,
            guide_scale=guide.scale,
            guide_interval=guide.interval,
            teacher_solver=TEACHER_SOLVER[family],
            teacher_steps=self.path_steps(family),
        )


def check_distilled(
    student: Checkpoint, original: Checkpoint, asked: Distilling, weak: Checkpoint | None = None
) -> str | None:
    """Return a warning as `check_pair` does; the student may be the original itself. `weak` is that of the guide.

    Raises `BadInputError` for a pair that does not correspond, and for an original that is distilled; `UsageError` for
    steps and guidance that it cannot be sampled by, and for settings that have no effect.
    """
    if original.distilled is not None:
        raise BadInputError(
            f"{original.path}: was distilled to {original.distilled.steps} steps itself; give the checkpoint that it "
            "was made from as ⟨original⟩"
        )
    warning = check_pair(student, original)
    asked.teacher_spec(original.config, 1)
    check_guide(asked.guide, original, weak)
    stages = asked.stages(original.config.sampler)
    asked.clocked(original.config.sampler)
    if asked.progressive and len(stages) == 1:
        raise UsageError(
            f"⟨progressive⟩ has no effect: between the {asked.steps} steps of the student and the original's "
            f"{asked.path_steps(original.config.sampler)} are no 8, 4 or 2 that both go with; leave it out"
        )
    if asked.iterations is not None and asked.iterations < len(stages):
        raise UsageError(
            f"⟨iterations⟩ {asked.iterations}: give at least {len(stages)}, one for each number of steps to learn"
        )
    if asked.states == "own" and stages == (1,):
        raise UsageError("⟨states⟩ own has no effect with ⟨steps⟩ 1: a single step begins at noise; leave it out")
    return warning


def check_own_teacher(student: Checkpoint) -> None:
    """Raise `UsageError` where a student that was made from another checkpoint would learn from itself unasked."""
    made = next((step for step in student.provenance().history if step.command != "convert"), None)
    if made is not None and student.distilled is None:
        raise UsageError(
            f"⟨original⟩ is missing: {student.name} was made from another checkpoint ({made.source[:12]}) by "
            f"{made.command}; give that one, or {student.name} itself to learn from its own images"
        )


def tensors_to_distill(student: Checkpoint, asked: Distilling) -> dict[str, TrainedTensor]:
    """Return the student's stored tensors that are trained, by name.

    Raises as `requested_tensors` and `require_codes` do.
    """
    found = requested_tensors(student, asked)
    require_codes(student, asked, found)
    return found
