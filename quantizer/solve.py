"""The mathematics of SVDQuant on tensors: smoothing, low-rank branch, 4-bit codes. Nothing here knows of files or FLUX.

Notation is that of ``kernels/int4.py``; the smoothed weight is ``W * smooth_factor``. Method: SVDQuant (arXiv
2411.05007); error feedback: GPTQ (arXiv 2210.17323). Everything is deterministic by seed on one device, and uses
the *stored* values of one step (scales, smoothing and branch rounded to T, the 16-bit type of the file) in the next, so
that each step absorbs the rounding of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout, reference
from ..kernels.int4 import AWQ, GROUP, W4A4, W8A8

# Exponent of the weight's magnitude where nothing is known of the activation: the middle of a flat optimum between 0.15
# and 0.5 (docs/quantizer.md).
WEIGHT_ONLY_BETA = 0.3
# Step sizes tried for a group, relative to amax / 7. Each is then refined in closed form, so a coarse grid will do.
RATIOS = (1.0, 0.93, 0.87, 0.8, 0.73, 0.65)
# The same for the range of an AWQ group, relative to its whole range.
_AWQ_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_INT8_MAX = 127
_OVERSAMPLE = 16  # columns of the randomized SVD beyond the rank
_POWER_ITERATIONS = 8
_WARM_ITERATIONS = 1  # when it starts from the branch of the round before
_SMOOTH_LIMIT = 64.0  # largest ratio of a smoothing factor to their geometric mean
# GPTQ: added to the Hessian's diagonal, relative to its mean. Modulation layers see few and similar inputs.
_DAMPING, _AWQ_DAMPING = 0.05, 0.5
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 24  # worked on at a time: within a CPU's cache, within a GPU's memory


class OutOfRange(ValueError):
    """A value that the 16-bit type of the file cannot hold."""


@dataclass(frozen=True)
class Recipe:
    """How a W4A4 weight is made.

    rank: of the branch, 0 or a multiple of 16 · dtype: T · iterations: rounds of branch and codes, at least 1 ·
    seed: of the randomized SVD · target_error: where above 0, smooth.py chooses the rank for it, up to ``rank``.
    """

    rank: int = 32
    dtype: torch.dtype = torch.bfloat16
    iterations: int = 8
    seed: int = 0
    target_error: float = 0.0


# ---- smoothing


def channel_span(weights: Iterable[Tensor]) -> Tensor:
    """float32 [K]: largest magnitude per input channel over all rows of ``weights``, each [N_i, K]."""
    return torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)


def smooth_factor(
    weight_span: Tensor,
    act_span: Tensor | None = None,
    alpha: float = 0.5,
    beta: float = WEIGHT_ONLY_BETA,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """smooth_factor T [K] = act_span ** alpha / weight_span ** beta, scaled to a geometric mean of 1.

    weight_span: [K], magnitude of the weight per input channel (:func:`channel_span`) · act_span: [K], the same of the
    activation (largest magnitude, or root mean square), or None where nothing is known about it: then all channels
    count alike. Channels in which a span is 0 or not finite get 1: they carry nothing that could be balanced.
    """
    exponent = -beta * _log(weight_span)
    if act_span is not None:
        exponent = exponent + alpha * _log(act_span)
    known = exponent.isfinite()
    mean = exponent[known].mean() if known.any() else exponent.new_zeros(())
    limit = torch.tensor(_SMOOTH_LIMIT, device=exponent.device).log()
    exponent = torch.where(known, exponent - mean, 0.0).clamp(-limit, limit)
    return exponent.exp().to(dtype)


def search_smooth(
    candidates: Iterable[tuple[float, float]], make: Callable[[float, float], Tensor], error: Callable[[Tensor], float]
) -> tuple[Tensor, tuple[float, float]]:
    """The best smoothing among exponents: (smooth_factor, (alpha, beta)).

    make: (alpha, beta) -> smooth_factor · error: smooth_factor -> output error of the layers that share it
    (:func:`output_error`), smaller is better; the first of equals is taken.
    """
    best: tuple[float, Tensor, tuple[float, float]] | None = None
    for alpha, beta in candidates:
        smooth = make(alpha, beta)
        found = error(smooth)
        if best is None or found < best[0]:
            best = (found, smooth, (alpha, beta))
    if best is None:
        raise ValueError("no exponents to search")
    return best[1], best[2]


def output_error(weight: Tensor, quantized: W4A4 | W8A8, x: Tensor) -> float:
    """Relative squared error of a layer's output in W4A4 or W8A8 arithmetic.

    weight: [N, K], the original · quantized: what stands for it · x: T [M, K], the raw activation (a GELU's output for
    an unsigned layer). Returns |y - x W^T|^2 / |x W^T|^2; 0 for an all-zero weight that stays zero.
    """
    exact = x.float() @ weight.float().t()
    if isinstance(quantized, W8A8):
        return ratio(reference.linear_w8a8(x, quantized, out_dtype=torch.float32) - exact, exact)
    _, shift_term = reference.dequantize_w4a4(quantized) if quantized.act_unsigned else (None, None)
    bias = None if shift_term is None else -shift_term
    got = reference.linear_w4a4(x, quantized, bias, out_dtype=torch.float32)
    return ratio(got - exact, exact)


def ratio(error: Tensor, signal: Tensor) -> float:
    """Squared norm of ``error`` over that of ``signal``, in float64; 0 / 0 is 0."""
    above, below = (tensor.double().square().sum().item() for tensor in (error, signal))
    return above / below if below else (0.0 if above == 0 else float("inf"))


def _log(span: Tensor) -> Tensor:
    """Natural logarithm; not finite where the span is 0, negative or not finite."""
    return span.float().log()


# ---- low-rank branch


def low_rank(
    smoothed: Tensor,
    rank: int,
    smooth: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    exact: bool = False,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best branch for a smoothed weight as the file stores it: (proj_up T [N, R], proj_down T [R, K]).

    smoothed: float32 [N, K] · smooth: [K], by which proj_down is already divided, because the branch sees the raw
    activation. ``proj_down * smooth`` are right singular vectors, ``proj_up`` left ones times singular values. A
    randomized SVD; with ``exact`` that of LAPACK or cuSOLVER, 40 times slower for an error that is 0.03 % (rank 32) to
    0.12 % (rank 128) smaller (docs/quantizer.md). start: [R, K], a proj_down that is nearly right, to save
    time. Raises ValueError if the rank is larger than N or K.
    """
    n, k = smoothed.shape
    if rank > min(n, k):
        raise ValueError(f"rank {rank} is larger than a weight of {n} x {k} allows")
    if rank == 0:
        return smoothed.new_empty(n, 0, dtype=dtype), smoothed.new_empty(0, k, dtype=dtype)
    if exact:
        left, singular, right = torch.linalg.svd(smoothed, full_matrices=False)
    else:
        left, singular, right = _svd(smoothed, rank, seed, None if start is None else start.float() * smooth.float())
    up = left[:, :rank] * singular[:rank]
    down = right[:rank] / smooth.float()
    return up.to(dtype), down.to(dtype)


