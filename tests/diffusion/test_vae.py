"""Decoding latents: what diffusers itself makes of them, and what is refused before it gets that far."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import COMMIT, FakeHub, Faults, point_client, serving, stay_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditmoe_cli.diffusion.vae import CONFIG_NAME, WEIGHTS_NAME, Decoder, check_fits, open_vae
from ditmoe_cli.errors import BadInputError, BrokenImageError

Vae = Callable[..., Path]


def build(**changes: Any) -> Any:
    """A random AutoencoderKL of 8 pixels per latent, as small as its norms allow."""
    diffusers = pytest.importorskip("diffusers")
    settings: dict[str, Any] = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "sample_size": 256,
    }
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**{**settings, **changes}).eval()
    with torch.no_grad():
        for parameter in vae.parameters():  # fresh norms and biases would hide that they are not read
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


@pytest.fixture
def saved(tmp_path: Path) -> Vae:
    """Write a VAE in diffusers' layout; return its folder."""

    def save(name: str = "vae-small", **changes: Any) -> Path:
        build(**changes).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def latents(count: int = 2, side: int = 4, channels: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def diffusers_own(folder: Path, z: Tensor) -> Tensor:
    """What a pipeline of diffusers computes from final latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        decoded: Tensor = vae.decode(z / vae.config.scaling_factor).sample
    return decoded


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_NAME
    document = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS_NAME).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def refusal(where: str | Path) -> str:
    with pytest.raises(BadInputError) as caught:
        open_vae(str(where))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("scale", [0.18215, 0.5])
def test_pixels_are_those_of_diffusers(saved: Vae, scale: float) -> None:
    folder, z = saved(scaling_factor=scale), latents()
    decoder = open_vae(str(folder))
    pixels = decoder.decode(z)
    assert torch.equal(pixels, diffusers_own(folder, z))
    assert (pixels.shape, pixels.dtype) == ((2, 3, 32, 32), torch.float32)
    assert (decoder.scale, decoder.shift, decoder.channels, decoder.upsampling) == (scale, 0.0, 4, 8)
    assert decoder.name == "vae-small"
    assert not pixels.requires_grad


def test_the_scale_divides(saved: Vae) -> None:
    z = latents()
    one, half = (open_vae(str(saved(f"vae-{s}", scaling_factor=s))) for s in (1.0, 0.5))
    assert torch.equal(half.decode(z), one.decode(2 * z))
    assert not torch.allclose(half.decode(z), one.decode(z), atol=1e-3)


def test_the_scale_is_upstreams_where_the_config_is_silent(saved: Vae) -> None:
    folder = saved(scaling_factor=0.18215)
    told = open_vae(str(folder)).decode(latents())
    change_config(folder, scaling_factor=...)
    assert open_vae(str(folder)).scale == 0.18215
    assert torch.equal(open_vae(str(folder)).decode(latents()), told)


def test_a_shift_is_added_after_the_scale(saved: Vae) -> None:
    plain, shifted = open_vae(str(saved("a"))), open_vae(str(saved("b", shift_factor=0.25)))
    assert shifted.shift == 0.25
    z = latents()
    assert torch.allclose(shifted.decode(z), plain.decode(z + 0.25 * plain.scale), atol=1e-5)
    assert not torch.allclose(shifted.decode(z), plain.decode(z), atol=1e-3)


@pytest.mark.parametrize(("blocks", "upsampling"), [(1, 1), (2, 2), (4, 8)])
def test_upsampling_follows_from_the_blocks(saved: Vae, blocks: int, upsampling: int) -> None:
    decoder = open_vae(
        str(
            saved(
                block_out_channels=(4,) * blocks,
                down_block_types=("DownEncoderBlock2D",) * blocks,
                up_block_types=("UpDecoderBlock2D",) * blocks,
            )
        )
    )
    assert decoder.upsampling == upsampling
    assert decoder.decode(latents(1)).shape == (1, 3, 4 * upsampling, 4 * upsampling)


def test_an_image_does_not_depend_on_its_batch(saved: Vae) -> None:
    decoder, z = open_vae(str(saved())), latents(5)
    alone = torch.cat([decoder.decode(z[i : i + 1]) for i in range(5)])
    assert torch.allclose(decoder.decode(z), alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_comes_out_in_fp32(saved: Vae, dtype: torch.dtype) -> None:
    folder = str(saved())
    whole, half = open_vae(folder), open_vae(folder, "cpu", dtype)
    assert half.module.dtype == dtype
    pixels = half.decode(latents())
    assert pixels.dtype == torch.float32
    spread = whole.decode(latents()).std()
    assert 0 < (pixels - whole.decode(latents())).abs().mean() < 0.05 * spread
    assert half.digest == whole.digest, "which tells the VAE, not how it is run"


# ------------------------------------------------------------------ tiles


def untiled(decoder: Decoder) -> Decoder:
    return replace(decoder, tiled_from=10**9)


def test_large_images_are_decoded_in_tiles_that_agree_with_the_whole(saved: Vae) -> None:
    # without attention and norms over few pixels, what a tile lacks is only its surroundings
    decoder, z = open_vae(str(saved(mid_block_add_attention=False))), latents(1, side=64)
    assert (decoder.tile * decoder.upsampling, decoder.tiled_from) == (256, 512)
    tiled, whole = decoder.decode(z), untiled(decoder).decode(z)
    assert tiled.shape == whole.shape == (1, 3, 512, 512)
    assert not torch.equal(tiled, whole), "else nothing was tiled"
    inner = (slice(None), slice(None), slice(8, 120), slice(8, 120))  # the first tile, away from its seams
    spread = whole.std()
    assert (tiled - whole)[inner].abs().mean() < 0.1 * spread
    assert (tiled - whole).abs().mean() < 0.2 * spread


def test_the_first_tile_is_the_decoded_corner(saved: Vae) -> None:
    decoder, z = open_vae(str(saved())), latents(1, side=64)
    corner = decoder.decode(z[:, :, :32, :32])
    assert torch.allclose(decoder.decode(z)[:, :, :192, :192], corner[:, :, :192, :192], atol=1e-5)


def test_smaller_images_are_whole(saved: Vae) -> None:
    decoder, z = open_vae(str(saved())), latents(1, side=56)
    decoder.decode(latents(1, side=64))  # tiles of one image are none of the next
    assert torch.equal(decoder.decode(z), untiled(decoder).decode(z))


@pytest.mark.parametrize(
    ("size", "tile"), [(32, 256), (256, 256), (300, 288), (512, 512), ([512, 512], 512), ([64, 1024], 1024)]
)
def test_a_tile_is_what_the_vae_was_trained_on(saved: Vae, size: Any, tile: int) -> None:
    folder = saved()
    change_config(folder, sample_size=size)
    decoder = open_vae(str(folder))
    assert decoder.tile * decoder.upsampling == tile
    assert decoder.module.tile_sample_min_size == decoder.upsampling * decoder.module.tile_latent_min_size


def test_an_image_of_one_tile_is_whole(saved: Vae) -> None:
    decoder, z = open_vae(str(saved(sample_size=512))), latents(1, side=64)
    assert torch.equal(decoder.decode(z), untiled(decoder).decode(z))


# ------------------------------------------------------------------ where it is


def test_a_pipeline_folder_is_as_good_as_its_vae(saved: Vae, tmp_path: Path) -> None:
    folder = saved("pipeline/vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    pipeline, own = open_vae(str(tmp_path / "pipeline")), open_vae(str(folder))
    assert pipeline.name == "pipeline"
    assert pipeline.digest == own.digest
    assert torch.equal(pipeline.decode(latents()), own.decode(latents()))


def test_relative_folders_have_names_too(saved: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved())
    assert open_vae(".").name == "vae-small"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub on this machine."""
    pytest.importorskip("diffusers")
    stay_here(monkeypatch)
    with serving(FakeHub()) as hub:
        point_client(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield hub


@pytest.mark.parametrize(("layout", "name"), [("", "owner/vae.v1-small"), ("vae", "hf:owner/vae.v1-small@main")])
def test_a_hub_name_is_fetched(saved: Vae, server: FakeHub, tmp_path: Path, layout: str, name: str) -> None:
    folder = saved(f"here/{layout}")
    server.add_folder("owner/vae.v1-small", tmp_path / "here")
    inside = f"{layout}/" if layout else ""
    server.repositories["owner/vae.v1-small"][COMMIT] |= {"unet/x.safetensors": b"x", f"{inside}x.bin": b"x"}
    decoder = open_vae(name)
    assert decoder.name == name and decoder.digest == open_vae(str(folder)).digest
    assert set(server.fetched()) == {inside + CONFIG_NAME, inside + WEIGHTS_NAME}
    server.faults = Faults("api", 503)
    assert open_vae(name).digest == decoder.digest, "the cache is read where the hub cannot be asked"


def test_a_folder_wins_over_a_hub_name(saved: Vae, server: FakeHub) -> None:
    saved("owner/small")
    assert open_vae("owner/small").name == "small" and server.asked == []


def test_what_the_hub_lacks_is_named(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("owner/other", {"unet/config.json": b"{}"})
    assert refusal("owner/other") == (
        "owner/other: no such folder, and from the hub: holds no VAE: there is no config.json in it or in vae/"
    )
    assert "no such folder, and from the hub: there is no such repository" in refusal("owner/absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "no such folder, and from the hub: HF_HUB_OFFLINE is set" in refusal("stabilityai/sd-vae-ft-mse")


# ------------------------------------------------------------------ the digest


def test_the_digest_follows_what_decoding_reads(saved: Vae) -> None:
    folder = saved()
    before = open_vae(str(folder)).digest

    def stays(name: str, **settings: Any) -> bool:
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        if name:
            change_weights(copy, lambda tensors: tensors[name].view(-1)[:1].add_(0.5))
        change_config(copy, **settings)
        return open_vae(str(copy)).digest == before

    assert stays("")
    assert stays("encoder.conv_in.bias")
    assert stays("", in_channels=3, _diffusers_version="0.1")
    for name in ("decoder.conv_out.bias", "decoder.mid_block.attentions.0.to_q.weight", "post_quant_conv.weight"):
        assert not stays(name)
    assert not stays("", scaling_factor=0.5)
    assert not stays("", shift_factor=0.5)
    assert not stays("", sample_size=1024), "another tile, other pixels"


def test_a_file_in_half_precision_counts_by_its_values(saved: Vae) -> None:
    folder = saved()

    def rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        tensors.update({name: value.half().to(dtype) for name, value in tensors.items()})

    change_weights(folder, lambda tensors: rounded(tensors, torch.float32))
    wide = open_vae(str(folder))
    change_weights(folder, lambda tensors: rounded(tensors, torch.float16))
    narrow = open_vae(str(folder))
    assert narrow.digest == wide.digest
    assert torch.equal(narrow.decode(latents()), wide.decode(latents()))


def test_what_decided_the_pixels_is_json(saved: Vae) -> None:
    decoder = open_vae(str(saved(scaling_factor=0.25)), "cpu", torch.bfloat16)
    document = json.loads(json.dumps(decoder.to_json()))
    assert document == {
        "name": "vae-small",
        "digest": decoder.digest,
        "scale": 0.25,
        "shift": 0.0,
        "dtype": "bfloat16",
        "tile": 256,
        "tiled_from": 512,
    }


# ------------------------------------------------------------------ what is refused


def test_other_channels_are_refused(saved: Vae) -> None:
    decoder = open_vae(str(saved(latent_channels=16)))
    check_fits(decoder, 16, Path("ckpt.pt"))
    with pytest.raises(BadInputError, match=r"ckpt\.pt: makes latents of 4 channels, .* vae-small decodes 16"):
        check_fits(decoder, 4, Path("ckpt.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_pixels_are_named_by_their_index(saved: Vae, value: float) -> None:
    decoder, z = open_vae(str(saved())), latents(4)
    z[2, 0, 1, 1] = value
    with pytest.raises(BrokenImageError, match=r"image 2 of the batch holds NaN .* by vae-small") as caught:
        decoder.decode(z)
    assert caught.value.index == 2


@pytest.mark.parametrize("where", ["absent", "./absent", "/absent/vae", "~/absent/vae/x", "a/b/c", "-x/y"])
def test_nothing_there(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(where).startswith(f"{where}: no such folder")


def test_a_folder_without_a_vae(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}: holds no VAE")


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"")
    assert "give the VAE's folder" in refusal(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "describes no class"),
        ("{}", "describes no class"),
        ('{"_class_name": "AutoencoderTiny"}', "describes AutoencoderTiny, not AutoencoderKL"),
        ('{"_class_name": "AutoencoderKL", "latents_mean": [0, 0, 0, 0]}', "latents_mean"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": 0}', "scaling_factor is 0"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": "0.2"}', "scaling_factor is '0.2'"),
        ('{"_class_name": "AutoencoderKL", "scaling_factor": NaN}', "scaling_factor is nan"),
        ('{"_class_name": "AutoencoderKL", "shift_factor": [0.1]}', "shift_factor is"),
        ('{"_class_name": "AutoencoderKL"}', f"{WEIGHTS_NAME}: no such file"),
    ],
)
def test_configs_that_are_none_of_ours(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / CONFIG_NAME).write_text(text, encoding="latin-1")
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path))
    assert said in message


def test_pickles_are_not_opened(saved: Vae) -> None:
    folder = saved()
    state = load_file(folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert "pickled weights are not read" in refusal(folder)


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.conv_out.scale"] = tensors.pop("decoder.conv_out.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("decoder.conv_in.weight"), "tensor 'decoder.conv_in.weight' is missing (1 such)"),
        (lambda t: t.pop("encoder.conv_in.weight"), "tensor 'encoder.conv_in.weight' is missing (1 such)"),
        (rename, "tensor 'decoder.conv_out.weight' is missing (1 such)"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' has no place in an AutoencoderKL (1 such)"),
        (lambda t: t.update({"decoder.conv_in.bias": torch.zeros(5)}), "decoder.conv_in.bias"),
    ],
    ids=["missing", "missing in the encoder", "renamed", "extra", "shape"],
)
def test_every_tensor_must_be_there(saved: Vae, change: Callable[[dict[str, Tensor]], None], said: str) -> None:
    folder = saved()
    change_weights(folder, change)
    message = refusal(folder)
    assert message.startswith(str(folder))
    assert said in message


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_files_cut_short(saved: Vae, kept: int) -> None:
    file = saved() / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(file.parent).startswith(str(file))


@pytest.mark.parametrize(
    "settings",
    [
        {"block_out_channels": []},
        {"block_out_channels": "4444"},
        {"up_block_types": ["Nonsense"] * 4},
        {"act_fn": "nonsense"},
        {"norm_num_groups": 3},
        {"sample_size": None},
        {"latent_channels": -1},
        {"quantization_config": {"quant_method": "nonsense"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_configs_that_build_nothing(saved: Vae, settings: dict[str, Any]) -> None:
    folder = saved()
    change_config(folder, **settings)
    assert refusal(folder).startswith(f"{folder}: cannot be loaded as AutoencoderKL (")
    assert torch.nn.Linear(4, 4).weight.std() > 0, "a failure leaves torch's initialisers as they were"


def test_pixels_must_have_three_channels(saved: Vae) -> None:
    assert "decodes to 1 channels" in refusal(saved(out_channels=1))


# ------------------------------------------------------------------ the extra


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.chdir(tmp_path)
    where = "owner/small"
    if kind == "folder":
        folder = tmp_path / where
        folder.mkdir(parents=True)
        (folder / CONFIG_NAME).write_text('{"_class_name": "AutoencoderKL"}')
        save_file({"x": torch.zeros(1)}, folder / WEIGHTS_NAME)
    message = refusal(where)
    assert message == ("owner/small: a VAE needs diffusers, which is not here; install it: pip install 'ditmoe[vae]'")


def test_opening_is_silent(saved: Vae, capfd: pytest.CaptureFixture[str]) -> None:
    folder = saved()
    change_config(folder, unheard_of=1)
    capfd.readouterr()
    open_vae(str(folder))
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == 0, "and others are heard again"
