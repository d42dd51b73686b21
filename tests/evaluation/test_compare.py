"""Comparison of two checkpoints: exact zeros, errors planted in one place, and all numbers computed a second way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import with_slow
from conftest import Pico, make_pico
from safetensors import safe_open

from ditmoe_cli.diffusion.guidance import combine
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.compare import (
    CheckpointPair,
    Divergence,
    Outputs,
    Sums,
    added,
    compare_checkpoints,
    cumulative,
    finite_json,
    image_errors,
    latent_error,
    mean_square,
    overlap,
    quick_score,
    relative,
    shared_rows,
)
from ditmoe_cli.evaluation.features.extractors import averaged
from ditmoe_cli.evaluation.scores.frechet import frechet_of_features
from ditmoe_cli.evaluation.scores.intervals import bootstrap_frechet
from ditmoe_cli.evaluation.worker import Runtime
from ditmoe_cli.files.provenance import Card, Provenance
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.moe import MoEEvent

DOWN = "blocks.{}.moe.experts.{}.down_proj.weight"
GREY_LEVELS = 16


def saved(pico: Pico, path: Path) -> Checkpoint:
    pico.save(path, provenance=Provenance(pico.config.to_json(), card=Card("pixels", GREY_LEVELS)), force=True)
    return open_checkpoint(path)


def spec_for(pico: Pico, cfg: float = 1.0, images: int = 5, steps: int = 3) -> SampleSpec:
    solver = "euler" if pico.config.sampler == "rf" else "ddim"
    return SampleSpec(images, steps, cfg, 7, solver, (0, 2))  # type: ignore[arg-type]


def compared(
    a: Pico, b: Pico, folder: Path, spec: SampleSpec | None = None, bins: int = 2, batch: int = 3, **outputs: Any
) -> Divergence:
    one, other = saved(a, folder / "a.safetensors"), saved(b, folder / "b.safetensors")
    pair = CheckpointPair(one, other, spec or spec_for(a), bins)
    return compare_checkpoints(pair, Runtime(batch=batch), Outputs(**outputs))


def pixels(**options: Any) -> Pico:
    return make_pico(**{"sampler": "rf", "in_channels": 1, "depth": 3, **options})


def changed(pico: Pico, name: str, scale: float = 0.1) -> Pico:
    generator = torch.Generator().manual_seed(1)
    value = pico.state[name]
    noise = torch.randn(value.shape, generator=generator) * value.std() * scale
    return replace(pico, state={**pico.state, name: value + noise})


# an unchanged model


@pytest.mark.parametrize(("sampler", "cfg"), [("rf", 1.0), ("ddpm", 2.5)])
def test_an_unchanged_model_scores_exactly_nothing(sampler: str, cfg: float, tmp_path: Path) -> None:
    pico = pixels(sampler=sampler)
    results = compared(pico, pico, tmp_path, spec_for(pico, cfg))
    for name, values in results.arrays().items():
        if "overlap" in name or name == "images.ssim":
            assert (values == 1).all(), name
        elif name.endswith((".t", ".n")):
            continue
        elif name == "images.psnr":
            assert np.isnan(values)
        else:
            assert (values == 0).all(), name
    result = results.to_json()
    assert result["prediction"]["kind"] == ("velocity" if sampler == "rf" else "noise")
    assert result["routing"]["note"] is None
    assert result["images"] == {"mse": 0.0, "psnr": None, "max_abs": 0.0, "n": 5, "ssim": 1.0}


def test_ghosting_nobody_and_ghosting_the_unused_change_nothing(tmp_path: Path) -> None:
    """A map that is the identity has the same rows, so all experts are known and shared."""
    mapped = pixels(expert_of=((0, 1, 2, 3),) * 3)
    plain = replace(pixels(), state={n: t for n, t in mapped.state.items() if "expert_of" not in n})
    results = compared(plain, mapped, tmp_path)
    assert results.arrays()["prediction.relative_error"] == 0
    assert results.to_json()["routing"]["overlap"] == 1


# errors planted in one place


def test_an_error_is_born_in_the_block_that_changed(tmp_path: Path) -> None:
    a = pixels()
    b = a
    for expert in range(4):
        b = changed(b, DOWN.format(1, expert))
    results = compared(a, b, tmp_path).arrays()
    born, total = results["depth.added"], results["depth.cumulative"]
    assert born[0] == born[2] == total[0] == 0, "block 2 is given the same inputs as A's"
    assert 0 < born[1] < 0.2
    assert total[1] > 0 and total[2] > 0
    assert (results["depth.bins.added"][:, 1] > 0).all()
    assert results["routing.blocks.overlap"][:2].tolist() == [1, 1], "up to there nothing has changed"
    assert results["prediction.relative_error"] > 0
    assert results["latents.relative_error"] > 0


def test_a_block_that_is_switched_off_adds_the_whole_of_itself(tmp_path: Path) -> None:
    """With all gates 0, B's block is the identity: ‖x - f_A(x)‖ / ‖f_A(x) - x‖ = 1."""
    a = pixels()
    names = [f"blocks.1.adaLN_modulation.1.{kind}" for kind in ("weight", "bias")]
    b = replace(a, state={**a.state, **{name: torch.zeros_like(a.state[name]) for name in names}})
    assert compared(a, b, tmp_path).arrays()["depth.added"].tolist() == [0, 1, 0]


