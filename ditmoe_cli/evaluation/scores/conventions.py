"""Conventions of the programs that report FID, as data: preprocessing, and the settings of each score.

Scores of the same images differ between conventions, so a number means something only together with its convention.
Settings are those of each program's source: ADM's evaluator (https://github.com/openai/guided-diffusion, folder
``evaluations``), torch-fidelity 0.4.0, pytorch-fid 0.3.0 and clean-fid 0.1.35.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ditmoe_cli.errors import UsageError

PRECISIONS = ("fp32", "bf16")
PREPROCESSINGS: Mapping[str, str] = {
    "tf1": "TF1 bilinear to 299x299, (x - 128) / 128",
    "pytorch-fid": "bilinear at half-pixel centres to 299x299, 2x / 255 - 1",
    "clean-fid": "PIL bicubic, antialiased, in float to 299x299, (x - 128) / 128",
}


@dataclass(frozen=True)
class InceptionParts:
    """Division of images for an Inception score: into `parts` equal ones, or into chunks of `chunk` in a row.

    Exactly one of both is given. Images are shuffled with `seed` first, or not at all where it is None. With `bias` the
    classifier's bias is added to the logits.
    """

    parts: int | None = None
    chunk: int | None = None
    seed: int | None = None
    bias: bool = False


@dataclass(frozen=True)
class KernelSubsets:
    """Settings of a kernel distance: the mean over `subsets` draws of `size` images, with kernel (γ x·y + c)^degree.

    γ is one over the number of features, c is `coefficient`. Fewer images than `size` are refused, or with `shrink` all
    of them are drawn. `seed` is that of the draws.
    """

    subsets: int = 100
    size: int = 1000
    degree: int = 3
    coefficient: float = 1.0
    seed: int = 2020
    shrink: bool = False


@dataclass(frozen=True)
class Convention:
    """Settings of one program's scores; None for a score that it does not have.

    Attributes:
        name: of the convention.
        preprocessing: one of `PREPROCESSINGS`.
        inception: of the Inception score.
        kernel: of the kernel distance (KID).
        neighbours: k of improved precision and recall over pool features.
        spatial: whether the program has sFID. All have FID over pool features.
    """

    name: str
    preprocessing: str
    inception: InceptionParts | None = None
    kernel: KernelSubsets | None = None
    neighbours: int | None = None
    spatial: bool = False


CONVENTIONS: Mapping[str, Convention] = {
    "adm": Convention("adm", "tf1", inception=InceptionParts(chunk=5000), neighbours=3, spatial=True),
    "torch-fidelity": Convention(
        "torch-fidelity",
        "tf1",
        inception=InceptionParts(parts=10, seed=2020),
        kernel=KernelSubsets(),
        neighbours=3,
    ),
    "pytorch-fid": Convention("pytorch-fid", "pytorch-fid"),
    # clean-fid itself draws from an unseeded generator: its numbers agree with ours within their deviation only
    "clean-fid": Convention("clean-fid", "clean-fid", kernel=KernelSubsets(shrink=True)),
}


def convention_named(name: str) -> Convention:
    """Return the convention of that name. Raises `UsageError` where there is none."""
    if name not in CONVENTIONS:
        raise UsageError(f"unknown convention {name!r}; choose {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
