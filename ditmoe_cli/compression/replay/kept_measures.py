"""Measurements that are kept beside the profile that they rest on, and used again by later plans.

``NAME.measured.json`` beside the profile ``NAME.safetensors`` holds JSON by part and name: errors of formats,
amplifications, trials of mixes, choices of experts. It is bound to a key, the digest of all that measurements depend
on: checkpoint, profile, this package's version, and how this machine computes. With another key, or where its digest
shows that it was changed, it is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditmoe_cli.errors import BadInputError, DitmoeError, OutputExistsError
from ditmoe_cli.files.fingerprint import digest
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.provenance import check_schema
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.workfolder import WorkFolder, open_work, work_key
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.routing.profile import RoutingProfile

MEASURED_SCHEMA = "ditmoe.measured/3"  # 3: errors of the time embedding are measured by the prediction


@dataclass(frozen=True)
class KeptMeasures:
    """The measurements kept at `path` under `key`; `note` takes lines on what is used again."""

    path: Path
    key: str
    note: Callable[[str], None]

    def part(self, name: str) -> dict[str, Any]:
        """Return the measurements of a part by name; none where the file is absent, damaged or of another key."""
        part = self._document().get(name, {})
        return part if isinstance(part, dict) else {}

    def add(self, name: str, measured: Mapping[str, Any]) -> None:
        """Keep more measurements of a part. Where the folder cannot be written, says so and goes on."""
        document = self._document()
        document[name] = {**document.get(name, {}), **measured}
        signed = {"schema": MEASURED_SCHEMA, "key": self.key, "digest": _digest(document), **document}
        try:
            with staged(self.path.absolute(), force=True) as path:  # several runs may measure at once
                path.write_text(json.dumps(signed, indent=1, sort_keys=True))
        except (DitmoeError, OSError) as error:
            self.note(f"measurements are not kept: {error}")

    @contextmanager
    def working(self, request: Mapping[str, Any]) -> Iterator[WorkFolder | None]:
        """Yield the work folder of a measurement; None where another run measures, or nothing can be written there."""
        with ExitStack() as stack:
            try:
                key = work_key({"measured": self.key, **request})
                work = stack.enter_context(open_work(self.path, key, self.note))
            except (OutputExistsError, OSError) as error:
                self.note(f"measuring without keeping what is done: {error}")
                yield None
                return
            yield work

    def _document(self) -> dict[str, Any]:
        try:
            document = check_schema(read_json(self.path), MEASURED_SCHEMA, str(self.path))
        except (OSError, ValueError, BadInputError):
            return {}
        del document["schema"]
        key, written = document.pop("key", None), document.pop("digest", None)
        return document if key == self.key and written == _digest(document) else {}


def _digest(document: Mapping[str, Any]) -> str:
    return digest(json.dumps(document, sort_keys=True))


def kept_blocks(work: WorkFolder, name: str, total: int) -> str | None:
    """Return what is kept of a walk over the blocks in the piece `name`, as people read it."""
    piece = work.read(name)
    return f"kept {piece.document['blocks']} of {total} blocks; the same command goes on" if piece else None


def kept_measures(
    checkpoint: Checkpoint, profile: RoutingProfile, device: str, note: Callable[[str], None]
) -> KeptMeasures:
    """Return what was measured of a checkpoint with a profile on this machine."""
    key = {
        "schema": MEASURED_SCHEMA,
        "checkpoint": checkpoint.fingerprint,
        "profile": profile.digest,
        "arithmetic": _arithmetic(device),
    }
    return KeptMeasures(profile.path.with_suffix(".measured.json"), work_key(key), note)


def _arithmetic(device: str) -> dict[str, Any]:
    """Return what the last bits of results depend on: the device, the number of threads, and torch."""
    import torch

    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
