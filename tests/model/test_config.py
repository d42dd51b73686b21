"""The configuration, inferred from names and shapes; what no shape tells, and what contradicts itself."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Pico
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import infos_of, upstream

from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.reader import tensor_bytes
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, Given, Inferred, expected_weights, infer_config
from ditmoe_cli.model.dit import DiTMoE

NOTHING_GIVEN = Given()


def infer(
    weights: Mapping[str, TensorInfo],
    hints: Mapping[str, Any] | None = None,
    given: Given = NOTHING_GIVEN,
    raw: Mapping[str, bytes] | None = None,
) -> Inferred:
    """Infer a configuration from headers; tensors whose bytes are not given hold zeros."""

    def read(name: str) -> memoryview:
        return memoryview((raw or {}).get(name, bytes(weights[name].nbytes)))

    return infer_config(weights, read, hints or {}, given, "the-file.pt")


@st.composite
def configs(draw: st.DrawFn) -> DiTMoEConfig:
    heads, head_dim = draw(st.integers(1, 6)), 4 * draw(st.integers(1, 8))
    patch, side = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 8))
    channels, depth = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    widths = st.lists(st.integers(1, 300), min_size=1, max_size=12).map(tuple)
    blocks = []
    for _ in range(depth):
        found = draw(widths)
        mapped = draw(st.booleans())
        rows = len(found) + (draw(st.integers(0, 3)) if mapped else 0)
        blocks.append(BlockConfig(rows, found, draw(st.integers(1, 300)), mapped))
    return DiTMoEConfig(
        input_size=patch * side,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels * draw(st.sampled_from([1, 2])),
        hidden_size=heads * head_dim,
        depth=depth,
        num_heads=heads,
        num_classes=draw(st.integers(1, 1000)),
        top_k=draw(st.integers(1, min(len(b.expert_widths) for b in blocks))),
        attention=draw(st.sampled_from(["timm", "flash"])),
        sampler=draw(st.sampled_from(["rf", "ddpm"])),
        blocks=tuple(blocks),
        null_class=draw(st.booleans()),
    )


@given(config=configs())
def test_any_configuration_is_inferred_from_its_tensors(config: DiTMoEConfig) -> None:
    weights, given_ = infos_of(config), Given(config.num_heads, config.top_k, config.sampler, config.num_classes)
    found = infer(weights, given=given_)
    assert found == Inferred(config)
    if config.attention == "flash":
        assert infer(weights, given=replace(given_, num_heads=None)).config == config


@given(config=configs())
def test_our_own_metadata_leaves_nothing_open(config: DiTMoEConfig) -> None:
    found = infer(infos_of(config), hints=config.to_json())
    assert found == Inferred(config)


@settings(max_examples=20)
@given(config=configs())
def test_the_network_has_the_tensors_that_are_expected(config: DiTMoEConfig) -> None:
    with torch.device("meta"):
        state = DiTMoE(config).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected_weights(config)


def test_derived_values(pico: Callable[..., Pico]) -> None:
    config = pico(widths=((8, 16, 24), (8, 8)), learn_sigma=False, patch=4, input_size=16).config
    assert (config.num_patches, config.head_dim, config.out_channels) == (16, 16, config.in_channels)
    assert config.num_experts == 3
    document = config.to_json()
    assert document["num_experts"] == [3, 2]
    assert document["expert_width"] == [[8, 16, 24], 8]
    assert document["shared_width"] == 64
    assert pico().config.to_json()["num_experts"] == 4


def test_experts_one_and_ten_are_not_confused(pico: Callable[..., Pico]) -> None:
    widths = tuple(range(10, 22))
    found = infer({i.name: i for i in pico(widths=(widths, widths)).infos()}, given=Given(2))
    assert found.config.blocks[0].expert_widths == widths


# ------------------------------------------------------------------ heads


def test_an_unknown_head_count_is_refused_with_a_way_out(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico().config)
    with pytest.raises(BadInputError, match="heads"):
        infer(weights)
    assert infer(weights, given=Given(num_heads=8)).config.num_heads == 8
    assert infer(weights, hints={"num_heads": 4}).config.num_heads == 4


@pytest.mark.parametrize("heads", [0, -2, 3, 5, 64])
def test_head_counts_that_do_not_divide_the_width(pico: Callable[..., Pico], heads: int) -> None:
    weights = infos_of(pico().config)
    with pytest.raises(BadInputError, match=f"heads {heads} contradicts"):
        infer(weights, given=Given(num_heads=heads))


@pytest.mark.parametrize("hint", [0, -2, -4, 3, "four", 4.5, float("nan"), float("inf"), True, None, [4]])
def test_senseless_hints_of_heads_are_not_taken(pico: Callable[..., Pico], hint: object) -> None:
    with pytest.raises(BadInputError, match="heads"):
        infer(infos_of(pico().config), hints={"num_heads": hint})


@pytest.mark.parametrize(
    "hints",
    [
        {"num_attention_heads": 4},
        {"attention_head_dim": 8},
        {"model": {"params": {"num_heads": 4}}},
        {"numHeads": 4},
        {"num-heads": 4},
        {"num_heads": "4"},
        {"num_heads": 4.0},
    ],
    ids=str,
)
def test_heads_in_the_spelling_of_other_programs(pico: Callable[..., Pico], hints: dict[str, Any]) -> None:
    assert infer(infos_of(pico().config), hints).config.num_heads == 4


def test_unknown_heads_are_left_open_where_that_is_allowed(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico().config)
    found = infer_config(weights, lambda name: memoryview(bytes(weights[name].nbytes)), {}, Given(), "x", True)
    assert found.config.num_heads == 0
    assert found.config.blocks == pico().config.blocks


def test_hints_that_are_no_numbers_are_named(pico: Callable[..., Pico]) -> None:
    found = infer(infos_of(pico().config), {"top_k": "one", "num_classes": 3}, Given(2, sampler="ddpm"))
    assert found.config.top_k == 2
    assert found.warnings == ("the file's hint top_k='one' is ignored: it is no whole number",)


@pytest.mark.parametrize("hints", [{"topK": 1}, {"top-k": "1"}, {"topk": 1.0}, {"moe": {"router_top_k": 1}}], ids=str)
def test_top_k_in_other_spellings(pico: Callable[..., Pico], hints: dict[str, Any]) -> None:
    assert infer(infos_of(pico().config), hints, Given(2)).config.top_k == 1


def test_spellings_that_contradict_each_other_are_named(pico: Callable[..., Pico]) -> None:
    hints = {"top_k": 1, "num_experts_per_tok": 2, "num_classes": 3}
    found = infer(infos_of(pico().config), hints, Given(2, sampler="ddpm"))
    assert found.config.top_k == 1
    assert found.warnings == ("the file says top_k=1 and num_experts_per_tok=2; the first is taken",)


@pytest.mark.parametrize(
    ("hints", "why"),
    [
        ({"num_heads": 3}, "num_heads=3 is ignored: num_heads must divide the width 32"),
        ({"head_dim": 5}, "head_dim=5 is ignored: head_dim must divide the width 32"),
        ({"num_heads": 4, "hidden_size": 64}, "num_heads=4 is ignored: hidden_size=64 is wrong"),
    ],
)
def test_hints_of_heads_that_are_not_taken_are_named(
    pico: Callable[..., Pico], hints: dict[str, Any], why: str
) -> None:
    weights = infos_of(pico().config)
    found = infer_config(weights, lambda name: memoryview(bytes(weights[name].nbytes)), hints, Given(), "x", True)
    assert found.config.num_heads == 0
    assert f"the file's hint {why}" in found.warnings
    with pytest.raises(BadInputError, match="the file's hint "):
        infer(weights, hints)


def test_heads_of_another_width_are_not_taken(pico: Callable[..., Pico]) -> None:
    with pytest.raises(BadInputError, match="heads"):
        infer(infos_of(pico().config), hints={"num_heads": 4, "hidden_size": 64})


def test_flash_layouts_tell_their_heads(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico(attention="flash", heads=4).config)
    assert infer(weights).config.num_heads == 4
    with pytest.raises(BadInputError, match="heads 2 contradicts"):
        infer(weights, given=Given(num_heads=2))
    found = infer(weights, hints={"num_heads": 16})
    assert found.config.num_heads == 4
    assert any("num_heads=16 is ignored" in warning for warning in found.warnings)


@pytest.mark.parametrize("length", [5, 20, 33, 64])
def test_a_head_norm_that_does_not_divide_the_width(pico: Callable[..., Pico], length: int) -> None:
    weights = infos_of(pico(attention="flash").config)
    for name in weights:
        if "_norm" in name:
            weights[name] = TensorInfo(name, "F32", (length,))
    with pytest.raises(BadInputError, match="q_norm"):
        infer(weights)


# ------------------------------------------------------------------ top-k


def test_top_k_is_two_by_assumption(pico: Callable[..., Pico]) -> None:
    found = infer(infos_of(pico().config), given=Given(2))
    assert found.config.top_k == 2
    assert any("top-2" in assumption for assumption in found.assumptions)
    single = infer(infos_of(pico(experts=1, top_k=1).config), given=Given(2))
    assert single.config.top_k == 1


@pytest.mark.parametrize("top_k", [0, -1, 4])
def test_top_k_out_of_bounds(pico: Callable[..., Pico], top_k: int) -> None:
    weights = infos_of(pico(widths=((8,) * 5, (8,) * 3)).config)
    with pytest.raises(BadInputError, match=f"top_k {top_k}"):
        infer(weights, given=Given(2, top_k))
    assert infer(weights, given=Given(2, 3)).config.top_k == 3


def test_top_k_from_the_name_of_an_upstream_model() -> None:
    weights = infos_of(upstream(12, 384, 6, 8, "timm"))
    found = infer(weights, {"model": "DiT-S/2-8E3A"})
    assert found.config.top_k == 3
    assert not any("top-" in assumption for assumption in found.assumptions)


@pytest.mark.parametrize("hint", ["top_k", "num_experts_per_tok", "experts_per_token"])
def test_top_k_from_hints(pico: Callable[..., Pico], hint: str) -> None:
    weights = infos_of(pico().config)
    found = infer(weights, hints={hint: 3}, given=Given(2))
    assert found.config.top_k == 3
    assert not any("top-" in assumption for assumption in found.assumptions)
    contradicted = infer(weights, hints={hint: 9}, given=Given(2))
    assert contradicted.config.top_k == 2
    assert any(f"{hint}=9 is ignored" in warning for warning in contradicted.warnings)


def test_top_k_counts_router_rows_where_experts_were_merged(pico: Callable[..., Pico]) -> None:
    """Rows that share an expert each take a slot, so top-2 of four rows stays top-2 with one expert left."""
    config = pico(widths=((8,), (8, 8)), expert_of=((0, 0, 0, 0), (0, 1, 1, 0))).config
    weights, name = infos_of(config), "blocks.{}.moe.gate.expert_of"
    raw = {name.format(0): struct.pack("<4i", 0, 0, 0, 0), name.format(1): struct.pack("<4i", 0, 1, 1, 0)}
    found = infer(weights, hints=config.to_json(), raw=raw)
    assert found.config == config
    assert found.config.top_k == 2
    assert not found.warnings
    raw[name.format(0)] = struct.pack("<4i", -1, 0, -1, -1)
    with pytest.raises(BadInputError, match="top_k 2"):
        infer(weights, given=Given(2, 2), raw=raw)


# ------------------------------------------------------------------ classes

NO_DROPOUT = [{"class_dropout_prob": 0.0}, {"class_dropout_prob": 0}, {"num_classes": 4}, {"model": {"class_num": 4}}]


@pytest.mark.parametrize("hints", NO_DROPOUT, ids=str)
def test_a_table_without_a_null_row_is_told_by_hints(pico: Callable[..., Pico], hints: dict[str, Any]) -> None:
    """Upstream's table has num_classes rows where class_dropout_prob is 0, and one more otherwise."""
    found = infer(infos_of(pico().config), hints, Given(2, 2, "ddpm"))  # four rows
    assert (found.config.num_classes, found.config.null_class) == (4, False)
    assert found.assumptions == found.warnings == ()
    assert found.config.to_json()["null_class"] is False


