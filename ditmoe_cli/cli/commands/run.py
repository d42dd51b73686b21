"""``ditmoe run``: a recipe, from its source to what it made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from ditmoe_cli.api.argument_checks import refuse_idle
from ditmoe_cli.api.devices import named_device
from ditmoe_cli.api.export_runs import ExportDestination
from ditmoe_cli.api.output_names import checkpoint_path, stem
from ditmoe_cli.cli.options import Destination, Overrides, complete_checkpoint, complete_device
from ditmoe_cli.cli.recipe_runs import Cooking, Foreseen, cooked, foreseen, last_writing
from ditmoe_cli.cli.recipe_stages import Called
from ditmoe_cli.cli.stage import Stage, incoming
from ditmoe_cli.cli.terminal import Printing, Row, emit, note
from ditmoe_cli.compression.recipe import Ingredient, Recipe, Result, read_recipe, recipe_of
from ditmoe_cli.diffusion.vae import CONFIG_NAME, WEIGHTS_NAME
from ditmoe_cli.errors import BadInputError, GateError, OutputExistsError, UsageError
from ditmoe_cli.exporting.diffusers_folder import copied_vae_digest
from ditmoe_cli.exporting.targets import CONTENTS, TARGETS
from ditmoe_cli.files.header import read_safetensors_header
from ditmoe_cli.files.making import computed_here, told_making
from ditmoe_cli.files.staging import check_target
from ditmoe_cli.files.writer import Output, changed_tensor
from ditmoe_cli.model.checkpoint import Checkpoint, checkpoint_or_export, open_checkpoint, resolve_path
from ditmoe_cli.model.conversions import Storage
from ditmoe_cli.model.throughput import likely_device
from ditmoe_cli.progress import human_bytes

EXAMPLES = (
    "ditmoe inspect small.safetensors --recipe > small.yaml",
    "ditmoe run small.yaml ckpt.pt -o again.safetensors --same",
    "ditmoe run small.safetensors other.pt -o other-small.safetensors",
)
_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, kw_only=True)
class RecipeAndSource(Overrides):
    """The recipe, and what it begins with."""

    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe, FILE.yaml, or a checkpoint, whose own recipe is carried out."),
    ]
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            autocompletion=complete_checkpoint,
            help="The checkpoint to begin with. [default: the one that the recipe names]",
        ),
    ] = None
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=PATH",
            help="A checkpoint or images that the recipe takes under a name; repeated for several.",
        ),
    ] = None

    def read(self) -> tuple[Recipe, Path | None]:
        """Return the recipe, and the checkpoint whose own it is. Raises `BadInputError` where there is none."""
        if self.recipe.endswith(_RECIPES):
            return read_recipe(Path(self.recipe)), None
        path = resolve_path(self.recipe, note)
        return recipe_of(checkpoint_or_export(path)), path

    def named(self) -> dict[str, str]:
        """Return the paths that were given, by name. Raises `UsageError` for what is not ``NAME=PATH``."""
        found = {}
        for text in self.inputs or ():
            name, _, path = text.partition("=")
            if not name or not path:
                raise UsageError(f"--input {text}: give a name and a path, as weak=weak.safetensors")
            found[name] = path
        return found


@dataclass(frozen=True)
class Comparing:
    """What is held against what the recipe recorded."""

    panel: ClassVar[str] = "Comparing"

    same: Annotated[
        bool,
        typer.Option("--same", help="Exit with code 6 unless the result is what the recipe recorded, byte for byte."),
    ] = False
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="NAME",
            rich_help_panel="Machine",
            callback=named_device,
            autocompletion=complete_device,
            help="auto, cpu, cuda or cuda:N, of all stages that name none. [default: auto]",
        ),
    ] = None


@dataclass(frozen=True)
class RecipeDestination(Destination):
    """Where the last checkpoint goes."""

    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="FILE.safetensors, or a folder for diffusers' sharded layout, for the last checkpoint; where a "
            "recipe ends in export, what that writes. [default: named after source and recipe]",
        ),
    ] = None

    def result(self, source: Path, label: str, last: Called) -> Output:
        """Return where the result of the last stage goes. Raises `UsageError` for a name that it does not write."""
        if last.exports:
            target = TARGETS[str(last.stage.options["to"])]
            named = ExportDestination(self.output, self.force, max_shard_size=self.max_shard_size)
            wanted = named.wanted(target, Path(f"{stem(source)}.{label}"), Storage())
            return Output(wanted.path, wanted.force, wanted.shard_bytes, contents=CONTENTS)
        try:
            checkpoint_path(self.output or source.with_suffix(""))
        except ValueError as error:
            raise UsageError(f"⟨output⟩ {self.output}: {error}") from None
        return self.at(source, label)


def run(asked: RecipeAndSource, comparing: Comparing, to: RecipeDestination, printing: Printing) -> None:
    """Carry out a recipe: the commands that made a checkpoint, from its source.

    A recipe is what inspect --recipe prints, or written by hand: a source, and a list of commands with their options.
    The result is held against what the recipe recorded. An unfinished run goes on with the stage that it was at.
    """
    recipe, own = asked.read()
    where = asked.recipe
    called = tuple(
        Called(stage, number, f"{where}: stage {number} ({stage.command})")
        for number, stage in enumerate(recipe.stages, 1)
    )
    for each in called:
        each.check()
    here = told_making(computed_here(likely_device(comparing.device or "auto")))
    if recipe.made.get("ditmoe", here["ditmoe"]) != here["ditmoe"]:
        called = tuple(each.with_defaults() for each in called)
    if comparing.device is not None:
        called = tuple(each.with_options(device=comparing.device) if each.takes("device") else each for each in called)
    last = last_writing(called)
    if last is None:
        refuse_idle(to, "for a recipe that writes no checkpoint", "output", "force", "max_shard_size")
    stage, recipe = _begun(asked, recipe, where)
    names = _inputs(asked, recipe, where)
    source = Path(str(stage.checkpoint))
    output = to.result(source, Path(where).name.partition(".")[0], last) if last is not None else None
    cooking = Cooking(recipe, called, names, output, where)
    cooking.check_names()
    inputs = [source, *map(Path, names.values()), Path(where) if own is None else own]
    if output is not None:
        check_target(output.path, True, inputs, output.contents)
        found = _made_before(output, recipe, cooking)
        if found is not None:
            return _told(printing, replace(stage, checkpoint=str(output.path)), recipe, found, [], {"up_to_date": True})
    if to.dry_run:
        return _preview(printing, stage, foreseen(cooking, stage), output)
    _warn_of_this_machine(recipe, here)
    after, results = cooked(cooking, stage)
    made = None
    if output is not None:
        made = Made.at(output.path)
        after = replace(after, checkpoint=str(output.path)) if last is not None and last.exports else after
    return _told(printing, after, recipe, made, results, {}, gate=comparing.same)


@dataclass(frozen=True)
class Made:
    """What stands at the output: its path, bytes, and recipe as its metadata tells."""

    path: Path
    bytes: int
    recipe: Recipe | None

    @property
    def result(self) -> Result | None:
        """The fingerprint and the digests as the metadata tells; None where it does not."""
        return self.recipe.result if self.recipe is not None else None

    @classmethod
    def at(cls, path: Path) -> Made:
        """Return what a stage has written at a path. Raises `BadInputError` where it cannot be read."""
        found = checkpoint_or_export(path)
        header = found.header if isinstance(found, Checkpoint) else found
        return cls(path, header.file_bytes, recipe_of(found) if header.provenance is not None else None)


def _begun(asked: RecipeAndSource, recipe: Recipe, where: str) -> tuple[Stage, Recipe]:
    """Return the stage to begin with, and the recipe without what it recorded where that is of another source.

    Raises `UsageError` where nothing names the source, `BadInputError` where the recipe's own is not what it was.
    """
    source = recipe.source
    name = asked.checkpoint or source.checkpoint
    if name is None:
        known = f" ({source.fingerprint[:12]})" if source.fingerprint else ""
        raise UsageError(f"{where}: the recipe knows its source by fingerprint alone{known}; give it as CHECKPOINT")
    stage = incoming(name, asked.given)
    recorded = _recorded_overrides(stage, source)
    if recorded is not None:
        stage = replace(stage, given={**recorded, **_named(stage.given)})
    opened = open_checkpoint(str(stage.checkpoint), **_named(stage.given))
    if source.fingerprint is None or _fingerprint(opened) == source.fingerprint:
        return stage, recipe
    if asked.checkpoint is None:
        raise BadInputError(
            f"{where}: source {name} is not what the recipe was made with ({_fingerprint(opened)[:12]}, not "
            f"{source.fingerprint[:12]}); give another as CHECKPOINT"
        )
    note(
        f"{opened.name} is another source than the recipe's ({_fingerprint(opened)[:12]}, not "
        f"{source.fingerprint[:12]}); there is nothing to hold the result against"
    )
    return incoming(name, asked.given), recipe.without_results()


def _recorded_overrides(stage: Stage, source: Ingredient) -> dict[str, Any] | None:
    """Return the overrides that a source was opened with; None where its file carries its whole configuration."""
    if not source.given or open_checkpoint(str(stage.checkpoint), allow_unknown=True).header.provenance is not None:
        return None
    return source.overrides


def _named(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the overrides that there are."""
    return {name: value for name, value in (given or {}).items() if value is not None}


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Return a fingerprint by the hashes in the metadata where there are, which each stage holds against the bytes."""
    return checkpoint.written_fingerprint or checkpoint.fingerprint


def _inputs(asked: RecipeAndSource, recipe: Recipe, where: str) -> dict[str, str]:
    """Return what the names of a recipe's inputs stand for. Raises where one is missing, or is not what it was."""
    given = asked.named()
    unknown = next((name for name in given if name not in recipe.inputs), None)
    if unknown is not None:
        told = ", ".join(recipe.inputs) or "none"
        raise UsageError(f"--input {unknown}={given[unknown]}: the recipe has no such input; there are {told}")
    found = {}
    for name, wanted in recipe.inputs.items():
        path = given.get(name) or wanted.checkpoint
        if path is None:
            known = f" ({wanted.fingerprint[:12]})" if wanted.fingerprint else ""
            raise UsageError(f"{where}: input {name!r} is missing{known}; give it as --input {name}=PATH")
        found[f"${name}"] = str(resolve_path(path, note).absolute())
        if wanted.fingerprint is not None and (known := _digest_of(Path(found[f"${name}"]))) != wanted.fingerprint:
            raise BadInputError(
                f"{where}: input {name} {path}: is not what the recipe was made with ({known[:12]}, not "
                f"{wanted.fingerprint[:12]})"
            )
    return found


