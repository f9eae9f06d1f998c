"""A node that tests put into ComfyUI's custom_nodes: a model that runs out of memory in its second step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.patcher_extension
import torch

LINEARS = 20  # of a step on the CPU, before the one that fails


class OutOfMemory:
    """The model, of which the second step gets no memory: on a GPU really, on a CPU in the middle of a block."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        model, steps = model.clone(), []

        def step(executor: Any, *args: Any, **options: Any) -> Any:
            steps.append(None)
            if len(steps) != 2:
                return executor(*args, **options)
            with no_memory(model.load_device):
                return executor(*args, **options)

        model.add_wrapper(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, step)
        return (model,)


@contextmanager
def no_memory(device: torch.device) -> Iterator[None]:
    """Whatever asks for memory gets torch.OutOfMemoryError."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.0)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    linear, calls = torch.nn.functional.linear, []

    def fail(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) > LINEARS:
            raise torch.OutOfMemoryError("Allocation on device")
        return linear(*args, **options)

    torch.nn.functional.linear = fail
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


NODE_CLASS_MAPPINGS = {"TestOutOfMemory": OutOfMemory}