@pytest.mark.parametrize("hints", [{"class_dropout_prob": 0.1}, {"num_classes": 3}, {"label_dropout": 0.5}], ids=str)
def test_a_table_with_a_null_row_is_told_by_hints(pico: Callable[..., Pico], hints: dict[str, Any]) -> None:
    found = infer(infos_of(pico().config), hints, Given(2, 2, "ddpm"))
    assert found == Inferred(pico().config)
    assert "null_class" not in found.config.to_json()


def test_the_null_row_is_an_assumption_where_nothing_tells(pico: Callable[..., Pico]) -> None:
    found = infer(infos_of(pico().config), given=Given(2, 2, "ddpm"))
    assert found.config == pico().config
    assert [a for a in found.assumptions if "3 classes and a null class" in a and "4 rows" in a]


@pytest.mark.parametrize(("rows", "classes", "assumed"), [(1001, 1000, False), (1000, 1000, True), (1, 1, False)])
def test_tables_of_usual_lengths(pico: Callable[..., Pico], rows: int, classes: int, assumed: bool) -> None:
    found = infer(infos_of(pico(num_classes=rows, null_class=False).config), given=Given(2, 2, "ddpm"))
    assert (found.config.num_classes, found.config.null_class) == (classes, rows > classes)
    assert any("label table" in a for a in found.assumptions) == assumed


