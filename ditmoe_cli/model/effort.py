"""What computing takes, from shapes alone: operations, seconds on a machine, and memory. Torch-free.

A DiT-MoE of width D passes P tokens an image through each block. With k of the experts' widths H (their mean), the
shared width S and R router rows, a block's forward pass takes, in floating-point operations (a multiplication and an
addition are two),

    P (8 D² + 4 P D + 2 R D + 6 k D H + 6 D S) + 12 D²,

that is attention's projections, its scores and their values, the router, k experts, the shared expert, and for each
image the modulation. Embedding and final layer take 2 P D p² (C_in + C_out) + 4 D² + 2 · 256 D, p being the patch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ditmoe_cli.model.config import FREQUENCIES, BlockConfig, DiTMoEConfig

BASELINE_BYTES = 350_000_000  # of a process that has loaded torch
_EFFICIENCY = 0.7  # of a model's products, whose sizes vary, against one large product
_DOUBLE = 0.35  # speed of double precision against single
_SECONDS_A_STEP = 6e-6  # of one small operation, whatever its size
_BYTES_A_SECOND = 0.4e9  # read, checked, hashed and written
_STEPS_A_BLOCK, _STEPS_AN_EXPERT = 60, 25  # small operations of one pass


@dataclass(frozen=True)
class Effort:
    """Operations of a piece of work; efforts add up.

    Attributes:
        flops: floating-point operations in single precision.
        double_flops: those in double precision.
        steps: operations on small tensors, which take as long whatever they compute.
        nbytes: bytes that are read or written, with their hashes.
    """

    flops: float = 0.0
    double_flops: float = 0.0
    steps: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        """Return the effort of both, one after the other."""
        return Effort(
            self.flops + other.flops,
            self.double_flops + other.double_flops,
            self.steps + other.steps,
            self.nbytes + other.nbytes,
        )

    def __mul__(self, times: float) -> Effort:
        """Return the effort of doing it so many times."""
        return Effort(self.flops * times, self.double_flops * times, self.steps * times, self.nbytes * times)

    @property
    def multiplies(self) -> bool:
        """Whether there are operations that take less time on a faster machine."""
        return bool(self.flops or self.double_flops)

    def seconds(self, rate: float) -> float:
        """Return the seconds on a machine that multiplies large matrices at `rate` operations a second."""
        products = self.flops / (_EFFICIENCY * rate) + self.double_flops / (_DOUBLE * rate)
        return products + self.steps * _SECONDS_A_STEP + self.nbytes / _BYTES_A_SECOND


def total(efforts: Iterable[Effort]) -> Effort:
    """Return the effort of all, one after the other."""
    return sum(efforts, Effort())


@dataclass(frozen=True)
class Estimate:
    """What one phase is expected to take.

    Attributes:
        what: what is done, such as ``refitting 28 blocks``.
        effort: its operations.
        memory: bytes of memory at its peak.
        asked_seconds: the time that it was given, which it takes where its operations do not take longer; 0 for none.
    """

    what: str
    effort: Effort
    memory: float
    asked_seconds: float = 0.0

    def seconds(self, rate: float) -> float:
        """Return the seconds on a machine that multiplies large matrices at `rate` operations a second."""
        return max(self.effort.seconds(rate), self.asked_seconds)


def attention_flops(config: DiTMoEConfig) -> float:
    """Return the operations of one image in a block's attention, P (8 D² + 4 P D), and its modulation, 12 D²."""
    width, tokens = config.hidden_size, config.num_patches
    return tokens * (8 * width**2 + 4 * tokens * width) + 12 * width**2


