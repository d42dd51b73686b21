"""The VAE: decoding latents with an AutoencoderKL (https://arxiv.org/abs/2112.10752), as diffusers stores it.

A model on latents is trained on z = scale · (encoded − shift), so pixels are decode(z / scale + shift). Scale and shift
are those of the VAE's config, by default 0.18215 and 0. Upstream DiT-MoE always uses Stable Diffusion's VAE at 0.18215.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_cli.errors import BadInputError, BrokenImageError
from ditmoe_cli.files.fingerprint import digest, file_digest, fingerprint
from ditmoe_cli.files.header import TensorInfo, read_safetensors_header
from ditmoe_cli.files.hub import Contents, fetched, silenced
from ditmoe_cli.files.hub_names import is_hub_name
from ditmoe_cli.files.json_text import read_json
from ditmoe_cli.files.streaming import sha256_of
from ditmoe_cli.progress import phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
VAE_CLASS = "AutoencoderKL"
UPSTREAM_SCALE = 0.18215
TILED_FROM = 512  # pixels a side from which images are decoded in tiles
SMALLEST_TILE = 256  # pixels a side; the default sample size of configs, 32, would give tiny tiles
PIXEL_CHANNELS = 3

_NO_VAE = f"holds no VAE: there is no {CONFIG_NAME} in it or in vae/"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# the tensors and the settings that determine decoded pixels, and so the digest
_DECODING = ("decoder.", "post_quant_conv.")
_DECODING_SETTINGS = (
    "act_fn",
    "block_out_channels",
    "latent_channels",
    "layers_per_block",
    "mid_block_add_attention",
    "norm_num_groups",
    "out_channels",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "up_block_types",
    "use_post_quant_conv",
)


@dataclass(frozen=True)
class Decoder:
    """An opened VAE, ready to decode.

    Attributes:
        module: diffusers' AutoencoderKL, on its device.
        name: hub name, or name of the folder.
        digest: SHA-256 over the sorted (name, dtype, shape, bytes) of the tensors that decoding reads, in fp32 and
            under diffusers' current names, and the settings of `_DECODING_SETTINGS`; not over the precision.
        scale: divisor of latents.
        shift: added to latents after the division.
        channels: of latents.
        upsampling: pixels per latent along a side.
        tile: side of a tile, in latents.
        tiled_from: side, in pixels, from which images are decoded in tiles.
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
        """Return the settings that determine decoded pixels, as JSON; ``dtype`` is the precision."""
        dtype = str(self.module.dtype).removeprefix("torch.")
        values = {"name": self.name, "digest": self.digest, "scale": self.scale, "shift": self.shift, "dtype": dtype}
        return {**values, "tile": self.tile * self.upsampling, "tiled_from": self.tiled_from}

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (N, 3, H, W) in about [-1, 1], fp32, of latents (N, C, S, S), H being S · `upsampling`.

        Images of at least `tiled_from` pixels a side that are larger than a tile are decoded in overlapping tiles,
        which are blended. Memory is then that of one tile, and values differ a little from those of whole images, as
        norms and attention see only a tile.

        Raises `BrokenImageError`, with the index in the batch, where an image holds NaN or infinite values.
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
    """Raise `BadInputError` where a checkpoint's latents do not have the channels of the VAE's."""
    if decoder.channels != in_channels:
        raise BadInputError(
            f"{path}: makes latents of {in_channels} channels, but the VAE {decoder.name} decodes {decoder.channels}; "
            "give the VAE that the checkpoint was trained with"
        )