def test_given_classes_overrule_hints(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico().config)
    assert infer(weights, {"num_classes": 3}, Given(2, num_classes=4)).config.null_class is False
    assert infer(weights, {"num_classes": 4}, Given(2, num_classes=3)).config.null_class is True
    for wrong in (0, 2, 5):
        with pytest.raises(BadInputError, match=f"num_classes {wrong} contradicts the label table of 4 rows"):
            infer(weights, given=Given(2, num_classes=wrong))


def test_hints_of_classes_that_contradict_each_other_are_named(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico().config)
    full = infer(weights, {"num_classes": 4, "class_dropout_prob": 0.1}, Given(2))
    assert full.config.null_class is False
    assert any("class_dropout_prob=0.1 is ignored" in warning for warning in full.warnings)
    untrained = infer(weights, {"num_classes": 3, "class_dropout_prob": 0.0}, Given(2))
    assert untrained.config.null_class is True
    assert any("null class was not trained" in warning for warning in untrained.warnings)


# ------------------------------------------------------------------ sampler family


def final_layer(pico: Pico) -> dict[str, bytes]:
    names = [name for name in pico.state if name.startswith("final_layer.linear")]
    return {name: bytes(tensor_bytes(pico.state[name])) for name in names}


@pytest.mark.parametrize("family", ["rf", "ddpm"])
@pytest.mark.parametrize(("channels", "patch"), [(4, 2), (1, 2), (3, 4)])
def test_the_family_is_told_by_the_sigma_rows(
    pico: Callable[..., Pico], family: str, channels: int, patch: int
) -> None:
    model = pico(sampler=family, in_channels=channels, patch=patch)
    found = infer({i.name: i for i in model.infos()}, given=Given(2, 2), raw=final_layer(model))
    assert found.config == model.config
    assert any(f"sampler {family}" in assumption for assumption in found.assumptions)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("row", [4, 15, 31])
