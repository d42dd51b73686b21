"""The InceptionV3 of FID (https://arxiv.org/abs/1706.08500), for the weights ported from TensorFlow.

It differs from torchvision's InceptionV3 (https://arxiv.org/abs/1512.00567): 1008 classes, batch norm with
eps 1e-3, average pools that leave the padding out, and a max pool in the last block. Layer names are those of the
weight file that pytorch-fid and torch-fidelity share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.evaluation.features.inception_weights import WEIGHTS_NAME, checked_weights
from ditmoe_cli.evaluation.scores.conventions import PREPROCESSINGS
from ditmoe_cli.files.reader import open_reader
from ditmoe_cli.progress import phase

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d, at 17 x 17: ADM's spatial features
SPATIAL_BLOCK = "Mixed_6d"
NORM_EPS = 1e-3


@dataclass(frozen=True)
class Conv:
    """A convolution's name, output channels, kernel and stride.

    A stride of one keeps the image size by padding, unless `padded` is off; a stride of two never pads.
    """

    name: str
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True

    @property
    def padding(self) -> tuple[int, int]:
        """Padding on each side."""
        keeps = self.padded and self.stride == 1
        return (self.kernel[0] // 2, self.kernel[1] // 2) if keeps else (0, 0)


Pool = Callable[[Tensor], Tensor]
Fork = tuple[Conv, ...]
Step = Conv | Pool | Fork
Branch = tuple[Step, ...]


def _average(x: Tensor) -> Tensor:
    """Return 3x3 means without the padding, as TensorFlow computes them."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


def _block_35(pool_outputs: int) -> tuple[Branch, ...]:
    """Return the branches of a block at 35x35."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
        (_average, Conv("branch_pool", pool_outputs)),
    )


def _block_17(inner: int) -> tuple[Branch, ...]:
    """Return the branches of a block at 17x17, with `inner` channels between its 7x1 and 1x7 convolutions."""
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, column),
            Conv("branch7x7dbl_3", inner, row),
            Conv("branch7x7dbl_4", inner, column),
            Conv("branch7x7dbl_5", 192, row),
        ),
        (_average, Conv("branch_pool", 192)),
    )


def _block_8(pool: Pool) -> tuple[Branch, ...]:
    """Return the branches of a block at 8x8, two of which fork at the end."""
    row, column = (1, 3), (3, 1)
    return (
        (Conv("branch1x1", 320),),
        (
            Conv("branch3x3_1", 384),
            (Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column)),
        ),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            (Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ),
        (pool, Conv("branch_pool", 192)),
    )


_TO_17: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, (3, 3), stride=2),),
    (
        Conv("branch3x3dbl_1", 64),
        Conv("branch3x3dbl_2", 96, (3, 3)),
        Conv("branch3x3dbl_3", 96, (3, 3), stride=2),
    ),
    (_halve,),
)
_TO_8: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), stride=2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), stride=2),
    ),
    (_halve,),
)
_STEM: Branch = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), stride=2),
    Conv("Conv2d_2a_3x3", 32, (3, 3), padded=False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), padded=False),
    _halve,
)
_BLOCKS: Mapping[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": _TO_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": _TO_8,
    "Mixed_7b": _block_8(_average),
    "Mixed_7c": _block_8(_maximum),
}


class FrozenNorm(nn.Module):
    """Batch normalisation with the statistics of training: y = (x - mean) / √(var + eps) · weight + bias."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of x (N, C, H, W)."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPS)


