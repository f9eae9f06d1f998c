"""Checkpoint files for tests: tiny valid ones, and valid ones with something changed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from svdq.cli.synth import synth
from svdq.kernels.int4 import PackedW4A4
from svdq.loaders import PlainLayer, W4A4Linear, open_checkpoint

Tensors = dict[str, Tensor]
Metadata = dict[str, str]

# The original project's second naming, written down independently of loaders/flux_names.py.
_SECOND_LEAVES = {
    "lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig",
}  # fmt: skip
_SECOND_LAYERS = {
    "transformer_blocks": {
        "qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.add_qkv_proj", "out_proj": "attn.to_out.0",
        "out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2",
        "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2", "norm_q": "attn.norm_q",
        "norm_k": "attn.norm_k", "norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k",
    },
    "single_transformer_blocks": {
        "qkv_proj": "attn.to_qkv", "out_proj": "attn.to_out", "norm_q": "attn.norm_q", "norm_k": "attn.norm_k",
    },
}  # fmt: skip


def second_name(key: str) -> str:
    """A stored key in the second naming."""
    block, _, rest = key.partition(".")
    if block not in _SECOND_LAYERS:
        return key
    index, _, rest = rest.partition(".")
    layer, _, leaf = rest.rpartition(".")
    return f"{block}.{index}.{_SECOND_LAYERS[block].get(layer, layer)}.{_SECOND_LEAVES.get(leaf, leaf)}"


def tiny(folder: Path, **options: Any) -> Path:
    """A tiny synthetic checkpoint in ``folder``; options as for ``synth``."""
    path = folder / f"tiny-{len(list(folder.iterdir()))}.safetensors"
    synth(path, scale="tiny", **options)
    return path


def read_all(path: Path) -> tuple[Tensors, Metadata]:
    """Every tensor and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def changed(path: Path, change: Callable[[Tensors, Metadata], Any], name: str = "changed.safetensors") -> Path:
    """A copy of ``path`` in the same folder after ``change`` has edited its tensors and metadata in place."""
    tensors, metadata = read_all(path)
    change(tensors, metadata)
    target = path.with_name(name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target, metadata or None)
    return target


def save_as_comfyui(path: Path, target: Path, prefix: str = "model.diffusion_model.") -> Path:
    """What ComfyUI's ModelSave writes for the model of a checkpoint, written down independently of model/saving.py."""
    tensors: Tensors = {}

    def put(name: str, **leaves: Tensor) -> None:
        tensors.update({f"{prefix}{name}.{leaf}": tensor.contiguous() for leaf, tensor in leaves.items()})

    def part_tensors(part: PackedW4A4, codes: str, start: str) -> Tensors:
        rest = {"scale": part.wscales, "smooth": part.smooth_factor, "down": part.proj_down, "up": part.proj_up}
        return {codes: part.qweight} | {start + leaf: tensor for leaf, tensor in rest.items()}

    for name, layer in open_checkpoint(path).layers():
        if isinstance(layer, PlainLayer):
            put(name, weight=layer.weight, **({} if layer.bias is None else {"bias": layer.bias}))
            continue
        if isinstance(layer, W4A4Linear):
            *head, last = layer.parts
            for part in head:
                put(name, **part_tensors(part, "weight_head_qdata", "weight_head_"))
            put(name, **part_tensors(last, "weight", "weight_"))
            kind = {"format": "svdq_int4", "axis": layer.axis, "unsigned": last.act_unsigned}
        else:
            weight = layer.weight
            put(name, weight=weight.qweight, weight_scale=weight.wscales, weight_zeros=weight.wzeros)
            kind = {"format": "svdq_awq", "splits": weight.splits}
        text = json.dumps(kind | {"shape": list(layer.shape)}).encode()
        put(name, bias=layer.bias, comfy_quant=torch.frombuffer(bytearray(text), dtype=torch.uint8))
    save_file(tensors, target)
    return target


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a safetensors file, and the data behind it."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A file with exactly this header and data, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
