"""The new mixture of a block before refitting: experts kept, merged or narrowed, router rows, constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from ditmoe_cli.compression.algebra.low_rank import LinearMap, low_rank_map
from ditmoe_cli.compression.algebra.neurons import (
    DEFAULT_ALPHA,
    best_neurons,
    energies,
    mean_gamma_square,
    narrowed,
    profiled_energies,
)
from ditmoe_cli.compression.block_layout import BlockLayout
from ditmoe_cli.compression.merge.inputs import MergeTokens
from ditmoe_cli.compression.methods import MERGES
from ditmoe_cli.compression.plan import BlockPlan, Experts
from ditmoe_cli.compression.replay.stream import Tokens
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import (
    CONSTANTS,
    CONSTANTS_DOWN,
    CONSTANTS_UP,
    EXPERT_OF,
    MATRICES,
    RESIDUAL_CONSTANT,
    RESIDUAL_LINEAR,
    ROUTER,
    SHARED,
)
from ditmoe_cli.model.config import mixture_shapes
from ditmoe_cli.model.expert_weights import ExpertWeights
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.moe import SparseMoE
from ditmoe_cli.model.router import Routing
from ditmoe_cli.progress import each
from ditmoe_cli.routing.profile import RoutingProfile


@dataclass(frozen=True)
class Source:
    """A block's original mixture, the stage that changes it, and the data that new weights are computed from.

    Attributes:
        old: the weights of the mixture, by names within the block.
        block: the number of the block.
        layout: the shapes and the router map of the result.
        stage: the stage of the plan.
        profile: the profile that the plan was made with.
        arriving: the mixture, and calibration tokens that arrive at it; None where the stage needs none.
        orders: of narrowed experts, by their names within the block: neurons, the last to go first; nothing where
            those of highest energy stay.
    """

    old: Mapping[str, Tensor]
    block: int
    layout: BlockLayout
    stage: Experts
    profile: RoutingProfile
    arriving: tuple[SparseMoE, Tokens] | None = None
    orders: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def original(self) -> SparseMoE:
        """The mixture, of a stage that needs tokens."""
        assert self.arriving is not None
        return self.arriving[0]

    @property
    def known_tokens(self) -> Tokens:
        """The calibration tokens, of a stage that needs them."""
        assert self.arriving is not None
        return self.arriving[1]

    def expert(self, number: int) -> ExpertWeights:
        """Return the weights of a routed expert."""
        return ExpertWeights(*(self.old[f"moe.experts.{number}.{matrix}.weight"] for matrix in MATRICES))

    @property
    def block_plan(self) -> BlockPlan:
        """The plan of this block."""
        return self.stage.blocks[self.block]

    def gates(self, expert: int) -> Tensor:
        """Return the routing weight of an expert where a token selected it, else 0, (T,)."""
        routing: Routing = self.original.gate(self.known_tokens.inputs)
        return routing.gate_of(expert)

    def stored(self, name: str) -> Tensor:
        """Return this block's part of a profile's table. Raises `BadInputError` where a ``fast`` profile lacks it."""
        if name not in self.profile.header.tensors:
            raise BadInputError(f"{self.profile.path}: the profile has no {name!r}; profile again without ⟨fast⟩")
        return self.profile.block_tensor(name, self.block)


def new_weights(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the new mixture before refitting, by names within the block, expert after expert.

    New residual constants and linear maps start at 0.
    """
    old, router = source.old, source.old[ROUTER]
    width, device = router.shape[1], router.device
    shapes = mixture_shapes(width, source.layout.config)
    for name in (RESIDUAL_CONSTANT, RESIDUAL_LINEAR):
        if name in shapes:
            yield name, old[name] if name in old else torch.zeros(shapes[name], device=device)
    replaces = bool(source.block_plan.constants and source.layout.dropped)
    if replaces:
        yield from _constants(source).items()
    else:
        yield from ((name, old[name]) for name in (CONSTANTS, CONSTANTS_UP, CONSTANTS_DOWN) if name in old)
    yield ROUTER, router[list(source.layout.rows)]
    yield from expert_map(source.layout, device).items()
    share = 0.1 if source.stage.repair else 0.8
    for index in each(range(len(source.layout.members)), "computing", "experts", share=share):
        yield from named(f"moe.experts.{index}", _expert(source, index)).items()
    yield from named(SHARED, _shared(source)).items()


def expert_map(layout: BlockLayout, device: torch.device | str) -> dict[str, Tensor]:
    """Return ``expert_of`` by its name within the block; nothing where rows select experts one by one."""
    selects = torch.tensor(layout.selects, dtype=torch.int32, device=device)
    return {EXPERT_OF: selects} if layout.config.mapped else {}


def weights_of(moe: SparseMoE) -> dict[str, Tensor]:
    """Return a mixture's weights by their names within the block."""
    return {f"moe.{name}": tensor for name, tensor in (*moe.named_parameters(), *moe.named_buffers())}


