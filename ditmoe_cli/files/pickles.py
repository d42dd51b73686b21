"""State dicts in pickles, which are opened weights-only; EMA weights are preferred.

A pickle holds a bare state dict, ``{ema|model|module|state_dict: ...}``, or train.py's dictionary with its arguments in
an ``argparse.Namespace``.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.file_names import utf8_name

_STATE_KEYS = ("ema", "model", "module", "state_dict")  # in order of preference


@dataclass(frozen=True)
class StateDict:
    """A state dict of a pickle, the name of its layout, and `hints`, the training arguments beside it."""

    tensors: Mapping[str, Any]
    layout: str
    hints: Mapping[str, Any] = field(default_factory=dict)


def read_state_dict(path: Path) -> StateDict:
    """Open a pickle, memory-mapped where torch can, and return its state dict.

    Only tensors, plain values and ``argparse.Namespace`` are unpickled. Raises `BadInputError` for everything else.
    """
    import pickle

    import torch

    try:
        with utf8_name(path) as name, torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols before it refuses them
            try:
                loaded = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError) as error:
                if "mmap" not in str(error):
                    raise
                loaded = torch.load(
                    name, map_location="cpu", weights_only=True
                )  # pickles from before torch 1.6 are no zip archives
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)", str(error))
        problem = f"holds {unsafe[1]}, which is not weights" if unsafe else "is not a checkpoint pickle"
        raise BadInputError(f"{path}: {problem}; ditmoe opens pickles of plain tensors only") from None
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # torch's unpickler raises all kinds of errors for bytes that are no pickle
        raise BadInputError(f"{path}: cannot be read as a checkpoint ({first_line(error)})") from None
    return find_state_dict(loaded, path, torch.is_tensor)


def find_state_dict(loaded: object, where: Path, is_tensor: Any) -> StateDict:
    """Return the state dict of an unpickled object: itself, or the first of ``ema|model|module|state_dict``.

    `is_tensor(value)` recognises tensors. Raises `BadInputError` where there is no state dict, and where ``ema`` holds
    more than tensors and numbers.
    """

    def tensors_of(value: object) -> dict[str, Any]:
        """Return the tensors of a state dict without the numbers beside them (an EMA's decay); {} for anything else."""
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return {}
        tensors = {key: entry for key, entry in value.items() if is_tensor(entry)}
        rest = [entry for key, entry in value.items() if key not in tensors]
        return tensors if all(isinstance(entry, int | float) for entry in rest) else {}

    if tensors_of(loaded):
        return StateDict(tensors_of(loaded), "bare state dict")
    if not isinstance(loaded, Mapping):
        raise BadInputError(f"{where}: holds a {type(loaded).__name__}, not a state dict")
    if loaded.get("ema") and not tensors_of(loaded["ema"]):
        raise BadInputError(f"{where}: 'ema' holds more than tensors and numbers; save its state dict alone")
    key = next((k for k in _STATE_KEYS if tensors_of(loaded.get(k))), None)
    if key is None:
        keys = ", ".join(sorted(map(str, loaded)))[:80]
        raise BadInputError(f"{where}: no state dict under any of {', '.join(_STATE_KEYS)}; its keys are {keys}")
    others = sorted(str(k) for k in loaded if k in (*_STATE_KEYS, "opt", "args"))
    return StateDict(tensors_of(loaded[key]), f"{key!r} of {{{', '.join(others)}}}", _hints(loaded.get("args")))


def _hints(args: object) -> dict[str, Any]:
    """Return train.py's arguments, an argparse.Namespace or a mapping, as a dictionary; {} for anything else."""
    if isinstance(args, Namespace):
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}