def test_a_final_layer_twice_as_large(tmp_path: Path) -> None:
    """v_B = 2 v_A: a relative error of 1, an MSE of A's power; no block adds an error."""
    a = pixels(learn_sigma=False)
    names = [f"final_layer.linear.{kind}" for kind in ("weight", "bias")]
    b = replace(a, state={**a.state, **{name: 2 * a.state[name] for name in names}})
    results = compared(a, b, tmp_path)
    arrays = results.arrays()
    np.testing.assert_allclose(arrays["prediction.steps.relative_error"], 1, rtol=1e-6)
    np.testing.assert_allclose(arrays["prediction.bins.relative_error"], 1, rtol=1e-6)
    power = results.sums.prediction[:, 1] / results.sums.prediction[:, 2]
    np.testing.assert_allclose(arrays["prediction.steps.mse"], power, rtol=1e-6)
    assert not arrays["depth.added"].any() and not arrays["depth.cumulative"].any()
    assert (arrays["routing.bins.overlap"] == 1).all()


@pytest.mark.parametrize(("solver", "blind"), [("ddim", True), ("ddpm", False)])
def test_the_learned_variance_is_no_part_of_the_prediction(solver: str, blind: bool, tmp_path: Path) -> None:
    """It changes the images of the solver that uses it, and no prediction along A's trajectory."""
    a = make_pico(in_channels=1, learn_sigma=True)
    weight = a.state["final_layer.linear.weight"].clone()
    weight[1::2] *= 3  # rows are (patch, patch, channel), channels being noise and variance
    b = a.with_state(final_layer__linear__weight=weight)
    results = compared(a, b, tmp_path, replace(spec_for(a), solver=solver))  # type: ignore[arg-type]
    assert results.arrays()["prediction.relative_error"] == 0
    assert (results.arrays()["latents.mse"] == 0) == blind


def test_under_guidance_the_fourth_channel_of_noise_is_the_conditional_one(tmp_path: Path) -> None:
    a = make_pico(learn_sigma=False)
    table = a.state["y_embedder.embedding_table.weight"].clone()
    table[-1] += 1  # the null class
    b = a.with_state(y_embedder__embedding_table__weight=table)
    unguided = compared(a, b, tmp_path, spec_for(a, 1.0)).arrays()
    assert unguided["prediction.relative_error"] == 0, "never asked for"
    results = compared(a, b, tmp_path, spec_for(a, 3.0))
    assert results.arrays()["prediction.relative_error"] > 0
    assert results.images is None and results.to_json()["images"] is None


