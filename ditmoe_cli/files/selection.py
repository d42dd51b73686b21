"""Which tensors of a file are the model's: those under one key or prefix, averaged ones where there are any.

A file may hold several sets of weights: under keys of a pickle, ``{"model": …, "ema": …}``, or under prefixes of names,
``model.blocks.0.…`` beside ``ema_model.blocks.0.…``. Both are one thing here: what stands before upstream's name in the
joined path is the set's prefix. Wrappers such as ``module.`` or ``_orig_mod.`` are dropped wherever they stand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.names import ROUTER, natural_key, unwrapped

_ROOTS = frozenset(("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer"))
_ROUTER = re.compile(rf"blocks\.\d+\.{re.escape(ROUTER)}")
_AVERAGED = frozenset(("ema", "swa", "shadow", "polyak", "avg", "average", "averaged", "averaging"))
_NOT_AVERAGED = frozenset(("non", "no", "online", "current", "raw", "exp", "collected"))  # exp_avg is an optimizer's
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_RAW_ORDER = ("model", "", "state_dict")  # of sets of weights that are not averaged


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: the keys of the mapping that holds it, its name there, and its shape."""

    keys: tuple[str, ...]
    name: str
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """Keys and name, joined by dots."""
        return ".".join((*self.keys, self.name))


@dataclass
class _Set:
    """A set of weights: its prefix without wrappers, as stored, and its entries by upstream name."""

    prefix: str
    shown: str
    members: dict[str, Entry] = field(default_factory=dict)

    @property
    def is_model(self) -> bool:
        """Whether a router is among the weights."""
        return any(_ROUTER.fullmatch(name) for name in self.members)

    @property
    def is_averaged(self) -> bool:
        """Whether the prefix says that the weights are averaged."""
        return looks_averaged(self.prefix)

    def add(self, name: str, entry: Entry) -> None:
        """Add a weight. Raises `BadInputError` where another one is called the same without wrappers."""
        other = self.members.setdefault(name, entry)
        if other is not entry:
            raise BadInputError(
                f"tensors {other.path!r} and {entry.path!r} both stand for {name!r}; remove one of them"
            )


@dataclass(frozen=True)
class Selection:
    """The weights of a file's model by upstream name.

    Attributes:
        entries: the entry of each weight, in natural order of the names.
        shown: the key or prefix that they stand under; empty for none.
        notes: which weights were taken, where there was a choice.
        warnings: what looks like averaged weights, or stands beside the weights, and is not read.
    """

    entries: dict[str, Entry]
    shown: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def looks_averaged(key: str) -> bool:
    """Return whether a key or prefix names averaged weights, as ``ema``, ``state_dict_ema`` or ``modelEMA.shadow``."""
    words = {word.lower() for word in _WORD.findall(key)}
    return bool(words & _AVERAGED) and not words & _NOT_AVERAGED


def select(entries: Sequence[Entry]) -> Selection | None:
    """Return the model's weights among the tensors of a file; None where no set of them has a router.

    Raises `BadInputError` where two names differ in their wrappers alone.
    """
    sets = _sets(entries)
    models = [found for found in sets.values() if found.is_model]
    models += _without_dots(models, entries)
    if not models:
        return None
    averaged = [found for found in models if found.is_averaged]
    raw = sorted((found for found in models if not found.is_averaged), key=_raw_order)
    chosen = next((found for found in averaged if found.prefix == "ema"), None) or [*averaged, *raw][0]
    notes, warnings = _told(chosen, averaged, raw)
    members, left_out = _with_strangers(chosen, models, entries)
    if chosen.is_averaged and raw and "pos_embed" not in members and "pos_embed" in raw[0].members:
        members["pos_embed"] = raw[0].members["pos_embed"]  # it is not trained, so averages may leave it out
    ordered = {name: members[name] for name in sorted(members, key=natural_key)}
    return Selection(ordered, chosen.shown, tuple(notes), (*warnings, *left_out))


def all_of(entries: Sequence[Entry]) -> Selection:
    """Return all tensors of one mapping, which is no DiT-MoE, without the wrappers in their names.

    Raises `BadInputError` where two names differ in their wrappers alone.
    """
    everything = _Set("", "")
    for entry in entries:
        everything.add(unwrapped(entry.name)[0], entry)
    members = everything.members
    return Selection({name: members[name] for name in sorted(members, key=natural_key)})


