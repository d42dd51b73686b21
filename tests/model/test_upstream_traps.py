"""The traps of upstream's checkpoints, one test each, on files made here; more of each stands where it is handled.

Upstream is feizc/DiT-MoE: train.py (DDP), train_deepspeed.py, upcycle.py, sample.py and download.py.

==  ==========================================  ======================================================================
1   containers, averaged weights first          files/test_pickles.py, files/test_containers.py, here
2   args is an argparse.Namespace               files/test_pickles.py, here
3   prefixes of names                           files/test_names.py, files/test_reader.py, here
4   two attention layouts, one with norms       model/test_parity.py, model/test_config.py, here
5   heads                                       model/test_config.py, here
6   top-k is not stored, experts are counted    model/test_config.py, here
7   weights of the top-k are not renormalised   model/test_router.py, here
8   names that begin or end alike               files/test_names.py, here
9   two shared experts are one module           model/test_parameters.py, here
10  the sampler family is not recorded          model/test_config.py, here
11  rectified flow weights in a DDPM sampler    diffusion/test_schedule.py, here
12  dtypes                                      model/test_loading.py, cli/test_cli_convert.py, here
13  mixed dtypes and shared storage             here
14  512 pixels, and no position embedding       model/test_loading.py, here
15  defaults and flags of the scripts           model/test_config.py, here
16  null class, scale of the VAE                model/test_config.py, diffusion/test_vae.py, here
17  optimizers, steps and their arguments       files/test_pickles.py, here
==  ==========================================  ======================================================================
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import here
from configs import infos_of, upstream
from conftest import Pico, make_pico
from reading import assert_holds
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ditmoe_cli import open_checkpoint
from ditmoe_cli.diffusion.schedule import choose_solver, evaluation_times
from ditmoe_cli.diffusion.vae import UPSTREAM_SCALE
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.attention import Attention
from ditmoe_cli.model.config import Given, expected_weights, infer_config
from ditmoe_cli.model.embedders import sincos_position_embedding
from ditmoe_cli.model.moe import MoEEvent
from ditmoe_cli.model.parameters import count_parameters


def no_bytes(_: str) -> memoryview:
    return memoryview(b"")


def shifted(model: Pico) -> dict[str, Tensor]:
    """Other weights than the model's, under the same names."""
    return {name: value + 1 for name, value in model.state.items()}


# ------------------------------------------------------------------ 1: containers


def trained(model: Pico) -> Any:
    return {"model": shifted(model), "ema": dict(model.state), "opt": {"state": {}}, "args": argparse.Namespace()}


def deepspeed(model: Pico) -> Any:
    return {"model": dict(model.state), "opt": {"state": {}}, "args": argparse.Namespace(rf=True)}


CONTAINERS: dict[str, Callable[[Pico], Any]] = {
    "train.py": trained,
    "cleaned S and B": lambda model: {"ema": dict(model.state)},
    "train_deepspeed.py, first version": deepspeed,
    "zero_to_fp32 and upcycle.py": lambda model: dict(model.state),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_trap_1_containers(tmp_path: Path, container: str) -> None:
    model = make_pico()
    torch.save(CONTAINERS[container](model), tmp_path / "x.pt")
    assert_holds(tmp_path / "x.pt", model)


def test_trap_1_deepspeed_folders_of_stages_1_and_3(tmp_path: Path) -> None:
    model = make_pico()
    model.save_pt(tmp_path / "run", "deepspeed")
    assert_holds(tmp_path / "run", model)
    placeholders = {name: torch.empty(0) for name in model.state}
    states = tmp_path / "run" / "global_step7" / "mp_rank_00_model_states.pt"
    torch.save({"module": placeholders, "param_shapes": [{n: t.shape for n, t in model.state.items()}]}, states)
    with pytest.raises(BadInputError, match=r"put them together first with python .*zero_to_fp32"):
        open_checkpoint(tmp_path / "run")


# ------------------------------------------------------------------ 2, 3: arguments and prefixes


def test_trap_2_arguments_are_a_namespace_which_torch_refuses(tmp_path: Path) -> None:
    model = make_pico()
    model.save_pt(tmp_path / "x.pt", "train", num_heads=2, num_experts_per_tok=1)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "x.pt", weights_only=True)
    config = open_checkpoint(tmp_path / "x.pt").config
    assert (config.num_heads, config.top_k) == (2, 1)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_trap_3_prefixes(tmp_path: Path, prefix: str, ending: str) -> None:
    model = make_pico()
    state = {prefix + name: value for name, value in model.state.items()}
    if ending == "pt":
        torch.save(state, tmp_path / "x.pt")
    else:
        save_file(state, tmp_path / "x.safetensors")
    assert_holds(tmp_path / f"x.{ending}", model)


