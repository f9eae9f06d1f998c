"""One unit of a FLUX.1 model at a time from 16-bit weights to the tensors of an SVDQuant INT4 checkpoint.

A unit is what has to be quantized together: the layers that share their smoothing factors, as the original toolkit has
them (qkv and fc1 of a single block, the two attention outputs of a double block), else one layer.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.int4 import GROUP, W4A4
from ..loaders.flux_names import AWQSource, Int8Source, PlainSource, Source, W4A4Source
from ..loaders.nunchaku import awq_leaves, int8_leaves, swapped_halves, tensor_table, w4a4_leaves
from ..loaders.safetensors_file import problem
from ..loaders.weights import FluxConfig
from ..loaders.write import Spec
from . import measure, solve
from .activations import Activations
from .smooth import Member, Smoothing, find_smooth
from .solve import Recipe
from .source import Source as Model

PLAIN_UNIT = "16-bit layers"
_FIXED = {"I8": torch.int8, "I32": torch.int32, "F32": torch.float32}  # all others are in the type of the file

_KEEP_16BIT, _KEEP_INT8 = "layers to keep in 16 bits", "layers to keep in int8"  # in errors

Facts = dict[str, object]
"""What the report says about one stored layer."""


@dataclass(frozen=True)
class Unit:
    """Stock layer name -> stored layer(s), of the layers that are quantized together."""

    name: str
    layers: dict[str, Source]


@dataclass(frozen=True)
class Exceptions:
    """Stock names of the linears that stay in 16 bits, and of those that get eight."""

    plain: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()


_NONE = Exceptions()


@dataclass(frozen=True)
class _Part:
    """A stored W4A4 layer as a section of a stock layer: rows and columns of its weight, and which bias it carries."""

    stored: str
    stock: str
    rows: slice
    columns: slice
    unsigned: bool
    has_bias: bool


def units_of(config: FluxConfig, kept: Exceptions = _NONE) -> list[Unit]:
    """All units in model order; the layers that are in 16 bits in every file are one, the first."""
    grouped: dict[str, dict[str, Source]] = {PLAIN_UNIT: {}}
    for name, source in config.layers(kept.plain, kept.int8).items():
        unit = name
        if isinstance(source, PlainSource) and name not in kept.plain:
            unit = PLAIN_UNIT
        elif isinstance(source, W4A4Source):
            # The two attention outputs of a double block share one smoothing vector.
            unit = name.replace(".img_attn.proj", ".attn.proj").replace(".txt_attn.proj", ".attn.proj")
        grouped.setdefault(unit, {})[name] = source
    return [Unit(name, members) for name, members in grouped.items()]


def specs_of(config: FluxConfig, rank: int, dtype: torch.dtype, kept: Exceptions = _NONE) -> dict[str, Spec]:
    """Stored name -> dtype and shape of every tensor of the checkpoint."""
    specs = {}
    for name, (dtypes, shape) in tensor_table(config, config.layers(kept.plain, kept.int8)).items():
        free = rank if name.endswith((".lora_down", ".lora_up")) else config.hidden_size // GROUP
        specs[name] = Spec(_FIXED.get(dtypes[0], dtype), tuple(free if size is None else size for size in shape))
    return specs


def kept_by(keep_16bit: Sequence[str], keep_int8: Sequence[str], config: FluxConfig, out: str) -> Exceptions:
    """The linears that one of the patterns (with *, ? and [..]) fits.

    out: the file, for errors. Raises CheckpointError for a pattern that fits none, for a linear that patterns of both
    kinds fit, and if nothing is left.
    """
    layers = {name: source for name, source in config.layers().items() if not isinstance(source, PlainSource)}
    plain = _fitting(keep_16bit, layers, _KEEP_16BIT, out)
    int8 = _fitting(keep_int8, layers, _KEEP_INT8, out)
    both = next((name for name in layers if name in plain and name in int8), None)
    if both is not None:
        found = f"{both}, which {plain[both]} (16 bits) and {int8[both]} (int8) fit"
        raise problem(out, _KEEP_INT8, found, "every layer once", "Change one of the two patterns")
    for blocks in ("double_blocks", "single_blocks"):
        left = (name for name, source in layers.items() if isinstance(source, W4A4Source) and name.startswith(blocks))
        if all(name in plain or name in int8 for name in left):
            expected = f"at least one of {blocks} to quantize" + (" to four bits" if keep_int8 else "")
            what, patterns = (_KEEP_16BIT if keep_16bit else _KEEP_INT8), " ".join((*keep_16bit, *keep_int8))
            raise problem(out, what, patterns, expected, "Keep fewer")
    return Exceptions(tuple(name for name in layers if name in plain), tuple(name for name in layers if name in int8))


def _fitting(patterns: Sequence[str], names: Collection[str], what: str, out: str) -> dict[str, str]:
    """Name -> the first pattern that fits it."""
    found: dict[str, str] = {}
    for pattern in patterns:
        fits = fnmatch.filter(names, pattern)
        if not fits:
            expected = "ComfyUI's name of a linear (double_blocks.0.img_mlp.2), or with *: single_blocks.*.linear2"
            raise problem(out, what, pattern, expected, "The report of any run lists all names")
        found = dict.fromkeys(fits, pattern) | found
    return found


def stored_names(unit: Unit, specs: dict[str, Spec]) -> list[str]:
    """Names of the tensors that a unit makes."""
    modules = set()
    for source in unit.layers.values():
        modules.update(source.parts if isinstance(source, W4A4Source) else (source.name,))
    return [name for name in specs if name.rpartition(".")[0] in modules]


def input_sections(unit: Unit, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[slice]]:
    """4-bit stock layer -> the sections of its input that are inputs of stored layers, of one unit.

    shapes: stock tensor name -> shape. Empty for all other layers, which need no second moments.
    """
    sections: dict[str, list[slice]] = {}
    for stock, source in unit.layers.items():
        if isinstance(source, AWQSource):
            sections[stock] = [slice(0, shapes[f"{stock}.weight"][1])]
        if isinstance(source, W4A4Source):
            found = [part.columns for part in _parts(stock, source, shapes[f"{stock}.weight"])]
            sections[stock] = [columns for index, columns in enumerate(found) if columns not in found[:index]]
    return sections


def watched_inputs(unit: Unit) -> list[str]:
    """Stock layers whose inputs calibration looks at: the quantized ones."""
    return [name for name, source in unit.layers.items() if not isinstance(source, PlainSource)]


def convert(
    model: Model, unit: Unit, recipe: Recipe, device: torch.device, activations: Activations | None = None
) -> tuple[dict[str, Tensor], list[Facts]]:
    """(stored name -> tensor, facts for the report) of one unit.

    activations: of the inputs of the unit's layers, None for calibration-free quantization. Raises CheckpointError
    for weights that are not finite, or too large for the type of the file.
    """
    tensors: dict[str, Tensor] = {}
    facts: list[Facts] = []
    if isinstance(next(iter(unit.layers.values())), PlainSource):
        for stock, source in unit.layers.items():
            tensors |= _plain(model, stock, source, recipe.dtype)
    elif isinstance(next(iter(unit.layers.values())), AWQSource):
        ((stock, source),) = unit.layers.items()
        tensors, facts = _awq(model, stock, source, recipe, device, activations)
    elif isinstance(next(iter(unit.layers.values())), Int8Source):
        (stock,) = unit.layers
        tensors, facts = _int8(model, stock, recipe, device, activations)
    else:
        for stored, found, fact in _w4a4(model, unit, recipe, device, activations):
            tensors |= {f"{stored}.{leaf}": tensor for leaf, tensor in found.items()}
            facts.append(fact)
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point and not tensor.isfinite().all():
            _too_large(model, name, recipe.dtype)
    return tensors, facts


def _too_large(model: Model, name: str, dtype: torch.dtype) -> None:
    found = f"a value beyond the range of {dtype}".replace("torch.", "")
    raise problem(model.path, name, found, "weights that fit", "Choose --dtype bf16, or another source")


def _plain(model: Model, stock: str, source: PlainSource, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for leaf in ("weight", "bias") if source.has_bias else ("weight",):
        tensor = model.tensor(f"{stock}.{leaf}")
        tensor = swapped_halves(tensor) if source.swap_halves else tensor
        tensors[f"{source.name}.{leaf}"] = tensor.to(dtype)
    return tensors


def _awq(
    model: Model, stock: str, source: AWQSource, recipe: Recipe, device: torch.device, activations: Activations | None
) -> tuple[dict[str, Tensor], list[Facts]]:
    started = time.monotonic()
    weight, bias = model.tensor(f"{stock}.weight").to(device), model.tensor(f"{stock}.bias")
    statistics = None if activations is None else activations.inputs[stock].to(device, recipe.dtype)
    importance = None if statistics is None else statistics.importance
    hessian = None if importance is None else _moments(stock, 0, device, activations)
    quantized = solve.quantize_awq(weight, recipe.dtype, importance, hessian)
    leaves = awq_leaves(quantized.pack(source.splits), bias, recipe.dtype)
    facts = measure.awq_quality(weight, quantized, source.name, None if statistics is None else statistics.rows)
    fact = _facts(source.name, stock, "w4a16", weight.shape, leaves, facts, started)
    return {f"{source.name}.{leaf}": tensor for leaf, tensor in leaves.items()}, [fact]


def _int8(
    model: Model, stock: str, recipe: Recipe, device: torch.device, activations: Activations | None
) -> tuple[dict[str, Tensor], list[Facts]]:
    started = time.monotonic()
    weight, bias = model.tensor(f"{stock}.weight").to(device), model.tensor(f"{stock}.bias")
    statistics = None if activations is None else activations.inputs[stock].to(device, recipe.dtype)
    member = Member(weight, False, statistics)
    found = find_smooth([member], recipe, int8=True)
    quantized = found.quantize_int8(member)
    leaves = int8_leaves(quantized, bias.to(recipe.dtype))
    quality = measure.w8a8_quality(weight, quantized, stock, member.rows) | found.facts
    fact = _facts(stock, stock, "w8a8", weight.shape, leaves, quality, started)
    return {f"{stock}.{leaf}": tensor for leaf, tensor in leaves.items()}, [fact]


def _w4a4(
    model: Model, unit: Unit, recipe: Recipe, device: torch.device, activations: Activations | None
) -> Iterator[tuple[str, dict[str, Tensor], Facts]]:
    """(stored layer, leaf -> tensor, facts)."""
    weights = {stock: model.tensor(f"{stock}.weight").to(device) for stock in unit.layers}
    parts = [part for stock, source in unit.layers.items() for part in _parts(stock, source, weights[stock].shape)]
    for columns in dict.fromkeys((part.columns.start, part.columns.stop) for part in parts):
        # Parts of a unit that read the same input columns share the smoothing.
        started = time.monotonic()
        sharing = [part for part in parts if (part.columns.start, part.columns.stop) == columns]
        members = [_member(part, weights[part.stock], recipe, device, activations) for part in sharing]
        found = find_smooth(members, recipe)
        for part, member in zip(sharing, members, strict=True):
            moments = _moments(part.stock, part.columns.start, device, activations)
            try:
                quantized, facts = _quantize(part, member, found, recipe, moments)
            except solve.OutOfRange:
                _too_large(model, f"{part.stock}.weight", recipe.dtype)
            bias = model.tensor(f"{part.stock}.bias")[part.rows].to(device)
            bias = bias if part.has_bias else torch.zeros_like(bias)
            leaves = w4a4_leaves(quantized.pack(), solve.shifted_bias(quantized, bias).to(recipe.dtype))
            quality = measure.w4a4_quality(member.weight, quantized, part.stored, member.rows) | facts
            shape = member.weight.shape
            yield part.stored, leaves, _facts(part.stored, part.stock, "w4a4", shape, leaves, quality, started)
            started = time.monotonic()


def _member(
    part: _Part, weight: Tensor, recipe: Recipe, device: torch.device, activations: Activations | None
) -> Member:
    statistics = None
    if activations is not None:
        statistics = activations.inputs[part.stock].section(part.columns).to(device, recipe.dtype)
    return Member(weight[part.rows, part.columns], part.unsigned, statistics)


def _quantize(
    part: _Part, member: Member, found: Smoothing, recipe: Recipe, moments: Tensor | None
) -> tuple[W4A4, Facts]:
    if not recipe.target_error:
        return found.quantize(member, recipe, moments), found.facts
    rows = member.rows
    if rows is None:
        rows = measure.probe(member.weight.shape[1], recipe.dtype, part.stored, part.unsigned)
    rows = rows.to(member.weight.device, recipe.dtype)
    quantized, facts = found.quantize_for(member, recipe, rows, moments)
    return quantized, found.facts | facts


def _moments(stock: str, first: int, device: torch.device, activations: Activations | None) -> Tensor | None:
    """Of the section of a layer's input that begins at column ``first``."""
    if activations is None or not activations.moments:
        return None
    return activations.moments[stock, first].to(device)


def _parts(stock: str, source: W4A4Source, shape: Sequence[int]) -> Iterator[_Part]:
    """``linear1`` has rows of qkv and fc1, ``linear2`` columns of the attention output and fc2, which has the bias."""
    n, k = shape
    row = column = 0
    for index, (stored, unsigned) in enumerate(zip(source.parts, source.unsigned, strict=True)):
        last = index == len(source.parts) - 1
        if len(source.parts) == 1:
            row_end, column_end = n, k
        elif source.axis == 0:
            row_end, column_end = (n if last else 3 * k), k
        else:
            row_end, column_end = n, (k if last else n)
        yield _Part(stored, stock, slice(row, row_end), slice(column, column_end), unsigned, last or source.axis == 0)
        if source.axis == 0:
            row = row_end
        else:
            column = column_end


def _facts(
    stored: str,
    stock: str,
    kind: str,
    shape: torch.Size,
    leaves: dict[str, Tensor],
    quality: Facts,
    started: float,
) -> Facts:
    facts: Facts = {"name": stored, "layer": stock, "kind": kind, "shape": list(shape)}
    nbytes = sum(tensor.nbytes for tensor in leaves.values())
    return facts | quality | {"bytes": nbytes, "seconds": round(time.monotonic() - started, 2)}
