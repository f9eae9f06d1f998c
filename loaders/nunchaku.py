"""The tensor set of an SVDQuant INT4 FLUX checkpoint: recognised, checked against its table, and read layer by layer.

Both containers (the single file and the legacy folder, legacy.py) hold this set. Every size is derived from tensor
shapes; metadata is a hint that may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.int4 import GROUP, W8A8, PackedAWQ, PackedW4A4
from . import flux_names
from .flux_names import AWQSource, Int8Source, PlainSource, Source, W4A4Source
from .recognise import refuse_other_files
from .safetensors_file import Header, Reader, TensorInfo, problem
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
    plain_shapes,
    read_config,
    read_int8,
    variant,
)
from .weights import AWQLinear, Checkpoint, FluxConfig, Int8Linear, Layer, PlainLayer, W4A4Linear

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


def build_checkpoint(
    path: str, container: str, headers: list[Header], metadata: dict[str, str], reader: Reader
) -> Checkpoint:
    """Check the tensors of ``headers`` as one checkpoint and return it; ``metadata`` holds config and comfy_config."""
    tensors = _merge(path, headers)
    refuse_other_files(path, {tensors.key(name): info for name, info in tensors.infos.items()})
    config = read_config(tensors, _canonical_name)
    plain, int8 = plain_linears(tensors, config), int8_linears(tensors, config)
    layers = config.layers(plain, int8)
    ranks = _check_tensors(tensors, config, layers)
    notes = _check_metadata(path, metadata, config)
    scales = tensors.infos[next(name for name in tensors.infos if name.endswith(".wscales"))]

    readers: dict[str, Callable[[str], Tensor]] = {}

    def get(name: str) -> Tensor:
        file, key = tensors.stored[name]
        if file not in readers:
            readers[file] = reader(file)
        return readers[file](key)

    present = frozenset(tensors.infos)
    return Checkpoint(
        path=path,
        files=tuple(header.path for header in headers),
        format=container,
        variant=variant(path, metadata, config),
        precision="int4",
        ranks=ranks,
        dtype=_TORCH[scales.dtype],
        config=config,
        metadata=metadata,
        notes=tuple(notes),
        file_bytes=sum(header.file_bytes for header in headers),
        layer_names=tuple(layers),
        plain_linears=plain,
        int8_linears=int8,
        read_layer=lambda name: _read_layer(layers[name], get, present),
    )


# ---- structure


def _merge(path: str, headers: list[Header]) -> TensorSet:
    infos: dict[str, TensorInfo] = {}
    stored: dict[str, tuple[str, str]] = {}
    for header in headers:
        for key, info in header.tensors.items():
            name = flux_names.canonical_key(key)
            if name in infos:
                other_file, other_key = stored[name]
                raise problem(
                    header.path, key, f"the layer that {other_key} in {other_file} also is", "every layer once",
                    "Remove one of the two",
                )  # fmt: skip
            infos[name], stored[name] = info, (header.path, key)
    return TensorSet(path, infos, stored)


def _canonical_name(stock: str) -> str:
    blocks = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
    return blocks.get(stock) or flux_names.outer_layers(guidance=True)[stock].name


def tensor_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    """Every tensor that a checkpoint of this size may have; None stands for ranks and padded rows."""
    hidden = config.hidden_size
    plain = {_canonical_name(module): shape for module, shape in plain_shapes(config).items()} | linear_shapes(config)
    expected = int8_table(config, layers)
    for source in layers.values():
        if isinstance(source, W4A4Source):
            for name in source.parts:
                n, k = part_shape(name, config)
                expected |= {
                    f"{name}.qweight": (("I8",), (n, k // 2)),
                    f"{name}.wscales": (HALF, (k // GROUP, n)),
                    f"{name}.smooth": (HALF, (k,)),
                    f"{name}.smooth_orig": (HALF, (k,)),
                    f"{name}.bias": (HALF, (n,)),
                    f"{name}.lora_down": (HALF, (k, None)),
                    f"{name}.lora_up": (HALF, (n, None)),
                }
        elif isinstance(source, AWQSource):
            n = source.splits * hidden
            expected |= {
                f"{source.name}.qweight": (("I32",), (n // 4, hidden // 2)),
                f"{source.name}.wscales": (HALF, (None, n)),
                f"{source.name}.wzeros": (HALF, (None, n)),
                f"{source.name}.bias": (HALF, (n,)),
            }
        elif isinstance(source, PlainSource):
            shape = plain.get(source.name, (128,))
            expected[f"{source.name}.weight"] = (PLAIN, shape)
            if source.has_bias:
                expected[f"{source.name}.bias"] = (PLAIN, shape[:1])
    return expected


def _optional(name: str) -> bool:
    return name.endswith((".smooth_orig", ".lora_down", ".lora_up"))


def _check_tensors(tensors: TensorSet, config: FluxConfig, layers: dict[str, Source]) -> dict[int, int]:
    """Names, dtypes, shapes. Returns rank -> number of W4A4 weights with it."""
    only_known = "Use the file as it was published or convert the model again"
    check_table(tensors, config, tensor_table(config, layers), _optional, only_known)
    ranks: dict[int, int] = {}
    for source in layers.values():
        if isinstance(source, AWQSource):
            check_awq_groups(tensors, config, (f"{source.name}.wscales", f"{source.name}.wzeros"))
        elif isinstance(source, W4A4Source):
            for name in source.parts:
                rank = check_rank(tensors, *(f"{name}.{leaf}" for leaf in flux_names.LOW_RANK_LEAVES))
                ranks[rank] = ranks.get(rank, 0) + 1
    return dict(sorted(ranks.items()))


# ---- metadata


def _check_metadata(path: str, metadata: dict[str, str], config: FluxConfig) -> list[str]:
    """Invalid JSON and a layer count that tensors contradict are errors; everything else about metadata is a note."""
    parsed: dict[str, dict] = {}
    for key in ("config", "comfy_config", "quantization_config"):
        if key not in metadata:
            continue
        try:
            parsed[key] = json.loads(metadata[key])
            if not isinstance(parsed[key], dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            raise problem(
                path, f"metadata {key}", f"invalid JSON ({error})", "a JSON object",
                "Download the file again, or remove that metadata entry: it is not needed",
            ) from error  # fmt: skip
    notes = []
    if "config" not in parsed:
        notes.append(f"{path}: metadata config: found none, expected one; sizes were taken from the tensors instead")
    declared = parsed.get("config", {})
    for key, value in (("num_layers", config.depth), ("num_single_layers", config.depth_single_blocks)):
        if declared.get(key, value) != value:
            raise problem(
                path, f"metadata config {key}", f"{value} blocks in the file", f"{declared[key]}",
                "The file is incomplete: download or convert it again",
            )  # fmt: skip
    for key, value in (
        ("in_channels", config.in_channels),
        ("joint_attention_dim", config.context_in_dim),
        ("pooled_projection_dim", config.vec_in_dim),
        ("guidance_embeds", config.guidance_embed),
    ):
        if declared.get(key, value) != value:
            found = f"found {declared[key]}, but the tensors say {value}; they count"
            notes.append(f"{path}: metadata config {key}: {found}")
    return notes


# ---- reading


def _read_layer(source: Source, get: Callable[[str], Tensor], present: frozenset[str]) -> Layer:
    if isinstance(source, AWQSource):
        return _read_awq(source, get)
    if isinstance(source, PlainSource):
        return _read_plain(source, get)
    if isinstance(source, Int8Source):
        return read_int8(source.name, get)
    parts = tuple(
        _read_w4a4(name, unsigned, get, present) for name, unsigned in zip(source.parts, source.unsigned, strict=True)
    )
    biases = [layout.unpack_vector(get(f"{name}.bias")) for name in source.parts]
    bias = _sum_exactly(biases) if source.axis == 1 else torch.cat(biases)
    return W4A4Linear(parts, source.axis, bias)


def _read_w4a4(name: str, unsigned: bool, get: Callable[[str], Tensor], present: frozenset[str]) -> PackedW4A4:
    qweight, wscales = get(f"{name}.qweight"), get(f"{name}.wscales")
    if f"{name}.lora_down" in present:
        down, up = get(f"{name}.lora_down"), get(f"{name}.lora_up")
    else:
        down = wscales.new_empty(qweight.shape[1] * 2, 0)
        up = wscales.new_empty(qweight.shape[0], 0)
    return PackedW4A4(qweight, wscales, get(f"{name}.smooth"), down, up, unsigned)


def _read_awq(source: AWQSource, get: Callable[[str], Tensor]) -> AWQLinear:
    weight = PackedAWQ(
        qweight=get(f"{source.name}.qweight"),
        wscales=get(f"{source.name}.wscales"),
        wzeros=get(f"{source.name}.wzeros"),
        splits=source.splits,
    )
    # float32: a scale bias near -1 is stored near 0 after +1, with more bits than bf16 has near -1.
    bias = layout.deinterleave_rows(get(f"{source.name}.bias"), source.splits).float()
    return AWQLinear(weight, _add_to_scales(bias, source.splits, -1.0))


def _read_plain(source: PlainSource, get: Callable[[str], Tensor]) -> PlainLayer:
    weight = get(f"{source.name}.weight")
    bias = get(f"{source.name}.bias") if source.has_bias else None
    if source.swap_halves:
        weight, bias = swapped_halves(weight), swapped_halves(bias)
    return PlainLayer(weight, bias)


def swapped_halves(tensor: Tensor) -> Tensor:
    """Rows of a layer with ``PlainSource.swap_halves``, from the order of the file to that of the model and back."""
    return torch.cat(tensor.chunk(2)[::-1])


def _add_to_scales(bias: Tensor, splits: int, value: float) -> Tensor:
    """float32 bias [N] of a modulation layer, in BFL's order, with ``value`` added to its scale chunks."""
    chunks = bias.reshape(splits, -1).clone()
    chunks[1::3] += value  # 1 and 4 of six, 1 of three
    return chunks.reshape(-1)


