"""The dtype that ``auto`` is: chosen by the machine and a measurement of the checkpoint.

It is bf16 where the device has it in hardware, the model is wide enough to gain by it, and a prediction in bf16 differs
from that in fp32 by at most `MOST_DIFFERENCE` near the end of sampling; else fp32, which is told where it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_cli.diffusion.few_steps import own_sampling
from ditmoe_cli.diffusion.sampling import SampleSpec, sample_batch
from ditmoe_cli.diffusion.schedule import DEFAULT_SOLVER
from ditmoe_cli.diffusion.watchers import Watchers
from ditmoe_cli.errors import BadInputError
from ditmoe_cli.files.cache import keep_number, kept_numbers, torch_version
from ditmoe_cli.model.checkpoint import Checkpoint
from ditmoe_cli.model.dtypes import Dtype, relative_difference, torch_dtype_of
from ditmoe_cli.progress import phase

if TYPE_CHECKING:
    from torch import Tensor

    from ditmoe_cli.model.offload import OffloadedDiTMoE

MOST_DIFFERENCE = 0.03  # ‖v_bf16 - v_fp32‖ / ‖v_fp32‖ of predictions that ``auto`` accepts
NARROWEST = 384  # width from which products in bf16 are faster by more than casting costs
_IMAGES, _STEPS, _SEED = 4, 8, 0  # of the path, on whose last state the difference is measured
_FILE = "dtypes.json"  # of the cache
_NOT_FINITE = 1e30  # for predictions that are not finite, since JSON holds neither NaN nor infinity
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86-64 and, the last, of Arm


def has_bf16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether a device multiplies bf16 in hardware: CPUs by their flags, GPUs by compute capability 8.0.

    Takes torch for a GPU alone.
    """
    if device.startswith("cuda"):
        import torch

        with suppress(RuntimeError, AssertionError):  # of a GPU that is not there, which is told where it is used
            return torch.cuda.is_available() and torch.cuda.get_device_capability(torch.device(device)) >= (8, 0)
        return False
    with suppress(OSError):
        lines = cpuinfo.read_text(errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        return bool(_CPU_FLAGS & set(flags.split()))
    return False


def chosen_dtype(
    checkpoint: Checkpoint, device: str, measures: bool = True, note: Callable[[str], None] = lambda _: None
) -> Dtype:
    """Return the dtype that ``auto`` is for a checkpoint on a device; `note` takes why bf16 was measured not to do.

    The difference is measured where it is not known, and kept in the cache; without `measures`, as for dry runs, which
    take no torch, an unknown one counts as small, and a GPU as one that has bf16.
    """
    if checkpoint.config.hidden_size < NARROWEST:
        return "fp32"
    if (measures or not device.startswith("cuda")) and not has_bf16(device):
        return "fp32"
    known = kept_numbers(_FILE).get(_key(checkpoint, device))
    if known is None and measures:
        known = measured_difference(checkpoint, device, "bf16")
        keep_number(_FILE, _key(checkpoint, device), known)
    if known is None or known <= MOST_DIFFERENCE:
        return "bf16"
    far = "are not finite" if known == _NOT_FINITE else f"differ by {known:.1%}, more than {MOST_DIFFERENCE:.0%}"
    note(f"computing {checkpoint.name} in fp32: its predictions in bf16 {far}")
    return "fp32"


def measured_difference(checkpoint: Checkpoint, device: str, dtype: Dtype) -> float:
    """Return ‖v - v_fp32‖ / ‖v_fp32‖ of predictions v in a dtype near the end of sampling, where they differ most.

    The state is the last of 8 steps of the default solver in fp32, of 4 images without guidance; of a distilled
    checkpoint that of its own steps. Takes one evaluation in `dtype` and 9 in fp32, each with one block in memory.
    1e30 where predictions are not finite.
    """
    import torch

    from ditmoe_cli.model.offload import OffloadedDiTMoE

    def model(kind: Dtype) -> OffloadedDiTMoE:
        return OffloadedDiTMoE(checkpoint, torch.device(device), _IMAGES, _IMAGES, dtype=torch_dtype_of(kind))

    spec = _spec(checkpoint)
    with phase(f"comparing {dtype} with fp32", spec.steps + 2, "passes") as progress, torch.inference_mode():
        exact = model("fp32")
        try:
            x, t = _last_state(exact, spec, lambda: progress(1))
        except BadInputError:  # predictions in fp32 are not finite, which sampling will tell
            return _NOT_FINITE
        predictions = []
        for each in (exact, model(dtype)):
            predictions.append(_prediction(each, spec, x, t))
            progress(1)
    difference = relative_difference(predictions[1], predictions[0])
    return difference if math.isfinite(difference) else _NOT_FINITE


def _spec(checkpoint: Checkpoint) -> SampleSpec:
    config = checkpoint.config
    solver, steps = own_sampling(checkpoint) or (DEFAULT_SOLVER[config.sampler], _STEPS)
    return SampleSpec(_IMAGES, steps, 1.0, _SEED, solver, tuple(range(config.num_classes)))


def _last_state(model: OffloadedDiTMoE, spec: SampleSpec, progress: Callable[[], None]) -> tuple[Tensor, float]:
    """Return the state x (4, C, S, S) and the time of the last evaluation."""
    seen: list[tuple[Tensor, float]] = []

    def on_step(x: Tensor, t: float) -> None:
        seen[:] = [(x.clone(), t)]
        progress()

    sample_batch(model, spec, range(_IMAGES), Watchers(on_step=on_step))
    return seen[0]


def _prediction(model: OffloadedDiTMoE, spec: SampleSpec, x: Tensor, t: float) -> Tensor:
    """Return what a model predicts for states x (4, C, S, S) at a time; DDPM's learned variance is no prediction."""
    import torch

    labels = torch.tensor(spec.labels(range(_IMAGES)), device=model.device)
    return model.prepared([t], labels)(x, t)[:, : model.config.in_channels]


def _key(checkpoint: Checkpoint, device: str) -> str:
    return f"{checkpoint.fingerprint} {device.partition(':')[0]} torch {torch_version()}, at the end"
