"""The corpora of damaged inputs: one for each kind of file that ditmoe reads."""

from __future__ import annotations

import argparse
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from cli_helpers import here
from compressing import opened, profile_of, pruning, quantising
from mutating import (
    Corpus,
    Pickled,
    Safetensors,
    a_provenance,
    hurt_bytes,
    hurt_index,
    hurt_json,
    hurt_pickle,
    hurt_safetensors,
    hurt_state,
    packed_model,
    read_checkpoint,
    read_tensors,
    small_model,
)
from PIL import Image

from ditmoe_cli.cli.stage import Stage, parse_stage
from ditmoe_cli.compression.plan import read_plan
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.evaluation.features.statistics_files import StoredStatistics, read_statistics, write_statistics
from ditmoe_cli.evaluation.images import ImageSet, kind_of, read_images, write_images
from ditmoe_cli.evaluation.samples import read_origin
from ditmoe_cli.evaluation.scores.feature_statistics import FeatureStatistics
from ditmoe_cli.files.header import TensorInfo, encode_header
from ditmoe_cli.files.provenance import Provenance
from ditmoe_cli.files.workfolder import WorkFolder
from ditmoe_cli.routing.profile import read_profile

_NPY_SHAPES = (
    "(1000000000000,)",
    "(-1,)",
    "(2, 2",
    "(1e9,)",
    "()",
    "(0,)",
    "((((",
    "(2**40,)",
    "None",
    "(5, 5)",
    "(" + "9" * 500 + ",)",
)
_NPY_TYPES = (
    "<f8",
    "|O",
    "<f4",
    "|S1000000000",
    "<U1",
    "|u1",
    "<i8",
    "f8,i4",
    "|V8",
    "x",
    "[('a', '<f8')]",
    "<c16",
    "<M8",
)


def checkpoints(folder: Path) -> list[Corpus]:
    """Damaged checkpoints: safetensors plain and packed, and pickles."""
    small, packed = small_model(), packed_model()
    plain, stored = (
        Safetensors.of(model.save(folder / f"{name}.safetensors", provenance=a_provenance(model)).read_bytes())
        for name, model in (("small", small), ("packed", packed))
    )
    kept = {"x.weight": (8, 2), "x.bias": (8,), "empty": (0, 3), "blocks.0.scalar": ()}
    few = Safetensors.of(_few(folder / "few.safetensors", kept, a_provenance(small)).read_bytes())
    document = {
        "model": dict(small.state),
        "ema": dict(small.state),
        "args": argparse.Namespace(num_experts=2, lr=1e-4, nested={"a": [1, 2]}),
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "array": np.zeros(3),
        "epoch": 3,
    }
    pickled = Pickled.of(document, folder)
    read_checkpoint(folder / "small.safetensors"), read_checkpoint(folder / "packed.safetensors")
    tensors, pickles = folder / "x.safetensors", folder / "x.pt"
    return [
        Corpus("headers of any tensors", lambda r: _put(tensors, hurt_safetensors(r, few)), read_tensors),
        Corpus("headers of a model", lambda r: _put(tensors, hurt_safetensors(r, plain)), read_checkpoint),
        Corpus("packed weights", lambda r: _put(tensors, hurt_safetensors(r, stored)), read_checkpoint),
        Corpus("states of packed weights", lambda r: _put(tensors, hurt_state(r, stored)), read_checkpoint),
        Corpus("pickles", lambda r: _put(pickles, hurt_pickle(r, pickled)), read_checkpoint),
        Corpus("ditmoe inspect", lambda r: _put(tensors, hurt_safetensors(r, plain)), _inspected),
    ]


