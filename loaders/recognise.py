"""Says what a file is when it is not an SVDQuant INT4 FLUX checkpoint, and what to do with it instead."""

from __future__ import annotations

from .safetensors_file import TensorInfo, problem

# (what it is, what to do with it) of a text encoder with weights of 4 bits, such as Nunchaku's T5.
FOUR_BIT_ENCODER = (
    "a 4-bit text encoder, which ComfyUI cannot read",
    "Use t5xxl_fp8_e4m3fn_scaled.safetensors or t5xxl_fp16.safetensors in its place",
)

_EXPECTED = "an SVDQuant INT4 FLUX checkpoint"
# What stands before the tensors of VAE and text encoders in a file that has model, VAE and text encoders.
_OTHER_PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")


def refuse_other_files(path: str, tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError if the tensors (stored name -> info) are recognisably something else."""
    keys = list(tensors)
    quantized = [key for key in keys if key.endswith(".qweight")]
    blocks = [key for key in quantized if key.startswith(("transformer_blocks.", "single_transformer_blocks."))]
    if blocks:
        _refuse_nvfp4(path, tensors)
        if not any(key.startswith("single_transformer_blocks.") for key in blocks):
            what = "an SVDQuant file without single_transformer_blocks: another model, such as Qwen-Image"
            raise problem(path, blocks[0], what, _EXPECTED, "Load it with a node for that model")
        return
    key, what, remedy = _describe(keys, quantized)
    raise problem(path, key, what, _EXPECTED, remedy)


def _refuse_nvfp4(path: str, tensors: dict[str, TensorInfo]) -> None:
    for key, info in tensors.items():
        if info.dtype.startswith("F8_") or key.endswith((".wtscale", ".wcscales")):
            raise problem(
                path, key, f"{info.dtype}: an NVFP4 checkpoint (svdq-fp4)", "INT4 (svdq-int4)",
                "Download the svdq-int4 file of the same model: it runs on every GPU, RTX 50 included",
            )  # fmt: skip


def _describe(keys: list[str], quantized: list[str]) -> tuple[str, str, str]:
    """(a telling key, what the file is, what to do with it)."""

    def first(*fragments: str) -> str | None:
        return next((key for key in keys if any(fragment in key for fragment in fragments)), None)

    if not keys:
        return "tensors", "none at all", "Download the file again"
    if key := next((key for key in quantized if "encoder.block." in key), None):
        return key, *FOUR_BIT_ENCODER
    if quantized:
        return quantized[0], "a quantized model that is not FLUX.1", "Load it with a node for that model"
    if key := first("lora", ".lokr_", ".hada_", ".oft_", ".dora_scale"):
        remedy = "Put it in models/loras and load it with the Load LoRA node (LoraLoaderModelOnly) behind this node"
        return key, "a LoRA", remedy
    if key := first("controlnet_blocks."):
        return key, "a ControlNet", "Put it in models/controlnet and load it with the Load ControlNet Model node"
    if key := first("ip_adapter"):
        return key, "an IP-Adapter", "Load it with the custom nodes that it is made for"
    model = first("model.diffusion_model.")
    if model and any(key.startswith(_OTHER_PARTS) for key in keys):
        remedy = "Put it in models/checkpoints and load it with the Load Checkpoint node"
        return model, "an all-in-one checkpoint of model, VAE and text encoders", remedy
    if key := first("double_blocks.", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"):
        return key, "a FLUX model that is not SVDQuant INT4", "Load it with the Load Diffusion Model node"
    if key := first("transformer_blocks.", "single_transformer_blocks."):
        return key, "FLUX blocks without INT4 weights", "Download the file again: its qweight tensors are missing"
    if key := first("x_embedder.", "context_embedder.", "time_text_embed."):
        return key, "the unquantized half of a legacy folder", "Choose the folder that holds it, not the file"
    if key := first("decoder.conv_in", "encoder.conv_in", "first_stage_model.", "taesd_decoder", "decoder.layers."):
        return key, "a VAE", "Load it with the Load VAE node"
    if key := first("encoder.block.", "text_model.encoder", "shared.weight", "model.embed_tokens"):
        return key, "a text encoder", "Load it with the Load CLIP (Dual) node (DualCLIPLoader)"
    return keys[0], "no tensor of a FLUX model", "Choose a svdq-int4 FLUX file"
