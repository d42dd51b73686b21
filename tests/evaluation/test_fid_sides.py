"""Sides of a comparison: their features by several processes, over restarts and where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_pico
from numpy.typing import NDArray

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.evaluation import fid_sides
from ditmoe_cli.evaluation.features.extraction import Extraction
from ditmoe_cli.evaluation.features.extractors import PixelExtractor
from ditmoe_cli.evaluation.fid_sides import read_side, sampled_side, with_features, workspace_of
from ditmoe_cli.evaluation.samples import Sampling
from ditmoe_cli.evaluation.worker import Notify, Runtime, Worker
from ditmoe_cli.evaluation.workspace import Workspace
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.processes import WHOLE, Share


def pixels(folder: Path, batch: int = 1) -> Extraction:
    return Extraction(
        PixelExtractor(255), 255, (), salt="", folder=folder / "work", cache=folder / "cache", batch=batch
    )


def worker(share: Share = WHOLE, notify: Notify = lambda _: None) -> Worker:
    return Worker(Runtime(batch=1), share, notify)


def sampling(folder: Path) -> Sampling:
    make_pico(sampler="rf", in_channels=1).save(folder / "a.safetensors")
    return Sampling(open_checkpoint(str(folder / "a.safetensors")), SampleSpec(7, 1, 1.0, 0, "euler", (0,)))


def lose(work: Workspace, name: str, rows: tuple[int, ...]) -> None:
    """Undo rows of an array, as if they had never been written."""
    array = work.array(name)
    assert isinstance(array, np.memmap)
    for row in rows:
        (work.folder / f"{name}.{row}-{row + 1}.done").unlink()
        with (work.folder / f"{name}.npy").open("r+b") as file:
            file.seek(array.offset + row * array[0].nbytes)
            file.write(bytes(array[0].nbytes))


def test_a_restart_near_the_end_of_several_processes_misses_no_feature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process still stores features of its last batch when the other looks for what is missing."""
    what, here = sampling(tmp_path), pixels(tmp_path)
    whole = sampled_side(what, here, worker())
    assert whole.activations is not None
    truth = np.array(whole.activations.features)
    work, name = workspace_of(what, here), here.array_names()["features"]
    lose(work, "samples", (3, 5))
    lose(work, name, (3, 5, 6))
    barrier, answers, sides = threading.Barrier(2, timeout=60), [], {}
    late, store = threading.Event(), fid_sides.store_activations

    def answer_all(self: Share, find: Callable[[], Any]) -> Any:
        if self.first:
            answers.append(find())
        barrier.wait()
        answer = answers[-1]
        barrier.wait()
        return answer

    def slow(work: Workspace, extraction: Extraction, first: int, images: NDArray[np.uint8], notify: Notify) -> None:
        if first == 5:
            late.wait(0.2)
        store(work, extraction, first, images, notify)

    monkeypatch.setattr(Share, "wait", lambda _: barrier.wait())
    monkeypatch.setattr(Share, "from_first", answer_all)
    monkeypatch.setattr(fid_sides, "store_activations", slow)

    def run(rank: int) -> None:
        sides[rank] = sampled_side(what, here, worker(Share(rank, 2)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for side in sides.values():
        np.testing.assert_array_equal(side.activations.features, truth)
    assert len(sides) == 2 and work.done(name).all()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no more")])
def test_features_that_do_not_fit_are_taken_in_halves(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "r.npz", arr_0=images)
    took, messages, plain = [], [], PixelExtractor.__call__

    def small(self: PixelExtractor, images: NDArray[np.uint8]) -> Any:
        if len(images) > 3:
            raise error
        took.append(len(images))
        return plain(self, images)

    monkeypatch.setattr(PixelExtractor, "__call__", small)
    side = with_features(read_side(tmp_path / "r.npz"), pixels(tmp_path, batch=10), worker(notify=messages.append))
    assert side.activations is not None
    np.testing.assert_array_equal(side.activations.features, plain(PixelExtractor(255), images))
    assert max(took) <= 3 and sum(took[1:]) == 10, "the first is the probe of two"
    assert any("out of memory with the features of 10 images" in line for line in messages)
