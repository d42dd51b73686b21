"""Train the embedded demo checkpoint: a DiT-MoE on scikit-learn's 8x8 digits, by rectified flow.

    python examples/train_demo.py --output digits.safetensors

Trains on one core in a few minutes, prints the Fréchet distance of the EMA model's samples to the real digits
beside that of two random halves of the real set, and writes fp16 safetensors under upstream tensor names.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ditmoe_cli.diffusion.forward_process import interpolate, velocity_target
from ditmoe_cli.diffusion.sampling import SampleSpec, batches, sample_batch
from ditmoe_cli.evaluation.scores.feature_statistics import feature_statistics
from ditmoe_cli.evaluation.scores.frechet import frechet_distance
from ditmoe_cli.files.header import TensorInfo
from ditmoe_cli.files.names import natural_key
from ditmoe_cli.files.provenance import Card, Provenance
from ditmoe_cli.files.reader import dtype_code, tensor_bytes
from ditmoe_cli.files.writer import Output, one_by_one
from ditmoe_cli.model.config import BlockConfig, DiTMoEConfig
from ditmoe_cli.model.dit import DiTMoE
from ditmoe_cli.model.embedders import sincos_position_embedding

GREY_LEVELS = 16
CLASS_DROPOUT = 0.1
BALANCE_ALPHA = 0.01
EMA_DECAY = 0.999

CONFIG = DiTMoEConfig(
    input_size=8,
    patch_size=2,
    in_channels=1,
    out_channels=2,
    hidden_size=64,
    depth=4,
    num_heads=4,
    num_classes=10,
    top_k=2,
    attention="timm",
    sampler="rf",
    blocks=(BlockConfig(router_rows=8, expert_widths=(256,) * 8, shared_width=128),) * 4,
)


def initialise(model: DiTMoE) -> None:
    """Initialise as upstream does: Xavier for matrices, zeros for modulation and output."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name.startswith(("t_embedder.mlp", "y_embedder")) and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() < 2 or "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
        else:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))
    side = CONFIG.input_size // CONFIG.patch_size
    model.pos_embed.data.copy_(sincos_position_embedding(CONFIG.hidden_size, side))


def flow_loss(model: DiTMoE, images: Tensor, labels: Tensor) -> Tensor:
    """Return the velocity's squared error at t = sigmoid(N(0, 1)) plus the scaled balance loss."""
    t = torch.randn(len(images)).sigmoid()
    noise = torch.randn_like(images)
    dropped = torch.rand(len(labels)) < CLASS_DROPOUT
    y = torch.where(dropped, CONFIG.num_classes, labels)
    out, balance = model.forward_with_balance_loss(interpolate(images, noise, t), t, y)
    error = out[:, : CONFIG.in_channels] - velocity_target(images, noise)
    return error.square().mean() + BALANCE_ALPHA * balance


def train(images: Tensor, labels: Tensor, steps: int, batch: int, rate: float) -> DiTMoE:
    """Train with AdamW under a cosine schedule; return the EMA of the weights."""
    model = DiTMoE(CONFIG)
    initialise(model)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch,))
        loss = flow_loss(model, images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        if step % 500 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return ema.eval()


def grey(pixels: Tensor) -> Tensor:
    """Return flat grey levels 0..16 of pixel values in [-1, 1]."""
    return ((pixels.clamp(-1, 1) + 1) / 2 * GREY_LEVELS).round().flatten(1).double()


def report(model: DiTMoE, images: Tensor) -> None:
    """Print Fréchet distances: samples to the real digits, and two random halves of them to each other."""
    spec = SampleSpec(len(images), steps=20, cfg=1.0, seed=1, solver="euler", classes=tuple(range(10)))
    sampled = torch.cat([sample_batch(model, spec, list(chunk)) for chunk in batches(spec.images, 256)])
    real, fake = grey(images), grey(sampled)
    halves = real[torch.randperm(len(real))].chunk(2)
    distance = frechet_distance(feature_statistics(fake.numpy()), feature_statistics(real.numpy()))
    floor = frechet_distance(feature_statistics(halves[0].numpy()), feature_statistics(halves[1].numpy()))
    print(f"Fréchet distance to the real digits {distance:.2f}; two random halves of them {floor:.2f}")


def save(model: DiTMoE, path: Path) -> None:
    """Write the weights in fp16 with configuration and card in the metadata."""
    state = {name: value.half() for name, value in model.state_dict().items()}
    infos = [
        TensorInfo(name, dtype_code(state[name].dtype, name), tuple(state[name].shape))
        for name in sorted(state, key=natural_key)
    ]
    provenance = Provenance(CONFIG.to_json(), card=Card(extractor="pixels", grey_levels=GREY_LEVELS))
    jobs = one_by_one(infos, lambda info: tensor_bytes(state[info.name]))
    size = Output(path, force=True).write(infos, jobs, provenance, ())
    print(f"{path}: {size:,} bytes, {sum(info.numel for info in infos):,} parameters")


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("digits.safetensors"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / (GREY_LEVELS / 2) - 1
    model = train(images, torch.tensor(digits.target), options.steps, options.batch, options.rate)
    report(model, images)
    save(model, options.output)


if __name__ == "__main__":
    main()
