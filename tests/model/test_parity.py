"""Every number that upstream computed, reproduced: networks, routing, guidance, samplers."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Oracle, load_oracle, oracle_folders

from ditmoe_cli.diffusion.guidance import guided_predictor
from ditmoe_cli.diffusion.solvers import integrate
from ditmoe_cli.diffusion.weak_guidance import Guidance
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.embedders import sincos_position_embedding
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.parameters import count_parameters

TOLERANCE = 1e-5
FOLDERS = oracle_folders()
INPUTS = {"x", "t_ddpm", "t_rf", "y", "z", "y_cond"}


@functools.cache
def opened(folder: Path) -> tuple[Oracle, Checkpoint, DiTMoE]:
    oracle = load_oracle(folder)
    checkpoint = open_checkpoint(oracle.checkpoint, num_heads=oracle.heads)
    return oracle, checkpoint, build_model(checkpoint, torch.device("cpu"))


def tensor(oracle: Oracle, key: str) -> torch.Tensor:
    value = torch.from_numpy(oracle.expected[key])
    return value if value.is_floating_point() else value.long()


def forward(time: str) -> Callable[[Oracle, DiTMoE], np.ndarray]:
    def compute(oracle: Oracle, model: DiTMoE) -> np.ndarray:
        return model(tensor(oracle, "x"), tensor(oracle, time), tensor(oracle, "y")).numpy()

    return compute


def events(oracle: Oracle, model: DiTMoE) -> list[MoEEvent]:
    seen: list[MoEEvent] = []
    model(tensor(oracle, "x"), tensor(oracle, "t_ddpm"), tensor(oracle, "y"), seen.append)
    assert [event.block for event in seen] == list(range(model.config.depth))
    return seen


def chosen(oracle: Oracle, model: DiTMoE) -> np.ndarray:
    return np.stack([np.sort(event.routing.experts.numpy(), axis=-1) for event in events(oracle, model)])


def mass(oracle: Oracle, model: DiTMoE) -> np.ndarray:
    return np.stack([event.routing.weights.sum(-1).numpy() for event in events(oracle, model)])


def guided(oracle: Oracle, model: DiTMoE) -> np.ndarray:
    # upstream repeats the guided half; we compute it once
    out = guided_predictor(model, tensor(oracle, "y_cond"), Guidance("ddpm", 4.0))(tensor(oracle, "z"), 500.0)
    return out.repeat(2, 1, 1, 1).numpy()


def euler(scale: float) -> Callable[[Oracle, DiTMoE], np.ndarray]:
    def compute(oracle: Oracle, model: DiTMoE) -> np.ndarray:
        predict = guided_predictor(model, tensor(oracle, "y_cond"), Guidance("rf", scale))
        return integrate("euler", 10, predict, tensor(oracle, "z"), torch.randn_like).numpy()

    return compute


def ddim(oracle: Oracle, model: DiTMoE) -> np.ndarray:
    predict = guided_predictor(model, tensor(oracle, "y_cond"), Guidance("ddpm", 1.5))
    return integrate("ddim", 10, predict, tensor(oracle, "z"), torch.randn_like).numpy()


def ancestral(oracle: Oracle, model: DiTMoE) -> np.ndarray:
    generator = torch.Generator().manual_seed(123)

    def noise(z: torch.Tensor) -> torch.Tensor:  # upstream draws for both branches and uses the first half
        return torch.randn(2 * len(z), *z.shape[1:], generator=generator)[: len(z)]

    predict = guided_predictor(model, tensor(oracle, "y_cond"), Guidance("ddpm", 1.5))
    return integrate("ddpm", 10, predict, tensor(oracle, "z"), noise).numpy()


COMPUTED: dict[str, Callable[[Oracle, DiTMoE], np.ndarray]] = {
    "out_ddpm": forward("t_ddpm"),
    "out_rf": forward("t_rf"),
    "topk_idx": chosen,
    "topk_weight_sum": mass,
    "cfg_out_t500_s4": guided,
    "rf_euler10_cfg2": euler(2.0),
    "rf_euler10_nocfg": euler(1.0),
    "ddim10_cfg1p5": ddim,
    "ddpm10_cfg1p5_seed123": ancestral,
}
ONLY_WITH_SIGMA = {"ddim10_cfg1p5", "ddpm10_cfg1p5_seed123"}


def cases() -> list[tuple[str, str]]:
    found = []
    for name, folder in FOLDERS.items():
        with np.load(folder / "expected.npz") as expected:
            found += [(name, key) for key in COMPUTED if key in expected]
    return found


CASES = cases()


@pytest.mark.parametrize("name", FOLDERS)
def test_every_array_of_an_oracle_is_covered(name: str) -> None:
    oracle = load_oracle(FOLDERS[name])
    optional = set() if oracle.about["config"].get("learn_sigma", True) else ONLY_WITH_SIGMA
    assert set(oracle.expected) == (INPUTS | set(COMPUTED)) - optional
    assert {key for case, key in CASES if case == name} == set(oracle.expected) - INPUTS


@pytest.mark.parametrize(("name", "key"), CASES, ids=[f"{name}-{key}" for name, key in CASES])
def test_upstream_numbers_are_reproduced(name: str, key: str) -> None:
    oracle, _, model = opened(FOLDERS[name])
    expected = oracle.expected[key]
    with torch.inference_mode():
        actual = COMPUTED[key](oracle, model)
    if key == "topk_idx":
        np.testing.assert_array_equal(actual, expected.reshape(actual.shape))
        return
    expected = expected.reshape(actual.shape) if key == "topk_weight_sum" else expected
    if key == "cfg_out_t500_s4" and expected.shape[1] > model.config.in_channels:
        half = len(expected) // 2  # the learned variance of the unconditional half is its own
        actual, expected = actual[:half], expected[:half]
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= TOLERANCE * np.linalg.norm(expected)


@pytest.mark.parametrize("name", FOLDERS)
def test_configuration_is_inferred(name: str) -> None:
    oracle, checkpoint, _ = opened(FOLDERS[name])
    about, config = oracle.about["config"], checkpoint.config
    same_names = (
        "input_size",
        "patch_size",
        "in_channels",
        "num_classes",
        "hidden_size",
        "depth",
        "num_heads",
    )
    assert {key: getattr(config, key) for key in same_names} == {key: about[key] for key in same_names}
    assert config.top_k == about["num_experts_per_tok"]
    assert config.attention == ("flash" if about.get("use_flash_attn") else "timm")
    assert (config.out_channels == 2 * config.in_channels) == about.get("learn_sigma", True)
    experts = (about["hidden_size"] * about["mlp_ratio"],) * about["num_experts"]
    assert all(block.expert_widths == experts and not block.mapped for block in config.blocks)
    assert all(block.shared_width == 2 * about["hidden_size"] for block in config.blocks)
    assert count_parameters(checkpoint).total == oracle.about["parameters"]


@pytest.mark.parametrize("name", FOLDERS)
def test_position_embedding_is_upstreams(name: str) -> None:
    _, checkpoint, _ = opened(FOLDERS[name])
    config = checkpoint.config
    rebuilt = sincos_position_embedding(config.hidden_size, config.input_size // config.patch_size)
    torch.testing.assert_close(rebuilt, checkpoint.reader.tensor("pos_embed"), rtol=0, atol=2e-7)


def test_hints_that_contradict_the_shapes_are_reported(oracle: Callable[[str], Oracle]) -> None:
    found = oracle("train-script")
    checkpoint = open_checkpoint(found.checkpoint, num_heads=found.heads)
    assert any("DiT-S/2" in warning and "ignored" in warning for warning in checkpoint.warnings)


def test_averaged_weights_are_the_ones_read(oracle: Callable[[str], Oracle]) -> None:
    found = oracle("train-script")
    with torch.serialization.safe_globals([argparse.Namespace]):
        both = torch.load(found.checkpoint, weights_only=True)
    reader = open_checkpoint(found.checkpoint, num_heads=found.heads).reader
    name = "blocks.0.moe.gate.weight"
    assert torch.equal(reader.tensor(name), both["ema"][name])
    assert not torch.equal(reader.tensor(name), both["model"][name])
