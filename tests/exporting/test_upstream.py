"""What upstream's code can hold: models that it builds are taken as they are, others are refused by what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import upstream
from conftest import Pico, load_oracle, make_pico, oracle_folders
from distilling import FOUR, save_distilled
from upstream_code import UpstreamDiT, find_model

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.exported import Wanted
from ditmoe_cli.exporting.targets import TARGETS, laid_out
from ditmoe_cli.exporting.upstream import arguments, obstacle
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.config import BlockConfig, expected_weights


def write_for_upstream(path: Path, checkpoint: Checkpoint) -> None:
    laid_out(TARGETS["upstream"], checkpoint, Wanted(path), lambda _: None).write()


HELD: dict[str, dict[str, Any]] = {
    "timm": {},
    "flash": {"attention": "flash", "heads": 2, "hidden": 32},
    "one expert": {"experts": 1, "top_k": 1},
    "sixteen experts": {"experts": 16},
    "narrowed": {"widths": ((32,) * 4,) * 2},
    "pixels, no sigma": {"in_channels": 3, "learn_sigma": False, "patch": 4},
    "no null class": {"null_class": False},
    "512 pixels": {"input_size": 64, "hidden": 16},
}


@pytest.mark.parametrize("case", HELD)
@pytest.mark.parametrize("sampler", ["rf", "ddpm"])
def test_upstreams_code_loads_what_it_has_modules_for(tmp_path: Path, case: str, sampler: str) -> None:
    model = make_pico(sampler=sampler, **HELD[case])
    assert obstacle(model.config) is None
    checkpoint = open_checkpoint(model.save(tmp_path / "x.safetensors"))
    write_for_upstream(tmp_path / "x.pt", checkpoint)
    state = find_model(tmp_path / "x.pt")
    built = UpstreamDiT(**arguments(model.config))
    built.load_state_dict(state)
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == expected_weights(model.config)
    assert all(torch.equal(state[name], value) for name, value in model.state.items())
    assert open_checkpoint(tmp_path / "x.pt").config == model.config


def test_a_flash_model_of_one_expert_is_a_bare_state_dict_as_upcycling_reads(tmp_path: Path) -> None:
    model = make_pico(attention="flash", experts=1, top_k=1)
    write_for_upstream(tmp_path / "x.pt", open_checkpoint(model.save(tmp_path / "x.safetensors")))
    assert torch.load(tmp_path / "x.pt", weights_only=True).keys() == model.state.keys()


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """Beside what upstream reads stands our metadata: history, steps of a distilled copy, hashes of all tensors."""
    save_distilled(make_pico(sampler="rf"), tmp_path / "x.safetensors", "a" * 64, FOUR)
    source = open_checkpoint(tmp_path / "x.safetensors")
    write_for_upstream(tmp_path / "x.pt", source)
    back = open_checkpoint(tmp_path / "x.pt")
    assert back.provenance() == source.provenance() and back.distilled == FOUR
    assert back.header.provenance is not None and back.header.provenance.export == {"to": "upstream"}
    assert back.written_fingerprint == back.fingerprint == source.fingerprint
    damaged = bytearray((tmp_path / "x.pt").read_bytes())
    damaged[damaged.index(b'"schema"')] = 0
    (tmp_path / "x.pt").write_bytes(damaged)
    with pytest.raises(BadInputError, match="cannot be read"):
        open_checkpoint(tmp_path / "x.pt")


def changed(**changes: Any) -> Callable[[Pico], Any]:
    """The configuration of a model whose second block has other values."""

    def change(model: Pico) -> Any:
        first, second = model.config.blocks
        return replace(model.config, blocks=(first, replace(second, **changes)))

    return change


OBSTACLES = {
    "rows that select no expert": changed(mapped=True),
    "constants": changed(mapped=True, constants=1),
    "rescaled routing weights": changed(mass=True),
    "a residual": changed(residual_linear=True),
    "3 to 4 experts": changed(expert_widths=(64,) * 3, router_rows=3),
    "64 and 32 neurons": changed(expert_widths=(64, 64, 32, 64)),
    "no multiple of the width 32": lambda m: replace(m.config, blocks=(BlockConfig(2, (48, 48), 64),) * 2),
    "a shared expert has 32 neurons, not 64": changed(shared_width=32),
    "heads are 4 wide": lambda _: make_pico(attention="flash", heads=8).config,
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_it_has_no_module_for_is_named(what: str) -> None:
    assert what in (obstacle(OBSTACLES[what](make_pico())) or "")


def test_a_model_that_it_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = make_pico(expert_of=((0, 1, -1, 2), (0, 1, 2, 3)), widths=((64,) * 3, (64,) * 4))
    checkpoint = open_checkpoint(model.save(tmp_path / "x.safetensors"))
    with pytest.raises(BadInputError, match="cannot load it: block 0 has a router with rows that select no expert"):
        write_for_upstream(tmp_path / "x.pt", checkpoint)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("size", [(12, 384, 6, 8, "timm"), (28, 1152, 16, 8, "flash"), (40, 1408, 16, 16, "flash")])
def test_published_models_are_held(size: tuple[int, int, int, int, str]) -> None:
    config = upstream(*size)
    assert obstacle(config) is None
    assert arguments(config)["mlp_ratio"] == 4


FOLDERS = oracle_folders()


@pytest.mark.parametrize("name", FOLDERS)
def test_arguments_are_those_that_upstream_built_its_models_with(tmp_path: Path, name: str) -> None:
    oracle = load_oracle(FOLDERS[name])
    checkpoint = open_checkpoint(oracle.checkpoint, num_heads=oracle.heads)
    found = arguments(checkpoint.config)
    built = {key: value for key, value in oracle.about["config"].items() if key != "pretraining_tp"}  # of arithmetic
    assert {key: found[key] for key in built} == built
    write_for_upstream(tmp_path / "x.pt", checkpoint)
    UpstreamDiT(**found).load_state_dict(find_model(tmp_path / "x.pt"))
    assert open_checkpoint(tmp_path / "x.pt").fingerprint == checkpoint.fingerprint