def _svd(matrix: Tensor, rank: int, seed: int, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4 and 5.1).

    torch.svd_lowrank draws from the global generator; this one is a function of its arguments. near: [rank, K], right
    singular vectors to start from.
    """
    columns = min(rank + _OVERSAMPLE, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    if near is not None:
        start[:, : len(near)] = near.t() * matrix.shape[1] ** 0.5  # columns of equal length
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_POWER_ITERATIONS if near is None else _WARM_ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, singular, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ left, singular, right


# ---- codes


def round_int4(
    residual: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[Tensor, Tensor]:
    """Nearest codes with the best scale for each row and group of 64: (q int8 [N, K] in -8..7, wscales T [N, G]).

    residual: float32 [N, K] · importance: float32 [K], weight of a channel's squared error (mean square of the smoothed
    activation), None for equal ones. For each step size ``amax / 7 * ratio`` the codes are found, then the best scale
    for these codes in closed form; the best of all, rounded to T, gives the final codes. Scales are positive; a group
    in which nothing but zeros can be represented has scale 1.
    """
    n, k = residual.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=residual.device)
    scales = torch.empty(n, k // GROUP, dtype=dtype, device=residual.device)
    importance = None if importance is None else importance.float().reshape(k // GROUP, GROUP)
    for rows in _row_blocks(residual):
        values = residual[rows].reshape(-1, k // GROUP, GROUP)
        scale = _best_scale(values, dtype, importance, ratios)
        q = _nearest(values, scale.float())
        codes[rows] = q.to(torch.int8).reshape(-1, k)
        scales[rows] = scale
    return codes, scales


def _best_scale(values: Tensor, dtype: torch.dtype, importance: Tensor | None, ratios: tuple[float, ...]) -> Tensor:
    """T [n, G] for values [n, G, 64]. With codes q, the error of scale s is |v|^2 - s (2 v.q - s q.q)."""
    weighted = values if importance is None else values * importance
    amax = values.abs().amax(dim=-1)
    best_gain = torch.zeros_like(amax)
    best = torch.ones_like(amax)
    for step in ratios:
        q = _nearest(values, amax * (step / 7))
        vq = (weighted * q).sum(dim=-1)
        qq = (q.square_() if importance is None else q.square_().mul_(importance)).sum(dim=-1)
        scale = (vq / qq).to(dtype).float()
        gain = scale * (2 * vq - scale * qq)
        better = gain > best_gain  # never where the group is zero (NaN) or the scale has no value in T
        better &= scale.isfinite()
        best = torch.where(better, scale, best)
        best_gain = torch.where(better, gain, best_gain)
    return best.to(dtype)


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """float32 codes -8..7 of values [n, G, 64] at scale [n, G]; a scale of 0 gives 0 for 0."""
    return (values / scale[..., None]).nan_to_num_(nan=0.0).round_().clamp_(-8, 7)


def gptq(
    residual: Tensor,
    hessian: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    ratios: tuple[float, ...] = RATIOS,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes that make up for each other's errors: as :func:`round_int4`, for inputs that are correlated.

    residual: float32 [N, K] · hessian: float32 or float64 [K, K], second moments E[v^T v] of the smoothed activation v
    (any scale). Columns are rounded one after the other; what each one misses is spread over the columns behind it.
    Channels that are never active get no say. inverse: :func:`inverse_factor` of the hessian, to save time. Raises
    ValueError if the hessian is not symmetric positive after damping.
    """
    groups = hessian.diagonal().float().clamp_min(0).reshape(-1, GROUP)
    importance = torch.where(groups.any(dim=1, keepdim=True), groups, 1.0).reshape(-1)
    inverse = inverse_factor(hessian) if inverse is None else inverse
    codes, scales, _ = _with_feedback(residual, inverse, _BestScale(importance, dtype, ratios), -8, 7)
    return codes, scales.to(dtype)


