"""The containers that DiT-MoE checkpoints come in, told apart by their files and keys.

Pickles: a bare state dict; ``{ema|model|module|state_dict: ...}``; train.py's dictionary with an
``argparse.Namespace``; a DeepSpeed folder. safetensors: one file, or shards with an index, in a folder or in
the ``transformer`` folder of a diffusers pipeline. EMA weights are preferred.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError

_STATE_KEYS = ("ema", "model", "module", "state_dict")
_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Located:
    """The files that hold a checkpoint: safetensors shards, or one pickle, and the name of the layout."""

    layout: str
    shards: tuple[Path, ...] = ()
    pickle: Path | None = None


@dataclass(frozen=True)
class StateDict:
    """A state dict found in a pickle, the layout it was in, and what the pickle said beside it."""

    tensors: Mapping[str, Any]
    layout: str
    hints: Mapping[str, Any] = field(default_factory=dict)


def locate(path: Path) -> Located:
    """Find the files of the checkpoint at `path`. Raises `BadInputError` where there are none."""
    try:
        found = path.exists()
    except OSError as error:  # a name that no file can have
        raise BadInputError(f"{path}: {error.strerror}") from None
    if not found:
        raise BadInputError(f"{path}: no such file or folder")
    if path.is_dir():
        return _locate_in_folder(path)
    if not path.is_file():
        raise BadInputError(f"{path}: neither a file nor a folder")
    if path.name.endswith(_INDEX_SUFFIX):
        return _sharded(path)
    if path.suffix == ".safetensors":
        return Located("safetensors", shards=(path,))
    return Located("pickle", pickle=path)


def _locate_in_folder(folder: Path) -> Located:
    for root in (folder, folder / "transformer"):
        indices = sorted(root.glob(f"*{_INDEX_SUFFIX}"))
        singles = sorted(file for file in root.glob("*.safetensors") if file.is_file())
        if len(indices) == 1:
            return _sharded(indices[0])
        if not indices and len(singles) == 1:
            return Located("safetensors folder", shards=(singles[0],))
        if len(indices) > 1 or singles:
            raise BadInputError(f"{root}: holds {max(len(indices), len(singles))} checkpoints; name one of them")
    return _locate_deepspeed(folder)


def _locate_deepspeed(folder: Path) -> Located:
    latest = folder / "latest"
    step = folder / latest.read_text(errors="replace").strip() if latest.is_file() else folder
    states = sorted(step.glob("mp_rank_*_model_states.pt"))
    if len(states) > 1:
        raise BadInputError(f"{step}: holds {len(states)} model-parallel parts; consolidate them first")
    if not states:
        raise BadInputError(
            f"{folder}: no checkpoint here (looked for *.safetensors, *{_INDEX_SUFFIX}, transformer/ and "
            "DeepSpeed's mp_rank_00_model_states.pt)"
        )
    return Located("DeepSpeed folder", pickle=states[0])


def _sharded(index: Path) -> Located:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("weight_map must name files beside the index")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index}: not an index of safetensors shards ({error})") from None
    shards = tuple(index.parent / name for name in names)
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise BadInputError(f"{index}: shard {missing.name} is missing beside it")
    return Located("safetensors shards", shards=shards)


def find_state_dict(loaded: object, where: Path, is_tensor: Any) -> StateDict:
    """Find the state dict in an unpickled object, EMA first.

    `is_tensor(value)` tells tensors apart, so that this module needs no torch.
    """

    def tensors_of(value: object) -> dict[str, Any]:
        """Return the tensors of what may be a state dict, plain numbers beside them (an EMA's decay) left out."""
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
        found = ", ".join(sorted(map(str, loaded)))[:80]
        raise BadInputError(f"{where}: no state dict under any of {', '.join(_STATE_KEYS)}; its keys are {found}")
    others = sorted(str(k) for k in loaded if k in (*_STATE_KEYS, "opt", "args"))
    return StateDict(tensors_of(loaded[key]), f"{key!r} of {{{', '.join(others)}}}", _hints(loaded.get("args")))


def _hints(args: object) -> dict[str, Any]:
    """Return train.py's arguments (an argparse.Namespace or a dictionary) as a dictionary; nothing of anything else."""
    if isinstance(args, Namespace):
        return dict(vars(args))
    return dict(args) if isinstance(args, Mapping) else {}
