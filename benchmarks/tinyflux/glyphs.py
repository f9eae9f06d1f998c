"""The letters a to z of four fonts as signed distances: what `pictures.py` paints words with.

The fonts are DejaVu, as Debian's `fonts-dejavu-core` and matplotlib's package data have them; their licence (Bitstream
Vera) allows to use, change and redistribute them. glyphs.safetensors beside this file was made from version 2.37 and is
all that drawing needs; `python3 benchmarks/tinyflux glyphs` makes it again where the fonts, Pillow and SciPy are.
"""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FILE = Path(__file__).with_name("glyphs.safetensors")
FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold")
LETTERS = string.ascii_lowercase

# A cell is as wide as the pitch from letter to letter, and so many texels; the em square is larger than a cell.
WIDTH, HEIGHT = 32, 56
RANGE = 4.0  # texels of distance that a byte spans on either side of the outline
_EM, _BASELINE, _MOST_INK = 1.6, 1.25, 0.92  # in pitches; the last one: wider letters are squeezed
_FINE = 8  # pixels per texel while the distance is measured


def load(device: torch.device | str = "cpu") -> Tensor:
    """float32 [faces, 27, HEIGHT, WIDTH]: distance to the outline in texels, positive inside; 26 is the empty cell."""
    stored = load_file(FILE)["distance"].to(device)
    return (stored.float() - 128) * (RANGE / 127)


def font_folders() -> list[Path]:
    """Folders that may hold the fonts: the system's, and that of an installed matplotlib."""
    folders = [Path("/usr/share/fonts/truetype/dejavu"), Path("/usr/share/fonts/dejavu-sans-fonts")]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")
    return folders


def find_font(face: str, folders: list[Path]) -> Path:
    """The file of a face. Raises FileNotFoundError with what to install."""
    for folder in folders:
        path = folder / f"{face}.ttf"
        if path.is_file():
            return path
    looked = ", ".join(map(str, folders))
    raise FileNotFoundError(f"{face}.ttf: in none of {looked}: install fonts-dejavu-core or matplotlib, or use --fonts")


def make(folders: list[Path]) -> Tensor:
    """uint8 [faces, 27, HEIGHT, WIDTH], as glyphs.safetensors has it."""
    cells = torch.zeros(len(FACES), len(LETTERS) + 1, HEIGHT, WIDTH)
    cells[:, -1] = -RANGE
    for face, name in enumerate(FACES):
        for letter, text in enumerate(LETTERS):
            cells[face, letter] = _distance(find_font(name, folders), text)
    return (cells.clamp(-RANGE, RANGE) * (127 / RANGE) + 128).round().to(torch.uint8)


def _distance(font: Path, text: str) -> Tensor:
    """float32 [HEIGHT, WIDTH]: one letter, its ink in the middle of the cell."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    pitch = WIDTH * _FINE
    canvas = Image.new("L", (3 * pitch, HEIGHT * _FINE))
    drawn = ImageFont.truetype(str(font), round(_EM * pitch))
    ImageDraw.Draw(canvas).text((pitch, _BASELINE * pitch), text, fill=255, font=drawn, anchor="ls")
    left, _, right, _ = canvas.getbbox()
    ink = canvas.crop((left, 0, right, canvas.height))
    if ink.width > _MOST_INK * pitch:
        ink = ink.resize((round(_MOST_INK * pitch), ink.height), Image.Resampling.LANCZOS)
    cell = Image.new("L", (pitch, HEIGHT * _FINE))
    cell.paste(ink, ((pitch - ink.width) // 2, 0))
    inside = np.asarray(cell) > 127
    distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
    distance = distance.reshape(HEIGHT, _FINE, WIDTH, _FINE).mean(axis=(1, 3)) / _FINE
    return torch.from_numpy(distance).float()