def folders(folder: Path) -> list[Corpus]:
    """Damaged indices, ``config.json`` and ``latest`` in folders with links, pipes and devices."""
    model = small_model()
    model.save(folder / "shards", shard_bytes=4000)
    shards = folder / "shards"
    (shards / "loop.safetensors").symlink_to("loop.safetensors")
    (shards / "zero.safetensors").symlink_to("/dev/zero")
    (shards / "folder").mkdir()
    (shards / "folder" / "up").symlink_to("..")
    os.mkfifo(shards / "pipe")
    (shards / "other.safetensors").write_bytes((shards / "diffusion_pytorch_model.safetensors.index.json").read_bytes())
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    written = json.loads(index.read_text())
    whole = folder / "whole"
    model.save(whole)
    config = {
        "num_heads": 2,
        "input_size": 4,
        "top_k": 1,
        "nested": {"class_dropout_prob": 0.1},
        "list": [1, 2.5, None],
    }
    zero = folder / "zero"
    model.save_pt(zero, "deepspeed")
    (zero / "pipes").mkdir()
    os.mkfifo(zero / "pipes" / "mp_rank_00_model_states.pt")
    (zero / "device").mkdir()
    (zero / "device" / "mp_rank_00_model_states.pt").symlink_to("/dev/zero")
    (zero / "loop").symlink_to("loop")

    def step(random: Random) -> Path:
        names = (
            "../zero",
            "/etc",
            "pipes",
            "device",
            "loop",
            "global_step7",
            "a\x00b",
            "x" * 300,
            "",
            "\n",
            ".",
            "..",
            "a/b",
        )
        text = random.choice(names).encode() if random.random() < 0.7 else hurt_bytes(random, b"global_step7")
        _put(zero / "latest", text)
        return zero

    def indexed(random: Random) -> Path:
        _put(index, hurt_index(random, written).encode(errors="surrogatepass"))
        return random.choice((shards, index))

    def configured(random: Random) -> Path:
        _put(whole / "config.json", hurt_json(random, config).encode(errors="surrogatepass"))
        return whole

    return [
        Corpus("indices of shards", indexed, read_checkpoint),
        Corpus("config.json", configured, read_checkpoint),
        Corpus("latest of DeepSpeed", step, read_checkpoint),
    ]


def documents(folder: Path) -> list[Corpus]:
    """Damaged plans and envelopes."""
    checkpoint = opened(small_model(), folder)
    plans = [
        pruning(checkpoint, [[0, 1]]).document(),
        quantising(checkpoint, {"blocks.0.attn.qkv.weight": "nf4"}).document(),
    ]
    plan, envelope = folder / "plan.json", folder / "envelope"
    stage = Stage(
        str(checkpoint.path), str(checkpoint.path), given={"num_heads": 2, "top_k": None}, history=({"command": "x"},)
    )
    return [
        Corpus("plans", lambda r: _put(plan, hurt_json(r, r.choice(plans)).encode(errors="surrogatepass")), _planned),
        Corpus(
            "envelopes",
            lambda r: _put(envelope, hurt_json(r, stage.to_json({"bytes": 1})).encode(errors="surrogatepass")),
            lambda path: parse_stage(path.read_text(errors="replace")),
        ),
    ]


def measures(folder: Path) -> list[Corpus]:
    """Damaged profiles, samples, statistics, archives of images, and pieces of unfinished work."""
    profile = Safetensors.of(profile_of(opened(small_model(), folder)).path.read_bytes())
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    write_images(folder / "images.safetensors", ImageSet(images), range(4), _origin())
    samples = Safetensors.of((folder / "images.safetensors").read_bytes())
    statistics = StoredStatistics(FeatureStatistics(np.zeros(3), np.eye(3), 10), None)
    write_statistics(folder / "s.npz", statistics)
    arrays = (folder / "s.npz").read_bytes()
    work = WorkFolder(folder, "k" * 64, lambda _: None)
    work.write("piece", {"a": torch.zeros(3), "b": torch.ones(2, 2)}, {"done": 1})
    piece = Safetensors.of((folder / "piece.safetensors").read_bytes())
    return [
        Corpus("profiles", lambda r: _put(folder / "p.safetensors", hurt_safetensors(r, profile)), _profiled),
        Corpus("samples", lambda r: _put(folder / "i.safetensors", hurt_safetensors(r, samples)), _sampled),
        Corpus("statistics", lambda r: _put(folder / "x.npz", hurt_npz(r, arrays)), _statistics),
        Corpus("archives of images", lambda r: _put(folder / "x.zip", hurt_images(r, images)), _pictures),
        Corpus(
            "kept pieces",
            lambda r: _put(folder / "piece.safetensors", hurt_safetensors(r, piece)),
            lambda _: _kept(work),
        ),
    ]


