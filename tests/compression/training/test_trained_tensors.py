"""Which stored tensors are trained, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import with_slow
from conftest import make_pico
from packed import KINDS, packed_pico
from stored_parts import wholly_packed

from ditmoe_cli.compression.training.stepped_matrices import matrix_flops
from ditmoe_cli.compression.training.trained_groups import GROUPS
from ditmoe_cli.compression.training.trained_tensors import tensors_to_train, trained_size
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.formats.registry import Format
from ditmoe_cli.model.checkpoint import open_checkpoint


@pytest.mark.parametrize("fmt", with_slow(sorted(KINDS, key=lambda kind: kind not in ("nf4", "int4-g64")), 2))
def test_a_checkpoint_of_packed_matrices_has_something_to_train_in_every_group(fmt: Format, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(wholly_packed(make_pico(), fmt).save(tmp_path / "x.safetensors"))
    for group in GROUPS:
        found = tensors_to_train(checkpoint, [group])
        assert set(found) <= set(checkpoint.header.tensors)
        assert not any(name.endswith("_packed") or name in checkpoint.weights for name in found if found[name].part)
        plain = [name for name, trained in found.items() if trained.part is None]
        assert all(checkpoint.weights[name].stored_as is None for name in plain)


def test_codes_are_trained_where_asked_for_and_where_there_are_whole_ones(tmp_path: Path) -> None:
    pico = packed_pico(packed_pico(make_pico(), "int3-g32"), "nf4", "attn.qkv")
    checkpoint = open_checkpoint(pico.save(tmp_path / "x.safetensors"))
    fixed, learned = (tensors_to_train(checkpoint, GROUPS, codes) for codes in (False, True))
    codes = {name for name in checkpoint.header.tensors if name.endswith("_packed")}
    assert codes
    assert set(learned) - set(fixed) == codes
    assert all(learned[name].values == learned[name].weight.info.numel for name in codes)
    composed = sum(weight.info.numel for weight in checkpoint.weights.values() if weight.quantized)
    found = trained_size(checkpoint, fixed)
    assert (found.values, found.composed) == (sum(each.values for each in fixed.values()), composed)
    plain = [name for name, each in fixed.items() if each.part is None]
    assert found.matrix_flops == sum(matrix_flops(name, fixed[name].shape) for name in plain) > 0
    assert "blocks.0.attn.qkv.weight" not in learned
    assert "blocks.0.attn.qkv.weight.absmax" in learned


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico().save(tmp_path / "x.safetensors"))
    with pytest.raises(BadInputError, match="no weights to train in nothing"):
        tensors_to_train(checkpoint, ["nothing"])
