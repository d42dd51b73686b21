"""Exports of quantised weights: bytes as predicted, whole or not at all, up to date, and refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import contents, here, series
from conftest import Pico, make_pico
from foreign_models import mixed_pico

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.provenance import Card, Distilled, Provenance, Step
from ditmoe_cli.model.checkpoint import open_checkpoint

FORMATS = {
    "compressed-tensors": ("int4-g64", None, "int8", "int3-g32-sym"),
    "sdnq": ("int4-g64", "ternary-g64", "int3-g32-sym"),
    "bitsandbytes": ("nf4", "int8", "fp4-dq", None),
}
HISTORY = (Step("quantize", "a" * 64, "b" * 64),)
DISTILLED = Distilled("euler", 4, cfg=2.0)


def provenance(pico: Pico) -> Provenance:
    return Provenance(pico.config.to_json(), HISTORY, Card(extractor="pixels", grey_levels=16), DISTILLED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for target, formats in FORMATS.items():
        pico = mixed_pico(formats)
        pico.save(folder / f"{target}.safetensors", provenance=provenance(pico))
    make_pico().save(folder / "plain.safetensors")
    mixed_pico(("nf4",), widths=((40,) * 3,) * 2).save(folder / "narrow.safetensors")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.mark.parametrize("target", FORMATS)
def test_the_export_is_what_the_dry_run_said_and_keeps_where_it_comes_from(folder: Path, target: str) -> None:
    words = ("export", f"{target}.safetensors", "--to", target, "-o", "out", "--max-shard-size", "150KB")
    predicted = here(*words, "--dry-run", cwd=folder)
    assert not (folder / "out").exists()
    written = here(*words, cwd=folder)
    size = sum(file.stat().st_size for file in (folder / "out").rglob("*") if file.is_file())
    assert written.result["bytes"] == predicted.result["bytes"] == size
    files = sorted((folder / "out").rglob("*.safetensors"))
    assert len(files) > 1
    document = json.loads(read_safetensors_header(files[0]).metadata["ditmoe"])
    source = open_checkpoint(folder / f"{target}.safetensors")
    old, new = document["history"]
    assert old == HISTORY[0].to_json() and new["command"] == "export"
    assert (new["source"], new["options"]) == (source.fingerprint, {"to": target})
    assert document["card"] == {"extractor": "pixels", "grey_levels": 16} and document["distilled"]["steps"] == 4


def test_dry_runs_import_no_torch(folder: Path) -> None:
    commands = [("export", f"{target}.safetensors", "--to", target, "--dry-run") for target in FORMATS]
    for outcome, heavy in series(commands, folder):
        assert outcome.code == 0, outcome.err
        assert not heavy


def test_equal_work_gives_equal_bytes_and_is_not_done_twice(folder: Path) -> None:
    words = ("export", "sdnq.safetensors", "--to", "sdnq", "-o")
    (folder / "again").mkdir()
    assert here(*words, "one", cwd=folder).code == here(*words, "again/one", cwd=folder).code == 0
    assert contents(folder / "one") == contents(folder / "again" / "one"), "but for its name, which the card tells"
    before = contents(folder)
    assert here(*words, "one", cwd=folder).result["up_to_date"] is True
    assert contents(folder) == before
    pico = mixed_pico(FORMATS["sdnq"], seed=1)
    pico.save(folder / "other.safetensors", provenance=provenance(pico))
    other = ("export", "other.safetensors", "--to", "sdnq", "-o", "one")
    assert "is no copy of this input" in here(*other, cwd=folder).error(5)
    assert here(*other, "--force", cwd=folder).code == 0
    config = folder / "again" / "one" / "transformer" / "config.json"
    config.write_text(config.read_text().replace("uint4", "uint5"))
    assert "config.json is another" in here(*words, "again/one", cwd=folder).error(5)


def test_plain_weights_take_another_dtype_and_quantised_ones_stay(folder: Path) -> None:
    words = ("export", "sdnq.safetensors", "--to", "sdnq", "--dtype", "bf16")
    written = here(*words, cwd=folder)
    assert written.code == 0, written.err
    (file,) = (folder / "sdnq.sdnq-bf16").rglob("*.safetensors")
    dtypes = {name: stored.info.dtype for name, stored in read_safetensors_header(file).tensors.items()}
    assert dtypes["blocks.0.attn.qkv.weight"] == "BF16" and dtypes["blocks.0.moe.experts.0.gate_proj.scale"] == "F32"
    document = json.loads(read_safetensors_header(file).metadata["ditmoe"])
    assert document["history"][-1]["source"] == open_checkpoint(folder / "sdnq.safetensors").fingerprint
    assert here(*words, cwd=folder).result["up_to_date"] is True


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("bitsandbytes", "compressed-tensors", "'blocks.0.moe.experts.0.down_proj.weight' is fp4-dq"),
        ("bitsandbytes", "sdnq", "is fp4-dq"),
        ("sdnq", "compressed-tensors", "is ternary-g64"),
        ("sdnq", "bitsandbytes", "is int3-g32-sym"),
        ("plain", "sdnq", "no weight is quantised"),
        ("narrow", "bitsandbytes", "whole blocks of 64"),
    ],
)
def test_what_a_layout_does_not_hold_is_refused_by_name(folder: Path, source: str, target: str, said: str) -> None:
    before = contents(folder)
    error = here("export", f"{source}.safetensors", "--to", target, "-o", "out", cwd=folder).error(3)
    assert said in error and f"compress --target {target}" in error
    assert contents(folder) == before


def test_nothing_is_left_to_say_of_weights_made_plain(folder: Path) -> None:
    words = ("export", "sdnq.safetensors", "--to", "sdnq", "--dequantize", "-o", "out")
    assert "no weight is quantised" in here(*words, cwd=folder).error(3)


def test_broken_weights_leave_no_output(folder: Path) -> None:
    pico = mixed_pico(FORMATS["sdnq"])
    scale = pico.state["blocks.1.moe.experts.0.gate_proj.weight_scale"]
    scale[0, 0] = torch.nan
    pico.save(folder / "broken.safetensors")
    error = here("export", "broken.safetensors", "--to", "sdnq", "-o", "out", cwd=folder).error(3)
    assert "NaN" in error and not (folder / "out").exists()


@pytest.mark.parametrize("target", ["compressed-tensors", "sdnq"])
def test_exports_that_ditmoe_does_not_read_are_called_so(folder: Path, target: str) -> None:
    assert here("export", f"{target}.safetensors", "--to", target, "-o", "out", cwd=folder).code == 0
    with pytest.raises(BadInputError, match=f"in the layout of {target}, which ditmoe writes and does not read"):
        open_checkpoint(folder / "out")


def test_an_export_for_bitsandbytes_is_the_checkpoint(folder: Path) -> None:
    assert here("export", "bitsandbytes.safetensors", "--to", "bitsandbytes", cwd=folder).code == 0
    found = open_checkpoint(folder / "bitsandbytes.bitsandbytes.safetensors")
    assert found.fingerprint == open_checkpoint(folder / "bitsandbytes.safetensors").fingerprint
