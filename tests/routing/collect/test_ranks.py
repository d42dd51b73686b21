"""Several processes profile as one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_helpers import here, in_two_processes
from conftest import Pico

from ditmoe_cli.diffusion.sampling import SampleSpec, batches
from ditmoe_cli.processes import Share
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.collect.collector import RoutingCollector, collect
from ditmoe_cli.routing.collect.ranks import merge
from ditmoe_cli.routing.collect.reservoir import Selection
from ditmoe_cli.routing.profile import read_profile


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_batch_belongs_to_one_process(world: int) -> None:
    dealt = [Share(rank, world).of(list(batches(10, 3))) for rank in range(world)]
    assert sorted(i for mine in dealt for indices in mine for i in indices) == list(range(10))


@pytest.mark.parametrize(("world", "cfg"), [(2, 2.0), (3, 1.0)])
def test_merged_parts_are_the_whole(
    pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch, cfg: float, world: int
) -> None:
    model = pico(sampler="rf", in_channels=1).model()
    spec = SampleSpec(7, 4, cfg, 3, "euler", (0, 1, 2))
    whole = collect(model, Calibration(spec, 2, 96, 2))
    assert whole is not None
    parts: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr("ditmoe_cli.routing.collect.collector.gather_merged", lambda _, mine: parts.append(mine))
    monkeypatch.setattr("ditmoe_cli.routing.collect.collector.rank_of_other_threads", lambda _: None)
    for rank in range(world):
        assert collect(model, Calibration(spec, 2, 96, 2), share=Share(rank, world)) is None
    found = merge(parts)
    assert set(whole) - set(found) == {"output.all_token_mean", "output.cka"}
    for name, tensor in found.items():
        if tensor.is_floating_point() and not name.startswith(("states.", "reservoir.", "norm_max")):
            torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(tensor, whole[name]) and tensor.dtype == whole[name].dtype, name


def test_a_process_without_any_batch_adds_nothing(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="rf", in_channels=1).model()
    spec = SampleSpec(2, 2, 1.0, 3, "euler", (0, 1))
    whole = collect(model, Calibration(spec, 1, 8, 2, fast=True))
    assert whole is not None
    idle = RoutingCollector(model, spec, 1, Selection({}, {})).tensors()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in merge([idle, whole]).items())


def test_unequal_threads_have_their_flips_counted(pico: Callable[..., Pico], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico(sampler="rf", in_channels=1).model()
    spec = SampleSpec(4, 2, 1.0, 3, "euler", (0, 1))

    def run(tamper: bool) -> float:
        def merged(_: Share, mine: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            whole = dict(collect(model, Calibration(spec, 2, 0, 2, fast=True)) or {})
            if tamper:  # one choice of image 2, at position 0 of block 0, went to another expert
                table = whole["image.positions"][2, 0, 0, 0]
                table[table.argmax()] -= 1
                table[table.argmin()] += 1
            return whole if mine is not None else mine

        with monkeypatch.context() as patched:
            patched.setattr(
                "ditmoe_cli.routing.collect.collector.rank_of_other_threads",
                lambda share: 1 if share.world > 1 else None,
            )
            patched.setattr(
                "ditmoe_cli.routing.collect.collector.gather_merged",
                lambda share, mine: mine if share.world == 1 else merged(share, mine),
            )
            found = collect(model, Calibration(spec, 2, 0, 2, fast=True), share=Share(0, 2))
        assert found is not None
        return float(found["flip_rate"])

    choices = 2 * 2 * model.config.num_patches * model.config.depth * model.config.top_k  # images, steps
    assert run(tamper=False) == 0.0
    assert run(tamper=True) == pytest.approx(1 / choices)


WORDS = ("profile-experts", "a.safetensors", "--steps", 2, "--bins", 2, "--batch", 2)


@pytest.mark.slow
def test_two_processes_count_as_one_does(pico: Callable[..., Pico], tmp_path: Path) -> None:
    pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    words = (*WORDS, "--images", 5)
    printing, silent = in_two_processes(*words, "-o", "two.safetensors", cwd=tmp_path)
    assert printing.envelope["profile"] == str(tmp_path / "two.safetensors")
    assert (silent.code, silent.out) == (0, ""), "one process prints"
    assert here(*words, "-o", "one.safetensors", cwd=tmp_path).code == 0
    first, second = read_profile(tmp_path / "one.safetensors"), read_profile(tmp_path / "two.safetensors")
    assert first.header.tensors.keys() == second.header.tensors.keys()
    for name, stored in first.header.tensors.items():
        if stored.info.dtype.startswith("I") or name.startswith(("states.", "reservoir.")):
            assert torch.equal(first.tensor(name), second.tensor(name)), name
        else:
            torch.testing.assert_close(first.tensor(name), second.tensor(name), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_processes_of_unequal_threads_report_a_flip_rate(pico: Callable[..., Pico], tmp_path: Path) -> None:
    """Two real processes, one of them with two threads."""
    pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    printing, silent = in_two_processes(*WORDS, "--images", 4, "--fast", cwd=tmp_path, threads=(1, 2))
    assert printing.result["flip_rate"] is not None and 0 <= printing.result["flip_rate"] < 0.05
    assert (silent.code, silent.out) == (0, ""), "one process prints"
