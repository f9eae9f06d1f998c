"""LoRA files, under every naming that FLUX trainers use, and what they make of the layers of an INT4 checkpoint.

In a 4-bit layer a LoRA becomes more columns of the low-rank branch: exact but for the rounding of its two factors, and
nothing is quantized again. In a 16-bit layer it is added to the weight.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.int4 import MAX_RANK
from ..loaders.flux_names import PlainSource
from ..loaders.nunchaku import swapped_halves
from ..loaders.safetensors_file import mapped_reader, problem, read_header
from ..loaders.tensor_set import some
from ..loaders.weights import AWQLinear, FluxConfig, Int8Linear, Layer, PlainLayer
from .source import check_finite, diffusers_names, stock_shapes

_EXPECTED = "a LoRA for FLUX.1, as its trainer wrote it"
_OTHER_MODEL = "Choose a LoRA that was made for this model"
_MERGE = "Bake it into the 16-bit model: the node SVDQ Quantize does that behind any LoRA node"
_PEFT_DORA = "DoRA of PEFT"
_MERGE_PEFT = "Bake it into the 16-bit model with PEFT: ComfyUI does not know its magnitudes"

# Ends of the keys of both factors and of their scale.
_DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight",
    ".lora_linear_layer.down.weight", ".lora_A", ".down.weight",
)  # fmt: skip
_UP = tuple(end.replace("down", "up").replace("lora_A", "lora_B") for end in _DOWN)
_ENDS = [*((end, "down") for end in _DOWN), *((end, "up") for end in _UP), (".alpha", "alpha")]
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_model")
# What else may be in such a file -> what it is called.
_OTHERS = {
    ".hada_": "LoHa", ".lokr_": "LoKr", ".dora_scale": "DoRA", ".lora_magnitude": _PEFT_DORA,
    ".oft_": "OFT", ".a1.weight": "GLoRA", ".lora_mid": "LoCon", ".diff_b": "differences of biases",
    ".lora_B.bias": "differences of biases", ".b_norm": "differences of biases", ".w_norm": "full differences",
    ".diff": "full differences", ".set_weight": "new weights", "_norm.scale": "new weights",
    ".reshape_weight": "a wider layer",
}  # fmt: skip

_Keys = dict[str, str]  # "down", "up", "alpha" -> key


@dataclass(frozen=True)
class Delta:
    """What one LoRA adds to a layer's weight: ``scale * up @ down`` to its ``rows``.

    down: [r, K] · up: [n, r], any float dtype, views of the file · swapped: its rows' halves are in the opposite order.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: slice
    swapped: bool = False

    def factors(self, n: int) -> tuple[Tensor, Tensor]:
        """(down [r, K], up [n, r]), float32, for all n rows of the weight."""
        up = self.scale * self.up.float()
        whole = up.new_zeros(n, up.shape[1])
        whole[self.rows] = swapped_halves(up) if self.swapped else up
        return self.down.float(), whole


@dataclass(frozen=True)
class _Target:
    layer: str
    rows: slice
    k: int
    swapped: bool = False


def read_loras(
    files: Iterable[tuple[str | os.PathLike[str], float]], config: FluxConfig
) -> tuple[dict[str, list[Delta]], int]:
    """(stock layer -> what LoRAs add to it, tensors for text encoders that were left out).

    files: (path, strength) of each. Raises CheckpointError for a file with anything but the factors of LoRAs for a
    model of these sizes: nothing is left out in silence.
    """
    targets = _targets(config)
    deltas: dict[str, list[Delta]] = defaultdict(list)
    left_out = 0
    for path, strength in files:
        path = os.fspath(path)
        header = read_header(path)
        keys = [key for key in header.tensors if not key.startswith(_TEXT_ENCODERS)]
        left_out += len(header.tensors) - len(keys)
        read = mapped_reader(path)
        for name, keys_of in _by_name(path, keys, targets).items():
            target = targets[name]
            deltas[target.layer].append(_delta(path, keys_of, target, strength, read))
    return dict(deltas), left_out


def _by_name(path: str, keys: Sequence[str], targets: Mapping[str, _Target]) -> dict[str, _Keys]:
    """Name in ``targets`` -> keys for it."""
    found: dict[str, _Keys] = defaultdict(dict)
    others: dict[str, list[str]] = defaultdict(list)
    unknown = []
    for key in keys:
        known = ((key[: -len(end)], kind) for end, kind in _ENDS if key.endswith(end))
        name, kind = next(((name, kind) for name, kind in known if name in targets), (None, None))
        if name is not None:
            found[name][kind] = key
            continue
        what = next((what for part, what in _OTHERS.items() if part in key), None)
        unknown.append(key) if what is None else others[what].append(key)
    if others:
        what, telling = next(iter(others.items()))
        remedy = _MERGE_PEFT if what == _PEFT_DORA else _MERGE
        raise problem(path, some(telling), f"{what} ({len(telling)} tensors)", "factors of LoRAs only", remedy)
    unknown += [keys_of["alpha"] for keys_of in found.values() if set(keys_of) == {"alpha"}]
    if unknown:
        raise problem(path, some(unknown), f"{len(unknown)} keys of no layer of this model", _EXPECTED, _OTHER_MODEL)
    if not found:
        raise problem(path, "tensors", "none for the transformer", _EXPECTED, _OTHER_MODEL)
    return found