# ------------------------------------------------------------------ 4, 5: attention and heads


def test_trap_4_layouts_pack_alike_and_flash_normalises_queries_and_keys() -> None:
    timm, flash = (make_pico(attention=layout).config for layout in ("timm", "flash"))
    plain, normed = Attention(timm), Attention(flash)
    normed.Wqkv.load_state_dict(plain.qkv.state_dict())
    normed.out_proj.load_state_dict(plain.proj.state_dict())
    x = torch.randn(2, 5, 32)
    q, k, v = plain.qkv(x).reshape(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    assert not torch.allclose(plain(x), normed(x), atol=1e-3)
    q, k = (F.layer_norm(each, (16,), eps=1e-6) for each in (q, k))
    expected = plain.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 32))
    torch.testing.assert_close(normed(x), expected)


def test_trap_4_a_flash_layout_without_its_norms_is_no_timm_layout(tmp_path: Path) -> None:
    model = make_pico(attention="flash")
    model.save(tmp_path / "x.safetensors")
    assert open_checkpoint(tmp_path / "x.safetensors").config.attention == "flash"
    bare = {name: value for name, value in model.state.items() if "_norm" not in name}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(BadInputError, match="q_norm"):
        open_checkpoint(tmp_path / "bare.safetensors", num_heads=2)


@pytest.mark.parametrize("attention", ["timm", "flash"])
@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16), (1408, 16)])
def test_trap_5_heads_of_upstreams_widths(attention: str, width: int, heads: int) -> None:
    config = upstream(2, width, heads, 2, attention)
    assert infer_config(infos_of(config), no_bytes, {}, Given(), "x").config.num_heads == heads
    assert config.head_dim == (88 if width == 1408 else 72 if width == 1152 else 64)


def test_trap_5_heads_of_other_widths_are_asked_for(tmp_path: Path) -> None:
    make_pico().save_pt(tmp_path / "x.pt")
    with pytest.raises(BadInputError, match="number of attention heads cannot be told"):
        open_checkpoint(tmp_path / "x.pt")


# ------------------------------------------------------------------ 6, 7: routing


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (8, 2), (16, 2)])
def test_trap_6_top_k_is_assumed_and_experts_are_the_routers_rows(tmp_path: Path, experts: int, top_k: int) -> None:
    make_pico(experts=experts, top_k=1, attention="flash").save_pt(tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.config.num_experts, checkpoint.config.top_k) == (experts, top_k)
    assert any(f"top-{top_k} routing: the file does not tell" in text for text in checkpoint.assumptions)


def test_trap_7_weights_are_not_renormalised_and_slicing_changes_their_sum() -> None:
    model = make_pico()
    sliced = make_pico(experts=3)
    name = "blocks.0.moe.gate.weight"
    sliced.state[name].copy_(model.state[name][:3])
    u = torch.randn(50, 32)
    whole, fewer = (each.model().blocks[0].moe.gate(u) for each in (model, sliced))
    expected = (u @ model.state[name].T).softmax(-1).topk(2).values
    torch.testing.assert_close(whole.weights, expected)
    assert (whole.weights.sum(-1) < 1).all()
    both = (whole.rows < 3).all(-1)
    assert both.any()
    assert (fewer.weights.sum(-1) > whole.weights.sum(-1))[both].all()


# ------------------------------------------------------------------ 8, 9: experts


