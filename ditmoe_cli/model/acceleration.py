"""Two ways to run a resident model with less work between its kernels: compiled blocks, and CUDA graphs.

Both give the images of the plain model: compiled ones within rounding, graphs to the last bit, since they replay the
same kernels. Compiling takes some ten seconds, once for each shape of a batch, and pays for long runs; a graph takes
three evaluations, once for each shape, and pays where a GPU waits for the host, as with few images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ditmoe_cli.errors import UsageError, first_line
from ditmoe_cli.formats.layers import PackedLinear
from ditmoe_cli.model.conditions import Modulate, conditions
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import Block, Denoiser, DiTMoE, ModulationOf, Prediction
from ditmoe_cli.model.experts import SwiGLU
from ditmoe_cli.model.mixture_backends import backend_for
from ditmoe_cli.model.moe import Observer

_WARM_UPS = 2  # evaluations before a capture: libraries set themselves up in the first

Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a function's work; returns what repeats it, and the tensor that its result then lies in."""


@dataclass(frozen=True)
class Acceleration:
    """Whether blocks are compiled by `torch.compile`, and whether evaluations are replayed as CUDA graphs.

    None of `graphs` replays where a model can be captured.
    """

    compiled: bool = False
    graphs: bool | None = None


def accelerated(model: DiTMoE, how: Acceleration) -> Denoiser:
    """Return a model that runs as asked for; its weights can be neither read nor changed then (`DiTMoE.prepack`).

    Raises `UsageError` where it cannot be captured as a graph.
    """
    replays = how.graphs is not False
    if replays and (obstacle := obstacle_to_capture(model)) is not None:
        if how.graphs:
            raise UsageError(f"⟨cuda_graphs⟩: {obstacle}")
        replays = False
    if how.compiled:
        compile_blocks(model)
    else:
        model.prepack()
    return GraphedDiTMoE(model) if replays else model


def compile_blocks(model: DiTMoE) -> None:
    """Compile attention and shared expert of each block, whose shapes do not depend on routing, in place.

    Raises `UsageError` where torch cannot compile, as without a C++ compiler on a CPU.
    """
    check_compiles(model.device)
    for block in model.blocks:
        assert isinstance(block, Block)
        for module in (block.attn, block.moe.shared_experts):
            for layer in module.modules():
                if isinstance(layer, PackedLinear):  # what is unpacked and kept is no part of a compiled function
                    layer.unpacked.keep_plain()
                    layer.matrix = torch.compiler.disable(layer.matrix)  # type: ignore[method-assign, no-untyped-call]
            module.compile(dynamic=False)


def check_compiles(device: torch.device) -> None:
    """Raise `UsageError` where torch cannot compile for a device."""
    try:
        torch.compile(_doubled)(torch.ones(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        raise UsageError(f"⟨compile⟩: torch cannot compile here ({first_line(error)[:100]}); leave it out") from None


def _doubled(x: Tensor) -> Tensor:
    return x + x


def obstacle_to_capture(model: DiTMoE) -> str | None:
    """Return why an evaluation cannot be captured, and what to do; None where it can: where nothing waits for a GPU."""
    if model.device.type != "cuda":
        return f"the model is on the {model.device.type}; leave it out, or compute on a GPU"
    probe = torch.zeros(1, model.config.hidden_size, dtype=model.dtype, device=model.device)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        experts = cast("list[SwiGLU]", list(block.moe.experts))
        if block.moe.constants is not None or backend_for(experts, probe).waits:
            return (
                f"block {index} cannot be captured, since its experts are of several widths, packed in part, or "
                f"computed in {str(model.dtype).removeprefix('torch.')}; leave it out, or give ⟨dtype⟩ bf16"
            )
    return None


def cuda_capture(work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record the kernels of a function as a CUDA graph, after it ran on a stream of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class GraphedDiTMoE:
    """A resident model whose evaluations are captured once for each shape of a batch, and replayed.

    Images and modulations are copied to where the graph reads them. Evaluations that are observed are not replayed.
    """

    def __init__(self, model: DiTMoE, capture: Capture = cuda_capture) -> None:
        self.model, self.capture = model, capture
        self._captured: dict[torch.Size, _Captured] = {}

    @property
    def config(self) -> DiTMoEConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def forget(self) -> None:
        """Free the memory of all captured evaluations; they are captured again when they are asked for."""
        self._captured.clear()

    def prepared(self, times: Sequence[float], labels: Tensor) -> Prediction:
        """Return the model for images of `labels` (N,), asked at any of `times`, as `DiTMoE.prepared` does."""
        run = conditions(times, labels, self.model.condition, self.config)

        def predict(x: Tensor, t: float, observer: Observer | None = None) -> Tensor:
            def modulation_of(name: str, modulate: Modulate) -> Tensor:
                return run.at(name, modulate, t)

            if observer is not None:
                return self.model.modulated(x, modulation_of, observer)
            if x.shape not in self._captured:
                self._captured[x.shape] = _Captured(self.model, x, modulation_of, self.capture)
            return self._captured[x.shape](x, modulation_of)

        return predict


class _Captured:
    """A captured evaluation of one shape, and the tensors that it reads."""

    def __init__(self, model: DiTMoE, x: Tensor, modulation_of: ModulationOf, capture: Capture) -> None:
        self._x = x.clone()
        self._layers: dict[str, Modulate] = {}
        self._modulations: dict[str, Tensor] = {}

        def read(name: str, modulate: Modulate) -> Tensor:
            if name not in self._modulations:  # before the capture, which then reads what is there
                self._layers[name] = modulate
                self._modulations[name] = modulation_of(name, modulate).clone()
            return self._modulations[name]

        model.modulated(self._x, read)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # whose streams a graph is captured from
            self._replay, self._result = capture(lambda: model.modulated(self._x, read))

    def __call__(self, x: Tensor, modulation_of: ModulationOf) -> Tensor:
        """Return the prediction for other images and modulations of the same shapes."""
        self._x.copy_(x)
        for name, place in self._modulations.items():
            place.copy_(modulation_of(name, self._layers[name]))
        self._replay()
        return self._result.clone()
