"""Parameter counts and groups of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from conftest import Pico
from support.configs import infos_of, upstream

from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import CheckpointHeader, PickleReader
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.config import Given, infer_config
from ditmoe_cli.model.parameters import count_parameters, is_compressible, weight_group

UPSTREAM_MODELS = {
    "S/2-8E2A": (upstream(12, 384, 6, 8, "timm"), 199_307_552, 71_905_568, 169_869_312),
    "S/2-16E2A": (upstream(12, 384, 6, 16, "timm"), 369_213_728, 71_942_432, 339_738_624),
    "B/2-8E2A": (upstream(12, 768, 12, 8, "timm"), 795_861_536, 286_253_600, 679_477_248),
    "L/2-8E2A": (upstream(24, 1024, 16, 8, "timm"), 2_823_764_000, 1_011_824_672, 2_415_919_104),
    "XL/2-8E2A": (upstream(28, 1152, 16, 8, "flash"), 4_168_172_192, 1_492_730_528, 3_567_255_552),
    "G/2-16E2A": (upstream(40, 1408, 16, 16, "flash"), 16_503_731_232, 3_181_573_152, 15_225_323_520),
}


@pytest.mark.parametrize("name", UPSTREAM_MODELS)
def test_parameter_counts_of_upstream_models(name: str) -> None:
    """Counted on upstream's own classes: S, B and L in the timm layout, XL and G in the flash layout."""
    config, total, activated, routed = UPSTREAM_MODELS[name]
    weights = infos_of(config)
    inferred = infer_config(weights, lambda name: memoryview(bytes(weights[name].nbytes)), {}, Given(sampler="rf"), "x")
    assert inferred.config == config, "heads of upstream widths are known, top-k is 2 by default"
    header = CheckpointHeader(None, "headers only", weights, 0)  # type: ignore[arg-type]
    checkpoint = Checkpoint(
        header, PickleReader({}), {n: Weight(i, None, (n,)) for n, i in weights.items()}, config, (), ()
    )
    counts = count_parameters(checkpoint)
    assert (counts.total, counts.activated, counts.routed) == (total, activated, routed)


def test_activated_parameters_take_the_widest_experts(pico: Callable[..., Pico]) -> None:
    model = pico(widths=((8, 16, 24), (40, 8, 8)))
    weights = {info.name: Weight(info, None, (info.name,)) for info in model.infos()}
    header = CheckpointHeader(None, "", {}, 0)  # type: ignore[arg-type]
    counts = count_parameters(Checkpoint(header, PickleReader({}), weights, model.config, (), ()))
    assert counts.total == sum(t.numel() for t in model.state.values())
    assert counts.routed == 3 * 32 * (8 + 16 + 24 + 40 + 8 + 8)
    assert counts.activated == counts.total - counts.routed + 3 * 32 * (16 + 24 + 40 + 8)


def test_what_quantisation_may_touch(pico: Callable[..., Pico]) -> None:
    model = pico(attention="flash")
    groups = {info.name: weight_group(info) for info in model.infos()}
    found = {name for name in groups if groups[name]}
    assert Counter(groups[name] for name in found) == {
        "experts": 2 * 4 * 3,
        "shared": 2 * 3,
        "attn": 2 * 2,
        "modulation": 2 + 1,
        "embedders": 2 + 1,
    }
    assert groups["t_embedder.mlp.0.weight"] == groups["final_layer.linear.weight"] == "embedders"
    assert groups["final_layer.adaLN_modulation.1.weight"] == "modulation"
    assert not any(name.endswith("bias") or "norm" in name for name in found)
    left = {"blocks.0.moe.gate.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed"}
    assert left <= groups.keys() - found
    assert all(is_compressible(info) == (info.name in found) for info in model.infos())
    assert not is_compressible(TensorInfo("blocks.0.attn.q_norm.weight", "F32", (4,)))
