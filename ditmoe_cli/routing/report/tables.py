"""The tensors of a profile that a report derives from, read once and checked for shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.routing import saliency
from ditmoe_cli.routing.profile import RoutingProfile, RoutingTables
from ditmoe_cli.routing.saliency import Scores

Numbers = NDArray[Any]

CRITERIA: Mapping[str, Callable[[RoutingTables], Scores]] = {
    "frequency": saliency.frequency,
    "gate mass": saliency.gate_mass,
    "REAP": saliency.reap,
    "MAN": saliency.man,
    "MSAN": saliency.msan,
    "EASY-EP": saliency.easy_ep,
}
ROUTER = ("entropy", "margin", "topk_mass")


@dataclass(frozen=True)
class ProfileTables:
    """Tensors of all blocks, laid out as `routing.profile` says; `labels` are those of the images.

    `gram`, `means` and `cka` are None in a ``fast`` profile. `saliency` has the criteria whose sums the profile holds.
    """

    experts: tuple[int, ...]
    labels: tuple[int, ...]
    counts: Numbers
    steps: Numbers
    positions: Numbers
    selected: Numbers
    coactivation: Numbers
    next_block: Numbers
    next_step: Numbers
    branch: Numbers
    neighbour: Numbers
    router: Mapping[str, Numbers]
    tokens: Numbers
    gram: Numbers | None
    means: Numbers | None
    cka: Numbers | None
    saliency: Mapping[str, Scores]

    @property
    def branches(self) -> int:
        """Return 2 where guidance ran, else 1."""
        return 2 if self.tokens[1].any() else 1

    @property
    def bins(self) -> int:
        """Return the number of step bins."""
        return int(self.counts.shape[2])


def read_tables(profile: RoutingProfile) -> ProfileTables:
    """Read a profile's tensors. Raises `BadInputError` where it is empty, or one is missing or of another shape."""
    if not profile.experts or min(profile.experts) < 1:
        raise BadInputError(f"{profile.path}: the profile has no blocks with experts")
    wide = profile.header.tensors["counts"].info.shape
    sizes = {"L": wide[0], "B": wide[2], "P": wide[3], "E": wide[4]}
    if not all(sizes.values()):
        raise BadInputError(f"{profile.path}: the profile is empty: {sizes}")
    steps = _Tensors(profile, sizes).read("image.steps", "IL2BE")
    if not len(steps):
        raise BadInputError(f"{profile.path}: the profile holds no image")
    labels = _labels(profile, len(steps))
    tensors = _Tensors(profile, {**sizes, "I": len(steps)})
    tensors.require("norm", "norm_square")
    return ProfileTables(
        experts=profile.experts,
        labels=labels,
        counts=tensors.read("counts", "L2BPE"),
        steps=steps,
        positions=tensors.read("image.positions", "IL2PE"),
        selected=tensors.read("selected", "L2BE"),
        coactivation=tensors.read("coactivation", "L2BEE"),
        next_block=tensors.read("transitions.block", "T2BEE"),
        next_step=tensors.read("transitions.step", "L2BEE"),
        branch=tensors.read("transitions.branch", "LBEE"),
        neighbour=tensors.read("transitions.neighbour", "L2BEE"),
        router={name: tensors.read(f"router.{name}", "L2B") for name in ROUTER},
        tokens=tensors.read("tokens", "2B"),
        gram=tensors.read_optional("output.gram", "L2BEE"),
        means=tensors.read_optional("output.all_token_mean", "L2BED"),
        cka=tensors.read_optional("output.cka", "LEE"),
        saliency={
            name: criterion(profile.tables)
            for name, criterion in CRITERIA.items()
            if name != "EASY-EP" or tensors.has("easy_ep")
        },
    )


@dataclass(frozen=True)
class _Tensors:
    """A profile's tensors, with the sizes of their axes by letter."""

    profile: RoutingProfile
    sizes: Mapping[str, int]

    def has(self, name: str) -> bool:
        return name in self.profile.header.tensors

    def require(self, *names: str) -> None:
        """Raise `BadInputError` where the profile lacks one of the tensors."""
        for name in names:
            if not self.has(name):
                raise BadInputError(f"{self.profile.path}: the profile has no tensor {name!r}; profile again")

    def read(self, name: str, axes: str) -> Numbers:
        """Return a tensor whose axes have the sizes of the letters; a letter without a size stands for any.

        Raises `BadInputError` where it is missing or of another shape.
        """
        self.require(name)
        shape = self.profile.header.tensors[name].info.shape
        expected = [int(axis) if axis.isdigit() else self.sizes.get(axis) for axis in axes]
        if len(shape) != len(axes) or any(want not in (None, size) for want, size in zip(expected, shape, strict=True)):
            known = ["any" if size is None else size for size in expected]
            raise BadInputError(f"{self.profile.path}: tensor {name!r} has shape {list(shape)}, not {known}")
        array: Numbers = self.profile.tensor(name).numpy()
        return array

    def read_optional(self, name: str, axes: str) -> Numbers | None:
        return self.read(name, axes) if self.has(name) else None


def _labels(profile: RoutingProfile, images: int) -> tuple[int, ...]:
    """Return the label of each image: the calibration's classes, in turn."""
    try:
        classes = profile.calibration["classes"]
        listed = range(int(classes.split("-")[1]) + 1) if isinstance(classes, str) else [int(c) for c in classes]
        return tuple(listed[i % len(listed)] for i in range(images))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInputError(f"{profile.path}: the profile's calibration settings are malformed ({error!r})") from None
