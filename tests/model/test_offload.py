"""A model that holds one block at a time predicts and profiles as the resident one does, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pico

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats import products
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.offload import OffloadedDiTMoE
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.collector import collect

CPU = torch.device("cpu")
CASES = {
    "one branch": ({"sampler": "rf", "in_channels": 1}, 1.0, "euler"),
    "guided": ({"sampler": "ddpm", "in_channels": 4, "attention": "flash"}, 2.0, "ddpm"),
    "uneven": ({"sampler": "rf", "in_channels": 1, "widths": ((8, 24, 16), (8,) * 5)}, 2.0, "euler"),
}


@pytest.mark.parametrize(
    ("name", "fmt", "batch"),
    [
        ("one branch", "nf4", 2),
        ("guided", None, 2),
        ("uneven", "int8", 5),
    ],
)
def test_profiles_are_equal_to_the_last_bit(
    tmp_path: Path, pico: Callable[..., Pico], name: str, fmt: str | None, batch: int
) -> None:
    options, cfg, solver = CASES[name]
    path = pico(**options).save(tmp_path / "a.safetensors")
    if fmt is not None:
        source = open_checkpoint(path)
        path = tmp_path / "b.safetensors"
        apply(source, plan_uniform(source, fmt), Output(path))
    checkpoint = open_checkpoint(path)
    spec = SampleSpec(5, 3, cfg, 1, solver, (0, 1, 2))  # type: ignore[arg-type]
    resident = collect(build_model(checkpoint, CPU), Calibration(spec, 3, 64, batch))
    offloaded = collect(OffloadedDiTMoE(checkpoint, CPU, 5, batch), Calibration(spec, 3, 64, batch))
    assert offloaded.keys() == resident.keys()
    for key, tensor in resident.items():
        if key.endswith(("_transitions", "norm_max")) or not tensor.is_floating_point() or key == "states.z":
            assert torch.equal(offloaded[key], tensor), key
        else:  # the same terms, added in another order where batches take turns
            torch.testing.assert_close(offloaded[key], tensor, rtol=1e-5, atol=1e-6)


def test_one_block_is_resident_at_a_time(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    checkpoint = open_checkpoint(pico(depth=4, sampler="rf", in_channels=1).save(tmp_path / "a.safetensors"))
    model = OffloadedDiTMoE(checkpoint, CPU, 2, 1)
    seen: list[list[bool]] = []

    def watch(_: MoEEvent) -> None:
        seen.append([not next(block.parameters()).is_meta for block in model._model.blocks])

    with torch.inference_mode():
        model.prepared([1.0], torch.zeros(2, dtype=torch.long))(torch.zeros(2, 1, 8, 8), 1.0, watch)
    assert [blocks.index(True) for blocks in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(sum(blocks) == 1 for blocks in seen)
    assert all(next(block.parameters()).is_meta for block in model._model.blocks)


@pytest.mark.parametrize(("fmt", "dtype"), [(None, torch.float32), ("nf4", torch.bfloat16)])
def test_prepacked_models_predict_as_offloaded_ones_to_the_last_bit(
    tmp_path: Path, pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch, fmt: str | None, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "LEAST_PACKED", 2**8)  # so that matrices of a small model are large
    options, *_ = CASES["uneven"]
    path = pico(**options).save(tmp_path / "a.safetensors")
    if fmt is not None:
        source, path = open_checkpoint(path), tmp_path / "b.safetensors"
        apply(source, plan_uniform(source, fmt), Output(path))
    checkpoint = open_checkpoint(path)
    resident = build_model(checkpoint, CPU, dtype).prepack()
    offloaded = OffloadedDiTMoE(checkpoint, CPU, 3, 3, dtype, dtype)
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    with torch.inference_mode():
        for t in (1.0, 0.5, 0.5):  # packed weights are kept from the second time on
            times = [t]
            found, expected = (model.prepared(times, labels)(x, t) for model in (resident, offloaded))
            assert torch.equal(found, expected)


def test_prepacked_models_hold_as_many_bytes(pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico().model()
    before = {name: (value.nbytes, value.clone()) for name, value in model.named_parameters()}
    monkeypatch.setattr(products, "LEAST_PACKED", 2**8)
    assert model.prepack() is model is model.prepack()
    laid_out = {name for name, value in model.named_parameters() if value.is_mkldnn}
    if products.prepacked(torch.zeros(32, 32)).is_mkldnn:
        assert {name.rpartition("blocks.0.")[2] for name in laid_out if "blocks.0." in name} >= {
            "attn.qkv.weight",
            "attn.proj.weight",
            "moe.experts.0.gate_proj.weight",
            "moe.shared_experts.down_proj.weight",
        }
    assert not any("adaLN" in name or "gate.weight" in name for name in laid_out)
    for name, value in model.named_parameters():
        size, expected = before[name]
        assert value.nbytes == size
        assert torch.equal(value.to_dense() if value.is_mkldnn else value, expected)