def test_one_trained_sigma_row_is_enough(pico: Callable[..., Pico], name: str, row: int) -> None:
    model = pico(sampler="rf")
    model.state[f"final_layer.linear.{name}"][row] = 1e-30
    found = infer({i.name: i for i in model.infos()}, given=Given(2), raw=final_layer(model))
    assert found.config.sampler == "ddpm"


def test_what_is_given_or_written_down_overrules_the_detector(pico: Callable[..., Pico]) -> None:
    model = pico(sampler="ddpm")
    weights, raw = {i.name: i for i in model.infos()}, final_layer(model)
    assert infer(weights, given=Given(2, sampler="rf"), raw=raw).config.sampler == "rf"
    assert infer(weights, hints={"sampler": "rf"}, given=Given(2), raw=raw).config.sampler == "rf"
    assert infer(weights, hints={"rf": True}, given=Given(2), raw=raw).config.sampler == "rf"
    both = infer(weights, hints={"sampler": "rf"}, given=Given(2, sampler="ddpm"), raw=raw)
    assert both.config.sampler == "ddpm"
    assert infer(weights, hints={"sampler": ["rf"]}, given=Given(2), raw=raw).config.sampler == "ddpm"


@pytest.mark.parametrize(("family", "flag"), [("rf", False), ("ddpm", True), ("rf", True), ("ddpm", "False")])
def test_a_flag_that_the_sigma_rows_contradict_is_named(pico: Callable[..., Pico], family: str, flag: object) -> None:
    """Upstream's --rf is of type bool, so that ``--rf False`` is stored as True."""
    model = pico(sampler=family)
    found = infer({i.name: i for i in model.infos()}, {"rf": flag, "num_classes": 3}, Given(2, 2), final_layer(model))
    said = "rf" if flag is True else "ddpm"
    assert found.config.sampler == said
    assert any(f"rf={flag}" in warning for warning in found.warnings) == (said != family)


