"""Reads pictures: the word on a sign, the kinds, colours and places of shapes. A small network, for 128 x 128 pixels.

    from svdq.benchmarks.tinyflux.score import Scorer, prompts

    samples = prompts(256, seed=1)            # Sample.prompt, .kind, .word, ...; the same ones everywhere
    scorer = Scorer.load(READER)              # assets/demo-flux-reader.safetensors
    result = scorer.score(pictures, samples)  # pictures float32 [B, 3, 128, 128] in 0..1, sample by sample
    result["letters"].nanmean()               # share of the letters that are right
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ...loaders.write import write_tensors
from .glyphs import LETTERS
from .pictures import COLOURS, MOST_LETTERS, RELATIONS, SHAPES, SIZE, Sample, pitch_of, prompts, render

__all__ = ["READER", "Sample", "Scorer", "prompts", "render"]

READER = Path(__file__).resolve().parents[2] / "assets" / "demo-flux-reader.safetensors"

# What the network tells apart, and how many cases there are. Shapes are numbered from left to right or from top to
# bottom.
_WORD = [f"letter {index}" for index in range(MOST_LETTERS)]
_REST = {
    "layout": 4,  # a sign, one shape, two beside each other, two above each other
    "background": len(COLOURS), "board": len(COLOURS), "letters": len(COLOURS),
    "shape 0": len(SHAPES), "shape 1": len(SHAPES), "colour 0": len(COLOURS), "colour 1": len(COLOURS),
}  # fmt: skip
_HEADS = ["count", *_WORD, *_REST]
_IGNORED = -1


class Scorer(nn.Module):
    """The network. Make one with `load`; `train` of this folder trained it.

    It counts the letters first, and then looks at each where it stands in a word of so many.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int, stride: int | tuple[int, int]) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 32, 1), block(32, 48, (2, 1)))
        # Rows are summed up by a learned weight each; 32 columns are kept.
        self.columns = nn.Sequential(nn.Conv2d(48, 40, (SIZE // 8, 1)), nn.ReLU())
        self.count = nn.Linear(40 * SIZE // 4, MOST_LETTERS + 1)
        self.letter = nn.Sequential(nn.Linear(3 * 40, 64), nn.ReLU(), nn.Linear(64, len(LETTERS)))
        self.shapes = nn.Sequential(block(48, 24, 2), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.rest = nn.Linear(24 * 16, sum(_REST.values()))

    def forward(self, pictures: Tensor, counts: Tensor | None = None) -> dict[str, Tensor]:
        """float32 [B, 3, 128, 128] in 0..1 -> name of a head -> logits [B, cases].

        counts: int64 [B], how many letters there are; as the network itself finds if None.
        """
        features = self.stem(2 * pictures - 1)
        columns = self.columns(features)
        outputs = {"count": self.count(columns.flatten(1))}
        if counts is None:
            counts = outputs["count"].argmax(1)
        letters = self.letter(self._cells(columns, counts))
        outputs |= dict(zip(_WORD, letters.unbind(1), strict=True))
        rest = self.rest(self.shapes(features)).split(list(_REST.values()), dim=1)
        return outputs | dict(zip(_REST, rest, strict=True))

    @staticmethod
    def _cells(columns: Tensor, counts: Tensor) -> Tensor:
        """[B, 40, 1, 32] -> [B, 7, 120]: left, middle and right of each letter's cell."""
        pitch = torch.tensor([pitch_of(count) for count in range(MOST_LETTERS + 1)], device=columns.device)[counts]
        index = torch.arange(MOST_LETTERS, device=columns.device)
        middle = (index - (counts[:, None] - 1) / 2) * pitch[:, None]  # pixels from the picture's middle
        x = middle[:, :, None] + pitch[:, None, None] * torch.tensor([-0.3, 0.0, 0.3], device=columns.device)
        grid = torch.stack((2 * x.flatten(1) / SIZE, torch.zeros_like(x.flatten(1))), dim=-1)[:, None]
        found = functional.grid_sample(columns.float(), grid, padding_mode="border", align_corners=False)
        return found[:, :, 0].movedim(1, 2).reshape(len(counts), MOST_LETTERS, -1)

    @classmethod
    def load(cls, path: str | os.PathLike[str] = READER) -> Scorer:
        """A trained network from a file, on the CPU. Raises OSError; ValueError for a file of something else."""
        scorer, stored = cls(), load_file(os.fspath(path))
        expected = scorer._stored()
        if stored.keys() != expected.keys():
            odd = min(stored.keys() ^ expected.keys())
            raise ValueError(f"{path}: {odd} is missing or too many; expected a file of the tiny FLUX's reader")
        scorer.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, strict=False)
        return scorer.eval().requires_grad_(False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights in fp16."""
        write_tensors(path, {name: tensor.half() for name, tensor in self._stored().items()}, {}, force=True)

    def _stored(self) -> dict[str, Tensor]:
        """What a file holds: all but the counters of batches."""
        return {name: tensor for name, tensor in self.state_dict().items() if tensor.is_floating_point()}

    @torch.inference_mode()
    def score(self, pictures: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """How far pictures show what their prompts say.

        Args:
            pictures: float32 [B, 3, 128, 128] in 0..1, on the scorer's device.
            samples: the B samples whose prompts made them.

        Returns:
            float32 [B] on the CPU for each name; NaN where a prompt says nothing about it. ``letters``: share of the
            word's letters that are right in their place · ``word``: 1 if the word is read exactly, no letter too many ·
            ``shape``, ``colour``: share of shapes whose kind, or colour, is right · ``place``: 1 if as many shapes are
            there as asked for, beside or above each other as asked for · ``surface``: share of the named colours of
            background, board and letters that are right.
        """
        if tuple(pictures.shape) != (len(samples), 3, SIZE, SIZE):
            expected = [len(samples), 3, SIZE, SIZE]
            raise ValueError(f"pictures are {list(pictures.shape)}, expected {expected}: one of each sample")
        read = {name: logits.argmax(1).cpu() for name, logits in self(pictures.float().clamp(0, 1)).items()}
        wanted = targets(samples)
        right = {name: (read[name] == wanted[name]).float() for name in _HEADS}
        right = {name: value.where(wanted[name] != _IGNORED, torch.nan) for name, value in right.items()}
        # A letter behind the end of what is read is not there.
        letters = torch.stack([right[name] * (index < read["count"]) for index, name in enumerate(_WORD)], dim=1)
        signs = wanted["layout"] == 0
        return {
            "letters": letters.nanmean(1),
            "word": (letters.nan_to_num(1).prod(1) * right["count"]).where(signs, torch.nan),
            "shape": _mean(right, "shape 0", "shape 1"),
            "colour": _mean(right, "colour 0", "colour 1"),
            "place": right["layout"].where(~signs, torch.nan),
            "surface": _mean({name: right[name].where(_named(samples, name), torch.nan) for name in right}, *_SURFACES),
        }  # fmt: skip

    @torch.inference_mode()
    def read_words(self, pictures: Tensor) -> list[str]:
        """The letters on each picture; whatever they look like where there is no sign."""
        heads = self(pictures.float().clamp(0, 1))
        codes = torch.stack([heads[name].argmax(1) for name in _WORD], dim=1).tolist()
        counts = heads["count"].argmax(1).tolist()
        return ["".join(LETTERS[code] for code in row[:count]) for row, count in zip(codes, counts, strict=True)]


_SURFACES = ("background", "board", "letters")


def _named(samples: Sequence[Sample], surface: str) -> Tensor:
    return torch.tensor([getattr(sample, surface, None) is not None for sample in samples], dtype=torch.bool)


def _mean(right: dict[str, Tensor], *names: str) -> Tensor:
    return torch.stack([right[name] for name in names], dim=1).nanmean(1)


def targets(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Name of a head -> int64 [B]: the right case, -1 where a picture has none."""
    rows = []
    for sample in samples:
        if sample.kind == "sign":
            codes = [LETTERS.index(letter) for letter in sample.word]
            codes += [_IGNORED] * (MOST_LETTERS - len(codes))
            rows.append([len(sample.word), *codes, 0, *sample.surfaces, *[_IGNORED] * 4])
            continue
        shapes = sample.shapes[::-1] if sample.relation in ("right of", "below") else sample.shapes
        layout = 1 if sample.relation is None else 2 + RELATIONS.index(sample.relation) // 2
        kinds = [SHAPES.index(shape.kind) for shape in shapes] + [_IGNORED] * (2 - len(shapes))
        colours = [list(COLOURS).index(shape.colour) for shape in shapes] + [_IGNORED] * (2 - len(shapes))
        rows.append([_IGNORED, *[_IGNORED] * MOST_LETTERS, layout, *sample.surfaces, *kinds, *colours])
    return dict(zip(_HEADS, torch.tensor(rows).reshape(-1, len(_HEADS)).unbind(1), strict=True))


def loss(scorer: Scorer, pictures: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of all heads, per picture; letters are looked for where they are."""
    heads = scorer(pictures, wanted["count"].clamp(min=0))
    return sum(
        functional.cross_entropy(heads[name], wanted[name], ignore_index=_IGNORED, reduction="sum") for name in _HEADS
    ) / len(pictures)
