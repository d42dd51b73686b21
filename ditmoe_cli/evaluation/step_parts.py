"""Time of a denoising step by part of the model, and what its routers chose: by hooks, with no other model.

Hooks note when a part begins and ends. On a GPU that is an event in its stream, read once the step is done, so that
nothing waits meanwhile. A part's time is its own: that of parts within it is theirs.

| part | is |
|---|---|
| attention | projections, norms of queries and keys, and what lies between |
| router | router rows, softmax and top-k |
| permutation | the rest of mixtures: slots sorted by expert and back, constants, the sum over slots |
| experts | routed experts, with gathering the tokens of each |
| shared | shared experts |
| modulation | embedding of times and labels, and the modulation of blocks and final layer by them |
| head | embedding of patches, and the final layer |
| other | norms of blocks, the residual stream, guidance |
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.model.router import Routing

PARTS = ("attention", "router", "permutation", "experts", "shared", "modulation", "head")
OTHER = "other"

Clock = Callable[[], float]


@dataclass(frozen=True)
class Stopwatch:
    """How moments of a device are noted, and read later.

    Attributes:
        mark: notes the present moment of the work that was asked for.
        read: returns the seconds of noted moments, from any zero.
        wait: returns when the device has done all that was asked for.
    """

    mark: Callable[[], Any]
    read: Callable[[Sequence[Any]], list[float]]
    wait: Callable[[], None]


def stopwatch(device: torch.device, clock: Clock = time.perf_counter) -> Stopwatch:
    """Return the stopwatch of a device: a clock on the CPU, events of its current stream on a GPU."""
    if device.type != "cuda":
        return Stopwatch(clock, list, lambda: None)

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    def read(events: Sequence[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize(device)
        return [events[0].elapsed_time(event) / 1000 for event in events]

    return Stopwatch(mark, read, lambda: torch.cuda.synchronize(device))


def parts_of(models: Sequence[DiTMoE]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of models whose calls are a part's, each once, even where models share it."""
    seen: set[nn.Module] = set()
    for part, module in itertools.chain.from_iterable(map(_parts_of, models)):
        if module not in seen:
            seen.add(module)
            yield part, module


def _parts_of(model: DiTMoE) -> Iterator[tuple[str, nn.Module]]:
    final = model.final_layer
    yield from (("head", model.x_embedder), ("head", final), ("modulation", final.adaLN_modulation))
    yield from (("modulation", model.t_embedder), ("modulation", model.y_embedder))
    for block in model.blocks:
        assert isinstance(block, Block)
        yield from (("attention", block.attn), ("modulation", block.adaLN_modulation), ("permutation", block.moe))
        moe = block.moe
        yield from (("router", moe.gate), ("experts", moe.experts), ("shared", moe.shared_experts))


class Trace:
    """The moments at which parts began, and at which the last that began ended."""

    def __init__(self, mark: Callable[[], Any]) -> None:
        """Begin with what is no part's."""
        self._mark = mark
        self.parts: list[str | None] = [OTHER]
        self.marks: list[Any] = [mark()]

    def begin(self, part: str) -> None:
        """Note that a part begins."""
        self.parts.append(part)
        self.marks.append(self._mark())

    def end(self) -> None:
        """Note that the part that began last ends."""
        self.parts.append(None)
        self.marks.append(self._mark())


def own_seconds(parts: Sequence[str | None], times: Sequence[float]) -> dict[str, float]:
    """Return the seconds of each of `PARTS` and `OTHER` without those of parts within; they add up to the whole.

    parts[i] begins at times[i]; None is the end of the part that began last.
    """
    found, within = dict.fromkeys((*PARTS, OTHER), 0.0), list[str]()
    for part, (since, until) in zip(parts, pairwise(times), strict=False):
        if part is None:
            within.pop()
        else:
            within.append(part)
        if within:
            found[within[-1]] += until - since
    return found


@contextmanager
def traced(models: Sequence[DiTMoE], trace: Trace) -> Iterator[None]:
    """Note in `trace` when the parts of models begin and end while the context lasts."""
    with ExitStack() as hooks:
        for part, module in parts_of(models):
            hooks.callback(module.register_forward_pre_hook(lambda *_, part=part: trace.begin(part)).remove)
            hooks.callback(module.register_forward_hook(lambda *_: trace.end()).remove)
        yield


def step_parts(models: Sequence[DiTMoE], step: Callable[[], object], passes: int, watch: Stopwatch) -> dict[str, float]:
    """Return the seconds of each of `PARTS` and `OTHER` in the fastest of some steps; hooks lengthen each a little.

    A step may ask several models, whose parts are added up.
    """
    found: list[dict[str, float]] = []
    for _ in range(passes):
        watch.wait()
        trace = Trace(watch.mark)
        with traced(models, trace):
            step()
        trace.end()
        found.append(own_seconds(trace.parts, watch.read(trace.marks)))
    return min(found, key=lambda seconds: sum(seconds.values()))


def routed_step(model: DiTMoE, step: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the result of a step, and the experts that each block's router chose in it, (T, k)."""
    chosen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, routing: Routing) -> None:
        chosen.append(routing.experts)

    with ExitStack() as hooks:
        for block in model.blocks:
            assert isinstance(block, Block)
            hooks.callback(block.moe.gate.register_forward_hook(keep).remove)
        result = step()
    return result, chosen


def slots_of(model: DiTMoE, chosen: Sequence[Tensor]) -> list[list[int]]:
    """Return how many slots each block's experts have, given what its router chose; constants are no experts."""
    return [
        torch.bincount(experts.reshape(-1).clamp_min(-1) + 1, minlength=len(block.expert_widths) + 1)[1:].tolist()
        for block, experts in zip(model.config.blocks, chosen, strict=True)
    ]


def share_rerouted(chosen: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the share of tokens, over all blocks, whose experts are another set than in the reference."""
    pairs = zip(chosen, reference, strict=True)
    other = [(here.sort(dim=1).values != there.sort(dim=1).values).any(dim=1) for here, there in pairs]
    return float(torch.cat(other).float().mean())
