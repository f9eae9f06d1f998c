"""Random weights for ``synth``: layer by layer, deterministic by seed, scaled so that a forward pass stays healthy.

Files hold 4-bit codes, scales and vectors in tile order, but independent random values have no order: all tensors are
drawn straight into the shapes on disk. What does have an order is computed: the +1 in modulation biases, the shift term
in the bias behind a GELU, and the layers at both ends of the model (see :func:`_plain`).

Everything is drawn with integer generators and exact arithmetic, never with ``torch.randn``, whose last bits depend on
the processor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import layout
from ..kernels.int4 import GROUP, SHIFT
from ..loaders.flux_names import AWQSource, Source, W4A4Source
from ..loaders.nunchaku import tensor_table
from ..loaders.weights import FluxConfig
from ..loaders.write import Spec

AWQ_ROW_MULTIPLE = 16  # the original converter pads the scale rows of modulation layers; no effect at hidden size 3072

_CODE_STD = math.sqrt(10.5)  # of the codes of _codes()
_LOW_RANK_SHARE = 0.3  # norm of U @ D relative to the whole weight
_SMOOTH_SIGMA = 0.3
_PATCH = 64  # values of a 2x2 patch of 16 latent channels
_SEVENS = 0x7777777777777777  # in every nibble of a word of 64 bits
_ONES = 0x1111111111111111
_EIGHTS = 0x8888888888888888 - 2**64


@dataclass(frozen=True)
class Style:
    """Statistics of the modulation and of the ends of the model.

    modulation: standard deviation of what the conditioning adds to shift, scale and gate · shift: standard deviation
    of the shift biases · scale: mean scale (0 leaves the normalized activation as it is, -1 removes it) · gate: mean
    gate of attention and of the MLP · waves: weight of the rotary frequencies that :func:`_waves` picks · picture,
    noise: gains of the two in the output · separate: blocks leave the half of the residual stream alone that carries
    the noise.
    """

    modulation: float = 0.1
    shift: float = 0.1
    scale: float = 0.0
    gate: tuple[float, float] = (0.3, 0.3)
    waves: float = 1.0
    picture: float = 1.0
    noise: float = 1.4
    separate: bool = False


# "full": activations like those of a trained model in size and in how they depend on the tokens.
# "tiny": position and text decide more than the noise does, so that a sampler arrives at large soft shapes.
STYLES = {
    "full": Style(),
    "tiny": Style(
        modulation=0.4, shift=1.0, scale=-0.5, gate=(1.5, 0.3), waves=3.0, picture=7.0, noise=8.0, separate=True
    ),
}


def tensor_specs(config: FluxConfig, rank: int, dtype: torch.dtype) -> dict[str, Spec]:
    """Stored name -> dtype and shape of every tensor of such a checkpoint; rank 0 leaves the low-rank factors out."""
    layers = config.layers()
    groups = config.hidden_size // GROUP
    awq_rows = -(-groups // AWQ_ROW_MULTIPLE) * AWQ_ROW_MULTIPLE
    integers = {"I8": torch.int8, "I32": torch.int32}
    specs = {}
    for name, (dtypes, shape) in tensor_table(config, layers).items():
        low_rank = name.endswith((".lora_down", ".lora_up"))
        if low_rank and rank == 0:
            continue
        free = rank if low_rank else awq_rows
        specs[name] = Spec(integers.get(dtypes[0], dtype), tuple(free if size is None else size for size in shape))
    return specs


@dataclass(frozen=True)
class WeightMaker:
    """Makes the tensors of one checkpoint; ``specs`` as :func:`tensor_specs` returns them."""

    config: FluxConfig
    specs: dict[str, Spec]
    seed: int
    style: Style

    def layers(self) -> list[Source]:
        """Every layer of the model, big and small; each can be made on its own, in any order."""
        config = self.config
        return list(config.layers().values())

    def tensors(self, source: Source) -> Iterator[tuple[str, Tensor]]:
        """(stored name, tensor) of one layer."""
        if isinstance(source, W4A4Source):
            for name, unsigned in zip(source.parts, source.unsigned, strict=True):
                yield from self._w4a4(name, unsigned)
        elif isinstance(source, AWQSource):
            yield from self._awq(source)
        else:
            yield from self._plain(source.name, source.has_bias)

    def _w4a4(self, name: str, unsigned: bool) -> Iterator[tuple[str, Tensor]]:
        n, half_k = self.specs[f"{name}.qweight"].shape
        k, dtype = half_k * 2, self.specs[f"{name}.wscales"].dtype
        codes = _codes(self._generator(f"{name}.qweight"), n * half_k)
        qweight = ((codes + _ONES) ^ _EIGHTS).view(torch.int8).reshape(n, half_k)  # 0..14 becomes -7..7
        step = math.sqrt(1 - _LOW_RANK_SHARE**2) / (math.sqrt(k) * _CODE_STD)
        wscales = (step * (1 + 0.2 * self._normal(f"{name}.wscales", (k // GROUP, n)))).to(dtype)
        smooth = _exp(_SMOOTH_SIGMA * self._normal(f"{_smoothed_with(name)}.smooth", (k,))).to(dtype)
        bias = 0.02 * self._normal(f"{name}.bias", (n,))
        if name.startswith("single") and name.endswith(".out_proj"):
            bias = torch.zeros(n)  # the bias of the pair stands in mlp_fc2
        if unsigned:
            bias = bias - layout.pack_vector(_shift_term(qweight, wscales, smooth))
        yield f"{name}.qweight", qweight
        yield f"{name}.wscales", wscales
        yield f"{name}.smooth", smooth
        yield f"{name}.smooth_orig", smooth
        yield f"{name}.bias", bias.to(dtype)
        if f"{name}.lora_down" in self.specs:
            rank = self.specs[f"{name}.lora_down"].shape[1]
            down = self._normal(f"{name}.lora_down", (k, rank)) / math.sqrt(k)
            up = self._normal(f"{name}.lora_up", (n, rank)) * (_LOW_RANK_SHARE / math.sqrt(rank))
            yield f"{name}.lora_down", down.to(dtype)
            yield f"{name}.lora_up", up.to(dtype)

    def _awq(self, source: AWQSource) -> Iterator[tuple[str, Tensor]]:
        name, splits, style = source.name, source.splits, self.style
        hidden, groups = self.config.hidden_size, self.config.hidden_size // GROUP
        rows, n = self.specs[f"{name}.wscales"].shape
        dtype = self.specs[f"{name}.wscales"].dtype
        qweight = _codes(self._generator(f"{name}.qweight"), n * hidden // 2).view(torch.int32)
        # The input is silu(vec) with vec near unit variance, which makes its root mean square about 0.6.
        step = style.modulation / (0.6 * math.sqrt(hidden) * _CODE_STD)
        wscales = torch.zeros(rows, n)
        wscales[:groups] = step * (1 + 0.2 * self._normal(f"{name}.wscales", (groups, n)))
        wscales = wscales.to(dtype)
        if style.separate:
            wscales.view(rows, hidden, splits)[:, : self._noise_channels(), 2::3] = 0
        bias = self._normal(f"{name}.bias", (splits, hidden))  # chunks: shift, scale, gate, for six twice
        bias[0::3] *= style.shift
        bias[1::3] = 0.1 * bias[1::3] + style.scale + 1  # the file has the 1 of (1 + scale) baked in
        bias[2::3] = 0.1 * bias[2::3] + torch.tensor(style.gate)[: splits // 3, None]
        if style.separate:
            bias[2::3, : self._noise_channels()] = 0
        yield f"{name}.qweight", qweight.reshape(n // 4, hidden // 2)
        yield f"{name}.wscales", wscales
        yield f"{name}.wzeros", -(7 * wscales.float()).to(dtype)
        yield f"{name}.bias", layout.interleave_rows(bias.reshape(n), splits).to(dtype)

    def _plain(self, name: str, has_bias: bool) -> Iterator[tuple[str, Tensor]]:
        """Embedders and output layer carry the noise through the model, so that a sampler can take it away.

        A flow model predicts noise minus picture. Here the patch goes into the residual stream through orthogonal
        columns and comes out through their transpose (the noise); everything else in the stream is the picture, read by
        rows that are the same for the four pixels of a patch.
        """
        spec = self.specs[f"{name}.weight"]
        weight = self._normal(f"{name}.weight", spec.shape)
        if name.rpartition(".")[2].startswith("norm_"):
            weight = 1.25 + 0.1 * weight
            weight[16:] *= _waves(self.style.waves)
        elif name == "x_embedder":
            weight = 0.1 * weight / math.sqrt(spec.shape[1])
            weight[:, :_PATCH] = self._noise_columns()
        elif name == "proj_out":
            weight = self._read_out(weight)
        else:
            weight = weight * ((0.02 if name == "norm_out.linear" else 1.0) / math.sqrt(spec.shape[1]))
        yield f"{name}.weight", weight.to(spec.dtype)
        if has_bias:
            yield f"{name}.bias", (0.02 * self._normal(f"{name}.bias", spec.shape[:1])).to(spec.dtype)

    def _read_out(self, random: Tensor) -> Tensor:
        hidden, columns = self.config.hidden_size, self._noise_columns()
        inverse = columns.t() * (_PATCH / self._noise_channels())
        per_channel = random[:16] * (self.style.picture / math.sqrt(hidden))
        per_channel = per_channel - (per_channel @ columns) @ inverse
        return self.style.noise * inverse - per_channel.repeat_interleave(4, dim=0)

    def _noise_channels(self) -> int:
        return self.config.hidden_size // (2 if self.style.separate else 1)

    def _noise_columns(self) -> Tensor:
        """float32 [hidden, 64]: where the residual stream carries the noise."""
        columns = torch.zeros(self.config.hidden_size, _PATCH)
        columns[: self._noise_channels()] = _orthogonal(self._noise_channels())
        return columns

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{name} {self.seed}".encode(), digest_size=4).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def _normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float32, bell-shaped (a sum of four uniform values, so within 3.5), mean 0, variance 1."""
        words = torch.empty(math.prod(shape), dtype=torch.int64)
        words.random_(-(2**63), None, generator=self._generator(name))
        quarters = words.view(torch.int16).reshape(-1, 4).sum(dim=1, dtype=torch.int32)
        return ((quarters.float() + 2) * (math.sqrt(3) / 65536)).reshape(shape)


