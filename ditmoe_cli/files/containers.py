"""The files of a checkpoint in each of its containers.

- one file, safetensors or pickle, told by its contents (`ditmoe_cli.files.kinds`); a pickle's state dict is chosen in
  `ditmoe_cli.files.pickles`
- shards, with an index or numbered ``NAME-00001-of-00002``, in a folder or in the ``transformer`` folder of a diffusers
  pipeline; variants such as ``NAME.fp16.safetensors`` stand beside the full weights
- DeepSpeed: a folder with ``mp_rank_00_model_states.pt``, or with ``latest``, which names the folder of a step
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ditmoe_cli.errors import BadInputError, first_line
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.json_text import read_file, read_json
from ditmoe_cli.files.kinds import kind_of_file
from ditmoe_cli.files.names import ROUTER
from ditmoe_cli.files.pipelines import MODEL_FOLDERS, scheduler_files
from ditmoe_cli.files.selection import looks_averaged

CONFIG = "config.json"
INDEX = re.compile(r"(?P<name>.+)\.(safetensors|bin)\.index(?P<variant>\.[\w-]+)?\.json")
_PICKLE_ENDINGS = ("bin", "pt", "pth", "ckpt")
# diffusers writes NAME.VARIANT-00001-of-00002, and wrote NAME-00001-of-00002.VARIANT
_WEIGHTS = re.compile(
    r"(?P<name>.+?)(?P<variant>\.(?:fp16|bf16|fp32|fp8|int8|non_ema|ema))?(?:-(?P<number>\d+)-of-(?P<count>\d+))?"
    rf"(?P<late>\.\w+)?\.(?P<ending>safetensors|{'|'.join(_PICKLE_ENDINGS)})"
)
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args).*|.*_states\.pt")
_LONGEST_NAME = 255  # bytes
_NAMED = 5
_MOST_CANDIDATES = 1000  # weights in a folder whose headers are read to choose between them
_LATEST = "latest"  # the file that names the folder of DeepSpeed's last step
_LOOKED_FOR = (
    "looked for *.safetensors, *.bin, *.pt, *.index.json, transformer/ and DeepSpeed's mp_rank_00_model_states.pt"
)
_ZERO = "zero_pp_rank_*_model_states.pt"


@dataclass(frozen=True)
class Located:
    """The files of a checkpoint, all safetensors or all pickles, and the name of their layout.

    Attributes:
        layout: the name of the layout.
        shards: safetensors files.
        pickles: pickles.
        config: the ``config.json`` beside them, where there is one.
        notes: which files were taken where there was a choice.
    """

    layout: str
    shards: tuple[Path, ...] = ()
    pickles: tuple[Path, ...] = ()
    config: Path | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Candidate:
    """Weights in a folder: their name and variant, and either their index or their files by number."""

    name: str
    variant: str
    index: Path | None = None
    count: int = 1
    files: dict[int, Path] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The name of the index or of the first file."""
        return (self.index or self.files[min(self.files)]).name

    @property
    def is_safetensors(self) -> bool:
        """Whether the names say safetensors, which stand before pickles of the same weights."""
        return ".safetensors" in self.shown


