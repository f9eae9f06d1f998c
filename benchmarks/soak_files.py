"""The files of a soak: two small checkpoints, a VAE, and for each checkpoint LoRAs that are good or bad."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from soak_plan import LORAS, MODELS, NAMED, VAE, lora_name
from torch import Tensor

from svdq.cli import ROOT
from svdq.cli.synth import synth
from svdq.loaders import open_checkpoint
from svdq.quantizer.source import stock_shapes

OUTER = ("img_in", "txt_in", "final_layer.linear")  # 16 bits, patched by ComfyUI
SDXL = {"lora_unet_input_blocks_4_1_proj_in": (640, 640), "lora_unet_middle_block_1_proj_out": (1280, 1280)}

Shapes = Mapping[str, tuple[int, int]]


def write_models(models: Path, seed: int) -> None:
    """Fill ComfyUI's models folder."""
    folders = [models / kind for kind in ("diffusion_models", "vae", "loras")]
    for folder in folders:
        folder.mkdir(parents=True)
    diffusion, vae, loras = folders
    demo, other = MODELS
    shutil.copyfile(ROOT / "assets" / demo, diffusion / demo)
    shutil.copyfile(ROOT / "assets" / VAE, vae / VAE)
    synth(diffusion / other, "schnell", scale="tiny", seed=seed)
    sizes = {model: _linears(diffusion / model) for model in MODELS}
    for index, model in enumerate(MODELS):
        good = {kind: _good(kind, sizes[model], torch.Generator().manual_seed(seed + index)) for kind in LORAS}
        for kind, tensors in good.items():
            save_file(tensors, loras / lora_name(model, kind))
        content = (loras / lora_name(model, "all")).read_bytes()
        (loras / lora_name(model, "truncated")).write_bytes(content[: len(content) * 2 // 3])
        damaged = good["kohya"]
        next(iter(damaged.values())).view(-1)[-1] = torch.nan
        save_file(damaged, loras / lora_name(model, "nan"))
        generator = torch.Generator().manual_seed(seed)
        # Only of blocks: an outer layer may have as many values here as there, and ComfyUI does not look at more.
        wrong = {"sizes": _factors(_blocks(sizes[MODELS[1 - index]]), generator), "sdxl": _factors(SDXL, generator, "")}
        for kind in NAMED:
            save_file(wrong[kind], loras / lora_name(model, kind))


def _linears(path: Path) -> Shapes:
    """Shapes of the weights of a checkpoint's linears, by stock names."""
    shapes = stock_shapes(open_checkpoint(path).config)
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}


def _blocks(linears: Shapes) -> Shapes:
    """Those in blocks, which are quantized."""
    return {name: shape for name, shape in linears.items() if "blocks." in name}


def _good(kind: str, linears: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    """One of LORAS for a model."""
    blocks = _blocks(linears)
    if kind == "all":  # every quantized layer
        return _factors(blocks, generator)
    if kind == "kohya":
        some = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in list(blocks.items())[::3]}
        alphas = {f"{name}.alpha": torch.tensor(2.0, dtype=torch.float16) for name in some}
        return {key: value.half() for key, value in _factors(some, generator, "").items()} | alphas
    if kind == "parts":  # of the fused qkv, as diffusers has them
        hidden = next(iter(blocks.values()))[1]
        names = ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.add_v_proj",
                 "single_transformer_blocks.1.attn.to_q", "single_transformer_blocks.1.proj_mlp")  # fmt: skip
        rows = {"proj_mlp": 4 * hidden}
        some = {f"transformer.{name}": (rows.get(name.rpartition(".")[2], hidden), hidden) for name in names}
        factors = _factors(some, generator, "", rank=16)
        return {key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for key, v in factors.items()}
    if kind == "outer":  # 16-bit layers beside quantized ones
        return _factors({name: linears[name] for name in (*OUTER, *list(blocks)[:2])}, generator)
    tensors: dict[str, Tensor] = {}  # LoKr, which is not low rank
    for name, (n, k) in list(blocks.items())[1::2]:
        tensors[f"diffusion_model.{name}.lokr_w1"] = torch.randn(4, 4, generator=generator)
        tensors[f"diffusion_model.{name}.lokr_w2"] = torch.randn(n // 4, k // 4, generator=generator) * 0.01
    return tensors


def _factors(
    shapes: Shapes, generator: torch.Generator, prefix: str = "diffusion_model.", rank: int = 4
) -> dict[str, Tensor]:
    """Low-rank factors for weights of these shapes."""
    tensors: dict[str, Tensor] = {}
    for name, (n, k) in shapes.items():
        tensors[f"{prefix}{name}.lora_down.weight"] = torch.randn(rank, k, generator=generator) * k**-0.5
        tensors[f"{prefix}{name}.lora_up.weight"] = torch.randn(n, rank, generator=generator) * 0.1
    return tensors
