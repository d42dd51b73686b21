"""Linear layers rounded in place by GPTQ, those of equal shapes together, on the inputs that they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from ditmoe_cli.compression.rounding.gptq import Readers, Rounded, best_rounding, rule_of
from ditmoe_cli.compression.rounding.second_moments import (
    CHUNK,
    effective_tokens,
    rooted,
    second_moment,
    shrunk_weights,
)
from ditmoe_cli.compression.working_sizes import ROUNDED_BYTES, ROUNDED_BYTES_ON_DEVICES
from ditmoe_cli.formats.base import Grid
from ditmoe_cli.formats.registry import grid_of

Item = TypeVar("Item")


@dataclass(frozen=True)
class Reading:
    """Linear layers that read the same inputs.

    Attributes:
        layers: by the names of their weights.
        formats: of each.
        inputs: returns the inputs (n, in) of tokens, given their indices (n,).
        fitted: (T,) weights of the tokens that layers are rounded on, 0 for all others.
        pooled: (T,) weights of those whose second moment the Hessian is shrunk towards (`shrunk_weights`); None for no
            shrinking.
        held: (T,) weights of the tokens that errors are measured on.
    """

    layers: Mapping[str, nn.Linear]
    formats: Mapping[str, str]
    inputs: Callable[[Tensor], Tensor]
    fitted: Tensor
    pooled: Tensor | None
    held: Tensor

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each layer."""
        return tuple((layer.out_features, layer.in_features) for layer in self.layers.values())

    @property
    def nbytes(self) -> int:
        """The memory that rounding takes: Hessian, factor and a copy; weights, rounded ones, and what both lose."""
        rows, width = sum(out for out, _ in self.shapes), self.shapes[0][1]
        return 4 * (3 * width**2 + 4 * width * rows)

    def prepared(self) -> list[_Prepared]:
        """Return the layers that are rounded by one rule, for each rule, with the second moments of their inputs."""
        width = self.shapes[0][1]
        weights = self.fitted if self.pooled is None else shrunk_weights(self.fitted, self.pooled, width)
        weights = weights.double() / weights.double().sum().clamp_min(torch.finfo(torch.float64).tiny)
        rows, held = (each.nonzero().squeeze(1) for each in (weights, self.held))
        batches = ((self.inputs(some), weights[some]) for some in torch.split(rows, CHUNK))
        moment = second_moment(batches, width, rows.device)
        root = torch.cat([rooted(self.inputs(some), self.held[some]) for some in torch.split(held, CHUNK)])
        tokens = effective_tokens(self.fitted)
        matrices = {name: layer.weight.detach().float() for name, layer in self.layers.items()}
        grids = {
            name: grid_of(each, self.formats[name], moment.diagonal(), name=name) for name, each in matrices.items()
        }
        found = []
        for names in grouped(grids, lambda name: rule_of(grids[name], rows.device)):
            readers = Readers(
                tuple(matrices[name] for name in names), tuple(grids[name] for name in names), moment, root, tokens
            )
            found.append(_Prepared({name: self.layers[name] for name in names}, readers))
        return found


@dataclass(frozen=True)
class _Prepared:
    """Layers, by the names of their weights, and what they are rounded as."""

    layers: Mapping[str, nn.Linear]
    readers: Readers


@dataclass(frozen=True)
class RoundedLayer:
    """A layer that was rounded in place: the name of its weight, its grid, and how it was rounded."""

    name: str
    grid: Grid
    rounded: Rounded


def round_layers(readings: Sequence[Reading]) -> Iterator[RoundedLayer]:
    """Round layers in place, and yield each when that is done.

    Neighbouring readings of equal shapes are rounded together, as many as memory allows.
    """
    for batch in _batches(readings):
        prepared = [part for reading in batch for part in reading.prepared()]
        for alike in grouped(prepared, lambda part: part.readers.alike):
            for part, results in zip(alike, best_rounding([each.readers for each in alike]), strict=True):
                for (name, layer), grid, rounded in zip(part.layers.items(), part.readers.grids, results, strict=True):
                    layer.weight.data.copy_(rounded.weight)
                    yield RoundedLayer(name, grid, rounded)


def _batches(readings: Sequence[Reading]) -> Iterator[list[Reading]]:
    """Yield neighbours of equal shapes, as many as memory allows, and at least one."""
    for _, group in groupby(readings, key=lambda reading: reading.shapes):
        alike = list(group)
        on_cpu = alike[0].fitted.device.type == "cpu"
        most = max(1, (ROUNDED_BYTES if on_cpu else ROUNDED_BYTES_ON_DEVICES) // alike[0].nbytes)
        for start in range(0, len(alike), most):
            yield alike[start : start + most]


def grouped(items: Iterable[Item], key: Callable[[Item], object]) -> list[list[Item]]:
    """Return items of equal keys together, in the order of the first of each."""
    groups: dict[object, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
