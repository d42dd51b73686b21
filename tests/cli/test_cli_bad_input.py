"""Bad input ends in one line that names it, with the right exit code, and leaves no trace."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import contents, here, shell
from conftest import Pico, make_pico
from PIL import Image
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

SETTINGS = ("--images", 2, "--steps", 2)
EXPERT = "blocks.0.moe.experts.1.up_proj.weight"


def pixel_pico(**options: object) -> Pico:
    """A pixel model, so that fid can score it."""
    return make_pico(**{"sampler": "rf", "in_channels": 1, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint with its profile, a plan and samples; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    pixel_pico().save(folder / "good.safetensors")
    for name, words in {
        "profile": ("profile-experts", "good.safetensors", *SETTINGS, "--bins", 1),
        "samples": ("sample", "good.safetensors", *SETTINGS),
    }.items():
        assert here(*words, "-o", f"{name}.safetensors", cwd=folder).code == 0
    words = ("prune", "good.safetensors", "--keep", 2, "--method", "random", "--no-refit", "--dry-run")
    (folder / "plan.json").write_text(here(*words, cwd=folder).out)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`."""
    return Path(shutil.copytree(made, tmp_path / "folder"))


# every command that opens a checkpoint; the bad one takes the place of {}
COMMANDS: dict[str, tuple[object, ...]] = {
    "inspect": ("inspect", "{}"),
    "convert": ("convert", "{}"),
    "profile-experts": ("profile-experts", "{}", *SETTINGS, "--bins", 1),
    "prune": ("prune", "{}", "--keep", 2, "--method", "random", "--no-refit"),
    "prune by profile": ("prune", "{}", "--keep", 2, "--profile", "profile.safetensors"),
    "merge": ("merge", "{}", "--groups", 2, "--profile", "profile.safetensors"),
    "quantize": ("quantize", "{}", "--uniform", "--bits", 4),
    "dry run": ("quantize", "{}", "--uniform", "--bits", 8, "--dry-run"),
    "heal": ("heal", "{}", "--original", "good.safetensors", "--profile", "profile.safetensors", "--steps", 1),
    "heal --original": ("heal", "good.safetensors", "--original", "{}", "--steps", 1),
    "distill": ("distill", "{}", "--original", "good.safetensors", "--iterations", 1, "--batch", 4),
    "distill --original": ("distill", "good.safetensors", "--original", "{}", "--iterations", 1, "--batch", 4),
    "apply": ("apply", "{}", "--plan", "plan.json"),
    "sample": ("sample", "{}", *SETTINGS),
    "fid": ("fid", "{}", "--ref", "samples.safetensors", *SETTINGS),
    "fid --ref": ("fid", "samples.safetensors", "--ref", "{}", *SETTINGS, "--extractor", "pixels"),
    "compare A": ("compare", "{}", "good.safetensors", *SETTINGS, "--bins", 1),
    "compare B": ("compare", "good.safetensors", "{}", *SETTINGS, "--bins", 1),
    "report sensitivity": ("report", "sensitivity", "{}", *SETTINGS, "--parts", "skip"),
    "bench": ("bench", "{}", "--batch", 1, "--repeats", 1),
}
every_command = pytest.mark.parametrize("name", COMMANDS)


def refused(name: str, bad: object, folder: Path, *options: object) -> str:
    """The error of a command on a bad checkpoint; nothing in the folder may change."""
    before = contents(folder)
    words = [bad if word == "{}" else word for word in COMMANDS[name]]
    message = here(*words, *options, cwd=folder).error(3)
    assert contents(folder) == before, f"{name} wrote something"
    return message


# what is no checkpoint at all


