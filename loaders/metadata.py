"""The metadata of an SVDQuant INT4 file, as the original project's merge tool writes it."""

from __future__ import annotations

import json

from .weights import FluxConfig


def merged_metadata(variant: str, config: FluxConfig, rank: int) -> dict[str, str]:
    """The four strings of a merged file. ``rank`` stands in quantization_config as the current merge tool writes it;
    the published r32 files are older and do not have it."""
    diffusers = {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.30.0.dev0",
        "_name_or_path": f"synthetic/flux.1-{variant}",
        "attention_head_dim": 128,
        "guidance_embeds": config.guidance_embed,
        "in_channels": config.in_channels,
        "joint_attention_dim": config.context_in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "patch_size": 1,
        "pooled_projection_dim": config.vec_in_dim,
    }
    if config.in_channels != config.out_channels:
        diffusers["out_channels"] = config.out_channels
    comfy = {
        "model_class": "Flux" if config.guidance_embed else "FluxSchnell",
        "model_config": {
            "axes_dim": [16, 56, 56],
            "context_in_dim": config.context_in_dim,
            "depth": config.depth,
            "depth_single_blocks": config.depth_single_blocks,
            "disable_unet_model_creation": True,
            "guidance_embed": config.guidance_embed,
            "hidden_size": config.hidden_size,
            "image_model": "flux",
            "in_channels": config.in_channels // 4,
            "mlp_ratio": 4.0,
            "num_heads": config.num_heads,
            "out_channels": 16,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config.vec_in_dim,
        },
    }
    codes = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    quantization = {"method": "svdquant", "weight": codes, "activation": codes, "rank": rank}
    return {
        "config": json.dumps(diffusers, indent=2) + "\n",
        "comfy_config": json.dumps(comfy, indent=2) + "\n",
        "model_class": "NunchakuFluxTransformer2dModel",
        "quantization_config": json.dumps(quantization),
    }