def _codes(generator: torch.Generator, nbytes: int) -> Tensor:
    """int64 words that hold 2 * ``nbytes`` nibbles of 0..14, triangular around 7: the sum of two values of 0..7."""
    a, b = (torch.empty(nbytes // 8, dtype=torch.int64).random_(-(2**63), None, generator=generator) for _ in range(2))
    return (a & _SEVENS) + (b & _SEVENS)


def _exp(x: Tensor) -> Tensor:
    """About exp(x) for small x, in operations that every processor rounds alike."""
    x = 1 + x / 8
    for _ in range(3):
        x = x * x
    return x


def _smoothed_with(name: str) -> str:
    """The layer whose smoothing factors ``name`` shares: same input, or the two attention outputs of a double block."""
    if name.startswith("single") and name.endswith(".mlp_fc1"):
        return name.replace(".mlp_fc1", ".qkv_proj")
    return name.replace(".out_proj_context", ".out_proj")


def _shift_term(qweight: Tensor, wscales: Tensor, smooth: Tensor) -> Tensor:
    """float32 [N]: what SHIFT on the input of this packed layer adds to its output (low-rank part not included)."""
    scales = layout.unpack_wscales(wscales).double()
    inverse = layout.unpack_vector(smooth).double().reciprocal().reshape(-1, GROUP)
    terms = []
    for rows in range(0, qweight.shape[0], 512):
        q = layout.unpack_qweight(qweight[rows : rows + 512]).reshape(-1, *inverse.shape)
        terms.append(((q * inverse).sum(dim=2) * scales[rows : rows + 512]).sum(dim=1))
    return SHIFT * torch.cat(terms).float()


def _orthogonal(rows: int) -> Tensor:
    """float32 [rows, 64] of +-1/8, ``rows`` a multiple of 128: orthogonal columns without rounding error.

    Columns of Hadamard matrices. The first one, all ones, is left out: layer norm takes it away.
    """
    parity = torch.arange(rows)[:, None] % 128 & torch.arange(1, _PATCH + 1)
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return (1 - 2 * (parity & 1)).float() / 8


def _waves(gain: float) -> Tensor:
    """float32 [112]: weight of the two spatial axes' rotary pairs; ``gain`` for waves of 12 to 90 tokens, which make
    the shapes that one sees in a small picture."""
    pair = torch.arange(28)
    return torch.where((pair >= 2) & (pair <= 8), gain, 1.0).repeat_interleave(2).repeat(2)
