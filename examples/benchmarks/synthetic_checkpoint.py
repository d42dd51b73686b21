"""Write a DiT-MoE of any size with random weights, in any container, at the speed of the disk.

    python examples/benchmarks/synthetic_checkpoint.py g2.safetensors --model G
    python examples/benchmarks/synthetic_checkpoint.py xl.pt --model XL
    python examples/benchmarks/synthetic_checkpoint.py run --model XL --container deepspeed
    python examples/benchmarks/synthetic_checkpoint.py shards --model XL --max-shard-size 2GB
    python examples/benchmarks/synthetic_checkpoint.py 0.4b.safetensors --width 768 --depth 6

Names, shapes, dtypes and containers are those of the published files: S and B in fp32 with timm attention, XL and G in
fp16 with flash attention. Matrices are normal, of variance 1 / columns but for the sigma rows, which are 0. They are
cut at random places out of 2^20 numbers, scaled by one of four factors, so that no two are alike and nothing is drawn
twice. A tensor of one name and seed has the same bytes in each container. It takes less than 200 MB of anonymous
memory for any size, and what is written leaves the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ditmoe_cli.api.output_names import parse_size
from ditmoe_cli.files.header import TensorInfo, encode_header
from ditmoe_cli.files.staging import staged
from ditmoe_cli.files.writer import FOLDER_STEM, plan_shards
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig, expected_weights

Container = Literal["safetensors", "bare", "ema", "train", "deepspeed"]
CONTAINERS: tuple[Container, ...] = ("safetensors", "bare", "ema", "train", "deepspeed")
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
DRAWN = 2**20  # numbers
SCALES = (0.7, 0.85, 1.0, 1.2)
PACE = 64 * 2**20  # bytes that are written between two waits for the disk
STEP = 100_000  # of training, in names of DeepSpeed's folders


@dataclass(frozen=True)
class Shape:
    """What a published model's name says: width, depth, heads, experts, the layout of attention, and the dtype."""

    width: int
    depth: int
    heads: int
    experts: int
    flash: bool
    dtype: str


MODELS: Mapping[str, Shape] = {
    "S": Shape(384, 12, 6, 8, False, "fp32"),
    "B": Shape(768, 12, 12, 8, False, "fp32"),
    "L": Shape(1024, 24, 16, 8, False, "fp32"),
    "XL": Shape(1152, 28, 16, 8, True, "fp16"),
    "G": Shape(1408, 40, 16, 16, True, "fp16"),
}


def config_of(shape: Shape, side: int = 32, channels: int = 4) -> DiTMoEConfig:
    """Return upstream's configuration: experts of 4 widths, a shared one of 2 widths, top-2."""
    block = BlockConfig(shape.experts, (4 * shape.width,) * shape.experts, 2 * shape.width)
    return DiTMoEConfig(
        input_size=side,
        patch_size=2,
        in_channels=channels,
        out_channels=2 * channels,
        hidden_size=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=1000,
        top_k=2,
        attention="flash" if shape.flash else "timm",
        sampler="rf",
        blocks=(block,) * shape.depth,
    )


