"""FLUX blocks on fused kernels, inside ComfyUI's own block classes.

A block here is the stock module with another ``forward``: normalization and modulation go into the quantization of an
input, RMSNorm and RoPE into the qkv product, which writes q, k, v of text and image into one buffer, and gate and
residual into the output products. Whatever wants to see an intermediate tensor, and every layer that is not a plain
quantized one, gets the stock forward with our linears; both ways agree.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, EmbedND, Modulation, SingleStreamBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import Backend
from ..kernels.int4 import W8A8, PackedAWQ, PackedW4A4
from . import graph_memory
from .graphs import Attend, BlockGraphs
from .held import Held
from .kept_weights import KeptWeights
from .layout_svdq import SVDQInt4Layout, branchless, compute_type, linear_branchless
from .ops import QuantizedLinear, is_quantized
from .slots import resident, unpin

HEAD = 128
_STOCK_ATTENTION = comfy.ldm.flux.math.attention  # other packs put their own in its place

# Exact kernels of torch, the fastest on Hopper and Blackwell first; ComfyUI's own order takes FlashAttention 2 there.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Rotary:
    """Sines and cosines of one forward pass in the order of the kernels, made once from ComfyUI's ``pe``."""

    def __init__(self) -> None:
        self._pe: Any = None
        self._rows: Tensor | None = None

    def rows(self, pe: Tensor) -> Tensor:
        """float32 [B, L, 64, 2] (sine, cosine) of pe float32 [B, 1, L, 64, 2, 2]."""
        if self._pe is None or self._pe() is not pe:
            self._rows = torch.stack((pe[:, 0, :, :, 1, 0], pe[:, 0, :, :, 0, 0]), dim=-1).float().contiguous()
            self._pe = weakref.ref(pe)
        return self._rows


