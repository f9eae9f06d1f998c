"""What ComfyUI's ModelSave and CheckpointSave write for a model of this pack, read back bit by bit.

Stock module names behind ``model.diffusion_model.``. A quantized layer has the inner tensors of its weight under keys
of their own (model/layout_svdq.py), and in ``comfy_quant`` what is no tensor, as JSON. Bytes are in file order;
biases, 16-bit layers and INT8 codes as in the stock model. ``lora_down`` and ``lora_up`` hold what model/saving.py
could not put into the branch of a layer. Metadata is what the save node likes to write; nothing in it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.int4 import GROUP, PackedAWQ, PackedW4A4
from .flux_names import AWQSource, Int8Source, PlainSource, Source, W4A4Source
from .safetensors_file import Header, Reader, problem, read_bytes
from .tensor_set import (
    HALF,
    PLAIN,
    TensorSet,
    TensorTable,
    check_awq_groups,
    check_rank,
    check_table,
    int8_linears,
    int8_table,
    linear_shapes,
    part_shape,
    plain_linears,
    plain_table,
    read_config,
    read_int8,
    variant,
)
from .weights import AWQLinear, Checkpoint, FluxConfig, Layer, LowRank, PlainLayer, W4A4Linear

# Names of the three kinds of weights in ``comfy_quant``.
SVDQ_INT4 = "svdq_int4"
SVDQ_AWQ = "svdq_awq"
SVDQ_INT8 = "svdq_int8"
LORA_LEAVES = ("lora_down", "lora_up")
LOW_RANK_LEAVES = (*LORA_LEAVES, "weight_down", "weight_up", "weight_head_down", "weight_head_up")

_TELLING = ("weight_smooth", "weight_zeros")  # no other pack's quantized layers have these
_SAVE_AGAIN = "Save the model again"
_MOST_JSON = 1000  # bytes
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


def saved_prefix(header: Header) -> str | None:
    """What the names of the model's layers begin with if this is a saved model of this pack, else None."""
    return prefix_before(header, _TELLING)


def prefix_before(header: Header, telling: tuple[str, ...]) -> str | None:
    """What stands before the blocks' stock names, by a layer of theirs that has one of the leaves ``telling``."""
    for key in header.tensors:
        layer, _, leaf = key.rpartition(".")
        # A file of nunchaku.py may have INT8 layers under their stock names, without such a description.
        if leaf in telling and f"{layer}.comfy_quant" in header.tensors:
            for blocks in ("double_blocks.", "single_blocks."):
                prefix, found, rest = layer.partition(blocks)
                if found and rest.partition(".")[0].isdecimal():
                    return prefix
    return None


def build_saved(header: Header, reader: Reader) -> Checkpoint:
    """Check a saved model and return it as a checkpoint. Raises CheckpointError."""
    prefix = saved_prefix(header)
    keys = {key.removeprefix(prefix): key for key in header.tensors if key.startswith(prefix)}
    tensors = TensorSet(
        header.path,
        {name: header.tensors[key] for name, key in keys.items()},
        {name: (header.path, key) for name, key in keys.items()},
        incomplete="The file is incomplete: copy or save it again",
        convert=_SAVE_AGAIN,
        prefix=prefix,
    )
    config = read_config(tensors, lambda name: name)
    plain, int8 = plain_linears(tensors, config), int8_linears(tensors, config, ("comfy_quant", *LORA_LEAVES))
    layers = config.layers(plain, int8)
    check_table(tensors, config, _tensor_table(config, layers), lambda name: name.endswith(LORA_LEAVES), _SAVE_AGAIN)
    ranks = _check_layers(tensors, header, config, layers)
    others = len(header.tensors) - len(keys)
    note = f"{header.path}: {others} tensors of other models (VAE, text encoders), which this loader leaves alone"
    readers: dict[str, Callable[[str], Tensor]] = {}

    def get(name: str) -> Tensor:
        if not readers:
            readers[header.path] = reader(header.path)
        return readers[header.path](prefix + name)

    present = frozenset(keys)
    return Checkpoint(
        path=header.path,
        files=(header.path,),
        format="comfyui",
        variant=variant(header.path, header.metadata, config),
        precision="int4",
        ranks=ranks,
        dtype=_TORCH[next(info.dtype for name, info in tensors.infos.items() if name.endswith(_TELLING))],
        config=config,
        metadata=header.metadata,
        notes=(note,) if others else (),
        file_bytes=header.file_bytes,
        layer_names=tuple(layers),
        plain_linears=plain,
        int8_linears=int8,
        read_layer=lambda name: _read_layer(name, layers[name], get, present),
    )


# ---- structure


def _inner(source: W4A4Source) -> tuple[tuple[str, str], ...]:
    """For each part: the leaf of its codes, and what the leaves of its other tensors begin with."""
    last = ("weight", "weight_")
    return (last,) if len(source.parts) == 1 else (("weight_head_qdata", "weight_head_"), last)


