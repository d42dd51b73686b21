"""What two checkpoints differ in: configuration, weights and histories, without torch or numpy for safetensors.

Weights that differ alike are told together: by block and expert, as ``blocks 0-27: experts 0-7 gate_proj: F16 -> nf4``.
Whether two weights have equal bytes is told by SHA-256 where both are known, and by comparing the bytes otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from ditmoe_cli.files.names import in_expert, natural_key, split_name
from ditmoe_cli.files.streaming import chunks
from ditmoe_cli.formats.base import Weight
from ditmoe_cli.formats.registry import format_label
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.lineage import Kept, Kinship, Lineage, kept_experts, kinship
from ditmoe_cli.progress import BYTES, phase

Kind = Literal["only in A", "only in B", "stored otherwise", "other bytes"]
Evidence = Literal["metadata", "bytes"]


@dataclass(frozen=True)
class Stored:
    """How a weight is stored: its format, or its dtype, and its logical shape."""

    format: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """A weight that differs.

    Its name has the expert's number in the last checkpoint that both come from, where they are related. `a` and `b` are
    how it is stored, None where there is no such weight.
    """

    name: str
    kind: Kind
    a: Stored | None
    b: Stored | None


@dataclass(frozen=True)
class Differences:
    """What two checkpoints differ in.

    Attributes:
        configuration: the fields that differ, with the values of both.
        changes: the weights that differ, in natural order of their names.
        equal: how many weights are equal, byte for byte.
        evidence: what equal bytes were told by, on either side: the hashes in its metadata, or its bytes. Empty where
            no two weights could be equal.
        kin: how the checkpoints are related.
        kept: the experts of the last checkpoint that both come from which A and B kept; None where all, or not known.
        pairs: A's and B's weights by name, where both have one of the same logical shape.
    """

    configuration: Mapping[str, tuple[Any, Any]]
    changes: tuple[Change, ...]
    equal: int
    evidence: Mapping[str, frozenset[Evidence]]
    kin: Kinship
    kept: tuple[Kept | None, Kept | None]
    pairs: Mapping[str, tuple[Weight, Weight]]

    @property
    def same(self) -> bool:
        """Whether both are the same model: equal weights, equally stored, and one configuration."""
        return not self.configuration and not self.changes


def differences(a: Checkpoint, b: Checkpoint, read: bool = False) -> Differences:
    """Return what two checkpoints differ in.

    With `read`, hashes in the metadata are not relied on. Without, a checkpoint whose metadata lacks them is read to
    find its fingerprint where the other one has a history, and weights of both are compared byte by byte where a hash
    is unknown.
    """
    kin = kinship(*lineages(a, b, read))
    kept = (
        (kept_experts(kin.a, a.config.experts), kept_experts(kin.b, b.config.experts))
        if kin.relation != "unknown"
        else (None, None)
    )
    left, right = _Side(a, kept[0], read), _Side(b, kept[1], read)
    changes: list[Change] = []
    alike: list[str] = []
    for name in sorted(left.weights.keys() | right.weights.keys(), key=natural_key):
        kind = _kind(left, right, name)
        if kind is None:
            alike.append(name)
        else:
            changes.append(Change(name, kind, left.stored(name), right.stored(name)))
    pairs = _Pairs(left, right)
    other = pairs.unequal(alike)
    changes += [Change(name, "other bytes", left.stored(name), right.stored(name)) for name in other]
    changes.sort(key=lambda change: natural_key(change.name))
    fields = _fields(_settings(a), _settings(b))
    both = {name: (left.weights[name], right.weights[name]) for name in left.weights if name in right.weights}
    comparable = {name: (x, y) for name, (x, y) in both.items() if x.info.shape == y.info.shape}
    return Differences(fields, tuple(changes), len(alike) - len(other), pairs.evidence, kin, kept, comparable)


def lineages(a: Checkpoint, b: Checkpoint, read: bool = False) -> tuple[Lineage, Lineage]:
    """Return the lineages of two checkpoints. A fingerprint is read off the bytes where a history needs it."""
    sides = []
    for own, other in ((a, b), (b, a)):
        written = None if read else own.written_fingerprint
        fingerprint = own.fingerprint if written is None and (read or other.ancestors) else written
        sides.append(Lineage(fingerprint, own.header.provenance.history if own.header.provenance else ()))
    return sides[0], sides[1]


@dataclass(frozen=True)
class _Side:
    """A checkpoint whose weights are named in the numbering of experts of a common ancestor."""

    checkpoint: Checkpoint
    kept: Kept | None
    read: bool

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The weights by name."""
        return {self._name(name): weight for name, weight in self.checkpoint.weights.items()}

    def _name(self, name: str) -> str:
        parts = split_name(name)
        if self.kept is None or parts.block is None or parts.expert is None:
            return name
        return in_expert(parts.block, self.kept[parts.block][parts.expert], parts.rest)

    @cached_property
    def _recorded(self) -> Mapping[str, str]:
        return self.checkpoint.recorded_hashes

    def stored(self, name: str) -> Stored | None:
        """Return how a weight is stored; None where there is none."""
        weight = self.weights.get(name)
        return None if weight is None else Stored(format_label(weight.format or weight.info.dtype), weight.info.shape)

    def hash(self, member: str) -> tuple[str, Evidence] | None:
        """Return the SHA-256 of a stored tensor, and what tells it; None where it is unknown."""
        computed = self.checkpoint.hashes.get(member)
        if computed is not None:
            return computed, "bytes"
        recorded = None if self.read else self._recorded.get(member)
        return None if recorded is None else (recorded, "metadata")


