"""The budget of a mix of formats in bytes of the file, and the size of the file with any formats. Torch-free.

A budget in bits is the size of the file with all routed, shared and attention matrices at that width, and everything
else as it is; between two widths it is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.compression.precision.candidates import Candidates
from ditmoe_cli.compression.precision.uniform import INTEGER_BITS, uniform_formats
from ditmoe_cli.compression.recorded import planned_step
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Step
from ditmoe_cli.files.writer import Output
from ditmoe_cli.formats.registry import quantized_members
from ditmoe_cli.model.checkpoint import Checkpoint

_UNITS = {"TB": 10**12, "TiB": 2**40, "GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20, "KB": 10**3, "KiB": 2**10}


@dataclass(frozen=True)
class Budget:
    """The largest file allowed: as large as with all matrices at `bits`, or `size` bytes."""

    bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.size is None):
            raise UsageError("give either ⟨bits⟩, as 3.25, or ⟨size⟩, as 2.5GiB")
        if self.bits is not None and not INTEGER_BITS[0] <= self.bits <= INTEGER_BITS[-1]:
            raise UsageError(f"⟨bits⟩ {self.bits:g}: choose from {INTEGER_BITS[0]} to {INTEGER_BITS[-1]}")

    def options(self) -> dict[str, float]:
        """Return the given value by its name, for the options of a plan."""
        return {name: value for name, value in (("bits", self.bits), ("size", self.size)) if value is not None}

    @property
    def label(self) -> str:
        """The budget as part of a file's name, such as ``bits4`` or ``size2.5GiB``."""
        return f"bits{self.bits:g}" if self.bits is not None else f"size{size_label(self.size or 0)}"

    def limit(self, sizes: FileSizes, candidates: Candidates) -> int:
        """Return the largest file that the budget allows, in bytes."""
        if self.size is not None:
            return self.size
        assert self.bits is not None
        below = max(bits for bits in INTEGER_BITS if bits <= self.bits)
        above = min(bits for bits in INTEGER_BITS if bits >= self.bits)
        smaller = sizes.uniform(below, candidates)
        if above == below:
            return smaller
        share = (self.bits - below) / (above - below)
        return math.floor(smaller + share * (sizes.uniform(above, candidates) - smaller))


def size_label(size: int) -> str:
    """Return a number of bytes exactly, in the unit in which it is shortest."""
    numbers = {f"{size / count:g}{unit}": float(f"{size / count:g}") * count for unit, count in _UNITS.items()}
    return min((*(text for text, count in numbers.items() if count == size), str(size)), key=len)


class FileSizes:
    """The sizes of a checkpoint's file with its weights in any formats, and everything else as it is.

    They equal the size of the plan's output (`compression.output.planned_output`) to the byte, and take less work.
    `step` is the one that the plan will add to the history; without it that of a plan of no options.
    """

    def __init__(self, checkpoint: Checkpoint, output: Output, step: Step | None = None) -> None:
        self._checkpoint, self._output = checkpoint, output
        base = checkpoint.provenance()
        usual = planned_step(CompressionPlan("quantize", checkpoint.fingerprint), checkpoint.config.experts)
        history = (*base.history, step or usual)
        self._provenance = replace(base, history=history)

    def of(self, formats: Mapping[str, str]) -> int:
        """Return the bytes of the file with weights in `formats`."""
        tensors = {info.name: info for info in self._tensors(formats)}  # bases are members of several weights
        ordered = sorted(tensors.values(), key=lambda info: natural_key(info.name))
        return self._output.predicted_bytes(ordered, self._provenance)

    def uniform(self, bits: int, candidates: Candidates) -> int:
        """Return the bytes of the file with all routed, shared and attention matrices at `bits`."""
        fmt = candidates.format_of(str(bits))
        assert fmt is not None
        return self.of(uniform_formats(self._checkpoint, fmt))

    def of_weight(self, name: str, fmt: str | None) -> int:
        """Return the bytes of one weight's tensors in a format; None leaves it as it is."""
        info = self._checkpoint.weights[name].info
        return info.nbytes if fmt is None else sum(member.nbytes for member in quantized_members(info, fmt))

    def _tensors(self, formats: Mapping[str, str]) -> Iterator[TensorInfo]:
        for name, weight in self._checkpoint.weights.items():
            if name in formats:
                yield from quantized_members(weight.info, formats[name])
            else:
                yield from (self._checkpoint.header.tensors[member] for member in weight.members)
