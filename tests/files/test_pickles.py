"""State dicts in pickles: each layout is read, EMA first, and nothing is ever executed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pico
from reading import assert_holds

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.reader import open_reader

CONTAINERS = ["bare", "ema", "model", "module", "state_dict", "train", "deepspeed"]


@pytest.fixture(scope="module")
def model(pico: Callable[..., Pico]) -> Pico:
    return pico(experts=12, hidden=16)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_pickles_of_every_container(tmp_path: Path, model: Pico, container: str, legacy: bool) -> None:
    path = model.save_pt(tmp_path / "x.pt", container, legacy=legacy)
    assert_holds(path, model)
    layout = open_reader(path)[0].layout
    assert {"bare": "bare", "train": "'ema'", "deepspeed": "DeepSpeed"}.get(container, container) in layout


def test_arguments_become_hints(tmp_path: Path, model: Pico) -> None:
    path = model.save_pt(tmp_path / "x.pt", "train", num_experts=12, image_size=64, model="DiT-S/2")
    assert open_reader(path)[0].hints == {"num_experts": 12, "image_size": 64, "model": "DiT-S/2"}
    torch.save({"ema": dict(model.state), "args": {"top_k": 1}}, tmp_path / "y.pt")
    assert open_reader(tmp_path / "y.pt")[0].hints == {"top_k": 1}


def test_an_empty_ema_is_passed_over(tmp_path: Path, model: Pico) -> None:
    torch.save({"ema": {}, "model": dict(model.state)}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


@pytest.mark.parametrize(
    "document",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        "weights",
        {},
        {"model": {}},
        {"weights": {"a": torch.zeros(2)}},
        {0: torch.zeros(2)},
        {"model": {("a", 1): torch.zeros(2)}},
        None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_pickles_without_a_state_dict_are_refused(tmp_path: Path, document: object) -> None:
    torch.save(document, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"x\.pt"):
        open_reader(tmp_path / "x.pt")


def test_numbers_beside_the_averaged_weights_do_not_hide_them(tmp_path: Path) -> None:
    averaged = {"a": torch.ones(2), "decay": 0.9999, "updates": 7}
    torch.save({"ema": averaged, "model": {"a": torch.zeros(2)}, "args": "--depth 2"}, tmp_path / "x.pt")
    header, reader = open_reader(tmp_path / "x.pt")
    assert list(header.tensors) == ["a"]
    assert reader.tensor("a").tolist() == [1.0, 1.0]
    assert header.hints == {}


def test_the_keys_that_were_found_are_named(tmp_path: Path) -> None:
    torch.save({"weights": {"a": torch.zeros(2)}, "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="epoch, weights"):
        open_reader(tmp_path / "x.pt")


def test_zero3_placeholders_are_explained(tmp_path: Path, model: Pico) -> None:
    torch.save({"module": {name: torch.empty(0) for name in model.state}}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="zero_to_fp32"):
        open_reader(tmp_path / "x.pt")


class Trap:
    """Runs a command when unpickled by the trusting."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.function, self.args


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [(os.system, "touch {}", "system"), (exec, "open({!r}, 'w')", "exec"), (eval, "open({!r}, 'w')", "eval")],
)
def test_a_pickle_that_would_run_something_is_refused_by_name(
    tmp_path: Path, form: str, function: Callable[..., Any], argument: str, named: str
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    document = {"ema": {"a": torch.zeros(2)}, "args": Trap(function, argument.format(str(canary)))}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"args": document["args"]}, protocol=2))
    else:
        torch.save(document, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(BadInputError, match=rf"x\.pt: holds [\w.]*{named}, which") as caught:
        open_reader(path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_pickles_of_other_protocols_run_nothing_either(tmp_path: Path, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Trap(os.system, f"touch {canary}"), protocol=protocol))
    with pytest.raises(BadInputError, match=r"x\.pt"):
        open_reader(path)
    assert not canary.exists()


def test_a_pickled_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"holds torch\.nn\.modules\.linear\.Linear, which"):
        open_reader(tmp_path / "x.pt")


def test_only_plain_values_pass_in_the_arguments(tmp_path: Path, pico: Callable[..., Pico]) -> None:
    path = pico().save_pt(tmp_path / "x.pt", "train", results=Path("x"))
    with pytest.raises(BadInputError, match=r"holds pathlib\.\w*Path, which"):
        open_reader(path)


def truncated(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_pickles(tmp_path: Path, pico: Callable[..., Pico], share: float, legacy: bool) -> None:
    path = pico().save_pt(tmp_path / "x.pt", "train", legacy=legacy)
    path.write_bytes(truncated(path.read_bytes(), share))
    with pytest.raises(BadInputError, match=r"x\.pt") as caught:
        open_reader(path)
    assert "\n" not in str(caught.value)
