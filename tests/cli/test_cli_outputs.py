"""Outputs: their names, what is refused, modes, equal bytes for equal work, and sizes known beforehand."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from cli_helpers import bytes_of, contents, here, series, tensor_shapes
from conftest import make_pico
from safetensors import safe_open

from ditmoe_cli.model.config import expected_weights

pytestmark = pytest.mark.usefixtures("few_tokens")

SETTINGS = ("--images", 4, "--steps", 2)
PROFILING = ("profile-experts", "a.safetensors", *SETTINGS, "--bins", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of several shapes with a profile each; not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    odd = ((7, 5, 9, 3), (6, 11, 4, 13))
    picos = {
        "plain": make_pico(sampler="rf", in_channels=1),
        "flash": make_pico(attention="flash", sampler="rf", in_channels=3, experts=12, top_k=3, depth=1),
        "odd": make_pico(
            sampler="rf", in_channels=1, hidden=20, heads=5, widths=odd, shared_width=3, num_classes=1, input_size=6
        ),
    }
    for name, pico in picos.items():
        pico.save(folder / f"{name}.safetensors")
        profiling = ("profile-experts", f"{name}.safetensors", *SETTINGS, "--bins", 2, "-o")
        assert here(*profiling, f"{name}.profile.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the plain checkpoint, its profile and samples of another seed."""
    shutil.copy(made / "plain.safetensors", tmp_path / "a.safetensors")
    shutil.copy(made / "plain.profile.safetensors", tmp_path / "p.safetensors")
    return tmp_path


WRITERS: dict[str, tuple[object, ...]] = {
    "convert": ("convert", "a.safetensors"),
    "profile-experts": PROFILING,
    "prune": ("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", "--refit-tokens", 64),
    "merge": ("merge", "a.safetensors", "--groups", 2, "--profile", "p.safetensors", "--refit-tokens", 64),
    "quantize": ("quantize", "a.safetensors", "--uniform", "--bits", 8),
    "sample": ("sample", "a.safetensors", *SETTINGS),
    "fid": ("fid", "a.safetensors", "--ref", "a.safetensors", *SETTINGS),
}
PLAINLY = ("--method", "random", "--no-refit")
writers = pytest.mark.parametrize("words", WRITERS.values(), ids=list(WRITERS))


