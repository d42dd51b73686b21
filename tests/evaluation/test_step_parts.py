"""Time by part of a step: own times by hand, clocks that tests wind, and slots as observers count them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_pico
from packed import packed_pico
from torch import Tensor, nn

from ditmoe_cli.evaluation.step_parts import (
    OTHER,
    PARTS,
    own_seconds,
    routed_step,
    share_rerouted,
    slots_of,
    step_parts,
    stopwatch,
)
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.rerouting import with_one_rank

CPU = torch.device("cpu")


def step_of(model: DiTMoE, images: int = 3) -> Callable[[], Tensor]:
    config = model.config
    x = torch.randn(images, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.full((images,), 0.5), torch.arange(images) % config.num_classes

    def step() -> Tensor:
        with torch.inference_mode():
            return model(x, t, y)  # type: ignore[no-any-return]

    return step


def test_own_times_by_hand() -> None:
    """The router within the mixture, from 2 to 5, is no time of the mixture, from 1 to 9; the rest is nobody's."""
    parts = [OTHER, "permutation", "router", None, "experts", None, None, "head", None, None]
    times = [0.0, 1.0, 2.0, 5.0, 6.0, 8.5, 9.0, 9.5, 10.0, 12.0]
    found = own_seconds(parts, times)
    assert found == dict.fromkeys(PARTS, 0.0) | {
        "permutation": 1.0 + 1.0 + 0.5,
        "router": 3.0,
        "experts": 2.5,
        "head": 0.5,
        OTHER: 1.0 + 0.5 + 2.0,
    }
    assert sum(found.values()) == times[-1] - times[0]


@pytest.mark.parametrize(("attention", "fmt"), [("timm", None), ("flash", "nf4"), ("timm", "int4-g32")])
def test_each_module_counts_for_its_part(
    attention: str, fmt: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on only within what a part is known by, by another number of seconds for each part."""
    pico = make_pico(attention=attention)
    path = (packed_pico(pico, fmt) if fmt else pico).save(tmp_path / "a.safetensors")
    model, depth = build_model(open_checkpoint(path), CPU), pico.config.depth
    now = [0.0]

    def winding(module: nn.Module, seconds: float) -> None:
        forward = module.forward

        def wound(*arguments: object) -> object:
            now[0] += seconds
            return forward(*arguments)

        monkeypatch.setattr(module, "forward", wound)

    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        seconds = {
            "attn": 1.0,
            "gate": 10.0,
            "moe": 100.0,
            "experts": 1000.0,
            "shared_experts": 1e4,
            "adaLN_modulation": 1e5,
        }
        seconds |= {"x_embedder": 1e6, "final_layer": 1e6, "t_embedder": 2e5, "y_embedder": 3e5}
        if leaf in seconds:
            winding(module, seconds[leaf])
    step = step_of(model)
    found = step_parts([model], step, 2, stopwatch(CPU, lambda: now[0]))
    assert found == {
        "attention": depth * 1.0,
        "router": depth * 10.0,
        "permutation": depth * 100.0,
        "experts": depth * 1000.0,
        "shared": depth * 1e4,
        "modulation": (depth + 1) * 1e5 + 5e5,
        "head": 2e6,
        OTHER: 0.0,
    }


def test_parts_that_two_models_share_count_in_each_call_once() -> None:
    """A view with other routers shares attention and experts: a step that asks both has two calls of each."""
    model = make_model()
    view = with_one_rank(model, 0)
    assert isinstance(view, DiTMoE)
    now = [0.0]
    for name, module in (*model.named_modules(), *view.named_modules()):
        if name.rpartition(".")[2] == "attn" and not module._forward_hooks:
            module.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
    steps = [step_of(model), step_of(view)]
    found = step_parts([model, view], lambda: [step() for step in steps], 1, stopwatch(CPU, lambda: now[0]))
    assert found["attention"] == 2 * model.config.depth == sum(found.values())


def test_the_fastest_pass_counts_and_hooks_are_gone() -> None:
    model = make_model()
    plain, now, passes = step_of(model), [0.0], iter((5.0, 2.0, 3.0))

    def step() -> None:
        plain()
        now[0] += next(passes)

    found = step_parts([model], step, 3, stopwatch(CPU, lambda: now[0]))
    assert found == dict.fromkeys(PARTS, 0.0) | {OTHER: 2.0}
    with pytest.raises(StopIteration):
        step_parts([model], step, 1, stopwatch(CPU, lambda: now[0]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def make_model() -> DiTMoE:
    pico = make_pico(widths=((64, 40, 8), (16, 64)), expert_of=((0, 1, -1, 2), (0, 1, 1, -2)), extras={"constants": 1})
    model = DiTMoE(pico.config).eval().requires_grad_(False)
    model.load_state_dict(pico.state, strict=False)
    return model


def test_watching_changes_no_result() -> None:
    model = make_model()
    step = step_of(model)
    exact = step()
    assert torch.equal(routed_step(model, step)[0], exact)
    outputs: list[Tensor] = []
    step_parts([model], lambda: outputs.append(step()), 1, stopwatch(CPU))
    assert torch.equal(outputs[0], exact)


def test_slots_are_those_that_observers_count() -> None:
    """Slots of ghosts do not exist, those of constants are no expert's."""
    model = make_model()
    events: list[MoEEvent] = []
    x, t, y = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), torch.tensor([0, 1])
    with torch.inference_mode():
        model(x, t, y, events.append)
        _, chosen = routed_step(model, lambda: model(x, t, y))
    counted = [
        [int((event.routing.experts == e).sum()) for e in range(len(block.expert_widths))]
        for event, block in zip(events, model.config.blocks, strict=True)
    ]
    assert slots_of(model, chosen) == counted
    constants = sum(int((event.routing.experts < 0).sum()) for event in events)
    assert sum(map(sum, counted)) == 2 * 2 * 16 * 2 - constants, "two blocks, two images of 16 tokens, two slots"
    assert share_rerouted(chosen, chosen) == 0
