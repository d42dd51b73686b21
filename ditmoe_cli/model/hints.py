"""What training arguments and ``config.json`` say of a model, in whatever spelling and nesting.

Documents come from upstream's ``args``, from configurations of diffusers, Lightning and OmegaConf, and from the
metadata of our own files. `Hints` returns a setting by the name that `DiTMoEConfig` gives it, and keeps the spelling
for messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "input_size": ("input_size", "sample_size", "latent_size"),
    "patch_size": ("patch_size",),
    "in_channels": ("in_channels",),
    "out_channels": ("out_channels",),
    "hidden_size": ("hidden_size",),
    "depth": ("depth", "num_layers", "n_layers"),
    "num_heads": ("num_heads", "num_attention_heads", "n_heads", "n_head"),
    "head_dim": ("attention_head_dim", "head_dim"),
    "num_classes": ("num_classes", "class_num", "n_classes", "num_embeds_ada_norm", "num_class_embeds"),
    "num_experts": ("num_experts", "n_routed_experts", "num_routed_experts", "n_experts"),
    "top_k": (
        *(
            "top_k",
            "router_top_k",
            "num_experts_per_tok",
            "num_experts_per_token",
            "experts_per_token",
            "num_selected_experts",
        ),
        *("n_activated_experts", "moe_top_k"),
    ),
    "class_dropout": (
        *("class_dropout_prob", "class_dropout", "class_drop_prob", "label_dropout_prob", "label_dropout"),
        *("cond_drop_prob", "cfg_dropout"),
    ),
}
_DEEPEST = 4
_SEPARATORS = re.compile(r"[-_ .]")
_MODEL_NAME = re.compile(r"^DiT(?:-MoE)?-([A-Z]+)/(\d+)(?:-(\d+)E(\d+)A)?$")


@dataclass(frozen=True)
class Hint:
    """A setting as a document has it: its spelling there, and its value."""

    spelling: str
    value: Any

    def __str__(self) -> str:
        return f"{self.spelling}={self.value}"


@dataclass(frozen=True)
class ModelName:
    """A name of upstream's, such as ``DiT-S/2-8E2A``: its size and patch, experts and top-k where it has them."""

    size: str
    patch: int
    experts: int | None = None
    top_k: int | None = None


@dataclass(frozen=True)
class Hints:
    """The settings of a document; `warnings` name those that it gives twice, differently."""

    values: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def find(self, setting: str) -> Hint | None:
        """Return a setting of `SPELLINGS`, or of its own name, in the first spelling that the document has."""
        found = self.all_of(setting)
        return found[0] if found else None

    def all_of(self, setting: str) -> list[Hint]:
        """Return a setting in all spellings that the document has, in the order of `SPELLINGS`."""
        by_spelling: dict[str, list[Hint]] = {}
        for name, value in self.values.items():
            if value is not None:
                by_spelling.setdefault(squeezed(name), []).append(Hint(name, value))
        spellings = dict.fromkeys(map(squeezed, SPELLINGS.get(setting, (setting,))))
        return [hint for spelling in spellings for hint in by_spelling.get(spelling, ())]

    def whole(self, setting: str) -> int:
        """Return a setting that is a positive integer; 0 where it is absent or anything else."""
        hint = self.find(setting)
        return hint.value if hint is not None and is_whole(hint.value) else 0

    def flag(self, setting: str) -> bool | None:
        """Return a setting that is true or false, also as 0, 1 or a word; None where it is absent or anything else."""
        hint = self.find(setting)
        text = str(hint.value).lower() if hint is not None and isinstance(hint.value, bool | int | str) else ""
        return {"true": True, "1": True, "false": False, "0": False}.get(text)

    def number(self, setting: str) -> float | None:
        """Return a setting that is a number; None where it is absent or anything else."""
        hint = self.find(setting)
        if hint is None or isinstance(hint.value, bool) or not isinstance(hint.value, int | float):
            return None
        try:
            return float(hint.value)
        except OverflowError:
            return None

    @property
    def model_name(self) -> ModelName | None:
        """The name of upstream's that ``model`` holds; None for any other."""
        match = _MODEL_NAME.match(str(self.values.get("model", "")))
        if match is None:
            return None
        experts, top_k = (int(part) if part else None for part in (match[3], match[4]))
        return ModelName(match[1], int(match[2]), experts, top_k)


def squeezed(name: str) -> str:
    """Return a name without what programs spell differently: ``numHeads``, ``num-heads`` and ``num_heads`` are one."""
    return _SEPARATORS.sub("", name).lower()


def is_whole(value: object) -> bool:
    """Return whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_hints(document: Mapping[str, Any]) -> Hints:
    """Return the settings of a document whose parts may be nested, as ``{"model": {"num_heads": 4}}``.

    An outer value stands before an inner one. Inner values that contradict each other are left out, with a warning.
    """
    found: dict[str, tuple[int, list[Any]]] = {}
    for level, name, value in _leaves(document):
        known, values = found.get(name, (level, []))
        if level < known or not values:
            found[name] = (level, [value])
        elif level == known and value not in values:
            values.append(value)
    settings = {squeezed(spelling) for spellings in SPELLINGS.values() for spelling in spellings}
    twice = [
        f"the file says both {' and '.join(f'{name}={value}' for value in values)}, so neither is taken"
        for name, (_, values) in found.items()
        if len(values) > 1 and squeezed(name) in settings
    ]
    hints = Hints({name: values[0] for name, (_, values) in found.items() if len(values) == 1})
    return Hints(hints.values, (*twice, *_contradictions(hints)))


def _contradictions(hints: Hints) -> list[str]:
    """Return a warning for each setting whose spellings have different values, of which the first is taken."""
    spelled = [hints.all_of(setting) for setting in SPELLINGS]
    return [
        f"the file says {first} and {other}; the first is taken"
        for first, *others in filter(None, spelled)
        if (other := next((hint for hint in others if hint.value != first.value), None)) is not None
    ]


def _leaves(document: Mapping[Any, Any], level: int = 0) -> Iterator[tuple[int, str, Any]]:
    """Yield the depth, name and value of all entries that are no mappings, outer ones first."""
    inner = [value for value in document.values() if isinstance(value, Mapping)]
    for name, value in document.items():
        if not isinstance(value, Mapping):
            yield level, str(name), _number(value) if squeezed(str(name)) in _NUMERIC else value
    for value in inner if level < _DEEPEST else ():
        yield from _leaves(value, level + 1)


_NUMERIC = frozenset(squeezed(spelling) for spellings in SPELLINGS.values() for spelling in spellings)


def _number(value: object) -> object:
    """Return what is a number in text, as in YAML of command lines, as one, and 2.0 as 2; anything else as it is."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value
