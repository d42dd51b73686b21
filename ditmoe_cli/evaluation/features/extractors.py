"""Feature extractors, from images to the features that distances compare.

``pixels`` needs no weights, ``inception`` is the network of FID, and ``package.module:factory`` names any other: the
factory is called without arguments and returns a callable from uint8 images (N, H, W, C) to an array (N, D).
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, UsageError, first_line
from ditmoe_cli.evaluation.images import ImageSet
from ditmoe_cli.evaluation.scores.conventions import PRECISIONS, PREPROCESSINGS
from ditmoe_cli.evaluation.scores.feature_statistics import Array

if TYPE_CHECKING:
    from ditmoe_cli.evaluation.features.inception import Inception

EXTRACTORS = ("pixels", "inception")
# activations that only Inception has beside features, and the score that needs them
EXTRAS = {"spatial": "sFID", "logits": "the Inception score", "biased_logits": "the Inception score with bias"}
GRID = 8
BATCH = 64

_CUSTOM = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")

Images = NDArray[np.uint8]


class Extractor(Protocol):
    """A map from uint8 images (N, H, W, C) to float64 features (N, D); name, digest and preprocessing identify it."""

    @property
    def name(self) -> str:
        """Name that the user gives."""

    @property
    def digest(self) -> str:
        """Hash of the weights, or the parameters: differs where the features differ."""

    @property
    def preprocessing(self) -> str:
        """Preprocessing of the images, in words."""

    def __call__(self, images: Images) -> Array:
        """Return the features of `images`."""


@dataclass(frozen=True)
class PixelExtractor:
    """Grey levels of the image, area-averaged to at most 8x8 per channel."""

    grey_levels: int
    name: str = field(default="pixels", init=False)

    @property
    def digest(self) -> str:
        """Size of the grid and grey levels."""
        return f"pixels-{GRID}x{GRID}-levels{self.grey_levels}"

    @property
    def preprocessing(self) -> str:
        """Preprocessing of the images, in words."""
        return f"area average to at most {GRID}x{GRID}, grey levels 0..{self.grey_levels}"

    def __call__(self, images: Images) -> Array:
        """Return features (N, h·w·C), h and w being the sides of the image, at most 8."""
        return averaged(images.astype(np.float64) * (self.grey_levels / 255))


def averaged(values: Array) -> Array:
    """Return values (N, H, W, C) area-averaged to at most 8 x 8 per channel, (N, h·w·C)."""
    rows, columns = (area_weights(side, min(side, GRID)) for side in values.shape[1:3])
    cells = np.einsum("ih,nhwc,jw->nijc", rows, values, columns, optimize=True)
    return np.ascontiguousarray(cells).reshape(len(values), -1)


def area_weights(length: int, cells: int) -> Array:
    """Return (cells, length) weights that average `length` pixels over `cells` equal intervals; rows sum to one.

    A pixel that straddles two cells counts in both, by the share that lies in each.
    """
    width = length / cells
    edges = np.arange(cells + 1) * width
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights: Array = overlap.clip(min=0.0) / width
    return weights


@dataclass(frozen=True)
class Activations:
    """Activations of N images: features (N, D), and where asked for spatial (N, 2023) and logits (N, 1008)."""

    features: Array
    spatial: Array | None = None
    logits: Array | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class InceptionExtractor:
    """Activations of FID's InceptionV3, `batch` images at a time.

    `recipe` is one of `PREPROCESSINGS`, `precision` one of `PRECISIONS`; bf16 computes convolutions in bf16, the last
    pool and the logits in fp32.
    """

    module: Inception
    digest: str
    device: str
    batch: int = BATCH
    recipe: str = "tf1"
    precision: str = "fp32"
    name: str = field(default="inception", init=False)

    @property
    def preprocessing(self) -> str:
        """Preprocessing of the images, in words, and the precision where it is not fp32."""
        return PREPROCESSINGS[self.recipe] + ("" if self.precision == "fp32" else f"; {self.precision}")

    def __call__(self, images: Images) -> Array:
        """Return features (N, 2048)."""
        return self.activations(images).features

    def activations(self, images: Images, extras: Collection[str] = ()) -> Activations:
        """Return features and the `extras`, names of `EXTRAS`. Raises `UsageError` as `check_extras` does."""
        import torch

        check_extras(self, extras)
        pools, spatials, logits = [], [], []
        autocast = torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode():
            for start in range(0, len(images), self.batch):
                # a copy, since torch must not wrap arrays that are mapped read-only
                part = torch.from_numpy(images[start : start + self.batch].copy()).to(self.device)
                with autocast:
                    pool, spatial = self.module.pool_and_spatial(part, self.recipe)
                pools.append(pool.double().cpu().numpy())
                if "spatial" in extras:
                    spatials.append(spatial.double().cpu().numpy())
                if "logits" in extras or "biased_logits" in extras:
                    logits.append(self.module.logits(pool, "biased_logits" in extras).double().cpu().numpy())
        return Activations(np.concatenate(pools), _joined(spatials), _joined(logits))


def _joined(parts: list[Array]) -> Array | None:
    return np.concatenate(parts) if parts else None


@dataclass(frozen=True)
class CustomExtractor:
    """A user's own callable, whose output is checked.

    `stable` is True where equal digests mean equal features, that is, where the function has a digest of its own: a
    hash of its source does not cover the weights that it loads.
    """

    name: str
    digest: str
    preprocessing: str
    function: Callable[[Images], Any]
    stable: bool = False

    def __call__(self, images: Images) -> Array:
        """Return its features (N, D). Raises `BadInputError` where it fails or returns another shape or NaN."""
        try:
            features = np.asarray(self.function(images), dtype=np.float64)
        except Exception as error:
            raise BadInputError(f"extractor {self.name} failed: {_described(error)}") from error
        if features.ndim != 2 or len(features) != len(images) or not features.size:
            raise BadInputError(f"extractor {self.name} returned shape {features.shape}, expected ({len(images)}, D)")
        if not np.isfinite(features).all():
            raise BadInputError(f"extractor {self.name} returned NaN or infinite features")
        return features


@dataclass(frozen=True)
class NamedExtractor:
    """The extractor that statistics record, where no features are taken."""

    name: str
    digest: str
    preprocessing: str

    def __call__(self, images: Images) -> Array:
        """Raise `UsageError`, since only the name is known."""
        raise UsageError(f"{len(images)} images, but the features {self.name!r} are known by statistics only")


def check_extractor_name(spec: str) -> None:
    """Raise `UsageError` for names that are neither an extractor nor ``package.module:factory``."""
    if spec not in EXTRACTORS and not _CUSTOM.match(spec):
        raise UsageError(f"unknown extractor {spec!r}; choose {', '.join(EXTRACTORS)} or package.module:factory")


def make_extractor(
    spec: str,
    *,
    grey_levels: int = 255,
    weights: Path | None = None,
    device: str = "cpu",
    preprocessing: str = "tf1",
    precision: str = "fp32",
) -> Extractor:
    """Return the extractor that `spec` names.

    `grey_levels` is for ``pixels``; `weights`, `device`, `preprocessing` and `precision` are for ``inception``. Raises
    `UsageError` for unknown names and modules, `BadInputError` where weights are missing or a factory fails.
    """
    check_extractor_name(spec)
    for setting, value, known in (
        ("preprocessing", preprocessing, PREPROCESSINGS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in known:
            raise UsageError(f"unknown {setting} {value!r}; choose {', '.join(known)}")
    if spec == "pixels":
        return PixelExtractor(grey_levels)
    if spec == "inception":
        from ditmoe_cli.evaluation.features.inception import load_inception

        module, digest = load_inception(weights)
        return InceptionExtractor(module.to(device), digest, device, recipe=preprocessing, precision=precision)
    return _custom(spec)


def _custom(spec: str) -> CustomExtractor:
    module_name, _, attribute = spec.partition(":")
    module = _import(spec, module_name)
    factory = getattr(module, attribute, None)
    if factory is None:
        raise UsageError(f"extractor {spec}: module {module_name} has no {attribute!r}")
    if not callable(factory):
        raise UsageError(f"extractor {spec}: {attribute!r} is a {type(factory).__name__}, not a factory to call")
    try:
        function = factory()
    except Exception as error:
        raise BadInputError(f"extractor {spec}: the factory failed: {_described(error)}") from error
    if not callable(function):
        kind = type(function).__name__
        raise BadInputError(f"extractor {spec}: the factory returned a {kind}, not a function of images")
    digest = getattr(function, "digest", None)
    preprocessing = getattr(function, "preprocessing", None)
    return CustomExtractor(
        name=spec,
        digest=digest if isinstance(digest, str) else _source_digest(module, spec),
        preprocessing=preprocessing if isinstance(preprocessing, str) else "its own",
        function=function,
        stable=isinstance(digest, str),
    )


def _import(spec: str, module_name: str) -> ModuleType:
    """Import a module, also from the working directory, which is not on a console script's path."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"extractor {spec}: cannot import {module_name}: {_described(error)}") from error


