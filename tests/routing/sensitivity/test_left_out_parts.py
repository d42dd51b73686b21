"""Maps against closed forms, and against whole models whose part is taken out by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pico, make_pico
from torch import Tensor
from torch.testing import assert_close

from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import evaluation_times
from ditmoe_cli.diffusion.scheduled_guidance import Scheduled, scheduled_predictor
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.worker import Runtime
from ditmoe_cli.model.block_choices import FULL, parse_choice, table_of
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.dit import Block, DiTMoE
from ditmoe_cli.routing.sensitivity.left_out_parts import block_output, measured_map, turn_of
from ditmoe_cli.routing.sensitivity.sensitivity_map import PARTS, SensitivityMap

ALL = tuple(PARTS)
RF = SampleSpec(images=4, steps=3, cfg=1.0, seed=5, solver="euler", classes=(0, 2))
GUIDED = replace(RF, cfg=1.5)


def map_of(pico: Pico, folder: Path, spec: SampleSpec = RF, bins: int | None = None, batch: int = 4) -> SensitivityMap:
    checkpoint = open_checkpoint(pico.save(folder / "a.safetensors", force=True))
    return measured_map(checkpoint, spec, bins or spec.steps, ALL, Runtime(batch=batch))


def without_part(pico: Pico, block: int, part: str) -> DiTMoE:
    """The model whose weights are such that a block lacks a part."""
    state = dict(pico.state)
    width = pico.config.hidden_size
    silent = {
        "skip": ("adaLN",),
        "skip-attention": ("attn.proj",),
        "skip-mixture": ("moe.experts", "shared_experts"),
        "skip-shared": ("shared_experts",),
    }[part]
    for name, tensor in state.items():
        if not name.startswith(f"blocks.{block}.") or not any(word in name for word in silent):
            continue
        if "adaLN" in name:
            gates = torch.ones(6, width)
            gates[[2, 5]] = 0
            state[name] = tensor * gates.reshape(-1, *([1] * (tensor.dim() - 1)))
        elif "down_proj" in name or "attn.proj" in name:
            state[name] = torch.zeros_like(tensor)
    return Pico(pico.config, state).model()


def states_of(model: DiTMoE, spec: SampleSpec) -> list[tuple[Tensor, float]]:
    states: list[tuple[Tensor, float]] = []
    watchers = Watchers(on_step=lambda x, t: states.append((x.clone(), t)))
    sample_batch(model, spec, range(spec.images), watchers, "calibration")
    return states


def relative(changed: Tensor, whole: Tensor, channels: int) -> float:
    changed, whole = changed[:, :channels].double(), whole[:, :channels].double()
    return float((changed - whole).square().sum() / whole.square().sum())


@pytest.mark.parametrize(("sampler", "spec"), [("rf", GUIDED), ("ddpm", replace(GUIDED, solver="ddim")), ("rf", RF)])
def test_a_map_is_the_error_of_models_without_the_part(tmp_path: Path, sampler: str, spec: SampleSpec) -> None:
    pico = make_pico(sampler=sampler)
    found, model = map_of(pico, tmp_path, spec, batch=3), pico.model()
    labels = torch.tensor(spec.labels(range(spec.images)))
    states = states_of(model, spec)
    assert found.times == pytest.approx([t for _, t in states])
    with torch.inference_mode():
        whole = guided_predictor(model, labels, spec.guidance)
        for part in ("skip", "skip-attention", "skip-mixture", "skip-shared"):
            for block in range(2):
                changed = guided_predictor(without_part(pico, block, part), labels, spec.guidance)
                for step, (x, t) in enumerate(states):
                    expected = relative(changed(x, t), whole(x, t), 4)
                    assert found.errors[part][step][block] == pytest.approx(expected, rel=1e-3)


def test_a_map_is_the_error_of_schedules_that_change_one_cell(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf", experts=3)
    found, model = map_of(pico, tmp_path, GUIDED), pico.model()
    labels, times = torch.tensor(GUIDED.labels(range(4))), evaluation_times("euler", 3)
    states = states_of(model, GUIDED)
    with torch.inference_mode():
        whole = guided_predictor(model, labels, GUIDED.guidance)
        expected = [whole(x, t) for x, t in states]
        for part in ALL:
            for step in range(3):
                for block in range(2):
                    cells = [[[FULL] * 2 for _ in range(2)] for _ in range(3)]
                    for branch in range(2):
                        cells[step][branch][block] = parse_choice(part)
                    table = table_of(cells, ("compute",) * 3)
                    run = scheduled_predictor(model, labels, GUIDED.guidance, times, Scheduled(table))
                    outputs = [run(x, t) for x, t in states]
                    assert found.errors[part][step][block] == pytest.approx(
                        relative(outputs[step], expected[step], 4), rel=1e-3
                    )


def test_a_block_whose_gates_are_zero_is_not_needed(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    silent = without_part(pico, 1, "skip")
    closed = Pico(pico.config, {name: value for name, value in silent.state_dict().items() if name in pico.state})
    found = map_of(closed, tmp_path, GUIDED)
    for part in ALL:
        assert found.by_block(part)[1] == 0.0
        assert found.by_block(part)[0] > 0.0


def test_a_mixture_that_gives_nothing_is_not_needed(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    silent = without_part(pico, 0, "skip-mixture")
    closed = Pico(pico.config, {name: value for name, value in silent.state_dict().items() if name in pico.state})
    found = map_of(closed, tmp_path)
    assert [found.by_block(part)[0] for part in ("skip-mixture", "top1", "skip-shared")] == [0.0] * 3
    assert found.errors["skip"][0][0] == found.errors["skip-attention"][0][0] > 0


def test_one_slot_has_no_slot_2(tmp_path: Path) -> None:
    found = map_of(make_pico(sampler="rf", top_k=1), tmp_path)
    assert found.errors["top1"] == ((0.0, 0.0),) * 3
    assert min(found.by_block("skip-mixture")) > 0


def test_predictions_of_zero_have_no_error(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    state = {name: value * ("final_layer" not in name) for name, value in pico.state.items()}
    found = map_of(Pico(pico.config, state), tmp_path)
    assert all(found.by_block(part) == [0.0, 0.0] for part in ALL)
    assert found.reference == (0.0,) * 3


@pytest.mark.parametrize("top_k", [1, 2])
def test_parts_of_a_block_add_up(pico: Callable[..., Pico], top_k: int) -> None:
    """out = x + gate ⊙ a + γ ⊙ (routed + shared), and each choice lacks its term."""
    block = pico(top_k=top_k).model().blocks[0]
    assert isinstance(block, Block)
    generator = torch.Generator().manual_seed(2)
    x, modulation = torch.randn(2, 16, 32, generator=generator), torch.randn(2, 192, generator=generator)
    attended = block.attend_modulated(x, modulation)
    gate, gamma = (each[:, None] for each in block.gates(modulation))

    def out(text: str) -> Tensor:
        return block_output(block, parse_choice(text), x, modulation, attended)

    full = block.mix(attended, 0, None)
    assert torch.equal(out("full"), full)
    assert torch.equal(out("skip"), x)
    assert_close(out("skip-mixture"), x + gate * block.attn(block.attention_inputs(x, modulation)))
    assert_close(full - out("skip-shared"), gamma * block.moe.shared_experts(attended.inputs), rtol=1e-4, atol=1e-5)
    assert_close(full - out("skip-mixture"), gamma * block.moe(attended.inputs, 0, gamma[:, 0], None))
    alone = block.attended_by(x, modulation, None)
    assert_close(out("skip-attention"), x + gamma * block.moe(alone.inputs, 0, gamma[:, 0], None))
    assert torch.equal(out("top1"), full) == (top_k == 1)


def test_each_image_is_measured_once_in_each_bin(tmp_path: Path) -> None:
    counts = Counter(turn_of(image, 5) for image in range(50))
    assert set(counts) == set(range(5)) and max(counts.values()) - min(counts.values()) <= 2
    pico = make_pico(sampler="rf")
    whole, model = map_of(pico, tmp_path, bins=1), pico.model()
    labels = RF.labels(range(4))
    error = size = 0.0
    with torch.inference_mode():
        for step, (x, t) in enumerate(states_of(model, RF)):
            for image in [i for i in range(4) if turn_of(i, 3) == step]:
                y = torch.tensor(labels[image : image + 1])
                models = (model, without_part(pico, 1, "skip"))
                v, changed = (guided_predictor(m, y, RF.guidance)(x[image : image + 1], t)[:, :4] for m in models)
                error, size = error + float((v - changed).square().sum()), size + float(v.square().sum())
    assert whole.errors["skip"][0][1] == pytest.approx(error / size, rel=1e-3)
    assert whole.reference[0] == pytest.approx(size / (4 * 4 * 64), rel=1e-4)


def test_batches_change_nothing(tmp_path: Path) -> None:
    one, four = (map_of(make_pico(sampler="rf"), tmp_path, GUIDED, batch=batch) for batch in (1, 4))
    for part in ALL:
        assert one.by_block(part) == pytest.approx(four.by_block(part), rel=1e-5)


def test_what_cannot_be_followed_or_is_not_finite_is_refused(tmp_path: Path) -> None:
    pico = make_pico(sampler="rf")
    with pytest.raises(UsageError, match="evaluates the model twice"):
        map_of(pico, tmp_path, replace(RF, solver="heun"))
    state = dict(pico.state)
    state["blocks.1.attn.proj.bias"] = torch.full_like(state["blocks.1.attn.proj.bias"], 1e38)
    with pytest.raises(BadInputError, match="NaN or infinite"):
        map_of(Pico(pico.config, state), tmp_path)
