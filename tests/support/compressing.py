"""What the tests of compression share: applying plans to pico models, profiles, and a mixture written naively."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import Pico
from torch import Tensor, nn

from ditmoe_cli.compression.apply import apply
from ditmoe_cli.compression.calibrated import Calibrated
from ditmoe_cli.compression.joint import choosing
from ditmoe_cli.compression.plan import BlockPlan, CompressionPlan, Experts, Formats
from ditmoe_cli.compression.precision.uniform import plan_uniform
from ditmoe_cli.compression.replay import amplification, eliminations, guided, states
from ditmoe_cli.diffusion.sampling import SampleSpec
from ditmoe_cli.files.writer import Output
from ditmoe_cli.model.checkpoint import Checkpoint, open_checkpoint
from ditmoe_cli.model.config import DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.loading import build_model
from ditmoe_cli.model.moe import Observer
from ditmoe_cli.routing.calibrate import Run, calibrate
from ditmoe_cli.routing.calibration_settings import Calibration
from ditmoe_cli.routing.profile import RoutingProfile, read_profile

FORMATS = {4: "nf4", 8: "int8"}
EXPERT_OF = "blocks.{}.moe.gate.expert_of"


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, fresh for each example of a property test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def opened(pico: Pico, where: Path, name: str = "original.safetensors") -> Checkpoint:
    return open_checkpoint(pico.save(where / name))


def pruning(
    checkpoint: Checkpoint, keeps: Sequence[Sequence[int]], routers: str | Sequence[str] = "ghost"
) -> CompressionPlan:
    """Plan to keep given experts; `routers` is one mode, or one for each block."""
    modes = [routers] * len(keeps) if isinstance(routers, str) else routers
    blocks = tuple(BlockPlan(tuple(keep), mode) for keep, mode in zip(keeps, modes, strict=True))  # type: ignore[arg-type]
    return CompressionPlan("prune", checkpoint.fingerprint, options={"method": "by hand"}, stages=(Experts(blocks),))


def quantising(checkpoint: Checkpoint, formats: Mapping[str, str]) -> CompressionPlan:
    """Plan to round weights to the nearest values of formats."""
    return CompressionPlan("quantize", checkpoint.fingerprint, stages=(Formats(formats),))


def blocks_of(plan: CompressionPlan) -> tuple[BlockPlan, ...]:
    return plan.stage(Experts).blocks


def formats_of(plan: CompressionPlan) -> Mapping[str, str]:
    return plan.stage(Formats).formats


def applied(
    checkpoint: Checkpoint, plan: CompressionPlan | None, path: Path, profile: RoutingProfile | None = None
) -> Checkpoint:
    """Carry out a plan and open what it wrote."""
    apply(checkpoint, plan, Output(path), profile=profile)
    return open_checkpoint(path)


def profile_of(
    checkpoint: Checkpoint,
    name: str = "profile",
    *,
    images: int = 4,
    steps: int = 4,
    cfg: float = 1.5,
    bins: int = 2,
    reservoir: int = 64,
    fast: bool = False,
) -> RoutingProfile:
    """A small profile, kept beside the checkpoint."""
    solver = "euler" if checkpoint.config.sampler == "rf" else "ddim"
    spec = SampleSpec(images, steps, cfg, 1, solver, tuple(range(checkpoint.config.num_classes)))
    path = checkpoint.path.parent / f"{checkpoint.path.stem}.{name}.safetensors"
    return calibrated_once(checkpoint, Calibration(spec, bins, reservoir, 4, fast=fast), path)


_profiles: dict[tuple[str, DiTMoEConfig, Calibration], bytes] = {}


def calibrated_once(checkpoint: Checkpoint, settings: Calibration, path: Path) -> RoutingProfile:
    """What `calibrate` writes to `path`, computed once for equal checkpoints: equal work gives equal bytes."""
    key = checkpoint.fingerprint, checkpoint.config, settings
    if key in _profiles:
        assert not path.exists()
        path.write_bytes(_profiles[key])
        return read_profile(path)
    found = calibrate(checkpoint, settings, Run("cpu"), path)
    assert found is not None
    _profiles[key] = path.read_bytes()
    return found


def pruned(
    checkpoint: Checkpoint, keeps: Sequence[Sequence[int]], routers: str | Sequence[str], path: Path
) -> Checkpoint:
    return applied(checkpoint, pruning(checkpoint, keeps, routers), path)


def quantised(checkpoint: Checkpoint, bits: int, path: Path) -> Checkpoint:
    return applied(checkpoint, plan_uniform(checkpoint, FORMATS[bits]), path)


def stored(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as its dtype, shape and bytes, read without the code under test."""
    from safetensors.torch import load_file

    files = [checkpoint.path] if checkpoint.path.is_file() else sorted(checkpoint.path.glob("*.safetensors"))
    found = {}
    for file in files:
        for name, tensor in load_file(file).items():
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = (str(tensor.dtype), tuple(tensor.shape), data)
    return found


