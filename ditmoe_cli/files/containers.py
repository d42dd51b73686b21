"""The files of a checkpoint in each of its containers.

- safetensors: one file; or shards with an index, in a folder or in the ``transformer`` folder of a diffusers pipeline
- pickle: one file (its state dict is chosen in `ditmoe_cli.files.pickles`)
- DeepSpeed: a folder with ``mp_rank_00_model_states.pt``, or with ``latest``, which names the folder of a step
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.errors import BadInputError

_INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Located:
    """The files of a checkpoint, safetensors shards or one pickle, and the name of their layout."""

    layout: str
    shards: tuple[Path, ...] = ()
    pickle: Path | None = None


def locate(path: Path) -> Located:
    """Find the files of the checkpoint at `path`.

    Raises `BadInputError` where there are none, a shard is missing, or a folder holds several checkpoints.
    """
    try:
        exists = path.exists()
    except OSError as error:  # a name that the file system does not allow
        raise BadInputError(f"{path}: {error.strerror}") from None
    if not exists:
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