def _tensor_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    hidden, expected = config.hidden_size, plain_table(config, layers) | int8_table(config, layers)
    shapes = linear_shapes(config)
    for name, source in layers.items():
        if isinstance(source, PlainSource):
            continue
        rows, columns = shapes[name]
        expected |= {
            f"{name}.bias": (PLAIN, (rows,)),
            f"{name}.comfy_quant": (("U8",), (None,)),
            f"{name}.lora_down": (PLAIN, (None, columns)),
            f"{name}.lora_up": (PLAIN, (rows, None)),
        }
        if isinstance(source, AWQSource):
            expected |= {
                f"{name}.weight": (("I32",), (rows // 4, hidden // 2)),
                f"{name}.weight_scale": (HALF, (None, rows)),
                f"{name}.weight_zeros": (HALF, (None, rows)),
            }
            continue
        if isinstance(source, Int8Source):
            continue
        for part, (codes, start) in zip(source.parts, _inner(source), strict=True):
            n, k = part_shape(part, config)
            expected |= {
                f"{name}.{codes}": (("I8",), (n, k // 2)),
                f"{name}.{start}scale": (HALF, (k // GROUP, n)),
                f"{name}.{start}smooth": (HALF, (k,)),
                f"{name}.{start}down": (HALF, (k, None)),
                f"{name}.{start}up": (HALF, (n, None)),
            }
    return expected


def _check_layers(tensors: TensorSet, header: Header, config: FluxConfig, layers: dict[str, Source]) -> dict[int, int]:
    """What the table leaves open. Returns rank -> number of W4A4 weights with it."""
    shapes = linear_shapes(config)
    ranks: dict[int, int] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    for name, source in layers.items():
        if isinstance(source, PlainSource):
            continue
        _check_lora(tensors, name)
        if isinstance(source, AWQSource):
            check_awq_groups(tensors, config, (f"{name}.weight_scale", f"{name}.weight_zeros"))
            kind = {"format": SVDQ_AWQ, "splits": source.splits}
        elif isinstance(source, Int8Source):
            kind = {"format": SVDQ_INT8}
        else:
            for _, start in _inner(source):
                rank = check_rank(tensors, f"{name}.{start}down", f"{name}.{start}up")
                ranks[rank] = ranks.get(rank, 0) + 1
            kind = {"format": SVDQ_INT4, "axis": source.axis, "unsigned": source.unsigned[-1]}
        descriptions[f"{name}.comfy_quant"] = kind | {"shape": list(shapes[name])}
    _check_descriptions(tensors, header, descriptions)
    return dict(sorted(ranks.items()))


def _check_lora(tensors: TensorSet, layer: str) -> None:
    names = [f"{layer}.{leaf}" for leaf in LORA_LEAVES]
    found = [name for name in names if name in tensors.infos]
    if len(found) == 1:
        raise tensors.error(found[0], "only one of lora_down and lora_up", "both", _SAVE_AGAIN)
    if found:
        rank, other = tensors.infos[names[0]].shape[0], tensors.infos[names[1]].shape[1]
        if rank != other or rank == 0:
            raise tensors.error(names[1], f"rank {other}", f"rank {rank or 1}, as lora_down", _SAVE_AGAIN)


def _check_descriptions(tensors: TensorSet, header: Header, expected: dict[str, dict[str, Any]]) -> None:
    """Everything in ``comfy_quant`` follows from the layer's name: it has to agree."""
    for name in expected:
        if tensors.infos[name].nbytes > _MOST_JSON:
            found, most = f"{tensors.infos[name].nbytes} bytes", f"at most {_MOST_JSON} bytes of JSON"
            raise tensors.error(name, found, most, _SAVE_AGAIN)
    contents = read_bytes(header, map(tensors.key, expected))
    for (key, content), (_, description) in zip(contents, expected.items(), strict=True):
        try:
            parsed = json.loads(content)
            agrees = {entry: parsed[entry] for entry in description} == description
        except (ValueError, RecursionError, TypeError, KeyError):
            agrees = False
        if not agrees:
            found = content.decode("utf-8", errors="backslashreplace")
            raise problem(header.path, key, found, json.dumps(description), f"{_SAVE_AGAIN} with this version")


# ---- reading


def _read_layer(name: str, source: Source, get: Callable[[str], Tensor], present: frozenset[str]) -> Layer:
    if isinstance(source, PlainSource):
        return PlainLayer(get(f"{name}.weight"), get(f"{name}.bias") if source.has_bias else None)
    lora = _read_lora(name, get, present)
    if isinstance(source, Int8Source):
        return read_int8(name, get, lora)
    bias = get(f"{name}.bias")
    if isinstance(source, AWQSource):
        weight = PackedAWQ(
            get(f"{name}.weight"), get(f"{name}.weight_scale"), get(f"{name}.weight_zeros"), source.splits
        )
        return AWQLinear(weight, bias, lora)
    parts = []
    for unsigned, (codes, start) in zip(source.unsigned, _inner(source), strict=True):
        scale, smooth, down, up = (get(f"{name}.{start}{leaf}") for leaf in ("scale", "smooth", "down", "up"))
        parts.append(PackedW4A4(get(f"{name}.{codes}"), scale, smooth, down, up, unsigned))
    return W4A4Linear(tuple(parts), source.axis, bias, lora)


def _read_lora(name: str, get: Callable[[str], Tensor], present: frozenset[str]) -> LowRank | None:
    down, up = (f"{name}.{leaf}" for leaf in LORA_LEAVES)
    return (get(down), get(up)) if down in present else None