def locate(path: Path) -> Located:
    """Find the files of the checkpoint at `path`.

    Raises `BadInputError` where there are none, a shard is missing, a folder holds several checkpoints, or the files
    are of other kinds.
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
    if INDEX.fullmatch(path.name):
        return _indexed(path)
    return _located((path,), "safetensors", path.parent if _has_folder_name(path) else None)


def _has_folder_name(file: Path) -> bool:
    """Return whether a file of weights is called as those of a folder are, which a ``config.json`` describes."""
    match = _WEIGHTS.fullmatch(file.name)
    return match is not None and match["name"] in ("diffusion_pytorch_model", "model", "pytorch_model")


def stands_alone(file: Path) -> bool:
    """Return whether nothing beside a file is read with it, going by its name and folder."""
    return not INDEX.fullmatch(file.name) and not _has_folder_name(file) and file.parent.name not in MODEL_FOLDERS


def files_to_fetch(
    path: Path, listing: Sequence[Path], fetch: Callable[[Path], None]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return which files of a `listing` `locate` would read for `path`, and notes; none where `path` names none.

    The files are not here yet: `fetch` brings the small ones here that name others, such as an index.
    Raises `BadInputError` where a folder holds several checkpoints, or none.
    """
    if path in listing:
        is_of_folder = INDEX.fullmatch(path.name) or _has_folder_name(path)
        beside = _descriptions(path.parent)[0 if is_of_folder else 1 :]
        return _listed((*_with_shards(path, fetch), *beside), listing), ()
    files = [file for file in listing if path in file.parents]
    if not files:
        return (), ()
    candidates = {}
    for root in (path, *(path / name for name in MODEL_FOLDERS)):
        inside = [file for file in files if file.parent == root]
        for index in inside:
            _with_shards(index, fetch)
        if found := _candidates(inside):
            candidates[root] = found
    if not candidates:
        return _deepspeed_to_fetch(path, files, fetch), ()
    root, chosen, notes = _best(candidates)
    weights = _with_shards(chosen.index, fetch) if chosen.index is not None else tuple(chosen.files.values())
    return _listed((*weights, *_descriptions(root)), listing), notes


def _descriptions(folder: Path) -> tuple[Path, ...]:
    """Return the files that say what the weights in a folder are: its ``config.json``, then those of a pipeline."""
    return (folder / CONFIG, *(scheduler_files(folder) if folder.name in MODEL_FOLDERS else ()))


def _with_shards(file: Path, fetch: Callable[[Path], None]) -> tuple[Path, ...]:
    """Return a file, and where it is an index, which is fetched, the shards that it names too."""
    if not INDEX.fullmatch(file.name):
        return (file,)
    fetch(file)
    return (file, *(file.parent / name for name in shard_names(file)))


def _listed(files: Iterable[Path], listing: Sequence[Path]) -> tuple[Path, ...]:
    known = set(listing)
    return tuple(file for file in files if file in known)


def _deepspeed_to_fetch(folder: Path, files: Sequence[Path], fetch: Callable[[Path], None]) -> tuple[Path, ...]:
    """Return the files of a DeepSpeed folder that are read. Raises `BadInputError` where it is none."""
    latest = folder / _LATEST
    if latest in files:
        fetch(latest)
    step = _deepspeed_folder(folder) or folder
    states = tuple(file for file in files if file.parent == step and file.match("mp_rank_*_model_states.pt"))
    if not states:
        raise BadInputError(f"{folder}: no checkpoint here ({_LOOKED_FOR})")
    return (*_listed((latest,), files), *states)


def _located(files: tuple[Path, ...], layout: str, folder: Path | None, notes: tuple[str, ...] = ()) -> Located:
    """Return the files as safetensors or pickles, as their contents are; `layout` is that of safetensors."""
    kinds = {file: kind_of_file(file) for file in files}
    first = kinds[files[0]]
    other = next((file for file, kind in kinds.items() if kind != first), None)
    if other is not None:
        raise BadInputError(
            f"{other}: is a {kinds[other]} beside {files[0].name}, which is a {first}; keep one of both"
        )
    config = folder / CONFIG if folder is not None and (folder / CONFIG).is_file() else None
    if first == "safetensors":
        return Located(layout, shards=files, config=config, notes=notes)
    return Located(layout.replace("safetensors", "pickle"), pickles=files, config=config, notes=notes)


