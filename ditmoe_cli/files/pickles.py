"""State dicts in pickles, which are opened weights-only; averaged weights are preferred.

A pickle holds a bare state dict, or a mapping with one under some key, such as train.py's with its arguments in an
``argparse.Namespace``. Which tensors are the model's is told by their names (`ditmoe_cli.files.selection`).
"""

from __future__ import annotations

import mmap
import pickle
import re
import struct
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError, first_line, is_out_of_memory
from ditmoe_cli.files.archives import ArchiveParts, read_torch_archive
from ditmoe_cli.files.file_names import utf8_name
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.names import ROUTER, unwrapped
from ditmoe_cli.files.pickle_scan import PickleScan, UnknownCallError
from ditmoe_cli.files.selection import Entry, Selection, all_of, looks_averaged, select
from ditmoe_cli.files.shared_memory import shared_bytes

# where state dicts stand that are no DiT-MoE's, and so are not told by their names; in order of preference
_STATE_KEYS = ("ema", "model", "module", "state_dict")
_HINT_KEYS = (
    *("args", "config", "cfg", "hparams", "hyper_parameters", "model_args", "model_config", "model_kwargs"),
    *("configuration", "opts", "options"),
)
_OPTIMIZER = re.compile("opt|optim.*|.*optimizer.*|.*scheduler.*|scaler|.*rng.*", re.IGNORECASE)
_ARCHIVE = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # magic number, version, system, the object, and the keys of its storages
_WORD = 64  # bits of the largest numbers that are settings
_DEEPEST = 10  # of mappings in mappings: names whose parts are mappings have 8
_LISTED = 5


@dataclass(frozen=True)
class StateDict:
    """A state dict of a pickle.

    Attributes:
        tensors: the model's tensors by upstream name.
        layout: the name of the layout.
        hints: the training arguments beside it.
        notes, warnings: as of `Selection`.
        whole: the shapes that DeepSpeed notes of whole tensors, where it does.
    """

    tensors: Mapping[str, Any]
    layout: str
    hints: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_state_dict(path: Path) -> StateDict:
    """Open a pickle, memory-mapped where torch can, and return its state dict.

    Only tensors, arrays, plain values and ``argparse.Namespace`` are unpickled. Raises `BadInputError` for everything
    else.
    """
    return find_state_dict(_load(path), path)


def read_shards(paths: tuple[Path, ...]) -> StateDict:
    """Open the pickles that a state dict is divided over. Raises `BadInputError` where two hold one tensor."""
    parts = [_load(path) for path in paths]
    whole: dict[Any, Any] = {}
    for path, part in zip(paths, parts, strict=True):
        if not isinstance(part, Mapping):
            raise BadInputError(f"{path}: holds a {type(part).__name__}, not a part of a state dict")
        twice = whole.keys() & part.keys()
        if twice:
            raise BadInputError(f"{path}: tensor {min(map(str, twice))!r} stands in another shard too")
        whole.update(part)
    return find_state_dict(whole, paths[0])


def _load(path: Path) -> Any:
    import torch

    is_archive = _is_archive(path)  # pickles from before torch 1.6 are none, and cannot be mapped
    _check(path, is_archive)
    try:
        with (
            torch.serialization.safe_globals(_harmless()),
            warnings.catch_warnings(),
            utf8_name(path, unlike=".safetensors") as name,
        ):
            warnings.simplefilter("ignore")  # torch warns of pickle protocols before it refuses them
            try:
                return torch.load(name, map_location="cpu", weights_only=True, mmap=is_archive)
            except RuntimeError as error:
                if "unable to mmap" not in str(error):
                    raise
            with _mapped_read_only():
                return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _no_weights(path, unsafe[1] if unsafe else None) from None
    except PermissionError:
        raise
    except Exception as error:  # torch's unpickler raises all kinds of errors for bytes that are no pickle
        if is_out_of_memory(error):
            raise
        raise BadInputError(f"{path}: cannot be read as a checkpoint ({first_line(error)})") from None


@contextmanager
def _mapped_read_only() -> Iterator[None]:
    """Have torch map files of any size, whose tensors then cannot be written to.

    torch maps a file so that its tensors can be changed in memory. The system counts that as memory that may be needed,
    and refuses it for files larger than all that there is.
    """
    import torch

    original = torch.UntypedStorage.from_file

    def mapped(name: str, shared: bool, nbytes: int) -> torch.UntypedStorage:
        del shared
        with Path(name).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ))
        return shared_bytes(data).untyped_storage()

    torch.UntypedStorage.from_file = mapped  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.from_file = original  # type: ignore[method-assign]


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


