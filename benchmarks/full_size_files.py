"""Everything that FLUX.1-dev needs, at full size and with random weights: ``write_all(folder)``.

Text encoders and VAE have the shapes of ComfyUI's own classes, T5-XXL in fp8 as most people have it. Needs ComfyUI on
the path (comfyui_process.start_comfyui) and the clone importable as ``svdq``. Files that are there are kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory_caps import DENSE, QUANTIZED, SECOND

T5, CLIP_L, VAE = "t5xxl_fp8-random.safetensors", "clip_l-random.safetensors", "flux-vae-random.safetensors"
SIZES = {QUANTIZED: 6.8, SECOND: 6.8, DENSE: 23.8, T5: 4.9, CLIP_L: 0.25, VAE: 0.17}  # GB
_VAE_CONFIG = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
_REGULARIZER = "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"
_VALUES = 2**22  # random numbers that a file repeats


def write_all(folder: Path, dense: bool, second: bool, update: Callable[[str], None] = lambda text: None) -> None:
    """Write the files into ``folder``: 12 GB, 24 GB more with the dequantized twin (``dense``), 7 GB more with a second
    checkpoint."""
    import torch

    from svdq.cli.dequantize import dequantize
    from svdq.cli.synth import synth

    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[Path], object]] = {
        QUANTIZED: lambda path: synth(path, scale="full"),
        T5: lambda path: _write_random(path, _t5(), torch.float8_e4m3fn),
        CLIP_L: lambda path: _write_random(path, _clip_l(), torch.float16),
        VAE: lambda path: _write_random(path, _vae(), torch.bfloat16),
    }
    if second:
        makers[SECOND] = lambda path: synth(path, scale="full", seed=1)
    if dense:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        makers[DENSE] = lambda path: dequantize(folder / QUANTIZED, path, device=device)
    for name, make in makers.items():
        if not (folder / name).exists():
            update(f"writing {name}, {SIZES[name]} GB")
            make(folder / name)


def _t5() -> Any:
    import comfy.ops
    import comfy.text_encoders.t5 as t5

    config = json.loads(Path(t5.__file__).with_name("t5_config_xxl.json").read_text(encoding="utf-8"))
    return t5.T5(config, None, "meta", comfy.ops.manual_cast)


def _clip_l() -> Any:
    import comfy.clip_model as clip_model
    import comfy.ops

    config = json.loads(Path(clip_model.__file__).with_name("sd1_clip_config.json").read_text(encoding="utf-8"))
    return clip_model.CLIPTextModel(config, None, "meta", comfy.ops.manual_cast)


def _vae() -> Any:
    import torch
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    module = "comfy.ldm.modules.diffusionmodules.model"
    with torch.device("meta"):
        return AutoencodingEngine(
            regularizer_config={"target": _REGULARIZER},
            encoder_config={"target": f"{module}.Encoder", "params": _VAE_CONFIG},
            decoder_config={"target": f"{module}.Decoder", "params": _VAE_CONFIG},
        )


def _write_random(path: Path, model: Any, dtype: Any) -> None:
    """Random weights for ``model`` (its tensors may be on the meta device) that keep activations finite."""
    import torch
    from safetensors.torch import save_file

    noise = torch.randn(_VALUES, generator=torch.Generator().manual_seed(0))
    blocks: dict[float, torch.Tensor] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2:
            tensors[name] = torch.full(tensor.shape, 0 if name.endswith("bias") else 1, dtype=dtype)
            continue
        scale = max(math.prod(tensor.shape[1:]) ** -0.5, 2.0**-6)  # below that fp8 has no precision left
        if scale not in blocks:
            blocks[scale] = (noise * scale).to(dtype)
        count, start = tensor.numel(), 997 * len(tensors)
        whole = blocks[scale].repeat(-(-(start % _VALUES + count) // _VALUES))
        tensors[name] = whole[start % _VALUES :][:count].view(tensor.shape).clone()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