@dataclass(frozen=True)
class Values:
    """The weights of a model, by name."""

    channels: int
    seed: int = 0

    def pieces(self, info: TensorInfo, of: str = "") -> Iterator[memoryview]:
        """Yield a tensor's bytes; those of the same name in another set of weights `of` a file are others."""
        if len(info.shape) < 2:
            kind = np.uint16 if info.dtype == "BF16" else np.float16 if info.dtype == "F16" else np.float32
            one = 0x3F80 if info.dtype == "BF16" else 1  # bfloat16 in the bits of an integer
            yield np.full(info.shape, one if info.name.endswith("norm.weight") else 0, kind).data.cast("B")
            return
        generator = np.random.default_rng(zlib.crc32(f"{self.seed} {of} {info.name}".encode()))
        columns = int(np.prod(info.shape[1:]))
        pool = drawn(columns, info.dtype, SCALES[generator.integers(len(SCALES))])
        if info.name == "final_layer.linear.weight":
            yield self._without_sigma(info, pool).data.cast("B")
            return
        left = info.numel
        while left:
            start = int(generator.integers(DRAWN // 2))
            piece = pool[start : start + min(left, DRAWN // 2)]
            yield piece.data.cast("B")
            left -= len(piece)

    def _without_sigma(self, info: TensorInfo, pool: NDArray[Any]) -> NDArray[Any]:
        """Return the final layer, whose sigma rows rectified flow leaves at 0."""
        values = pool[: info.numel].reshape(info.shape).copy()
        values[np.arange(len(values)) % (2 * self.channels) >= self.channels] = 0
        return values


@lru_cache(maxsize=4 * len(SCALES))
def drawn(columns: int, dtype: str, scale: float) -> NDArray[Any]:
    """Return the normal numbers that matrices of so many columns are cut from."""
    numbers = np.random.default_rng(0).standard_normal(DRAWN, dtype=np.float32) * np.float32(scale * columns**-0.5)
    if dtype == "BF16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return numbers.astype(np.float16) if dtype == "F16" else numbers


class Paced(io.RawIOBase):
    """A file that waits for the disk now and then, and gives its pages back.

    Else a file larger than memory fills it, and everything else on the machine waits.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._kept = 0

    def writable(self) -> bool:
        """Return that it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Write all of some bytes and return how many."""
        rest = memoryview(data)
        while rest.nbytes:
            rest = rest[self._file.write(rest) :]
        if (end := self._file.tell()) - self._kept >= PACE:
            self._release(end)
        return len(data)

    def _release(self, end: int) -> None:
        os.fdatasync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), self._kept, end - self._kept, os.POSIX_FADV_DONTNEED)
        self._kept = end

    def close(self) -> None:
        """Wait for the disk and close the file."""
        if not self._file.closed:
            self._release(self._file.tell())
            self._file.close()
        super().close()


def write_safetensors(path: Path, infos: Sequence[TensorInfo], values: Values) -> None:
    """Write a safetensors file as others than ditmoe write it: no metadata but the format."""
    with Paced(path) as file:
        file.write(encode_header(list(infos), {"format": "pt"}))
        for info in infos:
            for piece in values.pieces(info):
                file.write(piece)


def write_shards(folder: Path, infos: Sequence[TensorInfo], values: Values, shard_bytes: int) -> None:
    """Write a folder of shards and their index."""
    folder.mkdir()
    shards = plan_shards(infos, shard_bytes)
    for shard in shards:
        write_safetensors(folder / shard.name, shard.tensors, values)
    index = {info.name: shard.name for shard in shards for info in shard.tensors}
    total = {"total_size": sum(info.nbytes for info in infos)}
    text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
    (folder / f"{FOLDER_STEM}.safetensors.index.json").write_text(text)


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor in a pickle: the tensor, and the set of weights of the file that it belongs to."""

    info: TensorInfo
    of: str


class Stored:
    """A tensor that pickles as torch's do, without being there."""

    def __init__(self, info: TensorInfo, of: str = "") -> None:
        self.storage = Storage(info, of)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import torch

        shape = self.storage.info.shape
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        rebuild: Callable[..., Any] = torch._utils._rebuild_tensor_v2
        return rebuild, (self.storage, 0, shape, strides, False, {})


class _Pickler(pickle.Pickler):
    """Pickle `Stored` tensors as references to storages, which it lists in order."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[Storage] = []

    def persistent_id(self, item: object) -> Any:
        """Return torch's reference to a storage."""
        import torch

        if not isinstance(item, Storage):
            return None
        self.storages.append(item)
        kinds = {"F32": torch.FloatStorage, "F16": torch.HalfStorage, "BF16": torch.BFloat16Storage}
        return "storage", kinds[item.info.dtype], str(len(self.storages) - 1), "cpu", item.info.numel


def write_pickle(path: Path, content: Mapping[str, Any], values: Values) -> None:
    """Write what `torch.save` writes of a mapping that holds `Stored` tensors, one of them in memory at a time."""
    import torch

    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(content)
    with Paced(path) as file:
        archive = torch._C.PyTorchFileWriter(file)
        archive.write_record("data.pkl", pickled.getvalue(), pickled.tell())
        archive.write_record("byteorder", b"little", len(b"little"))
        for number, storage in enumerate(pickler.storages):
            data = b"".join(values.pieces(storage.info, storage.of))
            archive.write_record(f"data/{number}", data, len(data))
        archive.write_end_of_file()


def training_file(infos: Sequence[TensorInfo], config: DiTMoEConfig, container: Container) -> dict[str, Any]:
    """Return what upstream's scripts save; the weights to read are `Stored` without another set's name."""
    weights = {info.name: Stored(info) for info in infos}
    if container == "bare":
        return dict(weights)
    if container == "ema":
        return {"ema": weights}
    if container == "deepspeed":
        return {"module": weights, **_engine_state(infos)}
    raw = {info.name: Stored(info, "model") for info in infos}
    return {"model": raw, "ema": weights, "opt": _adam(infos), "args": _arguments(config)}


def _arguments(config: DiTMoEConfig) -> argparse.Namespace:
    size = next((name for name, each in MODELS.items() if each.width == config.hidden_size), "S")
    return argparse.Namespace(
        model=f"DiT-{size}/{config.patch_size}",
        image_size=8 * config.input_size,
        num_classes=config.num_classes,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        epochs=1400,
        global_batch_size=256,
        global_seed=0,
        vae="mse",
        rf=True,
    )


def _adam(infos: Sequence[TensorInfo]) -> dict[str, Any]:
    trained = [info for info in infos if info.name != "pos_embed"]
    state = {
        number: {name: Stored(replace(info, dtype="F32"), name) for name in ("exp_avg", "exp_avg_sq")}
        for number, info in enumerate(trained)
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "params": list(range(len(trained)))}
    return {"state": state, "param_groups": [group]}


def _engine_state(infos: Sequence[TensorInfo]) -> dict[str, Any]:
    """Return what DeepSpeed saves beside the weights of ``mp_rank_00_model_states.pt``."""
    return {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{info.name: info.shape for info in infos if info.name != "pos_embed"}],
        "frozen_param_shapes": {"pos_embed": next(info.shape for info in infos if info.name == "pos_embed")},
        "shared_params": {},
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": STEP,
        "global_samples": STEP * 256,
        "dp_world_size": 8,
        "mp_world_size": 1,
        "ds_version": "0.14.4",
    }


def write_deepspeed(folder: Path, content: Mapping[str, Any], values: Values) -> None:
    """Write DeepSpeed's folder: ``latest``, and the weights in the folder of the step."""
    step = f"global_step{STEP}"
    (folder / step).mkdir(parents=True)
    (folder / "latest").write_text(step)
    write_pickle(folder / step / "mp_rank_00_model_states.pt", content, values)


def write(path: Path, config: DiTMoEConfig, dtype: str, container: Container, shard_bytes: int, seed: int = 0) -> int:
    """Write the checkpoint; return its number of parameters."""
    infos = [TensorInfo(name, DTYPES[dtype], shape) for name, shape in expected_weights(config).items()]
    values = Values(config.in_channels, seed)
    with staged(path, force=True) as staging:
        if container == "safetensors" and path.suffix == ".safetensors":
            write_safetensors(staging, infos, values)
        elif container == "safetensors":
            write_shards(staging, infos, values, shard_bytes)
        elif container == "deepspeed":
            write_deepspeed(staging, training_file(infos, config, container), values)
        else:
            write_pickle(staging, training_file(infos, config, container), values)
    return sum(info.numel for info in infos)


def shape_of(options: argparse.Namespace) -> Shape:
    """Return the shape that the options name: a published model's, with what is given otherwise."""
    base = MODELS[options.model]
    given = {name: value for name in ("depth", "experts", "dtype") if (value := getattr(options, name)) is not None}
    if options.width is not None:
        known = next((each for each in MODELS.values() if each.width == options.width), None)
        heads = known.heads if known else max(1, options.width // 64)
        given |= {"width": options.width, "heads": heads, "flash": known.flash if known else base.flash}
    return replace(base, **given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the checkpoint; print how many parameters it has, its bytes and the seconds it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="NAME.safetensors, NAME.pt, or a folder")
    parser.add_argument("--model", choices=MODELS, default="S", help="of upstream's; G has 16 experts, others 8")
    parser.add_argument("--width", type=int)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--side", type=int, default=32, help="of the latent: 32 is 256 pixels")
    parser.add_argument("--channels", type=int, default=4, help="4 of latents, 3 of pixels, which fid needs no VAE for")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as published")
    parser.add_argument("--container", choices=CONTAINERS, help="default: safetensors; of a .pt a bare dict")
    parser.add_argument("--max-shard-size", default="10GB", help="of a folder of safetensors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    container = options.container or ("bare" if options.output.suffix == ".pt" else "safetensors")
    shape, start = shape_of(options), time.perf_counter()
    config = config_of(shape, options.side, options.channels)
    shard_bytes = parse_size(options.max_shard_size).bytes
    parameters = write(options.output, config, shape.dtype, container, shard_bytes, options.seed)
    seconds, output = time.perf_counter() - start, options.output
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{parameters / 1e9:.2f} B parameters, {size / 1e9:.2f} GB in {seconds:.0f} s")


if __name__ == "__main__":
    main()
