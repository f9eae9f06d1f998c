"""SVDQuant FLUX files in the layouts of comfy-kitchen, ComfyUI's kernel library: written from a checkpoint, read back.

Stock module names. A quantized layer has ``comfy_quant``, JSON that names its format, and row-major tensors:

    svdquant_w4a4  weight int8 [N, K / 2], weight_scale [K / 64, N], smooth_factor [K], proj_down [K, R], proj_up [N, R]
    awq_w4a16      weight int8 [N, K / 2], weight_scale, weight_zeros [K / 64, N]: w = (code - 8) * scale + zero

with the even column in the low half of a byte. Sources: comfy_kitchen/tensor/svdquant_w4a4.py and awq_w4a16.py, and the
format pages of Comfy-Org/comfy-quants. What does not fit:

* ``linear1`` and ``linear2`` are one layer there. Both parts of ``linear1`` have the same smoothing factors (or there
  is no such form), low-rank branches stand side by side, and ``ranks`` in the JSON says which is whose.
* Activation codes are signed or unsigned for a whole layer, so the fc2 part of ``linear2`` becomes signed: its
  activations are rounded twice as coarsely, and its bias is that of the ordinary layer.
* INT8 layers there have no smoothing factors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.int4 import AWQ, GROUP, RANK_MULTIPLE, SHIFT, W4A4
from .flux_names import AWQSource, PlainSource, Source
from .safetensors_file import Header, Reader, problem, read_bytes
from .saved import prefix_before
from .tensor_set import (
    HALF,
    PLAIN,
    TensorSet,
    TensorTable,
    check_rank,
    check_table,
    layer_shape,
    part_shape,
    plain_linears,
    plain_table,
    read_config,
    variant,
)
from .weights import AWQLinear, Checkpoint, FluxConfig, Int8Linear, Layer, PlainLayer, W4A4Linear

SVDQUANT = "svdquant_w4a4"
AWQ_W4A16 = "awq_w4a16"
LOW_RANK_LEAVES = ("proj_down", "proj_up")

_TELLING = ("smooth_factor",)
_CENTRE = 8  # codes stand for their distance from it
_CONVERT = "Convert the model again"
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}


# ---- writing


def kitchen_layer(layer: W4A4Linear | AWQLinear | Int8Linear) -> dict[str, Tensor] | None:
    """Leaf -> tensor of one layer, ``layer.lora`` left out; None if it has no such form."""
    if isinstance(layer, Int8Linear):
        return None  # comfy-kitchen's INT8 layouts have no smoothing
    if isinstance(layer, AWQLinear):
        weight = layer.weight.unpack()
        zeros = (weight.wzeros.float() + _CENTRE * weight.wscales.float()).to(weight.wzeros.dtype)
        return {
            "weight": _pairs(weight.code),
            "weight_scale": weight.wscales.t(),
            "weight_zeros": zeros.t(),
            "bias": layer.bias,
            "comfy_quant": _as_tensor({"format": AWQ_W4A16, "group_size": GROUP}),
        }
    parts = [part.unpack() for part in layer.parts]
    described: dict[str, Any] = {"format": SVDQUANT, "act_unsigned": parts[-1].act_unsigned and len(parts) == 1}
    bias = layer.bias
    if len(parts) > 1:
        described["ranks"] = [part.proj_down.shape[0] for part in parts]
    if layer.axis == 0:
        smooth, downs, ups = parts[0].smooth_factor, torch.cat([p.proj_down for p in parts]), [p.proj_up for p in parts]
        if not all(torch.equal(part.smooth_factor, smooth) for part in parts):
            return None
        up = torch.block_diag(*ups)
    else:
        smooth, up = torch.cat([p.smooth_factor for p in parts]), torch.cat([p.proj_up for p in parts], dim=1)
        downs = torch.block_diag(*(p.proj_down for p in parts))
        # float32, so that the way back finds the stored bias again.
        bias = (bias.double() + _shift_term(parts[-1])).float()
    return {
        "weight": _pairs(torch.cat([part.q for part in parts], dim=layer.axis)),
        "weight_scale": torch.cat([part.wscales for part in parts], dim=layer.axis).t(),
        "smooth_factor": smooth,
        "proj_down": downs.t(),
        "proj_up": up,
        "bias": bias,
        "comfy_quant": _as_tensor(described),
    }


def _as_tensor(described: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    """Codes [N, K] as int8 [N, K / 2]."""
    return ((codes[:, 0::2] & 0x0F) | (codes[:, 1::2] << 4)).view(torch.int8)


def _codes(pairs: Tensor) -> Tensor:
    """int8 [N, K] in -8..7 of int8 [N, K / 2]."""
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)


def _shift_term(part: W4A4) -> Tensor:
    """float64 [N]: what SHIFT on the input adds to the output of the 4-bit branch."""
    scales = part.wscales.double()
    inverse = part.smooth_factor.double().reciprocal().reshape(-1, GROUP)
    q = part.q.double().reshape(len(scales), -1, GROUP)
    return SHIFT * ((q * inverse).sum(dim=2) * scales).sum(dim=1)


# ---- reading


def kitchen_prefix(header: Header) -> str | None:
    """What the names of the model's layers begin with if this is such a file, else None."""
    return prefix_before(header, _TELLING)


