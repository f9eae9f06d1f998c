"""Figures of all configurations of one model, prompt by prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import metrics
from .configurations import Configuration
from .models import Models, Progress, dense_weight
from .sampling import Inputs, Task, latents, load

ORIGINAL = "original"


@dataclass
class Measured:
    """One configuration. values: figure -> [P], psnr_db, ssim, latent_sqnr_db, layer_sqnr_db and those of the task's
    score · weight_db, layer_db: layer -> SQNR of its weight and, for the inputs that it has in the original, of its
    output · pictures: float32 [P, 3, H, W] · bits: stored per weight · seconds: to make and to measure it."""

    values: dict[str, Tensor] = field(default_factory=dict)
    weight_db: dict[str, float] = field(default_factory=dict)
    layer_db: dict[str, float] = field(default_factory=dict)
    pictures: Tensor | None = None
    bits: float = 16.0
    seconds: float = 0.0


@dataclass
class Reference:
    """What configurations are compared with: the 16-bit weights computed in float32."""

    measured: Measured
    latents: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: dict[str, Tensor]


def measure(
    models: Models, task: Task, chosen: Mapping[str, Configuration], progress: Progress, pictures: bool = True
) -> dict[str, Measured]:
    """ORIGINAL and every configuration by name. pictures: False measures layers only."""
    with torch.inference_mode():
        progress("the original in float32")
        original = _reference(models, task, pictures)
        found = {ORIGINAL: original.measured}
        for name, configuration in chosen.items():
            start = time.monotonic()
            with models.running(configuration, progress) as patcher:
                progress(configuration.label)
                found[name] = _measure(patcher, task, original, pictures)
            found[name].bits, found[name].seconds = models.bits(configuration), time.monotonic() - start
    return found


def _reference(models: Models, task: Task, pictures: bool) -> Reference:
    inputs, measured = Inputs(models.w4a4), Measured(bits=32.0)
    flux, found = load(models.exact), []
    for first in task.batches:
        with inputs.watching(flux):
            found.append(latents(models.exact, task, first))
    tokens = dict(inputs.tokens())
    modules = {name: flux.get_submodule(name) for name in tokens}
    if pictures:
        _add_pictures(measured, torch.cat(found), task)
    return Reference(
        measured,
        torch.cat(found),
        tokens,
        {name: modules[name](x) for name, x in tokens.items()},
        {name: dense_weight(module) for name, module in modules.items()},
    )


def _measure(patcher: Any, task: Task, original: Reference, pictures: bool) -> Measured:
    measured = Measured()
    if pictures:
        found = torch.cat([latents(patcher, task, first) for first in task.batches])
        _add_pictures(measured, found, task)
        shown, exact = (values.to(patcher.load_device) for values in (measured.pictures, original.measured.pictures))
        measured.values |= {
            "psnr_db": metrics.psnr(shown, exact).cpu(),
            "ssim": metrics.ssim(shown, exact).cpu(),
            "latent_sqnr_db": metrics.sqnr(found, original.latents),
        }
    _add_layers(measured, load(patcher), patcher.model.get_dtype_inference(), original)
    return measured


def _add_pictures(measured: Measured, found: Tensor, task: Task) -> None:
    batches = []
    for first in task.batches:
        batches.append(task.decode(found[first : first + task.batch]).float().cpu().clamp(0, 1))
        for name, values in task.score(batches[-1], first).items():
            measured.values[name] = torch.cat([measured.values.get(name, values[:0]), values])
    measured.pictures = torch.cat(batches)


def _add_layers(measured: Measured, flux: nn.Module, dtype: torch.dtype, original: Reference) -> None:
    per_prompt = []
    for name, x in original.inputs.items():
        module, exact = flux.get_submodule(name), original.outputs[name]
        values = metrics.sqnr(module(x.to(dtype)).float(), exact)
        weight = original.weights[name]
        measured.layer_db[name] = values.mean().item()
        measured.weight_db[name] = metrics.sqnr(dense_weight(module)[None], weight[None]).item()
        per_prompt.append(values.cpu())
    measured.values["layer_sqnr_db"] = torch.stack(per_prompt).mean(dim=0)