def _digest_of(path: Path) -> str:
    """Return the fingerprint of a checkpoint, or the digest of a VAE or of images."""
    if not path.exists():
        raise BadInputError(f"{path}: no such file")
    try:
        return _fingerprint(open_checkpoint(path))
    except BadInputError:
        if all((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
            return copied_vae_digest(path)
        from ditmoe_cli.evaluation.images import images_digest

        return images_digest(path)


def _made_before(output: Output, recipe: Recipe, cooking: Cooking) -> Made | None:
    """Return what stands at the output where it is what the recipe recorded; None where there is nothing, or work kept.

    Raises `OutputExistsError` for anything else that is not to be replaced.
    """
    if output.force or not output.path.exists():
        return None
    try:
        made = Made.at(output.path)
        same = recipe.result is not None and made.result == recipe.result and not _damage(output, cooking)
    except BadInputError:
        same = False
    if same:
        note(f"{output.path} is up to date")
        return made
    if cooking.is_begun:
        return None  # the stage that wrote it tells whether it is up to date
    told = "is not what the recipe recorded" if recipe.result else "the recipe tells no result to know it by"
    raise OutputExistsError(
        f"{output.path}: exists already, and {told}; give ⟨force⟩ to replace it, or -o for another name"
    )


def _damage(output: Output, cooking: Cooking) -> str | None:
    """Return how what stands at the output differs from what was written; of an export a tensor that does."""
    if cooking.last is None or not cooking.last.exports:
        return output.damage({})
    if output.path.is_file() and output.path.suffix != ".safetensors":
        held = open_checkpoint(output.path)
        return None if held.fingerprint == held.written_fingerprint else "is damaged"
    files = [output.path] if output.path.is_file() else sorted(output.path.rglob("*.safetensors"))
    own = [file for file in files if file.parent.name != "vae"]
    return changed_tensor({file.name: read_safetensors_header(file) for file in own}, {})


def _warn_of_this_machine(recipe: Recipe, here: Mapping[str, str]) -> None:
    """Warn where other versions, threads or devices are `here` than those that the recipe was made by."""
    if recipe.result is None:
        return
    unlike = [name for name, text in here.items() if recipe.made.get(name, text) != text]
    if unlike:
        then = ", ".join(f"{name} {recipe.made[name]}" for name in unlike)
        now = ", ".join(f"{name} {here[name]}" for name in unlike)
        note(f"warning: recorded with {then}, and here is {now}: results may round otherwise")


def _preview(printing: Printing, stage: Stage, told: Foreseen, output: Output | None) -> None:
    """Print what a recipe would do, with the bytes of the first checkpoint that it would write."""
    rows: list[Row] = [("would write", output.path)] if output is not None else []
    rows += [(f"stage {each.number}", told.text(each)) for each in told.called]
    result = {"stages": told.document(), "dry_run": True, "plan": None}
    emit(printing, stage.to_json(result), rows, str(output.path) if output else None, editable=True)


def _told(
    printing: Printing,
    stage: Stage,
    recipe: Recipe,
    made: Made | None,
    results: list[dict[str, Any]],
    more: dict[str, Any],
    gate: bool = False,
) -> None:
    """Print what a recipe made, and how that differs from what it recorded."""
    differences = _differences(recipe, made) if recipe.result is not None and made is not None else None
    document: dict[str, Any] = {"stages": results, "same": None if differences is None else not differences}
    document |= {"differences": differences or [], **more}
    rows: list[Row] = []
    if made is not None:
        known = made.result.fingerprint if made.result is not None else None
        document |= {"bytes": made.bytes, "fingerprint": known}
        told = f"{made.bytes:,} ({human_bytes(made.bytes)})"
        rows += [("up to date" if more else "wrote", made.path), ("bytes", told)]
    rows += [(f"stage {number}", each["command"]) for number, each in enumerate(results, 1)]
    if differences is not None:
        rows += [("recorded", text) for text in differences] or [("recorded", "the same bytes")]
        for text in differences:
            note(f"warning: {text}")
    emit(printing, stage.to_json(document), rows, str(made.path) if made is not None else None)
    if gate and differences is None:
        raise GateError("there is nothing to hold the result against, which --same asks for")
    if gate and differences:
        assert made is not None
        raise GateError(f"{made.path}: is not what the recipe recorded, which --same asks for: {differences[0]}")


def _differences(recipe: Recipe, made: Made) -> list[str]:
    """Return in what a result differs from what a recipe recorded; nothing where every byte is the same."""
    assert recipe.result is not None
    now, own = made.result, made.recipe
    if now == recipe.result:
        return []
    if own is None:
        return ["it tells no making"]
    told = []
    if now is None or now.fingerprint != recipe.result.fingerprint:
        pairs = list(zip(recipe.stages, own.stages, strict=False))
        first = next((n for n, (then, here) in enumerate(pairs, 1) if then.gives != here.gives), len(own.stages))
        told.append(f"stage {first} ({own.stages[first - 1].command}) gives others than recorded")
    elif now.metadata != recipe.result.metadata:
        told.append("the weights are the same, the history tells another making")
    else:
        told.append("the weights are the same, files beside them are others")
    unlike = [name for name in {**recipe.made, **own.made} if recipe.made.get(name) != own.made.get(name)]
    for name in unlike:
        told.append(f"made with {name} {recipe.made.get(name, 'unknown')}, here {own.made.get(name, 'unknown')}")
    return told
