"""Names of checkpoints on the Hugging Face hub: ``hf:OWNER/REPO/PATH@REVISION``, and short ones of published files.

Nothing here asks the hub: `ditmoe_cli.files.hub` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ditmoe_cli.errors import BadInputError

HUB_PREFIX = "hf:"
_DEFAULT_REVISION = "main"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOTS = "snapshots"  # as the hub's cache calls the folder of commits
_REPOSITORY_FOLDER = "models--"


@dataclass(frozen=True)
class Published:
    """A published file of DiT-MoE weights: its repository, its path there, the model's name and its size."""

    repository: str
    path: str
    model: str
    size: str


_AUTHORS = "feizhengcong/DiT-MoE"
PUBLISHED: Mapping[str, Published] = {
    "dit-moe-s": Published(_AUTHORS, "dit_moe_s_8E2A.pt", "DiT-MoE-S/2-8E2A", "0.80 GB"),
    "dit-moe-b": Published(_AUTHORS, "dit_moe_b_8E2A.pt", "DiT-MoE-B/2-8E2A", "3.18 GB"),
    "dit-moe-xl": Published(_AUTHORS, "dit_moe_xl_8E2A.pt", "DiT-MoE-XL/2-8E2A", "8.34 GB"),
    "dit-moe-g": Published(_AUTHORS, "dit_moe_g_16E2A.pt", "DiT-MoE-G/2-16E2A", "33.0 GB"),
}
"""The files that the authors of DiT-MoE published (https://huggingface.co/feizhengcong/DiT-MoE), by short name.

ditmoe has never run them: names and sizes are those of the repository's page.
"""


@dataclass(frozen=True)
class HubName:
    """A name taken apart.

    Attributes:
        text: the name as it was given.
        repository: ``OWNER/REPO``.
        path: of a file or folder in the repository; empty for the repository itself.
        revision: a branch, a tag, or a commit.
    """

    text: str
    repository: str
    path: str = ""
    revision: str = _DEFAULT_REVISION

    @property
    def commit(self) -> str | None:
        """The commit that the revision is; None for a branch or tag, which may move."""
        return self.revision if _COMMIT.fullmatch(self.revision) else None

    @property
    def folder(self) -> str:
        """The folder of the repository in the hub's cache."""
        return _REPOSITORY_FOLDER + self.repository.replace("/", "--")


def is_hub_name(text: str) -> bool:
    """Return whether a checkpoint is named on the hub."""
    return text.startswith(HUB_PREFIX)


def parse_hub_name(text: str) -> HubName:
    """Return the parts of a name. Raises `BadInputError` for a malformed one, or an unknown short one."""
    where, at, revision = text.removeprefix(HUB_PREFIX).rpartition("@")
    if not at:
        where, revision = revision, _DEFAULT_REVISION
    parts = [part for part in where.split("/") if part]
    if not _REVISION.fullmatch(revision) or {".", ".."} & {*parts, *revision.split("/")}:
        raise BadInputError(f"{text}: no name on the hub; {_form()}")
    if len(parts) == 1 and parts[0].lower() in PUBLISHED:
        known = PUBLISHED[parts[0].lower()]
        return HubName(text, known.repository, known.path, revision)
    if len(parts) < 2:
        raise BadInputError(f"{text}: no such published checkpoint; there is {_listed()}; {_form()}")
    if not all(_PART.fullmatch(part) for part in parts[:2]):
        raise BadInputError(f"{text}: no name on the hub; {_form()}")
    return HubName(text, "/".join(parts[:2]), "/".join(parts[2:]), revision)


def _listed() -> str:
    return ", ".join(HUB_PREFIX + name for name in PUBLISHED)


def _form() -> str:
    return f"others are {HUB_PREFIX}OWNER/REPO, or {HUB_PREFIX}OWNER/REPO/FILE@REVISION"


def told_name(path: Path) -> str:
    """Return the name of a file or folder to tell users and to name outputs after.

    It is the repository's for the folder of a commit in the hub's cache, which is called after the commit.
    """
    repository = _repository_of(path)
    return path.name if repository is None else repository.rpartition("--")[2]


def hub_name_of(path: Path) -> str | None:
    """Return the name on the hub of a file or folder in its cache, with its commit; None for any other."""
    folder = commit_folder(path)
    repository = None if folder is None else _repository_of(folder)
    if folder is None or repository is None:
        return None
    inside = path.relative_to(folder).as_posix()
    owner = repository.replace("--", "/", 1)
    return f"{HUB_PREFIX}{owner}{'' if inside == '.' else f'/{inside}'}@{folder.name}"


def commit_folder(path: Path) -> Path | None:
    """Return the folder of a commit in the hub's cache that a file or folder lies in; None for any other."""
    return next((folder for folder in (path, *path.parents) if _repository_of(folder) is not None), None)


def _repository_of(folder: Path) -> str | None:
    """Return the repository, ``OWNER--REPO``, of which the hub's cache keeps a commit in a folder; None for others."""
    repository = folder.parent.parent.name
    kept = folder.parent.name == _SNAPSHOTS and _COMMIT.fullmatch(folder.name)
    return repository.removeprefix(_REPOSITORY_FOLDER) if kept and repository.startswith(_REPOSITORY_FOLDER) else None