def _locate_in_folder(folder: Path) -> Located:
    subfolders = [folder / name for name in MODEL_FOLDERS if (folder / name).is_dir()]
    roots = {root: found for root in (folder, *subfolders) if (found := _candidates(_files_in(root)))}
    if not roots:
        step = _deepspeed_folder(folder)
        if step is not None:
            return _locate_deepspeed(folder, step)
        _refuse_distributed(folder)
        raise BadInputError(f"{folder}: no checkpoint here ({_LOOKED_FOR})")
    root, chosen, notes = _best(roots)
    if chosen.index is not None:
        return _indexed(chosen.index, notes)
    if chosen.count == 1:
        return _located(tuple(chosen.files.values()), "safetensors folder", root, notes)
    missing = list(islice((n for n in range(1, chosen.count + 1) if n not in chosen.files), _NAMED))
    if missing:
        raise BadInputError(
            f"{root}: shards without an index: {len(chosen.files)} of {chosen.count} are here, as {chosen.shown}; "
            f"number {', '.join(map(str, missing))} is missing"
        )
    files = tuple(chosen.files[number] for number in range(1, chosen.count + 1))
    return _located(files, "safetensors shards without an index", root, notes)


def _best(roots: Mapping[Path, list[_Candidate]]) -> tuple[Path, _Candidate, tuple[str, ...]]:
    """Return the folder to read of those with weights, the first; the weights to read there; and notes."""
    root = next(iter(roots))
    chosen, notes = _chosen(root, roots[root])
    if len(roots) > 1 and root.name == MODEL_FOLDERS[0]:
        notes = (*notes, f"the averaged weights are read, in {root.name}/, not those in {MODEL_FOLDERS[1]}/")
    return root, chosen, notes


def _files_in(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()]


def _candidates(inside: Iterable[Path]) -> list[_Candidate]:
    """Return the weights among the files of a folder: each index, numbered shards without one, and other files."""
    files = sorted(file for file in inside if not file.name.startswith("."))
    found = [
        _Candidate(match["name"], (match["variant"] or "").removeprefix("."), index=file)
        for file in files
        if (match := INDEX.fullmatch(file.name))
    ]
    taken = {name for candidate in found if candidate.index for name in shard_names(candidate.index)}
    loose: dict[tuple[str, str, str, int], _Candidate] = {}
    for file in files:
        match = _WEIGHTS.fullmatch(file.name)
        if match is None or file.name in taken or _NOT_WEIGHTS.fullmatch(file.name):
            continue
        name, variant = match["name"] + (match["late"] or "" if not match["count"] else ""), match["variant"] or ""
        variant = (variant or (match["late"] or "" if match["count"] else "")).removeprefix(".")
        count, number = int(match["count"] or 1), int(match["number"] or 1)
        key = (name, variant, "safetensors" if match["ending"] == "safetensors" else "pickle", count)
        loose.setdefault(key, _Candidate(name, variant, count=count)).files[number] = file
    found += loose.values()
    return found


