"""Structure and bits carried out together, block after block: narrowed, rounded, refitted, rounded.

In each block, on the states that come from the finished blocks before it:

1. modulation and attention are rounded;
2. the new mixture is made: experts dropped, merged or narrowed;
3. experts' gate and up are rounded;
4. the down projections are refitted to the original mixture's output, so that they make up for what went and for what
   rounding did to gate and up;
5. they are rounded, on the neurons that the rounded gate and up give.

What gets no format is rounded to the dtype that it is written in, at the same places. The original model's states run
alongside, to measure the error. One block's weights are in memory, before and after, beside the states of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.block_layout import BlockLayout, block_layouts, new_names
from ditmoe_cli.compression.computed import Computing, as_stored, mixture_infos
from ditmoe_cli.compression.new_mixture import Source, new_weights, weights_of
from ditmoe_cli.compression.plan import Experts, Formats
from ditmoe_cli.compression.rebuild import mixture_of, neuron_orders, repaired
from ditmoe_cli.compression.replay.amplification import relative_error
from ditmoe_cli.compression.replay.guided import GuidedStates, in_branches
from ditmoe_cli.compression.replay.rounded_layers import rounded
from ditmoe_cli.compression.replay.states import States, fitting_states, image_count, judging_states
from ditmoe_cli.compression.replay.stream import CalibrationStream, Tokens, embedded, joined
from ditmoe_cli.compression.rounding.gptq_blocks import BlockRounding, agreement_of, mixture_readings, passed
from ditmoe_cli.compression.rounding.layers_together import Reading
from ditmoe_cli.compression.working_sizes import FEWEST_TO_JUDGE, TOKENS_PER_INPUT, TOKENS_PER_UNKNOWN, judged_images
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import EXPERT_OF, MATRICES, SHARED, in_block, split_name
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.files.workfolder import Piece
from ditmoe_cli.model.dit import Block
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.model.walk import resident_blocks
from ditmoe_cli.progress import phase
from ditmoe_cli.routing.profile import RoutingProfile, require_profile_of


@dataclass(frozen=True)
class HeldErrors:
    """Squared errors of the guided prediction on calibration images that nothing was fitted on, and their references.

    Attributes:
        errors: Σ ‖Δ prediction‖² of each image, over its states.
        references: Σ ‖prediction‖² of each.
    """

    errors: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def error(self) -> float:
        """The relative squared error over all of them."""
        total = sum(self.references)
        return sum(self.errors) / total if total else 0.0


@dataclass(frozen=True)
class Carried:
    """What carrying structure and bits out has measured.

    Attributes:
        refit_error: each block's held-out error after refitting over that before; empty without refitting.
        error: Σ ‖Δ prediction‖² / Σ ‖prediction‖², guided, on all calibration states.
        agreement: of each block, the share of selections that both models make.
        held: errors on the images to judge by, on which nothing was fitted.
    """

    refit_error: tuple[float, ...]
    error: float
    agreement: tuple[float, ...]
    held: HeldErrors


def carry_out_together(
    computing: Computing,
    experts: Experts,
    formats: Formats,
    *,
    title: str = "compressing",
    orders: Sequence[Mapping[str, Tensor]] | None = None,
) -> Carried:
    """Compute and keep every block's weights, going on behind those that an unfinished run has left.

    `title` says what is done to the checkpoint, and `orders` are those of `neuron_orders`, where they are known.

    Nothing is fitted on the `judged_images`, of which errors are told: held-out ones choose strengths and dampings, and
    are fitted on in the end.

    Raises `BadInputError` for a profile of another checkpoint or without states, and for values that are not finite.
    """
    checkpoint, kept = computing.checkpoint, computing.blocks
    require_profile_of(computing.profile, checkpoint.fingerprint, checkpoint.path)
    layouts = block_layouts(checkpoint, experts)
    if orders is None:
        orders = neuron_orders(computing, experts) if kept.start < kept.total else ()
    model = OffloadedDiTMoE(checkpoint, torch.device(computing.device), dtype=computing.dtype)
    states, judging = _states(computing, layouts, experts, formats), judging_states(computing)
    outside = {model.linear(n): fmt for n, fmt in formats.formats.items() if split_name(n).block is None}
    with resident_blocks(model, f"{title} {checkpoint.name}", kept.start) as blocks:
        original = CalibrationStream(model, states)
        with rounded(outside):
            student = CalibrationStream(model, states, left_out(computing.profile))
        original.go_on(kept.state, "original")
        student.go_on(kept.state, "student")
        judged = _Judged(model, in_branches(judging, model), outside)
        judged.go_on(kept.state)
        for index, block in blocks:
            selected = passed(original, block)
            judged.pass_original(block)
            own = {name: fmt for name, fmt in formats.formats.items() if split_name(name).block == index}
            with phase("compressing", len(own) + 1, "matrices", share=0.9) as progress:
                rounding = BlockRounding(checkpoint, index, block, student, progress)
                members, attended = rounding.before_mixture({n: fmt for n, fmt in own.items() if ".moe." not in n})
                tokens = student.tokens(attended)
                of_mixture = _Mixture(computing, index, layouts[index], own, rounding)
                made = of_mixture.made(experts, orders[index], block.moe, tokens)
                progress(1)
            changed = made.mixture
            rows = changed.gate(attended.inputs.flatten(0, 1)).rows
            agreement = {"agreement": agreement_of(selected, _old_rows(rows, layouts[index]))}
            student.advance(attended, changed)
            judged.pass_changed(block, changed)
            document = agreement | ({} if made.error is None else {"error": made.error})
            state = {"original": original.x, "student": student.x, **judged.state()}
            kept.keep(index, members | made.tensors, document, state)
        guided = in_branches(states, model)
        expected = guided.predicted(model, original.x, original.c)
        with rounded(outside):
            prediction = guided.predicted(model, student.x, student.c)
        held = by_image(*judged.predictions(), judging.images)
    documents = [kept.result(index).document for index in range(kept.total)]
    refit_error = tuple(float(each["error"]) for each in documents if "error" in each)
    agreement_of_blocks = tuple(float(each["agreement"]) for each in documents)
    return Carried(refit_error, relative_error(prediction, expected), agreement_of_blocks, held)


def left_out(profile: RoutingProfile) -> Sequence[int]:
    """Return the images of a profile that nothing is fitted on: those to judge by, unless there are too few."""
    count = image_count(profile)
    return judged_images(count) if count >= FEWEST_TO_JUDGE else ()


class _Judged:
    """States to judge by, in the original model and in the changed one."""

    def __init__(self, model: OffloadedDiTMoE, states: GuidedStates, outside: Mapping[nn.Linear, str]) -> None:
        self.model, self.states, self.outside = model, states, outside
        self.original = embedded(model, states)
        with rounded(outside):
            self.changed = embedded(model, states)

    def go_on(self, kept: Piece | None) -> None:
        """Move both behind the blocks that an unfinished run has done, if any."""
        self.original.go_on(kept, "judged.original")
        self.changed.go_on(kept, "judged.changed")

    def state(self) -> dict[str, Tensor]:
        """Return the tokens of both, by name."""
        return {"judged.original": self.original.x, "judged.changed": self.changed.x}

    def pass_original(self, block: Block) -> None:
        """Let the original's states pass a block that is as it was."""
        self.original.x = self.original.through(block)

    def pass_changed(self, block: Block, mixture: SparseMoE) -> None:
        """Let the other states pass a block whose other layers are changed already, with its new mixture."""
        self.changed.advance(joined(self.changed.attended(block)), mixture)

    def predictions(self) -> tuple[Tensor, Tensor]:
        """Return the guided predictions (N, C, S, S) of the changed model and of the original."""
        expected = self.states.predicted(self.model, self.original.x, self.original.c)
        with rounded(self.outside):
            return self.states.predicted(self.model, self.changed.x, self.changed.c), expected


