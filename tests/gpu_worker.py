"""One ComfyUI process in one memory mode: loads a checkpoint, runs it plain and with a LoRA, saves it and loads that,
reports. Started by tests.

    python gpu_worker.py COMFYUI CHECKPOINT OUT.pt LORA WEIGHTS -- [ComfyUI's own options]

WEIGHTS: as load_flux takes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    comfyui, checkpoint_path, out, lora_path, weights = sys.argv[1:6]
    options = sys.argv[sys.argv.index("--") + 1 :]
    sys.path.append(str(ROOT / "benchmarks"))
    from comfyui_process import start_comfyui

    start_comfyui(comfyui, options)
    import conftest  # noqa: F401  registers the package
    import torch

    torch.save(report(checkpoint_path, lora_path, weights, f"{out}.safetensors"), out)


def report(checkpoint_path: str, lora_path: str, weights: str, saved: str) -> dict:
    """Outputs (float32 tensors) and sizes (bytes) of one run. saved: where to write models."""
    import comfy.model_management as management
    import comfy.sd
    import comfy.utils
    import torch
    from flux_models import forward, inputs

    from svdq.loaders import open_checkpoint
    from svdq.model import load_flux
    from svdq.model.patcher import quantized_modules

    checkpoint = open_checkpoint(checkpoint_path)
    arguments = inputs(checkpoint, size=32, tokens=64)
    patcher = load_flux(checkpoint_path, weights=weights)
    on_gpu = patcher.load_device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    plain = forward(patcher, arguments)
    result = {
        "patcher": type(patcher).__name__,
        "dynamic": patcher.is_dynamic(),
        "file_bytes": checkpoint.file_bytes,
        "model_size": patcher.model_size(),
        "loaded_size": patcher.loaded_size(),
        "allocated": torch.cuda.memory_allocated() - before if on_gpu else 0,
        "plain": plain,
    }
    flux = patcher.model.diffusion_model
    blocks = [block for block in (*flux.double_blocks, *flux.single_blocks) if hasattr(block, "graphs")]
    if blocks:
        kept = blocks[0].kept
        result |= {"kept": kept.held, "counted": kept.counted(blocks)}
        # A block has a graph once its weights stayed where they were for three passes; dynamic VRAM brings them in one.
        for _ in range(3):
            assert torch.equal(forward(patcher, arguments), plain)
        result |= {"blocks": len(blocks), "graphs": blocks[0].graphs.count()}
    lora = comfy.utils.load_torch_file(lora_path)
    patched = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)[0]
    if patcher.is_dynamic():
        management.load_models_gpu([patched])
        signatures = [module._v_signature for module in quantized_modules(patched.model) if hasattr(module, "_v")]
        result |= {"paged": len(signatures), "forgotten": sum(signature is None for signature in signatures)}
    result["lora"] = forward(patched, arguments)
    result["plain_again"] = forward(patcher, arguments)
    if on_gpu:
        patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)
        result["after_partial_unload"] = forward(patcher, arguments, load=False)
    columns = {key: value for key, value in lora.items() if not key.endswith(".diff_b")}
    with_columns = comfy.sd.load_lora_for_models(patcher, None, columns, 0.8, 0)[0]
    result["columns"] = forward(with_columns, arguments)
    for key, model in (("saved", patcher), ("saved_lora", patched), ("saved_columns", with_columns)):
        # A file each: models of the earlier ones may still be read from them.
        path = f"{saved.removesuffix('.safetensors')}-{key}.safetensors"
        comfy.sd.save_checkpoint(path, model)
        result[key] = forward(load_flux(path), arguments)
    return result


if __name__ == "__main__":
    main()