def _with_routers(candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the safetensors candidates whose headers name a router: samples and profiles of ours have none."""

    def has_router(candidate: _Candidate) -> bool:
        files: Iterable[Path] = candidate.files.values()
        if candidate.index is not None:
            files = (candidate.index.parent / name for name in shard_names(candidate.index))
        for file in files:
            try:
                if any(name.endswith(ROUTER) for name in read_safetensors_header(file).tensors):
                    return True
            except (BadInputError, OSError):
                return True  # let the reader say what is wrong with it
        return False

    return [candidate for candidate in candidates if has_router(candidate)]


def _chosen(folder: Path, candidates: list[_Candidate]) -> tuple[_Candidate, tuple[str, ...]]:
    """Return the weights to read, and a note where others stand beside them.

    Safetensors stand before pickles. Of one name, the averaged weights are read, else the full ones, and not their
    variants.
    """
    kept = [candidate for candidate in candidates if candidate.is_safetensors]
    if 1 < len(kept) <= _MOST_CANDIDATES:
        kept = _with_routers(kept) or kept
    kept = kept or candidates
    names = {candidate.name for candidate in kept}
    best = (
        kept[0] if len(kept) == 1 else next((c for variant in ("ema", "") for c in kept if c.variant == variant), None)
    )
    if len(names) > 1 or best is None or sum(c.variant == best.variant for c in kept) > 1:
        listed = ", ".join(candidate.shown for candidate in kept[:3]) + (", …" if len(kept) > 3 else "")
        raise BadInputError(f"{folder}: holds {len(kept)} checkpoints ({listed}); name one of them")
    others = [c.shown for c in candidates if c is not best and (c in kept or looks_averaged(c.shown))]
    return best, (f"{best.shown} is read, not {', '.join(others)} beside it",) if others else ()


def _deepspeed_folder(folder: Path) -> Path | None:
    """Return the folder of a DeepSpeed step: `folder` itself, or the one that ``latest`` names; None for none."""
    latest = folder / _LATEST
    if latest.is_file():
        try:
            name = read_file(latest, _LONGEST_NAME).decode().strip()
        except ValueError as error:
            raise BadInputError(f"{latest}: names no folder beside it ({first_line(error)})") from None
        if not is_name(name):
            raise BadInputError(f"{latest}: names {name!r}, which is no folder beside it")
        return folder / name
    has_states = any(folder.glob("mp_rank_*_model_states.pt")) or any(folder.glob(_ZERO))
    return folder if has_states else None


def _locate_deepspeed(folder: Path, step: Path) -> Located:
    states = sorted(file for file in step.glob("mp_rank_*_model_states.pt") if file.is_file())
    parts = sorted(step.glob(_ZERO))
    if len(states) > 1:
        raise BadInputError(f"{step}: holds {len(states)} model-parallel parts; consolidate them first")
    if parts and not states:
        raise BadInputError(
            f"{step}: {len(parts)} ZeRO-3 shards, each with a part of every weight; " + consolidation(step)
        )
    if not states:
        raise BadInputError(f"{folder}: no checkpoint here: {step.name or 'its latest step'} holds no model states")
    return _located((states[0],), "DeepSpeed folder", folder)


def consolidation(step: Path) -> str:
    """Return the command of DeepSpeed's script that puts the shards of a step together, and what to do next."""
    run, script = step.parent, step.parent / "zero_to_fp32.py"
    program = shlex.quote(str(script)) if script.is_file() else "-m deepspeed.utils.zero_to_fp32"
    whole = f"{run}-fp32"
    command = f"python {program} {shlex.quote(str(run))} {shlex.quote(whole)} -t {shlex.quote(step.name)}"
    return f"put them together first with {command}, and name {whole}"


def _refuse_distributed(folder: Path) -> None:
    """Raise `BadInputError` for the folders of torch's distributed and of DeepSpeed's universal checkpoints."""
    distributed = next((child for child in (folder, *sorted(folder.iterdir())) if _is_distributed(child)), None)
    if distributed is not None:
        raise BadInputError(
            f"{distributed}: shards of a distributed checkpoint (FSDP); put them together first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {distributed} {distributed}.pt"
        )


def _is_distributed(folder: Path) -> bool:
    return folder.is_dir() and ((folder / ".metadata").is_file() or any(folder.glob("*.distcp")))


def shard_names(index: Path) -> list[str]:
    """Return the names of an index's shards. Raises `BadInputError` where it is malformed."""
    try:
        document = read_json(index)
        names = sorted(set(document["weight_map"].values()))
        if not names or not all(isinstance(name, str) and is_name(name) for name in names):
            raise ValueError("weight_map must name files beside the index")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index}: not an index of shards ({first_line(error)})") from None
    return names


def is_name(text: str) -> bool:
    """Return whether a text is the name of a file in a folder: no path, and nothing that the system does not take."""
    is_plain = Path(text).name == text and text not in ("", "..") and text.isprintable()
    return is_plain and len(os.fsencode(text)) <= _LONGEST_NAME


def _indexed(index: Path, notes: tuple[str, ...] = ()) -> Located:
    shards = tuple(index.parent / name for name in shard_names(index))
    missing = next((shard for shard in shards if not shard.is_file()), None)
    if missing is not None:
        raise BadInputError(f"{index}: shard {missing.name} is missing beside it")
    return _located(shards, "safetensors shards", index.parent, notes)