def test_trap_8_expert_1_is_not_expert_10_nor_a_shared_one(tmp_path: Path) -> None:
    model = make_pico(experts=12, hidden=16)
    model.save(tmp_path / "x.safetensors")
    words = ("prune", "x.safetensors", "--keep", "11", "--router", "slice", "--no-refit", "--method", "random")
    outcome = here(*words, "--seed", "3", "-o", "y.safetensors", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    found = load_file(tmp_path / "y.safetensors")
    for block in range(2):
        rows = model.state[f"blocks.{block}.moe.gate.weight"]
        router = found[f"blocks.{block}.moe.gate.weight"]
        kept = [next(e for e in range(12) if torch.equal(rows[e], row)) for row in router]
        assert kept == sorted(kept)
        for new, old in enumerate(kept):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                stem = f"blocks.{block}.moe.experts"
                assert torch.equal(found[f"{stem}.{new}.{matrix}.weight"], model.state[f"{stem}.{old}.{matrix}.weight"])
        shared = f"blocks.{block}.moe.shared_experts.up_proj.weight"
        assert torch.equal(found[shared], model.state[shared])


def test_trap_9_the_shared_expert_is_one_module_and_none_of_the_experts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_pico(experts=4).save(tmp_path / "x.safetensors"))
    counts = count_parameters(checkpoint)
    assert checkpoint.config.num_experts == 4
    assert counts.routed == 2 * 4 * 3 * 32 * 64
    assert counts.activated == counts.total - 2 * 2 * 3 * 32 * 64
    refused = here("prune", "x.safetensors", "--keep", "5", "--no-refit", "--method", "random", cwd=tmp_path)
    assert "4 experts" in refused.error(refused.code)


def test_trap_9_table_1_of_the_paper_is_reproduced() -> None:
    """XL/2-8E2A in the flash layout, at 256 pixels: 4,168,172,192 weights with the position embedding."""
    shapes = expected_weights(upstream(28, 1152, 16, 8, "flash"))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 4_168_172_192


# ------------------------------------------------------------------ 10, 11: sampler families


