"""What the tests of mixed precision share: small models with profiles, requests, and the sizes of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from compressing import calibrated, network, opened, profile_of, quantising
from conftest import Pico, make_pico
from rounding import states_for
from torch import Tensor

from ditmoe_cli.compression.output import planned_output
from ditmoe_cli.compression.precision.budget import Budget, FileSizes
from ditmoe_cli.compression.precision.candidates import Candidates, candidate_formats
from ditmoe_cli.compression.precision.mix import Mix
from ditmoe_cli.compression.precision.mix_request import MixRequest
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.routing.profile import RoutingProfile

WHERE = Output(Path("/nowhere/out.safetensors"))
TOKENS = 512
EXPERTS = 3
SMALL: dict[str, Any] = {"hidden": 32, "input_size": 4, "experts": EXPERTS}
Given = tuple[Checkpoint, RoutingProfile]


class Method(Protocol):
    """A method, or its module."""

    @property
    def choose(self) -> Any: ...


def chosen(method: Method, asked: Given, request: MixRequest) -> Mix:
    mix: Mix = method.choose(request, calibrated(*asked))
    return mix


def uneven_pico() -> Pico:
    """Blocks of different numbers of experts, of different widths, one too narrow for any format."""
    return make_pico(hidden=32, input_size=4, widths=((64, 32, 64, 96, 4), (64,) * 3))


def profiled(pico: Pico, folder: Path, **settings: Any) -> Given:
    checkpoint = opened(pico, folder)
    return checkpoint, profile_of(checkpoint, **settings)


def request_for(asked: Given, limit: int = 10**9, **fields: Any) -> MixRequest:
    checkpoint, _ = asked
    candidates = Candidates(**fields)
    formats = candidate_formats(checkpoint, candidates)
    return MixRequest(checkpoint, candidates, formats, limit, FileSizes(checkpoint, WHERE))


def within(asked: Given, bits: float, **fields: Any) -> MixRequest:
    limit = Budget(bits=bits).limit(FileSizes(asked[0], WHERE), Candidates(**fields))
    return request_for(asked, limit, **fields)


def size_of(checkpoint: Checkpoint, formats: Mapping[str, str]) -> int:
    plan = quantising(checkpoint, formats)
    return planned_output(checkpoint, plan).predicted_bytes(WHERE)


def experts_of(formats: Mapping[str, str], width: str) -> set[str]:
    """The matrices of routed experts at a width."""
    return {name for name, fmt in formats.items() if ".experts." in name and fmt.startswith(f"int{width}-")}


def events_of(asked: Given) -> tuple[list[MoEEvent], list[Tensor]]:
    """What the mixtures see of the calibration states in a whole model, and what they return."""
    model = network(asked[0])
    states, _ = states_for(*asked, TOKENS)
    null = torch.full_like(states.labels, model.config.num_classes)
    events: list[MoEEvent] = []
    with torch.no_grad():
        labels = torch.cat([states.labels, null])
        model(torch.cat([states.z] * 2), torch.cat([states.t] * 2), labels, events.append)
        mixed = []
        for event, block in zip(events, model.blocks, strict=True):
            routed = (event.routing.weights.unsqueeze(-1) * event.outputs).sum(dim=1)
            mixed.append(routed + block.moe.shared_experts(event.inputs))
    return events, mixed
