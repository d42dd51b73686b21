"""Recipes: the commands that make a checkpoint from another, as a YAML file that can be shared and run. Torch-free.

A checkpoint's history is its recipe: `recipe_of` reads it. Texts that begin with ``$`` stand for checkpoints:
``$source``, ``$2`` for what the second stage made, ``$weak`` for an input of that name. A file that is known by its
fingerprint alone is named by whoever runs the recipe, since files hold no paths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ditmoe_cli.compression.precision.uniform import settings_of
from ditmoe_cli.compression.recorded import CLOCK
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import digest, file_digest, fingerprint
from ditmoe_cli.files.making import told_making
from ditmoe_cli.files.pipelines import pipeline_folder
from ditmoe_cli.files.provenance import EXPORTING, Step, check_schema
from ditmoe_cli.files.reader import CheckpointHeader
from ditmoe_cli.files.yaml_text import read_yaml, yaml_text
from ditmoe_cli.model.checkpoint import Checkpoint

RECIPE_SCHEMA = "ditmoe.recipe/1"
SOURCE = "$source"
_PROFILING, _APPLYING = "profile-experts", "apply"
_WEIGHTS, _CARD_FILES = ".safetensors", ("README.md", "images.png")  # of folders
_STAGE_KEYS = ("defaults", "gives", "made")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
_HEX = re.compile(r"[0-9a-f]{32}([0-9a-f]{32})?")
_GIVEN = {"heads": "num_heads", "top-k": "top_k", "sampler": "sampler", "num-classes": "num_classes"}
_SETTINGS = ("images", "steps", "cfg", "seed", "solver", "classes", "dtype", "bins", "reservoir", "batch")
PROFILE_DIGITS = 32  # of a profile's digest, as many as a request holds


@dataclass(frozen=True)
class Ingredient:
    """A file that a recipe begins with.

    Attributes:
        checkpoint: its name, as ``demo:digits``, or its path; None where whoever runs the recipe has to name it.
        fingerprint: that of the checkpoint, or the digest of images; None where any will do.
        given: overrides of a configuration that the file cannot tell, by the names of the options.
    """

    checkpoint: str | None = None
    fingerprint: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, Any]:
        """What is `given`, by the names of the configuration."""
        return {_GIVEN[name]: value for name, value in self.given.items()}

    def document(self) -> dict[str, Any]:
        """Return the ingredient as a map, without what is not known."""
        fields = {"checkpoint": self.checkpoint, "fingerprint": self.fingerprint, "given": dict(self.given)}
        return {name: value for name, value in fields.items() if value}


@dataclass(frozen=True)
class RecipeStage:
    """A command of a recipe.

    Attributes:
        command: its name.
        options: options by their names, as they are given.
        defaults: options that were left out, at the values that they had.
        gives: the fingerprint of the checkpoint that it wrote, or the beginning of its profile's digest.
        made: what computed that.
    """

    command: str
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    gives: str | None = None
    made: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the stage as a map: its command first."""
        more = {"defaults": dict(self.defaults), "gives": self.gives, "made": dict(self.made)}
        return {self.command: dict(self.options) or None, **{name: value for name, value in more.items() if value}}


@dataclass(frozen=True)
class Result:
    """What a recipe made.

    Attributes:
        fingerprint: that of the checkpoint, or of the tensors that an export holds.
        metadata: SHA-256 of the metadata, in which the hashes of all tensors stand.
        files: SHA-256 of names and contents of the other files of an exported folder, but its card and its VAE's
            weights; None of anything else.
    """

    fingerprint: str
    metadata: str
    files: str | None = None

    @classmethod
    def of(cls, found: Checkpoint | CheckpointHeader) -> Result | None:
        """Return the result that a checkpoint or an export is, as it was written; None where it tells no hashes."""
        header = found if isinstance(found, CheckpointHeader) else found.header
        hashes = found.recorded if isinstance(found, CheckpointHeader) else found.recorded_hashes
        config, provenance = _configuration(found), header.provenance
        if provenance is None or any(name not in hashes for name in header.tensors):
            return None
        metadata = digest(provenance.to_metadata(hashes)["ditmoe"])
        files = _other_files(header.path) if provenance.export and header.path.is_dir() else None
        return cls(fingerprint(header.tensors.values(), hashes, config), metadata, files)


