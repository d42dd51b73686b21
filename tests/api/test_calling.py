"""Arguments from Python: what is taken as what, and one error that names the argument for all else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from conftest import make_pico

import ditmoe_cli
from ditmoe_cli import DitmoeError
from ditmoe_cli.api.calling import checked, public, quiet
from ditmoe_cli.api.notes import note
from ditmoe_cli.errors import UsageError
from ditmoe_cli.progress import is_watched, phase


def even(value: int) -> int:
    if value % 2:
        raise ValueError("give an even number")
    return value


@pytest.mark.parametrize(
    ("hint", "given", "found"),
    [
        (int, np.int64(3), 3),
        (float, np.float32(0.5), 0.5),
        (float, 2, 2.0),
        (int | float | str, "0.5", "0.5"),
        (float | int | str, 2, 2),
        (float | int | str, np.int64(2), 2),
        (float | int | str, 2.0, 2.0),
        (int | None, None, None),
        (Annotated[int, even] | None, 4, 4),
        (Sequence[int], range(3), (0, 1, 2)),
        (Sequence[int], np.array([1, 2]), (1, 2)),
        (Sequence[str], ["gate", "up"], ("gate", "up")),
        (Mapping[str, float], {"attn": 4}, {"attn": 4.0}),
        (str | Path, Path("a"), Path("a")),
        (Literal["a", "b"], "b", "b"),
        (Any, object, object),
    ],
)
def test_values_are_taken_as_their_hints_have_them(hint: Any, given: object, found: object) -> None:
    value = checked("x", given, hint)
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    ("hint", "given", "told"),
    [
        (int, True, "x True: give a whole number"),
        (int, 1.0, "x 1.0: give a whole number"),
        (float, "0.5", "x '0.5': give a number"),
        (bool, 1, "x 1: give True or False"),
        (str | Path, 3, "x 3: give a text or a path"),
        (Annotated[int, even] | None, 3, "x 3: give an even number"),
        (Sequence[int], "123", "x '123': give a list"),
        (Sequence[int], [1, "2"], "x [1, '2']: give a list"),
        (Mapping[str, float], ["attn"], "x ['attn']: give a mapping"),
        (Literal["a", "b"], "c", "x 'c': choose a, b"),
        (Literal["a", "b"], ["a"], "x ['a']: choose a, b"),
        (int, "y" * 500, f"x '{'y' * 76}...: give a whole number"),
    ],
)
def test_other_values_are_errors_that_name_the_argument(hint: Any, given: object, told: str) -> None:
    with pytest.raises(UsageError) as error:
        checked("x", given, hint)
    assert str(error.value) == told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calling")
    make_pico(sampler="rf", in_channels=1, learn_sigma=False).save(folder / "a.safetensors")
    return folder


BAD: Mapping[str, tuple[Callable[[str], object], str]] = {
    "a number as path": (lambda _: ditmoe_cli.open_checkpoint(3), "path 3"),  # type: ignore[arg-type]
    "no file": (lambda _: ditmoe_cli.open_checkpoint("nowhere.pt"), "nowhere.pt: no such"),
    "no demo": (lambda _: ditmoe_cli.load_model("demo:letters"), "demo:letters: no such demo"),
    "no profile": (lambda _: ditmoe_cli.read_profile("nowhere.safetensors"), "no such profile"),
    "another dtype": (lambda a: ditmoe_cli.load_model(a, dtype="int8"), "dtype int8: choose"),
    "another device": (lambda a: ditmoe_cli.profile(a, device="tpu"), "device 'tpu': choose auto, cpu"),
    "overrides of what is open": (
        lambda a: ditmoe_cli.load_model(ditmoe_cli.open_checkpoint(a), top_k=1),
        "top_k has no effect on an opened checkpoint",
    ),
    "no keep": (lambda a: ditmoe_cli.plan_prune(a), "keep is missing"),
    "a list to keep": (lambda a: ditmoe_cli.plan_prune(a, keep=[1]), "keep [1]: give"),  # type: ignore[arg-type]
    "a ratio above 1": (lambda a: ditmoe_cli.plan_prune(a, keep=1.5), "keep 1.5: a ratio"),
    "no method": (lambda a: ditmoe_cli.plan_prune(a, keep=0.5, method="best"), "method 'best': unknown; choose reap"),
    "an idle seed": (lambda a: ditmoe_cli.plan_prune(a, keep=0.5, seed=1), "seed has no effect without method random"),
    "an idle number": (
        lambda a: ditmoe_cli.plan_prune(a, keep=0.5, refit=False, refit_tokens=64),
        "refit_tokens has no effect with refit=False",
    ),
    "no groups": (lambda a: ditmoe_cli.plan_merge(a), "groups is missing"),
    "two ways to merge": (lambda a: ditmoe_cli.plan_merge(a, groups=2, delta="svd"), "groups and delta exclude"),
    "no bits": (lambda a: ditmoe_cli.plan_quantize(a), "bits is missing"),
    "a width of 7": (lambda a: ditmoe_cli.plan_quantize(a, bits=4, allow=(2, 7)), "allow 7: choose"),
    "a floor of nothing": (lambda a: ditmoe_cli.plan_quantize(a, bits=4, floor={"x": 4}), "floor x: choose"),
    "no size": (lambda a: ditmoe_cli.compress(a, size="much"), "size much: give a size such as 5GB"),
    "no goal": (lambda a: ditmoe_cli.compress(a), "give one of size"),
    "a pickle to write": (lambda a: ditmoe_cli.compress(a, ratio=0.5, output="b.pt"), "output 'b.pt': checkpoints"),
    "no plan": (lambda a: ditmoe_cli.apply(a, "nowhere.json"), "nowhere.json: no such file"),
    "a plan of another kind": (lambda a: ditmoe_cli.apply(a, {"keep": 1}), "plan {'keep': 1}: give"),  # type: ignore[arg-type]
    "no groups to train": (lambda a: ditmoe_cli.heal(a, original=a, train=["all", "heads"]), "train heads"),
    "no steps to learn": (lambda a: ditmoe_cli.distill(a, original=a, steps=0), "steps 0: must be at least 1"),
    "no images": (lambda a: ditmoe_cli.sample(a, images=0), "images 0"),
    "half an interval": (lambda a: ditmoe_cli.sample(a, cfg=2, cfg_interval=[0.5]), "give two"),
    "a guide without a scale": (lambda a: ditmoe_cli.sample(a, guide_by="top1"), "guide_by top1: give its scale"),
    "classes as text": (lambda a: ditmoe_cli.sample(a, classes="0-3"), "classes '0-3': give a list"),
    "nothing to compare with": (lambda a: ditmoe_cli.score(a), "nothing to compare with: give ref"),
    "no metric": (lambda a: ditmoe_cli.score(a, ref=a, metrics=["best"]), "best"),
    "no checkpoint to compare": (lambda a: ditmoe_cli.compare(a, "nowhere.pt"), "nowhere.pt: no such"),
    "no profile to report on": (lambda a: ditmoe_cli.report(a), "no profile of it lies here"),
    "a page of another kind": (lambda a: ditmoe_cli.report(a, output="b.pdf"), "output 'b.pdf': give a name that ends"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_that_names_it(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    call, told = BAD[name]
    with pytest.raises(DitmoeError) as error:
        call("a.safetensors")
    text = str(error.value)
    assert told in text
    assert "⟨" not in text and " --" not in text and "\n" not in text
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"], "nothing is left behind"


def test_phases_are_watched_unless_somebody_watches() -> None:
    seen: list[bool] = []

    @public
    def ask() -> None:
        seen.append(is_watched())

    ask()
    assert seen == [True] and not is_watched()


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet(), phase("working"):
        note("done")
    note("a ⟨keep⟩ of 1")
    assert capsys.readouterr().err == "ditmoe: a keep of 1\n"


def test_python_s_own_errors_stay() -> None:
    with contextlib.suppress(DitmoeError), pytest.raises(TypeError, match="unexpected keyword argument 'kep'"):
        ditmoe_cli.plan_prune("demo:digits", kep=0.5)  # type: ignore[call-arg]


def test_a_process_of_torchrun_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("TORCHELASTIC_RUN_ID", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="works in one process"):
        ditmoe_cli.plan_prune(folder / "a.safetensors", keep=0.5)


def test_a_wrong_word_is_told_with_the_function_and_the_word_that_is_near() -> None:
    with pytest.raises(TypeError, match=r"plan_prune\(\): .*'kep'; did you mean keep\?"):
        ditmoe_cli.plan_prune("a.safetensors", kep=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"heal\(\): missing a required argument: 'original'"):
        ditmoe_cli.heal("a.safetensors")  # type: ignore[call-arg]


def test_devices_are_told_alike_wherever_they_are_given(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_pico().save(path)
    with pytest.raises(UsageError, match="choose auto, cpu, cuda or cuda:N"):
        ditmoe_cli.load_model(path, device="gpu")


def test_an_empty_name_is_not_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pico().save(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    assert ditmoe_cli.open_checkpoint(".").path == tmp_path
    with pytest.raises(DitmoeError, match="the name of a checkpoint is empty"):
        ditmoe_cli.open_checkpoint("")
