"""Prompts and the pictures that they describe: coloured shapes, and signs with a short word.

A picture is a row of numbers (`Sample.row`), drawn on any device by `render`: 128 x 128 pixels, anti-aliased by signed
distances. Sample i of a seed depends on nothing but the two numbers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .glyphs import FACES, HEIGHT, LETTERS, WIDTH, load

SIZE = 128  # pixels
MOST_LETTERS = 7
SIGN_SHARE = 0.7

COLOURS = {
    "black": (0.08, 0.08, 0.09), "white": (0.96, 0.96, 0.94), "grey": (0.55, 0.56, 0.58), "red": (0.85, 0.15, 0.15),
    "orange": (0.97, 0.55, 0.10), "yellow": (0.98, 0.87, 0.20), "green": (0.18, 0.62, 0.28), "blue": (0.15, 0.33, 0.82),
    "purple": (0.52, 0.22, 0.66), "pink": (0.98, 0.62, 0.76),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring", "cross")
RELATIONS = ("left of", "right of", "above", "below")
SIZES = ("small", "large")

# A row: 1 for a sign · font, number of letters, pitch, x and y of the word's corner · half width and half height of the
# board, width of its border · 7 letters · colours of background, board, letters · two shapes: kind, x, y, r, colour
_LETTERS_AT, _COLOURS_AT, _SHAPES_AT = 9, 16, 25
ROW = 39
_JITTER = 0.03  # of colours
_INDEX = {colour: index for index, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class Shape:
    """kind: of SHAPES · colour: of COLOURS · size: of SIZES, or None where the prompt does not say."""

    kind: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Sample:
    """A prompt, what is true of its picture, and the picture as numbers.

    kind: "sign" or "shapes" · word: on the sign, else "" · shapes: one or two, as the prompt names them · relation: of
    the first shape to the second, or None · background, board, letters: colours that the prompt names, or None ·
    surfaces: the three as they are in the picture, indices of COLOURS, -1 for none · row: for `render`.
    """

    prompt: str
    kind: str
    row: tuple[float, ...]
    surfaces: tuple[int, int, int]
    word: str = ""
    shapes: tuple[Shape, ...] = ()
    relation: str | None = None
    background: str | None = None
    board: str | None = None
    letters: str | None = None


def prompts(count: int, seed: int = 0, held_out: bool = True, start: int = 0) -> list[Sample]:
    """Samples ``start`` to ``start + count`` of a seed. One in ten words is never trained on; ``held_out`` samples have
    such words and no others."""
    return [_sample(random.Random(f"{seed} {index} {held_out}"), held_out) for index in range(start, start + count)]


def is_held_out(word: str) -> bool:
    """Whether a word is kept away from training."""
    return zlib.crc32(word.encode()) % 10 == 0


def sign(word: str, seed: int = 0) -> Sample:
    """"a sign that says ..." with a word of 2 to 7 letters a to z; everything else is drawn from the seed."""
    if not 2 <= len(word) <= MOST_LETTERS or set(word) - set(LETTERS):
        raise ValueError(f"{word!r}: expected 2 to {MOST_LETTERS} letters a to z")
    return _sign(random.Random(f"{seed} {word}"), word, named=0.0)


def pitch_of(letters: int) -> float:
    """Pixels from letter to letter in a word of so many; words are in the middle of the picture, give or take a pixel.

    Two sizes: a small model then has few pictures of each letter to learn.
    """
    return 22.0 if letters <= 5 else 17.0


def render(rows: Tensor | Sequence[Sample], atlas: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw pictures.

    Args:
        rows: float32 [B, ROW], or samples.
        atlas: of `glyphs.load`, on the device of ``rows``; loaded if None.

    Returns:
        pictures: float32 [B, 3, SIZE, SIZE] in 0..1.
        subject: float32 [B, SIZE, SIZE], 1 in the cells of the word and on shapes, 0 elsewhere.
    """
    if not isinstance(rows, Tensor):
        rows = torch.tensor([sample.row for sample in rows], dtype=torch.float32).reshape(-1, ROW)
    if atlas is None:
        atlas = load(rows.device)
    columns = [column[:, None, None] for column in rows.unbind(1)]
    axis = torch.arange(SIZE, device=rows.device) + 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    is_sign, _, count, pitch, left, top, half_width, half_height, border = columns[:_LETTERS_AT]

    def paint(picture: Tensor, colour: int, coverage: Tensor) -> Tensor:
        return torch.lerp(picture, rows[:, colour : colour + 3, None, None], coverage[:, None])

    width = count * pitch
    middle = top + pitch * (HEIGHT / WIDTH / 2)
    # A box with round corners: the board, and the line on it.
    dx, dy = (x - left - width / 2).abs() - half_width + 5, (y - middle).abs() - half_height + 5
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0) - 5
    board = _covered(outside) * is_sign
    line = _covered((outside + 3.5).abs() - border / 2) * (border > 0) * is_sign
    word, subject = _word(rows, atlas, x, y)
    picture = rows[:, _COLOURS_AT : _COLOURS_AT + 3, None, None].expand(-1, -1, SIZE, SIZE)
    picture = paint(picture, _COLOURS_AT + 3, board)
    picture = paint(picture, _COLOURS_AT + 6, torch.maximum(line, word))
    for first in (_SHAPES_AT, _SHAPES_AT + 7):
        shape = _shape(*columns[first : first + 4], x, y)
        picture = paint(picture, first + 4, shape)
        subject = torch.maximum(subject, shape)
    return picture, subject


