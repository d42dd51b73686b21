"""Model cards: what a checkpoint is, what was done, what that cost as far as it was measured. Torch-free.

A card says what its file records, and what the scores tell that are given with it. What nobody measured is absent.
Texts of files are spans of code, which no reader takes for markup.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ditmoe_cli.api.step_texts import number, step_text
from ditmoe_cli.compression.recipe import recipe_of
from ditmoe_cli.diffusion.few_steps import told_steps
from ditmoe_cli.errors import BadInputError, as_option, named
from ditmoe_cli.files.hub_names import HUB_PREFIX, commit_folder, parse_hub_name
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.licences import UNKNOWN, licence_in_folder
from ditmoe_cli.files.provenance import STAGE_SCHEMA, Step
from ditmoe_cli.files.yaml_text import yaml_text
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.parameters import count_parameters
from ditmoe_cli.progress import human_bytes

_ERRORS = {
    "refit_error": "held-out error of the mixtures after refitting, of that before",
    "predicted_error": "predicted error of the guided prediction",
    "tried_error": "error of the guided prediction of the plan, tried on held-out images",
    "damage": "upper 95 % bound of that error",
    "prediction_error": "error of the guided prediction after rounding",
    "top_k_agreement": "share of selected experts that original and copy both select",
    "held_error": "error on held-out states, before training and after",
    "path_error_before": "error of the states behind each step before training",
    "path_error_after": "error of the states behind each step after training",
}
"""What entries of a history's figures are, in words; errors are relative squared errors."""
_TAGS = {
    "prune": "pruned",
    "merge": "merged-experts",
    "quantize": "quantized",
    "compress": "compressed",
    "heal": "healed",
    "distill": "distilled",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Loading:
    """How a program opens what a card stands beside.

    Attributes:
        program: its name.
        code: the Python that does it.
        folder: the name of the folder.
        options: the options of ``export`` that wrote it.
    """

    program: str
    code: str
    folder: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """What a card shows beside what the file records.

    Attributes:
        scores: what was measured.
        picture: the name of a picture of pairs that stands beside the card; None for none.
        loading: how another program opens it; None where ditmoe does.
        sampling: how the pairs were sampled, where that is known.
    """

    scores: Sequence[Mapping[str, Any]] = ()
    picture: str | None = None
    loading: Loading | None = None
    sampling: Mapping[str, Any] | None = None


def model_card(checkpoint: Checkpoint, shown: Shown = Shown()) -> str:
    """Return the model card of a checkpoint as Markdown with the front matter of the hub."""
    history = checkpoint.provenance().history
    sections = [
        ("What was done", _done(history)),
        ("Sizes", _sizes(checkpoint)),
        ("Damage", _damage(history, shown.scores)),
        ("Images of the same seeds", _pictured(shown.picture, shown.sampling)),
        ("How to load it", _loading(checkpoint, shown.loading)),
        ("Recipe", _recipe(checkpoint, shown.loading)),
        ("Source and licence", _source(checkpoint)),
    ]
    parts = [
        f"---\n{yaml_text(front_matter(checkpoint, shown.loading))}---",
        f"# {escaped(checkpoint.name if shown.loading is None else shown.loading.folder)}",
        _summary(checkpoint),
    ]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections if lines]
    return "\n\n".join(parts) + "\n"


def front_matter(checkpoint: Checkpoint, loading: Loading | None = None) -> dict[str, Any]:
    """Return what the hub reads of a card: library, tags, base model and licence, as far as they are known."""
    library = "ditmoe" if loading is None else loading.program.split()[0]
    history, origin = checkpoint.provenance().history, checkpoint.provenance().origin
    tags = ["diffusion", "dit-moe", "mixture-of-experts"]
    tags += [tag for command, tag in _TAGS.items() if any(step.command == command for step in history)]
    document: dict[str, Any] = {"library_name": library, "tags": tags}
    if origin is not None and origin.startswith(HUB_PREFIX):
        document["base_model"] = parse_hub_name(origin).repository
    licence = licence_of(checkpoint)
    return document if licence is None else {**document, "license": licence.name}


@dataclass(frozen=True)
class Licence:
    """A licence by the hub's name, and what names it: a file, or the metadata of the source."""

    name: str
    file: Path | None = None


def licence_of(checkpoint: Checkpoint) -> Licence | None:
    """Return the licence of a checkpoint's source; None where nothing names one.

    That is what its metadata names, what files in its folder say, or beside a single file that nothing was made of, and
    what files of its source say that lie in the hub's cache.
    """
    provenance = checkpoint.provenance()
    if provenance.licence is not None:
        return Licence(provenance.licence)
    found = next((found for folder in _folders(checkpoint) if (found := licence_in_folder(folder)) is not None), None)
    return None if found is None else Licence(*found)


