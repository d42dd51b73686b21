"""Pairs of images of the same seeds, drawn from the samples of a checkpoint and of the one that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.image_grids import pair_grid, png_bytes
from ditmoe_cli.evaluation.images import read_images
from ditmoe_cli.evaluation.sampled_models import are_copies, have_same_noise
from ditmoe_cli.evaluation.samples import SamplesOrigin, read_origin
from ditmoe_cli.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class SamplePairs:
    """A file of samples of a checkpoint, one of its original's, and how the checkpoint's were sampled."""

    original: Path
    copy: Path
    spec: SampleSpec

    def picture(self, most: int) -> bytes:
        """Return the first pairs as PNG, the original's image (A) left of the copy's (B), with the class of each.

        Raises `BadInputError` where the images are latents, or of other sizes.
        """
        sides = [read_images(file).images[:most] for file in (self.original, self.copy)]
        return png_bytes(pair_grid(sides[0], sides[1], self.spec.labels(range(len(sides[0])))))


def pairs_of(files: Sequence[Path], checkpoint: Checkpoint) -> SamplePairs:
    """Return which of two files of samples holds a checkpoint's, and which those of one that it was made from.

    Raises `UsageError` for other than two files, and `BadInputError` where they are no samples, or of other checkpoints
    or seeds.
    """
    if len(files) != 2:
        raise UsageError(
            f"⟨samples⟩: takes two files, of the checkpoint and of its original, and {len(files)} are given"
        )
    sides = [(file, _origin(file)) for file in files]
    own = next((side for side in sides if side[1].model.fingerprint == checkpoint.fingerprint), None)
    if own is None:
        told = " and ".join(f"{file} of {origin.model.fingerprint[:12]}" for file, origin in sides)
        raise BadInputError(
            f"{checkpoint.path}: is {checkpoint.fingerprint[:12]}, and the samples are others' ({told}); give what "
            "ditmoe sample writes of this checkpoint"
        )
    other = next(side for side in sides if side is not own)
    (copy, ours), (original, theirs) = own, other
    if theirs.model.fingerprint not in (*checkpoint.ancestors, *checkpoint.teachers):
        raise BadInputError(
            f"{original}: holds samples of {theirs.model.fingerprint[:12]}, which {checkpoint.path} was not made from, "
            "by its history; give those of its original"
        )
    if not have_same_noise(ours.spec, theirs.spec, copies=are_copies(ours.model, theirs.model)):
        raise BadInputError(f"{original}: has other seeds, labels or settings than {copy}; sample both alike")
    return SamplePairs(original, copy, ours.spec)


def _origin(file: Path) -> SamplesOrigin:
    """Return what a file of samples records. Raises `BadInputError` for any other."""
    if not file.is_file():
        raise BadInputError(f"{file}: no such file")
    origin = read_origin(file)
    if origin is None:
        raise BadInputError(f"{file}: holds no samples of ditmoe; give what ditmoe sample writes")
    return origin
