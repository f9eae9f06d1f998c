"""Checkpoints with INT8 layers, made of those without."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from files import read_all
from safetensors.torch import save_file

from svdq.cli.dequantize import effective
from svdq.loaders import open_checkpoint
from svdq.loaders.flux_names import W4A4Source
from svdq.loaders.nunchaku import int8_leaves
from svdq.quantizer import solve

# A linear behind a GELU, one with two parts, and two modulation layers, one of them in a block of nothing else in INT8.
NAMES = (
    "double_blocks.0.img_mlp.2",
    "double_blocks.1.txt_mod.lin",
    "single_blocks.0.linear2",
    "single_blocks.1.modulation.lin",
)


def with_int8(path: Path, names: Collection[str], out: Path) -> Path:
    """``out``: the single file ``path`` with the linears ``names``, by their stock names, in INT8."""
    tensors, metadata = read_all(path)
    checkpoint = open_checkpoint(path)
    sources = checkpoint.sources
    for name in names:
        weight, bias = effective(checkpoint.layer(name), checkpoint.dtype)
        smooth = solve.smooth_factor(solve.channel_span([weight]), dtype=checkpoint.dtype)
        leaves = int8_leaves(solve.quantize_w8a8(weight, smooth), bias)
        source = sources[name]
        gone = tuple(f"{stored}." for stored in (source.parts if isinstance(source, W4A4Source) else (source.name,)))
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(gone)}
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    save_file(tensors, out, metadata)
    return out
