"""Which weights are written with their neurons in another order. Torch-free, so that planned outputs can tell."""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.compression.plan import Formats
from ditmoe_cli.files.names import MATRICES, SHARED, split_name
from ditmoe_cli.formats.registry import parse_pieces


def expert_stem(name: str) -> str | None:
    """Return the name of the expert, routed or shared, that a weight is a matrix of; None for all other weights."""
    parts = split_name(name)
    stem, _, matrix = name.removesuffix(".weight").rpartition(".")
    known = parts.expert is not None or (parts.block is not None and stem.endswith(f".{SHARED}"))
    return stem if known and matrix in MATRICES and name.endswith(".weight") else None


def has_pieces(formats: Mapping[str, str], stem: str) -> bool:
    """Tell whether formats cut a matrix of an expert into pieces."""
    mine = (formats.get(f"{stem}.{matrix}.weight") for matrix in MATRICES)
    return any(fmt is not None and parse_pieces(fmt) is not None for fmt in mine)


def is_ordered(stage: Formats, name: str) -> bool:
    """Tell whether a weight's neurons are reordered: those of all matrices of an expert of which one is in pieces."""
    stem = expert_stem(name) if stage.ordering is not None else None
    return stem is not None and has_pieces(stage.formats, stem)