def _delta(path: str, keys: _Keys, target: _Target, strength: float, read: Callable[[str], Tensor]) -> Delta:
    factors = {kind: read(key) for kind, key in keys.items()}
    for kind, other in (("down", "up"), ("up", "down")):
        if kind not in factors:
            remedy = "The file is incomplete: download it again"
            raise problem(path, keys[other], f"no {kind} factor beside it", "both factors", remedy)
    rank, n = factors["down"].shape[0] if factors["down"].ndim else 0, target.rows.stop - target.rows.start
    for kind, shape in (("down", (rank, target.k)), ("up", (n, rank))):
        tensor, key = factors[kind], keys[kind]
        if tuple(tensor.shape) != shape or not rank or not tensor.dtype.is_floating_point:
            what = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise problem(path, key, what, f"floats {list(shape)} for {target.layer}", _OTHER_MODEL)
        check_finite(tensor.float(), path, key)
    scale = strength
    if "alpha" in factors:
        alpha, key = factors["alpha"], keys["alpha"]
        if alpha.numel() != 1 or not alpha.float().isfinite().all():
            raise problem(path, key, f"shape {list(alpha.shape)}", "one finite number", "Download the file again")
        scale *= alpha.float().item() / rank
    return Delta(factors["down"], factors["up"], scale, target.rows, target.swapped)


def _targets(config: FluxConfig) -> dict[str, _Target]:
    """Every name that a layer may have in a file, without the ends of the keys."""
    shapes = stock_shapes(config)
    targets: dict[str, _Target] = {}

    def add(target: _Target, name: str, prefixes: Sequence[str], flat: Sequence[str]) -> None:
        targets.update({f"{prefix}{name}": target for prefix in prefixes})
        targets.update({f"{prefix}{name.replace('.', '_')}": target for prefix in flat})

    for stock, source in config.layers().items():
        if isinstance(source, PlainSource) and not source.has_bias:
            continue  # norms
        n, k = shapes[f"{stock}.weight"]
        # ComfyUI and Black Forest Labs, PEFT, kohya.
        add(_Target(stock, slice(0, n), k), stock, ("diffusion_model.", "", "base_model.model."), ("lora_unet_",))
        names = [name.removesuffix(".weight") for name in diffusers_names(f"{stock}.weight")]
        starts = [0] if len(names) == 1 else [index * config.hidden_size for index in range(len(names))]
        swapped = isinstance(source, PlainSource) and source.swap_halves
        for name, start, stop in zip(names, starts, [*starts[1:], n], strict=True):
            # diffusers, DiffSynth, PEFT; OneTrainer, SimpleTuner, kohya.
            target = _Target(stock, slice(start, stop), k, swapped)
            prefixes, flat = ("transformer.", "", "base_model.model."), ("lora_transformer_", "lycoris_", "lora_unet_")
            add(target, name, prefixes, flat)
    # XLabs: 1 is the image's stream, 2 the text's; of linear1, qkv only.
    for index in range(config.depth):
        block = f"double_blocks.{index}"
        for number, stream in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                targets[f"{block}.processor.{layer}_lora{number}"] = targets[f"{block}.{stream}_attn.{layer}"]
    for index in range(config.depth_single_blocks):
        block = f"single_blocks.{index}"
        qkv = replace(targets[f"{block}.linear1"], rows=slice(0, 3 * config.hidden_size))
        targets[f"{block}.processor.qkv_lora"] = qkv
        targets[f"{block}.processor.proj_lora"] = targets[f"{block}.linear2"]
    return targets


# ---- what they make of layers


def with_loras(layer: Layer, deltas: Sequence[Delta]) -> Layer:
    """The same layer with LoRAs, those beside it (``layer.lora``) included.

    They stay, or are put, beside a layer that has no room for them: one without a low-rank branch, or whose rank would
    be above MAX_RANK.
    """
    if isinstance(layer, PlainLayer):
        if not deltas:
            return layer
        weight = layer.weight.float()
        for delta in deltas:
            down, up = delta.factors(len(weight))
            weight = weight + up @ down
        return PlainLayer(weight.to(layer.weight.dtype), layer.bias)
    factors = [delta.factors(layer.shape[0]) for delta in deltas]
    if layer.lora is not None:
        factors.append((layer.lora[0].float(), layer.lora[1].float()))
    if not factors:
        return layer
    down, up = torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], dim=1)
    if isinstance(layer, AWQLinear | Int8Linear):
        return replace(layer, lora=(down, up))
    parts, start = [], 0
    for part in layer.parts:
        section = slice(start, start + (part.n if layer.axis == 0 else part.k))
        start = section.stop
        part_down, part_up = (down, up[section]) if layer.axis == 0 else (down[:, section], up)
        # A LoRA for another part of the layer has nothing but zeros here.
        used = part_down.any(dim=1) & part_up.any(dim=0)
        parts.append(part.extended(part_down[used], part_up[:, used]) if used.any() else part)
    if max(part.rank for part in parts) > MAX_RANK:
        return replace(layer, lora=(down, up))
    return replace(layer, parts=tuple(parts), lora=None)