def _sets(entries: Iterable[Entry]) -> dict[str, _Set]:
    """Return the sets of weights by prefix; tensors without a name of upstream's are in none."""
    sets: dict[str, _Set] = {}
    for entry in entries:
        parsed = _parsed(entry)
        if parsed is not None:
            prefix, name, shown = parsed
            sets.setdefault(prefix, _Set(prefix, shown)).add(name, entry)
    return sets


def _parsed(entry: Entry) -> tuple[str, str, str] | None:
    """Return prefix, upstream name and prefix as stored of a tensor; None where its path has no name of upstream's."""
    name, parts = unwrapped(entry.path)
    words = name.split(".")
    root = next(
        (
            i
            for i, word in enumerate(words)
            if word in _ROOTS and (word != "blocks" or _is_number(words[i + 1 : i + 2]))
        ),
        None,
    )
    if root is None:
        return None
    shown = ".".join(entry.path.split(".")[: parts[root]])
    return ".".join(words[:root]), ".".join(words[root:]), shown


def _is_number(words: list[str]) -> bool:
    return bool(words) and words[0].isdecimal()


def _raw_order(found: _Set) -> int:
    return _RAW_ORDER.index(found.prefix) if found.prefix in _RAW_ORDER else len(_RAW_ORDER)


def _without_dots(models: Sequence[_Set], entries: Iterable[Entry]) -> list[_Set]:
    """Return averaged sets whose names lost their dots, as Latent Diffusion's LitEma stores them."""
    whole = next((found for found in models if not found.is_averaged), None)
    if whole is None:
        return []
    names = {name.replace(".", ""): name for name in whole.members}
    sets: dict[str, _Set] = {}
    for entry in entries:
        prefix, _, last = entry.path.rpartition(".")
        if looks_averaged(prefix) and last in names:
            sets.setdefault(prefix, _Set(prefix, prefix)).add(names[last], entry)
    return [found for found in sets.values() if found.is_model]


def _told(chosen: _Set, averaged: Sequence[_Set], raw: Sequence[_Set]) -> tuple[list[str], list[str]]:
    """Return what to say of the set that was chosen, and of those that were not."""
    notes, warnings = [], []
    if chosen.is_averaged:
        others = f", not those {_under(raw[0])}" if raw else ""
        notes.append(f"the averaged weights are read, {_under(chosen)}{others}")
    elif len(raw) > 1:
        others = ", ".join(_under(other) for other in raw if other is not chosen)
        warnings.append(f"the weights {_under(chosen)} are read, not those {others}")
    warnings += [
        f"{other.shown!r} looks like averaged weights too, and is not read; {chosen.shown!r} is"
        for other in averaged
        if other is not chosen
    ]
    return notes, warnings


def _under(found: _Set) -> str:
    return f"under {found.shown!r}" if found.shown else "under no key"


def _with_strangers(
    chosen: _Set, models: Sequence[_Set], entries: Sequence[Entry]
) -> tuple[dict[str, Entry], list[str]]:
    """Return the weights with those of no upstream name beside them, and what to say of those that are left out.

    Left out are numbers, such as an average's count of updates, and tensors under another prefix, such as a VAE's.
    Others stay, and are refused later by name.
    """
    members, taken = dict(chosen.members), {entry for found in models for entry in found.members.values()}
    keys = next(iter(members.values())).keys
    prefix = chosen.prefix + "." if chosen.prefix else ""
    numbers: list[str] = []
    foreign: Counter[str] = Counter()
    for entry in entries:
        if entry.keys != keys or entry in taken:
            continue
        name = unwrapped(entry.path)[0]
        if not entry.shape:
            numbers.append(entry.name)
        elif name.startswith(prefix):
            members[name.removeprefix(prefix)] = entry
        else:
            foreign[entry.name.partition(".")[0]] += 1
    told = [f"{', '.join(map(repr, numbers))} beside the weights is no weight, and is left out"] if numbers else []
    told += [
        f"{count} tensors under {name!r} are none of the model's, and are left out" for name, count in foreign.items()
    ]
    return members, told
