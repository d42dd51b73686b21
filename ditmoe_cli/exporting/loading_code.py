"""Python that opens exported folders in other programs, as their model cards and docs/export.md show it."""

from __future__ import annotations

FILL = '''import json
from pathlib import Path

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig


def fill(model, folder):
    """Fill a torch model whose modules have the names of the folder's weights; they are unpacked."""
    settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    compressor = ModelCompressor.from_compression_config(CompressedTensorsConfig(**settings))
    apply_quantization_config(model, compressor.quantization_config)
    compressor.compress_model(model)
    weights = {}
    for file in Path(folder).glob("*.safetensors"):
        weights |= load_file(file)
    model.load_state_dict(weights, assign=True)
    compressor.decompress_model(model)
'''
LINEAR = '''import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from safetensors import safe_open


def linear(path, name):
    """Return the linear layer `name` of a file, as blocks.0.moe.experts.3.up_proj, its weight packed."""
    with safe_open(path, "pt") as file:
        names = [key for key in file.keys() if key.startswith(f"{name}.")]
        stored = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in names}
    weight, bias = stored.pop("weight"), stored.pop("bias", None)
    if "SCB" in stored:  # int8
        out, columns = weight.shape
        layer = Linear8bitLt(columns, out, bias=bias is not None, has_fp16_weights=False)
        layer.weight = Int8Params(weight, requires_grad=False, CB=weight, SCB=stored["SCB"])
    else:  # nf4, fp4
        packed = Params4bit.from_prequantized(weight, stored, device="cpu")
        out, columns = packed.quant_state.shape
        layer = Linear4bit(columns, out, bias=bias is not None)
        layer.weight = packed
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias)
    return layer
'''


def pipeline(folder: str) -> str:
    """Return the Python that opens the folder of a pipeline and samples an image."""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)\n"
        "image = pipeline(class_labels=[0]).images[0]\n"
    )


def sdnq_pipeline(folder: str) -> str:
    """Return the same where SDNQ is needed too."""
    return f"# pip install diffusers sdnq accelerate\n{pipeline(folder)}"


def compressed_tensors(folder: str) -> str:
    """Return the Python that fills a model with the weights of a folder that compressed-tensors reads."""
    return f"{FILL}\n\nfill(model, {folder!r})  # a torch model of DiT-MoE, as github.com/feizc/DiT-MoE defines it\n"


def bitsandbytes(folder: str) -> str:
    """Return the Python that makes layers of bitsandbytes of the files of a folder."""
    return f"{LINEAR}\n\nlayer = linear(file, name)  # a safetensors file of {folder!r}, and a layer in it\n"
