"""Statistics of features on disk: our safetensors, and the npz of pytorch-fid and ADM.

A safetensors file holds `mu` (D,) and `sigma` (D, D) in float64, `n` where it is known, and the extractor in its
metadata. An npz holds `mu` and `sigma`, as the other programs write and read it (others that spell these in other ways
are read too, see `statistics_spelling`); ours add `n` and the JSON ``ditmoe``,
which the others ignore. Either may hold `mu_s` and `sigma_s` too, those of spatial features, which ADM's reference
batches have for sFID. (ADM's hold reference images as `arr_0` besides, which `read_images` reads.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.errors import BadInputError, UsageError, first_line
from ditmoe_cli.evaluation.features.statistics_spelling import spelled
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics, check_moments
from ditmoe_cli.files.arrays import map_tensor, npz_names, read_document, read_npz, write_arrays, write_npz
from ditmoe_cli.files.fingerprint import canonical_json
from ditmoe_cli.files.header import is_safetensors, read_safetensors_header
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.provenance import check_schema

STATISTICS_SCHEMA = "ditmoe.statistics/1"

_IDENTITY = ("name", "digest", "preprocessing")  # equal in comparable features


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics of features, with what a file records of extractor and images.

    Attributes:
        statistics: of the features.
        extractor: its name, digest, preprocessing and grey levels; None where they are not recorded.
        spatial: statistics of the same images' spatial features, for sFID.
        source: kind, path, sampling and shape (H, W, C) of the images; only our files record them.
    """

    statistics: FeatureStatistics
    extractor: dict[str, Any] | None = None
    spatial: FeatureStatistics | None = None
    source: dict[str, Any] | None = None


def write_statistics(path: Path, stored: StoredStatistics, force: bool = False, inputs: Iterable[Path] = ()) -> int:
    """Write statistics as ``.safetensors`` or ``.npz``; return the bytes. Equal content, equal bytes.

    Raises `UsageError` for any other suffix.
    """
    statistics = stored.statistics
    arrays: dict[str, NDArray[Any]] = {
        "mu": np.asarray(statistics.mu, dtype=np.float64),
        "sigma": np.asarray(statistics.sigma, dtype=np.float64),
    }
    if stored.spatial is not None:
        arrays["mu_s"] = np.asarray(stored.spatial.mu, dtype=np.float64)
        arrays["sigma_s"] = np.asarray(stored.spatial.sigma, dtype=np.float64)
    if statistics.n is not None:
        arrays["n"] = np.asarray(statistics.n, dtype=np.int64)
    source = {"source": stored.source} if stored.source is not None else {}
    document = {"schema": STATISTICS_SCHEMA, "extractor": stored.extractor, **source}
    if path.suffix == ".safetensors":
        return write_arrays(path, arrays, document, force, inputs)
    if path.suffix == ".npz":
        return write_npz(path, {**arrays, "ditmoe": np.array(canonical_json(document))}, force, inputs)
    raise UsageError(f"{path}: statistics are written as .safetensors or .npz; name the file so")


def read_statistics(path: Path) -> StoredStatistics:
    """Read the statistics at `path`, with spatial ones where it has both `mu_s` and `sigma_s`.

    Raises `BadInputError` where they are no mean and covariance.
    """
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    arrays, document = _read_safetensors(path) if is_safetensors(path) else _read_npz(path)
    missing = next((name for name in ("mu", "sigma") if name not in arrays), None)
    if missing is not None:
        raise BadInputError(f"{path}: has no array {missing!r}; statistics hold mu and sigma")
    n = None if "n" not in arrays else _count(path, arrays["n"])
    statistics = _moments(path, arrays, ("mu", "sigma"), n)
    spatial = _moments(path, arrays, ("mu_s", "sigma_s"), n) if {"mu_s", "sigma_s"} <= arrays.keys() else None
    return StoredStatistics(statistics, _extractor(path, document), spatial, _source(path, document))


