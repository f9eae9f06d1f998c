"""ComfyUI inside a process of ours, started as its main.py does it. Imports nothing of ComfyUI or torch itself."""

from __future__ import annotations

import sys


def start_comfyui(folder: str, options: list[str]) -> bool:
    """Make the ComfyUI in ``folder`` importable, with its command line options; whether it has dynamic VRAM then.

    The order of imports and calls is that of main.py, where dynamic VRAM has to be set up before torch.
    """
    sys.path.insert(0, folder)
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy_aimdo.control
    from comfy.cli_args import enables_dynamic_vram

    if enables_dynamic_vram():
        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher

    dynamic = enables_dynamic_vram() and comfy_aimdo.control.init_devices(
        device.index for device in management.get_all_torch_devices()
    )
    if dynamic:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return bool(dynamic)