def by_image(prediction: Tensor, expected: Tensor, images: Tensor) -> HeldErrors:
    """Return squared errors and references of predictions (N, ...), summed over the states of each of `images` (N,)."""
    squares = [part.double().square().flatten(1).sum(dim=1).cpu() for part in (prediction - expected, expected)]
    _, places = torch.unique(images.cpu(), return_inverse=True)
    count = int(places.max()) + 1 if len(places) else 0
    errors, references = (torch.zeros(count).double().index_add_(0, places, part) for part in squares)
    return HeldErrors(tuple(errors.tolist()), tuple(references.tolist()))


def _states(computing: Computing, layouts: Sequence[BlockLayout], experts: Experts, formats: Formats) -> States:
    """Return states enough for the unknowns of a refit, and for the widest input of a matrix that is rounded."""
    config = computing.checkpoint.config
    unknowns = max(sum(layout.config.expert_widths) + layout.config.shared_width for layout in layouts)
    needed = [(unknowns + config.hidden_size, TOKENS_PER_UNKNOWN)] if experts.repair is not None else []
    widest = max((computing.checkpoint.weights[name].info.shape[1] for name in formats.formats), default=1)
    unknowns, each = max([*needed, (widest, TOKENS_PER_INPUT)], key=lambda pair: pair[0] * pair[1])
    asked = [fit.tokens for fit in (experts.repair, formats.rounding) if fit is not None]
    return fitting_states(computing, unknowns, each, max(asked, default=0))


