"""Folders of diffusers pipelines: a model's weights in ``transformer/``, and beside it what samples them.

The diffusers port of DiT-MoE (github.com/Bili-Sakura/DiT-MoE-diffusers) keeps upstream's tensor names. Its
``transformer/config.json`` has the arguments of the model, and ``scheduler/scheduler_config.json`` tells by its class
whether that is a rectified flow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.json_text import read_json

MODEL_FOLDERS = ("transformer_ema", "transformer")  # averaged weights first
SCHEDULER = "pipeline_scheduler"  # the hint of a scheduler's class
_INDEX, _SCHEDULER_CONFIG = "model_index.json", Path("scheduler", "scheduler_config.json")


def pipeline_hints(weights: Path) -> dict[str, str]:
    """Return the hint of the scheduler's class for a file of weights in a pipeline's model folder; none elsewhere."""
    if weights.parent.name not in MODEL_FOLDERS:
        return {}
    config, index = scheduler_files(weights.parent)
    name = _document(config).get("_class_name")
    if not isinstance(name, str):
        entry = _document(index).get("scheduler")
        name = entry[-1] if isinstance(entry, list) and entry else None
    return {SCHEDULER: name} if isinstance(name, str) else {}


def scheduler_files(folder: Path) -> tuple[Path, Path]:
    """Return the files that tell the scheduler of the pipeline around a model folder."""
    return folder.parent / _SCHEDULER_CONFIG, folder.parent / _INDEX


def model_folder(path: Path) -> Path:
    """Return the folder of the model's weights in a pipeline's folder `path`, which may also be that folder itself.

    Raises `BadInputError` where `path` is no folder of a pipeline.
    """
    if path.name in MODEL_FOLDERS and path.is_dir():
        return path
    found = next((path / name for name in MODEL_FOLDERS if (path / name).is_dir()), None)
    if found is None:
        raise BadInputError(
            f"{path}: is no folder of a diffusers pipeline, with its weights in transformer/; leave ⟨from_diffusers⟩ "
            "out, which reads any layout"
        )
    return found


def pipeline_folder(path: Path) -> Path | None:
    """Return the folder of the pipeline that a folder is, or whose model folder it is; None for any other."""
    folders = (path, path.absolute().parent) if path.name in MODEL_FOLDERS else (path,)
    return next((folder for folder in folders if (folder / _INDEX).is_file()), None)


def _document(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is none that can be read, since weights do not depend on it."""
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
