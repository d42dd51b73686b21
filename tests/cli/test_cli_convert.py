"""``ditmoe convert``: what it keeps of a checkpoint, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import here
from conftest import make_pico

from ditmoe_cli import open_checkpoint


def test_a_model_without_a_null_class_stays_one(tmp_path: Path) -> None:
    model = make_pico(null_class=False, num_classes=5)
    model.save_pt(tmp_path / "x.pt", "train", num_heads=2, class_dropout_prob=0.0)
    assert here("convert", "x.pt", "-o", "y.safetensors", cwd=tmp_path).code == 0
    pruning = ("--keep", "2", "--no-refit", "--method", "random", "-o", "z")
    assert here("prune", "y.safetensors", *pruning, cwd=tmp_path).code == 0
    for name in ("x.pt", "y.safetensors", "z"):
        config = open_checkpoint(tmp_path / name).config
        assert (config.num_classes, config.null_class) == (5, False)


@pytest.mark.parametrize(
    "line", ["sample", "profile-experts", "bench", "compare x.safetensors", "fid --ref x.safetensors"]
)
def test_guidance_without_a_null_class_is_refused_with_the_reason(tmp_path: Path, line: str) -> None:
    make_pico(null_class=False, sampler="rf").save(tmp_path / "x.safetensors")
    message = here(*line.split(), "x.safetensors", "--cfg", "1.5", cwd=tmp_path, stdin="").error(2)
    assert message.startswith("--cfg 1.5: the checkpoint was trained without class dropout and has no null class")
