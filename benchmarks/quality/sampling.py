"""Latents of many prompts at once through ComfyUI's sampler, and what comes into the linears meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import comfy.model_management as management
import comfy.sample
import torch
from torch import Tensor, nn

from ...quantizer.prompts import Prompt

TOKENS = 4  # of each picture, kept of every input at every step


@dataclass(frozen=True)
class Task:
    """What is asked of every configuration.

    prompts: evaluated · calibration: other prompts, for the quantizer · size: of the pictures, in pixels · steps ·
    batch: prompts at once · decode: latents [B, 16, H / 8, W / 8] as a sampler returns them -> pictures [B, 3, H, W] in
    0..1 · score: (pictures, number of the first prompt) -> name -> [B], what an observer finds in them · texts:
    of the evaluated prompts.
    """

    prompts: Sequence[Prompt]
    calibration: Sequence[Prompt]
    size: int
    steps: int
    batch: int
    decode: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, int], dict[str, Tensor]] = field(default=lambda pictures, first: {})
    texts: Sequence[str] = ()

    @property
    def batches(self) -> range:
        """Number of the first prompt of each."""
        return range(0, len(self.prompts), self.batch)


def conditioning(prompts: Sequence[Prompt]) -> list[list[Any]]:
    """ComfyUI's CONDITIONING with an entry for each prompt."""
    return [_conditioned([prompt]) for prompt in prompts]


def _conditioned(prompts: Sequence[Prompt]) -> list[Any]:
    extra: dict[str, Any] = {"pooled_output": torch.stack([prompt.pooled for prompt in prompts])}
    if prompts[0].guidance is not None:
        extra["guidance"] = prompts[0].guidance
    return [torch.stack([prompt.context for prompt in prompts]), extra]


def latents(patcher: Any, task: Task, first: int) -> Tensor:
    """float32 [B, C, H / 8, W / 8] on the CPU: the batch that begins with prompt ``first``.

    A prompt's number is the seed of its noise, so that a picture does not depend on its batch. All prompts have one
    guidance and one length.
    """
    prompts = task.prompts[first : first + task.batch]
    channels = patcher.get_model_object("latent_format").latent_channels
    one = torch.zeros(1, channels, task.size // 8, task.size // 8)
    noise = torch.cat([comfy.sample.prepare_noise(one, first + index) for index in range(len(prompts))])
    positive = [_conditioned(prompts)]
    return comfy.sample.sample(
        patcher, noise, task.steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise),
        disable_pbar=True, seed=first,
    ).float().cpu()  # fmt: skip


class Inputs:
    """TOKENS tokens of each call of the linears ``names``, at random places, always the same ones."""

    def __init__(self, names: Sequence[str]) -> None:
        self._batches: dict[str, list[list[Tensor]]] = {name: [] for name in names}
        self._generator = torch.Generator().manual_seed(0)

    @contextlib.contextmanager
    def watching(self, flux: nn.Module) -> Iterator[None]:
        """Record while the block runs, which is one batch of prompts."""
        with contextlib.ExitStack() as stack:
            for name, batches in self._batches.items():
                batches.append([])
                hook = flux.get_submodule(name).register_forward_pre_hook(partial(self._record, batches[-1]))
                stack.callback(hook.remove)
            yield

    def _record(self, calls: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        places = torch.randint(x.shape[1], (TOKENS,), generator=self._generator)
        calls.append(x[:, places.to(x.device)].float())

    def tokens(self) -> Iterator[tuple[str, Tensor]]:
        """(layer, float32 [P, tokens, K]) for the P prompts of all batches."""
        for name, batches in self._batches.items():
            yield name, torch.cat([torch.cat(calls, dim=1) for calls in batches])


def load(patcher: Any) -> nn.Module:
    """The Flux of a MODEL with its weights on the device that computes."""
    management.load_models_gpu([patcher])
    return patcher.model.diffusion_model
