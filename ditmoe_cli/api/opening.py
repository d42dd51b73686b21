"""Checkpoints and models from Python, and what is told of a checkpoint that is opened."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from ditmoe_cli.api.argument_checks import at_least
from ditmoe_cli.api.calling import AnyCheckpoint, AnyPath, Count, Device, checked, public
from ditmoe_cli.api.devices import checked_device
from ditmoe_cli.api.notes import note
from ditmoe_cli.errors import UsageError
from ditmoe_cli.model import checkpoint as model_checkpoint
from ditmoe_cli.model.checkpoint import Checkpoint, resolve_path
from ditmoe_cli.model.config import Given
from ditmoe_cli.model.dtypes import DTYPES, torch_dtype_of
from ditmoe_cli.routing import profile as routing_profile
from ditmoe_cli.routing.profile import RoutingProfile

if TYPE_CHECKING:
    import torch

    from ditmoe_cli.model.dit import DiTMoE

NOTHING_GIVEN = Given()


@public
def open_checkpoint(
    path: AnyPath,
    *,
    num_heads: Count | None = None,
    top_k: Count | None = None,
    sampler: Literal["rf", "ddpm"] | None = None,
    num_classes: Count | None = None,
    allow_unknown: bool = False,
) -> Checkpoint:
    """Open a checkpoint of any layout, without reading its weights.

    Args:
        path: a file, a folder, ``demo:digits``, or ``hf:OWNER/REPO/FILE@REVISION`` on the Hugging Face hub.
        num_heads: attention heads, for timm layouts of unusual width.
        top_k: experts per token; by default that of the file, else 2.
        sampler: ``"rf"`` or ``"ddpm"``; by default that of the file, else that which its final layer shows.
        num_classes: classes without the null class; as many as the label table has rows where there is none.
        allow_unknown: whether to open a file that leaves its head count open, with 0 heads, to look at but not to run.

    Raises:
        BadInputError: the file is missing, damaged, not a DiT-MoE, or leaves its head count open.
    """
    return model_checkpoint.open_checkpoint(
        resolve_path(path, note).absolute(),
        num_heads=num_heads,
        top_k=top_k,
        sampler=sampler,
        num_classes=num_classes,
        allow_unknown=allow_unknown,
    )


@public
def load_model(
    checkpoint: AnyCheckpoint,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "fp32",
    *,
    num_heads: Count | None = None,
    top_k: Count | None = None,
    sampler: Literal["rf", "ddpm"] | None = None,
    num_classes: Count | None = None,
    weights_memory: Annotated[int, at_least(0)] | None = None,
) -> DiTMoE:
    """Load any checkpoint that ditmoe reads or writes, ready to predict.

    Quantised weights stay packed in memory; beside them, unpacked ones are kept from the first prediction on, as far as
    `weights_memory` goes. Experts that are stored as differences are rebuilt, and take the memory of whole ones.

    Args:
        checkpoint: what `open_checkpoint` takes or returns.
        device: of the weights: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"`` for the one to use.
        dtype: what attention and experts compute in, ``"fp32"``, ``"bf16"`` or ``"fp16"`` or torch's, and what their
            weights are kept in where they are not quantised. Routing, norms, modulation and the stream between blocks
            stay fp32.
        num_heads, top_k, sampler, num_classes: as for `open_checkpoint`; not of a checkpoint that is opened already.
        weights_memory: bytes for unpacked weights beside the packed ones, 0 for none; half of the memory that is free
            when the model first predicts, where none is given. Predictions are the same.

    Raises:
        BadInputError: the checkpoint is missing, damaged, not a DiT-MoE, or holds NaN or infinite weights.
        UsageError: an argument is of another type or out of range, or the device cannot be used.
    """
    import torch

    from ditmoe_cli.formats.unpacked_weights import UnpackedWeights
    from ditmoe_cli.model.loading import build_model

    found = opened(checkpoint, Given(num_heads, top_k, sampler, num_classes), told=False)
    place = torch.device(checked_device(checked("device", str(device), Device)))
    return build_model(found, place, _dtype(dtype), UnpackedWeights(weights_memory))


def _dtype(dtype: object) -> torch.dtype:
    """Return torch's dtype of that name. Raises `UsageError` for others than models compute in."""
    for name in DTYPES:
        if dtype in (name, torch_dtype_of(name)):
            return torch_dtype_of(name)
    raise UsageError(f"⟨dtype⟩ {dtype}: choose {', '.join(DTYPES)}")


def opened(
    checkpoint: AnyCheckpoint, given: Given = NOTHING_GIVEN, *, told: bool = True, allow_unknown: bool = False
) -> Checkpoint:
    """Return a checkpoint, opened with what is given of it, and tell what there is to tell of it.

    With `allow_unknown`, a head count that cannot be told is left open.

    Raises `UsageError` where something is given of a checkpoint that is opened already.
    """
    if isinstance(checkpoint, Checkpoint):
        wanted = next((name for name, value in asdict(given).items() if value is not None), None)
        if wanted is not None:
            raise UsageError(f"⟨{wanted}⟩ has no effect on an opened checkpoint; give it to open_checkpoint")
        return checkpoint
    path = resolve_path(checkpoint, note).absolute()
    found = model_checkpoint.open_checkpoint(path, allow_unknown=allow_unknown, **asdict(given))
    if told:
        tell_of(found)
    return found


def tell_of(checkpoint: Checkpoint, *, first: bool = True) -> None:
    """Tell warnings of an opened checkpoint, and what is assumed of it, where that was not told `first` by others."""
    for message in checkpoint.notes if first else ():
        note(f"{checkpoint.name}: {message}")
    for warning in checkpoint.warnings:
        note(f"warning: {warning}")
    for assumption in checkpoint.assumptions if first else ():
        note(f"assuming {assumption}")


@public
def read_profile(path: AnyPath) -> RoutingProfile:
    """Open a routing profile. Its `arrays` are read when they are asked for.

    Raises `BadInputError` where the file is missing, damaged or of another schema.
    """
    return routing_profile.read_profile(Path(path))