def _folders(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the folders whose files may say under which licence the source is, the checkpoint's own first."""
    path, provenance = checkpoint.path, checkpoint.provenance()
    if path.is_dir():
        yield path
    elif not provenance.history:  # beside a copy lies whatever its user works on
        yield path.parent
    kept = commit_folder(path)
    if kept is not None:
        yield kept
    if provenance.origin is not None and provenance.origin.startswith(HUB_PREFIX):
        from ditmoe_cli.files.hub import kept_commit

        source = kept_commit(provenance.origin)
        if source is not None:
            yield source


def escaped(text: str) -> str:
    """Return a text of a file as plain text of Markdown and HTML."""
    plain = _CONTROL.sub(" ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~>-])", r"\\\1", plain)


def code(text: str) -> str:
    """Return a text of a file as a span of code."""
    plain = _CONTROL.sub(" ", text).replace("|", "¦")
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    padding = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{padding}{plain}{padding}{fence}"


def _block(text: str, language: str) -> str:
    """Return a text as a block of code, whose fence is longer than any in it."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _summary(checkpoint: Checkpoint) -> str:
    provenance = checkpoint.provenance()
    source = provenance.history[0].source[:12] if provenance.history else None
    of = (
        code(provenance.origin) if provenance.origin is not None else f"the checkpoint {code(source)}" if source else ""
    )
    what = f"A DiT-MoE made from {of} by" if of and provenance.history else "A DiT-MoE in a file of"
    few = "" if checkpoint.distilled is None else f" It is sampled {told_steps(checkpoint.distilled)}."
    return f"{what} ditmoe.{few}"


def _done(history: Sequence[Step]) -> list[str]:
    """Return the commands of a history, their settings as the command line has them."""
    return [f"{place}. {code(named(step_text(step), as_option))}" for place, step in enumerate(history, 1)]


def _sizes(checkpoint: Checkpoint) -> list[str]:
    parameters = count_parameters(checkpoint)
    formats = Counter(format_label(weight.format or weight.info.dtype) for weight in checkpoint.weights.values())
    stored = sum(info.nbytes for info in checkpoint.header.tensors.values())
    rows = [
        ("parameters", f"{parameters.total:,}, {parameters.activated:,} of them activated for a token"),
        ("bytes of tensors", f"{stored:,} ({human_bytes(stored)})"),
        ("stored as", ", ".join(f"{count} {code(name)}" for name, count in sorted(formats.items()))),
    ]
    return _table(("", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _damage(history: Sequence[Step], scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is recorded of the damage, and what scores tell of it; errors are relative squared errors."""
    recorded, scored = _recorded(history), _scored(scores)
    return [*recorded, *([""] if recorded and scored else []), *scored]


def _recorded(history: Sequence[Step]) -> list[str]:
    """Return the figures that the history records, with the calibration that they were measured on."""
    rows = []
    for step in history:
        for name, texts in step.measured.items():
            values = [float(text) for text in texts]
            if name in _ERRORS and values:
                told = " → ".join(map(number, values)) if name == "held_error" else _range(values)
                rows.append((code(step.command), _ERRORS[name], told, _calibration(step)))
    return [] if not rows else _table(("by", "measured", "is", "on"), rows)


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def _calibration(step: Step) -> str:
    settings = step.calibration
    if settings is None:
        return "images of its own"
    return f"{_told(settings, ('images', 'steps'))}, cfg {code(str(settings.get('cfg')))}"


def _told(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{code(str(settings.get(name)))} {name}" for name in names)


def _scored(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for each score, with how the images were sampled."""
    rows = [row for score in scores for row in _score_rows(score)]
    return [] if not rows else _table(("score", "is", "against", "images"), rows)


def _score_rows(score: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    conditions = score["conditions"]
    if "metric" in score:
        interval = score.get("interval")
        spread = f" ({number(interval['low'])} to {number(interval['high'])})" if interval else ""
        sampling = conditions["subject"].get("sampling") or {}
        against = (
            f"{code(str(conditions['reference']['identity'])[:12])}, {code(str(score['reference_images']))} images"
        )
        extractor = code(str(conditions["extractor"]["name"]))
        yield (
            f"{code(str(score['metric']))} ({extractor})",
            f"{number(score[score['metric']])}{spread}",
            against,
            _sampled(sampling),
        )
        if score.get("paired"):
            original = code(str((conditions.get("original") or {}).get("identity"))[:12])
            yield ("mean squared error of pairs", number(score["paired"]["mse"]), original, _sampled(sampling))
        return
    other = code(str(conditions["a"]["identity"])[:12])
    error = score["prediction"]["relative_error"]
    yield ("relative error of the prediction", number(error), other, _sampled(conditions["sampling"]))


def _sampled(sampling: Mapping[str, Any]) -> str:
    if not sampling:
        return "not recorded"
    told = f"{_told(sampling, ('images', 'steps'))} of {code(str(sampling.get('solver')))}"
    return f"{told}, cfg {code(str(sampling.get('cfg')))}, seed {code(str(sampling.get('seed')))}"


@runtime_checkable
class Measurement(Protocol):
    """What `score` and `compare` found."""

    def to_json(self) -> dict[str, Any]:
        """Return it as the command prints it."""


def read_score(score: Path | Measurement, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return a score of the checkpoint: of the JSON that ``fid`` or ``compare`` printed, or of what a function found.

    Raises `BadInputError` for what is no such file, and for a score of another checkpoint.
    """
    told = f"{score}" if isinstance(score, Path) else "⟨scores⟩"
    try:
        document = read_json(score, names=True) if isinstance(score, Path) else score.to_json()
        if isinstance(document, dict) and document.get("schema") == STAGE_SCHEMA:
            document = document["result"]
        is_fid = "metric" in document
        side = document["conditions"]["subject" if is_fid else "b"]
        subject = str(side["identity"])
        list(_score_rows(document))
    except FileNotFoundError:
        raise BadInputError(f"{told}: no such file") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise BadInputError(f"{told}: is no score; give the JSON that ditmoe fid or compare prints") from None
    names = (checkpoint.written_fingerprint, checkpoint.fingerprint)
    if subject not in names and _sampled_by(side) not in names:
        raise BadInputError(
            f"{told}: is a score of {subject[:12]}, and {checkpoint.path} is {checkpoint.fingerprint[:12]}; score that "
            "one"
        )
    return dict(document)


def _sampled_by(side: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the checkpoint that scored samples are of; None where their file is gone or changed."""
    file = Path(str(side.get("path")))
    if side.get("kind") != "images" or not file.is_file():
        return None
    from ditmoe_cli.evaluation.images import images_digest
    from ditmoe_cli.evaluation.samples import read_origin

    try:
        origin = read_origin(file)
        return origin.model.fingerprint if origin is not None and images_digest(file) == side["identity"] else None
    except BadInputError:
        return None


def _pictured(picture: str | None, sampling: Mapping[str, Any] | None) -> list[str]:
    if picture is None:
        return []
    address = "".join(
        c if re.fullmatch(r"[A-Za-z0-9._-]", c) else "".join(f"%{b:02X}" for b in c.encode()) for c in picture
    )
    return [
        f"![the original beside this copy]({address})",
        "",
        "The original's image beside this copy's, of the same noise and label.",
        *(["", f"This copy: {_sampled(sampling)}."] if sampling is not None else []),
    ]


def _loading(checkpoint: Checkpoint, other: Loading | None) -> list[str]:
    if other is not None:
        return [f"With {other.program}:", "", _block(other.code, "python")]
    return ["With ditmoe:", "", _block(f"ditmoe sample {shell_word(checkpoint.path.name)}", "bash")]


def shell_word(name: str) -> str:
    """Return the name of a file as a word of a shell, in one line."""
    return shlex.quote(_CONTROL.sub("?", name))


def _recipe(checkpoint: Checkpoint, loading: Loading | None) -> list[str]:
    try:
        recipe = recipe_of(checkpoint)
        text = (recipe if loading is None else recipe.exported(loading.options)).text()
    except BadInputError:
        return []
    return ["`ditmoe run` makes it again from this:", "", _block(text, "yaml")]


def _source(checkpoint: Checkpoint) -> list[str]:
    provenance, licence = checkpoint.provenance(), licence_of(checkpoint)
    lines = []
    if provenance.history:
        named = f", {code(provenance.origin)}" if provenance.origin is not None else ""
        lines.append(f"Source: the checkpoint of fingerprint {code(provenance.history[0].source)}{named}.")
    elif provenance.origin is not None:
        lines.append(f"Source: {code(provenance.origin)}.")
    return [*lines, _licence_line(licence)]


def _licence_line(licence: Licence | None) -> str:
    if licence is None:
        return "The licence is the source's; this file does not name it."
    if licence.file is None:
        return f"Licence: {code(licence.name)}, as the metadata of the source says."
    if licence.name == UNKNOWN:
        return f"Licence: that of the file {code(licence.file.name)} of the source."
    return f"Licence: {code(licence.name)}, as the file {code(licence.file.name)} of the source says."