@dataclass(frozen=True)
class _BestScale:
    """Called with (values [N, 64] of a group, its columns): (scale, zero), float32 [N]. importance: float32 [K]."""

    importance: Tensor
    dtype: torch.dtype
    ratios: tuple[float, ...]

    def __call__(self, group: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        importance = self.importance[columns].reshape(1, GROUP)
        scale = _best_scale(group[:, None], self.dtype, importance, self.ratios)[:, 0].float()
        return scale, torch.zeros_like(scale)


def _with_feedback(
    weight: Tensor, inverse: Tensor, choose: Callable[[Tensor, slice], tuple[Tensor, Tensor]], low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int8 [N, K] in low..high, scales, zeros float32 [N, G]) of weight float32 [N, K], column by column.

    inverse: :func:`inverse_factor` · choose: (values [N, 64] of a group, its columns) -> (scale, zero), [N].
    """
    n, k = weight.shape
    work = weight.clone()
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales, zeros = (torch.zeros(n, k // GROUP, device=weight.device) for _ in range(2))
    round_group = _kernel(weight.device)
    if round_group is not None:
        search = None
        if isinstance(choose, _BestScale):
            steps = torch.tensor([ratio / 7 for ratio in choose.ratios], device=weight.device)
            search = (choose.importance, steps, choose.dtype)
        for start in range(0, k, GROUP):
            stop, at = start + GROUP, start // GROUP
            if search is None:
                scales[:, at], zeros[:, at] = choose(work[:, start:stop], slice(start, stop))
            errors = round_group(work, start, inverse, codes, scales, zeros, low, high, search)
            work[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
        return codes, scales, zeros
    for start in range(0, k, GROUP):
        stop = start + GROUP
        group = work[:, start:stop]
        scale, zero = choose(group, slice(start, stop))
        scales[:, start // GROUP], zeros[:, start // GROUP] = scale, zero
        errors = torch.empty_like(group)
        for column in range(GROUP):
            value = group[:, column]
            q = ((value - zero) / scale).round().clamp(low, high)
            codes[:, start + column] = q.to(torch.int8)
            at = start + column
            errors[:, column] = (value - (q * scale + zero)) / inverse[at, at]
            group[:, column + 1 :] -= errors[:, column, None] * inverse[at, at + 1 : stop]
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes, scales, zeros


def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """kernels.feedback.round_group, where it runs."""
    if device.type != "cuda":
        return None
    try:
        from ..kernels.feedback import round_group
    except ImportError:  # no Triton
        return None
    return round_group


def inverse_factor(hessian: Tensor, damping: float = _DAMPING) -> Tensor:
    """float32 [K, K], upper triangular U with U^T U = inverse of the damped hessian."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item() or not lower.isfinite().all():
        raise ValueError("the Hessian is not positive definite")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float().contiguous()


# ---- whole layers


def quantize_w4a4(
    weight: Tensor,
    smooth: Tensor,
    recipe: Recipe,
    act_unsigned: bool = False,
    act_square: Tensor | None = None,
    hessian: Tensor | None = None,
) -> W4A4:
    """One W4A4 weight: branch and codes in turn, ``recipe.iterations`` times, of which the best is kept.

    weight: [N, K], any float dtype · smooth: T [K] · act_square: float32 [K], mean square of the raw activation, None
    for equal ones · hessian: [K, K], second moments of the smoothed activation: codes come from :func:`gptq`.
    The first branch is that of the smoothed weight; each later one is that of what the codes leave over. Best is the
    smallest mean square of the output error that the weight's rounding causes. Raises ValueError if the rank is larger
    than N or K, OutOfRange if a value does not fit T.
    """
    smooth_values = smooth.float()
    target = weight.float() * smooth_values
    importance = smooth_values.square().reciprocal()
    if act_square is not None:
        importance = importance * act_square.float()
    best: tuple[float, W4A4] | None = None
    inverse = None if hessian is None else inverse_factor(hessian)
    left_over, down = target, None
    for _ in range(max(1, recipe.iterations)):
        up, down = low_rank(left_over, recipe.rank, smooth, recipe.dtype, recipe.seed, start=down)
        residual = torch.addmm(target, up.float(), down.float() * smooth_values, alpha=-1)
        if hessian is None:
            q, wscales = round_int4(residual, recipe.dtype, importance)
        else:
            q, wscales = gptq(residual, hessian, recipe.dtype, inverse=inverse)
        left_over, error = _compare(target, residual, q, wscales, importance, hessian)
        if not error < float("inf"):
            raise OutOfRange(f"a value is too large for {recipe.dtype}")
        if best is None or error < best[0]:
            best = (error, W4A4(q, wscales, smooth, down, up, act_unsigned))
        if recipe.rank == 0:
            break
    return best[1]


def _compare(
    target: Tensor, residual: Tensor, q: Tensor, wscales: Tensor, importance: Tensor, hessian: Tensor | None
) -> tuple[Tensor, float]:
    """(target minus codes, float32 [N, K]; squared error of the codes, weighted)."""
    left_over, error = torch.empty_like(target), 0.0
    for rows in _row_blocks(target):
        main = q[rows].float().reshape(*wscales[rows].shape, GROUP).mul_(wscales[rows].float()[..., None])
        main = main.reshape(-1, target.shape[1])
        missed = residual[rows] - main
        left_over[rows] = target[rows] - main
        if hessian is None:
            error += (missed.square().sum(dim=0) @ importance).item()
        else:
            error += (missed * (missed @ hessian.float())).sum().item()
    return left_over, error


def shifted_bias(quantized: W4A4, bias: Tensor) -> Tensor:
    """float32 [N]: the bias that the file stores for ``quantized`` when the layer's own bias is ``bias`` [N].

    An unsigned layer is fed with its input + SHIFT, and the stored bias takes that back: it is such that the equivalent
    dense layer (int4.py) has exactly ``bias``. The original converter subtracts the shift of the unrounded residual
    instead; its dense layer is off by SHIFT times the sum of the rounding errors.
    """
    if not quantized.act_unsigned:
        return bias.float()
    return bias.float() - reference.dequantize_w4a4(quantized)[1]


def quantize_awq(
    weight: Tensor, dtype: torch.dtype = torch.bfloat16, act_square: Tensor | None = None, hessian: Tensor | None = None
) -> AWQ:
    """W4A16: codes 0..15 with the best scale and zero for each row and group of 64.

    weight: [N, K], any float dtype · act_square: float32 [K], mean square of the activation, None for equal ones ·
    hessian: [K, K], second moments of the activation: errors are spread as by :func:`gptq`. For each of several ranges
    around a group's middle the codes are found, then scale and zero for these codes by linear regression; the best,
    rounded to T, gives the final codes. A group of one value is its zero.
    """
    n, k = weight.shape
    if hessian is not None:
        inverse = inverse_factor(hessian, _AWQ_DAMPING)

        def choose(group: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
            scale, zero = _best_line(group[:, None], dtype, group.new_ones(1, GROUP))
            return scale[:, 0], zero[:, 0]

        codes, scales, zeros = _with_feedback(weight.float(), inverse, choose, 0, 15)
        return AWQ(codes.to(torch.uint8), scales.to(dtype), zeros.to(dtype))
    importance = weight.new_ones(k // GROUP, GROUP, dtype=torch.float32)
    if act_square is not None:
        importance = act_square.float().reshape(k // GROUP, GROUP)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales, zeros = (torch.empty(n, k // GROUP, dtype=dtype, device=weight.device) for _ in range(2))
    for rows in _row_blocks(weight):
        values = weight[rows].float().reshape(-1, k // GROUP, GROUP)
        scale, zero = _best_line(values, dtype, importance)
        codes[rows] = _nearest_awq(values, scale, zero).to(torch.uint8).reshape(-1, k)
        scales[rows], zeros[rows] = scale.to(dtype), zero.to(dtype)
    return AWQ(codes, scales, zeros)


def quantize_w8a8(weight: Tensor, smooth: Tensor) -> W8A8:
    """One INT8 weight: nearest codes, of which each row uses the whole range.

    weight: [N, K], any float dtype · smooth: T [K]. A narrower range, as :func:`round_int4` searches it, gained nothing
    on weights with heavy tails.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _row_blocks(weight):
        values = weight[rows].float() * smooth.float()
        scale = values.abs().amax(dim=1) / _INT8_MAX
        scale[scale == 0] = 1.0
        codes[rows] = (values / scale[:, None]).round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8)
        scales[rows] = scale
    return W8A8(codes, scales, layout.pack_vector(smooth))


def _best_line(values: Tensor, dtype: torch.dtype, importance: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero), float32 [n, G] with values of T, for values [n, G, 64] of ``importance`` [G, 64]."""
    low, high = values.aminmax(dim=-1)
    middle, total = (low + high) / 2, importance.sum(dim=-1)
    mean = (values * importance).sum(dim=-1) / total
    best_scale, best_zero = torch.ones_like(middle), middle.to(dtype).float()
    best_error = _error_awq(values, best_scale, best_zero, importance)
    for part in _AWQ_RATIOS:
        scale = (high - low) * (part / 15)
        q = _nearest_awq(values, scale, middle - 7.5 * scale)
        q_mean = (q * importance).sum(dim=-1) / total
        centred = q - q_mean[..., None]
        spread = (centred.square() * importance).sum(dim=-1)
        scale = ((centred * values * importance).sum(dim=-1) / spread).to(dtype).float()
        zero = (mean - scale * q_mean).to(dtype).float()
        error = _error_awq(values, scale, zero, importance)
        better = (error < best_error) & (scale > 0) & scale.isfinite()
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def _nearest_awq(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((values - zero[..., None]) / scale[..., None]).nan_to_num_(nan=0.0).round_().clamp_(0, 15)


def _error_awq(values: Tensor, scale: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
    q = _nearest_awq(values, scale, zero)
    return (q.mul_(scale[..., None]).add_(zero[..., None]) - values).square_().mul_(importance).sum(dim=-1)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Rows to work on at a time: small enough for a CPU's cache, many enough for a GPU."""
    elements = _CPU_ELEMENTS if matrix.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, elements // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))
