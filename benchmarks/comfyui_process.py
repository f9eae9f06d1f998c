"""ComfyUI inside a process of ours, started as its main.py does it. Imports nothing of ComfyUI or torch itself."""

from __future__ import annotations

import sys
from collections.abc import Callable


def start_comfyui(folder: str, options: list[str], prepare: Callable[[], None] = lambda: None) -> bool:
    """Make the ComfyUI in ``folder`` importable, with its command line options; whether it has dynamic VRAM then.

    The order of imports and calls is that of main.py, where dynamic VRAM and torch's allocator have to be set up before
    torch is imported. ``prepare`` is called when torch may be, and before ComfyUI looks at the GPU.
    """
    sys.path.insert(0, folder)
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import enables_dynamic_vram

    if enables_dynamic_vram():
        comfy_aimdo.control.init()
    import cuda_malloc  # noqa: F401  chooses the allocator

    prepare()
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    dynamic = enables_dynamic_vram() and comfy_aimdo.control.init_devices(
        device.index for device in management.get_all_torch_devices()
    )
    if dynamic:
        comfy_aimdo.control.set_log_info()  # or every access to a weight is a line
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return bool(dynamic)


def finish_node() -> None:
    """What ComfyUI's executor does after each node."""
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_prefetch
    import comfy_aimdo.model_vbar

    if comfy.memory_management.aimdo_enabled:
        management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
