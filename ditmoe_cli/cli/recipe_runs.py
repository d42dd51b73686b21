"""A recipe carried out: its stages one after the other, what lies between them in a work folder beside the result.

An unfinished run leaves the folder, and the next one goes on: each stage finds its output up to date, or the work that
it had begun. The folder is deleted when the recipe is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.cli.recipe_stages import PLAN, PROFILING, Called
from ditmoe_cli.cli.stage import Stage
from ditmoe_cli.cli.terminal import note
from ditmoe_cli.compression.recipe import PROFILE_DIGITS, SOURCE, Recipe
from ditmoe_cli.errors import DitmoeError, OutputExistsError, UsageError
from ditmoe_cli.exporting.targets import ENDINGS_OF_FILES, TARGETS
from ditmoe_cli.files.fingerprint import file_digest
from ditmoe_cli.files.workfolder import open_work, work_folder, work_key
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import open_checkpoint
from ditmoe_cli.progress import human_bytes

_FORESEEN = ("cfg", "steps", "images", "seed", "classes")  # settings of a profile that planners take too


def last_writing(called: Sequence[Called]) -> Called | None:
    """Return the last stage that writes a checkpoint or an export; None where none does."""
    return next((each for each in reversed(called) if each.writes or each.exports), None)


@dataclass(frozen=True)
class Cooking:
    """A recipe to be carried out.

    Attributes:
        recipe: the recipe.
        called: its stages.
        names: paths of its inputs, by ``$name``.
        output: where the last checkpoint goes, or the export that the recipe ends in; None where none is written.
        where: its file, for messages.
    """

    recipe: Recipe
    called: tuple[Called, ...]
    names: Mapping[str, str]
    output: Output | None
    where: str

    @property
    def last(self) -> Called | None:
        """The stage whose output is the result; None where none writes."""
        return last_writing(self.called)

    def is_last(self, called: Called) -> bool:
        """Return whether a stage writes the result."""
        return self.last is not None and called.number == self.last.number

    @property
    def target(self) -> Path:
        """What the work folder is named after."""
        path = self.output.path if self.output is not None else Path(Path(self.where).name).absolute()
        return path.with_name(f"{path.name}.run")

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run has left a work folder."""
        return work_folder(self.target).is_dir()

    def check_names(self) -> None:
        """Raise `UsageError` for names that stand for nothing, or for what a later stage makes."""
        known = {SOURCE, *self.names}
        for each in self.called:
            names = dict(each.references())
            if each.of is not None:
                names["of"] = each.of
            for option, name in names.items():
                if name not in known:
                    raise UsageError(
                        f"{each.where}: option {option!r} is {name!r}, which stands for nothing; there are "
                        f"{', '.join(sorted(known))}"
                    )
            if each.writes or each.exports:
                known.add(f"${each.number}")


