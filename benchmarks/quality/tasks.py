"""What the configurations are asked to draw: prompts of the tiny FLUX, a decoder, and what an observer finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...loaders.demo_assets import demo_prompt_embedding
from ...quantizer.prompts import Prompt
from ..tinyflux.score import Sample, Scorer, prompts
from .sampling import Task

GUIDANCE = 3.5
EVALUATED, CALIBRATED = 1, 2  # seeds: neither is that of training


def make_task(
    widths: tuple[int, int], count: int, calibration: int, vae: Path, reader: Path | None, **options: Any
) -> Task:
    """widths: channels of context and pooled vector · count, calibration: prompts of each kind; the former have words
    that the tiny FLUX was not trained on · vae, reader: files; None where the pictures mean nothing · options: size,
    steps and batch of the Task."""
    samples = prompts(count, seed=EVALUATED)
    others = prompts(calibration, seed=CALIBRATED, held_out=False)
    scores = {} if reader is None else {"score": _scored(Scorer.load(reader), samples)}
    encoded = [_encode(sample.prompt, widths) for sample in (*samples, *others)]
    texts = [sample.prompt for sample in samples]
    return Task(encoded[:count], encoded[count:], decode=_decoder(vae), texts=texts, **scores, **options)


def _encode(text: str, widths: tuple[int, int]) -> Prompt:
    context, pooled = demo_prompt_embedding(text, *widths)
    return Prompt(context[0], pooled[0], GUIDANCE)


def _scored(scorer: Scorer, samples: Sequence[Sample]) -> Callable[[Tensor, int], dict[str, Tensor]]:
    device = management.get_torch_device()
    scorer = scorer.to(device)
    return lambda pictures, first: scorer.score(pictures.to(device), samples[first : first + len(pictures)])


def _decoder(path: Path) -> Callable[[Tensor], Tensor]:
    """Latents -> pictures [B, 3, H, W] in 0..1, by a VAE that ComfyUI loads."""
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    return lambda latents: torch.as_tensor(vae.decode(latents)).movedim(-1, 1)
