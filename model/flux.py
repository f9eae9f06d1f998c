"""FLUX blocks on fused kernels, inside ComfyUI's own block classes.

A block here is the stock module with another ``forward``: normalization and modulation go into the quantization of an
input, RMSNorm and RoPE into the qkv product, which writes q, k, v of text and image into one buffer, and gate and
residual into the output products. Whatever wants to see an intermediate tensor, and every layer that is not a plain
quantized one, gets the stock forward with our linears; both ways agree.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import comfy.ops
import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import Backend
from ..kernels.int4 import PackedW4A4
from .layout_svdq import packed_parts
from .ops import QuantizedLinear

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


class _Fused:
    """What both kinds of blocks share. Set by :func:`fuse_blocks`: layers (kernels.layers.Layers), rotary."""

    layers: Any
    rotary: Rotary
    linears: tuple[str, ...]  # the quantized linears of a block, by name

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
            and x.device.type == "cuda"
            and self.hidden_size == self.num_heads * HEAD
            and not (torch.is_grad_enabled() and x.requires_grad)
            and all(self.get_submodule(name).plain(x.dtype) for name in self.linears)
        )

    def _attend(self, qkv: Tensor, mask: Tensor | None, transformer_options: dict) -> Tensor:
        """Attention on q, k, v T [B, L, 3, H, 128], normalized and rotated; returns T [B, L, H * 128]."""
        q, k, v = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
        stock = comfy.ldm.flux.math.optimized_attention
        override = "optimized_attention_override" in transformer_options
        if stock is comfy.ldm.modules.attention.attention_pytorch and not override:
            if mask is not None and mask.ndim == 2:
                mask = mask[None, None]
            elif mask is not None and mask.ndim == 3:
                mask = mask[:, None]
            with sdpa_kernel(_ATTENTION, set_priority=True):
                out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return out.transpose(1, 2).reshape(qkv.shape[0], qkv.shape[1], -1)
        return stock(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=transformer_options)

    def _project_qkv(
        self,
        x: Tensor,
        part: PackedW4A4,
        bias: Tensor | None,
        modulation: Any,
        norm: nn.Module,
        rotary: Tensor,
        out: Tensor,
    ) -> None:
        """q, k, v of x T [B, n, hidden] into out T [B, n, 3 * hidden], whose batch elements may be apart."""
        with weights_of(norm.query_norm, x) as norm_q, weights_of(norm.key_norm, x) as norm_k:
            for b in range(x.shape[0]):
                after = self.layers.after(norm_q=norm_q, norm_k=norm_k, rotary=rotary[b % rotary.shape[0]])
                one = self.layers.modulation(modulation.scale[b], modulation.shift[b])
                self.layers.multiply(self.layers.quantize(x[b], part, one), part, bias, after, out=out[b])

    def _gate(self, gate: Tensor, residual: Tensor) -> Any:
        """Epilogue residual + gate * y; gate T [B, 1, hidden], residual T [M, hidden]."""
        return self.layers.after(gate=gate.reshape(gate.shape[0], -1).contiguous(), residual=residual)


class FusedDoubleBlock(_Fused, DoubleStreamBlock):
    """A double block: image and text, each with its own weights, one attention."""

    linears = tuple(
        f"{stream}_{name}" for stream in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    )

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
        batch, n_txt, hidden = txt.shape
        length = n_txt + img.shape[1]
        (img_mod1, img_mod2), (txt_mod1, txt_mod2) = self.img_mod(vec), self.txt_mod(vec)
        rotary = self.rotary.rows(pe)
        qkv = img.new_empty(batch, length, 3 * hidden)
        streams = ((txt, self.txt_attn, txt_mod1, 0, n_txt), (img, self.img_attn, img_mod1, n_txt, length))
        for x, attn, mod, start, stop in streams:
            with operands_of(attn.qkv, x) as ((part,), bias):
                self._project_qkv(x, part, bias, mod, attn.norm, rotary[:, start:stop], qkv[:, start:stop])
        attention = self._attend(qkv.view(batch, length, 3, -1, HEAD), attn_mask, transformer_options)
        del qkv
        streams = (
            (img, self.img_attn.proj, self.img_mlp, img_mod1, img_mod2, attention[:, n_txt:]),
            (txt, self.txt_attn.proj, self.txt_mlp, txt_mod1, txt_mod2, attention[:, :n_txt]),
        )
        for x, proj, mlp, mod1, mod2, attended in streams:
            rows = x.view(-1, hidden)
            with operands_of(proj, x) as ((part,), bias):
                y = self.layers.quantize(attended.reshape(-1, hidden), part)
                self.layers.multiply(y, part, bias, self._gate(mod1.gate, rows), out=rows)
            with operands_of(mlp[0], x) as ((fc1,), bias1), operands_of(mlp[2], x) as ((fc2,), bias2):
                modulation = self.layers.modulation(mod2.scale[:, 0], mod2.shift[:, 0])
                y = self.layers.gelu_input(self.layers.quantize(rows, fc1, modulation), fc1, bias1, fc2)
                self.layers.multiply(y, fc2, bias2, self._gate(mod2.gate, rows), out=rows)
        return img, txt


class FusedSingleBlock(_Fused, SingleStreamBlock):
    """A single block: attention and MLP side by side on text and image together."""

    linears = ("linear1", "linear2")

    def forward(
        self, x: Tensor, vec: Any, pe: Tensor, attn_mask: Tensor | None = None, modulation_dims: Any = None,
        transformer_options: dict | None = None,
    ) -> Tensor:  # fmt: skip
        transformer_options = {} if transformer_options is None else transformer_options
        if not (x.is_contiguous() and self._fuses(x, vec, pe, modulation_dims, transformer_options)):
            return super().forward(x, vec, pe, attn_mask, modulation_dims, transformer_options)
        batch, length, hidden = x.shape
        mod, _ = self.modulation(vec)
        rows = x.view(-1, hidden)
        modulation = self.layers.modulation(mod.scale[:, 0], mod.shift[:, 0])
        with operands_of(self.linear2, x) as ((attn_out, fc2), bias2):
            with operands_of(self.linear1, x) as ((qkv_part, fc1), bias1):
                qkv_bias, fc1_bias = (None, None) if bias1 is None else (bias1[: qkv_part.n], bias1[qkv_part.n :])
                qkv = x.new_empty(batch, length, 3 * hidden)
                self._project_qkv(x, qkv_part, qkv_bias, mod, self.norm, self.rotary.rows(pe), qkv)
                mlp = self.layers.gelu_input(self.layers.quantize(rows, fc1, modulation), fc1, fc1_bias, fc2)
            attention = self._attend(qkv.view(batch, length, 3, -1, HEAD), attn_mask, transformer_options)
            del qkv
            head = self.layers.quantize(attention.reshape(-1, hidden), attn_out)
            self.layers.multiply_sum(head, attn_out, mlp, fc2, bias2, self._gate(mod.gate, rows), out=rows)
        return x


@contextlib.contextmanager
def operands_of(linear: QuantizedLinear, x: Tensor) -> Iterator[tuple[tuple[PackedW4A4, ...], Tensor | None]]:
    """The parts and the stored bias of a linear on x's device."""
    with linear.on_device(x) as (weight, bias):
        yield packed_parts(weight._qdata, weight._params), bias


@contextlib.contextmanager
def weights_of(norm: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The weight of a stock RMSNorm on x's device, with its patches, in x's type."""
    weight, bias, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    try:
        yield weight
    finally:
        comfy.ops.uncast_bias_weight(norm, weight, bias, stream)


def fuse_blocks(flux: nn.Module, backend: Backend) -> None:
    """Give every block of a ComfyUI Flux its fused forward, where ``backend`` has kernels for it."""
    if not backend.kernels:
        return
    rotary, layers = Rotary(), backend.layers
    for blocks, stock, fused in (
        (flux.double_blocks, DoubleStreamBlock, FusedDoubleBlock),
        (flux.single_blocks, SingleStreamBlock, FusedSingleBlock),
    ):
        for block in blocks:
            if type(block) is stock and isinstance(block, stock):
                block.__class__ = fused
                block.layers, block.rotary = layers, rotary