def mixture_flops(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one token in a block's mixture, 2 R D + 6 k D H + 6 D S, and 2 D² of a linear map."""
    mean = sum(block.expert_widths) / max(len(block.expert_widths), 1)
    return unrouted_flops(config, block) + 6 * config.hidden_size * config.top_k * mean


def unrouted_flops(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one token in a block's mixture beside its experts: 2 R D + 6 D S, 2 D² of a map."""
    width = config.hidden_size
    linear = 2 * width**2 if block.residual_linear else 0
    return 2 * block.router_rows * width + 6 * width * block.shared_width + linear


def block_flops(config: DiTMoEConfig, block: BlockConfig) -> float:
    """Return the operations of one image in a block."""
    return attention_flops(config) + config.num_patches * mixture_flops(config, block)


def image_flops(config: DiTMoEConfig) -> float:
    """Return the operations of one evaluation of the model for one image, in one branch of guidance."""
    return ends_flops(config) + sum(block_flops(config, block) for block in config.blocks)


def ends_flops(config: DiTMoEConfig) -> float:
    """Return the operations of one image outside the blocks: embedding and final layer."""
    width = config.hidden_size
    channels = config.patch_size**2 * (config.in_channels + config.out_channels)
    return 2 * config.num_patches * width * channels + 2 * FREQUENCIES * width + 6 * width**2


def evaluation_flops(config: DiTMoEConfig, rows: int, slots: Sequence[Sequence[int]]) -> float:
    """Return the operations of one evaluation for `rows` images, where expert e of block b computes slots[b][e] tokens.

    Experts of unequal widths, and router rows that select none, make it differ from `rows` times `image_flops`. Small
    maps of constants are left out.
    """
    tokens = rows * config.num_patches
    routed = sum(
        6.0 * config.hidden_size * width * count
        for block, counts in zip(config.blocks, slots, strict=True)
        for width, count in zip(block.expert_widths, counts, strict=True)
    )
    fixed = sum(rows * attention_flops(config) + tokens * unrouted_flops(config, block) for block in config.blocks)
    return rows * ends_flops(config) + fixed + routed


def block_steps(block: BlockConfig) -> float:
    """Return the small operations of one pass of a block."""
    return _STEPS_A_BLOCK + _STEPS_AN_EXPERT * len(block.expert_widths)


def passes(config: DiTMoEConfig, images: float, evaluations: float, batch: int) -> Effort:
    """Return the effort of `evaluations` of the model for each of `images`, `batch` of them at once."""
    calls = evaluations * -(-images // max(batch, 1))
    steps = calls * sum(block_steps(block) for block in config.blocks)
    return Effort(flops=images * evaluations * image_flops(config), steps=steps)


def block_weights(config: DiTMoEConfig, block: BlockConfig) -> int:
    """Return the parameters of a block's matrices: 10 D² + 3 D (Σ H + S) + R D."""
    width = config.hidden_size
    return width * (10 * width + 3 * (sum(block.expert_widths) + block.shared_width) + block.router_rows)


def model_bytes(config: DiTMoEConfig) -> int:
    """Return the memory of a model in fp32, whole; matrices that stay packed take less."""
    return 4 * (sum(block_weights(config, block) for block in config.blocks) + 1000 * config.hidden_size)


def activation_bytes(config: DiTMoEConfig, images: int) -> int:
    """Return the memory of images, of all branches together, while they pass a block, in fp32.

    Of each token about 12 D for the stream and attention, k (2 H + D) for its experts and 2 S for the shared one.
    """
    width = config.hidden_size
    widest = max(max(block.expert_widths, default=0) for block in config.blocks)
    shared = max(block.shared_width for block in config.blocks)
    token = 12 * width + config.top_k * (2 * widest + width) + 2 * shared
    return 4 * images * config.num_patches * token


def branches_at(cfg: float) -> int:
    """Return the branches that the model is evaluated in at a guidance scale."""
    return 1 if cfg == 1.0 else 2


@dataclass(frozen=True)
class WeakModel:
    """A weaker model that guides: its configuration, and its evaluations an image.

    With `shared` weights it is another routing of the guided model, and takes no memory of its own.
    """

    config: DiTMoEConfig
    evaluations: int
    shared: bool = False


def passes_estimate(
    config: DiTMoEConfig, images: int, branches: int, count: int, weak: WeakModel | None = None
) -> Estimate:
    """Return what loading a model and `count` evaluations for a batch of `images` take, in each of the branches."""
    memory = BASELINE_BYTES + model_bytes(config) + activation_bytes(config, branches * images)
    effort = passes(config, images, count * branches, images) + loading(config)
    return _guided(Estimate(f"{count} passes of {images:,} images", effort, memory), images, images, weak)


def sampling_estimate(
    config: DiTMoEConfig, images: int, nfe: int, batch: int, weak: WeakModel | None = None
) -> Estimate:
    """Return what sampling takes: `nfe` evaluations an image, counting each branch of guidance, and those of `weak`."""
    memory = BASELINE_BYTES + model_bytes(config) + activation_bytes(config, min(2 * batch, 2 * images))
    effort = passes(config, images, nfe, batch) + loading(config)
    return _guided(Estimate(f"sampling {images:,} images", effort, memory), images, batch, weak)


def _guided(estimate: Estimate, images: int, batch: int, weak: WeakModel | None) -> Estimate:
    """Return an estimate with what a weaker model takes beside the guided one."""
    if weak is None:
        return estimate
    effort = estimate.effort + passes(weak.config, images, weak.evaluations, batch)
    if weak.shared:
        return replace(estimate, effort=effort)
    return replace(estimate, effort=effort + loading(weak.config), memory=estimate.memory + model_bytes(weak.config))


def loading(config: DiTMoEConfig) -> Effort:
    """Return the effort of reading and checking a whole model."""
    return Effort(nbytes=model_bytes(config))