# names


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("convert",), "a.converted.safetensors"),
        (("convert", "--dtype", "bf16"), "a.converted-bf16.safetensors"),
        (("convert", "--dequantize", "--dtype", "fp16"), "a.converted-dequantize-fp16.safetensors"),
        (("export", "--to", "upstream"), "a.upstream.pt"),
        (("export", "--to", "upstream", "--dtype", "fp16"), "a.upstream-fp16.pt"),
        (("prune", "--keep", "0.5", *PLAINLY), "a.prune-keep0.5-random-norefit.safetensors"),
        (("prune", "--keep", "2", *PLAINLY), "a.prune-keep2-random-norefit.safetensors"),
        (("quantize", "--uniform", "--bits", "4"), "a.quantize-nf4.safetensors"),
        (("quantize", "--uniform", "--bits", "8"), "a.quantize-int8.safetensors"),
    ],
)
def test_default_names_are_in_the_working_directory(words: tuple[str, ...], name: str, folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    first, *rest = words
    outcome = here(first, folder / "a.safetensors", *rest, "--dry-run", "-q", cwd=elsewhere)
    assert outcome.out == f"{elsewhere / name}\n"
    assert here(first, folder / "a.safetensors", *rest, "-q", cwd=elsewhere).out == f"{elsewhere / name}\n"
    assert [file.name for file in elsewhere.iterdir()] == [name]


@pytest.mark.parametrize("source", ["model.pt", "model.pth", "model.v2.ckpt", "folder"])
def test_names_derive_from_any_layout(source: str, tmp_path: Path) -> None:
    pico = make_pico()
    if source == "folder":
        pico.save_pt(tmp_path / source, "deepspeed", num_heads=2)
    else:
        pico.save_pt(tmp_path / source, "ema", num_heads=2)
    expected = tmp_path / f"{Path(source).stem}.converted.safetensors"
    assert here("convert", source, cwd=tmp_path).path == expected
    assert expected.is_file()


# refusals


@writers
def test_what_exists_is_refused_and_replaced_by_force(words: tuple[object, ...], folder: Path) -> None:
    target = folder / "out.safetensors"
    target.write_text("mine")
    before = contents(folder)
    message = here(*words, "-o", target, cwd=folder).error(5)
    assert str(target) in message and "--force" in message
    assert contents(folder) == before
    outcome = here(*words, "-o", target, "--force", cwd=folder)
    assert outcome.envelope
    after = contents(folder)
    assert after.pop("out.safetensors") != before.pop("out.safetensors")
    assert after == before


@writers
@pytest.mark.parametrize("kind", ["symlink", "dangling", "device", "fifo"])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_special_targets_are_refused(
    words: tuple[object, ...], kind: str, force: tuple[str, ...], folder: Path
) -> None:
    target = folder / "out.safetensors"
    if kind == "device":
        target = Path("/dev/null")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.symlink_to(folder / ("p.safetensors" if kind == "symlink" else "nothing"))
    before = contents(folder)
    outcome = here(*words, "-o", target, *force, cwd=folder)
    assert outcome.code in (2, 5), outcome.err
    if kind == "device":  # has no ending of ours: a usage error where only files are written
        assert str(target) in outcome.error(outcome.code)
    else:
        assert str(target) in outcome.error(5)
    assert contents(folder) == before


@writers
def test_the_input_is_refused_as_target(words: tuple[object, ...], folder: Path) -> None:
    (folder / "hard.safetensors").hardlink_to(folder / "a.safetensors")
    before = contents(folder)
    for target in ("a.safetensors", folder / "a.safetensors", "./a.safetensors", "hard.safetensors"):
        assert here(*words, "-o", target, "--force", cwd=folder).error(5)
    assert contents(folder) == before


def test_what_is_read_beside_the_checkpoint_is_refused_as_target(folder: Path) -> None:
    here("sample", "a.safetensors", *SETTINGS, "-o", "s.safetensors", cwd=folder)
    before = contents(folder)
    assert here(*WRITERS["prune"], "-o", "p.safetensors", "--force", cwd=folder).error(5)
    fid = ("fid", "a.safetensors", *SETTINGS, "-o", "s.safetensors", "--force")
    assert here(*fid, "--ref", "s.safetensors", cwd=folder).error(5)
    assert here(*fid, "--ref", "a.safetensors", "--original", "s.safetensors", cwd=folder).error(5)
    assert contents(folder) == before
    planned = here(*WRITERS["prune"], "--dry-run", cwd=folder)
    (folder / "plan").write_text(planned.out)
    before = contents(folder)
    for target in ("plan", "p.safetensors"):
        words = ("apply", "a.safetensors", "--plan", "plan", "--profile", "p.safetensors", "-o", target, "--force")
        assert "is the input itself" in here(*words, cwd=folder).error(5)
    assert contents(folder) == before
    data = ("--calibration-data", "s.safetensors", "-o", "s.safetensors", "--force")
    pruned = ("prune", "a.safetensors", "--keep", 2, "--profile", "p.safetensors", *data)
    assert here(*pruned, cwd=folder).code in (2, 3, 5)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "words",
    [
        *(pytest.param(words, id=name) for name, words in WRITERS.items()),
        pytest.param(("report", "profile", "p.safetensors", "--replicates", 20), id="report", marks=pytest.mark.slow),
    ],
)
def test_what_a_killed_run_left_is_deleted_by_whatever_writes_there_next(
    words: tuple[object, ...], folder: Path
) -> None:
    """A file and a folder of shards, of other targets; by a run that writes, and by one whose output is up to date."""
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    target = "x.html" if words[0] == "report" else "x.safetensors"
    before = set(contents(folder))

    def hidden() -> set[str]:
        return {path.name for path in folder.iterdir() if path.name.startswith(".")}

    def leave() -> set[str]:
        (folder / ".y.safetensors.ditmoe-tmp-999999999").write_bytes(bytes(1000))
        (folder / ".z.ditmoe-tmp-999999999").mkdir()
        (folder / ".z.ditmoe-tmp-999999999" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
        for name in (".y.safetensors", ".z"):
            (folder / f"{name}.ditmoe-tmp-999999999.lock").touch()
        return hidden()

    for again in (False, True):
        left = leave()
        if words[0] in ("convert", "prune", "merge", "quantize"):
            assert here(*words, "-o", "other.safetensors", "--dry-run", cwd=folder).code == 0
        assert here(*words, "-o", "absent/x.safetensors", cwd=folder).code in (2, 3)
        assert left <= hidden(), "dry runs and runs that are refused leave all as it is"
        outcome = here(*words, "-o", target, cwd=folder)
        assert outcome.code == 0 and ("up to date" in outcome.err) == again, outcome.err
        assert hidden() == set()
        if words[0] == "fid":  # which prints its score again, and writes no file
            break
    assert before <= set(contents(folder))


def test_a_folder_of_other_things_is_never_replaced(folder: Path) -> None:
    precious = folder / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("mine")
    assert "thesis.tex" in here("convert", "a.safetensors", "-o", precious, "--force", cwd=folder).error(5)
    assert (precious / "thesis.tex").read_text() == "mine"


def test_a_missing_folder_is_bad_input(folder: Path) -> None:
    for words in WRITERS.values():
        assert "nowhere" in here(*words, "-o", "nowhere/out.safetensors", cwd=folder).error(3)


def test_refusals_come_before_work(folder: Path) -> None:
    """A prune that cannot write must not profile first."""
    (folder / "out.safetensors").write_text("mine")
    outcome = here("prune", "a.safetensors", "--keep", 2, "-o", "out.safetensors", cwd=folder)
    assert outcome.error(5)
    assert "profiling" not in outcome.err
    assert not list(folder.glob("*.profile.safetensors"))


# modes


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_modes_follow_the_umask(umask: int, folder: Path) -> None:
    previous = os.umask(umask)
    try:
        for name, words in WRITERS.items():
            here(*words, "-o", f"{name}.safetensors", cwd=folder)
        here("convert", "a.safetensors", "-o", "folder", "--max-shard-size", "50KB", cwd=folder)
    finally:
        os.umask(previous)
    for file in [folder / f"{name}.safetensors" for name in WRITERS] + sorted((folder / "folder").iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file.name
    assert stat.S_IMODE((folder / "folder").stat().st_mode) == 0o777 & ~umask


# equal work, equal bytes


@pytest.mark.slow
def test_two_runs_give_equal_bytes(folder: Path) -> None:
    """In different processes with different hash seeds, from different folders."""
    commands = {
        **WRITERS,
        "prune-random": ("prune", "a.safetensors", "--keep", 3, *PLAINLY, "--seed", 5),
        "prune-slice": (*WRITERS["prune"], "--router", "slice"),
        "prune-best": (*WRITERS["prune"], "--method", "naee", "--router", "auto", "--allocate", "global"),
        "prune-linear": (*WRITERS["prune"], "--residual-rank", 2, "--neurons", 0.5, "--multiple", 8),
        "merge-clusters": (*WRITERS["merge"], "--method", "sub-moe", "--router", "slice"),
        "quantize-4": ("quantize", "a.safetensors", "--uniform", "--bits", 4),
        "guided": ("sample", "a.safetensors", *SETTINGS, "--cfg", 2, "--seed", 7),
        "profile-guided": (*PROFILING, "--cfg", 1.5),
        "folder": ("convert", "a.safetensors", "--max-shard-size", "50KB"),
    }
    del commands["fid"]  # a score names its files by path
    runs = []
    for run, seed in (("one", "1"), ("two", "2")):
        place = folder / run
        place.mkdir()
        for name in ("a.safetensors", "p.safetensors"):
            shutil.copy(folder / name, place)
        ending = {name: name if name == "folder" else f"{name}.safetensors" for name in commands}
        words = [(*line, "-o", ending[name]) for name, line in commands.items()]
        outcomes = series(words, place, PYTHONHASHSEED=seed)
        assert all(outcome.code == 0 for outcome, _ in outcomes), [outcome.err for outcome, _ in outcomes]
        runs.append(contents(place))
    assert runs[0] == runs[1]


def test_batches_change_no_image(folder: Path) -> None:
    """Noise belongs to the image: three at a time or one give the same, and two are the first two of four."""
    for name, options in {"b1": ("--batch", 1), "b3": ("--batch", 3), "two": ("--images", 2)}.items():
        words = {"--images": 4, "--steps": 2, **dict([options])}
        line = [word for pair in words.items() for word in pair]
        here("sample", "a.safetensors", *line, "-o", f"{name}.safetensors", cwd=folder)
    images = {}
    for name in ("b1", "b3", "two"):
        with safe_open(folder / f"{name}.safetensors", "np") as file:
            images[name] = file.get_tensor("images").astype(int)
    assert abs(images["b1"] - images["b3"]).max() <= 1, "no more than rounding"
    assert abs(images["b1"][:2] - images["two"]).max() <= 1
    assert images["b1"].std() > 0


# sizes


PLANS = {
    "convert": ("convert",),
    "slice": ("prune", "--keep", "0.5", "--router", "slice"),
    "ghost": ("prune", "--keep", "3", "--router", "ghost"),
    "all": ("prune", "--keep", "1.0"),
    "quantize-4": ("quantize", "--uniform", "--bits", 4),
    "quantize-8": ("quantize", "--uniform", "--bits", 8),
}
PLACES = {
    "file": ("-o", "out.safetensors"),
    "folder": ("-o", "out"),
    "shards": ("-o", "out", "--max-shard-size", "9KB"),
}


MODELS = ("plain", "flash", "odd")
# each plan in each place, each of them with each model
PREDICTED = [
    (MODELS[(row + column) % len(MODELS)], plan, place)
    for row, plan in enumerate(PLANS)
    for column, place in enumerate(PLACES)
]


@pytest.mark.parametrize(("model", "plan", "place"), PREDICTED)
def test_predicted_bytes_are_written(model: str, plan: str, place: str, made: Path, tmp_path: Path) -> None:
    before = contents(made)
    name, *options = PLANS[plan]
    profile = ("--profile", made / f"{model}.profile.safetensors") if name == "prune" else ()
    profile += ("--refit-tokens", 64) if name == "prune" else ()
    words = (name, made / f"{model}.safetensors", *options, *profile, *PLACES[place])
    predicted = here(*words, "--dry-run", cwd=tmp_path)
    assert predicted.result["dry_run"] is True
    assert list(tmp_path.iterdir()) == []
    written = here(*words, cwd=tmp_path)
    assert bytes_of(written.path) == written.result["bytes"] == predicted.result["bytes"]
    files = sorted(written.path.glob("*.safetensors")) if written.path.is_dir() else [written.path]
    assert (len(files) > 1) == (place == "shards")
    for file in files:
        with safe_open(file, "pt") as opened:
            assert all(list(opened.get_tensor(key).shape) == list(s) for key, s in tensor_shapes(file).items())
    assert here("inspect", written.path, cwd=tmp_path).result["file_bytes"] <= written.result["bytes"]
    assert contents(made) == before, "the input is untouched"


def test_without_a_profile_the_prediction_holds_too(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", "0.5", "--refit-tokens", 64)
    settings = ("--calibration-images", 4, "--calibration-steps", 2)  # which the history keeps
    predicted = here(*words, *settings, "--dry-run", cwd=folder)
    assert predicted.result["plan"] is None, "nothing is chosen without a profile"
    words = (*words, "--profile", "p.safetensors")
    chosen = here(*words, "--dry-run", cwd=folder)
    assert chosen.result["plan"]["blocks"]
    written = here(*words, cwd=folder)
    assert written.result["bytes"] == predicted.result["bytes"] == chosen.result["bytes"]
    assert bytes_of(written.path) == predicted.result["bytes"]


def test_experts_of_different_sizes_need_a_profile_to_predict(made: Path, tmp_path: Path) -> None:
    words = ("prune", shutil.copy(made / "odd.safetensors", tmp_path), "--keep", 2, "--dry-run")
    assert "--profile" in here(*words, cwd=tmp_path).error(3)


def test_a_plan_is_carried_out_as_printed(folder: Path) -> None:
    """What prune writes at once and what apply makes of its dry run are the same bytes."""
    profile = ("--profile", "p.safetensors")
    copying = ("prune", "a.safetensors", "--keep", 2, *PLAINLY)
    for words in (WRITERS["prune"], WRITERS["merge"], copying):
        (folder / "plan.json").write_text(here(*words, "--dry-run", cwd=folder).out)
        here(*words, "-o", "direct.safetensors", "--force", cwd=folder)
        given = () if words is copying else profile
        apply = ("apply", "a.safetensors", "--plan", "plan.json", *given, "-o", "applied.safetensors", "--force")
        assert here(*apply, cwd=folder).code == 0
        assert (folder / "direct.safetensors").read_bytes() == (folder / "applied.safetensors").read_bytes()


def test_an_edited_plan_is_followed(folder: Path) -> None:
    words = ("prune", "a.safetensors", "--keep", 2, *PLAINLY, "--router", "slice", "--dry-run")
    plan = here(*words, cwd=folder).result["plan"]
    plan["blocks"][0] = {"keep": [0, 1, 3], "router": "slice"}
    (folder / "plan.json").write_text(json.dumps(plan))
    written = here("apply", "a.safetensors", "--plan", "plan.json", cwd=folder)
    shapes = tensor_shapes(written.path)
    assert shapes["blocks.0.moe.gate.weight"] == (3, 32)
    assert shapes["blocks.1.moe.gate.weight"] == (2, 32)


def test_a_sliced_model_has_upstream_names_only(made: Path, tmp_path: Path) -> None:
    words = ("prune", made / "flash.safetensors", "--keep", 5, "--profile", made / "flash.profile.safetensors")
    sliced = here(*words, "--router", "slice", "--refit-tokens", 64, "-o", "s.safetensors", cwd=tmp_path)
    upstream = make_pico(attention="flash", sampler="rf", in_channels=3, experts=5, top_k=3, depth=1)
    assert tensor_shapes(sliced.path) == dict(expected_weights(upstream.config))
    assert here("inspect", sliced.path, cwd=tmp_path).result["config"]["num_experts"] == 5


def test_a_ghosted_model_says_which_rows_are_ghosts(made: Path, tmp_path: Path) -> None:
    words = ("prune", made / "plain.safetensors", "--keep", 3, "--profile", made / "plain.profile.safetensors")
    ghosted = here(*words, "--router", "ghost", "-o", "g.safetensors", cwd=tmp_path)
    described = here("inspect", ghosted.path, cwd=tmp_path).result
    assert described["ghost_rows"] == [1, 1]
    assert described["router_rows"] == [4, 4]
    assert described["config"]["num_experts"] == 3
    assert described["history"] == ["prune"]


def test_a_folder_is_what_diffusers_lays_out(folder: Path) -> None:
    written = here("convert", "a.safetensors", "-o", "out", "--max-shard-size", "50KB", cwd=folder)
    names = sorted(file.name for file in written.path.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert names == sorted(["config.json", "diffusion_pytorch_model.safetensors.index.json", *shards])
    index = json.loads((written.path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    stored = {name: shard for shard in shards for name in tensor_shapes(written.path / shard)}
    assert index["weight_map"] == stored
    assert stored.keys() == tensor_shapes(folder / "a.safetensors").keys()
    assert all((written.path / shard).stat().st_size < 80_000 for shard in shards)


def test_a_copy_keeps_every_byte_and_adds_the_configuration(tmp_path: Path) -> None:
    pico = make_pico()
    pico.save_pt(tmp_path / "m.pt", "train", model="x", num_experts=4)
    converted = here("convert", "m.pt", "--heads", 2, "--top-k", 1, "--sampler", "ddpm", cwd=tmp_path)
    with safe_open(converted.path, "pt") as file:
        assert set(file.keys()) == set(pico.state)
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in pico.state.items()), "the EMA weights"
    described = here("inspect", converted.path, cwd=tmp_path).result
    assert described["assumptions"] == []
    assert (described["config"]["num_heads"], described["config"]["top_k"]) == (2, 1)