def open_vae(where: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Open the VAE at `where` for decoding on `device` in `dtype` (fp32 by default).

    `where` is a folder in diffusers' layout (the VAE's or a pipeline's, with ``vae/``), or a hub name such as
    ``stabilityai/sd-vae-ft-mse``, which is downloaded once. Weights are read from safetensors only. All tensors must be
    in the file, since diffusers leaves missing ones at random values.

    Raises `BadInputError` where there is no VAE, the hub cannot be reached, the class is another, weights are damaged
    or incomplete, or diffusers is not installed.
    """
    import torch

    folder = _vae_folder(where)
    config = _read_config(folder / CONFIG_NAME)
    scale, shift = _scaling(config, folder / CONFIG_NAME)
    _check_weights_file(folder)
    with phase(f"loading the VAE {_name(where)}"):
        module = _load(folder, where)
    settings = dict(module.config)
    identity = _digest(module, settings)  # before the weights are rounded to `dtype`
    return Decoder(
        module=_placed(module, device, torch.float32 if dtype is None else dtype),
        name=_name(where),
        digest=identity,
        scale=scale,
        shift=shift,
        channels=int(settings["latent_channels"]),
        upsampling=_upsampling(settings),
        tile=int(module.tile_latent_min_size),
    )


def decoding_digest(where: str) -> str | None:
    """Return the SHA-256 of the files of a VAE on disk; None where it may have to be fetched, or is none."""
    given = Path(where).expanduser()
    folder = _vae_in(given)
    if folder is None or not (folder / WEIGHTS_NAME).is_file():
        return None
    return digest([file_digest(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)])


def vae_on_disk(where: str, in_channels: int) -> Path | None:
    """Return the folder of a VAE on disk that decodes latents of `in_channels`, None for the name of one on the hub.

    Raises `BadInputError` where `where` is neither, and for a VAE that `open_vae` does not open.
    """
    given = Path(where).expanduser()
    if not given.exists() and _HUB_NAME.fullmatch(where):
        return None
    found = _vae_in(given)
    if found is None:
        problem = _NO_VAE if given.is_dir() else "no such folder, and no hub name (owner/name)"
        raise BadInputError(f"{where}: {problem}")
    config = _read_config(found / CONFIG_NAME)
    _scaling(config, found / CONFIG_NAME)
    _check_weights_file(found)
    channels = config.get("latent_channels", in_channels)
    if channels != in_channels:
        raise BadInputError(f"{where}: decodes latents of {channels} channels, and the checkpoint makes {in_channels}")
    return found


def _name(where: str) -> str:
    path = Path(where).expanduser()
    return path.resolve().name if path.exists() else where


def _vae_folder(where: str) -> Path:
    """Return the folder with the VAE's config; a hub name is downloaded unless a folder has that name."""
    given = Path(where).expanduser()
    if given.is_file():
        raise BadInputError(f"{where}: is a file; give the VAE's folder, with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if given.is_dir():
        root = given
    elif is_hub_name(where) or _HUB_NAME.fullmatch(where):
        root = _fetched(where)
    else:
        raise BadInputError(f"{where}: no such folder, and no hub name (owner/name) to fetch a VAE by")
    found = _vae_in(root)
    if found is None:
        raise BadInputError(f"{where}: {_NO_VAE}")
    return found


def _fetched(name: str) -> Path:
    """Return the folder of a hub name's files, fetching those that the hub's cache lacks."""
    for module in ("diffusers", "huggingface_hub"):  # checked before the download, not after
        if find_spec(module) is None:
            raise _extra_missing(name, ModuleNotFoundError(name=module))
    try:
        return fetched(name, contents=Contents(_files_to_fetch, lambda root: _vae_in(root) is not None))
    except BadInputError as error:
        problem = error.message.removeprefix(f"{name}: ")
        raise BadInputError(f"{name}: no such folder, and from the hub: {problem}") from None


def _files_to_fetch(
    root: Path,
    listing: Sequence[Path],
    fetch: Callable[[Path], None],  # noqa: ARG001
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Return the files of a VAE in a listing, or of a pipeline's. Raises `BadInputError` where there are none."""
    for folder in (root, root / "vae"):
        if folder / CONFIG_NAME in listing:
            return tuple(file for name in (CONFIG_NAME, WEIGHTS_NAME) if (file := folder / name) in listing), ()
    raise BadInputError(f"{root}: {_NO_VAE}")


def _vae_in(root: Path) -> Path | None:
    """Return the folder of a VAE, or of a pipeline's; None where there is none."""
    return next((folder for folder in (root, root / "vae") if (folder / CONFIG_NAME).is_file()), None)


def _read_config(file: Path) -> dict[str, Any]:
    """Return a VAE's config. Raises `BadInputError` where its VAE is none that `Decoder` can decode with."""
    try:
        config = read_json(file, finite=False)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{file}: cannot be read as JSON ({_reason(error)})") from None
    class_name = config.get("_class_name") if isinstance(config, dict) else None
    if class_name != VAE_CLASS:
        raise BadInputError(f"{file}: describes {class_name or 'no class'}, not {VAE_CLASS}; give the VAE's folder")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise BadInputError(f"{file}: normalises latents by channel (latents_mean), as no DiT-MoE's VAE does")
    return dict(config)


def _scaling(config: Mapping[str, Any], file: Path) -> tuple[float, float]:
    """Return scale and shift of a config, by default diffusers'."""
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
    """Return the AutoencoderKL of a folder in fp32 on the CPU; all its tensors are from the file."""
    import torch

    with silenced():
        try:
            from diffusers import AutoencoderKL
        except (ImportError, RuntimeError) as error:  # failures of its lazy imports are RuntimeErrors
            raise _extra_missing(where, error) from None
        try:
            module, loading = AutoencoderKL.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,  # else accelerate would be required
                output_loading_info=True,
                torch_dtype=torch.float32,
            )
            _set_tiles(module)
        except Exception as error:  # constructors raise all kinds of errors for malformed configs
            raise BadInputError(f"{folder}: cannot be loaded as {VAE_CLASS} ({_reason(error)})") from None
    for kind, problem in (("missing_keys", "is missing"), ("unexpected_keys", f"has no place in an {VAE_CLASS}")):
        if loading[kind]:
            names = sorted(loading[kind])
            raise BadInputError(f"{folder / WEIGHTS_NAME}: tensor {names[0]!r} {problem} ({len(names)} such)")
    channels = module.config["out_channels"]
    if channels != PIXEL_CHANNELS:
        raise BadInputError(f"{folder}: decodes to {channels} channels; pixels must have {PIXEL_CHANNELS}")
    return module


def _set_tiles(module: Any) -> None:
    """Set the side of tiles to the size that the VAE was trained on, at least 256 pixels.

    diffusers has one side in latents and one in pixels, and computes with lists in neither. A multiple of four latents
    makes the overlap, a quarter, a whole number in both.
    """
    size = module.config["sample_size"]
    side = max(SMALLEST_TILE, *size) if isinstance(size, list | tuple) else max(SMALLEST_TILE, size)
    upsampling = _upsampling(module.config)
    module.tile_latent_min_size = max(4, side // upsampling // 4 * 4)
    module.tile_sample_min_size = module.tile_latent_min_size * upsampling


def _upsampling(config: Mapping[str, Any]) -> int:
    """Return the pixels per latent along a side: each block of the decoder but the last doubles it."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _digest(module: Any, settings: Mapping[str, Any]) -> str:
    from ditmoe_cli.files.reader import tensor_bytes

    tensors = {name: value for name, value in module.state_dict().items() if name.startswith(_DECODING)}
    infos = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    hashes = {name: sha256_of([tensor_bytes(value)]) for name, value in tensors.items()}
    return fingerprint(infos, hashes, {key: settings[key] for key in _DECODING_SETTINGS})


def _placed(module: Any, device: str, dtype: torch.dtype) -> Any:
    with silenced():  # diffusers warns of any change of dtype
        return module.to(device=device, dtype=dtype)


def _extra_missing(where: str, error: BaseException) -> BadInputError:
    missing = isinstance(error, ModuleNotFoundError) and error.name in ("diffusers", "huggingface_hub")
    state = "is not here" if missing else f"cannot be imported ({_reason(error)})"
    return BadInputError(f"{where}: a VAE needs diffusers, which {state}; install it: pip install 'ditmoe[vae]'")


def _reason(error: BaseException) -> str:
    """Return an error's message on one line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__
