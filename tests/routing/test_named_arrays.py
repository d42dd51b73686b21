"""Arrays of a profile with named axes: every stored tensor is described, and holds the stored numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import opened, profile_of
from conftest import REPOSITORY, make_pico

from ditmoe_cli.errors import UsageError
from ditmoe_cli.routing.named_arrays import AXES
from ditmoe_cli.routing.profile import RoutingProfile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> RoutingProfile:
    return profile_of(opened(make_pico(), tmp_path_factory.mktemp("arrays")))


def test_every_tensor_has_axes(profile: RoutingProfile) -> None:
    assert set(profile.arrays) == set(profile.header.tensors)
    assert set(AXES) - set(profile.arrays) <= {"flip_rate"}
    for name, tensor in profile.header.tensors.items():
        assert len(AXES[name]) == len(tensor.info.shape) == len(set(AXES[name])), name


def test_axes_of_one_name_have_one_length(profile: RoutingProfile) -> None:
    """But for blocks that lead to another, and channels of latents and of the stream."""
    lengths: dict[str, set[int]] = {}
    for name, array in profile.arrays.items():
        for axis, size in array.sizes.items():
            if (name, axis) not in (
                ("transitions.block", "block"),
                ("image.final", "channel"),
                ("states.z", "channel"),
            ):
                lengths.setdefault(axis, set()).add(size)
    assert {axis: sizes for axis, sizes in lengths.items() if len(sizes) > 1} == {}


def test_values_are_those_that_are_stored(profile: RoutingProfile) -> None:
    for name, array in profile.arrays.items():
        stored = profile.tensor(name)
        wide = stored.float() if stored.dtype == torch.bfloat16 else stored
        np.testing.assert_array_equal(array.values, wide.numpy(), err_msg=name)


def test_axes_are_summed_and_chosen_by_name(profile: RoutingProfile) -> None:
    counts = profile.arrays["counts"]
    selected = counts.sum("position")
    assert selected.axes == AXES["selected"]
    np.testing.assert_array_equal(selected.values, profile.arrays["selected"].values)
    one = counts.at(block=1, expert=-1)
    assert one.axes == ("branch", "bin", "position")
    np.testing.assert_array_equal(np.asarray(one), counts.values[1, ..., -1])
    assert float(counts.sum()) == counts.values.sum() and counts.sum().axes == ()


def test_what_is_not_there_is_said_by_name(profile: RoutingProfile) -> None:
    counts = profile.arrays["counts"]
    with pytest.raises(UsageError, match="counts has no axis 'step'; choose from block, branch, bin, position, expert"):
        counts.sum("step")
    with pytest.raises(UsageError, match="counts: block 7 is out of range: there are 2"):
        counts.at(block=7)
    with pytest.raises(KeyError, match="count"):
        profile.arrays["count"]


def test_a_changed_array_changes_nothing_else(profile: RoutingProfile) -> None:
    profile.arrays["counts"].values[:] = 0
    assert profile.arrays["counts"].values.any()


def test_every_array_is_documented() -> None:
    page = Path(REPOSITORY / "docs" / "python.md").read_text()
    table = page[page.index("## Arrays") :]
    missing = [name for name, axes in AXES.items() if f"`{name}` | {', '.join(axes) or 'none'} |" not in table]
    assert missing == [], f"a row like | `name` | {'axes'} | what it is |"