def test_a_quantised_final_layer_is_told_by_its_bias(pico: Callable[..., Pico]) -> None:
    for family in ("rf", "ddpm"):
        model = pico(sampler=family)
        raw = {**final_layer(model), "final_layer.linear.weight": b""}
        assert infer({i.name: i for i in model.infos()}, given=Given(2), raw=raw).config.sampler == family


def test_without_sigma_the_family_is_an_assumption(pico: Callable[..., Pico]) -> None:
    found = infer(infos_of(pico(learn_sigma=False).config), given=Given(2))
    assert found.config.sampler == "rf"
    assert any("sampler" in assumption for assumption in found.assumptions)


# ------------------------------------------------------------------ hints that contradict the shapes

CONTRADICTIONS = {
    "input_size": 64,
    "patch_size": 4,
    "in_channels": 3,
    "hidden_size": 384,
    "depth": 28,
    "num_classes": 1000,
    "num_experts": 16,
    "model": "DiT-XL/2",
    "image_size": 512,
}


@pytest.mark.parametrize("hint", CONTRADICTIONS)
def test_contradicting_hints_warn_and_are_ignored(pico: Callable[..., Pico], hint: str) -> None:
    config, value = pico().config, CONTRADICTIONS[hint]
    found = infer(infos_of(config), hints={hint: value}, given=Given(2, 2, "ddpm", 3))
    assert found.config == config
    assert len(found.warnings) == 1
    assert f"{hint}={value} is ignored" in found.warnings[0]


def test_hints_that_agree_say_nothing(pico: Callable[..., Pico]) -> None:
    config = pico().config
    hints = {"image_size": 64, "model": "DiT-Tiny/2", "num_classes": 3, "num_experts": 4, "depth": 2}
    assert infer(infos_of(config), hints=hints, given=Given(2, 2, "ddpm")) == Inferred(config)