def _source_digest(module: ModuleType, spec: str) -> str:
    """Return the SHA-256 of the module's source file; of `spec` where a module has no file."""
    source = getattr(module, "__file__", None)
    return hashlib.sha256(Path(source).read_bytes() if source else spec.encode()).hexdigest()


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def describe_extractor(extractor: Extractor, grey_levels: int) -> dict[str, Any]:
    """Return the description of an extractor that statistics carry, as JSON."""
    return {
        "name": extractor.name,
        "digest": extractor.digest,
        "preprocessing": extractor.preprocessing,
        "grey_levels": grey_levels,
    }


def check_extras(extractor: Extractor, extras: Collection[str]) -> None:
    """Raise `UsageError`, which names the score, for extras that `extractor` does not have.

    `extras` holds names of `EXTRAS`.
    """
    unknown = [name for name in extras if name not in EXTRAS]
    if unknown:
        raise UsageError(f"unknown activations {', '.join(unknown)}; choose {', '.join(EXTRAS)}")
    if "logits" in extras and "biased_logits" in extras:
        raise UsageError("logits are taken with the bias or without it; choose logits or biased_logits")
    if isinstance(extractor, InceptionExtractor):
        return
    score = next((score for name, score in EXTRAS.items() if name in extras), None)
    if score is not None:
        raise UsageError(f"{score} needs ⟨extractor⟩ inception; {extractor.name} gives features only")


def activations(
    extractor: Extractor,
    image_set: ImageSet,
    extras: Collection[str] = (),
    batch: int = BATCH,
) -> Activations:
    """Return features of all images and the `extras`, names of `EXTRAS`, in one pass of `batch` images at a time.

    Raises `UsageError` as `check_extras` does, `BadInputError` where the width of the features changes between batches.
    """
    check_extras(extractor, extras)
    parts: list[Activations] = []
    for start in range(0, len(image_set), batch):
        images = image_set.images[start : start + batch]
        if isinstance(extractor, InceptionExtractor):
            part = extractor.activations(images, extras)
        else:
            part = Activations(extractor(images))
        if parts and part.features.shape[1] != parts[0].features.shape[1]:
            widths = f"{parts[0].features.shape[1]}, then {part.features.shape[1]}"
            raise BadInputError(f"extractor {extractor.name} returned features of width {widths}")
        parts.append(part)
    return Activations(
        np.concatenate([part.features for part in parts]),
        _joined([part.spatial for part in parts if part.spatial is not None]),
        _joined([part.logits for part in parts if part.logits is not None]),
    )