# all numbers computed a second way


def guided(model: DiTMoE, z: torch.Tensor, t: float, labels: torch.Tensor, cfg: float, told: Told) -> torch.Tensor:
    null = torch.full_like(labels, model.config.num_classes)
    branches = [labels] if cfg == 1.0 else [labels, null]
    x, times = torch.cat([z] * len(branches)), torch.full((len(branches) * len(z),), t)
    parts = model(x, times, torch.cat(branches), told.event).chunk(len(branches))
    return (parts[0] if cfg == 1.0 else combine(*parts, cfg, model.config.sampler))[:, :4].double()


@pytest.mark.parametrize(
    ("sampler", "cfg"), with_slow([("rf", 3.0), ("ddpm", 1.0), ("rf", 1.0), ("ddpm", 2.0)], quick=2)
)
def test_all_numbers_computed_plainly(sampler: str, cfg: float, tmp_path: Path) -> None:
    a = make_pico(sampler=sampler, seed=3)
    b = a
    for name in (
        "t_embedder.mlp.2.bias",
        DOWN.format(0, 1),
        "blocks.0.attn.proj.weight",
        "blocks.1.moe.gate.weight",
        DOWN.format(1, 0),
    ):
        b = changed(b, name, 0.3)
    spec = spec_for(a, cfg)
    results = compared(a, b, tmp_path, spec, bins=3, batch=2).arrays()
    one, other, everyone = a.model(), b.model(), range(spec.images)
    states: list[tuple[torch.Tensor, float]] = []
    final = sample_batch(one, spec, everyone, Watchers(on_step=lambda z, t: states.append((z.clone(), t))))
    labels = torch.tensor(spec.labels(everyone))
    for step, (z, t) in enumerate(states):
        told_a, told_b = Told(one), Told(other)
        with torch.no_grad():
            v_a, v_b = (guided(model, z, t, labels, cfg, told) for model, told in ((one, told_a), (other, told_b)))
            alone = [other.blocks[i](*told_a.inputs[i], i, None) for i in range(2)]
        told_a.close(), told_b.close()
        error = float((v_b - v_a).square().sum() / v_a.square().sum())
        assert results["prediction.steps.relative_error"][step] == pytest.approx(error, rel=1e-4)
        assert results["prediction.steps.mse"][step] == pytest.approx(float((v_b - v_a).square().mean()), rel=1e-4)
        assert results["prediction.steps.t"][step] == pytest.approx(t)
        for i in range(2):
            x, y_a, y_b = told_a.inputs[i][0], told_a.outputs[i], told_b.outputs[i]
            assert results["depth.bins.added"][step, i] == pytest.approx(
                float((alone[i] - y_a).norm() / (y_a - x).norm()), rel=1e-3
            )
            assert results["depth.bins.cumulative"][step, i] == pytest.approx(
                float((y_b - y_a).norm() / y_a.norm()), rel=1e-3
            )
            pairs = zip(told_a.rows[i].tolist(), told_b.rows[i].tolist(), strict=True)
            share = np.mean([len(set(p) & set(q)) / 2 for p, q in pairs])
            assert results["routing.bins.overlap"][step, i] == pytest.approx(share, abs=0.02)
    theirs = sample_batch(other, spec, everyone)
    assert results["latents.mse"] == pytest.approx(float((theirs - final).square().mean()), rel=1e-3)
    ratio = float((theirs - final).square().sum() / final.square().sum())
    assert results["latents.relative_error"] == pytest.approx(ratio, rel=1e-3)
    assert results["latents.low"] <= results["latents.relative_error"] <= results["latents.high"]
    assert results["quick.frechet"] > 0