@given(
    hints=st.dictionaries(
        st.sampled_from([*CONTRADICTIONS, "num_heads", "top_k", "num_experts_per_tok", "sampler", "rf"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()),
    ),
    embedded=st.booleans(),
)
def test_no_hint_breaks_the_loader(pico: Callable[..., Pico], hints: dict[str, Any], embedded: bool) -> None:
    weights = infos_of(pico(attention="flash").config)
    if not embedded:
        del weights["pos_embed"]
    found = infer(weights, hints=hints)
    assert found.config.hidden_size == 32
    assert 1 <= found.config.top_k <= 4
    assert found.config.input_size % 2 == 0
    assert found.config.input_size > 0


# ------------------------------------------------------------------ the size of the image


def test_image_size_without_a_position_embedding(pico: Callable[..., Pico]) -> None:
    weights = infos_of(pico().config)
    del weights["pos_embed"]
    assumed = infer(weights, given=Given(2))
    assert assumed.config.input_size == 32
    assert any("pos_embed" in assumption for assumption in assumed.assumptions)
    assert infer(weights, hints={"image_size": 512}, given=Given(2)).config.input_size == 64
    assert infer(weights, hints={"input_size": 8}, given=Given(2)).config.input_size == 8


@pytest.mark.parametrize("shape", [(1, 15, 32), (2, 16, 32), (1, 16, 30), (16, 32), (1, 0, 32)])
def test_a_position_embedding_of_odd_shape(pico: Callable[..., Pico], shape: tuple[int, ...]) -> None:
    weights = {**infos_of(pico().config), "pos_embed": TensorInfo("pos_embed", "F32", shape)}
    with pytest.raises(BadInputError, match="'pos_embed'"):
        infer(weights, given=Given(2))


# ------------------------------------------------------------------ what is no whole DiT-MoE


def test_a_dense_dit_is_refused_as_such(pico: Callable[..., Pico]) -> None:
    names = [name for name in expected_weights(pico().config) if ".moe." not in name]
    names += [f"blocks.{i}.mlp.fc{j}.weight" for i in (0, 1) for j in (1, 2)]
    with pytest.raises(BadInputError, match="dense MLPs"):
        infer({name: TensorInfo(name, "F32", (2, 2)) for name in names})


def test_other_models_are_refused_as_such() -> None:
    with pytest.raises(BadInputError, match=r"not a DiT-MoE.*conv_in\.weight"):
        infer({"conv_in.weight": TensorInfo("conv_in.weight", "F32", (4, 4))})


NAMES = [name for name in expected_weights(upstream(2, 384, 6, 3, "timm")) if name != "pos_embed"]
FLASH_NAMES = [name for name in expected_weights(upstream(2, 384, 6, 3, "flash")) if "attn" in name]


def test_each_missing_tensor_is_named() -> None:
    whole = infos_of(upstream(2, 384, 6, 3, "timm"))
    for name in NAMES:
        with pytest.raises(BadInputError) as caught:
            infer({other: info for other, info in whole.items() if other != name}, given=Given(6))
        if ".experts.2." in name or name.endswith("gate.weight"):
            assert "blocks." in str(caught.value), name  # one router row too many, or one expert too few
        else:
            assert f"{name!r} is missing" in str(caught.value)
        assert "the-file.pt" in str(caught.value), name


def test_each_missing_tensor_of_flash_attention_is_named() -> None:
    whole = infos_of(upstream(2, 384, 6, 3, "flash"))
    for name in FLASH_NAMES:
        with pytest.raises(BadInputError, match="is missing"):
            infer({other: info for other, info in whole.items() if other != name}, given=Given(6))


@pytest.mark.parametrize("shape", [(), (7,), (7, 7), (0, 384), (7, 7, 7, 7)], ids=str)
def test_each_odd_shape_is_refused_in_one_way(shape: tuple[int, ...]) -> None:
    whole = infos_of(upstream(2, 384, 6, 3, "timm"))
    for name in NAMES:
        with pytest.raises(BadInputError, match=r"the-file\.pt: tensor '"):
            infer({**whole, name: TensorInfo(name, "F32", shape)}, given=Given(6))


@pytest.mark.parametrize("dtype", ["I32", "U8", "BOOL", "F8_E4M3"])
def test_each_odd_dtype_is_named(dtype: str) -> None:
    whole = infos_of(upstream(2, 384, 6, 3, "timm"))
    for name in NAMES:
        with pytest.raises(BadInputError, match=rf"'{name}' has dtype {dtype}"):
            infer({**whole, name: TensorInfo(name, dtype, whole[name].shape)}, given=Given(6))


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "blocks.0.moe.experts.x.up_proj.weight",
        "blocks.0.moe.experts.1.up_proj.bias",
        "blocks.0.attn.q_norm.weight",
        "blocks.0.moe.konstants",
    ],
)
def test_tensors_without_a_place_are_named(name: str) -> None:
    weights = {**infos_of(upstream(2, 384, 6, 3, "timm")), name: TensorInfo(name, "F32", (64,))}
    with pytest.raises(BadInputError, match=rf"'{name}' has no place"):
        infer(weights, given=Given(6))


def test_a_hole_between_blocks_is_named() -> None:
    weights = infos_of(upstream(3, 384, 6, 3, "timm"))
    rest = {name: info for name, info in weights.items() if not name.startswith("blocks.1.")}
    with pytest.raises(BadInputError, match=r"'blocks\.1\.moe\.gate\.weight' is missing"):
        infer(rest, given=Given(6))


def test_mixed_attention_layouts_are_refused() -> None:
    weights = infos_of(upstream(2, 384, 6, 3, "timm"))
    for old, new in (("qkv", "Wqkv"), ("proj", "out_proj")):
        for leaf in ("weight", "bias"):
            info = weights.pop(f"blocks.1.attn.{old}.{leaf}")
            weights[f"blocks.1.attn.{new}.{leaf}"] = info
    with pytest.raises(BadInputError, match=r"blocks\.1\.attn"):
        infer(weights, given=Given(6))


def test_more_router_rows_than_experts_need_a_map() -> None:
    weights = infos_of(upstream(2, 384, 6, 3, "timm"))
    name = "blocks.1.moe.gate.weight"
    weights[name] = TensorInfo(name, "F32", (5, 384))
    with pytest.raises(BadInputError, match="has 5 rows, but the block holds 3 experts"):
        infer(weights, given=Given(6))


def test_a_block_without_experts_is_refused(pico: Callable[..., Pico]) -> None:
    config = pico(widths=((8, 8), (8, 8)), expert_of=((-1, -1), (0, 1))).config
    weights = {n: i for n, i in infos_of(config).items() if not n.startswith("blocks.0.moe.experts.")}
    raw = {"blocks.0.moe.gate.expert_of": struct.pack("<2i", -1, -1)}
    with pytest.raises(BadInputError, match="block"):
        infer(weights, given=Given(2), raw=raw)
