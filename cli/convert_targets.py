"""The formats that ``convert`` writes, one layer at a time."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.int4 import MAX_RANK
from ..loaders import AWQLinear, Checkpoint, PlainLayer
from ..loaders.flux_names import LOW_RANK_LEAVES, AWQSource, PlainSource, W4A4Source, canonical_key
from ..loaders.kitchen import kitchen_layer
from ..loaders.nunchaku import stored_layer
from ..loaders.safetensors_file import mapped_reader, problem, read_header
from ..loaders.tensor_set import VARIANT, some
from ..loaders.weights import Int8Linear, Layer
from ..loaders.write import Spec
from ..quantizer.job import file_metadata
from ..quantizer.lora import Delta, with_loras
from ..quantizer.source import stock_shapes
from .dequantize import effective

_ROTATED = (256, 64)  # sizes of the groups that comfy-kitchen rotates, the usual one first
_PUBLISHED = ("config", "comfy_config", "model_class", "quantization_config")


class Baked:
    """A checkpoint with LoRAs in its layers.

    checkpoint · deltas: stock layer -> what LoRAs add to it · without_modulation: leave out what they do to
    modulation layers · left_out: how many tensors of LoRAs that are.
    """

    def __init__(
        self, checkpoint: Checkpoint, deltas: Mapping[str, Sequence[Delta]], without_modulation: bool = False
    ) -> None:
        self.checkpoint, self._without_modulation = checkpoint, without_modulation
        self.sources = checkpoint.sources
        dropped = {name for name in deltas if without_modulation and isinstance(self.sources[name], AWQSource)}
        self.deltas = {name: found for name, found in deltas.items() if name not in dropped}
        self.left_out = 2 * sum(len(deltas[name]) for name in dropped)

    def layer(self, name: str) -> Layer:
        layer = self.checkpoint.layer(name)
        if self._without_modulation and isinstance(layer, AWQLinear):
            layer = AWQLinear(layer.weight, layer.bias)
        return with_loras(layer, self.deltas.get(name, ()))


class Target(Protocol):
    """dense: layers that have to be in 16 bits there; after :meth:`specs`."""

    dense: list[str]

    def specs(self) -> dict[str, Spec]:
        """Key -> dtype and shape of every tensor. Raises CheckpointError for what the format has no place for."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Key -> tensor, of one layer by its stock name."""

    def metadata(self) -> dict[str, str]:
        """The strings of the header; after :meth:`specs`."""


def make_target(to: str, baked: Baked, loras: Sequence[tuple[str, float]]) -> Target:
    """to: one of convert.FORMATS · loras: (path, strength), for the metadata."""
    kinds = {"nunchaku": Nunchaku, "comfy": ComfyInt8, "comfy-svdquant": ComfySVDQuant}
    return kinds[to](baked, loras)