def build_kitchen(header: Header, reader: Reader) -> Checkpoint:
    """Check such a file and return it as a checkpoint. Raises CheckpointError."""
    prefix = kitchen_prefix(header)
    keys = {key.removeprefix(prefix): key for key in header.tensors if key.startswith(prefix)}
    tensors = TensorSet(
        header.path,
        {name: header.tensors[key] for name, key in keys.items()},
        {name: (header.path, key) for name, key in keys.items()},
        convert=_CONVERT,
        prefix=prefix,
    )
    config = read_config(tensors, lambda name: name)
    plain = plain_linears(tensors, config)
    layers = config.layers(plain)
    check_table(tensors, config, _tensor_table(config, layers), lambda name: False, _CONVERT)
    ranks = _read_ranks(tensors, header, layers)
    read: list[Callable[[str], Tensor]] = []

    def get(name: str) -> Tensor:
        if not read:
            read.append(reader(header.path))
        return read[0](prefix + name)

    counts: dict[int, int] = {}
    for parts in ranks.values():
        for rank in parts:
            counts[rank.stop - rank.start] = counts.get(rank.stop - rank.start, 0) + 1
    return Checkpoint(
        path=header.path,
        files=(header.path,),
        format="comfy-kitchen",
        variant=variant(header.path, header.metadata, config),
        precision="int4",
        ranks=dict(sorted(counts.items())),
        dtype=_TORCH[next(info.dtype for name, info in tensors.infos.items() if name.endswith(".weight_scale"))],
        config=config,
        metadata=header.metadata,
        notes=(),
        file_bytes=header.file_bytes,
        layer_names=tuple(layers),
        plain_linears=plain,
        read_layer=lambda name: _read_layer(name, layers[name], config, ranks.get(name, ()), get),
    )


