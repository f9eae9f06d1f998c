"""The pack's nodes (ComfyUI V3 schema). Each reads its widgets, calls one function of a lower layer, and returns."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .demo_prompt import SVDQDemoPrompt
from .flux_loader import SVDQFluxLoader
from .flux_sampler import SVDQFluxSampler


class SVDQExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SVDQFluxLoader, SVDQFluxSampler, SVDQDemoPrompt]
