"""Uniform quantisation: one format for every expert, shared and attention matrix. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from ditmoe_cli.checkpoint.formats import Format, is_quantizable
from ditmoe_cli.compression.plan import CompressionPlan
from ditmoe_cli.errors import BadInputError, UsageError
from ditmoe_cli.model.checkpoint import Checkpoint, is_compressible

FORMAT_OF_BITS: Mapping[int, Format] = {4: "nf4", 8: "int8"}


def format_of_bits(bits: int) -> Format:
    """Return the format of a width. Raises `UsageError` for a width without one."""
    if bits not in FORMAT_OF_BITS:
        raise UsageError(f"--bits {bits}: choose 4 (NF4, blocks of 64) or 8 (int8, a scale a row)")
    return FORMAT_OF_BITS[bits]


def plan_uniform(checkpoint: Checkpoint, bits: int) -> CompressionPlan:
    """Plan to store all compressible weights in the format of `bits`.

    Router, embedders, norms, modulation and biases stay as they are. Raises `BadInputError` where weights are
    quantised already.
    """
    fmt = format_of_bits(bits)
    planned = [weight for weight in checkpoint.weights.values() if is_compressible(weight.info)]
    packed = next((weight for weight in planned if weight.format is not None), None)
    if packed is not None:
        raise BadInputError(
            f"{checkpoint.path}: {packed.info.name!r} is {packed.format} already; quantise the checkpoint that it "
            "came from"
        )
    formats = {weight.info.name: fmt for weight in planned if is_quantizable(weight.info)}
    if not formats:
        raise BadInputError(f"{checkpoint.path}: holds no fp16, bf16 or fp32 matrix that could be stored as {fmt}")
    return CompressionPlan("quantize", checkpoint.fingerprint, options={"bits": bits}, formats=formats)