def _tensor_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    expected = plain_table(config, layers)
    for name, source in layers.items():
        if isinstance(source, PlainSource):
            continue
        n, k = layer_shape(source, config)
        expected |= {
            f"{name}.weight": (("I8",), (n, k // 2)),
            f"{name}.weight_scale": (HALF, (k // GROUP, n)),
            f"{name}.bias": (PLAIN, (n,)),
            f"{name}.comfy_quant": (("U8",), (None,)),
        }
        if isinstance(source, AWQSource):
            expected[f"{name}.weight_zeros"] = (HALF, (k // GROUP, n))
        else:
            expected[f"{name}.smooth_factor"] = (HALF, (k,))
            expected |= {f"{name}.proj_down": (HALF, (k, None)), f"{name}.proj_up": (HALF, (n, None))}
    return expected


def _read_ranks(tensors: TensorSet, header: Header, layers: dict[str, Source]) -> dict[str, tuple[slice, ...]]:
    """Stock W4A4 layer -> for each of its parts, which low-rank columns are its own. Checks all descriptions."""
    described = [name for name, source in layers.items() if not isinstance(source, PlainSource)]
    contents = read_bytes(header, (tensors.key(f"{name}.comfy_quant") for name in described))
    ranks: dict[str, tuple[slice, ...]] = {}
    for name, (key, content) in zip(described, contents, strict=True):
        source = layers[name]
        if isinstance(source, AWQSource):
            expected: dict[str, Any] = {"format": AWQ_W4A16, "group_size": GROUP}
        else:
            expected = {"format": SVDQUANT, "act_unsigned": source.unsigned == (True,)}
            total = check_rank(tensors, f"{name}.proj_down", f"{name}.proj_up")
        try:
            found = json.loads(content)
            agrees = {entry: found.get(entry, False) for entry in expected} == expected
            if agrees and not isinstance(source, AWQSource):
                ranks[name] = _slices(found.get("ranks"), len(source.parts), total)
        except (ValueError, RecursionError, TypeError, AttributeError):
            agrees = False
        if not agrees:
            text = content[:1000].decode("utf-8", errors="backslashreplace")
            raise problem(header.path, key, text, json.dumps(expected), _CONVERT)
    return ranks


def _slices(ranks: object, parts: int, total: int) -> tuple[slice, ...]:
    """Of the columns of each part; without ``ranks`` each has all of them. Raises ValueError."""
    if parts == 1 or ranks is None:
        return (slice(0, total),) * parts
    if not isinstance(ranks, list) or len(ranks) != parts or any(type(r) is not int or r < 0 for r in ranks):
        raise ValueError(f"ranks {ranks}")
    if sum(ranks) != total or any(rank % RANK_MULTIPLE for rank in ranks):
        raise ValueError(f"ranks {ranks} of {total} columns")
    starts = [sum(ranks[:index]) for index in range(parts)]
    return tuple(slice(start, start + rank) for start, rank in zip(starts, ranks, strict=True))


def _read_layer(
    name: str, source: Source, config: FluxConfig, ranks: tuple[slice, ...], get: Callable[[str], Tensor]
) -> Layer:
    """In file order of the other formats: copies."""
    if isinstance(source, PlainSource):
        return PlainLayer(get(f"{name}.weight"), get(f"{name}.bias") if source.has_bias else None)
    codes, scales, bias = _codes(get(f"{name}.weight")), get(f"{name}.weight_scale").t(), get(f"{name}.bias")
    if isinstance(source, AWQSource):
        # Nibbles 8..15 came out as -8..-1.
        zeros = (get(f"{name}.weight_zeros").t().float() - _CENTRE * scales.float()).to(scales.dtype)
        weight = AWQ((codes & 0x0F).view(torch.uint8), scales.contiguous(), zeros.contiguous())
        return AWQLinear(weight.pack(source.splits), bias.float())
    smooth, down, up = (get(f"{name}.{leaf}") for leaf in ("smooth_factor", "proj_down", "proj_up"))
    parts, row, column = [], 0, 0
    for stored, unsigned, rank in zip(source.parts, source.unsigned, ranks, strict=True):
        n, k = part_shape(stored, config)
        rows, columns = slice(row, row + n), slice(column, column + k)
        groups = slice(column // GROUP, (column + k) // GROUP)
        parts.append(
            W4A4(
                codes[rows, columns],
                scales[rows, groups],
                smooth[columns],
                down[columns, rank].t(),
                up[rows, rank],
                unsigned,
            )
        )
        row, column = (row + n, 0) if source.axis == 0 else (0, column + k)
    if source.axis == 1:
        bias = (bias.double() - _shift_term(parts[-1])).to(scales.dtype)
    return W4A4Linear(tuple(part.pack() for part in parts), source.axis, bias)
