"""Latents to pixels: the decoder of an AutoencoderKL (https://arxiv.org/abs/2112.10752), as diffusers stores it.

A model on latents is trained on z = scale · (encoded − shift), so pixels are decode(z / scale + shift). Upstream
DiT-MoE takes Stable Diffusion's VAE at 0.18215 throughout; here both numbers are those of the VAE's own config, whose
defaults are 0.18215 and no shift.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError, BrokenImageError
from ditmoe_cli.files.fingerprint import fingerprint
from ditmoe_cli.files.header import TensorInfo, read_safetensors_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
VAE_CLASS = "AutoencoderKL"
UPSTREAM_SCALE = 0.18215
TILED_FROM = 512  # pixels a side from which images are decoded in tiles
SMALLEST_TILE = 256  # pixels a side, whatever size the config names: its default, 32, would be all seams
PIXEL_CHANNELS = 3

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# the parts that decoding reads, and the settings beside the weights that decide what comes out
_DECODING = ("decoder.", "post_quant_conv.")
_DECISIVE = (
    *("act_fn", "block_out_channels", "latent_channels", "layers_per_block", "mid_block_add_attention"),
    *("norm_num_groups", "out_channels", "sample_size", "scaling_factor", "shift_factor", "up_block_types"),
    "use_post_quant_conv",
)


@dataclass(frozen=True)
class Decoder:
    """An opened VAE.

    `module` is diffusers' AutoencoderKL on its device, `name` the hub name or the folder's, `scale` and `shift` what
    latents are divided by and then moved by, `channels` those of the latents, `upsampling` pixels per latent, `tile`
    the side of a tile in latents, and `tiled_from` the side in pixels from which images are decoded in tiles.

    `digest` is SHA-256 over the sorted (name, dtype, shape, bytes) of the tensors that decoding reads and the settings
    that matter. Tensors count as fp32 and under diffusers' current names, whatever precision they are run in.
    """

    module: Any
    name: str
    digest: str
    scale: float
    shift: float
    channels: int
    upsampling: int
    tile: int
    tiled_from: int = TILED_FROM

    def to_json(self) -> dict[str, Any]:
        """Return what decided the pixels, as JSON; the precision stands in ``dtype``."""
        dtype = str(self.module.dtype).removeprefix("torch.")
        values = {"name": self.name, "digest": self.digest, "scale": self.scale, "shift": self.shift, "dtype": dtype}
        return {**values, "tile": self.tile * self.upsampling, "tiled_from": self.tiled_from}

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (N, 3, H, W) in about [-1, 1], fp32, of latents (N, C, S, S), H being S · `upsampling`.

        Images of `tiled_from` pixels a side or more, and larger than one tile, are decoded in overlapping tiles that
        are blended: memory then stays that of a tile, and values differ a little from those of the whole, since norms
        and attention see a tile alone.

        Raises `BrokenImageError` where an image holds NaN or infinite values, with its index in the batch.
        """
        import torch

        side = self.upsampling * max(latents.shape[-2:])
        if side >= self.tiled_from:
            self.module.enable_tiling()
        else:
            self.module.disable_tiling()
        with torch.inference_mode():
            z = latents.to(self.module.device, torch.float32) / self.scale + self.shift
            pixels: Tensor = self.module.decode(z.to(self.module.dtype)).sample.float()
        whole = pixels.isfinite().flatten(1).all(dim=1)
        if not bool(whole.all()):
            first = int(whole.logical_not().nonzero()[0])
            raise BrokenImageError(
                first,
                f"NaN or infinite values after decoding by {self.name}; are the latents whole, and is the precision "
                "enough?",
            )
        return pixels


def check_fits(decoder: Decoder, in_channels: int, path: Path) -> None:
    """Raise `BadInputError` where the checkpoint at `path`, of `in_channels`, makes no latents of this VAE."""
    if decoder.channels != in_channels:
        raise BadInputError(
            f"{path}: makes latents of {in_channels} channels, but the VAE {decoder.name} decodes {decoder.channels}; "
            "give the VAE that the checkpoint was trained with"
        )