class _Forbidden:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def _truncated(part: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        pixel_pico().save(path)
        os.truncate(path, int(path.stat().st_size * part))

    return make


def _flipped(at: int, byte: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        pixel_pico().save(path)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(byte)

    return make


def _header(document: object, data: bytes = b"") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        text = document if isinstance(document, bytes) else json.dumps(document).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    return make


def _dense(path: Path) -> None:
    state = {name: tensor for name, tensor in pixel_pico().state.items() if ".moe." not in name}
    state |= {f"blocks.{i}.mlp.fc1.weight": torch.zeros(64, 32) for i in range(2)}
    save_tensors(state, path)


def _folder(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).write_text("{}")

    return make


def _index(weight_map: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def _twice(path: Path) -> None:
    path.mkdir()
    for i in (1, 2):
        pixel_pico().save(path / f"{i}.safetensors")


def _pickled(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def _state(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        state = dict(pixel_pico().state)
        change(state)
        save_tensors(state, path)

    return make


def _reshaped(name: str, *shape: int) -> Callable[[Path], None]:
    return _state(lambda state: state.update({name: torch.zeros(shape)}))


def _without(name: str) -> Callable[[Path], None]:
    return _state(lambda state: state.pop(name))


def _wild_map(path: Path) -> None:
    pixel_pico(expert_of=((0, 1, 2, 9), (0, 1, 2, 3))).save(path)


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# file name, how it is made, and what the message must say beside its name
BAD: dict[str, tuple[str, Callable[[Path], object] | None, str]] = {
    "missing": ("x.safetensors", None, "no such file"),
    "missing folder": ("nowhere/x.pt", None, "no such file"),
    "empty folder": ("x", _folder(), "no checkpoint here"),
    "folder of other things": ("x", _folder("config.json", "notes.txt"), "no checkpoint here"),
    "folder of two": ("x", _twice, "name one"),
    "empty file": ("x.safetensors", lambda path: path.write_bytes(b""), "is empty; fetch it again"),
    "cut in the header": ("x.safetensors", _truncated(0.001), "cut short"),
    "cut in the data": ("x.safetensors", _truncated(0.7), "truncated"),
    "one byte short": ("x.safetensors", _truncated(0.99999), "truncated"),
    "header length of nonsense": ("x.safetensors", _flipped(4, b"\xff"), "not a safetensors file"),
    "header of nonsense": ("x.safetensors", _flipped(20, b"\xff\xfe"), "corrupt"),
    "a list as header": ("x.safetensors", _header([1]), "corrupt"),
    "an unknown dtype": ("x.safetensors", _header({"a": {**TENSOR, "dtype": "F12"}}, bytes(8)), "F12"),
    "shapes that do not fit": ("x.safetensors", _header({"a": {**TENSOR, "shape": [3]}}, bytes(8)), "'a'"),
    "overlap": ("x.safetensors", _header({"a": TENSOR, "b": TENSOR}, bytes(8)), "corrupt"),
    "bytes left over": ("x.safetensors", _header({"a": TENSOR}, bytes(9)), "corrupt"),
    "broken metadata": (
        "x.safetensors",
        _header({"__metadata__": {"ditmoe": "{"}, "a": TENSOR}, bytes(8)),
        "metadata",
    ),
    "no DiT": ("x.safetensors", _header({"a": TENSOR}, bytes(8)), "not a DiT-MoE"),
    "dense DiT": ("x.safetensors", _dense, "dense"),
    "samples": ("samples.safetensors", None, "schema"),
    "profile": ("profile.safetensors", None, "schema"),
    "index of a missing shard": ("x", _index({"a": "1.safetensors"}), "1.safetensors is missing"),
    "index out of the folder": ("x", _index({"a": "../good.safetensors"}), "not an index"),
    "index of nonsense": ("x", _index([1]), "not an index"),
    "a pickle of more than weights": ("x.pt", _pickled({"a": torch.zeros(2), "b": _Forbidden()}), "system"),
    "an old pickle of more than weights": ("x.pt", lambda path: path.write_bytes(pickle.dumps(_Forbidden())), ""),
    "a pickle of a list": ("x.pt", _pickled([torch.zeros(2)]), "list"),
    "a pickle without weights": ("x.pt", _pickled({"epoch": 3}), "epoch"),
    "a pickle of nothing": ("x.pt", _pickled({}), "no state dict"),
    "text": ("x.pt", lambda path: path.write_text("hello\n"), ""),
    "empty pickle": ("x.ckpt", lambda path: path.write_bytes(b""), ""),
    "expert misshapen": ("x.safetensors", _reshaped(EXPERT, 64, 30), EXPERT),
    "router too tall": ("x.safetensors", _reshaped("blocks.1.moe.gate.weight", 5, 32), "blocks.1.moe.gate.weight"),
    "final layer misshapen": ("x.safetensors", _reshaped("final_layer.linear.weight", 7, 32), "final_layer.linear"),
    "positions misshapen": ("x.safetensors", _reshaped("pos_embed", 1, 15, 32), "pos_embed"),
    "tensor missing": ("x.safetensors", _without("blocks.1.attn.proj.bias"), "blocks.1.attn.proj.bias"),
    "expert missing": ("x.safetensors", _without(EXPERT), EXPERT),
    "block missing": ("x.safetensors", _without("blocks.0.moe.gate.weight"), "blocks.0.moe.gate.weight"),
    "stray tensor": ("x.safetensors", _reshaped("blocks.0.moe.extra.weight", 2), "blocks.0.moe.extra.weight"),
    "row that names no expert": ("x.safetensors", _wild_map, "expert_of"),
    "unknown demo": ("demo:cats", None, "demo:digits"),
    "a demo that climbs": ("demo:../x", None, "demo:digits"),
    "empty name": ("demo:", None, "demo:digits"),
}


@pytest.mark.parametrize("kind", BAD)
def test_no_checkpoint(kind: str, folder: Path) -> None:
    bad, make, said = BAD[kind]
    if make is not None:
        make(folder / bad)
    for name in list(COMMANDS)[list(BAD).index(kind) % 4 :: 4]:  # all open checkpoints alike
        if kind == "samples" and name.startswith("fid"):
            continue  # which reads them
        message = refused(name, bad, folder, "--heads", 2)
        assert bad in message and said in message, name


def test_a_forbidden_pickle_does_nothing(folder: Path) -> None:
    """The code in it is named, not run."""

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (folder / "ran",)

    torch.save({"a": torch.zeros(2), "b": Touch()}, folder / "x.pt")
    assert "not weights" in here("inspect", "x.pt", cwd=folder).error(3)
    assert not (folder / "ran").exists()


@every_command
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(name: str, folder: Path) -> None:
    shutil.copy(folder / "good.safetensors", folder / "x.safetensors")
    words = ["x.safetensors" if word == "{}" else word for word in COMMANDS[name]]
    (folder / "x.safetensors").chmod(0)
    message = here(*words, cwd=folder).error(3)
    assert "x.safetensors" in message and "ermission denied" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    message = here("convert", "good.safetensors", "-o", "locked/x.safetensors", cwd=folder).error(3)
    assert "locked" in message and "ermission denied" in message


# heads, and options that contradict the file


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "--heads"), (("--heads", 3), "--heads 3"), (("--heads", 2, "--top-k", 5), "--top-k 5")],
)
def test_what_cannot_be_known_or_be_true(options: tuple[object, ...], said: str, folder: Path) -> None:
    pixel_pico().save_pt(folder / "x.pt")
    left_out = {"compare B", "heal --original", "distill --original"}  # said of the other checkpoint too
    left_out |= set() if options else {"inspect"}  # which leaves heads open
    for name in [name for name in COMMANDS if name not in left_out]:
        message = refused(name, "x.pt", folder, *options)
        assert "x.pt" in message and said in message


# broken numbers


def _poisoned(name: str, value: float) -> Pico:
    pico = pixel_pico()
    tensor = pico.state[name].clone()
    tensor.view(-1)[-1] = value
    return pico.with_state(**{name.replace(".", "__"): tensor})


@pytest.mark.parametrize(
    ("tensor", "value"),
    [(EXPERT, float("nan")), ("blocks.1.moe.gate.weight", float("inf")), ("final_layer.linear.bias", -float("inf"))],
)
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "x.safetensors"),
        ("convert", "x.safetensors", "-o", "folder", "--max-shard-size", "50KB"),
        ("prune", "x.safetensors", "--keep", "1.0", "--method", "random", "--no-refit"),
        ("prune", "x.safetensors", "--keep", 2),
        ("quantize", "x.safetensors", "--uniform", "--bits", 4),
        ("quantize", "x.safetensors", "--uniform", "--bits", 8),
        ("profile-experts", "x.safetensors", *SETTINGS, "--bins", 1),
        ("sample", "x.safetensors", *SETTINGS),
        ("fid", "x.safetensors", "--ref", "samples.safetensors", *SETTINGS),
        ("compare", "good.safetensors", "x.safetensors", *SETTINGS, "--bins", 1, "--grid", "g.png"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_weights_that_are_no_numbers(words: tuple[object, ...], tensor: str, value: float, folder: Path) -> None:
    _poisoned(tensor, value).save(folder / "x.safetensors")
    before = contents(folder)
    message = here(*words, cwd=folder).error(3)
    assert "x.safetensors" in message and tensor in message and "NaN or infinite" in message
    assert contents(folder) == before


def test_broken_scales_of_quantised_weights(folder: Path) -> None:
    from safetensors.torch import load_file

    for bits, scale in ((4, f"{EXPERT}.absmax"), (8, "blocks.0.moe.experts.1.up_proj.SCB")):
        quantized = here("quantize", "good.safetensors", "--uniform", "--bits", bits, cwd=folder)
        tensors = load_file(quantized.path)
        tensors[scale][0] = float("nan")
        save_tensors(tensors, folder / "x.safetensors")
        message = here("sample", "x.safetensors", "--heads", 2, *SETTINGS, "-o", "s.safetensors", cwd=folder).error(3)
        assert scale in message
        assert not (folder / "s.safetensors").exists()


@pytest.mark.parametrize("name", ["sample", "profile-experts", "fid", "compare A", "compare B"])
def test_a_model_that_overflows(name: str, folder: Path) -> None:
    """Finite weights whose images are not."""
    pico = pixel_pico()
    huge = {key.replace(".", "__"): pico.state[key] * 1e30 for key in pico.state if "moe" in key or "final" in key}
    pico.with_state(**huge).save(folder / "x.safetensors")
    assert "NaN or infinite" in refused(name, "x.safetensors", folder)


def test_quantised_twice(folder: Path) -> None:
    quantized = here("quantize", "good.safetensors", "--uniform", "--bits", 8, cwd=folder)
    for bits in (4, 8):
        for options in ((), ("--dry-run",)):
            message = here("quantize", quantized.path, "--uniform", "--bits", bits, *options, cwd=folder).error(3)
            assert "int8 already" in message


# profiles, plans, references


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("missing.safetensors", "no such profile"),
        ("good.safetensors", "schema"),
        ("samples.safetensors", "schema"),
        ("plan.json", "plan.json"),
        ("cut.safetensors", "truncated"),
        (".", ""),
    ],
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_no_profile(profile: str, said: str, options: tuple[str, ...], folder: Path) -> None:
    shutil.copy(folder / "profile.safetensors", folder / "cut.safetensors")
    os.truncate(folder / "cut.safetensors", 5000)
    before = contents(folder)
    words = ("prune", "good.safetensors", "--keep", 2, "--profile", profile, *options)
    message = here(*words, cwd=folder).error(3)
    assert profile in message and said in message
    assert contents(folder) == before


def _edited(**changes: object) -> Callable[[dict[str, object]], object]:
    return lambda plan: {**plan, **changes}


KEEP_ALL = {"keep": [0, 1, 2, 3], "router": "slice"}


@pytest.mark.parametrize(
    ("edit", "code", "said"),
    [
        (lambda _: "{", 3, "not a plan"),
        (lambda plan: [plan], 3, "JSON object"),
        (_edited(schema="ditmoe.plan/2"), 3, "ditmoe.plan/2"),
        (_edited(source="0" * 64), 3, "another checkpoint"),
        (lambda plan: {key: plan[key] for key in plan if key != "blocks"}, 3, "blocks"),
        (_edited(blocks=None), 3, "blocks"),
        (_edited(blocks=[KEEP_ALL]), 3, "1 blocks"),
        (_edited(blocks=[KEEP_ALL, {"keep": [0, 9], "router": "slice"}]), 3, "expert 9"),
        (_edited(blocks=[KEEP_ALL, {"keep": [1, 0], "router": "slice"}]), 3, "ascending"),
        (_edited(blocks=[KEEP_ALL, {"keep": [], "router": "slice"}]), 3, "block 1"),
        (_edited(blocks=[KEEP_ALL, {"keep": [0, 1], "router": "mask"}]), 3, "mask"),
        (_edited(blocks=[KEEP_ALL, {"keep": [2], "router": "ghost"}]), 4, "top-2"),
        (_edited(formats={"blocks.0.nothing.weight": "nf4"}), 3, "blocks.0.nothing.weight"),
        (_edited(formats={EXPERT: "int3"}), 3, "int3"),
        (_edited(formats={"final_layer.linear.bias": "nf4"}), 3, "final_layer.linear.bias"),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_no_plan(
    edit: Callable[[dict[str, object]], object], code: int, said: str, options: tuple[str, ...], folder: Path
) -> None:
    plan = json.loads((folder / "plan.json").read_text())["result"]["plan"]
    edited = edit(plan)
    (folder / "x.json").write_text(edited if isinstance(edited, str) else json.dumps(edited))
    before = contents(folder)
    assert said in here("apply", "good.safetensors", "--plan", "x.json", *options, cwd=folder).error(code)
    assert contents(folder) == before


def test_no_plan_file(folder: Path) -> None:
    for name, said in (("missing.json", "no such file"), ("good.safetensors", "not a plan"), (".", "not a plan")):
        for words in (("apply", "good.safetensors", "--plan", name), ("plan", name), ("plan", "plan.json", name)):
            message = here(*words, cwd=folder).error(3)
            assert name in message and said in message
    undecided = here("prune", "good.safetensors", "--keep", 2, "--dry-run", cwd=folder)
    (folder / "x.json").write_text(undecided.out)
    assert "x.json" in here("apply", "good.safetensors", "--plan", "x.json", cwd=folder).error(3)


def _images(path: Path, array: np.ndarray) -> None:
    np.savez(path, arr_0=array)


def _cut_npz(path: Path) -> None:
    _images(path, np.zeros((4, 8, 8, 1), np.uint8))
    os.truncate(path, 200)


def _pngs(*sizes: int, suffix: str = ".png") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for i, size in enumerate(sizes):
            Image.new("L", (size, size)).save(path / f"{i}{suffix}")

    return make


def _broken_png(path: Path) -> None:
    _pngs(8, 8)(path)
    (path / "1.png").write_bytes(b"\x89PNG nonsense")


REFERENCES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut npz": ("x.npz", _cut_npz, "x.npz"),
    "npz of floats": ("x.npz", lambda path: _images(path, np.zeros((4, 8, 8, 1))), "uint8"),
    "npz of channels first": ("x.npz", lambda path: _images(path, np.zeros((4, 3, 8, 8), np.uint8)), "(N, H, W, C)"),
    "npz of something else": ("x.npz", lambda path: np.savez(path, a=np.zeros(3)), "arr_0"),
    "npz of objects": ("x.npz", lambda path: np.savez(path, arr_0=np.array([{}])), "x.npz"),
    "no image": ("x.npz", lambda path: _images(path, np.zeros((0, 8, 8, 1), np.uint8)), "no pixel"),
    "one image": ("x.npz", lambda path: _images(path, np.zeros((1, 8, 8, 1), np.uint8)), "at least 2"),
    "colour images": ("x.npz", lambda path: _images(path, np.zeros((4, 8, 8, 3), np.uint8)), "8 x 8 x 3"),
    "PNG of two sizes": ("x", _pngs(8, 9), "1.png"),
    "TIFF": ("x", _pngs(8, 8, suffix=".tiff"), "TIFF is not read"),
    "JPEG of two sizes": ("x", _pngs(8, 9, suffix=".jpg"), "1.jpg"),
    "a broken PNG": ("x", _broken_png, "1.png"),
    "a single PNG": ("x.png", lambda path: Image.new("L", (8, 8)).save(path), "folder"),
    "broken statistics": (
        "x.npz",
        lambda path: np.savez(path, mu=np.zeros(64), sigma=np.full((64, 64), np.nan)),
        "NaN",
    ),
    "statistics of no covariance": ("x.npz", lambda path: np.savez(path, mu=np.zeros(64), sigma=np.eye(63)), "sigma"),
    "statistics of integers": (
        "x.safetensors",
        lambda path: save_file({"mu": np.zeros(64, np.int64), "sigma": np.eye(64)}, path),
        "mu",
    ),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_no_reference(kind: str, folder: Path) -> None:
    name, make, said = REFERENCES[kind]
    make(folder / name)
    before = contents(folder)
    words = ("fid", "samples.safetensors", "--ref", name, "--extractor", "pixels", "-o", "score.safetensors")
    message = here(*words, cwd=folder).error(3)
    assert name in message and said in message
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"input_size": 16}, "16"),
        ({"in_channels": 3}, "8 x 8 x 3"),
        ({"num_classes": 1}, "classes"),
        ({"sampler": "ddpm"}, "ddpm"),
    ],
)
def test_models_that_cannot_be_compared(options: dict[str, object], said: str, folder: Path) -> None:
    """The subject's seeds, labels and solver rule the other side, which must be able to follow."""
    pixel_pico(**options).save(folder / "x.safetensors")
    before = contents(folder)
    words = ("fid", "good.safetensors", "--ref", "x.safetensors", *SETTINGS, "--images", 4, "--extractor", "pixels")
    message = here(*words, cwd=folder).error(3)
    assert "x.safetensors" in message and said in message
    assert contents(folder) == before