def _configuration(found: Checkpoint | CheckpointHeader) -> Mapping[str, Any]:
    """Return the configuration as the metadata has it."""
    if isinstance(found, Checkpoint):
        return found.config.to_json()
    return found.provenance.config if found.provenance is not None else {}


def _other_files(folder: Path) -> str:
    """Return the SHA-256 of names and contents of the files of an exported folder that hold no weights."""
    root = pipeline_folder(folder) or folder
    names = sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    held = [name for name in names if not name.endswith(_WEIGHTS) and name not in _CARD_FILES]
    return digest([[name, file_digest(root / name)] for name in held])


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        source: the checkpoint that it begins with.
        stages: the commands, in order.
        inputs: other files that stages take, by name.
        made: what computed all stages, as far as that is the same; each stage says the rest.
        result: what it made; None where that is not known.
    """

    source: Ingredient
    stages: tuple[RecipeStage, ...]
    inputs: Mapping[str, Ingredient] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)
    result: Result | None = None

    def document(self) -> dict[str, Any]:
        """Return the recipe as a map."""
        more: dict[str, Any] = {"inputs": {name: each.document() for name, each in self.inputs.items()}}
        more |= {"stages": [stage.document() for stage in self.stages], "made": dict(self.made)}
        if self.result is not None:
            more["result"] = {name: text for name, text in vars(self.result).items() if text is not None}
        source = {"source": self.source.document()}
        return {"schema": RECIPE_SCHEMA, **source, **{name: value for name, value in more.items() if value}}

    def without_results(self) -> Recipe:
        """Return the recipe without what it gave, which another source does not give."""
        return replace(self, stages=tuple(replace(stage, gives=None) for stage in self.stages), result=None)

    def exported(self, options: Mapping[str, Any]) -> Recipe:
        """Return the recipe of an export of what it makes, to be written by these options."""
        kitchen = _Kitchen("", {}, list(self.stages), dict(self.inputs))
        kitchen.add(Step(EXPORTING, "", "", options), None)
        return replace(self, stages=tuple(kitchen.stages), inputs=kitchen.inputs, result=None)

    def text(self) -> str:
        """Return the recipe as YAML."""
        return yaml_text(self.document())


def recipe_of(found: Checkpoint | CheckpointHeader) -> Recipe:
    """Return the recipe of a checkpoint, or of an export by its header, by the history.

    Raises `BadInputError` for one without a history, and for a step that the history does not tell enough of to be
    carried out again.
    """
    provenance = found.provenance if isinstance(found, CheckpointHeader) else found.header.provenance
    if provenance is None or not (provenance.history or provenance.exported):
        raise BadInputError(
            f"{found.path}: has no history, and so no recipe: nothing was made of it yet, or not by ditmoe"
        )
    config, result = _configuration(found), Result.of(found)
    given = {option: config[name] for option, name in _GIVEN.items() if name in config}
    history, last = provenance.history, result.fingerprint if result else None
    source = Ingredient(provenance.origin, history[0].source if history else last, given)
    kitchen = _Kitchen(str(found.path), {source.fingerprint or "": SOURCE})
    states = (*(step.source for step in history[1:]), last)
    for step, gives in zip(history, states, strict=bool(history)):
        kitchen.add(step, None if step.command == EXPORTING else gives)
    if provenance.exported:
        kitchen.add(Step(EXPORTING, "", "", provenance.exported), None)
    made, stages = _common_making(kitchen.stages)
    return Recipe(source, tuple(stages), kitchen.inputs, made, result)


@dataclass
class _Kitchen:
    """A recipe in the making: stages and inputs so far, names of the checkpoints, the profile that flows on."""

    where: str
    names: dict[str, str]
    stages: list[RecipeStage] = field(default_factory=list)
    inputs: dict[str, Ingredient] = field(default_factory=dict)
    profile: tuple[str, Mapping[str, Any]] | None = None

    def add(self, step: Step, gives: str | None) -> None:
        """Add a step, and before it the profile that it rests on, where that is another than the stage before took."""
        if step.calibration is not None:
            own = step.options.get("original") if step.command == "heal" else None
            self._profile(str(own or step.source), step)
        options = self._options(step)
        command = step.command if step.planned is None else _APPLYING
        defaults = {name.replace("_", "-"): value for name, value in step.defaults.items()}
        self.stages.append(RecipeStage(command, options, defaults, gives, told_making(step.made)))
        if gives is not None:
            self.names[gives] = f"${len(self.stages)}"

    def _profile(self, target: str, step: Step) -> None:
        assert step.calibration is not None
        wanted = (target, step.calibration)
        if self.profile == wanted:
            return
        self.profile = wanted
        options = dict(profile_options(step.calibration))
        if step.calibration.get("data"):
            options["data"] = self._named(str(step.calibration["data"]), "images")
        if target != step.source:
            options = {"of": self._named(target, "original"), **options}
        known = (
            str(step.planned.get("profile"))[:PROFILE_DIGITS]
            if step.planned
            else (step.request or "")[-PROFILE_DIGITS:]
        )
        self.stages.append(RecipeStage(_PROFILING, options, gives=known if known.strip("0") else None))

    def _options(self, step: Step) -> dict[str, Any]:
        """Return the options of a step by their names on the command line, checkpoints by theirs here."""
        clock = {CLOCK: ",".join(text.strip() for text in step.measured[CLOCK])} if CLOCK in step.measured else {}
        if step.planned is not None:
            return {"plan": dict(step.planned), **clock}
        version = step.made.get("ditmoe")
        if step.edited or step.request == digest({"version": version, "plan": step.plan}):
            raise BadInputError(
                f"{self.where}: has no recipe: {step.command} carried out a plan that no planner signed, and that its "
                "history does not hold"
            )
        options = {**step.options, **clock}
        if step.command == "quantize" and options.get("uniform"):
            options |= settings_of(str(options.pop("format")))
        for name in ("original", "guide_with"):
            if name in options:
                options[name] = self._named(str(options[name]), name.removesuffix("_with"))
        if step.command == EXPORTING and _HEX.fullmatch(str(options.get("vae"))):
            options["vae"] = self._named(str(options["vae"]), "vae")
        return {name.replace("_", "-"): value for name, value in options.items()}

    def _named(self, fingerprint: str, name: str) -> str:
        """Return how a file is named here, a new input where it is none of what the recipe made."""
        if fingerprint not in self.names:
            taken = [each for each in self.inputs if each.rstrip("-0123456789") == name]
            own = f"{name}-{len(taken) + 1}" if taken else name
            self.inputs[own] = Ingredient(fingerprint=fingerprint)
            self.names[fingerprint] = f"${own}"
        return self.names[fingerprint]


def profile_options(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the options that profile with the settings of a calibration; labels of given images are their own."""
    given = settings.get("data")
    for name in _SETTINGS:
        if name in settings and not (given and name == "classes"):
            value = settings[name]
            yield name, ",".join(map(str, value)) if isinstance(value, list) else value
    if settings.get("fast"):
        yield "fast", True