def open_vae(where: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Open the VAE at `where` for decoding on `device` in `dtype` (fp32 unless told).

    `where` is a folder in diffusers' layout (the VAE's own or a pipeline's, with ``vae/``), or else a hub name such as
    ``stabilityai/sd-vae-ft-mse``, which is fetched once. Weights are read from safetensors alone, and every tensor must
    be there: diffusers itself would leave missing ones at random values.

    Raises `BadInputError`, which names the place: nothing there, hub out of reach, another class, damaged or incomplete
    weights, or diffusers not installed.
    """
    import torch

    folder = _vae_folder(where)
    config = _read_config(folder / CONFIG_NAME)
    scale, shift = _scaling(config, folder / CONFIG_NAME)
    _check_weights_file(folder)
    module = _load(folder, where)
    settings = dict(module.config)
    digest = _digest(module, settings)  # before it is rounded to `dtype`
    return Decoder(
        module=_placed(module, device, torch.float32 if dtype is None else dtype),
        name=_name(where),
        digest=digest,
        scale=scale,
        shift=shift,
        channels=int(settings["latent_channels"]),
        upsampling=_upsampling(settings),
        tile=int(module.tile_latent_min_size),
    )


def _name(where: str) -> str:
    path = Path(where).expanduser()
    return path.resolve().name if path.exists() else where


def _vae_folder(where: str) -> Path:
    """Return the local folder that holds the VAE's config, fetching a hub name if nothing of that name is here."""
    given = Path(where).expanduser()
    if given.is_file():
        raise BadInputError(f"{where}: is a file; give the VAE's folder, with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if given.is_dir():
        root = given
    elif _HUB_NAME.fullmatch(where):
        root = _fetched(where)
    else:
        raise BadInputError(f"{where}: no such folder, and no hub name (owner/name) to fetch a VAE by")
    for folder in (root, root / "vae"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise BadInputError(f"{where}: holds no VAE: there is no {CONFIG_NAME} in it or in vae/")


def _fetched(name: str) -> Path:
    """Return the folder that a hub name's files are in, after fetching those that the cache lacks."""
    if find_spec("diffusers") is None:  # found out before the download, not after
        raise _extra_missing(name, ModuleNotFoundError(name="diffusers"))
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _extra_missing(name, error) from None
    files = [prefix + file for prefix in ("", "vae/") for file in (CONFIG_NAME, WEIGHTS_NAME)]
    try:
        with _quiet():
            return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the HTTP library, the hub, the file system: all mean that it is not to be had
        raise BadInputError(
            f"{name}: no such folder, and fetching it from the hub failed ({_reason(error, lines=1)}); fetch it "
            "elsewhere and give its folder"
        ) from None


def _read_config(file: Path) -> dict[str, Any]:
    """Return a VAE's config. Raises `BadInputError` for what decoding as an AutoencoderKL would get wrong."""
    try:
        config: Any = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: cannot be read as JSON ({_reason(error)})") from None
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != VAE_CLASS:
        raise BadInputError(f"{file}: describes {found or 'no class'}, not {VAE_CLASS}; give the VAE's folder")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise BadInputError(f"{file}: normalises latents by channel (latents_mean), as no DiT-MoE's VAE does")
    return dict(config)


def _scaling(config: Mapping[str, Any], file: Path) -> tuple[float, float]:
    """Return the scale and the shift that a config names, with diffusers' defaults."""
    scale, shift = config.get("scaling_factor", UPSTREAM_SCALE), config.get("shift_factor")
    if not _is_number(scale) or scale <= 0:
        raise BadInputError(f"{file}: scaling_factor is {scale!r}; it must be a positive number")
    if shift is not None and not _is_number(shift):
        raise BadInputError(f"{file}: shift_factor is {shift!r}; it must be a number or null")
    return float(scale), float(shift or 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_weights_file(folder: Path) -> None:
    """Raise `BadInputError` where the safetensors file is missing or its header damaged."""
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        raise BadInputError(f"{file}: no such file; pickled weights are not read, so save the VAE as safetensors")
    read_safetensors_header(file)


def _load(folder: Path, where: str) -> Any:
    """Return the AutoencoderKL of a folder in fp32 on the CPU, ready for decoding, every tensor of it from the file."""
    import torch

    with _quiet():
        try:
            from diffusers import AutoencoderKL
        except (ImportError, RuntimeError) as error:  # it imports lazily, and words what fails as RuntimeError
            raise _extra_missing(where, error) from None
        try:
            module, found = AutoencoderKL.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # what it wants otherwise, accelerate, is not needed
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
            _set_tiles(module)
        except Exception as error:  # a config can hold anything, so its constructor can raise anything
            raise BadInputError(f"{folder}: cannot be loaded as {VAE_CLASS} ({_reason(error)})") from None
    for kind, problem in (("missing_keys", "is missing"), ("unexpected_keys", f"has no place in an {VAE_CLASS}")):
        if found[kind]:
            names = sorted(found[kind])
            raise BadInputError(f"{folder / WEIGHTS_NAME}: tensor {names[0]!r} {problem} ({len(names)} such)")
    channels = module.config["out_channels"]
    if channels != PIXEL_CHANNELS:
        raise BadInputError(f"{folder}: decodes to {channels} channels; pixels must have {PIXEL_CHANNELS}")
    return module


def _set_tiles(module: Any) -> None:
    """Give tiles the size that the VAE was trained on, at least 256 pixels.

    diffusers keeps the side in latents and in pixels apart and takes a list for neither; a side in latents that is a
    multiple of four lets its overlap, a quarter, come out whole in both.
    """
    size = module.config["sample_size"]
    side = max(SMALLEST_TILE, *size) if isinstance(size, list | tuple) else max(SMALLEST_TILE, size)
    upsampling = _upsampling(module.config)
    module.tile_latent_min_size = max(4, side // upsampling // 4 * 4)
    module.tile_sample_min_size = module.tile_latent_min_size * upsampling


def _upsampling(config: Mapping[str, Any]) -> int:
    """Pixels per latent along a side: all blocks of the decoder but the last double it."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _digest(module: Any, settings: Mapping[str, Any]) -> str:
    from ditmoe_cli.files.reader import tensor_bytes

    tensors = {name: value for name, value in module.state_dict().items() if name.startswith(_DECODING)}
    infos = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    return fingerprint(infos, lambda name: tensor_bytes(tensors[name]), {key: settings[key] for key in _DECISIVE})


def _placed(module: Any, device: str, dtype: torch.dtype) -> Any:
    with _quiet():  # diffusers warns of a change of dtype, naming no module that it would harm
        return module.to(device=device, dtype=dtype)


def _extra_missing(where: str, error: BaseException) -> BadInputError:
    missing = isinstance(error, ModuleNotFoundError) and error.name in ("diffusers", "huggingface_hub")
    state = "is not here" if missing else f"cannot be imported ({_reason(error)})"
    return BadInputError(f"{where}: a VAE needs diffusers, which {state}; install it: pip install 'ditmoe[vae]'")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log messages of libraries off stderr: what matters of them is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _reason(error: BaseException, lines: int | None = None) -> str:
    """Return an error's message, or its first `lines`, on one line and shortened."""
    words = " ".join(str(error).splitlines()[:lines]).split()
    return " ".join(words)[:160] or type(error).__name__
