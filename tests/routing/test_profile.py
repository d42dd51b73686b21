"""Profile files: what is written is read, with and without torch, and what is broken is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_pico
from hypothesis import given
from hypothesis import strategies as st
from profiling import opened
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, OutputExistsError
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import (
    RoutingProfile,
    empty_tables,
    read_profile,
    require_profile_of,
    write_profile,
)

SPEC = SampleSpec(images=2, steps=3, cfg=1.5, seed=1, solver="ddim", classes=(0, 1, 2))
SETTINGS = Calibration(SPEC, bins=3, reservoir=50, batch=2)
TABLES = ("selected", "gate_mass", "gate_norm")
OPTIONAL = ("norm", "norm_square", "easy_ep")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    checkpoint: Checkpoint
    profile: RoutingProfile
    tensors: Tensors
    document: dict[str, Any]

    def save(self, path: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
        """Write a variant: other tensors, metadata fields replaced (None removes one)."""
        document = {name: value for name, value in {**self.document, **changes}.items() if value is not None}
        save_file(tensors or self.tensors, path, {"format": "pt", "ditmoe": json.dumps(document)})
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("profiles")
    pico = make_pico(hidden=16, input_size=4, widths=((24, 24, 24), (8, 16, 32, 24, 8)))
    checkpoint = opened(pico, folder)
    profile = calibrate(checkpoint, SETTINGS, Run("cpu"), folder / "profile.safetensors")
    document = json.loads(read_safetensors_header(profile.path).metadata["ditmoe"])
    return Made(checkpoint, profile, load_file(profile.path), document)


def test_what_is_written_is_read(made: Made, tmp_path: Path) -> None:
    profile = made.profile
    assert profile.checkpoint == made.checkpoint.fingerprint
    assert dict(profile.calibration) == SETTINGS.to_json()
    assert profile.experts == (3, 5)
    assert profile.header.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(profile.tensor(name), tensor) for name, tensor in made.tensors.items())
    path = tmp_path / "again.safetensors"
    size = write_profile(path, made.tensors, profile.checkpoint, profile.calibration, profile.experts, False, ())
    assert size == path.stat().st_size
    assert path.read_bytes() == profile.path.read_bytes()
    assert read_profile(path).digest == profile.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tables_without_torch_are_the_tensors(made: Made) -> None:
    tables = made.profile.tables
    assert (tables.experts, tables.bins, tables.cfg) == ((3, 5), 3, 1.5)
    for name in TABLES:
        assert getattr(tables, name) == made.tensors[name].tolist()
    for name in OPTIONAL:
        assert tables.table(name) == made.tensors[name].tolist()


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_profile_may_lack_an_optional_table(name: str, made: Made, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in made.tensors.items() if key != name}
    tables = read_profile(made.save(tmp_path / "p.safetensors", tensors)).tables
    assert tables.optional.keys() == set(OPTIONAL) - {name}
    with pytest.raises(BadInputError, match=rf"no table '{name}'; profile without fast"):
        tables.table(name)


@pytest.mark.parametrize("name", ["reservoir.inputs", "reservoir.gamma", "counts", "output.cka"])
def test_a_block_is_read_alone(name: str, made: Made) -> None:
    for block, part in enumerate(made.tensors[name]):
        assert torch.equal(made.profile.block_tensor(name, block), part)


def test_reading_tables_needs_neither_torch_nor_numpy(made: Made) -> None:
    script = """
