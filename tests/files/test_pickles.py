"""State dicts in pickles: each layout is read, EMA first, and nothing is ever executed."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from conftest import Pico
from reading import assert_holds

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.pickles import read_state_dict
from ditmoe_cli.files.reader import open_reader, tensor_bytes
from ditmoe_cli.model.hints import read_hints

CONTAINERS = ["bare", "ema", "model", "module", "state_dict", "train", "deepspeed"]


@pytest.fixture(scope="module")
def model(pico: Callable[..., Pico]) -> Pico:
    return pico(experts=12, hidden=16, depth=1, input_size=4)


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


AVERAGED = {
    "state_dict": ["state_dict_ema"],
    "model": [
        "model_ema",
        "ema_model",
        "ema_state_dict",
        "ema_params",
        "modelEMA",
        "swa",
        "averaged_model",
        "ema_weights",
    ],
    "net": ["net_ema"],
    "model_state_dict": ["ema_model_state_dict"],
    "module": ["ema"],
}


@pytest.mark.parametrize(("raw", "key"), [(raw, key) for raw, keys in AVERAGED.items() for key in keys])
def test_averaged_weights_are_read_under_any_key(tmp_path: Path, model: Pico, raw: str, key: str) -> None:
    others = {name: value + 1 for name, value in model.state.items()}
    torch.save({raw: others, key: dict(model.state)}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    header = open_reader(tmp_path / "x.pt")[0]
    assert header.notes == (f"the averaged weights are read, under {key!r}, not those under {raw!r}",)
    assert header.warnings == ()


@pytest.mark.parametrize(
    "nest",
    [
        lambda averaged, raw: {"ema": {"shadow": averaged, "decay": 0.999}, "model": raw},
        lambda averaged, raw: {"ema": {"module": averaged}, "model": raw},
        lambda averaged, raw: {"callbacks": {"EMA": {"ema_state_dict": averaged}}, "state_dict": raw},
        lambda averaged, raw: {
            **{f"ema.{n}": t for n, t in averaged.items()},
            **{f"model.{n}": t for n, t in raw.items()},
        },
        lambda averaged, raw: {**raw, **{f"ema_model.{n}": t for n, t in averaged.items()}},
        lambda averaged, raw: {
            "ema": {
                **{f"online_model.{n}": t for n, t in raw.items()},
                **{f"ema_model.{n}": t for n, t in averaged.items()},
                "initted": torch.tensor(True),
            }
        },
        lambda averaged, raw: {
            "state_dict": {
                **{f"model.{n}": t for n, t in raw.items()},
                **{f"model_ema.{n.replace('.', '')}": t for n, t in averaged.items()},
                "model_ema.decay": torch.tensor(0.999),
            }
        },
    ],
    ids=["shadow", "module", "lightning", "prefixes", "prefix", "ema-pytorch", "lit-ema"],
)
def test_averaged_weights_are_read_from_any_nesting(tmp_path: Path, model: Pico, nest: Callable[..., Any]) -> None:
    raw = {name: value + 1 for name, value in model.state.items()}
    torch.save(nest(dict(model.state), raw), tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    assert "averaged weights are read" in open_reader(tmp_path / "x.pt")[0].notes[0]


def test_an_average_without_the_fixed_embedding_takes_that_of_the_raw_weights(tmp_path: Path, model: Pico) -> None:
    averaged = {name: value for name, value in model.state.items() if name != "pos_embed"}
    raw = {name: value if name == "pos_embed" else value + 1 for name, value in model.state.items()}
    torch.save({"model": raw, "ema": averaged}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


@pytest.mark.parametrize(
    "unnamed", [{"decay": 0.9, "shadow_params": [torch.zeros(2)]}, [torch.zeros(2)], {"a": torch.zeros(2)}], ids=str
)
def test_what_looks_averaged_and_is_not_read_is_named(tmp_path: Path, model: Pico, unnamed: object) -> None:
    torch.save({"model": dict(model.state), "model_ema": unnamed}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    (warning,) = open_reader(tmp_path / "x.pt")[0].warnings
    assert warning.startswith("'model_ema") and warning.endswith("is not read")


def test_a_second_average_is_named(tmp_path: Path, model: Pico) -> None:
    others = {name: value + 1 for name, value in model.state.items()}
    torch.save({"ema_0.999": others, "ema": dict(model.state)}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    assert open_reader(tmp_path / "x.pt")[0].warnings == (
        "'ema_0.999' looks like averaged weights too, and is not read; 'ema' is",
    )


def test_an_optimizers_averages_are_none_of_the_weights(tmp_path: Path, model: Pico) -> None:
    moments = {0: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    named = {"state": {name: {"exp_avg": value} for name, value in model.state.items()}}
    document = {"model": dict(model.state), "opt": {"state": moments}, "optimizer": named, "loss_avg": 0.5}
    torch.save(document, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    header = open_reader(tmp_path / "x.pt")[0]
    assert header.notes == header.warnings == ()


@pytest.mark.parametrize("entry", [None, "text", 3, [1, 2], (None,)], ids=str)
@pytest.mark.parametrize("container", ["model", None])
def test_entries_that_are_no_tensors_are_left_out_with_a_word(
    tmp_path: Path, model: Pico, entry: object, container: str | None
) -> None:
    state = {**model.state, "extra_state": entry}
    torch.save({container: state} if container else state, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)
    (warning,) = open_reader(tmp_path / "x.pt")[0].warnings
    assert "'extra_state'" in warning and "left out" in warning


def test_numbers_and_other_models_beside_the_weights_are_left_out_with_a_word(tmp_path: Path, model: Pico) -> None:
    state = {f"module.{name}": value for name, value in model.state.items()}
    torch.save({**state, "n_averaged": torch.tensor(3)}, tmp_path / "swa.pt")
    assert_holds(tmp_path / "swa.pt", model)
    assert "'n_averaged' beside the weights" in open_reader(tmp_path / "swa.pt")[0].warnings[0]
    state = {f"model.{name}": value for name, value in model.state.items()}
    torch.save({"state_dict": {**state, "vae.conv.weight": torch.zeros(2)}}, tmp_path / "vae.pt")
    assert_holds(tmp_path / "vae.pt", model)
    assert open_reader(tmp_path / "vae.pt")[0].warnings == (
        "1 tensors under 'vae' are none of the model's, and are left out",
    )


def test_nested_state_dicts_are_joined(tmp_path: Path, model: Pico) -> None:
    nested: dict[str, Any] = {}
    for name, value in model.state.items():
        place, leaf = nested, name.split(".")
        for part in leaf[:-1]:
            place = place.setdefault(part, {})
        place[leaf[-1]] = value
    torch.save({"model": nested}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


def test_arrays_are_read_as_tensors(tmp_path: Path, model: Pico) -> None:
    torch.save({"ema": {name: value.numpy() for name, value in model.state.items()}}, tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


def test_numbers_of_numpy_pass_in_the_arguments(tmp_path: Path, model: Pico) -> None:
    path = model.save_pt(tmp_path / "x.pt", "train", lr=np.float64(1e-4), num_heads=4)
    assert_holds(path, model)
    assert open_reader(path)[0].hints["num_heads"] == 4


@pytest.mark.parametrize("key", ["args", "config", "hyper_parameters", "cfg"])
def test_arguments_under_other_keys_become_hints(tmp_path: Path, model: Pico, key: str) -> None:
    torch.save({"model": dict(model.state), key: {"num_heads": 4}}, tmp_path / "x.pt")
    assert open_reader(tmp_path / "x.pt")[0].hints == {"num_heads": 4}


def test_names_that_differ_in_wrappers_alone_are_refused(tmp_path: Path, model: Pico) -> None:
    state = {**model.state, "_orig_mod.pos_embed": model.state["pos_embed"]}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"'model\.pos_embed' and 'model\._orig_mod\.pos_embed' both stand for"):
        open_reader(tmp_path / "x.pt")


def test_parts_of_weights_are_explained(tmp_path: Path, model: Pico) -> None:
    state = {name: value.flatten()[:3] for name, value in model.state.items()}
    shapes = [{name: value.shape for name, value in model.state.items()}]
    torch.save({"module": state, "param_shapes": shapes}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"a part of the whole.*zero_to_fp32"):
        open_reader(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "strange", [torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")], ids=str
)
def test_strange_tensors_are_named(tmp_path: Path, model: Pico, strange: torch.Tensor) -> None:
    torch.save({"model": {**model.state, "pos_embed": strange}}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"x\.pt: tensor 'pos_embed'"):
        open_reader(tmp_path / "x.pt")


def test_an_empty_tensor_of_a_plain_pickle_names_no_folder_of_deepspeeds(tmp_path: Path, model: Pico) -> None:
    torch.save({**model.state, "pos_embed": torch.empty(0)}, tmp_path / "x.pt")
    with pytest.raises(BadInputError, match=r"'pos_embed' is empty.*gather") as caught:
        open_reader(tmp_path / "x.pt")
    assert f"{tmp_path}-fp32" not in str(caught.value)


@pytest.mark.parametrize(
    "averages",
    [lambda s: [s], lambda s: (0.999, s), lambda s: {"decay": 0.9, "shadow": [s]}],
    ids=["list", "tuple", "in"],
)
def test_averages_in_lists_are_read(tmp_path: Path, model: Pico, averages: Callable[..., Any]) -> None:
    averaged = {name: tensor + 1 for name, tensor in model.state.items()}
    torch.save({"model": dict(model.state), "ema": averages(averaged)}, tmp_path / "x.pt")
    header, reader = open_reader(tmp_path / "x.pt")
    assert torch.equal(reader.tensor("pos_embed"), averaged["pos_embed"])
    assert any("averaged weights are read, under 'ema" in note for note in header.notes)


@pytest.mark.parametrize(
    "args",
    [
        {"num_heads": np.int64(2), "top_k": np.int32(1)},
        {"num_heads": torch.tensor(2), "top_k": torch.tensor([1])[0]},
        '{"num_heads": 2, "top_k": 1}',
        {"moe": {"num_heads": np.int64(2), "top_k": 1}},
    ],
    ids=["numpy", "tensors", "JSON", "nested"],
)
def test_training_arguments_in_other_forms(tmp_path: Path, model: Pico, args: Any) -> None:
    torch.save({"ema": dict(model.state), "args": args}, tmp_path / "x.pt")
    hints = read_hints(open_reader(tmp_path / "x.pt")[0].hints)
    assert (hints.whole("num_heads"), hints.whole("top_k")) == (2, 1)


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


def test_files_larger_than_memory_are_mapped_for_reading(
    pico: Callable[..., Pico], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses torch's own way to map them, which it counts as memory."""
    path = pico().save_pt(tmp_path / "a.pt", "ema")
    expected = {name: bytes(tensor_bytes(value)) for name, value in read_state_dict(path).tensors.items()}

    def refused(name: str, _: bool, nbytes: int) -> NoReturn:
        raise RuntimeError(f"unable to mmap {nbytes} bytes from file <{name}>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refused)
    read = read_state_dict(path).tensors
    gc.collect()
    assert {name: bytes(tensor_bytes(value)) for name, value in read.items()} == expected
    assert torch.UntypedStorage.from_file is refused