def _sum_exactly(biases: list[Tensor]) -> Tensor:
    """The sum, in the stored type where that is exact (one of two is zero in published files), else in float32."""
    total = torch.stack([bias.float() for bias in biases]).sum(dim=0)
    rounded = total.to(biases[0].dtype)
    return rounded if torch.equal(rounded.float(), total) else total


# ---- writing


def stored_layer(source: Source, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored name -> tensor of one layer, the inverse of reading it; biases and scales in ``dtype``.

    A layer with a LoRA beside it has no such form: ``layer.lora`` is left out.
    """
    if isinstance(layer, AWQLinear):
        return {f"{source.name}.{leaf}": tensor for leaf, tensor in awq_leaves(layer.weight, layer.bias, dtype).items()}
    if isinstance(layer, Int8Linear):
        leaves = int8_leaves(layer.weight, layer.bias.to(dtype))
        return {f"{source.name}.{leaf}": tensor for leaf, tensor in leaves.items()}
    if isinstance(layer, PlainLayer):
        leaves = {"weight": layer.weight} if layer.bias is None else {"weight": layer.weight, "bias": layer.bias}
        return {f"{source.name}.{leaf}": swapped_halves(tensor) if source.swap_halves else tensor
                for leaf, tensor in leaves.items()}  # fmt: skip
    if layer.axis == 0:
        biases = layer.bias.split([part.n for part in layer.parts])
    else:  # the last part carries the only bias
        biases = [torch.zeros_like(layer.bias)] * (len(layer.parts) - 1) + [layer.bias]
    return {
        f"{name}.{leaf}": tensor
        for name, part, bias in zip(source.parts, layer.parts, biases, strict=True)
        for leaf, tensor in w4a4_leaves(part, bias.to(dtype)).items()
    }


def w4a4_leaves(packed: PackedW4A4, bias: Tensor) -> dict[str, Tensor]:
    """Leaf -> tensor of a stored W4A4 layer; bias: T [N], natural order, as stored (with the shift taken back)."""
    leaves = {
        "qweight": packed.qweight,
        "wscales": packed.wscales,
        "smooth": packed.smooth_factor,
        "smooth_orig": packed.smooth_factor,
        "bias": layout.pack_vector(bias),
    }
    return leaves | ({"lora_down": packed.proj_down, "lora_up": packed.proj_up} if packed.rank else {})


def int8_leaves(weight: W8A8, bias: Tensor) -> dict[str, Tensor]:
    """Leaf -> tensor of a stored INT8 layer; bias: T [N]."""
    tensors = (weight.q, weight.wscales, weight.smooth_factor, bias)
    return dict(zip(flux_names.INT8_LEAVES, tensors, strict=True))


def awq_leaves(packed: PackedAWQ, bias: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaf -> tensor of a stored modulation layer; bias: [N], in BFL's order and without the +1."""
    stored = layout.interleave_rows(_add_to_scales(bias.float(), packed.splits, 1.0), packed.splits).to(dtype)
    return {"qweight": packed.qweight, "wscales": packed.wscales, "wzeros": packed.wzeros, "bias": stored}