def _few(path: Path, shapes: Mapping[str, tuple[int, ...]], provenance: Provenance) -> Path:
    """A safetensors file of few tensors, which are no model's, as ditmoe writes files."""
    infos = [TensorInfo(name, "F16", shape) for name, shape in shapes.items()]
    metadata = provenance.to_metadata({info.name: "0" * 64 for info in infos})
    return _put(path, encode_header(infos, metadata) + bytes(sum(info.nbytes for info in infos)))


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _inspected(path: Path) -> None:
    """Inspect a file by the command line: exit code 0, or 3 and one line."""
    outcome = here("inspect", path, "--heads", 2, "--text", "--tensors", cwd=path.parent)
    if outcome.code:
        raise BadInputError(outcome.error(3))
    assert all(line.startswith("ditmoe: ") for line in outcome.err.splitlines()), outcome.err
    assert "\x1b" not in outcome.out + outcome.err


def _planned(path: Path) -> None:
    plan = read_plan(path)
    assert read_plan(_put(path, json.dumps(plan.document()).encode())) == plan


def _profiled(path: Path) -> None:
    profile = read_profile(path)
    profile.tables, profile.flip_rate, profile.never_routed()
    for name in profile.header.tensors:
        profile.tensor(name)


def _sampled(path: Path) -> None:
    if kind_of(path) == "images":
        read_images(path).images.sum()
        read_origin(path)


def _statistics(path: Path) -> None:
    if kind_of(path) == "statistics":
        read_statistics(path).statistics.sigma.sum()
    else:
        read_images(path)


def _pictures(path: Path) -> None:
    if kind_of(path) == "images":
        read_images(path)


def _kept(work: WorkFolder) -> None:
    """Read a kept piece; a damaged one is none."""
    piece = work.read("piece")
    if piece is None:
        raise BadInputError("not kept")
    for name in piece.names:
        piece.tensor(name)


def _origin() -> Mapping[str, Any]:
    spec = {
        "images": 4,
        "steps": 2,
        "cfg": 1.5,
        "seed": 0,
        "solver": "euler",
        "classes": [0, 1],
        "interval": [0.0, 1.0],
    }
    return {"checkpoint": "a" * 64, "spec": spec, "card": {"extractor": "pixels", "grey_levels": 16}, "vae": None}


def hurt_npz(random: Random, content: bytes) -> bytes:
    """An npz whose arrays say other shapes or dtypes, or that is damaged as an archive."""
    if random.random() < 0.3:
        return hurt_bytes(random, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    if random.random() < 0.8:
        shape, dtype = random.choice(_NPY_SHAPES), random.choice((*_NPY_TYPES, "<f8"))
        named = dtype if dtype.startswith("[") else repr(dtype)
        said = f"{{'descr': {named}, 'fortran_order': False, 'shape': {shape}, }}"
        said = random.choice((said, said, hurt_bytes(random, said.encode()).decode("latin-1"), "-" * 9000 + "1"))
        text = said.encode("latin-1").ljust(100) + b"\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(random.choice((0, 24, 72)))
    else:
        members[name] = hurt_bytes(random, members[name])
    return _zipped(random, members)


def hurt_images(random: Random, images: np.ndarray[Any, Any]) -> bytes:
    """An archive of images, some of which are damaged, of other sizes, or none."""
    members = {}
    for number, pixels in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(pixels[:, :, 0]).save(buffer, random.choice(("PNG", "PNG", "BMP", "JPEG", "WEBP")))
        members[f"{number}.png"] = buffer.getvalue()
    name = random.choice(list(members))
    match random.randrange(4):
        case 0:
            members[name] = hurt_bytes(random, members[name])
        case 1:  # a PNG's chunk says another size
            size = struct.pack(">II", *(random.choice((0, 1, 8, 60_000, 2**31 - 1)) for _ in range(2)))
            members[name] = members[name][:16] + size + members[name][24:]
        case 2:
            members[random.choice(("../a.png", "/b.png", "c/" * 200 + "d.png", "e\n.png"))] = members.pop(name)
        case _:
            return hurt_bytes(random, _zipped(random, members))
    return _zipped(random, members)


def _zipped(random: Random, members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    compression = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


GROUPS: Mapping[str, Callable[[Path], list[Corpus]]] = {
    "checkpoints": checkpoints,
    "folders": folders,
    "documents": documents,
    "measures": measures,
}
