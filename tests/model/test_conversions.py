"""Conversions of every way to store a weight: casting leaves packed ones alone, unpacking gives what the model sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import here
from conftest import Pico, make_pico
from families import FAMILIES, MATRIX, stored_in
from packed import same_bytes
from torch import Tensor
from upstream_code import UpstreamDiT, find_model

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.exporting.upstream import arguments
from ditmoe_cli.files.casting import DTYPES
from ditmoe_cli.files.reader import torch_dtype
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.conversions import in_dtype, packed_weights, recorded, unpacked, with_positions

DIFFERENCES = ("svd", "ternary")


def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights as the model sees them."""
    return {
        name: weight.unpack({member: checkpoint.reader.tensor(member) for member in weight.members})
        for name, weight in checkpoint.weights.items()
    }


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, list(DTYPES)[i % len(DTYPES)]) for i, family in enumerate(FAMILIES)]
)
def test_a_cast_reaches_all_but_quantised_weights(tmp_path: Path, family: str, dtype: str) -> None:
    """A base and factors of differences are cast, codes and scales are not, and the file opens again."""
    source = open_checkpoint(stored_in(family).model.save(tmp_path / "x.safetensors"))
    cast = in_dtype(source, dtype)
    apply(recorded(cast, {"dtype": dtype}, source), None, Output(tmp_path / "y.safetensors"))
    found, wanted = open_checkpoint(tmp_path / "y.safetensors"), torch_dtype(DTYPES[dtype])
    assert found.config == source.config
    assert found.weights.keys() == source.weights.keys()
    before, after = read(source), read(found)
    for name, weight in source.weights.items():
        if weight.quantized:
            assert all(same_bytes(source.reader.tensor(m), found.reader.tensor(m)) for m in weight.members)
            continue
        assert found.weights[name].info.dtype == DTYPES[dtype]
        if weight.format is None:
            assert same_bytes(after[name], before[name].to(wanted))
        else:
            torch.testing.assert_close(after[name].float(), before[name].float(), rtol=0, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_weights_are_those_that_the_model_sees(tmp_path: Path, family: str) -> None:
    source = open_checkpoint(stored_in(family).model.save(tmp_path / "x.safetensors"))
    assert packed_weights(source) == (4 if family in DIFFERENCES else 1)
    plain = unpacked(source)
    assert packed_weights(plain) == 0
    assert plain.header.tensors.keys() == plain.weights.keys() == make_pico().state.keys()
    apply(plain, None, Output(tmp_path / "y"))
    found, expected = open_checkpoint(tmp_path / "y"), read(source)
    assert found.config == source.config
    assert all(same_bytes(found.reader.tensor(name), expected[name]) for name in expected)
    assert same_bytes(plain.reader.tensor(MATRIX), expected[MATRIX])
    assert bytes(plain.reader.raw(MATRIX)) == bytes(found.reader.raw(MATRIX))


@pytest.mark.parametrize("family", FAMILIES)
def test_upstream_gets_what_the_model_sees(tmp_path: Path, family: str) -> None:
    source = open_checkpoint(stored_in(family).model.save(tmp_path / "x.safetensors"))
    outcome = here("export", "x.safetensors", "--to", "upstream", "-o", "y.pt", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    found, expected = find_model(tmp_path / "y.pt"), read(source)
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], value) for name, value in expected.items())
    UpstreamDiT(**arguments(source.config)).load_state_dict(found)


def test_plain_checkpoints_are_left_as_they_are(tmp_path: Path) -> None:
    source = open_checkpoint(make_pico().save(tmp_path / "x.safetensors"))
    assert unpacked(source) is source
    assert in_dtype(source, "fp32") is source
    assert with_positions(source) is source
    assert recorded(source, {}, source) is source


@pytest.mark.parametrize("family", ["svd", "ternary"])
def test_a_base_beyond_the_range_is_refused_by_name(tmp_path: Path, family: str) -> None:
    stored = stored_in(family)
    state = {
        name: value.float() if value.dtype == torch.float16 else value for name, value in stored.model.state.items()
    }
    base = next(name for name in stored.members if ".base." in name)
    state[base][0, 0] = 1e6
    Pico(stored.model.config, state).save(tmp_path / "x.safetensors")
    message = here("convert", "x.safetensors", "--dtype", "fp16", cwd=tmp_path).error(3)
    assert base in message
    assert "1e+06" in message


def test_codes_that_stand_for_nothing_are_named_when_they_are_unpacked(tmp_path: Path) -> None:
    stored = stored_in("ternary-g32")
    codes = next(name for name in stored.members if stored.model.state[name].dtype == torch.uint8)
    stored.model.state[codes].fill_(255)
    plain = unpacked(open_checkpoint(stored.model.save(tmp_path / "x.safetensors")))
    with pytest.raises(BadInputError, match=rf"x\.safetensors: .*{MATRIX}"):
        plain.reader.tensor(MATRIX)