def _common_making(stages: list[RecipeStage]) -> tuple[dict[str, str], list[RecipeStage]]:
    """Return what computed all stages, and the stages with what computed them otherwise."""
    values: dict[str, set[str]] = {}
    for stage in stages:
        for name, text in stage.made.items():
            values.setdefault(name, set()).add(text)
    common = {name: next(iter(texts)) for name, texts in values.items() if len(texts) == 1}
    own = [{name: text for name, text in stage.made.items() if name not in common} for stage in stages]
    return common, [replace(stage, made=made) for stage, made in zip(stages, own, strict=True)]


def read_recipe(path: Path) -> Recipe:
    """Read the recipe of a YAML file. Raises `BadInputError` that names file, stage and key."""
    try:
        document = read_yaml(path)
    except FileNotFoundError:
        raise BadInputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise BadInputError(f"{path}: not a recipe (it is no text)") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: not a recipe ({error})") from None
    return parse_recipe(document, str(path))


def parse_recipe(document: object, where: str) -> Recipe:
    """Read a recipe from a map. Raises `BadInputError` that names `where`, the stage and the key."""
    fields = check_schema(document, RECIPE_SCHEMA, where)
    _refuse_unknown(fields, ("schema", "source", "inputs", "stages", "made", "result"), where)
    stages = fields.get("stages")
    if not isinstance(stages, list) or not stages:
        raise BadInputError(
            f"{where}: key 'stages' is {_brief(stages)}; expected a list of commands with their options"
        )
    inputs = _map(fields.get("inputs"), f"{where}: key 'inputs'")
    for name in inputs:
        if not _NAME.fullmatch(name) or name == SOURCE[1:]:
            raise BadInputError(f"{where}: inputs: {_brief(name)} is no name; give lower-case letters, as weak")
    return Recipe(
        _parse_ingredient(fields.get("source"), f"{where}: source"),
        tuple(_parse_stage(stage, f"{where}: stage {number}") for number, stage in enumerate(stages, 1)),
        {name: _parse_ingredient(each, f"{where}: input {name}") for name, each in inputs.items()},
        _texts(fields.get("made"), f"{where}: key 'made'"),
        _parse_result(fields.get("result"), f"{where}: result"),
    )