def _moments(
    path: Path, arrays: Mapping[str, NDArray[Any]], names: tuple[str, str], n: int | None
) -> FeatureStatistics:
    mu, sigma = (_floating(path, name, arrays[name]) for name in names)
    try:
        check_moments(mu, sigma, names)
    except BadInputError as error:
        raise BadInputError(f"{path}: {error}") from None
    return FeatureStatistics(mu, sigma, n)


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any] | None]:
    header = read_safetensors_header(path)
    arrays = {name: map_tensor(header.tensors[stored]) for name, stored in spelled(header.tensors, path).items()}
    return arrays, read_document(header, STATISTICS_SCHEMA, path)


def _read_npz(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any] | None]:
    spelling = spelled(npz_names(path), path)
    stored = read_npz(path, (*spelling.values(), "ditmoe"))
    text = stored.pop("ditmoe", None)
    arrays = {name: stored[spelled_so] for name, spelled_so in spelling.items()}
    if text is None:
        return arrays, None
    try:
        document = parse_json(str(text))
    except ValueError as error:
        raise BadInputError(f"{path}: the ditmoe metadata is not JSON ({first_line(error)})") from None
    return arrays, check_schema(document, STATISTICS_SCHEMA, f"{path}: ditmoe metadata")


def _floating(path: Path, name: str, array: NDArray[Any]) -> NDArray[np.float64]:
    if array.dtype.kind != "f":
        raise BadInputError(f"{path}: {name} has dtype {array.dtype}; it must be floating point")
    return array.astype(np.float64)


def _count(path: Path, array: NDArray[Any]) -> int:
    if array.size != 1 or array.dtype.kind not in "iu" or int(array.reshape(())) < 2:
        raise BadInputError(f"{path}: n is {array.tolist()!r}; it must be the number of images, at least 2")
    return int(array.reshape(()))


def _extractor(path: Path, document: Mapping[str, Any] | None) -> dict[str, Any] | None:
    extractor = None if document is None else document.get("extractor")
    if extractor is None:
        return None
    if not isinstance(extractor, dict) or not all(isinstance(extractor.get(key), str) for key in _IDENTITY):
        raise BadInputError(f"{path}: the extractor in its metadata lacks {', '.join(_IDENTITY)}")
    return extractor


def _source(path: Path, document: Mapping[str, Any] | None) -> dict[str, Any] | None:
    source = None if document is None else document.get("source")
    if source is None:
        return None
    shape = source.get("shape") if isinstance(source, dict) else None
    sampling, vae = (source.get(key) for key in ("sampling", "vae")) if isinstance(source, dict) else (0, 0)
    has_shape = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
    if not has_shape or not all(part is None or isinstance(part, dict) for part in (sampling, vae)):
        raise BadInputError(f"{path}: what its metadata says of the images is malformed")
    return dict(source)


def check_comparable(a: StoredStatistics, b: StoredStatistics, a_name: str, b_name: str) -> None:
    """Raise `BadInputError` where the features of two statistics differ in extractor or width.

    Statistics without a recorded extractor (npz of other programs) are checked for the width alone.
    """
    if a.extractor is not None and b.extractor is not None:
        for key in _IDENTITY:
            if a.extractor.get(key) != b.extractor.get(key):
                values = f"{a_name} has {a.extractor.get(key)!r}, {b_name} has {b.extractor.get(key)!r}"
                raise BadInputError(f"statistics of different extractors: {key} differs, {values}; make both with one")
    _check_widths(a.statistics, b.statistics, "features", a_name, b_name)
    if a.spatial is not None and b.spatial is not None:
        _check_widths(a.spatial, b.spatial, "spatial features", a_name, b_name)


def _check_widths(a: FeatureStatistics, b: FeatureStatistics, kind: str, a_name: str, b_name: str) -> None:
    if a.dimension != b.dimension:
        widths = f"{a_name} has {a.dimension} {kind}, {b_name} has {b.dimension}"
        raise BadInputError(f"statistics of different widths: {widths}; make both with one extractor")
