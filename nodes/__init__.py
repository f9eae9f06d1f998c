"""The pack's nodes (ComfyUI V3 schema). Each reads its widgets, calls one function of a lower layer, and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_api.latest import ComfyExtension, io

from .conditioning_files import SVDQLoadConditioning, SVDQSaveConditioning
from .demo_prompt import SVDQDemoPrompt
from .flux_loader import SVDQFluxLoader
from .flux_quantizer import SVDQFluxQuantize
from .flux_sampler import SVDQFluxSampler
from .migration import complete_prompt, register_replacements
from .nunchaku import (
    SVDQNunchakuFluxLoader,
    SVDQNunchakuLoraStack,
    SVDQNunchakuNoEquivalent,
    SVDQNunchakuTextEncoders,
)


class SVDQExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SVDQFluxLoader,
            SVDQFluxSampler,
            SVDQFluxQuantize,
            SVDQSaveConditioning,
            SVDQLoadConditioning,
            SVDQDemoPrompt,
        ]


class SVDQExtensionWithMigration(SVDQExtension):
    """Adds what workflows made for ComfyUI-nunchaku need.

    ``on_each_prompt``: registers a function that the server calls with the body of each POST to /prompt.
    """

    def __init__(self, on_each_prompt: Callable[[Callable[[dict[str, Any]], dict[str, Any]]], None]) -> None:
        self._on_each_prompt = on_each_prompt

    async def on_load(self) -> None:
        await register_replacements()
        self._on_each_prompt(complete_prompt)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *await super().get_node_list(),
            SVDQNunchakuFluxLoader,
            SVDQNunchakuLoraStack,
            SVDQNunchakuTextEncoders,
            SVDQNunchakuNoEquivalent,
        ]