def _old_rows(rows: Tensor, layout: BlockLayout) -> Tensor:
    """Return selected router rows by the numbers that they had before some went."""
    return torch.tensor(layout.rows, device=rows.device)[rows]


@dataclass(frozen=True)
class _Made:
    """A new mixture as it will compute, the tensors that store it, and its refit's held-out error."""

    mixture: SparseMoE
    tensors: dict[str, Tensor]
    error: float | None


@dataclass(frozen=True)
class _Mixture:
    """A block's mixture that is changed and rounded: how it is laid out, the formats of weights, and what rounds."""

    computing: Computing
    index: int
    layout: BlockLayout
    formats: Mapping[str, str]
    rounding: BlockRounding

    def made(self, experts: Experts, orders: Mapping[str, Tensor], original: SparseMoE, tokens: Tokens) -> _Made:
        """Return the new mixture, made for the `tokens` that arrive."""
        computing, repair = self.computing, experts.repair
        arriving, device = (original, tokens), torch.device(computing.device)
        source = Source(weights_of(original), self.index, self.layout, experts, computing.profile, arriving, orders)
        config = computing.checkpoint.config
        changed = mixture_of(new_weights(source), config, self.layout.config, device, computing.dtype)
        members: dict[str, Tensor] = {}
        readings = mixture_readings(changed, tokens, self._new_formats, in_block(self.index, ""))
        members |= self._finished(changed, next(readings), MATRICES[:2])
        error = None if repair is None else repaired(original, changed, tokens, repair)
        members |= self._finished(changed, next(readings), MATRICES[2:])
        return _Made(changed, members | self._plain(changed, self._others), error)

    def _finished(self, changed: SparseMoE, readings: Sequence[Reading], matrices: Sequence[str]) -> dict[str, Tensor]:
        """Round some matrices of all experts in place; return the tensors that store them."""
        members = dict(self.rounding.rounded(readings, self._infos))
        plain = [name for name in self._infos if _matrix(name) in matrices and name not in self._new_formats]
        return members | self._plain(changed, plain)

    def _plain(self, changed: SparseMoE, names: Sequence[str]) -> dict[str, Tensor]:
        """Round tensors in place to the dtypes that they are written in; return them as they are written."""
        prefix, checkpoint = in_block(self.index, "moe."), self.computing.checkpoint
        stored = {}
        for name in names:
            within = name.removeprefix(prefix)
            tensor = changed.get_parameter(within) if _is_parameter(changed, within) else changed.get_buffer(within)
            stored[name] = as_stored(checkpoint, name, tensor, torch_dtype(self._infos[name].dtype))
            if name != in_block(self.index, EXPERT_OF):
                tensor.data.copy_(stored[name])
        return stored

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        """The tensors of the new mixture as they are stored without a format, by name."""
        return {info.name: info for info in mixture_infos(self.computing.checkpoint, self.index, self.layout)}

    @cached_property
    def _new_formats(self) -> dict[str, str]:
        """The formats of the mixture's weights, by their new names."""
        renamed = new_names(self.index, self.layout)
        found = {renamed[name]: fmt for name, fmt in self.formats.items() if name in renamed}
        shared = in_block(self.index, SHARED)
        return found | {name: fmt for name, fmt in self.formats.items() if name.startswith(f"{shared}.")}

    @cached_property
    def _others(self) -> list[str]:
        """All tensors but experts' matrices."""
        return [name for name in self._infos if _matrix(name) not in MATRICES]


def _matrix(name: str) -> str:
    """Return which matrix of an expert a name is of; another text for other tensors."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _is_parameter(module: SparseMoE, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._parameters
