"""The routing profile: the file that a calibration run is stored in, and its reader.

One safetensors file. Sizes: L blocks, B step bins, P positions, E experts (the most of any block; missing ones
stay 0), R router rows, I images, T reservoir tokens, S states, D width, H neurons. Branch 0 is conditional, 1
unconditional. g is a routing weight, f an expert's output, γ the block's residual gate, φ an expert's neurons.

Counters, over all tokens; a ``fast`` profile has no more:

    flip_rate               F64  ()               where processes with unequal threads shared the work: the share of
                                                  choices that differed when rank 0 ran another's batch
    counts                  I64  (L, 2, B, P, E)  tokens routed to an expert
    selected                I64  (L, 2, B, E)     the same over all positions
    tokens                  I64  (2, B)           tokens seen per block
    image.steps             I32  (I, L, 2, B, E)  per image: what resampling over images needs
    image.positions         I16  (I, L, 2, P, E)
    image.final             F32  (I, C, S, S)     where each trajectory ended, or the image that was given
    coactivation            I64  (L, 2, B, E, E)  tokens that chose both; the diagonal is `selected`
    transitions.block       I64  (L-1, 2, B, E, E)  expert in a block, expert in the next
    transitions.step        I64  (L, 2, B, E, E)  expert a step before, expert now, at the same position
    transitions.branch      I64  (L, B, E, E)     expert in the conditional branch, expert in the other, of a token
    transitions.neighbour   I64  (L, 2, B, E, E)  expert of a patch, expert of the one to its right or below it
    gate_mass, gate_square  F64  (L, 2, B, E)     Σ g, Σ g²
    norm, norm_square, gate_norm, gate_square_norm_square, norm_max      Σ and max of ‖γ ⊙ f‖, with g as named
    raw_norm, raw_norm_square, raw_gate_norm      the same before γ
    router.entropy, .margin, .topk_mass, .logsumexp_square   F64  (L, 2, B)  sums over tokens
    router.logit_sum, .logit_gram                 F64  (L, 2, B, R), (L, 2, B, R, R)

Moments, over all tokens:

    easy_ep                 F64  (L, 2, B, E)     Σ g ‖γ ⊙ f‖ max(1 - cos(x, x + γ r), 0)
    output.gram             F64  (L, 2, B, E, E)  Σ ⟨γ g_i f_i, γ g_j f_j⟩ over tokens that chose both
    output.raw_gram, .cosine                      F64  (L, 2, B, E, E)  Σ ⟨f_i, f_j⟩ and its cosine, over the same
    gate_ratio, gate_ratio_square                 F64  (L, 2, B, E, E)  Σ r, Σ r² with r = g_i / (g_i + g_j)
    output.sum, .gate_square_sum                  F32  (L, 2, B, E, D)  Σ f, Σ g² f over routed tokens
    output.all_token_mean   F32  (L, 2, B, E, D)  mean f over all reservoir tokens, routed or not
    output.cka              F32  (L, E, E)        centred kernel alignment of outputs on the same reservoir tokens
    input.max, .square      F32  (L, E, D)        max |u|, Σ u² over routed tokens
    gamma.sum, .square      F32  (L, 2, B, D);  gamma.images  I64  (2, B)
    neuron.energy, .max     F32  (L, E, H)        Σ, max of (g φ)²

States and reservoir:

    states.z, .t, .label, .image, .bin         the model's inputs: F32 (S, C, H, W), F32 (S,), I64 (S,) ...
    reservoir.inputs     BF16 (L, T, D)        tokens u that entered the mixture, the same tokens in every block
    reservoir.state, .branch, .position        I32  (T,)  where each came from
    reservoir.gamma      F32  (L, S, 2, D)     γ of each state and branch

Reading the small tables needs neither torch nor numpy, so that planners can run without them.
"""

from __future__ import annotations

import array
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.briefs import Brief, Fact, heat_map, in_runs_of
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.fingerprint import canonical_json, file_digest
from ditmoe_cli.files.header import FileHeader, TensorInfo, read_safetensors_header
from ditmoe_cli.files.json_text import parse_json
from ditmoe_cli.files.provenance import check_schema
from ditmoe_cli.files.reader import SafetensorsReader, dtype_code, tensor_bytes, torch_dtype
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import write_safetensors
from ditmoe_cli.model.dtypes import recorded_dtype
from ditmoe_cli.routing.named_arrays import NamedArrays

if TYPE_CHECKING:
    from torch import Tensor

