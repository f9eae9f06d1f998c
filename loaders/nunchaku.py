"""The tensor set of an SVDQuant INT4 FLUX checkpoint: recognised, checked against its table, and read layer by layer.

Both containers (the single file and the legacy folder, legacy.py) hold this set. Every size is derived from tensor
shapes; metadata is a hint that may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.int4 import GROUP, RANK_MULTIPLE, PackedAWQ, PackedW4A4
from . import flux_names
from .flux_names import AWQSource, PlainSource, Source, W4A4Source
from .recognise import refuse_other_files
from .safetensors_file import Header, Reader, TensorInfo, mapped_reader, problem, read_header
from .weights import AWQLinear, Checkpoint, FluxConfig, Layer, PlainLayer, W4A4Linear

HALF = ("BF16", "F16")
PLAIN = ("BF16", "F16", "F32")
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
_TIME_EMBEDDING = 256
_SHOWN = 3
_INCOMPLETE = "The file is incomplete: download or convert it again"
_CONVERT = "Convert the model again"

TensorTable = dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]]
"""Canonical name -> (allowed dtypes, nominal shape with None where any size goes)."""


@dataclass(frozen=True)
class TensorSet:
    """Tensors of one checkpoint, from one or more files, under canonical names.

    path: what the user chose · infos: canonical name -> TensorInfo · stored: canonical name -> (file, name in it).
    """

    path: str
    infos: dict[str, TensorInfo]
    stored: dict[str, tuple[str, str]]

    def key(self, name: str) -> str:
        """The name as the file has it, for messages."""
        return self.stored[name][1] if name in self.stored else name

    def error(self, name: str, found: object, expected: object, remedy: str) -> Exception:
        file = self.stored[name][0] if name in self.stored else self.path
        return problem(file, self.key(name), found, expected, remedy)


def open_single_file(path: str, reader: Reader = mapped_reader) -> Checkpoint:
    """Open a merged single-file checkpoint. Raises CheckpointError."""
    header = read_header(path)
    return build_checkpoint(path, "nunchaku", [header], header.metadata, reader)


def build_checkpoint(
    path: str, container: str, headers: list[Header], metadata: dict[str, str], reader: Reader
) -> Checkpoint:
    """Check the tensors of ``headers`` as one checkpoint and return it; ``metadata`` holds config and comfy_config."""
    tensors = _merge(path, headers)
    refuse_other_files(path, {tensors.key(name): info for name, info in tensors.infos.items()})
    config = _read_config(tensors)
    layers = flux_names.all_layers(config.depth, config.depth_single_blocks, config.guidance_embed)
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
        variant=_variant(path, metadata, config),
        precision="int4",
        ranks=ranks,
        dtype=_TORCH[scales.dtype],
        config=config,
        metadata=metadata,
        notes=tuple(notes),
        file_bytes=sum(header.file_bytes for header in headers),
        layer_names=tuple(layers),
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


def _read_config(tensors: TensorSet) -> FluxConfig:
    def matrix(name: str) -> tuple[int, int]:
        info = tensors.infos.get(name)
        if info is None:
            raise tensors.error(name, "no such key", "the layer", _INCOMPLETE)
        if len(info.shape) != 2:
            raise tensors.error(name, f"shape {list(info.shape)}", "a matrix", _CONVERT)
        return info.shape

    hidden, in_channels = matrix("x_embedder.weight")
    if hidden % layout.TILE_K or hidden == 0:
        raise tensors.error(
            "x_embedder.weight", f"hidden size {hidden}", f"a multiple of {layout.TILE_K}",
            "INT4 tiles need that: the model cannot be used in this format",
        )  # fmt: skip
    if in_channels % 4 or in_channels == 0:
        found = f"{in_channels} input channels"
        raise tensors.error("x_embedder.weight", found, "a multiple of 4 (2x2 patches)", _CONVERT)
    for name in ("context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"):
        if matrix(name)[1] == 0:
            raise tensors.error(name, "no inputs", "at least one", _CONVERT)
    return FluxConfig(
        hidden_size=hidden,
        depth=_count_blocks(tensors, "transformer_blocks"),
        depth_single_blocks=_count_blocks(tensors, "single_transformer_blocks"),
        in_channels=in_channels,
        out_channels=matrix("proj_out.weight")[0],
        context_in_dim=matrix("context_embedder.weight")[1],
        vec_in_dim=matrix("time_text_embed.text_embedder.linear_1.weight")[1],
        guidance_embed=any(name.startswith("time_text_embed.guidance_embedder.") for name in tensors.infos),
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
        raise problem(tensors.path, f"{prefix}.{missing or 0}", "no such block", expected, _INCOMPLETE)
    return len(indices)


def tensor_table(config: FluxConfig, layers: dict[str, Source]) -> TensorTable:
    """Every tensor that a checkpoint of this size may have; None stands for ranks and padded rows."""
    hidden, mlp = config.hidden_size, config.mlp_size
    inner = {
        "qkv_proj": (3 * hidden, hidden),
        "out_proj": (hidden, hidden),
        "mlp_fc1": (mlp, hidden),
        "mlp_fc2": (hidden, mlp),
    }
    plain = {
        "x_embedder": (hidden, config.in_channels),
        "context_embedder": (hidden, config.context_in_dim),
        "norm_out.linear": (2 * hidden, hidden),
        "proj_out": (64, hidden),
    }
    for embedder, width in (
        ("timestep", _TIME_EMBEDDING), ("guidance", _TIME_EMBEDDING), ("text", config.vec_in_dim),
    ):  # fmt: skip
        plain[f"time_text_embed.{embedder}_embedder.linear_1"] = (hidden, width)
        plain[f"time_text_embed.{embedder}_embedder.linear_2"] = (hidden, hidden)

    expected: TensorTable = {}
    for source in layers.values():
        if isinstance(source, W4A4Source):
            for name in source.parts:
                n, k = inner[name.rpartition(".")[2].replace("_context", "")]
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
        else:
            shape = plain.get(source.name, (128,))
            expected[f"{source.name}.weight"] = (PLAIN, shape)
            if source.has_bias:
                expected[f"{source.name}.bias"] = (PLAIN, shape[:1])
    return expected


def _optional(name: str) -> bool:
    return name.endswith((".smooth_orig", ".lora_down", ".lora_up"))


def _check_tensors(tensors: TensorSet, config: FluxConfig, layers: dict[str, Source]) -> dict[int, int]:
    """Names, dtypes, shapes. Returns rank -> number of W4A4 weights with it."""
    expected = tensor_table(config, layers)
    missing = [name for name in expected if name not in tensors.infos and not _optional(name)]
    if missing:
        raise problem(
            tensors.path, _some(missing), f"{len(missing)} of {len(expected)} keys missing",
            f"all layers of a FLUX model with {config.depth} + {config.depth_single_blocks} blocks",
            _INCOMPLETE,
        )  # fmt: skip
    extra = [tensors.key(name) for name in tensors.infos if name not in expected]
    if extra:
        raise problem(
            tensors.path, _some(extra), f"{len(extra)} keys that no SVDQuant INT4 FLUX checkpoint has",
            f"only the {len(expected)} known keys", "Use the file as it was published or convert the model again",
        )  # fmt: skip
    for name, (dtypes, shape) in expected.items():
        info = tensors.infos.get(name)
        if info is None:
            continue
        if info.dtype not in dtypes:
            raise tensors.error(name, f"dtype {info.dtype}", " or ".join(dtypes), _CONVERT)
        fits = len(info.shape) == len(shape) and all(w in (None, h) for w, h in zip(shape, info.shape, strict=True))
        if not fits:
            wanted = [("any" if size is None else size) for size in shape]
            raise tensors.error(
                name, f"shape {list(info.shape)}", f"{wanted} for hidden size {config.hidden_size}",
                "The file does not fit together: download or convert it again",
            )  # fmt: skip
    return _check_free_sizes(tensors, config, layers)


def _check_free_sizes(tensors: TensorSet, config: FluxConfig, layers: dict[str, Source]) -> dict[int, int]:
    ranks: dict[int, int] = {}
    groups = config.hidden_size // GROUP
    padded_groups = (groups + 15) // 16 * 16  # the original converter rounds small models up
    for source in layers.values():
        if isinstance(source, AWQSource):
            for leaf in ("wscales", "wzeros"):
                rows = tensors.infos[f"{source.name}.{leaf}"].shape[0]
                if rows not in (groups, padded_groups):
                    expected = f"{groups} (one for 64 inputs)"
                    raise tensors.error(f"{source.name}.{leaf}", f"{rows} rows", expected, _CONVERT)
        elif isinstance(source, W4A4Source):
            for name in source.parts:
                rank = _rank(tensors, name)
                ranks[rank] = ranks.get(rank, 0) + 1
    return dict(sorted(ranks.items()))


def _rank(tensors: TensorSet, name: str) -> int:
    found = [leaf for leaf in flux_names.LOW_RANK_LEAVES if f"{name}.{leaf}" in tensors.infos]
    if not found:
        return 0
    if len(found) == 1:
        raise tensors.error(f"{name}.{found[0]}", "only one of lora_down and lora_up", "both", _CONVERT)
    down, up = (tensors.infos[f"{name}.{leaf}"].shape[1] for leaf in flux_names.LOW_RANK_LEAVES)
    if down != up:
        raise tensors.error(f"{name}.lora_up", f"rank {up}", f"rank {down}, as lora_down", _CONVERT)
    if down % RANK_MULTIPLE:
        expected = f"a multiple of {RANK_MULTIPLE}"
        raise tensors.error(f"{name}.lora_down", f"rank {down}", expected, f"{_CONVERT}, padding the rank")
    return down


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
                _INCOMPLETE,
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


def _variant(path: str, metadata: dict[str, str], config: FluxConfig) -> str:
    """The model's usual name. Shapes tell families apart; within a family only names do."""
    hint = (path.replace("\\", "/").rstrip("/").rpartition("/")[2] + " " + metadata.get("config", "")).lower()
    if not config.guidance_embed:
        return "schnell"
    if config.in_channels == 64:
        return next((name for name in ("kontext", "krea") if name in hint), "dev")
    if config.in_channels == 128:
        return next((name for name in ("canny", "depth") if name in hint), "canny or depth")
    if config.in_channels == 384:
        return "fill"
    return f"dev with {config.in_channels} input channels"


# ---- reading


def _read_layer(source: Source, get: Callable[[str], Tensor], present: frozenset[str]) -> Layer:
    if isinstance(source, AWQSource):
        return _read_awq(source, get)
    if isinstance(source, PlainSource):
        return _read_plain(source, get)
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
    chunks = bias.reshape(source.splits, -1).clone()
    chunks[1::3] -= 1.0  # the scale chunks: 1 and 4 of six, 1 of three
    return AWQLinear(weight, chunks.reshape(-1))


def _read_plain(source: PlainSource, get: Callable[[str], Tensor]) -> PlainLayer:
    weight = get(f"{source.name}.weight")
    bias = get(f"{source.name}.bias") if source.has_bias else None
    if source.swap_halves:
        weight, bias = (torch.cat(tensor.chunk(2)[::-1]) for tensor in (weight, bias))
    return PlainLayer(weight, bias)


def _sum_exactly(biases: list[Tensor]) -> Tensor:
    """The sum, in the stored type where that is exact (one of two is zero in published files), else in float32."""
    total = torch.stack([bias.float() for bias in biases]).sum(dim=0)
    rounded = total.to(biases[0].dtype)
    return rounded if torch.equal(rounded.float(), total) else total
