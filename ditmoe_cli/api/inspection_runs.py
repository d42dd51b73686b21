"""What a checkpoint is, and what differs in another one: looked at, with a model card where one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditmoe_cli.api.card_contents import CardContents
from ditmoe_cli.api.checkpoint_facts import (
    NameOf,
    comparison_json,
    describe,
    describe_tensors,
    measured_distances,
    stored_tensors,
    verification_json,
)
from ditmoe_cli.api.notes import note
from ditmoe_cli.briefs import Brief, Fact
from ditmoe_cli.compression.recipe import recipe_of
from ditmoe_cli.errors import BadInputError, UsageError, as_argument
from ditmoe_cli.files.integrity import require_whole
from ditmoe_cli.files.reader import CheckpointHeader, TensorReader, open_reader
from ditmoe_cli.files.staging import check_target, staged
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.checkpoint_differences import Differences, differences
from ditmoe_cli.model.config import Given
from ditmoe_cli.model.verification import Verification, verify, verify_tensors
from ditmoe_cli.progress import human_bytes


@dataclass(frozen=True)
class Looking:
    """What is looked at beside headers: stored tensors, all bytes, and how far weights are apart."""

    tensors: bool = False
    verify: bool = False
    values: bool = False


@dataclass(frozen=True)
class Carding(CardContents):
    """A model card to be written, and what it shows beside what the file records."""

    card: Path | None = None
    force: bool = False

    def write(self, checkpoint: Checkpoint) -> None:
        """Write the card, and beside it the picture that is drawn of samples, under its name.

        Raises `OutputExistsError` where others stand there, and what `card_of` raises.
        """
        assert self.card is not None
        path = self.card.absolute()
        if self.picture is not None and self.picture.absolute().parent != path.parent:
            raise UsageError(f"⟨picture⟩ {self.picture}: is not in the folder of the card, {path.parent}")
        drawn = path.with_suffix(".png")
        text, pixels = self.card_of(checkpoint, drawn.name if self.picture is None else self.picture.name)
        files = (
            {path: text.encode()}
            if pixels is None or self.picture is not None
            else {drawn: pixels, path: text.encode()}
        )
        wanted = {file: data for file, data in files.items() if not (file.is_file() and file.read_bytes() == data)}
        for file in wanted:
            check_target(file, self.force, [checkpoint.path, *self.inputs])
        for file, data in wanted.items():
            with staged(file, self.force) as staging:
                staging.write_bytes(data)
        for file in files:
            note(f"wrote {file}" if file in wanted else f"{file} is up to date")


@dataclass(frozen=True, repr=False)
class InspectedCheckpoint(Brief):
    """What a checkpoint is.

    Attributes:
        checkpoint: the checkpoint, opened.
        verified: what reading all its bytes has shown; None where they were not read.
        lists: whether `to_json` lists the stored tensors.
    """

    checkpoint: Checkpoint
    verified: Verification | None = None
    lists: bool = False

    @property
    def figures(self) -> Mapping[str, Any]:
        """All that is known of it by name; docs/inspect.md describes it."""
        return self.to_json()

    @property
    def recipe(self) -> str:
        """The commands that made it, as YAML that ``ditmoe run`` carries out. Raises `BadInputError` where none did."""
        return recipe_of(self.checkpoint).text()

    def require_whole(self) -> None:
        """Raise `BadInputError` where reading it has shown that something is wrong."""
        require_whole(self.checkpoint.path, self.verified.problems if self.verified is not None else ())

    def _brief(self) -> list[Fact]:
        return [*self.checkpoint._brief(), *([("verified", "all bytes")] if self.verified is not None else [])]

    def to_json(self, name_of: NameOf = as_argument) -> dict[str, Any]:
        """Return all that is known of it by name; `name_of` gives the names of settings in texts."""
        verified = verification_json(self.verified) if self.verified is not None else None
        listed = {"stored": stored_tensors(self.checkpoint.header)} if self.lists else {}
        return {**describe(self.checkpoint, name_of), "verified": verified, **listed}


@dataclass(frozen=True, repr=False)
class InspectedTensors(Brief):
    """The tensors of a file that is no DiT-MoE's, why it is none, and what reading all its bytes has shown, if read."""

    header: CheckpointHeader
    problem: BadInputError
    verified: Verification | None = None

    @property
    def figures(self) -> Mapping[str, Any]:
        """The same as data."""
        return self.to_json()

    @property
    def recipe(self) -> str:
        """The recipe of an export for another program, as YAML. Raises `BadInputError` for any other file."""
        return recipe_of(self.header).text()

    def require_whole(self) -> None:
        """Raise `BadInputError` where reading it has shown that something is wrong."""
        require_whole(self.header.path, self.verified.problems if self.verified is not None else ())

    def _brief(self) -> list[Fact]:
        size = human_bytes(self.header.file_bytes)
        return [("", self.header.path.name), ("tensors", len(self.header.tensors)), ("bytes", size)]

    def to_json(self, name_of: NameOf = as_argument) -> dict[str, Any]:
        """Return tensors and the problem by name; `name_of` gives the names of settings in texts."""
        verified = verification_json(self.verified) if self.verified is not None else None
        return {**describe_tensors(self.header, self.problem, name_of), "verified": verified}


