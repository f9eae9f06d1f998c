"""One picture of pictures: a few prompts by several configurations, labelled."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SHOWN = ("original", "fp8", "int8", "r32-gptq-int8", "r32-int8", "r32-gptq", "r32", "r16-gptq", "smooth", "nf4", "q4-0",
         "naive")  # fmt: skip
PROMPTS = 6
MOST_BYTES = 300_000
_GAP, _TEXT, _LINE = 4, 11, 14  # pixels


def save(path: Path, labels: Mapping[str, str], texts: Sequence[str], found: Mapping[str, Any]) -> None:
    """Write a JPEG of at most MOST_BYTES. labels: name -> text above the column · texts: of all prompts, above their
    rows · found: name -> measure.Measured."""
    names = [name for name in SHOWN if name in found]
    rows = _chosen(len(texts), found[names[0]].values.get("word"))
    height, width = found[names[0]].pictures.shape[2:]
    font = ImageFont.load_default(_TEXT)
    lines = {name: _wrapped(labels.get(name, name), font, width) for name in names}
    head, step = max(map(len, lines.values())) * _LINE, _LINE + height + _GAP
    page = Image.new("RGB", (len(names) * (width + _GAP) - _GAP, head + len(rows) * step - _GAP), "white")
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(names):
        left = column * (width + _GAP)
        for index, line in enumerate(lines[name]):
            draw.text((left, index * _LINE), line, "black", font)
        for row, prompt in enumerate(rows):
            page.paste(_image(found[name].pictures[prompt]), (left, head + row * step + _LINE))
    for row, prompt in enumerate(rows):
        draw.text((0, head + row * step), texts[prompt], "dimgray", font)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    for quality in (92, 85, 75, 60, 40, 20):
        page.save(unfinished, "JPEG", quality=quality, optimize=True)
        if unfinished.stat().st_size <= MOST_BYTES:
            break
    os.replace(unfinished, path)


def _chosen(count: int, word: Tensor | None) -> list[int]:
    """The first prompts; as many with a word (``word`` is not NaN) as without."""
    if word is None:
        return list(range(min(PROMPTS, count)))
    without = word.isnan().tolist()
    kinds = ([index for index in range(count) if without[index] == kind] for kind in (True, False))
    return sorted(index for kind in kinds for index in kind[: PROMPTS // 2])


def _image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1."""
    return Image.fromarray((picture * 255).round().byte().movedim(0, -1).contiguous().numpy())


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