def _check(path: Path, is_archive: bool) -> None:
    """Raise `BadInputError` for a pickle that would run code, or take more memory or time than its bytes justify."""
    try:
        if is_archive:
            archive = read_torch_archive(path)
            PickleScan(archive.pickle, partial(_stored_bytes, archive)).run()
            return
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            scan = PickleScan(data, _Room(len(data)).take)
            for _ in range(_LEGACY_PICKLES):
                scan.run()
    except UnknownCallError as error:
        raise _no_weights(path, str(error)) from None
    except (pickle.UnpicklingError, UnicodeDecodeError, AttributeError, LookupError, TypeError, struct.error):
        raise _no_weights(path, None) from None
    except ValueError as error:
        raise BadInputError(f"{path}: cannot be read as a checkpoint ({error})") from None


def _no_weights(path: Path, called: str | None) -> BadInputError:
    problem = f"holds {called.removeprefix('builtins.')}, which is not weights" if called else "is no checkpoint pickle"
    return BadInputError(
        f"{path}: {problem}; ditmoe opens pickles of plain tensors only (save the model's state_dict())"
    )


def _stored_bytes(archive: ArchiveParts, key: object, nbytes: int) -> int:
    if archive.storages.get(str(key)) != nbytes:
        raise ValueError(f"the storage {str(key)[:20]!r} has other than {nbytes} bytes")
    return nbytes


@dataclass
class _Room:
    """The bytes of a file that storages may still take, and those of each."""

    left: int
    taken: dict[str, int] = field(default_factory=dict)

    def take(self, key: object, nbytes: int) -> int:
        """Return the bytes of the storage of a key. Raises `ValueError` where the file has fewer."""
        if str(key) not in self.taken:
            self.left -= nbytes
            self.taken[str(key)] = nbytes
        if self.left < 0:
            raise ValueError("its tensors are larger than the file, which is cut short")
        return self.taken[str(key)]


def _harmless() -> list[Any]:
    """Return what may be unpickled besides tensors: training arguments, and numpy's arrays and numbers."""
    import numpy as np

    core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    named: list[Any] = [
        (getattr(core, name), f"numpy.{module}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for module in ("core", "_core")
    ]
    return [Namespace, np.ndarray, np.dtype, *dtypes, *named]


def find_state_dict(loaded: object, where: Path) -> StateDict:
    """Return the state dict of an unpickled object: the model's weights under any key, averaged ones where there are.

    Raises `BadInputError` where there is no state dict.
    """
    import torch

    if not isinstance(loaded, Mapping):
        raise BadInputError(f"{where}: holds a {type(loaded).__name__}, not a state dict")
    found = dict(_tensors(loaded, torch.is_tensor))
    try:
        selection = select(list(found)) or _by_key(found, loaded)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from None
    taken = {entry.path for entry in selection.entries.values()}
    keys = next(iter(selection.entries.values())).keys
    return StateDict(
        {name: found[entry] for name, entry in selection.entries.items()},
        _layout(loaded, selection, keys),
        _hints(loaded),
        selection.notes,
        (*selection.warnings, *_no_tensors(loaded, keys, torch.is_tensor), *_unread(loaded, taken | _routers(found))),
        _whole_shapes(loaded.get("param_shapes")),
    )


def _whole_shapes(groups: object) -> dict[str, tuple[int, ...]]:
    """Return the shapes in DeepSpeed's ``param_shapes``, a mapping for each group of parameters, by upstream name."""
    mappings = [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list | tuple) else []
    shapes = ((name, shape) for group in mappings for name, shape in group.items() if isinstance(shape, tuple))
    return {unwrapped(str(name))[0]: tuple(shape) for name, shape in shapes}


def _routers(found: Iterable[Entry]) -> set[str]:
    """Return the paths of all routers: `Selection` tells which sets of weights that have some are read."""
    return {entry.path for entry in found if unwrapped(entry.path)[0].endswith(ROUTER)}


def _tensors(value: Mapping[Any, Any], is_tensor: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[Entry, Any]]:
    """Yield all tensors of nested mappings, and arrays as tensors; optimizers are passed over.

    Lists of mappings, such as averages of several decays, count as mappings by position.
    """
    for key, item in value.items():
        if not isinstance(key, str):
            continue
        tensor = _bare(item) if is_tensor(item) else _from_array(item)
        if tensor is not None:
            yield Entry(keys, key, tuple(tensor.shape)), tensor
        elif len(keys) < _DEEPEST and not _OPTIMIZER.fullmatch(key):
            yield from _tensors(_inner(item), is_tensor, (*keys, key))


def _inner(value: object) -> Mapping[Any, Any]:
    """Return a mapping, or the mappings of a list by position; nothing of anything else."""
    if isinstance(value, list | tuple):
        return {str(place): item for place, item in enumerate(value) if isinstance(item, Mapping)}
    return value if isinstance(value, Mapping) else {}


def _bare(tensor: Any) -> Any:
    """Return a tensor without what a file may have set on it: methods of its own, signs that are yet to be turned."""
    import torch

    plain = torch.Tensor.detach(tensor)
    return plain.resolve_neg() if plain.is_neg() else plain


def _from_array(item: object) -> Any:
    """Return a numpy array as a tensor; None for anything else."""
    if type(item).__module__ != "numpy" or type(item).__name__ != "ndarray":
        return None
    import torch

    try:
        return torch.from_numpy(item)
    except (TypeError, ValueError):  # an array of text or objects, or of another byte order
        return None


def _by_key(found: Mapping[Entry, Any], loaded: Mapping[Any, Any]) -> Selection:
    """Return the tensors of the file itself, or under the first of the usual keys, which are no DiT-MoE's."""
    places = [entries for key in _STATE_KEYS if (entries := [e for e in found if e.keys == (key,)])]
    bare = [entry for entry in found if not entry.keys]
    if bare or places:
        return all_of(bare or places[0])
    keys = ", ".join(sorted(map(str, loaded)))[:80]
    raise BadInputError(f"no state dict under any of {', '.join(_STATE_KEYS)}; its keys are {keys}")


def _layout(loaded: Mapping[Any, Any], selection: Selection, keys: tuple[str, ...]) -> str:
    if not keys:
        return f"state dict, names under {selection.shown!r}" if selection.shown else "bare state dict"
    listed = sorted(map(str, loaded))
    others = ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "")
    return f"{selection.shown or '.'.join(keys)!r} of {{{others}}}"