@dataclass(frozen=True, repr=False)
class DifferingCheckpoints(Brief):
    """What two checkpoints differ in.

    Attributes:
        a, b: the checkpoints, opened.
        found: what differs.
        verified: what reading all bytes of both has shown; empty where they were not read.
        distances: how far the weights of B are from A's, by group; None where that was not measured.
        lists: whether `to_json` lists each weight that differs.
    """

    a: Checkpoint
    b: Checkpoint
    found: Differences
    verified: tuple[Verification, ...] = ()
    distances: Mapping[str, Any] | None = field(default=None)
    lists: bool = False

    @property
    def same(self) -> bool:
        """Whether both are the same model, byte for byte."""
        return self.found.same

    @property
    def figures(self) -> Mapping[str, Any]:
        """All that differs by name; docs/inspect.md describes it."""
        return self.to_json()

    def require_whole(self) -> None:
        """Raise `BadInputError` where reading one of both has shown that something is wrong."""
        for checkpoint, verified in zip((self.a, self.b), self.verified, strict=False):
            require_whole(checkpoint.path, verified.problems)

    def _brief(self) -> list[Fact]:
        return [
            ("same", "yes" if self.same else "no"),
            ("weights that differ", len(self.found.changes)),
            ("weights that are equal", self.found.equal),
            *([("settings that differ", ", ".join(self.found.configuration))] if self.found.configuration else []),
            ("a", self.a.path),
            ("b", self.b.path),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all that differs by name."""
        verified = [verification_json(each) for each in self.verified] or None
        compared = comparison_json(self.a, self.b, self.found, self.lists)
        return {**compared, "verified": verified, "values": self.distances}


def inspected(
    opening: Callable[[], Checkpoint], path: str | Path | None, looking: Looking, carding: Carding, given: Given
) -> InspectedCheckpoint | InspectedTensors:
    """Return what the checkpoint at a path is, which `opening` opens with what is `given` of it; write its card.

    A file of other tensors is shown where its tensors are asked for, with a warning.
    """
    try:
        opened = opening()
    except BadInputError as error:
        alone = _alone(path) if looking.tensors and path is not None else None
        if alone is None:
            raise
        note(f"warning: {error.message}")
        return InspectedTensors(alone[0], error, verify_tensors(*alone) if looking.verify else None)
    if carding.card is not None:
        carding.write(opened)
    return InspectedCheckpoint(opened, verify(opened, given) if looking.verify else None, looking.tensors)


def _alone(path: str | Path) -> tuple[CheckpointHeader, TensorReader] | None:
    """Return header and reader of a file of tensors that are no DiT-MoE's; None where it cannot be read."""
    try:
        return open_reader(resolve_path(path))
    except BadInputError:
        return None


def contrasted(a: Checkpoint, b: Checkpoint, looking: Looking, given: Given) -> DifferingCheckpoints:
    """Return what two checkpoints differ in, which were opened with what is `given` of them."""
    verified = tuple(verify(each, given) for each in (a, b)) if looking.verify else ()
    found = differences(a, b, read=looking.verify)
    distances = measured_distances(a, b, found) if looking.values else None
    return DifferingCheckpoints(a, b, found, verified, distances, looking.tensors)