class Told:
    """Hooks that record each block's inputs, outputs and rows of one prediction."""

    def __init__(self, model: Any) -> None:
        self.inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.outputs: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []
        self.hooks = [block.register_forward_hook(self.block) for block in model.blocks]

    def block(self, _: object, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.inputs.append(args[:2])
        self.outputs.append(output)

    def event(self, event: MoEEvent) -> None:
        self.rows.append(event.routing.rows)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def test_batches_and_bins_sum_to_the_same(tmp_path: Path) -> None:
    a = pixels()
    b = changed(a, DOWN.format(0, 0))
    spec = spec_for(a, steps=4)
    whole, split = (compared(a, b, tmp_path, spec, bins=4, batch=batch) for batch in (64, 1))
    for name, values in whole.arrays().items():
        np.testing.assert_allclose(split.arrays()[name], values, rtol=1e-3, atol=1e-7, err_msg=name)
    arrays = whole.arrays()
    assert (arrays["prediction.bins.mse"] == arrays["prediction.steps.mse"]).all()
    assert arrays["prediction.mse"] == pytest.approx(arrays["prediction.steps.mse"].mean())


# routing


def retrained_router(pico: Pico) -> Pico:
    """Return a model whose first router shares no row with any other."""
    name = "blocks.0.moe.gate.weight"
    return Pico(pico.config, {**pico.state, name: pico.state[name] * 1.5})


def test_ghosts_keep_their_rows_and_deleted_rows_are_unknown(tmp_path: Path) -> None:
    a = pixels(sampler="rf", depth=2)
    ghost = pixels(sampler="rf", depth=2, expert_of=((0, -1, 1, -1), (0, 1, 2, 3)), widths=((64,) * 2, (64,) * 4))
    results = compared(a, ghost, tmp_path).to_json()["routing"]
    assert results["note"] is None
    assert 0 < results["blocks"]["overlap"][0] < 1
    sliced = retrained_router(pixels(sampler="rf", depth=2, widths=((64,) * 2, (64,) * 4)))
    results = compared(a, sliced, tmp_path).to_json()["routing"]
    assert results["note"].endswith("the others changed: blocks 0")
    assert results["blocks"]["overlap"][0] is None
    assert results["overlap"] == results["blocks"]["overlap"][1], "over the blocks that are known"
    assert [row[0] for row in results["bins"]["overlap"]] == [None, None]


def test_the_overlap_of_ghosted_experts_in_the_first_block(tmp_path: Path) -> None:
    """Block 0's router is given the same inputs: what both select is A's selection less the ghosts."""
    a = pixels(depth=1)
    state = {**a.state, "blocks.0.moe.gate.expert_of": torch.tensor([0, 1, 2, -1], dtype=torch.int32)}
    state = {name: value for name, value in state.items() if ".experts.3." not in name}
    config = pixels(depth=1, expert_of=((0, 1, 2, -1),), widths=((64,) * 3,)).config
    counts: list[float] = []
    spec = spec_for(a)
    sample_batch(
        a.model(),
        spec,
        range(5),
        Watchers(lambda event: counts.append((event.routing.rows != 3).sum(1).double().mean().item() / 2)),
    )
    results = compared(a, Pico(config, state), tmp_path, spec).to_json()["routing"]
    assert results["overlap"] == pytest.approx(np.mean(counts), abs=0.01)


def test_deleted_rows_are_found_by_the_weights_of_those_that_remain(tmp_path: Path) -> None:
    """Rows 3 and 1 of 4 are left, in that order: block 0 selects both for every token."""
    a = pixels(depth=1)
    kept = [3, 1]
    state = {name: value for name, value in a.state.items() if ".experts." not in name or ".shared_experts." in name}
    state["blocks.0.moe.gate.weight"] = a.state["blocks.0.moe.gate.weight"][kept]
    for name, value in a.state.items():
        for new, old in enumerate(kept):
            if f".experts.{old}." in name:
                state[name.replace(f".experts.{old}.", f".experts.{new}.")] = value
    counts: list[float] = []

    def count(event: MoEEvent) -> None:
        counts.append((event.routing.rows % 2 == 1).sum(1).double().mean().item() / 2)

    spec = spec_for(a)
    sample_batch(a.model(), spec, range(5), Watchers(count))
    b = Pico(pixels(depth=1, widths=((64,) * 2,)).config, state)
    results = compared(a, b, tmp_path, spec).to_json()["routing"]
    assert results["note"] is None
    assert results["overlap"] == pytest.approx(np.mean(counts), abs=0.01)


def test_shared_rows_count_regardless_of_order() -> None:
    a, b = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 0], [6, 7]])
    assert shared_rows(a, b).tolist() == [3, 6]
    assert shared_rows(a, b[:, :1]).tolist() == [2, 6], "of the larger k"


