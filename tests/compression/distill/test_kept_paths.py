"""Paths that the work folder keeps: which classes they are of, and which of them are sampled again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from healing import SMALL, pair

from ditmoe_cli.compression.distill import kept_paths
from ditmoe_cli.compression.distill.distilling import Distilling, tensors_to_distill
from ditmoe_cli.compression.distill.distilling_memory import held_paths
from ditmoe_cli.compression.distill.kept_paths import KeptPaths
from ditmoe_cli.compression.distill.teacher_paths import Paths, sampled_paths
from ditmoe_cli.compression.training.fitting_batches import FittingBatches
from ditmoe_cli.compression.training.trained_weights import TrainedTensors
from ditmoe_cli.compression.training.training_session import Session, TrainingWork
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.model.loading import load_model


def kept(folder: Path, iterations: int, classes: int = 3) -> KeptPaths:
    """Paths of a pico for so many iterations of 8 states, by 2 steps of 4."""
    if not (folder / "a.safetensors").exists():
        pair(folder, num_classes=classes)
        (folder / "work").mkdir()
    original, student = (open_checkpoint(folder / f"{name}.safetensors") for name in "as")
    asked = Distilling(original.fingerprint, None, iterations, batch=8, steps=2, teacher_steps=4)
    work = TrainingWork(student, original, "cpu", torch.float32, WorkFolder(folder / "work", "key", print), print)
    session = Session(work, asked, TrainedTensors(student, tensors_to_distill(student, asked)), lambda _: 0.0)
    return KeptPaths(work, asked, session)


def direct(folder: Path, paths: KeptPaths, count: int) -> Paths:
    """The same paths, all at once."""
    spec = paths.asked.teacher_spec(paths.config, count)
    return sampled_paths(load_model(folder / "a.safetensors"), spec, 2, FittingBatches(256))


def test_paths_are_those_of_the_sampler_in_any_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kept(tmp_path, 16).paths()
    assert len(whole) == 32 + 4 and whole.z.shape == (36, 3, 1, 4, 4)
    expected = direct(tmp_path, kept(tmp_path, 16), 36)
    torch.testing.assert_close(whole.z, expected.z, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole.labels, expected.labels)
    for piece in (tmp_path / "work").iterdir():
        piece.unlink()
    monkeypatch.setattr(kept_paths, "SAMPLED", 10)
    parts = kept(tmp_path, 16).paths()
    torch.testing.assert_close(parts.z, whole.z, rtol=1e-5, atol=1e-5)
    assert torch.equal(parts.labels, whole.labels)


def test_what_is_kept_is_not_sampled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_paths, "SAMPLED", 10)
    whole = kept(tmp_path, 16).paths()
    gone = kept(tmp_path, 16)
    gone.work.folder.drop("paths-20")
    sampled = list[range]()

    def counted(*given: object, **_: object) -> Paths:
        rows = given[-1]
        assert isinstance(rows, range)
        sampled.append(rows)
        return sampled_paths(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(kept_paths, "sampled_paths", counted)
    assert torch.equal(gone.paths().z, whole.z) and sampled == [range(20, 30)]
    monkeypatch.setattr(KeptPaths, "_models", None)
    assert torch.equal(kept(tmp_path, 16).paths().z, whole.z), "the original is not even loaded"


def test_classes_are_spread_where_not_all_are_among_those_that_judge(tmp_path: Path) -> None:
    labels = kept(tmp_path, 8, classes=50).paths().labels
    assert len(labels) == 18 and len(labels.unique()) == 18 and held_paths(18) == 2
    for part in (labels[:2], labels):
        spread = part.sort().values
        assert int(torch.diff(spread, append=spread[:1] + 50).max()) <= 3 * 50 / len(part)


def test_few_classes_are_taken_in_their_order(tmp_path: Path) -> None:
    assert kept(tmp_path, 16).paths().labels.tolist() == [0, 1, 2] * 12 and SMALL["sampler"] == "rf"