@pytest.mark.parametrize("family", ["rf", "ddpm"])
def test_trap_10_the_family_is_told_by_rows_that_flow_training_leaves_at_zero(tmp_path: Path, family: str) -> None:
    model = make_pico(sampler=family)
    rows = model.state["final_layer.linear.weight"].abs().sum(1)
    assert bool((rows[torch.arange(32) % 8 >= 4] == 0).all()) == (family == "rf")
    model.save_pt(tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt", num_heads=2)
    assert checkpoint.config.sampler == family
    assert any(f"sampler {family}: the sigma rows" in text for text in checkpoint.assumptions)


def test_trap_10_an_untrained_final_layer_tells_nothing(tmp_path: Path) -> None:
    model = make_pico()
    for part in ("weight", "bias"):
        model.state[f"final_layer.linear.{part}"].zero_()
    model.save_pt(tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt", num_heads=2)
    assert any("as before training, and tells nothing" in text for text in checkpoint.assumptions)
    assert open_checkpoint(tmp_path / "x.pt", num_heads=2, sampler="ddpm").config.sampler == "ddpm"


def test_trap_11_flow_weights_are_asked_at_times_in_0_1_and_never_by_a_ddpm_solver() -> None:
    for solver in ("ddim", "ddpm"):
        with pytest.raises(UsageError, match="is not for rf weights"):
            choose_solver(solver, "rf")
    times = list(evaluation_times("euler", 50))
    assert len(times) == 50
    assert times[0] == 1
    assert all(0 < time <= 1 for time in times)


# ------------------------------------------------------------------ 12, 13: dtypes and storage


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["timm", "flash"])
def test_trap_12_every_dtype_is_kept(tmp_path: Path, dtype: torch.dtype, attention: str) -> None:
    model = make_pico(dtype=dtype, attention=attention)
    model.save_pt(tmp_path / "x.pt", "ema")
    assert here("convert", "x.pt", "--heads", "2", "-o", "y.safetensors", cwd=tmp_path).code == 0
    assert_holds(tmp_path / "y.safetensors", model)


def test_trap_13_views_on_one_flat_buffer_are_written_one_by_one(tmp_path: Path) -> None:
    """zero_to_fp32 leaves fp32 views on one buffer, beside a frozen pos_embed in fp16; XL was published so."""
    model = make_pico()
    trainable = {name: value for name, value in model.state.items() if name != "pos_embed"}
    flat = torch.cat([value.flatten() for value in trainable.values()])
    views = dict(zip(trainable, flat.split([value.numel() for value in trainable.values()]), strict=True))
    state = {name: views[name].view(value.shape) for name, value in trainable.items()}
    state["pos_embed"] = model.state["pos_embed"].half()
    torch.save(state, tmp_path / "x.pt")
    expected = model.with_state(pos_embed=state["pos_embed"])
    assert_holds(tmp_path / "x.pt", expected)
    for words in (
        ("-o", "y.safetensors"),
        ("-o", "shards", "--max-shard-size", "100KB"),
        ("--to", "upstream", "-o", "y.pt"),
    ):
        outcome = here("export" if "--to" in words else "convert", "x.pt", "--heads", "2", *words, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert_holds(tmp_path / words[words.index("-o") + 1], expected)
    tensors = sum(value.nbytes for value in state.values())
    assert tensors < (tmp_path / "y.pt").stat().st_size < 1.2 * tensors


def test_trap_13_tensors_that_share_all_their_values_are_written_twice(tmp_path: Path) -> None:
    """Upcycled experts may still be one storage."""
    model = make_pico(experts=4)
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        for expert in range(4):
            name = f"blocks.0.moe.experts.{{}}.{matrix}.weight"
            model.state[name.format(expert)] = model.state[name.format(0)]
    torch.save(dict(model.state), tmp_path / "x.pt")
    for words in (("convert", "-o", "y.safetensors"), ("export", "--to", "upstream", "-o", "y.pt")):
        assert here(words[0], "x.pt", "--heads", "2", *words[1:], cwd=tmp_path).code == 0
        assert_holds(tmp_path / words[-1], model)


# ------------------------------------------------------------------ 14, 15, 16: sizes, flags, labels


def test_trap_14_512_pixels_and_an_absent_position_embedding(tmp_path: Path) -> None:
    model = make_pico(input_size=64, hidden=16, heads=2)
    assert model.state["pos_embed"].shape == (1, 1024, 16)
    model.save_pt(tmp_path / "x.pt", num_heads=2)
    assert open_checkpoint(tmp_path / "x.pt", num_heads=2).config.input_size == 64
    model.with_state(pos_embed=None).save_pt(tmp_path / "y.pt", "train", num_heads=2, image_size=512)
    assert open_checkpoint(tmp_path / "y.pt").config == open_checkpoint(tmp_path / "x.pt", num_heads=2).config
    assert here("export", "y.pt", "--to", "upstream", "-o", "z.pt", cwd=tmp_path).code == 0
    assert torch.equal(torch.load(tmp_path / "z.pt")["ema"]["pos_embed"], sincos_position_embedding(16, 32))


def test_trap_15_defaults_of_the_scripts_do_not_outvote_the_weights(tmp_path: Path) -> None:
    """sample.py's default is 16 experts, and ``--rf`` is of type bool, so that ``--rf False`` is True."""
    model = make_pico(experts=8, sampler="ddpm")
    model.save_pt(tmp_path / "x.pt", "train", num_experts=16, num_experts_per_tok=2, num_heads=2, rf=True)
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.config.num_experts == 8
    assert any("num_experts=16 is ignored: it is 8" in text for text in checkpoint.warnings)
    assert any(
        "rf=True, but the sigma rows of the final layer are not all zero" in text for text in checkpoint.warnings
    )


def test_trap_16_the_last_of_1001_labels_is_the_null_class_and_latents_are_scaled(tmp_path: Path) -> None:
    model = make_pico(num_classes=1000)
    model.save_pt(tmp_path / "x.pt")
    config = open_checkpoint(tmp_path / "x.pt", num_heads=2).config
    assert (config.num_classes, config.null_class, config.label_rows) == (1000, True, 1001)
    assert UPSTREAM_SCALE == 0.18215


def test_trap_16_the_mixture_is_observed_without_gradients() -> None:
    """Upstream's inference drops gradients, so that saliencies rest on what a forward pass shows."""
    model, seen = make_pico().model(), list[MoEEvent]()
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3]), seen.append)
    assert [event.block for event in seen] == [0, 1]
    assert all(event.routing.weights.shape == (2 * 16, 2) for event in seen)


# ------------------------------------------------------------------ 17: training


def test_trap_17_nothing_of_the_optimizer_or_its_steps_is_read(tmp_path: Path) -> None:
    """train.py with ``--accum_iter`` above 1 steps wrongly; that is in the weights, and no argument mends it."""
    model = make_pico()
    moments = {i: {"step": torch.tensor(9.0), "exp_avg": value + 1} for i, value in enumerate(model.state.values())}
    document = trained(model) | {"opt": {"state": moments, "param_groups": [{"lr": 1e-4}]}}
    for accumulated in (1, 4):
        document["args"] = argparse.Namespace(accum_iter=accumulated, num_heads=2)
        torch.save(document, tmp_path / f"{accumulated}.pt")
        outcome = here("convert", f"{accumulated}.pt", "-o", f"{accumulated}.safetensors", cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert "warning" not in outcome.err
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()
    assert_holds(tmp_path / "4.safetensors", model)