class _FourBit:
    """What formats have in common whose layers are those of the checkpoint."""

    def __init__(self, baked: Baked, loras: Sequence[tuple[str, float]]) -> None:
        self._baked, self._loras = baked, loras
        self.rank = 0
        self.dense: list[str] = []

    def specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        modulation, crowded = [], {}
        for name in self._baked.sources:
            layer = self._layer(name)
            if getattr(layer, "lora", None) is None:
                tensors = self.tensors(name)
                if name in self._baked.deltas:
                    _check_finite(self._baked.checkpoint, tensors)
                specs |= {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
                self.rank = max(self.rank, *(part.rank for part in getattr(layer, "parts", ())), 0)
            elif isinstance(layer, AWQLinear):
                modulation.append(name)
            else:
                crowded[name] = layer.lora[0].shape[0]
        path, elsewhere = self._baked.checkpoint.path, "choose --to comfy, whose layers take any LoRA"
        if modulation:
            remedy = (
                f"Leave that part out with --without-modulation; or {elsewhere}; or let ComfyUI save the model (SVDQ "
                "FLUX Loader, LoRA, ModelSave), whose files hold it"
            )
            found = f"a LoRA on {len(modulation)} modulation layers"
            raise problem(path, some(modulation), found, "LoRAs on layers with a low-rank branch", remedy)
        if crowded:
            found = f"LoRAs of rank {max(crowded.values())} in all"
            expected = f"room for them beside the branch: {MAX_RANK} in all"
            raise problem(path, some(crowded), found, expected, f"Bake fewer of them; or {elsewhere}")
        return specs

    def tensors(self, name: str) -> dict[str, Tensor]:
        raise NotImplementedError

    def _layer(self, name: str) -> Layer:
        """An INT8 layer with a LoRA is in 16 bits: there is no place for a LoRA beside it, and rounding the two to
        eight bits again would round as much as many LoRAs change."""
        layer = self._baked.layer(name)
        if isinstance(layer, Int8Linear) and layer.lora is not None:
            return self._in_16_bits(name, layer)
        return layer

    def _in_16_bits(self, name: str, layer: Layer) -> PlainLayer:
        if name not in self.dense:
            self.dense.append(name)
        return PlainLayer(*effective(layer, self._baked.checkpoint.dtype))


class Nunchaku(_FourBit):
    """A single svdq-int4 file. What no LoRA changes is copied as it is if the source has the same tensors."""

    def __init__(self, baked: Baked, loras: Sequence[tuple[str, float]]) -> None:
        super().__init__(baked, loras)
        self._stored: dict[str, dict[str, tuple[str, str]]] = {}  # stored layer -> tensor -> (file, key)
        if baked.checkpoint.format.startswith("nunchaku"):
            for file in baked.checkpoint.files:
                for key in read_header(file).tensors:
                    name = canonical_key(key)
                    self._stored.setdefault(name.rpartition(".")[0], {})[name] = file, key

    def tensors(self, name: str) -> dict[str, Tensor]:
        source, tensors = self._baked.sources[name], {}
        if self._stored:
            modules = source.parts if isinstance(source, W4A4Source) else (source.name,)
            stored = {key: where for module in modules for key, where in self._stored[module].items()}
            tensors = {key: mapped_reader(file)(original) for key, (file, original) in stored.items()}
            if name not in self._baked.deltas:
                return tensors
        layer = self._layer(name)
        if isinstance(layer, PlainLayer) and not isinstance(source, PlainSource):
            return stored_layer(PlainSource(name, has_bias=True), layer, self._baked.checkpoint.dtype)
        made = stored_layer(source, layer, self._baked.checkpoint.dtype)
        if not tensors:
            return made
        ends = LOW_RANK_LEAVES if isinstance(source, W4A4Source) else (".weight",)
        return tensors | {key: tensor for key, tensor in made.items() if key.endswith(ends)}

    def metadata(self) -> dict[str, str]:
        checkpoint = self._baked.checkpoint
        made = file_metadata(_base(checkpoint.path), checkpoint.config, self.rank)
        if checkpoint.format == "nunchaku-legacy-folder" and not self._loras:
            return {key: checkpoint.metadata.get(key, made[key]) for key in _PUBLISHED}
        kept = checkpoint.metadata if checkpoint.format.startswith("nunchaku") else {VARIANT: checkpoint.variant}
        return made | kept | {"quantization_config": made["quantization_config"]} | _lora_metadata(self._loras)


class ComfySVDQuant(_FourBit):
    """comfy-kitchen's svdquant_w4a4 and awq_w4a16, see loaders/kitchen.py; what has no such form is in 16 bits."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        layer = self._layer(name)
        leaves = None if isinstance(layer, PlainLayer) else kitchen_layer(layer)
        if leaves is None:
            layer = layer if isinstance(layer, PlainLayer) else self._in_16_bits(name, layer)
            leaves = {"weight": layer.weight} if layer.bias is None else {"weight": layer.weight, "bias": layer.bias}
        return {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}

    def metadata(self) -> dict[str, str]:
        return _own_metadata(self._baked.checkpoint, self._loras, "4-bit layers of an SVDQuant INT4 checkpoint")


class ComfyInt8:
    """INT8 with one scale for each row, rotated by Hadamard matrices: ComfyUI's int8_tensorwise with convrot.

    Layers are those of the equivalent ordinary model (``dequantize``), so every LoRA fits. The rotation spreads
    outliers over 256 columns: weights are rounded by 0.9 % of their size instead of 2.4 % (docs/convert.md).
    """

    def __init__(self, baked: Baked, loras: Sequence[tuple[str, float]]) -> None:
        self._baked, self._loras = baked, loras
        self.dense: list[str] = []

    def specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        shapes = stock_shapes(self._baked.checkpoint.config)
        for name, source in self._baked.sources.items():
            if isinstance(source, PlainSource):
                specs |= {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in self.tensors(name).items()}
                continue
            n, k = shapes[f"{name}.weight"]
            specs |= {
                f"{name}.weight": Spec(torch.int8, (n, k)),
                f"{name}.weight_scale": Spec(torch.float32, (n, 1)),
                f"{name}.bias": Spec(self._baked.checkpoint.dtype, (n,)),
                f"{name}.comfy_quant": Spec(torch.uint8, (len(_described(k)),)),
            }
        return specs

    def tensors(self, name: str) -> dict[str, Tensor]:
        layer = self._baked.layer(name)
        if isinstance(layer, PlainLayer):
            tensors = {f"{name}.weight": layer.weight} | ({} if layer.bias is None else {f"{name}.bias": layer.bias})
            _check_finite(self._baked.checkpoint, tensors)
            return tensors
        weight, bias = effective(layer, torch.float32)
        n, k = weight.shape
        size = _group_size(k)
        rotated = (weight.view(n, k // size, size) @ _hadamard(size)).view(n, k)
        scale = rotated.abs().amax(dim=1, keepdim=True) / 127
        scale[scale == 0] = 1
        return {
            f"{name}.weight": (rotated / scale).round_().to(torch.int8),
            f"{name}.weight_scale": scale,
            f"{name}.bias": bias.to(self._baked.checkpoint.dtype),
            f"{name}.comfy_quant": torch.frombuffer(bytearray(_described(k)), dtype=torch.uint8),
        }

    def metadata(self) -> dict[str, str]:
        return _own_metadata(self._baked.checkpoint, self._loras, "INT8 weights of an SVDQuant INT4 checkpoint")


def _group_size(k: int) -> int:
    return next(size for size in _ROTATED if k % size == 0)


def _described(k: int) -> bytes:
    conf = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": _group_size(k)}
    return json.dumps(conf).encode()


@functools.cache
def _hadamard(size: int) -> Tensor:
    """float32 [size, size], symmetric and orthogonal: the regular Hadamard matrix of comfy-kitchen, a power of 4."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    return four if size == 4 else torch.kron(_hadamard(size // 4), four)


def _check_finite(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """LoRAs may lead beyond the range of the file's type."""
    for key, tensor in tensors.items():
        if tensor.dtype.is_floating_point and not tensor.isfinite().all():
            found = f"a LoRA that leads beyond the range of {tensor.dtype}".replace("torch.", "")
            raise problem(checkpoint.path, key, found, "values that fit", "Lower its strength")


def _own_metadata(checkpoint: Checkpoint, loras: Sequence[tuple[str, float]], what: str) -> dict[str, str]:
    return {
        "format": "pt",
        "modelspec.architecture": "flux-1",
        "svdq.source": _base(checkpoint.path),
        "svdq.source_format": checkpoint.format,
        VARIANT: checkpoint.variant,
        "svdq.note": f"{what}: its quality, not that of the original model",
    } | _lora_metadata(loras)


def _lora_metadata(loras: Sequence[tuple[str, float]]) -> dict[str, str]:
    described: list[dict[str, Any]] = [{"file": _base(path), "strength": strength} for path, strength in loras]
    return {"svdq.loras": json.dumps(described)} if described else {}


def _base(path: str) -> str:
    return os.path.basename(os.path.abspath(path))
