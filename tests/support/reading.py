"""Check that a checkpoint on disk holds a model."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Pico

from ditmoe_cli.files.reader import open_reader


def assert_holds(path: Path, model: Pico) -> None:
    """Assert that the tensors of `path` are those of `model`, by name, dtype and value."""
    header, reader = open_reader(path)
    assert set(header.tensors) == set(model.state)
    for name, value in model.state.items():
        found = reader.tensor(name)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
