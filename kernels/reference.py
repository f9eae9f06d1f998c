"""The arithmetic of ``int4.py`` in plain PyTorch: the backend for CPU and unsupported GPUs, and the oracle for kernels.

Its own oracle is the data of the original engine's kernels and float64 (tests/test_reference.py). Where the original
accumulates over groups in 16 bits, this accumulates in float32 and rounds once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .int4 import AWQ, GROUP, SHIFT, SIGNED_MAX, UNSIGNED_MAX, W4A4, W8A8, PackedAWQ, PackedW4A4

# Rows that are unpacked at a time: bounds the float32 temporaries of a dequantization to about 256 MB.
_ROW_ELEMENTS = 16 * 1024 * 1024
_FP16_MAX = 65504.0


def quantize_act(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth, quantize to INT4 and project down, all from one input.

    x: T [M, K], T bf16 or fp16 · smooth_factor: T [K] · proj_down: T [R, K]. With ``act_unsigned`` x is a GELU output
    and SHIFT is added before smoothing (not for the low-rank branch).

    Returns (codes int8 [M, K], ascales T [M, G], lora_act float32 [M, R]). Per group of 64, with all rounding to T to
    nearest even: v = T(T(x + shift) / smooth); s = amax(|v|) * float32(1 / 7) (unsigned 1 / 15);
    code = clamp(rint(v * (1 / s))) with the unrounded s; ascale = T(s). A group of zeros gives codes and scale 0.
    """
    dtype = x.dtype
    m, k = x.shape
    shifted = x + SHIFT if act_unsigned else x
    v = (shifted.float() / smooth_factor.float()).to(dtype).reshape(m, k // GROUP, GROUP)
    top = UNSIGNED_MAX if act_unsigned else SIGNED_MAX
    scale = v.abs().amax(dim=-1).float() * torch.tensor(1.0 / top, dtype=torch.float32, device=x.device)
    # 0 * (1 / 0) is NaN: a group of zeros; an infinite 1 / s (subnormal s) saturates.
    scaled = (v.float() * scale.reciprocal()[..., None]).nan_to_num(nan=0.0)
    codes = scaled.round().clamp(0 if act_unsigned else -SIGNED_MAX - 1, top).to(torch.int8)
    lora_act = x.float() @ proj_down.float().t()
    return codes.reshape(m, k), scale.to(dtype), lora_act


def gemm_w4a4(
    codes: Tensor,
    ascales: Tensor,
    lora_act: Tensor,
    weight: W4A4,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """INT4 GEMM + low-rank up + bias, accumulated in float32, rounded once.

    codes: int8 [M, K] · ascales: T [M, G] · lora_act: float32 [M, R], rounded to T as the tensor cores need it ·
    weight: natural order · bias: [N] or None. Returns [M, N] in ``out_dtype`` (default T); fp16 saturates at 65504.
    """
    dtype = ascales.dtype
    activation = codes.float() * ascales.float().repeat_interleave(GROUP, dim=1)
    residual = weight.q.float() * weight.wscales.float().repeat_interleave(GROUP, dim=1)
    y = activation @ residual.t()
    if bias is not None:
        y = y + bias.float()
    y = y + lora_act.to(dtype).float() @ weight.proj_up.float().t()
    return _round(y, out_dtype or dtype)


def linear_w4a4(x: Tensor, weight: W4A4, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """A whole W4A4 layer on x T [M, K]: :func:`quantize_act`, then :func:`gemm_w4a4`. Returns [M, N]."""
    codes, ascales, lora_act = quantize_act(x, weight.smooth_factor, weight.proj_down, weight.act_unsigned)
    return gemm_w4a4(codes, ascales, lora_act, weight, bias, out_dtype)


def gemv_w4a16(x: Tensor, weight: AWQ) -> Tensor:
    """AWQ W4A16: x T [M, K] times the transposed weight, accumulated in float32. Returns T [M, N]; no bias."""
    return (x.float() @ dequantize_awq(weight, x.dtype).float().t()).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh approximation, in float32, rounded to x's dtype: the activation between fc1 and fc2."""
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def rms_norm_rope(x: Tensor, norm_weight: Tensor, rotary: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm and rotary embedding of q or k in float32, one rounding at the end.

    x: T [M, heads, 128] · norm_weight: T [128] · rotary: float32 [M, 64, 2] as (sin, cos) of pair p, which is columns
    2p and 2p + 1. Returns x's shape and dtype.
    """
    v = x.float()
    v = v * (torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.float())
    even, odd = v[..., 0::2], v[..., 1::2]
    sin, cos = rotary[:, None, :, 0], rotary[:, None, :, 1]
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.reshape(x.shape).to(x.dtype)


def dequantize_w4a4(weight: W4A4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """The dense layer that a W4A4 weight stands for.

    Returns (W_eff [N, K] in ``dtype``, shift term float32 [N] or None): an unsigned layer fed with unshifted input
    needs ``bias + shift term`` (see int4.py).
    """
    main = weight.q.float().reshape(*weight.wscales.shape, GROUP).mul_(weight.wscales.float()[..., None])
    main = main.reshape(weight.q.shape).div_(weight.smooth_factor.float())
    # In float64, so that its 16-bit rounding does not depend on the order of a device's sum. MPS has no float64.
    exact = torch.float32 if main.device.type == "mps" else torch.float64
    shift_term = (SHIFT * main.sum(dim=1, dtype=exact)).float() if weight.act_unsigned else None
    dense = main.addmm_(weight.proj_up.float(), weight.proj_down.float())
    return dense.to(dtype), shift_term


def dequantize_awq(weight: AWQ, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [N, K] of an AWQ layer in ``dtype``: one fused multiply-add, one rounding."""
    scales, zeros = weight.wscales.float()[..., None], weight.wzeros.float()[..., None]
    dense = weight.code.float().reshape(*weight.wscales.shape, GROUP).mul_(scales).add_(zeros)
    return dense.reshape(weight.code.shape).to(dtype)


def dequantize_parts(
    parts: tuple[PackedW4A4, ...], axis: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The dense layer of a linear that consists of packed parts (see model/layout_svdq.py).

    axis 0: outputs side by side (``linear1``); axis 1: inputs side by side, outputs summed (``linear2``); with one part
    the axis does not matter. Returns as :func:`dequantize_w4a4`, for the whole linear. Works through blocks of rows, so
    that float32 temporaries stay small.
    """
    n = sum(p.n for p in parts) if axis == 0 else parts[0].n
    k = parts[0].k if axis == 0 else sum(p.k for p in parts)
    device = parts[0].qweight.device
    dense = torch.empty(n, k, dtype=dtype, device=device)
    shift = torch.zeros(n, dtype=torch.float32, device=device) if any(p.act_unsigned for p in parts) else None
    row0 = column0 = 0
    for part in parts:
        step = max(128, _ROW_ELEMENTS // part.k // 128 * 128)
        for start in range(0, part.n, step):
            stop = min(start + step, part.n)
            block, block_shift = dequantize_w4a4(part.rows(start, stop).unpack(), dtype)
            dense[row0 + start : row0 + stop, column0 : column0 + part.k] = block
            if block_shift is not None:
                shift[row0 + start : row0 + stop] += block_shift
        if axis == 0:
            row0 += part.n
        else:
            column0 += part.k
    return dense, shift


def linear_parts_w4a4(x: Tensor, parts: tuple[PackedW4A4, ...], axis: int, bias: Tensor | None) -> Tensor:
    """W4A4 arithmetic on a linear of packed parts; x T [M, K], bias [N] or None (the stored one). Returns T [M, N]."""
    if axis == 0:
        outputs, row0 = [], 0
        for part in parts:
            part_bias = None if bias is None else bias[row0 : row0 + part.n]
            outputs.append(linear_w4a4(x, part.unpack(), part_bias))
            row0 += part.n
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    total, column0 = None, 0
    for part in parts:
        y = linear_w4a4(x[:, column0 : column0 + part.k], part.unpack(), out_dtype=torch.float32)
        total = y if total is None else total + y
        column0 += part.k
    if bias is not None:
        total = total + bias.float()
    return _round(total, x.dtype)


def linear_awq(
    x: Tensor, weight: PackedAWQ, bias: Tensor | None, lora: tuple[Tensor, Tensor] | None = None
) -> Tensor | None:
    """None: a modulation layer is dequantized and multiplied by PyTorch (see layers.py for the kernels)."""
    return None


def _round(y: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to ``dtype``; fp16 saturates instead of overflowing, as in the original engine."""
    return y.clamp(-_FP16_MAX, _FP16_MAX).to(dtype) if dtype == torch.float16 else y.to(dtype)


def dequantize_packed_awq(weight: PackedAWQ, dtype: torch.dtype) -> Tensor:
    """The dense weight [N, K] of a packed AWQ layer, rows in BFL's order."""
    return dequantize_awq(weight.unpack(), dtype)


def quantize_act_int8(
    x: Tensor, smooth_factor: Tensor, proj_down: Tensor, act_unsigned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`quantize_act`, but to INT8 with one scale per token: the activations of the int8 mode.

    Returns (codes int8 [M, K], scales float32 [M], lora_act float32 [M, R]). v is that of quantize_act, rounded to T.
    Signed: s = amax(|v|) * float32(1 / 127), code = clamp(rint(v * (1 / s))), value = code * s.
    Unsigned (behind a GELU, SHIFT added): nothing is negative, so all 256 codes are used: s = amax * float32(1 / 255),
    code = clamp(rint(v * (1 / s)), 0, 255) - 128, value = (code + 128) * s: half the step of a signed code, and the
    stored bias, which holds the correction for the shift, fits as it is. A token of zeros gives scale 0.
    """
    dtype = x.dtype
    shifted = x + SHIFT if act_unsigned else x
    v = (shifted.float() / smooth_factor.float()).to(dtype).float()
    low, top = (0, 255) if act_unsigned else (-127, 127)
    scale = v.abs().amax(dim=1) * torch.tensor(1.0 / top, dtype=torch.float32, device=x.device)
    codes = (v * scale.reciprocal()[:, None]).nan_to_num(nan=0.0).round().clamp(low, top)
    codes = (codes - 128 if act_unsigned else codes).to(torch.int8)
    return codes, scale, x.float() @ proj_down.float().t()


def expand_w4_to_int8(weight: W4A4) -> tuple[Tensor, Tensor, Tensor]:
    """INT8 codes with one scale per output channel from INT4 codes with one per group.

    Returns (q int8 [N, K], scales float32 [N], sums int32 [N]): scales = max over groups of wscales / 16, so that the
    group with the largest scale stays exact and no code from -8 to 7 saturates (amax * 7 / 127 would cut -8);
    q = rint(q4 * ratio), of the exact product, with ratio = float32(wscales * float32(1 / scales)); sums of q along K,
    which unsigned activation codes need (:func:`gemm_w8a8`).
    """
    wscales = weight.wscales.float()
    scales = wscales.abs().amax(dim=1) * 0.0625
    ratio = (wscales * scales.reciprocal()[:, None]).nan_to_num(nan=0.0).double()
    groups = weight.q.double().reshape(*ratio.shape, GROUP)
    q = groups.mul_(ratio[..., None]).round_().to(torch.int8).reshape(weight.q.shape)
    return q, scales, q.sum(dim=1, dtype=torch.int32)


def gemm_w8a8(
    codes: Tensor,
    scales: Tensor,
    lora_act: Tensor,
    q: Tensor,
    wscales: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    act_unsigned: bool = False,
) -> Tensor:
    """INT8 GEMM + low-rank up + bias: the integer sum is exact, everything after it float64, rounded once.

    codes int8 [M, K], scales float32 [M]: of :func:`quantize_act_int8` · q int8 [N, K], wscales float32 [N]: of
    :func:`expand_w4_to_int8` · lora_act: [M, R], rounded to T · proj_up: T [N, R], natural order · bias: [N] or None.
    Returns [M, N] in ``out_dtype`` (default T, the type of proj_up); fp16 saturates at 65504.
    """
    dtype = proj_up.dtype
    act = codes.double() + 128 if act_unsigned else codes.double()
    y = (act @ q.double().t()) * scales.double()[:, None] * wscales.double()
    y = y + lora_act.to(dtype).double() @ proj_up.double().t()
    if bias is not None:
        y = y + bias.double()
    return _round(y, out_dtype or dtype)


def linear_w8a8(
    x: Tensor,
    weight: W8A8,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A whole W8A8 layer on x T [M, K]: :func:`quantize_act_int8`, then :func:`gemm_w8a8`, without a branch.

    lora: (down T [R, K], up T [N, R]), whose product with x is added. Returns [M, N] in ``out_dtype`` (default T).
    """
    down, up = (x.new_empty(0, weight.k), x.new_empty(weight.n, 0)) if lora is None else lora
    codes, scales, lora_act = quantize_act_int8(x, layout.unpack_vector(weight.smooth_factor), down)
    return gemm_w8a8(codes, scales, lora_act, weight.q, weight.wscales, up, bias, out_dtype)


def dequantize_w8a8(weight: W8A8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense weight [N, K] that an INT8 weight stands for, in ``dtype``, rounded once."""
    smooth = layout.unpack_vector(weight.smooth_factor).float()
    dense = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.q.device)
    step = max(1, _ROW_ELEMENTS // weight.k)
    for start in range(0, weight.n, step):
        rows = slice(start, start + step)
        dense[rows] = weight.q[rows].float().mul_(weight.wscales[rows, None]).div_(smooth)
    return dense


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine part, then (1 + scale) and shift, in float32, rounded once.

    x: T [M, K] · scale, shift: T [B, K] for batches of M / B rows. Returns T [M, K].
    """
    batches, k = scale.shape
    v = torch.nn.functional.layer_norm(x.float(), (k,), eps=eps).reshape(batches, -1, k)
    return (v * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype).reshape(x.shape)
