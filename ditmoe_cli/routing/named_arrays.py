"""Arrays of a profile with named axes, and the axes of each of its tensors. Numpy is imported when one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditmoe_cli.briefs import Brief, Fact, html_table
from ditmoe_cli.errors import UsageError
from ditmoe_cli.files.header import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BIN = ("block", "branch", "bin")
_EXPERT = (*_BIN, "expert")
_PAIR = (*_EXPERT, "other_expert")
_CHANNEL = (*_EXPERT, "channel")
AXES: Mapping[str, tuple[str, ...]] = {
    "flip_rate": (),
    "counts": (*_BIN, "position", "expert"),
    "selected": _EXPERT,
    "tokens": ("branch", "bin"),
    "image.steps": ("image", *_EXPERT),
    "image.positions": ("image", "block", "branch", "position", "expert"),
    "image.final": ("image", "channel", "row", "column"),
    "coactivation": _PAIR,
    "transitions.block": (*_EXPERT, "next_expert"),
    "transitions.step": (*_BIN, "previous_expert", "expert"),
    "transitions.branch": ("block", "bin", "expert", "unconditional_expert"),
    "transitions.neighbour": (*_EXPERT, "neighbour_expert"),
    **dict.fromkeys(("gate_mass", "gate_square", "gate_norm", "gate_square_norm_square"), _EXPERT),
    **dict.fromkeys(("norm", "norm_square", "norm_max", "raw_norm", "raw_norm_square", "raw_gate_norm"), _EXPERT),
    **dict.fromkeys(("router.entropy", "router.margin", "router.topk_mass", "router.logsumexp_square"), _BIN),
    "router.logit_sum": (*_BIN, "router_row"),
    "router.logit_gram": (*_BIN, "router_row", "other_row"),
    "easy_ep": _EXPERT,
    **dict.fromkeys(("output.gram", "output.raw_gram", "output.cosine", "gate_ratio", "gate_ratio_square"), _PAIR),
    **dict.fromkeys(("output.sum", "output.gate_square_sum", "output.all_token_mean"), _CHANNEL),
    "output.cka": ("block", "expert", "other_expert"),
    **dict.fromkeys(("input.max", "input.square"), ("block", "expert", "channel")),
    **dict.fromkeys(("gamma.sum", "gamma.square"), (*_BIN, "channel")),
    "gamma.images": ("branch", "bin"),
    **dict.fromkeys(("neuron.energy", "neuron.max"), ("block", "expert", "neuron")),
    "states.z": ("state", "channel", "row", "column"),
    **dict.fromkeys(("states.t", "states.label", "states.image", "states.bin"), ("state",)),
    "reservoir.inputs": ("block", "token", "channel"),
    **dict.fromkeys(("reservoir.state", "reservoir.branch", "reservoir.position"), ("token",)),
    "reservoir.gamma": ("block", "state", "branch", "channel"),
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "BF16": "<u2"}


@dataclass(frozen=True, repr=False, eq=False)
class NamedArray(Brief):
    """An array of numpy with a name for each axis; ``numpy.asarray`` gives `values`.

    Attributes:
        name: of the stored tensor.
        values: the numbers, those of bfloat16 as float32.
        axes: the name of each axis.
    """

    name: str
    values: NDArray[Any]
    axes: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis by its name."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    def sum(self, *axes: str) -> NamedArray:
        """Return the sums over the named axes, over all without names. Raises `UsageError` for unknown names."""
        gone = axes or self.axes
        places = tuple(self._place(axis) for axis in gone)
        return NamedArray(
            self.name, self.values.sum(axis=places), tuple(axis for axis in self.axes if axis not in gone)
        )

    def at(self, **places: int) -> NamedArray:
        """Return the part at an index of each of the named axes, as ``at(block=0, branch=1)``.

        Raises `UsageError` for unknown names, and for indices out of range.
        """
        wanted: list[int | slice] = [slice(None)] * len(self.axes)
        for axis, index in places.items():
            size = self.values.shape[self._place(axis)]
            if not -size <= index < size:
                raise UsageError(f"{self.name}: {axis} {index} is out of range: there are {size}")
            wanted[self._place(axis)] = index
        return NamedArray(
            self.name, self.values[tuple(wanted)], tuple(axis for axis in self.axes if axis not in places)
        )

    def _place(self, axis: str) -> int:
        if axis not in self.axes:
            raise UsageError(f"{self.name} has no axis {axis!r}; choose from {', '.join(self.axes) or 'none'}")
        return self.axes.index(axis)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return the values, as ``numpy.asarray`` asks for them."""
        import numpy as np

        return np.array(self.values, dtype=dtype, copy=True) if copy else np.asarray(self.values, dtype=dtype)

    def __float__(self) -> float:
        """Return the one number that an array without axes holds."""
        return float(self.values)

    def _brief(self) -> list[Fact]:
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return [("", self.name), ("axes", f"({sizes})"), ("dtype", self.values.dtype)]


class NamedArrays(Mapping[str, NamedArray]):
    """The arrays of a profile by the names of its tensors, each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, TensorInfo], raw: Callable[[str], memoryview]) -> None:
        self._tensors, self._raw = {name: tensors[name] for name in AXES if name in tensors}, raw

    def __getitem__(self, name: str) -> NamedArray:
        """Return an array. Raises `KeyError` for a name that the profile has not."""
        info = self._tensors[name]
        return NamedArray(name, as_numpy(info, self._raw(name)), AXES[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<{len(self)} arrays: {', '.join(self)}>"

    def _repr_html_(self) -> str:
        return html_table("Arrays", [(name, self._shape(name)) for name in self])

    def _shape(self, name: str) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in zip(AXES[name], self._tensors[name].shape, strict=True))


def as_numpy(info: TensorInfo, raw: memoryview) -> NDArray[Any]:
    """Return a stored tensor as an array; bfloat16, which numpy lacks, as float32 of the same values."""
    import numpy as np

    values: np.ndarray[Any, Any] = np.frombuffer(raw, dtype=_NUMPY[info.dtype]).reshape(info.shape)
    if info.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.copy()