def state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.reader.tensor(name) for name in checkpoint.header.tensors}


def renumbered(name: str, keeps: Sequence[Sequence[int]]) -> str | None:
    """The name that a tensor has after pruning, None where its expert is dropped."""
    parts = name.split(".")
    if ".moe.experts." not in name:
        return name
    keep = list(keeps[int(parts[1])])
    expert = int(parts[4])
    return ".".join([*parts[:4], str(keep.index(expert)), *parts[5:]]) if expert in keep else None


def network(checkpoint: Checkpoint) -> DiTMoE:
    return build_model(checkpoint, torch.device("cpu"))


def outputs(model: DiTMoE, observer: Observer | None = None, images: int = 3) -> Tensor:
    """What a model says of the same few noisy images, labels and times."""
    config = model.config
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(images, config.in_channels, config.input_size, config.input_size, generator=generator)
    y = torch.arange(images) % (config.num_classes + 1)
    with torch.no_grad():
        result: Tensor = model(x, torch.linspace(0, 900, images), y, observer)
    return result


class NaiveMixture(nn.Module):
    """A block's mixture written out token by token.

    `logits_over` are the router rows that count in the softmax, `selectable` those that top-k may choose.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        block: int,
        top_k: int,
        logits_over: Sequence[int],
        selectable: Sequence[int],
    ) -> None:
        super().__init__()
        prefix = f"blocks.{block}.moe."
        self.tensors = {n.removeprefix(prefix): t.double() for n, t in tensors.items() if n.startswith(prefix)}
        self.top_k, self.logits_over, self.selectable = top_k, set(logits_over), set(selectable)

    def swiglu(self, stem: str, u: Tensor) -> Tensor:
        gate, up, down = (self.tensors[f"{stem}.{m}_proj.weight"] for m in ("gate", "up", "down"))
        hidden = gate @ u
        return down @ (hidden * torch.sigmoid(hidden) * (up @ u))

    def one(self, u: Tensor) -> Tensor:
        logits = self.tensors["gate.weight"] @ u
        weight = {row: float(logits[row].exp()) for row in self.logits_over}
        total = sum(weight.values())
        chosen = sorted(self.selectable, key=lambda row: -weight[row])[: self.top_k]
        routed = sum(weight[row] / total * self.swiglu(f"experts.{row}", u) for row in chosen)
        return routed + self.swiglu("shared_experts", u)

    def forward(self, u: Tensor, block: int, gamma: Tensor, observer: object, residual: object = None) -> Tensor:
        del block, gamma, observer, residual
        mixed = torch.stack([self.one(token) for token in u.reshape(-1, u.shape[-1]).double()])
        return mixed.reshape(u.shape).to(u.dtype)


def naive_outputs(pico: Pico, softmax_over: Sequence[Sequence[int]], select_from: Sequence[Sequence[int]]) -> Tensor:
    """Outputs of a pico model whose mixtures are naive ones, restricted to rows of its routers."""
    model = pico.model()
    for i, block in enumerate(model.blocks):
        block.moe = NaiveMixture(pico.state, i, pico.config.top_k, softmax_over[i], select_from[i])
    return outputs(model)


def calibrated(checkpoint: Checkpoint, profile: RoutingProfile) -> Calibrated:
    """A checkpoint and its profile, to compute on without a bar."""
    return Calibrated(checkpoint, profile, "cpu")


def silence_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have failing Cholesky factorisations report success and leave NaN, as a GPU's solver may."""
    honest = torch.linalg.cholesky_ex

    def silent(matrix: Tensor) -> tuple[Tensor, Tensor]:
        lower, failed = honest(matrix)
        if int(failed):
            lower[int(failed) - 1 :] = math.nan
        return lower.tril(), torch.zeros_like(failed)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", silent)


def measure_few_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """As many for the streams that carry errors as for what is replayed, so that both see the same."""
    for name in ("MEASURED", "REPLAYED", "SENT"):
        monkeypatch.setattr(guided, f"{name}_TOKENS", tokens)
    monkeypatch.setattr(amplification, "carrying_tokens", lambda _: tokens)
    monkeypatch.setattr(states, "JUDGED_TOKENS", tokens)
    monkeypatch.setattr(eliminations, "ELIMINATION_TOKENS", 8 * tokens)


def compress_on_few_tokens(monkeypatch: pytest.MonkeyPatch, tokens: int = 256) -> None:
    """Measure, try and fit on so many tokens: on 256 compressing a pico model takes about a second."""
    measure_few_tokens(monkeypatch, tokens)
    monkeypatch.setattr(states, "FEWEST_TOKENS", tokens)
    monkeypatch.setattr(states, "MOST_TOKENS", 2 * tokens)
    monkeypatch.setattr(choosing, "SEARCH_TOKENS", tokens)


def compress_in_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on few tokens, and try the least number of plans."""
    compress_on_few_tokens(monkeypatch)
    monkeypatch.setattr(choosing, "MOST_TRIED", 2)
    monkeypatch.setattr(choosing, "SHARES", (0.5,))