# pure pieces


def test_bins_hold_the_steps_that_profiles_put_there() -> None:
    steps, bins = 7, 3
    sums = Sums(np.arange(7.0), np.ones((7, 3)), np.ones((7, 2, 6)))
    binned = sums.binned(bins)
    counted = np.bincount([step * bins // steps for step in range(steps)])
    assert binned.prediction[:, 0].tolist() == counted.tolist()
    assert binned.blocks[:, 1, 5].tolist() == counted.tolist()
    assert (sums.binned(7).prediction == sums.prediction).all()
    assert (sums + sums).prediction.sum() == 42


def test_ratios_of_nothing() -> None:
    sums = np.asarray([[0.0, 0.0, 2.0], [1.0, 0.0, 2.0], [1.0, 4.0, 2.0]])
    assert relative(sums).tolist() == [0, np.inf, 0.25]
    assert mean_square(sums).tolist() == [0, 0.5, 0.5]
    blocks = np.asarray([1.0, 4.0, 9.0, 1.0, 0.0, 0.0])
    assert (added(blocks), cumulative(blocks)) == (0.5, 3.0)
    assert np.isnan(overlap(blocks))
    assert finite_json([[1.0, np.nan], [np.inf]]) == [[1.0, None], [None]]


def test_the_latent_error_is_the_ratio_of_sums_within_its_interval() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=(60, 1, 4, 4))
    b = a + generator.normal(size=a.shape) * generator.uniform(0.1, 0.5, size=(60, 1, 1, 1))
    results = latent_error(a, b)
    assert results is not None
    assert results.estimate == pytest.approx(((b - a) ** 2).sum() / (a**2).sum())
    assert results.low < results.estimate < results.high
    assert results.deviation == pytest.approx((results.high - results.low) / 3.92, rel=0.2)
    doubled = latent_error(2 * a, 2 * b)
    assert doubled is not None
    assert (doubled.low, doubled.high) == pytest.approx((results.low, results.high)), "it has no unit"


def test_the_latent_error_of_equal_pairs_is_nothing_and_one_pair_has_none() -> None:
    a = np.ones((3, 1, 2, 2))
    results = latent_error(a, a)
    assert results is not None
    assert (results.estimate, results.low, results.high) == (0, 0, 0)
    assert latent_error(a[:1], a[:1]) is None


def test_the_quick_score_is_the_distance_that_fid_gives() -> None:
    """An unchanged set scores 0; noise that both share does not widen the interval, as noise of their own does."""
    generator = np.random.default_rng(0)
    a = generator.normal(size=(80, 6))
    moved = quick_score(a, a + 0.3)
    assert moved is not None
    assert moved.estimate == pytest.approx(frechet_of_features(a, a + 0.3)) == pytest.approx(6 * 0.09)
    apart = bootstrap_frechet(a, generator.normal(size=(80, 6)) + 0.3)
    assert moved.high - moved.low < 0.2 * (apart.high - apart.low)
    same = quick_score(a, a)
    assert same is not None and same.estimate == 0
    assert quick_score(a[:1], a[:1]) is None


def test_latents_are_averaged_as_pixels_are() -> None:
    values = np.random.default_rng(0).normal(size=(3, 16, 16, 2))
    expected = values.reshape(3, 8, 2, 8, 2, 2).mean(axis=(2, 4)).reshape(3, -1)
    np.testing.assert_allclose(averaged(values), expected)


def test_image_errors_are_on_the_scale_of_grey_levels() -> None:
    a, b = np.zeros((2, 8, 8, 1), np.uint8), np.full((2, 8, 8, 1), 255, np.uint8)
    results = image_errors(a, b, GREY_LEVELS)
    assert results.paired.mse == 256
    assert results.ssim == pytest.approx(1e-4 / (1 + 1e-4), rel=1e-6)


# what is written


def test_numbers_and_grid_are_written(tmp_path: Path) -> None:
    a = pixels(depth=2)
    b = retrained_router(pixels(depth=2, widths=((64,) * 3, (64,) * 4)))
    outputs = {"numbers": tmp_path / "c.safetensors", "grid": tmp_path / "g.png"}
    results = compared(a, b, tmp_path, **outputs)
    first = {name: path.read_bytes() for name, path in outputs.items()}
    with safe_open(outputs["numbers"], "np") as file:
        document = json.loads(file.metadata()["ditmoe"])
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert document["schema"] == "ditmoe.comparison/1"
    assert document["conditions"] == results.conditions
    assert document["conditions"]["sampling"]["seed"] == 7
    assert document["note"].endswith("blocks 0")
    assert stored.keys() == results.arrays().keys()
    for name, values in results.arrays().items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    assert stored["depth.bins.added"].shape == (2, 2)
    assert np.isnan(stored["routing.blocks.overlap"][0]) and stored["routing.blocks.overlap"][1] > 0
    compared(a, b, tmp_path, **outputs, force=True)
    assert {name: path.read_bytes() for name, path in outputs.items()} == first


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, "depth 2 instead of 3"),
        ({"hidden": 48}, "hidden_size 48 instead of 32"),
        ({"patch": 4}, "patch_size 4 instead of 2"),
        ({"input_size": 4}, "input_size 4 instead of 8"),
        ({"in_channels": 3}, "in_channels 3 instead of 1"),
        ({"num_classes": 5}, "num_classes 5 instead of 3"),
        ({"sampler": "ddpm"}, "sampler ddpm instead of rf"),
        ({"depth": 1, "num_classes": 4}, "depth 1 instead of 3, num_classes 4 instead of 3"),
    ],
)
def test_other_architectures(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=message) as refusal:
        compared(pixels(), pixels(**options), tmp_path)
    assert "a.safetensors" in str(refusal.value) and "b.safetensors" in str(refusal.value)


