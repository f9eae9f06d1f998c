"""The tensors of one checkpoint under the names of one table, and the checks that all formats share.

Every size is derived from tensor shapes; metadata is a hint that may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..kernels import layout
from ..kernels.int4 import GROUP, RANK_MULTIPLE, W8A8
from .flux_names import INT8_LEAVES, AWQSource, Int8Source, PlainSource, Source, W4A4Source
from .safetensors_file import TensorInfo, problem
from .weights import FluxConfig, Int8Linear, LowRank

HALF = ("BF16", "F16")
PLAIN = ("BF16", "F16", "F32")
TIME_EMBEDDING = 256
VARIANT = "svdq.variant"  # in metadata
_BY_NAME = {64: ("kontext", "krea"), 128: ("canny", "depth")}  # input channels -> variants that only names tell apart
_SHOWN = 3

TensorTable = dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]]
"""Canonical name -> (allowed dtypes, nominal shape with None where any size goes)."""


@dataclass(frozen=True)
class TensorSet:
    """Tensors of one checkpoint, from one or more files, under canonical names.

    path: what the user chose · infos: canonical name -> TensorInfo · stored: canonical name -> (file, name in it) ·
    incomplete, convert: what to do if something is missing, or has a wrong shape or type · prefix: what keys of the
    file have before the canonical name, where that is all.
    """

    path: str
    infos: dict[str, TensorInfo]
    stored: dict[str, tuple[str, str]]
    incomplete: str = "The file is incomplete: download or convert it again"
    convert: str = "Convert the model again"
    prefix: str = ""

    def key(self, name: str) -> str:
        """The name as the file has it, for messages."""
        return self.stored[name][1] if name in self.stored else self.prefix + name

    def error(self, name: str, found: object, expected: object, remedy: str) -> Exception:
        file = self.stored[name][0] if name in self.stored else self.path
        return problem(file, self.key(name), found, expected, remedy)


def read_config(tensors: TensorSet, name_of: Callable[[str], str]) -> FluxConfig:
    """Sizes of the model. name_of: a stock module name outside the blocks, or the stock name of a list of blocks, ->
    the canonical one. Raises CheckpointError."""

    def matrix(module: str) -> tuple[int, int]:
        name = f"{name_of(module)}.weight"
        info = tensors.infos.get(name)
        if info is None:
            raise tensors.error(name, "no such key", "the layer", tensors.incomplete)
        if len(info.shape) != 2:
            raise tensors.error(name, f"shape {list(info.shape)}", "a matrix", tensors.convert)
        return info.shape

    first = f"{name_of('img_in')}.weight"
    hidden, in_channels = matrix("img_in")
    if hidden % layout.TILE_K or hidden == 0:
        raise tensors.error(
            first, f"hidden size {hidden}", f"a multiple of {layout.TILE_K}",
            "INT4 tiles need that: the model cannot be used in this format",
        )  # fmt: skip
    if in_channels % 4 or in_channels == 0:
        raise tensors.error(first, f"{in_channels} input channels", "a multiple of 4 (2x2 patches)", tensors.convert)
    for module in ("txt_in", "vector_in.in_layer"):
        if matrix(module)[1] == 0:
            raise tensors.error(f"{name_of(module)}.weight", "no inputs", "at least one", tensors.convert)
    guidance = tuple(f"{name_of(f'guidance_in.{layer}')}." for layer in ("in_layer", "out_layer"))
    return FluxConfig(
        hidden_size=hidden,
        depth=_count_blocks(tensors, name_of("double_blocks")),
        depth_single_blocks=_count_blocks(tensors, name_of("single_blocks")),
        in_channels=in_channels,
        out_channels=matrix("final_layer.linear")[0],
        context_in_dim=matrix("txt_in")[1],
        vec_in_dim=matrix("vector_in.in_layer")[1],
        guidance_embed=any(name.startswith(guidance) for name in tensors.infos),
    )


def _count_blocks(tensors: TensorSet, prefix: str) -> int:
    indices = set()
    for name in tensors.infos:
        block, _, rest = name.partition(".")
        index = rest.partition(".")[0]
        if block == prefix and index.isdecimal() and len(index) < 6:
            indices.add(int(index))
    missing = next((i for i in range(len(indices)) if i not in indices), None)
    if missing is not None or not indices:
        expected = f"blocks 0 to {max(indices, default=0)} without a gap"
        block = f"{tensors.prefix}{prefix}.{missing or 0}"
        raise problem(tensors.path, block, "no such block", expected, tensors.incomplete)
    return len(indices)


def plain_shapes(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """Stock module name -> shape of the weight, for all layers outside the blocks."""
    hidden = config.hidden_size
    shapes = {
        "img_in": (hidden, config.in_channels),
        "txt_in": (hidden, config.context_in_dim),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "final_layer.linear": (64, hidden),
    }
    embedders = {"time_in": TIME_EMBEDDING, "guidance_in": TIME_EMBEDDING, "vector_in": config.vec_in_dim}
    for embedder, width in embedders.items():
        shapes[f"{embedder}.in_layer"] = (hidden, width)
        shapes[f"{embedder}.out_layer"] = (hidden, hidden)
    return shapes


def plain_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    """The tensors of all 16-bit layers, under stock names. Norms, which have no other shape, have 128 values."""
    shapes = plain_shapes(config) | linear_shapes(config)
    expected: TensorTable = {}
    for name, source in layers.items():
        if isinstance(source, PlainSource):
            shape = shapes.get(name, (128,))
            expected[f"{name}.weight"] = (PLAIN, shape)
            if source.has_bias:
                expected[f"{name}.bias"] = (PLAIN, shape[:1])
    return expected


def linear_shapes(config: FluxConfig) -> dict[str, tuple[int, int]]:
    """Stock module name -> [N, K], for all linears that are quantized, unless a file has them in 16 bits."""
    layers = config.layers()
    return {name: layer_shape(source, config) for name, source in layers.items() if not isinstance(source, PlainSource)}


def layer_shape(source: W4A4Source | AWQSource, config: FluxConfig) -> tuple[int, int]:
    """[N, K] of a quantized layer."""
    if isinstance(source, AWQSource):
        return source.splits * config.hidden_size, config.hidden_size
    shapes = [part_shape(part, config) for part in source.parts]
    if source.axis == 0:
        return sum(n for n, _ in shapes), shapes[0][1]
    return shapes[0][0], sum(k for _, k in shapes)


def plain_linears(tensors: TensorSet, config: FluxConfig) -> tuple[str, ...]:
    """Stock names of the linears that these tensors have in 16 bits, of those that are quantized in other files."""

    def in_16_bits(layer: str, found: set[str]) -> bool:
        return "weight" in found <= {"weight", "bias"} and tensors.infos[f"{layer}.weight"].dtype in PLAIN

    return tuple(name for name, found in _leaves_of_linears(tensors, config) if in_16_bits(name, found))


def int8_linears(tensors: TensorSet, config: FluxConfig, beside: Collection[str] = ()) -> tuple[str, ...]:
    """Stock names of the linears that these tensors have in INT8. beside: leaves that such a layer may have besides."""
    known = {*INT8_LEAVES, *beside}

    def in_int8(layer: str, found: set[str]) -> bool:
        if "weight" not in found or not found <= known:
            return False
        # What is missing or has another type is named by the table; packed modulation layers are I32.
        dtype = tensors.infos[f"{layer}.weight"].dtype
        return dtype == "I8" or (dtype != "I32" and bool(found & {"weight_scale", "weight_smooth"}))

    return tuple(name for name, found in _leaves_of_linears(tensors, config) if in_int8(name, found))


def _leaves_of_linears(tensors: TensorSet, config: FluxConfig) -> list[tuple[str, set[str]]]:
    leaves: dict[str, set[str]] = {}
    for name in tensors.infos:
        layer, _, leaf = name.rpartition(".")
        leaves.setdefault(layer, set()).add(leaf)
    return [(name, leaves.get(name, set())) for name in linear_shapes(config)]


def int8_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    """The tensors of all INT8 layers, under stock names."""
    shapes = linear_shapes(config)
    expected: TensorTable = {}
    for name, source in layers.items():
        if isinstance(source, Int8Source):
            n, k = shapes[name]
            expected |= {
                f"{name}.weight": (("I8",), (n, k)),
                f"{name}.weight_scale": (("F32",), (n,)),
                f"{name}.weight_smooth": (HALF, (k,)),
                f"{name}.bias": (PLAIN, (n,)),
            }
    return expected


def read_int8(name: str, get: Callable[[str], Tensor], lora: LowRank | None = None) -> Int8Linear:
    """An INT8 layer by its stock name."""
    weight = W8A8(get(f"{name}.weight"), get(f"{name}.weight_scale"), get(f"{name}.weight_smooth"))
    return Int8Linear(weight, get(f"{name}.bias"), lora)


def part_shape(part: str, config: FluxConfig) -> tuple[int, int]:
    """[N, K] of a stored W4A4 layer by its name in flux_names."""
    hidden, mlp = config.hidden_size, config.mlp_size
    kind = part.rpartition(".")[2].replace("_context", "")
    shapes = {
        "qkv_proj": (3 * hidden, hidden),
        "out_proj": (hidden, hidden),
        "mlp_fc1": (mlp, hidden),
        "mlp_fc2": (hidden, mlp),
    }
    return shapes[kind]


def check_table(
    tensors: TensorSet, config: FluxConfig, expected: TensorTable, optional: Callable[[str], bool], only_known: str
) -> None:
    """Names, dtypes and shapes of all tensors. only_known: what to do about a key that is not in the table."""
    missing = [tensors.key(name) for name in expected if name not in tensors.infos and not optional(name)]
    if missing:
        raise problem(
            tensors.path, some(missing), f"{len(missing)} of {len(expected)} keys missing",
            f"all layers of a FLUX model with {config.depth} + {config.depth_single_blocks} blocks",
            tensors.incomplete,
        )  # fmt: skip
    extra = [tensors.key(name) for name in tensors.infos if name not in expected]
    if extra:
        raise problem(
            tensors.path, some(extra), f"{len(extra)} keys that no SVDQuant INT4 FLUX checkpoint has",
            f"only the {len(expected)} known keys", only_known,
        )  # fmt: skip
    for name, (dtypes, shape) in expected.items():
        info = tensors.infos.get(name)
        if info is None:
            continue
        if info.dtype not in dtypes:
            raise tensors.error(name, f"dtype {info.dtype}", " or ".join(dtypes), tensors.convert)
        fits = len(info.shape) == len(shape) and all(w in (None, h) for w, h in zip(shape, info.shape, strict=True))
        if not fits:
            wanted = [("any" if size is None else size) for size in shape]
            raise tensors.error(
                name, f"shape {list(info.shape)}", f"{wanted} for hidden size {config.hidden_size}",
                f"The file does not fit together: {tensors.incomplete.partition(': ')[2]}",
            )  # fmt: skip


def check_rank(tensors: TensorSet, down: str, up: str) -> int:
    """Rank of the low-rank branch with these two factors [K, R] and [N, R]; 0 without them. Raises CheckpointError."""
    found = [name for name in (down, up) if name in tensors.infos]
    if not found:
        return 0
    leaves = [name.rpartition(".")[2] for name in (down, up)]
    if len(found) == 1:
        raise tensors.error(found[0], f"only one of {leaves[0]} and {leaves[1]}", "both", tensors.convert)
    ranks = [tensors.infos[name].shape[1] for name in (down, up)]
    if ranks[0] != ranks[1]:
        raise tensors.error(up, f"rank {ranks[1]}", f"rank {ranks[0]}, as {leaves[0]}", tensors.convert)
    if ranks[0] % RANK_MULTIPLE:
        expected = f"a multiple of {RANK_MULTIPLE}"
        raise tensors.error(down, f"rank {ranks[0]}", expected, f"{tensors.convert}, padding the rank")
    return ranks[0]


def check_awq_groups(tensors: TensorSet, config: FluxConfig, names: Iterable[str]) -> None:
    """Rows of an AWQ layer's scales and zero points, which the table leaves open. Raises CheckpointError."""
    groups = config.hidden_size // GROUP
    padded = (groups + 15) // 16 * 16  # the original converter rounds small models up
    for name in names:
        rows = tensors.infos[name].shape[0]
        if rows not in (groups, padded):
            raise tensors.error(name, f"{rows} rows", f"{groups} (one for 64 inputs)", tensors.convert)


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def variant(path: str, metadata: Mapping[str, str], config: FluxConfig) -> str:
    """The model's usual name. Shapes tell families apart; within a family only names do: of the file, in its config, or
    what it was taken for when this pack wrote it."""
    name, taken_for = path.replace("\\", "/").rstrip("/").rpartition("/")[2], metadata.get(VARIANT, "")
    known = _BY_NAME.get(config.in_channels, ())
    hint = " ".join((name, metadata.get("config", ""), taken_for if taken_for in known else "")).lower()
    if not config.guidance_embed:
        return "schnell"
    if config.in_channels == 64:
        return next((name for name in known if name in hint), "dev")
    if config.in_channels == 128:
        return next((name for name in known if name in hint), "canny or depth")
    if config.in_channels == 384:
        return "fill"
    return f"dev with {config.in_channels} input channels"
