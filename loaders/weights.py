"""What a checkpoint holds once file formats are out of the way: logical weights under ComfyUI's stock FLUX names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.int4 import W8A8, PackedAWQ, PackedW4A4
from . import flux_names


class CheckpointError(ValueError):
    """A file that cannot be used. The message is one complete line: file, key, found, expected, what to do.

    found: what is there instead, where that is known.
    """

    # ComfyUI shows it with the class; the real one is the path of this pack's folder.
    __module__ = "svdq"

    def __init__(self, message: str, found: str = "") -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1 transformer, read from tensor shapes.

    in_channels and out_channels count values per 2x2 patch (64 for FLUX.1-dev: 16 latent channels x 4).
    """

    hidden_size: int
    depth: int
    depth_single_blocks: int
    in_channels: int
    out_channels: int
    context_in_dim: int
    vec_in_dim: int
    guidance_embed: bool

    @property
    def mlp_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def num_heads(self) -> int:
        return self.hidden_size // 128

    def layers(
        self, plain_linears: Collection[str] = (), int8_linears: Collection[str] = ()
    ) -> dict[str, flux_names.Source]:
        """Stock module name -> stored layer(s), as :func:`flux_names.all_layers`."""
        sizes = self.depth, self.depth_single_blocks, self.guidance_embed
        return flux_names.all_layers(*sizes, plain_linears, int8_linears)


LowRank = tuple[Tensor, Tensor]
"""A LoRA that a saved model has beside a weight: down [R, K] and up [N, R], natural order, strength included."""


@dataclass(frozen=True)
class W4A4Linear:
    """A W4A4 linear under its stock name: packed parts and the stored bias [N].

    axis 0: outputs of the parts side by side (``linear1`` = qkv, fc1); axis 1: inputs side by side, outputs summed
    (``linear2`` = attention out, fc2). All other linears have one part. lora: what does not fit into their branches.
    """

    parts: tuple[PackedW4A4, ...]
    axis: int
    bias: Tensor
    lora: LowRank | None = None

    @property
    def shape(self) -> tuple[int, int]:
        if self.axis == 0:
            return sum(p.n for p in self.parts), self.parts[0].k
        return self.parts[0].n, sum(p.k for p in self.parts)


@dataclass(frozen=True)
class AWQLinear:
    """A W4A16 modulation layer: packed weight, bias [N] in BFL's row order without the +1 that the file bakes in.

    lora: in BFL's row order, too.
    """

    weight: PackedAWQ
    bias: Tensor
    lora: LowRank | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.n, self.weight.k


@dataclass(frozen=True)
class Int8Linear:
    """A linear in INT8 that other files have in four bits: weight and bias [N] in BFL's row order."""

    weight: W8A8
    bias: Tensor
    lora: LowRank | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.n, self.weight.k


@dataclass(frozen=True)
class PlainLayer:
    """A layer that is not quantized: ``weight`` of any shape, ``bias`` or None (norms)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


Layer = W4A4Linear | AWQLinear | Int8Linear | PlainLayer


def on_device(layer: Any, device: torch.device | str) -> Any:
    """A layer, or part of one, with every tensor in it on ``device``."""
    if isinstance(layer, Tensor):
        return layer.to(device)
    if isinstance(layer, tuple):
        return tuple(on_device(part, device) for part in layer)
    if dataclasses.is_dataclass(layer):
        fields = {f.name: on_device(getattr(layer, f.name), device) for f in dataclasses.fields(layer)}
        return dataclasses.replace(layer, **fields)
    return layer


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: facts about it, and its layers on demand.

    path: file or folder · files: the files that hold the bytes · format: "nunchaku", "nunchaku-legacy-folder",
    "comfyui" or "comfy-kitchen" · variant: "dev", "schnell", "fill", ... · precision: "int4" · ranks: rank of the
    low-rank branch -> number of packed weights that have it · dtype: of scales and low-rank factors · metadata: the
    header's strings · notes: what a user should know and nothing breaks on · file_bytes: total size · layer_names:
    stock module names in model order · plain_linears, int8_linears: those in 16 bits and in INT8, of linears that other
    files have in four bits.

    ``layer(name)`` reads one layer: tensors are views of the mapped file wherever the stock layout allows it.
    """

    path: str
    files: tuple[str, ...]
    format: str
    variant: str
    precision: str
    ranks: dict[int, int]
    dtype: torch.dtype
    config: FluxConfig
    metadata: dict[str, str]
    notes: tuple[str, ...]
    file_bytes: int
    layer_names: tuple[str, ...]
    read_layer: Callable[[str], Layer] = field(repr=False)
    plain_linears: tuple[str, ...] = ()
    int8_linears: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, flux_names.Source]:
        """Stock module name -> stored layer(s), in model order."""
        return self.config.layers(self.plain_linears, self.int8_linears)

    @property
    def rank(self) -> int:
        """The largest rank in the file."""
        return max(self.ranks)

    def layer(self, name: str) -> Layer:
        """One layer by its stock module name, ``double_blocks.0.img_attn.qkv`` and so on."""
        return self.read_layer(name)

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """(name, layer) for all layers, one at a time."""
        for name in self.layer_names:
            yield name, self.read_layer(name)
