"""Stand-ins for the two big files of a FLUX workflow, so that a tiny checkpoint runs end to end with no download.

* ``demo_prompt_embedding``: text -> the two tensors that FLUX wants from its text encoders (``context``
  from T5, ``pooled`` from CLIP). The tiny FLUX in assets/ was trained on them.
* ``write_demo_vae``: a small file in the TAESD layout that ComfyUI's stock VAE loader reads, with weights set by
  formula: a latent pixel is one colour, decoding interpolates between them, encoding averages 8 x 8 pixels.

Both are formulas. The trained VAE of the tiny FLUX lies in assets/.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .write import write_tensors

DEMO_PROMPT_TOKENS = 80
_PLACES = 32  # a longer word's bytes, or a longer text's words, share the last code
PROMPT_FEATURES = 128 + 4 * _PLACES

# FLUX's latent space: 16 channels; a file stores latents as z / SCALE + SHIFT, the model works on z.
LATENT_CHANNELS = 16
LATENT_SCALE = 0.3611
LATENT_SHIFT = 0.1159

# Orthonormal colour axes (brightness, red-blue, magenta-green), and the colour that one unit of latent makes on each.
# Pictures vary more in brightness than in hue; with these gains latents stay below 2.5, where the TAESD decoder's
# input limiter (3 tanh(z / 3)) is not far from linear.
_COLOUR_AXES = ((3**-0.5,) * 3, (2**-0.5, 0.0, -(2**-0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))
_COLOUR_GAINS = (0.6, 0.4, 0.4)
# Roughly where FLUX's own latents have these axes, so that ComfyUI's live previews show the colours of the result.
_LATENT_DIRECTIONS = (
    (1, 1, -1, 1, 2, 1, 3, -1, 1, 2, 0, 0, 3, -4, -2, -4),
    (-2, -1, 1, -2, 1, 0, -1, 0, -3, 3, -1, 1, 0, 0, 0, -1),
    (0, 1, 3, 0, -1, -2, -1, 0, 1, -2, -2, 1, 0, -3, 2, 0),
)

# The TAESD layout: 64 channels everywhere, position of each layer in its ``nn.Sequential``.
_WIDTH = 64
_ENCODER_FIRST, _ENCODER_DOWN, _ENCODER_BLOCKS, _ENCODER_LAST = 0, (2, 6, 10), (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), 14
_DECODER_FIRST, _DECODER_UP, _DECODER_BLOCKS, _DECODER_LAST = 1, (7, 12, 17), (3, 4, 5, 9, 10, 14, 15), 19

_CENTRE = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)


def demo_prompt_embedding(
    text: str, context_in_dim: int, vec_in_dim: int, tokens: int = DEMO_PROMPT_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of the text encoders: one token for each UTF-8 byte, set by formula.

    A token has 256 features of +1 or -1: which byte it is, its place in its word, how many bytes of the word are left,
    which word it is, and how many words are left, each as a row of a Hadamard matrix, so that different values are
    orthogonal. Behind the text tokens are zero. A text with more bytes than tokens shares each token among several.
    The pooled vector is the sum of the tokens, scaled to a root mean square of 1. Models of another width than 256
    get both through a fixed random mixture of the features.

    Returns:
        context: float32 ``[1, tokens, context_in_dim]``.
        pooled: float32 ``[1, vec_in_dim]``.
    """
    data = text.encode("utf-8")
    features = byte_features(torch.tensor(byte_numbers(data), dtype=torch.uint8).reshape(-1, 5))
    per_token = max(1, -(-len(data) // tokens))
    context = torch.zeros(tokens * per_token, PROMPT_FEATURES)
    context[: len(data)] = features
    context = context.reshape(tokens, per_token, PROMPT_FEATURES).sum(1) / per_token**0.5
    pooled = pool_tokens(context)
    return _mixed(context, context_in_dim).unsqueeze(0), _mixed(pooled, vec_in_dim).unsqueeze(0)


def byte_numbers(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """For each byte of a text: the byte, its place in its word, bytes of the word that are left, index of the word,
    words that are left. All but the first stop at 31; a space belongs to the word before it."""
    numbers = []
    words = data.replace(b"\n", b" ").split(b" ")
    position = 0
    for index, word in enumerate(words):
        for place in range(len(word) + (index < len(words) - 1)):
            counts = (place, len(word) - place, index, len(words) - 1 - index)
            numbers.append((data[position], *(min(count, _PLACES - 1) for count in counts)))
            position += 1
    return numbers


def byte_features(numbers: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., 5]`` of :func:`byte_numbers` -> float32 ``[..., 256]`` of +1 and -1."""
    device = numbers.device
    byte, *counts = numbers.long().unbind(-1)
    # Orthogonal codes for ASCII; other bytes have the negative of one.
    which = _hadamard(128, device)[byte & 127] * (1 - 2 * (byte >> 7)).unsqueeze(-1)
    where = _hadamard(_PLACES, device)
    return torch.cat((which, *(where[count] for count in counts)), dim=-1)


def pool_tokens(context: torch.Tensor) -> torch.Tensor:
    """``[..., tokens, channels]`` -> ``[..., channels]``: the sum, scaled to a root mean square of 1."""
    pooled = context.sum(-2)
    return pooled / pooled.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """float32 ``[size, size]`` of +1 and -1, orthogonal rows; ``size`` a power of 2."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _mixed(features: torch.Tensor, width: int) -> torch.Tensor:
    """``[..., 256]`` to ``[..., width]``, with the same mean square; the features themselves if the width is theirs."""
    if width == PROMPT_FEATURES:
        return features
    signs = torch.empty(PROMPT_FEATURES * width, dtype=torch.int8)
    # Integers: the same on every machine, which the last bits of torch.randn are not.
    signs.random_(0, 2, generator=torch.Generator().manual_seed(0))
    return features @ (2.0 * signs.reshape(PROMPT_FEATURES, width) - 1) / PROMPT_FEATURES**0.5


def write_demo_vae(path: str | os.PathLike[str]) -> None:
    """Write the demo VAE as safetensors (fp16, 5 MB). The file appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, demo_vae_state_dict(), {"format": "pt"}, force=True)


def demo_vae_state_dict() -> dict[str, torch.Tensor]:
    """The demo VAE's weights under TAESD's names, fp16."""
    to_rgb = _latent_to_rgb()
    sd = {f"taesd_encoder.{name}": weight for name, weight in _encoder(to_rgb).items()}
    sd |= {f"taesd_decoder.{name}": weight for name, weight in _decoder(to_rgb).items()}
    sd = {name: weight.to(torch.float16).contiguous() for name, weight in sd.items()}
    sd["vae_scale"] = torch.tensor(LATENT_SCALE)
    sd["vae_shift"] = torch.tensor(LATENT_SHIFT)
    return sd


def _latent_to_rgb() -> torch.Tensor:
    """``[3, 16]``: latent pixel -> colour in -1..1."""
    axes = torch.tensor(_COLOUR_AXES, dtype=torch.float64)
    gains = torch.tensor(_COLOUR_GAINS, dtype=torch.float64)
    # Made orthonormal in their order: no colour then needs large latents that cancel each other.
    directions, lengths = torch.linalg.qr(torch.tensor(_LATENT_DIRECTIONS, dtype=torch.float64).T)
    return axes.T @ torch.diag(gains * lengths.diagonal().sign()) @ directions.T


def _encoder(to_rgb: torch.Tensor) -> dict[str, torch.Tensor]:
    """Colour 0..1 -> latents. Colours are not negative, so the ReLUs between the layers do nothing."""
    box = torch.zeros(3, 3, dtype=torch.float64)
    box[1:, 1:] = 0.25  # with stride 2 and padding 1 these taps are exactly one 2 x 2 cell
    from_rgb = torch.linalg.pinv(to_rgb)
    colour = _select(0, 0, 3)
    sd = _conv(_ENCODER_FIRST, (_WIDTH, 3), (colour, _CENTRE), bias=torch.zeros(3))
    for index in _ENCODER_DOWN:
        sd |= _conv(index, (_WIDTH, _WIDTH), (colour, box))
    for index in _ENCODER_BLOCKS:
        sd |= _identity_block(index)
    return sd | _conv(_ENCODER_LAST, (LATENT_CHANNELS, _WIDTH), (2 * from_rgb, _CENTRE), bias=-from_rgb.sum(1))


def _decoder(to_rgb: torch.Tensor) -> dict[str, torch.Tensor]:
    """Latents -> colour 0..1. Positive and negative part travel in channels of their own, so that ReLU keeps both.

    Channels: 0-5 the two parts, 6-11 their value before smoothing, 12 the constant 1, 13 the share of the smoothing
    kernel that lies inside the picture (1, at an edge 0.75, in a corner 0.5625).
    """
    # After TAESD's nearest-neighbour doubling this kernel makes it bilinear.
    tent = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    tent = tent.outer(tent)
    smooth = _select(0, 0, 6) + _select(13, 12, 1)
    keep = _select(6, 0, 6) + _select(12, 12, 1)
    one = torch.zeros(13)
    one[12] = 1.0
    half = 0.5 * torch.eye(3, dtype=torch.float64)

    first = torch.cat((to_rgb, -to_rgb))
    sd = _conv(_DECODER_FIRST, (_WIDTH, LATENT_CHANNELS), (first, _CENTRE), bias=one)
    for index in _DECODER_UP:
        sd |= _conv(index, (_WIDTH, _WIDTH), (smooth, tent), (keep, _CENTRE))
        sd |= _edge_block(index + 1)
    for index in _DECODER_BLOCKS:
        sd |= _identity_block(index)
    return sd | _conv(_DECODER_LAST, (3, _WIDTH), (torch.cat((half, -half), 1), _CENTRE), bias=torch.full((3,), 0.5))


def _edge_block(index: int) -> dict[str, torch.Tensor]:
    """A residual block that gives back what smoothing lost to the zero padding, so that pictures have no grey frame.

    The lost share is 0.25 of the unsmoothed value at an edge, 0.4375 in a corner. ``relu(value - 16 (share - s))``
    switches the value on where the share is ``s`` and off where it is larger (for values below 3).
    """
    on_edges = _select(0, 6, 6) - 16 * _select(0, 13, 1, rows=6)
    in_corners = _select(6, 6, 6) - 16 * _select(6, 13, 1, rows=6)
    excess = -16 * _select(12, 13, 1)  # what on_edges has too much in corners: 16 (0.75 - 0.5625)
    bias = torch.tensor([16 * 0.75] * 6 + [16 * 0.5625] * 6 + [16 * 0.75])
    lost = 0.25 * (_select(0, 0, 6) - _select(0, 12, 1, rows=6)) + 0.1875 * _select(0, 6, 6)
    sd = _conv(f"{index}.conv.0", (_WIDTH, _WIDTH), (on_edges + in_corners + excess, _CENTRE), bias=bias)
    sd |= _conv(f"{index}.conv.2", (_WIDTH, _WIDTH), (lost, _CENTRE), bias=torch.zeros(0))
    return sd | _conv(f"{index}.conv.4", (_WIDTH, _WIDTH), (_select(0, 0, 6), _CENTRE), bias=torch.zeros(0))


def _identity_block(index: int) -> dict[str, torch.Tensor]:
    """A residual block whose branch is zero: relu(0 + x) = x for the non-negative values that arrive here."""
    sd: dict[str, torch.Tensor] = {}
    for conv in (0, 2, 4):
        sd |= _conv(f"{index}.conv.{conv}", (_WIDTH, _WIDTH), bias=torch.zeros(0))
    return sd


def _select(to: int, source: int, count: int, rows: int | None = None) -> torch.Tensor:
    """``[64, 64]`` channel mix: moves ``count`` channels from ``source`` to ``to``, or one channel to ``rows`` rows."""
    mix = torch.zeros(_WIDTH, _WIDTH, dtype=torch.float64)
    for i in range(rows or count):
        mix[to + i, source + min(i, count - 1)] = 1.0
    return mix


def _conv(
    name: int | str,
    shape: tuple[int, int],
    *terms: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """A 3 x 3 convolution of ``shape`` (out, in): the sum of ``terms``, each a channel mix and the kernel it goes with.

    A mix or bias smaller than the shape stands for its first rows and columns; the rest is zero.
    """
    weight = torch.zeros(*shape, 3, 3, dtype=torch.float64)
    for mix, kernel in terms:
        mix = mix[: shape[0], : shape[1]]
        weight[: mix.shape[0], : mix.shape[1]] += mix[:, :, None, None] * kernel
    sd = {f"{name}.weight": weight}
    if bias is not None:
        sd[f"{name}.bias"] = torch.zeros(shape[0], dtype=torch.float64)
        sd[f"{name}.bias"][: bias.shape[0]] = bias
    return sd