class ConvUnit(nn.Module):
    """Convolution without bias, frozen batch norm, ReLU."""

    def __init__(self, inputs: int, spec: Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, spec.outputs, spec.kernel, stride=spec.stride, padding=spec.padding, bias=False)
        self.bn = FrozenNorm(spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, inputs, H, W) to (N, outputs, H', W')."""
        return F.relu_(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Branches that read the same input; their outputs are concatenated along the channels."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.outputs = sum(self._add(inputs, branch) for branch in branches)

    def _add(self, width: int, branch: Branch) -> int:
        """Add a branch's convolutions and return its output channels."""
        for step in branch:
            convs = _convs(step)
            for conv in convs:
                self.add_module(conv.name, ConvUnit(width, conv))
            width = sum(conv.outputs for conv in convs) or width
        return width

    def _run(self, step: Step, x: Tensor) -> Tensor:
        if callable(step):
            return step(x)
        outputs = [self.get_submodule(conv.name)(x) for conv in _convs(step)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, inputs, H, W) to (N, outputs, H', W')."""
        results = []
        for branch in self.branches:
            result = x
            for step in branch:
                result = self._run(step, result)
            results.append(result)
        return torch.cat(results, 1)


def _convs(step: Step) -> tuple[Conv, ...]:
    """Return the convolutions of a step: a pool has none, a fork several."""
    if isinstance(step, Conv):
        return (step,)
    return step if isinstance(step, tuple) else ()


class Inception(Branches):
    """The network from uint8 images (N, H, W, C), C 1 or 3, to features (N, 2048), spatial features and logits.

    `fc` is used by the logits alone.
    """

    def __init__(self) -> None:
        super().__init__(3, (_STEM,))
        width = self.outputs
        for name, branches in _BLOCKS.items():
            block = Branches(width, branches)
            self.add_module(name, block)
            width = block.outputs
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor, preprocessing: str = "tf1") -> Tensor:
        """Return features (N, 2048) in fp32 of uint8 images (N, H, W, C)."""
        return self.pool_and_spatial(images, preprocessing)[0]

    def pool_and_spatial(self, images: Tensor, preprocessing: str = "tf1") -> tuple[Tensor, Tensor]:
        """Return, in fp32, features (N, 2048) and spatial features (N, 2023) of uint8 images (N, H, W, C).

        Spatial features, those of sFID (https://arxiv.org/abs/2103.03841), are the first 7 channels of TensorFlow's
        ``mixed_6/conv``, which is Mixed_6d.branch1x1 after its ReLU, at 17 x 17. They are flattened row by row with the
        channel running fastest, as in TensorFlow and in stored `mu_s` and `sigma_s`.
        """
        x = preprocess(images, preprocessing).contiguous(memory_format=torch.channels_last)
        spatial = x
        # TF32, cuDNN's default, would change features by 1e-3.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = super().forward(x)
            for name in _BLOCKS:
                x = self.get_submodule(name)(x)
                if name == SPATIAL_BLOCK:  # whose first branch is branch1x1
                    spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).float().flatten(1)
        return x.float().mean(dim=(2, 3)), spatial

    def logits(self, features: Tensor, bias: bool = False) -> Tensor:
        """Return features (N, 2048) times the classifier's weights (N, 1008), in fp32; scores leave the bias out."""
        return F.linear(features.float(), self.fc.weight, self.fc.bias if bias else None)


def preprocess(images: Tensor, preprocessing: str = "tf1") -> Tensor:
    """Return uint8 images (N, H, W, C) as fp32 (N, 3, 299, 299), by one of `PREPROCESSINGS`; grey is repeated.

    - ``tf1``: TensorFlow 1's bilinear resize, then (x - 128) / 128.
    - ``pytorch-fid``: torch's bilinear resize of x / 255 at half-pixel centres and without antialiasing, then 2x - 1.
    - ``clean-fid``: PIL's antialiased bicubic resize of each channel in float, cut to 0..255 but not rounded
      (https://arxiv.org/abs/2104.11222), then (x - 128) / 128.

    Raises `UsageError` for any other name.
    """
    x = images.permute(0, 3, 1, 2)
    if preprocessing == "tf1":
        x = (resize_tf1(x.float(), SIDE) - 128) / 128
    elif preprocessing == "pytorch-fid":
        x = x.contiguous().float() / 255
        x = 2 * F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    elif preprocessing == "clean-fid":
        x = (resize_clean(x, SIDE) - 128) / 128
    else:
        raise UsageError(f"unknown preprocessing {preprocessing!r}; choose {', '.join(PREPROCESSINGS)}")
    return x.expand(-1, 3, -1, -1)


def resize_clean(x: Tensor, side: int) -> Tensor:
    """Resize uint8 (N, C, H, W) to fp32 (N, C, side, side) by PIL's bicubic of each channel in float, cut to 0..255.

    PIL widens the filter where it shrinks. Results are not rounded to whole grey levels.
    """
    from PIL import Image

    planes = x.cpu().numpy().astype(np.float32)
    result = np.empty((*x.shape[:2], side, side), dtype=np.float32)
    for target, channels in zip(result, planes, strict=True):
        for index, plane in enumerate(channels):
            target[index] = Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(result.clip(0, 255)).to(x.device)


def resize_tf1(x: Tensor, side: int) -> Tensor:
    """Resize fp32 (N, C, H, W) to (N, C, side, side) as TensorFlow 1's bilinear resize does.

    Output i reads position i · length / side: aligned at the corner and without antialiasing, unlike torch
    and PIL. Positions are computed in fp32, as in the original.
    """
    return _resize_axis(_resize_axis(x, 3, side), 2, side)


def _resize_axis(x: Tensor, axis: int, side: int) -> Tensor:
    length = x.shape[axis]
    scale = torch.tensor(length / side, dtype=torch.float32, device=x.device)
    position = torch.arange(side, dtype=torch.float32, device=x.device) * scale
    low = position.long()
    high = (low + 1).clamp(max=length - 1)
    weight = (position - low).reshape([side if d == axis else 1 for d in range(x.ndim)])
    below, above = x.index_select(axis, low), x.index_select(axis, high)
    return below + (above - below) * weight


def load_inception(weights: Path | None = None) -> tuple[Inception, str]:
    """Return the network with its weights, and the SHA-256 of their file.

    The file is `weights`, else the one that the variable DITMOE_INCEPTION names, else the cached one, else it is
    downloaded once. Raises `BadInputError` where there is none, or where it holds other tensors.
    """
    path, digest = checked_weights(weights)
    with phase(f"loading {path.name}"):
        return _load(path), digest


def _load(path: Path) -> Inception:
    with torch.device("meta"):
        module = Inception()
    module.load_state_dict(_read_state(path, module), assign=True)
    return module.requires_grad_(False).eval()


def _read_state(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the module's tensors from the file, in fp32. Raises `BadInputError` for missing or misshapen ones."""
    header, reader = open_reader(path)
    advice = f"give the FID weights {WEIGHTS_NAME} with ⟨weights⟩ PATH"
    state = {}
    for name, expected in module.state_dict().items():
        if name not in header.tensors:
            raise BadInputError(f"{path}: not the Inception of FID: tensor {name!r} is missing; {advice}")
        shape = header.tensors[name].shape
        if shape != tuple(expected.shape):
            raise BadInputError(
                f"{path}: not the Inception of FID: tensor {name!r} is {shape}, expected {tuple(expected.shape)}; "
                f"{advice}"
            )
        tensor = reader.tensor(name).float()
        # kernels in the layout of the images make convolutions on a CPU a quarter faster
        state[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
    return state
