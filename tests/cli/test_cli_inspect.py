"""``ditmoe inspect``: what it shows of files that leave something open, and how compactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import make_pico
from safetensors.torch import save_file

from ditmoe_cli.cli.commands.inspect import span, width_rows


def test_unknown_heads_are_left_open(tmp_path: Path) -> None:
    model = make_pico()
    save_file(dict(model.state), tmp_path / "x.safetensors")
    result = here("inspect", "x.safetensors", cwd=tmp_path).result
    assert result["config"]["num_heads"] is None
    assert result["config"]["depth"] == model.config.depth
    text = here("inspect", "x.safetensors", "--text", cwd=tmp_path)
    assert text.code == 0
    assert "heads unknown (give --heads)" in text.out
    assert "--heads" in here("convert", "x.safetensors", cwd=tmp_path).error(3)


def test_tensors_are_listed(tmp_path: Path) -> None:
    model = make_pico()
    model.save(tmp_path / "x.safetensors")
    stored = here("inspect", "x.safetensors", "--tensors", cwd=tmp_path).result["stored"]
    assert {entry["name"]: (entry["dtype"], tuple(entry["shape"]), entry["bytes"]) for entry in stored} == {
        info.name: (info.dtype, info.shape, info.nbytes) for info in model.infos()
    }
    lines = here("inspect", "x.safetensors", "--tensors", "--text", cwd=tmp_path).out.splitlines()
    assert any(line.split() == ["pos_embed", "F32", "1", "x", "16", "x", "32", "2,048", "bytes"] for line in lines)
    assert "stored" not in here("inspect", "x.safetensors", cwd=tmp_path).result


def test_tensors_of_another_model_are_listed_with_the_reason(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    outcome = here("inspect", "x.safetensors", "--tensors", cwd=tmp_path)
    assert "not a DiT-MoE" in outcome.result["problem"]
    assert outcome.result["stored"] == [{"name": "conv.weight", "dtype": "F32", "shape": [2, 3], "bytes": 24}]
    assert "not a DiT-MoE" in here("inspect", "x.safetensors", cwd=tmp_path).error(3)
    assert "no such file" in here("inspect", "absent", "--tensors", cwd=tmp_path).error(3)


def test_which_weights_were_read_is_shown(tmp_path: Path) -> None:
    make_pico().save_pt(tmp_path / "x.pt", "train", num_heads=2)
    outcome = here("inspect", "x.pt", cwd=tmp_path)
    assert outcome.result["notes"] == ["the averaged weights are read, under 'ema', not those under 'model'"]
    assert "ditmoe: x.pt: the averaged weights are read, under 'ema', not those under 'model'" in outcome.notes


@pytest.mark.parametrize(
    ("value", "text"), [(96, "96"), ([24, 96, 96], "24–96"), ([[8, 16], 8], "8–16"), ([5, 5], "5"), ([], "none")]
)
def test_spans(value: object, text: str) -> None:
    assert span(value) == text


def test_blocks_of_equal_widths_share_a_row() -> None:
    assert width_rows([[8, 8], [8, 8]]) == []
    assert width_rows([[8, 16, 8], [8, 16, 8], [4], list(range(1, 9))]) == [
        ("blocks 0–1", "experts 1 x 16, 2 x 8"),
        ("block 2", "experts 1 x 4"),
        ("block 3", "experts 8 x 1–8"),
    ]


def test_narrowed_checkpoints_are_shown_in_runs(tmp_path: Path) -> None:
    make_pico(widths=((8, 24, 24, 24), (96, 96, 96, 96))).save(tmp_path / "x.safetensors")
    text = here("inspect", "x.safetensors", "--text", cwd=tmp_path).out
    assert "4 per block, top-2, width 8–96, shared 64" in text
    assert "experts 3 x 24, 1 x 8" in text
    assert "[" not in text
