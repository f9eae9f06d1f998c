"""``dequantize``: the dense weights that a checkpoint stands for, under ComfyUI's stock FLUX names."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..loaders.weights import Layer

DTYPES = ("bf16", "fp16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="SVDQuant INT4 checkpoint: a .safetensors file or a legacy folder")
    parser.add_argument("out", metavar="OUT", help="the .safetensors file to write, 3.5 times as large in 16 bits")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights written; default: bf16")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    from .console import StatusLine

    started = time.monotonic()
    status = StatusLine()
    nbytes = dequantize(
        args.file, args.out, args.dtype, args.force,
        progress=lambda done, total: status.update(f"{args.out}: {done / total:4.0%}"),
    )  # fmt: skip
    status.clear()
    print(f"{args.out}: {nbytes / 1e6:,.1f} MB ({args.dtype}) in {time.monotonic() - started:.1f} s")
    return 0


def dequantize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: str = "bf16",
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> int:
    """Write the effective weights of the checkpoint ``path`` to ``out`` and return the number of bytes written.

    Stock ComfyUI FLUX with them computes what the quantized model computes but for activation quantization: low-rank
    and smoothing are multiplied in, biases behind a GELU are those of the ordinary layer, modulation is in stock order.
    One layer at a time is in memory, and computed on ``device``: a GPU sums low-rank products in another order, which
    moves a few weights by one bit. Raises CheckpointError if the checkpoint cannot be read or ``out`` not be written.
    """
    import torch

    from ..loaders import open_checkpoint
    from ..loaders.safetensors_file import mapped_reader
    from ..loaders.tensor_set import VARIANT
    from ..loaders.weights import on_device
    from ..loaders.write import Spec, check_not_read, safetensors_writer

    target = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[dtype]
    # A mapping for each tensor: when a layer is dropped, its part of the file leaves memory with it.
    checkpoint = open_checkpoint(path, lambda file: lambda key: mapped_reader(file)(key))
    check_not_read(out, checkpoint.files)
    specs: dict[str, Spec] = {}
    for name, layer in checkpoint.layers():
        specs[f"{name}.weight"] = Spec(target, layer.shape)
        if layer.bias is not None:
            specs[f"{name}.bias"] = Spec(target, layer.shape[:1])
    metadata = {
        "format": "pt",
        "modelspec.architecture": "flux-1",
        "svdq.source": os.path.basename(os.path.abspath(path)),
        "svdq.source_format": checkpoint.format,
        VARIANT: checkpoint.variant,
        "svdq.note": "effective weights of an SVDQuant INT4 checkpoint: its quality, not that of the original model",
    }
    with safetensors_writer(out, specs, metadata, force) as write:
        for done, (name, layer) in enumerate(checkpoint.layers(), start=1):
            weight, bias = effective(on_device(layer, device), target)
            write(f"{name}.weight", weight)
            if bias is not None:
                write(f"{name}.bias", bias)
            progress(done, len(checkpoint.layer_names))
    return Path(out).stat().st_size


def effective(layer: Layer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias or None) of the ordinary dense layer that ``layer`` stands for, in ``dtype``."""
    import torch

    from ..kernels import reference
    from ..loaders.weights import Int8Linear, PlainLayer, W4A4Linear

    if isinstance(layer, PlainLayer):
        return layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
    first = dtype if layer.lora is None else torch.float32
    bias = layer.bias
    if isinstance(layer, W4A4Linear):
        weight, shift_term = reference.dequantize_parts(layer.parts, layer.axis, first)
        bias = bias.float() if shift_term is None else bias.float() + shift_term
    elif isinstance(layer, Int8Linear):
        weight = reference.dequantize_w8a8(layer.weight, first)
    else:
        weight = reference.dequantize_packed_awq(layer.weight, first)
    if layer.lora is not None:
        down, up = layer.lora
        weight += up.float() @ down.float()
    return weight.to(dtype), bias.to(dtype)