@dataclass
class _Run:
    """A run under way: the stage that the pipe is at, and what names stand for."""

    cooking: Cooking
    folder: Path
    stage: Stage
    names: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    differs: bool = False

    def path(self, called: Called) -> Path:
        """Return where a stage writes its checkpoint or its profile."""
        output = self.cooking.output
        if output is not None and self.cooking.is_last(called):
            return output.path
        if called.exports:
            endings = TARGETS[str(called.stage.options["to"])].endings
            ending = endings[0] if endings else ""
        else:
            ending = ".profile.safetensors" if called.command == PROFILING else ".safetensors"
        return self.folder / f"{called.number}-{called.command}{ending}"

    def words(self, called: Called) -> list[str]:
        """Return the words of a stage."""
        output = self.cooking.output
        if called.plan is not None:
            file = self.folder / f"{called.number}-plan.json"
            if self.folder.is_dir():
                file.write_text(json.dumps(called.plan))
            called = called.with_options(**{PLAN: str(file)})
        words = called.words(self.names)
        is_last = output is not None and self.cooking.is_last(called)
        if called.writes or called.exports or called.command == PROFILING:
            words.append(f"--output={self.path(called)}")
        if output is not None and is_last:
            words += ["--force"] if output.force else []
            words += [] if output.path.suffix in ENDINGS_OF_FILES else [f"--max-shard-size={output.shard_bytes}"]
        return words

    def carry_out(self, called: Called) -> None:
        """Carry out a stage, and hold what it gives against what the recipe recorded."""
        before = self.stage
        if called.of is not None:
            path = self.names[called.of]
            known = path == before.original
            before = replace(before, checkpoint=path, original=path, given=before.given if known else None, piped=True)
        after, result = self._run(called, before)
        if called.of is not None:
            after = replace(self.stage, profile=after.profile, history=after.history)
        self.stage = after
        self.results.append({"command": called.command, "result": result})
        if called.writes or called.exports:
            self.names[f"${called.number}"] = str(self.path(called))
        if called.exports and not self.cooking.is_last(called):  # something is made of it
            self.stage = replace(self.stage, checkpoint=str(self.path(called)))
        self._compare(called)

    def _run(self, called: Called, before: Stage) -> tuple[Stage, dict[str, Any]]:
        """Call a stage; what an earlier run left of another recipe gives way."""
        words = self.words(called)
        try:
            return called.run(before, words)
        except OutputExistsError:
            if self.folder not in self.path(called).parents:
                raise
        return called.run(before, [*words, "--force"])

    def _compare(self, called: Called) -> None:
        if called.stage.gives is None or self.differs:
            return
        if called.command == PROFILING:
            given, what = file_digest(self.path(called))[:PROFILE_DIGITS], "another profile"
        else:
            given, what = open_checkpoint(self.path(called)).written_fingerprint or "", "other weights"
        if given != called.stage.gives[: len(given)]:
            self.differs = True
            note(
                f"warning: {called.where} gives {what} than recorded ({given[:12]}, not {called.stage.gives[:12]}); "
                "what follows will differ too"
            )


def cooked(cooking: Cooking, stage: Stage) -> tuple[Stage, list[dict[str, Any]]]:
    """Carry out all stages of a recipe; return the stage behind them, and the result of each."""
    key, count = work_key({"recipe of": stage.checkpoint}), len(cooking.called)  # stages know what they were made by
    with open_work(cooking.target, key, note, keep_refused=True) as work:
        run = _Run(cooking, work.folder, stage, {SOURCE: str(stage.checkpoint), **cooking.names})
        work.tell(lambda: f"kept {len(run.results)} of {count} stages; the same command goes on from there")
        for called in cooking.called:
            run.carry_out(called)
    return run.stage, run.results


@dataclass(frozen=True)
class Foreseen:
    """What a recipe would do: its stages, and the results that dry runs give, by number."""

    called: tuple[Called, ...]
    results: Mapping[int, Mapping[str, Any]]

    def text(self, called: Called) -> str:
        """Return what is known of a stage, for reading."""
        size = self.results.get(called.number, {}).get("bytes")
        return called.command if size is None else f"{called.command}: {size:,} bytes ({human_bytes(size)})"

    def document(self) -> list[dict[str, Any]]:
        """Return the stages as JSON; of those behind the first checkpoint nothing is known yet."""
        return [{"command": each.command, "result": self.results.get(each.number)} for each in self.called]


def foreseen(cooking: Cooking, stage: Stage) -> Foreseen:
    """Return what a recipe would do, by a dry run of the first stage that writes a checkpoint."""
    run = _Run(cooking, work_folder(cooking.target), stage, {SOURCE: str(stage.checkpoint), **cooking.names})
    first = next((each for each in cooking.called if each.writes or cooking.is_last(each)), None)
    if first is None or first.plan is not None:
        return Foreseen(cooking.called, {})
    profiled = next((each for each in reversed(cooking.called[: first.number]) if each.command == PROFILING), None)
    words = run.words(first)
    if profiled is not None:
        settings = {name: profiled.stage.options[name] for name in _FORESEEN if name in profiled.stage.options}
        planned = first.with_options(**{f"calibration-{name}": value for name, value in settings.items()})
        words = run.words(planned)
    try:
        _, result = first.run(stage, [*words, "--dry-run"])
    except DitmoeError as error:
        note(f"what the first stage writes is not foreseen: {error.message}")
        return Foreseen(cooking.called, {})
    return Foreseen(cooking.called, {first.number: result})
