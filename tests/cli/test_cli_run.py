"""Recipes: what inspect prints makes the same bytes again; what is wrong in one is named before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import Outcome, contents, here, outputs
from compressing import measure_few_tokens
from conftest import make_pico

from ditmoe_cli.files.header import read_safetensors_header

A, P = "a.safetensors", ("--profile", "p.safetensors")
FEW = ("--tokens", 256)
GPTQ = ("quantize", A, *("--uniform", "--bits", 3, "--group-size", 32, "--symmetric", "--rounding", "gptq"), *FEW, *P)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its profile with settings of its own, and a weaker one; not to be written to."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, seed in ((A, 0), ("weak.safetensors", 3)):
        make_pico(sampler="rf", in_channels=1, input_size=4, experts=4, seed=seed).save(folder / name)
    settings = ("--images", 4, "--steps", 3, "--cfg", 1.5, "--bins", 2, "--reservoir", 500, "--seed", 7)
    assert here("profile-experts", A, *settings, "-o", "p.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "folder"))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_few_tokens(monkeypatch, 512)


def run(*words: object, cwd: Path) -> Outcome:
    outcome = here(*words, cwd=cwd)
    assert outcome.code == 0, f"{words}: {outcome.err}"
    return outcome


def recipe_from(file: Path | str, folder: Path) -> dict[str, Any]:
    """The recipe of a checkpoint, which is written to r.yaml too."""
    text = run("inspect", file, "--recipe", cwd=folder).out
    (folder / "r.yaml").write_text(text)
    recipe = yaml.safe_load(text)
    assert isinstance(recipe, dict)
    return recipe


def write(folder: Path, recipe: object) -> None:
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def commands_of(recipe: dict[str, Any]) -> list[str]:
    return [next(iter(stage)) for stage in recipe["stages"]]


HEAL = ("heal", "0.safetensors", "--original", A, "--minutes", 0.03, "--batch", 8, *P)
DISTILL = ("distill", A, "--steps", 2, "--minutes", 0.03, "--batch", 8, "--progressive", "--teacher-steps", 16)

CHAINS = {
    "dtype": [("convert", A, "--dtype", "bf16")],
    "random": [("prune", A, "--keep", 2, "--method", "random", "--seed", 5, "--no-refit", "--router", "slice")],
    "nf4": [("quantize", A, "--uniform", "--format", "nf4", "--double-quant")],
    "int": [GPTQ],
    "distill": [
        ("prune", A, "--keep", 2, "--method", "frequency", "--no-refit", *P),
        ("distill", "0.safetensors", "--original", A, "--steps", 2, "--iterations", 2, "--batch", 4),
        ("quantize", "1.safetensors", "--uniform", "--format", "int8"),
    ],
    "own-profile": [
        ("prune", A, "--keep", 2, "--no-refit", "--calibration-images", 2, "--calibration-steps", 2),
        ("quantize", "0.safetensors", "--uniform", "--bits", 4, "--format", "int", "--rounding", "gptq", *FEW),
    ],
}
SLOW = {
    "delta": [("merge", A, "--delta", "svd", *P)],
    "merge": [("merge", A, "--groups", 2, "--no-refit", *P)],
    "refit": [("prune", A, "--keep", 2, "--neurons", 0.5, "--multiple", 8, "--constants", *P)],
    "mix": [("quantize", A, "--bits", 3, "--floor", "attn=4", *FEW, *P)],
    "guided": [("distill", A, "--steps", 2, "--iterations", 2, "--guide-by", "top1", "--guide-scale", 0.5)],
    "healed by the clock": [("prune", A, "--keep", 2, "--no-refit", *P), HEAL],
    "distilled by the clock": [DISTILL],
}


def chained(commands: list[tuple[object, ...]], folder: Path) -> Path:
    """The last file of some commands, each of which writes N.safetensors."""
    for number, words in enumerate(commands):
        run(*words, "-o", f"{number}.safetensors", cwd=folder)
    return folder / f"{len(commands) - 1}.safetensors"


@pytest.mark.parametrize(
    "chain",
    [*CHAINS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_a_file_says_how_to_make_it_again(folder: Path, chain: str) -> None:
    commands = (CHAINS | SLOW)[chain]
    last = chained(commands, folder)
    recipe = recipe_from(last.name, folder)
    assert [name for name in commands_of(recipe) if name != "profile-experts"] == [str(words[0]) for words in commands]
    assert str(folder) not in (folder / "r.yaml").read_text()
    before = set(contents(folder))
    again = run("run", "r.yaml", A, "-o", "again.safetensors", "--same", cwd=folder)
    assert again.result["same"] is True and again.result["differences"] == []
    assert not [note for note in again.notes if "warning: recorded" in note or "than recorded" in note]
    assert (folder / "again.safetensors").read_bytes() == last.read_bytes()
    assert set(contents(folder)) - before == {"again.safetensors"}, "what lay between is gone"
    assert again.path == folder / "again.safetensors"


def test_a_checkpoint_is_its_own_recipe(folder: Path) -> None:
    last = chained([("quantize", A, "--uniform", "--format", "nf4")], folder)
    done = run("run", last.name, "weak.safetensors", "-o", "other.safetensors", cwd=folder)
    assert done.result["same"] is None
    assert any("is another source than the recipe's" in note for note in done.notes)
    direct = run("quantize", "weak.safetensors", "--uniform", "--format", "nf4", "-o", "direct.safetensors", cwd=folder)
    assert done.path.read_bytes() == direct.path.read_bytes()
    assert (
        "nothing to hold the result against"
        in here("run", last.name, "weak.safetensors", "-o", "third.safetensors", "--same", cwd=folder).err
    )


NF4, INT8, INT4 = ("--format", "nf4"), ("--format", "int8"), ("--bits", 4, "--format", "int", "--group-size", 32)
EXPORTS: dict[str, tuple[tuple[object, ...], tuple[object, ...], str]] = {
    "diffusers": (NF4, ("--to", "diffusers", "--max-shard-size", "50KB"), "out"),
    "diffusers in bf16": (NF4, ("--to", "diffusers", "--dtype", "bf16"), "out"),
    "sdnq": (INT4, ("--to", "sdnq"), "out"),
    "compressed-tensors": (INT4, ("--to", "compressed-tensors"), "out"),
    "bitsandbytes": (INT8, ("--to", "bitsandbytes"), "out"),
    "upstream": (NF4, ("--to", "upstream"), "out.pt"),
    "a file": (INT8, ("--to", "bitsandbytes"), "out.safetensors"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_says_how_to_make_it_again(folder: Path, case: str) -> None:
    """All its files, the card too; and it is up to date there."""
    fmt, words, name = EXPORTS[case]
    run("quantize", A, "--uniform", *fmt, "-o", "q.safetensors", cwd=folder)
    run("export", "q.safetensors", *words, "-o", name, cwd=folder)
    recipe = recipe_from(name, folder)
    assert commands_of(recipe) == ["quantize", "export"] and recipe["stages"][0]["gives"]
    (folder / "again").mkdir()
    where = ("r.yaml", A, "-o", f"again/{name}", *words[2:4] * (words[2:3] == ("--max-shard-size",)))
    again = run("run", *where, "--same", cwd=folder)
    assert again.result["same"] is True and again.path == folder / "again" / name
    ours, theirs = folder / name, folder / "again" / name
    assert contents(theirs) == contents(ours) if ours.is_dir() else theirs.read_bytes() == ours.read_bytes()
    assert {each.name for each in (folder / "again").iterdir()} == {name}, "what lay between is gone"
    assert run("run", *where, cwd=folder).result["up_to_date"]


def test_what_is_made_of_an_export_is_made_of_it_again(folder: Path) -> None:
    """One in another dtype, so that the checkpoint before it would not do; and what samples it is last."""
    run("export", A, "--to", "diffusers", "--dtype", "bf16", "-o", "out", cwd=folder)
    words = ("--keep", 2, "--method", "random", "--no-refit")
    last = run("prune", "out", *words, "-o", "made.safetensors", cwd=folder).path
    recipe = recipe_from(last.name, folder)
    assert commands_of(recipe) == ["export", "prune"]
    before = set(contents(folder))
    again = run("run", "r.yaml", A, "-o", "again.safetensors", "--same", cwd=folder)
    assert again.result["same"] is True and set(contents(folder)) - before == {"again.safetensors"}
    write(
        folder,
        {**recipe, "stages": [recipe["stages"][0], {"sample": {"images": 2, "steps": 2, "output": "s.safetensors"}}]},
    )
    assert run("run", "r.yaml", A, "-o", "third", cwd=folder).path == folder / "third"
    assert (folder / "third" / "model_index.json").is_file()


def test_an_export_that_differs_is_told(folder: Path) -> None:
    run("export", A, "--to", "diffusers", "-o", "out", cwd=folder)
    assert commands_of(recipe_from("out", folder)) == ["export"]
    code = folder / "out" / "pipeline_ditmoe.py"
    code.write_text(code.read_text() + "# changed\n")
    told = here("run", "out", A, "-o", "again", "--same", cwd=folder)
    assert told.code == 6 and "files beside them are others" in told.err
    assert "is not what the recipe recorded" in here("run", "out", A, "-o", "again", cwd=folder).error(5)


def test_a_vae_that_an_export_holds_is_an_input(folder: Path) -> None:
    make_pico(sampler="rf").save(folder / "latent.safetensors")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(folder / "decoder")
    run("export", "latent.safetensors", "--to", "diffusers", "--vae", "decoder", "-o", "out", cwd=folder)
    recipe = recipe_from("out", folder)
    assert recipe["stages"][-1]["export"] == {"to": "diffusers", "vae": "$vae"} and "vae" in recipe["inputs"]
    (folder / "again").mkdir()
    missing = here("run", "out", "latent.safetensors", "-o", "again/out", cwd=folder).error(2)
    assert "give it as --input vae=PATH" in missing
    run("run", "out", "latent.safetensors", "--input", "vae=decoder", "-o", "again/out", "--same", cwd=folder)
    assert contents(folder / "again" / "out") == contents(folder / "out")


def test_sources_with_public_names_are_named(tmp_path: Path) -> None:
    run("quantize", "demo:digits", "--uniform", "--format", "int8", "-o", "q.safetensors", cwd=tmp_path)
    assert recipe_from("q.safetensors", tmp_path)["source"]["checkpoint"] == "demo:digits"
    again = run("run", "r.yaml", "--same", "--dry-run", cwd=tmp_path)
    assert again.result["stages"][0]["result"]["bytes"] == (tmp_path / "q.safetensors").stat().st_size
    assert not (tmp_path / "digits.r.safetensors").exists()
    run("run", "r.yaml", "--same", "-q", cwd=tmp_path)
    assert (tmp_path / "digits.r.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


@pytest.mark.parametrize("signed", [True, False], ids=["edited", "by hand"])
def test_plans_of_no_planner_stand_in_the_recipe(folder: Path, signed: bool) -> None:
    words = ("prune", A, "--keep", 2, "--no-refit", "--method", "frequency", *P, "--dry-run")
    plan = run(*words, cwd=folder).result["plan"]
    plan["blocks"][0]["keep"] = [0, 3] if plan["blocks"][0]["keep"] != [0, 3] else [1, 2]
    if not signed:
        del plan["digest"]
    (folder / "plan.json").write_text(json.dumps(plan))
    direct = run("apply", A, "--plan", "plan.json", "-o", "direct.safetensors", cwd=folder).path
    recipe = recipe_from("direct.safetensors", folder)
    assert recipe["stages"][-1]["apply"]["plan"]["blocks"][0]["keep"] == plan["blocks"][0]["keep"]
    run("run", "r.yaml", A, "-o", "again.safetensors", "--same", cwd=folder)
    assert (folder / "again.safetensors").read_bytes() == direct.read_bytes()


def test_other_files_are_inputs(folder: Path) -> None:
    guided = ("--guide-with", "weak.safetensors", "--guide-scale", 0.5, "--batch", 4)
    chained([("distill", A, "--steps", 1, "--iterations", 1, *guided)], folder)
    recipe = recipe_from("0.safetensors", folder)
    assert recipe["inputs"].keys() == {"guide"} and recipe["stages"][0]["distill"]["guide-with"] == "$guide"
    words = ("run", "r.yaml", A, "-o", "again.safetensors")
    assert "input 'guide' is missing" in here(*words, cwd=folder).error(2)
    assert "input guide a.safetensors: is not what" in here(*words, "--input", f"guide={A}", cwd=folder).error(3)
    assert "has no such input" in here(*words, "--input", "weak=w", cwd=folder).error(2)
    assert "give a name and a path" in here(*words, "--input", "weak", cwd=folder).error(2)
    run(*words, "--input", "guide=weak.safetensors", "--same", cwd=folder)


def test_a_recipe_by_hand_may_end_in_other_commands(folder: Path) -> None:
    """And its values are those of the command line."""
    write(
        folder,
        {
            "schema": "ditmoe.recipe/1",
            "source": A,
            "stages": [
                {"quantize": {"uniform": True, "bits": 4, "format": "int", "double-quant": False, "symmetric": None}},
                {"sample": {"images": 2, "steps": 2, "classes": [0, 2], "output": "s.safetensors"}},
                "inspect",
            ],
        },
    )
    done = run("run", "r.yaml", "-o", "q.safetensors", cwd=folder)
    assert [stage["command"] for stage in done.result["stages"]] == ["quantize", "sample", "inspect"]
    assert done.result["same"] is None and done.envelope["samples"] == str(folder / "s.safetensors")
    assert done.result["stages"][1]["result"]["spec"]["classes"] == [0, 2]
    assert "tells no result to know it by" in here("run", "r.yaml", "-o", "q.safetensors", cwd=folder).error(5)
    (folder / "s.safetensors").unlink()
    run("run", "r.yaml", "-o", "q.safetensors", "--force", cwd=folder)


def test_what_is_there_is_up_to_date(folder: Path) -> None:
    last = chained([("quantize", A, "--uniform", "--format", "nf4")], folder)
    recipe_from(last.name, folder)
    before = outputs(folder)
    again = run("run", "r.yaml", A, "-o", last.name, cwd=folder)
    assert again.result["up_to_date"] and again.result["same"] and outputs(folder) == before
    shutil.copy(folder / "weak.safetensors", last)
    assert "is not what the recipe recorded" in here("run", "r.yaml", A, "-o", last.name, cwd=folder).error(5)


def test_a_run_goes_on_with_the_stage_that_failed(folder: Path) -> None:
    """Stages before it are not run again, also where it is given other options."""
    stages: list[Any] = [
        {"profile-experts": {"images": 2, "steps": 2}},
        {"prune": {"keep": 3, "no-refit": True, "router": "slice"}},
        {"prune": {"keep": 1, "no-refit": True, "router": "slice"}},  # fewer than top-k
    ]
    write(folder, {"schema": "ditmoe.recipe/1", "source": A, "stages": stages})
    failed = here("run", "r.yaml", "-o", "out.safetensors", cwd=folder)
    assert failed.error(4).startswith("r.yaml: stage 3 (prune): ")
    assert "kept 2 of 3 stages" in failed.err and not (folder / "out.safetensors").exists()
    stages[2]["prune"]["keep"] = 2
    write(folder, {"schema": "ditmoe.recipe/1", "source": A, "stages": stages})
    done = run("run", "r.yaml", "-o", "out.safetensors", cwd=folder)
    assert done.result["stages"][1]["result"]["up_to_date"] is True
    assert not list(folder.glob(".*")), "what lay between is gone"


def test_what_differs_is_told(folder: Path) -> None:
    last = chained([("quantize", A, "--uniform", "--format", "int8")], folder)
    recipe = recipe_from(last.name, folder)
    recipe["stages"][0]["quantize"] = {"uniform": True, "format": "nf4"}
    recipe["made"]["ditmoe"] = "0.0.1"
    write(folder, recipe)
    done = run("run", "r.yaml", A, "-o", "again.safetensors", cwd=folder)
    assert done.result["same"] is False
    assert any("recorded with ditmoe 0.0.1" in note for note in done.notes)
    assert "stage 1 (quantize) gives others than recorded" in done.result["differences"]
    again = here("run", "r.yaml", A, "-o", "third.safetensors", "--same", cwd=folder)
    assert again.code == 6 and "is not what the recipe recorded" in again.err


def test_another_version_is_given_the_defaults_of_the_recipe(folder: Path) -> None:
    last = chained([("quantize", A, "--uniform", "--format", "int8")], folder)
    recipe = recipe_from(last.name, folder)
    recipe["stages"][0]["defaults"] = {"rounding": "gptq", "tokens": 7}  # as if these had been the defaults
    recipe["made"]["ditmoe"] = "0.0.1"
    write(folder, recipe)
    dry = here("run", "r.yaml", A, "-o", "again.safetensors", "--dry-run", cwd=folder)
    assert dry.result["stages"][0]["result"]["plan"]["rounding"]["tokens"] == 7


def test_inputs_are_never_written_over(folder: Path) -> None:
    write(folder, broken(inputs={"weak": "weak.safetensors"}))
    before = contents(folder)
    for name in (A, "weak.safetensors", "r.yaml"):
        assert "is the input itself" in here("run", "r.yaml", "-o", name, "--force", cwd=folder).error(5)
    assert "checkpoints are written as" in here("run", "r.yaml", "-o", "x.pt", cwd=folder).error(2)
    assert contents(folder) == before


def test_a_recipe_records_what_computed_it(folder: Path) -> None:
    recipe = recipe_from(chained([GPTQ], folder).name, folder)
    assert recipe["made"]["device"] == "cpu" and recipe["made"]["threads"] == "1"
    settings = recipe["stages"][0]["profile-experts"]
    assert (settings["images"], settings["bins"], settings["reservoir"], settings["seed"]) == (4, 2, 500, 7)
    run("quantize", A, "--uniform", "--format", "int8", "-o", "plain.safetensors", cwd=folder)
    plain = recipe_from("plain.safetensors", folder)
    assert plain["made"].keys() == {"ditmoe"} and plain["stages"][0]["defaults"] == {"rounding": "nearest"}


def test_a_source_without_history_has_no_recipe(folder: Path) -> None:
    assert "has no history" in here("inspect", A, "--recipe", cwd=folder).error(3)
    assert "has no history" in here("run", A, cwd=folder).error(3)


def test_a_source_of_another_kind_is_refused_where_the_recipe_names_it(folder: Path) -> None:
    recipe = recipe_from(chained([("convert", A, "--dtype", "bf16")], folder).name, folder)
    assert "knows its source by fingerprint alone" in here("run", "r.yaml", cwd=folder).error(2)
    recipe["source"]["checkpoint"] = "weak.safetensors"
    write(folder, recipe)
    assert "is not what the recipe was made with" in here("run", "r.yaml", cwd=folder).error(3)
    recipe["source"]["checkpoint"] = "absent.safetensors"
    write(folder, recipe)
    assert "absent.safetensors" in here("run", "r.yaml", cwd=folder).error(3)


def test_overrides_of_the_source_are_kept(tmp_path: Path) -> None:
    model = make_pico(sampler="rf", in_channels=1, input_size=4, experts=4, seed=0)
    model.save_pt(tmp_path / "a.pt")
    given = ("--heads", model.config.num_heads, "--sampler", "rf", "--top-k", 1)
    run("quantize", "a.pt", *given, "--uniform", "--format", "int8", "-o", "q.safetensors", cwd=tmp_path)
    recipe_from("q.safetensors", tmp_path)
    run("run", "r.yaml", "a.pt", "-o", "again.safetensors", "--same", cwd=tmp_path)


def test_files_without_paths_hold_their_recipe(folder: Path) -> None:
    last = chained([("prune", A, "--keep", 2, "--method", "random", "--no-refit")], folder)
    text = read_safetensors_header(last).metadata["ditmoe"]
    assert str(folder) not in text and A not in text


def broken(**changes: Any) -> dict[str, Any]:
    """A recipe with some keys changed; None removes."""
    good = {"schema": "ditmoe.recipe/1", "source": A, "stages": [{"quantize": {"uniform": True, "format": "int8"}}]}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


BROKEN = {
    "no schema": (broken(schema=None), 3, "schema is None"),
    "unknown key": (broken(steps=[]), 3, "unknown key 'steps'"),
    "no stages": (broken(stages=None), 3, "key 'stages' is None"),
    "stages as a map": (broken(stages={"prune": {}}), 3, "key 'stages'"),
    "empty stage": (broken(stages=[{}]), 3, "stage 1: names no command"),
    "two commands": (broken(stages=[{"prune": {}, "merge": {}}]), 3, "stage 1: names 'prune', 'merge'"),
    "options as a list": (broken(stages=[{"prune": ["keep"]}]), 3, "stage 1 (prune): is ['keep']"),
    "map as a value": (broken(stages=[{"prune": {"keep": {"a": 1}}}]), 3, "stage 1 (prune): option 'keep'"),
    "gives": (broken(stages=[{"prune": {}, "gives": "x"}]), 3, "stage 1 (prune): key 'gives' is 'x'"),
    "source": (broken(source=[1]), 3, "source: is [1]"),
    "given": (broken(source={"checkpoint": A, "given": {"depth": 1}}), 3, "unknown key 'depth'"),
    "result": (broken(result={"fingerprint": "0" * 64}), 3, "result: expected a fingerprint and"),
    "input": (broken(inputs={"Weak!": A}), 3, "'Weak!' is no name"),
    "unknown command": (broken(stages=[{"prun": {}}]), 2, "stage 1 (prun): no such command; did you mean prune?"),
    "no command of a pipe": (broken(stages=[{"run": {}}]), 2, "stage 1 (run): no such command of a pipe"),
    "unknown option": (broken(stages=[{"prune": {"kep": 2}}]), 2, "has no option 'kep'; did you mean keep?"),
    "value": (broken(stages=[{"prune": {"router": "up"}}]), 2, "stage 1 (prune): --router up: choose"),
    "number": (broken(stages=[{"prune": {"seed": "x"}}]), 2, "stage 1 (prune): Invalid value for '--seed'"),
    "switch": (broken(stages=[{"prune": {"scale": 3}}]), 2, "it is a switch: give true or false"),
    "no switch": (broken(stages=[{"prune": {"keep": True}}]), 2, "it is no switch: give its value"),
    "no plan": (broken(stages=[{"apply": {"plan": {"a": 1}}}]), 3, "stage 1 (apply): plan: schema is None"),
    "missing option": (broken(stages=["apply"]), 2, "stage 1 (apply): Missing option '--plan'"),
    "output": (broken(stages=[{"prune": {"output": "x"}}]), 2, "option 'output' of the last checkpoint is given to"),
    "dry run": (broken(stages=[{"sample": {"dry-run": True}}]), 2, "option 'dry-run' is given to ditmoe run"),
    "later stage": (
        broken(stages=["inspect", {"heal": {"original": "$2"}}]),
        2,
        "stage 2 (heal): option 'original' is '$2', which stands for nothing",
    ),
    "no name": (broken(stages=[{"heal": {"original": "$weak"}}]), 2, "which stands for nothing; there are $source"),
    "infeasible": (broken(stages=[{"prune": {"keep": 1, "method": "random"}}]), 4, "stage 1 (prune): "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named_by_file_stage_and_key(folder: Path, case: str) -> None:
    recipe, code, said = BROKEN[case]
    write(folder, recipe)
    before = contents(folder)
    message = here("run", "r.yaml", "-o", "out.safetensors", cwd=folder).error(code)
    assert message.startswith("r.yaml: ") and said in message, message
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x", "line 1: anchors and aliases are not taken"),
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("a: !!python/object:os.system x", "line 1: the tag"),
        ("[" * 1000, "nested too deep"),
        ("a: [1", "line 1: "),
        ("- 1", "expected a JSON object of schema ditmoe.recipe/1"),
        ("", "expected a JSON object of schema ditmoe.recipe/1"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert said in here("run", "r.yaml", cwd=tmp_path).error(3)


def test_a_file_that_is_absent_or_no_text(tmp_path: Path) -> None:
    assert "absent.yaml: no such file" in here("run", "absent.yaml", cwd=tmp_path).error(3)
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
    assert "not a recipe" in here("run", "r.yaml", cwd=tmp_path).error(3)