# the system fails


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "good.safetensors"),
        ("convert", "good.safetensors", "-o", "out", "--max-shard-size", "50KB"),
        ("prune", "good.safetensors", "--keep", 3, "--method", "random", "--no-refit"),
        ("merge", "good.safetensors", "--groups", 2, "--profile", "profile.safetensors", "--refit-tokens", 64),
        ("quantize", "good.safetensors", "--uniform", "--bits", 8),
        ("profile-experts", "good.safetensors", *SETTINGS, "--bins", 1),
        ("sample", "good.safetensors", *SETTINGS),
        ("fid", "good.safetensors", "--ref", "samples.safetensors", *SETTINGS, "-o", "score.safetensors"),
        ("compare", "good.safetensors", "good.safetensors", *SETTINGS, "--bins", 1, "-o", "c.safetensors"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
@pytest.mark.parametrize("size", [0, 600])
def test_no_room_to_write(words: tuple[object, ...], size: int, folder: Path) -> None:
    before = contents(folder)
    with file_limit(size):
        outcome = here(*words, cwd=folder)
    assert "arge" in outcome.error(1), "File too large"
    after = contents(folder)
    made = [name for name in after if ".work/" in name]  # images that are not to be made again
    assert {name: after[name] for name in after if name not in made} == before
    assert not made or words[0] == "sample"
    assert here(*words, cwd=folder).code == 0, "the same command works once there is room"
    assert not [name for name in contents(folder) if ".work/" in name]


def test_no_room_to_write_as_a_program(folder: Path) -> None:
    """`ulimit -f` counts blocks of 1024 bytes; an old output outlives the attempt to replace it."""
    (folder / "out.safetensors").write_text("mine")
    before = contents(folder)
    outcome = shell("ulimit -f 100; ditmoe convert good.safetensors -o out.safetensors --force", folder)
    assert outcome.error(1)
    assert contents(folder) == before


def test_a_checkpoint_is_no_plan_and_no_profile(tmp_path: Path) -> None:
    make_pico(sampler="rf", in_channels=1).save(tmp_path / "a.safetensors")
    apply = ("apply", "a.safetensors", "--plan", "a.safetensors", "-o", "b.safetensors")
    assert here(*apply, cwd=tmp_path).error(3).endswith("a.safetensors: not a plan (it is no text)")
    prune = ("prune", "a.safetensors", "--keep", 2, "--profile", "a.safetensors", "-o", "b.safetensors")
    assert "expected 'ditmoe.profile/1'; name a file of that schema" in here(*prune, cwd=tmp_path).error(3)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