def test_bins_and_grids_that_cannot_be(tmp_path: Path) -> None:
    for bins in (0, 4):
        with pytest.raises(UsageError, match=f"bins {bins}"):
            compared(pixels(), pixels(), tmp_path, bins=bins)
    latent = make_pico(sampler="rf")
    with pytest.raises(BadInputError, match="latents of 4 channels"):
        compared(latent, latent, tmp_path, grid=tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_block_that_overflows_is_named(side: str, tmp_path: Path) -> None:
    good = pixels()
    huge = {name: good.state[name] * 1e30 for name in good.state if name.startswith("blocks.1.moe.shared")}
    bad = replace(good, state={**good.state, **huge})
    sides = (bad, good) if side == "a" else (good, bad)
    with pytest.raises(
        BadInputError, match=rf"{side}\.safetensors: block 1 makes NaN or infinite values at step 1 of 3"
    ):
        compared(*sides, tmp_path)


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_final_layer_that_overflows_is_named(side: str, tmp_path: Path) -> None:
    good = pixels(learn_sigma=False)
    bad = good.with_state(final_layer__linear__weight=good.state["final_layer.linear.weight"] * 1e38 * 10)
    bad = bad.with_state(final_layer__linear__weight=bad.state["final_layer.linear.weight"].clamp(-3e38, 3e38))
    sides = (bad, good) if side == "a" else (good, bad)
    with pytest.raises(BadInputError, match=rf"{side}\.safetensors: the final layer makes NaN or infinite"):
        compared(*sides, tmp_path)