import sys
from pathlib import Path
from ditmoe_cli.compression.counts import Keep
from ditmoe_cli.compression.prune.pruning import Pruning, plan_prune
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.routing.profile import read_profile
profile = read_profile(Path(sys.argv[1]))
plan = plan_prune(open_checkpoint(sys.argv[2]), profile, Pruning(Keep(count=2)))
print(profile.never_routed(), [len(block.keep) for block in plan.stages[0].blocks], plan.profile == profile.digest)
print(sorted({"torch", "numpy"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", script, made.profile.path, made.checkpoint.path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(REPOSITORY)})
    assert done.stdout.splitlines() == [f"{made.profile.never_routed()} [2, 2] True", "[]"]


def test_experts_that_were_never_routed_are_named(made: Made, tmp_path: Path) -> None:
    selected = made.tensors["selected"].clone()
    selected[0, :, :, 2] = 0
    selected[1, :, :, 0] = 0
    selected[1, 0, :, 4] = 0
    selected[1, 1, 1, 4] = 1  # one token of the unconditional branch is enough
    profile = read_profile(made.save(tmp_path / "p.safetensors", {**made.tensors, "selected": selected}))
    seen = selected.sum(dim=(1, 2))
    expected = [(b, e) for b, n in enumerate((3, 5)) for e in range(n) if not seen[b, e]]
    assert profile.never_routed() == expected
    assert {(0, 2), (1, 0)} <= set(expected)
    assert not {(0, 3), (0, 4), (1, 4)} & set(expected)


def test_empty_tables_know_how_many_experts_there_are() -> None:
    assert empty_tables((3, 5)).experts == (3, 5)
    assert empty_tables((3, 5)).bins == 0


def test_an_existing_profile_is_kept_unless_forced(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    path.write_bytes(b"old")
    arguments = (made.tensors, "f" * 64, SETTINGS.to_json(), (3, 5))
    with pytest.raises(OutputExistsError):
        write_profile(path, *arguments, False, ())
    with pytest.raises(OutputExistsError):
        write_profile(path, *arguments, True, (path,))
    assert path.read_bytes() == b"old"
    write_profile(path, *arguments, True, ())
    assert read_profile(path).checkpoint == "f" * 64
    assert [file.name for file in tmp_path.iterdir()] == ["profile.safetensors"]


def test_a_profile_is_valid_for_its_own_checkpoint(made: Made) -> None:
    profile, checkpoint = made.profile, made.checkpoint
    assert require_profile_of(profile, checkpoint.fingerprint, checkpoint.path) is profile
    with pytest.raises(BadInputError, match=r"profile of another checkpoint"):
        require_profile_of(replace(profile, checkpoint="f" * 64), checkpoint.fingerprint, checkpoint.path)


def test_a_missing_profile_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.safetensors", tmp_path):
        with pytest.raises(BadInputError, match="no such profile"):
            read_profile(path)


@given(data=st.data())
def test_a_truncated_profile_is_refused(
    made: Made, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = made.profile.path.read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(BadInputError, match=r"cut\.safetensors"):
        read_profile(path)


@pytest.mark.parametrize("schema", ["ditmoe.profile/2", "ditmoe.checkpoint/1", ""])
def test_another_schema_is_refused(schema: str, made: Made, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"p\.safetensors: .*ditmoe\.profile/1"):
        read_profile(made.save(tmp_path / "p.safetensors", schema=schema))


def test_a_checkpoint_is_no_profile(made: Made) -> None:
    with pytest.raises(BadInputError, match=r"ditmoe\.profile/1"):
        read_profile(made.checkpoint.path)


@pytest.mark.parametrize("metadata", [None, {}, {"ditmoe": ""}, {"ditmoe": "{"}, {"ditmoe": "[]"}, {"ditmoe": "5"}])
def test_metadata_that_is_no_profiles_is_refused(metadata: dict[str, str] | None, made: Made, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    save_file(made.tensors, path, metadata)
    with pytest.raises(BadInputError, match=r"p\.safetensors: profile metadata"):
        read_profile(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint", None),
        ("experts", None),
        ("experts", "ab"),
        ("experts", 5),
        ("experts", [3, "x"]),
        ("calibration", None),
        ("calibration", []),
        ("calibration", {}),
        ("calibration", {"cfg": 1.0}),
        ("calibration", {"bins": 3}),
        ("calibration", {"cfg": 1.0, "bins": "few"}),
        ("calibration", {"cfg": "high", "bins": 3}),
        ("calibration", {"cfg": None, "bins": 3}),
        ("calibration", {"cfg": float("nan"), "bins": 3}),
    ],
)
def test_malformed_fields_are_refused(field: str, value: object, made: Made, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"p\.safetensors"):
        read_profile(made.save(tmp_path / "p.safetensors", **{field: value}))


REQUIRED = ("counts", "selected", "gate_mass", "gate_norm", "tokens")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_table_is_named(name: str, made: Made, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in made.tensors.items() if key != name}
    with pytest.raises(BadInputError, match=rf"no tensor '{name}'"):
        read_profile(made.save(tmp_path / "p.safetensors", tensors))


DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "a block less": lambda tensor: tensor[:-1],
    "a bin less": lambda tensor: tensor[:, :-1] if tensor.ndim == 2 else tensor[:, :, :-1],
    "a column less": lambda tensor: tensor[..., :-1],
    "flat": lambda tensor: tensor.reshape(-1),
    "in fp32": lambda tensor: tensor.float(),
    "in int32": lambda tensor: tensor.int(),
}


@pytest.mark.parametrize("name", REQUIRED + OPTIONAL)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_of_another_shape_or_dtype_is_named(name: str, damage: str, made: Made, tmp_path: Path) -> None:
    tensors = {**made.tensors, name: DAMAGE[damage](made.tensors[name]).contiguous()}
    with pytest.raises(BadInputError, match=rf"tensor '{name}' is "):
        read_profile(made.save(tmp_path / "p.safetensors", tensors))


def test_experts_that_the_tables_do_not_have_are_refused(made: Made, tmp_path: Path) -> None:
    for experts in ([], [3], [3, 5, 5], [3, 6], [3, 4]):
        with pytest.raises(BadInputError, match="tensor '"):
            read_profile(made.save(tmp_path / "p.safetensors", experts=experts))