def expert_weights(expert: object) -> ExpertWeights:
    """Return an expert's weights."""
    assert isinstance(expert, SwiGLU)
    return ExpertWeights(expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight)


def named(stem: str, expert: ExpertWeights) -> dict[str, Tensor]:
    """Return an expert's weights by name."""
    weights = (expert.gate, expert.up, expert.down)
    return {f"{stem}.{matrix}.weight": weight for matrix, weight in zip(MATRICES, weights, strict=True)}


def _expert(source: Source, new: int) -> ExpertWeights:
    """Return a new expert: an old one, the merger of its members, or the kept neurons of an old one."""
    members = source.layout.members[new]
    if len(members) > 1:
        return _merged(source, members)
    expert = source.expert(members[0])
    if not source.block_plan.widths:
        return expert
    return _narrowed(source, expert, members[0], source.block_plan.widths[new])


@dataclass(frozen=True)
class _Members(Sequence[ExpertWeights]):
    """Some experts of a mixture, whose weights are asked for when they are."""

    source: Source
    numbers: tuple[int, ...]

    @overload
    def __getitem__(self, place: int) -> ExpertWeights: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[ExpertWeights]: ...
    def __getitem__(self, place: int | slice) -> ExpertWeights | Sequence[ExpertWeights]:
        if isinstance(place, slice):
            return _Members(self.source, self.numbers[place])
        return self.source.expert(self.numbers[place])

    def __len__(self) -> int:
        return len(self.numbers)


def _merged(source: Source, members: tuple[int, ...]) -> ExpertWeights:
    method = MERGES[source.stage.merging or ""]
    selected = source.stored("selected").sum(dim=(0, 1)).double()[list(members)]
    shares = (selected / selected.sum()).tolist() if float(selected.sum()) else [1 / len(members)] * len(members)
    tokens = None
    if method.needs_tokens:
        gates = torch.stack([source.gates(e) for e in members], dim=1)
        used = gates.sum(dim=1) > 0
        known = source.known_tokens
        tokens = MergeTokens(known.inputs, gates, known.weights, known.held).part(used)
    return method.merge(_Members(source, members), shares, tokens)


def _narrowed(source: Source, expert: ExpertWeights, old: int, width: int) -> ExpertWeights:
    """Return the neurons of a routed expert that stay: the last to go, or those of highest CAMERA energy."""
    order = source.orders.get(f"moe.experts.{old}")
    if order is not None:
        return narrowed(expert, order[:width].sort().values)
    (energy,) = profiled_energies(source.profile, source.block, [(old, expert.down)])
    return narrowed(expert, best_neurons(energy, width))


def _shared(source: Source) -> ExpertWeights:
    """Return the shared expert; where it is narrowed, the neurons that are last to go, or of highest energy."""
    expert = ExpertWeights(*(source.old[f"{SHARED}.{matrix}.weight"] for matrix in MATRICES))
    width = source.block_plan.shared_width
    if width is None:
        return expert
    if SHARED in source.orders:
        return narrowed(expert, source.orders[SHARED][:width].sort().values)
    shared = source.original.shared_experts
    squares = torch.zeros(expert.down.shape[1], device=expert.down.device)
    largest = torch.zeros_like(squares)
    for inputs in source.known_tokens.inputs.split(4096):  # type: ignore[no-untyped-call]
        phi = shared.neurons(inputs).square()
        squares += phi.sum(dim=0)
        largest = torch.maximum(largest, phi.amax(dim=0))
    gamma = mean_gamma_square(source.profile, source.block).to(squares.device)
    return narrowed(expert, best_neurons(energies(expert.down, squares, largest, gamma, DEFAULT_ALPHA), width))


def _constants(source: Source) -> dict[str, Tensor]:
    """Return the constant, or low-rank linear map, nearest to each dropped expert's output, for its rows to select."""
    rank = source.block_plan.rank
    dropped = each(source.layout.dropped, "replacing", "experts", share=0.1)
    maps = [_map(source, expert, rank) for expert in dropped]
    constants = {CONSTANTS: torch.stack([each.constant for each in maps])}
    if rank:
        constants[CONSTANTS_UP] = torch.stack([each.up for each in maps])
        constants[CONSTANTS_DOWN] = torch.stack([each.down for each in maps])
    return {name: tensor.contiguous() for name, tensor in constants.items()}


def _map(source: Source, expert: int, rank: int) -> LinearMap:
    """Return the constant, or low-rank linear map, nearest to an expert's output on the tokens that selected it."""
    gates = source.gates(expert)
    selecting = gates > 0
    inputs = source.known_tokens.inputs[selecting]
    outputs: Tensor = source.original.experts[expert](inputs)
    return low_rank_map(inputs, outputs, source.known_tokens.weights[selecting] * gates[selecting].square(), rank)
