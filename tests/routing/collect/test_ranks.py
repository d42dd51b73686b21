"""Several processes profile as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("world", [2, 3])
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


def test_torchrun_counts_as_one_process_does(pico: Callable[..., Pico], tmp_path: Path) -> None:
    pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    words = ["profile-experts", "a.safetensors", "--images", "5", "--steps", "2", "--bins", "2", "--batch", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*launcher: str, output: str) -> str:
        command = [sys.executable, "-m", *launcher, "ditmoe_cli", *words, "-o", output]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    two = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone", "-m")
    printed = run(*two, output="two.safetensors")
    assert json.loads(printed)["profile"] == str(tmp_path / "two.safetensors"), "one process prints"
    one = subprocess.run(
        [sys.executable, "-m", "ditmoe_cli", *words, "-o", "one.safetensors"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    )
    assert one.stdout
    first, second = read_profile(tmp_path / "one.safetensors"), read_profile(tmp_path / "two.safetensors")
    assert first.header.tensors.keys() == second.header.tensors.keys()
    for name, stored in first.header.tensors.items():
        if stored.info.dtype.startswith("I") or name.startswith(("states.", "reservoir.")):
            assert torch.equal(first.tensor(name), second.tensor(name)), name
        else:
            torch.testing.assert_close(first.tensor(name), second.tensor(name), rtol=1e-5, atol=1e-5)


def test_processes_of_unequal_threads_report_a_flip_rate(pico: Callable[..., Pico], tmp_path: Path) -> None:
    """Two real processes, one of them with two threads, as torchrun would start them."""
    pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    words = [
        "profile-experts",
        "a.safetensors",
        "--images",
        "4",
        "--steps",
        "2",
        "--bins",
        "2",
        "--batch",
        "2",
        "--fast",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "ditmoe_cli", *words],
            cwd=tmp_path,
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": str(rank + 1)}
            | {"PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outcomes = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outcomes
    result = json.loads(outcomes[0][0])["result"]
    assert result["flip_rate"] is not None and 0 <= result["flip_rate"] < 0.05
    assert outcomes[1][0] == "", "one process prints"