PROFILE_SCHEMA = "ditmoe.profile/1"
BRANCHES = 2
_TYPECODES = {"I64": "q", "F64": "d"}
_TABLES: Mapping[str, str] = {"selected": "I64", "gate_mass": "F64", "gate_norm": "F64"}
_OPTIONAL_TABLES: Mapping[str, str] = {"norm": "F64", "norm_square": "F64", "easy_ep": "F64"}
_REQUIRED = ("counts", *_TABLES, "tokens")

Table = list[list[list[list[float]]]]


@dataclass(frozen=True)
class RoutingTables:
    """The small tables as nested lists [block][branch][bin][expert], for torch-free planners.

    `experts` is the number of experts of each block, `cfg` the guidance scale of the calibration run. `optional` holds
    the tables that a profile may lack: a ``fast`` one lacks ``easy_ep``.
    """

    experts: tuple[int, ...]
    bins: int
    cfg: float
    selected: Table
    gate_mass: Table
    gate_norm: Table
    optional: Mapping[str, Table] = field(default_factory=dict)

    @property
    def shares(self) -> list[list[float]]:
        """The share n_j / Σ_i n_i of a block's selections that went to each expert; 0 in a block without any."""
        totals = [
            [sum(step[expert] for branch in self.selected[block] for step in branch) for expert in range(n)]
            for block, n in enumerate(self.experts)
        ]
        return [[count / max(sum(block), 1) for count in block] for block in totals]

    def table(self, name: str) -> Table:
        """Return an optional table. Raises `BadInputError` where the profile has none."""
        if name not in self.optional:
            raise BadInputError(f"the profile has no table {name!r}; profile without ⟨fast⟩")
        return self.optional[name]