def _no_tensors(loaded: Mapping[Any, Any], keys: tuple[str, ...], is_tensor: Any) -> list[str]:
    """Return what to say of the entries beside the weights that are no tensors."""
    mapping: Any = loaded
    for key in keys:
        mapping = _inner(mapping)[key]
    others = [
        f"{key!r} ({'None' if value is None else type(value).__name__})"
        for key, value in mapping.items()
        if not (is_tensor(value) or _from_array(value) is not None or isinstance(value, Mapping) or key in _HINT_KEYS)
    ]
    listed = ", ".join(others[:_LISTED]) + (f" and {len(others) - _LISTED} more" if len(others) > _LISTED else "")
    return [f"beside the weights, {listed} is no tensor and is left out"] if others else []


def _unread(loaded: Mapping[Any, Any], told_of: set[str], keys: tuple[str, ...] = ()) -> list[str]:
    """Return a warning for each key that looks like averaged weights, and holds no tensor of those `told_of`."""
    told = []
    for key, value in loaded.items():
        path = ".".join((*keys, str(key)))
        if not isinstance(value, Mapping | list | tuple) or _OPTIMIZER.fullmatch(str(key)):
            continue
        known = any(name.startswith(path + ".") for name in told_of)
        if looks_averaged(path) and not known and _holds_weights(value):
            told.append(f"{path!r} looks like averaged weights, but holds no DiT-MoE by name, and is not read")
        elif len(keys) < _DEEPEST:
            told += _unread(_inner(value), told_of, (*keys, str(key)))
    return told


def _holds_weights(value: object, depth: int = 0) -> bool:
    """Return whether tensors of any rank but 0 are in a value."""
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, list | tuple):
        items = list(value)
    else:
        return len(getattr(value, "shape", ())) > 0
    return depth < _DEEPEST and any(_holds_weights(item, depth + 1) for item in items)


def _hints(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Return training arguments, an argparse.Namespace or a mapping, and the plain numbers beside the weights."""
    values = {str(key): _plain(value) for key, value in loaded.items()}
    plain = {key: value for key, value in values.items() if isinstance(value, int | float)}
    found = {key: _mapping_of(loaded[key]) for key in _HINT_KEYS if _mapping_of(loaded.get(key))}
    if len(found) == 1:
        (only,) = found.values()
        return {**plain, **only}
    return {**plain, **found}


def _mapping_of(value: object) -> dict[str, Any]:
    if isinstance(value, Namespace):
        value = vars(value)
    elif isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value, finite=False)
        except ValueError:
            return {}
    if not isinstance(value, Mapping):
        return {}
    return {str(key): _mapping_of(item) or _plain(item) for key, item in value.items()}


def _plain(value: object) -> object:
    """Return plain values as they are, numbers of numpy's and tensors of one number as Python's, None for all else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, TypeError, ValueError):  # a tensor without data
            return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if type(value) is int and value.bit_length() > _WORD:
        return None
    return value if isinstance(value, bool | int | float | str) else None