def _parse_ingredient(document: object, where: str) -> Ingredient:
    if document is None or isinstance(document, str):
        return Ingredient(document or None)
    fields = _map(document, where)
    _refuse_unknown(fields, ("checkpoint", "fingerprint", "given"), where)
    name = fields.get("checkpoint")
    if not isinstance(name, str | None) or name == "":
        raise BadInputError(f"{where}: key 'checkpoint' is {_brief(name)}; expected a path, demo:digits or hf:…")
    given = _map(fields.get("given"), f"{where}: key 'given'")
    _refuse_unknown(given, tuple(_GIVEN), f"{where}: key 'given'")
    return Ingredient(name, _digest(fields.get("fingerprint"), f"{where}: key 'fingerprint'"), given)


def _parse_stage(document: object, where: str) -> RecipeStage:
    if isinstance(document, str):
        document = {document: None}
    fields = _map(document, where)
    commands = [name for name in fields if name not in _STAGE_KEYS]
    if len(commands) != 1:
        told = ", ".join(map(_brief, commands)) or "no command"
        raise BadInputError(f"{where}: names {told}; expected one command with its options, as prune: {{keep: 0.5}}")
    (command,) = commands
    where = f"{where} ({command})"
    options = _map(fields[command], where)
    for name, value in options.items():
        _check_value(value, f"{where}: option {_brief(name)}", may_be_map=(command, name) == (_APPLYING, "plan"))
    return RecipeStage(
        command,
        options,
        _map(fields.get("defaults"), f"{where}: key 'defaults'"),
        _digest(fields.get("gives"), f"{where}: key 'gives'"),
        _texts(fields.get("made"), f"{where}: key 'made'"),
    )


def _check_value(value: object, where: str, may_be_map: bool) -> None:
    """Refuse what no option takes."""
    flat = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float | bool | None) for each in flat) and not may_be_map:
        raise BadInputError(f"{where} is {_brief(value)}; expected a text, a number, true, false or a list of them")


def _parse_result(document: object, where: str) -> Result | None:
    if document is None:
        return None
    fields = _map(document, where)
    _refuse_unknown(fields, ("fingerprint", "metadata", "files"), where)
    known = [_digest(fields.get(name), f"{where}: key {name!r}") for name in ("fingerprint", "metadata")]
    if None in known:
        raise BadInputError(f"{where}: expected a fingerprint and the digest of the metadata, or neither")
    return Result(str(known[0]), str(known[1]), _digest(fields.get("files"), f"{where}: key 'files'"))


def _map(value: object, where: str) -> dict[str, Any]:
    """Return a map, an empty one for nothing."""
    if value is not None and not isinstance(value, dict):
        raise BadInputError(f"{where}: is {_brief(value)}; expected a map")
    return dict(value or {})


def _texts(value: object, where: str) -> dict[str, str]:
    return {name: str(text) for name, text in _map(value, where).items()}


def _digest(value: object, where: str) -> str | None:
    if value is None or (isinstance(value, str) and _HEX.fullmatch(value)):
        return value
    raise BadInputError(f"{where} is {_brief(value)}; expected a SHA-256 in hexadecimal digits")


def _refuse_unknown(fields: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        raise BadInputError(f"{where}: unknown key {_brief(unknown)}; there are {', '.join(known)}")


def _brief(value: object) -> str:
    """Return a value of a file for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}…"