def _kind(a: _Side, b: _Side, name: str) -> Kind | None:
    """Return how a weight differs, as far as descriptions tell."""
    left, right = a.weights.get(name), b.weights.get(name)
    if left is None or right is None:
        return "only in B" if left is None else "only in A"
    same = left.format == right.format and replace(left.info, name="") == replace(right.info, name="")
    return None if same else "stored otherwise"


@dataclass(frozen=True)
class _Pairs:
    """Weights of two checkpoints that are described alike, and what their bytes were compared by."""

    a: _Side
    b: _Side

    @cached_property
    def evidence(self) -> dict[str, frozenset[Evidence]]:
        """What bytes were compared by, on either side."""
        return {"a": frozenset(), "b": frozenset()}

    def unequal(self, names: Sequence[str]) -> list[str]:
        """Return the weights whose bytes differ."""
        members = {name: self._members(name) for name in names}
        pairs = dict.fromkeys(pair for each in members.values() for pair in each)
        equal = {pair: told for pair in pairs if (told := self._by_hash(*pair)) is not None}
        left = [pair for pair in pairs if pair not in equal]
        if left:
            equal.update(self._by_bytes(left))
        return [name for name in names if not all(equal[pair] for pair in members[name])]

    def _members(self, name: str) -> list[tuple[str, str]]:
        return list(zip(self.a.weights[name].members, self.b.weights[name].members, strict=True))

    def _by_hash(self, a: str, b: str) -> bool | None:
        """Return whether two tensors are equal by their hashes; None where one is unknown."""
        left, right = self.a.hash(a), self.b.hash(b)
        if left is None or right is None:
            return None
        self._tell(left[1], right[1])
        return left[0] == right[0]

    def _by_bytes(self, pairs: Collection[tuple[str, str]]) -> dict[tuple[str, str], bool]:
        """Return of pairs of tensors whether their bytes are equal; a pair is read up to its first difference."""
        self._tell("bytes", "bytes")
        infos = self.a.checkpoint.header.tensors
        with phase("comparing bytes", sum(infos[a].nbytes for a, _ in pairs), BYTES) as progress:
            found = {}
            for a, b in pairs:
                found[a, b] = _same_bytes(self.a.checkpoint.reader.raw(a), self.b.checkpoint.reader.raw(b))
                progress(infos[a].nbytes)
        return found

    def _tell(self, a: Evidence, b: Evidence) -> None:
        self.evidence["a"] |= {a}
        self.evidence["b"] |= {b}


def _same_bytes(a: memoryview, b: memoryview) -> bool:
    # as bytes, since comparing views takes their elements one by one
    return a.nbytes == b.nbytes and all(bytes(x) == bytes(y) for x, y in zip(chunks(a), chunks(b), strict=True))


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration, and how the checkpoint was distilled where it was."""
    distilled = checkpoint.distilled
    return {**checkpoint.config.to_json(), **({"distilled": asdict(distilled)} if distilled is not None else {})}


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields of two configurations that differ; those that hold their usual value are not written."""
    usual = {"null_class": True, "router_mode": "plain"}
    left, right = {**usual, **a}, {**usual, **b}
    return {name: (left.get(name), right.get(name)) for name in (left | right) if left.get(name) != right.get(name)}


