"""16-bit FLUX.1 models to quantize: recognised, checked against the sizes of FLUX.1, read one layer at a time.

Names may be Black Forest Labs' (raw, or with ComfyUI's prefixes) or those of diffusers; either way layers are asked for
by their stock name, as everywhere in this pack.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import layout
from ..loaders import flux_names
from ..loaders.flux_names import AWQSource, W4A4Source
from ..loaders.safetensors_file import Header, TensorInfo, mapped_reader, problem, read_header
from ..loaders.weights import FluxConfig

_PLAIN = ("BF16", "F16", "F32")
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_BFL_FIRST = "double_blocks.0.img_attn.qkv.weight"
_DIFFUSERS_FIRST = "single_transformer_blocks.0.attn.to_q.weight"
_QUANTIZED = (
    ".qweight", ".scale_weight", ".weight_scale", ".comfy_quant", ".absmax", ".quant_map", ".weight_scale_inv",
    "scaled_fp8",
)  # fmt: skip
_EXPECTED = "a FLUX.1 model in 16 bits"
_ORIGINAL = "Choose the original 16-bit file of the model"
_FP8 = f"{_ORIGINAL}, or leave --no-calibration out: calibrated runs take fp8"
_INCOMPLETE = "The model is incomplete or not FLUX.1: download it again"

# Stock module -> the modules of diffusers whose rows make it, inside one block.
_DIFFUSERS_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DIFFUSERS_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}


class Source(Protocol):
    """A 16-bit model to quantize. path: what errors call it · config: sizes · shapes: stock tensor name -> shape."""

    path: str
    config: FluxConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def files(self) -> tuple[str, ...]:
        """What it is read from."""

    @property
    def nbytes(self) -> int:
        """Size."""

    def tensor(self, name: str) -> Tensor:
        """One tensor by its stock name, any float type. Raises CheckpointError if a value is not finite."""

    def fingerprint(self) -> object:
        """As JSON, what changes when the model does."""


@dataclass(frozen=True)
class DenseModel:
    """An opened 16-bit model.

    path: file or folder · headers: of its files · config: sizes · shapes: stock tensor name -> shape ·
    pieces: stock tensor name -> (file, key) of the tensors whose rows make it · swapped: stock tensor names whose
    halves stand in the opposite order in the file.
    """

    path: str
    headers: tuple[Header, ...]
    config: FluxConfig
    shapes: dict[str, tuple[int, ...]]
    pieces: dict[str, tuple[tuple[str, str], ...]] = field(repr=False)
    swapped: frozenset[str] = frozenset()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(header.path for header in self.headers)

    @property
    def nbytes(self) -> int:
        return sum(header.file_bytes for header in self.headers)

    def tensor(self, name: str) -> Tensor:
        """One tensor by its stock name, in the type of the file. Raises CheckpointError if a value is not finite."""
        read = []
        for file, key in self.pieces[name]:
            # A mapping for each tensor: when the tensor is dropped, its part of the file leaves memory with it.
            tensor = mapped_reader(file)(key)
            check_finite(tensor, file, key)
            read.append(tensor)
        whole = read[0] if len(read) == 1 else torch.cat(read)
        return torch.cat(whole.chunk(2)[::-1]) if name in self.swapped else whole

    def fingerprint(self) -> list[list[object]]:
        """[file name, bytes, time of change in ns] per file: changes when the model does."""
        stats = [(os.path.basename(header.path), os.stat(header.path)) for header in self.headers]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def check_finite(tensor: Tensor, path: str, key: str) -> None:
    bad = tensor.numel() - tensor.isfinite().sum().item()
    if bad:
        found = f"{bad} of {tensor.numel()} values NaN or infinite"
        raise problem(path, key, found, "finite weights", "The model is damaged: download or merge it again")


def open_dense(path: str | os.PathLike[str]) -> DenseModel:
    """Open a 16-bit FLUX.1 model: a safetensors file, or a folder of them (a diffusers ``transformer`` folder).

    Only headers are read. Raises CheckpointError if the file is no FLUX.1 model, quantized already or incomplete.
    """
    path = os.fspath(path)
    headers = tuple(read_header(file) for file in _files(path))
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for header in headers:
        for key, info in header.tensors.items():
            if key in tensors:
                found = f"the key that {tensors[key][0]} also has"
                raise problem(header.path, key, found, "every key once", "Remove one of the two files")
            tensors[key] = (header.path, info)
    if not tensors:
        raise problem(path, "tensors", "none at all", _EXPECTED, _ORIGINAL)
    prefix, diffusers = naming(path, tensors)
    found = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    _refuse_quantized({key: tensors[key] for key in found.values()})
    if not diffusers:
        found = {_current(name): key for name, key in found.items()}
    return _check(path, headers, tensors, found, diffusers)


def stock_model(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[FluxConfig, dict[str, str]]:
    """(sizes, stock tensor name -> name in ``shapes``) of a model that has ComfyUI's modules in memory.

    shapes: tensor name -> shape, without a prefix. Raises CheckpointError as :func:`open_dense` does.
    """
    tensors = {name: (path, TensorInfo("F32", tuple(shape), 0, 0)) for name, shape in shapes.items()}
    naming(path, tensors)
    model = _check(path, (), tensors, {_current(name): name for name in tensors}, diffusers=False)
    return model.config, {name: key for name, ((_, key),) in model.pieces.items()}


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    files = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".safetensors"))
    if not files:
        raise problem(path, "folder", "no .safetensors file in it", _EXPECTED, "Choose the file or folder of the model")
    return files


def _refuse_quantized(tensors: Mapping[str, tuple[str, TensorInfo]]) -> None:
    for key, (file, _) in tensors.items():
        if key.endswith(_QUANTIZED):
            remedy = _FP8 if any(is_fp8(info) for _, info in tensors.values()) else _ORIGINAL
            raise problem(file, key, "a model that is quantized already", _EXPECTED, remedy)


def naming(path: str, tensors: Mapping[str, tuple[str, TensorInfo]]) -> tuple[str, bool]:
    """(prefix of the model's keys, whether the names are those of diffusers). tensors: key -> (file, info).

    Raises CheckpointError if there is no FLUX.1 model under any prefix.
    """
    for prefix in _PREFIXES:
        if prefix + _BFL_FIRST in tensors:
            return prefix, False
        if prefix + _DIFFUSERS_FIRST in tensors:
            return prefix, True
    _refuse_quantized(tensors)
    lora = next((key for key in tensors if "lora" in key), None)
    what = "a LoRA" if lora else f"a model without {_BFL_FIRST}: not FLUX.1"
    raise problem(path, lora or next(iter(tensors), "tensors"), what, _EXPECTED, "Choose a FLUX.1 transformer")


def is_fp8(info: TensorInfo) -> bool:
    """Whether a tensor is in 8-bit floating point, of any kind."""
    return info.dtype.startswith("F8")


def _current(name: str) -> str:
    """The original release calls the weights of the q/k norms ``scale``."""
    return f"{name[:-6]}.weight" if name.endswith("_norm.scale") else name


def _check(
    path: str,
    headers: tuple[Header, ...],
    tensors: dict[str, tuple[str, TensorInfo]],
    found: dict[str, str],
    diffusers: bool,
) -> DenseModel:
    """found: name without prefix -> key."""

    def info(key: str) -> TensorInfo:
        return tensors[key][1]

    def theirs(stock: str) -> tuple[str, ...]:
        return diffusers_names(stock) if diffusers else (stock,)

    def matrix(stock: str) -> tuple[int, int]:
        name = theirs(stock)[0]
        if name not in found:
            raise problem(path, name, "no such key", "the layer", _INCOMPLETE)
        shape = info(found[name]).shape
        if len(shape) != 2:
            raise problem(path, found[name], f"shape {list(shape)}", "a matrix", _INCOMPLETE)
        return shape

    hidden, in_channels = matrix("img_in.weight")
    if hidden == 0 or hidden % layout.TILE_K:
        expected = f"a multiple of {layout.TILE_K}"
        raise problem(path, "img_in.weight", f"hidden size {hidden}", expected, "INT4 tiles need that")
    blocks = ("transformer_blocks", "single_transformer_blocks") if diffusers else ("double_blocks", "single_blocks")
    guidance = theirs("guidance_in.in_layer.weight")[0] in found
    config = FluxConfig(
        hidden_size=hidden,
        depth=_count(found, blocks[0]),
        depth_single_blocks=_count(found, blocks[1]),
        in_channels=in_channels,
        out_channels=matrix("final_layer.linear.weight")[0],
        context_in_dim=matrix("txt_in.weight")[1],
        vec_in_dim=matrix("vector_in.in_layer.weight")[1],
        guidance_embed=guidance,
    )
    shapes = stock_shapes(config)
    pieces: dict[str, tuple[tuple[str, str], ...]] = {}
    for stock, shape in shapes.items():
        names = theirs(stock)
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            raise problem(path, missing, "no such key", f"all layers of {_described(config)}", _INCOMPLETE)
        keys = [found.pop(name) for name in names]
        _check_layer(tensors, keys, shape)
        pieces[stock] = tuple((tensors[key][0], key) for key in keys)
    if found:
        key = next(iter(found.values()))
        what = f"{len(found)} keys that no FLUX.1 model has"
        raise problem(path, key, what, f"the layers of {_described(config)}", "Choose a FLUX.1 transformer")
    swapped = [name for name in shapes if name.startswith("final_layer.adaLN_modulation.1.")] if diffusers else []
    return DenseModel(path, headers, config, shapes, pieces, frozenset(swapped))


def _check_layer(tensors: dict[str, tuple[str, TensorInfo]], keys: list[str], shape: tuple[int, ...]) -> None:
    infos = [tensors[key][1] for key in keys]
    for key, info in zip(keys, infos, strict=True):
        if info.dtype not in _PLAIN:
            remedy = _FP8 if is_fp8(info) else _ORIGINAL
            raise problem(tensors[key][0], key, f"dtype {info.dtype}", " or ".join(_PLAIN), remedy)
    rows = sum(info.shape[0] if info.shape else 0 for info in infos)
    if len(infos[0].shape) != len(shape) or any((rows, *info.shape[1:]) != shape for info in infos):
        found = " + ".join(str(list(info.shape)) for info in infos)
        raise problem(tensors[keys[0]][0], keys[0], f"shape {found}", f"{list(shape)} as in FLUX.1", _INCOMPLETE)


def _described(config: FluxConfig) -> str:
    return f"a FLUX.1 model of {config.depth} + {config.depth_single_blocks} blocks"


def _count(names: Iterable[str], prefix: str) -> int:
    """1 + the largest index of a block: a gap shows up as a missing layer."""
    indices = [name.split(".")[1] for name in names if name.startswith(f"{prefix}.")]
    return 1 + max((int(index) for index in indices if index.isdecimal() and len(index) < 6), default=-1)


def stock_shapes(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Stock tensor name -> shape, for a whole FLUX.1 model in model order."""
    h, mlp = config.hidden_size, config.mlp_size
    w4a4 = {
        "qkv": (3 * h, h), "proj": (h, h), "0": (mlp, h), "2": (h, mlp),
        "linear1": (3 * h + mlp, h), "linear2": (h, h + mlp),
    }  # fmt: skip
    plain = {
        "img_in": (h, config.in_channels),
        "txt_in": (h, config.context_in_dim),
        "vector_in.in_layer": (h, config.vec_in_dim),
        "time_in.in_layer": (h, 256),
        "guidance_in.in_layer": (h, 256),
        "final_layer.adaLN_modulation.1": (2 * h, h),
        "final_layer.linear": (64, h),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    layers = config.layers()
    for name, source in layers.items():
        if isinstance(source, W4A4Source):
            shape: tuple[int, ...] = w4a4[name.rpartition(".")[2]]
        elif isinstance(source, AWQSource):
            shape = (source.splits * h, h)
        else:
            shape = plain.get(name, (h, h) if source.has_bias else (128,))
        shapes[f"{name}.weight"] = shape
        if isinstance(source, W4A4Source | AWQSource) or source.has_bias:
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def diffusers_names(stock: str) -> tuple[str, ...]:
    """Names in diffusers' model of the tensors whose rows make a stock tensor."""
    module, _, leaf = stock.rpartition(".")
    block, _, rest = module.partition(".")
    if block in ("double_blocks", "single_blocks"):
        index, _, layer = rest.partition(".")
        prefix, table = {
            "double_blocks": ("transformer_blocks", _DIFFUSERS_DOUBLE),
            "single_blocks": ("single_transformer_blocks", _DIFFUSERS_SINGLE),
        }[block]
        return tuple(f"{prefix}.{index}.{name}.{leaf}" for name in table[layer])
    return (f"{flux_names.outer_layers(guidance=True)[module].name}.{leaf}",)
