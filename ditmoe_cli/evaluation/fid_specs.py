"""How each side of a ``fid`` comparison is sampled, or was: as the subject, or by its own few steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ditmoe_cli.diffusion.sampling import SampleSpec, check_spec
from ditmoe_cli.diffusion.schedule import choose_solver
from ditmoe_cli.diffusion.weak_guidance import check_guide
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.fid_sides import Comparison, SideKey
from ditmoe_cli.evaluation.images import kind_of
from ditmoe_cli.evaluation.sampled_models import SampledModel, guided_as, model_of, spec_beside
from ditmoe_cli.evaluation.samples import read_origin
from ditmoe_cli.model.checkpoint import Checkpoint

SpecOf = Callable[[Checkpoint], SampleSpec]


@dataclass(frozen=True)
class SideSpecs:
    """Checkpoints and specs of the sides by key, None where they are not known; `subject` is the subject's spec."""

    models: Mapping[SideKey, SampledModel | None]
    specs: Mapping[SideKey, SampleSpec | None]
    subject: SampleSpec | None

    @property
    def distilled(self) -> bool:
        """Whether a side is distilled."""
        return any(model is not None and model.distilled is not None for model in self.models.values())


def side_specs(comparison: Comparison, spec_of: SpecOf, weak: Checkpoint | None = None) -> SideSpecs:
    """Return how the sides come about; `spec_of` returns a checkpoint's spec, `weak` guides.

    Checkpoints are sampled as the subject is, but for those that a distilled one among the sides was made from, and
    those that were distilled otherwise (`sampled_models`); a schedule is the subject's alone. Raises `BadInputError`
    for a checkpoint that cannot be sampled as the subject is, a schedule that does not fit, and malformed samples.
    """
    items = {item.key: item for item in comparison.items}
    models: dict[SideKey, SampledModel | None] = {}
    specs: dict[SideKey, SampleSpec | None] = {}
    for key, item in items.items():
        if item.checkpoint is not None:
            models[key] = model_of(item.checkpoint)
            continue
        origin = read_origin(item.path) if kind_of(item.path) == "images" else None
        models[key], specs[key] = (origin.model, origin.spec) if origin is not None else (None, None)
    scored, subject = comparison.subject, specs.get(comparison.subject.key)
    own = models[scored.key]
    if scored.checkpoint is not None and own is not None:
        whole = guided_as(spec_of(scored.checkpoint), own, models.values(), weak)
        subject = specs[scored.key] = whole.by(scored.schedule, scored.checkpoint)
    for key, item in items.items():
        if item.checkpoint is not None and key != scored.key:
            spec = spec_beside(item.checkpoint, spec_of, subject, own, models.values(), weak)
            specs[key] = _checked(spec, item.checkpoint, weak) if subject is not None else spec
    return SideSpecs(models, specs, subject)


def _checked(spec: SampleSpec, checkpoint: Checkpoint, weak: Checkpoint | None) -> SampleSpec:
    """Return a spec. Raises `BadInputError` where a checkpoint cannot be sampled by it."""
    try:
        choose_solver(spec.solver, checkpoint.config.sampler)
        check_guide(spec.guide, checkpoint, weak)
        return check_spec(spec, checkpoint.config)
    except (UsageError, BadInputError) as error:
        raise BadInputError(f"{checkpoint.path}: cannot be sampled as the other side is: {error.message}") from None
