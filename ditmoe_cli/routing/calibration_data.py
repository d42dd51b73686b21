"""Images given for calibration, in the form that the model takes. Torch is imported only for the model inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.model.config import DiTMoEConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class CalibrationData:
    """The images of a file, their labels, and the file's path and digest.

    `stored` is uint8 (N, S, S, C), or float latents (N, C, S, S).
    """

    path: Path
    stored: NDArray[Any]
    labels: tuple[int, ...]
    digest: str

    @property
    def clean(self) -> Tensor:
        """The model inputs (N, C, S, S) in fp32."""
        import torch

        values = torch.from_numpy(self.stored.copy()).float()
        return values.permute(0, 3, 1, 2) / 127.5 - 1 if self.stored.dtype == "uint8" else values


def read_data(path: Path, config: DiTMoEConfig, images: int) -> CalibrationData:
    """Read the first `images` images of a file, or latents where the model works on latents.

    Images are uint8 values v (a folder of PNG, npz with `arr_0`, samples of ours) and become v / 127.5 - 1. Latents are
    `latents` of a safetensors file, as ``ditmoe sample`` writes them. Labels are `labels` beside them; without labels
    all are of the null class. Raises `BadInputError` where images are missing or of another size than the model's, for
    labels that the model does not have, and for images without labels where it has no null class.
    """
    from ditmoe_cli.evaluation.images import images_digest, read_images
    from ditmoe_cli.files.arrays import read_arrays

    if not path.exists() or (path.is_dir() and not config.pixel_space):
        raise BadInputError(f"{path}: no such file")
    if config.pixel_space:
        found = read_images(path)
        stored, labels = found.images[:images], found.labels
        shape = (stored.shape[3], *stored.shape[1:3])
    else:
        arrays = read_arrays(path, ("latents", "labels"))
        if "latents" not in arrays:
            raise BadInputError(
                f"{path}: holds no latents; this model works on latents of {config.in_channels} channels"
            )
        stored, labels = arrays["latents"][:images], arrays.get("labels")
        shape = stored.shape[1:]
    expected = (config.in_channels, config.input_size, config.input_size)
    if shape != expected:
        raise BadInputError(f"{path}: images are {shape}, the model takes {expected}")
    if labels is not None and (labels.dtype.kind not in "iu" or len(labels) < len(stored)):
        raise BadInputError(f"{path}: labels are {labels.dtype} of {labels.shape}; expected one integer for each image")
    if not len(stored):
        raise BadInputError(f"{path}: holds no image")
    if labels is None and not config.null_class:
        raise BadInputError(
            f"{path}: holds no labels, and the model has no null class for images without; store labels beside them"
        )
    given = labels if labels is not None else [config.num_classes] * len(stored)
    chosen = tuple(int(label) for label in given[:images])
    bad = next((label for label in chosen if not 0 <= label < config.label_rows), None)
    if bad is not None:
        null = ", and the null class after" if config.null_class else ""
        raise BadInputError(f"{path}: holds label {bad}; the model has classes 0 to {config.num_classes - 1}{null}")
    return CalibrationData(path, stored, chosen, images_digest(path))
