"""What the programs that report FID do differently, as data: preprocessing, and how each score is taken.

Scores of one set of images differ between conventions, so a number is worth something only beside its convention's
name. Facts are those of each program's source: ADM's evaluator (https://github.com/openai/guided-diffusion, folder
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
    """How an Inception score divides its images: into `parts` equal ones, or into chunks of `chunk` in a row.

    Exactly one of both is given. Images are shuffled with `seed` first, or not at all where it is None. `bias` tells
    whether the classifier's bias is added to the logits.
    """

    parts: int | None = None
    chunk: int | None = None
    seed: int | None = None
    bias: bool = False


@dataclass(frozen=True)
class KernelSubsets:
    """How a kernel distance is taken: the mean over `subsets` draws of `size` images, with kernel (γ x·y + c)^degree.

    γ is one over the number of features, c is `coefficient`. With `shrink` fewer images than `size` make subsets of all
    of them, otherwise they are refused. A convention whose program draws from an unseeded generator has `seeded` False:
    its numbers can be met within their deviation only, and `seed` is ours.
    """

    subsets: int = 100
    size: int = 1000
    degree: int = 3
    coefficient: float = 1.0
    seed: int = 2020
    shrink: bool = False
    seeded: bool = True


@dataclass(frozen=True)
class Convention:
    """How one program scores; None stands for a score that it does not have.

    `inception` is the Inception score, `kernel` the kernel distance (KID), `neighbours` the k of improved precision and
    recall over pool features, `spatial` tells whether sFID is given. FID over pool features is common to all.
    """

    name: str
    preprocessing: str
    inception: InceptionParts | None = None
    kernel: KernelSubsets | None = None
    neighbours: int | None = None
    spatial: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """Activations beside features that all scores of the convention take."""
        spatial = ("spatial",) if self.spatial else ()
        if self.inception is None:
            return spatial
        return (*spatial, "biased_logits" if self.inception.bias else "logits")


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
    "clean-fid": Convention("clean-fid", "clean-fid", kernel=KernelSubsets(shrink=True, seeded=False)),
}


def convention_named(name: str) -> Convention:
    """Return the convention of that name. Raises `UsageError` where there is none."""
    if name not in CONVENTIONS:
        raise UsageError(f"unknown convention {name!r}; choose {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