class FusedEmbedND(EmbedND):
    """ComfyUI's table of rotations, of all axes at once: 8 kernels instead of 36, each of which Python has to start
    before the first block can. The same bits."""

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [B, 1, L, sum(axes_dim) / 2, 2, 2] of ids [B, L, axes]."""
        fits = comfy.model_management.supports_fp64(ids.device) and ids.shape[-1] == len(self.axes_dim)
        if torch.compiler.is_compiling() or not fits:
            return super().forward(ids)
        axes, omega = _frequencies(tuple(self.axes_dim), self.theta, ids.device)
        angle = ids.float()[..., axes] * omega
        cosine, sine = torch.cos(angle), torch.sin(angle)
        pe = torch.stack((cosine, -sine, sine, cosine), dim=-1).float()
        return pe.view(*angle.shape, 2, 2).unsqueeze(1)


@functools.lru_cache(maxsize=8)
def _frequencies(axes_dim: tuple[int, ...], theta: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(axis int64 [P], radians float64 [P] for each position) of every pair of columns."""
    with torch.inference_mode(False):
        axes = torch.tensor([axis for axis, dim in enumerate(axes_dim) for _ in range(dim // 2)], device=device)
        scales = [
            torch.linspace(0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64, device=device) for dim in axes_dim
        ]
        return axes, torch.cat([1.0 / (theta**scale) for scale in scales])


class _Weights:
    """The weights of a block on the device of x.

    Those that are there are held until ``pins`` are given back. Core brings the others one at a time, so that each is
    there only while it is used.
    """

    def __init__(self, block: _Fused, x: Tensor, pins: list[Any]):
        comfy.ops.run_every_op()
        self._x, device, dtype = x, x.device, x.dtype
        self._linears = block._parts.linears
        held: dict[str, Held] = {}
        for name, linear in self._linears.items():
            there = resident(linear, device, pins)
            if there is not None:
                held[name] = linear.hold(*there, x)
        self.resident = len(held) == len(self._linears)
        # Of those that are there; other ranks may need other kernels.
        self.ranks = tuple(part.rank for linear in held.values() for part in linear.parts)
        kept = block.kept.keep(block, held, device, pins) if self.resident else ()
        self.kept = bool(kept)
        self._held = {name: (linear.kept if kept else linear.parts, linear.bias) for name, linear in held.items()}
        places: list[Any] = [kept, *[linear.places for linear in held.values()]]
        self.norms: dict[str, Tensor] = {}
        for name, norm in block._parts.norms.items():
            there = resident(norm, device, pins)
            if there is not None and there[0].dtype == dtype:
                self.norms[name] = there[0]
                places.append(there[0].data_ptr())
            else:
                self.resident = False
                weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
                self.norms[name] = weight.clone()
                comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
        self._layers = block.layers
        self._modulations = [_hold_modulation(linear, x, pins) for linear in block._parts.modulations]
        self.modulates = bool(self._modulations) and None not in self._modulations
        if self.modulates:
            for weight, bias, factors in self._modulations:
                codes = weight.q if isinstance(weight, W8A8) else weight.qweight
                tensors, rank = (codes, bias, *(factors or ())), len(factors[0]) if factors else 0
                places.append((rank, *(0 if t is None else t.data_ptr() for t in tensors)))
            self.ranks += tuple((type(weight), factors is not None) for weight, _, factors in self._modulations)
        # What a CUDA graph of the block has recorded of its weights, if all of them are resident.
        self.places = tuple(places)

    def modulate(self, vec: Tensor) -> tuple[Tensor, ...]:
        """What the block's modulation layers make of vec T [B, hidden], if ``modulates``."""
        vec = nn.functional.silu(vec)
        return tuple(linear_branchless(self._layers, vec, *held) for held in self._modulations)

    @contextlib.contextmanager
    def use(self, name: str, copied: bool = False) -> Iterator[tuple[tuple[PackedW4A4, ...], Tensor | None]]:
        """(parts, bias) of a linear. copied: they stay while others are brought."""
        if name in self._held:
            yield self._held[name]
            return
        linear = self._linears[name]
        with linear.on_device(self._x) as (weight, bias):
            parts = linear.parts(weight, self._x)
            if not copied:
                yield parts, bias
                return
            clones: dict[int, Tensor] = {}  # parts that share a tensor go on sharing it
            parts = tuple(part.map(lambda t: clones.setdefault(id(t), t.clone())) for part in parts)
            bias = None if bias is None else bias.clone()
        yield parts, bias


def _hold_modulation(
    linear: QuantizedLinear, x: Tensor, pins: list[Any]
) -> tuple[PackedAWQ | W8A8, Tensor | None, tuple[Tensor, Tensor] | None] | None:
    """Weight, bias and LoRA factors of a modulation layer for kernels with activations like x, if they stay on x's
    device (see :func:`slots.resident`), and nobody changes them otherwise, watches or takes the place of ``forward``.
    """
    weight = linear.weight
    if (
        not is_quantized(weight)
        or weight._layout_cls == SVDQInt4Layout.__name__
        or compute_type(weight) != x.dtype
        or not linear.has_plain_patches()
        or linear._forward_hooks
        or linear._forward_pre_hooks
        or _is_replaced(linear)
    ):
        return None
    there = resident(linear, x.device, pins)
    return None if there is None else (branchless(there[0]), there[1], linear.factors(x))


def _is_replaced(module: nn.Module) -> bool:
    """Whether something else is called instead of a module; ComfyUI's bypass LoRA puts ``forward`` back on it."""
    return getattr(module.forward, "__func__", None) is not type(module).forward


@dataclass(frozen=True)
class _Parts:
    """The modules of a block, without itself, or it would keep its memory until the garbage collector comes.

    tree: all of them, as (children of a module, name, child) · watched: those that nobody may have hooked anything to ·
    linears, norms: those that fused kernels take the place of · modulations: linears of which they may; none if one is
    not ours.
    """

    tree: list[tuple[dict[str, nn.Module | None], str, nn.Module | None]]
    watched: list[nn.Module]
    linears: dict[str, QuantizedLinear]
    norms: dict[str, nn.Module]
    modulations: list[QuantizedLinear]


class _Fused:
    """What both kinds of blocks share. :func:`fuse_blocks` sets layers (kernels.layers.Layers), rotary, graphs, kept.

    torch.compile leaves a whole block out and compiles what is around it. As an operator, a block could return neither
    its inputs nor the tensors of its graph: every block would copy its streams, 2 % of a step on an H200.
    """

    layers: Any
    rotary: Rotary
    graphs: BlockGraphs
    kept: KeptWeights
    linears: tuple[str, ...]  # the quantized linears of a block, by name
    norms: tuple[str, ...]
    modulations: tuple[str, ...]
    _parts: _Parts | None = None  # as they were found last

    def _fuses(self, x: Tensor, vec: Any, pe: Tensor | None, dims: Any, transformer_options: dict) -> bool:
        """Whether this call can be fused: nobody looks inside the block, and every layer is as stored."""
        patches = transformer_options.get("patches", {})
        return (
            isinstance(vec, Tensor)
            and vec.ndim == 2
            and dims is None
            and "attn1_patch" not in patches
            and "attn1_output_patch" not in patches
            and comfy.ldm.flux.layers.attention is _STOCK_ATTENTION
            and pe is not None
            and pe.ndim == 6
            and pe.shape[1] == 1
            and pe.shape[3:] == (HEAD // 2, 2, 2)
            and pe.shape[0] in (1, x.shape[0])
            and x.device.type == self.layers.device_type
            and self.hidden_size == self.num_heads * HEAD
            and not (torch.is_grad_enabled() and x.requires_grad)
            and self._as_built()
            and all(linear.plain(x.dtype) for linear in self._parts.linears.values())
        )

    def _as_built(self) -> bool:
        """Whether the block's parts are ComfyUI's and ours: nothing in the place of one or hooked to it."""
        parts = self._parts
        if parts is None or not all(children.get(name) is module for children, name, module in parts.tree):
            parts = self._parts = self._find_parts()
        return parts is not None and not any(
            part._forward_hooks or part._forward_pre_hooks or ("forward" in part.__dict__ and _is_replaced(part))
            for part in parts.watched
        )

    def _find_parts(self) -> _Parts | None:
        """None if one is not what it was built as."""
        modules = dict(self.named_modules())
        kinds = dict.fromkeys(self.linears, QuantizedLinear) | dict.fromkeys(self.norms, nn.RMSNorm)
        kinds |= dict.fromkeys(self.modulations, Modulation)
        if not all(isinstance(modules.get(name), kind) for name, kind in kinds.items()):
            return None
        called = [f"{name}.lin" for name in self.modulations]  # if need be as modules, whatever they are
        modulations = [modules[name] for name in called]
        return _Parts(
            tree=[(part._modules, name, child) for part in modules.values() for name, child in part._modules.items()],
            watched=[module for name, module in modules.items() if name not in ("", *called)],
            linears={name: modules[name] for name in self.linears},
            norms={name: modules[name] for name in self.norms},
            modulations=modulations if all(isinstance(linear, QuantizedLinear) for linear in modulations) else [],
        )

    def _run(self, vec: Tensor, streams: tuple[Tensor, ...], pe: Tensor, mask: Tensor | None,
             transformer_options: dict) -> tuple[Tensor, ...]:  # fmt: skip
        """The block on ``streams``, in place."""
        # A mask may be another tensor each time, what others attend with is not known to bear a CUDA graph, and
        # attention allocates its result.
        stock = torch_attention(transformer_options)
        apart = mask is not None or not stock or graph_memory.needed()
        if stock:
            attend = partial(attend_exactly, mask=mask)
        else:
            attend = partial(attend_as_asked, mask=mask, options=transformer_options)
        pins: list[Any] = []
        try:
            weights = _Weights(self, streams[0], pins)
            modulates = weights.modulates and len(vec) <= self.layers.max_awq_rows and vec.dtype == streams[0].dtype
            if modulates:
                given: tuple[Tensor, ...] = (vec,)
            else:
                silu = nn.functional.silu(vec)
                given = tuple(self.get_submodule(name).lin(silu) for name in self.modulations)
            tensors = (*streams, self.rotary.rows(pe), *given)

            def compute(attend: Attend, *tensors: Tensor) -> None:
                inputs, rows, given = tensors[: len(streams)], tensors[len(streams)], tensors[len(streams) + 1 :]
                self._compute(weights, inputs, weights.modulate(*given) if modulates else given, rows, attend)

            key = (type(self).__name__, streams[0].device, modulates, weights.ranks, *(t.shape for t in streams))
            kind = (*key, weights.kept)
            self.layers.compile_once(key, lambda: compute(graph_memory.attention_result, *(t.clone() for t in tensors)))
            if not weights.resident:
                compute(attend, *tensors)
                return streams
            places = (modulates, *weights.places)
            results = self.graphs.run(self, kind, places, compute, attend, apart, tensors, len(streams))
            if results[0] is not streams[0] and _is_wrapped(len(streams), transformer_options):
                # Whoever wraps a block may call it twice, and a graph writes to the same tensors both times.
                results = tuple(result.clone() for result in results)
            return results
        finally:
            unpin(pins)

    def _project_qkv(
        self,
        x: Tensor,
        part: PackedW4A4,
        bias: Tensor | None,
        modulation: Any,
        norms: tuple[Tensor, Tensor],
        rotary: Tensor,
        out: Tensor,
    ) -> None:
        """q, k, v of x T [B, n, hidden] into out T [B, n, 3 * hidden], whose batch elements may be apart."""
        for b in range(x.shape[0]):
            after = self.layers.after(norm_q=norms[0], norm_k=norms[1], rotary=rotary[b % rotary.shape[0]])
            one = self.layers.modulation(modulation.scale[b : b + 1], modulation.shift[b : b + 1])
            self.layers.multiply(self.layers.quantize(x[b], part, one), part, bias, after, out=out[b])

    def _gate(self, gate: Tensor, residual: Tensor) -> Any:
        """Epilogue residual + gate * y; gate T [B, hidden], residual T [M, hidden]."""
        return self.layers.after(gate=gate.contiguous(), residual=residual)


class FusedDoubleBlock(_Fused, DoubleStreamBlock):
    """A double block: image and text, each with its own weights, one attention."""

    linears = tuple(
        f"{stream}_{name}" for stream in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    )
    norms = tuple(f"{stream}_attn.norm.{name}_norm" for stream in ("img", "txt") for name in ("query", "key"))
    modulations = ("img_mod", "txt_mod")

    @torch.compiler.disable  # see _Fused
    def forward(
        self, img: Tensor, txt: Tensor, vec: Any, pe: Tensor, attn_mask: Tensor | None = None,
        modulation_dims_img: Any = None, modulation_dims_txt: Any = None, transformer_options: dict | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        transformer_options = {} if transformer_options is None else transformer_options
        dims = modulation_dims_img or modulation_dims_txt
        if not (img.is_contiguous() and txt.is_contiguous() and self._fuses(img, vec, pe, dims, transformer_options)):
            return super().forward(
                img, txt, vec, pe, attn_mask, modulation_dims_img, modulation_dims_txt, transformer_options
            )
        return self._run(vec, (img, txt), pe, attn_mask, transformer_options)

    def _compute(self, weights: _Weights, streams: tuple, modulations: tuple, rotary: Tensor, attend: Attend) -> None:
        img, txt = streams
        batch, n_txt, hidden = txt.shape
        length = n_txt + img.shape[1]
        qkv = img.new_empty(batch, length, 3 * hidden)
        parts = (
            ("txt", txt, modulations[1].chunk(6, dim=1), 0, n_txt),
            ("img", img, modulations[0].chunk(6, dim=1), n_txt, length),
        )
        for name, x, mod, start, stop in parts:
            norms = (weights.norms[f"{name}_attn.norm.query_norm"], weights.norms[f"{name}_attn.norm.key_norm"])
            modulation = self.layers.modulation(shift=mod[0], scale=mod[1])
            with weights.use(f"{name}_attn.qkv") as ((part,), bias):
                self._project_qkv(x, part, bias, modulation, norms, rotary[:, start:stop], qkv[:, start:stop])
        attention = attend(qkv.view(batch, length, 3, -1, HEAD))
        del qkv
        for name, x, mod, start, stop in parts:
            rows = x.view(-1, hidden)
            with weights.use(f"{name}_attn.proj") as ((part,), bias):
                y = self.layers.quantize(attention[:, start:stop].reshape(-1, hidden), part)
                self.layers.multiply(y, part, bias, self._gate(mod[2], rows), out=rows)
            modulation = self.layers.modulation(shift=mod[3].contiguous(), scale=mod[4].contiguous())
            fc1, fc2 = weights.use(f"{name}_mlp.0", copied=True), weights.use(f"{name}_mlp.2")
            with fc1 as ((part1,), bias1), fc2 as ((part2,), bias2):
                y = self.layers.gelu_input(self.layers.quantize(rows, part1, modulation), part1, bias1, part2)
                self.layers.multiply(y, part2, bias2, self._gate(mod[5], rows), out=rows)


class FusedSingleBlock(_Fused, SingleStreamBlock):
    """A single block: attention and MLP side by side on text and image together."""

    linears = ("linear1", "linear2")
    norms = ("norm.query_norm", "norm.key_norm")
    modulations = ("modulation",)

    @torch.compiler.disable  # see _Fused
    def forward(
        self, x: Tensor, vec: Any, pe: Tensor, attn_mask: Tensor | None = None, modulation_dims: Any = None,
        transformer_options: dict | None = None,
    ) -> Tensor:  # fmt: skip
        transformer_options = {} if transformer_options is None else transformer_options
        if not (x.is_contiguous() and self._fuses(x, vec, pe, modulation_dims, transformer_options)):
            return super().forward(x, vec, pe, attn_mask, modulation_dims, transformer_options)
        return self._run(vec, (x,), pe, attn_mask, transformer_options)[0]

    def _compute(self, weights: _Weights, streams: tuple, modulations: tuple, rotary: Tensor, attend: Attend) -> None:
        (x,) = streams
        batch, length, hidden = x.shape
        shift, scale, gate = modulations[0].chunk(3, dim=1)
        modulation = self.layers.modulation(shift=shift.contiguous(), scale=scale.contiguous())
        rows = x.view(-1, hidden)
        qkv = x.new_empty(batch, length, 3 * hidden)
        norms = (weights.norms["norm.query_norm"], weights.norms["norm.key_norm"])
        with weights.use("linear1", copied=True) as ((part, fc1), bias):
            part_bias, fc1_bias = (None, None) if bias is None else (bias[: part.n], bias[part.n :])
            if batch == 1:
                first, y = self.layers.quantize_for(rows, (part, fc1), modulation)
                after = self.layers.after(norm_q=norms[0], norm_k=norms[1], rotary=rotary[0])
                self.layers.multiply(first, part, part_bias, after, out=qkv[0])
            else:
                self._project_qkv(x, part, part_bias, modulation, norms, rotary, qkv)
                y = self.layers.quantize(rows, fc1, modulation)
            with weights.use("linear2") as ((attn_out, fc2), bias2):
                y = self.layers.gelu_input(y, fc1, fc1_bias, fc2)
                attention = attend(qkv.view(batch, length, 3, -1, HEAD))
                del qkv
                head = self.layers.quantize(attention.reshape(-1, hidden), attn_out)
                self.layers.multiply_sum(head, attn_out, y, fc2, bias2, self._gate(gate, rows), out=rows)


def _is_wrapped(streams: int, transformer_options: dict) -> bool:
    """Whether something calls the block in ComfyUI's place (``patches_replace``)."""
    kind = "double_block" if streams == 2 else "single_block"
    wrapped = transformer_options.get("patches_replace", {}).get("dit", {})
    return (kind, transformer_options.get("block_index")) in wrapped


def torch_attention(transformer_options: dict) -> bool:
    """Whether ComfyUI would take torch's attention, so that we may choose among torch's kernels ourselves."""
    stock = comfy.ldm.flux.math.optimized_attention is comfy.ldm.modules.attention.attention_pytorch
    return stock and "optimized_attention_override" not in transformer_options


def attend_exactly(qkv: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by the fastest exact kernel that torch has, on q, k, v T [B, L, 3, H, 128], normalized and rotated.

    Returns T [B, L, H * 128].
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
    if mask is not None and mask.ndim == 2:
        mask = mask[None, None]
    elif mask is not None and mask.ndim == 3:
        mask = mask[:, None]
    with sdpa_kernel(_ATTENTION, set_priority=True):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1)


def attend_as_asked(qkv: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    """As :func:`attend_exactly`, with the attention that ComfyUI's flags or an override ask for."""
    q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
    return comfy.ldm.flux.math.optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options
    )


def fused_blocks(flux: nn.Module) -> list[_Fused]:
    """The blocks of a Flux that have a fused forward; they share ``graphs`` and ``kept``."""
    return [block for block in (*flux.double_blocks, *flux.single_blocks) if isinstance(block, _Fused)]


def give_back(flux: nn.Module) -> None:
    """Give up INT8 copies and CUDA graphs of the fused blocks of a Flux, if it has any."""
    for block in fused_blocks(flux)[:1]:
        block.kept.forget()
        block.graphs.clear()


def fuse_blocks(flux: nn.Module, backend: Backend, weights: str = "int4") -> None:
    """Give every block of a ComfyUI Flux its fused forward, where ``backend`` has kernels for it.

    weights: what else they keep of them, one of kept_weights.WEIGHTS.
    """
    if not backend.kernels:
        return
    rotary, layers, graphs = Rotary(), backend.layers, BlockGraphs()
    kept = KeptWeights(layers, graphs, weights)
    if type(flux.pe_embedder) is EmbedND:
        flux.pe_embedder.__class__ = FusedEmbedND
    for blocks, stock, fused in (
        (flux.double_blocks, DoubleStreamBlock, FusedDoubleBlock),
        (flux.single_blocks, SingleStreamBlock, FusedSingleBlock),
    ):
        for block in blocks:
            if type(block) is stock and isinstance(block, stock):
                block.__class__ = fused
                block.layers, block.rotary, block.graphs, block.kept = layers, rotary, graphs, kept