def _covered(distance: Tensor) -> Tensor:
    """Share of a pixel inside an outline; distance in pixels, negative inside."""
    return (0.5 - distance).clamp(0, 1)


def _word(rows: Tensor, atlas: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Coverage of the letters, and of their cells: both [B, SIZE, SIZE]."""
    is_sign, font, count, pitch, left, top = (rows[:, i, None] for i in range(6))
    x, y = (x[:, 0] - left) / pitch, (y[..., 0] - top) / pitch  # [B, SIZE], in cells
    cell = x.floor().clamp(0, MOST_LETTERS - 1)
    u, v = (x - cell) * WIDTH - 0.5, y * WIDTH - 0.5  # in texels
    letter = rows[:, _LETTERS_AT : _LETTERS_AT + MOST_LETTERS].gather(1, cell.long())
    inside = ((x >= 0) & (x < count))[:, None, :] & ((v > -0.5) & (v < HEIGHT - 0.5))[:, :, None]
    column, row = u.floor(), v.floor()
    texels = atlas.reshape(-1)
    base = ((font.long() * atlas.shape[1] + letter.long()) * HEIGHT)[:, None, :]

    def corner(dx: int, dy: int) -> Tensor:
        at_x = (column + dx).clamp(0, WIDTH - 1).long()[:, None, :]
        at_y = (row + dy).clamp(0, HEIGHT - 1).long()[:, :, None]
        return texels[(base + at_y) * WIDTH + at_x]

    wx, wy = (u - column)[:, None, :], (v - row)[:, :, None]
    upper, lower = (torch.lerp(corner(0, dy), corner(1, dy), wx) for dy in (0, 1))
    distance = torch.lerp(upper, lower, wy) * (pitch[:, :, None] / WIDTH)
    shown = inside * is_sign[:, :, None]
    return _covered(-distance) * shown, shown


def _shape(kind: Tensor, cx: Tensor, cy: Tensor, r: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Coverage of one shape, [B, SIZE, SIZE]; radius 0 is none."""
    dx, dy = (x - cx).abs(), y - cy
    ady = dy.abs()
    radius = torch.hypot(dx, dy)
    run, rise = 0.95, 1.6
    slope = (dx * rise - (dy + r) * run) / (run**2 + rise**2) ** 0.5
    distances = (
        radius - r,
        torch.maximum(dx, ady) - 0.86 * r,
        torch.maximum(slope, dy - (rise - 1) * r),
        (radius - 0.74 * r).abs() - 0.26 * r,
        torch.minimum(torch.maximum(dx - r, ady - 0.32 * r), torch.maximum(ady - r, dx - 0.32 * r)),
    )
    distance = distances[0]
    for index, other in enumerate(distances[1:], start=1):
        distance = torch.where(kind == index, other, distance)
    return _covered(distance) * (r > 0)


def _sample(rng: random.Random, held_out: bool) -> Sample:
    if rng.random() >= SIGN_SHARE:
        return _shapes(rng)
    while True:
        word = _make_word(rng)
        if is_held_out(word) == held_out:
            return _sign(rng, word, named=0.35)


def _make_word(rng: random.Random) -> str:
    """Half of the words are any letters, the others alternate consonants and vowels."""
    count = rng.choice((2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7))
    if rng.random() < 0.5:
        return "".join(rng.choices(LETTERS, k=count))
    groups = ("aeiou", "bcdfghjklmnpqrstvwxyz")
    first = rng.random() < 0.7
    return "".join(rng.choice(groups[(index + first) % 2]) for index in range(count))


def _sign(rng: random.Random, word: str, named: float) -> Sample:
    """named: how likely the prompt names each of the colours."""
    background, board, letters = _three_colours(rng)
    said = [colour if rng.random() < named else None for colour in (board, letters, background)]
    prompt = f"{_a(said[0] or 'sign')} sign" if said[0] else "a sign"
    if said[1]:
        prompt += f" with {said[1]} letters"
    if said[2]:
        prompt += f" on {_a(said[2])} background"
    count = len(word)
    pitch = pitch_of(count)
    left = (SIZE - count * pitch) / 2 + rng.uniform(-1, 1)
    top = (SIZE - pitch * HEIGHT / WIDTH) / 2 + rng.uniform(-2.5, 2.5)
    half_width = min(count * pitch / 2 + rng.uniform(7, 10), 63)
    half_height = pitch * HEIGHT / WIDTH / 2 + rng.uniform(6, 12)
    codes = [LETTERS.index(letter) for letter in word] + [len(LETTERS)] * (MOST_LETTERS - count)
    row = [1, rng.randrange(len(FACES)), count, pitch, left, top, half_width, half_height, rng.choice((0, 1.5, 2))]
    row += [*codes, *_shade(rng, background), *_shade(rng, board), *_shade(rng, letters), *([0] * 14)]
    surfaces = tuple(_INDEX[colour] for colour in (background, board, letters))
    prompt = f"{prompt} that says {word}"
    return Sample(
        prompt, "sign", tuple(row), surfaces, word, board=said[0], letters=said[1], background=said[2]
    )  # fmt: skip


def _shapes(rng: random.Random) -> Sample:
    background = rng.choice(list(COLOURS))
    relation = rng.choice(RELATIONS) if rng.random() < 0.65 else None
    shapes = []
    for _ in range(2 if relation else 1):
        colour = _other(rng, [background, *(shape.colour for shape in shapes)])
        shapes.append(Shape(rng.choice(SHAPES), colour, rng.choice((None, None, *SIZES))))
    said = background if rng.random() < 0.6 else None
    spread = (rng.uniform(26, 30), rng.uniform(-8, 8))  # along and across the line through both
    numbers = []
    for index, shape in enumerate(shapes):
        ranges = {None: (15, 22), "small": (9, 13), "large": (24, 28)} if relation else {
            None: (24, 36), "small": (12, 18), "large": (42, 52)
        }  # fmt: skip
        radius = rng.uniform(*ranges[shape.size])
        x, y = rng.uniform(-3, 3), rng.uniform(-3, 3)
        if relation:
            sign = (1 if index else -1) * (1 if relation in ("left of", "above") else -1)
            along, across = sign * spread[0], sign * spread[1]
            x, y = (x + along, y + across) if relation in RELATIONS[:2] else (x + across, y + along)
        centre = SIZE / 2
        numbers += [SHAPES.index(shape.kind), centre + x, centre + y, radius, *_shade(rng, shape.colour)]
    prompt = f" {relation} ".join(
        _a(f"{shape.size} {shape.colour}" if shape.size else shape.colour) + f" {shape.kind}" for shape in shapes
    )
    if said:
        prompt += f" on {_a(said)} background"
    row = [0, 0, 0, 1, 0, 0, 0, 0, 0, *([len(LETTERS)] * MOST_LETTERS), *_shade(rng, background), *([0] * 6)]
    row += numbers + [0] * (14 - len(numbers))
    surfaces = (_INDEX[background], -1, -1)
    return Sample(prompt, "shapes", tuple(row), surfaces, "", tuple(shapes), relation, background=said)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _shade(rng: random.Random, colour: str) -> list[float]:
    return [min(max(value + rng.uniform(-_JITTER, _JITTER), 0.0), 1.0) for value in COLOURS[colour]]


def _luminance(colour: str) -> float:
    red, green, blue = COLOURS[colour]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def _other(rng: random.Random, taken: Sequence[str]) -> str:
    """A colour unlike those taken."""
    def differs(a: str, b: str) -> bool:
        return sum(abs(p - q) for p, q in zip(COLOURS[a], COLOURS[b], strict=True)) > 0.55

    return rng.choice([colour for colour in COLOURS if all(differs(colour, other) for other in taken)])


def _three_colours(rng: random.Random) -> tuple[str, str, str]:
    """Background, board, letters; the letters can be read on the board."""
    board = rng.choice(list(COLOURS))
    letters = rng.choice([c for c in COLOURS if abs(_luminance(c) - _luminance(board)) > 0.42])
    return _other(rng, [board]), board, letters