@dataclass(frozen=True, repr=False)
class RoutingProfile(Brief):
    """A profile file, opened: its metadata at once, its tensors when asked for.

    `checkpoint` is the fingerprint of the checkpoint it is valid for; `calibration` the settings of the run.
    """

    path: Path
    header: FileHeader
    checkpoint: str
    calibration: Mapping[str, Any]
    experts: tuple[int, ...]

    @property
    def _reader(self) -> SafetensorsReader:
        return SafetensorsReader(self.header.tensors)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return file_digest(self.path)

    @property
    def arrays(self) -> NamedArrays:
        """All stored tensors as arrays of numpy with named axes, each read when it is asked for."""
        return NamedArrays({name: tensor.info for name, tensor in self.header.tensors.items()}, self._reader.raw)

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor."""
        return self._reader.tensor(name)

    def block_tensor(self, name: str, block: int) -> Tensor:
        """Return one block's part of a stored tensor whose first axis counts blocks, reading no other's."""
        import torch

        info = self.header.tensors[name].info
        size = info.nbytes // info.shape[0]
        data = bytearray(self._reader.raw(name)[block * size : (block + 1) * size])
        return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).reshape(info.shape[1:])

    @cached_property
    def tables(self) -> RoutingTables:
        """The small tables, read without torch or numpy."""
        named = {name: self._table(name) for name in _TABLES}
        bins = self.header.tensors["selected"].info.shape[2]
        optional = {name: self._table(name) for name in _OPTIONAL_TABLES if name in self.header.tensors}
        return RoutingTables(self.experts, bins, float(self.calibration["cfg"]), **named, optional=optional)

    def _table(self, name: str) -> Table:
        info = self.header.tensors[name].info
        values = array.array(_TYPECODES[info.dtype], bytes(self._reader.raw(name)))
        if sys.byteorder == "big":
            values.byteswap()
        nested: Any = list(values)
        for size in reversed(info.shape[1:]):
            nested = [nested[i : i + size] for i in range(0, len(nested), size)]
        result: Table = nested
        return result

    @property
    def flip_rate(self) -> float | None:
        """The share of choices that differed between processes with unequal threads; None where none was measured."""
        if "flip_rate" not in self.header.tensors:
            return None
        rate: float = struct.unpack("<d", bytes(self._reader.raw("flip_rate")))[0]
        return rate

    def never_routed(self) -> list[tuple[int, int]]:
        """Return the (block, expert) pairs that no calibration token chose."""
        selected = self.tables.selected
        return [
            (block, expert)
            for block, n in enumerate(self.experts)
            for expert in range(n)
            if not any(step[expert] for branch in selected[block] for step in branch)
        ]

    def _brief(self) -> list[Fact]:
        run, dead, inputs = self.calibration, self.never_routed(), self.header.tensors.get("reservoir.inputs")
        return [
            ("", self.path.name),
            ("experts", in_runs_of(self.experts)),
            ("calibration", f"{run['images']} images, {run['steps']} steps of {run['solver']}, cfg {run['cfg']:g}"),
            ("step bins", run["bins"]),
            ("kept", f"{inputs.info.shape[1]:,} tokens of each block" if inputs else "counters only"),
            ("never routed", ", ".join(f"block {b} expert {e}" for b, e in dead) or "none"),
            ("of checkpoint", self.checkpoint[:12]),
        ]

    def _repr_html_(self) -> str:
        uniform = 1 / max(self.experts, default=1)
        shares = heat_map("Share of a block's selections", self.tables.shares, "block", "expert", uniform)
        return f"{super()._repr_html_()}{shares}"


def empty_tables(experts: tuple[int, ...]) -> RoutingTables:
    """Return tables without any counts, for criteria that need no profile."""
    return RoutingTables(experts, 0, 1.0, [], [], [])


def read_profile(path: Path) -> RoutingProfile:
    """Open a profile. Raises `BadInputError` where the file is missing, damaged or of another schema."""
    if not path.is_file():
        raise BadInputError(f"{path}: no such profile; make one with ditmoe profile-experts")
    header = read_safetensors_header(path)
    where = f"{path}: profile metadata"
    try:
        document = check_schema(parse_json(header.metadata.get("ditmoe", "null")), PROFILE_SCHEMA, where)
        experts = tuple(document["experts"])
        if not all(type(n) is int and n > 0 for n in experts):
            raise ValueError(f"experts are {experts}")
        calibration = dict(document["calibration"])
        calibration["dtype"] = recorded_dtype(calibration)
        profile = RoutingProfile(path, header, str(document["checkpoint"]), calibration, experts)
        bins, cfg = int(profile.calibration["bins"]), float(profile.calibration["cfg"])
        if not math.isfinite(cfg):
            raise ValueError(f"cfg is {cfg}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadInputError(f"{where} is malformed ({error})") from None
    _check_tables(profile, bins)
    return profile


def _check_tables(profile: RoutingProfile, bins: int) -> None:
    """Raise `BadInputError` where the counters' shapes are not those of the metadata's blocks, bins and experts."""
    tensors = profile.header.tensors
    missing = next((name for name in _REQUIRED if name not in tensors), None)
    if missing is not None:
        raise BadInputError(f"{profile.path}: the profile has no tensor {missing!r}")
    table = (len(profile.experts), BRANCHES, bins, max(profile.experts, default=0))
    positions = tensors["counts"].info.shape[3:4]
    optional = {name: dtype for name, dtype in _OPTIONAL_TABLES.items() if name in tensors}
    expected = {name: TensorInfo(name, dtype, table) for name, dtype in {**_TABLES, **optional}.items()}
    expected["counts"] = TensorInfo("counts", "I64", (*table[:3], *positions, table[3]))
    expected["tokens"] = TensorInfo("tokens", "I64", (BRANCHES, bins))
    for name, wanted in expected.items():
        info = tensors[name].info
        if info != wanted:
            raise BadInputError(
                f"{profile.path}: tensor {name!r} is {info.dtype} {list(info.shape)}, not {wanted.dtype} "
                f"{list(wanted.shape)} as {table[0]} blocks, {bins} bins and {table[3]} experts need"
            )


def require_profile_of(profile: RoutingProfile, fingerprint: str, checkpoint: Path) -> RoutingProfile:
    """Return `profile`. Raises `BadInputError` where it is the profile of another checkpoint."""
    if profile.checkpoint != fingerprint:
        raise BadInputError(
            f"{profile.path}: is the profile of another checkpoint ({profile.checkpoint[:12]}), not of {checkpoint} "
            f"({fingerprint[:12]}); profile that one"
        )
    return profile


def write_profile(
    path: Path,
    tensors: Mapping[str, Tensor],
    checkpoint: str,
    calibration: Mapping[str, Any],
    experts: tuple[int, ...],
    force: bool,
    inputs: tuple[Path, ...],
) -> int:
    """Write a profile, whole or not at all, and return its size in bytes."""
    infos = [TensorInfo(name, dtype_code(t.dtype, name), tuple(t.shape)) for name, t in sorted(tensors.items())]
    document = {
        "schema": PROFILE_SCHEMA,
        "checkpoint": checkpoint,
        "calibration": dict(calibration),
        "experts": list(experts),
    }
    metadata = {"format": "pt", "ditmoe": canonical_json(document)}
    with staged(path, force, inputs) as staging:
        return write_safetensors(staging, infos, lambda info: tensor_bytes(tensors[info.name]), lambda _: metadata)