@dataclass(frozen=True)
class Group:
    """Weights that differ alike.

    Attributes:
        rests: what the names end in, after block and expert, as ``gate_proj.weight``.
        blocks: the runs of blocks, as (first, last); none outside of blocks.
        experts: the experts of each of these blocks; empty for weights of no expert, None where they differ by block.
        kind: how the weights differ.
        a, b: how they are stored on both sides, None where there is none.
        names: all of them.
    """

    rests: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]
    experts: tuple[int, ...] | None
    kind: Kind
    a: str | None
    b: str | None
    names: tuple[str, ...]


_MOST_RUNS = 3  # of blocks that a change is told in; where there would be more, experts are left out


@dataclass(frozen=True)
class _Alike:
    """What changes have in common that are told together: kind, formats on both sides, and whether shapes differ."""

    kind: Kind
    a: str | None
    b: str | None
    reshaped: bool


@dataclass(frozen=True)
class _Place:
    """A block, None for what is outside of blocks, and the experts there whose weights differ alike."""

    block: int | None
    experts: tuple[int, ...]


def grouped(changes: Iterable[Change]) -> list[Group]:
    """Return changes in groups: of one kind, between the same formats, in runs of blocks that have the same experts."""
    by_rest: dict[tuple[_Alike, str], list[Change]] = {}
    for change in changes:
        by_rest.setdefault((_alike(change), split_name(change.name).rest), []).append(change)
    together: dict[tuple[_Alike, tuple[_Place, ...]], dict[str, list[Change]]] = {}
    for (alike, rest), members in by_rest.items():
        together.setdefault((alike, _places(members)), {})[rest] = members
    groups = [_group(alike, run, of) for (alike, places), of in together.items() for run in _runs_of_places(places)]
    return sorted(groups, key=lambda group: (not group.blocks, group.blocks, natural_key(group.names[0])))


def _alike(change: Change) -> _Alike:
    a, b = change.a, change.b
    return _Alike(change.kind, a.format if a else None, b.format if b else None, bool(a and b and a.shape != b.shape))


def _places(changes: Iterable[Change]) -> tuple[_Place, ...]:
    places: dict[int | None, list[int]] = {}
    for change in changes:
        parts = split_name(change.name)
        places.setdefault(parts.block, []).extend(() if parts.expert is None else (parts.expert,))
    return tuple(_Place(block, tuple(sorted(experts))) for block, experts in places.items())


def _runs_of_places(places: Sequence[_Place]) -> list[list[_Place]]:
    """Return places in runs of neighbouring blocks that have the same experts; in one where these would be many."""
    runs: list[list[_Place]] = []
    for place in places:
        last = runs[-1][-1] if runs else None
        follows = last is not None and last.block is not None and place.block == last.block + 1
        if last is not None and follows and last.experts == place.experts:
            runs[-1].append(place)
        else:
            runs.append([place])
    return runs if len(runs) <= _MOST_RUNS else [list(places)]


def _group(alike: _Alike, places: Sequence[_Place], of: Mapping[str, Sequence[Change]]) -> Group:
    blocks = [place.block for place in places]
    members = [change for changes in of.values() for change in changes if split_name(change.name).block in blocks]
    sides = [[change.a for change in members], [change.b for change in members]]
    a, b = (_told(name, side, alike.reshaped) for name, side in zip((alike.a, alike.b), sides, strict=True))
    return Group(
        rests=tuple(of),
        blocks=tuple(_runs([block for block in blocks if block is not None])),
        experts=places[0].experts if len({place.experts for place in places}) == 1 else None,
        kind=alike.kind,
        a=a,
        b=b,
        names=tuple(sorted((change.name for change in members), key=natural_key)),
    )


def _told(name: str | None, side: Iterable[Stored | None], reshaped: bool) -> str | None:
    return f"{name} {_spans([stored.shape for stored in side if stored])}" if name and reshaped else name


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of numbers that follow each other, each as its first and last."""
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda item: item[1] - item[0]):
        members = [number for _, number in run]
        yield members[0], members[-1]


def _spans(shapes: Sequence[tuple[int, ...]]) -> str:
    """Return shapes as one: ``24-96 x 32`` where sides differ, ``of several ranks`` where their number does."""
    if len({len(shape) for shape in shapes}) > 1:
        return "of several ranks"
    ends = ((min(sides), max(sides)) for sides in zip(*shapes, strict=True))
    return " x ".join(str(low) if low == high else f"{low}-{high}" for low, high in ends) or "scalar"
